"""`padim_jax.load`: imports what the file at hand needs, and JAX only for its own models."""

import os
from typing import TYPE_CHECKING, Any

from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config
from padim_jax.errors import UserError
from padim_jax.export.runtimes import Runtime
from padim_jax.runs import scoring

if TYPE_CHECKING:
    from padim_jax.api import Detector
else:
    Detector = Any  # or `scoring.OnnxDetector`, whose methods are a part of its methods


def load(
    path: str | os.PathLike[str],
    config: Config | config_lib.Overrides | None = None,
    weights: str | None = None,
    runtime: Runtime | None = None,
) -> Detector:
    """Load a fitted detector.

    It serves the process that loads it: neither JAX nor another runtime works after a fork.
    Where several processes score, start them by "spawn" and load it in each.

    Args:
      path: a checkpoint's folder, a model file, or an ONNX file (see `Detector.export`), which
        is for scoring alone and is loaded without JAX.
      config: None takes the model's own; see `runs.loading.load` and, for an ONNX file,
        `runs.scoring.load`.
      weights: where the backbone's weights are now, if not where they were.
      runtime: for an ONNX file, "onnxruntime" or "openvino"; None takes the one that is
        installed, ONNX Runtime first.

    Returns:
      The detector. That of an ONNX file has `score`, `stream`, `evaluate`, `thresholds` and
      `config`, and refuses what needs statistics.

    Raises:
      UserError: no model there, or one that is fitted with something else than asked for.
    """
    if scoring.is_onnx(path):
        found: Any = scoring.load(path, config, weights, runtime)
        return found
    if runtime is not None:
        raise UserError(f"runtime={runtime}: for ONNX files (.onnx) alone, and not for {path}")
    from padim_jax import api

    return api.load(path, config, weights)
