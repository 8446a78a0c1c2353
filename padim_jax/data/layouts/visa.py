"""VisA, the Visual Anomaly dataset, as it is distributed: with its one-class split.

    root/split_csv/1cls.csv                  object,split,label,image,mask
    root/category/Data/Images/Normal/*.JPG
    root/category/Data/Images/Anomaly/*.JPG
    root/category/Data/Masks/Anomaly/*.png

Paths in the table are relative to the root. Masks hold the number of a pixel's defect type,
from 1 on.

Zou et al., "SPot-the-Difference Self-Supervised Pre-training for Anomaly Detection and
Segmentation", ECCV 2022. Licence: CC BY 4.0.
"""

import csv
import difflib
import io
import pathlib
from collections.abc import Mapping

from padim_jax.data.files import file_names, image_files, quoted, read_file
from padim_jax.data.layouts.layout import Layout, require_root, split_given
from padim_jax.data.records import GOOD, Record
from padim_jax.errors import UserError
from padim_jax.system.paths import Path, is_folder

NAME = "VisA"
URL = "https://github.com/amazon-science/spot-diff"
TABLE = "split_csv/1cls.csv"
COLUMNS = ("object", "split", "label", "image", "mask")
ANOMALY = "anomaly"


def visa(root: Path, category: str) -> list[Record]:
    """List the images of one category: train, then test, each sorted by path.

    Args:
      root: folder that holds split_csv and the category folders.
      category: an object of the table.

    Returns:
      A record for each row; the defect type is "anomaly".

    Raises:
      UserError: the root, the table or the category is missing; a row is not as expected or
        names a missing file; or the table leaves out an image.
    """
    rows = [row for row in _rows(root) if row["object"] == category]
    if not rows:
        raise UserError(_no_category(root, category))
    records = [_record(root, category, row) for row in rows]
    _require_files(root, category, records)
    for split in ("train", "test"):
        if not any(record.split == split for record in records):
            raise UserError(f"{root / TABLE}: no {split} image of {category}")
    return sorted(records, key=lambda r: (r.split != "train", r.relative_path))


def categories(root: Path) -> list[str]:
    """Return the objects of the table whose folders are there, in its order.

    Raises:
      UserError: the root, the table or all folders are missing.
    """
    objects = dict.fromkeys(row["object"] for row in _rows(root))
    found = [name for name in objects if is_folder(root / name)]
    if not found:
        raise UserError(
            f"config.dataset.root={root}: holds no category folder; expected one or more of "
            f"{', '.join(objects)} from {URL}"
        )
    return found


LAYOUT = Layout(split_given(visa), categories)


def _rows(root: Path) -> list[dict[str, str]]:
    require_root(root, NAME, f"{TABLE} and CATEGORY/Data/Images", URL)
    table = root / TABLE
    if "1cls.csv" not in file_names(table.parent):
        raise UserError(
            f"{table}: no such file; expected the table of {NAME}'s one-class split, which "
            f"comes with the data from {URL}. Copies converted to other folders are not read"
        )
    try:
        text = read_file(table).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text), strict=True)
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: not a table of comma-separated values: {error}") from error
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise UserError(
            f"{table}: has the columns {','.join(reader.fieldnames or ())}; expected "
            f"{','.join(COLUMNS)}"
        )
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise UserError(f"{table}, line {number}: expected {len(COLUMNS)} values")
        name = row["object"]
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise UserError(
                f"{table}, line {number}: object {name!r}; expected a folder's name, after "
                "which results are called"
            )
    return rows


def _record(root: Path, category: str, row: Mapping[str, str]) -> Record:
    def wrong(found: str, expected: str) -> UserError:
        return UserError(f"{root / TABLE}, image {row['image']}: {found}; expected {expected}")

    split, label = row["split"], row["label"]
    if split not in ("train", "test"):
        raise wrong(f"split {split!r}", "train or test")
    if label not in ("normal", ANOMALY):
        raise wrong(f"label {label!r}", f"normal or {ANOMALY}")
    if split == "train" and label == ANOMALY:
        raise wrong("an anomaly to train on", "the one-class split, which has none")
    if label == ANOMALY and not row["mask"]:
        raise wrong("no mask of an anomaly", "one for each")
    for name in filter(None, (row["image"], row["mask"])):
        parts = pathlib.PurePosixPath(name).parts
        if parts[:1] != (category,) or ".." in parts:
            raise wrong(f"the path {name!r}", f"one that begins with {category}/")
    return Record(
        split=split,
        image=root / row["image"],
        mask=root / row["mask"] if label == ANOMALY else None,
        label=int(label == ANOMALY),
        defect_type=ANOMALY if label == ANOMALY else GOOD,
        relative_path=row["image"],
    )


def _require_files(root: Path, category: str, records: list[Record]) -> None:
    """Raise UserError unless the table and the folders agree."""
    named = {path for record in records for path in (record.image, record.mask) if path}
    folders = {path.parent for path in named}
    there = {folder / name for folder in folders for name in file_names(folder)}
    if absent := sorted(named - there):
        raise UserError(
            f"{root / TABLE}: names {quoted(absent)}, which {absent[0].parent} does not hold. "
            f"Unpack {NAME} from {URL} again"
        )
    images = {record.image for record in records}
    for folder in sorted({path.parent for path in images}):
        if extra := [path for path in image_files(folder) if path not in images]:
            raise UserError(
                f"{folder}: holds {quoted(extra)}, which {root / TABLE} does not name as "
                f"{category}'s; add rows for them, or move them elsewhere"
            )


def _no_category(root: Path, category: str) -> str:
    objects = list(dict.fromkeys(row["object"] for row in _rows(root)))
    close = difflib.get_close_matches(category, objects, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else "."
    return (
        f"config.category={category!r}: {root / TABLE} has no such object{guess} Categories "
        f"found there: {', '.join(objects)}"
    )
