"""Predictions for images without labels: thresholds, tables, maps and overlays."""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image

from padim_jax.config.settings import Config, ImageConfig
from padim_jax.core import calibration as calibration_lib
from padim_jax.core import interpolation
from padim_jax.core import regions as regions_lib
from padim_jax.core.calibration import Calibration
from padim_jax.core.regions import Region
from padim_jax.data import decoding, input_pipeline, roi
from padim_jax.data.files import read_file, shown
from padim_jax.data.records import Record, Source
from padim_jax.detector import grid
from padim_jax.detector import scores as scores_lib
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.output import figures, regions_file, results, tables
from padim_jax.system import journal as journal_lib
from padim_jax.system import paths, progress
from padim_jax.system.journal import Journal, Row, Table
from padim_jax.system.paths import Path

TABLE, REGIONS, COCO = "scores.csv", "regions.json", "regions.coco.json"
EARLIER_COLUMNS = ("path", "score", "predicted", "calibrated")  # of tables without regions
COLUMNS = (*EARLIER_COLUMNS, "regions", "largest_area")

# Pictures drawn at a time, if memory allows; see `input_pipeline.ROOM`.
_THREADS = min(8, os.cpu_count() or 1)

_COMPARED = 256  # images of an interrupted run that are read again together
_MOST_TURNED = 1 << 20  # pixels of a map that are rotated back together


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Thresholds of predictions; None where unknown.

    Attributes:
      image: lowest image score called anomalous.
      pixel: lowest score of an outlined pixel.
      scale: colours of the heat maps.
      text: origin of the thresholds, for a person.
    """

    image: float | None = None
    pixel: float | None = None
    scale: figures.ColorScale | None = None
    text: str = ""


def thresholds(calibration: Calibration, score: str = "max") -> Thresholds:
    """Return thresholds from normal images, and the colours of maps.

    The image threshold has the middle colour if image scores are distances, as pixels are;
    otherwise the pixel threshold.

    Args:
      calibration: calibration of the detector.
      score: `config.score.image`.

    Returns:
      The thresholds.
    """
    low = calibration.typical_pixel
    distances = score in ("max", "top")
    middle = calibration.image_threshold if distances else calibration.pixel_threshold
    high = 2 * middle - low
    # A rate so high that typical images are called anomalous leaves no range for colours.
    scale = figures.ColorScale(low, high if high > low else low + max(1.0, abs(low)))
    return Thresholds(
        calibration.image_threshold,
        calibration.pixel_threshold,
        scale,
        calibration_lib.text(calibration),
    )


def read_evaluation(path: Path, *detector: str) -> Thresholds:
    """Return thresholds and colours of an evaluation's metrics.json, in place of a calibration.

    Args:
      path: the file.
      detector: fingerprints of the detector in use. If the file is absent or of another
        detector (fitted again since, say), nothing is known.

    Returns:
      The thresholds.

    Raises:
      UserError: the file is damaged.
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
    """Map an anomaly map back onto the original image.

    Undoes the resizing, rotation and cropping of `input_pipeline.preprocess`, with bilinear
    interpolation between pixel centres.

    Args:
      anomaly_map: (h, w) at the size of the detector's input.
      size: original height and width.
      config: preprocessing.
      view: view of the image; None for the centre, not rotated.

    Returns:
      The map at the original size; NaN where the crop or the region of interest left the image
      unscored.
    """
    top, left = input_pipeline.crop_offset(config) if view is None else view[1:]
    if view is not None and view.angle:
        return _restore_turned(anomaly_map, size, config, view)
    if config.roi:  # its edge has no zeros beside it
        covered = roi.at_input_size(str(config.roi), config)
        anomaly_map = anomaly_map[interpolation.nearest_inside(covered)]
    rows, rows_scored = _source_pixels(size[0], config.resize[0], top, config.size[0])
    columns, columns_scored = _source_pixels(size[1], config.resize[1], left, config.size[1])
    full = _interpolate(_interpolate(anomaly_map, rows).T, columns).T
    full[~rows_scored] = np.nan
    full[:, ~columns_scored] = np.nan
    if (outside := _outside(config, size)) is not None:
        full[outside] = np.nan
    return np.ascontiguousarray(full)


def _outside(
    config: ImageConfig, size: tuple[int, int]
) -> Bool[np.ndarray, "height width"] | None:
    """Return the pixels of an image outside of the region of interest, or None."""
    return ~roi.at_size(str(config.roi), size) if config.roi else None


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
    for start in range(0, size[0], rows):  # about 100 bytes per pixel of temporaries
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
    """Return bilinear samples at distances from the map's edges; NaN outside the map."""
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
    """Return the original's pixel centres in the map, and whether they lie within it."""
    edge = (np.arange(original) + 0.5) * resized / original - offset
    return np.clip(edge - 0.5, 0, size - 1), (edge >= 0) & (edge <= size)


