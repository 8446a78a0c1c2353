"""Normal images -> a fitted model on disk: fit, go on with a fit, extend it, merge several."""

import collections
import dataclasses
import hashlib
import operator
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config, ModelConfig
from padim_jax.core import reduction
from padim_jax.core.types import Moments, Projection
from padim_jax.data import (
    copies,
    decoding,
    image_cache,
    input_pipeline,
    passes,
    roi,
    sampling,
    skipping,
    summary,
    survey,
)
from padim_jax.data.files import shown
from padim_jax.data.records import Record, Source
from padim_jax.detector import geometry, memory, steps
from padim_jax.detector import statistics as statistics_lib
from padim_jax.detector.detector import Detector
from padim_jax.detector.embeddings import Embeddings
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import DataWarning, Stopped, UserError
from padim_jax.models.weights import pretrained
from padim_jax.models.weights.identity import WeightsIdentity
from padim_jax.runs import results_folder
from padim_jax.store import checkpoint, statistics_store
from padim_jax.store.checkpoint import Fitted
from padim_jax.store.statistics_store import OnDisk, Store
from padim_jax.system import compilation_cache, interrupts, paths, progress
from padim_jax.system.paths import Path

Backbone = tuple[Any, WeightsIdentity]  # variables, and what identifies them


def load_backbone(model: ModelConfig, devices: Devices) -> Backbone:
    """A configuration's backbone, on the devices; see `pretrained.load`."""
    variables, weights = pretrained.load(model.weights, model.backbone, model.layers)
    return parallel.replicate(variables, devices), weights


def train(
    config: Config,
    source: Source,
    path: Path,
    backbone: Backbone | None = None,
    tests: int = 0,
    left_out: int = 0,
    embeddings: Embeddings | None = None,
) -> Detector:
    """Fit a detector to normal images and save it.

    A fit of the same images and settings that was interrupted goes on where it was last
    saved; its result is the same. On SIGTERM it is saved and stopped.

    Args:
      config: what to fit.
      source: the normal images. Of files that are the same the first one counts.
      path: the checkpoint's folder.
      backbone: the configuration's, if it is loaded already.
      tests: so many images are evaluated next, for which there has to be memory as well.
      left_out: how many images the detector is to leave out at a time; see
        `statistics.finalize`.
      embeddings: extended by those of the images that are fitted now, if given.

    Returns:
      The fitted detector.

    Raises:
      UserError: too few images, an unreadable one, weights that cannot be had, or an
        interrupted fit of something else.
      Stopped: by SIGTERM.
    """
    devices = parallel.every()
    _check_place(path, devices)
    source = copies.distinct(source, devices)
    if (count := len(source.records)) < 2:
        raise UserError(
            f"config.dataset.root={config.dataset.root}: {count} normal image(s) to fit; a "
            "covariance needs at least 2 (MVTec AD's categories have 60 to 391)"
        )
    kept = 0 if embeddings is None else memory.embeddings_to_keep(config, count, devices)
    memory.require(config, count, devices, tests, embeddings=kept)
    variables, weights = backbone or load_backbone(config.model, devices)
    progress.say(f"weights: {weights.origin}")
    fitted = checkpoint.load_unfinished(path, devices)
    if fitted is not None:
        listed = f"train {passes.listing(source, devices)}"
        _require_resumable(path, fitted, config, weights, listed)
        statistics_store.require_whole(path, fitted, fitted.statistics)
        # Names are not enough: files may have been replaced meanwhile.
        done = source.digests[: len(fitted.images)]
        if not np.array_equal(done, fitted.images):
            changed = int(np.argmax(np.any(done != fitted.images, axis=1)))
            name = source.records[changed].image
            raise UserError(f"{_other_unfinished(path)} ({name} has changed since)")
        progress.say(
            f"going on with an interrupted fit, after {len(fitted.images)} of {count} images"
        )
    else:
        with interrupts.sigterm() as asked:
            fitted = begin(config, source, (variables, weights), devices, asked)
    start = len(fitted.images)
    return _fit(
        *(fitted, source, start, config, variables, path, devices, left_out),
        embeddings if kept else None,
    )


@dataclasses.dataclass(frozen=True)
class Extended:
    """Result of `update`, and of `forget`.

    Attributes:
      detector: the extended model, or the one that has forgotten.
      source: the images that were to be added and can be read, all of which are in it now; or
        those that were to be forgotten, none of which are.
      digests: SHA-256 of their files.
      changed: how many of them were added or forgotten.
    """

    detector: Detector
    source: Source
    digests: UInt8[np.ndarray, "n 32"]
    changed: int


