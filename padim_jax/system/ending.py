"""The end of the program: one line for a mistake, one for a warning, and the exit code."""

import contextlib
import os
import sys
import threading
import warnings
from typing import NoReturn, TextIO

from padim_jax.errors import DataWarning


def fail(message: str) -> NoReturn:
    """Print an error and exit with code 2."""
    print(f"error: {_printable(message)}", file=sys.stderr)
    # A save that failed may leave threads of Orbax's that wait five minutes for its folder.
    if any(type(thread).__name__ == "_SignalingThread" for thread in threading.enumerate()):
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(2)
    sys.exit(2)


def show_warnings(strict: bool) -> None:
    """Print each `DataWarning` as one line above the progress bars.

    Args:
      strict: whether to raise it instead.
    """
    warnings.simplefilter("error" if strict else "always", DataWarning)
    warnings.showwarning = _show


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if not issubclass(category, DataWarning):
        text = warnings.formatwarning(message, category, filename, lineno, line)
        (file or sys.stderr).write(text)
        return
    import tqdm

    tqdm.tqdm.write(f"warning: {_printable(str(message))}", file=sys.stderr)


def _printable(message: str) -> str:
    # Names of files may hold what a terminal would act on, or cannot print.
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)
