"""Standard streams: if closed or full, they lose output but no results."""

import errno
import io
import os
import sys


def install() -> None:
    """Keep the process running even if standard streams are closed or their disk is full.

    Streams that were closed before the start are opened to the null device, so that no file
    gets their numbers, to which libraries print. Streams that were already replaced stay
    unchanged.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stdout is sys.__stdout__:
        sys.stdout = opened(1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = opened(2)


def opened(number: int) -> io.TextIOWrapper:
    """Return a text stream of a file descriptor that survives its reader and a full disk.

    Each line is written when it is complete, also to files and pipes: a log shows how far a
    killed process came.
    """
    like = sys.__stdout__ if sys.__stdout__ is not None else sys.__stderr__
    return io.TextIOWrapper(
        io.BufferedWriter(_Lasting(number, "wb", closefd=False)),
        encoding=like.encoding if like is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )


class _Lasting(io.FileIO):
    """A file descriptor that is redirected to the null device at the first write error."""

    def write(self, data: object) -> int:
        """Write bytes; those that cannot be written are lost."""
        try:
            return super().write(data)  # pyright: ignore[reportArgumentType]
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            # A reader that stops wants no more output; a full disk needs a warning.
            if self.fileno() != 2 and error.errno != errno.EPIPE:
                print(
                    f"warning: standard output cannot be written ({error.strerror}): what is "
                    "printed from here on is lost; results are written as always",
                    file=sys.stderr,
                )
            return len(memoryview(data).cast("B"))  # pyright: ignore[reportArgumentType]
