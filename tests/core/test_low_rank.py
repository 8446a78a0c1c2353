"""The low-rank form against dense float64 covariances and against the moments."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import patchwise
import pytest
from fuzzing import examples
from hypothesis import strategies as st

from padim_jax.core import gaussian, low_rank, scoring
from padim_jax.core.types import Samples
from padim_jax.detector import statistics as statistics_lib
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices

ROUNDOFF = 2.0**-24  # of float32

ALIKE = "three levels"  # where one pyramid says it all: 9 channels, 4 regions

update = jax.jit(low_rank.update)


def fit(pyramid, levels, sizes):
    samples = low_rank.init(pyramid.shapes, sum(sizes))
    for batch in patchwise.batches(levels, sizes):
        samples = update(samples, *batch)
    return samples


def fit_moments(pyramid, levels):
    moments = gaussian.init(pyramid.shapes)
    valid = jnp.ones(levels[0].shape[-1], bool)
    return jax.jit(gaussian.update)(moments, tuple(map(jnp.asarray, levels)), valid)


def distances(fitted, levels, pyramid):
    found = jax.jit(scoring.mahalanobis)(fitted, tuple(map(jnp.asarray, levels)))
    return np.asarray(scoring.on_grid(found, pyramid.patches), np.float64)


def assert_distances(found, training, x, regularization):
    """Checks distances of the low-rank form against those that float64 gives.

    A squared distance is the difference of two numbers of at most |x - mean|^2 / epsilon,
    each a sum over d channels or s images, which is off by as many roundoffs or twice that.
    """
    expected, _ = patchwise.distances(training, x, regularization)
    mean = training.mean(axis=0)
    # The mean and what is subtracted from it are rounded as well.
    sizes = sum(np.linalg.norm(y, axis=-1) ** 2 for y in (x - mean, x, mean))
    terms = training.shape[-1] + len(training)
    bound = 2 * terms * ROUNDOFF * (sizes / regularization + expected)
    # Measured at most 0.6 of it.
    assert np.all(np.abs(found**2 - expected) <= bound)


@pytest.mark.parametrize(
    "name", [name for name in patchwise.KINDS if name not in ("one channel", "same grid")]
)
def test_distances_are_the_dense_ones(name):
    pyramid = patchwise.lay(patchwise.CASES[name])
    levels, training = patchwise.random_levels(patchwise.CASES[name], 5)
    others, x = patchwise.random_levels(patchwise.CASES[name], 7, seed=1)
    fitted = patchwise.finalize(fit(pyramid, levels, [2, 3]), 0.01)
    assert_distances(distances(fitted, others, pyramid), training, x, 0.01)


@pytest.mark.parametrize("images", [2, 30], ids="{} images".format)
def test_distances_are_those_of_the_moments(images):
    """Fewer images than channels and more: both forms are exact."""
    case = patchwise.CASES[ALIKE]
    pyramid = patchwise.lay(case)
    levels, training = patchwise.random_levels(case, images)
    others, x = patchwise.random_levels(case, 7, seed=1)
    samples = patchwise.finalize(fit(pyramid, levels, [images]), 0.01)
    moments = patchwise.finalize(fit_moments(pyramid, levels), 0.01)
    found, expected = (distances(form, others, pyramid) for form in (samples, moments))
    assert_distances(found, training, x, 0.01)
    # The moments' roundoffs are amplified by the covariance's condition number.
    dense, condition = patchwise.distances(training, x, 0.01)
    amplified = training.shape[-1] * ROUNDOFF * condition
    assert np.all(np.abs(expected**2 / dense - 1) <= amplified)
    # Roundoffs times a condition number of up to 2000; measured 2e-5.
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("regularization", [1e-4, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("images", [5, 30], ids="{} images".format)
def test_regularization(regularization, images):
    case = patchwise.CASES[ALIKE]
    pyramid = patchwise.lay(case)
    levels, training = patchwise.random_levels(case, images)
    others, x = patchwise.random_levels(case, 7, seed=1)
    fitted = patchwise.finalize(fit(pyramid, levels, [images]), regularization)
    assert_distances(distances(fitted, others, pyramid), training, x, regularization)


@pytest.mark.parametrize(("regularization", "scale"), [(0.01, 1), (1e-4, 1), (0.1, 100)])
def test_a_training_image(regularization, scale):
    """All but nothing is left of its deviation, which lies in the training images' span."""
    case = patchwise.CASES[ALIKE]
    pyramid = patchwise.lay(case)
    levels, training = patchwise.random_levels(case, 5)
    levels, training = [scale * x for x in levels], scale * training
    fitted = patchwise.finalize(fit(pyramid, levels, [5]), regularization)
    found = distances(fitted, levels, pyramid)
    assert_distances(found, training, training, regularization)


