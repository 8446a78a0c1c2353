"""Thresholds from normal images alone, and scores that say how rare they are.

Normal images that the model has not been fitted to (or each training image as the model
without it scores it) tell what normal scores are like. No defect is needed.

Image threshold: the k-th smallest of n normal scores, k = ceil((n + 1)(1 - rate)). If a new
normal image is drawn as these were, it exceeds that with a probability of at most `rate`,
whatever the scores' distribution (split conformal prediction: Vovk et al., Algorithmic
Learning in a Random World, 2005). n images can promise no less than 1 / (n + 1), by their
highest score, and without an explicit rate no less is asked of them. For an explicit rate below
that the threshold is the tail's, described next. Of training images, each left out, the
promise is not a theorem, since the model that scores new images has one more. Measured on
MVTec AD's bottle, 139 images fitted and 70 others scored, 20 draws: 6.1 % for 5, 9.4 % for 10.

Pixel threshold: the same order statistic of the normal maps' highest pixels, so that at most
`rate` of normal images have any pixel above it: an outline promises what a verdict does. For an
explicit `pixel_rate` it is the one that this part of all normal pixels is above.

Calibrated score: the estimated share of normal images that score lower. Up to the highest
tenth of the normal scores it is read off their ranks, k / (n + 1). Above, the excesses over
that point are taken for exponential, as those of maxima are in the limit (Pickands 1975;
Gumbel's case). With m of them, of mean b, a further one exceeds t with the probability
(1 + t / (m b))^-m if b itself is only known from those m: exactly, for any m. It goes to
exp(-t / b) for large m, and claims less the fewer images there are. (Same draws: above 0.95,
0.99 and 0.995 lie 5.8, 1.1 and 0.57 %; with exp(-t / b) 6.1, 1.4 and 0.79, with a generalised
Pareto distribution, whose shape so few excesses do not settle, 5.9, 1.4 and 0.86.)

The chi-squared distribution, which squared distances of Gaussian embeddings would have, is not
used: of bottle's patches, left out, 0.6 % exceed its median and 0.24 % its 0.999 quantile.
Regularization shortens most distances, and the embeddings' tails are heavier.

All this rests on images that are independent. Where they come in groups, as frames of one part
do, each group counts as one image whose score is its highest.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

import padim_jax
from padim_jax.core import verdicts

# Where the normal images come from, and how to say it.
ORIGINS = {
    "leave_one_out": "training images, each scored by the model without it",
    "leave_some_out": "some of the training images, each scored by the model without it",
    "held_out": "not fitted",
    "given": "given for it",
}
# A mean excess, and the rank of its starting point, need two scores at the least; and a
# covariance without one image needs two others.
MIN_IMAGES = 3
# The part of normal images that may be called anomalous where nothing else is asked for, and
# enough images promise it.
AUTOMATIC_RATE = 0.01
RATES = (0.01, 0.02, 0.05, 0.1)  # to choose from

# The part of the scores that the tail is estimated from, and how many there are to be of
# them where there are few: with ten the mean excess is known to a third.
_TAIL = 0.1
_TAIL_IMAGES = 10
# At most so many quantiles are kept, however many images there are.
_POINTS = 256
_SCORES = 512  # and so many scores
# A threshold for one in 10^300, say, is still a number.
_FARTHEST = 1e30
_FORMAT = "padim_jax calibration 2"
_LISTS = ("quantiles", "levels", "rates", "rate_thresholds", "scores")
_ASIDE = {"format", "version", "detector", "sha256"}
_LONGEST_WARNING = 100_000
_LARGEST = float(np.finfo(np.float32).max)  # of what is compared with scores
_MOST_IMAGES = 2**31


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What normal images say of scores. Scores of at least a threshold are anomalous.

    A field that is added has a default that says what is known of thresholds stored without it.

    Attributes:
      origin: of the normal images, one of `ORIGINS`.
      images: how many there were.
      groups: of how many groups they were, each of which counts as one image; None where each
        image is independent.
      warning: why there may be more false alarms than promised, "" where nothing is known.
      image_rate: the share of normal images that may be called anomalous: as asked for, or
        the least that as many images promise, but no less than `AUTOMATIC_RATE`.
      image_promised_rate: that which as many images, or groups, promise; above the former
        where they are too few for it.
      image_threshold: in standard deviations, as the scores.
      pixel_rate: the share of normal pixels that may be called anomalous. Estimated, not
        promised: pixels of an image depend on each other. 0 where the pixel threshold is by
        images instead: `image_rate` of them may have any pixel called anomalous.
      pixel_threshold: in standard deviations, as the maps.
      typical_pixel: a central value of normal maps, for the colours of heat maps: the median
        over images of each map's median, of every fourth row and column. Near the median of
        all pixels, but not equal to it.
      quantiles: normal scores, rising.
      levels: what share of normal images scores lower than these.
      tail_images: how many images scored higher than the last quantile.
      tail_excess: by how much on average.
      rates: of `RATES` those that as many images promise.
      rate_thresholds: the image threshold of each of them; falling.
      scores: normal scores, rising; of many images a few hundred that are evenly spaced in
        rank. None are known of thresholds that older versions stored.
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

    @property
    def independent(self) -> int:
        """How many images, or groups of them, count."""
        return self.images if self.groups is None else self.groups

    def calibrated(self, scores: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The estimated share of normal images that score lower, from 0 to below 1.

        Never falling in the score. Above about 1 - 1 / `independent` it rests on the tail's
        form.
        """
        scores = scores.astype(np.float64)
        body = np.interp(scores, self.quantiles, self.levels, left=0.0)
        excess = np.maximum(scores - self.quantiles[-1], 0)
        beyond = 1 - self.levels[-1]
        if self.tail_excess > 0:
            scale = self.tail_images * self.tail_excess
            with np.errstate(over="ignore"):  # far beyond a tail of no width nothing is left
                beyond = beyond * np.exp(-self.tail_images * np.log1p(excess / scale))
        else:  # the highest scores are equal: nothing is known but that none was higher
            beyond = 1 / (self.independent + 1)
        found = np.where(excess > 0, 1 - beyond, body)
        return np.minimum(found, np.nextafter(1.0, 0.0))


