"""Train, evaluate, predict: where the stages meet, and where all side effects start."""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, UInt8

import padim_jax
from padim_jax import calibration as calibration_lib
from padim_jax import (
    calibration_file,
    checkpoint,
    compilation_cache,
    copies,
    figures,
    fitting,
    image_cache,
    input_pipeline,
    inputs,
    journal,
    locks,
    memory,
    metrics,
    model_file,
    parallel,
    paths,
    predictions,
    progress,
    report,
    results,
    skipping,
    survey,
    unfinished,
)
from padim_jax import config as config_lib
from padim_jax import detector as detector_lib
from padim_jax import summary as summary_lib
from padim_jax import suspects as suspects_lib
from padim_jax import watch as watch_lib
from padim_jax.calibration import Calibration
from padim_jax.config import Config
from padim_jax.datasets import LAYOUTS, files, masks, sampling
from padim_jax.datasets import folder as folder_layout
from padim_jax.datasets.files import shown
from padim_jax.datasets.records import Record, Skipped, Source, Split
from padim_jax.detector import Detector
from padim_jax.errors import DataWarning, UserError
from padim_jax.fitting import Backbone
from padim_jax.input_pipeline import FolderSource
from padim_jax.paths import Path
from padim_jax.suspects import Suspects
from padim_jax.types import LowRank

_MOST_NAMED = 5  # folders in a warning

METRICS = "metrics.json"  # the last to be written, and the first to go
_CONFIG = "config.json"  # the first
REPORT = "report.html"
_INCOMPLETE = "results.incomplete"  # holds them until they are whole
_SIGN = ".padim_jax"  # in that folder: whose it is
THUMBNAILS = "report_thumbnails.json"  # of the worst images, for the page of a sweep
# All that an evaluation may leave beside these.
_RESULTS = (
    *("scores.csv", "maps", "figures", "roc_curve.png", "score_histogram.png", "overview.jpg"),
    *(REPORT, THUMBNAILS, results.SKIPPED),
)


def run(
    mode: str,
    config: Config | config_lib.Overrides | None,
    workdir: Path,
    checkpoint_path: Path,
    pattern: str | None = None,
    weights: str | None = None,
    half: bool = False,
    models: Sequence[str] = (),
    watching: watch_lib.Timing | None = None,
    overwrite: bool = False,
) -> None:
    """Does what the command line asks for.

    Args:
      mode: "train_and_eval", "train", "eval", "predict", "calibrate", "update", "merge" or
        "export".
      config: for all but training None, or settings that replace some of the model's own;
        see `load`.
      workdir: folder of the results.
      checkpoint_path: where the fitted model is or goes.
      pattern: for predict, calibrate and update: an image file, a folder or a glob.
      weights: for all but training: where the backbone's weights are now; see `load`.
      half: for export: see there.
      models: for merge: the checkpoints to merge.
      watching: for predict: go on with the images that arrive in the folder `pattern`.
      overwrite: for train_and_eval, train and eval: replace another data set's results.

    Raises:
      UserError: something to mend in the settings or the files, or too little memory.
      Stopped: by SIGTERM, during a fit.
    """
    _limit_images()
    try:
        if mode == "train_and_eval":
            assert isinstance(config, Config)
            train_and_eval(config, workdir, checkpoint_path, overwrite=overwrite)
        elif mode == "train":
            assert isinstance(config, Config)
            with compilation_cache.enabled(config.cache):
                dataset = open_dataset(config)
                del dataset["test"]  # nor looked at
                _say_folders(config, dataset)
                config = fitting.with_range(config, dataset["train"])
                dataset, skipped = _readable(config, dataset)
                dataset, _ = _survey(dataset)
                _, suspects = _train(config, dataset, checkpoint_path, overwrite=overwrite)
            if parallel.every().process == 0:
                results.write_skipped(workdir, skipped)
                results.write_suspects(workdir, suspects)
        elif mode == "update":
            _update(config, checkpoint_path, pattern, weights)
        elif mode == "merge":
            merge(models, checkpoint_path)
        else:
            _use(
                mode,
                config,
                workdir,
                checkpoint_path,
                pattern,
                weights,
                half,
                watching,
                overwrite,
            )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"not enough memory ({' '.join(str(error).split())}). Statistics grow with patches "
            "and channels: lower config.model.channels or config.image.resize, or start "
            "config.model.layers at a deeper one; config.batch_size bounds only the rest"
        ) from error


def _limit_images() -> None:
    """Half of what is free is for images at full size; the other half for all else."""
    input_pipeline.ROOM.limit = memory.available_to_host() // 2


def train_and_eval(
    config: Config,
    workdir: Path,
    checkpoint_path: Path,
    backbone: Backbone | None = None,
    overwrite: bool = False,
) -> dict:
    """Fits and evaluates one detector.

    Args:
      config: of one run.
      workdir: of its results.
      checkpoint_path: where the fitted model goes.
      backbone: see `train`.
      overwrite: replace the results and the model of another data set, which are kept
        otherwise.

    Returns:
      What `evaluate` returns.

    Raises:
      UserError: something to mend in the settings or the files, or too little memory.
      Stopped: by SIGTERM, during the fit.
    """
    _limit_images()
    dataset = open_dataset(config)
    _say_folders(config, dataset)
    _require_test_images(config, dataset["test"])
    with _writing_results(workdir), compilation_cache.enabled(config.cache):
        memory.require_for_maps(config, len(dataset["test"].records))  # not after the fit
        identity = inputs.read(config, dataset, parallel.every())
        if not overwrite:
            _require_same_data(workdir, identity)
        ranged = fitting.with_range(config, dataset["train"])
        dataset, skipped = _readable(ranged, dataset)
        dataset, summary = _survey(dataset)
        detector, suspects = _train(ranged, dataset, checkpoint_path, backbone, overwrite)
        if parallel.every().process == 0:
            results.write_suspects(workdir, suspects)
            # Of the model that was: nobody is to take it for this one's.
            (workdir / METRICS).unlink(missing_ok=True)
        return _evaluate(
            config, detector, dataset["test"], workdir, skipped, identity, summary, suspects
        )


def train(
    config: Config,
    dataset: Mapping[str, Source],
    path: Path,
    backbone: Backbone | None = None,
    overwrite: bool = False,
) -> Detector:
    """Fits a detector and finds its thresholds.

    Args:
      config: what to fit.
      dataset: see `open_dataset`.
      path: the checkpoint's folder, where thresholds are kept as well.
      backbone: the configuration's, if it is loaded already.
      overwrite: replace the model of another data set, which is kept otherwise.

    Raises:
      UserError: see `fitting.train`; or there are too few normal images for thresholds,
        another process writes to the checkpoint, or it is of another data set.
      Stopped: by SIGTERM, during the fit.
    """
    return _train(config, dataset, path, backbone, overwrite)[0]


def _train(
    config: Config,
    dataset: Mapping[str, Source],
    path: Path,
    backbone: Backbone | None = None,
    overwrite: bool = False,
) -> tuple[Detector, Suspects | None]:
    """As `train`; with images left out one by one also how these rank, in the first process."""
    config = fitting.with_range(config, dataset["train"])
    with locks.held(path, parallel.every().process):
        if not overwrite:
            _require_model_of_same_data(path, config, dataset["train"])
        dataset = _with_held_out(config, dataset)
        source = copies.distinct(dataset["train"], parallel.every())
        validation, normal = dataset["validation"], config.threshold.normal
        leave_out = normal == "leave_one_out" or (normal == "auto" and not validation.records)
        if normal != "none":  # not after the fit
            _require_groups(config, source if leave_out else validation)
        detector = fitting.train(config, source, path, backbone)
        if normal == "none":
            return detector, None
        if not leave_out:
            return _calibrate(detector, validation, "held_out", path), None
        if detector.count < 3:
            print("no thresholds: leaving one out needs at least 3 images that were fitted")
            return detector, None
        return _calibrate_ranked(detector, source, "leave_one_out", path)


