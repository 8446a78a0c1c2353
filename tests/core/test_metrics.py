"""Metrics against scikit-learn and plain references that loop over every threshold."""

import itertools
import json

import hypothesis
import numpy as np
import pytest
import sklearn.metrics
from fuzzing import examples
from hypothesis import strategies as st

from padim_jax.core import metrics

# Both sides are float64 sums of a few thousand terms below 1: rounding stays below 1e-12,
# while one pixel or one pair counted wrongly changes a result by more than 1e-7.
EXACT = 1e-12

IMAGE_KEYS = ["image_auroc", "image_ap", "image_f1_max", "image_f1_threshold"]
PIXEL_KEYS = ["pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_f1_threshold", "aupro"]


def plain_f1_max(labels, scores):
    """(F1, threshold) over every distinct score, from the highest down."""
    best = (0.0, None)
    for threshold in sorted({float(score) for score in scores}, reverse=True):
        f1 = sklearn.metrics.f1_score(labels, scores >= threshold)
        if f1 > best[0] + EXACT:
            best = (f1, threshold)
    return best


def plain_regions(mask):
    """8-connected regions of one image by flood fill, each a list of (y, x)."""
    left = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    regions = []
    while left:
        stack, region = [left.pop()], []
        while stack:
            y, x = stack.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack += near
        regions.append(region)
    return regions


def plain_pro_points(masks, maps):
    """(FPR, PRO) at every distinct score from the highest down, after (0, 0)."""
    regions = [
        [float(maps[i][place]) for place in region]
        for i, mask in enumerate(masks)
        for region in plain_regions(mask)
    ]
    normal = maps[~masks]
    points = [(0.0, 0.0)]
    for threshold in sorted({float(value) for value in maps.ravel()}, reverse=True):
        overlaps = [sum(v >= threshold for v in region) / len(region) for region in regions]
        points.append((float(np.mean(normal >= threshold)), sum(overlaps) / len(regions)))
    return points


def plain_aupro(masks, maps, max_fpr):
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(plain_pro_points(masks, maps)):
        end = min(x1, max_fpr)
        if end > x0:
            y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y_end) / 2
    return area / max_fpr


def random_samples(seed, levels, dtype: type = np.float64, n=60):
    """Overlapping classes, with scores on both sides of zero."""
    rng = np.random.default_rng(seed)
    labels = rng.random(n) < 0.3
    labels[:2] = True, False
    scores = rng.normal(size=n) + labels
    return labels, _with_ties(scores, levels).astype(dtype)


def random_maps(seed, levels=None, dtype: type = np.float64, n=3, size=12):
    """Ragged regions, some joined only over a corner; the first image is normal."""
    rng = np.random.default_rng(seed)
    masks = rng.random((n, size, size)) < 0.2
    masks[0] = False
    return masks, _with_ties(rng.normal(size=masks.shape) + masks, levels).astype(dtype)


def _with_ties(scores, levels):
    return scores if levels is None else np.round(scores * levels / 6)


def dataset(seed=0, levels=None):
    """Arguments of `evaluate`: two normal images and two defect types, interleaved."""
    masks, maps = random_maps(seed, levels, np.float32, n=7, size=10)
    masks[3] = False
    types = ["good", "scratch", "hole", "good", "hole", "scratch", "hole"]
    return masks.any(axis=(1, 2)), maps.max(axis=(1, 2)), types, masks, maps


def take(indices, labels, scores, types, masks, maps):
    chosen = [types[i] for i in indices]
    return labels[indices], scores[indices], chosen, masks[indices], maps[indices]


# One score per sample.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [None, 2, 6, 40])
@pytest.mark.parametrize("seed", range(3))
def test_binary_metrics_are_those_of_scikit_learn(seed, levels, dtype):
    labels, scores = random_samples(seed, levels, dtype)
    found = metrics.binary_metrics(labels, scores)
    f1, threshold = plain_f1_max(labels, scores)
    assert found.auroc == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), EXACT)
    ap = sklearn.metrics.average_precision_score(labels, scores)
    assert found.ap == pytest.approx(ap, EXACT)
    assert found.f1_max == pytest.approx(f1, EXACT)
    assert found.f1_threshold == threshold
    assert found.undefined is None


