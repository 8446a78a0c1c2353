"""PaDiM on one category of MPDD: painted metal parts.

Command:
    python -m padim_jax.main --config=configs/mpdd.py --config.category=bracket_black

Data: https://github.com/stepanje/MPDD, unpacked into data/mpdd; folders, licence, citation:
docs/datasets.md.

Accuracy: not measured here, the data are not part of this project. Images are resized to
256x256, whatever their aspect.

Presets as in configs/mvtec.py; every setting is explained in padim_jax/config/settings.py.
"""

import ml_collections

from padim_jax.config import defaults


def get_config(preset: str = "anomalib") -> ml_collections.ConfigDict:
    config = defaults.get_config(preset)
    config.dataset.name = "mpdd"
    # The folder that holds the category folders.
    config.dataset.root = "data/mpdd"
    # bracket_black, bracket_brown, bracket_white, connector, metal_plate or tubes.
    config.category = "bracket_black"
    return config
