"""Listing and reading image files: the one rule for what counts as an image in a folder."""

import errno
import os
import pathlib
import stat
from collections.abc import Sequence

from padim_jax import paths
from padim_jax.errors import MachineError, UserError
from padim_jax.paths import Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

MAX_BYTES = 2**30  # of a file: more than the largest image takes that is decoded
# Of a file's name, in UTF-8. Results are called after it, with a few letters more, and file
# systems take 255.
MAX_NAME = 240
# What is wrong with the name or the link; of any other error the machine is the cause.
_FAULTS_OF_FILES = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EILSEQ),
}
_NO_FILES = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def is_image(path: Path) -> bool:
    """Whether the name is an image's (suffix, any case) and not a hidden file's."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def subfolders(folder: Path) -> list[Path]:
    """The folders in `folder` except hidden ones, sorted by name.

    Raises:
      UserError: `folder` is no folder.
    """
    return [path for path in _listing(folder)[0] if not path.name.startswith(".")]


def image_files(folder: Path) -> list[Path]:
    """The image files in `folder`, sorted by name.

    Raises:
      UserError: `folder` is no folder or holds no image, or there are images deeper
        below it, which would be left out.
    """
    folders, others = _listing(folder)
    for below in folders:
        if below.name.startswith("."):
            continue
        if any(is_image(path) for found in _listing(below) for path in found):
            raise UserError(
                f"{below}: holds images, but they are expected in {folder} itself; move them "
                "there or elsewhere"
            )
    found = sorted(path for path in [*folders, *others] if is_image(path))
    if not found:
        raise UserError(f"{folder}: holds no image; expected files {', '.join(IMAGE_SUFFIXES)}")
    return found


def folders_only(folder: Path) -> list[Path]:
    """The folders, of defect types, in a folder that should hold nothing else.

    Raises:
      UserError: `folder` is no folder, or images lie beside the folders.
    """
    if astray := images_outside_folders(folder):
        raise UserError(
            f"{astray[0]}: lies directly in {folder.name}/; expected a folder for each defect "
            f"type in between, as in {folder / 'bad' / astray[0].name}"
        )
    return subfolders(folder)


def images_outside_folders(folder: Path) -> list[Path]:
    """The image files that lie directly in `folder`, sorted by name; folders are none.

    Raises:
      UserError: `folder` is no folder.
    """
    return [path for path in _listing(folder)[1] if is_image(path)]


def by_stem(folder: Path) -> dict[str, list[Path]]:
    """The image files in `folder` by their names without suffix; none if it is no folder."""
    found: dict[str, list[Path]] = {}
    for name in sorted(file_names(folder)):
        path = folder / name
        if is_image(path):
            found.setdefault(path.stem, []).append(path)
    return found


def quoted(paths: Sequence[Path]) -> str:
    """The names of a few files, for a message, and how many more there are."""
    names = ", ".join(path.name for path in paths[:5])
    return names + f" and {len(paths) - 5} more" * (len(paths) > 5)


def file_names(folder: Path) -> set[str]:
    """The names of the files in `folder`; none if it is no folder."""
    try:
        found = paths.listing(folder)[1]
    except (FileNotFoundError, NotADirectoryError):
        return set()
    # A dangling link is none; an object store has no links.
    return {p.name for p in found if not isinstance(p, pathlib.Path) or p.is_file()}


def images_below(folder: Path) -> list[Path]:
    """What counts as an image anywhere below a folder, sorted.

    Links to folders are not followed. A folder that has an image's name and no image in it is
    among them, as in `image_files`, for whoever reads it to refuse.

    Raises:
      UserError: a folder cannot be listed.
    """
    if not isinstance(folder, pathlib.Path):
        return sorted(filter(is_image, paths.files_below(folder)))

    def refuse(error: OSError) -> None:
        raise _not_listed(error.filename, error) from error

    found, folders = [], []
    for place, below, others in os.walk(folder, onerror=refuse):
        here = pathlib.Path(place)
        found += filter(is_image, map(here.joinpath, others))
        folders += filter(is_image, map(here.joinpath, below))
    inside = {parent for path in found for parent in path.parents}
    return sorted([*found, *(path for path in folders if path not in inside)])


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
      MachineError: it cannot be read, which says nothing of the file; see there.
      UserError: it is no file (see `require_file`), is larger than `MAX_BYTES`, or has a name
        that results cannot have.
    """
    _require_name(path)
    try:
        if not isinstance(path, pathlib.Path):
            return path.read_bytes()
        require_file(path)
        # Does not wait, should it have become a pipe since.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= MAX_BYTES:
                return file.read(MAX_BYTES)
    except (OSError, ValueError) as error:  # of a zero byte in the name
        raise unreadable(path, error) from error
    raise UserError(
        f"{shown(path)}: {size} bytes; expected an image of at most {MAX_BYTES}. Make it "
        "smaller"
    )


def require_file(path: Path) -> None:
    """Makes sure that a path is a file to be read: reading a pipe or a device may not end.

    Raises:
      MachineError: the machine cannot tell.
      UserError: it is none. Nothing is asked of object stores.
    """
    if not isinstance(path, pathlib.Path):
        return
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        what = next((text for is_, text in _NO_FILES.items() if is_(status.st_mode)), "no file")
        raise UserError(
            f"{shown(path)}: {what}, not an image file; move it away or give it another name"
        )


def shown(path: Path | str) -> str:
    """A path for a message, in one line: what is not printable is written as an escape."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path)
    )


def _require_name(path: Path) -> None:
    try:
        length = len(path.name.encode())
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{shown(path)}: a name that is not UTF-8, which tables and reports cannot hold; "
            "rename it"
        ) from error
    if length > MAX_NAME:
        raise UserError(
            f"{shown(path)}: a name of {length} bytes; expected at most {MAX_NAME}, since "
            "results are named after it. Rename it"
        )


def unreadable(path: Path, error: OSError | ValueError) -> UserError:
    """Return the error to raise of a file that cannot be read."""
    reason, link = (isinstance(error, OSError) and error.strerror) or error, ""
    if isinstance(path, pathlib.Path) and isinstance(error, OSError) and path.is_symlink():
        link = f" (a link to {shown(path.readlink())})"
    # A store's errors may have no number, but the classes of Python that stand for it.
    missing = isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    own = isinstance(error, ValueError) or missing or error.errno in _FAULTS_OF_FILES
    return (UserError if own else MachineError)(
        f"{shown(path)}: cannot be read: {reason}{link}; make it readable, or leave it out"
    )


def _not_listed(folder: Path | str, error: OSError) -> UserError:
    return UserError(
        f"{shown(folder)}: cannot be listed: {error.strerror or error}; make it readable, or "
        "move it away"
    )


def _listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and all else in a folder; see `paths.listing`."""
    try:
        return paths.listing(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = isinstance(error, FileNotFoundError)
        what = "no such folder" if missing else "is not a folder"
        raise UserError(f"{folder}: {what}; expected a folder of images there") from error
    except OSError as error:
        raise _not_listed(folder, error) from error
