"""Train, evaluate, predict: where the stages meet, and where all side effects start."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

import padim_jax
from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config
from padim_jax.core import calibration as calibration_lib
from padim_jax.core.suspects import Suspects
from padim_jax.data import copies, dataset_splits, input_pipeline, inputs, listing, passes
from padim_jax.data.files import shown
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.records import Skipped, Source
from padim_jax.detector import detector as detector_lib
from padim_jax.detector import memory, scoring_pass
from padim_jax.detector.detector import Detector
from padim_jax.devices import parallel
from padim_jax.errors import UserError
from padim_jax.output import predictions, results
from padim_jax.runs import calibrate, evaluate, grow, results_folder
from padim_jax.runs import train as fitting
from padim_jax.runs import watch as watch_lib
from padim_jax.runs.train import Backbone
from padim_jax.store import calibration_file, checkpoint, model_file, statistics_store
from padim_jax.store.statistics_store import OnDisk
from padim_jax.system import compilation_cache, journal, locks, paths
from padim_jax.system.paths import Path

# Of all files that predictions are in: what `predict` writes, and earlier versions wrote.
_PREDICTIONS = (".csv", ".jpg", ".jsonl", ".npy", ".tiff", *journal.SUFFIXES)


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
    if mode in ("train", "update", "merge") and parallel.every().process == 0:
        results.require_own_suspects(workdir)  # not after a fit
    try:
        if mode == "train_and_eval":
            assert isinstance(config, Config)
            train_and_eval(config, workdir, checkpoint_path, overwrite=overwrite)
        elif mode == "train":
            assert isinstance(config, Config)
            with compilation_cache.enabled(config.cache.programs):
                dataset = dataset_splits.open_dataset(config)
                del dataset["test"]  # nor looked at
                dataset_splits.say_folders(config, dataset)
                config = fitting.with_range(config, dataset["train"])
                dataset, skipped = scoring_pass.readable(config, dataset)
                dataset, _ = evaluate.take_survey(dataset, config)
                _, suspects = _train(config, dataset, checkpoint_path, overwrite=overwrite)
            if parallel.every().process == 0:
                results.write_skipped(workdir, skipped)
                results.write_suspects(workdir, suspects)
        elif mode == "update":
            _update(config, workdir, checkpoint_path, pattern, weights)
        elif mode == "merge":
            grow.merge(models, checkpoint_path, workdir)
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
    dataset = dataset_splits.open_dataset(config)
    dataset_splits.say_folders(config, dataset)
    dataset_splits.require_test_images(config, dataset["test"])
    with (
        results_folder.writing_results(workdir),
        compilation_cache.enabled(config.cache.programs),
    ):
        memory.require_for_maps(config, len(dataset["test"].records))  # not after the fit
        identity = inputs.read(config, dataset, parallel.every())
        if not overwrite:
            results_folder.require_same_data(workdir, identity)
        ranged = fitting.with_range(config, dataset["train"])
        dataset, skipped = scoring_pass.readable(ranged, dataset)
        dataset, summary = evaluate.take_survey(dataset, ranged)
        tests = len(dataset["test"].records)
        detector, suspects = _train(
            ranged, dataset, checkpoint_path, backbone, overwrite, tests
        )
        if parallel.every().process == 0:
            results.write_suspects(workdir, suspects)
            # Of the model that was: nobody is to take it for this one's.
            (workdir / results_folder.METRICS).unlink(missing_ok=True)
        return evaluate.evaluate_unlocked(
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
    tests: int = 0,
) -> tuple[Detector, Suspects | None]:
    """As `train`; with images left out one by one also how these rank, in the first process.

    There has to be memory for evaluating `tests` images afterwards.
    """
    config = fitting.with_range(config, dataset["train"])
    with locks.held(path, parallel.every().process):
        if not overwrite:
            results_folder.require_model_of_same_data(path, config, dataset["train"])
        dataset = dataset_splits.with_held_out(config, dataset)
        source = copies.distinct(dataset["train"], parallel.every())
        validation, normal = dataset["validation"], config.threshold.normal
        leave_out = normal == "leave_one_out" or (normal == "auto" and not validation.records)
        if normal != "none":  # not after the fit
            if not leave_out:
                validation = calibrate.without_fitted(source.digests, validation)
            calibrate.require_groups(config, source if leave_out else validation)
        # Of groups the sizes differ.
        left_out = int(leave_out and not config.threshold.groups and len(source.records) >= 3)
        detector = fitting.train(config, source, path, backbone, tests, left_out)
        if normal == "none":
            return detector, None
        if not leave_out:
            return calibrate.find(detector, validation, "held_out", OnDisk(path)), None
        if detector.count < 3:
            print("no thresholds: leaving one out needs at least 3 images that were fitted")
            return detector, None
        return calibrate.find_ranked(detector, source, "leave_one_out", OnDisk(path))


def _update(
    config: Config | config_lib.Overrides | None,
    workdir: Path,
    checkpoint_path: Path,
    pattern: str | None,
    weights: str | None,
) -> None:
    if pattern is not None:
        source = FolderSource(listing.find(pattern))
        grow.update(checkpoint_path, source, config, weights, workdir=workdir)
    else:
        assert isinstance(config, Config)
        dataset = dataset_splits.open_dataset(config)
        dataset_splits.say_folders(config, {"train": dataset["train"]})
        dataset = grow.as_fitted(config, dataset)
        grow.update(checkpoint_path, dataset["train"], config, weights, dataset, workdir)


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
        source = FolderSource(listing.find(pattern))
    if mode in ("calibrate", "export") and checkpoint_path.is_file():
        # It may be rounded already, and what was written once is not changed.
        raise UserError(
            f"{checkpoint_path}: --mode={mode} takes a checkpoint, and this is a model file; "
            "name the checkpoint's folder with --checkpoint"
        )
    detector = load(checkpoint_path, config, weights)
    with compilation_cache.enabled(detector.config.cache.programs):
        if mode == "export":
            test = None
            if half:
                sources = {"test": dataset_splits.open_dataset(detector.config)["test"]}
                test = scoring_pass.readable(detector.config, sources)[0]["test"]
            export(detector, workdir / f"model{model_file.SUFFIX}", half, test)
            return
        print(f"weights: {detector.weights.origin}")
        if mode == "eval":
            dataset = dataset_splits.open_dataset(detector.config)
            dataset_splits.say_folders(detector.config, {"test": dataset["test"]})
            evaluate.evaluate(detector.config, detector, dataset["test"], workdir, overwrite)
        elif mode == "calibrate":
            assert source is not None
            seen = scoring_pass.for_new_images(detector).config
            sources, _ = scoring_pass.readable(seen, {"input": source}, cached=False)
            evaluate.take_survey(sources, seen, cached=False)
            calibrate.calibrate(detector, sources["input"], "given", checkpoint_path)
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
    fitted, identity = (
        statistics_store.load_checkpoint(place, devices) if model is None else (model, "")
    )
    config = config_lib.resolve(config, fitted.config)
    fitting.require_same(place, fitted.config, config)
    fitting.warn_implausible(place, fitted.config)
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
        detector = statistics_store.ready(fitted, identity, config, variables)
        found = calibration_file.read(place, *detector_lib.fingerprints(detector))
    else:
        statistics_store.require_whole(place, fitted, fitted.fitted)
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
                f"--half: {dataset_splits.no_test_images(detector.config)}; what the rounding "
                "changes is measured on them"
            )
        memory.require_for_maps(detector.config, 2 * len(test.records))
        exact, _ = evaluate.score(detector, test)
        assert exact is not None
        identity = f"{identity} in float16"  # a threshold of the one is not the other's
        try:
            detector = dataclasses.replace(
                detector, gaussian=model_file.rounded(detector.gaussian)
            )
        except ValueError as error:
            raise UserError(f"--half: {error}; export without --half") from error
        rounded, _ = evaluate.score(detector, test)
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


def predict(detector: Detector, source: Source, workdir: Path) -> None:
    """Scores images of which nothing is known; see `predictions.Writer` for the output.

    Thresholds and colours are the detector's; if it has none, those of its evaluation in
    `workdir/metrics.json`; without one, nothing is called anomalous and the colours
    follow the first batch.

    Args:
      detector: fitted.
      source: the images; see `listing.find`.
      workdir: results go to `predictions` below it, whose earlier contents they replace
        once all images are scored; until then they are in `predictions.incomplete`, where
        the next call finds what was done if this one is interrupted (see `predictions.resume`;
        not on an object store).

    Raises:
      UserError: an unreadable image, or another process is writing there.
    """
    known = _known_thresholds(detector, workdir)
    detector = scoring_pass.for_new_images(detector)
    devices = parallel.every()
    with locks.held(workdir / "predictions", devices.process):
        memory.require_for_scores(detector.config, detector.count, devices)
        sources, skipped = scoring_pass.readable(detector.config, {"input": source}, False)
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
    suffix, size = _map_suffix(config), passes.batch_size(source, config, devices)
    if devices.process > 0:  # the first one writes
        for _ in _scored(detector, source, 0):
            pass
        return
    for place in (folder, growing):
        results_folder.require_own(place, _is_predictions(place))
        results_folder.require_no_other_files(place, _PREDICTIONS)
        _require_elsewhere(source, place)
    if not isinstance(growing, pathlib.Path):
        paths.remove_folder(growing)
    elif (growing / journal.EARLIER).exists():
        print("interrupted predictions of an earlier version of padim_jax are redone")
        paths.remove_folder(growing)
    fitting.make_folder(growing)
    settings = _said(detector, known) | {
        "batch size": size,
        "format of maps": suffix,
        "version of padim_jax": padim_jax.__version__,
        "version of jax": jax.__version__,
    }
    with contextlib.closing(predictions.open_journal(growing, settings)) as log:
        start = predictions.resume(log, growing, suffix, source, size, devices)
        with predictions.Writer(
            growing, config.image, suffix, known, detector.calibration, log
        ) as writer:
            for part in _scored(detector, source, start):
                writer.add(part.records, part.maps, part.scores, part.digests)
            writer.finish()
    results.write_skipped(growing, skipped)
    # Earlier predictions stay until these are whole.
    _remove_predictions(folder)
    paths.move_folder(growing, folder, last=predictions.TABLE)
    (folder / journal.NAME).unlink(missing_ok=True)
    left_out = f", {len(skipped)} skipped (see {results.SKIPPED})" if skipped else ""
    print(f"scored {len(source.records)} images{left_out}\nresults: {folder}")


def _scored(detector: Detector, source: Source, start: int) -> Iterator[scoring_pass.Part]:
    """Score images from where the first process says."""
    start = parallel.agreed(start)
    # Not cached: images that are seen once would push out those that are seen again.
    return scoring_pass.scores(detector, source, "predict", cache=None, start=start)


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
    detector = scoring_pass.for_new_images(detector)
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
    results_folder.remove(folder, folder / predictions.TABLE)


def _is_predictions(folder: Path) -> bool:
    log = folder / journal.NAME
    is_journal = isinstance(log, pathlib.Path) and journal.is_ours(log)
    return is_journal or predictions.is_table(folder / predictions.TABLE)


def _regions(detector: Detector) -> int:
    config = detector.config
    index = detector.index.tolist()
    return detector_lib.pyramid(config.image, config.model, index).shapes[0][0]
