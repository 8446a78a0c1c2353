"""Anomaly maps -> regions: where on an image something is anomalous, and how large it is.

A region is made of the pixels of a map that reach a threshold and touch each other, by an edge
or a corner. Regions that a gap of at most `close` parts count as one (to within one pixel of
the map), and those of less than `min_area` do not count. Lengths and areas are in pixels of the
original image; `Frame` says where a map lies on it. Positions are (x, y) from the image's top
left corner: the centre of its first pixel is (0.5, 0.5).

Regions give verdicts, too: an image is anomalous if it has one. As the threshold rises, the
pixels that reach it become fewer, and no region grows. So each map has a highest threshold at
which it has a region (`peak`; without `min_area`, its highest pixel). This is a score like any
other: the order statistic of the peaks of n normal images promises how many of further normal
images have a region at all (see `calibration`).
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

# Pixels that share a corner touch, as in the ground truth's regions (see `metrics`).
_NEIGHBOURS = np.ones((3, 3), bool)

Point = tuple[float, float]
Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Frame:
    """Place of a map on the original image.

    Attributes:
      scale: height and width of a pixel of the map.
      corner: y and x of the map's top left corner.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    corner: tuple[float, float] = (0.0, 0.0)

    @property
    def pixel_area(self) -> float:
        """Return the area of a pixel of the map."""
        return self.scale[0] * self.scale[1]

    def on_map(self, box: Box) -> Box:
        """Return a box of the original image in pixels of the map."""
        (down, right), (top, left) = self.scale, self.corner
        return (
            *((box[0] - left) / right, (box[1] - top) / down),
            *((box[2] - left) / right, (box[3] - top) / down),
        )


@dataclasses.dataclass(frozen=True)
class Region:
    """A region of an image; positions and sizes are in pixels of the original image.

    Attributes:
      box: left, top, right and bottom edge.
      centroid: x and y of its centre of gravity, all pixels weighing the same.
      area: its pixels, without the gaps that were closed.
      peak: its highest distance.
      mean: the mean of its distances.
      contour: its outlines, a polygon for each connected part and each hole, of (x, y), the
        last of which is the first again.
    """

    box: Box
    centroid: Point
    area: float
    peak: float
    mean: float
    contour: tuple[tuple[Point, ...], ...]


def find(
    anomaly_map: Float32[np.ndarray, "h w"],
    threshold: float,
    frame: Frame = Frame(),
    min_area: float = 0.0,
    close: float = 0.0,
) -> tuple[Region, ...]:
    """Return the regions of a map, the one with the highest peak first.

    Args:
      anomaly_map: (h, w), finite.
      threshold: pixels of at least this distance belong to a region.
      frame: place of the map on the original image.
      min_area: smallest area of a region.
      close: longest gap within a region.
    """
    labels, count = label(anomaly_map, threshold, frame, min_area, close)
    if not count:
        return ()
    from scipy import ndimage  # as in `_connected`

    (down, right), (top, left) = frame.scale, frame.corner
    found = []
    for number, part in enumerate(ndimage.find_objects(labels), 1):
        inside = labels[part] == number
        values = anomaly_map[part][inside]
        y, x = (np.mean(index) + 0.5 for index in np.nonzero(inside))
        rows, columns = part
        edges = (columns.start * right, rows.start * down, columns.stop * right)
        contour = tuple(
            tuple(zip((left + xs * right).tolist(), (top + ys * down).tolist(), strict=True))
            for xs, ys in _outlines(anomaly_map, labels, number, part, threshold)
        )
        found.append(
            Region(
                box=(left + edges[0], top + edges[1], left + edges[2], top + rows.stop * down),
                centroid=(
                    left + float(columns.start + x) * right,
                    top + float(rows.start + y) * down,
                ),
                area=len(values) * frame.pixel_area,
                peak=float(values.max()),
                mean=float(np.mean(values, dtype=np.float64)),
                contour=contour,
            )
        )
    return tuple(sorted(found, key=lambda region: -region.peak))


