r"""A backbone of your own: a ResNet-18 that learns from images which the program draws.

Command:
    python -m padim_jax.main --config=configs/pretrain.py --mode=pretrain

No image and no weight is downloaded: textures, objects and their defects are drawn in every
step anew. This is the recipe of the weights that come with padim_jax (bundled), which were
trained on two devices: another number rounds otherwise, and comes to weights that are alike,
not the same. Results go to results/pretrain, or --workdir; the same command goes on with a
training that was interrupted.

Expected: about 40 minutes on 4 CPU cores (5,600 steps of 64 images).

To go on with normal images of your own, from weights that there are:

    python -m padim_jax.main --config=configs/pretrain.py --mode=pretrain \
        --config.start=bundled --config.images.photos=/path/to/parts/train/good \
        --config.optimizer.steps=1000 --workdir=results/pretrain_parts

and to use what comes out, as the weights of any other configuration:

    --config.model.weights=results/pretrain/backbone.safetensors

Every setting is explained in padim_jax/pretrain/config.py.
"""

import ml_collections

from padim_jax.pretrain import config


def get_config() -> ml_collections.ConfigDict:
    return config.get_config()
