"""Moments and their factorisation against float64 NumPy, patch by patch."""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import patchwise
import pytest
from fuzzing import examples
from hypothesis import strategies as st

from padim_jax.core import gaussian
from padim_jax.core.types import Gaussian, Moments
from padim_jax.detector import statistics as statistics_lib
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices

ROUNDOFF = 2.0**-24  # of float32

ALIKE = "three levels"  # where one pyramid says it all
on_all_pyramids = pytest.mark.parametrize("name", patchwise.KINDS)

update = jax.jit(gaussian.update)
merge = jax.jit(gaussian.merge)
remove = jax.jit(gaussian.remove)


class Images:
    """Embeddings of images on one of `patchwise.CASES`."""

    def __init__(self, name=ALIKE, images=24, mean=0.0, case=None):
        case = case or patchwise.CASES[name]
        self.pyramid = patchwise.lay(case)
        self.levels, self.embeddings = patchwise.random_levels(case, images, mean)

    def fit(self, sizes, order: slice | np.ndarray = slice(None)):
        """Moments of the images, taken in batches of the given sizes."""
        moments = gaussian.init(self.pyramid.shapes)
        for batch in patchwise.batches([x[..., order] for x in self.levels], sizes):
            moments = update(moments, *batch)
        return moments


def assert_moments(found, images, x=None, m2_rounding=None, few=False):
    """Checks moments against those that float64 gives for the same float32 numbers.

    A sum of n float32 terms is off by at most n roundoffs of the terms' absolute sum:
    n max|x| / n for a mean, and sqrt(m2_ii m2_jj) (Cauchy-Schwarz) for m2_ij. Twice that
    leaves room for the terms' own rounding and for merging.

    A few images may lie so close together that the mean's error e counts beside their
    deviations: of each product's sum it adds at most e sqrt(n) (sqrt(m2_ii) + sqrt(m2_jj))
    + n e^2.
    """
    x = (images.embeddings if x is None else x).astype(np.float64)
    rounding = 2 * len(x) * ROUNDOFF
    m2_rounding = m2_rounding or rounding
    mean = x.mean(axis=0)
    m2 = np.einsum("npi,npj->pij", x - mean, x - mean)
    spread = np.sqrt(np.einsum("pii->pi", m2))
    assert int(found.count) == len(x)
    off = np.abs(patchwise.vectors(found.mean, images.pyramid) - mean)
    assert np.all(off <= rounding * np.abs(x).max(axis=0))
    off = np.abs(patchwise.symmetric(found.m2, images.pyramid) - m2)
    bound = m2_rounding * spread[:, :, None] * spread[:, None]
    if few:
        error = np.sqrt(len(x)) * rounding * np.abs(x).max(axis=0)
        bound += (spread + error)[:, :, None] * (spread + error)[:, None]
        bound -= spread[:, :, None] * spread[:, None]
    assert np.all(off <= bound)


def assert_same(a, b):
    for found, expected in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(found, expected)


@on_all_pyramids
def test_moments_are_those_of_every_patch(name):
    images = Images(name)
    assert_moments(images.fit([8, 8, 8]), images)


SPLITS = {
    "one batch": [24],
    "single images": [1] * 24,
    "ragged": [5, 1, 11, 7],
}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS.keys())
def test_any_split_into_batches_gives_the_same_moments(sizes):
    images = Images()
    assert_moments(images.fit(sizes), images)


def test_order_of_images_does_not_matter():
    images = Images()
    order = np.random.default_rng(1).permutation(24)
    assert_moments(images.fit([8, 8, 8], order), images)


