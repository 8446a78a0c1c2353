"""Log records of libraries that repeat at length what this program says in a line."""

import contextlib
import logging
from collections.abc import Callable, Iterator

# Orbax and TensorFlow Datasets both log through absl's logger.
_LOGGER = "absl"


@contextlib.contextmanager
def held_back(library: str) -> Iterator[None]:
    """Hold back warnings and errors that a library logs in the block.

    If the block ends with an error, which says enough, the records are dropped;
    otherwise they are logged at the block's end.

    Args:
      library: name of a folder in the paths of its modules.
    """
    held: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or f"/{library}/" not in record.pathname:
            return True
        held.append(record)
        return False

    with _filtered(keep):
        yield
    for record in held:
        logging.getLogger(_LOGGER).handle(record)


@contextlib.contextmanager
def without(text: str) -> Iterator[None]:
    """Drop the block's log records whose message contains a text."""
    with _filtered(lambda record: text not in record.getMessage()):
        yield


@contextlib.contextmanager
def _filtered(keep: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    logger = logging.getLogger(_LOGGER)
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