@pytest.mark.parametrize("positive", range(5))
def test_single_positive(positive):
    labels = np.arange(5) == positive
    scores = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    found = metrics.binary_metrics(labels, scores)
    rank = 5 - positive
    assert found.auroc == positive / 4
    assert found.ap == 1 / rank
    assert found.f1_max == 2 / (1 + rank)
    assert found.f1_threshold == positive


def test_constant_scores_are_one_threshold():
    found = metrics.binary_metrics(np.arange(8) < 2, np.full(8, -3.5))
    assert found == metrics.BinaryMetrics(0.5, 0.25, 0.4, -3.5)


def test_order_of_samples_does_not_matter():
    labels = np.array([True, False, True, False, True, False])
    scores = np.array([2.0, 2.0, 1.0, 1.0, 1.0, 0.0])
    results = {
        metrics.binary_metrics(labels[list(order)], scores[list(order)])
        for order in itertools.permutations(range(6))
    }
    assert len(results) == 1


def test_highest_threshold_of_equal_f1():
    # F1 at 4: 2·1/(1 + 2); at 1: 2·2/(4 + 2); both 2/3.
    labels = np.array([False, True, True, False])
    found = metrics.binary_metrics(labels, np.array([3.0, 1.0, 4.0, 2.0]))
    assert (found.f1_max, found.f1_threshold) == (2 / 3, 4.0)


def test_threshold_is_a_score_and_reproduces_f1():
    labels, scores = random_samples(5, None, np.float32, n=1000)
    found = metrics.binary_metrics(labels, scores)
    assert found.f1_threshold is not None
    assert found.f1_threshold in scores.tolist()
    f1 = sklearn.metrics.f1_score(labels, scores >= found.f1_threshold)
    assert found.f1_max == pytest.approx(f1, EXACT)


def test_signed_zeros_tie():
    for positive, negative in [(0.0, -0.0), (-0.0, 0.0)]:
        scores = np.array([positive, negative], np.float32)
        found = metrics.binary_metrics(np.array([True, False]), scores)
        assert (found.auroc, found.ap) == (0.5, 0.5)
    # Zeros of both signs among the anomalous scores are one threshold too.
    scores = np.array([0.0, -0.0, -0.0, 0.0], np.float32)
    found = metrics.binary_metrics(np.array([True, True, False, False]), scores)
    assert (found.auroc, found.ap, found.f1_max) == (0.5, 0.5, 2 / 3)


@pytest.mark.parametrize("transform", [np.exp, lambda s: -1 / (s + 9), lambda s: 4 * s - 7])
def test_only_the_order_of_scores_matters(transform):
    labels, scores = random_samples(1, 12)
    before = metrics.binary_metrics(labels, scores)
    after = metrics.binary_metrics(labels, transform(scores))
    assert (after.auroc, after.ap, after.f1_max) == (before.auroc, before.ap, before.f1_max)
    assert after.f1_threshold == transform(np.float64(before.f1_threshold))


def test_pair_counts_beyond_32_bits():
    m = 70_000  # classes alternate: the positive number j is above j of the negatives
    found = metrics.binary_metrics(np.arange(2 * m) % 2 == 1, np.arange(2.0 * m))
    assert found.auroc == (m + 1) / (2 * m)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([False, False], "no anomalous sample"),
        ([True, True], "no normal sample"),
        ([], "no anomalous sample and no normal sample"),
    ],
)
def test_missing_class_is_undefined(labels, reason):
    labels = np.array(labels, bool)
    scores = np.linspace(0, 1, labels.size)
    found = metrics.binary_metrics(labels, scores)
    assert found == metrics.BinaryMetrics(None, None, None, None, undefined=reason)
    assert metrics.roc_curve(labels, scores) is None


# AUPRO.


