"""Regions of predictions as JSON: regions.json (docs/regions.md), and COCO annotations."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import padim_jax
from padim_jax.core.regions import Region
from padim_jax.system import journal, paths
from padim_jax.system.paths import Path

FORMAT = "padim_jax regions 1"


def fields(size: tuple[int, int], regions: Sequence[Region] | None) -> dict[str, Any]:
    """Return what a row of predictions keeps for the files of regions.

    Args:
      size: height and width of the image.
      regions: its regions; None without a pixel threshold.
    """
    found = [_to_dict(region) for region in regions or ()]
    return {"height": size[0], "width": size[1], "found": found}


def rounded(pixels: float) -> float:
    """Return a length or an area with two digits, far below what a map resolves."""
    return round(pixels, 2)


def document(about: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the text of regions.json.

    Args:
      about: pixel threshold, and which regions count.
      rows: rows of predictions, with `fields`.
    """
    version = padim_jax.__version__
    head = json.dumps({"format": FORMAT, "padim_jax": version, **about}, allow_nan=False)
    images = (
        {
            "path": row["path"],
            "width": row["width"],
            "height": row["height"],
            "score": float(row["score"]),
            "predicted": None if row["predicted"] == "" else bool(row["predicted"]),
            "regions": row["found"],
        }
        for row in rows
    )
    yield f'{head[:-1]}, "images": '
    yield from _array(images)
    yield "}\n"


def coco(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield annotations as COCO's results of object detection have them.

    The image's id is its number from 1, in the order of scores.csv. A hole is a polygon of its
    own, which COCO does not subtract.

    Args:
      rows: see `document`.
    """
    annotations: list[dict[str, Any]] = []

    def images() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows, 1):
            size = {"width": row["width"], "height": row["height"]}
            yield {"id": number, "file_name": row["path"], **size}
            for region in row["found"]:
                left, top, right, bottom = region["box"]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": 1,
                        "bbox": [left, top, rounded(right - left), rounded(bottom - top)],
                        "area": region["area"],
                        "segmentation": [
                            [value for point in line[:-1] for value in point]
                            for line in region["contour"]
                        ],
                        "iscrowd": 0,
                        "score": region["peak"],
                    }
                )

    yield '{"categories": [{"id": 1, "name": "anomaly"}], "images": '
    yield from _array(images())
    yield ', "annotations": '
    yield from _array(annotations)
    yield "}\n"


def write(path: Path, text: Iterable[str]) -> None:
    """Write a text piece by piece; the file appears when complete."""
    with (
        journal.writing(path),
        paths.replacing(path) as growing,
        growing.open("w", encoding="utf-8") as file,
    ):
        file.writelines(text)


def _array(values: Iterable[Any]) -> Iterator[str]:
    separator = "[\n"
    for value in values:
        yield separator + json.dumps(value, allow_nan=False)
        separator = ",\n"
    yield "[]" if separator == "[\n" else "\n]"


def _to_dict(region: Region) -> dict[str, Any]:
    def point(xy: Sequence[float]) -> list[float]:
        return [rounded(value) for value in xy]

    return {
        "box": point(region.box),
        "centroid": point(region.centroid),
        "area": rounded(region.area),
        "peak": float(f"{region.peak:.7g}"),  # as float32 resolves it
        "mean": float(f"{region.mean:.7g}"),
        "contour": [[point(xy) for xy in line] for line in region.contour],
    }
