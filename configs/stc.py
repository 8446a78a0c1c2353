"""PaDiM on one scene of STC, the ShanghaiTech Campus dataset.

Command:
    python -m padim_jax.main --config=configs/stc.py --config.category=01

Data: https://svip-lab.github.io/dataset/campus_dataset.html, unpacked into data/stc. Training
videos have to be made frames of first: without them the program prints the ffmpeg command.
Folders, licence, citation: docs/datasets.md. Frames are 856x480 pixels, resized to 256x256.

A subset of the training frames is fitted, drawn with config.dataset.seed; a scene has 21,000
on average, most of them nearly the same as the one before. Of the PaDiM paper we know that it
reports STC, but not which frames it took (its text could not be checked when this was
written); PatchCore takes every fifth frame of training and test (mSTC), some 4,200 a scene.
5000 is our choice, of the same size; 0 takes them all.

Accuracy: not measured here, the data are not part of this project. Every test frame is
evaluated: some 3,400 a scene.

Presets as in configs/mvtec.py; every setting is explained in padim_jax/config/settings.py.
"""

import ml_collections

from padim_jax.config import defaults


def get_config(preset: str = "anomalib") -> ml_collections.ConfigDict:
    config = defaults.get_config(preset)
    config.dataset.name = "stc"
    # The folder that holds training and testing.
    config.dataset.root = "data/stc"
    # The scene, 01 to 12; 13 has no test videos and can only be fitted.
    config.category = "01"
    # Drawn of the scene's training frames.
    config.dataset.train_images = 5000
    return config
