"""Progress bars and lines on the terminal; silent in logs, and if a program asks for it."""

import contextlib
import contextvars
from collections.abc import Iterator

import tqdm

# Whether lines are printed, and bars shown.
_SHOWN: contextvars.ContextVar[tuple[bool, bool]] = contextvars.ContextVar(
    "shown", default=(True, True)
)


@contextlib.contextmanager
def showing(lines: bool, bars: bool) -> Iterator[None]:
    """Choose what is printed in the block, for a program with its own output.

    Args:
      lines: whether `say` prints.
      bars: whether progress bars are shown if standard error is a terminal.
    """
    token = _SHOWN.set((lines, bars))
    try:
        yield
    finally:
        _SHOWN.reset(token)


def bar(
    total: int, what: str, visible: bool = True, start: int = 0, unit: str = "img"
) -> tqdm.tqdm:
    """Return a progress bar; below another bar it disappears when it is closed.

    Args:
      total: number of steps.
      what: name of the bar.
      visible: False in all processes but the first.
      start: number of steps already done.
      unit: unit of a step.

    Returns:
      The bar.
    """
    quiet = None if visible and _SHOWN.get()[1] else True  # None: shown on a terminal only
    return tqdm.tqdm(
        total=total, initial=start, desc=what, unit=unit, disable=quiet, leave=None
    )


def say(text: str) -> None:
    """Print a line above the bars."""
    if _SHOWN.get()[0]:
        tqdm.tqdm.write(text)
