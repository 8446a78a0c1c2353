"""Images without labels: finding them, and writing what the detector says of them."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float, Float32, UInt8

from padim_jax.config.settings import ImageConfig
from padim_jax.core import calibration as calibration_lib
from padim_jax.core.calibration import Calibration
from padim_jax.data import decoding, input_pipeline
from padim_jax.data.files import (
    read_file,
)
from padim_jax.data.records import Record
from padim_jax.errors import RemovedError, UserError
from padim_jax.output import figures, results, tables
from padim_jax.system import paths
from padim_jax.system.paths import Path

TABLE = "scores.csv"
COLUMNS = ("path", "score", "predicted", "calibrated")

# Pictures drawn at a time, if there is room for them; see `input_pipeline.ROOM`.
_THREADS = min(8, os.cpu_count() or 1)

_MOST_TURNED = 1 << 20  # pixels of a map that are turned back together


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What predictions are called by; None where unknown.

    Attributes:
      image: image scores of at least this are called anomalous.
      pixel: the same of pixels, for the outline.
      scale: colours of the heat maps.
      text: where all this comes from, for a person.
    """

    image: float | None = None
    pixel: float | None = None
    scale: figures.ColorScale | None = None
    text: str = ""


def thresholds(calibration: Calibration) -> Thresholds:
    """Thresholds that need no defect; the image threshold has the middle of the colours."""
    low = calibration.typical_pixel
    high = 2 * calibration.image_threshold - low
    # A rate so high that typical images are called anomalous leaves no room for colours.
    scale = figures.ColorScale(low, high if high > low else low + max(1.0, abs(low)))
    return Thresholds(
        calibration.image_threshold,
        calibration.pixel_threshold,
        scale,
        calibration_lib.text(calibration),
    )


