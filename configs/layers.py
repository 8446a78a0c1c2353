"""Single layers against their concatenation, with all of their channels.

Commands:
    python -m padim_jax.main --config=configs/layers.py:layer1 --workdir=results/layer1
    python -m padim_jax.main --config=configs/layers.py:layer2 --workdir=results/layer2
    python -m padim_jax.main --config=configs/layers.py:layer3 --workdir=results/layer3
    python -m padim_jax.main --config=configs/layers.py:layer1+layer2+layer3

The comparison of the paper's section V-A. Any set of layers is a preset, as in layer2+layer3.

Expected for bottle (ResNet-18): see docs/results.md, "What the choices cost".

Every setting is explained in padim_jax/config/settings.py.
"""

import ml_collections

from padim_jax.config import defaults


def get_config(layers: str = "layer1+layer2+layer3") -> ml_collections.ConfigDict:
    config = defaults.get_config()
    # As in configs/mvtec.py.
    config.dataset.name = "mvtec_ad"
    config.dataset.root = "data/mvtec_ad"
    config.category = "bottle"
    # The stages of the backbone to use, shallowest first.
    config.model.layers = tuple(layers.split("+"))
    # All of their channels: 64, 128 and 256 of a ResNet-18.
    config.model.reduction = "none"
    return config