def update(
    path: Path,
    source: Source,
    config: Config | config_lib.Overrides | None = None,
    weights: str | None = None,
    check: Callable[[Config, UInt8[np.ndarray, "m 32"]], None] | None = None,
) -> Extended:
    """Extend a fitted model by normal images that are not in it yet.

    The result is that of one fit to all, up to rounding. It has no thresholds; see
    `grow.update`, which also locks the checkpoint.

    Args:
      path: the checkpoint's folder; the extended model replaces it.
      source: normal images. Those that the model was fitted to are left out: their
        files' contents are known.
      config: None takes the model's own; see `config.resolve` and `require_same`.
      weights: where the backbone's weights are now; see `loading.load`.
      check: called before the fit, if there is anything to fit, with the configuration and
        the SHA-256 of all images that the extended model is fitted to.

    Raises:
      UserError: no checkpoint, other settings or weights than it was fitted with, an
        unreadable image, or too little memory.
      Stopped: by SIGTERM.
    """
    devices = parallel.every()
    fitted, identity = statistics_store.load_checkpoint(path, devices)
    config = config_lib.resolve(config, fitted.config)
    config = with_stored_roi(config, fitted.config)
    require_same(path, fitted.config, config)
    warn_implausible(path, fitted.config)
    config = with_stored_range(config, fitted.config)
    cache = image_cache.open_cache(config.cache)
    sources, _ = skipping.readable({"input": source}, config, devices, cache)
    source = sources["input"]
    variables = load_weights(path, fitted.weights, config, weights)
    known = {digest.tobytes() for digest in fitted.images}
    files = survey.read({"input": source}, devices, config.image, cache)
    survey.tell(summary.summarize(files), devices)
    source = copies.distinct(source, devices, survey.hashes(files["input"]))
    digests = source.digests
    new = [i for i, digest in enumerate(digests) if digest.tobytes() not in known]
    if len(new) < len(source.records):
        left_out = len(source.records) - len(new)
        progress.say(
            f"{left_out} of {len(source.records)} images are in {path} already: left out"
        )
    warn_forgotten(fitted, sampling.part(source, new), digests[new], devices)
    start, marker = 0, f"update {identity}"
    unfinished = checkpoint.load_unfinished(path, devices)
    if unfinished is not None:
        done = unfinished.images[len(fitted.images) :]
        start = len(done)
        if unfinished.unfinished != marker or not np.array_equal(done, digests[new[:start]]):
            raise UserError(_other_unfinished(path))
        progress.say(f"going on with an interrupted update, after {start} of {len(new)} images")
    elif not new:
        progress.say(f"nothing to add: {path} is as it was")
        variables = steps.with_projection(variables, fitted.projection)
        variables = parallel.replicate(variables, devices)
        return Extended(
            statistics_store.ready(fitted, identity, config, variables), source, digests, 0
        )
    total = len(fitted.images) + len(new)
    memory.require(config, total, devices)
    if check is not None:
        check(config, np.concatenate([fitted.images, digests[new]]))
    shapes = geometry.pyramid(config.image, config.model, fitted.index.tolist()).shapes
    fitted = unfinished or fitted
    extended = dataclasses.replace(
        fitted,
        statistics=statistics_lib.extend(
            fitted.statistics, shapes, total, fitted.config.model.statistics
        ),
        unfinished=marker,
        forgotten=without(fitted.forgotten, digests[new]),
    )
    del fitted, unfinished  # whose statistics are used up, or would be there twice
    with compilation_cache.enabled(config.cache.programs):
        part = sampling.part(source, new)
        detector = _fit(extended, part, start, config, variables, path, devices)
    return Extended(detector, source, digests, len(new))


def forget(
    path: Path,
    source: Source,
    config: Config | config_lib.Overrides | None = None,
    weights: str | None = None,
    check: Callable[[Config, UInt8[np.ndarray, "m 32"]], None] | None = None,
) -> Extended:
    """Remove images that a model was fitted to; the inverse of `update`.

    The result is that of one fit to the others, up to rounding. It has no thresholds; see
    `grow.forget`, which also locks the checkpoint.

    Args:
      path: the checkpoint's folder; the model without the images replaces it.
      source: the images, all of which the model was fitted to; told by their files' contents.
      config: see `update`.
      weights: see `update`.
      check: called before the model changes, if it does, with the configuration and the SHA-256
        of all images that it is fitted to now.

    Raises:
      UserError: see `forgettable` and `without_images`; or no checkpoint, other settings or
        weights than it was fitted with, an unreadable image, or too little memory.
      Stopped: by SIGTERM.
    """
    devices = parallel.every()
    fitted, identity = statistics_store.load_checkpoint(path, devices)
    config = config_lib.resolve(config, fitted.config)
    require_same(path, fitted.config, config)
    config = with_stored_range(config, fitted.config)
    found = copies.distinct(source, devices)
    variables = load_weights(path, fitted.weights, config, weights)
    variables = parallel.replicate(steps.with_projection(variables, fitted.projection), devices)
    part = forgettable(path, fitted, found)
    if not (count := len(part.records)):
        progress.say(f"nothing to forget: {path} is as it was")
        ready = statistics_store.ready(fitted, identity, config, variables)
        return Extended(ready, found, found.digests, 0)
    if checkpoint.load_unfinished(path, devices) is not None:
        raise UserError(_other_unfinished(path))
    if isinstance(fitted.statistics, Moments):
        memory.require(config, len(fitted.images), devices, kept=True)  # those of the part, too
    if check is not None:
        check(config, fitted.images)
    with (
        compilation_cache.enabled(config.cache.programs),
        interrupts.sigterm() as asked,
    ):
        left = without_images(path, fitted, part, config, variables, devices, asked)
        del fitted  # whose statistics are used up
        progress.say(f"forgot {count} images")
        detector = _save(left, part, config, variables, path, devices, asked)
    return Extended(detector, found, found.digests, count)


