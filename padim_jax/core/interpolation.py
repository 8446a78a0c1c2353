"""Upsampling along one axis as a matrix, with PyTorch's conventions.

`torch.nn.functional.interpolate(align_corners=False)` is linear, and separable: a matrix for
the rows and one for the columns are the whole of it.
"""

import functools

import numpy as np
from jaxtyping import Float, Int


def nearest(n_in: int, n_out: int) -> Int[np.ndarray, " n_out"]:
    """Of every output sample the input one that nearest upsampling puts there."""
    # In float32, as PyTorch: a whole number may round to the sample before it.
    return (np.arange(n_out, dtype=np.float32) * np.float32(n_in / n_out)).astype(int)


@functools.cache
def matrix(n_in: int, n_out: int, method: str) -> Float[np.ndarray, "n_out n_in"]:
    """The matrix that interpolates `n_in` samples at `n_out` positions, float64.

    Args:
      n_in: samples there are.
      n_out: samples to make.
      method: "nearest", or "bilinear" or "bicubic" with half-pixel centres.
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
    """Keys' cubic convolution kernel at distance t >= 0, with PyTorch's a = -0.75."""
    a = -0.75
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, far)