@pytest.mark.parametrize("first", [1, 12])
@pytest.mark.parametrize("name", [ALIKE, "no nested grids"])
def test_merge_of_two_models_is_one_fit(name, first):
    images = Images(name)
    a, b = (
        images.fit([8] * (n // 8) + [n % 8], part)
        for n, part in ((first, slice(first)), (24 - first, slice(first, None)))
    )
    assert_moments(merge(a, b), images)
    assert_moments(merge(b, a), images)


@examples(25)
@hypothesis.given(
    order=st.permutations(range(24)),
    valid=st.lists(st.booleans(), min_size=24, max_size=24),
    ends=st.lists(st.integers(0, 24), max_size=8).map(sorted),
    models=st.lists(st.integers(0, 9), min_size=9, max_size=9),
    mean=st.sampled_from([0.0, 3.0, -40.0]),
)
def test_any_images_split_into_any_batches_and_models(order, valid, ends, models, mean):
    """Batches of 0 to 24 images with padding anywhere, added to any of several models."""
    images = Images(mean=mean)
    order, valid = np.array(order), np.array(valid)
    parts = {}
    for batch, model in zip(np.split(np.arange(24), ends), models, strict=False):
        flags = np.zeros(24, bool)
        flags[batch] = valid[batch]  # all else is padding, which would be noticed
        levels = tuple(
            jnp.asarray(np.where(flags, x[..., order], np.float32(1e6))) for x in images.levels
        )
        moments = parts.get(model, gaussian.init(images.pyramid.shapes))
        parts[model] = update(moments, levels, jnp.asarray(flags))
    whole = functools.reduce(merge, parts.values())
    seen = order[valid]
    if len(seen):
        assert_moments(whole, images, images.embeddings[seen], few=True)
    else:
        assert not any(np.any(x) for x in jax.tree.leaves(whole))


@examples(25)
@hypothesis.given(
    order=st.permutations(range(24)),
    removed=st.integers(1, 22),
    mean=st.sampled_from([0.0, 3.0, -40.0]),
    defect=st.sampled_from([1.0, 30.0, 3000.0]),
    regularization=st.sampled_from([1e-2, 1e-8]),
)
def test_removal_is_a_fit_to_the_others(order, removed, mean, defect, regularization):
    """The largest error is below the estimate, with few and many, ordinary and odd images."""
    images, order = Images(mean=mean), np.array(order)
    factor = np.ones(24, np.float32)
    factor[order[:removed]] = defect
    images.embeddings = images.embeddings * factor[:, None, None]
    images.levels = [x * factor for x in images.levels]
    left, overall, own = remove(
        images.fit([8, 8, 8]), images.fit([removed], order[:removed]), regularization
    )
    x = images.embeddings[order[removed:]].astype(np.float64)
    assert int(left.count) == len(x)
    m2 = np.einsum("npi,npj->pij", x - x.mean(axis=0), x - x.mean(axis=0))
    variances = np.einsum("pii->pi", m2) + (len(x) - 1) * regularization
    off = np.abs(patchwise.symmetric(left.m2, images.pyramid) - m2)
    size = np.sqrt(variances)
    if np.max(own) < 0.1:
        assert np.max(off) <= np.max(overall) * np.max(variances)
        assert np.max(off / size[:, :, None] / size[:, None]) <= np.max(own)
    if defect == 1 and mean == 0 and removed < 12:
        assert np.max(overall) <= statistics_lib.MOST_LOST
        assert np.max(own) <= statistics_lib.MOST_LOST_EACH
    if defect == 3000:
        assert np.max(own) > statistics_lib.MOST_LOST_EACH


def test_merge_and_removal_are_inverses():
    images = Images()
    a, b = images.fit([8, 8], slice(16)), images.fit([8], slice(16, None))
    for whole in (merge(a, b), merge(b, a)):
        left, *_ = remove(whole, b, 0.01)
        assert_moments(left, images, images.embeddings[:16], m2_rounding=100 * ROUNDOFF)


def test_merging_with_no_images_changes_nothing():
    images = Images()
    moments, empty = images.fit([8, 8, 8]), gaussian.init(images.pyramid.shapes)
    for merged in (merge(moments, empty), merge(empty, moments)):
        assert_same(merged, moments)
    assert_same(merge(empty, empty), empty)


@pytest.mark.parametrize("valid", [[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0]])
def test_padded_rows_count_nothing(valid):
    images, valid = Images(), np.array(valid, bool)
    batch = tuple(
        jnp.asarray(np.where(valid, x[..., 20:], np.float32(1e6))) for x in images.levels
    )
    moments = update(images.fit([8, 8, 4]), batch, jnp.asarray(valid))
    seen = np.concatenate([np.ones(20, bool), valid])
    assert_moments(moments, images, images.embeddings[seen])


def test_batch_of_padding_alone_changes_nothing():
    images = Images()
    moments = images.fit([8, 8, 8])
    (padding,) = patchwise.batches(images.levels, [0])
    assert_same(update(moments, *padding), moments)


@pytest.mark.parametrize("sizes", [[100], [8] * 12 + [4], [1] * 100], ids=str)
def test_large_mean_does_not_cancel(sizes):
    # At a mean of 1000 standard deviations, E[xx] - E[x]E[x] is off by 1000^2 roundoffs,
    # 6 % of the variance, and more. Deviations from a rounded mean are off by 1000
    # roundoffs, 6e-5.
    images = Images(images=100, mean=1e3)
    assert_moments(images.fit(sizes), images, m2_rounding=3e-4)


def test_same_shapes_are_traced_once():
    # A carried type that changes (weak float, int64) would compile the loop twice.
    traces = 0

    @jax.jit
    def update(moments: Moments, levels, valid):
        nonlocal traces
        traces += 1
        return gaussian.update(moments, levels, valid)

    images = Images()
    moments = gaussian.init(images.pyramid.shapes)
    for batch in patchwise.batches(images.levels, [8, 8, 8]):
        moments = update(moments, *batch)
    assert traces == 1
    assert_moments(moments, images)


def factor_error(images, fitted, regularization):
    """How far L L^T is from the covariance that float64 gives, as a multiple of its bound.

    Cholesky's L L^T is off by d roundoffs of sqrt(c_ii c_jj) (Higham 2002, theorem 10.3).
    Blocks that come from an inverse, and the diagonal ones that are inverted back here,
    are off by another factor of L's condition number, the square root of C's.
    """
    x = images.embeddings.astype(np.float64)
    delta = x - x.mean(axis=0)
    channels = x.shape[-1]
    expected = np.einsum("npi,npj->pij", delta, delta) / (len(x) - 1)
    expected += regularization * np.eye(channels)
    factor = patchwise.factors(fitted.factor, images.pyramid)
    spread = np.sqrt(np.einsum("pii->pi", expected))
    condition = np.sqrt(np.linalg.cond(expected))[:, None, None]
    bound = 2 * channels * ROUNDOFF * condition * spread[:, :, None] * spread[:, None]
    # Of the moments, see above.
    bound += 2 * len(x) * ROUNDOFF * spread[:, :, None] * spread[:, None]
    return np.max(np.abs(factor @ factor.swapaxes(1, 2) - expected) / bound)


@on_all_pyramids
@pytest.mark.parametrize("images", [2, 5, 41], ids="{} images".format)
def test_factor_is_that_of_every_regularized_covariance(name, images):
    # With 2 and mostly with 5 images only the regularization makes them invertible.
    found = Images(name, images)
    fitted = patchwise.finalize(found.fit([8] * (images // 8) + [images % 8]), 0.01)
    error = factor_error(found, fitted, 0.01)
    assert error < 1
    assert isinstance(fitted, Gaussian)
    for i, (own, *_) in enumerate(fitted.factor):
        assert np.all(np.triu(own, 1) == 0), f"level {i} is not triangular"


@pytest.mark.parametrize("regularization", [1e-4, 1.0])
def test_regularization(regularization):
    found = Images("no nested grids", 5)
    fitted = patchwise.finalize(found.fit([5]), regularization)
    error = factor_error(found, fitted, regularization)
    assert error < 1


def test_many_regions_are_computed_in_several_blocks():
    # 24 x 20 regions of 16 patches; a block has room for 256 patches.
    case = [(96, 80, 2), (48, 40, 1), (24, 20, 2)], [4, 0, 2, 1, 3]
    images = Images(images=8, case=case)
    moments = images.fit([5, 3])
    assert_moments(moments, images)
    assert factor_error(images, patchwise.finalize(moments, 0.01), 0.01) < 1


def test_products_are_of_float32():
    # GPUs multiply in TF32, of a 10-bit mantissa, unless they are told not to.
    images = Images()
    moments = images.fit([8])
    (batch,) = patchwise.batches(images.levels, [8])
    found = patchwise.products(gaussian.update, moments, *batch)
    found += patchwise.products(gaussian.merge, moments, moments)
    found += patchwise.products(gaussian.finalize, moments, 0.01)
    assert len(found) >= 3
    assert all("HIGHEST, HIGHEST" in product for product in found)


def test_finalize_keeps_the_mean():
    moments = Images().fit([8, 8, 8])
    expected = [np.array(mean) for mean in moments.mean]
    assert_same(patchwise.finalize(moments, 0.01).mean, expected)


def finalize(moments, regularization, devices=1):
    """As it is called, on a number of devices."""
    return statistics_lib.finalize(parallel.split(moments, Devices(devices)), regularization)


@pytest.mark.parametrize("images", [0, 1])
def test_fewer_than_two_images_raise(images):
    moments = Images().fit([1] * images)
    with pytest.raises(ValueError, match=rf"at least 2 images, there are {images}"):
        finalize(moments, 0.01)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [(np.nan, "not finite"), (np.inf, "not finite"), (-1.0, "keeps 0%")],
)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_broken_covariance_raises_naming_the_region(bad, problem, level):
    moments = Images().fit([8, 8, 8])
    own, *cross = moments.m2[level]
    broken = list(moments.m2)
    broken[level] = (own.at[1, -1, 1, 1].set(bad), *cross)
    moments = Moments(moments.count, moments.mean, tuple(broken))
    for devices in (1, 8):
        with pytest.raises(ValueError, match=rf"region 1 are {problem}|{problem} .* region 1;"):
            finalize(moments, 0.01, devices)


def test_overflow_is_called_so():
    # Finite features, whose squares are not: no regularization would help.
    found = Images()
    found.levels[1][2, 0, 1] *= 1e25
    with pytest.raises(ValueError, match=r"region 2 are not finite.*overflow"):
        finalize(found.fit([8, 8, 8]), 0.01)


def test_broken_cross_covariance_raises():
    moments = Images().fit([8, 8, 8])
    own, coarser, coarsest = moments.m2[0]
    finest = (own, coarser, coarsest.at[3, 5, 0, 1].set(np.nan))
    with pytest.raises(ValueError, match="region 3 are not finite"):
        finalize(Moments(moments.count, moments.mean, (finest, *moments.m2[1:])), 0.01)


@pytest.mark.parametrize("levels", ["one level", "two levels"])
def test_regularization_lost_in_rounding_raises(levels):
    # Three images, both channels of region 1 alike: variances and covariance are exactly
    # 1, and 1 + 1e-9 is 1 in float32. Of one level or of two, the result is the same.
    alike = jnp.array([1.0, 0.0, -1.0])
    x = jax.random.normal(jax.random.key(0), (2, 1, 2, 3)).at[1].set(alike[None, None])
    data = (x,) if levels == "one level" else (x[:, :, :1], x[:, :, 1:])
    moments = gaussian.init([(2, 1, level.shape[2]) for level in data])
    moments = update(moments, data, jnp.ones(3, bool))
    problem = r"\(1e-09\) in region 1; .* raise the regularization to 1e-07"
    with pytest.raises(ValueError, match=problem):
        finalize(moments, 1e-9)


# A wide_resnet50_2 at 256 x 256 with 550 channels. Compiled only: nothing is computed.
LARGE = [(256, 16, 86), (256, 4, 170), (256, 1, 294)]


def memory_of(function, *arguments, **settings):
    """Bytes of what a function's first argument holds, of it reused, and in between."""
    compiled = jax.jit(function, donate_argnums=0, **settings).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arguments[0]))
    return held, memory.alias_size_in_bytes, memory.temp_size_in_bytes


def large_statistics():
    """(mean, m2) without values."""
    empty = jax.eval_shape(lambda: dataclasses.astuple(gaussian.init(LARGE)))
    return empty[1:]


def test_update_makes_no_second_copy(optimized):
    def update(statistics, *batch):
        moments = gaussian.update(Moments(jnp.array(32), *statistics), *batch)
        return moments.mean, moments.m2

    levels = tuple(jax.ShapeDtypeStruct((*shape, 32), jnp.float32) for shape in LARGE)
    valid = jax.ShapeDtypeStruct((32,), bool)
    held, reused, between = memory_of(update, large_statistics(), levels, valid)
    assert reused >= held
    assert between < held / 6
