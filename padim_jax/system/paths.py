"""Paths of this machine and of object stores: what the two do differently.

`gs://bucket/...` and `s3://bucket/...` are `etils.epath` paths, all else are pathlib's. An
object store has no folders (a name's prefix is taken for one), no links and no renaming,
and each question is a request. A file appears there when it is closed, whole: so what is
written to either is made complete in memory or in a local file first.
"""

import contextlib
import errno
import hashlib
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

from padim_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

    Path: TypeAlias = pathlib.Path | epath.Path
else:
    # What both are. Importing etils takes 0.1 s, and few need it.
    Path = pathlib.PurePath

# The schemes that etils, TFDS and JAX share, and the package that fsspec takes for each.
SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}
# What operating systems put into folders that people look into: macOS, Windows, KDE, Synology,
# ext4. Never ours, and no sign that a folder is anybody else's.
_SYSTEM_FILES = {
    *(".DS_Store", ".directory", "@eaDir", "Thumbs.db", "desktop.ini", "lost+found"),
}
_OPEN = ".nfs"  # begins the names of removed files that are open somewhere
# Packages below them, whose errors are no OSErrors.
_CLIENTS = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "s3fs")


def parse(text: str, *, needed: bool = True) -> Path:
    """A path from what a person wrote; nothing is looked up there.

    Args:
      text: gs://bucket/..., s3://bucket/..., or a path of this machine, where ~ is home.
      needed: False takes a remote path even if the package to reach it is missing: it may
        never be used here.

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
    # If TensorFlow were there, epath would go through it: seconds to import, the whole of
    # the GPU's memory taken, other errors. To be set before epath is first asked.
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec
    from etils import epath
    from fsspec.config import conf

    # Listings would be kept for good, whatever other processes write meanwhile.
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
    """The object store of a path that is parsed already, and the path's name there."""
    import fsspec

    try:
        return fsspec.url_to_fs(text)
    except Exception as error:
        raise _failure(parse(text, needed=False), error) from error


def absolute(path: Path) -> Path:
    """The path for use from any folder; a remote one is that as it is."""
    # epath would put the current folder in front.
    return path.absolute() if isinstance(path, pathlib.Path) else path


def is_folder(path: Path) -> bool:
    """Whether there is a folder; on an object store: anything whose name starts with it.

    Raises:
      UserError: the object store does not answer, or refuses.
    """
    if isinstance(path, pathlib.Path):
        return path.is_dir()
    try:
        listing(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """The folders in a folder, and all else in it, each sorted; one request remotely.

    Raises:
      FileNotFoundError: there is none.
      NotADirectoryError: it is a file.
      UserError: the object store does not answer, or refuses.
    """
    if isinstance(folder, pathlib.Path):
        parts: tuple[list[Path], list[Path]] = ([], [])
        for path in sorted(folder.iterdir()):
            parts[0 if path.is_dir() else 1].append(path)
        return parts

    store, place = _store(str(folder))
    try:
        # Not epath's walk, which s3fs does not understand, nor its iterdir, which does not
        # tell folders from files.
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
        elif entry["size"]:  # else the empty object that some tools leave for a folder
            raise NotADirectoryError(errno.ENOTDIR, "is not a folder", str(folder))
    return sorted(folders), sorted(others)


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and the folders in it; links to folders are not followed.

    Raises:
      UserError: the object store does not answer, or refuses.
    """
    if isinstance(folder, pathlib.Path):
        yield from (path for path in folder.rglob("*") if not path.is_dir())
    else:
        folders, files = listing(folder)
        yield from files
        for below in folders:
            yield from files_below(below)


def glob(pattern: str) -> list[Path]:
    """The files of an object store that match, as Python's glob would have it.

    Args:
      pattern: gs:// or s3://; `**` stands for any depth. Names that begin with a dot match
        where the pattern has one.

    Raises:
      UserError: see `parse`; or the object store does not answer, or refuses.
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
    """Makes a folder and those above it; on an object store: makes sure one can write there.

    Raises:
      OSError: it cannot be made, or written to.
    """
    if isinstance(path, pathlib.Path):
        path.mkdir(parents=True, exist_ok=True)
        return
    probe = path / f".padim_jax-{secrets.token_hex(4)}"
    with _as_os_error(path):
        probe.write_bytes(b"")
        probe.unlink()


def write(path: Path, content: bytes) -> None:
    """Writes a file, and the folders above it where there are such things.

    It is there whole or, after a crash or an error, as it was; what a killed process leaves of
    it the next one's write replaces.

    Raises:
      OSError: it cannot be written; the error names it.
    """
    if not isinstance(path, pathlib.Path):
        path.write_bytes(content)  # there when it is whole
        return
    growing = growing_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        growing.unlink(missing_ok=True)
        with growing.open("xb") as file:  # and through no link that lies there
            file.write(content)
        growing.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            growing.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: pathlib.Path) -> None:
    """Make a file, or the names in a folder, outlast a power cut from now on.

    Raises:
      OSError: it is not there, or cannot be written.
    """
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def growing_file(path: pathlib.Path) -> pathlib.Path:
    """Return where a file is written until it is whole: by a name that nobody else gives."""
    # Short, as the name may be as long as one can be.
    mark = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    return path.with_name(f".{mark}.incomplete")


