"""Train, evaluate, predict: where the stages meet, and where all side effects start."""

import dataclasses
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32

from padim_jax import (
    checkpoint,
    compilation_cache,
    figures,
    fitting,
    image_cache,
    input_pipeline,
    model_file,
    parallel,
    paths,
    predictions,
    progress,
    results,
)
from padim_jax import config as config_lib
from padim_jax import detector as detector_lib
from padim_jax.config import Config
from padim_jax.datasets import LAYOUTS
from padim_jax.datasets.records import Record
from padim_jax.detector import Detector
from padim_jax.errors import UserError
from padim_jax.input_pipeline import FolderSource, Source
from padim_jax.paths import Path


def run(
    mode: str,
    config: Config | None,
    workdir: Path,
    checkpoint_path: Path,
    pattern: str | None = None,
    weights: str | None = None,
    half: bool = False,
    models: Sequence[str] = (),
) -> None:
    """Does what the command line asks for.

    Args:
      mode: "train_and_eval", "train", "eval", "predict", "export", "update" or "merge".
      config: None, for all but training, takes the model's.
      workdir: folder of the results.
      checkpoint_path: where the fitted model is or goes.
      pattern: for predict and update: an image file, a folder or a glob.
      weights: for all but training: where the backbone's weights are now; see `load`.
      half: for export: see there.
      models: for merge: the checkpoints to merge.

    Raises:
      UserError: something to mend in the settings or the files, or too little memory.
      Stopped: by SIGTERM, during a fit.
    """
    try:
        if mode in ("train", "train_and_eval"):
            assert config is not None
            _train(mode, config, workdir, checkpoint_path)
        elif mode == "update":
            _update(config, checkpoint_path, pattern, weights)
        elif mode == "merge":
            fitting.merge(models, checkpoint_path)
        else:
            _use(mode, config, workdir, checkpoint_path, pattern, weights, half)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"not enough memory ({' '.join(str(error).split())}). Statistics grow with patches "
            "and channels: lower config.model.channels or config.image.resize, or start "
            "config.model.layers at a deeper one; config.batch_size bounds only the rest"
        ) from error


def _train(mode: str, config: Config, workdir: Path, checkpoint_path: Path) -> None:
    dataset = open_dataset(config)
    if mode == "train_and_eval":
        _require_test_images(config, dataset["test"])
        _prepare(workdir)
    with compilation_cache.enabled(config.cache):
        detector = fitting.train(config, dataset["train"], checkpoint_path)
        if mode == "train_and_eval":
            evaluate(config, detector, dataset["test"], workdir)


def _update(
    config: Config | None,
    checkpoint_path: Path,
    pattern: str | None,
    weights: str | None,
) -> None:
    if pattern is not None:
        source: Source = FolderSource(predictions.find(pattern))
    else:
        assert config is not None
        source = open_dataset(config)["train"]
    fitting.update(checkpoint_path, source, config, weights)


def _use(
    mode: str,
    config: Config | None,
    workdir: Path,
    checkpoint_path: Path,
    pattern: str | None,
    weights: str | None,
    half: bool,
) -> None:
    source = FolderSource(predictions.find(pattern)) if pattern is not None else None
    if mode == "export" and checkpoint_path.is_file():  # which may be rounded already
        raise UserError(
            f"{checkpoint_path}: --mode=export makes a model file of a checkpoint, and this is "
            "none; name the checkpoint's folder with --checkpoint"
        )
    detector = load(checkpoint_path, config, weights)
    with compilation_cache.enabled(detector.config.cache):
        if mode == "export":
            test = open_dataset(detector.config)["test"] if half else None
            export(detector, workdir / f"model{model_file.SUFFIX}", half, test)
            return
        print(f"weights: {detector.weights.origin}")
        if mode == "eval":
            dataset = open_dataset(detector.config)
            evaluate(detector.config, detector, dataset["test"], workdir)
        else:
            assert mode == "predict"
            assert source is not None
            predict(detector, source, workdir)


def open_dataset(config: Config) -> dict[str, Source]:
    """Finds the images of a configuration; no pixel is read.

    Returns:
      The splits "train" and "test"; the latter may be empty.

    Raises:
      UserError: folders or files are missing.
    """
    # What is missing yet one process draws and packs.
    with parallel.first_process_first():
        dataset = config.dataset
        layout = LAYOUTS[dataset.name]
        if dataset.source == "folder":
            records = layout(dataset.root, config.category)
            return {
                split: FolderSource([record for record in records if record.split == split])
                for split in ("train", "test")
            }
        # Imported here: TensorFlow Datasets takes its time, and few need it.
        from padim_jax.datasets import tfds_builder

        packed = tfds_builder.packed_dir(dataset.tfds_dir, config.title)
        folder = dataset.root / config.category
        # A synthetic one is drawn when missing.
        if paths.is_folder(folder) or dataset.name == "synthetic":
            records = layout(dataset.root, config.category)
        else:
            records = None
            print(
                f"config.dataset.root: no folder {folder}; reading what is packed in {packed}"
            )
        builder = tfds_builder.prepare(packed, records)
        return {split: tfds_builder.open_split(builder, split) for split in ("train", "test")}