def forgettable(place: Path | str, fitted: Fitted, source: copies.Distinct) -> copies.Distinct:
    """Return the images that a model was fitted to, without those that it has forgotten.

    Args:
      place: where the model is, for messages.
      fitted: the model.
      source: images to forget.

    Raises:
      UserError: an image was never fitted, or fewer than two are left.
    """
    known, gone = (set(map(bytes, x)) for x in (fitted.images, fitted.forgotten))
    digests = list(map(bytes, source.digests))
    names = [shown(record.image) for record in source.records]
    never = [x for x, digest in zip(names, digests, strict=True) if digest not in known | gone]
    if never:
        raise UserError(
            f"{', '.join(never[:3])}{', ...' * (len(never) > 3)}: {len(never)} of {len(names)} "
            f"images to forget were never fitted by {place} (a file's content counts, not its "
            "name); expected images that were"
        )
    numbers = [i for i, digest in enumerate(digests) if digest in known]
    if len(numbers) < len(digests):
        progress.say(f"{len(digests) - len(numbers)} images were forgotten before: left out")
    left = len(without(fitted.images, source.digests))
    if numbers and left < 2:
        raise UserError(
            f"{place}: fitted to {len(fitted.images)} images, of which {left} would be left; a "
            "covariance needs at least 2"
        )
    return source.part(np.array(numbers, int))


def without_images(
    place: Path | str,
    fitted: Fitted,
    source: copies.Distinct,
    config: Config,
    variables: Any,
    devices: Devices,
    asked: Callable[[], bool] = lambda: False,
) -> Fitted:
    """Return a model without some of its images; its statistics are used up.

    Samples lose these images' rows. Of moments those of the images are taken away, which are
    read again for it.

    Args:
      place: where the model is, for messages.
      fitted: the model.
      source: images that it was fitted to, of which at least two others are left.
      config: in use.
      variables: the backbone's, and the projection, on the devices.
      devices: that take part.
      asked: whether to stop.

    Raises:
      UserError: rounding would leave too little of moments; or they are of random views.
      Stopped: `asked` said so.
    """
    removed = set(map(bytes, source.digests))
    rows = [i for i, digest in enumerate(fitted.images) if bytes(digest) not in removed]
    statistics, again = fitted.statistics, "fit again without them"
    if isinstance(statistics, Moments):
        if input_pipeline.centred(config.image) != config.image:
            # A view depends on the name that an image had when it was fitted.
            raise UserError(
                f"{place}: random views of fitted images cannot be drawn again, to take them "
                f"out of moments; {again}"
            )

        def pause(done: int, _: Callable[[], Fitted]) -> None:
            if np.any(parallel.gather(np.array([asked()]))):
                raise Stopped(
                    f"stopped by SIGTERM after {done} of {len(source.records)} images, nothing "
                    "is forgotten; the same command begins anew"
                )

        # Models of earlier versions may have a file's image several times.
        times = collections.Counter(map(bytes, fitted.images))
        numbers = [i for i, x in enumerate(source.digests) for _ in range(times[bytes(x)])]
        index = fitted.index.tolist()
        shapes = geometry.pyramid(config.image, config.model, index).shapes
        empty = statistics_lib.init(shapes, len(numbers), "moments", devices)
        part = dataclasses.replace(fitted, statistics=empty)
        images = sampling.part(source, numbers)
        part = add_images(part, images, 0, config, variables, devices, pause)
        assert isinstance(part.statistics, Moments)
        try:
            statistics = statistics_lib.remove(
                statistics, part.statistics, config.model.regularization
            )
        except statistics_lib.CancellationError as error:
            raise UserError(f"{place}: cannot forget them: {error}; {again}") from error
    else:
        statistics = statistics_lib.take(statistics, rows, devices)
    return dataclasses.replace(
        fitted,
        statistics=statistics,
        images=fitted.images[rows],
        forgotten=np.concatenate([fitted.forgotten, source.digests]),
    )


