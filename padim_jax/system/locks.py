"""One writer per place: locks of the operating system, released however their holder ends.

In a folder `.locks` beside the place lie a file that is locked and, while it is, one that
names the holder. Object stores have no locks: there nothing is locked, and the user must not
start two processes that write to one place.
"""

import contextlib
import datetime
import json
import os
import pathlib
import socket
from collections.abc import Iterator

import filelock

from padim_jax.errors import RemovedError, Stopped, UserError
from padim_jax.system import paths
from padim_jax.system.paths import Path

FOLDER = ".locks"
_LONGEST_REASON = 300  # characters of another error


@contextlib.contextmanager
def held(place: Path, process: int = 0) -> Iterator[None]:
    """Let no other process write to a place until the block's end.

    Args:
      place: file or folder, which need not exist.
      process: number of this process; of joined processes only the first holds the lock, for
        all.

    Raises:
      UserError: another process writes there, or nothing can be locked there.
      RemovedError: see `attempt`.
    """
    with attempt(place, process) as taken:
        if not taken:
            raise UserError(
                f"{place}: {_holder(_file(place))} is writing there; wait for its end, or name "
                "another --workdir (or --checkpoint)"
            )
        yield


@contextlib.contextmanager
def attempt(place: Path, process: int = 0, wait: bool = False) -> Iterator[bool]:
    """Lock a place until the block's end, and yield whether that succeeded.

    Args:
      place: see `held`.
      process: see `held`.
      wait: whether to wait for another process's end, after printing a line; the lock is then
        held.

    Yields:
      True if the lock is held.

    Raises:
      UserError: nothing can be locked there.
      RemovedError: the block ended with an error after the lock's file was removed.
    """
    if process > 0 or not isinstance(place, pathlib.Path):
        yield True
        return
    file = _file(place)
    lock, holder = filelock.FileLock(file), _holder_file(file)
    try:
        paths.make_folder(file.parent)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            if wait:
                print(f"{place}: waiting for {_holder(file)}, which is writing there")
                lock.acquire()
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{place.parent}: cannot be made a folder, or no file can be locked in it "
            f"({reason}); name another place with --workdir or --checkpoint"
        ) from error
    if not lock.is_locked:
        yield False
        return
    try:
        with contextlib.suppress(OSError):  # a full disk does not prevent locking
            paths.write(holder, json.dumps(_description()).encode())
        yield True
    except (RemovedError, Stopped):
        raise
    except Exception as error:
        if file.exists():
            raise
        # The folder was most likely removed as well, for which libraries raise arbitrary
        # errors.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
        if isinstance(error, UserError):
            reason = str(error)
        raise RemovedError(
            f"{place.parent}: was removed, or files in it, while this command was writing "
            f"there; leave the folder alone until it is done. The same command begins anew "
            f"({reason})"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        lock.release()


def _file(place: Path) -> pathlib.Path:
    assert isinstance(place, pathlib.Path)
    place = place.expanduser().resolve()  # one place by several names has one lock
    return place.parent / FOLDER / f"{place.name}.lock"


def _holder_file(lock: pathlib.Path) -> pathlib.Path:
    return lock.with_suffix(".json")


def _description() -> dict[str, str | int]:
    now = datetime.datetime.now(datetime.UTC)
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": now.isoformat(" ", "seconds"),
    }


def _holder(lock: pathlib.Path) -> str:
    try:
        said = json.loads(_holder_file(lock).read_text(encoding="utf-8"))
        return f"process {said['process']} on {said['host']} (since {said['since']})"
    except (OSError, ValueError, LookupError, TypeError):  # the holder has only just begun
        return "another process"
