"""The small run that most tests of whole runs share, so that it is compiled once for all.

One layer, few channels, moments, batches of 4: what else a test asks for is compiled for it.
"""

import dataclasses
import pathlib
from typing import Any

from padim_jax.config import defaults
from padim_jax.config.settings import Config, ImageConfig, validate

SETTINGS: dict[str, Any] = {
    # Read as MVTec AD: the synthetic layout would generate its own full set.
    "dataset.name": "mvtec_ad",
    "category": "part",
    "image.resize": (64, 64),
    "model.weights": "random",
    "model.layers": ("layer1",),
    "model.channels": 8,
    "model.statistics": "moments",
    "batch_size": 4,
}


def values(root: pathlib.Path, **changes: Any) -> Any:
    """Return the settings of a small run on `root`, changed by dotted names."""
    found = defaults.get_config()
    found.update_from_flattened_dict(SETTINGS | {"dataset.root": str(root)} | changes)
    return found


def config(root: pathlib.Path, **changes: Any) -> Config:
    """Return `values`, validated."""
    return validate(values(root, **changes))


def preprocessed(image: ImageConfig, **changes: Any) -> Config:
    """Return the small run's settings with other preprocessing."""
    return dataclasses.replace(config(pathlib.Path(), **changes), image=image)
