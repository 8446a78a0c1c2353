"""A folder of one's own images, for inspection without a published dataset.

    root/train/good/*                    normal images to fit
    root/val/good/*                      normal images to evaluate on
    root/val/bad/*  or  root/val/<defect type>/*   anomalous images
    root/masks/<defect type>/<name>.png  or  <name>_mask.png    optional ground truth

A folder of normal images may have any of the names in `GOOD_NAMES`, the folder of masks any
of those in `MASKS`. With a category, `root/category` is read instead of `root`. Files are png,
jpg, jpeg, bmp, tif, tiff and webp, in any case. It is the layout of the PyTorch project
Lornatang/PaDiM.
"""

import collections
from collections.abc import Iterable

from padim_jax.data.files import (
    folders_only,
    holding_images,
    image_files,
    images_outside_folders,
    quoted,
    shown,
    subfolders,
)
from padim_jax.data.records import GOOD, Record
from padim_jax.errors import UserError
from padim_jax.system.paths import Path, is_folder

# Compared without regard to case, spaces, hyphens and underscores: "Defect-free" matches, too.
GOOD_NAMES = (
    *(GOOD, "normal", "ok", "okay", "fine", "pass", "passed", "healthy"),
    *("defect free", "no defect", "no defects", "non defective"),
)
MASKS = ("masks", "mask", "ground_truth")
_MOST_LISTED = 20  # folders per line


def folder(root: Path, category: str = "") -> list[Record]:
    """List the images of `root` (or `root/category`), sorted by path.

    Masks are all or nothing for a defect type: a type without a folder under
    `masks/` has none (only image-level metrics can then be computed); one with a
    folder must have a mask for each of its images. Masks of good images are
    ignored: they have no defect pixel.

    Args:
      root: the dataset's folder.
      category: a folder below it, or "" for the root itself.

    Returns:
      Records of train/good, then of val/*. Without `val` only the former: enough to fit a model
      and to score unlabelled images. Several folders of normal images, such as `good` and `OK`,
      are all read; `summary` names them.

    Raises:
      UserError: a folder is missing or empty, images lie beside the folders that should contain
        them, there are several folders of masks, or a mask is missing, left over or ambiguous.
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
        for good in _good_folders(base / "train")
        for path in image_files(good)
    ]
    if not (base / "val").exists():
        return records
    defects = folders_only(base / "val")
    if not defects:
        raise UserError(
            f"{base / 'val'}: holds no folder; expected good and bad (or one for each defect "
            "type) in it, or no val at all to fit a model without evaluating it"
        )
    for defect in defects:
        if _plain(defect.name) in map(_plain, MASKS):
            raise UserError(
                f"{defect}: by its name a folder of masks, in the place of a defect type's "
                f"images; expected masks in {base / MASKS[0] / 'bad'}"
            )
    mask_folder = _mask_folder(base)
    if mask_folder is not None:
        names = [defect.name for defect in defects]
        for left_over in folders_only(mask_folder):
            if left_over.name not in names:
                raise UserError(
                    f"{left_over}: masks for no images; expected the name of a folder in "
                    f"{base / 'val'}: {', '.join(names)}"
                )
    for defect in defects:
        images = image_files(defect)
        good = is_good(defect.name)
        masks = {}
        if mask_folder is not None and not good:
            masks = _masks(mask_folder / defect.name, images)
        records += [
            Record(
                split="test",
                image=path,
                mask=masks.get(path),
                label=int(not good),
                defect_type=GOOD if good else defect.name,
                relative_path=path.relative_to(root).as_posix(),
            )
            for path in images
        ]
    return records


def unused(root: Path, category: str = "") -> list[Path]:
    """Return the folders with images that `folder` passes over, sorted.

    They lie beside train, val and the masks, or in train beside the normal images; train is
    one of them if images lie directly in it.

    Args:
      root: the dataset's folder.
      category: a folder below it, or "" for the root itself.

    Returns:
      The folders.
    """
    base = root / category
    used = set(map(_plain, ("train", "val", *MASKS)))
    found = holding_images(base, lambda name: _plain(name) in used)
    train = base / "train"
    if is_folder(train) and images_outside_folders(train):
        found.append(train)
    return sorted(found + holding_images(train, is_good))


def is_good(name: str) -> bool:
    """Return whether a folder's name marks normal images; see `GOOD_NAMES`."""
    return _plain(name) in map(_plain, GOOD_NAMES)


def summary(records: Iterable[Record]) -> str:
    """Return one line that says which folders hold normal images and which hold defects."""
    folders: dict[int, dict[str, None]] = {0: {}, 1: {}}
    for record in records:
        folders[record.label][record.relative_path.rpartition("/")[0]] = None
    normal, defects = (_listed(list(names)) for names in folders.values())
    return f"folders of good images: {normal}; of defects: {defects}"


def _listed(names: list[str]) -> str:
    rest = len(names) - _MOST_LISTED
    text = ", ".join(map(shown, names[:_MOST_LISTED])) or "none"
    return text + (f" and {rest} more" if rest > 0 else "")


def _plain(name: str) -> str:
    return name.casefold().translate(str.maketrans("", "", " -_"))


def _good_folders(train: Path) -> list[Path]:
    """Return the folders of normal images in `train`; without any, the expected one."""
    folders = subfolders(train) if is_folder(train) else []
    good = [path for path in folders if is_good(path.name)]
    if folders and not good:
        raise UserError(
            f"{train / GOOD}: no such folder, and {train} holds {quoted(folders)}; expected "
            f"the normal images in a folder called {', '.join(GOOD_NAMES)}"
        )
    return good or [train / GOOD]


def _mask_folder(base: Path) -> Path | None:
    names = list(map(_plain, MASKS))
    present = [path for path in subfolders(base) if _plain(path.name) in names]
    if len(present) > 1:
        raise UserError(
            f"{base}: holds {len(present)} folders of masks, {quoted(present)}; expected one. "
            "Move the others elsewhere"
        )
    return present[0] if present else None


def categories(root: Path) -> list[str]:
    """Return the folders below `root` in this layout, sorted; [""] if it is one itself.

    Raises:
      UserError: there is neither.
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