def _interpolate(values: np.ndarray, position: np.ndarray) -> np.ndarray:
    low = np.minimum(position.astype(int), len(values) - 2)
    weight = (position - low).astype(np.float32)[:, None]
    return values[low] * (1 - weight) + values[low + 1] * weight


def files(folder: Path, name: str, map_suffix: str, masks: bool) -> tuple[Path, ...]:
    """Return the paths of an image's pictures as `Pictures` writes them.

    Args:
      folder: folder of the predictions.
      name: relative path of the image.
      map_suffix: npy or tiff.
      masks: whether there is a pixel threshold.

    Returns:
      Map and overlay, and with a pixel threshold the mask.
    """
    pictures = folder / "maps" / f"{name}.{map_suffix}", folder / "overlays" / f"{name}.jpg"
    return (*pictures, folder / "masks" / f"{name}.png") if masks else pictures


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Results of drawing an image.

    Attributes:
      size: height and width of the image.
      regions: its regions, the strongest first; None without a pixel threshold.
    """

    size: tuple[int, int]
    regions: tuple[Region, ...] | None


class Pictures:
    """Writer of predictions' pictures below a folder.

    maps/ gets the raw map (float32 .npy or .tiff, NaN where unscored), overlays/ the heat map
    over the image with its regions, masks/ the regions' pixels in white on black, all at the
    image's size.
    """

    def __init__(self, folder: Path, config: Config, map_suffix: str, thresholds: Thresholds):
        self._folder, self._config, self._suffix = folder, config, map_suffix
        self._thresholds, self.scale = thresholds, thresholds.scale

    def set_scale(self, maps: Float32[np.ndarray, "n h w"]) -> None:
        """Set the colour scale from the first maps, if there is none yet."""
        if self.scale is None:
            pixels = grid.scored_pixels(self._config.image, maps)
            self.scale = figures.color_scale(pixels, np.zeros(len(maps), int))

    def draw(
        self, name: str, path: Path, data: bytes, anomaly_map: Float32[np.ndarray, "h w"]
    ) -> Drawn:
        """Write an image's pictures, and return its regions; the colour scale must be set.

        The image is decoded a second time: kept at full size from its scoring on, images would
        take memory that grows with the batch. Local files are flushed to disk: their row,
        written later, states that they are complete.

        Args:
          name: relative path of the image.
          path: path of the image file, for messages.
          data: the file's bytes.
          anomaly_map: (h, w) at the size of the detector's input.

        Raises:
          UserError: they cannot be written.
        """
        with input_pipeline.ROOM.held(input_pipeline.DRAWING * decoding.pixel_count(data)):
            counts = self._config.image.counts
            image = np.asarray(input_pipeline.decode(data, shown(path), counts))
            return self._write(name, image, anomaly_map)

    def _write(
        self,
        name: str,
        image: UInt8[np.ndarray, "height width 3"],
        anomaly_map: Float32[np.ndarray, "h w"],
    ) -> Drawn:
        assert self.scale is not None
        size, config, threshold = image.shape[:2], self._config, self._thresholds.pixel
        full = restore_map(anomaly_map, size, config.image)
        predicted = found = None
        if threshold is not None:
            found = scores_lib.find_regions(config, anomaly_map, threshold, size)
            predicted = _mask(full, anomaly_map, threshold, size, config)
        boxes = [region.box for region in found or ()]
        outside = _outside(config.image, size)
        overlay = figures.overlay(image, full, self.scale, predicted, boxes, outside)
        written = files(self._folder, name, self._suffix, predicted is not None)
        pictures = [overlay] if predicted is None else [overlay, Image.fromarray(predicted)]
        with journal_lib.writing(written[1]):
            results.save_map(self._folder / "maps", name, self._suffix, full)
            for path, picture in zip(written[1:], pictures, strict=True):
                if isinstance(path, pathlib.Path):
                    path.parent.mkdir(parents=True, exist_ok=True)
                figures.save(picture, path)
            for file in written:
                if isinstance(file, pathlib.Path):
                    paths.sync(file)
        return Drawn(size, found)


def _mask(
    full: Float32[np.ndarray, "height width"],
    anomaly_map: Float32[np.ndarray, "h w"],
    threshold: float,
    size: tuple[int, int],
    config: Config,
) -> Bool[np.ndarray, "height width"]:
    """Return the pixels of the regions that count, from the map at the image's size."""
    high, rule = anomaly_map >= np.float32(threshold), config.regions
    if rule.min_area and high.any():
        frame = input_pipeline.frame(config.image, size)
        labels, _ = regions_lib.label(anomaly_map, threshold, frame, rule.min_area, rule.close)
        if (dropped := high & (labels == 0)).any():
            below = np.where(dropped, np.nextafter(np.float32(threshold), -np.inf), anomaly_map)
            full = restore_map(below.astype(np.float32), size, config.image)
    return full >= threshold


