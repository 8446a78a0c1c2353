"""Standard streams: closed or full ones lose what is printed, and no results."""

import errno
import io
import os
import sys


def install() -> None:
    """Keep the process going whoever closes its standard streams, or whatever fills up.

    Streams that were closed before the start are opened to nowhere, so that no file gets
    their numbers, to which libraries print. Streams that are replaced already stay as they are.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is sys.__stdout__:
        sys.stdout = opened(1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = opened(2)


def opened(number: int) -> io.TextIOWrapper:
    """Return a text stream of a file descriptor that survives its reader and a full disk.

    Each line is written when it is complete, to files and pipes too: a log tells how far a
    process came that was killed.
    """
    like = sys.__stdout__ if sys.__stdout__ is not None else sys.__stderr__
    return io.TextIOWrapper(
        io.BufferedWriter(_Lasting(number, "wb", closefd=False)),
        encoding=like.encoding if like is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )


class _Lasting(io.FileIO):
    """A file descriptor that leads to nowhere from the first error in writing on."""

    def write(self, data: object) -> int:
        """Write bytes; those that cannot be written are lost."""
        try:
            return super().write(data)  # pyright: ignore[reportArgumentType]
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            # Who stops reading wants no more; a full disk is another matter.
            if self.fileno() != 2 and error.errno != errno.EPIPE:
                print(
                    f"warning: standard output cannot be written ({error.strerror}): what is "
                    "printed from here on is lost; results are written as always",
                    file=sys.stderr,
                )
            return len(memoryview(data).cast("B"))  # pyright: ignore[reportArgumentType]
