"""Feature maps of several depths -> embeddings, each stage on its own grid.

PaDiM (arXiv 2011.08785), section III-A, repeats the deeper stages' features until they
cover the finest grid: 16 patches share one layer-3 feature, which then enters 16
covariances and 16 distances. Here nothing is repeated. A coarsest cell together with all
cells above it is a *region*, and a stage's channels form a *level*: (r, n, d, b) for
r regions, n cells per region, d selected channels and b images. `gaussian` and `scoring`
process region by region, on matrices d x b; `embed` gives the paper's embedding.

If embeddings are projected (see `reduction`) or deeper stages interpolated, patches share
no features: `assemble` and `project` give one feature map on the finest grid, a pyramid of
one level with one region per patch.

Two stages on grids of 2x2 and 1x1 form one region with four cells and one cell::

      finest level   0 1      cells 0 1 2 3 of region 0
                     2 3
    coarsest level    0       cell 0 of region 0
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int

from padim_jax.core import interpolation
from padim_jax.core.types import Embeddings, FeatureMap, Levels


@dataclasses.dataclass(frozen=True, eq=False)
class Level:
    """The selected channels of one stage.

    Attributes:
      stage: index among the stages in use.
      channels: channel numbers within the stage.
      order: positions of the channels in the embedding.
      source: position of each cell in the stage's feature map, row-major. If grids do not
        divide each other, some cells are repeated so that all regions have the same number.
    """

    stage: int
    channels: Int[np.ndarray, " d"]
    order: Int[np.ndarray, " d"]
    source: Int[np.ndarray, "r n"]


@dataclasses.dataclass(frozen=True, eq=False)
class Pyramid:
    """Correspondence between the stages' grids.

    Attributes:
      levels: levels of the stages with selected channels, the finest first. Cells of a level
        that share a cell of the next coarser level are contiguous.
      patches: per patch, row-major, the index of its cell among all cells of the finest level.
      inside: whether each patch takes part; see `restrict`.
    """

    levels: tuple[Level, ...]
    patches: Int[np.ndarray, " p"]
    inside: Bool[np.ndarray, " p"]

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Return (r, n, d) of each level: regions, cells per region, own channels."""
        return tuple((*level.source.shape, len(level.channels)) for level in self.levels)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Shifts:
    """Cells that the embeddings of nearby patches are made of.

    The neighbours of a cell's patches have features of few cells of its level: within one patch
    of 16 patches that share a layer-3 cell lie patches of that cell and of 8 others. These are
    the cell's *variants*, the first of which is the cell itself. Variants outside the grid are
    the cell again.

    Attributes:
      sources: per level, the cells that are variants, (r, n, v), as numbers among all cells of
        the level. v differs from level to level.
      coarser: per level, for each coarser level j, which variant of the cell of level j at the
        same place has the features that belong to each variant: (r, n, v).
    """

    sources: tuple[Int[Array | np.ndarray, "*r _n _v"], ...]
    coarser: tuple[tuple[Int[Array | np.ndarray, "*r _n _v"], ...], ...]


def channel_index(total: int, channels: int, seed: int) -> Int[np.ndarray, " d"]:
    """Draw the channels to keep out of the concatenated stages' channels.

    The PyTorch projects call `random.seed(seed); random.sample(range(total), channels)`;
    the same generator makes a published seed give the published channels.

    Args:
      total: number of channels of all stages together.
      channels: number of channels to keep, at most `total`.
      seed: any integer.

    Returns:
      int64 channel numbers in the order drawn, which is the embedding's order.
    """
    return np.array(random.Random(seed).sample(range(total), channels), np.int64)


