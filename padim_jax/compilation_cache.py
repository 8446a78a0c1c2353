"""Compiled programs on disk, so that a second run need not compile: JAX's persistent cache.

JAX names an entry after the program, its own version and the machine, and loads whatever
lies there under that name. Damage is found by decompressing it only where that has a
checksum: with zstandard installed, a flipped bit has crashed the program and has changed
a result. So each entry gets a seal at the end of the run that wrote it, and what has no
seal that fits is gone before the next run looks.
"""

import contextlib
import errno
import hashlib
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

from padim_jax import paths
from padim_jax.config import CacheConfig
from padim_jax.paths import Path

_LIMIT = 1 << 28  # bytes; JAX removes the least recently used. A run leaves 0.2 MB on CPUs.
_ENTRY, _SEAL = "-cache", "-sha256"  # JAX's suffix and ours
_TRUSTED = (0,)  # users whose programs are run: root, who has other means
_UNKEPT = "Error writing persistent compilation cache entry"  # JAX's warning
_USED = "-atime"  # JAX's, of when an entry was last asked for


@contextlib.contextmanager
def enabled(config: CacheConfig) -> Iterator[None]:
    """Keeps what is compiled in the block, and takes from the folder what is there already.

    JAX's settings are as before afterwards. If they name a folder already, as
    JAX_COMPILATION_CACHE_DIR does, that one is used and nothing is done here. A folder
    that cannot be written to, or that others may write to or replace, is told on stderr and
    not used: results do not depend on it. On an object store nothing bounds the folder but the
    store's own rules, which also say who may write there.

    Raises:
      UserError: there is no folder for it; see `CacheConfig.folder`.
    """
    if not config.compilation or jax.config.jax_compilation_cache_dir is not None:
        yield
        return
    folder = config.folder / "compilation"
    try:
        if isinstance(folder, pathlib.Path):
            # As private as the XDG specification wants it: what lies here is run.
            for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
                missing.mkdir(mode=0o700, exist_ok=True)
            _require_private(folder)
            tempfile.TemporaryFile(dir=folder).close()
        else:
            paths.make_folder(folder)
        _remove_unsealed(folder)
    except OSError as error:
        _warn(folder, error.strerror)
        yield
        return
    before = {path.name for path in folder.glob(f"*{_ENTRY}")}
    local = isinstance(folder, pathlib.Path)
    settings = {
        "jax_compilation_cache_dir": str(folder),
        # JAX's lock for the removal is a file of this machine.
        "jax_compilation_cache_max_size": _LIMIT if local else -1,
        # Not only what took a second: a run has a dozen programs, all below.
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        # XLA's own caches have no bound, no seal, and little to add.
        "jax_persistent_cache_enable_xla_caches": "none",
    }
    others = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    try:
        with _told_once(folder):
            yield
    finally:
        _configure(others)
        with contextlib.suppress(OSError):  # what has no seal is compiled again
            for path in folder.glob(f"*{_ENTRY}"):
                # JAX, which counts uses where it has a bound, begins to when the entry is
                # whole: one without may be half of what a killed process or a full disk left.
                if path.name not in before and (not local or _used(path).exists()):
                    _seal(path).write_bytes(_digest(path))


def _require_private(folder: pathlib.Path) -> None:
    """Raise PermissionError where others may write to a folder, or put another in its place.

    A seal tells damage, and not who wrote an entry: whoever writes here runs programs. Who
    owns a folder above, or may write to it, can rename what is in it, unless it is sticky (as
    /tmp). Links count by where they lie and by where they lead.
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
    """JAX warns of every program that it cannot keep: one line does, however many they are."""
    with warnings.catch_warnings():
        show, told = warnings.showwarning, False

        def showwarning(message: Warning | str, *args: Any, **options: Any) -> None:
            nonlocal told
            if not str(message).startswith(_UNKEPT):
                show(message, *args, **options)
            elif not told:
                told = True
                _warn(folder, str(message).rpartition(": ")[2])

        warnings.showwarning = showwarning
        warnings.filterwarnings("always", message=_UNKEPT)
        yield


def _warn(folder: Path, reason: object) -> None:
    print(
        f"warning: {folder}: compiled programs cannot be kept for the next run ({reason}); "
        "name another folder with --config.cache.dir, or switch this off with "
        "--config.cache.compilation=False",
        file=sys.stderr,
    )


def _configure(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # which would stay with the folder it has


def _remove_unsealed(folder: Path) -> None:
    for path in folder.glob(f"*{_ENTRY}"):
        with contextlib.suppress(FileNotFoundError):  # another process removes it, too
            if not _seal(path).is_file() or _seal(path).read_bytes() != _digest(path):
                path.unlink()
    for seal in folder.glob(f"*{_SEAL}"):
        if not _entry(seal).is_file():
            seal.unlink(missing_ok=True)


def _seal(entry: Path) -> Path:
    return entry.with_name(entry.name.removesuffix(_ENTRY) + _SEAL)


def _used(entry: Path) -> Path:
    return entry.with_name(entry.name.removesuffix(_ENTRY) + _USED)


def _entry(seal: Path) -> Path:
    return seal.with_name(seal.name.removesuffix(_SEAL) + _ENTRY)


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