@pytest.mark.parametrize("max_fpr", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("levels", [None, 3, 30])
def test_aupro_is_that_of_the_plain_reference(levels, dtype, max_fpr):
    masks, maps = random_maps(0, levels, dtype)
    expected = plain_aupro(masks, maps, max_fpr)
    assert metrics.aupro(masks, maps, max_fpr) == pytest.approx(expected, EXACT)


def one_row(*pixels):
    """(mask, map) of shape (1, 1, w) from (is a defect, score) pairs."""
    mask, scores = zip(*pixels, strict=True)
    return np.array(mask, bool)[None, None], np.array(scores, np.float32)[None, None]


@pytest.mark.parametrize(
    ("second_defect", "area"),
    [
        # Ten normal pixels score 10, 9, ..., 1, so the FPR is 0.1 after the 10, and so on.
        (8.5, 0.2 * 0.5 + 0.1 * 1.0),  # found at FPR 0.2, before the limit
        (8.0, 0.2 * 0.5 + 0.1 * 0.75),  # tied with a normal pixel: a ramp over 0.2 ... 0.3
        (7.5, 0.3 * 0.5),  # found at the limit itself
        (7.0, 0.3 * 0.5),  # a ramp that starts at the limit
        (0.5, 0.3 * 0.5),  # found beyond the limit
    ],
)
def test_aupro_up_to_the_limit(second_defect, area):
    # The first defect is above all normal pixels and apart from the second: PRO 0.5.
    normal = [(False, score) for score in range(1, 11)]
    masks, maps = one_row((True, 99.0), *normal, (True, second_defect))
    assert metrics.aupro(masks, maps, 0.3) == pytest.approx(area / 0.3, EXACT)


def test_aupro_interpolates_at_the_limit():
    # Two normal pixels tie with the second defect: a ramp from (0.2, 0.5) to (0.4, 1).
    normal = [(False, score) for score in (10, 9, 7, 7, 6, 5, 4, 3, 2, 1)]
    masks, maps = one_row((True, 99.0), *normal, (True, 7.0))
    area = 0.2 * 0.5 + 0.1 * (0.5 + 0.75) / 2
    assert metrics.aupro(masks, maps, 0.3) == pytest.approx(area / 0.3, EXACT)


def test_aupro_of_a_constant_map_is_the_diagonal():
    masks, maps = random_maps(0)
    area = metrics.aupro(masks, np.zeros_like(maps), 0.3)
    assert area == pytest.approx(0.15, EXACT)


def test_aupro_of_perfect_maps_is_exactly_one():
    masks, _ = random_maps(0, n=7, size=30)
    assert metrics.aupro(masks, masks.astype(np.float32)) == 1


def test_pixels_touching_at_a_corner_are_one_region():
    mask = np.array([[[1, 0, 0, 0], [0, 1, 0, 1]]], bool)
    # The diagonal pair is found at once, the lone pixel last: PRO 1/2 (split up: 2/3).
    maps = np.where(mask, 9.0, 1.0)
    maps[0, 1, 3] = 0
    assert metrics.aupro(mask, maps) == pytest.approx(1 / 2, EXACT)


def test_regions_end_with_their_image():
    masks = np.array([[[1, 0, 0]], [[1, 1, 0]]], bool)
    # The first image's pixel is found, the second's are not: PRO 1/2 (joined: 1/3).
    maps = np.array([[[9.0, 1.0, 1.0]], [[0.0, 0.0, 1.0]]])
    assert metrics.aupro(masks, maps) == pytest.approx(1 / 2, EXACT)


def test_aupro_ties_signed_zeros():
    masks, maps = one_row((True, 0.0), (False, -0.0), (False, 0.0))
    assert metrics.aupro(masks, maps, 1.0) == 0.5


@pytest.mark.parametrize("everything", [False, True])
def test_aupro_without_one_class_is_undefined(everything):
    masks = np.full((2, 3, 3), everything)
    assert metrics.aupro(masks, np.zeros((2, 3, 3))) is None
    assert pixel_curves(masks, np.zeros((2, 3, 3))) is None


@pytest.mark.parametrize("max_fpr", [0.0, -0.3, 1.01, float("nan")])
def test_aupro_limit_outside_of_range(max_fpr):
    with pytest.raises(ValueError, match=r"max_fpr is .*expected"):
        metrics.aupro(*random_maps(0), max_fpr)


# Curves.


def pixel_curves(masks, maps):
    """ROC and PRO curve of good images, which have masks here, and of two defect types."""
    types = [("good", "hole", "scratch")[i % 3] for i in range(len(masks))]
    labels = np.array([kind != "good" for kind in types])
    return metrics.pixel_metrics(labels, types, masks, maps).curves


@pytest.mark.parametrize("levels", [None, 2, 6, 40])
def test_roc_curve_is_scikit_learns_without_collinear_points(levels):
    labels, scores = random_samples(0, levels)
    fpr, tpr, _ = sklearn.metrics.roc_curve(labels, scores, drop_intermediate=False)
    # In whole numbers of samples, so that being in one line is exact.
    points = list(
        zip(
            np.rint(fpr * (~labels).sum()).astype(int).tolist(),
            np.rint(tpr * labels.sum()).astype(int).tolist(),
            strict=True,
        )
    )
    corners = points[:1]
    for (x, y), (x_next, y_next) in itertools.pairwise(points[1:]):
        x_last, y_last = corners[-1]
        if (x - x_last) * (y_next - y) != (x_next - x) * (y - y_last):
            corners.append((x, y))
    corners.append(points[-1])
    expected = np.array(corners) / [(~labels).sum(), labels.sum()]
    np.testing.assert_array_equal(np.transpose(metrics.roc_curve(labels, scores)), expected)


@pytest.mark.parametrize("levels", [None, 3, 30])
def test_pro_curve_runs_through_every_point_of_the_plain_one(levels):
    masks, maps = random_maps(0, levels)
    curves = pixel_curves(masks, maps)
    assert curves is not None
    fpr, pro = curves[1]
    assert (fpr[0], pro[0], fpr[-1], pro[-1]) == (0, 0, 1, 1)
    x, y = np.transpose(plain_pro_points(masks, maps))
    # Both rates only grow, so their sum is a position along the curve.
    np.testing.assert_allclose(np.interp(x + y, fpr + pro, fpr), x, rtol=0, atol=EXACT)
    assert len(fpr) <= len(x)
    assert np.trapezoid(pro, fpr) == pytest.approx(metrics.aupro(masks, maps, 1.0), EXACT)


# Images of several sizes, streamed.


def plain_pixels(images):
    """The metrics of (mask, map) pairs, in float64 and all in memory; NaN is left out."""
    scored = [(mask, anomaly_map.astype(np.float64)) for mask, anomaly_map in images]
    labels = np.concatenate([mask[~np.isnan(x)] for mask, x in scored])
    scores = np.concatenate([x[~np.isnan(x)] for _, x in scored])
    regions = [
        kept
        for mask, x in scored
        for region in plain_regions(mask)
        if (kept := [float(x[place]) for place in region if not np.isnan(x[place])])
    ]
    area, last = 0.0, (0.0, 0.0)
    for threshold in np.unique(scores)[::-1]:
        overlaps = [np.mean(np.array(region) >= threshold) for region in regions]
        point = float(np.mean(scores[~labels] >= threshold)), float(np.mean(overlaps))
        end = min(point[0], metrics.AUPRO_MAX_FPR)
        if end > last[0]:
            share = (end - last[0]) / (point[0] - last[0])
            area += (end - last[0]) * (2 * last[1] + share * (point[1] - last[1])) / 2
        last = point
    f1, threshold = plain_f1_max(labels, scores)
    auroc = sklearn.metrics.roc_auc_score(labels, scores)
    ap = sklearn.metrics.average_precision_score(labels, scores)
    return auroc, ap, f1, threshold, area / metrics.AUPRO_MAX_FPR


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=3, max_size=7),
    group=st.sampled_from([1, 7, 40, 10_000]),
    levels=st.sampled_from([None, 2, 6]),
    seed=st.integers(0, 1000),
)
def test_streamed_pixels_are_those_of_all_images_in_memory(sizes, group, levels, seed):
    rng = np.random.default_rng(seed)
    images, types = [], []
    for number, size in enumerate(sizes):
        kind = ("good", "scratch", "hole")[number % 3]
        mask = (rng.random(size) < 0.3) & (kind != "good")
        anomaly_map = _with_ties(rng.normal(size=size) + mask, levels).astype(np.float32)
        anomaly_map[rng.random(size) < 0.1] = np.nan
        if kind != "good":  # so that everything is defined
            mask[0, 0], anomaly_map[0, 0] = True, 0
        else:
            anomaly_map[0, 0] = 1
        images.append((mask, anomaly_map))
        types.append(kind)
    labels = np.array([kind != "good" for kind in types])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "GROUP", group)
        found = metrics.stream_pixels(labels, types, images.__getitem__)
    expected = {None: range(len(images))} | {
        name: [i for i, kind in enumerate(types) if kind in ("good", name)]
        for name in ("scratch", "hole")
    }
    assert set(found.per_defect) == {"scratch", "hole"}
    for name, chosen in expected.items():
        pixel, area = found.whole if name is None else found.per_defect[name]
        *three, threshold, theirs = plain_pixels([images[i] for i in chosen])
        assert [pixel.auroc, pixel.ap, pixel.f1_max] == pytest.approx(three, abs=EXACT)
        assert pixel.f1_threshold == threshold
        assert area == pytest.approx(theirs, abs=EXACT)


