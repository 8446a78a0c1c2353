"""The stages put together: the right form, the paper's embeddings, no trace of padding."""

import dataclasses
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import patchwise
import pytest
from fuzzing import examples
from hypothesis import strategies as st

from padim_jax.config import backbones, defaults
from padim_jax.config.settings import Config, validate
from padim_jax.core import embedding, gaussian, low_rank, scoring
from padim_jax.core.types import Gaussian, LowRank, Moments, Samples
from padim_jax.detector import detector, geometry, steps
from padim_jax.detector import statistics as statistics_lib
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.models import resnet
from padim_jax.models.weights import pretrained
from padim_jax.models.weights.identity import WeightsIdentity


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
    index = tuple(geometry.channel_index(config.model).tolist())
    return {"image": config.image, "model": config.model, "index": index}


def variables_of(config: Config) -> Any:
    return pretrained.load(config.model.weights, config.model.backbone, config.model.layers)[0]


ONE = Devices(1)


def statistics_of(
    case: patchwise.Case,
    form: str,
    chosen: slice = slice(None),
    of: int = 8,
    room: int | None = None,
    devices: int = 1,
) -> Moments | Samples:
    """Statistics of some of the same random images, on a number of devices."""
    levels, _ = patchwise.random_levels(case, of)
    levels = [x[..., chosen] for x in levels]
    images, shapes = levels[0].shape[-1], patchwise.lay(case).shapes
    batches = list(patchwise.batches(levels, [images]))
    if form == "moments":
        moments = jax.jit(gaussian.update)(gaussian.init(shapes), *batches[0])
        return parallel.split(moments, Devices(devices))
    samples = jax.jit(low_rank.update)(low_rank.init(shapes, room or images), *batches[0])
    return parallel.split(samples, Devices(devices))


def whole(statistics: Moments | Samples, case: patchwise.Case) -> Moments | Samples:
    """Of all devices together."""
    leaves, structure = jax.tree.flatten(statistics)
    joined = parallel.join(leaves, patchwise.lay(case).shapes[0][0])
    return structure.unflatten(map(jnp.asarray, joined))


def fitted_numbers(case: patchwise.Case, images: int, form: str) -> int:
    """How many numbers a fitted model really holds, means aside."""
    shapes = patchwise.lay(case).shapes

    def leaves() -> list[jax.Array]:
        if form == "moments":
            return jax.tree.leaves(gaussian.finalize(gaussian.init(shapes), 0.01)[0].factor)
        fitted, *_ = low_rank.finalize(low_rank.init(shapes, images), 0.01)
        return jax.tree.leaves((fitted.deviations, fitted.root))

    return sum(x.size for x in jax.eval_shape(leaves))


@pytest.mark.parametrize(
    ("name", "images"),
    [("one level", 2), ("three levels", 3), ("three levels", 5), ("no nested grids", 4)],
)
def test_the_smaller_form_is_chosen(name: str, images: int):
    case = patchwise.CASES[name]
    shapes = patchwise.lay(case).shapes
    sizes = {form: fitted_numbers(case, images, form) for form in ("moments", "samples")}
    for form, size in sizes.items():
        assert statistics_lib.fitted_size(shapes, images, form) == size
    expected = Moments if sizes["moments"] <= sizes["samples"] else Samples
    assert isinstance(statistics_lib.init(shapes, images, "auto", ONE), expected)


@pytest.mark.parametrize("name", ["one level", "three levels", "no nested grids"])
def test_few_images_are_kept_and_many_summed_up(name: str):
    shapes = patchwise.lay(patchwise.CASES[name]).shapes
    forms = [type(statistics_lib.init(shapes, images, "auto", ONE)) for images in range(1, 30)]
    turn = forms.index(Moments)
    assert forms == [Samples] * turn + [Moments] * (29 - turn)
    # A factor has at most d^2 numbers a patch, samples at least s^2: never for s > d.
    assert turn <= sum(d for _, _, d in shapes)


