"""Upsampling along one axis as a matrix, with PyTorch's conventions.

`torch.nn.functional.interpolate(align_corners=False)` is linear and separable: one matrix
for the rows and one for the columns describe it completely.
"""

import functools
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int


def nearest(n_in: int, n_out: int) -> Int[np.ndarray, " n_out"]:
    """Return, per output sample, the index of the input sample that nearest upsampling copies.

    Args:
      n_in: number of input samples.
      n_out: number of output samples.

    Returns:
      Indices (n_out,) from 0 to n_in - 1.
    """
    # In float32, as in PyTorch: a whole number may round down to the previous sample.
    return (np.arange(n_out, dtype=np.float32) * np.float32(n_in / n_out)).astype(int)


def nearest_inside(
    inside: Bool[np.ndarray, "h w"],
) -> tuple[Int[np.ndarray, "h w"], Int[np.ndarray, "h w"]]:
    """Return, for each cell of a grid, row and column of the nearest cell inside a region.

    Args:
      inside: (h, w), at least one cell.

    Returns:
      Rows and columns; those of the cell itself where it is inside.
    """
    from scipy import ndimage  # slow to import; only a region of interest needs it

    found: Any = ndimage.distance_transform_edt(
        ~inside, return_distances=False, return_indices=True
    )
    rows, columns = found
    return rows, columns


@functools.cache
def matrix(n_in: int, n_out: int, method: str) -> Float[np.ndarray, "n_out n_in"]:
    """Return the matrix that interpolates `n_in` samples at `n_out` positions.

    Args:
      n_in: number of input samples.
      n_out: number of output samples.
      method: "nearest", or "bilinear" or "bicubic" with half-pixel centres.

    Returns:
      (n_out, n_in) float64.

    Raises:
      ValueError: `method` is unknown.
    """
    if method == "nearest":
        return np.eye(n_in)[nearest(n_in, n_out)]
    centre = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
    if method == "bilinear":
        taps, kernel = np.arange(2), lambda t: 1.0 - t
    elif method == "bicubic":
        taps, kernel = np.arange(-1, 3), _cubic
    else:
        raise ValueError(f"{method!r}: expected 'nearest', 'bilinear' or 'bicubic'")
    left = np.floor(centre).astype(int)
    found = np.zeros((n_out, n_in))
    for tap in taps:
        weight = kernel(np.abs(centre - (left + tap)))
        np.add.at(found, (np.arange(n_out), np.clip(left + tap, 0, n_in - 1)), weight)
    return found


def _cubic(t: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return Keys' cubic convolution kernel at distance t >= 0, with PyTorch's a = -0.75."""
    a = -0.75
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, far)
