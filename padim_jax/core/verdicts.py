"""What a threshold's verdicts are worth: intervals, where a defect was found, and transfer.

Pure functions of scores, maps and masks. `calibration` finds the thresholds; here a test set
that had no part in them says how far they can be trusted.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

# Images are called unlike the training images at this level: of evaluations whose normal test
# images are drawn as the training images were, at most so many are called unlike by chance.
TRANSFER_LEVEL = 0.01

# Regions are 8-connected, as those of the ground truth in `metrics`.
_NEIGHBOURS = np.ones((3, 3), bool)
_FEWEST = 8  # images of either kind, to compare their scores


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Whether normal test images score as the normal images of the thresholds did.

    Attributes:
      images: number of normal test images.
      higher: estimated probability that a normal test image scores higher than a normal image
        of the thresholds (a tie counts one half); 0.5 where both are alike.
      p_value: two-sided, of the Mann-Whitney test that both are alike.
    """

    images: int
    higher: float
    p_value: float

    @property
    def unlike(self) -> bool:
        """Whether the test rejects at `TRANSFER_LEVEL`."""
        return self.p_value < TRANSFER_LEVEL


def interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of a proportion.

    It covers the true proportion with a probability of at least `confidence`, for any `total`
    (Clopper and Pearson, Biometrika 26, 1934): 0 of 12 leaves up to 26 %.

    Args:
      count: successes, from 0 to `total`.
      total: independent trials; 0 says nothing, and the interval is (0, 1).
      confidence: above 0 and below 1.

    Returns:
      Lower and upper limit, from 0 to 1.

    Raises:
      ValueError: `count` is not within 0 and `total`.
    """
    from scipy import stats  # takes its time, and only a test set needs it

    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total}: expected a count from 0 to the total")
    tail = (1 - confidence) / 2
    low = stats.beta.ppf(tail, count, total - count + 1) if count else 0.0
    high = stats.beta.ppf(1 - tail, count + 1, total - count) if count < total else 1.0
    return float(low), float(high)


def upper_limits(total: int, confidence: float = 0.95) -> Float[np.ndarray, " n"]:
    """Return the upper limit of `interval` for each count from 0 to `total`.

    The lower limit for a count is 1 minus the upper one for `total` - count.
    """
    from scipy import stats

    counts = np.arange(total)
    high = stats.beta.ppf(1 - (1 - confidence) / 2, counts + 1, total - counts)
    return np.append(high, 1.0)


def share(called: Bool[np.ndarray, " n"]) -> dict[str, Any]:
    """Return how many images were called anomalous, of how many, with the interval of 95 %.

    For JSON: `count`, `total`, and `low` and `high`, from 0 to 1; see `interval`.
    """
    count, total = int(np.count_nonzero(called)), len(called)
    low, high = interval(count, total)
    return {"count": count, "total": total, "low": low, "high": high}


def share_text(found: Mapping[str, Any]) -> str:
    """`share` for a person, as in "3 of 20 (3 to 38 %)"."""
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
    """Whether the strongest region of a map lies where the defect is.

    The strongest region is the 8-connected region of pixels at or above `threshold` that holds
    the map's highest pixel, the peak; below the threshold it is the peak alone. It lies in the
    right place if it overlaps the mask, or if the peak lies within one patch of it.

    Args:
      anomaly_map: scores of an image's pixels.
      mask: True for its defect pixels; at least one.
      threshold: from which score on a pixel is outlined.
      patch: height and width of a patch in pixels.

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
    """Compare the scores of normal test images with those that the thresholds rest on.

    Mann-Whitney's U by its normal approximation, with the correction for ties (Mann and
    Whitney, Annals of Mathematical Statistics 18, 1947).

    Args:
      normal: scores of the normal images of the thresholds, each left out or held out.
      test: scores of the normal images of a test set.

    Returns:
      The comparison; None where either has fewer than 8 images, of which the approximation
      does not hold and which could hardly tell.
    """
    from scipy import stats

    if min(normal.size, test.size) < _FEWEST:
        return None
    result: Any = stats.mannwhitneyu(test, normal, alternative="two-sided", method="asymptotic")
    higher = float(result.statistic) / (test.size * normal.size)
    # Where all scores are equal nothing speaks against it.
    p_value = float(result.pvalue) if np.isfinite(result.pvalue) else 1.0
    return Transfer(int(test.size), higher, p_value)
