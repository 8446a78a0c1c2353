"""Embeddings -> Mahalanobis distances -> anomaly maps -> image scores.

PaDiM (arXiv 2011.08785), section III-C. Upsampling and blur are both linear and
separable, so that one small matrix per axis does the two in a single product.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int32

from padim_jax import interpolation
from padim_jax.types import AnomalyMaps, Distances, Gaussian, Levels, LowRank, Scores

# The blur's kernel ends at this many standard deviations, as scipy.ndimage's
# gaussian_filter by default: sigma 4 gives 33 taps.
_TRUNCATE = 4.0

_LARGEST_BLOCK = 128  # patches whose low-rank distances are computed together

# Four roundoffs of float32.
_LEAST_LEFT = 2.0**-22

# float32 products, also on GPUs, where the default would be TF32's 10-bit mantissa.
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def mahalanobis(fitted: Gaussian | LowRank, levels: Levels) -> Float32[Array, "r n b"]:
    """Distance of every patch from its Gaussian (paper eq. 2).

    Args:
      fitted: the Gaussians.
      levels: embeddings by level, (r, n, d, b) float32.

    Returns:
      (r, n, b) float32 of the finest level's cells, in standard deviations; the square
      root of the quadratic form. `on_grid` brings them into the patches' order.
    """
    if isinstance(fitted, Gaussian):
        return jnp.sqrt(jax.vmap(_full_rank)(fitted.mean, fitted.factor, levels))

    def one(region: tuple) -> Float32[Array, "n b"]:
        mean, deviations, root, x = region
        return jnp.sqrt(_low_rank(mean, deviations, root, fitted.regularization, x))

    # Block by block: what is left of the deviations is of every patch, for coarse levels too.
    each = (fitted.mean, fitted.deviations, fitted.root, levels)
    return lax.map(one, each, batch_size=max(1, _LARGEST_BLOCK // fitted.root.shape[1]))


def leave_one_out(
    distances: Float32[Array, "*shape"], count: Int32[Array, ""] | int
) -> Float32[Array, "*shape"]:
    """Distances of images that were fitted, as the model without each of them has them.

    Without an image at distance d the scatter of n images loses a multiple of its
    deviation's outer product, which the Sherman-Morrison formula inverts. The mean moves, too:

        d_without^2 = (n / (n - 1))^2 (n - 2) / (n - 1) d^2 / (1 - n d^2 / (n - 1)^2)

    Exact, up to the regularization: the model without the image has epsilon
    (n - 1) / (n - 2) instead of epsilon.

    Args:
      distances: see `mahalanobis`; of images that were fitted, whose distances are below
        (n - 1) / sqrt(n).
      count: n, of images fitted; at least 3.
    """
    n = jnp.asarray(count, jnp.float32)
    squared = distances * distances
    # What is left of an image that others hardly explain: of it rounding may leave nothing.
    left = jnp.maximum(1 - n / (n - 1) ** 2 * squared, _LEAST_LEFT)
    return n / (n - 1) * jnp.sqrt((n - 2) / (n - 1) * squared / left)


def on_grid(distances: Float32[Array, "r n b"], patches: Int[np.ndarray, " p"]) -> Distances:
    """Distances by region, (r, n, b), as (b, p): patch by patch, row by row.

    Args:
      distances: see `mahalanobis`.
      patches: `embedding.Pyramid.patches`.
    """
    return distances.reshape(-1, distances.shape[-1])[patches].T


def anomaly_maps(
    distances: Distances,
    grid: tuple[int, int],
    size: tuple[int, int],
    upsample: str,
    sigma: float,
) -> AnomalyMaps:
    """Distances on the patch grid, brought to the image's size and blurred.

    Args:
      distances: (b, p) with p = grid[0] * grid[1].
      grid: height and width in patches.
      size: height and width of the maps in pixels.
      upsample: "bilinear" or "bicubic", with half-pixel centres, as
        `torch.nn.functional.interpolate(align_corners=False)`.
      sigma: standard deviation of the Gaussian blur in pixels, 0 for none; borders
        are reflected without repeating the edge pixel.

    Returns:
      (b, h, w) float32.
    """
    rows, columns = (
        jnp.asarray(_blur(n, sigma) @ interpolation.matrix(m, n, upsample), jnp.float32)
        for m, n in zip(grid, size, strict=True)
    )
    on_grid = distances.reshape(len(distances), *grid)
    return jnp.einsum("hi,bij,wj->bhw", rows, on_grid, columns, precision=lax.Precision.HIGHEST)


def image_scores(maps: AnomalyMaps) -> Scores:
    """The maximum of each anomaly map: (b,) float32."""
    return jnp.max(maps, axis=(1, 2))


def _full_rank(
    mean: tuple[Float32[Array, "_n _d"], ...],
    factor: tuple[tuple[Float32[Array, "_n _d _e"], ...], ...],
    levels: tuple[Float32[Array, "_n _d b"], ...],
) -> Float32[Array, "n b"]:
    """Squared distances of a region's patches: |L^-1 (x - mean)|^2, level by level.

    L^-1 comes from forward substitution, the coarsest level first. A coarse cell meets
    the rows of all cells above it in one product.
    """
    cells, _, images = levels[0].shape
    squared, white = jnp.zeros((cells, images)), ()
    for x, m, (inverse, *cross) in reversed(list(zip(levels, mean, factor, strict=True))):
        rest = x - m[..., None]
        for rows, coarse in zip(cross, white, strict=True):
            stacked = rows.reshape(len(coarse), -1, rows.shape[-1])
            rest -= _matmul(stacked, coarse).reshape(rest.shape)
        white = (_matmul(inverse, rest), *white)
        squared += _spread(jnp.sum(white[0] * white[0], axis=1), cells)
    return squared


def _low_rank(
    mean: tuple[Float32[Array, "_n _d"], ...],
    deviations: tuple[Float32[Array, "_n s _d"], ...],
    root: Float32[Array, "n s s"],
    regularization: Float32[Array, ""],
    levels: tuple[Float32[Array, "_n _d b"], ...],
) -> Float32[Array, "n b"]:
    """Squared distances of a region's patches, by the Woodbury identity.

    With the kernel K = (s - 1) epsilon I + X X^T, which `low_rank.finalize` inverts (R^T R,
    but for a part that all X delta lack), y = K^-1 X delta are the weights of the images that
    explain a deviation delta best, r = delta - X^T y what they leave of it, and

        delta^T (X^T X / (s - 1) + epsilon I)^-1 delta = |r|^2 / epsilon + (s - 1) |y|^2

    The shorter (|delta|^2 - |R X delta|^2) / epsilon cancels: of images that were fitted, and
    are all but explained, nothing but roundoffs may be left, amplified by 1 / epsilon. Here
    nothing cancels but r itself, and y is where the sum is least: of its errors only squares
    count.
    """
    cells, images, _ = root.shape
    deltas = [x - m[..., None] for x, m in zip(levels, mean, strict=True)]
    pairs = list(zip(deltas, deviations, strict=True))
    products = sum(_spread(_matmul(x, delta), cells) for delta, x in pairs)
    weights = _matmul(root.swapaxes(-1, -2), _matmul(root, products))
    squared = (images - 1) * jnp.sum(weights * weights, axis=1)
    for delta, x in pairs:
        explained = _matmul(_spread(x.swapaxes(-1, -2), cells), weights)
        rest = _spread(delta, cells) - explained
        squared += jnp.sum(rest * rest, axis=1) / regularization
    return squared


def _spread(x: Float32[Array, "_n *b"], cells: int) -> Float32[Array, "n *b"]:
    """Repeats a coarse level's cells for the finer ones above them."""
    return jnp.repeat(x, cells // len(x), axis=0)


@functools.cache
def _blur(n: int, sigma: float) -> Float[np.ndarray, "n n"]:
    """The matrix that blurs `n` samples with a Gaussian, borders reflected."""
    if sigma == 0:
        return np.eye(n)
    radius = int(_TRUNCATE * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    # np.pad's reflection repeats where the kernel is wider than the image.
    source = np.pad(np.arange(n), radius, mode="reflect")
    matrix = np.zeros((n, n))
    for tap, weight in enumerate(taps):
        np.add.at(matrix, (np.arange(n), source[tap : tap + n]), weight)
    return matrix
