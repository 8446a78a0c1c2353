"""Train, evaluate, predict: where the stages meet, and where all side effects start."""

import dataclasses
import pathlib
import shutil
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from padim_jax import (
    checkpoint,
    compilation_cache,
    figures,
    image_cache,
    input_pipeline,
    memory,
    model_file,
    predictions,
    results,
)
from padim_jax import config as config_lib
from padim_jax import detector as detector_lib
from padim_jax.config import Config
from padim_jax.datasets import LAYOUTS
from padim_jax.detector import Detector
from padim_jax.errors import UserError
from padim_jax.input_pipeline import FolderSource, Source
from padim_jax.models import pretrained
from padim_jax.types import Moments


def run(
    mode: str,
    config: Config | None,
    workdir: pathlib.Path,
    checkpoint_path: pathlib.Path,
    pattern: str | None = None,
    weights: str | None = None,
    half: bool = False,
) -> None:
    """Does what the command line asks for.

    Args:
      mode: "train_and_eval", "train", "eval", "predict" or "export".
      config: None, for all but training, takes the model's.
      workdir: folder of the results.
      checkpoint_path: where the fitted model is or goes.
      pattern: for predict: an image file, a folder or a glob.
      weights: for all but training: where the backbone's weights are now; see `load`.
      half: for export: see there.

    Raises:
      UserError: something to mend in the settings or the files, or too little memory.
    """
    try:
        _run(mode, config, workdir, checkpoint_path, pattern, weights, half)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"not enough memory ({' '.join(str(error).split())}). Statistics take patches x "
            "channels^2 numbers: lower config.model.channels or config.image.resize, or start "
            "config.model.layers at a deeper one; config.batch_size bounds only the rest"
        ) from error


def _run(
    mode: str,
    config: Config | None,
    workdir: pathlib.Path,
    checkpoint_path: pathlib.Path,
    pattern: str | None,
    weights: str | None,
    half: bool,
) -> None:
    if mode in ("train", "train_and_eval"):
        assert config is not None
        dataset = open_dataset(config)
        if mode == "train_and_eval":
            _require_test_images(config, dataset["test"])
            _make_folder(workdir)
            _require_own_results(workdir)
        with compilation_cache.enabled(config.cache):
            detector = train(config, dataset["train"], checkpoint_path)
            if mode == "train_and_eval":
                evaluate(config, detector, dataset["test"], workdir)
        return
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
    if folder.is_dir() or dataset.name == "synthetic":  # which is drawn when missing
        records = layout(dataset.root, config.category)
    else:
        records = None
        print(f"config.dataset.root: no folder {folder}; reading what is packed in {packed}")
    builder = tfds_builder.prepare(packed, records)
    return {split: tfds_builder.open_split(builder, split) for split in ("train", "test")}


def train(config: Config, source: Source, checkpoint_path: pathlib.Path) -> Detector:
    """Fits a detector to normal images and saves it.

    Args:
      config: what to fit.
      source: the normal images.
      checkpoint_path: the folder to save it in.

    Returns:
      The fitted detector.

    Raises:
      UserError: too few images, an unreadable one, or weights that cannot be had.
    """
    if len(source.records) < 2:
        raise UserError(
            f"config.dataset.root={config.dataset.root}: {len(source.records)} normal image(s) "
            "to fit; a covariance needs at least 2 (MVTec AD's categories have 60 to 391)"
        )
    # Now, rather than after hours of fitting.
    _make_folder(checkpoint_path.parent)
    checkpoint.check_destination(checkpoint_path)
    memory.require(config, len(source.records))
    index = detector_lib.channel_index(config.model)
    variables, weights = pretrained.load(
        config.model.weights, config.model.backbone, config.model.layers
    )
    print(f"weights: {weights.origin}")
    variables = jax.device_put(variables)
    shapes = detector_lib.pyramid(config.image, config.model, index.tolist()).shapes
    statistics = detector_lib.init(shapes, len(source.records), config.model.statistics)
    cache = image_cache.open_cache(config.cache)
    for batch in _progress(source, config, "fit", cache):
        images, valid = jnp.asarray(batch.images), jnp.asarray(batch.valid)
        # Computation is asynchronous: unawaited, batches would pile up before it.
        statistics = detector_lib.fit_batch(
            jax.block_until_ready(statistics),
            variables,
            images,
            valid,
            image=config.image,
            model=config.model,
            index=tuple(index.tolist()),
        )
    fitted = checkpoint.Fitted(
        config_lib.with_absolute_paths(config), index, statistics, weights
    )
    count = int(statistics.count)
    with checkpoint.saving(checkpoint_path, fitted):
        detector = _detector(fitted, config, variables)
    height, width = detector_lib.patch_grid(config.image, config.model.layers)
    form = "moments" if isinstance(statistics, Moments) else "samples"
    print(
        f"fitted {count} images, {height}x{width} patches of {len(index)} channels "
        f"({form}) -> {checkpoint_path}"
    )
    return detector


