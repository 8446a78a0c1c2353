r"""Drift: whether images called normal still look like those of the calibration.

The p-value of a new image is the fraction of calibration scores above its own. With n
calibration scores and the last w images, the mean of the p-values is U / (n w), U being the
statistic of Wilcoxon, Mann and Whitney. If all are independent and alike, the logarithm of
E exp(t (U - n w / 2)) is the sum over k = 1..w of g((n + k) t / 2) - g(k t / 2), where g(x) is
ln(sinh(x) / x), since U has the generating function of a Gaussian binomial coefficient (Mann,
Whitney 1947). As a function of x^2, g is concave with slope 1/6 at 0, sinh(x) / x being the
product of all 1 + x^2 / (k pi)^2, so that the sum is at most t^2 v / 2, where v is the variance
of U, n w (n + w + 1) / 12.
Hence, for any n and w,

    P(|U / (n w) - 1/2| >= d) <= 2 exp(-6 d^2 n w / (n + w + 1)).

This includes that the calibration is finite: a mean over ever more images does not tend to 1/2,
but to something 1 / sqrt(12 n) from it.

Images are tested again and again. The bound is summed over the windows that end at each of
10,000 images, so that the rate is one of the whole run, however the windows overlap.

Images called normal are below the image threshold. Given the k-th smallest calibration score as
the largest one below the threshold, the k - 1 smaller ones and the new images below it are
independent and alike, of the distribution cut off there: the test takes these alone, and the
bound holds for them.

Where images score so high that few are called normal, their p-values say nothing. So the number
of images from the cut on, among the last w, is tested as well: by its distribution, which for
normal images follows from counting, and by more than half, since defects are no drift.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Float, Int

from padim_jax.core.calibration import Calibration

WINDOW = 100  # images
RATE, IMAGES = 0.01, 10_000  # of any alarm among so many normal images


@dataclasses.dataclass(frozen=True)
class Reference:
    """Calibration scores to compare with.

    Attributes:
      scores: those below the cut, ascending.
      cut: images that score at least this take no part in the mean.
      band: largest distance of the mean of `WINDOW` p-values from 1/2 that is no drift.
      most: largest number of `WINDOW` images from the cut on that is no drift.
    """

    scores: tuple[float, ...]
    cut: float
    band: float
    most: int


@dataclasses.dataclass(frozen=True)
class State:
    """Summary of the images before.

    Attributes:
      ranks: twice the number of reference scores above each of the last images below the cut,
        equal ones counted once; at most `WINDOW`.
      high: whether each of the last images is from the cut on; at most `WINDOW`.
    """

    ranks: Int[np.ndarray, " _"] = dataclasses.field(
        default_factory=lambda: np.zeros(0, np.int64)
    )
    high: Bool[np.ndarray, " _"] = dataclasses.field(default_factory=lambda: np.zeros(0, bool))


@dataclasses.dataclass(frozen=True)
class Course:
    """Results of the test after each of n images.

    Attributes:
      means: mean p-value of the last `WINDOW` images below the cut; NaN while there are fewer.
      high: how many of the last `WINDOW` images are from the cut on; NaN likewise.
      drifted: whether either is out of its bounds.
    """

    means: Float[np.ndarray, " n"]
    high: Float[np.ndarray, " n"]
    drifted: Bool[np.ndarray, " n"]


def reference(calibration: Calibration | None) -> Reference | None:
    """Return what to compare new images with.

    The calibration may hold only some of its scores, evenly spaced in rank. They differ less
    from the distribution than as many independent ones, for which the bound is.

    Args:
      calibration: calibration of the detector.

    Returns:
      The reference; None without a calibration, with scores of groups of images (which single
      images are not like), and if they are too few for any alarm.
    """
    if calibration is None or calibration.groups is not None:
        return None
    every = np.asarray(calibration.scores, np.float64)
    called_normal = every[every < calibration.image_threshold]
    if not len(called_normal):
        return None
    cut = called_normal[-1]
    below = every[every < cut]
    if not (count := len(below)):
        return None
    tail = math.log(2 * IMAGES / (RATE / 2))
    band = math.sqrt(tail * (count + WINDOW + 1) / (6 * count * WINDOW))
    if band >= 0.5:
        return None
    most = _most(len(every), len(every) - len(called_normal))
    return Reference(tuple(below.tolist()), float(cut), band, most)


def _most(total: int, above: int) -> int:
    """Return how many of `WINDOW` images may exceed the score that `above` of `total` exceed.

    At least m do if, and only if, of the highest m + above of all total + WINDOW scores at most
    `above` are calibration scores.
    """
    rate = RATE / 2 / IMAGES
    for fewest in range(WINDOW // 2 + 1, WINDOW + 1):
        top = fewest + above
        ways = sum(math.comb(total, i) * math.comb(WINDOW, top - i) for i in range(above + 1))
        if ways <= rate * math.comb(total + WINDOW, top):
            return fewest - 1
    return WINDOW


def follow(
    against: Reference, state: State, scores: Float[np.ndarray, " n"]
) -> tuple[State, Course]:
    """Test after each of some images. Any split of them into calls gives the same.

    Args:
      against: see `reference`.
      state: of the images before; `State()` for none.
      scores: image scores, in the order of the images.

    Returns:
      The state after them, and what the test says.
    """
    scores = np.asarray(scores, np.float64)
    is_high, count = scores >= against.cut, len(against.scores)
    sides = [np.searchsorted(against.scores, scores[~is_high], x) for x in ("left", "right")]
    # Integers: sums do not depend on where they begin.
    ranks = np.concatenate([state.ranks, 2 * count - sides[0] - sides[1]])
    high = np.concatenate([state.high, is_high])
    seen = len(state.ranks) + np.cumsum(~is_high)
    means = _of_last(ranks)[seen] / (2 * count * WINDOW)
    many = _of_last(high.astype(np.int64))[len(state.high) + 1 :]
    # Comparisons with NaN are false.
    drifted = (np.abs(means - 0.5) > against.band) | (many > against.most)
    return State(ranks[-WINDOW:], high[-WINDOW:]), Course(means, many, drifted)


def _of_last(values: Int[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    """Return the sums of the last `WINDOW` of the first 0, 1, ... n values; NaN if fewer."""
    sums = np.concatenate([[0], np.cumsum(values)])
    found = np.full(len(sums), np.nan)
    found[WINDOW:] = sums[WINDOW:] - sums[: max(0, len(sums) - WINDOW)]
    return found


def text(against: Reference, mean: float, high: float) -> str:
    """Describe for a person a drift, in one line.

    Args:
      against: see `reference`.
      mean: see `Course.means`.
      high: see `Course.high`.
    """
    if high > against.most:
        return (
            f"drift: {high:.0f} of the last {WINDOW} images score like anomalous ones, more "
            f"than {against.most}: the camera, the light or the parts have changed"
        )
    side = "higher" if mean < 0.5 else "lower"
    return (
        f"drift: the last {WINDOW} images called normal score {side} than those of the "
        f"calibration (mean p-value {mean:.3f}, expected {0.5 - against.band:.3f} to "
        f"{0.5 + against.band:.3f}): the camera, the light or the parts have changed"
    )
