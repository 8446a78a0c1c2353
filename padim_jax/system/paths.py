"""Local paths and paths of object stores, and where they differ.

`gs://bucket/...` and `s3://bucket/...` are `etils.epath` paths, all others are pathlib's. An
object store has no folders (a prefix of names is treated as one), no links and no renaming,
and each query is a request. A file appears there complete, when it is closed: files for both
kinds are therefore completed in memory or in a local file first.
"""

import contextlib
import errno
import hashlib
import os
import pathlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from padim_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

    Path: TypeAlias = pathlib.Path | epath.Path
else:
    # The base of both. Importing etils takes 0.1 s, and few need it.
    Path = pathlib.PurePath

# Schemes that etils, TFDS and JAX share, and the package that fsspec uses for each.
SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}
# Files that operating systems add to folders: macOS, Windows, KDE, Synology, ext4. Never ours,
# and no sign that a folder belongs to somebody else.
_SYSTEM_FILES = {
    *(".DS_Store", ".directory", "@eaDir", "Thumbs.db", "desktop.ini", "lost+found"),
}
_OPEN = ".nfs"  # prefix of removed files that are open somewhere
# Packages of object stores whose errors are not OSErrors.
_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "s3fs")


def parse(text: str, *, needed: bool = True) -> Path:
    """Return a path from the user's text, without accessing it.

    Args:
      text: gs://bucket/..., s3://bucket/..., or a local path, where ~ is home.
      needed: False accepts a remote path even if the package to reach it is missing: it may
        never be used here.

    Returns:
      The path.

    Raises:
      UserError: another scheme, no bucket, a missing package, or no home.
    """
    scheme, separator, rest = text.partition(":")
    if scheme in SCHEMES and separator:
        if not rest.startswith("//") or not rest.strip("/"):
            raise UserError(f"{text}: expected a bucket's name, as in {scheme}://bucket/folder")
        return _remote(text, scheme, needed)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise UserError(
            f"{text}: files cannot be reached by {scheme}://; expected a path of this machine, "
            f"or one that starts with {' or '.join(f'{name}://' for name in SCHEMES)}"
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:  # no such user
        raise UserError(f"{text}: {error} Expected the path of a file or folder") from error


def _remote(text: str, scheme: str, needed: bool) -> "epath.Path":
    # If TensorFlow is installed, epath would use it: seconds to import, all GPU memory taken,
    # other errors. Must be set before epath is first used.
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec
    from etils import epath
    from fsspec.config import conf

    # Listings would be cached forever, even if other processes write meanwhile.
    for name in ("gs", "gcs", "s3"):
        conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    path = epath.Path(text)
    if needed:
        try:
            fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            raise _failure(path, error) from error
    return path


def _store(text: str) -> tuple[Any, str]:
    """Return the object store of a parsed path, and the path's name there."""
    import fsspec

    try:
        return fsspec.url_to_fs(text)
    except Exception as error:
        raise _failure(parse(text, needed=False), error) from error


def absolute(path: Path) -> Path:
    """Return the path for use from any folder; a remote path is absolute already."""
    # epath would prepend the current folder.
    return path.absolute() if isinstance(path, pathlib.Path) else path


def is_folder(path: Path) -> bool:
    """Return whether there is a folder; on an object store: any name with this prefix.

    Raises:
      UserError: the object store does not answer, or denies access.
    """
    if isinstance(path, pathlib.Path):
        return path.is_dir()
    try:
        listing(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders in a folder, and all else in it, each sorted; one request remotely.

    Raises:
      FileNotFoundError: there is none.
      NotADirectoryError: it is a file.
      UserError: the object store does not answer, or denies access.
    """
    if isinstance(folder, pathlib.Path):
        parts: tuple[list[Path], list[Path]] = ([], [])
        for path in sorted(folder.iterdir()):
            parts[0 if path.is_dir() else 1].append(path)
        return parts

    store, place = _store(str(folder))
    try:
        # Not epath's walk, which s3fs does not support, nor its iterdir, which does not
        # distinguish folders from files.
        entries = store.ls(place, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except Exception as error:
        raise _failure(folder, error) from error
    folders, others = [], []
    for entry in entries:
        name = entry["name"].rstrip("/")
        if name != place.rstrip("/"):
            kind = folders if entry["type"] == "directory" else others
            kind.append(folder / name.rpartition("/")[2])
        elif entry["size"]:  # otherwise the empty object that some tools leave for a folder
            raise NotADirectoryError(errno.ENOTDIR, "is not a folder", str(folder))
    return sorted(folders), sorted(others)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files in a folder and below; links to folders are not followed.

    Raises:
      UserError: the object store does not answer, or denies access.
    """
    if isinstance(folder, pathlib.Path):
        yield from (path for path in folder.rglob("*") if not path.is_dir())
    else:
        folders, files = listing(folder)
        yield from files
        for below in folders:
            yield from files_below(below)


def glob(pattern: str) -> list[Path]:
    """Return the files of an object store that match, as with Python's glob.

    Args:
      pattern: gs:// or s3://; `**` stands for any depth. Names that begin with a dot match only
        an explicit dot.

    Raises:
      UserError: see `parse`; or the object store does not answer, or denies access.
    """
    given = parse(pattern)
    store, place = _store(pattern)
    try:
        found = store.glob(place, detail=True)
    except Exception as error:
        raise _failure(given, error) from error
    names = sorted(name.strip("/") for name, info in found.items() if info["type"] == "file")
    if "/." not in pattern:
        names = [name for name in names if "/." not in name]
    scheme = pattern.partition("://")[0]
    return [parse(f"{scheme}://{name}") for name in names]


def make_folder(path: Path) -> None:
    """Create a folder and its parents; on an object store: check that it is writable.

    Raises:
      OSError: it cannot be created, or written to.
    """
    if isinstance(path, pathlib.Path):
        path.mkdir(parents=True, exist_ok=True)
        return
    probe = path / f".padim_jax-{secrets.token_hex(4)}"
    with _as_os_error(path):
        probe.write_bytes(b"")
        probe.unlink()


def write(path: Path, content: bytes) -> None:
    """Write a file, and create the folders above it where folders exist; see `replacing`.

    Args:
      path: file to write.
      content: its bytes.

    Raises:
      OSError: it cannot be written; the error names it.
    """
    if not isinstance(path, pathlib.Path):
        path.write_bytes(content)  # visible only when complete
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as growing, growing.open("xb") as file:  # do not follow a link there
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path, growing: pathlib.Path | None = None) -> Iterator[pathlib.Path]:
    """Yield the path of a file to write, which replaces another one at the block's end.

    After a crash or an error that file is complete or unchanged; the next write replaces
    leftovers of a killed process.

    Args:
      path: file to replace, local or in an object store.
      growing: local file in the same folder, for several writers of one `path`; None for
        `growing_file`.

    Raises:
      OSError: it cannot be written; the error names `path`.
    """
    if not isinstance(path, pathlib.Path):
        with tempfile.TemporaryDirectory() as folder:
            local = pathlib.Path(folder, path.name)
            yield local
            upload(local, path)
        return
    growing = growing or growing_file(path)
    try:
        growing.unlink(missing_ok=True)
        yield growing
        growing.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            growing.unlink()
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def sync(path: pathlib.Path) -> None:
    """Flush a file, or the names in a folder, to disk, to survive a power cut.

    Raises:
      OSError: it does not exist, or cannot be written.
    """
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def growing_file(path: pathlib.Path) -> pathlib.Path:
    """Return the path of a file while it is written, with a name that nobody else uses."""
    # Short, as the file's name may have the maximum length.
    mark = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    return path.with_name(f".{mark}.incomplete")


def is_growing(path: Path) -> bool:
    """Return whether a name was made by `growing_file`."""
    return re.fullmatch(r"\.[0-9a-f]{16}\.incomplete", path.name) is not None


_LONGEST_LINE = 100_000  # bytes; of the line that identifies a file's owner


def first_line(path: Path) -> bytes:
    """Return a file's first line, or the beginning of a long one; b"" without a file."""
    try:
        with path.open("rb") as file:
            return file.readline(_LONGEST_LINE)
    except (FileNotFoundError, IsADirectoryError):
        return b""


def modified(path: Path) -> float:
    """Return a file's modification time in seconds since 1970, by the clock of its storage."""
    if isinstance(path, pathlib.Path):
        return path.stat().st_mtime
    store, name = _store(str(path))
    return store.modified(name).timestamp()


def upload(local: pathlib.Path, remote: Path) -> None:
    """Copy a file to an object store, in pieces.

    Args:
      local: file to copy.
      remote: path to write.

    Raises:
      OSError: it cannot be read, or written there.
    """
    from etils import epath

    with _as_os_error(remote):
        epath.Path(local).copy(remote, overwrite=True)


def download(remote: Path, local: pathlib.Path) -> None:
    """Copy a file from an object store, in pieces.

    Args:
      remote: file to copy.
      local: path to write.

    Raises:
      OSError: it cannot be read there, or written here.
    """
    assert not isinstance(remote, pathlib.Path)
    with _as_os_error(remote):
        remote.copy(local, overwrite=True)


def move_folder(source: Path, target: Path, last: str) -> None:
    """Rename a folder to an unused name; on an object store copy and remove it.

    Args:
      source: the folder.
      target: its new name.
      last: file in it that marks completeness: the last to be copied.
    """
    if isinstance(source, pathlib.Path):
        source.rename(target)
        return
    files = list(files_below(source))
    names = [path.relative_to(source).as_posix() for path in files]
    names = [name for name in names if name != last]
    store, _ = _store(str(source))
    if names:  # all at once, within the store
        store.copy([str(source / name) for name in names], [str(target / n) for n in names])
    if source / last in files:
        store.copy(str(source / last), str(target / last))
    remove_folder(source)


def flush(folder: Path) -> None:
    """Flush a local folder's contents, and its name, to disk, to survive a power cut."""
    if isinstance(folder, pathlib.Path):
        for path in (*folder.rglob("*"), folder, folder.parent):
            sync(path)


def is_system_file(name: str) -> bool:
    """Return whether operating systems put files or folders of this name anywhere."""
    return name in _SYSTEM_FILES or name.startswith(("._", _OPEN))


def remove_folder(path: Path) -> None:
    """Remove a folder and its contents, if it exists; links in it, but not their targets.

    On NFS a file that another process has open stays, as `.nfs...`, until it is closed.
    A folder with nothing else in it is renamed to the name of a growing file.

    Raises:
      UserError: see `require_no_link`.
      OSError: something in it cannot be removed.
    """
    if not isinstance(path, pathlib.Path):
        path.rmtree(missing_ok=True)
        return
    require_no_link(path)
    aside = growing_file(path)
    for folder in (path, aside):  # the latter of an earlier removal
        shutil.rmtree(folder, ignore_errors=True)
    if not path.exists():
        return
    if any(not left.name.startswith(_OPEN) for left in files_below(path)):
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)  # raises what was ignored
    elif not is_growing(path):
        if aside.exists():
            aside = growing_file(path.with_name(secrets.token_hex(8)))
        path.rename(aside)