def calibrate(
    parts: Iterable[tuple[Float32[np.ndarray, "_n h w"], Float32[np.ndarray, " _n"]]],
    images: int,
    origin: str,
    image_rate: float,
    pixel_rate: float,
    groups: Int[np.ndarray, " n"] | None = None,
) -> Calibration:
    """Thresholds, and the distribution of normal scores.

    Args:
      parts: anomaly maps and image scores of normal images, batch by batch. Of the maps
        only the highest `pixel_rate` of all pixels is kept.
      images: how many there are in all.
      origin: see `Calibration`.
      image_rate: the share of normal images that may be called anomalous, below 1; 0 for
        `automatic_rate`.
      pixel_rate: the same of normal pixels; 0 for a pixel threshold by images.
      groups: of each image, in the order of `parts`, the number of its group. The highest
        score of a group stands for it. None where each image is independent.

    Raises:
      ValueError: fewer than `MIN_IMAGES` or as many groups, another number than was said, or a
        score that is not finite.
    """
    independent = images if groups is None else len(np.unique(groups))
    if independent < MIN_IMAGES:
        what = f"{images} normal images"
        if groups is not None:
            what += f" in {independent} groups that are independent"
        raise ValueError(f"{what}; thresholds need at least {MIN_IMAGES}")
    scores, maxima, medians = [], [], []
    highest = np.zeros(0, np.float32)
    for maps, part in parts:
        scores.append(part)
        maxima.append(maps.max(axis=(1, 2)))
        # Maps are smooth: a sixteenth of the pixels shows where a map's middle is.
        medians.append(np.median(maps[:, ::4, ::4], axis=(1, 2)))
        if pixel_rate:
            pixels = images * math.prod(maps.shape[1:])
            highest = _largest(highest, maps.ravel(), pixels - _rank(pixels, pixel_rate) + 1)
    found = np.concatenate(scores) if scores else np.zeros(0, np.float32)
    if len(found) != images:
        raise ValueError(f"{len(found)} normal images; {images} were to come")
    if not np.all(np.isfinite(found)):
        raise ValueError("a score of a normal image is not finite")
    found, peaks = (
        np.sort(values if groups is None else _highest(values, groups))
        for values in (found, np.concatenate(maxima))
    )
    image_rate = image_rate or automatic_rate(independent)
    tail = _tail(found)
    promised = tuple(rate for rate in RATES if is_promised(rate, independent))
    some = found
    if independent > _SCORES:
        some = found[np.linspace(0, independent - 1, _SCORES).round().astype(int)]
    return Calibration(
        origin=origin,
        images=images,
        image_rate=image_rate,
        image_promised_rate=_promised(image_rate, independent),
        image_threshold=_threshold(found, image_rate, tail),
        pixel_rate=pixel_rate,
        pixel_threshold=_above(float(highest.min()))
        if pixel_rate
        else _threshold(peaks, image_rate, _tail(peaks)),
        typical_pixel=float(np.median(np.concatenate(medians))),
        quantiles=tail.quantiles,
        levels=tail.levels,
        tail_images=tail.images,
        tail_excess=tail.excess,
        groups=None if groups is None else independent,
        rates=promised,
        rate_thresholds=tuple(conformal(found, rate) for rate in promised),
        scores=tuple(some.tolist()),
    )


