"""PaDiM on the colour images of one category of MVTec 3D-AD.

Command:
    python -m padim_jax.main --config=configs/mvtec_3d_ad.py --config.category=bagel

Data: https://www.mvtec.com/company/research/datasets/mvtec-3d-ad (CC BY-NC-SA 4.0, not for
commercial use), unpacked into data/mvtec_3d_ad; folders, citation: docs/datasets.md. The
normal images of the validation split are not fitted: thresholds come from them. Point clouds
(xyz) are not read: defects that only show in depth are missed.

Accuracy: not measured here, the data are not part of this project. Images are resized to
256x256, whatever their aspect.

Presets as in configs/mvtec.py; every setting is explained in padim_jax/config/settings.py.
"""

import ml_collections

from padim_jax.config import defaults


def get_config(preset: str = "anomalib") -> ml_collections.ConfigDict:
    config = defaults.get_config(preset)
    config.dataset.name = "mvtec_3d_ad"
    # The folder that holds the category folders.
    config.dataset.root = "data/mvtec_3d_ad"
    # bagel, cable_gland, carrot, cookie, dowel, foam, peach, potato, rope or tire.
    config.category = "bagel"
    return config
