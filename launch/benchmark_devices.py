"""Measures padim_jax on this process's devices; prints one JSON object on its last line.

    python launch/benchmark_devices.py TASK ...   (started by benchmark.py, which says the rest)

Tasks: "single" measures one device: each stage, what `jax.pmap` costs beside plain
`jax.jit`, the machine's own speed, a whole fit. "devices" takes all devices: what they
send each other, whether they agree with one, and their times.
"""

import os

# As padim_jax.main does, and why.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import re
import shutil
import time
from typing import Any

import benchmark_measure as measure
import jax
import jax.numpy as jnp
import numpy as np
from benchmark_stages import configuration
from jax import lax

from padim_jax.config.settings import Config
from padim_jax.core import gaussian, scoring
from padim_jax.data import dataset_splits, image_cache, input_pipeline
from padim_jax.detector import geometry, steps
from padim_jax.detector import statistics as statistics_lib
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.models.weights import pretrained
from padim_jax.runs import fitting
from padim_jax.store import checkpoint

_BATCHES = 3  # that devices are compared with one device on
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COLLECTIVE = re.compile(
    r"=(?P<shapes>.*?) (?P<name>(?:ragged-)?all-to-all|all-gather|all-reduce|reduce-scatter"
    r"|collective-permute|collective-broadcast)(?P<start>-start)?\("
)


