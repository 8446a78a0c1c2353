"""Training images that score far beyond the others, each scored by the model without it.

One odd image among the training images, a defect or another product, sets the threshold: it
scores highest when it is left out. Pure functions of the left-out scores.

Rule: above their highest tenth, scores of normal images are taken for exponential (see
`calibration`). The gaps between consecutive ones, each times its rank from above, are then
independent and equally distributed (Renyi, Acta Mathematica Hungarica 4, 1953). The mean of the
highest k scaled gaps, the mean excess of the k highest scores, is compared with that of
the m scaled gaps below: their ratio has the F distribution with 2 k and 2 m degrees of freedom.
The k whose ratio is the least probable has the suspects above it, if that is below `LEVEL`
shared out among all k that are looked at. Of data without any odd image at most the part
`LEVEL` has suspects, if the tail is exponential.
"""

import dataclasses
import math
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from padim_jax.core import calibration

LEVEL = 0.01
SHOWN = 10  # images of the highest scores that are shown
_LARGEST_SHARE = 0.1  # of the images, as suspects
_TAIL, _TAIL_IMAGES = 0.1, 10  # gaps to compare with, as a part of all, and at least
_LEAST_GAPS = 5


@dataclasses.dataclass(frozen=True)
class Suspects:
    """Training images by their left-out scores, the highest first.

    Attributes:
      paths: of the images, relative to the dataset.
      scores: of each, by the model without it (or without its group).
      expected: of the highest scores, what their ranks would have if the tail of the others
        went on; NaN below the tail.
      count: so many of the first are suspects.
      threshold: the image threshold of all images.
      without: that of all but the suspects, left as it is where there are none; None where
        too few images remain.
      images: the first `SHOWN`, as the model sees them.
      maps: their left-out anomaly maps.
      aspects: of each, width over height in the proportions of its file.
    """

    paths: Sequence[str]
    scores: Float32[np.ndarray, " n"]
    expected: Float[np.ndarray, " n"]
    count: int
    threshold: float
    without: float | None
    images: Sequence[UInt8[np.ndarray, "h w 3"]] = ()
    maps: Sequence[Float32[np.ndarray, "h w"]] = ()
    aspects: Sequence[float] = ()


def count_odd(scores: Float32[np.ndarray, " n"]) -> int:
    """Return how many of the highest scores are too high; see the module's text.

    Args:
      scores: of independent images, in any order.
    """
    from scipy import stats  # takes its time

    falling = np.sort(scores.astype(np.float64))[::-1]
    n = len(falling)
    gaps = (falling[:-1] - falling[1:]) * np.arange(1, n)
    largest = max(1, int(_LARGEST_SHARE * n))
    odd, least = 0, math.log(LEVEL / largest)
    for k in range(1, min(largest, n - 1) + 1):
        below = gaps[k : k + _tail_size(n)]
        if len(below) < _LEAST_GAPS or not (mean := below.mean()) > 0:
            continue
        log_p = float(stats.f.logsf(gaps[:k].mean() / mean, 2 * k, 2 * len(below)))
        if log_p < least:
            odd, least = k, log_p
    return odd


def expected(scores: Float32[np.ndarray, " n"], odd: int) -> Float[np.ndarray, " n"]:
    """Return the scores that ranks from the highest on would have, without the odd ones.

    Args:
      scores: of independent images, falling.
      odd: so many of the first are left out of the tail that is fitted.

    Returns:
      By rank, start + mean excess * (1 / rank + ... + 1 / m) for the first m; NaN below.
    """
    found = np.full(len(scores), np.nan)
    below = scores[odd:].astype(np.float64)
    m = min(_tail_size(len(scores)), len(below) - 1)
    if m < 1:
        return found
    excess = np.mean(below[:m] - below[m])
    found[:m] = below[m] + excess * np.cumsum(1 / np.arange(m, 0, -1))[::-1]
    return found


def _tail_size(images: int) -> int:
    return max(_TAIL_IMAGES, math.ceil(_TAIL * images))


def rank(
    paths: Sequence[str],
    scores: Float32[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    rate: float,
    threshold: float,
) -> Suspects:
    """Rank training images by their left-out scores.

    Args:
      paths: of the images.
      scores: of each, by the model without its group.
      groups: the number of each image's group; each counts as its highest score.
      rate: the share of normal images that may be called anomalous; 0 for automatic.
      threshold: the one that was found of all images.
    """
    _, numbers = np.unique(groups, return_inverse=True)
    independent = np.full(numbers.max() + 1, -np.inf, np.float32)
    np.maximum.at(independent, numbers, scores)
    independent = np.sort(independent)[::-1]
    odd, order = count_odd(independent), np.argsort(-scores, kind="stable")
    without = threshold
    if odd:
        rest = independent[odd:]
        rate = rate or calibration.automatic_rate(len(rest))
        promised = calibration.is_promised(rate, len(rest))
        without = calibration.conformal(rest, rate) if promised else None
    likely = np.full(len(scores), np.nan)
    likely[: len(independent)] = expected(independent, odd)
    return Suspects(
        paths=[paths[int(i)] for i in order],
        scores=scores[order],
        expected=likely,
        count=int(np.count_nonzero(scores >= independent[odd - 1])) if odd else 0,
        threshold=threshold,
        without=without,
    )


def to_dict(found: Suspects) -> dict[str, Any]:
    """The suspects, and the image thresholds with and without them, for JSON."""
    return {
        "images": [
            {"path": path, "score": float(score)}
            for path, score in zip(found.paths[: found.count], found.scores, strict=False)
        ],
        "threshold": found.threshold,
        "threshold_without": found.without,
    }


def text(found: Suspects) -> str:
    """What was found, and what to do about it, on one or two lines for a person."""
    total = len(found.paths)
    if not found.count:
        return (
            f"suspects: none of {total} training images scores beyond the others, left out "
            f"(the highest: {found.paths[0]}, {found.scores[0]:.4g})"
        )
    named = [
        f"{path} {score:.4g}" for path, score in zip(found.paths, found.scores, strict=True)
    ][: min(found.count, 3)]
    more = ", ..." * (found.count > len(named))
    without = "" if found.without is None else f", without them {found.without:.4g}"
    lines = [
        f"suspects: {found.count} of {total} training images score far beyond the others, "
        f"left out ({', '.join(named)}{more}); image threshold {found.threshold:.4g}{without}"
    ]
    what = f"--config.dataset.exclude={command(found)}"
    lines.append(f"  look at them; if they are no normal images, fit without them: {what}")
    return "\n".join(lines)


def command(found: Suspects) -> str:
    """The suspects as a value of config.dataset.exclude, for a shell."""
    return shlex.quote(str(tuple(found.paths[: found.count])))
