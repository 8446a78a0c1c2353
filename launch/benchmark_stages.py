"""Times the stages of padim_jax in this process; prints one JSON object on its last line.

    python launch/benchmark_stages.py TASK ...    (started by benchmark.py, which says the rest)

Tasks: "stages" measures every stage, "growth" those whose cost depends on the model,
"score" a fitted model as its users call it: images in memory to maps and scores.
"""

import os

# As padim_jax.main does, and why.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import platform
import tempfile
from collections.abc import Callable
from typing import Any

import benchmark_measure as measure
import jax
import jax.numpy as jnp
import numpy as np

import padim_jax
from padim_jax.config import defaults
from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config
from padim_jax.core import embedding, gaussian, low_rank, scoring
from padim_jax.core.types import Moments, Samples
from padim_jax.data import dataset_splits, input_pipeline
from padim_jax.detector import detector, geometry
from padim_jax.detector import statistics as statistics_lib
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.models.network import build
from padim_jax.models.weights import pretrained
from padim_jax.output import figures, results
from padim_jax.runs import loading
from padim_jax.store import checkpoint

_BATCHES = 4  # that are decoded: as many different images as the stages meet


class Stages:
    """Measures stages, one after the other.

    Attributes:
      found: of every stage its median, spread and repeats in seconds, what one call is
        "of", for how many images if its cost is theirs, the peak memory of the process
        while it ran and how much of that came with it.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.found: dict[str, dict[str, Any]] = {}

    def add(
        self,
        name: str,
        of: str,
        images: int,
        function: Callable[..., Any],
        prepare: Callable[[], tuple] = tuple,
    ) -> Any:
        """Measures a stage; its result of the last call."""
        result: Any = None

        def call(*arguments: Any) -> None:
            nonlocal result
            result = None  # not two of them at a time
            result = jax.block_until_ready(function(*arguments))

        call(*prepare())  # compiles
        measure.reset_peak_memory()
        before, _ = measure.memory()
        times = measure.repeat(call, prepare=prepare, warmup=0, seconds=self.seconds)
        _, peak = measure.memory()
        self.found[name] = {
            **measure.summary(times),
            "of": of,
            "images": images,
            "peak_bytes": peak,
            "added_bytes": peak - before,
        }
        return result


def main() -> None:
    """Measures what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=("stages", "growth", "score"))
    for name in ("data", "weights", "workdir"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--backbone", required=True)
    for name in ("channels", "size", "batch_size", "images"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    if options.task == "score":
        measured = score(options.workdir / "checkpoint", options.seconds)
    else:
        measured = stages(configuration(options), options)
    names = ("jax", "jaxlib", "flax", "numpy", "pillow", "orbax-checkpoint")
    measured["versions"] = {
        "python": platform.python_version(),
        "padim_jax": padim_jax.__version__,
        **{name: importlib.metadata.version(name) for name in names},
    }
    measured["devices"] = [device.device_kind for device in jax.devices()]
    print(json.dumps(measured))


def configuration(options: argparse.Namespace) -> Config:
    """The default configuration for a case."""
    settings: Any = defaults.get_config()
    settings.dataset.root, settings.category = str(options.data.parent), options.data.name
    settings.image.resize = (options.size, options.size)
    settings.model.backbone = options.backbone
    settings.model.weights = str(options.weights)
    settings.model.channels = options.channels
    settings.batch_size = options.batch_size
    return config_lib.validate(settings)


def score(path: pathlib.Path, seconds: float) -> dict[str, Any]:
    """Times a fitted model on images in memory: batches of 32, and single images."""
    fitted = loading.load(path)
    shape = (32, *fitted.config.image.size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def timed(images: np.ndarray) -> dict[str, float]:
        call = functools.partial(detector.score_pixels, fitted, images)
        return measure.summary(measure.repeat(call, warmup=2, seconds=seconds))

    return {"batch_32": timed(images), "single": timed(images[:1])}


def stages(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Times the stages on one device, in the order that data passes through them."""
    devices = Devices(1)
    measured = Stages(options.seconds)
    add, size = measured.add, config.batch_size
    dataset = dataset_splits.open_dataset(config)
    source = input_pipeline.FolderSource(dataset["train"].records[: _BATCHES * size])
    images = len(source.records)
    whole = options.task == "stages"

    def decode() -> list[input_pipeline.Batch]:
        return list(input_pipeline.batches(source, config.image, size))

    batches = add("decode", f"{images} images", images, decode) if whole else decode()

    # Of one batch: images -> feature maps -> levels of the embedding.
    variables, weights = pretrained.load(
        config.model.weights, config.model.backbone, config.model.layers
    )
    variables = parallel.replicate(variables, devices)
    network = build(config.model.backbone, config.model.layers, config.model.precision)
    index = geometry.channel_index(config.model)
    pyramid = geometry.pyramid(config.image, config.model, tuple(index.tolist()))
    pixels = jnp.asarray(batches[0].images, jnp.float32) / 255 - 0.5
    features = add(
        "backbone", "a batch", size, jax.jit(network.apply), lambda: (variables, pixels)
    )
    select = jax.jit(functools.partial(embedding.select, pyramid=pyramid))
    levels = add("embed", "a batch", size, select, lambda: (features,))
    del features
    levels = tuple(x[None] for x in levels)  # of one device

    # Levels -> statistics of all images -> fitted Gaussians.
    shapes, asked = pyramid.shapes, config.model.statistics
    statistics = statistics_lib.init(shapes, options.images, asked, devices)
    form = gaussian if isinstance(statistics, Moments) else low_rank
    update = parallel.mapped(form.update, donated=(0,))
    for start in range(0, options.images, size):
        valid = np.arange(size) < options.images - start
        statistics = update(statistics, levels, parallel.share(valid, devices))

    zero, full = np.int32(0), np.int32(options.images)

    def emptied() -> tuple[Moments | Samples, Any, Any]:
        # Written in place: the last call's result is the next one's argument.
        nonlocal statistics
        statistics = dataclasses.replace(statistics, count=parallel.number(zero, devices))
        return statistics, levels, np.ones((1, size), bool)

    def moments(*arguments: Any) -> None:
        nonlocal statistics
        statistics = jax.block_until_ready(update(*arguments))

    add("moments", "a batch", size, moments, emptied)
    statistics = dataclasses.replace(statistics, count=parallel.number(full, devices))
    with tempfile.TemporaryDirectory(dir=options.workdir) as folder:
        path = pathlib.Path(folder, "checkpoint")
        digests = np.zeros((options.images, 32), np.uint8)  # of which image is which
        state = checkpoint.Fitted(config, index, statistics, weights, shapes[0][0], digests)

        def save() -> None:
            checkpoint.save(path, state, devices)

        def load() -> Moments | Samples:
            return checkpoint.load(path, devices)[0].statistics

        add("checkpoint: save", "the model", 0, save)
        model_bytes = measure.disk_bytes(path)
        add("checkpoint: load", "the model", 0, load)
        del state

    def copied() -> tuple[Moments | Samples, float]:
        # Finalising uses up what it is given.
        copy = jax.block_until_ready(jax.tree.map(jnp.copy, statistics))
        return copy, config.model.regularization

    fitted = add("finalise", "the model", 0, statistics_lib.finalize, copied)
    del statistics

    # Levels -> distances -> maps and scores, and both from images.
    def maps(fitted: Any, levels: Any) -> Any:
        distances = scoring.mahalanobis(fitted, levels)
        found = scoring.anomaly_maps(
            scoring.on_grid(distances, pyramid.patches),
            grid=geometry.patch_grid(config.image, config.model.layers),
            size=config.image.size,
            upsample=config.map.upsample,
            sigma=config.map.sigma,
        )
        return found, jnp.max(found, axis=(1, 2))

    add("score", "a batch", size, parallel.mapped(maps), lambda: (fitted, levels))
    del levels
    model = detector.Detector(config, index, variables, weights, fitted, "", digests)
    add(
        "images to scores",
        "a batch",
        size,
        detector.score_pixels,
        lambda: (model, batches[0].images),
    )
    if whole:
        evaluation(config, model, dataset["test"], measured, options.workdir)
    return {"stages": measured.found, "model_bytes": model_bytes, "form": form.__name__}


def evaluation(
    config: Config,
    model: detector.Detector,
    source: input_pipeline.Source,
    measured: Stages,
    workdir: pathlib.Path,
) -> None:
    """Times what comes after the scores of a whole test set."""
    maps, scores, masks = [], [], []
    for batch in input_pipeline.batches(source, config.image, config.batch_size):
        found = detector.score_pixels(model, batch.images)
        maps.append(found.maps[batch.valid])
        scores.append(found.scores[batch.valid])
        masks += batch.masks
    scored = results.Scored(source.records, masks, np.concatenate(maps), np.concatenate(scores))
    images = len(scored.records)

    def measure() -> tuple[results.Scored, dict]:
        with_pixels = results.with_pixels(scored)
        return with_pixels, results.measure(with_pixels)

    scored, found = measured.add("metrics", f"{images} maps", images, measure)
    scale = figures.color_scale(scored.maps, scored.labels.astype(int))
    found["color_scale"] = [scale.low, scale.high]
    with tempfile.TemporaryDirectory(dir=workdir) as folder:
        place = pathlib.Path(folder)

        def write() -> None:
            results.write(
                place,
                config,
                scored,
                found,
                lambda number: input_pipeline.load_image(source, config.image, number),
            )

        measured.add("figures", f"{config.outputs.figures} of {images} images", 0, write)


if __name__ == "__main__":
    main()