def _with_held_out(config: Config, splits: Mapping[str, Source]) -> dict[str, Source]:
    """The splits, with a part of the training images for validation where that is asked for.

    Whole groups are held out, drawn at random; of copies the first one counts.
    """
    threshold = config.threshold
    if threshold.normal != "held_out" or splits["validation"].records:
        return dict(splits)
    source = copies.distinct(splits["train"], parallel.every())
    groups = sampling.groups(source.records, threshold.groups)
    _, held = sampling.held_out(
        range(int(groups.max(initial=-1)) + 1), threshold.held_out, config.dataset.seed
    )
    is_held = np.isin(groups, held)
    parts = (source.part(np.flatnonzero(x)) for x in (~is_held, is_held))
    return {**splits, **dict(zip(("train", "validation"), parts, strict=True))}


def _require_groups(config: Config, source: Source) -> None:
    if not (pattern := config.threshold.groups):
        return
    count = len(set(sampling.groups(source.records, pattern).tolist()))
    if count < calibration_lib.MIN_IMAGES:
        raise UserError(
            f"config.threshold.groups={pattern!r}: {count} group(s) of {len(source.records)} "
            f"normal images; thresholds need at least {calibration_lib.MIN_IMAGES}. More parts "
            "are needed, or no thresholds with --config.threshold.normal=none"
        )


def calibrate(detector: Detector, source: Source, origin: str, path: Path) -> Detector:
    """Find thresholds on normal images, and keep them beside the model.

    Args:
      detector: fitted. For images left out its Gaussians are given up, since those that leave
        images out take their place in memory; go on with the result, or after an error with
        what `load` returns.
      source: normal images. Of files that are the same the first one counts.
      origin: how they relate to the model, one of `calibration.ORIGINS`. "leave_one_out" takes
        all images that were fitted, "leave_some_out" some of them, each once. "held_out" and
        "given" take images that were not fitted: of the former, copies of fitted images are
        left out with a `DataWarning`; of the latter, they are an error.
      path: the checkpoint's folder.

    Returns:
      The detector with its thresholds.

    Raises:
      UserError: too few images, images that contradict `origin`, an unreadable one, or another
        process writes to the checkpoint.
    """
    with locks.held(path, parallel.every().process):
        return _calibrate(detector, source, origin, path)


def _calibrate(detector: Detector, source: Source, origin: str, path: Path) -> Detector:
    return _calibrate_ranked(detector, source, origin, path)[0]


def _calibrate_ranked(
    detector: Detector, source: Source, origin: str, path: Path
) -> tuple[Detector, Suspects | None]:
    """As `calibrate`; and how images that were left out rank, in the first process."""
    config, given = detector.config, origin == "given"
    left_out = origin in ("leave_one_out", "leave_some_out")
    source = copies.distinct(source, parallel.every())
    if origin == "held_out":
        source = _without_fitted(detector, source)
    count, pattern = len(source.records), config.threshold.groups
    fitted = len(set(map(bytes, detector.images)))
    if origin == "leave_some_out" and pattern and count < fitted:
        raise UserError(
            f"thresholds: {count} of the {fitted} images that were fitted, and "
            f"config.threshold.groups={pattern!r}; expected all of them, since those of a "
            "group that stay in the model lower the scores of the others"
        )
    if origin == "leave_one_out" and count != fitted:
        raise UserError(
            f"thresholds: {count} images to leave out one by one, and the model was fitted to "
            f"{fitted}; expected all of those, each once"
        )
    groups = sampling.groups(source.records, pattern)
    # One pass for each size of a group, of which each takes other Gaussians.
    passes = _by_size(groups) if left_out else [(0, np.arange(count))]
    order = np.concatenate([numbers for _, numbers in passes])
    seen = _for_new_images(detector) if given else detector
    # Given ones are seen once; see `predict`.
    cache = None if given else image_cache.open_cache(config.cache)
    samples: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    highest: list[tuple[float, int, np.ndarray]] = []  # score, place in `order`, map

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal seen
        unused = collections.Counter(map(bytes, detector.images))
        for size, numbers in passes:
            chosen = sampling.part(source, numbers.tolist())
            if size:
                seen = fitting.refinalize(seen, path, size)
            for part in _scores(seen, chosen, "calibrate", cache, size):
                for record, digest in zip(part.records, map(bytes, part.digests), strict=True):
                    if not left_out:
                        _require_unknown(record, digest in unused, origin)
                        continue
                    _require_fitted(record, digest in unused, unused[digest])
                    unused[digest] -= 1
                if sum(map(len, samples)) < copies.MOST_COMPARED:
                    samples.append(part.samples)
                start = sum(map(len, scores))
                scores.append(part.scores)
                for i in np.argsort(-part.scores)[: suspects_lib.SHOWN].tolist():
                    highest.append((float(part.scores[i]), start + i, part.maps[i].copy()))
                highest.sort(key=lambda one: (-one[0], order[one[1]]))
                del highest[suspects_lib.SHOWN :]
                yield part.maps, part.scores

    found = _thresholds(detector, parts(), count, origin, groups[order] if pattern else None)
    if not pattern:  # the order is then the source's
        names = [record.relative_path for record in source.records]
        found = _with_warning(found, samples, names)
    if left_out:
        detector = fitting.refinalize(seen, path)
    detector = _keep_thresholds(detector, found, path)
    if not left_out or parallel.every().process > 0:
        return detector, None
    back = np.argsort(order)  # to the source's order
    ranked = suspects_lib.rank(
        [record.relative_path for record in source.records],
        np.concatenate(scores)[back],
        groups,
        config.threshold.image_rate,
        found.image_threshold,
    )
    print(suspects_lib.text(ranked))
    images = [
        input_pipeline.load_image(source, config.image, int(order[place]), cache)
        for _, place, _ in highest
    ]
    maps = [anomaly_map for *_, anomaly_map in highest]
    return detector, dataclasses.replace(ranked, images=images, maps=maps)


def _calibrate_samples(detector: Detector, path: Path) -> Detector:
    """Thresholds of all images fitted, whose embeddings the model holds."""
    left_out = fitting.refinalize(detector, path, 1)
    samples: list[np.ndarray] = []

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for found, valid in detector_lib.score_samples(left_out):
            own: Any = (valid, found.maps, found.scores, found.samples)
            valid, maps, scores, part = parallel.gather(own)
            samples.append(part[valid])
            yield maps[valid], scores[valid]

    found = _thresholds(detector, parts(), detector.count, "leave_one_out")
    found = _with_warning(found, samples, [f"image {i + 1}" for i in range(detector.count)])
    return _keep_thresholds(fitting.refinalize(left_out, path), found, path)


def _thresholds(
    detector: Detector,
    parts: Iterable[tuple[np.ndarray, np.ndarray]],
    count: int,
    origin: str,
    groups: Int[np.ndarray, " n"] | None = None,
) -> Calibration:
    """Thresholds of the maps and scores of `count` normal images."""
    threshold = detector.config.threshold
    try:
        return calibration_lib.calibrate(
            parts, count, origin, threshold.image_rate, threshold.pixel_rate, groups
        )
    except ValueError as error:
        raise UserError(
            f"thresholds: {error}. More normal images are needed, or none at all with "
            "--config.threshold.normal=none"
        ) from error


def _with_warning(
    found: Calibration, samples: Sequence[np.ndarray], names: Sequence[str]
) -> Calibration:
    """The same thresholds, with a warning if many of their images are near copies."""
    near = copies.near_copies(np.concatenate(samples))
    return dataclasses.replace(found, warning=copies.near_copies_text(near, names))


