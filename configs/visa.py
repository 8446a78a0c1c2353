"""PaDiM on one category of VisA, with its one-class split.

Command:
    python -m padim_jax.main --config=configs/visa.py --config.category=pcb1

Data: https://github.com/amazon-science/spot-diff (CC BY 4.0), unpacked into data/visa as it
is, with split_csv/1cls.csv in it; folders, citation: docs/datasets.md.

Accuracy: not measured here, the data are not part of this project. Images are resized to
256x256, whatever their aspect. Capsules and macaroni2 differ largely in places and poses,
which one Gaussian for each position is not made for.

Presets as in configs/mvtec.py; every setting is explained in padim_jax/config/settings.py.
"""

import ml_collections

from padim_jax.config import defaults


def get_config(preset: str = "anomalib") -> ml_collections.ConfigDict:
    config = defaults.get_config(preset)
    config.dataset.name = "visa"
    # The folder that holds split_csv and the category folders.
    config.dataset.root = "data/visa"
    # candle, capsules, cashew, chewinggum, fryum, macaroni1, macaroni2, pcb1 to pcb4 or
    # pipe_fryum.
    config.category = "candle"
    return config
