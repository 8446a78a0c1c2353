"""A folder of one's own images, for inspection without a published dataset.

    root/train/good/*                    normal images to fit
    root/val/good/*                      normal images to evaluate on
    root/val/bad/*  or  root/val/<defect type>/*   anomalous images
    root/masks/<defect type>/<name>.png  or  <name>_mask.png    optional ground truth

With a category, `root/category` is read instead of `root`. png, jpg, jpeg, bmp,
tif, tiff and webp, in any case. The layout of the PyTorch project Lornatang/PaDiM.
"""

import collections

from padim_jax.datasets.files import folders_only, image_files, quoted, subfolders
from padim_jax.datasets.records import GOOD, Record
from padim_jax.errors import UserError
from padim_jax.paths import Path, is_folder


def folder(root: Path, category: str = "") -> list[Record]:
    """Lists the images of `root` (or `root/category`), sorted by path.

    Masks are all or nothing for a defect type: a type without a folder under
    `masks/` has none (only image-level metrics can then be computed); one with a
    folder must have a mask for each of its images. Masks of good images are not
    looked at: they have no defect pixel.

    Args:
      root: the dataset's folder.
      category: a folder below it, or "" for the root itself.

    Returns:
      Records of train/good, then of val/*. An absent `val` gives only the former:
      a model can be fitted, and used on images of which nothing is known.

    Raises:
      UserError: a folder is missing or empty, images lie beside the folders that they
        belong in, or a mask is missing, left over or ambiguous.
    """
    base = root / category
    if not is_folder(base):
        setting = "config.dataset.root" if not is_folder(root) else "config.category"
        value = root if not is_folder(root) else repr(category)
        raise UserError(
            f"{setting}={value}: no folder {base}; expected one that holds train/good and, to "
            "evaluate, val/good and val/bad"
        )
    records = [
        Record("train", path, None, 0, GOOD, path.relative_to(root).as_posix())
        for path in image_files(base / "train" / GOOD)
    ]
    if not (base / "val").exists():
        return records
    defects = folders_only(base / "val")
    if not defects:
        raise UserError(
            f"{base / 'val'}: holds no folder; expected good and bad (or one for each defect "
            "type) in it, or no val at all to fit a model without evaluating it"
        )
    if (base / "masks").exists():
        names = [defect.name for defect in defects]
        for left_over in folders_only(base / "masks"):
            if left_over.name not in names:
                raise UserError(
                    f"{left_over}: masks for no images; expected the name of a folder in "
                    f"{base / 'val'}: {', '.join(names)}"
                )
    for defect in defects:
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


def categories(root: Path) -> list[str]:
    """The folders below `root` in this layout, sorted; [""] if it is one itself.

    Raises:
      UserError: neither.
    """
    if is_folder(root / "train"):
        return [""]
    found = [path.name for path in subfolders(root) if is_folder(path / "train")]
    if not found:
        raise UserError(
            f"config.dataset.root={root}: holds neither train/good nor folders with train/good "
            "in them; expected the images of one part, or a folder for each of several parts"
        )
    return found


def _masks(folder: Path, images: list[Path]) -> dict[Path, Path]:
    if not is_folder(folder):
        return {}
    by_stem: dict[str, list[Path]] = {}
    for mask in image_files(folder):
        by_stem.setdefault(mask.stem, []).append(mask)
    matches = {
        image: by_stem.get(image.stem, []) + by_stem.get(f"{image.stem}_mask", [])
        for image in images
    }
    uses = collections.Counter(mask for found in matches.values() for mask in found)
    problems = {
        "no mask for": [image for image, found in matches.items() if not found],
        "more than one mask for": [image for image, found in matches.items() if len(found) > 1],
        "no image for": [
            mask for found in by_stem.values() for mask in found if not uses[mask]
        ],
        "more than one image for": [mask for mask, count in uses.items() if count > 1],
    }
    if any(problems.values()):
        raise UserError(
            f"{folder}: masks and images do not match: "
            + "; ".join(f"{what} {quoted(paths)}" for what, paths in problems.items() if paths)
            + ". Name a mask like its image (name.png or name_mask.png), or remove the folder "
            "to do without masks"
        )
    return {image: found[0] for image, found in matches.items()}
