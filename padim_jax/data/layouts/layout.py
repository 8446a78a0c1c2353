"""Interface of all layouts, and errors shared by several."""

import dataclasses
from collections.abc import Callable

from padim_jax.data.records import Record
from padim_jax.errors import UserError
from padim_jax.system.paths import Path, is_folder


def _category_folder(root: Path, category: str) -> Path:
    return root / category


def _no_folders(root: Path, category: str) -> list[Path]:
    del root, category
    return []


@dataclasses.dataclass(frozen=True)
class Layout:
    """Folder structure of a dataset.

    Attributes:
      records: function of (root, category, seed) that lists the images. The seed is
        `dataset.seed`: it draws the split of a dataset published without one, and nothing else.
      categories: function of a root that lists the present categories that can be evaluated, in
        the published order; [""] for a dataset without categories. Raises UserError if there is
        none.
      folder: function of (root, category) that returns the folder without which the images are
        missing.
      unused: function of (root, category) that lists, sorted, the folders in and beside those
        of the splits whose images are not read; empty for a layout without such folders.
      test: where test images are expected, for messages; "" if that takes more words.
    """

    records: Callable[[Path, str, int], list[Record]]
    categories: Callable[[Path], list[str]]
    folder: Callable[[Path, str], Path] = _category_folder
    unused: Callable[[Path, str], list[Path]] = _no_folders
    test: str = ""


def split_given(records: Callable[[Path, str], list[Record]]) -> Callable[..., list[Record]]:
    """Adapt a function to `Layout.records`, for a dataset published with a split."""
    return lambda root, category, seed: records(root, category)


def require_root(root: Path, name: str, expected: str, url: str) -> None:
    """Require the root to be a folder.

    Args:
      root: the dataset's folder.
      name: the dataset's name.
      expected: files and folders expected below `root`.
      url: the dataset's source.

    Raises:
      UserError: it is not; states what should be there and its source.
    """
    if not is_folder(root):
        raise UserError(
            f"config.dataset.root={root}: no such folder. Expected {name}'s folder, with "
            f"{expected} below it. Get the data from {url}, unpack it there, or point "
            "--config.dataset.root at where it is"
        )


def require_no_category(name: str, category: str) -> None:
    """Raise UserError unless `category` is "", for a dataset without categories.

    Args:
      name: the dataset's name.
      category: the configured category.
    """
    if category:
        raise UserError(
            f"config.category={category!r}: {name} has no categories; expected "
            "--config.category=''"
        )