def test_streamed_images_are_read_twice_at_most_and_one_after_the_other():
    _, _, types, masks, maps = dataset()
    labels, read = masks.any(axis=(1, 2)), []

    def load(index):
        read.append(index)
        return masks[index], maps[index]

    found = metrics.stream_pixels(labels, types, load)
    assert sorted(read) == sorted([*range(7), *np.flatnonzero(labels)])
    whole = metrics.evaluate(labels, maps.max(axis=(1, 2)), types, masks, maps)
    streamed = metrics.evaluate(labels, maps.max(axis=(1, 2)), types, masks, maps, pixels=found)
    assert without_rounding(streamed) == without_rounding(whole)


def without_rounding(values):
    """Weights of regions are added up in another order."""
    return json.loads(json.dumps(values), parse_float=lambda text: round(float(text), 12))


def test_a_split_by_what_is_left_out_makes_no_two_regions():
    mask = np.array([[True, True, True, False]])
    scores = np.array([[3.0, np.nan, 1.0, 2.0]], np.float32)
    found = metrics.stream_pixels(np.array([True]), ["hole"], lambda _: (mask, scores))
    # One region, half of which lies above the only normal pixel.
    assert found.whole[1] == 0.5


def test_an_unseen_region_does_not_count():
    mask = np.array([[True, False, True, False]])
    scores = np.array([[np.nan, 1.0, 2.0, 0.0]], np.float32)
    found = metrics.stream_pixels(np.array([True]), ["hole"], lambda _: (mask, scores))
    assert found.whole[1] == 1
    assert found.whole[0].ap == 1


