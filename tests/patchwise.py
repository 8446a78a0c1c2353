"""What levels stand for, patch by patch in NumPy: the slow and obvious reference."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from padim_jax.core import gaussian, low_rank
from padim_jax.core.embedding import Pyramid, pyramid
from padim_jax.core.types import Gaussian, Levels, LowRank, Moments, Samples, Valid
from padim_jax.detector import statistics as statistics_lib

# Stages as (height, width, channels), the finest first, and the channels to keep.
Case = tuple[list[tuple[int, int, int]], list[int]]
CASES: dict[str, Case] = {
    "one level": ([(3, 5, 6)], [4, 0, 5, 2]),
    "one channel": ([(2, 3, 2)], [1]),
    "two levels": ([(4, 6, 4), (2, 3, 5)], [7, 0, 3, 4, 2, 8]),
    "three levels": ([(8, 8, 4), (4, 4, 5), (2, 2, 6)], [14, 2, 5, 0, 9, 3, 8, 11, 10]),
    "a level of one channel": ([(8, 8, 3), (4, 4, 4), (2, 2, 5)], [2, 11, 5, 7, 0]),
    "finest stage unused": ([(8, 8, 3), (4, 4, 4), (2, 2, 5)], [11, 4, 6, 7, 8]),
    "middle stage unused": ([(8, 8, 3), (4, 4, 4), (2, 2, 5)], [11, 0, 2, 8, 9]),
    "same grid": ([(4, 3, 4), (4, 3, 4)], [6, 3, 5, 1, 4]),
    # Cells of a finer stage that lie in two of a coarser one, regions of unequal sizes.
    "no nested grids": ([(13, 9, 3), (7, 5, 4), (4, 3, 5)], [9, 1, 4, 0, 6, 2, 11]),
}
# One of each kind: other cases have the same kinds of levels.
KINDS = [name for name in CASES if name not in ("two levels", "middle stage unused")]


def lay(case: Case) -> Pyramid:
    shapes, index = case
    grids = tuple((height, width) for height, width, _ in shapes)
    return pyramid(grids, tuple(channels for _, _, channels in shapes), tuple(index))


def random_features(
    shapes: list[tuple[int, int, int]], images: int, mean: float = 0.0, seed: int = 0
) -> list[np.ndarray]:
    """Stages correlated with each other, another Gaussian of deviation about 1 a position."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(images, 6))
    features = []
    for shape in shapes:
        mix = rng.normal(size=(6, *shape)) / np.sqrt(12)
        own = rng.normal(size=(images, *shape)) / np.sqrt(2)
        centre = mean + rng.normal(size=shape)
        features.append((np.tensordot(common, mix, 1) + own + centre).astype(np.float32))
    return features


def embeddings(
    features: Sequence[np.ndarray] | Sequence[jax.Array],
    index: list[int] | np.ndarray,
    dtype: type = np.float32,
) -> np.ndarray:
    """(b, p, d): every stage nearest-upsampled, all channels side by side, then selected."""
    height, width, _ = features[0].shape[1:]
    upsampled = []
    for stage in features:
        # In float32, as PyTorch has it.
        ys, xs = (
            np.floor(np.arange(n, dtype=np.float32) * np.float32(m / n)).astype(int)
            for n, m in zip((height, width), stage.shape[1:3], strict=True)
        )
        upsampled.append(np.asarray(stage, dtype)[:, ys[:, None], xs[None]])
    chosen = np.concatenate(upsampled, axis=-1)[..., np.asarray(index)]
    return chosen.reshape(len(chosen), height * width, -1)


def whole(
    features: Sequence[np.ndarray] | Sequence[jax.Array],
    pooling: int = 1,
    upsample: str = "nearest",
) -> np.ndarray:
    """(b, p, c) float64: every stage pooled, upsampled, and all channels side by side."""
    pooled = [_pooled(np.asarray(stage, np.float64), pooling) for stage in features]
    if upsample == "nearest":
        total = sum(stage.shape[-1] for stage in pooled)
        return embeddings(pooled, list(range(total)), np.float64)
    height, width = pooled[0].shape[1:3]
    found = []
    for stage in pooled:
        for axis, size in ((1, height), (2, width)):
            stage = np.apply_along_axis(_interpolated, axis, stage, size)
        found.append(stage.reshape(len(stage), height * width, -1))
    return np.concatenate(found, axis=-1)


def _interpolated(x: np.ndarray, size: int) -> np.ndarray:
    # Half-pixel centres; np.interp holds the end values beyond the ends.
    centre = (np.arange(size) + 0.5) * len(x) / size - 0.5
    return np.interp(centre, np.arange(len(x)), x)


def _pooled(stage: np.ndarray, size: int) -> np.ndarray:
    """Means of the cells that a window around each has."""
    reach, found = size // 2, np.empty_like(stage)
    for y, x in np.ndindex(stage.shape[1:3]):
        window = stage[:, max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1]
        found[:, y, x] = window.mean(axis=(1, 2))
    return found


