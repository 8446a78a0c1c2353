"""Feature maps of several depths -> embeddings, every stage on its own grid.

PaDiM (arXiv 2011.08785), section III-A, repeats the deeper stages' features until they
cover the finest grid: 16 patches share one layer-3 feature, which then enters 16
covariances and 16 distances. Here nothing is repeated. A coarsest cell with all that
lies above it is a *region*, and a stage's channels form a *level*: (r, n, d, b) for
r regions, n cells a region, d selected channels and b images. `gaussian` and `scoring`
work region by region, on matrices d x b; `embed` gives the paper's embedding.

Where embeddings are projected (see `reduction`) or deeper stages interpolated, every patch
has features of its own: `assemble` and `project` give one feature map on the finest grid,
and that is a pyramid of one level, with a region for every patch.

With two stages on grids of 2x2 and 1x1 there is one region with four cells and one::

      finest level   0 1      cells 0 1 2 3 of region 0
                     2 3
    coarsest level    0       cell 0 of region 0
"""

import dataclasses
import functools
import random
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float32, Int

from padim_jax.core import interpolation
from padim_jax.core.types import Embeddings, FeatureMap, Levels


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """The selected channels of one stage.

    Attributes:
      stage: which one, of the stages in use.
      channels: their numbers in the stage.
      order: where the embedding has them.
      source: of every cell, its position in the stage's feature map, row by row. Where
        grids do not divide each other some cells are there twice, so that every region
        has equally many.
    """

    stage: int
    channels: Int[np.ndarray, " d"]
    order: Int[np.ndarray, " d"]
    source: Int[np.ndarray, "r n"]


