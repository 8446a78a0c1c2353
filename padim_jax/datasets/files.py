"""Listing and reading image files: the one rule for what counts as an image in a folder."""

import pathlib

from padim_jax.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def is_image(path: pathlib.Path) -> bool:
    """Whether the name is an image's (suffix, any case) and not a hidden file's."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def subfolders(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folders in `folder` except hidden ones, sorted by name.

    Raises:
      UserError: `folder` is no folder.
    """
    _require_folder(folder)
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The image files in `folder`, sorted by name.

    Raises:
      UserError: `folder` is no folder or holds no image, or there are images deeper
        below it, which would be left out.
    """
    _require_folder(folder)
    for below in subfolders(folder):
        if any(is_image(path) for path in below.iterdir()):
            raise UserError(
                f"{below}: holds images, but they are expected in {folder} itself; move them "
                "there or elsewhere"
            )
    found = sorted(path for path in folder.iterdir() if is_image(path))
    if not found:
        raise UserError(f"{folder}: holds no image; expected files {', '.join(IMAGE_SUFFIXES)}")
    return found


def read_file(path: pathlib.Path) -> bytes:
    """The bytes of a file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _require_folder(folder: pathlib.Path) -> None:
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}; expected a folder of images there")
