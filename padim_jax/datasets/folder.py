"""A folder of one's own images, for inspection without a published dataset.

    root/train/good/*                    normal images to fit
    root/val/good/*                      normal images to evaluate on
    root/val/bad/*  or  root/val/<defect type>/*   anomalous images
    root/masks/<defect type>/<name>.png  or  <name>_mask.png    optional ground truth

With a category, `root/category` is read instead of `root`. png, jpg, jpeg, bmp,
tif, tiff and webp, in any case. The layout of the PyTorch project Lornatang/PaDiM.
"""

import pathlib

from padim_jax.datasets.files import image_files, subfolders
from padim_jax.datasets.records import GOOD, Record
from padim_jax.errors import UserError


def folder(root: pathlib.Path, category: str = "") -> list[Record]:
    """Lists the images of `root` (or `root/category`), sorted by path.

    Masks are all or nothing for a defect type: a type without a folder under
    `masks/` has none (only image-level metrics can then be computed); one with a
    folder must have a mask for each of its images.

    Args:
      root: the dataset's folder.
      category: a folder below it, or "" for the root itself.

    Returns:
      Records of train/good, then of val/*. An absent `val` gives only the former:
      a model can be fitted, and used on images of which nothing is known.

    Raises:
      UserError: a folder is missing or empty, or a mask is missing or left over.
    """
    base = root / category
    if not base.is_dir():
        setting = "config.dataset.root" if not root.is_dir() else "config.category"
        value = root if not root.is_dir() else repr(category)
        raise UserError(
            f"{setting}={value}: no folder {base}; expected one that holds train/good and, to "
            "evaluate, val/good and val/bad"
        )
    records = [
        Record("train", path, None, 0, GOOD, path.relative_to(root).as_posix())
        for path in image_files(base / "train" / GOOD)
    ]
    if not (base / "val").is_dir():
        return records
    for defect in subfolders(base / "val"):
        images = image_files(defect)
        masks = _masks(base / "masks" / defect.name, images) if defect.name != GOOD else {}
        records += [
            Record(
                split="test",
                image=path,
                mask=masks.get(path),
                label=int(defect.name != GOOD),
                defect_type=defect.name,
                relative_path=path.relative_to(root).as_posix(),
            )
            for path in images
        ]
    return records


def _masks(
    folder: pathlib.Path, images: list[pathlib.Path]
) -> dict[pathlib.Path, pathlib.Path]:
    if not folder.is_dir():
        return {}
    # `x_mask` belongs to image `x`; `x` itself is also accepted.
    by_stem = {path.stem.removesuffix("_mask"): path for path in image_files(folder)}
    stems = {path.stem for path in images}
    missing = sorted(stems - by_stem.keys())
    left_over = sorted(by_stem.keys() - stems)
    if missing or left_over:
        raise UserError(
            f"{folder}: masks and images do not match: "
            + f"no mask for {missing[:5]}" * bool(missing)
            + "; " * bool(missing and left_over)
            + f"no image for {left_over[:5]}" * bool(left_over)
            + ". Name a mask like its image (name.png or name_mask.png), or remove the folder "
            "to do without masks"
        )
    return {path: by_stem[path.stem] for path in images}
