"""What every layout offers, and the errors that several share."""

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
    """How a dataset lies in its folders.

    Attributes:
      records: lists the images, of (root, category, seed). The seed is `dataset.seed`: it
        draws the split of a dataset that is published without one, and nothing else.
      categories: of a root, those that are there and can be evaluated, in the published
        order; [""] of a dataset without categories. Raises UserError if there is none.
      folder: of (root, category), the folder without which the images are not here.
      unused: of (root, category), the folders in and beside those of the splits that hold
        images which are not read, sorted; of a layout that has no room for such, none.
      test: where test images are expected, for messages; "" if that takes more words.
    """

    records: Callable[[Path, str, int], list[Record]]
    categories: Callable[[Path], list[str]]
    folder: Callable[[Path, str], Path] = _category_folder
    unused: Callable[[Path, str], list[Path]] = _no_folders
    test: str = ""


def split_given(records: Callable[[Path, str], list[Record]]) -> Callable[..., list[Record]]:
    """For `Layout.records`: of a dataset that is published with a split."""
    return lambda root, category, seed: records(root, category)


def require_root(root: Path, name: str, expected: str, url: str) -> None:
    """Raises UserError, with what should be there and its source, unless `root` is a folder."""
    if not is_folder(root):
        raise UserError(
            f"config.dataset.root={root}: no such folder. Expected {name}'s folder, with "
            f"{expected} below it. Get the data from {url}, unpack it there, or point "
            "--config.dataset.root at where it is"
        )


def require_no_category(name: str, category: str) -> None:
    """Raises UserError unless `category` is "": of a dataset that has none."""
    if category:
        raise UserError(
            f"config.category={category!r}: {name} has no categories; expected "
            "--config.category=''"
        )
