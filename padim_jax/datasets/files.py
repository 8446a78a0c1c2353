"""Listing and reading image files: the one rule for what counts as an image in a folder."""

import pathlib
from collections.abc import Sequence

from padim_jax import paths
from padim_jax.errors import UserError
from padim_jax.paths import Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


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


def read_file(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and all else in a folder; see `paths.listing`."""
    try:
        return paths.listing(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing = isinstance(error, FileNotFoundError)
        what = "no such folder" if missing else "is not a folder"
        raise UserError(f"{folder}: {what}; expected a folder of images there") from error
