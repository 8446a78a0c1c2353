"""Embeddings against the naive order: upsample everything, concatenate, then select."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from padim_jax.embedding import channel_index, embed

# Stages as (height, width, channels), the finest first.
STAGES = {
    "square": [(8, 8, 5), (4, 4, 7), (2, 2, 9)],
    "rectangular": [(8, 12, 5), (4, 6, 7), (2, 3, 9)],
    "tall": [(12, 4, 5), (6, 2, 7), (3, 1, 9)],
    # Sides that no stride divides, as of images 250 and 230 pixels wide.
    "non-divisible": [(63, 58, 2), (32, 29, 3), (16, 15, 4)],
    "same grid": [(6, 6, 4), (6, 6, 4)],
    "one row": [(1, 7, 3), (1, 4, 3)],
    "single stage": [(5, 3, 6)],
}


def random_features(shapes, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(batch, *shape)), jnp.float32) for shape in shapes]


def naive(features, index):
    """Patch by patch: nearest source of every stage, all channels side by side, select."""
    features = [np.asarray(stage, np.float32) for stage in features]
    batch, height, width, _ = features[0].shape
    rows = []
    for y in range(height):
        for x in range(width):
            column = [
                stage[:, y * stage.shape[1] // height, x * stage.shape[2] // width]
                for stage in features
            ]
            rows.append(np.concatenate(column, axis=-1)[:, index])
    return np.stack(rows, axis=1).reshape(batch, height * width, len(index))


# Embedding only moves values, so that every comparison here is exact.
@pytest.mark.parametrize("shapes", STAGES.values(), ids=STAGES.keys())
@pytest.mark.parametrize("share", [0.4, 1.0], ids=["some channels", "all channels"])
def test_equals_select_after_upsampling(shapes, share):
    features = random_features(shapes)
    total = sum(channels for _, _, channels in shapes)
    index = channel_index(total, round(share * total), seed=3)
    np.testing.assert_array_equal(embed(features, index), naive(features, index))


@pytest.mark.parametrize(
    "index", [[2, 13, 0], [6, 5], [20, 12, 17], [20, 3]], ids=["1+3", "2", "3", "3+1"]
)
def test_stages_without_a_selected_channel(index):
    features = random_features(STAGES["rectangular"])
    index = np.array(index)
    np.testing.assert_array_equal(embed(features, index), naive(features, index))


def test_channels_keep_the_drawn_order():
    # Every channel holds its own number.
    features = [
        jnp.tile(jnp.arange(start, stop, dtype=jnp.float32), (1, side, side, 1))
        for side, start, stop in [(4, 0, 3), (2, 3, 8), (1, 8, 10)]
    ]
    index = np.array([9, 0, 4, 8, 2, 7, 1])
    np.testing.assert_array_equal(embed(features, index), np.tile(index, (1, 16, 1)))


def test_bfloat16_features_give_float32_embeddings():
    features = [x.astype(jnp.bfloat16) for x in random_features(STAGES["square"])]
    index = channel_index(21, 8, seed=0)
    found = embed(features, index)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, naive(features, index))


def test_only_selected_channels_are_upsampled():
    # The same numbers come from upsampling all channels, at many times the memory.
    features = random_features([(16, 16, 8), (8, 8, 16), (4, 4, 32)])
    index = channel_index(56, 10, seed=0)
    jaxpr = jax.make_jaxpr(lambda *stages: embed(stages, index))(*features)
    arrays = [variable.aval for eqn in jaxpr.eqns for variable in eqn.outvars]
    sizes = [array.size for array in arrays]  # pyright: ignore[reportAttributeAccessIssue]
    assert max(sizes) == 2 * 16 * 16 * 10  # the embedding itself


def test_source_positions_are_rounded_as_in_torch():
    # 99 * 50 / 198 is 25, but in torch's float32 it is just below; known from torch 2.13.
    coarse = jnp.arange(50, dtype=jnp.float32).reshape(1, 50, 1, 1)
    found = embed([jnp.zeros((1, 198, 1, 1)), coarse], np.array([1]))
    assert found[0, 98:101, 0].tolist() == [24, 24, 25]


@pytest.mark.parametrize(
    ("fine", "coarse"),
    [
        ((64, 56), (16, 14)),
        ((63, 58), (32, 15)),
        ((57, 97), (8, 25)),
        ((198, 122), (50, 16)),
        ((46, 549), (14, 138)),
    ],
)
def test_nearest_equals_torch(fine, coarse):
    torch = pytest.importorskip("torch")
    features = random_features([(*fine, 2), (*coarse, 3)])
    nchw = torch.from_numpy(np.array(features[1])).permute(0, 3, 1, 2)
    upsampled = torch.nn.functional.interpolate(nchw, size=fine, mode="nearest")
    expected = upsampled.permute(0, 2, 3, 1).numpy().reshape(2, -1, 3)
    np.testing.assert_array_equal(embed(features, np.array([2, 3, 4])), expected)


@pytest.mark.parametrize(
    ("total", "channels", "seed"), [(448, 100, 42), (448, 100, 1024), (1792, 550, 0), (5, 5, 7)]
)
def test_channel_index_is_that_of_the_pytorch_projects(total, channels, seed):
    state = random.getstate()
    try:
        random.seed(seed)
        expected = random.sample(range(total), channels)
    finally:
        random.setstate(state)
    np.testing.assert_array_equal(channel_index(total, channels, seed), expected)
    assert random.getstate() == state  # the global generator is not touched


@pytest.mark.parametrize("preset", ["bilinear256", "nearest256_crop224"])
def test_channel_index_equals_golden(shared, preset):
    golden = np.load(shared / "golden" / f"bottle_resnet18_{preset}.npz")
    np.testing.assert_array_equal(channel_index(448, 100, 42), golden["channel_index"])
