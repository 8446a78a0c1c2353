"""What a pretraining teaches, and the network that learns, against plain NumPy."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from padim_jax.config.backbones import RESNETS, Precision
from padim_jax.devices import parallel
from padim_jax.models.resnet import ResNet
from padim_jax.models.weights import folding, pretrained
from padim_jax.pretrain import inspection, network, run, training
from padim_jax.pretrain.config import STAGES, get_config, validate
from padim_jax.pretrain.inspection import DEVIATION, EPSILON
from padim_jax.pretrain.redundancy import redundancy

BACKBONE = "resnet18"


# Compiled whole: one by one, their steps take longer.
log_distances = jax.jit(inspection.log_distances, static_argnums=2)
ranking = jax.jit(inspection.ranking)
standardised = jax.jit(inspection.standardised)
repeated = jax.jit(redundancy)

GRIDS = ((4, 8), (2, 4), (1, 2))
CHANNELS = (5, 7, 9)


def random_features(seed: int, scale: float = 1.0, scenes: int = 2, images: int = 7) -> Any:
    """Of three stages (s, b, h, w, c), channels of different scales and means, correlated."""
    rng = np.random.default_rng(seed)
    found = []
    for grid, channels in zip(GRIDS, CHANNELS, strict=True):
        mixed = rng.normal(size=(scenes, images, *grid, channels)) @ rng.normal(
            size=(channels, channels)
        )
        found.append(jnp.float32(scale * (mixed + rng.normal(size=channels))))
    return tuple(found)


def reference_log_distances(
    features: Sequence[jax.Array], kept: Sequence[jax.Array], good: int
) -> np.ndarray:
    """As a person would write it: embeddings, covariances and their inverses, in float64."""
    (height, width), embeddings = GRIDS[0], []
    for x, chosen in zip(features, kept, strict=True):
        x = np.asarray(x, np.float64)[..., np.asarray(chosen) > 0]
        x = x.repeat(height // x.shape[2], 2).repeat(width // x.shape[3], 3)
        embeddings.append(x)
    embedding = np.concatenate(embeddings, -1)
    scenes, images, *_, channels = embedding.shape
    found = np.empty((scenes, images - good, height, width))
    for s, i, j in np.ndindex(scenes, height, width):
        known, others = embedding[s, :good, i, j], embedding[s, good:, i, j]
        covariance = np.cov(known, rowvar=False).reshape(channels, channels)
        inverse = np.linalg.inv(covariance + EPSILON * np.eye(channels))
        differences = others - known.mean(0)
        squares = np.einsum("qc,cd,qd->q", differences, inverse, differences)
        found[s, :, i, j] = np.log(squares / channels + 1e-3)
    return found


class TestLogDistances:
    @pytest.mark.parametrize(
        ("kept", "scale", "tolerance"),
        [
            # Of logarithms; measured 1e-6, and 2e-5 where channels are as many as images.
            ("all", 1.0, 1e-4),
            ("all", DEVIATION, 1e-4),
            ("some", 1.0, 1e-4),
            ("one stage's", 1.0, 1e-3),
            # More images than channels explain nearly all: what is left of the difference
            # has lost digits. Training never comes near. Measured 4e-4.
            ("two", 1.0, 5e-3),
        ],
    )
    def test_equal_mahalanobis_distances(self, kept: str, scale: float, tolerance: float):
        features = random_features(0, scale)
        rng = np.random.default_rng(1)
        chosen = {
            "all": [np.ones(c) for c in CHANNELS],
            "some": [rng.integers(0, 2, c) for c in CHANNELS],
            "one stage's": [np.zeros(5), np.ones(7), np.zeros(9)],
            "two": [np.eye(c)[0] * (c < 9) for c in CHANNELS],
        }[kept]
        chosen = tuple(map(jnp.float32, chosen))
        for good in (3, 5):
            found = log_distances(features, chosen, good)
            expected = reference_log_distances(features, chosen, good)
            assert found.shape == expected.shape == (2, 7 - good, *GRIDS[0])
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)

    def test_a_good_image_seen_again_is_near(self):
        """Less than any other can be: (n - 1)^2 / n at most, before the division."""
        features = random_features(2)
        again = tuple(jnp.concatenate([x[:, :5], x[:, :2]], 1) for x in features)
        kept = tuple(map(jnp.ones, CHANNELS))
        found = np.exp(log_distances(again, kept, 5)) * sum(CHANNELS)
        assert found.max() <= 16 / 5 + 0.05

    def test_gradients_are_finite_where_nothing_differs(self):
        """All images of a scene the same: distances are 0, and their logarithms have ends."""
        features = tuple(x[:, :1].repeat(7, 1) for x in random_features(3))
        kept = tuple(map(jnp.ones, CHANNELS))

        def total(features: Any) -> jax.Array:
            return jnp.sum(log_distances(features, kept, 5))

        value, slopes = jax.jit(jax.value_and_grad(total))(features)
        assert np.isfinite(value)
        assert all(np.isfinite(x).all() for x in slopes)


# Of one scene's patches: four are spoilt, in different parts.
DEFECT = np.pad([[[[1.0, 0.5], [0.25, 0.1]]]], ((0, 0), (1, 0), (0, 2), (1, 1)))


class TestRanking:
    def both(self, distances: np.ndarray, defect: np.ndarray) -> tuple[float, float]:
        loss, auroc = ranking(jnp.float32(distances), jnp.float32(defect))
        assert loss.shape == auroc.shape == (1,)
        return float(loss[0]), float(auroc[0])

    def test_order(self):
        noise = np.random.default_rng(0).normal(size=DEFECT.shape)
        there = DEFECT > 0
        right, first = self.both(noise + 20 * there, DEFECT)
        wrong, last = self.both(noise - 20 * there, DEFECT)
        by_chance, middle = self.both(noise, DEFECT)
        assert first == 1.0
        assert last == 0.0
        assert 0 < middle < 1
        assert 0 <= right < 1e-6 < by_chance < wrong

    def test_equals_its_definition(self):
        distances = np.random.default_rng(1).normal(size=DEFECT.shape)
        loss, auroc = self.both(distances, DEFECT)
        normal = distances[DEFECT <= 0]
        # As much as one patch, of all normal ones together.
        others = np.mean(np.exp(2 * normal))
        # Patches count by how much of them is spoilt, from a quarter in full.
        losses, weights = [], []
        for part in (1.0, 0.5, 0.25, 0.1):
            (value,) = np.exp(2 * distances[np.isclose(DEFECT, part)])
            losses.append(-np.log(value / (value + others)))
            weights.append(min(4 * part, 1.0))
        # Float32 of values near 1.
        assert loss == pytest.approx(np.average(losses, weights=weights), rel=1e-5)
        plain = distances[DEFECT >= 0.25]
        assert auroc == pytest.approx(np.mean(plain[:, None] > normal))

    def test_no_defects(self):
        distances = np.random.default_rng(2).normal(size=DEFECT.shape)
        loss, auroc = self.both(distances, 0 * DEFECT)
        assert loss == 0
        assert np.isnan(auroc)

    def test_slope_without_defects_is_nothing(self):
        none = jnp.zeros(DEFECT.shape)
        slope = jax.jit(jax.grad(lambda x: ranking(x, none)[0][0]))(none + 1)
        assert not np.any(slope)

    def test_all_spoilt(self):
        distances = np.random.default_rng(3).normal(size=DEFECT.shape)
        loss, auroc = self.both(distances, np.ones_like(DEFECT))
        assert loss == pytest.approx(0, abs=1e-6)
        assert np.isnan(auroc)

    def test_order_of_images_does_not_matter_and_scenes_stand_alone(self):
        rng = np.random.default_rng(4)
        distances = rng.normal(size=(3, *DEFECT.shape[1:]))
        defect = DEFECT.repeat(3, 0)
        loss, auroc = ranking(jnp.float32(distances), jnp.float32(defect))
        swapped = ranking(jnp.float32(distances[:, ::-1]), jnp.float32(defect[:, ::-1]))
        # Sums in another order.
        np.testing.assert_allclose(swapped[0], loss, rtol=1e-5)
        np.testing.assert_allclose(swapped[1], auroc, rtol=1e-5)
        for i in range(3):
            alone = self.both(distances[i : i + 1], defect[i : i + 1])
            np.testing.assert_allclose(alone, [loss[i], auroc[i]], rtol=1e-5)


def flat_features(seed: int) -> tuple[jax.Array, ...]:
    return tuple(x.reshape(-1, *x.shape[2:]) for x in random_features(seed))


class TestStandardised:
    def test_is_one_number_for_a_stage(self):
        features = flat_features(5)
        for x, found in zip(features, standardised(features), strict=True):
            factor = np.asarray(found / x)
            # Rounding twice.
            np.testing.assert_allclose(factor, factor.flat[0], rtol=1e-5)
            deviation = np.sqrt(np.var(np.asarray(found, np.float64), (0, 1, 2)).mean())
            assert deviation == pytest.approx(DEVIATION, rel=1e-4)

    def test_of_several_devices_is_that_of_all_images(self):
        features = flat_features(5)
        together = standardised(features)
        shared = tuple(x.reshape(7, 2, *x.shape[1:]) for x in features)
        apart = jax.jit(
            jax.vmap(
                lambda x: inspection.standardised(x, parallel.mean), axis_name=parallel.AXIS
            )
        )(shared)
        for x, y in zip(apart, together, strict=True):
            np.testing.assert_allclose(x.reshape(y.shape), y, rtol=1e-5)

    def test_silence_stays_silent(self):
        (found,) = standardised((jnp.zeros((2, 3, 3, 4)),))
        assert not np.any(found)


class TestRedundancy:
    def independent(self) -> np.ndarray:
        return np.random.default_rng(0).normal(size=(50, 8, 8, 6))

    def of(self, *stages: Any) -> float:
        return float(repeated(tuple(map(jnp.float32, stages))))

    def test_channels_of_their_own_are_free(self):
        # 30 squared correlations of 3200 numbers: 6 channels' sum of 5 each, 1 / 3200 apiece;
        # deviations differ by 1 % from each other.
        assert 0 <= self.of(self.independent()) < 0.1

    def test_repeated_channels_count_by_their_squared_correlations(self):
        x = self.independent()
        x[..., 1] = x[..., 0]
        x[..., 2] = -3 * x[..., 0] + 7
        found = self.of(x)
        # Three pairs, each counted twice, over six channels; and what falls short.
        deviation = x.reshape(-1, 6).std(0)
        level = np.sqrt(np.mean(deviation**2))
        short = np.mean(np.maximum(0, 1 - deviation / level))
        assert found == pytest.approx(1.0 + 10 * short, abs=0.02)

    def test_equals_its_definition(self):
        features = flat_features(6)
        expected = []
        for x in features:
            flat = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
            count = flat.shape[1]
            others = np.sum(np.corrcoef(flat, rowvar=False) ** 2) - count
            deviation = flat.std(0)
            short = np.maximum(0, 1 - deviation / np.sqrt(np.mean(deviation**2)))
            expected.append(others / count + 10 * np.mean(short))
        # Correlations are damped by 1e-4 of the level.
        assert self.of(*features) == pytest.approx(np.mean(expected), rel=5e-3)

    def test_silent_channels_cost(self):
        x = self.independent()
        x[..., 4:] = 3.0
        # A third of the channels falls short of everything.
        assert self.of(x) == pytest.approx(10 / 3, abs=0.05)
        slope = jax.jit(jax.grad(lambda x: redundancy((x,))))(jnp.float32(x))
        assert np.isfinite(slope).all()

    def test_scale_does_not_matter(self):
        x = self.independent()
        x[..., 1] += x[..., 0]
        once, larger = self.of(x), self.of(100 * x)
        assert once == pytest.approx(larger, rel=1e-3)
        assert once > 0.05

    def test_of_several_devices_is_that_of_all_images(self):
        x = self.independent() + np.arange(50)[:, None, None, None] / 20
        together = self.of(x)
        apart = jax.jit(
            jax.vmap(lambda x: redundancy((x,), parallel.mean), axis_name=parallel.AXIS)
        )(jnp.float32(np.stack(np.split(x, 5))))
        np.testing.assert_allclose(apart, together, rtol=1e-5)


IMAGES = jnp.float32(np.random.default_rng(7).normal(size=(4, 32, 48, 3)))


def random_variables(seed: int) -> dict[str, Any]:
    """Of `Network`, as if trained: no scale is 1, no mean 0, and everything keeps its size."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(
        network.Network(BACKBONE, "float32").init, jax.random.key(0), IMAGES[:1]
    )

    def draw(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
        kind = path[-1].key
        if kind == "kernel":
            values = rng.normal(0, np.sqrt(2 / np.prod(x.shape[:-1])), x.shape)
        elif kind in ("scale", "var"):
            values = rng.uniform(0.4, 1.2, x.shape)
        else:
            values = rng.normal(0, 0.2, x.shape)
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def plain_features(weights: Any) -> list[np.ndarray]:
    """Of the backbone that all other modes use; layer by layer, which compiles less."""
    model = ResNet(RESNETS[BACKBONE], network.STAGES, "float32")
    found: Any = model.apply(weights, IMAGES)
    return [np.asarray(x) for x in found]


def require_near(found: Any, expected: Any) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        # Twenty layers of float32; measured 1e-6.
        np.testing.assert_allclose(x, y, rtol=0, atol=3e-5 * np.abs(y).max())


class TestNetwork:
    def test_stages_are_those_that_recipes_count_channels_of(self):
        assert network.STAGES == STAGES

    def test_folded_and_rescaled_is_the_same_function(self):
        variables = random_variables(8)
        found: Any = network.Network(BACKBONE, "float32").apply(variables, IMAGES)
        features, told = found
        tensors = network.folded(variables)
        convert = folding.convert
        plain = convert(tensors, BACKBONE, network.STAGES, "test")
        require_near(plain_features(plain), features)
        for x, guess, stride in zip(features, told, (4, 8, 16), strict=True):
            assert x.shape[1:3] == guess.shape[1:3] == (32 // stride, 48 // stride)
            assert guess.shape[-1] == 3 * network.PATCH**2

        # Another factor for each channel, over three orders of magnitude.
        rng = np.random.default_rng(9)
        factors = {
            stage: np.exp(rng.uniform(-3.5, 3.5, count)).astype(np.float32)
            for stage, count in zip(network.STAGES, network.channels(BACKBONE), strict=True)
        }
        before = {name: value.copy() for name, value in tensors.items()}
        scaled = network.rescaled(tensors, factors)
        for name, value in before.items():
            np.testing.assert_array_equal(tensors[name], value)
        assert {x.dtype for x in scaled.values()} == {np.dtype(np.float32)}
        found = plain_features(convert(scaled, BACKBONE, network.STAGES, "test"))
        back = [x / factors[stage] for x, stage in zip(found, network.STAGES, strict=True)]
        require_near(back, features)

    def test_begins_with_the_function_of_weights(self):
        weights, _ = pretrained.load("random", BACKBONE, network.STAGES)
        rng = np.random.default_rng(10)
        # Those have no biases.
        weights = jax.tree.map(
            lambda x: x if x.any() else rng.normal(0, 0.1, x.shape).astype(np.float32), weights
        )
        expected = plain_features(weights)
        start = random_variables(11)
        put = jax.jit(network.with_weights, static_argnums=3)
        variables = put(start, weights["params"], IMAGES, BACKBONE)
        assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, start)
        for stage in network.STAGES:
            head = f"pixels_{stage}"
            for kind, value in start["params"][head].items():
                np.testing.assert_array_equal(variables["params"][head][kind], value)
        model = network.Network(BACKBONE, "float32")

        def train(images: jax.Array) -> Any:
            (features, _), changed = model.apply(variables, images, mutable=["batch_stats"])
            return features, changed["batch_stats"]

        # By the statistics of these images, of which two devices have a half each.
        features, changed = jax.jit(jax.vmap(train, axis_name=parallel.AXIS))(
            IMAGES.reshape(2, 2, *IMAGES.shape[1:])
        )
        require_near([x.reshape(-1, *x.shape[2:]) for x in features], expected)
        # They are the running ones already.
        for x, y in zip(
            jax.tree.leaves(changed), jax.tree.leaves(variables["batch_stats"]), strict=True
        ):
            np.testing.assert_array_equal(x[0], x[1])
            np.testing.assert_allclose(x[0], y, rtol=0, atol=1e-4 * np.abs(y).max())
        # And its weights are those.
        folded = network.folded(variables)
        converted = folding.convert(folded, BACKBONE, network.STAGES, "test")
        for x, y in zip(jax.tree.leaves(converted), jax.tree.leaves(weights), strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())

    def test_bfloat16_is_for_the_arithmetic_only(self):
        """What is kept, and sums over many values, are float32; results are near its own."""
        variables = random_variables(12)

        def trained(precision: Precision) -> Any:
            model = network.Network(BACKBONE, precision)

            def loss(params: Any) -> Any:
                given = {**variables, "params": params}
                (features, told), changed = model.apply(given, IMAGES, mutable=["batch_stats"])
                total = sum(jnp.mean(x**2) for x in (*features, *told))
                return total, (features, changed["batch_stats"])

            def step(params: Any) -> Any:
                return jax.value_and_grad(loss, has_aux=True)(params)

            # A device alone, of an axis that has a name.
            one = jax.tree.map(lambda x: x[None], variables["params"])
            return jax.jit(jax.vmap(step, axis_name=parallel.AXIS))(one)

        (loss, (features, stats)), slope = trained("bfloat16")
        for x in jax.tree.leaves((loss, features, stats, slope)):
            assert x.dtype == jnp.float32
        (plain_loss, (plain, plain_stats)), plain_slope = trained("float32")
        for x, y in zip(features, plain, strict=True):
            off = np.sqrt(np.mean((x - y) ** 2) / np.mean(y**2))
            # Eight bits: each of up to 20 layers rounds by 2^-9; measured 0.7, 1.5 and 2.4 %.
            assert 2**-10 < off < 20 * 2**-9
        np.testing.assert_allclose(loss, plain_loss, rtol=0.02)
        assert jax.tree.map(np.shape, stats) == jax.tree.map(np.shape, plain_stats)
        # Measured 0.980; rounding also decides which rectifiers let values near 0 through.
        assert cosine(slope, plain_slope) > 0.95


def cosine(a: Any, b: Any) -> float:
    x, y = (np.concatenate([np.ravel(v) for v in jax.tree.leaves(t)]) for t in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_weights_are_read_as_they_were_written(tmp_path: pathlib.Path):
    """Every kernel's axes included."""
    recipe = validate(get_config())
    tensors = network.folded(random_variables(12))
    images = jnp.zeros((recipe.task.good + recipe.task.inspected, 32, 32, 3))
    row: list[float | int] = [1, *range(len(training.Measures._fields))]
    run._write(recipe, {}, tmp_path, tensors, [row], images)
    path = str(tmp_path / run.WEIGHTS)
    found, _ = pretrained.load(path, BACKBONE, network.STAGES)
    expected = folding.convert(tensors, BACKBONE, network.STAGES, "test")
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y.astype(np.float16))


class TestOptimizer:
    def recipe(self, **changes: Any) -> Any:
        values: Any = get_config()
        values.optimizer.update({"steps": 20, "warmup": 4, "learning_rate": 0.5, **changes})
        return validate(values)

    def test_the_rate_rises_and_falls(self):
        schedule = training.schedule(self.recipe())
        rates = [np.asarray(schedule(step)) for step in range(21)]
        assert rates[0] == 0
        assert rates[4] == max(rates) == pytest.approx(0.5)
        assert rates[12] == pytest.approx(0.25)
        assert rates[20] == pytest.approx(0, abs=1e-7)
        assert np.all(np.diff(rates[:5]) > 0)
        assert np.all(np.diff(rates[4:]) < 0)

    def test_only_kernels_decay(self):
        optimizer = training.optimizer(self.recipe(warmup=0, weight_decay=0.1))
        params = {"conv": {"kernel": jnp.ones((1, 1, 2, 2))}, "norm": {"scale": jnp.ones(2)}}
        still = jax.tree.map(jnp.zeros_like, params)
        update, _ = jax.jit(optimizer.update)(still, optimizer.init(params), params)
        np.testing.assert_allclose(update["conv"]["kernel"], -0.5 * 0.1, rtol=1e-5)
        assert not np.any(update["norm"]["scale"])