def random_levels(
    case: Case, images: int, mean: float = 0.0, seed: int = 0
) -> tuple[list[np.ndarray], np.ndarray]:
    """Images' embeddings by level, (r, n, d, b), and the same (b, p, d)."""
    features = random_features(case[0], images, mean, seed)
    levels = []
    for level in lay(case).levels:
        stage = features[level.stage][..., level.channels]
        cells = stage.reshape(images, -1, stage.shape[-1])[:, level.source]
        levels.append(np.moveaxis(cells, 0, -1))
    return levels, embeddings(features, case[1])


def batches(
    levels: Sequence[np.ndarray], sizes: Sequence[int]
) -> Iterator[tuple[Levels, Valid]]:
    """Batches of the given sizes, all padded to one size with what would be noticed."""
    room, start = max([8, *sizes]), 0
    for size in sizes:
        widths = [(0, 0)] * 3 + [(0, room - size)]
        taken = (x[..., start : start + size] for x in levels)
        padded = (np.pad(x, widths, constant_values=1e6) for x in taken)
        yield tuple(jnp.asarray(x) for x in padded), jnp.arange(room) < size
        start += size


def finalize(statistics: Moments | Samples, regularization: float) -> Gaussian | LowRank:
    """The fitted Gaussians, all of them sound; the statistics are used up."""
    fitted, finite, kept, _ = _finalize(statistics, regularization)
    assert np.all(finite)
    assert np.all(kept >= statistics_lib.LEAST_KEPT)
    return fitted


@functools.partial(jax.jit, donate_argnums=0)
def _finalize(statistics: Moments | Samples, regularization: float | jax.Array) -> tuple:
    if isinstance(statistics, Moments):
        found = gaussian.finalize(statistics, regularization)
    else:
        found = low_rank.finalize(statistics, regularization)
    return *found, statistics.count  # of which JAX would warn that it is given up for nothing


def distances(
    training: np.ndarray, x: np.ndarray, regularization: float
) -> tuple[np.ndarray, np.ndarray]:
    """Squared Mahalanobis distances (b, p) of embeddings; condition numbers (p,)."""
    training, x = training.astype(np.float64), x.astype(np.float64)
    mean = training.mean(axis=0)
    deviations = training - mean
    covariance = np.einsum("npi,npj->pij", deviations, deviations) / (len(training) - 1)
    covariance += regularization * np.eye(x.shape[-1])
    delta = np.moveaxis(x - mean, 0, -1)
    squared = np.sum(delta * np.linalg.solve(covariance, delta), axis=1).T
    return squared, np.linalg.cond(covariance)


def products(function: Callable, *arguments) -> list[str]:
    """The matrix products of a function, in StableHLO."""
    leaves, tree = jax.tree.flatten(arguments)
    lowered = jax.jit(lambda *leaves: function(*tree.unflatten(leaves))).lower(*leaves)
    lines = lowered.as_text().splitlines()
    return [line for line in lines if "dot_general" in line]


def vectors(parts, pyramid: Pyramid) -> np.ndarray:
    """(r, n, d) a level -> (p, d), channels in the embedding's order."""
    shapes = pyramid.shapes
    found = np.zeros((len(pyramid.patches), sum(d for _, _, d in shapes)))
    for part, level, cell in zip(parts, pyramid.levels, _cells(pyramid), strict=True):
        found[:, level.order] = np.asarray(part).reshape(-1, part.shape[-1])[cell]
    return found


def matrices(blocks, pyramid: Pyramid) -> np.ndarray:
    """(r, n, d, e) of a level and itself or a coarser one -> (p, d, d), 0 elsewhere."""
    total = sum(d for _, _, d in pyramid.shapes)
    found = np.zeros((len(pyramid.patches), total, total))
    for i, (row, cell) in enumerate(zip(blocks, _cells(pyramid), strict=True)):
        for block, coarse in zip(row, pyramid.levels[i:], strict=True):
            whole = np.asarray(block, np.float64).reshape(-1, *block.shape[2:])[cell]
            found[:, pyramid.levels[i].order[:, None], coarse.order[None]] = whole
    return found


def symmetric(blocks, pyramid: Pyramid) -> np.ndarray:
    """(p, d, d) of symmetric matrices, of which blocks of unlike levels are there once."""
    one = matrices(blocks, pyramid)
    once = matrices([[row[0]] + [0 * x for x in row[1:]] for row in blocks], pyramid)
    return one + one.transpose(0, 2, 1) - once


def factors(blocks, pyramid: Pyramid) -> np.ndarray:
    """(p, d, d): of a factor whose diagonal blocks are inverted. Rows in the embedding's order.

    Columns, too, so that it is triangular only with the channels of coarse levels first.
    """
    whole = [(np.linalg.inv(np.asarray(own, np.float64)), *rest) for own, *rest in blocks]
    return matrices(whole, pyramid)


def _cells(pyramid: Pyramid) -> list[np.ndarray]:
    """Of every patch, its cell among all of a level's, for every level."""
    finest = pyramid.shapes[0][1]
    return [pyramid.patches // (finest // cells) for _, cells, _ in pyramid.shapes]
