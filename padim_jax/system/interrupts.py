"""Signals. Ctrl-C ends the process at once, whatever it is doing.

Python's default is an exception in the main thread. It waits for C++ to return, which may
compile or factorise for long, is swallowed by callbacks, destructors and imports, and ends in
a traceback. Here C's handler notifies a thread, which ends the process. Files on disk are
complete or absent, so this is as safe as a kill, which the next run handles anyway. SIGTERM
is reported to long computations, which save before they end.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

CODE = 130  # 128 + SIGINT, as shells have it
# Time for the last output, which may meet a full pipe.
_SECONDS = 1.0


def install() -> None:
    """Make Ctrl-C end this process with code 130; call once, in the main thread.

    If SIGINT is ignored, as for a shell's background jobs, it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda *_: None)  # its number still goes to the pipe
    threading.Thread(target=_end_on_interrupt, args=(reader,), daemon=True).start()


@contextlib.contextmanager
def sigterm() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGTERM came in the block, which continues."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # only the main thread can handle signals
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_on_interrupt(reader: int) -> None:
    while signal.SIGINT not in os.read(reader, 64):
        pass
    late = threading.Timer(_SECONDS, os._exit, (CODE,))
    late.daemon = True
    late.start()
    with contextlib.suppress(OSError):
        os.write(2, b"\ninterrupted\n")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(CODE)