def is_table(path: Path) -> bool:
    """Return whether a file is a table of predictions, of this version or an earlier one."""
    columns = paths.first_line(path).strip().decode(errors="replace").split(",")
    return tuple(columns[: len(EARLIER_COLUMNS)]) == EARLIER_COLUMNS


def rows(
    names: Sequence[str],
    scores: Float32[np.ndarray, " n"],
    drawn: Sequence[Drawn],
    threshold: float | None,
    calibration: Calibration | None,
    decide: str,
) -> list[dict[str, Any]]:
    """Return the table's rows for images, by `COLUMNS`; "" where a value is unknown.

    Args:
      names: relative paths of the images.
      scores: image scores.
      drawn: what was drawn of them.
      threshold: lowest score called anomalous, or None.
      calibration: calibration of the detector, or None.
      decide: `config.decide`.

    Returns:
      A row per image.
    """
    calibrated: Sequence[str] = [""] * len(scores)
    if calibration is not None:
        levels = calibration.calibrated(scores)
        calibrated = [calibration_lib.shown(float(level)) for level in levels]
    predicted: Sequence[Any] = [""] * len(scores)
    if threshold is not None:
        has_region = np.array([bool(x.regions) for x in drawn], bool)
        called = calibration_lib.decided(decide, scores >= threshold, has_region)
        predicted = called.astype(int).tolist()
    return [
        {
            "path": name,
            "score": str(score),  # the shortest digits that give this float32
            "predicted": verdict,
            "calibrated": level,
            "regions": "" if one.regions is None else len(one.regions),
            "largest_area": ""
            if one.regions is None
            else regions_file.rounded(max((x.area for x in one.regions), default=0.0)),
        }
        for name, score, verdict, level, one in zip(
            names, scores, predicted, calibrated, drawn, strict=True
        )
    ]


def encode_row(columns: Sequence[str]) -> Callable[[Mapping[str, Any]], bytes]:
    """Return a function from a row's fields to a line of a table."""
    return lambda fields: tables.as_csv([[fields.get(column, "") for column in columns]])


_HEADER, _encode = tables.as_csv([COLUMNS]), encode_row(COLUMNS)


def open_journal(folder: Path, settings: Mapping[str, Any]) -> Journal:
    """Open the journal of predictions below a folder, which writes scores.csv along the way.

    Object stores cannot append rows to a file: there the rows are kept in memory, and
    scores.csv has only its header until `Writer.finish`.

    Args:
      folder: existing folder of the predictions.
      settings: see `Journal`.

    Returns:
      The journal.

    Raises:
      UserError: see `Journal`.
    """
    if isinstance(folder, pathlib.Path):
        table = {folder / TABLE: Table(_HEADER, _encode)}
        return Journal(folder / journal_lib.NAME, settings, table)
    (folder / TABLE).write_bytes(_HEADER)
    return Journal(None, settings)


def resume(
    journal: Journal,
    folder: Path,
    map_suffix: str,
    source: Source,
    batch_size: int,
    devices: Devices,
    masks: bool,
) -> int:
    """Keep an interrupted run's results that this run would repeat; remove the rest.

    Files of images that are already scored are read again: their contents count, not
    their dates.

    Args:
      journal: journal of the folder; reduced to the rows that are kept.
      folder: folder of the predictions.
      map_suffix: suffix of the maps' files.
      source: images of this run.
      batch_size: batch size of this run. The last bit of a score depends on an image's place in
        its batch: only complete batches are kept.
      devices: devices of this process, for a progress bar.
      masks: whether there are masks; see `files`.

    Returns:
      Number of leading images that are scored, with all their files written.
    """
    records, before, kept = source.records, journal.count(), 0
    if journal.other_settings:
        names = ", another ".join(journal.other_settings)
        print(f"interrupted predictions are redone: those were made with another {names}")
    else:
        kept = _unchanged(journal, folder, map_suffix, source, devices, masks)
        if not kept == before == len(records):
            kept -= kept % batch_size
        if kept:
            print(
                f"going on with interrupted predictions, after {kept} of {len(records)} images"
            )
        if kept < before:
            behind = f"behind {shown(records[kept - 1].relative_path)} " if kept else ""
            print(f"interrupted predictions {behind}are redone: images or results have changed")
    _remove_pictures(folder, map_suffix, records[:kept], masks)
    journal.keep(kept)
    return kept