def without(
    digests: UInt8[np.ndarray, "n 32"], others: UInt8[np.ndarray, "m 32"]
) -> UInt8[np.ndarray, "_ 32"]:
    """Return the digests that are not among others, in their order."""
    known = set(map(bytes, others))
    return digests[[bytes(digest) not in known for digest in digests]]


def warn_forgotten(
    fitted: Fitted, source: Source, digests: UInt8[np.ndarray, "n 32"], devices: Devices
) -> None:
    """Issue a `DataWarning` for images to add that the model has forgotten before."""
    gone = set(map(bytes, fitted.forgotten))
    pairs = zip(source.records, digests, strict=True)
    names = [shown(record.image) for record, digest in pairs if bytes(digest) in gone]
    if names and devices.process == 0:
        message = (
            f"{', '.join(names[:3])}{', ...' * (len(names) > 3)}: {len(names)} of the images "
            "to add were forgotten before, and count again now; move their files away if they "
            "are not to"
        )
        warnings.warn(DataWarning(message), stacklevel=3)


def merge(
    models: Sequence[str | os.PathLike[str]], destination: Path
) -> tuple[Detector, list[Config]]:
    """Join models that were fitted to disjoint images of the same kind.

    The result is that of one fit to all images, up to rounding. It can be merged or
    extended again. It has no thresholds; see `grow.merge`, which also locks the
    destination.

    Args:
      models: checkpoints' folders, at least two; a model file does not do, it has no
        statistics.
      destination: the merged checkpoint's folder; one that is there is replaced.

    Returns:
      The merged model, without the backbone's variables, which merging does not need; and
      the configurations of the models, in their order.

    Raises:
      UserError: a checkpoint is missing, models differ in settings, channels or weights,
        or share an image.
    """
    if len(models) < 2:
        raise UserError(f"{len(models)} model(s) to merge; expected at least 2")
    devices = parallel.every()
    _check_place(destination, devices)
    names = [paths.parse(os.fspath(model)) for model in models]
    merged, configs = join([OnDisk(name) for name in names])
    count = len(merged.images)
    variables = steps.with_projection({}, merged.projection)
    with checkpoint.saving(destination, merged, devices) as identity:
        detector = statistics_store.ready(merged, identity, merged.config, variables)
    progress.say(f"merged {len(models)} models of {count} images in all -> {destination}")
    return detector, configs


def join(models: Sequence[Store]) -> tuple[Fitted, list[Config]]:
    """Return a model of all images of several models, on the devices; see `merge`.

    Args:
      models: at least one, of disjoint images of the same kind.

    Returns:
      The merged model, and the configurations of the models, in their order.

    Raises:
      UserError: models differ in settings, channels or weights, or share an image.
    """
    names = [str(model) for model in models]
    merged, _ = models[0].statistics()
    warn_implausible(names[0], merged.config)
    owners = {digest.tobytes(): names[0] for digest in merged.images}
    configs = [merged.config]
    for name, store in zip(names[1:], models[1:], strict=True):
        other, _ = store.statistics()
        if (a := other.config.image.range) != (b := merged.config.image.range):
            raise UserError(
                f"{name}: fitted with config.image.range={a}, and {names[0]} with {b}: the "
                "same pixels mean other values to each. Fit both with the same (low, high)"
            )
        require_same(name, other.config, merged.config)
        if other.weights.sha256 != merged.weights.sha256:
            raise UserError(
                f"{name}: fitted with the weights {other.weights.origin}, sha256 "
                f"{other.weights.sha256[:12]}..., and {names[0]} with {merged.weights.origin}, "
                f"sha256 {merged.weights.sha256[:12]}...; only models of the same weights can "
                "be merged"
            )
        if not _same_projection(other.projection, merged.projection):
            raise UserError(
                f"{name}: other principal components than those of {names[0]}, whose numbers "
                "cannot be added to its own. Extend one model by the other's images "
                "(--mode=update keeps its components), or fit both with "
                "config.model.reduction=semi_orthogonal or random"
            )
        shared = [digest for digest in other.images if digest.tobytes() in owners]
        if shared:
            raise UserError(
                f"{name}: {len(shared)} of its {len(other.images)} images are in "
                f"{owners[shared[0].tobytes()]} as well, and would count twice; fit models to "
                "disjoint images, or extend one by the images it lacks (--mode=update)"
            )
        owners |= {digest.tobytes(): name for digest in other.images}
        configs.append(other.config)
        model = merged.config.model
        shapes = geometry.pyramid(merged.config.image, model, merged.index.tolist()).shapes
        merged = Fitted(
            merged.config,
            merged.index,
            statistics_lib.merge(merged.statistics, other.statistics, shapes, model.statistics),
            merged.weights,
            merged.regions,
            np.concatenate([merged.images, other.images]),
            projection=merged.projection,
            forgotten=np.concatenate([merged.forgotten, other.forgotten]),
        )
        del other
    # What one of them has forgotten may be fitted by another.
    forgotten = without(merged.forgotten, merged.images)
    return dataclasses.replace(merged, forgotten=forgotten), configs