@functools.cache
def pyramid(
    grids: tuple[tuple[int, int], ...], channels: tuple[int, ...], index: tuple[int, ...]
) -> Pyramid:
    """Return the correspondence between the stages' grids.

    Args:
      grids: height and width of each stage's feature map, the finest first.
      channels: number of channels of each stage.
      index: channels to keep, numbers into the stages' concatenated channels.

    Returns:
      The pyramid; the same object for the same arguments.
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
        starts = np.searchsorted(cell, cell)  # first pair of equal cells
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
    return Pyramid(tuple(levels), patches, np.ones(len(patches), bool))


def restrict(whole: Pyramid, inside: Bool[np.ndarray, "_h _w"]) -> Pyramid:
    """Return the part of a pyramid that a region of interest needs.

    Regions without a patch inside are left out. Each patch outside gets the cell of the nearest
    patch inside: maps then continue beyond the edge of the region of interest with the values
    at its edge.

    Args:
      whole: pyramid of the whole grid.
      inside: which patches of the finest grid take part, at least one.

    Returns:
      The pyramid.
    """
    patches = whole.patches.reshape(inside.shape)[interpolation.nearest_inside(inside)]
    regions, cells, _ = whole.shapes[0]
    region, cell = np.divmod(patches.reshape(-1), cells)
    kept = np.unique(region)
    numbers = np.zeros(regions, int)
    numbers[kept] = np.arange(len(kept))
    levels = [dataclasses.replace(level, source=level.source[kept]) for level in whole.levels]
    return Pyramid(tuple(levels), numbers[region] * cells + cell, inside.reshape(-1))


@functools.cache
def shifts(pyramid: Pyramid, grid: tuple[int, int], radius: int) -> Shifts:
    """Return the cells of all patches within a distance of each patch, rows and columns.

    Args:
      pyramid: correspondence between the grids.
      grid: height and width of the finest grid, in patches.
      radius: largest distance in patches, at least 1.

    Returns:
      The shifts; the finest level has (2 radius + 1)^2 variants. Patches outside of a region of
      interest are like patches outside the grid.

    Raises:
      ValueError: patches share cells of the finest level, since no channel of the finest stage
        is kept; their neighbours are not the same.
    """
    (own_patches,) = np.nonzero(pyramid.inside)
    if len(np.unique(pyramid.patches[own_patches])) < len(own_patches):
        raise ValueError("no channel of the first layer is kept")
    steps = sorted(itertools.product(range(-radius, radius + 1), repeat=2), key=any)
    rows, columns = (axis.reshape(-1, 1) for axis in np.indices(grid))
    y, x = rows + np.array(steps)[:, 0], columns + np.array(steps)[:, 1]
    inside = (y >= 0) & (y < grid[0]) & (x >= 0) & (x < grid[1])
    near = np.where(inside, y * grid[1] + x, rows * grid[1] + columns)
    near = np.where(pyramid.inside[near], near, rows * grid[1] + columns)
    regions, finest, _ = pyramid.shapes[0]
    fine = np.arange(regions * finest)[:, None].repeat(len(steps), 1)
    # Repeated cells, and those outside, keep to themselves.
    fine[pyramid.patches[own_patches]] = pyramid.patches[near[own_patches]]
    own = np.arange(len(fine))[:, None]
    sources, numbers = [], []
    for _, cells, _ in pyramid.shapes:
        fan, count = finest // cells, regions * cells
        # Distinct pairs of a cell and a source, sorted: a cell itself before all others.
        cell, source = np.broadcast_to(own // fan, fine.shape), fine // fan
        pairs = cell * (count + 1) + np.where(source == cell, 0, source + 1)
        distinct, inverse = np.unique(pairs, return_inverse=True)
        cells_of = distinct // (count + 1)
        rank = np.arange(len(distinct)) - np.searchsorted(cells_of, cells_of)
        variants = np.arange(count)[:, None].repeat(rank.max() + 1, 1)
        variants[cells_of, rank] = np.where(rank, distinct % (count + 1) - 1, cells_of)
        sources.append(variants)
        numbers.append(rank[inverse].reshape(fine.shape))
    coarser = []
    for i, variants in enumerate(sources):
        fan = len(fine) // len(variants)
        maps = []
        for number in numbers[i + 1 :]:
            # Variants that are the cell again have the coarser cell's first variant: itself.
            table = np.zeros((len(variants), variants.shape[1]), int)
            table[np.broadcast_to(own // fan, fine.shape), numbers[i]] = number
            maps.append(table.reshape(regions, -1, variants.shape[1]))
        coarser.append(tuple(maps))
    shaped = (variants.reshape(regions, -1, variants.shape[1]) for variants in sources)
    return Shifts(tuple(shaped), tuple(coarser))


def select(features: Sequence[FeatureMap], pyramid: Pyramid, pooling: int = 1) -> Levels:
    """Select the kept channels of each stage, on its own grid.

    Args:
      features: feature maps (b, h_i, w_i, c_i) of the stages, the finest first.
      pyramid: pyramid of their grids; static under jit.
      pooling: see `pool`; static under jit.

    Returns:
      One array (r, n, d, b) per level, float32.
    """
    found = []
    for level in pyramid.levels:
        # Pooling is per channel, so only the selected channels need it.
        stage = pool(features[level.stage][..., level.channels], pooling)
        cells = stage.reshape(stage.shape[0], -1, len(level.channels))
        chosen = jnp.take(cells, level.source.reshape(-1), axis=1)
        found.append(
            jnp.moveaxis(chosen, 0, -1).reshape(*level.source.shape, -1, stage.shape[0])
        )
    return tuple(found)


def pool(stage: FeatureMap, size: int) -> Float32[Array, "b _h _w _c"]:
    """Average each cell with its neighbours; at the border only with those that exist.

    `torch.nn.functional.avg_pool2d(stage, size, 1, size // 2, count_include_pad=False)`.

    Args:
      stage: feature map (b, h, w, c).
      size: side of the square window in cells; odd. 1 changes nothing.

    Returns:
      (b, h, w, c) float32.
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
    """Return the embeddings as one feature map on the first stage's grid.

    Used where deeper stages are interpolated: patches then share no features, and `select`
    would save nothing.

    Args:
      features: feature maps (b, h_i, w_i, c_i), the finest grid first.
      index: channel numbers into the stages' concatenated channels; static under jit.
      pooling: see `pool`.
      upsample: "nearest" or "bilinear", to the first stage's grid.

    Returns:
      (b, h, w, d) float32.
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
    """Return the embeddings of all channels times a matrix, on the first stage's grid.

    x W is the sum of the stages' x_s W_s. Pooling and upsampling act on cells and W on
    channels, so W is applied first, at each stage's own resolution.

    Args:
      features: feature maps (b, h_i, w_i, c_i), the finest grid first.
      projection: W (C, D), rows in the order of the stages' channels; see `reduction`.
      pooling: see `pool`.
      upsample: "nearest" or "bilinear", to the first stage's grid.

    Returns:
      (b, h, w, d) float32.
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
    """Return the paper's embedding: kept channels of all stages on the finest grid.

    Deeper stages are brought to that grid by nearest upsampling, as by
    `torch.nn.functional.interpolate(mode="nearest")`.

    Args:
      features: feature maps (b, h_i, w_i, c_i), the finest grid first.
      index: channel numbers into the stages' concatenated channels; static under jit.

    Returns:
      Embeddings (b, p, d), float32; p runs over the first stage's grid row by row.
    """
    grids = tuple((x.shape[1], x.shape[2]) for x in features)
    found = pyramid(grids, tuple(x.shape[3] for x in features), tuple(index.tolist()))
    return concatenate(select(features, found), found)


def concatenate(levels: Levels, pyramid: Pyramid) -> Embeddings:
    """Return the embeddings composed of the levels.

    Args:
      levels: arrays (r, n, d, b), the finest level first.
      pyramid: pyramid that the levels were selected by.

    Returns:
      Embeddings (b, p, d), float32.
    """
    finest = levels[0].shape[1]
    parts = [jnp.repeat(level, finest // level.shape[1], axis=1) for level in levels]
    embedding = jnp.concatenate(parts, axis=2)
    embedding = embedding.reshape(-1, *embedding.shape[2:])[pyramid.patches]
    # Levels hold their channels contiguously; the embedding keeps the drawn order.
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
    """Return, per cell of the fine grid, the coarse cell that nearest upsampling copies."""
    rows, columns = (interpolation.nearest(m, n) for n, m in zip(fine, coarse, strict=True))
    return (rows[:, None] * coarse[1] + columns).reshape(-1)
