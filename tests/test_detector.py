"""The stages put together: the right form, the paper's embeddings, no trace of padding."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import patchwise
import pytest

from padim_jax import defaults, detector, embedding, gaussian, low_rank, models
from padim_jax.config import Config, validate
from padim_jax.models import pretrained, resnet
from padim_jax.types import Gaussian, LowRank, Moments, Samples


def make_config(**model: Any) -> Config:
    values: Any = defaults.get_config()
    values.dataset.root = "/nowhere"
    values.image.resize = (75, 50)
    values.model.weights, values.model.channels = "random", 20
    values.model.update(model)
    return validate(values)


def random_images(count: int, config: Config, seed: int = 0) -> jax.Array:
    shape = (count, *config.image.size, 3)
    return jnp.asarray(np.random.default_rng(seed).integers(0, 256, shape), jnp.uint8)


def arguments(config: Config) -> dict[str, Any]:
    index = tuple(detector.channel_index(config.model).tolist())
    return {"image": config.image, "model": config.model, "index": index}


def variables_of(config: Config) -> Any:
    return pretrained.load(config.model.weights, config.model.backbone, config.model.layers)[0]


UPDATE: dict[str, Any] = {
    "moments": jax.jit(gaussian.update),
    "samples": jax.jit(low_rank.update),
}


def fitted_numbers(case: patchwise.Case, images: int, form: str) -> int:
    """How many numbers a fitted model really holds, means aside."""
    statistics = detector.init(patchwise.lay(case).shapes, images, form)
    levels, _ = patchwise.random_levels(case, images)
    for batch in patchwise.batches(levels, [images]):
        statistics = UPDATE[form](statistics, *batch)
    fitted = detector.finalize(statistics, 0.01)
    if isinstance(fitted, Gaussian):
        return sum(x.size for x in jax.tree.leaves(fitted.factor))
    return sum(x.size for x in jax.tree.leaves((fitted.deviations, fitted.root)))


@pytest.mark.parametrize(
    ("name", "images"),
    [("one level", 2), ("three levels", 3), ("three levels", 5), ("no nested grids", 4)],
)
def test_the_smaller_form_is_chosen(name: str, images: int):
    case = patchwise.CASES[name]
    shapes = patchwise.lay(case).shapes
    sizes = {form: fitted_numbers(case, images, form) for form in ("moments", "samples")}
    for form, size in sizes.items():
        assert detector.fitted_size(shapes, images, form) == size
    expected = Moments if sizes["moments"] <= sizes["samples"] else Samples
    assert isinstance(detector.init(shapes, images, "auto"), expected)


@pytest.mark.parametrize("name", patchwise.CASES)
def test_few_images_are_kept_and_many_summed_up(name: str):
    shapes = patchwise.lay(patchwise.CASES[name]).shapes
    forms = [type(detector.init(shapes, images, "auto")) for images in range(1, 30)]
    turn = forms.index(Moments)
    assert forms == [Samples] * turn + [Moments] * (29 - turn)
    # A factor has at most d^2 numbers a patch, samples at least s^2: never for s > d.
    assert turn <= sum(d for _, _, d in shapes)


def test_a_form_that_is_asked_for_is_taken():
    shapes = patchwise.lay(patchwise.CASES["three levels"]).shapes
    assert isinstance(detector.init(shapes, 2, "moments"), Moments)
    samples = detector.init(shapes, 1000, "samples")
    assert isinstance(samples, Samples)
    assert [x.shape[2] for x in samples.values] == [1000] * 3


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"layers": ("layer2", "layer4")},
        {"channels": 3},
        {"layers": ("layer3",)},
    ],
    ids=str,
)
def test_extracts_the_embeddings_of_the_backbones_features(model: dict):
    # 19 x 13, 10 x 7 and 5 x 4 patches: no side divides another.
    config = make_config(precision="float32", **model)
    variables, images = variables_of(config), random_images(2, config)
    given = arguments(config)
    index = given["index"]
    levels = detector.extract(variables, images, **given)
    pyramid = detector.pyramid(config.image, config.model, index)
    found = embedding.concatenate(levels, pyramid)
    mean, std = (np.asarray(x, np.float32) for x in (config.image.mean, config.image.std))
    pixels = (np.asarray(images, np.float32) / 255 - mean) / std
    spec = models.BACKBONES[config.model.backbone]
    backbone = resnet.ResNet(spec, config.model.layers, config.model.precision)
    features: Any = jax.jit(backbone.apply)(variables, jnp.asarray(pixels))
    expected = patchwise.embeddings([np.asarray(x) for x in features], list(index))
    # Convolutions fused otherwise; measured 8e-7 of the largest.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["moments", "samples"])
def test_fit_and_score_in_batches(form: str):
    """From pixels to scores, against float64 on the embeddings that `extract` gives."""
    config = make_config()
    variables, given = variables_of(config), arguments(config)
    shapes = detector.pyramid(config.image, config.model, given["index"]).shapes
    images = random_images(6, config)
    statistics = detector.init(shapes, 5, form)
    valid = jnp.array([True, True, True])
    first = detector.fit_batch(statistics, variables, images[:3], valid, **given)
    # The statistics' memory is the result's.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(statistics))
    whole = detector.fit_batch(first, variables, images[3:], valid.at[1].set(False), **given)
    fitted = detector.finalize(whole, config.model.regularization)
    assert isinstance(fitted, Gaussian if form == "moments" else LowRank)

    pyramid = detector.pyramid(config.image, config.model, given["index"])
    levels = detector.extract(variables, images, **given)
    x = np.asarray(embedding.concatenate(levels, pyramid))
    squared, _ = patchwise.distances(x[[0, 1, 2, 3, 5]], x, config.model.regularization)
    maps, scores = detector.score_batch(variables, fitted, images, map_=config.map, **given)
    expected = detector.scoring.anomaly_maps(
        jnp.asarray(np.sqrt(squared), jnp.float32),
        grid=detector.patch_grid(config.image, config.model.layers),
        size=config.image.size,
        upsample=config.map.upsample,
        sigma=config.map.sigma,
    )
    # Features of variance up to 10 beside an epsilon of 0.01: roundoffs are amplified by
    # 1000 and summed 20 times; measured 9e-6 (moments) and 3e-5 (samples).
    np.testing.assert_allclose(maps, expected, rtol=3e-4)
    np.testing.assert_array_equal(scores, maps.max(axis=(1, 2)))
    # The image that was marked as padding is not among those fitted.
    assert np.argmax(scores) == 4


def test_fingerprint_is_that_of_one_fit():
    shapes = patchwise.lay(patchwise.CASES["two levels"]).shapes
    levels, _ = patchwise.random_levels(patchwise.CASES["two levels"], 5)

    def fingerprint(images: int, form: str, **model: Any) -> str:
        config = make_config(**model)
        statistics = detector.init(shapes, images, form)
        for batch in patchwise.batches(levels, [images]):
            statistics = UPDATE[form](statistics, *batch)
        fitted = detector.finalize(statistics, 0.01)
        identity = pretrained.WeightsIdentity("a", "b")
        index = detector.channel_index(config.model)
        return detector.fingerprint(detector.Detector(config, index, {}, identity, fitted))

    for form in ("moments", "samples"):
        found = fingerprint(5, form)
        assert found == fingerprint(5, form)
        assert found != fingerprint(4, form)
        assert found != fingerprint(5, form, seed=1)
