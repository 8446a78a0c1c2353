"""Training images that score far above the others, each scored by the model without it.

One odd training image (a defect, another product) determines the threshold, because it
scores highest when left out. Pure functions of the left-out scores.

Rule: above their highest tenth, scores of normal images are modelled as exponential (see
`calibration`). The gaps between consecutive ones, each times its rank from above, are then
independent and identically distributed (Renyi, Acta Mathematica Hungarica 4, 1953). The mean of
the highest k scaled gaps, the mean excess of the k highest scores, is compared with that of
the m scaled gaps below: their ratio has the F distribution with 2 k and 2 m degrees of freedom.
The least probable k gives the suspects, if its probability is below `LEVEL` divided by the
number of k examined. If the tail is exponential, at most a fraction `LEVEL` of datasets without
odd images has suspects.
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
_LARGEST_SHARE = 0.1  # largest fraction of images that can be suspects
_TAIL, _TAIL_IMAGES = 0.1, 10  # gaps to compare with: fraction of all, and least number
_LEAST_GAPS = 5


@dataclasses.dataclass(frozen=True)
class Suspects:
    """Training images by their left-out scores, the highest first.

    Attributes:
      paths: paths of the images, relative to the dataset.
      scores: score of each image by the model without it (or without its group).
      expected: scores expected at the highest ranks if the tail of the others continued; NaN
        below the tail.
      count: number of suspects, which come first.
      threshold: image threshold of all images.
      without: image threshold without the suspects, equal to `threshold` if there are none;
        None if too few images remain.
      images: the first `SHOWN` images, as the model sees them.
      maps: their left-out anomaly maps.
      aspects: width over height of each image file.
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
    """Return the number of scores that are too high; see the module's docstring.

    Args:
      scores: scores of independent images, in any order.
    """
    from scipy import stats  # slow to import

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
    """Return the scores expected at each rank, from the highest on, without the odd ones.

    Args:
      scores: scores of independent images, descending.
      odd: number of leading scores to leave out of the tail's fit.

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
      paths: paths of the images.
      scores: score of each image by the model without its group.
      groups: group number of each image; a group counts as its highest score.
      rate: fraction of normal images that may be called anomalous; 0 for automatic.
      threshold: image threshold of all images.

    Returns:
      The images, the highest score first, without pixels.
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
    """Return the suspects and the image thresholds with and without them, for JSON."""
    return {
        "images": [
            {"path": path, "score": float(score)}
            for path, score in zip(found.paths[: found.count], found.scores, strict=False)
        ],
        "threshold": found.threshold,
        "threshold_without": found.without,
    }


def text(found: Suspects) -> str:
    """Describe for a person, on one or two lines, the suspects and what to do about them."""
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
    """Return the suspects as a value of config.dataset.exclude, quoted for a shell."""
    return shlex.quote(str(tuple(found.paths[: found.count])))
