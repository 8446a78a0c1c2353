"""The stages composed into functions of a batch of images, mapped over the devices.

Training, evaluation, prediction and the Python API all use `extract`, so that
preprocessing, backbone and embedding are the same everywhere.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from padim_jax.config.settings import ImageConfig, MapConfig, ModelConfig
from padim_jax.core import embedding, gaussian, image_score, low_rank, reduction, scoring
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
from padim_jax.detector import geometry
from padim_jax.devices import parallel
from padim_jax.models import network

# The backbone's parameters and, under PROJECTION, the matrix of a reduction by projection.
Variables = Mapping[str, Any]
PROJECTION = "projection"

# Numbers of each image's embeddings that are kept to compare images by.
_SAMPLE = 2048

# Squares of larger features overflow float32.
_LARGEST_FEATURE = 1.8e19


def with_projection(variables: Variables, projection: Projection | None) -> Variables:
    """Return the backbone's variables together with the projection, if any.

    Args:
      variables: variables of the backbone.
      projection: matrix (C, D), or None.

    Returns:
      `variables`, with the matrix under `PROJECTION` if there is one.
    """
    return variables if projection is None else {**variables, PROJECTION: projection}


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
    laid = geometry.pyramid(image, model, index)
    pooling, upsample = model.pooling, model.upsample
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


def score_on_device(
    variables: Variables,
    fitted: Gaussian | LowRank,
    images: Images,
    image: ImageConfig,
    model: ModelConfig,
    map_: MapConfig,
    score: str,
    index: tuple[int, ...],
) -> tuple[AnomalyMaps, Float32[Array, "b _k"], Float32[Array, "b _s"]]:
    """Score a device's images, inside `parallel.mapped`; see `score_batch`."""
    levels = extract(variables, images, image=image, model=model, index=index)
    if model.shift:
        near = parallel.own_regions(geometry.shifts(image, model, index))
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
        near = parallel.own_regions(geometry.shifts(image, model, index))
        every = parallel.of_all_images_levels(levels)
        left_out = scoring.leave_out_nearby(fitted, every, near, count, size)
    else:
        left_out = scoring.leave_out(fitted, parallel.to_regions(levels), count, size)
    return *_maps_and_summaries(left_out, image, model, map_, score, index), _sample(levels)


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
        near = parallel.own_regions(geometry.shifts(image, model, index))
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
    patches = geometry.pyramid(image, model, index).patches
    grid = geometry.patch_grid(image, model.layers)
    distances = scoring.on_grid(parallel.to_images(by_region), patches)
    maps = scoring.anomaly_maps(distances, grid, image.size, map_.upsample, map_.sigma)
    return maps, image_score.summaries(maps, distances, grid, score)


def _update(statistics: Moments | Samples, levels: Levels, valid: Valid) -> Moments | Samples:
    if isinstance(statistics, Moments):
        return gaussian.update(statistics, levels, valid)
    return low_rank.update(statistics, levels, valid)


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
  statistics: see `statistics.init`.
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

score_batch = parallel.mapped(score_on_device, replicated=(0,), static=(3, 4, 5, 6, 7))
"""Return anomaly maps (k, b, h, w), summaries (k, b, j) and samples (k, b, s) of images.

Args:
  variables: variables of the backbone, on every device.
  fitted: see `statistics.finalize`.
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
  fitted: see `statistics.finalize`; made from `Samples`.
  count: number of fitted images.
  start: number of the first image of the batch, in the order of fitting.
  size: images in the batch, divisible by the number of devices; static.
  image, model, map_, score, index: settings and channels kept, static.
"""
