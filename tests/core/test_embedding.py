"""Embeddings against the naive order: upsample everything, concatenate, then select."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import patchwise
import pytest

from padim_jax.core import embedding
from padim_jax.core.embedding import channel_index, select

# Stages as (height, width, channels), the finest first.
STAGES = {
    "rectangular": [(8, 12, 5), (4, 6, 7), (2, 3, 9)],
    # Sides that no stride divides, as of images 250 and 230 pixels wide.
    "non-divisible": [(63, 58, 2), (32, 29, 3), (16, 15, 4)],
    # A cell of the second stage lies in two of the third.
    "not nested": [(46, 19, 2), (14, 9, 3), (4, 4, 4)],
    "same grid": [(6, 6, 4), (6, 6, 4)],
    "same grid at the end": [(6, 6, 4), (3, 3, 4), (3, 3, 4)],
    "one row": [(1, 7, 3), (1, 4, 3)],
    "single stage": [(5, 3, 6)],
}


def random_features(shapes, batch=2):
    return [jnp.asarray(stage) for stage in patchwise.random_features(shapes, batch)]


def drawn(shapes, share):
    """A case as `patchwise` has them: a share of the channels, in drawn order."""
    total = sum(channels for _, _, channels in shapes)
    return shapes, channel_index(total, max(1, round(share * total)), seed=3).tolist()


on_all_grids = pytest.mark.parametrize("shapes", STAGES.values(), ids=STAGES.keys())
# Of few channels, some stages have none.
shares = pytest.mark.parametrize("share", [0.2, 1.0], ids="{:.0%} of the channels".format)


def embed(features, index):
    """Compiled as one program, which is sooner than every operation by itself."""
    return jax.jit(lambda features: embedding.embed(features, index))(features)


# Embedding only moves values, so that every comparison here is exact.
@on_all_grids
@shares
def test_equals_select_after_upsampling(shapes, share):
    features, (_, index) = random_features(shapes), drawn(shapes, share)
    found = embed(features, np.array(index))
    np.testing.assert_array_equal(found, patchwise.embeddings(features, index))


@pytest.mark.parametrize(
    "index", [[2, 13, 0], [6, 5], [20, 12, 17], [20, 3]], ids=["1+3", "2", "3", "3+1"]
)
def test_stages_without_a_selected_channel(index):
    features = random_features(STAGES["rectangular"])
    found = embed(features, np.array(index))
    np.testing.assert_array_equal(found, patchwise.embeddings(features, index))


def test_channels_keep_the_drawn_order():
    # Every channel holds its own number.
    features = [
        jnp.tile(jnp.arange(start, stop, dtype=jnp.float32), (1, side, side, 1))
        for side, start, stop in [(4, 0, 3), (2, 3, 8), (1, 8, 10)]
    ]
    index = np.array([9, 0, 4, 8, 2, 7, 1])
    np.testing.assert_array_equal(embed(features, index), np.tile(index, (1, 16, 1)))


@on_all_grids
@shares
def test_every_level_holds_its_channels_of_every_patch(shapes, share):
    case = drawn(shapes, share)
    features, pyramid = random_features(shapes), patchwise.lay(case)
    levels = jax.jit(lambda features: select(features, pyramid))(features)
    assert [x.shape for x in levels] == [(*shape, 2) for shape in pyramid.shapes]
    for image, expected in enumerate(patchwise.embeddings(features, case[1])):
        found = patchwise.vectors([np.asarray(level)[..., image] for level in levels], pyramid)
        np.testing.assert_array_equal(found, expected)


@on_all_grids
@shares
def test_cells_of_patches_with_equal_features_only_are_one(shapes, share):
    """What `gaussian` and `scoring` build on: regions alike, whose cells nest."""
    pyramid = patchwise.lay(drawn(shapes, share))
    regions, finest, _ = pyramid.shapes[0]
    for r, n, _ in pyramid.shapes:
        assert r == regions
        assert finest % n == 0
    assert pyramid.shapes[-1][1] == 1
    # Two patches share a cell where all stages in use have equal positions, and only there.
    height, width, _ = shapes[0]
    positions = [
        np.arange(h * w).reshape(1, h, w, 1)
        for h, w, _ in (shapes[level.stage] for level in pyramid.levels)
    ]
    stages = [np.zeros((1, height, width, 1)), *positions]
    unlike = patchwise.embeddings(stages, list(range(1, len(stages))))[0]
    together = np.column_stack([pyramid.patches, unlike])
    for found in (pyramid.patches, unlike):
        assert len(np.unique(found, axis=0)) == len(np.unique(together, axis=0))


def test_nested_grids_have_every_cell_once():
    pyramid = patchwise.lay(([(8, 12, 2), (4, 6, 2), (2, 3, 2)], [0, 2, 4]))
    assert pyramid.shapes == ((6, 16, 1), (6, 4, 1), (6, 1, 1))
    for level in pyramid.levels:
        sources = level.source.reshape(-1)
        np.testing.assert_array_equal(np.sort(sources), np.arange(len(sources)))
    np.testing.assert_array_equal(np.sort(pyramid.patches), np.arange(8 * 12))


def test_bfloat16_features_give_float32_embeddings():
    features = [x.astype(jnp.bfloat16) for x in random_features(STAGES["rectangular"])]
    index = channel_index(21, 8, seed=0)
    found = embed(features, index)
    assert found.dtype == jnp.float32
    expected = patchwise.embeddings([np.asarray(x, np.float32) for x in features], index)
    np.testing.assert_array_equal(found, expected)


@on_all_grids
def test_select_makes_nothing_larger_than_the_selected_channels(shapes):
    # The same numbers come from upsampling, or from all channels, at many times the memory.
    pyramid, batch = patchwise.lay(drawn(shapes, 0.4)), 2
    features = [x.astype(jnp.bfloat16) for x in random_features(shapes, batch)]
    jaxpr = jax.make_jaxpr(lambda *stages: select(stages, pyramid))(*features)
    arrays = [variable.aval for eqn in jaxpr.eqns for variable in eqn.outvars]
    sizes = [array.size for array in arrays]  # pyright: ignore[reportAttributeAccessIssue]
    on_grids = [
        batch * len(level.channels) * shapes[level.stage][0] * shapes[level.stage][1]
        for level in pyramid.levels
    ]
    # Where grids are not nested, a level has a few cells twice.
    levels = [batch * r * n * d for r, n, d in pyramid.shapes]
    assert max(sizes) <= max(on_grids + levels)


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
