"""Extend a model, let it forget, join several, and find their thresholds again."""

import collections
import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config
from padim_jax.core import calibration as calibration_lib
from padim_jax.core.suspects import Suspects
from padim_jax.core.types import LowRank
from padim_jax.data import copies, dataset_splits, input_pipeline
from padim_jax.data.layouts import LAYOUTS
from padim_jax.data.records import Record, Source
from padim_jax.detector import detector as detector_lib
from padim_jax.detector import scoring_pass, steps
from padim_jax.detector.detector import Detector
from padim_jax.devices import parallel
from padim_jax.errors import DataWarning, UserError
from padim_jax.output import results
from padim_jax.runs import calibrate, fitting
from padim_jax.store import calibration_file
from padim_jax.store.statistics_store import OnDisk, Store
from padim_jax.system import compilation_cache, locks, paths, progress
from padim_jax.system.paths import Path


def update(
    path: Path,
    source: Source,
    config: Config | config_lib.Overrides | None = None,
    weights: str | None = None,
    dataset: Mapping[str, Source] | None = None,
    workdir: Path | None = None,
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
      workdir: where suspects.csv is, which is written anew, or removed where thresholds are
        not found by leaving images out one by one or the images' names are not known.

    Returns:
      The extended detector.

    Raises:
      UserError: see `fitting.update` and `calibrate`; or another process writes there.
      Stopped: by SIGTERM.
    """
    return _changed(fitting.update, path, source, config, weights, dataset, workdir)


def forget(
    path: Path,
    source: Source,
    config: Config | config_lib.Overrides | None = None,
    weights: str | None = None,
    dataset: Mapping[str, Source] | None = None,
    workdir: Path | None = None,
) -> Detector:
    """Remove images that a model was fitted to, and find its thresholds again.

    The inverse of `update`, with the same arguments and thresholds; see `fitting.forget` for
    the rest.

    Args:
      path: the checkpoint's folder; the model without the images replaces it.
      source: images that were fitted.
      config: see `update`.
      weights: see `update`.
      dataset: see `update`.
      workdir: see `update`.

    Returns:
      The detector without the images.

    Raises:
      UserError: see `fitting.forget` and `calibrate`; or another process writes there.
      Stopped: by SIGTERM.
    """
    return _changed(fitting.forget, path, source, config, weights, dataset, workdir)


def _changed(
    change: Callable[..., fitting.Extended],
    path: Path,
    source: Source,
    config: Config | config_lib.Overrides | None,
    weights: str | None,
    dataset: Mapping[str, Source] | None,
    workdir: Path | None,
) -> Detector:
    splits = dataset

    def check(used: Config, images: UInt8[np.ndarray, "_n 32"]) -> None:
        nonlocal splits
        splits = _without_fitted(used, splits or _dataset_at_hand(used), images)

    with locks.held(path, parallel.every().process):
        changed = change(path, source, config, weights, check)
        detector = changed.detector
        with compilation_cache.enabled(detector.config.cache.programs):
            if not changed.changed:  # what was killed may lack its thresholds, or suspects.csv
                mark = detector_lib.fingerprint(detector)
                known = calibration_file.read(path, mark)
                ranked = workdir is None or (workdir / results.SUSPECTS).exists()
                if known and _all_processes(ranked or known.origin != "leave_one_out"):
                    return dataclasses.replace(detector, calibration=known)
            splits = splits or _dataset_at_hand(detector.config)
            hashed = [(changed.source, changed.digests)]
            return find_thresholds(detector, [splits], hashed, OnDisk(path), workdir)


def merge(
    models: Sequence[str | os.PathLike[str]],
    destination: str | os.PathLike[str],
    workdir: Path | None = None,
) -> Detector:
    """Join models that were fitted to disjoint images of the same kind.

    The result is that of one fit to all images, up to rounding. It can be merged or extended
    again. Thresholds are found again as by `update`; where the images are not at hand, a
    `DataWarning` says that there are none.

    Args:
      models: checkpoints' folders, at least two; a model file does not do, it has no
        statistics.
      destination: the merged checkpoint's folder; one that is there is replaced.
      workdir: see `update`.

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
        with compilation_cache.enabled(detector.config.cache.programs):
            datasets = [_dataset_at_hand(config) for config in configs]
            if any(datasets):
                detector, loaded = _with_backbone(detector, place)
                datasets = datasets if loaded else []
            return find_thresholds(detector, datasets, [], OnDisk(place), workdir)


def _without_fitted(
    config: Config, splits: Mapping[str, Source], images: UInt8[np.ndarray, "_n 32"]
) -> Mapping[str, Source]:
    """The splits, whose validation images are none of those if they are for thresholds."""
    unused = config.threshold.normal in ("none", "leave_one_out")
    if unused or not splits or not splits["validation"].records:
        return splits
    part, _ = scoring_pass.readable(config, {"validation": splits["validation"]})
    validation = calibrate.without_fitted(images, part["validation"])
    return {**splits, "validation": validation}


def _with_backbone(detector: Detector, path: Path) -> tuple[Detector, bool]:
    """The same detector with its backbone's variables, and whether they can be had."""
    variables, loaded = {}, True
    try:
        variables = fitting.load_weights(path, detector.weights, detector.config, None)
    except UserError as error:
        progress.say(f"thresholds: no image can be scored ({error})")
        loaded = False
    if not _all_processes(loaded):
        return detector, False
    variables = steps.with_projection(variables, detector.projection)
    variables = parallel.replicate(variables, parallel.every())
    return dataclasses.replace(detector, variables=variables), True


def find_thresholds(
    detector: Detector,
    datasets: Sequence[Mapping[str, Source]],
    hashed: Sequence[tuple[Source, UInt8[np.ndarray, "_n 32"]]],
    store: Store,
    workdir: Path | None = None,
) -> Detector:
    """Find the thresholds of a model that has grown, from what is at hand.

    Args:
      detector: the grown model.
      datasets: the splits of its datasets; none of a dataset that is not at hand.
      hashed: other images, and the SHA-256 of their files.
      store: of the grown model.
      workdir: of suspects.csv, if it is to be kept up.
    """
    place = workdir if parallel.every().process == 0 else None
    if place is not None:  # that of the model before, whatever happens now
        results.write_suspects(place, None)
    detector, suspects = _find_ranked(detector, datasets, hashed, store)
    if place is not None:
        results.write_suspects(place, suspects)
    return detector


def _find_ranked(
    detector: Detector,
    datasets: Sequence[Mapping[str, Source]],
    hashed: Sequence[tuple[Source, UInt8[np.ndarray, "_n 32"]]],
    store: Store,
) -> tuple[Detector, Suspects | None]:
    """Find thresholds as `find_thresholds` does, and rank the images in the first process."""
    config, devices, minimum = detector.config, parallel.every(), calibration_lib.MIN_IMAGES
    if config.threshold.normal == "none":
        # Those of the model before, if it had some, are not silently gone.
        mark = detector_lib.fingerprint(detector)
        known = store.read_thresholds(mark)
        return dataclasses.replace(detector, calibration=known), None
    validation = [splits["validation"] for splits in datasets if splits]
    complete = len(validation) == len(datasets) and all(x.records for x in validation)
    if validation and complete and config.threshold.normal != "leave_one_out":
        images = [(x, i) for x in validation for i in range(len(x.records))]
        sources, _ = scoring_pass.readable(config, {"validation": _Images(images)})
        return calibrate.find(detector, sources["validation"], "held_out", store), None
    if detector.count < minimum:
        progress.say(
            f"no thresholds: leaving one out needs at least {minimum} images that were fitted"
        )
        return detector, None
    # Whose files these were, and so their groups and sizes, is not known.
    by_files = config.threshold.groups or config.decide != "score"
    if isinstance(detector.gaussian, LowRank) and not by_files:
        known = _fitted_at_hand(detector, datasets, hashed)
        return calibrate.find_from_model(detector, store, _names(detector, known))
    # A random view depends on the name that an image had when it was fitted.
    centred = input_pipeline.centred(config.image) == config.image
    source = _Images([])
    if centred:
        source = _Images([one for _, one in _fitted_at_hand(detector, datasets, hashed)])
    count = len(source.records)
    if count == detector.count:
        return calibrate.find_ranked(detector, source, "leave_one_out", store)
    why = f"{count} of the {detector.count} images that were fitted are at hand"
    if count >= minimum and not config.threshold.groups:
        progress.say(why)
        return calibrate.find_ranked(detector, source, "leave_some_out", store)
    if devices.process == 0:
        if not centred:
            why = "random views of fitted images cannot be drawn again"
        elif count >= minimum:
            why += ", and of which groups (config.threshold.groups) the others are is not known"
        warnings.warn(
            DataWarning(
                f"{store}: the model has no thresholds now: {why}. Find them with "
                f"{store.calibration}"
            ),
            stacklevel=2,
        )
    return detector, None


def _names(
    detector: Detector, images: Sequence[tuple[bytes, tuple[Source, int]]]
) -> list[str] | None:
    """The names of all images that were fitted, in their order; None if some are not known."""
    names = {digest: source.records[i].relative_path for digest, (source, i) in images}
    fitted = list(map(bytes, detector.images))
    return [names[digest] for digest in fitted] if names.keys() >= set(fitted) else None


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
) -> list[tuple[bytes, tuple[Source, int]]]:
    """The images that were fitted, told by their contents, each as often as it was fitted."""
    unused = collections.Counter(map(bytes, detector.images))
    chosen: list[tuple[bytes, tuple[Source, int]]] = []

    def choose(source: Source, digests: UInt8[np.ndarray, "_n 32"]) -> None:
        for number, digest in enumerate(map(bytes, digests)):
            if unused[digest] > 0:
                unused[digest] -= 1
                chosen.append((digest, (source, number)))

    for source, digests in hashed:
        choose(source, digests)
    for splits in datasets:
        if splits and len(chosen) < detector.count:
            choose(splits["train"], copies.digests(splits["train"], parallel.every()))
    return chosen


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
            found = dataset_splits.held_back(config, dataset_splits.by_split(records))
    return as_fitted(config, found) if _all_processes(bool(found)) else {}


def as_fitted(config: Config, splits: Mapping[str, Source]) -> dict[str, Source]:
    """The splits as `train` has them: what is held out is drawn from what can be used."""
    if config.threshold.normal == "held_out":
        splits = {**splits, **scoring_pass.readable(config, {"train": splits["train"]})[0]}
    return dataset_splits.with_held_out(config, splits)


def _all_processes(said: bool) -> bool:
    """Return whether the flag is true in all processes. A collective."""
    return bool(np.all(parallel.gather(np.array([said]))))