def load(
    path: str | Path, config: Config | None = None, weights: str | None = None
) -> Detector:
    """Loads a fitted detector.

    Args:
      path: a checkpoint's folder, or a model file (see `export`).
      config: None takes the model's own. Otherwise dataset, batch size, map, outputs and
        the place of the weights come from here; what the statistics depend on must be as
        the model was fitted with.
      weights: where the backbone's weights are now, if not where the configuration
        says; a path or name as in `config.model.weights`.

    Raises:
      UserError: no model, or one fitted with another backbone, weights file,
        preprocessing or channel choice than the configuration asks for.
    """
    place, devices = paths.parse(os.fspath(path)), parallel.every()
    model = model_file.load(place, devices) if place.is_file() else None
    fitted, identity = checkpoint.load(place, devices) if model is None else (model, "")
    config = config or fitted.config
    fitting.require_same(place, fitted.config, config)
    if config.title != fitted.config.title:
        print(f"{path} was fitted to {fitted.config.title}; now used for {config.title}")
    variables = fitting.load_weights(place, fitted.weights, config, weights)
    variables = parallel.replicate(variables, devices)
    if isinstance(fitted, checkpoint.Fitted):
        return fitting.ready(fitted, identity, config, variables)
    return Detector(
        config, fitted.index, variables, fitted.weights, fitted.fitted, fitted.identity
    )


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
      UserError: the file cannot be written, or `half` without test images.
    """
    if parallel.every().processes > 1:
        raise UserError("--mode=export: one process writes the file; start only one")
    comparison, identity = None, detector.identity
    if half:
        if test is None or not test.records:
            raise UserError(
                "--half: no test images; what the rounding changes is measured on them "
                "(folder layout: val/good and val/bad)"
            )
        exact = _score(detector, test)
        assert exact is not None
        identity = f"{identity} in float16"  # a threshold of the one is not the other's
        try:
            detector = dataclasses.replace(
                detector, gaussian=model_file.rounded(detector.gaussian)
            )
        except ValueError as error:
            raise UserError(f"--half: {error}; export without --half") from error
        rounded = _score(detector, test)
        assert rounded is not None
        comparison = results.compare(exact, rounded)
        print(f"\n{results.comparison_table(comparison)}\n")
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
            half,
            comparison,
        ),
        _regions(detector),
    )
    print(f"model file, {size / 1e6:.0f} MB -> {path}")


def evaluate(config: Config, detector: Detector, source: Source, workdir: Path) -> dict:
    """Scores a test set and writes metrics, scores, maps and pictures.

    Args:
      config: dataset and outputs.
      detector: fitted.
      source: normal and anomalous images.
      workdir: where the results go; files of an earlier evaluation are replaced.

    Returns:
      What metrics.json holds; of several processes, in the first.

    Raises:
      UserError: no test images, or an unreadable one.
    """
    _require_test_images(config, source)
    _prepare(workdir)
    scored = _score(detector, source)
    if scored is None:
        return {}
    measured = results.measure(scored)
    scale = figures.color_scale(scored.maps, scored.labels.astype(int))
    measured["color_scale"] = [scale.low, scale.high]
    measured["detector"] = detector_lib.fingerprint(detector)
    results.write_json(workdir / "config.json", config_lib.to_dict(config))
    results.write(
        workdir,
        config,
        scored,
        measured,
        lambda index: input_pipeline.load_image(
            source, config.image, index, image_cache.open_cache(config.cache)
        ),
    )
    print(f"\n{results.table(config, measured)}\n\nresults: {workdir}")
    return measured


def predict(detector: Detector, source: Source, workdir: Path) -> None:
    """Scores images of which nothing is known; see `predictions.Writer` for the output.

    Thresholds and colours are those of this detector's evaluation in
    `workdir/metrics.json`; without one, nothing is called anomalous and the colours
    follow the first batch.

    Args:
      detector: fitted.
      source: the images; see `predictions.find`.
      workdir: results go to `predictions` below it, whose earlier contents they replace
        once all images are scored; until then they are in `predictions.incomplete`.

    Raises:
      UserError: an unreadable image.
    """
    config = detector.config
    calibration = predictions.read_calibration(
        workdir / "metrics.json", detector_lib.fingerprint(detector)
    )
    if calibration.image_threshold is None:
        print(
            f"no threshold of this model in {workdir / 'metrics.json'}: scores only, no "
            "predicted class (evaluate it for one: --mode=eval)"
        )
    else:
        print(
            f"threshold {calibration.image_threshold:.4g}: the best F1 on the test set of "
            f"{workdir / 'metrics.json'}"
        )
    devices = parallel.every()
    # Not cached: images that are seen once would push out those that are seen again.
    found = _scores(detector, source, "predict", cache=None)
    if devices.process > 0:
        for _ in found:  # for the first process, which writes
            pass
        return
    folder, growing = workdir / "predictions", workdir / "predictions.incomplete"
    for place in (folder, growing):
        _require_own(place, place / "scores.csv")
    paths.remove_folder(growing)
    fitting.make_folder(growing)
    suffix = "npy" if config.outputs.maps == "npy" else "tiff"
    with predictions.Writer(growing, config.image, suffix, calibration) as writer:
        for part in found:
            sizes = tuple((int(height), int(width)) for height, width in part.sizes)
            writer.add(part.records, sizes, part.maps, part.scores)
    # Earlier predictions stay until these are whole.
    paths.remove_folder(folder)
    paths.move_folder(growing, folder, last="scores.csv")
    print(f"scored {len(source.records)} images\nresults: {folder}")


def _prepare(workdir: Path) -> None:
    if parallel.every().process == 0:
        fitting.make_folder(workdir)
        _require_own_results(workdir)


def _require_own_results(workdir: Path) -> None:
    for name in ("maps", "figures"):
        _require_own(workdir / name, workdir / "metrics.json")


def _require_own(folder: Path, sign: Path) -> None:
    """Results of an earlier run are replaced, anything else in their place is not."""
    if folder.exists() and not sign.exists():
        raise UserError(
            f"{folder}: exists and is not from an earlier run (there is no {sign}); move it "
            "away or name another --workdir"
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
      sizes: original height and width.
    """

    records: Sequence[Record]
    maps: Float32[np.ndarray, "n h w"]
    scores: Float32[np.ndarray, " n"]
    masks: Bool[np.ndarray, "n h w"]
    known: Bool[np.ndarray, " n"]
    sizes: Int32[np.ndarray, "n 2"]


