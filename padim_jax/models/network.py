"""Network construction by the backbone's name."""

from padim_jax.config.backbones import EFFICIENTNETS, RESNETS, SCATTERING, Precision
from padim_jax.models.efficientnet import EfficientNet
from padim_jax.models.resnet import ResNet
from padim_jax.models.scattering import Scattering


def build(
    backbone: str, stages: tuple[str, ...], precision: Precision
) -> ResNet | EfficientNet | Scattering:
    """Return a backbone cut after the deepest of `stages`.

    Args:
      backbone: key of `padim_jax.config.backbones.BACKBONES`.
      stages: stages whose feature maps are returned, from its `parts`.
      precision: see `resnet.ResNet`.

    Returns:
      The Flax module.
    """
    if backbone in RESNETS:
        return ResNet(RESNETS[backbone], stages, precision)
    if backbone in SCATTERING:
        return Scattering(SCATTERING[backbone], stages, precision)
    return EfficientNet(EFFICIENTNETS[backbone], stages, precision)
