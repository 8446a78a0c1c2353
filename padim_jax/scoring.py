"""Embeddings -> Mahalanobis distances -> anomaly maps -> image scores.

PaDiM (arXiv 2011.08785), section III-C. Upsampling and blur are both linear and
separable, so that one small matrix per axis does the two in a single product.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from padim_jax.types import AnomalyMaps, Distances, Embeddings, Gaussian, Scores

# The blur's kernel ends at this many standard deviations, as scipy.ndimage's
# gaussian_filter by default: sigma 4 gives 33 taps.
_TRUNCATE = 4.0


def mahalanobis(gaussian: Gaussian, embeddings: Embeddings) -> Distances:
    """Distance of every patch from its Gaussian (paper eq. 2).

    Args:
      gaussian: of p patches and d channels.
      embeddings: (b, p, d) float32.

    Returns:
      (b, p) float32, in standard deviations; the square root of the quadratic form.
    """
    distance = jax.vmap(_patch_distance, in_axes=(0, 0, 1), out_axes=1)
    return distance(gaussian.mean, gaussian.whitening, embeddings)


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


def _patch_distance(
    mean: Float32[Array, " d"], whitening: Float32[Array, "d d"], x: Float32[Array, "b d"]
) -> Float32[Array, " b"]:
    # float32 products on GPUs as well, where the default would be TF32.
    white = jnp.matmul(x - mean[None], whitening.T, precision=lax.Precision.HIGHEST)
    return jnp.sqrt(jnp.sum(white * white, axis=1))


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
