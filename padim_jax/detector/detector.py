"""The complete detector: composes the stages into functions from uint8 images to scores.

Training, evaluation, prediction and the Python API all use `extract`, so that
preprocessing, backbone and embedding are the same everywhere.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import operator
import os
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, UInt8

from padim_jax.config import backbones
from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config, ImageConfig, MapConfig, ModelConfig
from padim_jax.core import embedding, gaussian, image_score, low_rank, reduction, scoring
from padim_jax.core.calibration import Calibration
from padim_jax.core.embedding import Pyramid
from padim_jax.core.types import (
    AnomalyMaps,
    FeatureMap,
    Gaussian,
    Images,
    Levels,
    LowRank,
    Moments,
    Projection,
    Samples,
    Valid,
)
from padim_jax.data import input_pipeline
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import DataWarning, UserError
from padim_jax.models import network
from padim_jax.models.weights import pretrained

Shape = tuple[int, int, int]  # regions, cells per region and channels of a level
# The backbone's parameters and, under PROJECTION, the matrix of a reduction by projection.
Variables = Mapping[str, Any]

PROJECTION = "projection"

# Fraction of the regularization that must survive rounding. In directions without variance
# squared distances are wrong by the lost fraction.
LEAST_KEPT = 0.95

# Settings that scores depended on in padim_jax 0.1.0, in that order; see `_first_fingerprint`.
_FIRST_SETTINGS = {
    "image": ("resize", "method", "crop", "mean", "std", "rotation", "crop_at", "seed"),
    "model": (
        *("backbone", "layers", "weights", "channels", "seed", "reduction", "pooling"),
        *("upsample", "precision", "regularization", "statistics"),
    ),
    "map": ("upsample", "sigma"),
}
# Numbers of each image's embeddings that are kept to compare images by.
_SAMPLE = 2048

# Squares of larger features overflow float32.
_LARGEST_FEATURE = 1.8e19


class RegionError(ValueError):
    """Statistics of a region that give no Gaussians.

    Attributes:
      region: index of the first such region.
      finite: whether its statistics are finite.
    """

    def __init__(self, message: str, region: int, finite: bool):
        super().__init__(message)
        self.region, self.finite = region, finite


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Detector:
    """A fitted model: everything needed to score an image. Compared by identity.

    Attributes:
      config: configuration in use; settings that affect the statistics are those of the fit.
      index: channels kept, in the embedding's order.
      variables: variables of the backbone, and the projection; see `with_projection`.
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
        found = self.variables.get(PROJECTION)
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
      is_anomalous: whether each score is at least the image threshold; None if the detector has
        no thresholds.
      rarity: estimated fraction of normal images that score lower, in [0, 1) (see
        `Calibration.calibrated`); None if the detector has no thresholds.
    """

    maps: Float32[np.ndarray, "n h w"]
    scores: Float32[np.ndarray, " n"]
    samples: Float32[np.ndarray, "n _s"] | None = None
    is_anomalous: Bool[np.ndarray, " n"] | None = None
    rarity: Float[np.ndarray, " n"] | None = None

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


def total_channels(config: ModelConfig) -> int:
    """Return the number of channels of all stages in use together."""
    return sum(map(backbones.BACKBONES[config.backbone].channels, config.layers))


def channel_index(config: ModelConfig) -> Int[np.ndarray, " d"]:
    """Return the channels that a configuration keeps; see `embedding.channel_index`.

    Without random selection they are numbered: all channels, or those of a projection.
    """
    if config.reduction != "random":
        return np.arange(config.channels)
    return embedding.channel_index(total_channels(config), config.channels, config.seed)


def is_projected(config: ModelConfig) -> bool:
    """Return whether channels are reduced by a matrix, which belongs to the model."""
    return config.reduction in ("semi_orthogonal", "pca")


def has_one_level(config: ModelConfig) -> bool:
    """Return whether patches share no features, so that each patch is a region."""
    return is_projected(config) or config.upsample != "nearest"


def with_projection(variables: Variables, projection: Projection | None) -> Variables:
    """Return the backbone's variables together with the projection, if any.

    Args:
      variables: variables of the backbone.
      projection: matrix (C, D), or None.

    Returns:
      `variables`, with the matrix under `PROJECTION` if there is one.
    """
    return variables if projection is None else {**variables, PROJECTION: projection}


def patch_grid(config: ImageConfig, layers: Sequence[str]) -> tuple[int, int]:
    """Return height and width of the first layer's feature map, in patches.

    Args:
      config: image settings.
      layers: names of the stages in use, the finest first.

    Returns:
      Height and width in patches.
    """
    stride = backbones.STRIDES[layers[0]]
    height, width = config.size
    return -(-height // stride), -(-width // stride)


def patch_size(config: Config) -> tuple[float, float]:
    """Return height and width of a patch, in pixels of the anomaly maps."""
    rows, columns = patch_grid(config.image, config.model.layers)
    height, width = config.image.size
    return height / rows, width / columns


def pyramid(image: ImageConfig, model: ModelConfig, index: Sequence[int]) -> Pyramid:
    """Return the correspondence between the stages' grids; see `embedding`.

    Args:
      image: image settings.
      model: model settings.
      index: channels kept.

    Returns:
      The pyramid.
    """
    if has_one_level(model):
        grid, channels = patch_grid(image, model.layers), len(index)
        return embedding.pyramid((grid,), (channels,), tuple(range(channels)))
    spec = backbones.BACKBONES[model.backbone]
    grids = tuple(patch_grid(image, (layer,)) for layer in model.layers)
    return embedding.pyramid(grids, tuple(map(spec.channels, model.layers)), tuple(index))


def init(
    shapes: Sequence[Shape], images: int, form: str, devices: Devices
) -> Moments | Samples:
    """Return the statistics of zero images, in the form that suits the number of images.

    Both forms are exact. Fitted, `Samples` take s values per channel and s^2 per patch for s
    images, `Moments` each level's channels times its own and the coarser levels'. Times to fit
    and to score grow with these sizes.

    Args:
      shapes: `Pyramid.shapes`.
      images: number of images to fit.
      form: "moments", "samples", or "auto" for the smaller.
      devices: devices that take part.

    Returns:
      Statistics on this process's devices.
    """
    form = choose_form(shapes, images, form)
    room = images if form == "samples" else None
    own = tuple((devices.padded(r) // devices.total, n, d) for r, n, d in shapes)
    return _init(np.zeros(devices.local, np.int32), own, room)


def choose_form(shapes: Sequence[Shape], images: int, form: str = "auto") -> str:
    """Return the form that `init` uses: "moments" or "samples".

    Args:
      shapes: `Pyramid.shapes`.
      images: number of images to fit.
      form: "moments", "samples", or "auto" for the smaller.

    Returns:
      "moments" or "samples".
    """
    if form != "auto":
        return form
    return min(("moments", "samples"), key=lambda form: fitted_size(shapes, images, form))


def fitted_size(shapes: Sequence[Shape], images: int, form: str) -> int:
    """Return the size of a fitted model, means excluded; see `init`.

    Args:
      shapes: `Pyramid.shapes`.
      images: number of fitted images.
      form: "moments" or "samples".

    Returns:
      Number of float32 values.
    """
    cells = [regions * cells for regions, cells, _ in shapes]
    channels = [channels for _, _, channels in shapes]
    if form == "samples":
        return images * sum(map(operator.mul, cells, channels)) + images**2 * cells[0]
    rows = map(operator.mul, cells, channels)
    return sum(n * sum(channels[i:]) for i, n in enumerate(rows))


def extend(
    statistics: Moments | Samples, shapes: Sequence[Shape], images: int, form: str
) -> Moments | Samples:
    """Return the statistics with capacity for more images; consumes its argument.

    Args:
      statistics: statistics of all images fitted so far.
      shapes: `Pyramid.shapes`.
      images: total number of images, including those already fitted.
      form: as in `init`. `Samples` become `Moments` if these are requested or smaller;
        `Moments` stay as they are, since they no longer contain single images.

    Returns:
      Statistics of the same images.
    """
    if isinstance(statistics, Moments):
        return statistics
    if choose_form(shapes, images, form) == "moments":
        return _summarise(statistics)
    return _resize(statistics, images)


def merge(
    a: Moments | Samples, b: Moments | Samples, shapes: Sequence[Shape], form: str
) -> Moments | Samples:
    """Return the statistics of two disjoint sets of images together; consumes both.

    Args:
      a: statistics of the set whose images come first in the result.
      b: statistics of the other set.
      shapes: `Pyramid.shapes`.
      form: form of the result, if both are `Samples`; see `extend`.

    Returns:
      Statistics of both.
    """
    if isinstance(a, Samples) and isinstance(b, Samples):
        images = int(a.count[0] + b.count[0])
        if choose_form(shapes, images, form) == "samples":
            return _merge_samples(a, b)
    first, second = (_summarise(x) if isinstance(x, Samples) else x for x in (a, b))
    return _merge_moments(first, second)


def finalize(
    statistics: Moments | Samples, regularization: float, left_out: int = 0
) -> Gaussian | LowRank:
    """Return the fitted Gaussians; consumes the statistics.

    Args:
      statistics: statistics of at least two images more than `left_out`.
      regularization: epsilon, above 0.
      left_out: number of images that `score_pixels` leaves out at a time. Epsilon is then
        lowered to the value that `scoring.leave_out` expects.

    Returns:
      Gaussians in the form of the statistics.

    Raises:
      ValueError: there are too few images.
      RegionError: statistics are not finite, or float32 loses the regularization in a
        covariance.
    """
    count = int(np.asarray(statistics.count)[0])
    if count - left_out < 2:
        without = f" without {left_out} of them" * bool(left_out)
        raise ValueError(f"a covariance needs at least 2 images, there are {count}{without}")
    if isinstance(statistics, Samples) and count != (room := statistics.values[0].shape[-2]):
        raise ValueError(f"room for {room} images, of which {count} are there")
    epsilon = regularization * (count - left_out - 1) / (count - 1)
    regularizations = np.full(len(statistics.count), epsilon, np.float32)
    fitted, finite, kept, _ = _finalize(statistics, regularizations)
    finite, kept = np.asarray(finite)[0], np.asarray(kept)[0]
    if not np.all(finite):
        region = int(np.argmin(finite))
        message = (
            f"the embeddings of region {region} are not finite: the backbone's features "
            "overflow or its weights are broken"
        )
        raise RegionError(message, region, finite=False)
    if np.min(kept) < LEAST_KEPT:
        region, least = int(np.argmin(kept)), float(np.min(kept))
        without = f" without {left_out} of {count} images" * bool(left_out)
        message = (
            f"float32 keeps {least:.0%} of the regularization ({regularization:g}) in region "
            f"{region}{without}; expected at least {LEAST_KEPT:.0%}, or distances were wrong: "
            f"raise the regularization to {_enough(regularization, least):.1g}"
        )
        raise RegionError(message, region, finite=True)
    return fitted


def place(image: ImageConfig, model: ModelConfig, index: Sequence[int], region: int) -> str:
    """Describe for a message which patches of the grid belong to a region.

    Args:
      image: image settings.
      model: model settings.
      index: channels kept.
      region: index of the region.

    Returns:
      Ranges of rows and columns, and the grid's size.
    """
    laid, (height, width) = pyramid(image, model, index), patch_grid(image, model.layers)
    cells = laid.shapes[0][1]
    rows, columns = np.divmod(np.flatnonzero(laid.patches // cells == region), width)
    return (
        f"patches of rows {rows.min()} to {rows.max()} and columns {columns.min()} to "
        f"{columns.max()}, of {height}x{width}"
    )


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
    model, total = config.model, total_channels(config.model)
    matrix = (total, model.channels) if is_projected(model) else None
    if (None if projection is None else projection.shape) != matrix:
        raise ValueError("its projection is not of its configuration")
    if projection is not None and not np.all(np.isfinite(projection)):
        raise ValueError("its projection is not finite")
    if not np.array_equal(index, channel_index(model)):
        raise ValueError("its channels are not those of its configuration")
    shapes = pyramid(config.image, model, index.tolist()).shapes
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


def _enough(regularization: float, kept: float) -> float:
    """Return a regularization of which about the same rounding leaves enough."""
    if kept <= 0:  # how much is missing is unknown
        return 100 * regularization
    return regularization * 2 * (1 - kept) / (1 - LEAST_KEPT)


@functools.partial(jax.jit, static_argnames=("image", "model", "index"))
def extract(
    variables: Variables,
    images: Images,
    *,
    image: ImageConfig,
    model: ModelConfig,
    index: tuple[int, ...],
) -> Levels:
    """Map uint8 images to embeddings by level, normalisation included.

    Args:
      variables: see `with_projection`.
      images: (b, h, w, 3) uint8.
      image: image settings, static.
      model: model settings, static.
      index: channels kept, static.

    Returns:
      One array (r, n, d, b) per level; `embedding.concatenate` makes the paper's embeddings (b,
      p, d) of them.
    """
    features = _features(variables, images, image, model)
    return _levels(features, variables.get(PROJECTION), image, model, index)


def _levels(
    features: Sequence[FeatureMap],
    projection: Float32[Array, "c _d"] | None,
    image: ImageConfig,
    model: ModelConfig,
    index: tuple[int, ...],
) -> Levels:
    laid, pooling, upsample = pyramid(image, model, index), model.pooling, model.upsample
    if projection is not None:
        one = embedding.project(features, projection, pooling, upsample)
    elif upsample != "nearest":
        one = embedding.assemble(features, index, pooling, upsample)
    else:
        return embedding.select(features, laid, pooling)
    return embedding.select((one,), laid)


def _features(
    variables: Variables, images: Images, image: ImageConfig, model: ModelConfig
) -> tuple[FeatureMap, ...]:
    mean = np.asarray(image.mean, np.float32) * 255
    std = np.asarray(image.std, np.float32) * 255
    pixels = (images.astype(jnp.float32) - mean[None, None, None]) / std[None, None, None]
    backbone = network.build(model.backbone, model.layers, model.precision)
    parameters = {name: value for name, value in variables.items() if name != PROJECTION}
    return cast(tuple[FeatureMap, ...], backbone.apply(parameters, pixels))


def _scatter_batch(
    variables: Variables, images: Images, valid: Valid, image: ImageConfig, model: ModelConfig
) -> tuple[Float32[Array, " c"], Float32[Array, "c c"]]:
    features = _features(variables, images, image, model)
    pooled = [embedding.pool(stage, model.pooling) for stage in features]
    return reduction.scatter(pooled, valid, model.upsample)


def _fit_batch(
    statistics: Moments | Samples,
    variables: Variables,
    images: Images,
    valid: Valid,
    image: ImageConfig,
    model: ModelConfig,
    index: tuple[int, ...],
) -> Moments | Samples:
    levels = extract(variables, images, image=image, model=model, index=index)
    levels, valid = parallel.to_regions(levels), parallel.of_all_images(valid)
    return _update(statistics, levels, valid)


def _finite_batch(
    variables: Variables,
    images: Images,
    image: ImageConfig,
    model: ModelConfig,
    index: tuple[int, ...],
) -> Bool[Array, " b"]:
    levels = extract(variables, images, image=image, model=model, index=index)
    each = [jnp.max(jnp.abs(x), axis=(0, 1, 2)) for x in levels]
    return jnp.stack(each).max(axis=0) < _LARGEST_FEATURE  # false for NaN


def _score_batch(
    variables: Variables,
    fitted: Gaussian | LowRank,
    images: Images,
    image: ImageConfig,
    model: ModelConfig,
    map_: MapConfig,
    score: str,
    index: tuple[int, ...],
) -> tuple[AnomalyMaps, Float32[Array, "b _k"], Float32[Array, "b _s"]]:
    levels = extract(variables, images, image=image, model=model, index=index)
    if model.shift:
        near = parallel.own_regions(_shifts(image, model, index))
        every = parallel.of_all_images_levels(levels)
        by_region = scoring.mahalanobis_nearby(fitted, every, near)
    else:
        by_region = scoring.mahalanobis(fitted, parallel.to_regions(levels))
    return *_maps_and_summaries(by_region, image, model, map_, score, index), _sample(levels)


def _score_left_out_batch(
    variables: Variables,
    fitted: Gaussian | LowRank,
    count: Int32[Array, ""],
    images: Images,
    image: ImageConfig,
    model: ModelConfig,
    map_: MapConfig,
    score: str,
    index: tuple[int, ...],
    size: int,
    most: int,
) -> tuple[AnomalyMaps, Float32[Array, "b _k"], Float32[Array, "b _s"]]:
    levels = _extract_by_parts(variables, images, image, model, index, most)
    if model.shift:
        near = parallel.own_regions(_shifts(image, model, index))
        every = parallel.of_all_images_levels(levels)
        left_out = scoring.leave_out_nearby(fitted, every, near, count, size)
    else:
        left_out = scoring.leave_out(fitted, parallel.to_regions(levels), count, size)
    return *_maps_and_summaries(left_out, image, model, map_, score, index), _sample(levels)


def _shifts(image: ImageConfig, model: ModelConfig, index: tuple[int, ...]) -> embedding.Shifts:
    """Return the neighbours of all regions' patches."""
    laid = pyramid(image, model, index)
    try:
        return embedding.shifts(laid, patch_grid(image, model.layers), model.shift)
    except ValueError as error:
        raise UserError(
            f"config.model.shift={model.shift}: {error} by config.model.channels="
            f"{model.channels}, and its patches are those that are shifted; take more channels"
        ) from error


