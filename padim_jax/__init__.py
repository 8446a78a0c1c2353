"""PaDiM anomaly detection and localisation in JAX/Flax, as pure functions."""

__version__ = "0.1.0"
