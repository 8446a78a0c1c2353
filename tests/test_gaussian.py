"""Moments and their factorisation against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from padim_jax import gaussian
from padim_jax.types import Moments

ROUNDOFF = 2.0**-24  # of float32


def random_embeddings(images=24, patches=5, channels=6, mean=0.0, seed=0):
    """Correlated channels of standard deviation about 1, another Gaussian per patch."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(patches, channels, channels)) / np.sqrt(channels)
    centre = mean + rng.normal(size=(patches, channels))
    x = np.einsum("npi,pij->npj", rng.normal(size=(images, patches, channels)), mix) + centre
    return x.astype(np.float32)


def fit(x, sizes):
    """Moments of `x` taken in batches of the given sizes."""
    assert sum(sizes) == len(x)
    moments, start = gaussian.init(*x.shape[1:]), 0
    for size in sizes:
        batch = jnp.asarray(x[start : start + size])
        moments = gaussian.update(moments, batch, jnp.ones(size, bool))
        start += size
    return moments


def assert_moments(found, x, m2_rounding=None):
    """Checks moments against those that float64 gives for the same float32 numbers.

    A sum of n float32 terms is off by at most n roundoffs of the terms' absolute sum:
    n max|x| / n for a mean, and sqrt(m2_ii m2_jj) (Cauchy-Schwarz) for m2_ij. Twice that
    leaves room for the terms' own rounding and for merging.
    """
    rounding = 2 * len(x) * ROUNDOFF
    m2_rounding = m2_rounding or rounding
    x = x.astype(np.float64)
    mean = x.mean(axis=0)
    m2 = np.einsum("npi,npj->pij", x - mean, x - mean)
    spread = np.sqrt(np.einsum("pii->pi", m2))
    assert int(found.count) == len(x)
    assert np.all(np.abs(found.mean - mean) <= rounding * np.abs(x).max(axis=0))
    assert np.all(np.abs(found.m2 - m2) <= m2_rounding * spread[:, :, None] * spread[:, None])


def assert_same(a, b):
    for found, expected in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(found, expected)


SPLITS = {
    "one batch": [24],
    "equal batches": [8, 8, 8],
    "single images": [1] * 24,
    "ragged": [5, 1, 11, 7],
    "one left over": [23, 1],
}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS.keys())
def test_any_split_into_batches_gives_the_same_moments(sizes):
    x = random_embeddings()
    assert_moments(fit(x, sizes), x)


def test_order_of_images_does_not_matter():
    x = random_embeddings()
    shuffled = np.random.default_rng(1).permutation(x)
    assert_moments(fit(shuffled, [10, 10, 4]), x)


@pytest.mark.parametrize("first", [1, 7, 12, 23])
def test_merge_of_two_models_is_one_fit(first):
    x = random_embeddings()
    a, b = fit(x[:first], [first]), fit(x[first:], [24 - first])
    assert_moments(gaussian.merge(a, b), x)
    assert_moments(gaussian.merge(b, a), x)


def test_merging_with_no_images_changes_nothing():
    x = random_embeddings()
    moments, empty = fit(x, [24]), gaussian.init(*x.shape[1:])
    for merged in (gaussian.merge(moments, empty), gaussian.merge(empty, moments)):
        assert_same(merged, moments)
    assert_same(gaussian.merge(empty, empty), empty)


@pytest.mark.parametrize("valid", [[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]])
def test_padded_rows_count_nothing(valid):
    x = random_embeddings()
    valid = np.array(valid, bool)
    batch = np.where(valid[:, None, None], x[20:], np.float32(1e6))
    moments = gaussian.update(fit(x[:20], [20]), jnp.asarray(batch), jnp.asarray(valid))
    assert_moments(moments, np.concatenate([x[:20], x[20:][valid]]))


def test_batch_of_padding_alone_changes_nothing():
    x = random_embeddings()
    moments = fit(x, [24])
    padding = jnp.full((4, *x.shape[1:]), 1e6)
    updated = gaussian.update(moments, padding, jnp.zeros(4, bool))
    assert_same(updated, moments)


@pytest.mark.parametrize("sizes", [[100], [10] * 10, [1] * 100], ids=str)
def test_large_mean_does_not_cancel(sizes):
    # At a mean of 1000 standard deviations, E[xx] - E[x]E[x] is off by 1000^2 roundoffs,
    # 6 % of the variance, and more. Deviations from a rounded mean are off by 1000
    # roundoffs, 6e-5; measured at most 8e-5 in m2.
    x = random_embeddings(images=100, mean=1e3)
    assert_moments(fit(x, sizes), x, m2_rounding=3e-4)


def test_same_shapes_are_traced_once():
    # A carried type that changes (weak float, int64) would compile the loop twice.
    traces = 0

    @jax.jit
    def update(moments: Moments, embeddings, valid):
        nonlocal traces
        traces += 1
        return gaussian.update(moments, embeddings, valid)

    x = random_embeddings()
    moments = gaussian.init(*x.shape[1:])
    for start in range(0, 24, 8):
        moments = update(moments, jnp.asarray(x[start : start + 8]), jnp.ones(8, bool))
    assert traces == 1
    assert_moments(moments, x)


@pytest.mark.parametrize("regularization", [0.01, 1.0])
@pytest.mark.parametrize("images", [2, 10, 100], ids="{} images".format)
def test_whitening_inverts_the_regularized_covariance(images, regularization):
    # 20 channels: with 2 and 10 images only the regularization makes it invertible.
    x = random_embeddings(images=images, channels=20)
    fitted = gaussian.finalize(fit(x, [images]), regularization)
    assert np.all(np.triu(fitted.whitening, 1) == 0)
    for patch, whitening in enumerate(np.asarray(fitted.whitening, np.float64)):
        covariance = np.cov(x[:, patch].T.astype(np.float64)) + regularization * np.eye(20)
        # Cholesky's error, of the order of a roundoff of the largest eigenvalue, is
        # amplified by the inverse of the smallest; measured at most 0.4 of this product.
        rounding = ROUNDOFF * np.linalg.cond(covariance)
        found = whitening @ covariance @ whitening.T
        np.testing.assert_allclose(found, np.eye(20), rtol=0, atol=2 * rounding)


def test_finalize_keeps_the_mean():
    moments = fit(random_embeddings(), [24])
    np.testing.assert_array_equal(gaussian.finalize(moments, 0.01).mean, moments.mean)


@pytest.mark.parametrize("images", [0, 1])
def test_fewer_than_two_images_raise(images):
    x = random_embeddings()[:images]
    with pytest.raises(ValueError, match=rf"at least 2 images, the moments hold {images}"):
        gaussian.finalize(fit(x, [1] * images), 0.01)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [(np.nan, "not finite"), (np.inf, "not finite"), (-1.0, "not positive definite")],
)
def test_broken_covariance_raises_naming_the_patch(bad, problem):
    moments = fit(random_embeddings(), [24])
    broken = Moments(moments.count, moments.mean, moments.m2.at[3, 2, 2].set(bad))
    with pytest.raises(ValueError, match=rf"patch 3 (is|are) {problem}"):
        gaussian.finalize(broken, 0.01)


def test_regularization_lost_in_rounding_raises():
    # Three images, both channels of patch 1 alike: variances and covariance are exactly 1,
    # and 1 + 1e-9 is 1 in float32.
    x = random_embeddings(images=3, channels=2)
    x[:, 1] = np.array([[1], [0], [-1]])
    moments = fit(x, [3])
    with pytest.raises(ValueError, match=r"patch 1 .* raise the regularization \(1e-09\)"):
        gaussian.finalize(moments, 1e-9)
