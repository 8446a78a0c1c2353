"""Every way to an embedding, from features to distances, against the paper's in float64.

The reference pools every stage, upsamples it, puts all channels side by side, selects or
projects, and inverts a covariance for every patch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import patchwise
import pytest

from padim_jax.config import defaults
from padim_jax.config.settings import Config, validate
from padim_jax.core import embedding, gaussian, low_rank, reduction, scoring
from padim_jax.core.types import Moments, Samples
from padim_jax.detector import geometry, steps

# Stages of 9 x 8, 5 x 4 and 3 x 2 cells, of which none divide another.
SIZE = (36, 32)
STAGES = [(9, 8, 64), (5, 4, 128), (3, 2, 256)]
IMAGES = 6


def make_config(**model: Any) -> Config:
    values: Any = defaults.get_config()
    values.image.resize = SIZE
    values.model.weights, values.model.channels = "random", 20
    values.model.layers = ("layer1", "layer2")
    values.model.update(model)
    return validate(values)


def projection_of(config: Config, training: list[np.ndarray]) -> np.ndarray | None:
    """As `fitting` makes it, of one batch of images."""
    model, total = config.model, geometry.total_channels(config.model)
    if model.reduction == "semi_orthogonal":
        return reduction.semi_orthogonal(total, model.channels, model.seed)
    if model.reduction != "pca":
        return None
    pooled = [embedding.pool(jnp.asarray(x), model.pooling) for x in training]
    mean, m2 = reduction.scatter(pooled, jnp.ones(IMAGES, bool), model.upsample)
    scatter = reduction.Scatter(IMAGES, np.asarray(mean, float), np.asarray(m2, float))
    return reduction.components(scatter, model.channels)


def reference(config: Config, features: list[np.ndarray], training: list[np.ndarray]) -> Any:
    """Embeddings (b, p, d) in float64; of principal components those of the training images."""
    model, index = config.model, geometry.channel_index(config.model)
    x = patchwise.whole(features, model.pooling, model.upsample)
    if model.reduction in ("random", "none"):
        return x[..., index]
    if model.reduction == "semi_orthogonal":
        total = x.shape[-1]
        return x @ reduction.semi_orthogonal(total, model.channels, model.seed).astype(float)
    fitted = patchwise.whole(training, model.pooling, model.upsample)
    _, vectors = np.linalg.eigh(np.cov(fitted.reshape(-1, fitted.shape[-1]).T))
    return x @ vectors[:, : -model.channels - 1 : -1]


def dense_distances(training: np.ndarray, x: np.ndarray, epsilon: float) -> np.ndarray:
    """Squared (b, p): `patchwise.distances` without condition numbers, which take long."""
    found = np.empty(x.shape[:2])
    for p in range(x.shape[1]):
        covariance = np.cov(training[:, p].T) + epsilon * np.eye(x.shape[-1])
        delta = (x[:, p] - training[:, p].mean(axis=0)).T
        found[:, p] = np.sum(delta * np.linalg.solve(covariance, delta), axis=0)
    return found


def fit(form: str, shapes: Any, levels: Any) -> Moments | Samples:
    """In two batches, the second one padded."""
    module: Any = gaussian if form == "moments" else low_rank
    statistics = module.init(shapes) if form == "moments" else module.init(shapes, IMAGES)
    update = jax.jit(module.update)
    for batch in patchwise.batches([np.asarray(x) for x in levels], [4, 2]):
        statistics = update(statistics, *batch)
    return statistics


@pytest.mark.parametrize(
    ("form", "model"),
    [
        ("moments", {"pooling": 3, "layers": ("layer1", "layer2", "layer3")}),
        ("samples", {"pooling": 5, "regularization": 1e-4}),
        ("moments", {"upsample": "bilinear", "regularization": 1e-4}),
        # All 192 channels.
        ("samples", {"reduction": "none", "upsample": "bilinear", "pooling": 3}),
        ("moments", {"reduction": "none", "pooling": 3, "regularization": 1e-4}),
        ("moments", {"reduction": "semi_orthogonal"}),
        ("samples", {"reduction": "semi_orthogonal", "pooling": 3, "upsample": "bilinear"}),
        ("moments", {"reduction": "pca", "pooling": 3, "regularization": 1e-4}),
        ("samples", {"reduction": "pca", "upsample": "bilinear"}),
    ],
    ids=str,
)
def test_distances_are_the_papers(form: str, model: dict):
    config = make_config(**model)
    index = tuple(geometry.channel_index(config.model).tolist())
    stages = STAGES[: len(config.model.layers)]
    training = patchwise.random_features(stages, IMAGES, mean=2.0)
    others = patchwise.random_features(stages, 3, mean=2.0, seed=1)
    projection = projection_of(config, training)

    @jax.jit
    def levels(features: list) -> Any:
        matrix = None if projection is None else jnp.asarray(projection)
        return steps._levels(features, matrix, config.image, config.model, index)

    pyramid = geometry.pyramid(config.image, config.model, index)
    statistics = fit(form, pyramid.shapes, levels([jnp.asarray(x) for x in training]))
    fitted = patchwise.finalize(statistics, config.model.regularization)
    distances = jax.jit(scoring.mahalanobis)
    x = levels([jnp.asarray(x) for x in others])
    found = scoring.on_grid(distances(fitted, x), pyramid.patches)
    squared = dense_distances(
        reference(config, training, training),
        reference(config, others, training),
        config.model.regularization,
    )
    # Most directions have no variance but epsilon, beside which roundoffs (6e-8) of variances
    # of 1 count: measured 1.4e-3 at 1e-4, 7e-6 at 0.01. Samples do not cancel: measured 1e-6.
    rtol = 2e-7 / config.model.regularization if form == "moments" else 2e-5
    np.testing.assert_allclose(found, np.sqrt(squared), rtol=rtol)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_pooling_equals_torch(size: int):
    torch = pytest.importorskip("torch")
    (stage,) = patchwise.random_features([(5, 4, 3)], 2)
    found = embedding.pool(jnp.asarray(stage), size)
    expected = torch.nn.functional.avg_pool2d(
        torch.from_numpy(stage).permute(0, 3, 1, 2), size, 1, size // 2, count_include_pad=False
    )
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), rtol=0, atol=1e-6)


def test_an_option_that_is_off_computes_nothing():
    """The published form's program is what it was: channels selected, cells gathered."""
    config = make_config()
    index = tuple(geometry.channel_index(config.model).tolist())

    def levels(*features: jax.Array) -> Any:
        return steps._levels(features, None, config.image, config.model, index)

    jaxpr = jax.make_jaxpr(levels)(*[jnp.zeros((2, *stage)) for stage in STAGES[:2]])
    found = {eqn.primitive.name for eqn in jaxpr.eqns}
    assert not found & {"dot_general", "reduce_window_sum", "reduce_window", "div", "mul"}
