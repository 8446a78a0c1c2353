"""A detector's program as StableHLO, for whoever stays with XLA: `jax.export`.

It is the program that the detector itself compiles, but for any number of images: results are
equal up to the order of sums. Read it with `jax.export.deserialize`.
"""

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from padim_jax.core import combined_score
from padim_jax.detector import geometry, steps
from padim_jax.detector import scores as scores_lib
from padim_jax.detector.detector import Detector
from padim_jax.devices import parallel

SUFFIX = ".stablehlo"


def serialize(detector: Detector) -> bytes:
    """Return the serialized program of a detector.

    It maps uint8 images (b, h, w, 3), for any b, to a dict with `anomaly_map` (b, h, w) and
    `score` (b,), float32, and with thresholds `is_anomalous` (b,).

    Args:
      detector: fitted detector of a single device.

    Raises:
      UserError: the score needs thresholds, and there are none.
    """
    scores_lib.require_scorable(detector)
    config, thresholds = detector.config, detector.calibration
    static = (
        *(config.image, config.model, config.map, config.score.image),
        tuple(detector.index.tolist()),
    )
    laid = geometry.pyramid(config.image, config.model, detector.index.tolist())
    regions = laid.shapes[0][0]
    structure = jax.tree.structure(detector.gaussian)
    joined = parallel.join(jax.tree.leaves(detector.gaussian), regions)
    fitted = structure.unflatten(map(jnp.asarray, joined))

    def on_device(variables: Any, fitted: Any, images: Any) -> Any:
        return steps.score_images(variables, fitted, images, *static)

    score = parallel.alone(on_device)

    def program(images: UInt8[Array, "b h w 3"]) -> dict[str, Array]:
        maps, summaries, _ = score(detector.variables, fitted, images)
        scores = summaries[:, 0]
        if config.score.image == "combined":
            assert thresholds is not None
            means = np.array(thresholds.summary_means)
            deviations = combined_score.at_least(means, np.array(thresholds.summary_deviations))
            excess = (summaries - jnp.float32(means)[None]) / jnp.float32(deviations)[None]
            scores = jnp.sqrt(jnp.sum(jnp.maximum(excess, 0) ** 2, axis=1))
        found = {"anomaly_map": maps, "score": scores}
        if thresholds is not None:
            found["is_anomalous"] = scores >= jnp.float32(thresholds.image_threshold)
        return found

    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *config.image.size, 3), jnp.uint8)
    return bytes(jax.export.export(jax.jit(program))(images).serialize())
