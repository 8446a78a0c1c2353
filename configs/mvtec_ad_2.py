"""PaDiM on one category of MVTec AD 2, evaluated on its public test images.

Command:
    python -m padim_jax.main --config=configs/mvtec_ad_2.py --config.category=can

Data: https://www.mvtec.com/company/research/datasets/mvtec-ad-2 (CC BY-NC-SA 4.0, not for
commercial use), unpacked into data/mvtec_ad_2; folders, citation: docs/datasets.md. The
normal images of the validation split are not fitted: thresholds come from them. test_private
and test_private_mixed have no published labels: --mode=predict scores them, and only the
authors' server can judge the maps.

Accuracy: not measured here, the data are not part of this project. Images are resized to
256x256, whatever their aspect. They are large and many defects in them small: try
--config.image.resize='(512, 512)', at four times the memory.

Presets as in configs/mvtec.py; every setting is explained in padim_jax/config/settings.py.
"""

import ml_collections

from padim_jax.config import defaults


def get_config(preset: str = "anomalib") -> ml_collections.ConfigDict:
    config = defaults.get_config(preset)
    config.dataset.name = "mvtec_ad_2"
    # The folder that holds the category folders.
    config.dataset.root = "data/mvtec_ad_2"
    # can, fabric, fruit_jelly, rice, sheet_metal, vial, wallplugs or walnuts.
    config.category = "can"
    return config
