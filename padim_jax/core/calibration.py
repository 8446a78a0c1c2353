"""Thresholds from normal images alone, and scores that say how rare they are.

Normal images that the model was not fitted to (or each training image, scored by the model
without it) show the distribution of normal scores. No defect is needed.

Image threshold: the k-th smallest of n normal scores, k = ceil((n + 1)(1 - rate)). A new normal
image from the same distribution exceeds it with a probability of at most `rate`, whatever the
scores' distribution (split conformal prediction: Vovk et al., Algorithmic Learning in a Random
World, 2005). With n images the lowest rate that can be promised is 1 / (n + 1), by their
highest score; without an explicit rate no lower one is used. For an explicit rate below it the
threshold comes from the tail, described next. For training images, each left out, the promise
is not a theorem, because the model that scores new images has one image more. Measured on MVTec
AD's bottle, 139 images fitted and 70 others scored, 20 draws: 6.1 % for 5, 9.4 % for 10.

Pixel threshold: the same order statistic of the normal maps' highest pixels, so that at most
`rate` of normal images have any pixel above it: outlines keep the same promise as verdicts.
With an explicit `pixel_rate` it is the value that this fraction of all normal pixels exceeds.

Verdicts by regions: the pixel threshold is the order statistic of the maps' peaks
(`regions.peak`), the highest thresholds at which they have a region that counts, and so at most
`rate` of normal images have a region. Verdicts by score or region (`either`): each threshold
promises half of the rate, and both together all of it, however they depend on each other.

Calibrated score: the estimated fraction of normal images that score lower. Up to the highest
tenth of the normal scores it comes from their ranks, k / (n + 1). Above, the excesses over
that point are modelled as exponential, as those of maxima are in the limit (Pickands 1975;
Gumbel's case). With m of them, of mean b, a further one exceeds t with the probability
(1 + t / (m b))^-m if b itself is only known from those m: exactly, for any m. It tends to
exp(-t / b) for large m, and claims less the fewer images there are. (Same draws: above 0.95,
0.99 and 0.995 lie 5.8, 1.1 and 0.57 %; with exp(-t / b) 6.1, 1.4 and 0.79, with a generalised
Pareto distribution, whose shape cannot be estimated from so few excesses, 5.9, 1.4 and 0.86.)

The chi-squared distribution, which squared distances of Gaussian embeddings would have, is not
used: of bottle's patches, left out, 0.6 % exceed its median and 0.24 % its 0.999 quantile.
Regularization shortens most distances, and the embeddings' tails are heavier.

All this assumes independent images. If they come in groups, such as frames of one part, each
group counts as one image whose score is its highest.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from padim_jax.core import combined_score, verdicts

# Origins of the normal images, and their descriptions.
ORIGINS = {
    "leave_one_out": "training images, each scored by the model without it",
    "leave_some_out": "some of the training images, each scored by the model without it",
    "held_out": "not fitted",
    "given": "given for it",
}
# A mean excess and the rank of its starting point need at least two scores, and a covariance
# without one image needs two others.
MIN_IMAGES = 3
# Fraction of normal images that may be called anomalous by default, if there are enough images
# to promise it.
AUTOMATIC_RATE = 0.01
RATES = (0.01, 0.02, 0.05, 0.1)  # to choose from

# Fraction of the scores that the tail is estimated from, and their least number: ten give the
# mean excess to within a third.
_TAIL = 0.1
_TAIL_IMAGES = 10
# Most quantiles kept, however many images there are.
_POINTS = 256
_SCORES = 512  # most scores kept
# Keeps a threshold for a rate of, say, 1e-300 finite.
_FARTHEST = 1e30


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Distribution of normal scores. Scores of at least a threshold are anomalous.

    A new field needs a default that is true of thresholds stored without it.

    Attributes:
      origin: origin of the normal images, one of `ORIGINS`.
      images: number of images.
      groups: number of groups of images, each of which counts as one image; None if each image
        is independent.
      warning: reason to expect more false alarms than promised, "" if none is known.
      image_rate: fraction of normal images that may be called anomalous: as requested, or the
        lowest that this number of images promises, but at least `AUTOMATIC_RATE`.
      image_promised_rate: rate that this number of images or groups promises; above
        `image_rate` if they are too few for it.
      image_threshold: image threshold in standard deviations, as the scores.
      pixel_rate: fraction of normal pixels that may be called anomalous. Estimated, not
        promised: pixels of an image are dependent. 0 if the pixel threshold is by images
        instead: `image_rate` of them may have any pixel called anomalous.
      pixel_threshold: pixel threshold in standard deviations, as the maps.
      typical_pixel: central value of normal maps, for the colours of heat maps: the median over
        images of each map's median, of every fourth row and column. Close to the median of all
        pixels, but not equal to it.
      quantiles: normal scores, strictly ascending.
      levels: fraction of normal images that scores lower than each quantile.
      tail_images: number of images that scored higher than the last quantile.
      tail_excess: their mean excess over it.
      rates: those of `RATES` that this number of images promises.
      rate_thresholds: image threshold for each of them; descending.
      scores: normal scores, ascending; for many images a few hundred evenly spaced in rank.
        Empty for thresholds stored by older versions.
      summary_means: mean of each summary of the normal images, which `combined` scores are
        measured by (see `image_score`); empty for other scores.
      summary_deviations: standard deviation of each summary.
      decide: what `image_rate` is promised of: "score", "regions" (the pixel threshold is then
        by them) or "either" (both thresholds then promise half of it).
      min_area: smallest area of a region, in pixels of the original; 0 for `decide` "score".
      close: longest gap within a region, likewise.
    """

    origin: str
    images: int
    image_rate: float
    image_promised_rate: float
    image_threshold: float
    pixel_rate: float
    pixel_threshold: float
    typical_pixel: float
    quantiles: tuple[float, ...]
    levels: tuple[float, ...]
    tail_images: int
    tail_excess: float
    groups: int | None = None
    warning: str = ""
    rates: tuple[float, ...] = ()
    rate_thresholds: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    summary_means: tuple[float, ...] = ()
    summary_deviations: tuple[float, ...] = ()
    decide: str = "score"
    min_area: float = 0.0
    close: float = 0.0

    @property
    def independent(self) -> int:
        """Return the number of independent images, or of groups of them."""
        return self.images if self.groups is None else self.groups

    def calibrated(self, scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return the estimated fraction of normal images that score lower.

        Above about 1 - 1 / `independent` it depends on the form of the tail.

        Args:
          scores: image scores (n,).

        Returns:
          (n,) float64 in [0, 1), non-decreasing in the score.
        """
        scores = scores.astype(np.float64)
        body = np.interp(scores, self.quantiles, self.levels, left=0.0)
        excess = np.maximum(scores - self.quantiles[-1], 0)
        beyond = 1 - self.levels[-1]
        if self.tail_excess > 0:
            scale = self.tail_images * self.tail_excess
            with np.errstate(over="ignore"):  # far beyond a tail of zero width nothing is left
                beyond = beyond * np.exp(-self.tail_images * np.log1p(excess / scale))
        else:  # the highest scores are equal: only known that none was higher
            beyond = 1 / (self.independent + 1)
        found = np.where(excess > 0, 1 - beyond, body)
        return np.minimum(found, np.nextafter(1.0, 0.0))


def calibrate(
    parts: Iterable[Sequence[np.ndarray]],
    images: int,
    origin: str,
    image_rate: float,
    pixel_rate: float,
    groups: Int[np.ndarray, " n"] | None = None,
    decide: str = "score",
) -> Calibration:
    """Return thresholds and the distribution of normal scores.

    Args:
      parts: anomaly maps (n, h, w) and summaries (n, k) of normal images, batch by batch; see
        `image_score.summaries`. Only the highest `pixel_rate` of all pixels is kept. With
        `decide` also the maps' peaks (n,), see `regions.peak`; else these are their maxima.
      images: total number of images.
      origin: see `Calibration`.
      image_rate: fraction of normal images that may be called anomalous, below 1; 0 for
        `automatic_rate`.
      pixel_rate: the same for normal pixels; 0 for a pixel threshold by images.
      groups: group number of each image, in the order of `parts`. A group is represented by its
        highest score. None if each image is independent.
      decide: see `Calibration`; not "score" only where `pixel_rate` is 0.

    Returns:
      The calibration, which does not know yet which regions count.

    Raises:
      ValueError: there are fewer than `MIN_IMAGES` images or groups, their number is not
        `images`, or a score is not finite.
    """
    independent = images if groups is None else len(np.unique(groups))
    if independent < MIN_IMAGES:
        what = f"{images} normal images"
        if groups is not None:
            what += f" in {independent} groups that are independent"
        raise ValueError(f"{what}; thresholds need at least {MIN_IMAGES}")
    summaries, maxima, medians = [], [], []
    highest = np.zeros(0, np.float32)
    for maps, part, *peaks in parts:
        summaries.append(part)
        maxima.append(*peaks or [maps.max(axis=(1, 2))])
        # Maps are smooth: a sixteenth of the pixels suffices for their median.
        medians.append(np.median(maps[:, ::4, ::4], axis=(1, 2)))
        if pixel_rate:
            pixels = images * math.prod(maps.shape[1:])
            highest = _largest(highest, maps.ravel(), pixels - _rank(pixels, pixel_rate) + 1)
    count = sum(map(len, summaries))
    if count != images:
        raise ValueError(f"{count} normal images; {images} were to come")
    every = np.concatenate(summaries)
    if not np.all(np.isfinite(every)):
        raise ValueError("a score of a normal image is not finite")
    scores = combined_score.of_normal(every, groups)
    means = deviations = np.zeros(0)
    if every.shape[1] > 1:
        means, deviations = combined_score.moments(every)
    found, peaks = (
        np.sort(values if groups is None else _highest(values, groups))
        for values in (scores, np.concatenate(maxima))
    )
    tests = 2 if decide == "either" else 1  # each of which has its part of the rate
    image_rate = image_rate or automatic_rate(independent, tests)
    rate = image_rate / tests
    tail = _tail(found)
    promised = tuple(rate for rate in RATES if is_promised(rate, independent))
    some = found
    if independent > _SCORES:
        some = found[np.linspace(0, independent - 1, _SCORES).round().astype(int)]
    return Calibration(
        origin=origin,
        images=images,
        image_rate=image_rate,
        image_promised_rate=tests * _promised(rate, independent),
        image_threshold=_threshold(found, rate, tail),
        pixel_rate=pixel_rate,
        pixel_threshold=_above(float(highest.min()))
        if pixel_rate
        else _threshold(peaks, rate, _tail(peaks)),
        typical_pixel=float(np.median(np.concatenate(medians))),
        quantiles=tail.quantiles,
        levels=tail.levels,
        tail_images=tail.images,
        tail_excess=tail.excess,
        groups=None if groups is None else independent,
        rates=promised,
        rate_thresholds=tuple(conformal(found, rate) for rate in promised),
        scores=tuple(some.tolist()),
        summary_means=tuple(means.tolist()),
        summary_deviations=tuple(deviations.tolist()),
        decide=decide,
    )


def decided(
    decide: str, high: Bool[np.ndarray, " n"], has_region: Bool[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Return which images are anomalous.

    Args:
      decide: "score", "regions" or "either".
      high: whether the score reaches the image threshold.
      has_region: whether there is a region from the pixel threshold on.
    """
    return {"score": high, "regions": has_region, "either": high | has_region}[decide]


def automatic_rate(independent: int, tests: int = 1) -> float:
    """Return `AUTOMATIC_RATE`, or the lowest rate so many images promise if that is higher.

    Args:
      independent: number of independent images.
      tests: number of thresholds that share the rate.
    """
    return max(AUTOMATIC_RATE, tests / (independent + 1))


def is_promised(rate: float, independent: int) -> bool:
    """Return whether a number of images promises a rate by one of their scores.

    Args:
      rate: fraction of normal images that may be called anomalous.
      independent: number of independent images.

    Returns:
      True if it does.
    """
    return _wanted(rate, independent) <= independent


def conformal(scores: Float32[np.ndarray, " n"], rate: float) -> float:
    """Return the image threshold that promises a rate; see the module's docstring.

    Args:
      scores: scores of independent normal images, in any order.
      rate: rate that so many images promise.

    Returns:
      The threshold; scores of at least it are anomalous.

    Raises:
      ValueError: so many images do not promise the rate.
    """
    if not is_promised(rate, len(scores)):
        raise ValueError(f"{len(scores)} images do not promise a rate of {rate:g}")
    return _above(float(np.sort(scores)[_wanted(rate, len(scores)) - 1]))


def _wanted(rate: float, independent: int) -> int:
    """Return the rank, from 1, of the score that promises a rate; above n if none does."""
    return math.ceil(_exact((independent + 1) * (1 - rate)))


def _promised(rate: float, independent: int) -> float:
    """Return the rate that is promised if `rate` is requested."""
    wanted = min(_wanted(rate, independent), independent)
    return (independent + 1 - wanted) / (independent + 1)


def _highest(
    scores: Float32[np.ndarray, " n"], groups: Int[np.ndarray, " n"]
) -> Float32[np.ndarray, " g"]:
    """Return the highest score of each group."""
    _, numbers = np.unique(groups, return_inverse=True)
    found = np.full(numbers.max() + 1, -np.inf, np.float32)
    np.maximum.at(found, numbers, scores)
    return found


def _largest(
    largest: Float32[np.ndarray, " _k"], values: Float32[np.ndarray, " _n"], count: int
) -> Float32[np.ndarray, " _m"]:
    """Return the `count` largest values of both (all, if there are fewer), in any order."""
    if len(largest) == count:  # avoids copying most values, which are too small
        values = values[values > largest.min()]
    both = np.concatenate([largest, values])
    if len(both) <= count:
        return both
    return np.partition(both, len(both) - count)[len(both) - count :]


@dataclasses.dataclass(frozen=True)
class _Tail:
    """Distribution of scores; names as in `Calibration`."""

    quantiles: tuple[float, ...]
    levels: tuple[float, ...]
    images: int
    excess: float


def _tail(scores: Float32[np.ndarray, " n"]) -> _Tail:
    """Return the distribution of sorted scores."""
    images = len(scores)
    tail = min(images - 1, max(_TAIL_IMAGES, math.ceil(_TAIL * images)))
    # Equal scores get the level of the first of them, so as not to overstate their rarity.
    values, first = np.unique(scores[: images - tail], return_index=True)
    levels = (first + 1) / (images + 1)
    if len(values) > _POINTS:
        chosen = np.linspace(0, len(values) - 1, _POINTS).round().astype(int)
        values, levels = values[chosen], levels[chosen]
    start = float(values[-1])
    excess = float(np.mean(scores[images - tail :].astype(np.float64) - start))
    return _Tail(tuple(values.tolist()), tuple(levels.tolist()), tail, excess)


def _threshold(scores: Float32[np.ndarray, " n"], rate: float, tail: _Tail) -> float:
    """Return the threshold of sorted scores: promised by one of them, or else the tail's."""
    if is_promised(rate, len(scores)):
        return conformal(scores, rate)
    # Quantile of the calibrated score, in closed form.
    ratio = (1 - tail.levels[-1]) / rate
    beyond = tail.quantiles[-1] + tail.images * tail.excess * math.expm1(
        math.log(ratio) / tail.images
    )
    return max(_above(float(scores[-1])), _above(min(beyond, _FARTHEST)))


def _rank(count: int, rate: float) -> int:
    """Return the rank, from 1, that a fraction `rate` of further values exceeds."""
    return min(count, math.ceil(_exact((count + 1) * (1 - rate))))


def _exact(product: float) -> float:
    # 100 * (1 - 0.1) is 90.00000000000001 or 89.99..., where 90 is meant.
    return round(product, 6)


def _above(value: float) -> float:
    """Return the next float32, so that `score >= threshold` means above the value."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def shown(calibrated: float) -> str:
    """Format a calibrated score for a table, with as many nines as it has: "0.99986"."""
    beyond = 1 - calibrated
    digits = 4 if beyond >= 1e-3 else 1 - math.floor(math.log10(beyond))
    return f"{calibrated:.{digits}f}"


def text(calibration: Calibration) -> str:
    """Describe for a person the thresholds' origin and promise."""
    known = calibration
    images = f"{known.images} normal images"
    if known.groups is not None:
        images += f" in {known.groups} groups"
    promised = known.image_promised_rate <= known.image_rate
    both = known.decide == "either"
    what = f"region of {known.min_area:g} pixels" if known.min_area else "outline"
    rate = known.image_rate / (1 + both)
    lines = [
        f"thresholds of {images} ({ORIGINS[known.origin]}): image score "
        f"{known.image_threshold:.4g} for {'at most' if promised else 'about'} "
        f"{100 * rate:.3g} % false alarms, pixel {known.pixel_threshold:.4g} for "
        + (
            f"about {100 * known.pixel_rate:.3g} %"
            if known.pixel_rate
            else f"as many images with any {what}"
        )
        + (" (each half of it, as images are called anomalous by either)" * both)
    ]
    if not promised:
        few = "images" if known.groups is None else "groups"
        lines.append(
            f"  so few {few} promise {100 * known.image_promised_rate:.2g} % at best; for "
            "less the threshold rests on the form of their scores' tail"
        )
    if known.scores:
        lines.append(f"  {rates_text(known)}")
    if known.warning:
        lines.append(f"  warning: {known.warning}")
    return "\n".join(lines)


def rates_text(calibration: Calibration) -> str:
    """Describe for a person thresholds for other rates, and rates that are not promised."""
    known = calibration
    found = [
        f"{100 * rate:g} % from {threshold:.4g}"
        for rate, threshold in zip(known.rates, known.rate_thresholds, strict=True)
    ]
    missing = [rate for rate in RATES if rate not in known.rates]
    if missing:
        what = "images" if known.groups is None else "groups"
        rates = ", ".join(f"{100 * rate:g} % takes {fewest(rate)}" for rate in missing)
        found.append(f"not promised by {known.independent} {what}: {rates}")
    return f"false alarms by image threshold: {'; '.join(found)}"


def fewest(rate: float) -> int:
    """Return the smallest number of images that promises a rate."""
    return math.ceil(_exact(1 / rate)) - 1


def outcome(
    calibration: Calibration,
    labels: Bool[np.ndarray, " n"],
    scores: Float32[np.ndarray, " n"],
    maps: Float32[np.ndarray, "n h w"],
    masks: Sequence[Bool[np.ndarray, "h w"] | None],
    called: Bool[np.ndarray, " n"] | None = None,
) -> dict[str, Any]:
    """Evaluate the thresholds on a test set that did not influence them.

    Args:
      calibration: calibration on normal images.
      labels: True for anomalous images.
      scores: image scores.
      maps: anomaly maps.
      masks: defect pixels; None if unknown, such images enter the image rates only.
      called: which images are called anomalous; None for those from the image threshold on.

    Returns:
      A dict ready for JSON: the thresholds' origin, and rates from 0 to 1; None if there is no
      image or pixel of the kind. Counts of images have the intervals of `verdicts.share`.
    """
    if called is None:
        called = scores >= np.float32(calibration.image_threshold)
    decide = {} if calibration.decide == "score" else {"decide": calibration.decide}
    # Pixels and those called anomalous: of defects, of the rest, of normal images.
    counts = np.zeros((3, 2), np.int64)
    outlined = np.zeros(len(labels), bool)
    for i, (label, anomaly_map, mask) in enumerate(zip(labels, maps, masks, strict=True)):
        outlined[i] = anomaly_map.max() >= np.float32(calibration.pixel_threshold)
        if mask is not None:
            high = anomaly_map >= np.float32(calibration.pixel_threshold)
            defect = mask.sum(), (high & mask).sum()
            rest = mask.size - defect[0], high.sum() - defect[1]
            counts += [defect, rest, (0, 0) if label else rest]
    recall, alarms, alarms_good = (
        float(called) / float(pixels) if pixels else None for pixels, called in counts
    )
    return {
        "origin": calibration.origin,
        "images": calibration.images,
        "groups": calibration.groups,
        "warning": calibration.warning,
        "image_rate": calibration.image_rate,
        "image_promised_rate": calibration.image_promised_rate,
        "image_threshold": calibration.image_threshold,
        "image_false_alarm_rate": None if labels.all() else float(np.mean(called[~labels])),
        "image_false_alarms": verdicts.share(called[~labels]),
        "image_recall": float(np.mean(called[labels])) if labels.any() else None,
        "image_found": verdicts.share(called[labels]),
        "pixel_rate": calibration.pixel_rate,
        "pixel_threshold": calibration.pixel_threshold,
        "pixel_false_alarm_rate": alarms,
        "pixel_false_alarm_rate_good": alarms_good,
        "pixel_recall": recall,
        "outlined_normal": verdicts.share(outlined[~labels]),
        "outlined_anomalous": verdicts.share(outlined[labels]),
        "rates": [_at_rate(calibration, rate, labels, scores) for rate in RATES]
        if calibration.scores
        else [],
        **decide,
    }


def _at_rate(
    calibration: Calibration,
    rate: float,
    labels: Bool[np.ndarray, " n"],
    scores: Float32[np.ndarray, " n"],
) -> dict[str, Any]:
    """Evaluate the threshold for a rate; None if so few images do not promise the rate."""
    found: dict[str, Any] = {"rate": rate, "threshold": None, "images_needed": fewest(rate)}
    if rate not in calibration.rates:
        return found
    threshold = calibration.rate_thresholds[calibration.rates.index(rate)]
    called = scores >= np.float32(threshold)
    return found | {
        "threshold": threshold,
        "found": verdicts.share(called[labels]),
        "false_alarms": verdicts.share(called[~labels]),
    }
