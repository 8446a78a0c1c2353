"""Statistics of normal images on the devices, in two forms: `Moments` and `Samples`."""

import operator
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from padim_jax.core import gaussian, low_rank
from padim_jax.core.types import Gaussian, LowRank, Moments, Samples
from padim_jax.detector.geometry import Shape
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices

# Fraction of the regularization that must survive rounding. In directions without variance
# squared distances are wrong by the lost fraction.
LEAST_KEPT = 0.95


# Largest estimated errors of moments that images are removed from, see `gaussian.remove`: of
# covariances relative to the largest, and of each variance. Measured on 600 drawn sets, of what
# is allowed: moments are wrong by at most 6e-6, distances by 5e-5.
MOST_LOST, MOST_LOST_EACH = 1e-5, 1e-4


class CancellationError(ValueError):
    """Moments of which rounding leaves too little when images are removed."""


class RegionError(ValueError):
    """Statistics of a region that give no Gaussians.

    Attributes:
      region: index of the first such region.
      finite: whether its statistics are finite.
    """

    def __init__(self, message: str, region: int, finite: bool):
        super().__init__(message)
        self.region, self.finite = region, finite


def init(
    shapes: Sequence[Shape], images: int, form: str, devices: Devices
) -> Moments | Samples:
    """Return the statistics of zero images, in the form that suits the number of images.

    Both forms are exact. Fitted, `Samples` take s values per channel and s^2 per patch for s
    images, `Moments` each level's channels times its own and the coarser levels'. Times to fit
    and to score grow with these sizes.

    Args:
      shapes: `Pyramid.shapes`.
      images: number of images to fit.
      form: "moments", "samples", or "auto" for the smaller.
      devices: devices that take part.

    Returns:
      Statistics on this process's devices.
    """
    form = choose_form(shapes, images, form)
    room = images if form == "samples" else None
    own = tuple((devices.padded(r) // devices.total, n, d) for r, n, d in shapes)
    return _init(np.zeros(devices.local, np.int32), own, room)


def choose_form(shapes: Sequence[Shape], images: int, form: str = "auto") -> str:
    """Return the form that `init` uses: "moments" or "samples".

    Args:
      shapes: `Pyramid.shapes`.
      images: number of images to fit.
      form: "moments", "samples", or "auto" for the smaller.

    Returns:
      "moments" or "samples".
    """
    if form != "auto":
        return form
    return min(("moments", "samples"), key=lambda form: fitted_size(shapes, images, form))


def fitted_size(shapes: Sequence[Shape], images: int, form: str) -> int:
    """Return the size of a fitted model, means excluded; see `init`.

    Args:
      shapes: `Pyramid.shapes`.
      images: number of fitted images.
      form: "moments" or "samples".

    Returns:
      Number of float32 values.
    """
    cells = [regions * cells for regions, cells, _ in shapes]
    channels = [channels for _, _, channels in shapes]
    if form == "samples":
        return images * sum(map(operator.mul, cells, channels)) + images**2 * cells[0]
    rows = map(operator.mul, cells, channels)
    return sum(n * sum(channels[i:]) for i, n in enumerate(rows))


def extend(
    statistics: Moments | Samples, shapes: Sequence[Shape], images: int, form: str
) -> Moments | Samples:
    """Return the statistics with capacity for more images; consumes its argument.

    Args:
      statistics: statistics of all images fitted so far.
      shapes: `Pyramid.shapes`.
      images: total number of images, including those already fitted.
      form: as in `init`. `Samples` become `Moments` if these are requested or smaller;
        `Moments` stay as they are, since they no longer contain single images.

    Returns:
      Statistics of the same images.
    """
    if isinstance(statistics, Moments):
        return statistics
    if choose_form(shapes, images, form) == "moments":
        return _summarise(statistics)
    return _resize(statistics, images)


def merge(
    a: Moments | Samples, b: Moments | Samples, shapes: Sequence[Shape], form: str
) -> Moments | Samples:
    """Return the statistics of two disjoint sets of images together; consumes both.

    Args:
      a: statistics of the set whose images come first in the result.
      b: statistics of the other set.
      shapes: `Pyramid.shapes`.
      form: form of the result, if both are `Samples`; see `extend`.

    Returns:
      Statistics of both.
    """
    if isinstance(a, Samples) and isinstance(b, Samples):
        images = int(a.count[0] + b.count[0])
        if choose_form(shapes, images, form) == "samples":
            return _merge_samples(a, b)
    first, second = (_summarise(x) if isinstance(x, Samples) else x for x in (a, b))
    return _merge_moments(first, second)


def take(samples: Samples, rows: Sequence[int], devices: Devices) -> Samples:
    """Return the samples of some of the images; see `low_rank.take`.

    Args:
      samples: samples filled to capacity.
      rows: numbers of the images.
      devices: devices that take part.
    """
    return _take(samples, parallel.replicate(np.array(rows, np.int32), devices))


def remove(moments: Moments, part: Moments, regularization: float) -> Moments:
    """Return the moments without a part of the images; consumes the first argument.

    Args:
      moments: moments of all images.
      part: moments of some of them; at least two images are left.
      regularization: epsilon, above 0.

    Returns:
      Moments of the images that are left.

    Raises:
      CancellationError: rounding errors could exceed `MOST_LOST` or `MOST_LOST_EACH`; or they
        are not finite.
    """
    epsilon = np.full(len(moments.count), regularization, np.float32)
    left, *errors = _remove(moments, part, epsilon)
    overall, each = (float(np.max(np.asarray(x)[0])) for x in errors)
    if not (overall <= MOST_LOST and each <= MOST_LOST_EACH):
        raise CancellationError(
            "float32 keeps too little of the moments, of which these images make up too much: "
            f"estimated rounding errors of {overall:.1g} of the moments and {each:.1g} of a "
            f"variance; at most {MOST_LOST:g} and {MOST_LOST_EACH:g} are allowed"
        )
    return left


def finalize(
    statistics: Moments | Samples, regularization: float, left_out: int = 0
) -> Gaussian | LowRank:
    """Return the fitted Gaussians; consumes the statistics.

    Args:
      statistics: statistics of at least two images more than `left_out`.
      regularization: epsilon, above 0.
      left_out: number of images that `detector.measure_pixels` leaves out at a time. Epsilon is
        then lowered to the value that `scoring.leave_out` expects.

    Returns:
      Gaussians in the form of the statistics.

    Raises:
      ValueError: there are too few images.
      RegionError: statistics are not finite, or float32 loses the regularization in a
        covariance.
    """
    count = int(np.asarray(statistics.count)[0])
    if count - left_out < 2:
        without = f" without {left_out} of them" * bool(left_out)
        raise ValueError(f"a covariance needs at least 2 images, there are {count}{without}")
    if isinstance(statistics, Samples) and count != (room := statistics.values[0].shape[-2]):
        raise ValueError(f"room for {room} images, of which {count} are there")
    epsilon = regularization * (count - left_out - 1) / (count - 1)
    regularizations = np.full(len(statistics.count), epsilon, np.float32)
    fitted, finite, kept, _ = _finalize(statistics, regularizations)
    finite, kept = np.asarray(finite)[0], np.asarray(kept)[0]
    if not np.all(finite):
        region = int(np.argmin(finite))
        message = (
            f"the embeddings of region {region} are not finite: the backbone's features "
            "overflow or its weights are broken"
        )
        raise RegionError(message, region, finite=False)
    if np.min(kept) < LEAST_KEPT:
        region, least = int(np.argmin(kept)), float(np.min(kept))
        without = f" without {left_out} of {count} images" * bool(left_out)
        message = (
            f"float32 keeps {least:.0%} of the regularization ({regularization:g}) in region "
            f"{region}{without}; expected at least {LEAST_KEPT:.0%}, or distances were wrong: "
            f"raise the regularization to {_enough(regularization, least):.1g}"
        )
        raise RegionError(message, region, finite=True)
    return fitted


def _enough(regularization: float, kept: float) -> float:
    """Return a regularization of which about the same rounding leaves enough."""
    if kept <= 0:  # how much is missing is unknown
        return 100 * regularization
    return regularization * 2 * (1 - kept) / (1 - LEAST_KEPT)


def _init_regions(
    zero: Int32[Array, ""], shapes: tuple[Shape, ...], images: int | None
) -> Moments | Samples:
    del zero  # mapped over only for the number of devices
    return gaussian.init(shapes) if images is None else low_rank.init(shapes, images)


def _moments(samples: Samples) -> Moments:
    shapes = [(r, n, d) for r, n, _, d in (x.shape for x in samples.values)]
    return gaussian.update(gaussian.init(shapes), *low_rank.levels(samples))


def _remove_regions(
    moments: Moments, part: Moments, regularization: Float32[Array, ""]
) -> tuple[Moments, Float32[Array, " r"], Float32[Array, " r"]]:
    left, *errors = gaussian.remove(moments, part, regularization)
    overall, each = map(parallel.of_all_regions, errors)
    return left, overall, each


def _finalize_regions(
    statistics: Moments | Samples, regularization: Float32[Array, ""]
) -> tuple[Gaussian | LowRank, Bool[Array, " r"], Float32[Array, " r"], Int32[Array, ""]]:
    if isinstance(statistics, Moments):
        fitted, *flags = gaussian.finalize(statistics, regularization)
    else:
        fitted, *flags = low_rank.finalize(statistics, regularization)
    finite, kept = (parallel.of_all_regions(x) for x in flags)
    return fitted, finite, kept, statistics.count  # its buffer was donated as well


_init = parallel.mapped(_init_regions, static=(1, 2))
_resize = parallel.mapped(low_rank.resize, static=(1,))
_summarise = parallel.mapped(_moments)
_merge_samples = parallel.mapped(low_rank.merge)
_take = parallel.mapped(low_rank.take, replicated=(1,))
_remove = parallel.mapped(_remove_regions, donated=(0,))
_merge_moments = parallel.mapped(gaussian.merge, donated=(0,))
_finalize = parallel.mapped(_finalize_regions, donated=(0,))