def _same_projection(a: Projection | None, b: Projection | None) -> bool:
    if a is None or b is None:
        return a is b
    # Of one seed they are, up to another machine's rounding.
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=1e-6)


def _projection(
    config: Config,
    source: Source,
    variables: Any,
    devices: Devices,
    asked: Callable[[], bool],
) -> Projection | None:
    """The matrix that makes a configuration's channels fewer, if it is one that does.

    Raises:
      UserError: the features have no principal components.
      Stopped: by SIGTERM.
    """
    model = config.model
    if not geometry.is_projected(model):
        return None
    if model.reduction == "semi_orthogonal":
        total = geometry.total_channels(model)
        found = reduction.semi_orthogonal(total, model.channels, model.seed)
    else:
        scatter = _scatter(config, source, variables, devices, asked)
        try:
            found = reduction.components(scatter, model.channels)
        except ValueError as error:
            raise UserError(f"config.model.reduction=pca: {error}") from error
    # Another machine's linear algebra may round otherwise.
    return parallel.gather(found[None])[0]


def _scatter(
    config: Config,
    source: Source,
    variables: Any,
    devices: Devices,
    asked: Callable[[], bool],
) -> reduction.Scatter:
    """Return the scatter of all images' embeddings, in a pass of its own."""
    found = reduction.empty(geometry.total_channels(config.model))
    cache = image_cache.open_cache(config.cache)
    for batch in passes.batches(source, config, "principal components", cache, devices):
        if np.any(parallel.gather(np.array([asked()]))):
            raise Stopped(
                "stopped by SIGTERM before the fit, nothing to keep yet; the same command "
                "begins anew"
            )
        valid = parallel.share(batch.valid, devices)
        means, m2 = steps.scatter_batch(
            variables,
            parallel.share(batch.images, devices),
            valid,
            config.image,
            config.model,
        )
        # Sums of all images are of float64.
        parts = zip(np.asarray(means, np.float64), np.asarray(m2, np.float64), strict=True)
        for flags, (mean, part) in zip(valid, parts, strict=True):
            own = reduction.Scatter(int(np.sum(flags)), mean, part)
            found = reduction.merge(found, own)
    # As bytes: JAX would make float32 of them.
    counted = np.concatenate([[found.count], found.mean, found.m2.ravel()])
    every = np.asarray(parallel.gather(counted.view(np.uint8)[None]))
    whole = reduction.empty(len(found.mean))
    for numbers in every.view(np.float64):
        mean, part = np.split(numbers[1:], [len(found.mean)])
        own = reduction.Scatter(int(numbers[0]), mean, part.reshape(len(mean), -1))
        whole = reduction.merge(whole, own)
    return whole


_PERCENTILES = 0.001, 0.999  # of pixels, for `config.image.range=train`


def with_range(config: Config, source: Source) -> Config:
    """The configuration with numbers for `config.image.range=train`.

    They are the 0.1 and 99.9 percentiles of all pixels of the training images: the least
    values that are not exceeded by these parts of them.

    Args:
      config: returned as it is if it has another range.
      source: the training images; of those that cannot be read nothing is taken where
        `config.dataset.skip_bad` says so.

    Raises:
      UserError: an image cannot be read, has colours of 16 bits, or another depth than others.
    """
    if config.image.range != "train":
        return config
    devices = parallel.every()
    passes.listing(source, devices)
    own = range(devices.process, len(source.records), devices.processes)
    # By depth: 8 and 16 bits.
    totals = [np.zeros(256, np.int64), np.zeros(65536, np.int64)]
    for i in own:
        name = shown(source.records[i].image)
        try:
            counts = decoding.grey_counts(source.read(i)[0], name)
        except UserError:
            if config.dataset.skip_bad:
                continue
            raise
        totals[len(counts) > 256] += counts
    # As bytes: JAX would make 32 bits of them.
    every = np.asarray(parallel.gather(np.concatenate(totals).view(np.uint8)[None]))
    total = every.view(np.int64).sum(axis=0)
    shallow, deep = total[:256], total[256:]
    if shallow.any() and deep.any():
        raise UserError(
            "config.image.range=train: training images of 8 and of 16 bits a channel, whose "
            "values do not compare; save all of them alike"
        )
    part = deep if deep.any() else shallow
    if not part.any():
        raise UserError("config.image.range=train: no training image can be read")
    share = np.cumsum(part) / part.sum()
    low, high = (int(np.searchsorted(share, x)) for x in _PERCENTILES)
    high = max(high, low + 1)  # of one value alone
    if high >= len(part):
        low, high = low - 1, high - 1
    progress.say(f"config.image.range: {low} to {high}, of the training images")
    image = dataclasses.replace(config.image, range=(low, high))
    return dataclasses.replace(config, image=image)