# Whole test sets.


@pytest.mark.parametrize("levels", [None, 6])
def test_evaluate_is_made_of_the_single_metrics(levels):
    labels, scores, types, masks, maps = dataset(levels=levels)
    found = metrics.evaluate(labels, scores, types, masks, maps)
    image = metrics.binary_metrics(labels, scores)
    pixel = metrics.binary_metrics(masks.ravel(), maps.ravel())
    expected = [image.auroc, image.ap, image.f1_max, image.f1_threshold]
    expected += [pixel.auroc, pixel.ap, pixel.f1_max, pixel.f1_threshold]
    expected += [metrics.aupro(masks, maps, 0.3)]
    assert list(found) == [*IMAGE_KEYS, *PIXEL_KEYS, "per_defect"]
    assert [found[key] for key in IMAGE_KEYS + PIXEL_KEYS] == pytest.approx(expected, EXACT)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("levels", [None, 6])
def test_each_defect_type_is_evaluated_with_all_normal_images(levels):
    everything = dataset(levels=levels)
    found = metrics.evaluate(*everything)["per_defect"]
    assert list(found) == ["hole", "scratch"]
    for name, images in {"hole": [0, 2, 3, 4, 6], "scratch": [0, 1, 3, 5]}.items():
        alone = metrics.evaluate(*take(images, *everything))
        del alone["per_defect"]
        assert found[name] == pytest.approx(alone, EXACT)


