"""PaDiM on one product of BTAD (beanTech).

Command:
    python -m padim_jax.main --config=configs/btad.py --config.category=01

Data: https://github.com/pankajmishra000/VT-ADL, unpacked into data/btad so that
data/btad/01/train/ok exists; folders, licence, citation: docs/datasets.md.

Accuracy: not measured here, the data are not part of this project. Images are resized to
256x256; products 01 and 02 are square (1600x1600, 600x600 pixels), 03 (800x600) is not.

Presets as in configs/mvtec.py; every setting is explained in padim_jax/config/settings.py.
"""

import ml_collections

from padim_jax.config import defaults


def get_config(preset: str = "anomalib") -> ml_collections.ConfigDict:
    config = defaults.get_config(preset)
    config.dataset.name = "btad"
    # The folder that holds the folders 01, 02 and 03.
    config.dataset.root = "data/btad"
    # 01, 02 or 03.
    config.category = "01"
    return config
