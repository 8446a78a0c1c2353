"""Projections: orthonormal, uniform, and the components that plain float64 finds."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import patchwise
import pytest
from fuzzing import examples
from hypothesis import strategies as st

from padim_jax.core import reduction
from padim_jax.core.reduction import Scatter

NESTED = [(8, 12, 5), (4, 6, 7), (2, 3, 9)]
# A cell of the second stage lies in two of the third.
NOT_NESTED = [(13, 10, 3), (7, 5, 4), (4, 3, 5)]


@pytest.mark.parametrize(("total", "channels"), [(448, 100), (21, 21), (9, 1)])
def test_columns_are_orthonormal(total: int, channels: int):
    found = reduction.semi_orthogonal(total, channels, seed=3)
    assert found.shape == (total, channels)
    assert found.dtype == np.float32
    # Rounded to float32: as many terms as rows, of roundoffs of the columns' length 1.
    off = found.T.astype(np.float64) @ found - np.eye(channels)
    assert np.abs(off).max() < 2.0**-24 * 2


def test_a_seed_is_one_matrix():
    # A few entries, for the same matrix everywhere; NumPy 2.4, PCG64.
    found = reduction.semi_orthogonal(4, 2, seed=0)
    np.testing.assert_array_equal(found, reduction.semi_orthogonal(4, 2, seed=0))
    assert np.abs(found - reduction.semi_orthogonal(4, 2, seed=1)).max() > 0.1
    gaussian = np.random.default_rng(0).standard_normal((4, 2))
    first = gaussian[:, 0] / np.linalg.norm(gaussian[:, 0])  # Gram and Schmidt's
    second = gaussian[:, 1] - first * (first @ gaussian[:, 1])
    expected = np.stack([first, second / np.linalg.norm(second)], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_no_direction_is_preferred():
    # LAPACK's signs alone would make every first entry negative.
    found = np.stack([reduction.semi_orthogonal(3, 2, seed) for seed in range(400)])
    # An entry has mean 0 and variance 1/3; of 400 the mean is off by 0.03 or so.
    assert np.abs(found.mean(axis=0)).max() < 0.1
    np.testing.assert_allclose(found.var(axis=0), 1 / 3, atol=0.06)


def embeddings(features: list[np.ndarray], upsample: str) -> np.ndarray:
    """(b p, c) float64"""
    found = patchwise.whole(features, upsample=upsample)
    return found.reshape(-1, found.shape[-1])


@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@pytest.mark.parametrize("shapes", [NESTED, NOT_NESTED], ids=["nested", "not nested"])
def test_scatter_is_that_of_all_patches(shapes: list, upsample: str):
    features = patchwise.random_features(shapes, 5, mean=3.0)
    padded = [np.concatenate([x, np.full_like(x[:1], np.nan)]) for x in features]
    scatter = jax.jit(reduction.scatter, static_argnums=2)
    found = reduction.empty(sum(c for _, _, c in shapes))
    # Batches of 2, 1 and 2 images, with padding that would be noticed.
    for chosen in ([0, 1, 5], [5, 2, 5], [5, 3, 4]):
        valid = np.array(chosen) < 5
        mean, m2 = scatter([jnp.asarray(x[chosen]) for x in padded], valid, upsample)
        own = Scatter(int(valid.sum()), np.asarray(mean, float), np.asarray(m2, float))
        found = reduction.merge(found, own)
    x = embeddings(features, upsample)
    assert found.count == 5
    expected = 5 * np.cov(x.T, bias=True)
    # Sums in float32, of which the largest has 40 or so roundoffs at most; measured 2e-7.
    np.testing.assert_allclose(found.mean, x.mean(axis=0), atol=2e-6 * np.abs(x).max())
    np.testing.assert_allclose(found.m2, expected, atol=2e-6 * np.abs(expected).max())


@examples(50)
@hypothesis.given(
    images=st.integers(0, 9),
    ends=st.lists(st.integers(0, 9), max_size=5).map(sorted),
    halves=st.booleans(),
    mean=st.sampled_from([0.0, 1.0, -1e3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_merge_is_that_of_all_images(
    images: int, ends: list, halves: bool, mean: float, seed: int
):
    """Of any parts, also of none, one after the other or the ones of two halves first."""
    x = np.random.default_rng(seed).normal(mean, 1, (images, 4, 3))  # images, patches, channels
    parts = [scatter_of(part) for part in np.split(x, ends)]
    middle = len(parts) // 2 if halves else 0
    first, second = (
        functools.reduce(reduction.merge, some, reduction.empty(3))
        for some in (parts[:middle], parts[middle:])
    )
    found, expected = reduction.merge(first, second), scatter_of(x)
    assert found.count == images
    # float64: sums of few terms, of which the mean takes part in those of merging.
    size = np.abs(x).max(initial=1)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=0, atol=1e-14 * size)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=0, atol=1e-13 * size)


def scatter_of(x: np.ndarray) -> Scatter:
    """Of embeddings (images, patches, channels), as defined."""
    if not len(x):
        return reduction.empty(x.shape[-1])
    mean = x.mean(axis=(0, 1))
    return Scatter(len(x), mean, np.einsum("npi,npj->ij", x - mean, x - mean) / x.shape[1])


def test_components_are_the_leading_ones():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    scatter = Scatter(9, np.zeros(6), basis @ np.diag([1.0, 9, 0, 4, 25, 16]) @ basis.T)
    found = reduction.components(scatter, 3)
    expected = basis[:, [4, 5, 1]]
    np.testing.assert_allclose(np.abs(found.T @ expected), np.eye(3), atol=1e-6)
    # One sign, whatever LAPACK's is.
    assert all(column[np.argmax(np.abs(column))] > 0 for column in found.T)


def test_features_that_overflow_have_no_components():
    broken = Scatter(3, np.zeros(2), np.array([[1.0, np.nan], [np.nan, 1.0]]))
    with pytest.raises(ValueError, match="not finite"):
        reduction.components(broken, 1)


def test_products_are_of_float32():
    features = [jnp.asarray(x) for x in patchwise.random_features(NESTED, 2)]

    def scatter(features: list) -> tuple:
        return reduction.scatter(features, jnp.ones(2, bool), "bilinear")

    found = patchwise.products(scatter, features)
    assert found
    assert all("HIGHEST, HIGHEST" in product for product in found)