SPLITS = [[2, 2, 3], [1] * 7, [3, 0, 4], [7]]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_any_split_into_batches_keeps_every_image(sizes):
    pyramid = patchwise.lay(patchwise.CASES["two levels"])
    levels, _ = patchwise.random_levels(patchwise.CASES["two levels"], 7)
    samples = fit(pyramid, levels, sizes)
    assert int(samples.count) == 7
    for found, expected in zip(samples.values, levels, strict=True):
        np.testing.assert_array_equal(found, expected.swapaxes(2, 3))


@pytest.mark.parametrize("valid", [[1, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]], ids=str)
def test_padding_anywhere_counts_nothing(valid):
    pyramid = patchwise.lay(patchwise.CASES["two levels"])
    levels, _ = patchwise.random_levels(patchwise.CASES["two levels"], 6)
    valid = np.array(valid, bool)
    seen = np.concatenate([np.ones(2, bool), valid])
    batch = tuple(jnp.asarray(np.where(seen, x, np.float32(1e6))[..., 2:]) for x in levels)
    first = tuple(jnp.asarray(x[..., :2]) for x in levels)
    samples = low_rank.init(pyramid.shapes, int(seen.sum()))
    samples = update(samples, first, jnp.ones(2, bool))
    samples = update(samples, batch, jnp.asarray(valid))
    assert int(samples.count) == seen.sum()
    for found, expected in zip(samples.values, levels, strict=True):
        np.testing.assert_array_equal(found, expected[..., seen].swapaxes(2, 3))


def test_merge_of_two_models_is_one_fit():
    pyramid = patchwise.lay(patchwise.CASES["two levels"])
    levels, _ = patchwise.random_levels(patchwise.CASES["two levels"], 7)
    a, b = (
        fit(pyramid, [x[..., part] for x in levels], [n])
        for part, n in ((slice(3), 3), (slice(3, None), 4))
    )
    merged, whole = low_rank.merge(a, b), fit(pyramid, levels, [7])
    assert int(merged.count) == 7
    for found, expected in zip(merged.values, whole.values, strict=True):
        np.testing.assert_array_equal(found, expected)


