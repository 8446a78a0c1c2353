"""The complete detector: a fitted model, its identity, and functions from images to scores."""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import os
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8

from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config
from padim_jax.core import calibration as calibration_lib
from padim_jax.core import embedding, image_score
from padim_jax.core import regions as regions_lib
from padim_jax.core.calibration import Calibration
from padim_jax.core.regions import Region
from padim_jax.core.types import Gaussian, LowRank, Moments, Projection, Samples
from padim_jax.data import input_pipeline
from padim_jax.detector import geometry, steps
from padim_jax.detector.geometry import Shape
from padim_jax.detector.steps import Embedded, Variables
from padim_jax.devices import parallel
from padim_jax.errors import DataWarning, UserError
from padim_jax.models.weights import pretrained

# Settings that scores depended on in padim_jax 0.1.0, in that order; see `_first_fingerprint`.
_FIRST_SETTINGS = {
    "image": ("resize", "method", "crop", "mean", "std", "rotation", "crop_at", "seed"),
    "model": (
        *("backbone", "layers", "weights", "channels", "seed", "reduction", "pooling"),
        *("upsample", "precision", "regularization", "statistics"),
    ),
    "map": ("upsample", "sigma"),
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Detector:
    """A fitted model: everything needed to score an image. Compared by identity.

    Attributes:
      config: configuration in use; settings that affect the statistics are those of the fit.
      index: channels kept, in the embedding's order.
      variables: variables of the backbone, and the projection; see `steps.with_projection`.
      weights: origin and digest of the backbone's weights.
      gaussian: Gaussians of all patch positions, on the devices that score.
      identity: digest of the statistics, as stored with them.
      images: SHA-256 of each fitted file.
      calibration: thresholds from normal images, or None.
      left_out: number of images that `gaussian` is prepared to leave out at a time; 0 to score
        images with the complete model.
      process: id of the process that created the detector; no other process can use it.
    """

    config: Config
    index: Int[np.ndarray, " d"]
    variables: Variables
    weights: pretrained.WeightsIdentity
    gaussian: Gaussian | LowRank
    identity: str
    images: UInt8[np.ndarray, "s 32"]
    calibration: Calibration | None = None
    left_out: int = 0
    process: int = dataclasses.field(default_factory=os.getpid, repr=False, compare=False)

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
    def projection(self) -> Projection | None:
        """Return the matrix of a reduction by projection, or None."""
        found = self.variables.get(steps.PROJECTION)
        return None if found is None else np.asarray(found)


@jax.tree_util.register_dataclass
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


@dataclasses.dataclass(frozen=True)
class _Static:
    """Static fields of a detector; equal for equal models in use.

    Attributes:
      key: values by which detectors are compared.
      values: the fields.
    """

    key: tuple[Any, ...]
    values: Mapping[str, Any] = dataclasses.field(compare=False)


def register(cls: type[Detector]) -> None:
    """Register a detector class as a pytree: arrays are leaves, all else is static."""

    def flatten(detector: Detector) -> tuple[tuple[Any, Any], _Static]:
        values = {field.name: getattr(detector, field.name) for field in fields}
        arrays = values.pop("variables"), values.pop("gaussian")
        key = (fingerprint(detector), detector.config, detector.calibration, detector.left_out)
        return arrays, _Static(key, values)

    def unflatten(static: _Static, arrays: tuple[Any, Any]) -> Detector:
        detector = object.__new__(cls)  # leaves may be anything
        variables, fitted = arrays
        for name, value in {
            **static.values,
            "variables": variables,
            "gaussian": fitted,
        }.items():
            object.__setattr__(detector, name, value)
        return detector

    fields = dataclasses.fields(cls)
    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


register(Detector)


def fingerprint(detector: Detector) -> str:
    """Return the SHA-256 hex digest that identifies a detector: thresholds belong to one.

    It covers the statistics, the weights, and the settings that scores depend on. A setting
    added by a later version does not change the fingerprints of models without it.
    """
    said = {
        "identity": detector.identity,
        "weights": detector.weights.sha256,
        **config_lib.score_settings(detector.config),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def fingerprints(detector: Detector) -> tuple[str, ...]:
    """Return all fingerprints that stored thresholds of a detector may have.

    The first is this version's; see `fingerprint`.
    """
    first = _first_fingerprint(detector)
    return (fingerprint(detector), *([] if first is None else [first]))


def _first_fingerprint(detector: Detector) -> str | None:
    """Return the fingerprint of padim_jax 0.1.0, made of its dataclasses' text.

    None for a model with settings added later.
    """
    config = detector.config
    stored = config_lib.to_stored(config)
    texts = []
    if "score" in stored:
        return None
    for group, names in _FIRST_SETTINGS.items():
        if set(stored[group]) != set(names):
            return None
        values = {name: getattr(getattr(config, group), name) for name in names}
        if group == "model":
            values |= {"weights": detector.weights.sha256, "statistics": ""}
        listed = ", ".join(f"{name}={value!r}" for name, value in values.items())
        texts.append(f"{group.capitalize()}Config({listed})")
    said = f"({detector.identity!r}, {', '.join(texts)})"
    return hashlib.sha256(said.encode()).hexdigest()


def require_fitting(
    config: Config,
    index: np.ndarray,
    fitted: Moments | Samples | Gaussian | LowRank,
    images: int,
    projection: np.ndarray | None,
) -> None:
    """Check that a file's arrays match its configuration.

    Args:
      config: configuration of the model.
      index: channels kept.
      fitted: statistics or Gaussians, on the devices.
      images: number of image digests in the file.
      projection: projection matrix (C, D), or None.

    Raises:
      ValueError: they do not match.
    """
    model, total = config.model, geometry.total_channels(config.model)
    matrix = (total, model.channels) if geometry.is_projected(model) else None
    if (None if projection is None else projection.shape) != matrix:
        raise ValueError("its projection is not of its configuration")
    if projection is not None and not np.all(np.isfinite(projection)):
        raise ValueError("its projection is not finite")
    if not np.array_equal(index, geometry.channel_index(model)):
        raise ValueError("its channels are not those of its configuration")
    shapes = geometry.pyramid(config.image, model, index.tolist()).shapes
    arrays = [x for x in jax.tree.leaves(fitted) if x.ndim > 1]
    room = fitted.values[0].shape[-2] if isinstance(fitted, Samples) else images
    devices = len(arrays[0]) * parallel.every().processes
    own = -(-shapes[0][0] // devices)  # regions per device, as `parallel.split` has them
    if [x.shape[1:] for x in arrays] != [(own, *s) for s in _shapes(fitted, shapes, room)]:
        raise ValueError("its numbers have other shapes than its configuration says")
    if isinstance(fitted, Moments | Samples):
        count = int(np.asarray(fitted.count)[0])
        if count != images or room < images:
            raise ValueError(f"its statistics are of {count} images, and not of {images}")


def _shapes(
    fitted: Moments | Samples | Gaussian | LowRank, shapes: Sequence[Shape], images: int
) -> list[tuple[int, ...]]:
    """Return the shapes of a region's arrays, in the order of JAX's leaves."""
    means = [(n, d) for _, n, d in shapes]
    if isinstance(fitted, Moments | Gaussian):
        return [
            *means,
            *((n, d, e) for i, (_, n, d) in enumerate(shapes) for _, _, e in shapes[i:]),
        ]
    rows = [(n, images, d) for _, n, d in shapes]
    if isinstance(fitted, Samples):
        return [*rows]
    return [*means, *rows, (shapes[0][1], images, images)]


def score_pixels(
    detector: Detector, images: UInt8[np.ndarray, "b h w 3"], names: Sequence[str] = ()
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
    measures = measure_pixels(detector, images, names)
    scores = image_scores(detector, measures.summaries)
    return Anomalies(measures.maps, scores, measures.samples)


def image_scores(
    detector: Detector, summaries: Float32[np.ndarray, "b _k"]
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
    if detector.config.score.image != "combined" or detector.calibration is None:
        return summaries[:, 0]
    thresholds = detector.calibration
    means, deviations = thresholds.summary_means, thresholds.summary_deviations
    return image_score.combine(summaries, np.array(means), np.array(deviations))


def require_scorable(detector: Detector) -> None:
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


def measure_pixels(
    detector: Detector, images: UInt8[np.ndarray, "b h w 3"], names: Sequence[str] = ()
) -> Measures:
    """Compute maps and their summaries of images that are already preprocessed.

    With several processes, each passes the same number of its own images and gets their
    measures. A detector that leaves k images out at a time (`Detector.left_out`) accepts fitted
    images only: those of all processes together are groups of k, each image is scored by the
    model without its group, and only padding follows the last complete group.

    Args:
      detector: fitted model.
      images: (b, h, w, 3), as from `input_pipeline.preprocess`.
      names: names of the images for error messages.

    Returns:
      The measures.

    Raises:
      UserError: a summary is not finite (the image is named), or this process was forked from
        the one that loaded the detector.
      ValueError: fewer than two images would be left, which give no covariance; or the detector
        was given up by `calibrate.calibrate`.
    """
    levels = embed_pixels(detector, images)
    measures = measure_levels(detector, levels, names)
    count = len(images)
    return Measures(measures.maps[:count], measures.summaries[:count], measures.samples[:count])


def embed_pixels(detector: Detector, images: UInt8[np.ndarray, "b h w 3"]) -> Embedded:
    """Return the embeddings by level of images that are already preprocessed.

    Args:
      detector: fitted model.
      images: (b, h, w, 3), as from `input_pipeline.preprocess`; filled up with zeros to a
        multiple of the number of devices.

    Returns:
      Embeddings of all processes' images in the devices' regions; see `steps.embed_batch`.

    Raises:
      UserError: this process was forked from the one that loaded the detector.
    """
    _require_usable(detector)
    config, local = detector.config, len(detector.gaussian.mean[0])
    if padding := -len(images) % local:
        images = np.pad(images, ((0, padding), (0, 0), (0, 0), (0, 0)))
    devices = parallel.Devices(local, parallel.every().processes)
    shared, index = parallel.share(images, devices), tuple(detector.index.tolist())
    return steps.embed(detector.variables, shared, config, index, devices)


def measure_levels(detector: Detector, levels: Embedded, names: Sequence[str] = ()) -> Measures:
    """Compute maps and their summaries from embeddings.

    Args:
      detector: fitted model; see `measure_pixels` for one that leaves images out.
      levels: embeddings of all processes' images, as from `embed_pixels`.
      names: names of this process's images for error messages; others are padding.

    Returns:
      The measures of this process's images.

    Raises:
      UserError: see `measure_pixels`.
      ValueError: see `measure_pixels`.
    """
    _require_usable(detector)
    if not detector.left_out:
        each = steps.score_batch(detector.gaussian, levels, *_static(detector))
    elif detector.count - detector.left_out < 2:
        raise ValueError(
            f"{detector.count} images fitted: without {detector.left_out} there is no "
            "covariance"
        )
    else:
        static = (*_static(detector), detector.left_out)
        fitted = np.int32(detector.count)
        each = steps.score_left_out_batch(detector.gaussian, fitted, levels, *static)
    measures = Measures(*(np.asarray(x).reshape(-1, *x.shape[2:]) for x in each))
    _require_finite(detector, measures.summaries, names)
    return measures


def measure_samples(
    detector: Detector,
) -> Iterator[tuple[Measures, Bool[np.ndarray, " _b"]]]:
    """Measure each fitted image by the model without it, from the model alone.

    The low-rank form holds the embeddings of all its images; no file is read.

    Args:
      detector: model in the low-rank form, fitted to at least three images, that leaves one
        image out at a time.

    Yields:
      In the order of fitting, batch by batch: the measures of this process's part of a batch,
      and which of them are not padding.

    Raises:
      UserError: a summary is not finite.
      ValueError: the model has another form, has too few images, or leaves none out.
    """
    _require_usable(detector)
    devices, fitted = parallel.every(), detector.gaussian
    if detector.left_out != 1:
        raise ValueError(f"the detector leaves {detector.left_out} images out; expected 1")
    if not isinstance(fitted, LowRank):
        raise ValueError("the model does not hold the embeddings of its images")
    size = devices.padded(min(detector.config.batch_size, detector.count))
    own = size // devices.processes
    for start in range(0, detector.count, size):
        levels = steps.held_batch(fitted, np.int32(detector.count), np.int32(start), size)
        first = start + devices.process * own
        numbers = range(first, first + own)
        measures = measure_levels(detector, levels, [f"fitted image {i}" for i in numbers])
        yield measures, np.array(numbers) < detector.count


def _static(detector: Detector) -> tuple[Any, ...]:
    """Return the static arguments of the mapped functions that score."""
    config, index = detector.config, tuple(detector.index.tolist())
    return config.image, config.model, config.map, config.score.image, index


def _require_usable(detector: Detector) -> None:
    """Reject a forked detector (JAX does not survive forks) and one with deleted arrays."""
    if detector.process != os.getpid():
        raise UserError(
            f"the detector was loaded in process {detector.process}, of which this one "
            f"({os.getpid()}) was forked, and JAX does not work after a fork. Load it in each "
            'process, and start these with multiprocessing.get_context("spawn")'
        )
    arrays = [x for x in jax.tree.leaves(detector.gaussian) if isinstance(x, jax.Array)]
    if any(x.is_deleted() for x in arrays):
        raise ValueError(
            "the detector was given up to find thresholds; go on with the one that "
            "calibrate.calibrate returned, or load the checkpoint again"
        )


def _require_finite(
    detector: Detector, summaries: Float32[np.ndarray, "b _k"], names: Sequence[str]
) -> None:
    """Reject summaries that are not finite; they are finite only if the whole map is."""
    finite = np.isfinite(summaries).all(axis=1)
    if finite.all():
        return
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(detector.gaussian)):
        raise UserError(
            "the model holds numbers that are not finite, and scores nothing; fit again, or "
            "restore it from a copy"
        )
    i = int(np.argmin(finite))
    raise UserError(
        f"{names[i] if i < len(names) else f'image {i}'}: a score of {summaries[i, 0]}: the "
        "backbone's features of it are not finite, or too large for float32. Its weights "
        f"({detector.weights.origin}) are broken, or config.image.std is too small"
    )


def score(
    detector: Detector, images: Sequence[input_pipeline.Input] | UInt8[np.ndarray, "..."]
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
    detector: Detector, images: Iterable[input_pipeline.Input], batch_size: int | None = None
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
    detector: Detector, images: Iterable[input_pipeline.Input], batch_size: int | None
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


def embed(
    detector: Detector, images: UInt8[np.ndarray, "b h w 3"]
) -> Float32[np.ndarray, "b _h _w _d"]:
    """Return the patch embeddings of images that are already preprocessed.

    These are the vectors that the Gaussians model: the paper's embedding vectors, after the
    reduction of channels (PaDiM, section III-A).

    Args:
      detector: fitted model.
      images: (b, h, w, 3), as from `input_pipeline.preprocess`.

    Returns:
      (b, h, w, d) float32 on the patch grid.
    """
    _require_usable(detector)
    config, index = detector.config, tuple(detector.index.tolist())
    levels = steps.extract(
        detector.variables, images, image=config.image, model=config.model, index=index
    )
    laid = geometry.pyramid(config.image, config.model, index)
    grid = geometry.patch_grid(config.image, config.model.layers)
    embeddings = np.asarray(embedding.concatenate(levels, laid))
    return embeddings.reshape(len(images), *grid, -1)


def _name(item: input_pipeline.Input, number: int) -> str:
    if isinstance(item, str | os.PathLike):
        return os.fspath(item)
    return f"images[{number}]"


def _judged(
    detector: Detector, found: Anomalies, sizes: Sequence[tuple[int, int]]
) -> Anomalies:
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
