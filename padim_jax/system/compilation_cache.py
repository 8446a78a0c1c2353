"""Compiled programs on disk, so that later runs need not compile: JAX's persistent cache."""

import contextlib
import errno
import os
import pathlib
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from padim_jax.system import paths
from padim_jax.system.paths import Path

_LIMIT = 1 << 28  # bytes; JAX removes the least recently used. A run leaves 0.2 MB on CPUs.
_TRUSTED = (0,)  # users whose programs are run: root, who has other means
# How JAX's warnings begin, and what they mean.
_FAULTS = {
    "Error writing persistent compilation cache entry": "kept for the next run",
    "Error reading persistent compilation cache entry": "read, and are compiled again",
}


@contextlib.contextmanager
def enabled(folder: Path | None) -> Iterator[None]:
    """Keep what is compiled in the block, and load what earlier runs compiled.

    JAX's settings are restored afterwards. If they already name a folder, as
    JAX_COMPILATION_CACHE_DIR does, that folder is used and nothing is done here. A folder that
    is not writable, or that others may write to or replace, is reported on stderr and not used:
    results do not depend on it. On an object store only the store's own rules limit the
    folder's size and who may write to it.

    Args:
      folder: folder of the cache, created private if missing; None for no cache.
    """
    if folder is None or jax.config.jax_compilation_cache_dir is not None:
        yield
        return
    try:
        if isinstance(folder, pathlib.Path):
            # Private, as the XDG specification requires: programs stored here are run.
            for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
                missing.mkdir(mode=0o700, exist_ok=True)
            _require_private(folder)
            tempfile.TemporaryFile(dir=folder).close()
        else:
            paths.make_folder(folder)
    except OSError as error:
        _warn(folder, error.strerror)
        yield
        return
    settings = {
        "jax_compilation_cache_dir": str(folder),
        # JAX's lock for the removal is a local file.
        "jax_compilation_cache_max_size": _LIMIT if isinstance(folder, pathlib.Path) else -1,
        # Not only compilations of a second or more: a run has a dozen programs, all shorter.
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        # XLA's own caches are unbounded and add little.
        "jax_persistent_cache_enable_xla_caches": "none",
    }
    others = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    try:
        with _told_once(folder):
            yield
    finally:
        _configure(others)


def _require_private(folder: pathlib.Path) -> None:
    """Raise PermissionError if others may write to a folder, or replace it.

    Whoever writes here runs programs. The owner of a parent folder, or anyone who may write to
    it, can rename its entries, unless it is sticky (as /tmp). Links count by their own place
    and by their target's.
    """
    above = {*folder.absolute().parents, *folder.resolve().parents} - {folder}
    for place in (folder, *sorted(above, reverse=True)):
        status = place.stat()
        theirs = status.st_uid not in (os.geteuid(), *_TRUSTED)
        writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if theirs or (writable and (place == folder or not status.st_mode & stat.S_ISVTX)):
            raise PermissionError(
                errno.EPERM, f"others may write there, as {place} lets them, and it is run"
            )


@contextlib.contextmanager
def _told_once(folder: Path) -> Iterator[None]:
    """Reduce JAX's warnings of programs that it cannot keep or read to one line each."""
    with warnings.catch_warnings():
        show, told = warnings.showwarning, set[str]()

        def showwarning(message: Warning | str, *args: Any, **options: Any) -> None:
            fault = next((x for x in _FAULTS if str(message).startswith(x)), None)
            if fault is None:
                show(message, *args, **options)
            elif fault not in told:
                told.add(fault)
                _warn(folder, str(message).rpartition(": ")[2], _FAULTS[fault])

        warnings.showwarning = showwarning
        for fault in _FAULTS:
            warnings.filterwarnings("always", message=fault)
        yield


def _warn(folder: Path, reason: object, fault: str = "kept for the next run") -> None:
    print(
        f"warning: {folder}: compiled programs cannot be {fault} ({reason}); empty this "
        "folder, name another one with --config.cache.dir, or switch this off with "
        "--config.cache.compilation=False",
        file=sys.stderr,
    )


def _configure(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # otherwise the cache would keep its folder