def _unchanged(
    journal: Journal,
    folder: Path,
    map_suffix: str,
    source: Source,
    devices: Devices,
    masks: bool,
) -> int:
    """Return the number of leading images that are unchanged, including their pictures."""

    def digest(number: int) -> bytes:
        try:
            return hashlib.sha256(source.read(number)[0]).digest()
        except UserError:  # scoring it again will report the error
            return b""

    rows, total = journal.rows(), min(journal.count(), len(source.records))
    with (
        progress.bar(total, "compare", devices.process == 0) as bar,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        for start in range(0, total, _COMPARED):
            numbers = range(start, min(start + _COMPARED, total))
            found = threads.map(digest, numbers)
            for number, content, row in zip(numbers, found, rows, strict=False):  # more rows
                name = source.records[number].relative_path
                pictures = files(folder, name, map_suffix, masks)
                if (row.fields["path"], row.identity) != (name, content):
                    return number
                if not all(picture.exists() for picture in pictures):
                    return number
            bar.update(len(numbers))
    return total


def _remove_pictures(
    folder: Path, map_suffix: str, records: Sequence[Record], masks: bool
) -> None:
    """Remove pictures of images that are not among the records."""
    names = [x.relative_path for x in records]
    known = {path for name in names for path in files(folder, name, map_suffix, masks)}
    for place in (folder / "maps", folder / "overlays", folder / "masks"):
        if paths.is_folder(place):
            for path in paths.files_below(place):
                if path not in known and not paths.is_system_file(path.name):
                    path.unlink()


class Writer:
    """Writer that draws predictions below a folder and adds their rows to its journal.

    An image's row is written last: if it exists, the pictures are complete. `Pictures` draws
    them.

    Args:
      folder: folder of the predictions.
      config: configuration in use.
      map_suffix: npy or tiff.
      thresholds: thresholds of the predictions; without a scale it is the journal's, and
        without one there the first batch's.
      calibration: calibration for calibrated scores; None for none.
      journal: see `open_journal`.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        map_suffix: str,
        thresholds: Thresholds,
        calibration: Calibration | None,
        journal: Journal,
    ):
        if thresholds.scale is None and (scale := journal.fact("scale")) is not None:
            thresholds = dataclasses.replace(thresholds, scale=figures.ColorScale(*scale))
        self._pictures = Pictures(folder, config, map_suffix, thresholds)
        self._thresholds, self._calibration = thresholds, calibration
        self._folder, self._config, self._journal = folder, config, journal
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS)

    def __enter__(self) -> "Writer":
        """Return itself; its threads end with the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def add(
        self,
        records: Sequence[Record],
        maps: Float32[np.ndarray, "n h w"],
        scores: Float32[np.ndarray, " n"],
        digests: UInt8[np.ndarray, "n 32"],
    ) -> None:
        """Write a batch; either all its rows are added or none.

        Args:
          records: records of the images.
          maps: anomaly maps.
          scores: image scores.
          digests: SHA-256 of the files that the detector saw.

        Raises:
          UserError: an image cannot be read again, or has changed; or something cannot be
            written.
        """
        self._pictures.set_scale(maps)
        identities = [digest.tobytes() for digest in digests]
        # In threads, since Pillow and NumPy release the GIL.
        drawn = list(self._threads.map(self._draw, records, maps, identities))
        names = [record.relative_path for record in records]
        thresholds, decide = self._thresholds, self._config.decide
        fields = rows(names, scores, drawn, thresholds.image, self._calibration, decide)
        fields = [
            row | regions_file.fields(one.size, one.regions)
            for row, one in zip(fields, drawn, strict=True)
        ]
        done = [Row(x, "scored", y) for x, y in zip(identities, fields, strict=True)]
        assert self._pictures.scale is not None
        self._journal.add(done, scale=dataclasses.astuple(self._pictures.scale))

    def finish(self) -> None:
        """Write the complete tables, whatever happened to them meanwhile."""
        self._journal.keep(self._journal.count())
        table, journal, rule = self._folder / TABLE, self._journal, self._config.regions
        if not isinstance(table, pathlib.Path):
            lines = (_encode(row.fields) for row in journal.rows())
            table.write_bytes(b"".join((_HEADER, *lines)))
        if (threshold := self._thresholds.pixel) is None:
            return
        images = (row.fields for row in journal.rows())
        about = {"threshold": threshold, **dataclasses.asdict(rule)}
        regions_file.write(self._folder / REGIONS, regions_file.document(about, images))
        if self._config.outputs.coco:
            images = (row.fields for row in journal.rows())
            regions_file.write(self._folder / COCO, regions_file.coco(images))

    def _draw(
        self, record: Record, anomaly_map: Float32[np.ndarray, "h w"], digest: bytes
    ) -> Drawn:
        data = read_file(record.image)
        if hashlib.sha256(data).digest() != digest:
            raise UserError(
                f"{record.image}: was written to while it was scored; run the same command "
                "again when it is whole"
            )
        return self._pictures.draw(record.relative_path, record.image, data, anomaly_map)