def automatic_rate(independent: int) -> float:
    """Return `AUTOMATIC_RATE`, or the least that so many images promise where that is more."""
    return max(AUTOMATIC_RATE, 1 / (independent + 1))


def is_promised(rate: float, independent: int) -> bool:
    """Return whether so many images promise a rate by one of their scores."""
    return _wanted(rate, independent) <= independent


def conformal(scores: Float32[np.ndarray, " n"], rate: float) -> float:
    """Return the image threshold that promises a rate; see the module's text.

    Args:
      scores: of independent normal images, in any order.
      rate: one that so many images promise.

    Raises:
      ValueError: they do not.
    """
    if not is_promised(rate, len(scores)):
        raise ValueError(f"{len(scores)} images do not promise a rate of {rate:g}")
    return _above(float(np.sort(scores)[_wanted(rate, len(scores)) - 1]))


def _wanted(rate: float, independent: int) -> int:
    """The rank, from 1, of the score that promises a rate; above all where none does."""
    return math.ceil(_exact((independent + 1) * (1 - rate)))


def _promised(rate: float, independent: int) -> float:
    """The rate that is promised where this one is asked for."""
    wanted = min(_wanted(rate, independent), independent)
    return (independent + 1 - wanted) / (independent + 1)


def _highest(
    scores: Float32[np.ndarray, " n"], groups: Int[np.ndarray, " n"]
) -> Float32[np.ndarray, " g"]:
    """The highest score of each group."""
    _, numbers = np.unique(groups, return_inverse=True)
    found = np.full(numbers.max() + 1, -np.inf, np.float32)
    np.maximum.at(found, numbers, scores)
    return found


def _largest(
    largest: Float32[np.ndarray, " _k"], values: Float32[np.ndarray, " _n"], count: int
) -> Float32[np.ndarray, " _m"]:
    """Return the `count` largest values of both (all, if there are fewer), in any order."""
    if len(largest) == count:  # most values are below all of them, and are not copied
        values = values[values > largest.min()]
    both = np.concatenate([largest, values])
    if len(both) <= count:
        return both
    return np.partition(both, len(both) - count)[len(both) - count :]


@dataclasses.dataclass(frozen=True)
class _Tail:
    """The distribution of scores; names as of `Calibration`."""

    quantiles: tuple[float, ...]
    levels: tuple[float, ...]
    images: int
    excess: float


