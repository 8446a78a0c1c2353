"""Devices: shares, what goes over the wire, and results that do not depend on their number.

Runs on virtual CPU devices, of which `conftest.py` asks for eight.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import patchwise
import pytest

from padim_jax.config import defaults
from padim_jax.config.settings import Config, validate
from padim_jax.core import gaussian, reduction
from padim_jax.detector import detector, geometry, steps
from padim_jax.detector import statistics as statistics_lib
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.models.weights import pretrained

counts = pytest.mark.parametrize("count", [1, 8])


# One device, regions that devices divide, and that they do not, fewer than they are and more.
@pytest.mark.parametrize(("regions", "count"), [(5, 1), (16, 4), (1, 4), (19, 8)])
class TestSharingOut:
    def test_split_and_join(self, regions: int, count: int):
        tree = {
            "numbers": np.arange(regions * 6, dtype=np.float32).reshape(regions, 2, 3),
            "one": np.array(7.0, np.float32),
        }
        devices = Devices(count)
        shared = parallel.split(tree, devices)
        own = -(-regions // count)
        assert shared["numbers"].shape == (count, own, 2, 3)
        for shard in shared["numbers"].addressable_shards:
            assert shard.data.shape == (1, own, 2, 3)
        assert np.array_equal(shared["one"], np.full(count, 7.0))
        # Beyond the last region there is nothing.
        padding = np.asarray(shared["numbers"]).reshape(-1, 2, 3)[regions:]
        assert not np.any(padding)
        joined = parallel.join(shared, regions)
        np.testing.assert_array_equal(joined["numbers"], tree["numbers"])
        assert joined["one"] == 7.0

    def test_from_images_to_regions_and_back(self, regions: int, count: int):
        rng = np.random.default_rng(0)
        images = 2 * count
        levels = [rng.normal(size=(regions, n, 3, images)).astype(np.float32) for n in (4, 1)]

        def exchange(x: jax.Array, y: jax.Array) -> Any:
            regional = parallel.to_regions((x, y))
            return regional, parallel.to_images(regional[0][:, :, 0])

        # The images' axis is the last, and shared out.
        given = [np.stack(np.split(level, count, axis=-1)) for level in levels]
        found, back = parallel.mapped(exchange)(*given)
        own = -(-regions // count)
        for level, result in zip(levels, found, strict=True):
            assert result.shape == (count, own, *level.shape[1:])
            np.testing.assert_array_equal(parallel.join(result, regions), level)
        together = np.concatenate(list(np.asarray(back)), axis=-1)
        np.testing.assert_array_equal(together[:regions], levels[0][:, :, 0])
        assert not np.any(together[regions:])

    def test_global_arrays_are_the_regions_in_order(self, regions: int, count: int):
        devices, x = Devices(count), np.arange(regions * 2.0, dtype=np.float32)
        shared = parallel.split(x.reshape(regions, 2), devices)
        stored = parallel.as_global({"x": shared}, devices)["x"]
        assert stored.shape == (devices.padded(regions), 2)
        assert {shard.data.shape for shard in stored.addressable_shards} == {
            (devices.padded(regions) // count, 2)
        }
        np.testing.assert_array_equal(np.asarray(stored)[:regions].ravel(), x)
        again = parallel.from_global({"x": stored}, devices)["x"]
        np.testing.assert_array_equal(again, shared)
        assert not shared.is_deleted()

    def test_parts_are_each_devices_own(self, regions: int, count: int):
        devices, x = Devices(count), np.arange(1.0, regions + 1).astype(np.float32)
        found = np.zeros(devices.padded(regions), np.float32)
        for first, part in parallel.parts(parallel.split(x[:, None], devices), devices):
            found[first : first + len(part)] = part[:, 0]
        np.testing.assert_array_equal(found[:regions], x)


def make_config(**model: Any) -> Config:
    values: Any = defaults.get_config()
    values.dataset.root = "/nowhere"
    values.image.resize = (80, 48)  # 5 x 3 regions: an odd number
    values.model.weights, values.model.channels = "random", 20
    values.model.update(model)
    return validate(values)


NO_DIGESTS = np.zeros((15, 32), np.uint8)  # of the files that random images are not from


def fit_and_score(
    config: Config, images: np.ndarray, count: int, form: str
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The statistics' numbers, of all images but the last; those images' maps and scores."""
    devices = Devices(count)
    index = geometry.channel_index(config.model)
    shapes = geometry.pyramid(config.image, config.model, index.tolist()).shapes
    variables, identity = pretrained.load("random", config.model.backbone, config.model.layers)
    projection = None
    if geometry.is_projected(config.model):
        total = geometry.total_channels(config.model)
        projection = reduction.semi_orthogonal(total, config.model.channels, seed=0)
    variables = steps.with_projection(variables, projection)
    variables = parallel.replicate(variables, devices)
    statistics = statistics_lib.init(shapes, len(images) - 1, form, devices)
    size = len(images) // 2
    for start in (0, size):
        valid = np.arange(start, start + size) < len(images) - 1
        shared = parallel.share(images[start : start + size], devices)
        levels = steps.embed(variables, shared, config, tuple(index.tolist()), devices)
        statistics = steps.fit_batch(statistics, levels, parallel.share(valid, devices))
    whole = parallel.join(jax.tree.leaves(statistics), shapes[0][0])
    fitted = statistics_lib.finalize(statistics, config.model.regularization)
    found = detector.score_pixels(
        detector.Detector(config, index, variables, identity, fitted, "", NO_DIGESTS),
        images[:-1],
    )
    return whole, found.maps, found.scores


