"""Images -> scores and verdicts, by whatever measures them: JAX, or another runtime.

Nothing here imports JAX: a detector in an ONNX file starts without it.
"""

import abc
import concurrent.futures
import dataclasses
import itertools
import os
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from padim_jax.config.settings import Config
from padim_jax.core import calibration as calibration_lib
from padim_jax.core import combined_score
from padim_jax.core import regions as regions_lib
from padim_jax.core.calibration import Calibration
from padim_jax.core.regions import Region
from padim_jax.data import input_pipeline
from padim_jax.errors import DataWarning, UserError
from padim_jax.models.weights.identity import WeightsIdentity


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Anomalies:
    """Scores of n images.

    Attributes:
      maps: Mahalanobis distance per pixel of the preprocessed image, blurred.
      scores: image score of each; see `core.image_score`.
      samples: about 2,000 numbers of each image's embeddings, at the same positions for all
        images.
      is_anomalous: whether each image is called anomalous, by `config.decide`: by default,
        whether its score is at least the image threshold. None if the detector has no
        thresholds.
      rarity: estimated fraction of normal images that score lower, in [0, 1) (see
        `Calibration.calibrated`); None if the detector has no thresholds.
      regions: for each image its regions above the pixel threshold, the strongest first; see
        `regions.Region`. None if the detector has no thresholds.
    """

    maps: Float32[np.ndarray, "n h w"]
    scores: Float32[np.ndarray, " n"]
    samples: Float32[np.ndarray, "n _s"] | None = None
    is_anomalous: Bool[np.ndarray, " n"] | None = None
    rarity: Float[np.ndarray, " n"] | None = None
    regions: tuple[tuple[Region, ...], ...] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    def __repr__(self) -> str:
        """Return two lines: number and size of images, and their scores."""
        count, height, width = self.maps.shape
        called = ""
        if self.is_anomalous is not None:
            called = f", {np.count_nonzero(self.is_anomalous)} anomalous"
        scores = f"{self.scores.min():.4g} to {self.scores.max():.4g}" if count else "none"
        return (
            f"Anomalies: {count} images, maps of {height}x{width}{called}\n  scores: {scores}"
        )


@dataclasses.dataclass(frozen=True)
class Measures:
    """Measures of n images, of which image scores are made.

    Attributes:
      maps: as in `Anomalies`.
      summaries: see `image_score.summaries`.
      samples: as in `Anomalies`.
    """

    maps: Float32[np.ndarray, "n h w"]
    summaries: Float32[np.ndarray, "n _k"]
    samples: Float32[np.ndarray, "n _s"]


