"""Detectors of arbitrary numbers, which need no fit, and images to score."""

import dataclasses
import importlib.util
import pathlib
from typing import Any

import numpy as np
import pytest

from padim_jax.config import defaults
from padim_jax.config.settings import Config, validate
from padim_jax.core import calibration, reduction
from padim_jax.core.types import Gaussian, LowRank
from padim_jax.detector import detector as detector_lib
from padim_jax.detector import geometry, steps
from padim_jax.detector.detector import Detector
from padim_jax.devices import parallel
from padim_jax.export import runtimes
from padim_jax.export.runtimes import Runtime
from padim_jax.models.weights import pretrained

ONE = parallel.Devices(1)
IMAGES = 6  # of the low-rank form
# Of images of 36x40 pixels, with edges within patches.
ROI = "rle:36x40:210,14,26,14,26,14,26,16,24,17,23,9,31,9,981"
assert sum(map(int, ROI.split(":")[2].split(","))) == 36 * 40


def require(runtime: Runtime) -> pathlib.Path:
    """Return the folder of a runtime's package, or skip the test.

    It is not imported: OpenVINO's package would report its use, which `runtimes` prevents.
    """
    spec = importlib.util.find_spec(runtime)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs {runtimes.NAMES[runtime]} (extras onnx and openvino)")
    return pathlib.Path(spec.origin).parent


def make_config(**settings: Any) -> Config:
    """Return a configuration; settings by dotted names."""
    values = defaults.get_config()
    base = {
        "dataset.name": "folder",
        "dataset.root": "/parts",
        "category": "",
        "image.resize": (36, 40),
        "image.crop": None,
        "model.weights": "random",
        "model.precision": "float32",  # that of verification, which compiles nothing more then
        "model.channels": 12,
        "model.pooling": 1,
        "model.shift": 0,
        "model.reduction": "random",
        "model.upsample": "nearest",
        "score.image": "max",
    }
    values.update_from_flattened_dict(base | settings)
    return validate(values)


def images(config: Config, count: int = 7) -> np.ndarray:
    """Return noise, at several scales of brightness."""
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (count, *config.image.size, 3))
    return (noise * rng.uniform(0.2, 1, (count, 1, 1, 1))).astype(np.uint8)


def make(form: str = "moments", calibrated: bool = True, **settings: Any) -> Detector:
    """Return a detector whose Gaussians are random numbers of plausible sizes."""
    config, rng = make_config(**settings), np.random.default_rng(0)
    model = config.model
    variables, identity = pretrained.load(model.weights, model.backbone, model.layers)
    if geometry.is_projected(model):
        total = geometry.total_channels(model)
        matrix = reduction.semi_orthogonal(total, model.channels, model.seed)
        variables = steps.with_projection(variables, matrix)
    index = geometry.channel_index(model)
    shapes = geometry.pyramid(config.image, model, index.tolist()).shapes

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    mean = tuple(normal(*shape) for shape in shapes)
    fitted: Any
    if form == "moments":
        factor = tuple(
            (
                np.tril(0.2 * normal(r, n, d, d)) + np.eye(d, dtype=np.float32),
                *(0.1 * normal(r, n, d, e) for _, _, e in shapes[i + 1 :]),
            )
            for i, (r, n, d) in enumerate(shapes)
        )
        fitted = parallel.split((mean, factor), ONE)
        fitted = Gaussian(*fitted)
    else:
        deviations = tuple(normal(r, n, IMAGES, d) for r, n, d in shapes)
        root = np.tril(0.3 * normal(*shapes[0][:2], IMAGES, IMAGES))
        parts = (mean, deviations, root, np.array(0.05, np.float32))
        fitted = LowRank(*parallel.split(parts, ONE))
    detector = Detector(
        config,
        index,
        parallel.replicate(variables, ONE),
        identity,
        fitted,
        "0123456789abcdef" * 4,
        rng.integers(0, 256, (IMAGES, 32), np.uint8),
    )
    return calibrate(detector) if calibrated else detector


def calibrate(detector: Detector) -> Detector:
    """Return the detector with thresholds of the five images that score lowest."""
    measures = detector_lib.measure_pixels(detector, images(detector.config))
    lowest = np.argsort(measures.summaries[:, 0])[:5]
    parts = [(measures.maps[lowest], measures.summaries[lowest])]
    found = calibration.calibrate(parts, 5, "held_out", 0.2, 0.0)
    return dataclasses.replace(detector, calibration=found)
