"""Normal images -> a fitted detector with thresholds, and its evaluation."""

from collections.abc import Mapping

from padim_jax.config.settings import Config
from padim_jax.core.suspects import Suspects
from padim_jax.data import copies, dataset_splits, inputs
from padim_jax.data.records import Source
from padim_jax.detector import memory, scoring_pass
from padim_jax.detector.detector import Detector
from padim_jax.detector.embeddings import Embeddings
from padim_jax.devices import parallel
from padim_jax.output import results
from padim_jax.runs import calibrate, evaluate, fitting, results_folder
from padim_jax.runs.fitting import Backbone
from padim_jax.store.statistics_store import OnDisk
from padim_jax.system import compilation_cache, locks
from padim_jax.system.paths import Path


def train_alone(config: Config, workdir: Path, path: Path, overwrite: bool = False) -> None:
    """Fit a detector to a dataset, without a look at its test images.

    Args:
      config: of one run.
      workdir: for lists of skipped and of suspicious images.
      path: the checkpoint's folder.
      overwrite: replace the model of another data set, which is kept otherwise.

    Raises:
      UserError: see `train`.
      Stopped: by SIGTERM, during the fit.
    """
    with compilation_cache.enabled(config.cache.programs):
        dataset = dataset_splits.open_dataset(config)
        del dataset["test"]
        dataset_splits.say_folders(config, dataset)
        config = fitting.from_images(config, dataset["train"])
        dataset, skipped = scoring_pass.readable(config, dataset)
        dataset, _ = evaluate.take_survey(dataset, config)
        _, suspects = _train(config, dataset, path, overwrite=overwrite)
    if parallel.every().process == 0:
        results.write_skipped(workdir, skipped)
        results.write_suspects(workdir, suspects)


def train_and_eval(
    config: Config,
    workdir: Path,
    checkpoint_path: Path,
    backbone: Backbone | None = None,
    overwrite: bool = False,
) -> dict:
    """Fit and evaluate one detector.

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
    memory.limit_images()
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
        ranged = fitting.from_images(config, dataset["train"])
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
    """Fit a detector and find its thresholds.

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
    """Fit as `train` does; return the ranking of left-out images, in the first process.

    There has to be memory for evaluating `tests` images afterwards.
    """
    config = fitting.from_images(config, dataset["train"])
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
        embeddings = Embeddings() if leave_out else None
        detector = fitting.train(config, source, path, backbone, tests, left_out, embeddings)
        if normal == "none":
            return detector, None
        if not leave_out:
            return calibrate.find(detector, validation, "held_out", OnDisk(path)), None
        if detector.count < 3:
            print("no thresholds: leaving one out needs at least 3 images that were fitted")
            return detector, None
        return calibrate.find_ranked(
            detector, source, "leave_one_out", OnDisk(path), embeddings
        )