@examples(20)
@hypothesis.given(
    room=st.sampled_from([0, 3, 8, 13]),
    valid=st.lists(st.booleans(), min_size=8, max_size=8),
    ends=st.lists(st.integers(0, 8), max_size=4).map(sorted),
    models=st.lists(st.integers(0, 5), min_size=5, max_size=5),
    bad=st.sampled_from([1e6, np.nan]),
)
def test_any_images_split_into_any_batches_and_models(room, valid, ends, models, bad):
    """Batches of 0 to 8 images with padding anywhere, added to any of several models.

    Every model begins with room for some, and gets more as it grows; the result has its
    images in the models' order, each bit for bit.
    """
    case = patchwise.CASES["two levels"]
    pyramid = patchwise.lay(case)
    levels, _ = patchwise.random_levels(case, 8)
    valid = np.array(valid)
    parts, seen = {}, {}
    for batch, model in zip(np.split(np.arange(8), ends), models, strict=False):
        flags = np.zeros(8, bool)
        flags[batch] = valid[batch]
        padded = tuple(jnp.asarray(np.where(flags, x, np.float32(bad))) for x in levels)
        samples = parts.get(model, low_rank.init(pyramid.shapes, room))
        there = seen.setdefault(model, [])
        there += np.flatnonzero(flags).tolist()
        if samples.values[0].shape[2] < len(there):
            samples = low_rank.resize(samples, 13)
        parts[model] = update(samples, padded, jnp.asarray(flags))
    full = [low_rank.resize(parts[model], len(seen[model])) for model in parts]
    whole = functools.reduce(low_rank.merge, full)
    order = [number for model in parts for number in seen[model]]
    assert int(whole.count) == len(order)
    for found, expected in zip(whole.values, levels, strict=True):
        np.testing.assert_array_equal(found, expected[..., order].swapaxes(2, 3))


def test_levels_are_the_images_as_they_came():
    pyramid = patchwise.lay(patchwise.CASES[ALIKE])
    levels, _ = patchwise.random_levels(patchwise.CASES[ALIKE], 7)
    found, valid = low_rank.levels(fit(pyramid, levels, [4, 3]))
    np.testing.assert_array_equal(valid, np.ones(7, bool))
    for x, expected in zip(found, levels, strict=True):
        np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize(("there", "room"), [(0, 5), (3, 5), (5, 5)])
def test_levels_of_samples_that_are_not_full(there, room):
    """As moments they are those of the images that are there, whatever else the rows hold."""
    pyramid = patchwise.lay(patchwise.CASES[ALIKE])
    levels, _ = patchwise.random_levels(patchwise.CASES[ALIKE], room)
    samples = fit(pyramid, levels, [room])
    samples = Samples(jnp.array(there), samples.values)
    found, valid = low_rank.levels(samples)
    np.testing.assert_array_equal(valid, np.arange(room) < there)
    moments = jax.jit(gaussian.update)(gaussian.init(pyramid.shapes), found, valid)
    expected = fit_moments(pyramid, [x[..., :there] for x in levels])
    assert int(moments.count) == there
    for x, y in zip(*map(jax.tree.leaves, (moments, expected)), strict=True):
        # The same terms and as many zeros: measured 5e-8 of the largest.
        np.testing.assert_allclose(
            x, y, rtol=0, atol=room * ROUNDOFF * np.abs(y).max(initial=0)
        )


@pytest.mark.parametrize("room", [3, 7])
def test_resize_makes_room_for_more_images(room):
    """Half way through a fit or after it, and what is there stays."""
    pyramid = patchwise.lay(patchwise.CASES["two levels"])
    levels, _ = patchwise.random_levels(patchwise.CASES["two levels"], 7)
    first, rest = [x[..., :3] for x in levels], [x[..., 3:room] for x in levels]
    samples = low_rank.resize(fit(pyramid, first, [3]), room)
    assert int(samples.count) == 3
    assert all(not np.any(x[:, :, 3:]) for x in samples.values)
    for batch in patchwise.batches(rest, [room - 3]):
        samples = update(samples, *batch)
    assert_same(samples, fit(pyramid, [x[..., :room] for x in levels], [room]))


def test_resize_takes_back_room_that_is_not_used():
    pyramid = patchwise.lay(patchwise.CASES["two levels"])
    levels, _ = patchwise.random_levels(patchwise.CASES["two levels"], 3)
    samples = fit(pyramid, levels, [3])
    assert_same(low_rank.resize(low_rank.resize(samples, 9), 3), samples)


def assert_same(found, expected):
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_same_shapes_are_traced_once():
    traces = 0

    @jax.jit
    def update(samples: Samples, levels, valid):
        nonlocal traces
        traces += 1
        return low_rank.update(samples, levels, valid)

    pyramid = patchwise.lay(patchwise.CASES["two levels"])
    levels, _ = patchwise.random_levels(patchwise.CASES["two levels"], 7)
    samples = low_rank.init(pyramid.shapes, 7)
    for batch in patchwise.batches(levels, [3, 3, 1]):
        samples = update(samples, *batch)
    assert traces == 1