def _tail(scores: Float32[np.ndarray, " n"]) -> _Tail:
    """Of scores that are sorted."""
    images = len(scores)
    tail = min(images - 1, max(_TAIL_IMAGES, math.ceil(_TAIL * images)))
    # Equal scores have the level of the first of them: no more than their share is claimed.
    values, first = np.unique(scores[: images - tail], return_index=True)
    levels = (first + 1) / (images + 1)
    if len(values) > _POINTS:
        chosen = np.linspace(0, len(values) - 1, _POINTS).round().astype(int)
        values, levels = values[chosen], levels[chosen]
    start = float(values[-1])
    excess = float(np.mean(scores[images - tail :].astype(np.float64) - start))
    return _Tail(tuple(values.tolist()), tuple(levels.tolist()), tail, excess)


def _threshold(scores: Float32[np.ndarray, " n"], rate: float, tail: _Tail) -> float:
    """Of scores that are sorted: promised by one of them, or where none does the tail's."""
    if is_promised(rate, len(scores)):
        return conformal(scores, rate)
    # The calibrated score's own quantile, in closed form.
    ratio = (1 - tail.levels[-1]) / rate
    beyond = tail.quantiles[-1] + tail.images * tail.excess * math.expm1(
        math.log(ratio) / tail.images
    )
    return max(_above(float(scores[-1])), _above(min(beyond, _FARTHEST)))


def _rank(count: int, rate: float) -> int:
    """Of `count` values the rank, from 1, that the part `rate` of further ones exceeds."""
    return min(count, math.ceil(_exact((count + 1) * (1 - rate))))


def _exact(product: float) -> float:
    # 100 * (1 - 0.1) is 90.00000000000001 or 89.99...: what was meant is 90.
    return round(product, 6)


def _above(value: float) -> float:
    """The next float32: `score >= threshold` then means higher than the value."""
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def shown(calibrated: float) -> str:
    """A calibrated score for a table, with as many nines as it has, as in 0.99986."""
    beyond = 1 - calibrated
    digits = 4 if beyond >= 1e-3 else 1 - math.floor(math.log10(beyond))
    return f"{calibrated:.{digits}f}"


def text(calibration: Calibration) -> str:
    """Where the thresholds come from and what they promise, for a person."""
    known = calibration
    images = f"{known.images} normal images"
    if known.groups is not None:
        images += f" in {known.groups} groups"
    promised = known.image_promised_rate <= known.image_rate
    lines = [
        f"thresholds of {images} ({ORIGINS[known.origin]}): image score "
        f"{known.image_threshold:.4g} for {'at most' if promised else 'about'} "
        f"{100 * known.image_rate:.3g} % false alarms, pixel {known.pixel_threshold:.4g} for "
        + (
            f"about {100 * known.pixel_rate:.3g} %"
            if known.pixel_rate
            else "as many images with any outline"
        )
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
    """Thresholds for other rates, and what so few images do not promise, for a person."""
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
    """Return the least number of images that promise a rate."""
    return math.ceil(_exact(1 / rate)) - 1


def outcome(
    calibration: Calibration,
    labels: Bool[np.ndarray, " n"],
    scores: Float32[np.ndarray, " n"],
    maps: Float32[np.ndarray, "n h w"],
    masks: Sequence[Bool[np.ndarray, "h w"] | None],
) -> dict[str, Any]:
    """What the thresholds do on a test set, which had no part in them.

    Args:
      calibration: of normal images.
      labels: True for anomalous images.
      scores: of the images.
      maps: anomaly maps.
      masks: defect pixels; None where unknown. Such images count by image only.

    Returns:
      JSON-able: where the thresholds come from, and rates from 0 to 1; None where there is
      no image or pixel of the kind. Numbers of images come with `verdicts.share`'s intervals.
    """
    called = scores >= np.float32(calibration.image_threshold)
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
    }


def _at_rate(
    calibration: Calibration,
    rate: float,
    labels: Bool[np.ndarray, " n"],
    scores: Float32[np.ndarray, " n"],
) -> dict[str, Any]:
    """What the threshold for a rate does; without one where so few images do not promise it."""
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


