"""PaDiM on one category of MVTec AD, reproducing the published PyTorch numbers.

Command:
    python -m padim_jax.main --config=configs/mvtec.py --config.category=bottle

Expected for bottle (ResNet-18, 209 + 83 images):
    image AUROC 0.994, image F1-max 0.977, pixel AUROC 0.984, AUPRO 0.954

Presets, as the config file's argument (every override applies on top):
    configs/mvtec.py            the same as :anomalib
    configs/mvtec.py:anomalib   bilinear 256, no crop: how the published tables were made
    configs/mvtec.py:seed       nearest 256, centre crop 224: as Lornatang/PaDiM
    configs/mvtec.py:paper      bicubic 256, centre crop 224, bicubic map upsampling
    configs/mvtec.py:rd         the paper's Rd-MVTec AD: as :paper, with every image of training
                                and test turned by up to 10 degrees and cropped at random
    configs/mvtec.py:best       the highest accuracy at about this cost (docs/results.md):
                                all channels, 3x3 pooling, another image score

All categories, one after the other, with a table of them all beside the published numbers:

    python -m padim_jax.main --config=configs/mvtec.py --config.category=all

Every setting, with its default and its meaning: padim_jax/config/settings.py.
"""

import ml_collections

from padim_jax.config import defaults


def get_config(preset: str = "anomalib") -> ml_collections.ConfigDict:
    config = defaults.get_config(preset)
    config.dataset.name = "mvtec_ad"
    # The folder that holds MVTec AD's category folders.
    config.dataset.root = "data/mvtec_ad"
    # One of the fifteen, or your own in the same layout.
    config.category = "bottle"
    return config
