"""Images without labels: finding them, and writing what the detector says of them."""

import concurrent.futures
import csv
import dataclasses
import glob
import io
import json
import os
import pathlib
from collections.abc import Sequence
from types import TracebackType

import numpy as np
from jaxtyping import Float32

from padim_jax import calibration as calibration_lib
from padim_jax import figures, input_pipeline, paths, results
from padim_jax.calibration import Calibration
from padim_jax.config import ImageConfig
from padim_jax.datasets.files import is_image
from padim_jax.datasets.records import Record
from padim_jax.errors import UserError
from padim_jax.paths import Path

UNKNOWN = "unknown"  # the defect type of an image of which nothing is known

# Pictures drawn at a time. Each holds its image and map at full size, about 25 bytes a
# pixel, which is what bounds their number.
_THREADS = min(8, os.cpu_count() or 1)


def find(pattern: str) -> list[Record]:
    """Lists the images to score, sorted.

    Args:
      pattern: an image file, a folder (images anywhere below it) or a glob (`**`
        for any depth), of this machine or remote.

    Returns:
      Records whose relative paths start at the folder that all images share.

    Raises:
      UserError: there is none.
    """
    given = paths.parse(pattern)
    found: list[Path]
    if paths.is_folder(given):
        base, found = given, sorted(filter(is_image, paths.files_below(given)))
    elif given.exists():
        base, found = given.parent, [given]
    else:
        if isinstance(given, pathlib.Path):
            # pathlib's own glob takes no absolute pattern.
            names = sorted(glob.glob(str(given), recursive=True))  # noqa: PTH207
            found = [path for path in map(pathlib.Path, names) if not path.is_dir()]
        else:
            found = paths.glob(pattern)
        base = _common_folder(found) if found else given
    if not found:
        raise UserError(
            f"--input={pattern}: no image there; expected an image file, a folder of images or "
            "a quoted glob, as in '--input=parts/**/*.png'"
        )
    return [
        Record("test", path, None, 0, UNKNOWN, path.relative_to(base).as_posix())
        for path in found
    ]


def _common_folder(files: Sequence[Path]) -> Path:
    common = files[0].parent
    while not all(path.is_relative_to(common) for path in files):
        common = common.parent
    return common


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


def read_evaluation(path: Path, detector: str) -> Thresholds:
    """Thresholds and colours of an evaluation's metrics.json, for want of a calibration.

    Args:
      path: the file.
      detector: fingerprint of the one in use. Where the file is absent or of another
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
        if measured["detector"] != detector:
            return nothing
        image, pixel = measured["image_f1_threshold"], measured["pixel_f1_threshold"]
        scale = figures.ColorScale(*measured["color_scale"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not an evaluation's results ({type(error).__name__}: {error}); evaluate "
            "again (--mode=eval) or remove the file to predict without thresholds"
        ) from error
    if image is None:
        return dataclasses.replace(nothing, pixel=pixel, scale=scale)
    text = f"threshold {image:.4g}: the best F1 on the test set's labels, of {path}"
    return Thresholds(image, pixel, scale, text)


def restore_map(
    anomaly_map: Float32[np.ndarray, "h w"], size: tuple[int, int], config: ImageConfig
) -> Float32[np.ndarray, "height width"]:
    """Brings a map back onto the image that it was computed from.

    Undoes the resizing and cropping of `input_pipeline.preprocess`, with bilinear
    interpolation between pixel centres.

    Args:
      anomaly_map: at the size of the detector's input.
      size: original height and width.
      config: the preprocessing.

    Returns:
      The map at the original size; NaN where the crop left the image unscored.
    """
    top, left = input_pipeline.crop_offset(config)
    rows, rows_scored = _source_pixels(size[0], config.resize[0], top, config.size[0])
    columns, columns_scored = _source_pixels(size[1], config.resize[1], left, config.size[1])
    full = _interpolate(_interpolate(anomaly_map, rows).T, columns).T
    full[~rows_scored] = np.nan
    full[:, ~columns_scored] = np.nan
    return np.ascontiguousarray(full)


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


class Writer:
    """Writes predictions below a folder as they come.

    scores.csv gets one row an image, with what share of normal images scores lower where the
    model has a calibration; maps/ the raw map (float32 .npy or .tiff, NaN
    where unscored) and overlays/ the heat map over the image, both at the image's size.
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
    ):
        paths.make_folder(folder)
        self._folder, self._config, self._suffix = folder, config, map_suffix
        self._thresholds, self._calibration = thresholds, calibration
        self._table = folder / "scores.csv"
        if isinstance(self._table, pathlib.Path):
            self._file = self._table.open("w", newline="", encoding="utf-8")
        else:
            self._file = io.StringIO(newline="")
        self._rows = csv.writer(self._file)
        self._rows.writerow(("path", "score", "predicted", "calibrated"))
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
        self._upload()
        self._file.close()

    def add(
        self,
        records: Sequence[Record],
        sizes: Sequence[tuple[int, int]],
        maps: Float32[np.ndarray, "n h w"],
        scores: Float32[np.ndarray, " n"],
    ) -> None:
        """Writes a batch; without a colour scale the first batch sets it."""
        known = self._thresholds
        if known.scale is None:
            scale = figures.color_scale(maps, np.zeros(len(maps), int))
            self._thresholds = known = dataclasses.replace(known, scale=scale)
        calibrated = [""] * len(scores)
        if self._calibration is not None:
            calibrated = map(calibration_lib.shown, self._calibration.calibrated(scores))
        # In threads, since Pillow and NumPy leave Python's lock while they work.
        drawn = self._threads.map(self._draw, records, sizes, maps)
        for record, score, level, _ in zip(records, scores, calibrated, drawn, strict=True):
            predicted = "" if known.image is None else int(score >= known.image)
            self._rows.writerow((record.relative_path, score, predicted, level))
        self._file.flush()

    def _draw(
        self, record: Record, size: tuple[int, int], anomaly_map: Float32[np.ndarray, "h w"]
    ) -> None:
        known, name = self._thresholds, record.relative_path
        assert known.scale is not None
        full = restore_map(anomaly_map, size, self._config)
        results.save_map(self._folder / "maps", name, self._suffix, full)
        image = np.asarray(input_pipeline.read_image(record.image))
        overlay = figures.overlay(image, full, known.scale, known.pixel)
        path = self._folder / "overlays" / f"{name}.jpg"
        if isinstance(path, pathlib.Path):
            path.parent.mkdir(parents=True, exist_ok=True)
        figures.save(overlay, path)

    def _upload(self) -> None:
        if isinstance(self._file, io.StringIO):
            self._table.write_bytes(self._file.getvalue().encode())
