"""PaDiM on Magnetic Tile Defects, with a seeded split.

Command:
    python -m padim_jax.main --config=configs/magnetic_tile.py

Data: https://github.com/abin24/Magnetic-tile-defect-datasets. (the dot belongs to the name;
no licence is stated), cloned into data/magnetic_tile; folders, citation: docs/datasets.md. It
has no categories and no split: --config.dataset.seed draws the fifth of the tiles without a
defect that is tested, with all tiles with one.

Accuracy: not measured here, the data are not part of this project. Tiles are of many sizes and
aspects, all resized to 256x256.

Presets as in configs/mvtec.py; every setting is explained in padim_jax/config/settings.py.
"""

import ml_collections

from padim_jax.config import defaults


def get_config(preset: str = "anomalib") -> ml_collections.ConfigDict:
    config = defaults.get_config(preset)
    config.dataset.name = "magnetic_tile"
    # The folder that holds MT_Free, MT_Blowhole and the others.
    config.dataset.root = "data/magnetic_tile"
    # There are no categories.
    config.category = ""
    return config