def test_a_form_that_is_asked_for_is_taken():
    shapes = patchwise.lay(patchwise.CASES["three levels"]).shapes
    assert isinstance(statistics_lib.init(shapes, 2, "moments", ONE), Moments)
    samples = statistics_lib.init(shapes, 1000, "samples", ONE)
    assert isinstance(samples, Samples)
    assert [x.shape[3] for x in samples.values] == [1000] * 3


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"layers": ("layer2",), "channels": 3},
    ],
    ids=str,
)
def test_extracts_the_embeddings_of_the_backbones_features(model: dict):
    # 19 x 13, 10 x 7 and 5 x 4 patches: no side divides another.
    config = make_config(precision="float32", **model)
    variables, images = variables_of(config), random_images(2, config)
    given = arguments(config)
    index = given["index"]
    levels = steps.extract(variables, images, **given)
    pyramid = geometry.pyramid(config.image, config.model, index)
    found = embedding.concatenate(levels, pyramid)
    mean, std = (np.asarray(x, np.float32) for x in (config.image.mean, config.image.std))
    pixels = (np.asarray(images, np.float32) / 255 - mean) / std
    spec = backbones.RESNETS[config.model.backbone]
    backbone = resnet.ResNet(spec, config.model.layers, config.model.precision)
    features: Any = jax.jit(backbone.apply)(variables, jnp.asarray(pixels))
    expected = patchwise.embeddings([np.asarray(x) for x in features], list(index))
    # Convolutions fused otherwise; measured 8e-7 of the largest.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["moments", "samples"])
def test_fit_and_score_in_batches(form: str):
    """From pixels to scores, against float64 on the embeddings that `extract` gives."""
    config = make_config(layers=("layer1", "layer2"))
    variables, given = variables_of(config), arguments(config)
    shapes = geometry.pyramid(config.image, config.model, given["index"]).shapes
    images = random_images(6, config)
    statistics = statistics_lib.init(shapes, 5, form, ONE)
    valid, index = jnp.ones((1, 3), bool), given["index"]

    def embedded(batch: Any) -> Any:
        return steps.embed(variables, batch[None], config, index, ONE)

    first = steps.fit_batch(statistics, embedded(images[:3]), valid)
    # The statistics' memory is the result's.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(statistics))
    valid = valid.at[0, 1].set(False)
    second = steps.fit_batch(first, embedded(images[3:]), valid)
    fitted = statistics_lib.finalize(second, config.model.regularization)
    # And the fitted model's.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(second))
    assert isinstance(fitted, Gaussian if form == "moments" else LowRank)

    pyramid = geometry.pyramid(config.image, config.model, given["index"])
    levels = steps.extract(variables, images, **given)
    x = np.asarray(embedding.concatenate(levels, pyramid))
    squared, _ = patchwise.distances(x[[0, 1, 2, 3, 5]], x, config.model.regularization)
    settings = config.image, config.model, config.map, config.score.image, index
    found = steps.score_batch(fitted, embedded(images), *settings)
    maps, scores, _ = (np.asarray(x)[0] for x in found)
    expected = scoring.anomaly_maps(
        jnp.asarray(np.sqrt(squared), jnp.float32),
        grid=geometry.patch_grid(config.image, config.model.layers),
        size=config.image.size,
        upsample=config.map.upsample,
        sigma=config.map.sigma,
    )
    # Features of variance up to 10 beside an epsilon of 0.01: roundoffs are amplified by
    # 1000 and summed 20 times; measured 9e-6 (moments) and 3e-5 (samples).
    np.testing.assert_allclose(maps, expected, rtol=3e-4)
    np.testing.assert_array_equal(scores[:, 0], maps.max(axis=(1, 2)))
    # The image that was marked as padding is not among those fitted.
    assert np.argmax(scores[:, 0]) == 4


SMALL = make_config(channels=8, layers=("layer1",))


@pytest.fixture(scope="module")
def fitted() -> detector.Detector:
    """To four of six images, and to twenty others: more than channels."""
    given, variables = arguments(SMALL), variables_of(SMALL)
    images = np.concatenate([random_images(6, SMALL)[:4], random_images(20, SMALL, seed=1)])
    shapes = geometry.pyramid(SMALL.image, SMALL.model, given["index"]).shapes
    statistics = statistics_lib.init(shapes, 24, "moments", ONE)
    levels = steps.embed(variables, images[None], SMALL, given["index"], ONE)
    statistics = steps.fit_batch(statistics, levels, np.ones((1, 24), bool))
    return detector.Detector(
        SMALL,
        geometry.channel_index(SMALL.model),
        variables,
        WeightsIdentity("random", ""),
        statistics_lib.finalize(statistics, SMALL.model.regularization),
        "",
        np.zeros((24, 32), np.uint8),
    )