@examples(30)
@hypothesis.given(
    types=st.lists(st.sampled_from(["good", "a", "b", "c"]), min_size=1, max_size=8),
    levels=st.sampled_from([None, 1, 3, 30]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_groups_of_images_are_evaluated_as_if_alone(types, levels, seed):
    """Counted group by group and put together: what scikit-learn and the plain loops give."""
    masks, maps = random_maps(seed, levels, np.float32, n=len(types), size=4)
    labels = np.array([name != "good" for name in types])
    masks &= labels[:, None, None]
    scores = maps.max(axis=(1, 2))
    found = metrics.evaluate(labels, scores, types, masks, maps)
    named = {name: ["good", name] for name in sorted({*types} - {"good"})}
    assert list(found["per_defect"]) == list(named)
    for name, chosen in {None: {"good", *types}, **named}.items():
        result = found if name is None else found["per_defect"][name]
        images = np.isin(types, list(chosen))
        require_metrics(result, "image_", labels[images], scores[images])
        require_metrics(result, "pixel_", masks[images].ravel(), maps[images].ravel())
        if result["pixel_auroc"] is None:
            assert result["aupro"] is None
        else:
            area = plain_aupro(masks[images], maps[images], 0.3)
            assert result["aupro"] == pytest.approx(area, EXACT)


def require_metrics(result, prefix, labels, scores):
    auroc, ap, f1, threshold = (
        result[prefix + name] for name in ("auroc", "ap", "f1_max", "f1_threshold")
    )
    if labels.all() or not labels.any():
        assert (auroc, ap, f1, threshold) == (None,) * 4
        return
    assert auroc == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores), EXACT)
    expected = sklearn.metrics.average_precision_score(labels, scores)
    assert ap == pytest.approx(expected, EXACT)
    # F1 = 2 TP / (called + defects), of every distinct score; the highest of the best.
    thresholds = np.unique(scores)[::-1]
    called = scores >= thresholds[:, None]
    every = 2 * (called & labels).sum(axis=1) / (called.sum(axis=1) + labels.sum())
    assert f1 == pytest.approx(every.max(), EXACT)
    assert threshold == thresholds[np.argmax(every)]