def require_no_link(path: Path) -> None:
    """Require that files written below a folder of results are stored there.

    Raises:
      UserError: it is a link to another place.
    """
    if isinstance(path, pathlib.Path) and path.is_symlink():
        raise UserError(
            f"{path}: is a link to {path.readlink()}; results are written and removed below "
            "their own folder only. Remove the link, or name another --workdir"
        )


def below(folder: Path, name: str) -> Path:
    """Return `folder / name`, for an untrusted name.

    Args:
      folder: folder that must contain the path.
      name: relative path with slashes.

    Returns:
      The path.

    Raises:
      UserError: the name leads out of the folder.
    """
    if not is_below(name):
        raise UserError(f"{name!r}: leads out of {folder}, and is not written there")
    return folder / name


def is_below(name: str) -> bool:
    """Return whether a relative path with slashes stays in its starting folder."""
    parts = name.split("/")
    # On Windows a backslash is a slash, and C:x is on another disk.
    foreign = os.name == "nt" and any(mark in name for mark in ("\\", ":"))
    return not foreign and "\0" not in name and ".." not in parts and parts[0] != ""


# Faults of a place, not of this program, and advice.
_ADVICE = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EFBIG: "files may not be so large there (ulimit -f?)",
    errno.EROFS: "name another place",
    errno.EACCES: "see to the permissions, or name another place",
    errno.EPERM: "see to the permissions, or name another place",
    errno.EIO: "the disk or the network fails",
    errno.ESTALE: "the disk or the network fails",
    errno.ENODEV: "the disk or the network fails",
    errno.ENAMETOOLONG: "use shorter names",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "allow more open files",
}


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Convert the block's errors that are the fault of a file's place to UserErrors.

    Clients of object stores raise many types of errors, most of which the user can fix.
    """
    try:
        yield
    except Exception as error:
        if (reason := explanation(error)) is None:
            raise
        raise UserError(reason) from error


def explanation(error: BaseException, place: Path | None = None) -> str | None:
    """Return the message for an error of a disk or an object store; None for others.

    Args:
      error: error of the system, of a client, or of a library that quotes the system's.
      place: place of the error; None if the error names it.

    Returns:
      The message with advice, or None.
    """
    code = error.errno if isinstance(error, OSError) else None
    if code not in _ADVICE and place is not None:
        code = next((code for code in _ADVICE if os.strerror(code) in str(error)), None)
    if code in _ADVICE:
        where = place or getattr(error, "filename", None) or "a file"
        return f"{where}: cannot be read or written: {os.strerror(code)}; {_ADVICE[code]}"
    modules = [cls.__module__.partition(".")[0] for cls in type(error).__mro__]
    client = next((module for module in modules if module in _CLIENTS), None)
    if client is None:
        return None
    return (
        f"{client}, which reaches gs:// and s3:// paths: {type(error).__name__}: {error}. "
        "Check the network, the bucket's name and that you may use it (credentials)"
    )


@contextlib.contextmanager
def _as_os_error(path: Path) -> Iterator[None]:
    """Convert errors of object stores' clients, which are of many types, to OSErrors."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}", str(path)) from error


def _failure(path: Path, error: Exception) -> UserError:
    scheme = str(path).partition(":")[0]
    if isinstance(error, ImportError):
        return UserError(
            f"{path}: {scheme}:// paths need the package {SCHEMES[scheme]}, which is not "
            f"installed ({error}); install it, or padim-jax[{scheme}], which brings it"
        )
    return UserError(
        f"{path}: cannot be reached ({type(error).__name__}: {error}). Check the network, the "
        "bucket's name and that you may use it (credentials)"
    )
