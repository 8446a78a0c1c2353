"""A written graph against the detector that it was made of: a wrong graph runs as well."""

import dataclasses

import numpy as np
from jaxtyping import UInt8

from padim_jax.config.settings import Config
from padim_jax.core import combined_score
from padim_jax.core.calibration import Calibration
from padim_jax.detector import scores as scores_lib
from padim_jax.detector.detector import Detector
from padim_jax.errors import UserError
from padim_jax.export.runtimes import Run

# Largest differences: of maps relative to the highest pixel of all, of scores relative to
# `_scale`. Measured in ONNX Runtime on all backbones, forms and options of the tests: 1.4e-6 of
# maps, 1.6e-6 of scores; of training images in the low-rank form 2e-5. In OpenVINO alike.
BOUND = 1e-4
# With raw frames a grey level may round to the other side (see `resizing`). Measured on frames
# of noise: 2e-4.
FRAMES_BOUND = 1e-2


def drawn_images(height: int, width: int) -> UInt8[np.ndarray, "3 _h _w 3"]:
    """Return noise, a gradient and blobs, as images to compare on."""
    rng = np.random.default_rng(0)
    rows, columns = np.indices((height, width))[..., None] / max(height, width)
    phase, frequency = rng.uniform(0, 6, 3), rng.uniform(5, 40, (2, 3))
    waves = np.sin(frequency[0] * rows + phase) * np.cos(frequency[1] * columns)
    images = np.stack(
        [
            rng.uniform(0, 255, (height, width, 3)),
            np.broadcast_to(255 * (rows + columns) / 2, (height, width, 3)),
            127.5 + 120 * waves,
        ]
    )
    return images.astype(np.uint8)


def verify(
    detector: Detector,
    run: Run,
    images: UInt8[np.ndarray, "n h w 3"],
    frames: UInt8[np.ndarray, "n _h _w 3"] | None = None,
) -> str:
    """Compare a graph with its detector.

    The reference is the detector at full precision, whatever `config.model.precision` is.

    Args:
      detector: detector that the graph was made of.
      run: the graph in a runtime.
      images: at least two images of the model's size.
      frames: the raw frames of these images, if the graph takes such.

    Returns:
      What was compared, for a person.

    Raises:
      UserError: they differ by more than `BOUND`, or `FRAMES_BOUND`.
    """
    config = detector.config
    model = dataclasses.replace(config.model, precision="float32")
    exact = dataclasses.replace(detector, config=dataclasses.replace(config, model=model))
    expected = scores_lib.score_pixels(exact, images)
    given = images if frames is None else frames
    # In two calls: the number of images must not matter.
    parts = [run(given[:1]), run(given[1:])]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    maps = _difference(found["anomaly_map"], expected.maps, float(expected.maps.max()))
    scale = _scale(config, detector.calibration, expected.scores)
    scores = _difference(found["score"], expected.scores, scale)
    about = (
        f"{len(images)} images in ONNX Runtime: maps differ by {maps:.1e}, scores {scores:.1e}"
    )
    bound = BOUND if frames is None else FRAMES_BOUND
    if not max(maps, scores) <= bound:
        raise UserError(
            f"the exported graph is not the detector, and was not written ({about}; at most "
            f"{bound:g} is rounding). Another version of onnxruntime may compute it right; "
            "please report this"
        )
    return about


def _difference(found: np.ndarray, expected: np.ndarray, scale: float) -> float:
    return float(np.max(np.abs(found.astype(np.float64) - expected)) / scale)


def _scale(config: Config, calibration: Calibration | None, scores: np.ndarray) -> float:
    """Return what a score's rounding is relative to.

    A `combined` score is in standard deviations of its summaries, whose rounding is relative
    to the summaries themselves.
    """
    scale = float(np.max(np.abs(scores)))
    if config.score.image == "combined" and calibration is not None:
        means = np.array(calibration.summary_means)
        least = combined_score.at_least(means, np.array(calibration.summary_deviations))
        scale = max(scale, float(np.max(np.abs(means) / least)))
    return scale
