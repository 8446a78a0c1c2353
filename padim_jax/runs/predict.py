"""Images of which nothing is known -> scores, maps and pictures in a folder."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import padim_jax
from padim_jax.config.settings import Config
from padim_jax.data import passes
from padim_jax.data.records import Skipped, Source
from padim_jax.detector import scores as scores_lib
from padim_jax.detector import scoring_pass
from padim_jax.detector.scores import Scorer
from padim_jax.devices import parallel
from padim_jax.errors import UserError
from padim_jax.output import predictions, results
from padim_jax.runs import monitor, results_folder
from padim_jax.store import calibration_file
from padim_jax.system import journal, locks, paths
from padim_jax.system.paths import Path

# Of all files that predictions are in: what `predict` writes, and earlier versions wrote.
_PREDICTIONS = (
    *(".csv", ".jpg", ".json", ".jsonl", ".npy", ".png", ".tiff"),
    *journal.SUFFIXES,
)


def predict(detector: Scorer, source: Source, workdir: Path) -> None:
    """Score images of which nothing is known; see `predictions.Writer` for the output.

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
    scores_lib.require_scorable(detector)
    known = known_thresholds(detector, workdir)
    detector = scoring_pass.for_new_images(detector)
    devices = parallel.every()
    with locks.held(workdir / "predictions", devices.process):
        detector.require_memory()
        sources, skipped = scoring_pass.readable(detector.config, {"input": source}, False)
        _predict(detector, sources["input"], workdir, known, devices, skipped)


def known_thresholds(detector: Scorer, workdir: Path) -> predictions.Thresholds:
    """Return a detector's thresholds, or those of its evaluation in `workdir`; print which."""
    if detector.calibration is not None:
        known = predictions.thresholds(detector.calibration, detector.config.score.image)
    else:
        fingerprints = detector.fingerprints
        known = predictions.read_evaluation(workdir / "metrics.json", *fingerprints)
    print(known.text)
    return known


def _predict(
    detector: Scorer,
    source: Source,
    workdir: Path,
    known: predictions.Thresholds,
    devices: parallel.Devices,
    skipped: Sequence[Skipped],
) -> None:
    config = detector.config
    folder, growing = workdir / "predictions", workdir / "predictions.incomplete"
    suffix, size = map_suffix(config), passes.batch_size(source, config, devices)
    if devices.process > 0:  # the first one writes
        for _ in _measured(detector, source, 0):
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
    results_folder.make_folder(growing)
    settings = dependencies(detector, known) | {
        "batch size": size,
        "format of maps": suffix,
        "version of padim_jax": padim_jax.__version__,
        **detector.versions,
    }
    with contextlib.closing(predictions.open_journal(growing, settings)) as log:
        masks = known.pixel is not None
        start = predictions.resume(log, growing, suffix, source, size, devices, masks)
        with predictions.Writer(
            growing, config, suffix, known, detector.calibration, log
        ) as writer:
            for part in _measured(detector, source, start):
                scores = scores_lib.image_scores(detector, part.summaries)
                writer.add(part.records, part.maps, scores, part.digests)
            writer.finish()
        drifted = monitor.summary(detector.calibration, log.rows())
    results.write_skipped(growing, skipped)
    # Earlier predictions stay until these are whole.
    _remove_predictions(folder)
    paths.move_folder(growing, folder, last=predictions.TABLE)
    (folder / journal.NAME).unlink(missing_ok=True)
    left_out = f", {len(skipped)} skipped (see {results.SKIPPED})" if skipped else ""
    print(f"scored {len(source.records)} images{left_out}\nresults: {folder}")
    if drifted:
        print(drifted)


def _measured(detector: Scorer, source: Source, start: int) -> Iterator[scoring_pass.Part]:
    """Measure images from where the first process says."""
    start = parallel.agreed(start)
    # Not cached: images that are seen once would push out those that are seen again.
    return scoring_pass.measure(detector, source, "predict", cache=None, start=start)


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


def map_suffix(config: Config) -> str:
    """Return the suffix of maps' files, without the dot."""
    return "npy" if config.outputs.maps == "npy" else "tiff"


def dependencies(detector: Scorer, known: predictions.Thresholds) -> dict[str, Any]:
    """Return all that predictions depend on beside images, by names for a person."""
    fingerprint, calibration = detector.fingerprints[0], detector.calibration
    said = calibration and calibration_file.to_dict(calibration, fingerprint)
    rule = (detector.config.decide, *dataclasses.astuple(detector.config.regions))
    # Left out as it is by default: results before there were regions are of these.
    regions = {"rule of regions": list(rule)} if rule != ("score", 0.0, 0.0) else {}
    return {
        "model": fingerprint,
        "threshold": [known.image, known.pixel],
        "scale of colours": known.scale and dataclasses.astuple(known.scale),
        "calibration": hashlib.sha256(json.dumps(said).encode()).hexdigest(),
        **regions,
    }


def _remove_predictions(folder: Path) -> None:
    """Remove predictions, their table last: after a kill the rest is still known as ours."""
    results_folder.remove(folder, folder / predictions.TABLE)


def _is_predictions(folder: Path) -> bool:
    log = folder / journal.NAME
    is_journal = isinstance(log, pathlib.Path) and journal.is_ours(log)
    return is_journal or predictions.is_table(folder / predictions.TABLE)