def label(
    anomaly_map: Float32[np.ndarray, "h w"],
    threshold: float,
    frame: Frame = Frame(),
    min_area: float = 0.0,
    close: float = 0.0,
) -> tuple[Int[np.ndarray, "h w"], int]:
    """Number the regions of a map.

    Args:
      anomaly_map: see `find`.
      threshold: see `find`.
      frame: see `find`.
      min_area: see `find`.
      close: see `find`.

    Returns:
      The number of each pixel's region, 0 outside of all; and how many there are.
    """
    high = anomaly_map >= np.float32(threshold)
    if not high.any():
        return np.zeros(high.shape, np.int32), 0
    labels, count = _connected(high, frame, close)
    kept = np.bincount(labels.ravel(), minlength=count + 1) * frame.pixel_area >= min_area
    kept[0] = False
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    return numbers[labels], int(np.count_nonzero(kept))


def peak(
    anomaly_map: Float32[np.ndarray, "h w"],
    frame: Frame = Frame(),
    min_area: float = 0.0,
    close: float = 0.0,
    pixels: int | None = None,
) -> float:
    """Return the highest threshold at which a map has a region.

    Args:
      anomaly_map: see `find`.
      frame: see `find`.
      min_area: see `find`.
      close: see `find`.
      pixels: number of the map's pixels that are scored; None for all.

    Returns:
      One of the map's values.

    Raises:
      ValueError: what is scored of the map is smaller than `min_area`.
    """
    fewest = max(1, math.ceil(min_area / frame.pixel_area))
    if fewest > (pixels := anomaly_map.size if pixels is None else pixels):
        raise ValueError(
            f"a region of {min_area:g} pixels is larger than what is scored of an image, "
            f"{pixels * frame.pixel_area:.0f} pixels"
        )
    if fewest == 1:
        return float(anomaly_map.max())
    values = np.sort(anomaly_map, axis=None)[::-1]
    # At `values[low]` there may be a region, at `values[high]`, the lowest, there is one.
    low, high = fewest - 1, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if label(anomaly_map, float(values[middle]), frame, min_area, close)[1]:
            high = middle
        else:
            low = middle + 1
    return float(values[low])


def _connected(
    high: Bool[np.ndarray, "h w"], frame: Frame, close: float
) -> tuple[Int[np.ndarray, "h w"], int]:
    """Number the connected parts of a mask, those with short gaps between them alike."""
    from scipy import ndimage  # slow to import; only verdicts need it

    if not close:
        return ndimage.label(high, _NEIGHBOURS)  # pyright: ignore[reportReturnType]
    # From each side half of the gap, and half of the step from pixel to pixel beyond it.
    distances: Any = ndimage.distance_transform_edt(~high, sampling=frame.scale)
    near = distances <= (close + max(frame.scale)) / 2
    labels, count = ndimage.label(near, _NEIGHBOURS)  # pyright: ignore[reportGeneralTypeIssues]
    return np.where(high, labels, 0), count


def _outlines(
    anomaly_map: Float32[np.ndarray, "h w"],
    labels: Int[np.ndarray, "h w"],
    number: int,
    part: tuple[slice, slice],
    threshold: float,
) -> Iterator[tuple[Float[np.ndarray, " _n"], Float[np.ndarray, " _n"]]]:
    """Yield x and y of a region's outlines, in pixels of the map: the map's level lines.

    Levels are interpolated between pixel centres. At the map's edge outlines follow the edge.
    """
    from contourpy import contour_generator  # with matplotlib, slow to import

    level = float(np.nextafter(np.float64(np.float32(threshold)), -np.inf))
    rows, columns = (
        slice(max(0, s.start - 1), min(n, s.stop + 1))
        for s, n in zip(part, labels.shape, strict=True)
    )
    values = anomaly_map[rows, columns].astype(np.float64)
    # Pixels of other regions touch none of this one's.
    values = np.where((labels[rows, columns] == number) | (values < level), values, level - 1)
    # Beyond the edge as far below the level as the last pixel is above it.
    padded = np.pad(values, 1, mode="edge")
    beyond = np.where(padded > level, 2 * level - padded, level - 1)
    beyond[1:-1, 1:-1] = values
    # Pixel 0 of the padded part has its centre half a pixel outside of the part.
    x0, y0 = columns.start - 0.5, rows.start - 0.5
    lines: Any = contour_generator(z=beyond).lines(level)
    height, width = labels.shape
    for line in lines:  # roundings reach beyond the edge
        yield np.clip(line[:, 0] + x0, 0, width), np.clip(line[:, 1] + y0, 0, height)