def main() -> None:
    """Measures what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("single", "devices"))
    for name in ("data", "weights", "workdir"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--backbone", required=True)
    for name in ("channels", "size", "batch_size", "images", "devices"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    if jax.local_device_count() != options.devices:
        raise SystemExit(
            f"--devices={options.devices}: there are {jax.local_device_count()} "
            f"({jax.devices()[0].device_kind}); ask for as many as there are, or for virtual "
            "ones with JAX_PLATFORMS=cpu"
        )
    task = single if options.task == "single" else devices
    measured = task(Inputs(configuration(options)), options)
    measured["device_kind"] = jax.devices()[0].device_kind
    print(json.dumps(measured))


class Inputs:
    """What is fitted: a configuration, its backbone, the first batches of its images."""

    def __init__(self, config: Config):
        # What many images are kept as, whatever is the smaller for these.
        model = dataclasses.replace(config.model, statistics="moments")
        self.config = config = dataclasses.replace(config, model=model)
        self.index = tuple(geometry.channel_index(config.model).tolist())
        self.pyramid = geometry.pyramid(config.image, config.model, self.index)
        self.variables, self.weights = pretrained.load(
            config.model.weights, config.model.backbone, config.model.layers
        )
        self.source = dataset_splits.open_dataset(config)["train"]

    def batches(self, count: int, size: int) -> list[input_pipeline.Batch]:
        """Decodes some batches."""
        source = input_pipeline.FolderSource(self.source.records[: count * size])
        return list(input_pipeline.batches(source, self.config.image, size))

    def start(self, devices: Devices) -> Any:
        """Statistics of no image yet."""
        return statistics_lib.init(
            self.pyramid.shapes, len(self.source.records), "moments", devices
        )


# ---- several devices


def devices(inputs: Inputs, options: argparse.Namespace) -> dict[str, Any]:
    """Fits and scores a few batches on all devices and on one of them; times the former."""
    config, every = inputs.config, parallel.every()
    size = every.padded(config.batch_size)
    batches = inputs.batches(_BATCHES, size)
    shapes = inputs.pyramid.shapes
    scored = config.image, config.model, config.map, config.score.image, inputs.index

    def embed(part: Devices, variables: Any, images: Any) -> Any:
        return steps.embed(variables, images, config, inputs.index, part)

    def fit_all(part: Devices) -> tuple[Any, Any]:
        statistics, variables = inputs.start(part), parallel.replicate(inputs.variables, part)
        for batch in batches:
            images, valid = (parallel.share(x, part) for x in (batch.images, batch.valid))
            statistics = steps.fit_batch(statistics, embed(part, variables, images), valid)
        return jax.block_until_ready(statistics), variables

    def score(part: Devices, statistics: Any, variables: Any) -> tuple:
        model = statistics_lib.finalize(statistics, config.model.regularization)
        images = parallel.share(batches[0].images, part)
        return part, variables, model, images

    def scored_by(part: Devices, variables: Any, model: Any, images: Any) -> tuple:
        return steps.score_batch(model, embed(part, variables, images), *scored)

    def results(arguments: tuple) -> list[np.ndarray]:
        return [np.asarray(x).reshape(-1) for x in scored_by(*arguments)]

    (one, one_variables), (statistics, variables) = fit_all(Devices(1)), fit_all(every)
    found: dict[str, Any] = {
        "devices": every.total,
        "batch": size,
        "levels": shapes,
        "statistics_bytes": on_first_device(statistics),
        "statistics_difference": difference(statistics, one, shapes[0][0]),
    }
    expected = results(score(Devices(1), one, one_variables))
    del one, one_variables
    arguments = score(every, statistics, variables)
    del statistics  # used up
    maps, scores, _ = results(arguments)
    found["map_difference"] = relative(maps, expected[0])
    found["score_difference"] = relative(scores, expected[1])

    def score_once() -> None:
        jax.block_until_ready(scored_by(*arguments))

    levels = embed(every, variables, arguments[-1])
    sent = [
        collectives(_compiled(*program), every.total)
        for program in (
            (
                *(steps.embed_batch, variables, arguments[-1], config.image, config.model),
                *(inputs.index, steps.at_a_time(config, every)),
            ),
            (steps.score_batch, arguments[2], levels, *scored),
        )
    ]
    found["score"] = {
        **measure.summary(measure.repeat(score_once, seconds=options.seconds)),
        "collectives": [*sent[0], *sent[1]],
    }
    del arguments
    held = inputs.start(every)
    images, valid = (parallel.share(x, every) for x in (batches[0].images, batches[0].valid))
    fitted = collectives(_compiled(steps.fit_batch, held, levels, valid), every.total)

    def fit_once() -> None:
        nonlocal held
        levels = embed(every, variables, images)
        held = jax.block_until_ready(steps.fit_batch(held, levels, valid))

    found["fit"] = {
        **measure.summary(measure.repeat(fit_once, seconds=options.seconds)),
        "collectives": [*sent[0], *fitted],
    }
    return found


def _compiled(function: Any, *arguments: Any) -> str:
    return function.lower(*arguments).compile().as_text()


def collectives(compiled: str, size: int) -> list[dict[str, Any]]:
    """What a compiled program sends from device to device, read from its HLO.

    Args:
      compiled: the program's text. All its collectives are of all devices.
      size: how many devices.

    Returns:
      Of each collective its name and the bytes that leave a device.
    """
    found = []
    for line in compiled.splitlines():
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        # XLA's CPU backend writes an all-to-all as a tuple of slices, one a device.
        arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", match["shapes"])
        counts = [
            _BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n)
            for kind, shape in arrays
        ]
        if match["start"] and match["name"] in ("all-gather", "collective-permute"):
            counts = counts[len(counts) // 2 :]  # operands come first
        found.append(
            {"name": match["name"], "bytes": _leaving(match["name"], sum(counts), size)}
        )
    return found


def _leaving(name: str, result: int, size: int) -> float:
    """Bytes that leave a device, for a collective's result of so many bytes."""
    others = (size - 1) / size
    if name == "all-reduce":  # as a reduce-scatter and an all-gather
        return 2 * result * others
    if name == "reduce-scatter":
        return result * (size - 1)
    if name == "collective-permute":
        return result
    return result * others  # all-to-all; all-gather, of which result / size are a device's


def on_first_device(tree: Any) -> int:
    """Bytes of arrays that one device holds."""
    first = jax.local_devices()[0]
    shards = (shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == first)


def difference(a: Any, b: Any, regions: int) -> float:
    """The largest of all arrays' differences; see `relative`."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    joined = ((parallel.join(x, regions), parallel.join(y, regions)) for x, y in pairs)
    return max(relative(x, y) for x, y in joined)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference from b, relative to b's largest number."""
    return float(np.max(np.abs(a - b)) / np.max(np.abs(b)))


# ---- one device


