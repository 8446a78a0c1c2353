"""Train, evaluate, predict: where the stages meet, and where all side effects start."""

import pathlib
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from padim_jax import (
    checkpoint,
    figures,
    gaussian,
    input_pipeline,
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


def run(
    mode: str,
    config: Config | None,
    workdir: pathlib.Path,
    checkpoint_path: pathlib.Path,
    pattern: str | None = None,
    weights: str | None = None,
) -> None:
    """Does what the command line asks for.

    Args:
      mode: "train_and_eval", "train", "eval" or "predict".
      config: None, for eval and predict, takes the checkpoint's.
      workdir: folder of the results.
      checkpoint_path: where the fitted model is or goes.
      pattern: for predict: an image file, a folder or a glob.
      weights: for eval and predict: where the backbone's weights are now; see `load`.

    Raises:
      UserError: something to mend in the settings or the files, or too little memory.
    """
    try:
        _run(mode, config, workdir, checkpoint_path, pattern, weights)
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
) -> None:
    if mode in ("train", "train_and_eval"):
        assert config is not None
        dataset = open_dataset(config)
        if mode == "train_and_eval":
            _require_test_images(config, dataset["test"])
            _make_folder(workdir)
            _require_own_results(workdir)
        detector = train(config, dataset["train"], checkpoint_path)
        if mode == "train_and_eval":
            evaluate(config, detector, dataset["test"], workdir)
    elif mode == "eval":
        detector = load(checkpoint_path, config, weights)
        print(f"weights: {detector.weights.origin}")
        dataset = open_dataset(detector.config)
        evaluate(detector.config, detector, dataset["test"], workdir)
    else:
        assert mode == "predict"
        assert pattern is not None
        source = FolderSource(predictions.find(pattern))
        detector = load(checkpoint_path, config, weights)
        print(f"weights: {detector.weights.origin}")
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
    index = detector_lib.channel_index(config.model)
    variables, weights = pretrained.load(
        config.model.weights, config.model.backbone, config.model.layers
    )
    print(f"weights: {weights.origin}")
    variables = jax.device_put(variables)
    height, width = detector_lib.patch_grid(config.image, config.model.layers)
    moments = gaussian.init(height * width, len(index))
    for batch in _progress(source, config, "fit"):
        moments = detector_lib.fit_batch(
            moments,
            variables,
            jnp.asarray(batch.images),
            jnp.asarray(batch.valid),
            image=config.image,
            model=config.model,
            index=tuple(index.tolist()),
        )
    fitted = checkpoint.Fitted(config_lib.with_absolute_paths(config), index, moments, weights)
    detector = _detector(fitted, config, variables)
    checkpoint.save(checkpoint_path, fitted)
    print(
        f"fitted {int(moments.count)} images, {height}x{width} patches of {len(index)} "
        f"channels -> {checkpoint_path}"
    )
    return detector


def load(
    path: str | pathlib.Path, config: Config | None = None, weights: str | None = None
) -> Detector:
    """Loads a fitted detector.

    Args:
      path: the checkpoint's folder.
      config: None takes the checkpoint's configuration. Otherwise dataset, batch size,
        map, outputs and the place of the weights come from here; what the statistics
        depend on must be as in the checkpoint.
      weights: where the backbone's weights are now, if not where the configuration
        says; a path or name as in `config.model.weights`.

    Raises:
      UserError: no checkpoint, or one fitted with another backbone, weights file,
        preprocessing or channel choice than the configuration asks for.
    """
    fitted = checkpoint.load(path)
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
            f"{error} (The checkpoint {path} was fitted with {wanted}; --weights names "
            "where that file is now)"
        ) from error
    if found.sha256 != fitted.weights.sha256:
        raise UserError(
            f"weights {place}: other weights ({found.origin}, sha256 {found.sha256[:12]}...) "
            f"than the checkpoint {path} was fitted with ({wanted}). Name that file with "
            "--weights, or fit again"
        )
    return _detector(fitted, config, jax.device_put(variables))


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
    records = source.records
    _require_test_images(config, source)
    _make_folder(workdir)
    _require_own_results(workdir)
    maps, scores, masks = [], [], []
    for batch in _progress(source, config, "evaluate"):
        found = detector_lib.score_pixels(detector, batch.images)
        maps.append(found.maps[batch.valid])
        scores.append(found.scores[batch.valid])
        masks += batch.masks
    scored = results.Scored(records, masks, np.concatenate(maps), np.concatenate(scores))
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
        lambda index: input_pipeline.load_image(source, config.image, index),
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
        for batch in _progress(source, config, "predict"):
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
                    f"config.{group}.{field}={ours}: the checkpoint {path} was fitted with "
                    f"{theirs}. Ask for that, fit again, or leave out --config to take the "
                    "checkpoint's configuration"
                )


def _detector(fitted: checkpoint.Fitted, config: Config, variables: dict) -> Detector:
    try:
        ready = gaussian.finalize(fitted.moments, fitted.config.model.regularization)
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


def _progress(source: Source, config: Config, what: str) -> Iterator[input_pipeline.Batch]:
    """The batches of a source with a progress bar, which is quiet in logs."""
    with tqdm.tqdm(total=len(source.records), desc=what, unit="img", disable=None) as bar:
        # A few images need not be padded to a whole batch.
        size = min(config.batch_size, len(source.records))
        for batch in input_pipeline.batches(source, config.image, size):
            yield batch
            bar.update(len(batch.records))
