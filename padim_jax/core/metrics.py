"""Exact detection and localisation metrics: AUROC, AP, F1-max, AUPRO and their curves.

Exact means: each distinct score is a threshold, a prediction is `score >= threshold`,
equal scores change side together, nothing is binned.

All metrics need only three counts at each distinct score of an anomalous sample:
anomalous samples at or above it, normal samples above it, normal samples at or above it.
Between one such score and the next lower one only false positives are added: the ROC and
PRO curves run horizontally, the average precision gains nothing and F1 falls. Normal
pixels, almost all there are, therefore only need to be sorted, in groups of images, and
counted by binary search. Counts of groups add up, so no pixel is sorted again for its defect
type, and images may differ in size and need not be in memory together (`stream_pixels`).
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

AUPRO_MAX_FPR = 0.3  # the limit of Bergmann et al. and of published MVTec AD results

# Regions are 8-connected within an image and never continue into the next image.
_REGION_STRUCTURE = np.zeros((3, 3, 3), bool)
_REGION_STRUCTURE[1] = True

# Normal pixels that `stream_pixels` sorts together: 64 MB in float32, twice that while sorting.
GROUP = 1 << 24

Curve = tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]
# The ROC curve, and that of the mean overlap of regions (PRO), whose area is `aupro`.
Curves = tuple[Curve, tuple[Float[np.ndarray, " l"], Float[np.ndarray, " l"]]]


@dataclasses.dataclass(frozen=True)
class BinaryMetrics:
    """Separation of anomalous from normal samples by one score.

    Attributes:
      auroc: area under the ROC curve; a tied pair counts one half.
      ap: average precision, the sum of `(R_k - R_{k-1}) P_k` over the distinct thresholds
        (`sklearn.metrics.average_precision_score`).
      f1_max: largest F1 over all distinct thresholds.
      f1_threshold: score t for which `score >= t` has that F1; the highest one if there are
        several.
      undefined: reason why the other four are None; None if they are numbers.
    """

    auroc: float | None = None
    ap: float | None = None
    f1_max: float | None = None
    f1_threshold: float | None = None
    undefined: str | None = None


@dataclasses.dataclass(frozen=True)
class PixelMetrics:
    """Result of `pixel_metrics` and of `stream_pixels`.

    Attributes:
      whole: binary metrics and AUPRO of all images.
      per_defect: the same by defect type, of its images and the normal ones.
      curves: ROC and PRO curve of all images; None if undefined.
    """

    whole: tuple[BinaryMetrics, float | None]
    per_defect: dict[str, tuple[BinaryMetrics, float | None]]
    curves: Curves | None


def binary_metrics(
    labels: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"]
) -> BinaryMetrics:
    """Return AUROC, AP and F1-max of one score per sample.

    Args:
      labels: True for anomalous samples.
      scores: higher is more anomalous.

    Returns:
      The metrics; all None, with a reason, if either class is missing.

    Raises:
      ValueError: a score is not finite.
    """
    _require_finite("scores", scores)
    return _metrics(_samples(labels, scores), "sample")[0]


def aupro(
    masks: Bool[np.ndarray, "n h w"],
    maps: Float[np.ndarray, "n h w"],
    max_fpr: float = AUPRO_MAX_FPR,
) -> float | None:
    """Return the normalised area under the per-region overlap (PRO) curve.

    The overlap of a ground-truth region is the fraction of its pixels at or above the
    threshold; PRO is the mean overlap of the 8-connected regions of all images, each
    region weighted equally; the false positive rate is that of all normal pixels of all
    images. PRO is integrated over rates in [0, max_fpr] by the trapezoid rule, with
    linear interpolation at the limit, and divided by `max_fpr`. A perfect map has 1, a
    constant one `max_fpr / 2`. Source: Bergmann et al., "The MVTec Anomaly Detection
    Dataset", IJCV 2021.

    Args:
      masks: True for defect pixels; all False for normal images.
      maps: anomaly maps, higher is more anomalous.
      max_fpr: upper limit of the false positive rate, in (0, 1].

    Returns:
      Area in [0, 1]; None without defect pixels or without normal pixels.

    Raises:
      ValueError: `max_fpr` is outside (0, 1], or a value of a map is not finite.
    """
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr is {max_fpr}, expected a number in (0, 1]")
    _require_finite("maps", maps)
    return _metrics(_pixels(masks, maps), "pixel", max_fpr)[1]


def roc_curve(labels: Bool[np.ndarray, " n"], scores: Float[np.ndarray, " n"]) -> Curve | None:
    """Return the exact ROC curve, without points inside its straight pieces.

    Args:
      labels: True for anomalous samples.
      scores: higher is more anomalous.

    Returns:
      False and true positive rates from (0, 0) to (1, 1), float64; None if either class is
      missing.

    Raises:
      ValueError: a score is not finite.
    """
    _require_finite("scores", scores)
    tally = _tally(_samples(labels, scores))
    if tally.missing():
        return None
    counts = tally.counts()
    return _points(counts, counts.tp)


def pixel_metrics(
    labels: Bool[np.ndarray, " n"],
    defect_types: Sequence[str],
    masks: Bool[np.ndarray, "n h w"],
    maps: Float[np.ndarray, "n h w"],
    inside: Bool[np.ndarray, "h w"] | None = None,
) -> PixelMetrics:
    """Return the pixel metrics of a test set and their curves; each pixel is sorted once.

    Args:
      labels: True for anomalous images.
      defect_types: one per image; ignored for normal images.
      masks: True for defect pixels; all False for normal images.
      maps: anomaly maps, higher is more anomalous.
      inside: pixels that count, as those that are not NaN in `stream_pixels`; None for all.

    Returns:
      Metrics and curves.

    Raises:
      ValueError: a value of a map is not finite.
    """
    _require_finite("maps", maps)
    types = np.array(defect_types, dtype=str)
    names = [str(name) for name in np.unique(types[labels])]
    groups = [~labels, *(labels & (types == name) for name in names)]
    # NumPy sorts and searches without holding the GIL: threads use all cores.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda group: _pixels(masks[group], maps[group], inside), groups))
        every = [_merge(parts), *(_merge([parts[0], part]) for part in parts[1:])]
        whole, *tallies = pool.map(_tally, every)
    return _pixel_metrics(whole, dict(zip(names, tallies, strict=True)))


def stream_pixels(
    labels: Bool[np.ndarray, " n"],
    defect_types: Sequence[str],
    read: Callable[[int], tuple[Bool[np.ndarray, "h w"], Float[np.ndarray, "h w"]]],
    mask_known: Bool[np.ndarray, " n"] | None = None,
) -> PixelMetrics:
    """Return pixel metrics of images of any sizes, which are never in memory together.

    They are exact, and equal to those of `pixel_metrics` for the same images. Normal images
    are read once, anomalous ones twice: for the scores of their defects, then to count the
    other pixels. At any time memory holds one image, up to 2**24 normal pixels (or one
    image's, if it has more), and about 200 bytes for each defect pixel of the test set.

    Args:
      labels: True for anomalous images.
      defect_types: one per image; ignored for normal images.
      read: function that maps an image's number to its mask (True for defect pixels) and
        anomaly map, of equal shapes. Pixels whose map is NaN are left out; a region without any
        other pixel does not count.
      mask_known: False for anomalous images without a mask, which are left out. None: all masks
        are known.

    Returns:
      Metrics and curves.
    """
    types = np.array(defect_types, dtype=str)
    known = np.ones_like(labels) if mask_known is None else mask_known
    names = [str(name) for name in np.unique(types[labels])]
    numbers = {
        name: np.flatnonzero(labels & known & (types == name)).tolist() for name in names
    }
    defects = {
        name: _merge([_defects(*read(i)) for i in chosen]) for name, chosen in numbers.items()
    }
    whole = _tally(_merge(list(defects.values())))
    parts = {name: _tally(samples) for name, samples in defects.items()}
    del defects
    for scores in _sorted_groups(read, np.flatnonzero(~labels).tolist()):
        for tally in (whole, *parts.values()):
            tally.add(scores)
    for name, chosen in numbers.items():
        for scores in _sorted_groups(read, chosen):
            whole.add(scores)
            parts[name].add(scores)
    return _pixel_metrics(whole, parts)


def _defects(mask: np.ndarray, anomaly_map: np.ndarray) -> "_Samples":
    """Return the scored defect pixels of one image."""
    from scipy import ndimage

    regions = np.empty(mask.shape, np.int32)
    ndimage.label(mask, structure=_REGION_STRUCTURE[1], output=regions)
    scored = mask & ~np.isnan(anomaly_map)
    region = regions[scored]  # labelled before, so that NaN pixels do not split a region
    return _Samples(anomaly_map[scored], 1 / np.bincount(region)[region], [])


def _sorted_groups(
    read: Callable[[int], tuple[np.ndarray, np.ndarray]], numbers: Iterable[int]
) -> Iterable[np.ndarray]:
    """Yield the normal pixels of some images, sorted in groups of at least `GROUP`."""
    group: list[np.ndarray] = []
    for number in numbers:
        mask, anomaly_map = read(number)
        group.append(anomaly_map[~mask & ~np.isnan(anomaly_map)])
        if sum(map(len, group)) >= GROUP:
            yield np.sort(np.concatenate(group))
            group = []
    if group:
        yield np.sort(np.concatenate(group))


def evaluate(
    labels: Bool[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    defect_types: Sequence[str],
    masks: Bool[np.ndarray, "n h w"] | None,
    maps: Float[np.ndarray, "n h w"],
    mask_known: Bool[np.ndarray, " n"] | None = None,
    pixels: PixelMetrics | None = None,
) -> dict[str, Any]:
    """Return all metrics of a test set, overall and for each defect type.

    Args:
      labels: True for anomalous images.
      scores: image scores, higher is more anomalous.
      defect_types: one per image; ignored for normal images.
      masks: True for defect pixels, all False for normal images. None: the dataset has no
        ground-truth masks.
      maps: anomaly maps, higher is more anomalous.
      mask_known: False for anomalous images without a mask; ignored for normal images. None:
        all masks are known, and an empty one means no defect pixel.
      pixels: pixel metrics of the same images; None to compute them from masks and maps.

    Returns:
      A dict ready for JSON: `auroc`, `ap`, `f1_max` and `f1_threshold` (see `BinaryMetrics`)
      prefixed with `image_` and with `pixel_`; `aupro`; `per_defect`, with the same entries for
      each defect type, sorted, computed from the normal images and the images of that type.
      Values that cannot be computed are None; the dict (or the defect type's) then has
      `undefined`: the reason by key. Pixel metrics are undefined as soon as one mask is
      unknown: its pixels belong to neither class.

    Raises:
      ValueError: a score or a value of a map is not finite, the number of defect types differs
        from that of images, or a normal image has defect pixels.
    """
    _require_finite("scores", scores)
    _require_finite("maps", maps)
    if len(defect_types) != labels.size:
        raise ValueError(f"{len(defect_types)} defect types for {labels.size} images")
    if masks is not None and (wrong := ~labels & masks.any(axis=(1, 2))).any():
        raise ValueError(f"image {wrong.argmax()} is normal but its mask has defect pixels")

    types = np.array(defect_types, dtype=str)
    names = [str(name) for name in np.unique(types[labels])]
    unknown = np.zeros_like(labels) if mask_known is None else labels & ~mask_known
    if masks is not None and pixels is None:
        pixels = pixel_metrics(labels, defect_types, masks, maps)

    def subset(name: str | None) -> dict[str, Any]:
        images = np.ones_like(labels) if name is None else ~labels | (types == name)
        image, _ = _metrics(_samples(labels[images], scores[images]), "image")
        if masks is None or pixels is None:
            pixel, area = BinaryMetrics(undefined="no ground-truth masks"), None
        elif unknown[images].any():
            count = f"{unknown[images].sum()} of {labels[images].sum()} anomalous images"
            pixel, area = BinaryMetrics(undefined=f"{count} without ground-truth mask"), None
        else:
            pixel, area = pixels.whole if name is None else pixels.per_defect[name]
        return _flat(image, pixel, area)

    return subset(None) | {"per_defect": {name: subset(name) for name in names}}


@dataclasses.dataclass(frozen=True)
class _Samples:
    """Scores split by class.

    Attributes:
      anomalous: scores of the anomalous samples, in any order.
      weights: their weights in the curve's height, float64.
      normal: scores of the normal samples, in arrays each sorted ascending.
    """

    anomalous: np.ndarray
    weights: np.ndarray
    normal: list[np.ndarray]


def _samples(labels: np.ndarray, scores: np.ndarray) -> _Samples:
    """Weight samples equally: the curve is the ROC curve."""
    anomalous = scores[labels]
    return _Samples(anomalous, np.ones(anomalous.size), [np.sort(scores[~labels])])


def _pixels(masks: np.ndarray, maps: np.ndarray, inside: np.ndarray | None = None) -> _Samples:
    """Weight regions equally, not their pixels: the curve is the PRO curve."""
    from scipy import ndimage  # slow to import; only pixel metrics need it

    regions = np.empty(masks.shape, np.int32)
    ndimage.label(masks, structure=_REGION_STRUCTURE, output=regions)
    normal = ~masks
    if inside is not None:  # labelled before, so that its edge does not split a region
        masks, normal = masks & inside, normal & inside
    region = regions[masks]
    return _Samples(maps[masks], 1 / np.bincount(region)[region], [np.sort(maps[normal])])


def _merge(parts: Sequence[_Samples]) -> _Samples:
    nothing = np.zeros(0, np.float32)
    return _Samples(
        np.concatenate([part.anomalous for part in parts] or [nothing]),
        np.concatenate([part.weights for part in parts] or [nothing]),
        [scores for part in parts for scores in part.normal],
    )


@dataclasses.dataclass(frozen=True)
class _Counts:
    """Counts at each of the k distinct anomalous scores t, highest first.

    Attributes:
      thresholds: the t, descending.
      tp: number of anomalous samples with score >= t, int64.
      weight: their weight, float64.
      fp_above: number of normal samples with score > t, int64.
      fp: number of normal samples with score >= t, int64.
      normal: number of normal samples.
    """

    thresholds: np.ndarray
    tp: np.ndarray
    weight: np.ndarray
    fp_above: np.ndarray
    fp: np.ndarray
    normal: int


class _Tally:
    """Counter of normal samples, group by group, below and up to each anomalous score."""

    def __init__(self, anomalous: np.ndarray, weights: np.ndarray):
        """Start with the anomalous scores and weights of `_Samples`, and no normal sample."""
        order = np.argsort(anomalous)[::-1]
        scores = anomalous[order]
        last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # of equal scores
        last = last[: scores.size]
        self._thresholds, self._tp = scores[last], last + 1
        self._weight = np.cumsum(weights[order])[last]
        self._below, self._up_to = np.zeros((2, last.size), np.int64)
        self._normal = 0

    def add(self, normal: np.ndarray) -> None:
        """Count normal scores, sorted ascending."""
        self._below += np.searchsorted(normal, self._thresholds, "left")
        self._up_to += np.searchsorted(normal, self._thresholds, "right")
        self._normal += normal.size

    def missing(self) -> list[str]:
        """Return the classes without samples."""
        sizes = {"anomalous": self._tp.size, "normal": self._normal}
        return [name for name, size in sizes.items() if size == 0]

    def counts(self) -> _Counts:
        """Return the counts; both classes must be present."""
        return _Counts(
            thresholds=self._thresholds,
            tp=self._tp,
            weight=self._weight,
            fp_above=self._normal - self._up_to,
            fp=self._normal - self._below,
            normal=self._normal,
        )


def _tally(samples: _Samples) -> _Tally:
    tally = _Tally(samples.anomalous, samples.weights)
    for normal in samples.normal:
        tally.add(normal)
    return tally


def _metrics(
    samples: _Samples, unit: str, max_fpr: float = AUPRO_MAX_FPR
) -> tuple[BinaryMetrics, float | None]:
    """Return binary metrics, and the normalised area under the curve up to max_fpr."""
    return _tally_metrics(_tally(samples), unit, max_fpr)


def _tally_metrics(
    tally: _Tally, unit: str, max_fpr: float = AUPRO_MAX_FPR
) -> tuple[BinaryMetrics, float | None]:
    if missing := tally.missing():
        return BinaryMetrics(undefined=" and ".join(f"no {c} {unit}" for c in missing)), None
    counts = tally.counts()
    return _summary(counts), _area(counts, max_fpr)


def _summary(counts: _Counts) -> BinaryMetrics:
    positives = int(counts.tp[-1])
    gained = np.diff(counts.tp, prepend=0)
    # In integers up to the single division; doubled because a tied pair counts one half.
    pairs = 2 * positives * counts.normal
    lost = int(np.dot(gained, counts.fp_above + counts.fp))
    precision = counts.tp / (counts.tp + counts.fp)
    f1 = 2 * counts.tp / (counts.tp + counts.fp + positives)
    best = f1.argmax()  # the first of equals: the highest threshold
    return BinaryMetrics(
        auroc=(pairs - lost) / pairs,
        ap=float(np.dot(gained, precision) / positives),
        f1_max=float(f1[best]),
        f1_threshold=float(counts.thresholds[best]),
    )


def _vertices(counts: _Counts, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the curve of `tp` or `weight` against false positives, from (0, 0)."""
    height_above = np.append(0, heights[:-1])
    fp = np.column_stack([counts.fp_above, counts.fp]).ravel()
    height = np.column_stack([height_above, heights]).ravel()
    return (
        np.concatenate([[0], fp, [counts.normal]]),
        np.concatenate([[0], height, heights[-1:]]),
    )


def _pixel_metrics(whole: _Tally, parts: dict[str, _Tally]) -> PixelMetrics:
    curves = None
    if not whole.missing():
        counts = whole.counts()
        curves = _points(counts, counts.tp), _points(counts, counts.weight)
    return PixelMetrics(
        _tally_metrics(whole, "pixel"),
        {name: _tally_metrics(tally, "pixel") for name, tally in parts.items()},
        curves,
    )


def _points(counts: _Counts, heights: np.ndarray) -> Curve:
    x, y = _vertices(counts, heights)
    distinct = np.append(True, (np.diff(x) != 0) | (np.diff(y) != 0))
    x, y = x[distinct], y[distinct]
    dx, dy = np.diff(x), np.diff(y)
    turns = np.concatenate([[True], dx[:-1] * dy[1:] != dx[1:] * dy[:-1], [True]])
    return x[turns] / x[-1], y[turns] / y[-1]


def _area(counts: _Counts, max_fpr: float) -> float:
    x, y = _vertices(counts, counts.weight)
    # Normalise by the computed total, not the number of regions, so that a perfect map has
    # exactly 1.
    x, y = x / x[-1], y / y[-1]
    inside = int(np.searchsorted(x, max_fpr, "right"))
    around = slice(inside - 1, inside + 1)  # the last point within the limit and the next
    at_limit = np.interp(max_fpr, x[around], y[around])
    x, y = np.append(x[:inside], max_fpr), np.append(y[:inside], at_limit)
    return float(np.trapezoid(y, x) / max_fpr)


def _flat(image: BinaryMetrics, pixel: BinaryMetrics, area: float | None) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    undefined: dict[str, str] = {}
    for prefix, metrics in (("image_", image), ("pixel_", pixel)):
        values = dataclasses.asdict(metrics)
        reason = values.pop("undefined")
        flat |= {prefix + name: value for name, value in values.items()}
        if reason:
            undefined |= {prefix + name: reason for name in values}
    flat["aupro"] = area
    if pixel.undefined:
        undefined["aupro"] = pixel.undefined
    return flat | ({"undefined": undefined} if undefined else {})


def _require_finite(name: str, values: np.ndarray) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        bad = np.argwhere(~finite)
        raise ValueError(
            f"{name}: {len(bad)} of {values.size} values are not finite, the first "
            f"({values[tuple(bad[0])]}) at index {tuple(map(int, bad[0]))}"
        )