@pytest.fixture(scope="module")
def alone(fitted: detector.Detector) -> dict[bool, list[detector.Anomalies]]:
    """Each of six images by itself; and each of the four that were fitted, left out."""
    images = np.asarray(random_images(6, SMALL))
    return {
        left_out: [
            detector.score_pixels(
                dataclasses.replace(fitted, left_out=int(left_out)), images[i][None]
            )
            for i in range(4 if left_out else 6)
        ]
        for left_out in (False, True)
    }


class TestBatches:
    """Images are scored alone, whatever else is in their batch."""

    @examples(20)
    @hypothesis.given(
        chosen=st.lists(st.integers(0, 5), max_size=7), batch_size=st.sampled_from([1, 3])
    )
    def test_any_batch_size(
        self,
        chosen: list[int],
        batch_size: int,
        fitted: detector.Detector,
        alone: dict[bool, list[detector.Anomalies]],
    ):
        config = dataclasses.replace(fitted.config, batch_size=batch_size)
        images = np.asarray(random_images(6, SMALL))
        found = detector.score(
            dataclasses.replace(fitted, config=config), [images[i] for i in chosen]
        )
        assert found.maps.shape == (len(chosen), *config.image.size)
        for i, anomaly_map, score in zip(chosen, found.maps, found.scores, strict=True):
            # Products of another shape, whose sums have another order; measured 8e-7.
            np.testing.assert_allclose(anomaly_map, alone[False][i].maps[0], rtol=2e-5)
            np.testing.assert_allclose(score, alone[False][i].scores[0], rtol=2e-5)

    @examples(12)
    @hypothesis.given(chosen=st.lists(st.integers(0, 3), min_size=3, max_size=3))
    def test_any_images_left_out(
        self,
        chosen: list[int],
        fitted: detector.Detector,
        alone: dict[bool, list[detector.Anomalies]],
    ):
        images = np.asarray(random_images(6, SMALL))
        found = detector.score_pixels(dataclasses.replace(fitted, left_out=1), images[chosen])
        for i, anomaly_map in zip(chosen, found.maps, strict=True):
            np.testing.assert_allclose(anomaly_map, alone[True][i].maps[0], rtol=2e-5)


class TestFinalize:
    """What is checked; `gaussian` and `low_rank` have the numbers."""

    CASE = patchwise.CASES["no nested grids"]

    @pytest.mark.parametrize("form", ["moments", "samples"])
    def test_regions_that_are_not_there_are_no_failure(self, form: str):
        """Devices that do not divide the regions have some of zeros at the end."""
        regions = patchwise.lay(self.CASE).shapes[0][0]
        assert regions % 8
        fitted = statistics_lib.finalize(statistics_of(self.CASE, form, devices=8), 0.01)
        expected = patchwise.finalize(whole(statistics_of(self.CASE, form), self.CASE), 0.01)
        found = parallel.join(jax.tree.leaves(fitted), regions)
        # Regions do not depend on each other, but blocks of them may be of other sizes, and
        # products summed otherwise. Measured 3e-6.
        for x, y in zip(found, jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())

    @pytest.mark.parametrize("form", ["moments", "samples"])
    def test_what_it_is_given_is_used_up(self, form: str):
        statistics = statistics_of(self.CASE, form, devices=2)
        statistics_lib.finalize(statistics, 0.01)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(statistics))