def read_evaluation(path: Path, *detector: str) -> Thresholds:
    """Thresholds and colours of an evaluation's metrics.json, for want of a calibration.

    Args:
      path: the file.
      detector: fingerprints of the one in use. Where the file is absent or of another
        detector (fitted again since, say), nothing is known.

    Raises:
      UserError: the file is broken.
    """
    nothing = Thresholds(
        text=f"no thresholds: the model has none from normal images, and {path} none of this "
        "model. Scores only, no predicted class. For thresholds: --mode=calibrate "
        "--input=<normal images that were not fitted>, or evaluate it (--mode=eval)"
    )
    if not path.exists():
        return nothing
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        if measured["detector"] not in detector:
            return nothing
        names = "image_f1_threshold", "pixel_f1_threshold"
        image, pixel = (None if (x := measured[n]) is None else _finite(x) for n in names)
        scale = figures.ColorScale(*map(_finite, measured["color_scale"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not an evaluation's results ({type(error).__name__}: {error}); evaluate "
            "again (--mode=eval) or move the file away to predict without thresholds"
        ) from error
    if image is None:
        return dataclasses.replace(nothing, pixel=pixel, scale=scale)
    text = f"threshold {image:.4g}: the best F1 on the test set's labels, of {path}"
    return Thresholds(image, pixel, scale, text)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is no threshold")
    return float(value)


def restore_map(
    anomaly_map: Float32[np.ndarray, "h w"],
    size: tuple[int, int],
    config: ImageConfig,
    view: input_pipeline.View | None = None,
) -> Float32[np.ndarray, "height width"]:
    """Brings a map back onto the image that it was computed from.

    Undoes the resizing, turning and cropping of `input_pipeline.preprocess`, with bilinear
    interpolation between pixel centres.

    Args:
      anomaly_map: at the size of the detector's input.
      size: original height and width.
      config: the preprocessing.
      view: what was seen of the image; None is the centre, unturned.

    Returns:
      The map at the original size; NaN where the crop left the image unscored.
    """
    top, left = input_pipeline.crop_offset(config) if view is None else view[1:]
    if view is not None and view.angle:
        return _restore_turned(anomaly_map, size, config, view)
    rows, rows_scored = _source_pixels(size[0], config.resize[0], top, config.size[0])
    columns, columns_scored = _source_pixels(size[1], config.resize[1], left, config.size[1])
    full = _interpolate(_interpolate(anomaly_map, rows).T, columns).T
    full[~rows_scored] = np.nan
    full[:, ~columns_scored] = np.nan
    return np.ascontiguousarray(full)


def _restore_turned(
    anomaly_map: Float32[np.ndarray, "h w"],
    size: tuple[int, int],
    config: ImageConfig,
    view: input_pipeline.View,
) -> Float32[np.ndarray, "height width"]:
    (height, width), angle = config.resize, np.radians(view.angle)
    cos, sin = np.cos(angle), np.sin(angle)
    y = ((np.arange(size[0]) + 0.5) * height / size[0] - height / 2)[:, None]
    x = (np.arange(size[1]) + 0.5) * width / size[1] - width / 2
    full = np.empty(size, np.float32)
    rows = max(1, _MOST_TURNED // size[1])
    for start in range(0, size[0], rows):  # a pixel takes some 100 bytes on the way
        part = slice(start, start + rows)
        # Counter-clockwise, with y pointing down.
        down = cos * y[part] - sin * x + height / 2 - view.top
        right = sin * y[part] + cos * x + width / 2 - view.left
        full[part] = _sample(anomaly_map, down, right)
    return full


def _sample(
    anomaly_map: Float32[np.ndarray, "h w"],
    down: Float[np.ndarray, "_h _w"],
    right: Float[np.ndarray, "_h _w"],
) -> Float[np.ndarray, "_h _w"]:
    """Bilinear samples at distances from the map's edges; NaN outside of it."""
    height, width = anomaly_map.shape
    inside = (down >= 0) & (down <= height) & (right >= 0) & (right <= width)
    y, x = np.clip(down - 0.5, 0, height - 1), np.clip(right - 0.5, 0, width - 1)
    top, left = (np.minimum(at.astype(int), n - 2) for at, n in ((y, height), (x, width)))
    y, x = y - top, x - left
    upper = anomaly_map[top, left] * (1 - x) + anomaly_map[top, left + 1] * x
    lower = anomaly_map[top + 1, left] * (1 - x) + anomaly_map[top + 1, left + 1] * x
    return np.where(inside, upper * (1 - y) + lower * y, np.nan)


def _source_pixels(
    original: int, resized: int, offset: int, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where the original's pixel centres lie in the map, and whether they lie in it."""
    edge = (np.arange(original) + 0.5) * resized / original - offset
    return np.clip(edge - 0.5, 0, size - 1), (edge >= 0) & (edge <= size)


def _interpolate(values: np.ndarray, position: np.ndarray) -> np.ndarray:
    low = np.minimum(position.astype(int), len(values) - 2)
    weight = (position - low).astype(np.float32)[:, None]
    return values[low] * (1 - weight) + values[low + 1] * weight


def files(folder: Path, name: str, map_suffix: str) -> tuple[Path, Path]:
    """Where `Pictures` puts an image's map and overlay, by its relative path."""
    return folder / "maps" / f"{name}.{map_suffix}", folder / "overlays" / f"{name}.jpg"


class Pictures:
    """Draws predictions below a folder.

    maps/ gets the raw map (float32 .npy or .tiff, NaN where unscored), overlays/ the heat map
    over the image, both at the image's size.
    """

    def __init__(
        self, folder: Path, config: ImageConfig, map_suffix: str, thresholds: Thresholds
    ):
        self._folder, self._config, self._suffix = folder, config, map_suffix
        self._thresholds, self.scale = thresholds, thresholds.scale

    def set_scale(self, maps: Float32[np.ndarray, "n h w"]) -> None:
        """Where there is no colour scale, the first maps set it for all."""
        if self.scale is None:
            self.scale = figures.color_scale(maps, np.zeros(len(maps), int))

    def draw(
        self,
        name: str,
        image: UInt8[np.ndarray, "height width 3"],
        anomaly_map: Float32[np.ndarray, "h w"],
    ) -> None:
        """Writes an image's map and overlay; there is a colour scale.

        Local ones are on the disk then: what is written later, as their row, says that they
        are whole.

        Raises:
          UserError: they cannot be written.
        """
        assert self.scale is not None
        height, width, _ = image.shape
        full = restore_map(anomaly_map, (height, width), self._config)
        overlay = figures.overlay(image, full, self.scale, self._thresholds.pixel)
        written = files(self._folder, name, self._suffix)
        path = written[1]
        with writing(path):
            results.save_map(self._folder / "maps", name, self._suffix, full)
            if isinstance(path, pathlib.Path):
                path.parent.mkdir(parents=True, exist_ok=True)
            figures.save(overlay, path)
            for file in written:
                if isinstance(file, pathlib.Path):
                    paths.sync(file)


def is_table(path: Path) -> bool:
    """Return whether a file is a table of predictions."""
    return paths.first_line(path).strip() == ",".join(COLUMNS).encode()


def rows(
    names: Sequence[str],
    scores: Float32[np.ndarray, " n"],
    threshold: float | None,
    calibration: Calibration | None,
) -> list[tuple[str, np.float32, int | str, str]]:
    """What a table says of images: `COLUMNS`; "" where there is nothing to compare with."""
    calibrated: Sequence[str] = [""] * len(scores)
    if calibration is not None:
        levels = calibration.calibrated(scores)
        calibrated = [calibration_lib.shown(float(level)) for level in levels]
    return [
        (
            name,
            score,
            "" if threshold is None else int(score >= threshold),
            level,
        )
        for name, score, level in zip(names, scores, calibrated, strict=True)
    ]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tells the user of an error in writing there: a full disk, a name that is too long."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}). When this is mended, the "
            "same command goes on"
        ) from error


class Writer:
    """Writes predictions below a folder as they come; a row of an image is its last.

    scores.csv gets one row an image, with what share of normal images scores lower where the
    model has a calibration; `Pictures` draws the rest.
    An object store can't take a file row by row: there scores.csv has its header at first,
    and the rows at the end.
    Images are decoded a second time here: keeping them, at their full size, from the
    pipeline on would take memory that grows with the batch.
    """

    def __init__(
        self,
        folder: Path,
        config: ImageConfig,
        map_suffix: str,
        thresholds: Thresholds,
        calibration: Calibration | None,
        kept: int = 0,
    ):
        """Begins the table, or goes on with its first `kept` bytes (of a local folder)."""
        paths.make_folder(folder)
        self._counts: decoding.Range = config.counts
        self._pictures = Pictures(folder, config, map_suffix, thresholds)
        self._threshold, self._calibration = thresholds.image, calibration
        self._table = folder / TABLE
        self._file: BinaryIO
        with writing(self._table):
            if isinstance(self._table, pathlib.Path):
                self._file = self._table.open("r+b" if kept else "wb")
                self._file.truncate(kept)
                self._file.seek(kept)
            else:
                assert not kept
                self._file = io.BytesIO()
            if not kept:
                self._append([COLUMNS])
            self._upload()
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS)

    def __enter__(self) -> "Writer":
        """Returns itself; the table is closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the table."""
        self._threads.shutdown(cancel_futures=True)
        try:
            self._upload()
        finally:
            self._file.close()

    @property
    def scale(self) -> figures.ColorScale | None:
        """Of the heat maps; None before the first batch, which may set it."""
        return self._pictures.scale

    @property
    def size(self) -> int:
        """Bytes of the table so far."""
        return self._file.tell()

    def add(
        self,
        records: Sequence[Record],
        maps: Float32[np.ndarray, "n h w"],
        scores: Float32[np.ndarray, " n"],
        digests: UInt8[np.ndarray, "n 32"] | None = None,
    ) -> None:
        """Writes a batch; without a colour scale the first batch sets it.

        Args:
          records: the images.
          maps: what the detector says of them.
          scores: and of each as a whole.
          digests: SHA-256 of the files that it saw; None does not compare.

        Raises:
          UserError: an image cannot be read again, or is another one by now; or something
            cannot be written. The table then has the rows before.
        """
        self._pictures.set_scale(maps)
        expected = [None] * len(records) if digests is None else [x.tobytes() for x in digests]
        names = [record.relative_path for record in records]
        written = rows(names, scores, self._threshold, self._calibration)
        # In threads, since Pillow and NumPy leave Python's lock while they work.
        drawn = self._threads.map(self._draw, records, maps, expected)
        done = []
        try:
            for row, _ in zip(written, drawn, strict=True):
                done.append(row)
        finally:
            with writing(self._table):
                self._append(done)

    def _draw(
        self,
        record: Record,
        anomaly_map: Float32[np.ndarray, "h w"],
        digest: bytes | None,
    ) -> None:
        data = read_file(record.image)
        if digest is not None and hashlib.sha256(data).digest() != digest:
            raise UserError(
                f"{record.image}: was written to while it was scored; run the same command "
                "again when it is whole"
            )
        pixels = decoding.pixel_count(data)
        with input_pipeline.ROOM.held(input_pipeline.DRAWING * pixels):
            decoded = input_pipeline.decode(data, str(record.image), self._counts)
            self._pictures.draw(record.relative_path, np.asarray(decoded), anomaly_map)

    def _append(self, rows: Iterable[Sequence[Any]]) -> None:
        local = isinstance(self._table, pathlib.Path)
        if local and os.fstat(self._file.fileno()).st_nlink == 0:
            raise RemovedError(
                f"{self._table}: was removed while predictions were written; leave the folder "
                "alone until they are done. The same command scores the images again"
            )
        self._file.write(tables.as_csv(rows))
        self._file.flush()
        if isinstance(self._table, pathlib.Path):
            os.fsync(self._file.fileno())  # before the journal says so, if there is one

    def _upload(self) -> None:
        if isinstance(self._file, io.BytesIO):
            self._table.write_bytes(self._file.getvalue())
