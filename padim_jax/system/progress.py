"""Progress bars and lines on the terminal: quiet in logs, and where a program asks for it."""

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
    """Choose what is printed in the block, for a program that has its own output.

    Args:
      lines: whether `say` prints.
      bars: whether there are progress bars, where standard error is a terminal.
    """
    token = _SHOWN.set((lines, bars))
    try:
        yield
    finally:
        _SHOWN.reset(token)


def bar(
    total: int, what: str, visible: bool = True, start: int = 0, unit: str = "img"
) -> tqdm.tqdm:
    """Return a progress bar; below another one it disappears when it is closed.

    Args:
      total: number of steps.
      what: name of the bar.
      visible: False in all processes but the first.
      start: number of steps that are done.
      unit: of a step.
    """
    quiet = None if visible and _SHOWN.get()[1] else True  # None: unless this is a terminal
    return tqdm.tqdm(
        total=total, initial=start, desc=what, unit=unit, disable=quiet, leave=None
    )


def say(text: str) -> None:
    """Print a line above the bars."""
    if _SHOWN.get()[0]:
        tqdm.tqdm.write(text)