def _scores(
    detector: Detector, source: Source, what: str, cache: image_cache.ImageCache | None
) -> Iterator[_Part]:
    """Scores a source batch by batch; every process gets all processes' scores."""
    config, devices, start = detector.config, parallel.every(), 0
    for batch in progress.batches(source, config, what, cache, devices):
        found = detector_lib.score_pixels(detector, batch.images)
        padding = len(batch.images) - len(batch.records)
        nothing = np.zeros(config.image.size, bool)
        masks = [nothing if mask is None else mask for mask in batch.masks]
        own: dict[str, Any] = {
            "maps": found.maps,
            "scores": found.scores,
            "masks": np.stack(masks + padding * [nothing]),
            "known": np.array([mask is not None for mask in batch.masks] + padding * [False]),
            "sizes": np.array([*batch.sizes, *padding * [(0, 0)]], np.int32),
        }
        valid, every = parallel.gather((batch.valid, own))
        every = {name: x[valid] for name, x in every.items()}
        end = start + int(np.sum(valid))
        yield _Part(source.records[start:end], **every)
        start = end


def _score(detector: Detector, source: Source) -> results.Scored | None:
    """Scores a test set, for the first process."""
    cache = image_cache.open_cache(detector.config.cache)
    # While the device computes, for the results that follow.
    threading.Thread(target=results.import_libraries).start()
    parts = []
    for part in _scores(detector, source, "evaluate", cache):
        if parallel.every().process == 0:
            parts.append(part)
    if not parts:
        return None
    masks = [
        mask if known else None
        for part in parts
        for mask, known in zip(part.masks, part.known, strict=True)
    ]
    return results.Scored(
        source.records,
        masks,
        np.concatenate([part.maps for part in parts]),
        np.concatenate([part.scores for part in parts]),
    )


def _regions(detector: Detector) -> int:
    config = detector.config
    index = detector.index.tolist()
    return detector_lib.pyramid(config.image, config.model, index).shapes[0][0]


def _require_test_images(config: Config, source: Source) -> None:
    if not source.records:
        raise UserError(
            f"config.dataset.root={config.dataset.root}: no test images; expected normal and "
            "anomalous ones to evaluate on (folder layout: val/good and val/bad). To fit only, "
            "use --mode=train"
        )
