"""PaDiM on a small category that the program draws itself: needs no download at all.

Command:
    python -m padim_jax.main --config=configs/demo.py

Expected: image AUROC 1.00, pixel AUROC 0.99, AUPRO 0.97.

A textured part with varying pose and lighting and four kinds of defects is written
to data/synthetic as PNG files in MVTec AD's layout. The features are those of fixed filters,
without weights (docs/scattering.md).

Every setting is explained in padim_jax/config/settings.py.
"""

import ml_collections

from padim_jax.config import defaults


def get_config(preset: str = "anomalib") -> ml_collections.ConfigDict:
    config = defaults.get_config(preset)
    config.dataset.name = "synthetic"
    # Where the images are written on first use.
    config.dataset.root = "data/synthetic"
    # The one category of the synthetic dataset.
    config.category = "part"
    # Fixed filters: no weights need be downloaded.
    config.model.backbone = "scattering"
    return config
