"""PaDiM on one category of MVTec LOCO AD: logical and structural anomalies.

Command:
    python -m padim_jax.main --config=configs/mvtec_loco.py --config.category=pushpins

Data: https://www.mvtec.com/company/research/datasets/mvtec-loco (CC BY-NC-SA 4.0, not for
commercial use), unpacked into data/mvtec_loco; folders, citation: docs/datasets.md. The
normal images of the validation split are not fitted: thresholds come from them.

Accuracy: not measured here, the data are not part of this project. Pixel metrics take the
union of an image's masks; the dataset's own saturated PRO is not computed. Images are resized
to 256x256, whatever their aspect.

Presets as in configs/mvtec.py; every setting is explained in padim_jax/config/settings.py.
"""

import ml_collections

from padim_jax.config import defaults


def get_config(preset: str = "anomalib") -> ml_collections.ConfigDict:
    config = defaults.get_config(preset)
    config.dataset.name = "mvtec_loco"
    # The folder that holds the category folders.
    config.dataset.root = "data/mvtec_loco"
    # breakfast_box, juice_bottle, pushpins, screw_bag or splicing_connectors.
    config.category = "breakfast_box"
    return config
