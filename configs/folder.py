"""PaDiM on a folder of your own images.

Command:
    python -m padim_jax.main --config=configs/folder.py --config.dataset.root=/path/to/parts

Expected below the root:
    train/good/*                     normal images to fit
    val/good/*, val/bad/*            to evaluate on (other folders than good are defect types)
                                     (good may be called normal, ok, ...: docs/datasets.md)
    masks/bad/NAME.png               optional: masks of val/bad (NAME.png or NAME_mask.png)

The accuracy depends on the parts; docs/choosing_settings.md tells which settings to take when.

Presets: :best, or one of configs/mvtec.py, as in --config=configs/folder.py:anomalib. Every
setting is explained in padim_jax/config/settings.py.
"""

import ml_collections

from padim_jax.config import defaults


def get_config(preset: str = "best") -> ml_collections.ConfigDict:
    config = defaults.get_config(preset)
    config.dataset.name = "folder"
    # The folder that holds train/ and val/.
    config.dataset.root = "data/parts"
    # Optionally a folder below the root that holds them, for several parts side by side.
    config.category = ""
    return config