@pytest.mark.parametrize(
    ("form", "model"),
    [
        ("moments", {"layers": ("layer1", "layer2")}),
        # Every patch has its own channels.
        (
            "samples",
            {
                "reduction": "semi_orthogonal",
                "layers": ("layer1", "layer2"),
                "channels": 40,
                "pooling": 3,
                "upsample": "bilinear",
            },
        ),
    ],
    ids=str,
)
def test_results_do_not_depend_on_the_number_of_devices(form: str, model: dict):
    config = make_config(**model)
    shape = (16, *config.image.size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    statistics, maps, scores = fit_and_score(config, images, 1, form)
    assert len(maps) == len(scores) == 15  # which no number of devices divides
    others = fit_and_score(config, images, 8, form)
    assert others[0][0] == statistics[0] == 15
    # The same sums in the same order; only convolutions of another number of images may be
    # summed in another: some roundoffs (2^-24) of the largest feature, squared in moments;
    # measured 7e-7. Distances amplify it by the covariances' condition, 1e3 here.
    for x, y in zip(statistics, others[0], strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=2e-6 * np.abs(x).max())
    np.testing.assert_allclose(others[1], maps, rtol=2e-5)  # measured 6e-7
    np.testing.assert_allclose(others[2], scores, rtol=2e-5)


def collectives(compiled: Any) -> list[tuple[str, int]]:
    """Every collective of a compiled program: its name and the bytes that it gives a device."""
    sizes = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "f16": 2, "bf16": 2}
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(r"= (.*?) ([a-z-]+)(-start)?\(", line)
        if match is None or not re.match(
            r"all-|reduce-scatter|collective|ragged|send|recv", match[2]
        ):
            continue
        parts = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
        found.append(
            (
                match[2],
                sum(sizes[t] * math.prod(int(n) for n in s.split(",") if n) for t, s in parts),
            )
        )
    return found


def compile_(function: Any, *arguments: Any) -> Any:
    # What `lower` describes statistics by are no arrays.
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        return function.lower(*arguments).compile()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_the_parser_of_collectives_finds_them():
    both = parallel.mapped(
        lambda x: (jax.lax.all_gather(x, parallel.AXIS), jax.lax.psum(x, parallel.AXIS))
    )
    found = collectives(compile_(both, np.zeros((4, 10), np.float32)))
    assert sorted(found) == [("all-gather", 160), ("all-reduce", 40)]