def from_images(config: Config, source: Source) -> Config:
    """Return the configuration with what the training images decide.

    These are the numbers of `config.image.range=train` (see `with_range`), and the pixels of
    `config.image.roi`, which is given in pixels of the images.

    Args:
      config: configuration of a run.
      source: training images.

    Raises:
      UserError: see `with_range` and `roi.resolve`.
    """
    config = with_range(config, source)
    if not config.image.roi:
        return config
    devices, text = parallel.every(), ""
    if devices.process == 0:  # the mask may be on its disk alone
        text = roi.resolve(config.image.roi, _first_size(config, source), config.image)
    text = parallel.gather_bytes(text.encode())[0].decode()
    return _with_roi(config, text)


def _with_roi(config: Config, text: str) -> Config:
    return dataclasses.replace(config, image=dataclasses.replace(config.image, roi=text))


def _first_size(config: Config, source: Source) -> tuple[int, int]:
    """Return height and width of the first image that can be read."""
    for i, record in enumerate(source.records):
        try:
            image = decoding.open_rgb(source.read(i)[0], shown(record.image))
        except UserError:
            if config.dataset.skip_bad:
                continue
            raise
        return image.height, image.width
    raise UserError("config.image.roi: no training image can be read")


def with_stored_roi(config: Config, fitted: Config) -> Config:
    """Return the configuration with its region of interest as models keep it.

    It is given in pixels of the images that the model was fitted to. A model without a region
    of interest knows of no images; see `require_same`.

    Raises:
      UserError: see `roi.resolve`.
    """
    wanted, stored = config.image.roi, fitted.image.roi
    if not wanted or not stored or wanted == stored:
        return config
    size = roi.original_size(str(stored))
    return _with_roi(config, roi.resolve(wanted, size, config.image))


def with_stored_range(config: Config, fitted: Config) -> Config:
    """The configuration with the model's range, where it says "train"."""
    if config.image.range != "train":
        return config
    image = dataclasses.replace(config.image, range=fitted.image.range)
    return dataclasses.replace(config, image=image)


def require_same(path: Path | str, fitted: Config, wanted: Config) -> None:
    """Check that a model serves a configuration.

    Raises:
      UserError: what its statistics depend on differs.
    """
    names = [config_lib.fitted_settings(x) for x in (fitted, wanted)]
    for name in names[0] | names[1]:
        setting = operator.attrgetter(name)
        if setting(wanted) == "train" and fitted.image.range != "full":
            continue  # the range, which a fit found; see `with_stored_range`
        if (ours := setting(wanted)) != (theirs := setting(fitted)):
            if name == "image.roi":
                ours, theirs = roi.shown(ours), roi.shown(theirs)
            raise UserError(
                f"config.{name}={ours}: the model {path} was fitted with {theirs}. Ask for "
                f"that, fit again, or leave out --config (or --config.{name} alone) to take "
                "the model's configuration"
            )


def warn_implausible(path: Path | str, fitted: Config) -> None:
    """Issue a `DataWarning` for settings of a stored model that no new model may have."""
    if (reason := config_lib.implausible(fitted)) and parallel.every().process == 0:
        warnings.warn(DataWarning(f"{path}: {reason}"), stacklevel=3)


def load_weights(
    path: Path,
    identity: WeightsIdentity,
    config: Config,
    weights: str | None,
) -> Any:
    """The backbone's variables, if they are those that a model was fitted with.

    Args:
      path: the model.
      identity: its weights'.
      config: the one in use, which names a place for the weights.
      weights: another place.

    Raises:
      UserError: they cannot be had, or are others.
    """
    wanted = f"{identity.origin}, sha256 {identity.sha256[:12]}..."
    place = weights or config.model.weights
    try:
        variables, found = pretrained.load(place, config.model.backbone, config.model.layers)
    except UserError as error:
        raise UserError(
            f"{error} (The model {path} was fitted with {wanted}; --weights names where "
            "that file is now)"
        ) from error
    if found.sha256 != identity.sha256:
        both = found.origin == identity.origin == pretrained.FIXED_ORIGIN
        raise UserError(
            f"weights {place}: other weights ({found.origin}, sha256 {found.sha256[:12]}...) "
            f"than the model {path} was fitted with ({wanted}). "
            + ("Those are the filters of another version of padim_jax. " if both else "")
            + "Name that file with --weights, or fit again"
        )
    return variables