@dataclasses.dataclass(frozen=True, eq=False)
class Pyramid:
    """How the stages' grids lie upon each other.

    Attributes:
      levels: of the stages with selected channels, the finest first. The cells of a
        level lie together that share a cell of the next coarser one.
      patches: of every patch, row by row, its cell among all of the finest level's.
    """

    levels: tuple[Level, ...]
    patches: Int[np.ndarray, " p"]

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(r, n, d) of every level: regions, cells a region, own channels."""
        return tuple((*level.source.shape, len(level.channels)) for level in self.levels)


def channel_index(total: int, channels: int, seed: int) -> Int[np.ndarray, " d"]:
    """Draws the channels to keep out of the concatenated stages' channels.

    The PyTorch projects call `random.seed(seed); random.sample(range(total), channels)`;
    the same generator makes a published seed give the published channels.

    Args:
      total: number of channels of all stages together.
      channels: how many to keep, at most `total`.
      seed: any integer.

    Returns:
      int64 channel numbers in the order drawn, which is the embedding's order.
    """
    return np.array(random.Random(seed).sample(range(total), channels), np.int64)


@functools.cache
def pyramid(
    grids: tuple[tuple[int, int], ...], channels: tuple[int, ...], index: tuple[int, ...]
) -> Pyramid:
    """Lays the stages' grids upon each other.

    Args:
      grids: height and width of every stage's feature map, the finest first.
      channels: of every stage.
      index: the channels to keep, numbers into the stages' concatenated channels.
    """
    kept = np.asarray(index)
    offsets = np.cumsum([0, *channels])
    stages = [i for i in range(len(grids)) if np.any(_within(kept, offsets, i))]
    # From the coarsest level, whose cells are the regions, to the finest.
    patches, cells, sources = np.zeros(grids[0][0] * grids[0][1], int), 1, {}
    for i in reversed(stages):
        # Distinct pairs of a coarser cell and a position above it, sorted.
        size = grids[i][0] * grids[i][1]
        pairs, of_patch = np.unique(
            patches * size + _nearest(grids[0], grids[i]), return_inverse=True
        )
        cell, position = np.divmod(pairs, size)
        starts = np.searchsorted(cell, cell)  # of equal cells, the first pair
        rank = np.arange(len(cell)) - starts
        fan = rank.max() + 1
        source = np.zeros((cells, fan), int)
        source[cell] = position[starts][:, None]
        source[cell, rank] = position
        patches, cells = (cell * fan + rank)[of_patch], cells * fan
        sources[i] = source.reshape(-1)
    regions = len(sources[stages[-1]])
    levels = []
    for i in stages:
        (order,) = np.nonzero(_within(kept, offsets, i))
        source = sources[i].reshape(regions, -1)
        levels.append(Level(i, kept[order] - offsets[i], order, source))
    return Pyramid(tuple(levels), patches)


def select(features: Sequence[FeatureMap], pyramid: Pyramid, pooling: int = 1) -> Levels:
    """Picks the kept channels of every stage, on its own grid.

    Args:
      features: feature maps (b, h_i, w_i, c_i) of the stages, the finest first.
      pyramid: of their grids; static under jit.
      pooling: see `pool`; static under jit.

    Returns:
      One array (r, n, d, b) a level, float32.
    """
    found = []
    for level in pyramid.levels:
        # The fewer channels are pooled: it is the same for each.
        stage = pool(features[level.stage][..., level.channels], pooling)
        cells = stage.reshape(len(stage), -1, len(level.channels))
        chosen = jnp.take(cells, level.source.reshape(-1), axis=1)
        found.append(jnp.moveaxis(chosen, 0, -1).reshape(*level.source.shape, -1, len(stage)))
    return tuple(found)


def pool(stage: FeatureMap, size: int) -> Float32[Array, "b _h _w _c"]:
    """Averages every cell with its neighbours; at the border with those that exist.

    `torch.nn.functional.avg_pool2d(stage, size, 1, size // 2, count_include_pad=False)`.

    Args:
      stage: a feature map.
      size: of the square window, in cells; odd. 1 changes nothing.
    """
    stage = stage.astype(jnp.float32)
    if size == 1:
        return stage
    reach = size // 2
    padding = ((0, 0), (reach, reach), (reach, reach), (0, 0))
    window, strides = (1, size, size, 1), (1, 1, 1, 1)
    sums = lax.reduce_window(stage, 0.0, lax.add, window, strides, padding)
    rows, columns = (
        np.convolve(np.ones(n), np.ones(size))[reach : reach + n] for n in stage.shape[1:3]
    )
    return sums / np.outer(rows, columns).astype(np.float32)[None, :, :, None]


def assemble(
    features: Sequence[FeatureMap], index: Sequence[int], pooling: int, upsample: str
) -> Float32[Array, "b h w d"]:
    """The embeddings as one feature map on the first stage's grid.

    Where deeper stages are interpolated, patches share none of their features: `select` has
    nothing to save.

    Args:
      features: feature maps (b, h_i, w_i, c_i), the one with the finest grid first.
      index: channel numbers into the stages' concatenated channels; static under jit.
      pooling: see `pool`.
      upsample: "nearest" or "bilinear", to the first one's grid.
    """
    kept, offsets = np.asarray(index), np.cumsum([0, *(x.shape[3] for x in features)])
    parts, orders = [], []
    for i, stage in enumerate(features):
        (order,) = np.nonzero(_within(kept, offsets, i))
        chosen = pool(stage[..., kept[order] - offsets[i]], pooling)
        parts.append(_upsample(chosen, features[0].shape[1:3], upsample))
        orders.append(order)
    return jnp.concatenate(parts, axis=-1)[..., np.argsort(np.concatenate(orders))]


def project(
    features: Sequence[FeatureMap],
    projection: Float32[Array, "c d"],
    pooling: int,
    upsample: str,
) -> Float32[Array, "b h w d"]:
    """The embeddings of all channels times a matrix, on the first stage's grid.

    x W is the sum of the stages' x_s W_s. Pooling and upsampling go over cells and W over
    channels, so that W comes first, at every stage's own resolution.

    Args:
      features: feature maps (b, h_i, w_i, c_i), the one with the finest grid first.
      projection: W, of the stages' channels in their order; see `reduction`.
      pooling: see `pool`.
      upsample: "nearest" or "bilinear", to the first one's grid.
    """
    ends = np.cumsum([x.shape[3] for x in features])
    found = None
    for stage, part in zip(features, jnp.split(projection, ends[:-1]), strict=True):
        mixed = jnp.matmul(
            stage.astype(jnp.float32), part[None, None], precision=lax.Precision.HIGHEST
        )
        there = _upsample(pool(mixed, pooling), features[0].shape[1:3], upsample)
        found = there if found is None else found + there
    assert found is not None
    return found


def embed(features: Sequence[FeatureMap], index: Int[np.ndarray, " d"]) -> Embeddings:
    """The paper's embedding: the kept channels of all stages on the finest stage's grid.

    Deeper stages are brought to that grid by nearest upsampling, as
    `torch.nn.functional.interpolate(mode="nearest")` does.

    Args:
      features: feature maps (b, h_i, w_i, c_i), the one with the finest grid first.
      index: channel numbers into the stages' concatenated channels; static under jit.

    Returns:
      Embeddings (b, p, d), float32; p runs over the first stage's grid row by row.
    """
    grids = tuple((x.shape[1], x.shape[2]) for x in features)
    found = pyramid(grids, tuple(x.shape[3] for x in features), tuple(index.tolist()))
    return concatenate(select(features, found), found)


def concatenate(levels: Levels, pyramid: Pyramid) -> Embeddings:
    """The embeddings (b, p, d) whose parts the levels are."""
    finest = levels[0].shape[1]
    parts = [jnp.repeat(level, finest // level.shape[1], axis=1) for level in levels]
    embedding = jnp.concatenate(parts, axis=2)
    embedding = embedding.reshape(-1, *embedding.shape[2:])[pyramid.patches]
    # Levels hold their channels side by side; the embedding keeps the drawn order.
    order = np.argsort(np.concatenate([level.order for level in pyramid.levels]))
    return jnp.transpose(embedding[:, order], (2, 0, 1))


def _within(index: np.ndarray, offsets: np.ndarray, stage: int) -> np.ndarray:
    return (index >= offsets[stage]) & (index < offsets[stage + 1])


def _upsample(
    stage: Float32[Array, "b _h _w _c"], grid: tuple[int, ...], method: str
) -> Float32[Array, "b _i _j _c"]:
    sides = list(zip(stage.shape[1:3], grid, strict=True))
    if stage.shape[1:3] == grid:
        return stage
    if method == "nearest":
        rows, columns = (interpolation.nearest(m, n) for m, n in sides)
        return stage[:, rows][:, :, columns]
    rows, columns = (
        jnp.asarray(interpolation.matrix(m, n, method), jnp.float32) for m, n in sides
    )
    return jnp.einsum("yi,bijc,xj->byxc", rows, stage, columns, precision=lax.Precision.HIGHEST)


def _nearest(fine: tuple[int, int], coarse: tuple[int, int]) -> Int[np.ndarray, " p"]:
    """Of every cell of the fine grid the coarse one that nearest upsampling puts there."""
    rows, columns = (interpolation.nearest(m, n) for n, m in zip(fine, coarse, strict=True))
    return (rows[:, None] * coarse[1] + columns).reshape(-1)
