"""Image scores against definitions in NumPy and SciPy, float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from padim_jax.core import combined_score, image_score, scoring

GRID, SIZE = (12, 9), (48, 36)
DISTANCES = np.random.default_rng(0).gamma(9, size=(5, GRID[0] * GRID[1])).astype(np.float32)
MAPS = np.asarray(scoring.anomaly_maps(jnp.asarray(DISTANCES), GRID, SIZE, "bilinear", 1.0))


def of(kind: str, maps: np.ndarray = MAPS, distances: np.ndarray = DISTANCES) -> np.ndarray:
    maps_, distances_ = jnp.asarray(maps), jnp.asarray(distances)
    return np.asarray(image_score.summaries(maps_, distances_, GRID, kind))


def blurred(grid: np.ndarray, sigma: float) -> np.ndarray:
    # "mirror" reflects without repeating the edge, as the anomaly map's blur.
    return ndimage.gaussian_filter(grid.astype(float), sigma, mode="mirror", truncate=4.0)


def test_max_is_the_maximum_also_below_0():
    maps = MAPS - 100
    np.testing.assert_array_equal(of("max", maps)[:, 0], maps.max(axis=(1, 2)))


def test_top_is_the_mean_of_the_highest_hundredth():
    count = round(0.01 * SIZE[0] * SIZE[1])  # 17 of 1,728
    expected = np.sort(MAPS.reshape(5, -1).astype(float))[:, -count:].mean(axis=1)
    np.testing.assert_allclose(of("top")[:, 0], expected, rtol=1e-6)
    # Of fewer than 100 pixels the highest one.
    few = jnp.asarray(MAPS[:, :9, :9])
    np.testing.assert_array_equal(image_score.top(few), few.max(axis=(1, 2)))


def test_band_is_the_deviation_between_two_blurs():
    grids = DISTANCES.reshape(5, *GRID)
    expected = [np.std(blurred(grid, 1.0) - blurred(grid, 10.0)) for grid in grids]
    # float32 sums of 108 terms, which the difference of the blurs amplifies by about 10.
    np.testing.assert_allclose(of("band")[:, 0], expected, rtol=1e-5)


def test_band_ignores_what_all_patches_have():
    np.testing.assert_allclose(of("band", distances=DISTANCES + 50), of("band"), rtol=1e-4)


def test_variation_is_the_mean_change_from_patch_to_patch():
    maps = MAPS.astype(float)
    expected = 4 * sum(np.abs(np.diff(maps, axis=a)).mean(axis=(1, 2)) for a in (1, 2))
    np.testing.assert_allclose(of("variation")[:, 0], expected, rtol=1e-5)
    # Of a slope of 1 a patch along one axis.
    slope = np.broadcast_to(np.arange(48)[None, :, None] / 4, (5, 48, 36)).astype(np.float32)
    np.testing.assert_allclose(of("variation", slope)[:, 0], 1, rtol=1e-6)


def test_combined_has_four_summaries():
    found = of("combined")
    maps = MAPS.astype(float)
    np.testing.assert_array_equal(found[:, 0], of("top")[:, 0])
    np.testing.assert_allclose(found[:, 1], maps.std(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(found[:, 2], of("variation")[:, 0])
    np.testing.assert_array_equal(found[:, 3], of("band")[:, 0])


def test_unknown_kind():
    with pytest.raises(
        ValueError, match="mean: expected max, top, band, variation or combined"
    ):
        of("mean")


def test_combine_adds_squares_of_what_exceeds_the_mean():
    summaries = np.array([[3, 0, 5, 1], [1, 1, 1, 1]], np.float32)
    found = combined_score.combine(summaries, np.ones(4), np.array([1.0, 1, 2, 1]))
    np.testing.assert_allclose(found, [np.sqrt(2**2 + (4 / 2) ** 2), 0])


def test_summaries_that_are_equal_in_all_normal_images():
    """Any more is far away, but finite."""
    summaries = np.array([[2.0, 0, 0, 0], [2.1, 0, 0, 0.1]], np.float32)
    found = combined_score.combine(summaries, np.array([2.0, 0, 0, 0]), np.zeros(4))
    assert found[0] == 0
    assert 1e3 < found[1] < np.inf


@given(st.integers(3, 12), st.integers(0, 2**32 - 1), st.booleans())
def test_normal_images_are_measured_by_the_others(count: int, seed: int, grouped: bool):
    rng = np.random.default_rng(seed)
    groups = np.arange(count)
    if grouped:
        groups = rng.permutation(np.r_[0, 1, 2, rng.integers(0, 4, 2 * count)])
    summaries = (10 + rng.gamma(4, size=(len(groups), 4))).astype(np.float32)
    found = combined_score.of_normal(summaries, groups if grouped else None)
    for i, group in enumerate(groups):
        others = summaries[groups != group].astype(float)
        expected = combined_score.combine(
            summaries[i : i + 1], others.mean(axis=0), others.std(axis=0, ddof=1)
        )
        # Squares of deviations of 1 to 5 in float64: no cancellation worth mentioning, but for
        # deviations that are nearly 0, where the quotient is large.
        np.testing.assert_allclose(found[i], expected[0], rtol=1e-4)


def test_scores_of_one_summary_are_the_summary():
    summaries = np.array([[3.0], [1.0], [2.0]], np.float32)
    np.testing.assert_array_equal(combined_score.of_normal(summaries), [3, 1, 2])


@pytest.mark.parametrize("kind", ["max", "top", "band", "variation", "combined"])
def test_region_of_interest_is_all_that_counts(kind: str):
    patches = np.zeros(GRID, bool)
    patches[2:9, 1:7] = True
    patches[4, 3] = False
    pixels = patches.repeat(4, 0).repeat(4, 1)
    pixels[8:10] = False  # half of a patch
    inside, maps = image_score.Inside(pixels, patches), np.where(pixels, MAPS, 0)
    found = image_score.summaries(jnp.asarray(maps), jnp.asarray(DISTANCES), GRID, kind, inside)
    values = MAPS[:, pixels].astype(float)
    highest = np.sort(values, axis=1)[:, -round(0.01 * np.count_nonzero(pixels)) :]
    grids = DISTANCES.reshape(5, *GRID)
    between = np.stack([blurred(grid, 1.0) - blurred(grid, 10.0) for grid in grids])
    changes = [
        np.abs(np.diff(MAPS.astype(float), axis=axis))[:, pairs].mean(axis=1)
        for axis, pairs in ((1, pixels[1:] & pixels[:-1]), (2, pixels[:, 1:] & pixels[:, :-1]))
    ]
    expected = {
        "max": values.max(axis=1),
        "top": highest.mean(axis=1),
        "band": between[:, patches].std(axis=1),
        "variation": 4 * sum(changes),
    }
    order = ("top", "deviation", "variation", "band") if kind == "combined" else (kind,)
    expected["deviation"] = values.std(axis=1)
    columns = np.stack([expected[name] for name in order], axis=1)
    np.testing.assert_allclose(found, columns, rtol=1e-5)