@pytest.mark.parametrize("form", ["moments", "samples"])
def test_only_embeddings_cross_the_wire(form: str, optimized: None):
    config, devices, images = make_config(layers=("layer1", "layer2")), Devices(4), 32
    index = tuple(geometry.channel_index(config.model).tolist())
    pyramid = geometry.pyramid(config.image, config.model, index)
    shapes = pyramid.shapes
    variables, _ = pretrained.load("random", config.model.backbone, config.model.layers)
    variables = parallel.replicate(variables, devices)
    pixels = np.zeros((4, images // 4, *config.image.size, 3), np.uint8)
    statistics = statistics_lib.init(shapes, 40, form, devices)
    given = variables, pixels, config.image, config.model, index
    compiled = compile_(steps.embed_batch, *given, images // 4)
    # Of its regions a device gets all images' embeddings.
    regions = devices.padded(shapes[0][0]) // 4
    embeddings = [4 * regions * n * d * images for _, n, d in shapes]
    assert sorted(collectives(compiled)) == sorted(("all-to-all", x) for x in embeddings)
    levels = steps.embed(variables, pixels, config, index, devices)
    valid = np.ones((4, images // 4), bool)
    compiled = compile_(steps.fit_batch, statistics, levels, valid)
    # Which images are valid, a byte each.
    assert collectives(compiled) == [("all-gather", images)]
    # A device's statistics alone are more than that; all together a batch must not move.
    statistics_bytes = sum(x.nbytes for x in jax.tree.leaves(statistics)) // 4
    assert statistics_bytes > images

    size = config.model.regularization
    finalize = compile_(statistics_lib._finalize, statistics, np.full(4, size, np.float32))
    found = collectives(finalize)
    assert {name for name, _ in found} == {"all-gather"}
    # Of every region a flag and a float32.
    assert sum(size for _, size in found) <= 5 * devices.padded(shapes[0][0])

    for _ in range(2):
        statistics = steps.fit_batch(statistics, levels, valid)
    if form == "moments":
        fitted = statistics_lib.finalize(statistics, size)
        compiled = compile_(
            steps.score_batch,
            *(fitted, levels, config.image, config.model),
            *(config.map, config.score.image, index),
        )
        cells = shapes[0][1]
        distances = 4 * devices.padded(shapes[0][0]) * cells * images // 4
        # And of each image about 2,000 numbers to compare images by.
        own = [size // (4 * images) for size in embeddings]
        stride = -(-4 * sum(own) // 2048)
        samples = 4 * images * sum(-(-size // stride) for size in own)
        assert sorted(collectives(compiled)) == sorted(
            ("all-to-all", size) for size in [distances, samples]
        )


def test_every_device_has_its_share_of_the_statistics():
    shapes = patchwise.lay(patchwise.CASES["three levels"]).shapes
    assert shapes[0][0] == 4
    for form in ("moments", "samples"):
        for count in (1, 8):
            statistics = statistics_lib.init(shapes, 10, form, Devices(count))
            for x in jax.tree.leaves(statistics):
                if x.ndim > 1:
                    assert x.shape[:2] == (count, -(-4 // count))
                for shard in x.addressable_shards:
                    assert shard.data.shape == (1, *x.shape[1:])


def test_merging_and_extending_keep_the_regions_apart():
    """Pure per region: nothing but a region's own numbers enters it."""
    case = patchwise.CASES["three levels"]
    shapes = patchwise.lay(case).shapes
    levels, _ = patchwise.random_levels(case, 8)
    (batch, valid), *_ = patchwise.batches(levels, [8])
    update = jax.jit(gaussian.update)
    parts = [
        parallel.split(update(gaussian.init(shapes), batch, valid & half), Devices(8))
        for half in (np.arange(8) < 4, np.arange(8) >= 4)
    ]
    together = statistics_lib.merge(parts[0], parts[1], shapes, "auto")
    merged = parallel.join(jax.tree.leaves(together), shapes[0][0])
    whole = update(gaussian.init(shapes), batch, valid)
    assert merged[0] == 8
    for x, y in zip(merged, jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * float(jnp.max(jnp.abs(y))), rtol=0)


def test_processes_tell_each_other_texts_of_different_lengths(monkeypatch: pytest.MonkeyPatch):
    said = [b"", b"abc\0", b"x" * 300]
    gathered = []

    def gather(array: np.ndarray) -> np.ndarray:
        # What the others give for the same question: all of one shape.
        if array.dtype == np.int32:
            return np.array([len(text) for text in said], np.int32)
        gathered.append(array)
        rows = [np.frombuffer(text.ljust(300, b"\0"), np.uint8) for text in said]
        return np.stack(rows)

    monkeypatch.setattr(parallel, "gather", gather)
    for text in said:
        assert parallel.gather_bytes(text) == said
        assert gathered[-1].shape == (1, 300)
        assert gathered[-1].tobytes() == text.ljust(300, b"\0")
    monkeypatch.undo()
    assert parallel.gather_bytes(b"alone") == [b"alone"]
    assert parallel.gather_bytes(b"") == [b""]
