"""Drift: the rate of false alarms, that it is found, and that nothing depends on the split."""

import dataclasses
from typing import Any

import hypothesis
import numpy as np
import pytest
from fuzzing import examples
from hypothesis import strategies as st
from scipy import stats

from padim_jax.core import drift
from padim_jax.core.calibration import Calibration, calibrate
from padim_jax.core.drift import IMAGES, RATE, WINDOW, State


def calibrated(scores: np.ndarray, rate: float, **named: Any) -> Calibration:
    maps, summaries = scores[:, None, None], scores[:, None]
    return calibrate([(maps, summaries)], len(scores), "given", rate, 0.0, **named)


def against(scores: np.ndarray, rate: float = 0.01) -> drift.Reference | None:
    return drift.reference(calibrated(scores, rate))


def drawn(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).gamma(9, 1, count).astype(np.float32)


@pytest.mark.parametrize(("images", "rate"), [(20, 0.1), (60, 0.01), (60, 0.1), (1000, 0.05)])
def test_no_alarm_on_normal_images(images: int, rate: float):
    """10,000 each of 40 calibrations: at a rate of 1 % there may be 2 (or, at 1 in 1e5, 4)."""
    alarms = 0
    for seed in range(40):
        compared = against(drawn(seed, images), rate)
        assert compared is not None
        _, course = drift.follow(compared, State(), drawn(1000 + seed, IMAGES))
        alarms += bool(course.drifted.any())
    assert alarms <= 4


@pytest.mark.parametrize("images", [60, 200])
@pytest.mark.parametrize("factor", [0.5, 1.8])
def test_a_change_is_found_within_200_images(images: int, factor: float):
    for seed in range(10):
        compared = against(drawn(seed, images))
        assert compared is not None
        before, after = np.split(drawn(1000 + seed, 400), 2)
        _, course = drift.follow(compared, State(), np.concatenate([before, factor * after]))
        assert not course.drifted[:200].any()
        assert course.drifted[200:].any()


def test_images_that_are_all_anomalous_are_found():
    """Their p-values take no part; that a third of the parts are bad is no drift."""
    compared = against(drawn(0, 60))
    assert compared is not None
    _, course = drift.follow(compared, State(), np.full(WINDOW, 1e9))
    assert np.isnan(course.means).all()
    assert course.drifted.tolist() == [False] * (WINDOW - 1) + [True]
    assert "100 of the last 100" in drift.text(compared, course.means[-1], course.high[-1])
    bad = np.where(np.arange(3000) % 3, drawn(1, 3000), 1e9)
    assert not drift.follow(compared, State(), bad)[1].drifted.any()


def test_bound_is_one():
    """Of the statistic of Mann and Whitney, against its exact distribution."""
    for count in (5, 17, 60):
        window = 25
        for distance in (0.1, 0.2, 0.3, 0.45):
            u = (0.5 - distance) * count * window
            # As many scores below as give the statistic.
            exact = 2 * exact_tail(count, window, int(np.floor(u)))
            bound = 2 * np.exp(-6 * distance**2 * count * window / (count + window + 1))
            assert exact <= bound


def exact_tail(count: int, window: int, most: int) -> float:
    """P(U <= most), by the recursion over which of both is the largest."""
    ways = {(0, j): np.ones(1) for j in range(window + 1)}
    for i in range(1, count + 1):
        ways[i, 0] = np.ones(1)
        for j in range(1, window + 1):
            sums = np.zeros(i * j + 1)
            sums[j:] += ways[i - 1, j]
            sums[: len(ways[i, j - 1])] += ways[i, j - 1]
            ways[i, j] = sums
    return ways[count, window][: most + 1].sum() / ways[count, window].sum()


@pytest.mark.parametrize(("total", "above"), [(20, 0), (60, 0), (200, 9)])
def test_most_is_the_exact_quantile(total: int, above: int):
    most = drift._most(total, above)

    def tail(fewest: int) -> float:
        top = fewest + above
        return float(stats.hypergeom.cdf(above, total + WINDOW, total, top))

    assert tail(most + 1) <= RATE / 2 / IMAGES
    assert most == WINDOW // 2 or tail(most) > RATE / 2 / IMAGES


def test_too_few_images():
    assert against(drawn(0, 12)) is None
    assert drift.reference(None) is None
    earlier = dataclasses.replace(calibrated(drawn(0, 60), 0.01), scores=())
    assert drift.reference(earlier) is None
    assert drift.reference(calibrated(drawn(0, 60), 0.1, groups=np.arange(60) // 2)) is None


@examples(25)
@hypothesis.given(
    ends=st.lists(st.integers(0, 500), max_size=6).map(sorted), rounded=st.booleans()
)
def test_any_split_gives_the_same(ends: list[int], rounded: bool):
    """With scores that are equal to those of the calibration, too."""
    digits = 0 if rounded else 7
    compared = against(np.round(drawn(0, 60), digits))
    assert compared is not None
    scores = np.round(np.concatenate([drawn(1, 250), 1.5 * drawn(2, 250)]), digits)
    state, course = drift.follow(compared, State(), scores)
    parts, now = [], State()
    for part in np.split(scores, ends):
        now, found = drift.follow(compared, now, part)
        parts.append(found)
    for name in ("means", "high", "drifted"):
        joined = np.concatenate([getattr(x, name) for x in parts])
        np.testing.assert_array_equal(joined, getattr(course, name))
    np.testing.assert_array_equal(now.ranks, state.ranks)
    low = scores[scores < compared.cut][-WINDOW:]
    reference = np.array(compared.scores)
    p = [np.mean(reference > x) + np.mean(reference == x) / 2 for x in low]
    assert course.means[-1] == pytest.approx(np.mean(p))
