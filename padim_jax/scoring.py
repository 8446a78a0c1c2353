"""Embeddings -> Mahalanobis distances -> anomaly maps -> image scores.

PaDiM (arXiv 2011.08785), section III-C. Upsampling and blur are both linear and
separable, so that one small matrix per axis does the two in a single product.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int

from padim_jax.types import AnomalyMaps, Distances, Gaussian, Levels, LowRank, Scores

# The blur's kernel ends at this many standard deviations, as scipy.ndimage's
# gaussian_filter by default: sigma 4 gives 33 taps.
_TRUNCATE = 4.0

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
    squared = jax.vmap(_low_rank, in_axes=(0, 0, 0, None, 0))(
        fitted.mean, fitted.deviations, fitted.root, fitted.regularization, levels
    )
    return jnp.sqrt(squared)


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
        jnp.asarray(_blur(n, sigma) @ _interpolation(m, n, upsample), jnp.float32)
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

    (X^T X / (s - 1) + epsilon I)^-1 is (I - X^T K^-1 X) / epsilon, with the kernel
    K = (s - 1) epsilon I + X X^T = (R^T R)^-1 that `low_rank.finalize` inverts.
    """
    products, squared = 0.0, 0.0
    for x, m, deviation in zip(levels, mean, deviations, strict=True):
        delta = x - m[..., None]
        products += _spread(_matmul(deviation, delta), len(root))
        squared += _spread(jnp.sum(delta * delta, axis=1), len(root))
    explained = _matmul(root, products)
    explained = jnp.sum(explained * explained, axis=1)
    # Rounding can leave less than nothing of a patch that is all but a training image's.
    return jnp.maximum(squared - explained, 0) / regularization


def _spread(x: Float32[Array, "_n *b"], cells: int) -> Float32[Array, "n *b"]:
    """Repeats a coarse level's cells for the finer ones above them."""
    return jnp.repeat(x, cells // len(x), axis=0)


@functools.cache
def _interpolation(n_in: int, n_out: int, method: str) -> Float[np.ndarray, "n_out n_in"]:
    """The matrix that interpolates `n_in` samples at `n_out` half-pixel centres."""
    centre = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
    if method == "bilinear":
        taps, kernel = np.arange(2), lambda t: 1.0 - t
    elif method == "bicubic":
        taps, kernel = np.arange(-1, 3), _cubic
    else:
        raise ValueError(f"upsample={method!r}: expected 'bilinear' or 'bicubic'")
    left = np.floor(centre).astype(int)
    matrix = np.zeros((n_out, n_in))
    for tap in taps:
        weight = kernel(np.abs(centre - (left + tap)))
        np.add.at(matrix, (np.arange(n_out), np.clip(left + tap, 0, n_in - 1)), weight)
    return matrix


def _cubic(t: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Keys' cubic convolution kernel at distance t >= 0, with PyTorch's a = -0.75."""
    a = -0.75
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, far)


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
