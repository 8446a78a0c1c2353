"""PaDiM on a small category that the program draws itself: needs no download at all.

Command:
    python -m padim_jax.main --config=configs/demo.py

Expected: image AUROC 0.98, pixel AUROC 0.99, AUPRO 0.94.

A textured part with varying pose and lighting and four kinds of defects is written
to data/synthetic as PNG files in MVTec AD's layout. The weights come with padim_jax and
were trained on other images that it draws itself. ImageNet's are better
(--config.model.weights=resnet18.tv_in1k).

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
    # Not ImageNet's: no weights need be downloaded.
    config.model.backbone = "scattering"
    return config