def begin(
    config: Config,
    source: Source,
    backbone: Backbone,
    devices: Devices,
    asked: Callable[[], bool] = lambda: False,
) -> Fitted:
    """Return a model of no image yet.

    Args:
      config: what to fit.
      source: the normal images, each once.
      backbone: the configuration's.
      devices: that take part.
      asked: whether to stop.

    Raises:
      UserError: the features have no principal components, or an image cannot be read.
      Stopped: `asked` said so.
    """
    variables, weights = backbone
    index, count = geometry.channel_index(config.model), len(source.records)
    shapes = geometry.pyramid(config.image, config.model, index.tolist()).shapes
    projection = _projection(config, source, variables, devices, asked)
    return Fitted(
        config_lib.with_absolute_paths(config),
        index,
        statistics_lib.init(shapes, count, config.model.statistics, devices),
        weights,
        shapes[0][0],
        np.zeros((0, 32), np.uint8),
        f"train {passes.listing(source, devices)}",
        projection,
    )


def add_images(
    fitted: Fitted,
    source: Source,
    start: int,
    config: Config,
    variables: Any,
    devices: Devices,
    pause: Callable[[int, Callable[[], Fitted]], None] | None = None,
    embeddings: Embeddings | None = None,
) -> Fitted:
    """Return a model with more images; the statistics that are given are used up.

    Args:
      fitted: the model so far, with room for the images.
      source: normal images.
      start: how many of them the model has already.
      config: in use.
      variables: the backbone's, and the projection, on the devices.
      devices: that take part.
      pause: called before each batch with the number of images of `source` that are done, and
        a function that returns the model so far. May raise.
      embeddings: extended by those of the images, if given.

    Raises:
      UserError: an image cannot be read.
    """
    statistics, digests = fitted.statistics, [fitted.images]
    index, total = tuple(fitted.index.tolist()), len(source.records)

    def so_far() -> Fitted:
        # Awaited: of several processes' computations only one at a time is to communicate.
        now = jax.block_until_ready(statistics)
        return dataclasses.replace(fitted, statistics=now, images=np.concatenate(digests))

    alike, few = _Alike(), dict[str, int]()
    cache, done = image_cache.open_cache(config.cache), start
    for batch in passes.batches(source, config, "fit", cache, devices, start):
        # Computation is asynchronous: unawaited, batches would pile up before it.
        jax.block_until_ready(statistics)
        if pause is not None:
            pause(done, so_far)
        images = parallel.share(batch.images, devices)
        levels = steps.embed(variables, images, config, index, devices)
        valid = parallel.share(batch.valid, devices)
        statistics = steps.fit_batch(statistics, levels, valid)
        alike.add(batch.images[batch.valid])
        few |= passes.few_levels(batch)
        sizes = np.zeros((len(batch.valid), 2), np.int32)
        sizes[batch.valid] = np.reshape(batch.sizes, (-1, 2))  # a process may have none
        if config.image.roi:
            for record, size in zip(batch.records, batch.sizes, strict=True):
                roi.require_aspect(str(config.image.roi), size, shown(record.image))
        new, sizes, valid = parallel.gather((batch.digests, sizes, batch.valid))
        digests.append(new[valid])
        records = source.records[done : done + len(digests[-1])]
        if embeddings is not None:
            embeddings.add(levels, valid, records, new[valid], sizes[valid])
        done += len(records)
    passes.warn_few_levels(few, total, devices)
    if not len(fitted.images) and alike.said() and devices.process == 0:
        message = (
            f"all {total} images are the same, pixel for pixel, as "
            f"{shown(source.records[0].image)}: nothing is known of how good parts differ. "
            "Every difference will score high, and thresholds mean nothing; expected "
            "different images of good parts"
        )
        warnings.warn(DataWarning(message), stacklevel=2)
    return so_far()


def finalize(
    fitted: Fitted,
    identity: str,
    source: Source,
    config: Config,
    variables: Any,
    left_out: int = 0,
) -> Detector:
    """Factorise as `statistics_store.ready` does; name the image whose features are not finite.

    Args:
      fitted: see there.
      identity: see there.
      source: the images that were added last.
      config: see there.
      variables: see there.
      left_out: see there.
    """
    try:
        return statistics_store.ready(fitted, identity, config, variables, left_out)
    except statistics_store.NotFiniteError as error:
        index, devices = tuple(fitted.index.tolist()), parallel.every()
        if record := _not_finite(source, config, variables, index, devices):
            raise UserError(f"{record.image}: {error}") from error
        raise


