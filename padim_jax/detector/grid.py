"""The grid of patches that follows from a configuration."""

from collections.abc import Sequence

from padim_jax.config import backbones
from padim_jax.config.settings import Config, ImageConfig


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
