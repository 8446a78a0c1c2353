"""PaDiM with EfficientNet-B5, the third backbone of the paper, on one category of MVTec AD.

Command:
    python -m padim_jax.main --config=configs/efficientnet_b5.py --config.category=bottle

The default weights are timm's own, trained on ImageNet-12k and fine-tuned on ImageNet-1k. Those
of torchvision, ported from the original EfficientNet's, are not in the hub: download
https://download.pytorch.org/models/efficientnet_b5_lukemelas-1a07897c.pth and add
    --config.model.weights=/path/to/efficientnet_b5_lukemelas-1a07897c.pth
See third_party/pretrained_weights.md.

Presets as in configs/mvtec.py; every setting is explained in padim_jax/config/settings.py.
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
    config.model.backbone = "efficientnet_b5"
    # After blocks 7, 20 and 26, counted from 0 over all: 40, 176 and 176 channels.
    config.model.layers = ("block7", "block20", "block26")
    config.model.weights = "efficientnet_b5.sw_in12k_ft_in1k"
    # About half; all of them: 392.
    config.model.channels = 200
    return config