def to_dict(calibration: Calibration, detector: str) -> dict[str, Any]:
    """As JSON; `from_dict` takes it back.

    Args:
      calibration: what to store.
      detector: fingerprint of the one whose scores these are.
    """
    fields = {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(calibration)
        # What older versions do not know, they need not where it says nothing.
        if (value := getattr(calibration, field.name)) != field.default
    }
    about = {"format": _FORMAT, "version": padim_jax.__version__, "detector": detector}
    said = about | fields
    return said | {"sha256": _digest(said)}


def _digest(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def from_dict(stored: Any, *detector: str) -> Calibration | None:
    """Of this detector; None of another one (fitted again since, say).

    Args:
      stored: what `to_dict` returned, in this version or another one.
      detector: the fingerprints that it may have been stored with.

    Raises:
      ValueError: it is not what `to_dict` made, or has a field that this version lacks.
    """
    if not isinstance(stored, Mapping) or stored.get("format") != _FORMAT:
        raise ValueError(f"expected a group with format {_FORMAT!r}")
    known = {field.name: field.default for field in dataclasses.fields(Calibration)}
    if unknown := sorted(map(str, set(stored) - known.keys() - _ASIDE)):
        raise ValueError(
            f"{', '.join(unknown)[:200]}: unknown to padim_jax {padim_jax.__version__}; "
            f"padim_jax {str(stored.get('version'))[:60]} wrote it"
        )
    first = {name for name, default in known.items() if default is dataclasses.MISSING}
    if missing := sorted(first - set(stored)):
        raise ValueError(f"{', '.join(missing)}: missing")
    fields: dict[str, Any] = {name: stored.get(name, known[name]) for name in known}
    _check(fields)
    if not isinstance(stored.get("detector"), str):
        raise ValueError("it does not say of which detector it is")
    said = {name: value for name, value in stored.items() if name != "sha256"}
    if stored.get("sha256") != _digest(said):
        raise ValueError("its contents are not what was saved")
    if stored["detector"] not in detector:
        return None
    fields |= {name: tuple(fields[name]) for name in _LISTS}
    return Calibration(**fields)


def _check(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if not _valid(name, value):
            raise ValueError(f"{name}={repr(value)[:60]}")
    if (fields.get("groups") or 0) > fields["images"]:
        raise ValueError("more groups than images")
    if fields["tail_images"] > (fields.get("groups") or fields["images"]):
        raise ValueError("more images in the tail than there are")
    if len(fields["quantiles"]) != len(fields["levels"]):
        raise ValueError("as many levels as quantiles were expected")
    if len(fields["rates"]) != len(fields["rate_thresholds"]):
        raise ValueError("as many thresholds as rates were expected")


def _valid(name: str, value: Any) -> bool:
    if name == "origin":
        return isinstance(value, str) and value in ORIGINS
    if name == "warning":
        return isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST_WARNING
    if name == "groups" and value is None:
        return True
    if name in ("images", "groups", "tail_images"):
        least = 1 if name == "tail_images" else MIN_IMAGES
        return type(value) is int and least <= value <= _MOST_IMAGES
    if name in _LISTS:
        return _valid_list(name, value)
    if type(value) is not float or not abs(value) <= _LARGEST:
        return False
    if name.endswith("rate"):
        return 0 < value < 1 or (name == "pixel_rate" and value == 0)
    return value >= 0 if name == "tail_excess" else True


def _valid_list(name: str, value: Any) -> bool:
    # What came later is empty in what was stored before it.
    if name in ("rates", "rate_thresholds", "scores") and value in ((), []):
        return True
    if not isinstance(value, list) or not value or {type(x) for x in value} != {float}:
        return False
    array = np.array(value)
    if not np.all(np.abs(array) <= _LARGEST):  # false for NaN
        return False
    steps = np.diff(array)
    if name in ("rate_thresholds", "scores"):  # of which some may be equal
        return bool(np.all((steps if name == "scores" else -steps) >= 0))
    shares = name == "quantiles" or 0 < array[0] <= array[-1] < 1
    return bool(shares and np.all(steps > 0))
