"""New configurations; configs/*.py start from here, and `settings` explains all settings.

It is part of the package so that a config file works from any folder and installation:

    from padim_jax.config import defaults

    def get_config(preset="anomalib"):
        config = defaults.get_config(preset)
        config.dataset.root = "/path/to/parts"
        return config
"""

from typing import Any

import ml_collections

from padim_jax.config import schema
from padim_jax.config.settings import Config
from padim_jax.errors import UserError

_CROP = {"image.crop": (224, 224)}
_PAPER = {**_CROP, "image.method": "bicubic", "map.upsample": "bicubic"}
# Variants, as they differ from the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "anomalib": {},
    "seed": {**_CROP, "image.method": "nearest"},
    "paper": _PAPER,
    "rd": {**_PAPER, "image.rotation": 10.0, "image.crop_at": "random"},
    # Chosen on bottle, screw, tire and drawn parts: docs/results.md.
    "best": {
        "model.channels": 0,
        "model.pooling": 3,
        "model.regularization": 0.003,
        "score.image": "variation",
    },
}


def get_config(preset: str = "anomalib") -> ml_collections.ConfigDict:
    """Return the default configuration in one of four published variants, or the best one.

    Args:
      preset: "anomalib" (bilinear 256, no crop), "seed" (nearest 256, crop 224: the PyTorch
        project Lornatang/PaDiM), "paper" (bicubic 256, crop 224, bicubic map upsampling), "rd"
        (the same with the paper's random rotations and crops: Rd-MVTec AD), or "best" (as
        "anomalib", with all channels, averaged over 3x3 cells, a smaller regularization, and
        the variation of the map as score; not published).

    Raises:
      UserError: the preset is unknown.
    """
    if preset not in PRESETS:
        raise UserError(
            f"--config=...:{preset}: expected one of {', '.join(PRESETS)} behind the colon"
        )
    config = schema.defaults(Config)
    config.update_from_flattened_dict(PRESETS[preset])
    return config