class TestMore:
    """More images than a model was fitted to, and models of disjoint images."""

    CASE = patchwise.CASES["no nested grids"]
    SHAPES = patchwise.lay(CASE).shapes
    FEW, MANY = 3, 40  # images: less as samples, and as moments

    def test_the_numbers_are_what_they_are_for(self):
        forms = [statistics_lib.choose_form(self.SHAPES, n) for n in (self.FEW, self.MANY)]
        assert forms == ["samples", "moments"]

    @pytest.mark.parametrize(("form", "devices"), [("moments", 4), ("samples", 1)])
    def test_an_extended_fit_is_that_of_all_images(self, form: str, devices: int):
        first = statistics_of(self.CASE, form, slice(5), devices=devices)
        extended = statistics_lib.extend(first, self.SHAPES, 8, form)
        assert isinstance(extended, Moments if form == "moments" else Samples)
        rest = [x[..., 5:] for x in patchwise.random_levels(self.CASE, 8)[0]]
        (batch,) = patchwise.batches(rest, [3])
        update = jax.jit(steps._update)
        both = update(whole(extended, self.CASE), *batch)
        assert_close(both, whole(statistics_of(self.CASE, form), self.CASE))

    @pytest.mark.parametrize(("asked", "devices"), [("auto", 4), ("moments", 1)])
    def test_samples_become_moments_where_these_are_smaller(self, asked: str, devices: int):
        images = self.MANY if asked == "auto" else self.FEW
        samples = statistics_of(self.CASE, "samples", devices=devices)
        extended = statistics_lib.extend(samples, self.SHAPES, images, asked)
        assert isinstance(extended, Moments)
        expected = statistics_of(self.CASE, "moments")
        assert_close(whole(extended, self.CASE), whole(expected, self.CASE))

    def test_samples_of_an_unfinished_fit_become_moments_of_what_is_there(self):
        samples = statistics_of(self.CASE, "samples", slice(3), room=8)
        extended = statistics_lib.extend(samples, self.SHAPES, self.MANY, "auto")
        expected = statistics_of(self.CASE, "moments", slice(3))
        assert_close(whole(extended, self.CASE), whole(expected, self.CASE))

    @pytest.mark.parametrize("asked", ["auto", "samples"])
    def test_samples_stay_where_they_are_smaller_or_asked_for(self, asked: str):
        images = self.FEW if asked == "auto" else self.MANY
        samples = statistics_of(self.CASE, "samples", slice(2))
        extended = statistics_lib.extend(samples, self.SHAPES, images, asked)
        assert isinstance(extended, Samples)
        assert {x.shape[3] for x in extended.values} == {images}

    @pytest.mark.parametrize("asked", ["auto", "samples", "moments"])
    def test_moments_stay(self, asked: str):
        """Single images are no longer in them."""
        moments = statistics_of(self.CASE, "moments")
        assert isinstance(statistics_lib.extend(moments, self.SHAPES, 9, asked), Moments)

    @pytest.mark.parametrize(
        ("a", "b", "asked", "result", "devices"),
        [
            ("samples", "samples", "samples", Samples, 4),
            ("samples", "samples", "moments", Moments, 1),
            ("moments", "samples", "auto", Moments, 4),
            ("moments", "moments", "samples", Moments, 4),
        ],
    )
    def test_merged_models_are_one_fit(
        self, a: str, b: str, asked: str, result: type, devices: int
    ):
        first = statistics_of(self.CASE, a, slice(3), devices=devices)
        second = statistics_of(self.CASE, b, slice(3, None), devices=devices)
        merged = statistics_lib.merge(first, second, self.SHAPES, asked)
        assert isinstance(merged, result)
        form = "moments" if result is Moments else "samples"
        assert_close(whole(merged, self.CASE), whole(statistics_of(self.CASE, form), self.CASE))

    @pytest.mark.parametrize(("images", "form"), [(FEW, "samples"), (MANY, "moments")])
    def test_merged_samples_take_the_form_that_is_smaller(self, images: int, form: str):
        half = images // 2
        parts = [
            statistics_of(self.CASE, "samples", chosen, of=images)
            for chosen in (slice(half), slice(half, None))
        ]
        merged = statistics_lib.merge(parts[0], parts[1], self.SHAPES, "auto")
        expected = statistics_of(self.CASE, form, of=images)
        assert_close(whole(merged, self.CASE), whole(expected, self.CASE))

    def test_merging_needs_no_third_copy(self):
        moments = statistics_of(self.CASE, "moments", slice(3))
        statistics_lib.merge(moments, statistics_of(self.CASE, "moments"), self.SHAPES, "auto")
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(moments))


def assert_close(found: Moments | Samples, expected: Moments | Samples) -> None:
    """Equal up to roundoffs of sums: see `test_gaussian`."""
    assert type(found) is type(expected)
    assert int(found.count) == int(expected.count)
    for x, y in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        if isinstance(found, Samples):
            np.testing.assert_array_equal(x, y)
        else:
            # Of up to 40 terms that are not above the largest sum; measured 4e-7.
            np.testing.assert_allclose(x, y, rtol=0, atol=40 * 2**-24 * np.abs(y).max())