def _extract_by_parts(
    variables: Variables,
    images: Images,
    image: ImageConfig,
    model: ModelConfig,
    index: tuple[int, ...],
    most: int,
) -> Levels:
    """Apply `extract` to at most `most` images at a time, to bound a large group's memory."""

    def one(part: Images) -> Levels:
        return extract(variables, part, image=image, model=model, index=index)

    if (count := len(images)) <= most:
        return one(images)
    padded = jnp.pad(images, ((0, -count % most), (0, 0), (0, 0), (0, 0)))
    found = lax.map(one, padded.reshape(-1, most, *images.shape[1:]))
    # Concatenate the parts' images.
    together = (jnp.moveaxis(x, 0, 3) for x in found)
    return tuple(x.reshape(*x.shape[:3], -1)[..., :count] for x in together)


def _sample(levels: Levels) -> Float32[Array, "b _s"]:
    """Return evenly spaced numbers of each image's embeddings, over levels and positions."""
    stride = -(-sum(x[..., 0].size for x in levels) // _SAMPLE)
    each = [x.reshape(-1, x.shape[-1])[::stride] for x in levels]
    return jnp.concatenate(each).T


def _score_samples_batch(
    fitted: LowRank,
    count: Int32[Array, ""],
    start: Int32[Array, ""],
    size: int,
    image: ImageConfig,
    model: ModelConfig,
    map_: MapConfig,
    score: str,
    index: tuple[int, ...],
) -> tuple[AnomalyMaps, Float32[Array, "b _k"], Float32[Array, "b _s"]]:
    rows = jnp.minimum(start + jnp.arange(size), count - 1)  # padding repeats the last image
    levels = tuple(
        (deviations[:, :, rows] + mean[:, :, None]).swapaxes(-1, -2)
        for deviations, mean in zip(fitted.deviations, fitted.mean, strict=True)
    )
    if model.shift:
        near = parallel.own_regions(_shifts(image, model, index))
        every = tuple(map(parallel.of_all_regions, levels))
        left_out = scoring.leave_out_nearby(fitted, every, near, count)
    else:
        left_out = scoring.leave_out(fitted, levels, count)
    samples = parallel.to_images(_sample(levels).T[:, None])[:, 0].T  # of all regions
    return *_maps_and_summaries(left_out, image, model, map_, score, index), samples


def _maps_and_summaries(
    by_region: Float32[Array, "r n _b"],
    image: ImageConfig,
    model: ModelConfig,
    map_: MapConfig,
    score: str,
    index: tuple[int, ...],
) -> tuple[AnomalyMaps, Float32[Array, "b _k"]]:
    """Return maps and summaries of a device's images, from distances in a device's regions."""
    patches, grid = pyramid(image, model, index).patches, patch_grid(image, model.layers)
    distances = scoring.on_grid(parallel.to_images(by_region), patches)
    maps = scoring.anomaly_maps(distances, grid, image.size, map_.upsample, map_.sigma)
    return maps, image_score.summaries(maps, distances, grid, score)


def _update(statistics: Moments | Samples, levels: Levels, valid: Valid) -> Moments | Samples:
    if isinstance(statistics, Moments):
        return gaussian.update(statistics, levels, valid)
    return low_rank.update(statistics, levels, valid)


def _init_regions(
    zero: Int32[Array, ""], shapes: tuple[Shape, ...], images: int | None
) -> Moments | Samples:
    del zero  # mapped over only for the number of devices
    return gaussian.init(shapes) if images is None else low_rank.init(shapes, images)


def _moments(samples: Samples) -> Moments:
    shapes = [(r, n, d) for r, n, _, d in (x.shape for x in samples.values)]
    return gaussian.update(gaussian.init(shapes), *low_rank.levels(samples))


def _finalize_regions(
    statistics: Moments | Samples, regularization: Float32[Array, ""]
) -> tuple[Gaussian | LowRank, Bool[Array, " r"], Float32[Array, " r"], Int32[Array, ""]]:
    if isinstance(statistics, Moments):
        fitted, *flags = gaussian.finalize(statistics, regularization)
    else:
        fitted, *flags = low_rank.finalize(statistics, regularization)
    finite, kept = (parallel.of_all_regions(x) for x in flags)
    return fitted, finite, kept, statistics.count  # its buffer was donated as well


_init = parallel.mapped(_init_regions, static=(1, 2))
_resize = parallel.mapped(low_rank.resize, static=(1,))
_summarise = parallel.mapped(_moments)
_merge_samples = parallel.mapped(low_rank.merge)
_merge_moments = parallel.mapped(gaussian.merge, donated=(0,))
_finalize = parallel.mapped(_finalize_regions, donated=(0,))

scatter_batch = parallel.mapped(_scatter_batch, replicated=(0,), static=(3, 4))
"""Return mean and scatter of each device's images, of all channels; see `reduction.scatter`.

Args:
  variables: variables of the backbone, on every device.
  images: (k, b, h, w, 3) uint8, b images for each of this process's devices.
  valid: (k, b); False marks padding.
  image, model: as in `extract`, static.
"""

fit_batch = parallel.mapped(_fit_batch, replicated=(1,), static=(4, 5, 6), donated=(0,))
"""Add a batch of normal images to the statistics, whose buffers are donated.

Args:
  statistics: see `init`.
  variables: variables of the backbone, on every device.
  images: (k, b, h, w, 3) uint8, b images for each of this process's devices.
  valid: (k, b); False marks padding.
  image, model, index: as in `extract`, static.
"""

finite_batch = parallel.mapped(_finite_batch, replicated=(0,), static=(2, 3, 4))
"""Return (k, b): whether a fit can add up the features of each image.

Args:
  variables: variables of the backbone, on every device.
  images: (k, b, h, w, 3) uint8, b images for each of this process's devices.
  image, model, index: as in `extract`, static.
"""

score_batch = parallel.mapped(_score_batch, replicated=(0,), static=(3, 4, 5, 6, 7))
"""Return anomaly maps (k, b, h, w), summaries (k, b, j) and samples (k, b, s) of images.

Args:
  variables: variables of the backbone, on every device.
  fitted: see `finalize`.
  images: (k, b, h, w, 3) uint8, b images for each of this process's devices.
  image, model, map_, score, index: settings and channels kept, static.
"""

score_left_out_batch = parallel.mapped(
    _score_left_out_batch, replicated=(0, 2), static=(4, 5, 6, 7, 8, 9, 10)
)
"""Apply `score_batch` to fitted images, each scored by the model without its group.

Args:
  count: number of fitted images.
  size: images per group, static; see `scoring.leave_out`. The devices' images, concatenated,
    are complete groups followed by padding.
  most: number of images that a device's backbone processes at a time, static.
  variables, fitted, images, image, model, map_, score, index: as in `score_batch`.
"""

score_samples_batch = parallel.mapped(
    _score_samples_batch, replicated=(1, 2), static=(3, 4, 5, 6, 7, 8)
)
"""Apply `score_left_out_batch` to images whose embeddings the fitted model holds.

Args:
  fitted: see `finalize`; made from `Samples`.
  count: number of fitted images.
  start: number of the first image of the batch, in the order of fitting.
  size: images in the batch, divisible by the number of devices; static.
  image, model, map_, score, index: settings and channels kept, static.
"""


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
    """Raise UserError if image scores need normal images and the detector has none."""
    thresholds = detector.calibration
    if detector.config.score.image == "combined" and not (
        thresholds and thresholds.summary_means
    ):
        raise UserError(
            "config.score.image=combined: the model has no thresholds, and this score is "
            "measured by the normal images that they were found on. Find thresholds "
            "(--mode=calibrate --input=<normal images>; in Python "
            "detector.update([], thresholds=images)), or use another score"
        )


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
    _require_usable(detector)
    config, devices = detector.config, len(detector.gaussian.mean[0])
    left_out = detector.left_out
    count, padding = len(images), -len(images) % devices
    if padding:
        images = np.pad(images, ((0, padding), (0, 0), (0, 0), (0, 0)))
    shared = images.reshape(devices, -1, *images.shape[1:])
    if not left_out:
        each = score_batch(detector.variables, detector.gaussian, shared, *_static(detector))
    elif detector.count - left_out < 2:
        raise ValueError(
            f"{detector.count} images fitted: without {left_out} there is no covariance"
        )
    else:
        every = devices * parallel.every().processes
        fitted, most = np.int32(detector.count), -(-config.batch_size // every)
        static = (*_static(detector), left_out, most)
        each = score_left_out_batch(
            detector.variables, detector.gaussian, fitted, shared, *static
        )
    measures = Measures(*(np.asarray(x).reshape(-1, *x.shape[2:])[:count] for x in each))
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
    config, devices, fitted = detector.config, parallel.every(), detector.gaussian
    if detector.left_out != 1:
        raise ValueError(f"the detector leaves {detector.left_out} images out; expected 1")
    if not isinstance(fitted, LowRank):
        raise ValueError("the model does not hold the embeddings of its images")
    if detector.count < 3:
        raise ValueError(f"{detector.count} images fitted: without one there is no covariance")
    size = devices.padded(min(config.batch_size, detector.count))
    own = size // devices.processes
    count = np.int32(detector.count)
    for start in range(0, detector.count, size):
        static = (size, *_static(detector))
        each = score_samples_batch(fitted, count, np.int32(start), *static)
        measures = Measures(*(np.asarray(x).reshape(-1, *x.shape[2:]) for x in each))
        first = start + devices.process * own
        numbers = range(first, first + own)
        _require_finite(detector, measures.summaries, [f"fitted image {i}" for i in numbers])
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
    start = 0
    for found in stream(detector, images, size):
        done = slice(start, start := start + len(found.scores))
        maps[done], scores[done] = found.maps, found.scores
    return _judged(detector, Anomalies(maps, scores))


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
                for i, (name, future) in enumerate(zip(names, futures, strict=True)):
                    pixels[i], levels = future.result()
                    if levels is not None:
                        few[name] = levels
                found = score_pixels(detector, pixels, names)
                count, total = len(names), total + len(names)
                yield _judged(detector, Anomalies(found.maps[:count], found.scores[:count]))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
    if few:
        text = input_pipeline.few_levels(few, total)
        warnings.warn(DataWarning(text), stacklevel=2)


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
    levels = extract(
        detector.variables, images, image=config.image, model=config.model, index=index
    )
    laid = pyramid(config.image, config.model, index)
    grid = patch_grid(config.image, config.model.layers)
    embeddings = np.asarray(embedding.concatenate(levels, laid))
    return embeddings.reshape(len(images), *grid, -1)


def _name(item: input_pipeline.Input, number: int) -> str:
    if isinstance(item, str | os.PathLike):
        return os.fspath(item)
    return f"images[{number}]"


def _judged(detector: Detector, found: Anomalies) -> Anomalies:
    """Return the scores with the verdicts of the detector's thresholds added."""
    if (thresholds := detector.calibration) is None:
        return found
    return dataclasses.replace(
        found,
        is_anomalous=found.scores >= thresholds.image_threshold,
        rarity=thresholds.calibrated(found.scores),
    )