def test_many_regions_are_computed_in_several_blocks():
    # 12 x 10 regions of 16 patches; a block has room for 64 patches.
    case = [(48, 40, 2), (24, 20, 1), (12, 10, 2)], [4, 0, 2, 1, 3]
    pyramid = patchwise.lay(case)
    levels, training = patchwise.random_levels(case, 4)
    others, x = patchwise.random_levels(case, 2, seed=1)
    fitted = patchwise.finalize(fit(pyramid, levels, [4]), 0.01)
    assert_distances(distances(fitted, others, pyramid), training, x, 0.01)
    mean = patchwise.vectors(fitted.mean, pyramid)
    # Four terms are off by four roundoffs of the largest.
    off = np.abs(mean - training.astype(np.float64).mean(axis=0))
    assert np.all(off <= 4 * ROUNDOFF * np.abs(training).max(axis=0))


def test_products_are_of_float32():
    found = patchwise.products(low_rank.finalize, samples_of(), 0.01)
    assert found
    assert all("HIGHEST, HIGHEST" in product for product in found)


def samples_of(images=5):
    pyramid = patchwise.lay(patchwise.CASES[ALIKE])
    levels, _ = patchwise.random_levels(patchwise.CASES[ALIKE], images)
    return fit(pyramid, levels, [images])


def finalize(samples, regularization, devices=1):
    """As it is called, on a number of devices."""
    return statistics_lib.finalize(parallel.split(samples, Devices(devices)), regularization)


@pytest.mark.parametrize("images", [0, 1])
def test_fewer_than_two_images_raise(images):
    shapes = patchwise.lay(patchwise.CASES[ALIKE]).shapes
    samples = statistics_lib.init(shapes, images, "samples", Devices(1))
    if images:
        samples = parallel.split(samples_of(1), Devices(1))
    with pytest.raises(ValueError, match=rf"at least 2 images, there are {images}"):
        statistics_lib.finalize(samples, 0.01)


@pytest.mark.parametrize("images", [4, 6])
def test_room_for_other_than_all_images_raises(images):
    pyramid = patchwise.lay(patchwise.CASES[ALIKE])
    levels, _ = patchwise.random_levels(patchwise.CASES[ALIKE], images)
    samples = low_rank.init(pyramid.shapes, 5)
    for batch in patchwise.batches(levels, [images]):
        samples = update(samples, *batch)
    with pytest.raises(ValueError, match=rf"room for 5 images, of which {images} are there"):
        finalize(samples, 0.01)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e25], ids=str)
@pytest.mark.parametrize("level", [0, 1, 2])
def test_not_finite_embeddings_raise_naming_the_region(bad, level):
    # 1e25 is finite, but its square is not: no regularization would help.
    samples = samples_of()
    values = list(samples.values)
    values[level] = values[level].at[1, -1, 3, 0].set(bad)
    for devices in (1, 8):
        with pytest.raises(ValueError, match=r"region 1 are not finite.*overflow"):
            finalize(Samples(samples.count, tuple(values)), 0.01, devices)


def test_regularization_lost_in_rounding_raises():
    # Four images of one channel, with deviations of 3, 1, -1 and -3 in region 1: two of the
    # kernel's directions have nothing but what is added, which is lost beside 20.
    x = jnp.array([1e-6, 1.0]).reshape(2, 1, 1, 1)
    x *= jnp.array([6.0, 4.0, 2.0, 0.0]).reshape(1, 1, 4, 1)
    with pytest.raises(ValueError, match=r"\(1e-09\) in region 1; .* raise the regularization"):
        finalize(Samples(jnp.array(4), (x,)), 1e-9)