# A wide_resnet50_2 at 256 x 256 with 550 channels. Compiled only: nothing is computed.
LARGE = ((256, 16, 86), (256, 4, 170), (256, 1, 294))


class TestMemory:
    """A device's statistics are there once, mapped as they are over devices."""

    def analysis(self, function: Any, devices: int, *statistics: Any) -> tuple[int, Any]:
        """Bytes of the first of a device's statistics, and what XLA says."""
        # Flat, since JAX would fill the statistics' class with descriptions of arrays.
        own = [(r // devices, n, d) for r, n, d in LARGE]
        leaves = [jax.eval_shape(lambda x=x: jax.tree.leaves(x(own))) for x in statistics]
        structures = [jax.tree.structure(x(((1, 1, 1),) * 3)) for x in statistics]
        shared = [
            [jax.ShapeDtypeStruct((devices, *x.shape), x.dtype) for x in part]
            for part in leaves
        ]

        def one(a: Any) -> Any:
            return jax.tree.leaves(function(structures[0].unflatten(a)))

        def two(a: Any, b: Any) -> Any:
            pair = (x.unflatten(y) for x, y in zip(structures, (a, b), strict=True))
            return jax.tree.leaves(function(*pair))

        mapped: Any = parallel.mapped(one if len(shared) == 1 else two, donated=(0,))
        compiled = mapped.lower(*shared).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return sum(x.size * x.dtype.itemsize for x in leaves[0]), memory

    @pytest.mark.parametrize("form", ["moments", "samples"])
    def test_finalize(self, form: str, optimized: None):
        devices = 4
        held, memory = self.analysis(
            lambda statistics: statistics_lib._finalize_regions(statistics, jnp.array(0.01)),
            devices,
            gaussian.init if form == "moments" else lambda shapes: low_rank.init(shapes, 60),
        )
        assert memory.alias_size_in_bytes >= held
        # A few blocks of regions, of 256 patches (moments) or 64 (samples): measured with two
        # versions of XLA at most 0.20 of what one device holds of 4,096.
        assert memory.temp_size_in_bytes < held * devices / 4

    def test_merge(self, optimized: None):
        devices = 4
        held, memory = self.analysis(gaussian.merge, devices, gaussian.init, gaussian.init)
        assert memory.alias_size_in_bytes >= held
        assert memory.temp_size_in_bytes < held * devices / 6


NONE = np.zeros((0, 32), np.uint8)


class TestFingerprint:
    """Thresholds and colours belong to one detector."""

    def fingerprint(
        self, identity: str = "model", sha256: str = "b", origin: str = "a", **settings: Any
    ) -> str:
        values: Any = defaults.get_config()
        values.update_from_flattened_dict(settings)
        config = validate(values)
        weights = WeightsIdentity(origin, sha256)
        index = geometry.channel_index(config.model)
        fitted = Gaussian((), ())  # not looked at: the statistics' identity says it
        found = detector.Detector(config, index, {}, weights, fitted, identity, NONE)
        return detector.fingerprint(found)

    def test_of_the_same(self):
        assert self.fingerprint() == self.fingerprint()

    @pytest.mark.parametrize(
        "change",
        [
            {"identity": "another"},
            {"sha256": "c"},
            {"image.resize": (256, 288)},
            {"image.mean": (0.5, 0.5, 0.5)},
            {"model.seed": 1},
            {"model.precision": "float32"},
            {"map.sigma": 3.0},
            {"map.upsample": "bicubic"},
        ],
        ids=str,
    )
    def test_of_another(self, change: dict):
        assert self.fingerprint(**change) != self.fingerprint()

    @pytest.mark.parametrize(
        "change",
        [
            {"origin": "elsewhere", "model.weights": "moved.npz"},
            # Of a checkpoint it says nothing: its statistics have the form that they have.
            {"model.statistics": "moments"},
            {"batch_size": 1},
            {"train.checkpoint_every": 1.0},
            {"category": "cable"},
            {"outputs.maps": "npy"},
        ],
        ids=str,
    )
    def test_of_the_same_used_otherwise(self, change: dict):
        assert self.fingerprint(**change) == self.fingerprint()