def is_growing(path: Path) -> bool:
    """Return whether a name is one that `growing_file` gives."""
    return re.fullmatch(r"\.[0-9a-f]{16}\.incomplete", path.name) is not None


_LONGEST_LINE = 100_000  # bytes; of what tells whose a file is


def first_line(path: Path) -> bytes:
    """Return a file's first line, or the beginning of a long one; b"" without a file."""
    try:
        with path.open("rb") as file:
            return file.readline(_LONGEST_LINE)
    except (FileNotFoundError, IsADirectoryError):
        return b""


def modified(path: Path) -> float:
    """When a file was written: seconds since 1970, by the clock of the place where it is."""
    if isinstance(path, pathlib.Path):
        return path.stat().st_mtime
    store, name = _store(str(path))
    return store.modified(name).timestamp()


def upload(local: pathlib.Path, remote: Path) -> None:
    """Copies a file to an object store, a piece at a time.

    Raises:
      OSError: it cannot be read, or written there.
    """
    from etils import epath

    with _as_os_error(remote):
        epath.Path(local).copy(remote, overwrite=True)


def download(remote: Path, local: pathlib.Path) -> None:
    """Copies a file from an object store, a piece at a time.

    Raises:
      OSError: it cannot be read there, or written here.
    """
    assert not isinstance(remote, pathlib.Path)
    with _as_os_error(remote):
        remote.copy(local, overwrite=True)


def move_folder(source: Path, target: Path, last: str) -> None:
    """Gives a folder another name, which is free; on an object store copies and removes it.

    Args:
      source: the folder.
      target: its new name.
      last: the file in it whose presence says that all is there: the last to be copied.
    """
    if isinstance(source, pathlib.Path):
        source.rename(target)
        return
    files = list(files_below(source))
    names = [path.relative_to(source).as_posix() for path in files]
    names = [name for name in names if name != last]
    store, _ = _store(str(source))
    if names:  # all at once; the data do not come here
        store.copy([str(source / name) for name in names], [str(target / n) for n in names])
    if source / last in files:
        store.copy(str(source / last), str(target / last))
    remove_folder(source)


def flush(folder: Path) -> None:
    """Sees to it that what is in a local folder, and its name, outlive a power cut."""
    if isinstance(folder, pathlib.Path):
        for path in (*folder.rglob("*"), folder, folder.parent):
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.close(file)


def is_system_file(name: str) -> bool:
    """Return whether an operating system puts files or folders of this name anywhere."""
    return name in _SYSTEM_FILES or name.startswith(("._", _OPEN))


def remove_folder(path: Path) -> None:
    """Removes a folder with all in it, if there is one; links in it, not what they lead to.

    On NFS a file that another process has open stays, as `.nfs...`, until that one closes it.
    A folder of nothing else goes out of the way, by the name of a growing file.

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
    """Makes sure that what is written below a folder of results is written there.

    Raises:
      UserError: it is a link to another place.
    """
    if isinstance(path, pathlib.Path) and path.is_symlink():
        raise UserError(
            f"{path}: is a link to {path.readlink()}; results are written and removed below "
            "their own folder only. Remove the link, or name another --workdir"
        )


def below(folder: Path, name: str) -> Path:
    """`folder / name`, for a name that may be a stranger's.

    Args:
      folder: where it has to be.
      name: a relative path with slashes.

    Raises:
      UserError: the name leads out of the folder.
    """
    if not is_below(name):
        raise UserError(f"{name!r}: leads out of {folder}, and is not written there")
    return folder / name


def is_below(name: str) -> bool:
    """Whether a relative path with slashes stays in the folder that it starts from."""
    parts = name.split("/")
    # On Windows a backslash is a slash, and C:x another disk's.
    foreign = os.name == "nt" and any(mark in name for mark in ("\\", ":"))
    return not foreign and "\0" not in name and ".." not in parts and parts[0] != ""


# What is wrong with a place, and not with this program.
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
    """Makes errors of the block that the place of a file is to blame for UserErrors.

    Clients of object stores raise all sorts of errors, of which most can be mended.
    """
    try:
        yield
    except Exception as error:
        if (reason := explanation(error)) is None:
            raise
        raise UserError(reason) from error


def explanation(error: BaseException, place: Path | None = None) -> str | None:
    """What to tell of an error of a disk's or an object store's; None of others.

    Args:
      error: the system's, a client's, or a library's that quotes the system's.
      place: where it was; None if the error knows.
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
    """The clients of object stores raise all sorts of errors."""
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