def single(inputs: Inputs, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one device: what a prediction starts from, and what it is compared with."""
    return {
        "images": len(inputs.source.records),
        "batch": inputs.config.batch_size,
        "cores": os.cpu_count(),
        "speed": speed(inputs.config, options.seconds),
        "decode": decode(inputs, options),
        "overhead": overhead(inputs, options),
        "stages": stages(inputs, options),
        "train": train(inputs, options),
    }


def speed(config: Config, seconds: float) -> dict[str, float]:
    """The machine's own at best: products of large matrices in FLOP/s, copying in bytes/s."""
    large = jax.default_backend() != "cpu" and seconds > 0
    size = 8192 if large else 2048 if seconds else 256
    x = jnp.asarray(np.random.default_rng(0).random((size, size), np.float32))
    narrow = x.astype(jnp.bfloat16) if config.model.precision == "bfloat16" else x

    def product_rate(precision: lax.Precision, x: jax.Array) -> float:
        function = jax.jit(functools.partial(jnp.matmul, precision=precision))
        times = measure.repeat(
            lambda: jax.block_until_ready(function(x, x)), seconds=min(seconds, 2.0)
        )
        return 2 * size**3 / min(times)

    copied = jnp.zeros((64 if seconds else 1) * 2**20, jnp.float32)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy_once() -> None:
        nonlocal copied
        copied = jax.block_until_ready(copy(copied))

    times = measure.repeat(copy_once, seconds=min(seconds, 2.0))
    return {
        "backbone": product_rate(lax.Precision.DEFAULT, narrow),
        "products": product_rate(lax.Precision.HIGHEST, x),
        "memory": 2 * copied.nbytes / min(times),
    }


def decode(inputs: Inputs, options: argparse.Namespace) -> dict[str, float]:
    """Seconds an image, all cores at it: from the file, and from the cache."""
    config, size = inputs.config, inputs.config.batch_size
    source = input_pipeline.FolderSource(inputs.source.records[: 4 * size])
    folder = options.workdir / "decode"
    shutil.rmtree(folder, ignore_errors=True)
    cache = image_cache.open_cache(dataclasses.replace(config.cache, dir=folder))

    def read(cache: Any) -> float:
        def once() -> None:
            list(input_pipeline.batches(source, config.image, size, cache))

        # The first call fills the cache.
        times = measure.repeat(once, seconds=options.seconds)
        return measure.summary(times)["median"] / len(source.records)

    found = {"files": read(None), "cached": read(cache)}
    shutil.rmtree(folder)
    return found


@functools.partial(jax.jit, static_argnums=(4, 5, 6), donate_argnums=0)
def plain_fit(
    statistics: Any, variables: Any, images: Any, valid: Any, image: Any, model: Any, index: Any
) -> Any:
    """`steps.fit_batch` of one device, without parallel.py."""
    levels = steps.extract(variables, images, image=image, model=model, index=index)
    return gaussian.update(statistics, levels, valid)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def plain_score(
    variables: Any, fitted: Any, images: Any, image: Any, model: Any, map_: Any, index: Any
) -> Any:
    """`steps.score_batch` of one device, without parallel.py."""
    levels = steps.extract(variables, images, image=image, model=model, index=index)
    patches = geometry.pyramid(image, model, index).patches
    maps = scoring.anomaly_maps(
        scoring.on_grid(scoring.mahalanobis(fitted, levels), patches),
        grid=geometry.patch_grid(image, model.layers),
        size=image.size,
        upsample=map_.upsample,
        sigma=map_.sigma,
    )
    return maps, jnp.max(maps, axis=(1, 2))


def overhead(inputs: Inputs, options: argparse.Namespace) -> dict[str, Any]:
    """Times what parallel.py maps over one device beside the same under plain jit."""
    config, one = inputs.config, Devices(1)
    (batch,) = inputs.batches(1, config.batch_size)
    static = config.image, config.model
    mapped_variables = parallel.replicate(inputs.variables, one)
    variables = jax.device_put(inputs.variables)
    held = inputs.start(one)
    plain = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), held)
    images, valid = parallel.share(batch.images, one), parallel.share(batch.valid, one)

    def fit_mapped() -> None:
        nonlocal held
        levels = steps.embed(mapped_variables, images, config, inputs.index, one)
        held = steps.fit_batch(held, levels, valid)
        jax.block_until_ready(held)

    def fit_plain() -> None:
        nonlocal plain
        plain = plain_fit(plain, variables, images[0], valid[0], *static, inputs.index)
        jax.block_until_ready(plain)

    def compare(mapped: Any, plain: Any) -> dict[str, float]:
        return compared(*measure.alternate(mapped, plain, seconds=4 * options.seconds))

    found = {"fit": compare(fit_mapped, fit_plain)}
    del plain
    mapped_model = statistics_lib.finalize(held, config.model.regularization)
    plain_model = jax.tree.map(lambda x: x[0], mapped_model)
    for name, count in (("score", config.batch_size), ("score, single image", 1)):
        part, scored = images[:, :count], (config.map, config.score.image, inputs.index)

        def mapped(part: Any = part, scored: Any = scored) -> Any:
            levels = steps.embed(mapped_variables, part, config, inputs.index, one)
            return steps.score_batch(mapped_model, levels, *static, *scored)

        rest = (*static, config.map, inputs.index)
        plainly = functools.partial(plain_score, variables, plain_model, part[0], *rest)
        found[name] = compare(
            lambda mapped=mapped: jax.block_until_ready(mapped()),
            lambda plainly=plainly: jax.block_until_ready(plainly()),
        )
    return found


