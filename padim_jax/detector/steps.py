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
from jaxtyping import Array, Bool, Float32, Int32, UInt8

from padim_jax.config.settings import Config, ImageConfig, MapConfig, ModelConfig
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

# Embeddings by level, of all images, in a device's regions; and those of all devices.
_Own = tuple[Float32[Array, "_r _n _d _b"], ...]
Embedded = tuple[Float32[Array | np.ndarray, "k _r _n _d _b"], ...]

# The backbone's parameters and, under PROJECTION, the matrix of a reduction by projection.
Variables = Mapping[str, Any]
PROJECTION = "projection"

# Numbers of each image's embeddings that are kept to compare images by.
_SAMPLE = 2048

# Images that a CPU processes at a time. 32 take as long in one piece, as 4 x 8 and as 32 x 1,
# with equal bits, and feature maps are most of a batch's memory.
_ON_CPU = 8

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


def _embed_batch(
    variables: Variables,
    images: Images,
    image: ImageConfig,
    model: ModelConfig,
    index: tuple[int, ...],
    most: int,
) -> _Own:
    def one(part: Images) -> Levels:
        return extract(variables, part, image=image, model=model, index=index)

    if (count := len(images)) <= most:
        return parallel.to_regions(one(images))
    padded = jnp.pad(images, ((0, -count % most), (0, 0), (0, 0), (0, 0)))
    found = lax.map(one, padded.reshape(-1, most, *images.shape[1:]))
    # Concatenate the parts' images.
    together = (jnp.moveaxis(x, 0, 3) for x in found)
    levels = tuple(x.reshape(*x.shape[:3], -1)[..., :count] for x in together)
    return parallel.to_regions(levels)


def _fit_batch(
    statistics: Moments | Samples, levels: _Own, valid: Bool[Array, " _own"]
) -> Moments | Samples:
    return _update(statistics, levels, parallel.of_all_images(valid))


def _update(statistics: Moments | Samples, levels: Levels, valid: Valid) -> Moments | Samples:
    if isinstance(statistics, Moments):
        return gaussian.update(statistics, levels, valid)
    return low_rank.update(statistics, levels, valid)


def _finite_batch(levels: Levels) -> Bool[Array, " b"]:
    each = [jnp.max(jnp.abs(x), axis=(0, 1, 2)) for x in levels]
    finite = jnp.stack(each).max(axis=0) < _LARGEST_FEATURE  # false for NaN
    return parallel.total(~finite) == 0


def _held_batch(
    fitted: LowRank, count: Int32[Array, ""], start: Int32[Array, ""], size: int
) -> _Own:
    rows = jnp.minimum(start + jnp.arange(size), count - 1)  # padding repeats the last image
    return tuple(
        (deviations[:, :, rows] + mean[:, :, None]).swapaxes(-1, -2)
        for deviations, mean in zip(fitted.deviations, fitted.mean, strict=True)
    )


def _score_batch(
    fitted: Gaussian | LowRank,
    levels: _Own,
    image: ImageConfig,
    model: ModelConfig,
    map_: MapConfig,
    score: str,
    index: tuple[int, ...],
) -> tuple[AnomalyMaps, Float32[Array, "b _k"], Float32[Array, "b _s"]]:
    if model.shift:
        near = parallel.own_regions(geometry.shifts(image, model, index))
        every = tuple(map(parallel.of_all_regions, levels))
        by_region = scoring.mahalanobis_nearby(fitted, every, near)
    else:
        by_region = scoring.mahalanobis(fitted, levels)
    return _measures(by_region, levels, image, model, map_, score, index)


def score_images(
    variables: Variables,
    fitted: Gaussian | LowRank,
    images: Images,
    image: ImageConfig,
    model: ModelConfig,
    map_: MapConfig,
    score: str,
    index: tuple[int, ...],
) -> tuple[AnomalyMaps, Float32[Array, "b _k"], Float32[Array, "b _s"]]:
    """Score a device's images in one program, inside `parallel.mapped`; see `score_batch`."""
    levels = extract(variables, images, image=image, model=model, index=index)
    regional = parallel.to_regions(levels)
    return _score_batch(fitted, regional, image, model, map_, score, index)


def _score_left_out_batch(
    fitted: Gaussian | LowRank,
    count: Int32[Array, ""],
    levels: _Own,
    image: ImageConfig,
    model: ModelConfig,
    map_: MapConfig,
    score: str,
    index: tuple[int, ...],
    size: int,
) -> tuple[AnomalyMaps, Float32[Array, "b _k"], Float32[Array, "b _s"]]:
    if model.shift:
        near = parallel.own_regions(geometry.shifts(image, model, index))
        every = tuple(map(parallel.of_all_regions, levels))
        by_region = scoring.leave_out_nearby(fitted, every, near, count, size)
    else:
        by_region = scoring.leave_out(fitted, levels, count, size)
    return _measures(by_region, levels, image, model, map_, score, index)


