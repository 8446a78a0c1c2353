"""Magnetic Tile Defects: five kinds of defects of magnetic tiles, and tiles without.

    root/MT_Free/Imgs/*.jpg, *.png
    root/MT_{Blowhole,Break,Crack,Fray,Uneven}/Imgs/*.jpg, *.png

A .png is the mask of the .jpg of the same name. No split is published: one in five of the
images without a defect is drawn for the test, as others are said to have done.

Huang et al., "Surface defect saliency of magnetic tile", The Visual Computer 36, 2020.
Licence: none is stated.
"""

import random

from padim_jax.data.files import image_files, quoted
from padim_jax.data.layouts.layout import Layout, require_no_category, require_root
from padim_jax.data.records import GOOD, Record
from padim_jax.errors import UserError
from padim_jax.system.paths import Path, is_folder

NAME = "Magnetic Tile Defects"
URL = "https://github.com/abin24/Magnetic-tile-defect-datasets."
FREE = "MT_Free"
DEFECTS = ("MT_Blowhole", "MT_Break", "MT_Crack", "MT_Fray", "MT_Uneven")
TESTED = 0.2  # fraction of the images without a defect


def magnetic_tile(root: Path, category: str = "", seed: int = 0) -> list[Record]:
    """List the images and split those without a defect.

    Args:
      root: folder that holds the MT_ folders.
      category: "", there are none.
      seed: seed of the split: `random.Random(seed).sample` of the sorted images draws the
        tested fifth.

    Returns:
      Records of train, then of test by folder, each sorted by path. The defect types are
      blowhole, break, crack, fray and uneven. Masks of images without a defect are not read.

    Raises:
      UserError: the root or one of the six folders is missing or holds no images; images and
        masks do not match; or a category is given.
    """
    require_no_category(NAME, category)
    categories(root)
    free = [path for path in image_files(root / FREE / "Imgs") if path.suffix.lower() != ".png"]
    if len(free) < 2:
        raise UserError(
            f"{root / FREE / 'Imgs'}: holds {len(free)} .jpg images; expected at least two, "
            "to fit and to test"
        )
    tested = set(random.Random(seed).sample(free, max(1, round(TESTED * len(free)))))

    def record(path: Path, mask: Path | None, defect_type: str) -> Record:
        return Record(
            split="train" if defect_type == GOOD and path not in tested else "test",
            image=path,
            mask=mask,
            label=int(defect_type != GOOD),
            defect_type=defect_type,
            relative_path=path.relative_to(root).as_posix(),
        )

    records = [record(path, None, GOOD) for path in free]
    for folder in DEFECTS:
        defect_type = folder.removeprefix("MT_").lower()
        pairs = _pairs(root / folder / "Imgs")
        records += [record(image, mask, defect_type) for image, mask in pairs.items()]
    return sorted(records, key=lambda record: record.split != "train")


def categories(root: Path) -> list[str]:
    """Return [""]: there are none. Raise UserError unless all folders are there."""
    require_root(root, NAME, f"{FREE}/Imgs and {DEFECTS[0]}/Imgs", URL)
    if missing := [name for name in (FREE, *DEFECTS) if not is_folder(root / name / "Imgs")]:
        raise UserError(
            f"{root / missing[0] / 'Imgs'}: no such folder. Expected {FREE}, "
            f"{', '.join(DEFECTS)} in config.dataset.root={root}, each with Imgs in it; "
            f"{NAME} comes from {URL}"
        )
    return [""]


LAYOUT = Layout(magnetic_tile, categories, lambda root, _: root)


def _pairs(folder: Path) -> dict[Path, Path]:
    """Return the images of a folder with their masks."""
    files = image_files(folder)
    masks = {path.stem: path for path in files if path.suffix.lower() == ".png"}
    images = {path.stem: path for path in files if path.suffix.lower() != ".png"}
    if len(images) + len(masks) < len(files) or images.keys() != masks.keys():
        single = [path for path in files if path.stem not in images.keys() & masks.keys()]
        raise UserError(
            f"{folder}: images and masks do not match"
            + (f": {quoted(single)} without the other" if single else " one to one")
            + "; expected a .png for each .jpg"
        )
    return {images[stem]: masks[stem] for stem in sorted(images)}
