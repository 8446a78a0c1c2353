"""Anomaly maps -> image scores.

PaDiM (arXiv 2011.08785), section III-C, scores an image by the maximum of its anomaly map. The
maximum of a normal image's map is an extreme value: it varies from image to image, and more so
the more patches a map has, which hides small defects. Summaries of more of the map vary less::

    max        the maximum of the map: as published
    top        the mean of the highest 1 % of the map's pixels
    band       the standard deviation, over the patch grid, of the distances blurred by 1 patch
               minus the distances blurred by 10: structures of the size of defects, without
               single patches and without what an image has everywhere, such as its brightness
    variation  the map's total variation: the mean absolute difference of vertical and of
               horizontal neighbours, added, times the width of a patch in pixels
    combined   four summaries s_j together: `top`, the standard deviation of the map,
               `variation` and `band`, each in standard deviations of the same summary of normal
               images: sqrt(sum_j max(0, (s_j - mean_j) / deviation_j)^2)

With a region of interest all of them are taken over its pixels, or its patches, alone.

Blurs are in patches and parts of maps in fractions, so that all scale with the image's size.
`combined` takes mean and deviation of the summaries of normal images that the model was not
fitted to, or that were left out of it: those that thresholds are found on.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32

from padim_jax.core import scoring
from padim_jax.core.types import AnomalyMaps, Distances

TOP = 0.01  # fraction of a map's pixels
FINE, COARSE = 1.0, 10.0  # standard deviations of the blurs of `band`, in patches


@dataclasses.dataclass(frozen=True, eq=False)
class Inside:
    """Pixels and patches in a region of interest.

    Attributes:
      pixels: pixels of the maps.
      patches: patches of the grid: those with a pixel inside.
    """

    pixels: Bool[np.ndarray, "h w"]
    patches: Bool[np.ndarray, "_i _j"]


def summaries(
    maps: AnomalyMaps,
    distances: Distances,
    grid: tuple[int, int],
    kind: str,
    inside: Inside | None = None,
) -> Float32[Array, "b _k"]:
    """Return what an image score is made of: the score itself, or four numbers for `combined`.

    Args:
      maps: anomaly maps (b, h, w), 0 outside of a region of interest.
      distances: Mahalanobis distances (b, p) that the maps were made of.
      grid: height and width of the patch grid.
      kind: max, top, band, variation or combined; static under jit.
      inside: region of interest; None for whole maps.

    Returns:
      (b, 1) float32, or (b, 4) for `combined`, in the order of the module's docstring.

    Raises:
      ValueError: `kind` is none of these.
    """
    pixels = None if inside is None else inside.pixels
    patches = None if inside is None else inside.patches
    if kind == "max":
        parts = [jnp.max(maps, axis=(1, 2))]
    elif kind == "top":
        parts = [top(maps, pixels)]
    elif kind == "band":
        parts = [band(distances, grid, patches)]
    elif kind == "variation":
        parts = [total_variation(maps, grid, pixels)]
    elif kind == "combined":
        deviation = jnp.std(maps, axis=(1, 2), where=_of_each(pixels))
        variation = total_variation(maps, grid, pixels)
        parts = [top(maps, pixels), deviation, variation, band(distances, grid, patches)]
    else:
        raise ValueError(f"{kind}: expected max, top, band, variation or combined")
    return jnp.stack(parts, axis=1)


def top(
    maps: AnomalyMaps, inside: Bool[np.ndarray, "h w"] | None = None
) -> Float32[Array, " b"]:
    """Return the mean of the highest `TOP` of each map's pixels, at least one: (b,)."""
    pixels = maps.reshape(maps.shape[0], -1)
    count = pixels.shape[1] if inside is None else int(np.count_nonzero(inside))
    return jnp.mean(lax.top_k(pixels, top_count(count))[0], axis=1)


def top_count(pixels: int) -> int:
    """Return the number of pixels that `top` is the mean of, of so many of a map."""
    return max(1, round(TOP * pixels))


def band(
    distances: Distances,
    grid: tuple[int, int],
    inside: Bool[np.ndarray, "_i _j"] | None = None,
) -> Float32[Array, " b"]:
    """Return the standard deviation of the band-passed distances.

    Args:
      distances: (b, p).
      grid: height and width of the patch grid.
      inside: patches that count; None for all.

    Returns:
      (b,) float32.
    """
    fine, coarse = (
        scoring.anomaly_maps(distances, grid, grid, "bilinear", sigma)
        for sigma in (FINE, COARSE)
    )
    return jnp.std(fine - coarse, axis=(1, 2), where=_of_each(inside))


def total_variation(
    maps: AnomalyMaps,
    grid: tuple[int, int],
    inside: Bool[np.ndarray, "h w"] | None = None,
) -> Float32[Array, " b"]:
    """Return the mean absolute change of each map from patch to patch, along both axes added.

    Args:
      maps: (b, h, w), of at least 2 pixels along each axis.
      grid: height and width of the patch grid.
      inside: pixels that count: changes between two of them; None for all.

    Returns:
      (b,) float32.
    """
    pairs = (None, None) if inside is None else neighbours(inside)
    changes = (
        jnp.mean(jnp.abs(jnp.diff(maps, axis=a)), axis=(1, 2), where=_of_each(pair))
        for a, pair in zip((1, 2), pairs, strict=True)
    )
    height, width = (
        jnp.float32(pixels / cells) for pixels, cells in zip(maps.shape[1:], grid, strict=True)
    )
    vertical, horizontal = changes
    return vertical * height + horizontal * width


def neighbours(
    inside: Bool[np.ndarray, "h w"],
) -> tuple[Bool[np.ndarray, "_i w"], Bool[np.ndarray, "h _j"]]:
    """Return which vertical and which horizontal pairs of neighbours are inside."""
    return inside[1:] & inside[:-1], inside[:, 1:] & inside[:, :-1]


def _of_each(inside: Bool[np.ndarray, "_h _w"] | None) -> Bool[np.ndarray, "1 _h _w"] | None:
    return None if inside is None else inside[None]
