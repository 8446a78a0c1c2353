"""Listing and reading image files: the one rule for what counts as an image in a folder."""

import errno
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from padim_jax.errors import MachineError, UserError
from padim_jax.system import paths
from padim_jax.system.paths import Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")

MAX_BYTES = 2**30  # per file: more than the largest decodable image takes
# Of a file's name, in UTF-8. Results are named after it with a few more letters, and file
# systems allow 255.
MAX_NAME = 240
# Faults of the name or the link; all other errors are the machine's.
_FAULTS_OF_FILES = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EILSEQ),
}
# Private folders of desktops, network storage and file systems whose names have no leading dot.
_SYSTEM_FOLDERS = ("@eaDir", "__MACOSX", "lost+found")
_NO_FILES = {
    stat.S_ISDIR: "a folder",
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def is_image(path: Path) -> bool:
    """Return whether the name is an image's (suffix, any case) and not a hidden file's."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def is_hidden_folder(name: str) -> bool:
    """Return whether a folder name is hidden or a system's; such folders are not read."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in `folder` except hidden and system ones, sorted by name.

    Raises:
      UserError: `folder` is not a folder.
    """
    return [path for path in _listing(folder)[0] if not is_hidden_folder(path.name)]


def image_files(folder: Path) -> list[Path]:
    """Return the image files in `folder`, sorted by name.

    Raises:
      UserError: `folder` is not a folder or holds no image, or there are images in folders
        below it, which would be left out.
    """
    folders, others = _listing(folder)
    for below in folders:
        if is_hidden_folder(below.name):
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
    """Return the folders of defect types in a folder that should hold nothing else.

    Raises:
      UserError: `folder` is not a folder, or images lie beside the folders.
    """
    if astray := images_outside_folders(folder):
        raise UserError(
            f"{astray[0]}: lies directly in {folder.name}/; expected a folder for each defect "
            f"type in between, as in {folder / 'bad' / astray[0].name}"
        )
    return subfolders(folder)


def images_outside_folders(folder: Path) -> list[Path]:
    """Return the image files directly in `folder`, sorted by name; folders are excluded.

    Raises:
      UserError: `folder` is not a folder.
    """
    return [path for path in _listing(folder)[1] if is_image(path)]


def holding_images(folder: Path, read: Callable[[str], bool]) -> list[Path]:
    """Return the folders in `folder` that hold images at any depth, except those that are read.

    Args:
      folder: folder to search; the result is empty if it is not a folder.
      read: function that tells by its name whether a folder is read.

    Returns:
      The folders, sorted by name.
    """
    if not paths.is_folder(folder):
        return []
    return [
        path for path in subfolders(folder) if not read(path.name) and images_below(path)[0]
    ]


def by_stem(folder: Path) -> dict[str, list[Path]]:
    """Return the image files in `folder` by stem; none if it is not a folder."""
    found: dict[str, list[Path]] = {}
    for name in sorted(file_names(folder)):
        path = folder / name
        if is_image(path):
            found.setdefault(path.stem, []).append(path)
    return found


def quoted(paths: Sequence[Path]) -> str:
    """Return the names of a few files, for a message, and the number of others."""
    names = ", ".join(path.name for path in paths[:5])
    return names + f" and {len(paths) - 5} more" * (len(paths) > 5)


def file_names(folder: Path) -> set[str]:
    """Return the names of the files in `folder`; none if it is not a folder."""
    try:
        found = paths.listing(folder)[1]
    except (FileNotFoundError, NotADirectoryError):
        return set()
    # A dangling link is not a file; an object store has no links.
    return {p.name for p in found if not isinstance(p, pathlib.Path) or p.is_file()}


class Tree(NamedTuple):
    """Contents of a folder and of the folders below it.

    Attributes:
      images: POSIX path below the folder and entry of everything that has an image's name.
      hidden: hidden and system folders, which were not listed.
    """

    images: "list[tuple[str, os.DirEntry[str]]]"
    hidden: list[pathlib.Path]


def walk(
    root: pathlib.Path,
    refuse: Callable[[pathlib.Path, OSError], None],
    without: pathlib.Path | None = None,
    wanted: Callable[[pathlib.Path], bool] = is_image,
) -> Tree:
    """List a local folder and those below it, each once, in the order of their names.

    Links to folders are followed after all folders reached without a link; a folder
    that was already listed, as in a loop or by a second link, is left out. Hidden and system
    folders are not listed. A folder with an image's name is among the images if there is
    no image in it, so that reading it raises an error.

    Args:
      root: folder to start at, whatever its own name.
      refuse: called with a folder that cannot be listed, and the error.
      without: another folder not to list, however it is reached.
      wanted: function that tells which names are an image's.

    Returns:
      The images and the hidden folders.
    """
    left_out = None if without is None else f"{os.path.realpath(without)}/"
    images: list[tuple[str, os.DirEntry[str]]] = []
    hidden: list[pathlib.Path] = []
    named: list[tuple[str, os.DirEntry[str]]] = []  # folders with an image's name
    listed: set[str] = set()
    folders, links = [""], []
    while folders or links:
        prefix = folders.pop() if folders else links.pop(0)
        folder = root / prefix
        real = os.path.realpath(folder)
        if real in listed or (left_out and f"{real}/".startswith(left_out)):
            continue
        listed.add(real)
        try:
            # The complete listing first: the folder may vanish meanwhile.
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            refuse(folder, error)
            continue
        below: list[str] = []
        for entry in entries:
            is_folder, name = _is_folder(entry), f"{prefix}{entry.name}"
            if is_folder and is_hidden_folder(entry.name):
                hidden.append(folder / entry.name)
            elif is_folder:
                (links if entry.is_symlink() else below).append(f"{name}/")
                if is_image(pathlib.Path(entry.name)):
                    named.append((name, entry))
            elif wanted(pathlib.Path(entry.name)):
                images.append((name, entry))
        folders += reversed(below)
    inside = {name[: i + 1] for name, _ in images for i, c in enumerate(name) if c == "/"}
    images += [(name, entry) for name, entry in named if f"{name}/" not in inside]
    return Tree(images, hidden)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: reading it raises the error
        return False


def images_below(
    folder: Path, wanted: Callable[[pathlib.Path], bool] = is_image
) -> tuple[list[Path], list[Path]]:
    """Return the images anywhere below a folder and the folders passed over, sorted.

    Args:
      folder: folder to start at.
      wanted: see `walk`; for a local folder.

    Returns:
      The images, see `walk`; and the hidden and system folders that hold images.

    Raises:
      UserError: a folder cannot be listed.
    """
    if not isinstance(folder, pathlib.Path):
        images, hidden = _walk_remote(folder)
        return sorted(images), sorted(path for path in hidden if any(_walk_remote(path)[0]))

    def refuse(place: pathlib.Path, error: OSError) -> None:
        raise _not_listed(place, error) from error

    tree = walk(folder, refuse, wanted=wanted)
    return sorted(folder / name for name, _ in tree.images), with_images(tree.hidden)


def _walk_remote(root: Path) -> tuple[list[Path], list[Path]]:
    """Apply `walk` to an object store, which has no links: images, and hidden folders."""
    images: list[Path] = []
    hidden: list[Path] = []
    folders = [root]
    while folders:
        below, others = _listing(folders.pop())
        images += filter(is_image, others)
        for path in below:
            (hidden if is_hidden_folder(path.name) else folders).append(path)
    return images, hidden


def with_images(hidden: Iterable[pathlib.Path]) -> list[Path]:
    """Return the local folders that hold an image, sorted; unlistable ones are skipped."""

    def holds(folder: pathlib.Path) -> bool:
        places = os.walk(folder)
        return any(is_image(pathlib.Path(name)) for *_, names in places for name in names)

    return sorted(filter(holds, hidden))


def hidden_beside(images: Iterable[Path], root: Path) -> list[Path]:
    """Return hidden and system folders with images, in `root` and between it and some images.

    Args:
      images: files below `root`. Object stores are not searched: each folder would be a
        request.
      root: the folder.

    Returns:
      The folders, sorted.
    """
    places = {parent for path in images for parent in path.parents}
    local = [x for x in places if isinstance(x, pathlib.Path) and x.is_relative_to(root)]
    entries = (entry for folder in local for entry in folder.iterdir())
    return with_images(x for x in entries if is_hidden_folder(x.name) and x.is_dir())


def passed_over(hidden: Sequence[Path]) -> str:
    """Return a line that counts and names hidden and system folders with images, or ""."""
    if not hidden:
        return ""
    names = list(dict.fromkeys(shown(path.name) for path in hidden))
    more = ", ..." if len(names) > 5 else ""
    folders = "folder" if len(hidden) == 1 else "folders"
    return (
        f"passed over: {len(hidden)} hidden or system {folders} with images "
        f"({', '.join(names[:5])}{more})"
    )


def read_file(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
      MachineError: it cannot be read, which says nothing about the file; see there.
      UserError: it is not a file (see `require_file`), is larger than `MAX_BYTES`, or has a
        name that results cannot have.
    """
    _require_name(path)
    try:
        if not isinstance(path, pathlib.Path):
            return path.read_bytes()
        require_file(path)
        # Does not wait, should it have become a pipe meanwhile.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            # One byte more than expected, not the allowed maximum: that much memory is
            # allocated.
            data = file.read(size + 1) if size <= MAX_BYTES else b""
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise unreadable(path, error) from error
    if len(data) > size:
        raise MachineError(
            f"{shown(path)}: was written to while it was read; run the same command again when "
            "it is whole"
        )
    if size <= MAX_BYTES:
        return data
    raise UserError(
        f"{shown(path)}: {size} bytes; expected an image of at most {MAX_BYTES}. Make it "
        "smaller"
    )


def require_file(path: Path) -> None:
    """Require a regular file: reading a pipe or a device may not end.

    Raises:
      MachineError: the machine cannot tell.
      UserError: it is not a regular file. Object stores are not asked.
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
    """Return a path for a message, in one line, with unprintable characters escaped."""
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
    """Return the error to raise for a file that cannot be read.

    Args:
      path: path of the file.
      error: the original error.

    Returns:
      A UserError if the file is at fault, otherwise a MachineError.
    """
    reason, link = (isinstance(error, OSError) and error.strerror) or error, ""
    if isinstance(path, pathlib.Path) and isinstance(error, OSError) and path.is_symlink():
        link = f" (a link to {shown(path.readlink())})"
    # A store's errors may lack a number, but have the corresponding classes of Python.
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
    """Return the folders and all else in a folder; see `paths.listing`."""
    try:
        return paths.listing(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = isinstance(error, FileNotFoundError)
        what = "no such folder" if missing else "is not a folder"
        raise UserError(f"{folder}: {what}; expected a folder of images there") from error
    except OSError as error:
        raise _not_listed(folder, error) from error