def _keep_thresholds(detector: Detector, found: Calibration, path: Path) -> Detector:
    """The detector with thresholds, which are kept beside the model."""
    copied = detector.count - len(set(map(bytes, detector.images)))
    if copied and found.origin.startswith("leave_") and not found.warning:
        # Fitted by an older version, to which each copy counted.
        warning = (
            f"{copied} of the {detector.count} images that were fitted are copies of others: "
            "new images will be called anomalous more often than promised. Fit again, which "
            "counts each image once"
        )
        found = dataclasses.replace(found, warning=warning)
    if parallel.every().process == 0:
        calibration_file.write(path, found, detector_lib.fingerprint(detector))
        if found.warning:
            warnings.warn(DataWarning(f"thresholds: {found.warning}"), stacklevel=2)
    print(calibration_lib.text(found))
    return dataclasses.replace(detector, calibration=found)


def _without_fitted(detector: Detector, source: Source) -> Source:
    """The images that a model was not fitted to, with a warning about the others.

    Raises:
      UserError: too few are left for thresholds.
    """
    devices = parallel.every()
    fitted = set(map(bytes, detector.images))
    known = [bytes(digest) in fitted for digest in copies.distinct(source, devices).digests]
    if not any(known):
        return source
    names = [str(source.records[i].image) for i in np.flatnonzero(known).tolist()]
    message = (
        f"{len(names)} of {len(known)} validation images are copies of images that the model "
        f"was fitted to ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    )
    others = np.flatnonzero(~np.array(known)).tolist()
    if len(others) < calibration_lib.MIN_IMAGES:
        raise UserError(
            f"{message}; {len(others)} are left, and thresholds need at least "
            f"{calibration_lib.MIN_IMAGES}. Expected other images, or "
            "--config.threshold.normal=leave_one_out"
        )
    if devices.process == 0:
        warnings.warn(
            DataWarning(
                f"{message}: left out of the thresholds, which say nothing of new images "
                f"otherwise; {len(others)} images remain. Check how the dataset was split"
            ),
            stacklevel=2,
        )
    return sampling.part(source, others)


def update(
    path: Path,
    source: Source,
    config: Config | config_lib.Overrides | None = None,
    weights: str | None = None,
    dataset: Mapping[str, Source] | None = None,
) -> Detector:
    """Extend a fitted model by normal images, and find its thresholds again.

    The thresholds are of the images that `config.threshold.normal` asks for, as far as these
    are at hand: in the model itself (of the low-rank form), in `source`, or where the model's
    dataset was. See `fitting.update` for the rest.

    Args:
      path: the checkpoint's folder; the extended model replaces it.
      source: normal images.
      config: None takes the model's own; see `load`.
      weights: where the backbone's weights are now; see `load`.
      dataset: the splits of the configuration's dataset, if they are listed already.

    Returns:
      The extended detector.

    Raises:
      UserError: see `fitting.update` and `calibrate`; or another process writes there.
      Stopped: by SIGTERM.
    """
    with locks.held(path, parallel.every().process):
        extended = fitting.update(path, source, config, weights)
        detector = extended.detector
        with compilation_cache.enabled(detector.config.cache):
            if not extended.added:  # an update that was killed may lack its thresholds
                mark = detector_lib.fingerprint(detector)
                if known := calibration_file.read(path, mark):
                    return dataclasses.replace(detector, calibration=known)
            splits = dataset or _dataset_at_hand(detector.config)
            hashed = [(extended.source, extended.digests)]
            return _find_thresholds(detector, [splits], hashed, path)


def merge(
    models: Sequence[str | os.PathLike[str]], destination: str | os.PathLike[str]
) -> Detector:
    """Join models that were fitted to disjoint images of the same kind.

    The result is that of one fit to all images, up to rounding. It can be merged or extended
    again. Thresholds are found again as by `update`; where the images are not at hand, a
    `DataWarning` says that there are none.

    Args:
      models: checkpoints' folders, at least two; a model file does not do, it has no
        statistics.
      destination: the merged checkpoint's folder; one that is there is replaced.

    Returns:
      The merged detector, with the backbone's variables only if thresholds took them: `load`
      it to score images.

    Raises:
      UserError: a checkpoint is missing, models differ in settings, channels or weights,
        or share an image; or another process writes to the destination.
    """
    place = paths.parse(os.fspath(destination))
    with locks.held(place, parallel.every().process):
        detector, configs = fitting.merge(models, place)
        with compilation_cache.enabled(detector.config.cache):
            datasets = [_dataset_at_hand(config) for config in configs]
            if any(datasets):
                detector, loaded = _with_backbone(detector, place)
                datasets = datasets if loaded else []
            return _find_thresholds(detector, datasets, [], place)


def _with_backbone(detector: Detector, path: Path) -> tuple[Detector, bool]:
    """The same detector with its backbone's variables, and whether they can be had."""
    variables, loaded = {}, True
    try:
        variables = fitting.load_weights(path, detector.weights, detector.config, None)
    except UserError as error:
        print(f"thresholds: no image can be scored ({error})")
        loaded = False
    if not _all_processes(loaded):
        return detector, False
    variables = detector_lib.with_projection(variables, detector.projection)
    variables = parallel.replicate(variables, parallel.every())
    return dataclasses.replace(detector, variables=variables), True


def _find_thresholds(
    detector: Detector,
    datasets: Sequence[Mapping[str, Source]],
    hashed: Sequence[tuple[Source, UInt8[np.ndarray, "_n 32"]]],
    path: Path,
) -> Detector:
    """Find the thresholds of a model that has grown, from what is at hand.

    Args:
      detector: the grown model.
      datasets: the splits of its datasets; none of a dataset that is not at hand.
      hashed: other images, and the SHA-256 of their files.
      path: the checkpoint's folder.
    """
    config, devices, minimum = detector.config, parallel.every(), calibration_lib.MIN_IMAGES
    if config.threshold.normal == "none":
        # Those of the model before, if it had some, are not silently gone.
        mark = detector_lib.fingerprint(detector)
        return dataclasses.replace(detector, calibration=calibration_file.read(path, mark))
    validation = [splits["validation"] for splits in datasets if splits]
    complete = len(validation) == len(datasets) and all(x.records for x in validation)
    if validation and complete and config.threshold.normal != "leave_one_out":
        images = [(x, i) for x in validation for i in range(len(x.records))]
        sources, _ = _readable(config, {"validation": _Images(images)})
        return _calibrate(detector, sources["validation"], "held_out", path)
    if detector.count < minimum:
        print(
            f"no thresholds: leaving one out needs at least {minimum} images that were fitted"
        )
        return detector
    # Whose files these were, and so their groups, is not known.
    if isinstance(detector.gaussian, LowRank) and not config.threshold.groups:
        return _calibrate_samples(detector, path)
    # A random view depends on the name that an image had when it was fitted.
    centred = input_pipeline.centred(config.image) == config.image
    source = _fitted_at_hand(detector, datasets, hashed) if centred else _Images([])
    count = len(source.records)
    if count == detector.count:
        return _calibrate(detector, source, "leave_one_out", path)
    why = f"{count} of the {detector.count} images that were fitted are at hand"
    if count >= minimum and not config.threshold.groups:
        print(why)
        return _calibrate(detector, source, "leave_some_out", path)
    if devices.process == 0:
        if not centred:
            why = "random views of fitted images cannot be drawn again"
        elif count >= minimum:
            why += ", and of which groups (config.threshold.groups) the others are is not known"
        warnings.warn(
            DataWarning(
                f"{path}: the model has no thresholds now: {why}. Find them with "
                f"--mode=calibrate --checkpoint={path} --input=<normal images that were not "
                "fitted>"
            ),
            stacklevel=2,
        )
    return detector


@dataclasses.dataclass(frozen=True)
class _Images:
    """Images of several sources, as one: (source, number) each."""

    images: Sequence[tuple[Source, int]]

    @property
    def records(self) -> Sequence[Record]:
        return [source.records[number] for source, number in self.images]

    def read(self, index: int) -> tuple[bytes, bytes | None]:
        source, number = self.images[index]
        return source.read(number)


def _fitted_at_hand(
    detector: Detector,
    datasets: Sequence[Mapping[str, Source]],
    hashed: Sequence[tuple[Source, UInt8[np.ndarray, "_n 32"]]],
) -> Source:
    """The images that were fitted, told by their contents, each as often as it was fitted."""
    unused = collections.Counter(map(bytes, detector.images))
    chosen: list[tuple[Source, int]] = []

    def choose(source: Source, digests: UInt8[np.ndarray, "_n 32"]) -> None:
        for number, digest in enumerate(map(bytes, digests)):
            if unused[digest] > 0:
                unused[digest] -= 1
                chosen.append((source, number))

    for source, digests in hashed:
        choose(source, digests)
    for splits in datasets:
        if splits and len(chosen) < detector.count:
            choose(splits["train"], copies.digests(splits["train"], parallel.every()))
    return _Images(chosen)


def _dataset_at_hand(config: Config) -> dict[str, Source]:
    """The splits of a model's dataset; none if it is not where it was. A collective.

    Nothing is drawn, packed or downloaded.
    """
    layout, dataset, found = LAYOUTS[config.dataset.name], config.dataset, {}
    with contextlib.suppress(UserError, OSError):
        if dataset.source == "folder" and paths.is_folder(
            layout.folder(dataset.root, config.category)
        ):
            records = layout.records(dataset.root, config.category, dataset.seed)
            found = _held_back(config, _by_split(records))
    return _as_fitted(config, found) if _all_processes(bool(found)) else {}


def _as_fitted(config: Config, splits: Mapping[str, Source]) -> dict[str, Source]:
    """The splits as `train` has them: what is held out is drawn from what can be used."""
    if config.threshold.normal == "held_out":
        splits = {**splits, **_readable(config, {"train": splits["train"]})[0]}
    return _with_held_out(config, splits)


def _all_processes(said: bool) -> bool:
    """Whether all processes say so. A collective."""
    return bool(np.all(parallel.gather(np.array([said]))))


def _by_size(
    groups: Int[np.ndarray, " n"],
) -> list[tuple[int, Int[np.ndarray, " _n"]]]:
    """Each size of a group, and the images of such groups, those of a group side by side."""
    sizes = np.bincount(groups)[groups]
    order = np.lexsort([groups, sizes])
    return [(int(size), order[sizes[order] == size]) for size in np.unique(sizes)]


def _update(
    config: Config | config_lib.Overrides | None,
    checkpoint_path: Path,
    pattern: str | None,
    weights: str | None,
) -> None:
    if pattern is not None:
        update(checkpoint_path, FolderSource(predictions.find(pattern)), config, weights)
    else:
        assert isinstance(config, Config)
        dataset = open_dataset(config)
        _say_folders(config, {"train": dataset["train"]})
        dataset = _as_fitted(config, dataset)
        update(checkpoint_path, dataset["train"], config, weights, dataset)


def _use(
    mode: str,
    config: Config | config_lib.Overrides | None,
    workdir: Path,
    checkpoint_path: Path,
    pattern: str | None,
    weights: str | None,
    half: bool,
    watching: watch_lib.Timing | None,
    overwrite: bool,
) -> None:
    source, folder = None, None
    if watching is not None:
        folder = _local_folder(pattern)
    elif pattern is not None:
        source = FolderSource(predictions.find(pattern))
    if mode in ("calibrate", "export") and checkpoint_path.is_file():
        # It may be rounded already, and what was written once is not changed.
        raise UserError(
            f"{checkpoint_path}: --mode={mode} takes a checkpoint, and this is a model file; "
            "name the checkpoint's folder with --checkpoint"
        )
    detector = load(checkpoint_path, config, weights)
    with compilation_cache.enabled(detector.config.cache):
        if mode == "export":
            test = None
            if half:
                sources = {"test": open_dataset(detector.config)["test"]}
                test = _readable(detector.config, sources)[0]["test"]
            export(detector, workdir / f"model{model_file.SUFFIX}", half, test)
            return
        print(f"weights: {detector.weights.origin}")
        if mode == "eval":
            dataset = open_dataset(detector.config)
            _say_folders(detector.config, {"test": dataset["test"]})
            evaluate(detector.config, detector, dataset["test"], workdir, overwrite)
        elif mode == "calibrate":
            assert source is not None
            sources, _ = _readable(_for_new_images(detector).config, {"input": source}, False)
            _survey(sources)
            calibrate(detector, sources["input"], "given", checkpoint_path)
        elif watching is not None:
            assert folder is not None
            watch(detector, folder, workdir, watching)
        else:
            assert mode == "predict"
            assert source is not None
            predict(detector, source, workdir)


def _local_folder(pattern: str | None) -> pathlib.Path:
    folder = paths.parse(pattern or "")
    if not isinstance(folder, pathlib.Path):
        raise UserError(f"--input={pattern}: --watch is for folders of this machine")
    if not folder.is_dir():
        raise UserError(f"--input={pattern}: no such folder; expected the one to watch")
    return folder


def open_dataset(config: Config) -> dict[str, Source]:
    """Finds the images of a configuration; no image is decoded.

    Returns:
      The splits "train" (at most `train_images` of it), "validation" and "test"; the latter
      two may be empty.

    Raises:
      UserError: folders or files are missing.
    """
    sources: dict[str, Source] = _open_splits(config)
    if config.dataset.inverted_masks == "yes":
        for split, source in sources.items():
            sources[split] = masks.Inverted(source)
    if parallel.every().process == 0:
        _warn_unused(config)
    return _held_back(config, sources)


def _warn_unused(config: Config) -> None:
    """Warn of folders in the dataset whose images are not read."""
    layout, dataset = LAYOUTS[config.dataset.name], config.dataset
    base = layout.folder(dataset.root, config.category)
    if not paths.is_folder(base):  # packed elsewhere
        return
    if unused := layout.unused(dataset.root, config.category):
        names = ", ".join(
            files.shown(path.relative_to(base).as_posix()) for path in unused[:_MOST_NAMED]
        )
        more = f" and {len(unused) - _MOST_NAMED} more" if unused[_MOST_NAMED:] else ""
        warnings.warn(
            DataWarning(
                f"{base}: images that are not used lie in {names}{more}; "
                f"config.dataset.name={dataset.name} has no such folder (docs/datasets.md). "
                "Rename the folder if they are to be used, else move it elsewhere"
            ),
            stacklevel=3,
        )


def _held_back(config: Config, sources: dict[str, Source]) -> dict[str, Source]:
    """The splits of a dataset as a configuration uses them; see `open_dataset`."""
    train = sources["train"]
    if exclude := config.dataset.exclude:
        train = _without_excluded(train, exclude)
    if count := config.dataset.train_images:
        chosen = sampling.subset(range(len(train.records)), count, config.dataset.seed)
        train = sampling.part(train, chosen)
    return {**sources, "train": train}


def _without_excluded(source: Source, exclude: Sequence[str]) -> Source:
    """The training images but those of `config.dataset.exclude`."""
    known = {record.relative_path for record in source.records}
    if unknown := [name for name in exclude if name not in known]:
        example = f", as in {next(iter(known))!r}" if known else ""
        raise UserError(
            f"config.dataset.exclude: {unknown[0]!r} is none of the {len(known)} training "
            f"images; expected their relative paths{example}"
        )
    left = [i for i, x in enumerate(source.records) if x.relative_path not in set(exclude)]
    return sampling.part(source, left)


def _say_folders(config: Config, sources: Mapping[str, Source]) -> None:
    """Print which folders were taken for good images, where their names alone decide."""
    if config.dataset.name == "folder":
        records = itertools.chain.from_iterable(source.records for source in sources.values())
        print(folder_layout.summary(records))


def _readable(
    config: Config, sources: Mapping[str, Source], cached: bool = True
) -> tuple[dict[str, Source], list[Skipped]]:
    """Without images that cannot be used, where that is asked for; see `skipping`.

    Images that are seen once are not cached: they would push out those that are seen again.
    """
    cache = image_cache.open_cache(config.cache) if cached else None
    return skipping.readable(sources, config, parallel.every(), cache)


def _open_splits(config: Config) -> dict[str, Source]:
    # What is missing yet one process draws and packs.
    with parallel.first_process_first():
        dataset = config.dataset
        layout = LAYOUTS[dataset.name]
        if dataset.source == "folder":
            records = layout.records(dataset.root, config.category, dataset.seed)
            folder = layout.folder(dataset.root, config.category)
            images = [record.image for record in records]
            if text := files.passed_over(files.hidden_beside(images, folder)):
                print(text)
            return _by_split(records)
        # Imported here: TensorFlow Datasets takes its time, and few need it.
        from padim_jax.datasets import tfds_builder

        packed = tfds_builder.packed_dir(dataset.tfds_dir, config.packed_name)
        folder = layout.folder(dataset.root, config.category)
        # A synthetic one is drawn when missing.
        if paths.is_folder(folder) or dataset.name == "synthetic":
            records = layout.records(dataset.root, config.category, dataset.seed)
        else:
            records = None
            print(
                f"config.dataset.root: no folder {folder}; reading what is packed in {packed}"
            )
        builder = tfds_builder.prepare(packed, records)
        return {split: tfds_builder.open_split(builder, split) for split in get_args(Split)}


def _by_split(records: Sequence[Record]) -> dict[str, Source]:
    return {
        split: FolderSource([record for record in records if record.split == split])
        for split in get_args(Split)
    }


def load(
    path: str | Path,
    config: Config | config_lib.Overrides | None = None,
    weights: str | None = None,
) -> Detector:
    """Loads a fitted detector.

    It serves the process that loads it: JAX does not work after a fork. Where several
    processes score, start them by "spawn" and load it in each.

    Args:
      path: a checkpoint's folder, or a model file (see `export`).
      config: None takes the model's own. Otherwise dataset, batch size, map, outputs and
        the place of the weights come from here; what the statistics depend on must be as
        the model was fitted with. Settings by dotted names, as {"outputs.figures": "none"},
        replace some of the model's own.
      weights: where the backbone's weights are now, if not where the configuration
        says; a path or name as in `config.model.weights`.

    Raises:
      UserError: no model, or one fitted with another backbone, weights file,
        preprocessing or channel choice than the configuration asks for.
    """
    place, devices = paths.parse(os.fspath(path)), parallel.every()
    model = model_file.load(place, devices) if place.is_file() else None
    fitted, identity = fitting.load_checkpoint(place, devices) if model is None else (model, "")
    config = config_lib.resolve(config, fitted.config)
    fitting.require_same(place, fitted.config, config)
    config = fitting.with_stored_range(config, fitted.config)
    if config.title != fitted.config.title:
        print(f"{path} was fitted to {fitted.config.title}; now used for {config.title}")
    elif inputs.folder(config) != inputs.folder(fitted.config):
        print(
            f"{path} was fitted to images of {shown(inputs.folder(fitted.config))}; now used "
            f"for {shown(inputs.folder(config))}"
        )
    variables = fitting.load_weights(place, fitted.weights, config, weights)
    variables = detector_lib.with_projection(variables, fitted.projection)
    variables = parallel.replicate(variables, devices)
    if isinstance(fitted, checkpoint.Fitted):
        detector = fitting.ready(fitted, identity, config, variables)
        found = calibration_file.read(place, *detector_lib.fingerprints(detector))
    else:
        fitting.require_whole(place, fitted, fitted.fitted)
        detector = Detector(
            *(config, fitted.index, variables, fitted.weights),
            *(fitted.fitted, fitted.identity, fitted.images),
        )
        stored, marks = fitted.calibration, detector_lib.fingerprints(detector)
        found = None if stored is None else calibration_file.restore(place, stored, *marks)
    return dataclasses.replace(detector, calibration=found)


def export(
    detector: Detector, path: Path, half: bool = False, test: Source | None = None
) -> None:
    """Writes a model file: for scoring alone, loaded without factorising.

    Args:
      detector: fitted.
      path: the file; an earlier one is replaced.
      half: keep the factorisation in float16. What this changes is measured on the test
        set, printed, and stored in the file.
      test: normal and anomalous images, needed for `half`.

    Raises:
      UserError: the file cannot be written, another process writes it, or `half` without
        test images.
    """
    if parallel.every().processes > 1:
        raise UserError("--mode=export: one process writes the file; start only one")
    with locks.held(path):
        _export(detector, path, half, test)


def _export(detector: Detector, path: Path, half: bool, test: Source | None) -> None:
    model_file.require_own(path)  # now, rather than after measuring
    comparison, identity = None, detector.identity
    if half:
        if test is None or not test.records:
            raise UserError(
                f"--half: {_no_test_images(detector.config)}; what the rounding changes is "
                "measured on them"
            )
        memory.require_for_maps(detector.config, 2 * len(test.records))
        exact, _ = _score(detector, test)
        assert exact is not None
        identity = f"{identity} in float16"  # a threshold of the one is not the other's
        try:
            detector = dataclasses.replace(
                detector, gaussian=model_file.rounded(detector.gaussian)
            )
        except ValueError as error:
            raise UserError(f"--half: {error}; export without --half") from error
        rounded, _ = _score(detector, test)
        assert rounded is not None
        comparison = results.compare(exact, rounded)
        print(f"\n{results.comparison_table(comparison)}\n")
    thresholds = None
    if detector.calibration is not None:
        # --half moves scores by far less than the thresholds' own error.
        exported = dataclasses.replace(detector, identity=identity)
        thresholds = calibration_lib.to_dict(
            detector.calibration, detector_lib.fingerprint(exported)
        )
    fitting.make_folder(path.parent)
    config = config_lib.with_absolute_paths(detector.config)
    size = model_file.save(
        path,
        model_file.Model(
            config,
            detector.index,
            detector.gaussian,
            detector.weights,
            identity,
            detector.images,
            half,
            comparison,
            thresholds,
            projection=detector.projection,
        ),
        _regions(detector),
    )
    print(f"model file, {size / 1e6:.0f} MB -> {path}")


def evaluate(
    config: Config, detector: Detector, source: Source, workdir: Path, overwrite: bool = False
) -> dict:
    """Scores a test set and writes metrics, scores, maps and pictures.

    Args:
      config: dataset and outputs.
      detector: fitted.
      source: normal and anomalous images.
      workdir: where the results go; files of an earlier evaluation are replaced.
      overwrite: replace those of another data set, which are kept otherwise.

    Returns:
      What metrics.json holds; of several processes, in the first.

    Raises:
      UserError: no test images, an unreadable one, too little memory for their maps,
        another process writes there, or there are results of another data set.
    """
    _require_test_images(config, source)
    with _writing_results(workdir):
        identity = inputs.read(config, {"test": source}, parallel.every())
        if not overwrite:
            _require_same_data(workdir, identity)
        seen = dataclasses.replace(config, image=detector.config.image)
        sources, skipped = _readable(seen, {"test": source})
        sources, summary = _survey(sources, detector)
        return _evaluate(config, detector, sources["test"], workdir, skipped, identity, summary)


def _evaluate(
    config: Config,
    detector: Detector,
    source: Source,
    workdir: Path,
    skipped: Sequence[Skipped],
    identity: Mapping[str, Any],
    summary: summary_lib.Summary,
    suspects: Suspects | None = None,
) -> dict:
    if parallel.every().process == 0:  # which keeps the maps
        memory.require_for_maps(config, len(source.records))
    scored, read = _score(detector, source)
    found = _summarize_masks(config, source, scored, read)
    summary = dataclasses.replace(summary, masks=found)
    said = (
        []
        if found is None
        else summary_lib.mask_warnings(found, config.image.size, config.metrics.resolution)
    )
    survey.warn(said, parallel.every())
    if scored is None:
        return {}
    if config.metrics.resolution == "full":
        scored = dataclasses.replace(scored, pixels=_full_pixels(config, source, scored, read))
    defects = sum(int(mask.sum()) for mask in scored.masks if mask is not None)
    memory.require_for_maps(config, len(source.records), defects / scored.maps.size)
    measured = results.measure(scored, detector.calibration)
    if (transfer := measured["transfer"]) and transfer["unlike"]:
        warnings.warn(DataWarning(results.transfer_text(transfer)), stacklevel=2)
    scale = figures.color_scale(scored.maps, scored.labels.astype(int))
    measured["color_scale"] = [scale.low, scale.high]
    measured["detector"] = detector_lib.fingerprint(detector)
    measured[inputs.KEY] = {**identity, "weights": detector.weights.sha256}
    line = None if found is None else summary_lib.mask_line(found, config.image.size)
    if line is not None:
        print(line)
    measured["data"] = summary_lib.to_dict(summary) | {
        "mask_line": line,
        "warnings": summary_lib.warnings(summary) + said,
    }
    known = {digest.tobytes() for digest in detector.images}
    measured["leaks"] = [
        record.relative_path
        for record, digest in zip(source.records, read.digests, strict=True)
        if digest.tobytes() in known
    ]
    measured["train_images"] = detector.count
    measured["skipped"] = [dataclasses.asdict(one) for one in skipped]
    cache = image_cache.open_cache(config.cache)

    def load_image(index: int) -> UInt8[np.ndarray, "h w 3"]:
        return input_pipeline.load_image(source, detector.config.image, index, cache)

    with _replacing_results(workdir) as place:
        results.write_json(place / _CONFIG, config_lib.to_dict(config))
        if config.outputs.report:
            page = report.run_page(config, scored, measured, load_image, suspects)
            paths.write(place / REPORT, page.encode())
            worst = report.thumbnails(scored, scale, load_image)
            results.write_json(place / THUMBNAILS, worst)
        results.write_skipped(place, skipped)
        results.write(place, config, scored, measured, load_image, detector.calibration)
    print(f"\n{results.table(config, measured)}\n\nresults: {workdir}")
    return measured


def predict(detector: Detector, source: Source, workdir: Path) -> None:
    """Scores images of which nothing is known; see `predictions.Writer` for the output.

    Thresholds and colours are the detector's; if it has none, those of its evaluation in
    `workdir/metrics.json`; without one, nothing is called anomalous and the colours
    follow the first batch.

    Args:
      detector: fitted.
      source: the images; see `predictions.find`.
      workdir: results go to `predictions` below it, whose earlier contents they replace
        once all images are scored; until then they are in `predictions.incomplete`, where
        the next call finds what was done if this one is interrupted (see `unfinished`; not
        on an object store).

    Raises:
      UserError: an unreadable image, or another process is writing there.
    """
    known = _known_thresholds(detector, workdir)
    detector = _for_new_images(detector)
    devices = parallel.every()
    with locks.held(workdir / "predictions", devices.process):
        sources, skipped = _readable(detector.config, {"input": source}, False)
        _predict(detector, sources["input"], workdir, known, devices, skipped)


def _known_thresholds(detector: Detector, workdir: Path) -> predictions.Thresholds:
    if detector.calibration is not None:
        known = predictions.thresholds(detector.calibration)
    else:
        fingerprints = detector_lib.fingerprints(detector)
        known = predictions.read_evaluation(workdir / "metrics.json", *fingerprints)
    print(known.text)
    return known


def _predict(
    detector: Detector,
    source: Source,
    workdir: Path,
    known: predictions.Thresholds,
    devices: parallel.Devices,
    skipped: Sequence[Skipped],
) -> None:
    config = detector.config
    folder, growing = workdir / "predictions", workdir / "predictions.incomplete"
    suffix = _map_suffix(config)
    journal, kept = None, unfinished.Kept()
    if devices.process == 0:
        for place in (folder, growing):
            table, log = place / predictions.TABLE, place / unfinished.NAME
            _require_own(place, predictions.is_table(table) or _is_journal(log))
            _require_elsewhere(source, place)
        if isinstance(growing, pathlib.Path):
            fitting.make_folder(growing)
            size = progress.batch_size(source, config, devices)
            settings = _said(detector, known) | {
                "batch size": size,
                "version of padim_jax": padim_jax.__version__,
                "version of jax": jax.__version__,
            }
            journal = unfinished.Progress(growing, suffix, settings)
            kept = journal.take_up(source, size, devices)
            known = dataclasses.replace(known, scale=known.scale or kept.scale)
        else:
            paths.remove_folder(growing)
            fitting.make_folder(growing)
    start = parallel.agreed(kept.images)
    # Not cached: images that are seen once would push out those that are seen again.
    found = _scores(detector, source, "predict", cache=None, start=start)
    if devices.process > 0:
        for _ in found:  # for the first process, which writes
            pass
        return
    with predictions.Writer(
        growing, config.image, suffix, known, detector.calibration, kept.table
    ) as writer:
        done = start
        for part in found:
            writer.add(part.records, part.maps, part.scores, part.digests)
            done += len(part.records)
            if journal is not None:
                inputs = unfinished.identity(part.records, map(bytes, part.digests))
                journal.add(done, inputs, writer.size, writer.scale)
    results.write_skipped(growing, skipped)
    # Earlier predictions stay until these are whole.
    _remove_predictions(folder)
    paths.move_folder(growing, folder, last=predictions.TABLE)
    if journal is not None:
        assert isinstance(folder, pathlib.Path)
        journal.finish(folder)
    left_out = f", {len(skipped)} skipped (see {results.SKIPPED})" if skipped else ""
    print(f"scored {len(source.records)} images{left_out}\nresults: {folder}")


def watch(
    detector: Detector, folder: pathlib.Path, workdir: Path, timing: watch_lib.Timing
) -> None:
    """Scores images as they arrive in a folder, until SIGTERM; see `watch.run`.

    Thresholds and colours are those of `predict`.

    Args:
      detector: fitted.
      folder: the images come there, and to folders in it.
      workdir: results go to `watch` below it, where those before stay.
      timing: how often to look, and how long to wait.

    Raises:
      UserError: see `watch.run`.
    """
    known = _known_thresholds(detector, workdir)
    detector = _for_new_images(detector)
    suffix, said = _map_suffix(detector.config), _said(detector, known)
    watch_lib.run(detector, known, folder, workdir / "watch", suffix, said, timing)


def _require_elsewhere(source: Source, folder: Path) -> None:
    """Pictures of predictions are images as well, but nobody means to score them."""
    place = f"{_resolved(folder)}/"
    for record in source.records:
        if f"{_resolved(record.image.parent)}/".startswith(place):
            raise UserError(
                f"--input: {record.image} is of the results in {folder}; name a --workdir "
                "outside of the folder to predict, or images by a glob that leaves it out"
            )


def _resolved(path: Path) -> str:
    return os.path.realpath(path) if isinstance(path, pathlib.Path) else os.fspath(path)


def _map_suffix(config: Config) -> str:
    return "npy" if config.outputs.maps == "npy" else "tiff"


def _said(detector: Detector, known: predictions.Thresholds) -> dict[str, Any]:
    """All that predictions depend on beside images, by names for a person."""
    fingerprint, calibration = detector_lib.fingerprint(detector), detector.calibration
    said = calibration and calibration_lib.to_dict(calibration, fingerprint)
    return {
        "model": fingerprint,
        "threshold": [known.image, known.pixel],
        "scale of colours": known.scale and dataclasses.astuple(known.scale),
        "calibration": hashlib.sha256(json.dumps(said).encode()).hexdigest(),
    }


def _remove_predictions(folder: Path) -> None:
    """Removes them; killed on the way, the next run knows the rest for one of ours."""
    _remove(folder, folder / predictions.TABLE)


def _remove(folder: Path, sign: Path) -> None:
    """Removes a folder, in the end the file in it that says whose it is."""
    if isinstance(folder, pathlib.Path) and folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                paths.remove_folder(path)
            elif path != sign:
                path.unlink()
    paths.remove_folder(folder)


def _for_new_images(detector: Detector) -> Detector:
    """Random views are of a dataset's images; others are seen from the centre."""
    config = detector.config
    image = input_pipeline.centred(config.image)
    return dataclasses.replace(detector, config=dataclasses.replace(config, image=image))


@contextlib.contextmanager
def _writing_results(workdir: Path) -> Iterator[None]:
    process = parallel.every().process
    with locks.held(workdir / "results", process):
        if process == 0:
            fitting.make_folder(workdir)
            _require_own_results(workdir)
        yield


@contextlib.contextmanager
def _replacing_results(workdir: Path) -> Iterator[Path]:
    """Where to write results, which at the block's end take an earlier evaluation's place.

    An error, as of a full disk, keeps those. An object store, where nothing can be renamed, is
    written to at once.
    """
    if not isinstance(workdir, pathlib.Path):
        for name in (METRICS, REPORT, THUMBNAILS):
            (workdir / name).unlink(missing_ok=True)
        yield workdir
        return
    place = workdir / _INCOMPLETE
    _require_own(place, (place / _SIGN).exists())
    _remove(place, place / _SIGN)  # a killed process's
    place.mkdir()
    try:
        paths.write(place / _SIGN, b"padim_jax: results on their way; may be deleted\n")
        yield place
    except BaseException:
        _remove(place, place / _SIGN)
        raise
    # From here to the end there is no sign of a whole evaluation.
    (workdir / METRICS).unlink(missing_ok=True)
    names = {*_RESULTS, *(path.name for path in place.iterdir())} - {_SIGN}
    for name in (_CONFIG, *sorted(names - {_CONFIG, METRICS}), METRICS):
        old, new = workdir / name, place / name
        if old.is_dir() and not old.is_symlink():
            paths.remove_folder(old)
        elif not new.exists() or new.is_dir():
            old.unlink(missing_ok=True)
        if new.exists():
            new.replace(old)
    _remove(place, place / _SIGN)


def stored_inputs(workdir: Path) -> dict[str, Any] | None:
    """Return what `inputs.read` said of an evaluation's images; None if there is none.

    Of one by a version that did not keep it only the folder is known.

    Raises:
      ValueError: these are no results.
    """
    if not (workdir / METRICS).exists():
        return None
    measured = json.loads((workdir / METRICS).read_text(encoding="utf-8"))
    if not isinstance(measured, dict):
        raise ValueError("no results")
    stored = measured.get(inputs.KEY)
    if stored is None:
        config = json.loads((workdir / _CONFIG).read_text(encoding="utf-8"))
        root = paths.absolute(paths.parse(config["dataset"]["root"]))
        stored = {"folder": os.fspath(root / config["category"]), "images": {}}
    if not isinstance(stored, dict) or not isinstance(stored.get("images"), dict):
        raise ValueError("no results")
    return stored if isinstance(stored.get("folder"), str) else stored | {"folder": ""}


def other_data(workdir: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the sentence that refuses to replace another data set's results."""
    return (
        f"{workdir}: holds the results of another data set, {shown(stored['folder'])}, and not "
        f"of {shown(now['folder'])}; name another --workdir, or replace them with --overwrite"
    )


def _require_same_data(workdir: Path, now: Mapping[str, Any]) -> None:
    """Keeps results of other images: those of a folder of the same name, say."""
    refusal = ""
    if parallel.every().process == 0:  # the only one that reads and writes results
        # What cannot be read is shown to nobody, and replaced as it was before.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            stored = stored_inputs(workdir)
            if stored is not None and not inputs.are_same_data(stored, now):
                refusal = other_data(workdir, stored, now)
    if refusal := parallel.gather_bytes(refusal.encode())[0].decode():
        raise UserError(refusal)


def _require_model_of_same_data(path: Path, config: Config, source: Source) -> None:
    """Keeps a model of other images; see `inputs.are_same_data`."""
    fitted = checkpoint.fitted_config(path)
    if fitted is None or inputs.folder(fitted) == inputs.folder(config):
        return
    present = {digest.tobytes() for digest in copies.digests(source, parallel.every())}
    # Some of these images may be held out, or may have come since.
    if not present.issuperset(x.tobytes() for x in checkpoint.fitted_images(path)):
        raise UserError(
            f"{path}: holds a model of another data set, {shown(inputs.folder(fitted))}, and "
            f"not of {shown(inputs.folder(config))}; name another --workdir (or --checkpoint), "
            "or replace it with --overwrite"
        )


def _require_own_results(workdir: Path) -> None:
    ours = is_own_config(workdir / _CONFIG)  # written before all else
    for name in ("maps", "figures"):
        _require_own(workdir / name, ours)
    for name in (_CONFIG, METRICS, *_RESULTS):
        if name != results.SKIPPED:  # which knows its own, and comes of a training as well
            _require_own(workdir / name, ours, link=True)
    _require_own(workdir / _INCOMPLETE, (workdir / _INCOMPLETE / _SIGN).exists())


def is_own_config(path: Path) -> bool:
    """Return whether a file is the config.json of a run: other programs have one, too."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    groups = ("dataset", "image", "model", "map")
    return isinstance(found, dict) and all(isinstance(found.get(x), dict) for x in groups)


def _is_journal(path: Path) -> bool:
    return path.exists() and journal.is_ours(path)


def _require_own(place: Path, ours: bool, link: bool = False) -> None:
    """Results of an earlier run are replaced, anything else in their place is not.

    Raises:
      UserError: there is something else, or a link where there is to be none.
    """
    if not link:
        paths.require_no_link(place)
    if ours or not place.exists():
        return
    is_folder = isinstance(place, pathlib.Path) and place.is_dir()
    if is_folder and all(
        paths.is_growing(path) or paths.is_system_file(path.name) for path in place.iterdir()
    ):
        return  # a run that was killed has just made it
    raise UserError(
        f"{place}: exists and is not from an earlier run; move it away or name another "
        "--workdir"
    )


@dataclasses.dataclass(frozen=True)
class _Part:
    """Scores of consecutive images of a source, of all processes'.

    Attributes:
      records: what the images are.
      maps: anomaly maps.
      scores: of the images.
      masks: defect pixels; nothing where unknown.
      known: whether the mask is.
      digests: SHA-256 of the images' files.
      samples: see `detector.Anomalies`.
      sizes: of the images as they are stored, (height, width).
      facts: of the masks; see `image_cache.MaskFacts`.
    """

    records: Sequence[Record]
    maps: Float32[np.ndarray, "n h w"]
    scores: Float32[np.ndarray, " n"]
    masks: Bool[np.ndarray, "n h w"]
    known: Bool[np.ndarray, " n"]
    digests: UInt8[np.ndarray, "n 32"]
    samples: Float32[np.ndarray, "n _s"]
    sizes: Int32[np.ndarray, "n 2"]
    facts: Int32[np.ndarray, "n 4"]


def _scores(
    detector: Detector,
    source: Source,
    what: str,
    cache: image_cache.ImageCache | None,
    left_out: int = 0,
    start: int = 0,
) -> Iterator[_Part]:
    """Scores a source batch by batch; every process gets all processes' scores.

    With `left_out` the source is of groups of so many images that were fitted, and each is
    scored as the model without its group would. The first `start` images, whole batches, are
    left out.
    """
    config, devices = detector.config, parallel.every()
    few: dict[str, int] = {}
    if left_out > 1:  # whole groups
        least = math.lcm(left_out, devices.total)
        size = max(1, config.batch_size // least) * least
        config = dataclasses.replace(config, batch_size=size)
    for batch in progress.batches(source, config, what, cache, devices, start):
        names = [str(record.image) for record in batch.records]
        found = detector_lib.score_pixels(detector, batch.images, left_out, names)
        padding = len(batch.images) - len(batch.records)
        nothing = np.zeros(config.image.size, bool)
        masks = [nothing if mask is None else mask for mask in batch.masks]
        own: dict[str, Any] = {
            "maps": found.maps,
            "scores": found.scores,
            "masks": np.stack(masks + padding * [nothing]),
            "known": np.array([mask is not None for mask in batch.masks] + padding * [False]),
            "digests": batch.digests,
            "samples": found.samples,
            "sizes": np.array([*batch.sizes, *(padding * [(0, 0)])], np.int32),
            "facts": np.array([*batch.facts, *(padding * [image_cache.NO_MASK])], np.int32),
        }
        valid, every = parallel.gather((batch.valid, own))
        every = {name: x[valid] for name, x in every.items()}
        end = start + int(np.sum(valid))
        few |= progress.few_levels(batch)
        yield _Part(source.records[start:end], **every)
        start = end
    if not left_out:  # else the fit has told
        progress.warn_few_levels(few, len(source.records), devices)


@dataclasses.dataclass(frozen=True)
class _Read:
    """What a pass over a test set has read; see `_Part`."""

    digests: UInt8[np.ndarray, "n 32"]
    sizes: Int32[np.ndarray, "n 2"]
    facts: Int32[np.ndarray, "n 4"]


def _score(detector: Detector, source: Source) -> tuple[results.Scored | None, _Read]:
    """Scores a test set, for the first process; and what was read of it.

    Raises:
      UserError: most of the masks are a defect by more than half; see `masks.FullCheck`.
    """
    check = masks.FullCheck(sum(record.mask is not None for record in source.records))
    checked = detector.config.dataset.inverted_masks == "check"
    cache = image_cache.open_cache(detector.config.cache)
    # While the device computes, for the results that follow.
    threading.Thread(target=results.import_libraries).start()
    parts = []
    read: list[_Read] = []
    for part in _scores(detector, source, "evaluate", cache):
        read.append(_Read(part.digests, part.sizes, part.facts))
        if checked:
            for record, (defect, *_), size in zip(
                part.records, part.facts, part.sizes, strict=True
            ):
                if record.mask is not None:
                    check.add(shown(record.mask), int(defect), int(np.prod(size)))
        if parallel.every().process == 0:
            parts.append(part)
    every = _Read(
        *(
            np.concatenate([getattr(part, field.name) for part in read])
            for field in dataclasses.fields(_Read)
        )
    )
    if not parts:
        return None, every
    known_masks = [
        mask if known else None
        for part in parts
        for mask, known in zip(part.masks, part.known, strict=True)
    ]
    scored = results.Scored(
        source.records,
        known_masks,
        np.concatenate([part.maps for part in parts]),
        np.concatenate([part.scores for part in parts]),
    )
    return scored, every


def _summarize_masks(
    config: Config, source: Source, scored: results.Scored | None, read: _Read
) -> summary_lib.Masks | None:
    """In the first process, which alone has the masks; None in the others."""
    if scored is None:
        return None
    pixels = config.image.size[0] * config.image.size[1]
    found = []
    for i, record in enumerate(source.records):
        mask = scored.masks[i]
        if record.mask is not None and mask is not None:
            defect, *regions = read.facts[i].tolist()
            size, left = int(np.prod(read.sizes[i])), int(np.count_nonzero(mask))
            found.append(
                summary_lib.Mask(record.relative_path, size, defect, pixels, left, *regions)
            )
    return summary_lib.summarize_masks(found)


def _full_pixels(
    config: Config, source: Source, scored: results.Scored, read: _Read
) -> metrics.PixelMetrics:
    """Pixel metrics at the masks' own sizes; masks are read again, and never kept."""
    areas = np.prod(read.sizes.astype(np.int64), axis=1)
    memory.require_for_full(int(areas.max()), int(read.facts[:, 0].sum(dtype=np.int64)))
    known = np.array([mask is not None for mask in scored.masks])

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        record, (height, width) = source.records[index], read.sizes[index].tolist()
        seen = input_pipeline.view(config.image, record.relative_path)
        bar.update()
        full = predictions.restore_map(scored.maps[index], (height, width), config.image, seen)
        if record.mask is None:
            return np.zeros(full.shape, bool), full
        content = source.read(index)[1]
        assert content is not None
        return masks.decode(content, shown(record.mask)), full

    kinds = [record.defect_type for record in source.records]
    total = len(known) + int(np.count_nonzero(known & scored.labels))
    with progress.bar(total, "full resolution", parallel.every()) as bar:
        return metrics.stream_pixels(scored.labels, kinds, load, known)


def _survey(
    sources: Mapping[str, Source], detector: Detector | None = None
) -> tuple[dict[str, Source], summary_lib.Summary]:
    """Read the images' files, print what they are, and warn of what is implausible.

    Args:
      sources: images, by the name of their split.
      detector: whose images must not be among them, if it is fitted already.

    Returns:
      The same images, of which copies among those to be fitted count once; and the summary.
    """
    devices = parallel.every()
    fitted = detector and {digest.tobytes() for digest in detector.images}
    files = survey.read(sources, devices)
    summary = summary_lib.summarize(files, fitted)
    survey.tell(summary, devices)
    known = dict(sources)
    if "train" in known:  # read once more for it otherwise
        hashes = survey.hashes(files["train"])
        known["train"] = copies.distinct(known["train"], devices, hashes)
    return known, summary


def _regions(detector: Detector) -> int:
    config = detector.config
    index = detector.index.tolist()
    return detector_lib.pyramid(config.image, config.model, index).shapes[0][0]


def _require_unknown(record: Record, fitted: bool, origin: str) -> None:
    """Images that a model was fitted to score lower than others: no thresholds come of them."""
    if fitted:
        raise UserError(
            f"{'--input' if origin == 'given' else 'thresholds'}: {record.image} is one of the "
            "images that the model was fitted to, and scores lower than others do; expected "
            "normal images that it does not know"
        )


def _require_fitted(record: Record, fitted: bool, unused: int) -> None:
    """Only images that were fitted can be left out, each as often as it was fitted."""
    if not fitted:
        raise UserError(
            f"thresholds: {record.image} is none of the images that the model was fitted to; "
            "expected those, since no others can be left out of it"
        )
    if not unused:
        raise UserError(
            f"thresholds: {record.image} is there more often than it was fitted; expected each "
            "image once"
        )


def _require_test_images(config: Config, source: Source) -> None:
    if not source.records:
        raise UserError(
            f"config.dataset.root={config.dataset.root}: {_no_test_images(config)}. To fit "
            "only, use --mode=train"
        )


def _no_test_images(config: Config) -> str:
    """What was found instead of test images, and where layouts have them."""
    name, dataset = config.dataset.name, config.dataset
    base, there = LAYOUTS[name].folder(dataset.root, config.category), ""
    if paths.is_folder(base):
        folders = files.subfolders(base)
        there = f"; {base} holds {files.quoted(folders) or 'no folder'}"
    expected = [
        f"{LAYOUTS[one].test} (config.dataset.name={one})"
        for one in dict.fromkeys((name, "mvtec_ad", "folder"))
        if LAYOUTS[one].test
    ]
    return (
        f"no test images{there}; expected normal and anomalous ones in {' or '.join(expected)}"
    )
