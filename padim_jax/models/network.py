"""The network of a backbone's name."""

from padim_jax.config.backbones import EFFICIENTNETS, RESNETS, Precision
from padim_jax.models.efficientnet import EfficientNet
from padim_jax.models.resnet import ResNet


def build(
    backbone: str, stages: tuple[str, ...], precision: Precision
) -> ResNet | EfficientNet:
    """A backbone cut after the deepest of `stages`, whose feature maps it returns.

    Args:
      backbone: a key of `padim_jax.config.backbones.BACKBONES`.
      stages: of its `parts`.
      precision: see `resnet.ResNet`.
    """
    if backbone in RESNETS:
        return ResNet(RESNETS[backbone], stages, precision)
    return EfficientNet(EFFICIENTNETS[backbone], stages, precision)
