"""KolektorSDD2, the Kolektor Surface-Defect Dataset 2.

    root/train/{10000.png, 10000_GT.png, ..}
    root/test/{20000.png, 20000_GT.png, ..}

All images have a mask; only an empty mask tells that an image has no defect. 246 training
images have a defect: they are not listed, because a model is fitted to normal images.

Božič, Tabernik and Skočaj, "Mixed supervision for surface-defect detection: from weakly to
fully supervised learning", Computers in Industry 129, 2021. Licence: see docs/datasets.md.
"""

import concurrent.futures

from padim_jax.data.files import image_files, quoted, read_file
from padim_jax.data.layouts.layout import Layout, require_no_category, require_root, split_given
from padim_jax.data.records import GOOD, Record, Split
from padim_jax.errors import UserError
from padim_jax.system.paths import Path

NAME = "KolektorSDD2"
URL = "https://www.vicos.si/resources/kolektorsdd2/"
MASK = "_GT"
DEFECT = "defect"
# Left in the published archive by mistake: the same as 10301.png and 10301_GT.png.
COPIES = ("10301 (copy).png", "10301_GT (copy).png")


def ksdd2(root: Path, category: str = "") -> list[Record]:
    """List the images: normal ones of train, then all of test, each sorted by path.

    All masks are read and decoded, in threads, to see whether they are empty: one or two
    seconds for the published dataset.

    Args:
      root: folder that holds train and test.
      category: "", there are none.

    Returns:
      The records; the defect type is "defect". Images without a defect have no mask. The two
      `COPIES` are left out. Without `test` only train is listed, which suffices to fit a model.

    Raises:
      UserError: the root or train is missing; an image lacks a mask, or a mask an image; a mask
        cannot be read; no normal image is left; or a category is given.
    """
    require_no_category(NAME, category)
    require_root(root, NAME, "train/10000.png, train/10000_GT.png and test", URL)
    records = _split(root, "train")
    normal = [record for record in records if not record.label]
    if not normal:
        raise UserError(
            f"{root / 'train'}: every mask of {quoted([r.image for r in records])} has a "
            "defect; expected images without one, to fit"
        )
    return normal + (_split(root, "test") if (root / "test").exists() else [])


def categories(root: Path) -> list[str]:
    """Return [""]: there are none. Raise UserError unless the training images are there."""
    require_root(root, NAME, "train/10000.png, train/10000_GT.png and test", URL)
    image_files(root / "train")
    return [""]


LAYOUT = Layout(split_given(ksdd2), categories, lambda root, _: root)


def _split(root: Path, split: Split) -> list[Record]:
    # Pillow is imported only if needed: all configurations import this module.
    from padim_jax.data import masks

    pairs = _pairs(root / split)

    def is_defect(mask: Path) -> bool:
        return bool(masks.decode(read_file(mask), str(mask)).any())

    with concurrent.futures.ThreadPoolExecutor() as threads:
        defects = list(threads.map(is_defect, pairs.values()))
    return [
        Record(
            split=split,
            image=image,
            mask=mask if defect else None,
            label=int(defect),
            defect_type=DEFECT if defect else GOOD,
            relative_path=image.relative_to(root).as_posix(),
        )
        for (image, mask), defect in zip(pairs.items(), defects, strict=True)
    ]


def _pairs(folder: Path) -> dict[Path, Path]:
    """Return the images of a split with their masks."""
    files = [path for path in image_files(folder) if path.name not in COPIES]
    images = {path.stem: path for path in files if not path.stem.endswith(MASK)}
    masks = {path.stem.removesuffix(MASK): path for path in files if path.stem.endswith(MASK)}
    if len(images) + len(masks) < len(files) or images.keys() != masks.keys():
        paired = images.keys() & masks.keys()
        single = [path for path in files if path.stem.removesuffix(MASK) not in paired]
        raise UserError(
            f"{folder}: images and masks do not match"
            + (f": {quoted(single)} without the other" if single else " one to one")
            + f"; expected NAME.png and NAME{MASK}.png for each image"
        )
    return {images[stem]: masks[stem] for stem in sorted(images)}
