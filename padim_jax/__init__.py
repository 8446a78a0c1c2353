"""PaDiM anomaly detection and localisation in JAX/Flax, as pure functions.

Example:
  >>> import numpy as np, padim_jax
  >>> good = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
  >>> detector = padim_jax.fit(good, backbone="scattering", channels=20, resize=(64, 64))
  >>> anomalies = detector.score(good[:2])  # or paths, a folder, Pillow images
  >>> anomalies.maps.shape  # distance from normality, per pixel
  (2, 64, 64)
  >>> anomalies.scores.shape  # higher is more anomalous
  (2,)
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Anomalies",
    "DataWarning",
    "Detector",
    "UserError",
    "fit",
    "load",
    "merge",
    "score",
]

if TYPE_CHECKING:
    from padim_jax.api import Detector, fit, merge
    from padim_jax.detector.scores import Anomalies, score
    from padim_jax.errors import DataWarning, UserError
    from padim_jax.loading import load

_HOMES = {
    "Anomalies": "detector.scores",
    "DataWarning": "errors",
    "Detector": "api",
    "UserError": "errors",
    "fit": "api",
    "load": "loading",
    "merge": "api",
    "score": "detector.scores",
}


def __getattr__(name: str) -> Any:
    # On first use only, so that `import padim_jax` does not import JAX (PEP 562).
    if name not in _HOMES:
        raise AttributeError(f"module 'padim_jax' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"padim_jax.{_HOMES[name]}"), name)
