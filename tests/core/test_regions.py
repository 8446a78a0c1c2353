"""Regions of drawn maps, against their definition pixel by pixel."""

import itertools
import math
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import ndimage

from padim_jax.core import calibration, regions
from padim_jax.core.regions import Frame, find, label, peak


def blank(*high: Any, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    found = np.ones(size, np.float32)
    for part in high:
        found[part] = 5
    return found


def smooth(seed: int, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=size)
    return ndimage.gaussian_filter(noise, 1.5).astype(np.float32)


class TestFind:
    def test_in_pixels_of_the_original(self):
        anomaly_map = blank(np.s_[2:5, 10:14])
        anomaly_map[3, 12] = 9
        (found,) = find(anomaly_map, 4.0, Frame((2.0, 3.0), (10.0, 100.0)))
        assert found.box == (130.0, 14.0, 142.0, 20.0)
        assert found.centroid == (136.0, 17.0)
        assert found.area == 12 * 6
        assert (found.peak, found.mean) == (9.0, pytest.approx((11 * 5 + 9) / 12))

    def test_strongest_first_and_corners_touch(self):
        anomaly_map = blank(np.s_[0:2, 0:2], np.s_[2:4, 2:4], np.s_[10:12, 10:12])
        anomaly_map[10, 10] = 6
        found = find(anomaly_map, 5.0)
        assert [x.box for x in found] == [(10, 10, 12, 12), (0, 0, 4, 4)]

    def test_a_pixel_at_the_threshold_is_inside(self):
        assert len(find(blank(np.s_[3, 3]), 5.0)) == 1
        assert find(blank(np.s_[3, 3]), float(np.nextafter(np.float32(5), np.float32(6)))) == ()

    def test_small_ones_do_not_count(self):
        anomaly_map = blank(np.s_[0:2, 0:2], np.s_[10:13, 10:13])
        frame = Frame((2.0, 2.0))
        assert [x.area for x in find(anomaly_map, 5.0, frame, 36.0)] == [36]
        assert find(anomaly_map, 5.0, frame, 36.5) == ()

    def test_gaps_are_closed_and_not_counted(self):
        anomaly_map = blank(np.s_[5:8, 5:8], np.s_[5:8, 11:14])  # three pixels between
        frame = Frame((2.0, 2.0))
        assert len(find(anomaly_map, 5.0, frame, 0.0, 5.0)) == 2
        (found,) = find(anomaly_map, 5.0, frame, 0.0, 6.0)
        assert (found.area, found.box, len(found.contour)) == (72, (10, 10, 28, 16), 2)

    @pytest.mark.parametrize("gap", range(1, 6))
    def test_gaps_of_at_most_close_are_closed(self, gap: int):
        """To within a pixel of the map."""
        anomaly_map = blank(np.s_[5:8, 5:8], np.s_[5:8, 8 + gap : 11 + gap])
        counts = [
            len(find(anomaly_map, 5.0, Frame(), 0.0, float(close)))
            for close in (gap - 1.1, gap)
        ]
        assert counts == [2, 1]

    @hypothesis.given(st.integers(0, 99), st.floats(-0.3, 0.3))
    @hypothesis.settings(deadline=None, max_examples=30)
    def test_contours_are_the_levels_around_the_pixels(self, seed: int, threshold: float):
        """Even-odd: a pixel's centre lies inside of a region's polygons if it belongs to it."""
        anomaly_map = smooth(seed)
        labels, count = label(anomaly_map, threshold)
        found = find(anomaly_map, threshold)
        assert len(found) == count
        inside = np.zeros(anomaly_map.shape, int)
        for region in found:
            for line in region.contour:
                assert line[0] == line[-1]
                left, top, right, bottom = region.box
                # Levels reach up to half a pixel beyond the pixels, never beyond the image.
                assert min(x for x, _ in line) >= max(left - 0.5, 0)
                assert max(x for x, _ in line) <= min(right + 0.5, 32)
                assert min(y for _, y in line) >= max(top - 0.5, 0)
                assert max(y for _, y in line) <= min(bottom + 0.5, 24)
            inside += even_odd(region.contour, anomaly_map.shape)
        np.testing.assert_array_equal(inside, labels > 0)


def even_odd(contour, shape: tuple[int, int]) -> np.ndarray:
    crossings = np.zeros(shape, int)
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    for line in contour:
        for (x0, y0), (x1, y1) in itertools.pairwise(line):
            if (y0 == y1) or (x0, y0) == (x1, y1):
                continue
            crosses = (np.minimum(y0, y1) <= y) & (y < np.maximum(y0, y1))
            crossings += crosses & (x0 + (y - y0) * (x1 - x0) / (y1 - y0) > x)
    return crossings % 2


class TestPeak:
    @hypothesis.given(
        st.integers(0, 99),
        st.sampled_from([0.0, 1.0, 7.0, 30.0, 200.0]),
        st.sampled_from([0.0, 2.0, 5.0]),
    )
    @hypothesis.settings(deadline=None, max_examples=40)
    def test_is_the_highest_threshold_with_a_region(
        self, seed: int, min_area: float, close: float
    ):
        anomaly_map, frame = smooth(seed), Frame((1.5, 0.7))
        found = peak(anomaly_map, frame, min_area, close)
        above = float(np.nextafter(np.float32(found), np.float32(np.inf)))
        assert find(anomaly_map, found, frame, min_area, close)
        assert not find(anomaly_map, above, frame, min_area, close)

    def test_of_a_region_larger_than_the_image(self):
        with pytest.raises(ValueError, match=r"801 pixels is larger than .* 600 pixels"):
            peak(blank(), Frame(), 801.0)


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Maps and their peaks."""
    maps = np.random.default_rng(7).gamma(2.0, size=(2000, 3, 4)).astype(np.float32)
    return maps, np.array([peak(x, Frame(), 3.0) for x in maps], np.float32)


class TestPromise:
    """At most the rate of normal images is called anomalous, however it is decided."""

    @pytest.mark.parametrize("decide", ["score", "regions", "either"])
    @pytest.mark.parametrize("rate", [0.05, 0.2])
    def test_on_drawn_maps(self, drawn: tuple, decide: str, rate: float):
        maps, peaks = drawn
        scores = maps.std(axis=(1, 2)).astype(np.float32)  # not the highest pixel
        rates = []
        for start in range(0, 1000, 100):
            known = np.s_[start : start + 99]
            part = (maps[known], scores[known, None], peaks[known])
            found = calibration.calibrate([part], 99, "held_out", rate, 0.0, None, decide)
            assert found.image_promised_rate <= rate + 1e-9
            high = scores[1000:] >= np.float32(found.image_threshold)
            # As `find` says on new maps.
            region = peaks[1000:] >= np.float32(found.pixel_threshold)
            rates.append(np.mean(calibration.decided(decide, high, region)))
        # Of 10 calibrations, each with a standard deviation of about sqrt(r (1 - r) / 100).
        error = 3 * math.sqrt(rate * (1 - rate) / 100 / 10)
        assert np.mean(rates) <= rate + error
        if decide != "either":  # which may promise more than it needs
            assert np.mean(rates) >= rate - 0.01 - error

    def test_either_shares_the_rate(self):
        maps = np.random.default_rng(0).gamma(2.0, size=(40, 4, 5)).astype(np.float32)
        part = (maps, maps.max(axis=(1, 2))[:, None], maps.max(axis=(1, 2)))
        found = calibration.calibrate([part], 40, "held_out", 0.0, 0.0, None, "either")
        assert found.image_rate == found.image_promised_rate == 2 / 41
        assert found.image_threshold > maps.max()
        assert "half of it" in calibration.text(found)


def test_a_box_on_the_map():
    frame = Frame((2.0, 3.0), (10.0, 100.0))
    assert frame.on_map((130.0, 14.0, 142.0, 20.0)) == (10.0, 2.0, 14.0, 5.0)
    assert regions.Frame().on_map((1.0, 2.0, 3.0, 4.0)) == (1.0, 2.0, 3.0, 4.0)
