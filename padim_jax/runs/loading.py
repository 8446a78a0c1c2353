"""Fitted models on disk -> detectors that are ready to score."""

import dataclasses
import os

from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config
from padim_jax.detector import detector as detector_lib
from padim_jax.detector import steps
from padim_jax.detector.detector import Detector
from padim_jax.devices import parallel
from padim_jax.errors import UserError
from padim_jax.runs import fitting, scoring
from padim_jax.store import calibration_file, checkpoint, model_file, statistics_store
from padim_jax.system import paths
from padim_jax.system.paths import Path


def load(
    path: str | Path,
    config: Config | config_lib.Overrides | None = None,
    weights: str | None = None,
) -> Detector:
    """Load a fitted detector.

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
    if scoring.is_onnx(place) and place.is_file():
        raise UserError(
            f"{path}: an ONNX file, for scoring alone; name the checkpoint that it was "
            "exported from"
        )
    model = model_file.load(place, devices) if place.is_file() else None
    fitted, identity = (
        statistics_store.load_checkpoint(place, devices) if model is None else (model, "")
    )
    config = config_lib.resolve(config, fitted.config)
    config = fitting.with_stored_roi(config, fitted.config)
    fitting.require_same(place, fitted.config, config)
    fitting.warn_implausible(place, fitted.config)
    config = fitting.with_stored_range(config, fitted.config)
    scoring.tell_use(path, fitted.config, config)
    variables = fitting.load_weights(place, fitted.weights, config, weights)
    variables = steps.with_projection(variables, fitted.projection)
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
