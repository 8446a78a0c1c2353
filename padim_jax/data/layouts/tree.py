"""Datasets laid out like MVTec AD, up to names: one folder per defect type.

    root/category/train/good/*.png
    root/category/test/{good,<defect type>}/*.png
    root/category/ground_truth/<defect type>/<name>_mask.png

MVTec LOCO AD, MVTec 3D-AD, MVTec AD 2, BTAD and MPDD differ from it by the few names in a
`Tree`.
"""

import dataclasses
import difflib

from padim_jax.data.files import (
    by_stem,
    folders_only,
    holding_images,
    image_files,
    images_outside_folders,
    quoted,
    subfolders,
)
from padim_jax.data.layouts.layout import Layout, split_given
from padim_jax.data.records import GOOD, Record, Split
from padim_jax.errors import UserError
from padim_jax.system import paths
from padim_jax.system.paths import Path, is_folder

GROUND_TRUTH = "ground_truth"


@dataclasses.dataclass(frozen=True)
class Tree:
    """Names by which such datasets differ.

    Attributes:
      name: the dataset's name in messages.
      url: its source.
      published: its categories, in the order of the published tables.
      good: folder of normal images, in each split.
      validation: split of normal images that are not fitted; may be absent.
      test: split to evaluate on.
      unlisted: published folders of images that are intentionally not read.
      images: folder of images within that of a defect type; "" if it is the same.
      masks: folder of a defect type's masks, below the category's.
      mask: name of an image's mask, without suffix.
      several_masks: whether that is a folder of masks, whose union counts.
    """

    name: str
    url: str
    published: tuple[str, ...]
    good: str = GOOD
    validation: str = "validation"
    test: str = "test"
    unlisted: tuple[str, ...] = ()
    images: str = ""
    masks: str = GROUND_TRUTH + "/{type}"
    mask: str = "{stem}_mask"
    several_masks: bool = False

    @property
    def layout(self) -> Layout:
        """Return these functions, for `LAYOUTS`."""
        return Layout(
            split_given(self.records),
            self.categories,
            unused=self.unused,
            test=f"{self.test}/{self.good} and {self.test}/<defect type>",
        )

    def records(self, root: Path, category: str) -> list[Record]:
        """List the images of one category, by split, each sorted by path.

        Args:
          root: folder that holds the category folders.
          category: a folder below `root`: a published one or your own in the same layout.

        Returns:
          Records of train, validation, then test. The latter two may be absent: a model can
          still be fitted. Masks without an image, as in a part of the dataset, are ignored.

        Raises:
          UserError: the folder, the category, a split or a mask is missing, or images lie
            beside the folders that should contain them.
        """
        base = root / category
        if not is_folder(base):
            raise UserError(self._no_category(root, category))

        def normal(split: Split, folder: Path) -> list[Record]:
            return [
                Record(split, path, None, 0, GOOD, path.relative_to(root).as_posix())
                for path in image_files(folder / self.images)
            ]

        records = normal("train", base / "train" / self.good)
        if is_folder(base / self.validation / self.good):
            records += normal("validation", base / self.validation / self.good)
        if not (base / self.test).exists():
            return records
        defects = [
            folder for folder in folders_only(base / self.test) if folder.name != GROUND_TRUTH
        ]
        if not defects:
            raise UserError(
                f"{base / self.test}: holds no folder; expected {self.good} and one for each "
                "defect type"
            )
        for defect in defects:
            if defect.name == self.good:
                records += normal("test", defect)
                continue
            images = image_files(defect / self.images)
            masks = self._masks(base / self.masks.format(type=defect.name), images)
            records += [
                Record(
                    split="test",
                    image=path,
                    mask=masks[path],
                    label=1,
                    defect_type=defect.name,
                    relative_path=path.relative_to(root).as_posix(),
                )
                for path in images
            ]
        return records

    def unused(self, root: Path, category: str) -> list[Path]:
        """Return the folders of a category with images that `records` passes over, sorted.

        In train and validation these are all except the normal images' folder, and the split
        itself if images lie directly in it.

        Args:
          root: folder that holds the category folders.
          category: a folder below `root`.

        Returns:
          The folders.
        """
        base = root / category
        used = {"train", self.validation, self.test, GROUND_TRUTH, *self.unlisted}
        found = holding_images(base, used.__contains__)
        for split in filter(is_folder, (base / "train", base / self.validation)):
            found += [split] if images_outside_folders(split) else []
            found += holding_images(split, lambda name: name == self.good)
        return sorted(found)

    def categories(self, root: Path) -> list[str]:
        """Return the category folders, published ones first and in that order, others sorted.

        Raises:
          UserError: there is none.
        """
        found = self._found(root) if is_folder(root) else []
        if not found:
            raise UserError(
                f"config.dataset.root={root}: holds no category folder (with train/{self.good} "
                f"in it). {self.name} comes from {self.url}; expected one or more of "
                f"{', '.join(self.published)} there, or your own in the same layout"
            )
        return [name for name in self.published if name in found] + [
            name for name in found if name not in self.published
        ]

    def _found(self, root: Path) -> list[str]:
        return [path.name for path in subfolders(root) if is_folder(path / "train")]

    def _masks(self, folder: Path, images: list[Path]) -> dict[Path, Path]:
        if self.several_masks:
            there = {path.name: [path] for path in _folders(folder)}
        else:
            there = by_stem(folder)
        names = {path: self.mask.format(stem=path.stem) for path in images}
        if missing := [path for path in images if names[path] not in there]:
            what = "folder of ground-truth masks" if self.several_masks else "ground-truth mask"
            mask = folder / f"{names[missing[0]]}{'' if self.several_masks else '.png'}"
            more = f" (nor those of {quoted(missing[1:])})" if missing[1:] else ""
            raise UserError(
                f"{missing[0]}: its {what} {mask} does not exist{more}. {self.name}'s layout "
                "has one for every defective test image; for images without masks use the "
                "layout of --config=configs/folder.py"
            )
        for path in images:
            if len(found := there[names[path]]) > 1:
                raise UserError(
                    f"{path}: has more than one mask, {quoted(found)} in {folder}; keep one"
                )
        return {path: there[names[path]][0] for path in images}

    def _no_category(self, root: Path, category: str) -> str:
        if not is_folder(root):
            return (
                f"config.dataset.root={root}: no such folder. Expected {self.name}'s folder, "
                f"with {category}/train/{self.good} and {category}/{self.test} below it. Get "
                f"the data from {self.url} (free for research, after accepting its licence), "
                "unpack it there, or point --config.dataset.root at where it is"
            )
        found = self._found(root)
        known = found or (() if category in self.published else self.published)
        close = difflib.get_close_matches(category, known, n=1)
        guess = f"; did you mean {close[0]!r}?" if close else "."
        if not found:
            return (
                f"config.category={category!r}: no folder {root / category}{guess} {root} "
                f"holds no category folder (with train/{self.good} in it); {self.name} comes "
                f"from {self.url}"
            )
        return (
            f"config.category={category!r}: no folder {root / category}{guess} "
            f"Categories found in {root}: {', '.join(found)}"
        )


def _folders(folder: Path) -> list[Path]:
    try:
        return paths.listing(folder)[0]
    except (FileNotFoundError, NotADirectoryError):
        return []
