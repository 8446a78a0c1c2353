"""Reliability of a threshold's verdicts: intervals, location of defects, and transfer.

Pure functions of scores, maps and masks. `calibration` computes the thresholds; a test set
that did not influence them shows how far they can be trusted.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

# Significance level for calling test images unlike the training images: at most this fraction
# of evaluations with identically distributed images does so by chance.
TRANSFER_LEVEL = 0.01

# Regions are 8-connected, as those of the ground truth in `metrics`.
_NEIGHBOURS = np.ones((3, 3), bool)
_FEWEST = 8  # images of either kind needed to compare their scores


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Comparison of normal test images' scores with those behind the thresholds.

    Attributes:
      images: number of normal test images.
      higher: estimated probability that a normal test image scores higher than a normal image
        of the thresholds (a tie counts one half); 0.5 if both are alike.
      p_value: two-sided p-value of the Mann-Whitney test that both are alike.
    """

    images: int
    higher: float
    p_value: float

    @property
    def unlike(self) -> bool:
        """Return whether the test rejects at `TRANSFER_LEVEL`."""
        return self.p_value < TRANSFER_LEVEL


def interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of a proportion.

    It covers the true proportion with a probability of at least `confidence`, for any `total`
    (Clopper and Pearson, Biometrika 26, 1934): 0 of 12 gives an upper limit of 26 %.

    Args:
      count: number of successes, from 0 to `total`.
      total: number of independent trials; for 0 the interval is (0, 1).
      confidence: coverage, above 0 and below 1.

    Returns:
      Lower and upper limit, from 0 to 1.

    Raises:
      ValueError: `count` is not between 0 and `total`.
    """
    from scipy import stats  # slow to import; only a test set needs it

    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total}: expected a count from 0 to the total")
    tail = (1 - confidence) / 2
    low = stats.beta.ppf(tail, count, total - count + 1) if count else 0.0
    high = stats.beta.ppf(1 - tail, count + 1, total - count) if count < total else 1.0
    return float(low), float(high)


def upper_limits(total: int, confidence: float = 0.95) -> Float[np.ndarray, " n"]:
    """Return the upper limit of `interval` for each count from 0 to `total`.

    The lower limit for a count is 1 minus the upper one for `total` - count.

    Args:
      total: number of independent trials.
      confidence: coverage, above 0 and below 1.

    Returns:
      (total + 1,) float64.
    """
    from scipy import stats

    counts = np.arange(total)
    high = stats.beta.ppf(1 - (1 - confidence) / 2, counts + 1, total - counts)
    return np.append(high, 1.0)


def share(called: Bool[np.ndarray, " n"]) -> dict[str, Any]:
    """Return the share of images called anomalous with its 95 % interval, for JSON.

    Keys: `count`, `total`, and `low` and `high`, from 0 to 1; see `interval`.
    """
    count, total = int(np.count_nonzero(called)), len(called)
    low, high = interval(count, total)
    return {"count": count, "total": total, "low": low, "high": high}


def share_text(found: Mapping[str, Any]) -> str:
    """Format `share` for a person, as in "3 of 20 (3 to 38 %)"."""
    if not found["total"]:
        return "-"
    low, high = (f"{100 * found[key]:.0f}" for key in ("low", "high"))
    return f"{found['count']} of {found['total']} ({low} to {high} %)"


def in_place(
    anomaly_map: Float[np.ndarray, "h w"],
    mask: Bool[np.ndarray, "h w"],
    threshold: float,
    patch: tuple[float, float],
) -> bool:
    """Return whether the strongest region of a map lies at the defect.

    The strongest region is the 8-connected region of pixels at or above `threshold` that
    contains the map's highest pixel, the peak; if the peak is below the threshold, it is the
    peak alone. It lies at the defect if it overlaps the mask or the peak lies within one patch
    of the mask.

    Args:
      anomaly_map: scores of an image's pixels (h, w).
      mask: True for its defect pixels (h, w); at least one.
      threshold: lowest score of an outlined pixel.
      patch: height and width of a patch in pixels.

    Returns:
      True if it does.

    Raises:
      ValueError: the mask is empty.
    """
    from scipy import ndimage

    if not mask.any():
        raise ValueError("the mask has no defect pixel: there is no right place")
    peak = np.unravel_index(np.argmax(anomaly_map), anomaly_map.shape)
    rows, columns = np.nonzero(mask)
    near = (np.abs(rows - peak[0]) <= patch[0]) & (np.abs(columns - peak[1]) <= patch[1])
    if near.any():
        return True
    regions = np.empty(anomaly_map.shape, np.int32)
    ndimage.label(anomaly_map >= threshold, structure=_NEIGHBOURS, output=regions)
    strongest = regions[peak]
    return bool(strongest and np.any(mask & (regions == strongest)))


def transfer(normal: Float[np.ndarray, " n"], test: Float[np.ndarray, " m"]) -> Transfer | None:
    """Compare scores of normal test images with those that the thresholds are based on.

    Mann-Whitney's U by its normal approximation, with the correction for ties (Mann and
    Whitney, Annals of Mathematical Statistics 18, 1947).

    Args:
      normal: scores of the normal images of the thresholds, each left out or held out.
      test: scores of the normal images of a test set.

    Returns:
      The comparison; None if either has fewer than 8 images, too few for the approximation.
    """
    from scipy import stats

    if min(normal.size, test.size) < _FEWEST:
        return None
    result: Any = stats.mannwhitneyu(test, normal, alternative="two-sided", method="asymptotic")
    higher = float(result.statistic) / (test.size * normal.size)
    # Equal scores give no evidence of a difference.
    p_value = float(result.pvalue) if np.isfinite(result.pvalue) else 1.0
    return Transfer(int(test.size), higher, p_value)