class Scorer(abc.ABC):
    """A model that measures images: a detector in JAX, or an exported one elsewhere.

    Attributes:
      config: configuration in use.
      weights: origin and digest of the backbone's weights.
      images: SHA-256 of each fitted file.
      calibration: thresholds from normal images, or None.
      left_out: number of fitted images left out at a time; 0 to score images with the complete
        model.
      process: id of the process that created it; no other process can use it.
    """

    config: Config
    weights: WeightsIdentity
    images: UInt8[np.ndarray, "s 32"]
    calibration: Calibration | None
    left_out: int
    process: int

    def __repr__(self) -> str:
        """Return two lines: model, number of fitted images, and thresholds."""
        model = self.config.model
        height, width = self.config.image.size
        found = "none"
        if (thresholds := self.calibration) is not None:
            found = (
                f"image {thresholds.image_threshold:.4g} (at most "
                f"{max(thresholds.image_rate, thresholds.image_promised_rate):.2g} of normal "
                f"images), pixel {thresholds.pixel_threshold:.4g}"
            )
        return (
            f"Detector: {model.backbone}, {'+'.join(model.layers)}, {model.channels} channels, "
            f"{height}x{width} pixels, fitted to {self.count} images\n  thresholds: {found}"
        )

    @property
    def count(self) -> int:
        """Return the number of fitted images."""
        return len(self.images)

    @property
    @abc.abstractmethod
    def fingerprints(self) -> tuple[str, ...]:
        """Digests that identify the model; the first is this version's."""

    @property
    @abc.abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of what computes scores, by names for a person."""

    @abc.abstractmethod
    def measure(
        self, images: UInt8[np.ndarray, "b h w 3"], names: Sequence[str] = ()
    ) -> Measures:
        """Compute maps and their summaries of images that are already preprocessed.

        Args:
          images: (b, h, w, 3), as from `input_pipeline.preprocess`.
          names: names of the images for error messages.

        Raises:
          UserError: a summary is not finite (the image is named), or this process was forked
            from the one that loaded the model.
        """

    @abc.abstractmethod
    def require_memory(self, tests: int = 0) -> None:
        """Stop a run whose scoring does not fit into memory.

        Args:
          tests: number of images to evaluate, whose maps are kept; 0 for predictions.

        Raises:
          UserError: there is too little memory.
        """


def require_own_process(detector: Scorer) -> None:
    """Reject a forked detector: the threads of JAX and of other runtimes do not survive forks.

    Raises:
      UserError: this process was forked from the one that loaded the detector.
    """
    if detector.process != os.getpid():
        raise UserError(
            f"the detector was loaded in process {detector.process}, of which this one "
            f"({os.getpid()}) was forked, and neither JAX nor another runtime works after a "
            "fork. Load it in each process, and start these with "
            'multiprocessing.get_context("spawn")'
        )


def find_regions(
    config: Config,
    anomaly_map: Float32[np.ndarray, "h w"],
    threshold: float,
    size: Sequence[int],
    seen: input_pipeline.View | None = None,
) -> tuple[Region, ...]:
    """Return the regions of a map that count; see `regions.find`.

    Args:
      config: preprocessing, and which regions count.
      anomaly_map: (h, w).
      threshold: pixel threshold.
      size: height and width of the original image.
      seen: view of the image; None for the centre.
    """
    frame = input_pipeline.frame(config.image, size, seen)
    rule = config.regions
    return regions_lib.find(anomaly_map, threshold, frame, rule.min_area, rule.close)


def score_pixels(
    detector: Scorer, images: UInt8[np.ndarray, "b h w 3"], names: Sequence[str] = ()
) -> Anomalies:
    """Score images that are already preprocessed (resized and cropped, uint8).

    Args:
      detector: fitted model.
      images: (b, h, w, 3), as from `input_pipeline.preprocess`; see `measure_pixels`.
      names: names of the images for error messages.

    Returns:
      Maps (b, h, w), scores (b,) and samples.

    Raises:
      UserError: see `measure_pixels` and `image_scores`.
      ValueError: see `measure_pixels`.
    """
    measures = detector.measure(images, names)
    scores = image_scores(detector, measures.summaries)
    return Anomalies(measures.maps, scores, measures.samples)


def image_scores(
    detector: Scorer, summaries: Float32[np.ndarray, "b _k"]
) -> Float32[np.ndarray, " b"]:
    """Return the image scores, by `config.score.image`, of what was measured.

    Args:
      detector: model that measured the images.
      summaries: see `image_score.summaries`.

    Returns:
      (b,) float32.

    Raises:
      UserError: the score is `combined`, and the detector has no normal images to measure by.
    """
    require_scorable(detector)
    if summaries.shape[1] == 1:
        return summaries[:, 0]
    thresholds = detector.calibration
    assert thresholds is not None
    means, deviations = thresholds.summary_means, thresholds.summary_deviations
    return combined_score.combine(summaries, np.array(means), np.array(deviations))


def require_scorable(detector: Scorer) -> None:
    """Raise UserError if scores or verdicts need thresholds that the detector has not."""
    thresholds = detector.calibration
    _require_decided(detector.config, thresholds)
    if detector.config.score.image == "combined" and not (
        thresholds and thresholds.summary_means
    ):
        raise UserError(
            "config.score.image=combined: the model has no thresholds, and this score is "
            "measured by the normal images that they were found on. Find thresholds "
            "(--mode=calibrate --input=<normal images>; in Python "
            "detector.update([], thresholds=images)), or use another score"
        )


def _require_decided(config: Config, thresholds: Calibration | None) -> None:
    """Raise UserError unless thresholds keep their promise for the verdicts asked for."""
    rule = config.decide, config.regions.min_area, config.regions.close
    if config.decide == "score" or (thresholds and _decided_by(thresholds) == rule):
        return
    kept = "it has none"
    if thresholds:
        kept = "it has them for config.decide={}, regions.min_area={:g}, close={:g}".format(
            *_decided_by(thresholds)
        )
    raise UserError(
        f"config.decide={rule[0]}: the model needs thresholds for it with config.regions."
        f"min_area={rule[1]:g} and close={rule[2]:g}, and {kept}. Find them with these "
        "settings (--mode=calibrate --input=<normal images that were not fitted>), or fit with "
        "them"
    )


def _decided_by(thresholds: Calibration) -> tuple[str, float, float]:
    return thresholds.decide, thresholds.min_area, thresholds.close


def score(
    detector: Scorer, images: Sequence[input_pipeline.Input] | UInt8[np.ndarray, "..."]
) -> Anomalies:
    """Score images of any size, given as arrays, paths, files, bytes or Pillow images.

    They are converted, resized and cropped as in training, and processed in batches of
    `config.batch_size`.

    Args:
      detector: fitted model.
      images: uint8 or uint16 arrays (h, w), (h, w, 1), (h, w, 3) or (h, w, 4), paths of image
        files, their bytes, files opened in binary mode or Pillow images, also mixed. Each is
        treated like an image file of the same content; see `decoding.open_rgb`.

    Returns:
      Maps at the size of the detector's input, and scores.

    Raises:
      UserError: an image cannot be read, is empty or too large, or is not an image (it is
        named); or this process was forked from the one that loaded the detector.
      TypeError: an array has another type or shape, or a single image was given.
    """
    if isinstance(images, str | os.PathLike):
        raise TypeError("images: a single image; expected several, as in [image]")
    input_pipeline.require_several(images)
    # Few shapes mean few compilations: up to a batch the next power of two, then whole batches.
    size = min(detector.config.batch_size, 1 << max(0, len(images) - 1).bit_length())
    maps = np.empty((len(images), *detector.config.image.size), np.float32)
    scores = np.empty(len(images), np.float32)
    sizes: list[tuple[int, int]] = []
    start = 0
    for found, of in _scored(detector, images, size):
        done = slice(start, start := start + len(found.scores))
        maps[done], scores[done] = found.maps, found.scores
        sizes += of
    return _judged(detector, Anomalies(maps, scores), sizes)


def stream(
    detector: Scorer, images: Iterable[input_pipeline.Input], batch_size: int | None = None
) -> Generator[Anomalies, None, None]:
    """Score images of any size batch by batch, in bounded memory.

    The next batch is decoded in threads while one is scored.

    Args:
      detector: fitted model.
      images: see `score`; at most two batches of an iterable are read ahead.
      batch_size: images per batch; None for `config.batch_size`.

    Yields:
      The scores of the next images, in their order.

    Raises:
      UserError: see `score`.
      TypeError: see `score`.
      ValueError: `batch_size` is not above 0.
    """
    for found, sizes in _scored(detector, images, batch_size):
        yield _judged(detector, found, sizes)


def _scored(
    detector: Scorer, images: Iterable[input_pipeline.Input], batch_size: int | None
) -> Generator[tuple[Anomalies, list[tuple[int, int]]], None, None]:
    """Yield maps and scores of the next images as `stream` does, and the images' sizes."""
    config = detector.config
    size = config.batch_size if batch_size is None else batch_size
    if size < 1:
        raise ValueError(f"batch_size={size}: expected a number of images above 0")
    if detector.left_out:
        raise ValueError("the detector leaves images out, to find thresholds; see `finalize`")
    few: dict[str, int] = {}
    total = 0
    with concurrent.futures.ThreadPoolExecutor() as threads:

        def decoded() -> Iterator[tuple[list[str], list[concurrent.futures.Future]]]:
            rest = enumerate(images)
            while chunk := list(itertools.islice(rest, size)):
                names = [_name(item, i) for i, item in chunk]
                yield (
                    names,
                    [
                        threads.submit(input_pipeline.load_input, item, name, config.image)
                        for (_, item), name in zip(chunk, names, strict=True)
                    ],
                )

        chunks = decoded()
        try:
            following = next(chunks, None)
            while following is not None:
                (names, futures), following = following, next(chunks, None)
                pixels = np.zeros((size, *config.image.size, 3), np.uint8)
                sizes = []
                for i, (name, future) in enumerate(zip(names, futures, strict=True)):
                    pixels[i], levels, original = future.result()
                    sizes.append(original)
                    if levels is not None:
                        few[name] = levels
                found = score_pixels(detector, pixels, names)
                count, total = len(names), total + len(names)
                yield Anomalies(found.maps[:count], found.scores[:count]), sizes
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
    if few:
        text = input_pipeline.few_levels(few, total)
        warnings.warn(DataWarning(text), stacklevel=3)


def _name(item: input_pipeline.Input, number: int) -> str:
    if isinstance(item, str | os.PathLike):
        return os.fspath(item)
    return f"images[{number}]"


def _judged(detector: Scorer, found: Anomalies, sizes: Sequence[tuple[int, int]]) -> Anomalies:
    """Return the scores with the verdicts of the detector's thresholds added."""
    if (thresholds := detector.calibration) is None:
        return found
    regions = tuple(
        find_regions(detector.config, anomaly_map, thresholds.pixel_threshold, size)
        for anomaly_map, size in zip(found.maps, sizes, strict=True)
    )
    high = found.scores >= thresholds.image_threshold
    has_region = np.array([len(x) > 0 for x in regions], bool)
    return dataclasses.replace(
        found,
        is_anomalous=calibration_lib.decided(detector.config.decide, high, has_region),
        rarity=thresholds.calibrated(found.scores),
        regions=regions,
    )