def compared(mapped: list[measure.Seconds], plain: list[measure.Seconds]) -> dict[str, float]:
    """Medians of both times, and of the pairs' ratios.

    What the threads worked is less moved by other processes than what passed, which is
    what counts.
    """
    pairs = list(zip(mapped, plain, strict=True))
    ratios = measure.summary([a / b for (a, _), (b, _) in pairs])
    return {
        "mapped": measure.summary([seconds for seconds, _ in mapped])["median"],
        "plain": measure.summary([seconds for seconds, _ in plain])["median"],
        "ratio": ratios["median"],
        "spread": ratios["spread"],
        "work_ratio": measure.summary([a / b for (_, a), (_, b) in pairs])["median"],
        "pairs": len(pairs),
    }


def stages(inputs: Inputs, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of what a fit is made of: of a batch, and of the model."""
    config, one = inputs.config, Devices(1)
    (batch,) = inputs.batches(1, config.batch_size)
    variables, images = jax.device_put(inputs.variables), batch.images
    extract = functools.partial(
        steps.extract, image=config.image, model=config.model, index=inputs.index
    )
    levels = jax.block_until_ready(extract(variables, images))
    times = measure.repeat(
        lambda: jax.block_until_ready(extract(variables, images)), seconds=options.seconds
    )
    found = {"backbone": measure.summary(times)["median"]}
    alone = jax.tree.map(lambda x: x[0], inputs.start(one))
    update = jax.jit(gaussian.update, donate_argnums=0)

    def update_once() -> None:
        nonlocal alone
        alone = jax.block_until_ready(update(alone, levels, batch.valid))

    times = measure.repeat(update_once, seconds=options.seconds)
    found["moments"] = measure.summary(times)["median"]
    held = jax.tree.map(lambda x: x[None], alone)
    del alone, levels
    index = np.asarray(inputs.index)
    state = checkpoint.Fitted(
        config,
        index,
        held,
        inputs.weights,
        inputs.pyramid.shapes[0][0],
        np.zeros((options.images, 32), np.uint8),
    )
    path = options.workdir / "checkpoint"
    times = measure.repeat(
        lambda: checkpoint.save(path, state, one), seconds=options.seconds, most=5
    )
    found["checkpoint"] = measure.summary(times)["median"]
    found["checkpoint_bytes"] = measure.disk_bytes(path)
    del state

    def copied() -> tuple[Any, float]:
        copy = jax.tree.map(jnp.copy, held)
        return jax.block_until_ready(copy), config.model.regularization

    def finalise(statistics: Any, regularization: float) -> None:
        jax.block_until_ready(statistics_lib.finalize(statistics, regularization))

    times = measure.repeat(finalise, prepare=copied, seconds=options.seconds, most=10)
    found["finalise"] = measure.summary(times)["median"]
    return found


def train(inputs: Inputs, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of whole fits, compiled before; no image is cached."""
    cache = dataclasses.replace(inputs.config.cache, images_gb=0.0)
    config = dataclasses.replace(inputs.config, cache=cache)
    path = options.workdir / "train" / "checkpoint"
    times = []
    for _ in range(3 if options.seconds else 2):
        shutil.rmtree(path.parent, ignore_errors=True)
        start = time.perf_counter()
        fitted = fitting.train(config, inputs.source, path)
        jax.block_until_ready(fitted.gaussian)
        times.append(time.perf_counter() - start)
        del fitted
    return measure.summary(times[1:])


if __name__ == "__main__":
    main()