def load(
    path: str | pathlib.Path, config: Config | None = None, weights: str | None = None
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
    path = pathlib.Path(path)
    fitted = model_file.load(path) if path.is_file() else checkpoint.load(path)
    if config is None:
        config = fitted.config
    _require_same(path, fitted.config, config)
    if config.title != fitted.config.title:
        print(f"{path} was fitted to {fitted.config.title}; now used for {config.title}")
    wanted = f"{fitted.weights.origin}, sha256 {fitted.weights.sha256[:12]}..."
    place = weights or config.model.weights
    try:
        variables, found = pretrained.load(place, config.model.backbone, config.model.layers)
    except UserError as error:
        raise UserError(
            f"{error} (The model {path} was fitted with {wanted}; --weights names where "
            "that file is now)"
        ) from error
    if found.sha256 != fitted.weights.sha256:
        raise UserError(
            f"weights {place}: other weights ({found.origin}, sha256 {found.sha256[:12]}...) "
            f"than the model {path} was fitted with ({wanted}). Name that file with "
            "--weights, or fit again"
        )
    return _detector(fitted, config, jax.device_put(variables))


def export(
    detector: Detector, path: pathlib.Path, half: bool = False, test: Source | None = None
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
    comparison = None
    if half:
        if test is None or not test.records:
            raise UserError(
                "--half: no test images; what the rounding changes is measured on them "
                "(folder layout: val/good and val/bad)"
            )
        exact = _score(detector, test)
        try:
            detector = dataclasses.replace(
                detector, gaussian=model_file.rounded(detector.gaussian)
            )
        except ValueError as error:
            raise UserError(f"--half: {error}; export without --half") from error
        comparison = results.compare(exact, _score(detector, test))
        print(f"\n{results.comparison_table(comparison)}\n")
    _make_folder(path.parent)
    config = config_lib.with_absolute_paths(detector.config)
    model_file.save(
        path,
        model_file.Model(
            config, detector.index, detector.gaussian, detector.weights, half, comparison
        ),
    )
    print(f"model file, {path.stat().st_size / 1e6:.0f} MB -> {path}")


def evaluate(config: Config, detector: Detector, source: Source, workdir: pathlib.Path) -> dict:
    """Scores a test set and writes metrics, scores, maps and pictures.

    Args:
      config: dataset and outputs.
      detector: fitted.
      source: normal and anomalous images.
      workdir: where the results go; files of an earlier evaluation are replaced.

    Returns:
      What metrics.json holds.

    Raises:
      UserError: no test images, or an unreadable one.
    """
    _require_test_images(config, source)
    _make_folder(workdir)
    _require_own_results(workdir)
    scored = _score(detector, source)
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


def predict(detector: Detector, source: Source, workdir: pathlib.Path) -> None:
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
    folder, growing = workdir / "predictions", workdir / "predictions.incomplete"
    for place in (folder, growing):
        _require_own(place, place / "scores.csv")
    shutil.rmtree(growing, ignore_errors=True)
    _make_folder(growing)
    suffix = "npy" if config.outputs.maps == "npy" else "tiff"
    with predictions.Writer(growing, config.image, suffix, calibration) as writer:
        # Not cached: images that are seen once would push out those that are seen again.
        for batch in _progress(source, config, "predict", cache=None):
            found = detector_lib.score_pixels(detector, batch.images)
            valid = batch.valid
            writer.add(batch.records, batch.sizes, found.maps[valid], found.scores[valid])
    # Earlier predictions stay until these are whole.
    shutil.rmtree(folder, ignore_errors=True)
    growing.rename(folder)
    print(f"scored {len(source.records)} images\nresults: {folder}")


def _make_folder(path: pathlib.Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be made a folder ({error.strerror}); name another place with "
            "--workdir or --checkpoint"
        ) from error


def _require_own_results(workdir: pathlib.Path) -> None:
    for name in ("maps", "figures"):
        _require_own(workdir / name, workdir / "metrics.json")


def _require_own(folder: pathlib.Path, sign: pathlib.Path) -> None:
    """Results of an earlier run are replaced, anything else in their place is not."""
    if folder.exists() and not sign.exists():
        raise UserError(
            f"{folder}: exists and is not from an earlier run (there is no {sign}); move it "
            "away or name another --workdir"
        )


def _score(detector: Detector, source: Source) -> results.Scored:
    config = detector.config
    cache = image_cache.open_cache(config.cache)
    # While the device computes, for the results that follow.
    threading.Thread(target=results.import_libraries).start()
    maps, scores, masks = [], [], []
    for batch in _progress(source, config, "evaluate", cache):
        found = detector_lib.score_pixels(detector, batch.images)
        maps.append(found.maps[batch.valid])
        scores.append(found.scores[batch.valid])
        masks += batch.masks
    return results.Scored(source.records, masks, np.concatenate(maps), np.concatenate(scores))


# What the statistics depend on; the weights are compared by their content.
_FITTED = (
    ("image", ("resize", "method", "crop", "mean", "std")),
    ("model", ("backbone", "layers", "channels", "seed", "precision", "regularization")),
)


def _require_same(path: str | pathlib.Path, fitted: Config, wanted: Config) -> None:
    for group, fields in _FITTED:
        for field in fields:
            ours = getattr(getattr(wanted, group), field)
            theirs = getattr(getattr(fitted, group), field)
            if ours != theirs:
                raise UserError(
                    f"config.{group}.{field}={ours}: the model {path} was fitted with "
                    f"{theirs}. Ask for that, fit again, or leave out --config to take the "
                    "model's configuration"
                )


def _detector(
    fitted: checkpoint.Fitted | model_file.Model, config: Config, variables: dict
) -> Detector:
    if isinstance(fitted, model_file.Model):
        return Detector(config, fitted.index, variables, fitted.weights, fitted.fitted)
    try:
        ready = detector_lib.finalize(fitted.statistics, fitted.config.model.regularization)
    except ValueError as error:
        raise UserError(f"config.model.regularization: {error}") from error
    return Detector(config, fitted.index, variables, fitted.weights, ready)


def _require_test_images(config: Config, source: Source) -> None:
    if not source.records:
        raise UserError(
            f"config.dataset.root={config.dataset.root}: no test images; expected normal and "
            "anomalous ones to evaluate on (folder layout: val/good and val/bad). To fit only, "
            "use --mode=train"
        )


def _progress(
    source: Source, config: Config, what: str, cache: image_cache.ImageCache | None
) -> Iterator[input_pipeline.Batch]:
    """The batches of a source with a progress bar, which is quiet in logs."""
    with tqdm.tqdm(total=len(source.records), desc=what, unit="img", disable=None) as bar:
        # A few images need not be padded to a whole batch.
        size = min(config.batch_size, len(source.records))
        for batch in input_pipeline.batches(source, config.image, size, cache):
            yield batch
            bar.update(len(batch.records))
