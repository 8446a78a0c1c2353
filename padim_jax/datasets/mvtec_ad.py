"""MVTec AD's folder layout, read in place.

    root/category/train/good/*.png
    root/category/test/{good,<defect type>}/*.png
    root/category/ground_truth/<defect type>/<name>_mask.png

Bergmann et al., "MVTec AD - A Comprehensive Real-World Dataset for Unsupervised
Anomaly Detection", CVPR 2019. Licence: CC BY-NC-SA 4.0.
"""

import difflib

from padim_jax.datasets.files import file_names, image_files, subfolders
from padim_jax.datasets.records import GOOD, Record
from padim_jax.errors import UserError
from padim_jax.paths import Path, is_folder

CATEGORIES = (
    "bottle", "cable", "capsule", "carpet", "grid", "hazelnut", "leather", "metal_nut",
    "pill", "screw", "tile", "toothbrush", "transistor", "wood", "zipper",
)  # fmt: skip
URL = "https://www.mvtec.com/company/research/datasets/mvtec-ad"


def mvtec_ad(root: Path, category: str) -> list[Record]:
    """Lists the images of one category, sorted by path.

    Args:
      root: the folder that holds the category folders.
      category: a folder below `root`; one of MVTec's fifteen or your own in the
        same layout.

    Returns:
      Records of train/good, then of test/*. An absent `test` gives only the former: a
      model can be fitted.

    Raises:
      UserError: the folder, the category, a split or a mask is not there.
    """
    folder = root / category
    if not is_folder(folder):
        raise UserError(_no_category(root, category))
    records = [
        Record("train", path, None, 0, GOOD, path.relative_to(root).as_posix())
        for path in image_files(folder / "train" / GOOD)
    ]
    if not (folder / "test").exists():
        return records
    defects = subfolders(folder / "test")
    if not defects:
        raise UserError(
            f"{folder / 'test'}: holds no folder; expected good and one for each defect type"
        )
    for defect in defects:
        masks = folder / "ground_truth" / defect.name
        there = file_names(masks) if defect.name != GOOD else set()
        for path in image_files(defect):
            mask = None if defect.name == GOOD else _mask(masks, there, path)
            records.append(
                Record(
                    split="test",
                    image=path,
                    mask=mask,
                    label=int(defect.name != GOOD),
                    defect_type=defect.name,
                    relative_path=path.relative_to(root).as_posix(),
                )
            )
    return records


def _mask(folder: Path, there: set[str], image: Path) -> Path:
    mask = folder / f"{image.stem}_mask.png"
    if mask.name not in there:
        raise UserError(
            f"{image}: its ground-truth mask {mask} does not exist. MVTec's layout has one "
            "for every defective test image; for images without masks use the layout of "
            "--config=configs/folder.py"
        )
    return mask


def _no_category(root: Path, category: str) -> str:
    if not is_folder(root):
        return (
            f"config.dataset.root={root}: no such folder. Expected MVTec AD's folder, with "
            f"{category}/train/good and {category}/test below it. Get the data from {URL} "
            "(free for research, after accepting its licence), unpack it there, or point "
            "--config.dataset.root at where it is"
        )
    found = [path.name for path in subfolders(root) if is_folder(path / "train")]
    known = found or (() if category in CATEGORIES else CATEGORIES)
    close = difflib.get_close_matches(category, known, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else "."
    if not found:
        return (
            f"config.category={category!r}: no folder {root / category}{guess} {root} holds no "
            f"category folder (with train/good in it); MVTec AD comes from {URL}"
        )
    return (
        f"config.category={category!r}: no folder {root / category}{guess} "
        f"Categories found in {root}: {', '.join(found)}"
    )
