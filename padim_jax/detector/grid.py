"""The grid of patches that follows from a configuration."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32

from padim_jax.config import backbones
from padim_jax.config.settings import Config, ImageConfig
from padim_jax.data import roi


def patch_grid(config: ImageConfig, layers: Sequence[str]) -> tuple[int, int]:
    """Return height and width of the first layer's feature map, in patches.

    Args:
      config: image settings.
      layers: names of the stages in use, the finest first.

    Returns:
      Height and width in patches.
    """
    stride = backbones.STRIDES[layers[0]]
    height, width = config.size
    return -(-height // stride), -(-width // stride)


def patch_size(config: Config) -> tuple[float, float]:
    """Return height and width of a patch, in pixels of the anomaly maps."""
    rows, columns = patch_grid(config.image, config.model.layers)
    height, width = config.image.size
    return height / rows, width / columns


def inside(image: ImageConfig) -> Bool[np.ndarray, "_h _w"] | None:
    """Return the pixels of maps in the region of interest, or None without one.

    Args:
      image: image settings of a model.
    """
    return roi.at_input_size(str(image.roi), image) if image.roi else None


def scored_pixels(
    image: ImageConfig, maps: Float32[np.ndarray, "n h w"]
) -> Float32[np.ndarray, "n _h _w"]:
    """Return the pixels of maps inside the region of interest, in one row of each map.

    Args:
      image: image settings of a model.
      maps: anomaly maps.

    Returns:
      (n, 1, k), or the maps without a region of interest.
    """
    covered = inside(image)
    return maps if covered is None else maps[:, None, covered]