def _measures(
    by_region: Float32[Array, "r n _b"],
    levels: _Own,
    image: ImageConfig,
    model: ModelConfig,
    map_: MapConfig,
    score: str,
    index: tuple[int, ...],
) -> tuple[AnomalyMaps, Float32[Array, "b _k"], Float32[Array, "b _s"]]:
    """Return measures of a device's images, from distances in a device's regions."""
    patches = geometry.pyramid(image, model, index).patches
    grid = geometry.patch_grid(image, model.layers)
    distances = scoring.on_grid(parallel.to_images(by_region), patches)
    maps = scoring.anomaly_maps(distances, grid, image.size, map_.upsample, map_.sigma)
    inside = geometry.inside(image, model.layers)
    if inside is not None:
        maps = jnp.where(inside.pixels[None], maps, 0)
    samples = parallel.to_images(_sample(levels)[:, None])[:, 0].T  # of all regions
    return maps, image_score.summaries(maps, distances, grid, score, inside), samples


def _sample(levels: Levels) -> Float32[Array, "_s b"]:
    """Return evenly spaced numbers of each image's embeddings, over levels and positions."""
    stride = -(-sum(x[..., 0].size for x in levels) * parallel.count() // _SAMPLE)
    each = [x.reshape(-1, x.shape[-1])[::stride] for x in levels]
    return jnp.concatenate(each)


scatter_batch = parallel.mapped(_scatter_batch, replicated=(0,), static=(3, 4))
"""Return mean and scatter of each device's images, of all channels; see `reduction.scatter`.

Args:
  variables: variables of the backbone, on every device.
  images: (k, b, h, w, 3) uint8, b images for each of this process's devices.
  valid: (k, b); False marks padding.
  image, model: as in `extract`, static.
"""

embed_batch = parallel.mapped(_embed_batch, replicated=(0,), static=(2, 3, 4, 5))
"""Return the embeddings (k, r / k, n, d, b) by level of all processes' images.

Each device gets all images' embeddings in its own regions. Fits, thresholds and scores use this
one compiled program, so that an image's embeddings are bit-identical in all of them.

Args:
  variables: variables of the backbone, on every device.
  images: (k, b, h, w, 3) uint8, b images for each of this process's devices.
  image, model, index: as in `extract`, static.
  most: number of images that a device's backbone processes at a time, static.
"""


def at_a_time(config: Config, devices: parallel.Devices) -> int:
    """Return the number of images that a device's backbone processes at a time.

    Args:
      config: configuration in use.
      devices: devices that take part.

    Returns:
      A device's share of a batch, and on CPUs at most `_ON_CPU`.
    """
    share = -(-config.batch_size // devices.total)
    return share if parallel.memory_grows() else min(_ON_CPU, share)


def embed(
    variables: Variables,
    images: UInt8[Array | np.ndarray, "k b h w 3"],
    config: Config,
    index: tuple[int, ...],
    devices: parallel.Devices,
) -> Embedded:
    """Apply `embed_batch` with the `most` of this kind of device.

    Args:
      variables: variables of the backbone, on every device.
      images: b images for each of this process's devices.
      config: configuration in use.
      index: channels kept.
      devices: devices that take part.

    Returns:
      See `embed_batch`.
    """
    most = at_a_time(config, devices)
    return embed_batch(variables, images, config.image, config.model, index, most)


fit_batch = parallel.mapped(_fit_batch, donated=(0,))
"""Add a batch of normal images to the statistics, whose buffers are donated.

Args:
  statistics: see `statistics.init`.
  levels: see `embed_batch`.
  valid: (k, b); False marks padding.
"""

finite_batch = parallel.mapped(_finite_batch)
"""Return (k, b), equal for all devices: whether a fit can add up the features of each image.

Args:
  levels: see `embed_batch`.
"""

held_batch = parallel.mapped(_held_batch, replicated=(1, 2), static=(3,))
"""Return the embeddings of images that a fitted model holds, as `embed_batch` does.

Args:
  fitted: see `statistics.finalize`; made from `Samples`.
  count: number of fitted images.
  start: number of the first image of the batch, in the order of fitting.
  size: images in the batch, static.
"""

score_batch = parallel.mapped(_score_batch, static=(2, 3, 4, 5, 6))
"""Return anomaly maps (k, b, h, w), summaries (k, b, j) and samples (k, b, s) of images.

Args:
  fitted: see `statistics.finalize`.
  levels: see `embed_batch`, of a number of images that the devices divide.
  image, model, map_, score, index: settings and channels kept, static.
"""

score_left_out_batch = parallel.mapped(
    _score_left_out_batch, replicated=(1,), static=(3, 4, 5, 6, 7, 8)
)
"""Apply `score_batch` to fitted images, each scored by the model without its group.

Args:
  count: number of fitted images.
  size: images per group, static; see `scoring.leave_out`. The images are complete groups
    followed by padding.
  fitted, levels, image, model, map_, score, index: as in `score_batch`.
"""
