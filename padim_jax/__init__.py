"""PaDiM anomaly detection and localisation in JAX/Flax, as pure functions.

Example:
  >>> import padim_jax
  >>> detector = padim_jax.load("results/mvtec_ad_bottle/checkpoint")
  >>> anomalies = padim_jax.score(detector, ["a.png", "b.png"])  # or uint8 (h, w, 3)
  >>> anomalies.maps.shape  # distance from normality, per pixel
  (2, 256, 256)
  >>> anomalies.scores.shape  # the maximum of each map
  (2,)
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Anomalies", "Detector", "UserError", "load", "merge", "score"]

if TYPE_CHECKING:
    from padim_jax.detector import Anomalies, Detector, score
    from padim_jax.errors import UserError
    from padim_jax.experiment import load
    from padim_jax.growing import merge

_HOMES = {
    "Anomalies": "detector",
    "Detector": "detector",
    "UserError": "errors",
    "load": "experiment",
    "merge": "growing",
    "score": "detector",
}


def __getattr__(name: str) -> Any:
    # On first use only, so that `import padim_jax` does not import JAX (PEP 562).
    if name not in _HOMES:
        raise AttributeError(f"module 'padim_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"padim_jax.{_HOMES[name]}"), name)