def _fit(
    fitted: Fitted,
    source: Source,
    start: int,
    config: Config,
    variables: Any,
    path: Path,
    devices: Devices,
    left_out: int = 0,
    embeddings: Embeddings | None = None,
) -> Detector:
    """Add the images from `start` on; save at intervals and when finished."""
    variables = parallel.replicate(steps.with_projection(variables, fitted.projection), devices)
    total, saved = len(source.records), time.monotonic()

    def pause(done: int, so_far: Callable[[], Fitted]) -> None:
        nonlocal saved
        due = time.monotonic() - saved >= config.train.checkpoint_every
        said = parallel.gather({"asked": np.array([asked()]), "due": np.array([due])})
        stop = bool(np.any(said["asked"]))
        if done > start and (stop or said["due"][0]):  # by the clock of process 0
            checkpoint.save(path, so_far(), devices)
            saved = time.monotonic()
        if stop:
            kept = f"saved in {path}; the same command goes on from there"
            if done == 0:
                kept = "nothing to keep yet; the same command begins anew"
            raise Stopped(f"stopped by SIGTERM after {done} of {total} images, {kept}")

    with interrupts.sigterm() as asked:
        fitted = add_images(
            fitted, source, start, config, variables, devices, pause, embeddings
        )
        finished = dataclasses.replace(fitted, unfinished=None)
        return _save(finished, source, config, variables, path, devices, asked, left_out)


def _save(
    fitted: Fitted,
    source: Source,
    config: Config,
    variables: Any,
    path: Path,
    devices: Devices,
    asked: Callable[[], bool],
    left_out: int = 0,
) -> Detector:
    """Write a finished model, whose statistics are used up, and factorise it."""
    count, index = len(fitted.images), fitted.index
    form = "moments" if isinstance(fitted.statistics, Moments) else "samples"
    with checkpoint.saving(path, fitted, devices) as identity:
        detector = finalize(fitted, identity, source, config, variables, left_out)
    stop = bool(np.any(parallel.gather(np.array([asked()]))))
    height, width = geometry.patch_grid(config.image, config.model.layers)
    progress.say(
        f"fitted {count} images, {height}x{width} patches of {len(index)} channels "
        f"({form}) -> {path}"
    )
    if stop:
        raise Stopped(f"stopped by SIGTERM; the fit is finished and saved in {path}")
    return detector


def _check_place(path: Path, devices: Devices) -> None:
    # Now, rather than after hours of fitting.
    if devices.process == 0:
        results_folder.make_folder(path.parent)
        checkpoint.check_destination(path)


def _not_finite(
    source: Source,
    config: Config,
    variables: Any,
    index: tuple[int, ...],
    devices: Devices,
) -> Record | None:
    """The first image whose features are not finite, in a pass of its own."""
    start, cache = 0, image_cache.open_cache(config.cache)
    for batch in passes.batches(source, config, "search", cache, devices):
        images = parallel.share(batch.images, devices)
        levels = steps.embed(variables, images, config, index, devices)
        finite = np.asarray(steps.finite_batch(levels))[0]
        valid = parallel.gather(batch.valid)
        if not np.all(finite[valid]):
            return source.records[start + int(np.argmin(finite[valid]))]
        start += int(np.sum(valid))
    return None


class _Alike:
    """Check of whether all images of a fit are the same, pixel for pixel.

    Then nothing is known of how good parts differ: the covariances are the regularization
    alone, and each difference from that image counts as if it were a defect. The numbers
    are right, and of no use.
    """

    def __init__(self) -> None:
        self._first: np.ndarray | None = None
        self._alike = True

    def add(self, images: UInt8[np.ndarray, "n h w 3"]) -> None:
        """Compare a process's share of a batch, until two images differ."""
        if self._alike and len(images):
            self._first = images[0] if self._first is None else self._first
            self._alike = bool(np.all(images == self._first))

    def said(self) -> bool:
        """Return the result for all processes' images. A collective."""
        pixels = b"" if self._first is None else self._first.tobytes()
        digest = np.frombuffer(hashlib.sha256(pixels).digest(), np.uint8)
        some = np.array([self._first is not None])
        alike, some, digests = parallel.gather((np.array([self._alike]), some, digest[None]))
        return bool(np.all(alike)) and len(np.unique(digests[some], axis=0)) == 1


def _require_resumable(
    path: Path,
    fitted: Fitted,
    config: Config,
    weights: WeightsIdentity,
    listed: str,
) -> None:
    if fitted.unfinished != listed:
        raise UserError(_other_unfinished(path))
    if fitted.weights.sha256 != weights.sha256:
        raise UserError(f"{_other_unfinished(path)} (its weights: {fitted.weights.origin})")
    try:
        require_same(path, fitted.config, config)
    except UserError as error:
        raise UserError(f"{_other_unfinished(path)} ({error})") from error


def _other_unfinished(path: Path) -> str:
    return (
        f"{path}: holds an interrupted fit of other images or settings. Finish it with the "
        "command that began it, move it away, or name another --checkpoint"
    )
