"""Embeddings -> Mahalanobis distances -> anomaly maps.

PaDiM (arXiv 2011.08785), section III-C. Upsampling and blur are both linear and
separable, so one small matrix per axis applies both in a single product.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int32

from padim_jax.core import interpolation
from padim_jax.core.embedding import Shifts
from padim_jax.core.types import AnomalyMaps, Distances, Gaussian, Levels, LowRank

# The blur's kernel is truncated at this many standard deviations, the default of
# scipy.ndimage's gaussian_filter: sigma 4 gives 33 taps.
_TRUNCATE = 4.0

_LARGEST_BLOCK = 128  # patches whose low-rank distances are computed together

# Numbers that `leave_out` computes together: 64 MB.
_MOST_NUMBERS = 1 << 24

# Images per batch that the memory of an exported program is bounded for.
_EXPORTED_IMAGES = 32

# Four roundoffs of float32.
_LEAST_LEFT = 2.0**-22

# float32 products, also on GPUs, where the default would be TF32's 10-bit mantissa.
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def mahalanobis(fitted: Gaussian | LowRank, levels: Levels) -> Float32[Array, "r n b"]:
    """Return the distance of each patch from its Gaussian (paper eq. 2).

    Args:
      fitted: the Gaussians.
      levels: embeddings by level, (r, n, d, b) float32.

    Returns:
      (r, n, b) float32 for the finest level's cells, in standard deviations: the square root of
      the quadratic form. `on_grid` brings them into the patches' order.
    """
    squared, parts = _by_region(fitted, _squares)
    if isinstance(fitted, Gaussian):
        return jnp.sqrt(jax.vmap(squared)(*parts, levels))
    # Block by block: residuals of the deviations are per patch, for coarse levels too.
    block = max(1, _LARGEST_BLOCK // levels[0].shape[1])
    return lax.map(lambda part: jnp.sqrt(squared(*part)), (*parts, levels), batch_size=block)


def leave_out(
    fitted: Gaussian | LowRank,
    levels: Levels,
    count: Int32[Array, ""] | int,
    size: int = 1,
) -> Float32[Array, "r n b"]:
    """Return distances of fitted images, each from the model without the image's group.

    Removing a group of k images with deviations D (d, k) from the scatter S of all n moves the
    mean and leaves S - D W D^T, where W = I + J / m, m = n - k and J is all ones. With
    B = S + (m - 1) epsilon I and Q = D^T B^-1 D, the Woodbury identity gives the squared
    distances of the group's images from the model of the other m:

        (m - 1) diag((I - J / n - Q)^-1 Q W)

    This is exact: epsilon is that of the model without the group, too. For a single image it is
    (n / (n - 1))^2 (n - 2) q / (1 - n q / (n - 1)), the Sherman-Morrison formula.

    Args:
      fitted: Gaussians of all n images, finalized with (m - 1) / (n - 1) times epsilon, so that
        their covariances times n - 1 are B.
      levels: embeddings by level, (r, n, d, b) float32, of images that were fitted. Each `size`
        consecutive images are a group; the rest after the last complete group is padding.
      count: n; at least k + 2.
      size: k.

    Returns:
      (r, n, b) float32 as from `mahalanobis`; 0 for padding.
    """
    cells, images = levels[0].shape[1], levels[0].shape[-1]
    groups, n = images // size, jnp.asarray(count, jnp.float32)
    m = n - size

    def products(x: Float32[Array, "_n _d b"]) -> Float32[Array, "_n _g _k _k"]:
        """Return the products of each group's images with each other."""
        x = x[..., : groups * size].reshape(*x.shape[:2], groups, size)
        return _matmul(jnp.moveaxis(x, 1, 3), jnp.moveaxis(x, 1, 2))

    squared, parts = _by_region(fitted, products)

    def one(part: tuple) -> Float32[Array, "n b"]:
        q = squared(*part) / (n - 1)
        q_w = q + jnp.sum(q, axis=-1, keepdims=True) / m
        root = lax.linalg.cholesky(jnp.eye(size)[None, None] - 1 / n - q)
        identity = jnp.broadcast_to(jnp.eye(size), q.shape)
        both = jnp.concatenate([identity, q_w], axis=-1)
        both = lax.linalg.triangular_solve(root, both, left_side=True, lower=True)
        found = (m - 1) * jnp.sum(both[..., :size] * both[..., size:], axis=-2)
        # Rounding may leave nothing of a group that the other images hardly explain.
        found = jnp.where(jnp.isfinite(found), found, (m - 1) / _LEAST_LEFT)
        found = jnp.sqrt(jnp.maximum(found, 0)).reshape(cells, -1)
        return jnp.pad(found, ((0, 0), (0, images - groups * size)))

    channels = sum(level.shape[2] for level in levels)
    block = max(1, _MOST_NUMBERS // (cells * images * max(channels, size)))
    if isinstance(fitted, LowRank):
        block = min(block, max(1, _LARGEST_BLOCK // cells))
    return _map(one, (*parts, levels), block)


def mahalanobis_nearby(
    fitted: Gaussian | LowRank, levels: Levels, shifts: Shifts
) -> Float32[Array, "_r n b"]:
    """Return the smallest distance of each patch from the Gaussians of nearby patches.

    Parts that are not quite in the place of the fitted ones are then not anomalous by that:
    min_s M_q(x_{q+s}) over the shifts s, with M_q the distance from the Gaussian of q (PaDiM's
    eq. 2; the search for the best of several places is that of PatchCore, arXiv 2106.08265, and
    SPADE, arXiv 2005.02357, restricted to neighbours).

    Neighbours share features, so that most of the work is shared: each level's products are
    computed once for each of a cell's variants, 9 for one patch's distance, and not for each of
    the 16 times 9 pairs of a layer-3 cell with a patch. `embedding.Shifts` says which belong
    together.

    Args:
      fitted: the Gaussians of some regions.
      levels: embeddings by level of all regions, (R, n, d, b) float32.
      shifts: neighbours of the patches of the fitted regions; see `embedding.shifts`.

    Returns:
      (r, n, b) float32, as from `mahalanobis`.
    """
    images = levels[0].shape[-1]
    squared, parts = _by_region(fitted, _squares)

    def one(part: tuple, own: Shifts) -> Float32[Array, "n b"]:
        found = squared(*part, _variants(levels, own), own)
        return jnp.sqrt(jnp.min(found.reshape(len(found), -1, images), axis=1))

    block = _shift_block(fitted, levels, shifts)
    return _map(lambda x: one(*x), (parts, shifts), block)


def leave_out_nearby(
    fitted: Gaussian | LowRank,
    levels: Levels,
    shifts: Shifts,
    count: Int32[Array, ""] | int,
    size: int = 1,
) -> Float32[Array, "_r n b"]:
    """Return `mahalanobis_nearby` of fitted images, each from the model without its group.

    As in `leave_out`, but the vector that is scored, x - mean at another patch, is none of the
    group's deviations D there. With a = x - mean + D 1 / m, its deviation from the mean without
    the group, and M = I - J / n - Q, the Woodbury identity gives the squared distance

        (m - 1) (a^T B^-1 a + (D^T B^-1 a)^T M^-1 (D^T B^-1 a))

    Args:
      fitted: see `leave_out`.
      levels: embeddings of all regions; see `leave_out`.
      shifts: see `mahalanobis_nearby`.
      count: see `leave_out`.
      size: see `leave_out`.

    Returns:
      (r, n, b) float32; 0 for padding.
    """
    cells, images = shifts.sources[0].shape[1], levels[0].shape[-1]
    groups, n = images // size, jnp.asarray(count, jnp.float32)
    m = n - size

    def products(x: Float32[Array, "_n _d _vb"]) -> Float32[Array, "_n _c"]:
        """Return per variant and image: products with the group's images, and its square."""
        x = x.reshape(*x.shape[:2], -1, images)[..., : groups * size]
        x = x.reshape(*x.shape[:3], groups, size)
        own = x[:, :, 0]  # the first variant is the patch itself
        cross = _einsum("ndvgk,ndgl->nvgkl", x, own)
        both = jnp.concatenate([cross, jnp.sum(x * x, axis=1)[..., None]], axis=-1)
        return both.reshape(len(x), -1)

    squared, parts = _by_region(fitted, products)

    def one(part: tuple, own: Shifts) -> Float32[Array, "n b"]:
        found = squared(*part, _variants(levels, own), own) / (n - 1)
        found = found.reshape(cells, -1, groups, size, size + 1)
        cross, square = found[..., :size], found[..., size]
        q = cross[:, 0]
        moved = (
            square + 2 / m * jnp.sum(cross, -1) + jnp.sum(q, (-1, -2))[:, None, :, None] / m**2
        )
        weights = cross + jnp.sum(q, axis=-2)[:, None, :, None] / m
        root = lax.linalg.cholesky(jnp.eye(size)[None, None] - 1 / n - q)
        root = jnp.broadcast_to(root[:, None], (*weights.shape[:3], size, size))
        solved = lax.linalg.triangular_solve(root, weights.mT, left_side=True, lower=True)
        found = (m - 1) * (moved + jnp.sum(solved * solved, axis=-2))
        found = jnp.where(jnp.isfinite(found), found, (m - 1) / _LEAST_LEFT)
        found = jnp.sqrt(jnp.maximum(jnp.min(found, axis=1), 0)).reshape(cells, -1)
        return jnp.pad(found, ((0, 0), (0, images - groups * size)))

    block = max(1, _shift_block(fitted, levels, shifts) // (size + 1))
    return _map(lambda x: one(*x), (parts, shifts), block)


def on_grid(distances: Float32[Array, "r n b"], patches: Int[np.ndarray, " p"]) -> Distances:
    """Reorder distances by region to patches, row by row.

    Args:
      distances: (r, n, b); see `mahalanobis`.
      patches: (p,); `embedding.Pyramid.patches`.

    Returns:
      (b, p).
    """
    return distances.reshape(-1, distances.shape[-1])[patches].T


def anomaly_maps(
    distances: Distances,
    grid: tuple[int, int],
    size: tuple[int, int],
    upsample: str,
    sigma: float,
) -> AnomalyMaps:
    """Upsample distances from the patch grid to the image's size and blur them.

    Args:
      distances: (b, p) with p = grid[0] * grid[1].
      grid: height and width in patches.
      size: height and width of the maps in pixels.
      upsample: "bilinear" or "bicubic", with half-pixel centres, as
        `torch.nn.functional.interpolate(align_corners=False)`.
      sigma: standard deviation of the Gaussian blur in pixels, 0 for none; borders are
        reflected without repeating the edge pixel.

    Returns:
      (b, h, w) float32.
    """
    rows, columns = (
        jnp.asarray(axis_matrix(m, n, upsample, sigma), jnp.float32)
        for m, n in zip(grid, size, strict=True)
    )
    on_grid = distances.reshape(distances.shape[0], *grid)
    return jnp.einsum("hi,bij,wj->bhw", rows, on_grid, columns, precision=lax.Precision.HIGHEST)


def axis_matrix(
    cells: int, pixels: int, upsample: str, sigma: float
) -> Float[np.ndarray, "pixels cells"]:
    """Return the matrix that upsamples and blurs along one axis; see `anomaly_maps`.

    Args:
      cells: number of patches.
      pixels: number of pixels.
      upsample: "bilinear" or "bicubic".
      sigma: standard deviation of the blur in pixels, 0 for none.

    Returns:
      (pixels, cells) float64.
    """
    return _blur(pixels, sigma) @ interpolation.matrix(cells, pixels, upsample)


def _by_region(
    fitted: Gaussian | LowRank, product: Callable[[Array], Array]
) -> tuple[Callable[..., Array], tuple[Any, ...]]:
    """Return a function of one region's parts and levels, and the parts of all regions.

    The function's last argument may be the region's `Shifts`; its levels are then `_variants`.
    """
    if isinstance(fitted, Gaussian):
        return functools.partial(_full_rank, product), (fitted.mean, fitted.factor)
    function = functools.partial(_low_rank, product, fitted.regularization)
    return function, (fitted.mean, fitted.deviations, fitted.root)


def _map(function: Callable[[Any], Array], regions: Any, most: int) -> Float32[Array, "r n b"]:
    """Apply a function of one region to all regions, at most so many at a time.

    Blocks that divide the regions: of a remainder `lax.map` would copy all regions' factors.
    """
    count = len(jax.tree.leaves(regions)[0])
    if most < count:
        block = max(n for n in range(1, most + 1) if count % n == 0)
        if 4 * block >= most:  # of a prime number of regions, say, blocks would be slow
            most = block
    return lax.map(function, regions, batch_size=most)


def _variants(levels: Levels, own: Shifts) -> tuple[Float32[Array, "_n _d _vb"], ...]:
    """Return the embeddings of all variants of a region's cells, side by side as images."""
    found = []
    for level, sources in zip(levels, own.sources, strict=True):
        x = level.reshape(-1, *level.shape[2:])[sources]  # (n, v, d, b)
        found.append(jnp.moveaxis(x, 1, 2).reshape(len(x), level.shape[2], -1))
    return tuple(found)


def _pick(
    x: Float32[Array, "_n *_d _vb"], own: Shifts | None, level: int, coarse: int
) -> Float32[Array, "_n *_d _wb"]:
    """Return, for the variants of a level's cells, what belongs to them of a coarser level.

    Args:
      x: values of the coarser level's variants, at each of the level's cells.
      own: a region's neighbours; None if each cell has itself alone.
      level: index of the level.
      coarse: index of the coarser level, or of the level itself.
    """
    if own is None or level == coarse:
        return x
    index, variants = own.coarser[level][coarse - level - 1], own.sources[coarse].shape[-1]
    x = x.reshape(*x.shape[:-1], variants, -1)
    index = jnp.expand_dims(index, (*range(1, x.ndim - 2), x.ndim - 1))
    return jnp.take_along_axis(x, index, axis=-2).reshape(*x.shape[:-2], -1)


def _shift_block(fitted: Gaussian | LowRank, levels: Levels, shifts: Shifts) -> int:
    """Return how many regions are computed together, to bound their memory."""
    own = zip(levels, shifts.sources, strict=True)
    images = levels[0].shape[-1]
    if not isinstance(images, int):  # any number, in `jax.export`
        images = _EXPORTED_IMAGES
    numbers = images * sum(
        n * v * x.shape[2] for x, (_, n, v) in ((x, s.shape) for x, s in own)
    )
    if isinstance(fitted, LowRank):  # all levels' deviations at the finest
        _, cells, variants = shifts.sources[0].shape
        channels = sum(x.shape[2] for x in levels)
        numbers = cells * variants * images * (channels + fitted.root.shape[-1])
    return max(1, _MOST_NUMBERS // numbers)


def _squares(x: Float32[Array, "_n _d b"]) -> Float32[Array, "_n b"]:
    return jnp.sum(x * x, axis=1)


def _full_rank(
    product: Callable[[Array], Array],
    mean: tuple[Float32[Array, "_n _d"], ...],
    factor: tuple[tuple[Float32[Array, "_n _d _e"], ...], ...],
    levels: tuple[Float32[Array, "_n _d _b"], ...],
    own: Shifts | None = None,
) -> Float32[Array, "n *_c"]:
    """Return squared distances of a region's patches: |L^-1 (x - mean)|^2, level by level.

    L^-1 is applied by forward substitution, the coarsest level first; one product serves a
    coarse cell and the rows of all cells above it. `product` maps the images' L^-1 (x - mean)
    to squares, or to products of one image with another.
    """
    cells, squared, white = levels[0].shape[0], jnp.zeros(()), ()
    for i, (x, m, (inverse, *cross)) in reversed(
        list(enumerate(zip(levels, mean, factor, strict=True)))
    ):
        rest = x - m[..., None]
        for j, (rows, coarse) in enumerate(zip(cross, white, strict=True), i + 1):
            stacked = rows.reshape(len(coarse), -1, rows.shape[-1])
            explained = _matmul(stacked, coarse).reshape(*rest.shape[:2], -1)
            rest -= _pick(explained, own, i, j)
        white = (_matmul(inverse, rest), *white)
        squared += _pick(_spread(product(white[0]), cells), own, 0, i)
    return squared


def _low_rank(
    product: Callable[[Array], Array],
    regularization: Float32[Array, ""],
    mean: tuple[Float32[Array, "_n _d"], ...],
    deviations: tuple[Float32[Array, "_n s _d"], ...],
    root: Float32[Array, "n s s"],
    levels: tuple[Float32[Array, "_n _d _b"], ...],
    own: Shifts | None = None,
) -> Float32[Array, "n *_c"]:
    """Return squared distances of a region's patches, by the Woodbury identity.

    With the kernel K = (s - 1) epsilon I + X X^T, which `low_rank.finalize` inverts (R^T R,
    except for a component that no X delta has), y = K^-1 X delta are the weights of the images
    that best explain a deviation delta, r = delta - X^T y is the residual, and

        delta^T (X^T X / (s - 1) + epsilon I)^-1 delta = |r|^2 / epsilon + (s - 1) |y|^2

    The shorter (|delta|^2 - |R X delta|^2) / epsilon cancels: for fitted images, which are
    almost completely explained, only roundoff may remain, amplified by 1 / epsilon. Here only r
    cancels, and y minimizes the sum, so that its errors enter as squares only. `product`: see
    `_full_rank`; r and y are linear in delta.
    """
    cells, images, _ = root.shape
    deltas = [x - m[..., None] for x, m in zip(levels, mean, strict=True)]
    pairs = list(zip(deltas, deviations, strict=True))
    products = sum(
        _pick(_spread(_matmul(x, delta), cells), own, 0, i)
        for i, (delta, x) in enumerate(pairs)
    )
    weights = _matmul(root.swapaxes(-1, -2), _matmul(root, products))
    squared = (images - 1) * product(weights)
    for i, (delta, x) in enumerate(pairs):
        explained = _matmul(_spread(x.swapaxes(-1, -2), cells), weights)
        rest = _pick(_spread(delta, cells), own, 0, i) - explained
        squared += product(rest) / regularization
    return squared


def _spread(x: Float32[Array, "_n *b"], cells: int) -> Float32[Array, "n *b"]:
    """Repeat a coarse level's cells for the finer cells above them."""
    return jnp.repeat(x, cells // len(x), axis=0)


@functools.cache
def _blur(n: int, sigma: float) -> Float[np.ndarray, "n n"]:
    """Return the matrix that blurs `n` samples with a Gaussian, borders reflected."""
    if sigma == 0:
        return np.eye(n)
    radius = int(_TRUNCATE * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    # np.pad reflects repeatedly if the kernel is wider than the image.
    source = np.pad(np.arange(n), radius, mode="reflect")
    matrix = np.zeros((n, n))
    for tap, weight in enumerate(taps):
        np.add.at(matrix, (np.arange(n), source[tap : tap + n]), weight)
    return matrix
