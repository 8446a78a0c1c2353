"""PaDiM on KolektorSDD2, fitted to the normal ones of its training images.

Command:
    python -m padim_jax.main --config=configs/ksdd2.py

Data: https://www.vicos.si/resources/kolektorsdd2/, unpacked into data/ksdd2 so that
data/ksdd2/train/10000.png exists; folders, licence, citation: docs/datasets.md. It has no
categories. The 246 training images with a defect are left out.

Accuracy: not measured here, the data are not part of this project. Images are resized to
256x256; they have about 230x630 pixels (width, height). --config.image.resize='(640, 256)'
nearly keeps their aspect, at 2.5 times the memory.

Presets as in configs/mvtec.py; every setting is explained in padim_jax/config/settings.py.
"""

import ml_collections

from padim_jax.config import defaults


def get_config(preset: str = "anomalib") -> ml_collections.ConfigDict:
    config = defaults.get_config(preset)
    config.dataset.name = "ksdd2"
    # The folder that holds train and test.
    config.dataset.root = "data/ksdd2"
    # There are no categories.
    config.category = ""
    return config
