"""Intervals, the place of a defect, and the test that thresholds transfer."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from padim_jax.core import verdicts


class TestInterval:
    @pytest.mark.parametrize(
        ("count", "total", "low", "high"),
        [
            # Of R's binom.test and the closed forms 1 - (a/2)^(1/n) for no success.
            (0, 12, 0.0, 1 - 0.025 ** (1 / 12)),
            (12, 12, 0.025 ** (1 / 12), 1.0),
            (1, 20, 0.001265089, 0.2487328),
        ],
    )
    def test_known_values(self, count: int, total: int, low: float, high: float):
        assert verdicts.interval(count, total) == pytest.approx((low, high), abs=1e-6)

    def test_limits_leave_half_of_the_rest_in_each_tail(self):
        low, high = verdicts.interval(60, 63)
        tail = sum(math.comb(63, k) * low**k * (1 - low) ** (63 - k) for k in range(60, 64))
        assert tail == pytest.approx(0.025)
        tail = sum(math.comb(63, k) * high**k * (1 - high) ** (63 - k) for k in range(61))
        assert tail == pytest.approx(0.025)

    @pytest.mark.parametrize("total", [0, 1, 7, 63])
    def test_all_upper_limits_at_once(self, total: int):
        high = verdicts.upper_limits(total)
        limits = [verdicts.interval(count, total) for count in range(total + 1)]
        np.testing.assert_allclose(high, [limit for _, limit in limits], rtol=1e-12)
        np.testing.assert_allclose(1 - high[::-1], [low for low, _ in limits], atol=1e-12)

    def test_no_trial_says_nothing(self):
        assert verdicts.interval(0, 0) == (0.0, 1.0)

    @settings(deadline=None, max_examples=40)
    @given(st.integers(1, 60), st.floats(0.01, 0.99))
    def test_covers_at_least_as_often_as_it_says(self, total: int, rate: float):
        covered = 0.0
        for count in range(total + 1):
            low, high = verdicts.interval(count, total)
            if low <= rate <= high:
                covered += math.comb(total, count) * rate**count * (1 - rate) ** (total - count)
        assert covered >= 0.95 - 1e-9

    def test_refuses_more_than_all(self):
        with pytest.raises(ValueError, match="13 of 12"):
            verdicts.interval(13, 12)


class TestInPlace:
    def map_with(self, *blobs: tuple[int, int, int, float]) -> np.ndarray:
        """A map of zeros with squares: top, left, side, value."""
        found = np.zeros((32, 32), np.float32)
        for top, left, side, value in blobs:
            found[top : top + side, left : left + side] = value
        return found

    def mask(self, top: int, left: int, side: int = 4) -> np.ndarray:
        return self.map_with((top, left, side, 1.0)) > 0

    def test_peak_on_the_defect(self):
        assert verdicts.in_place(
            self.map_with((8, 8, 4, 9.0)), self.mask(8, 8), 5.0, (4.0, 4.0)
        )

    def test_peak_within_a_patch_of_the_defect(self):
        anomaly_map, mask = self.map_with((8, 16, 1, 3.0)), self.mask(8, 8)  # ends at column 11
        assert verdicts.in_place(anomaly_map, mask, 5.0, (4.0, 5.0))
        assert not verdicts.in_place(anomaly_map, mask, 5.0, (4.0, 4.0))

    def test_region_of_the_peak_reaches_the_defect(self):
        anomaly_map = self.map_with((8, 8, 20, 6.0), (27, 27, 1, 9.0))
        assert verdicts.in_place(anomaly_map, self.mask(8, 8), 5.0, (2.0, 2.0))

    def test_another_region_on_the_defect_is_not_the_strongest(self):
        anomaly_map = self.map_with((8, 8, 4, 6.0), (27, 27, 2, 9.0))
        assert not verdicts.in_place(anomaly_map, self.mask(8, 8), 5.0, (2.0, 2.0))

    def test_corners_connect(self):
        anomaly_map = self.map_with((8, 8, 4, 6.0), (12, 12, 8, 7.0))
        assert verdicts.in_place(anomaly_map, self.mask(6, 6), 5.0, (1.0, 1.0))

    def test_empty_mask(self):
        with pytest.raises(ValueError, match="no defect pixel"):
            verdicts.in_place(self.map_with(), np.zeros((32, 32), bool), 5.0, (4.0, 4.0))


class TestTransfer:
    def test_alike_is_rejected_as_often_as_the_level_says(self):
        rng = np.random.default_rng(0)
        rejected = 0
        for _ in range(2000):
            normal, test = rng.gumbel(size=60), rng.gumbel(size=25)
            comparison = verdicts.transfer(normal, test)
            assert comparison is not None
            rejected += comparison.unlike
        # 20 are expected at 1 %; binomial, so that 5 standard deviations are 22.
        assert rejected <= 42

    def test_drift(self):
        rng = np.random.default_rng(1)
        comparison = verdicts.transfer(rng.gumbel(size=200), rng.gumbel(size=100) + 1.5)
        assert comparison is not None
        assert comparison.unlike
        assert comparison.higher > 0.75

    def test_lower_is_unlike_as_well(self):
        rng = np.random.default_rng(2)
        comparison = verdicts.transfer(rng.gumbel(size=200), rng.gumbel(size=100) - 1.5)
        assert comparison is not None
        assert comparison.unlike
        assert comparison.higher < 0.25

    def test_equal_scores_are_alike(self):
        comparison = verdicts.transfer(np.ones(20), np.ones(30))
        assert comparison == verdicts.Transfer(30, 0.5, 1.0)

    def test_too_few(self):
        assert verdicts.transfer(np.arange(7.0), np.arange(50.0)) is None


def test_share_in_words():
    found = verdicts.share(np.array([True, False, False]))
    assert (found["count"], found["total"]) == (1, 3)
    assert verdicts.share_text(found) == "1 of 3 (1 to 91 %)"
    assert verdicts.share_text(verdicts.share(np.zeros(0, bool))) == "-"