@examples(60)
@hypothesis.given(
    images=st.integers(1, 20),
    levels=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_curves_of_any_number_of_images(images, levels, seed):
    """Sorted by defect type, some of which have no image, and merged."""
    masks, maps = random_maps(seed, levels, np.float32, n=images, size=3)
    curves, roc = pixel_curves(masks, maps), metrics.roc_curve(masks.ravel(), maps.ravel())
    if curves is None:
        assert roc is None
        return
    np.testing.assert_array_equal(curves[0], roc)
    area = np.trapezoid(curves[1][1], curves[1][0])
    assert area == pytest.approx(metrics.aupro(masks, maps, 1.0), abs=EXACT)


def test_order_of_images_does_not_matter():
    everything = dataset(levels=6)
    found = metrics.evaluate(*everything)
    shuffled = metrics.evaluate(*take([4, 6, 1, 0, 5, 3, 2], *everything))
    assert shuffled.pop("per_defect").keys() == found.pop("per_defect").keys()
    assert shuffled == pytest.approx(found, EXACT)


def test_defect_types_of_normal_images_are_not_read():
    labels, scores, types, masks, maps = dataset()
    renamed = ["ok" if name == "good" else name for name in types]
    renamed[3] = "hole"
    expected = metrics.evaluate(labels, scores, types, masks, maps)
    assert metrics.evaluate(labels, scores, renamed, masks, maps) == expected


def test_without_masks_only_image_metrics_are_defined():
    labels, scores, types, masks, maps = dataset()
    found = metrics.evaluate(labels, scores, types, None, maps)
    with_masks = metrics.evaluate(labels, scores, types, masks, maps)
    for result, full in [
        (found, with_masks),
        (found["per_defect"]["hole"], with_masks["per_defect"]["hole"]),
    ]:
        assert all(result[key] == full[key] for key in IMAGE_KEYS)
        assert all(result[key] is None for key in PIXEL_KEYS)
        assert result["undefined"] == dict.fromkeys(PIXEL_KEYS, "no ground-truth masks")


def test_an_unknown_mask_only_undefines_what_it_is_part_of():
    labels, scores, types, masks, maps = dataset()
    known = np.ones(7, bool)
    known[[0, 4]] = False  # a normal image needs no mask; image 4 is a hole
    complete = metrics.evaluate(labels, scores, types, masks, maps)
    found = metrics.evaluate(labels, scores, types, masks, maps, known)
    hole, scratch = found["per_defect"]["hole"], found["per_defect"]["scratch"]
    assert scratch == complete["per_defect"]["scratch"]
    for result, reason in [
        (found, "1 of 5 anomalous images without ground-truth mask"),
        (hole, "1 of 3 anomalous images without ground-truth mask"),
    ]:
        assert result["undefined"] == dict.fromkeys(PIXEL_KEYS, reason)
        assert all(result[key] is None for key in PIXEL_KEYS)
    assert all(found[key] == complete[key] for key in IMAGE_KEYS)


def test_a_defect_cut_away_leaves_its_type_without_anomalous_pixels():
    labels, scores, types, masks, maps = dataset()
    masks[[1, 5]] = False  # both scratches lie outside the crop
    found = metrics.evaluate(labels, scores, types, masks, maps)
    assert "undefined" not in found
    scratch = found["per_defect"]["scratch"]
    assert scratch["undefined"] == dict.fromkeys(PIXEL_KEYS, "no anomalous pixel")
    assert scratch["image_auroc"] is not None


def test_only_normal_images():
    found = metrics.evaluate(*take([0, 3], *dataset()))
    assert found["per_defect"] == {}
    assert all(found[key] is None for key in IMAGE_KEYS + PIXEL_KEYS)
    assert found["undefined"] == (
        dict.fromkeys(IMAGE_KEYS, "no anomalous image")
        | dict.fromkeys(PIXEL_KEYS, "no anomalous pixel")
    )


def test_only_anomalous_images():
    found = metrics.evaluate(*take([1, 2], *dataset()))
    assert found["undefined"] == dict.fromkeys(IMAGE_KEYS, "no normal image")
    assert found["aupro"] is not None
    assert found["per_defect"]["hole"]["undefined"] == found["undefined"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_named(value):
    labels, scores, types, masks, maps = dataset()
    bad_scores, bad_maps = scores.copy(), maps.copy()
    bad_scores[[2, 5]] = value
    bad_maps[1, 2, 3:6] = value
    in_scores = rf"scores: 2 of 7 values are not finite, the first \({value}\) at index \(2,\)"
    in_maps = rf"maps: 3 of 700 values .* the first \({value}\) at index \(1, 2, 3\)"
    for function, arguments, message in [
        (metrics.binary_metrics, (labels, bad_scores), in_scores),
        (metrics.roc_curve, (labels, bad_scores), in_scores),
        (metrics.aupro, (masks, bad_maps), in_maps),
        (metrics.pixel_metrics, (labels, types, masks, bad_maps), in_maps),
        (metrics.evaluate, (labels, bad_scores, types, masks, maps), in_scores),
        (metrics.evaluate, (labels, scores, types, masks, bad_maps), in_maps),
        (metrics.evaluate, (labels, scores, types, None, bad_maps), in_maps),
    ]:
        with pytest.raises(ValueError, match=message):
            function(*arguments)


def test_pixels_outside_the_region_of_interest_do_not_count():
    labels, _, types, masks, maps = dataset()
    inside = np.zeros(masks.shape[1:], bool)
    inside[:, 1:-1] = True
    found = metrics.pixel_metrics(labels, types, masks, maps, inside)

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        return masks[index], np.where(inside, maps[index], np.nan)

    expected = metrics.stream_pixels(labels, types, load)
    assert (found.whole, found.per_defect) == (expected.whole, expected.per_defect)
    assert found.whole != metrics.pixel_metrics(labels, types, masks, maps).whole


def test_contradictory_arguments_are_refused():
    labels, scores, types, masks, maps = dataset()
    with pytest.raises(ValueError, match="6 defect types for 7 images"):
        metrics.evaluate(labels, scores, types[:-1], masks, maps)
    masks[3, 0, 0] = True
    with pytest.raises(ValueError, match="image 3 is normal but its mask has defect pixels"):
        metrics.evaluate(labels, scores, types, masks, maps)


@pytest.mark.parametrize(
    ("preset", "file"),
    [
        ("nearest-256-crop224-seed42", "bottle_resnet18_nearest256_crop224.npz"),
        ("bilinear-256-nocrop-seed42", "bottle_resnet18_bilinear256.npz"),
    ],
)
def test_image_metrics_of_the_pytorch_scores(shared, preset, file):
    expected = json.loads((shared / "golden/bottle_resnet18.json").read_text())[preset]
    with np.load(shared / "golden" / file) as golden:
        labels = ~np.char.startswith(golden["image_names"], "test/good/")
        found = metrics.binary_metrics(labels, golden["image_scores"])
    # The reference is rounded to six decimals.
    assert found.auroc == pytest.approx(expected["image_auroc"], abs=5.1e-7)
    assert found.f1_max == pytest.approx(expected["image_f1_max"], abs=5.1e-7)
