"""The recipe of a pretraining: all its settings, and what they have to be together.

It is like `padim_jax.config.settings`, which shows how settings are stated.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_args

import ml_collections

from padim_jax.config import backbones, checks, schema
from padim_jax.config.checks import MOST, MOST_SECONDS, Integer, Number, OneOf
from padim_jax.config.schema import setting
from padim_jax.errors import UserError
from padim_jax.system import paths

# Blocks of two 3x3 convolutions, which the network with norms supports.
BACKBONES = tuple(name for name, spec in backbones.RESNETS.items() if spec.block == "basic")
# Stages that are trained, and that channels are drawn from.
STAGES = ("layer1", "layer2", "layer3")
TEXTURE_SIZE = 128  # pixels of a texture's side, from which all images are cut
FAMILIES = 13  # of textures; fewer classes would leave some out
_MULTIPLE = 16  # input pixels per cell of layer3
_LEAST_SIZE = 32
_MOST_TEXTURES = 100_000  # of one byte per pixel, 1.6 GB
_MOST_PIXELS = 4096  # per side of a photograph
# The same for all `BACKBONES`.
_MOST_CHANNELS = sum(map(backbones.RESNETS[BACKBONES[0]].channels, STAGES))


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
    """Contents of the images."""

    size: int = setting(64, Integer(_LEAST_SIZE, TEXTURE_SIZE))
    """Side of the images in pixels, a multiple of 16."""

    classes: int = setting(260, Integer(FAMILIES, _MOST_TEXTURES))
    """Number of kinds of textures for scenes. The product with `instances` has the
    same limit."""

    instances: int = setting(6, Integer(1, _MOST_TEXTURES))
    """Number of pictures of each kind."""

    photos: paths.Path | None = setting("", checks.optional_path)
    """Folder of normal images of your own to learn from as well; `""` for none."""

    photo_part: float = setting(0.5, Number(1e-3, 1.0))
    """Fraction of the scenes that are cut from them."""

    photo_size: int = setting(256, Integer(_LEAST_SIZE, _MOST_PIXELS))
    """Side in pixels that they are resized to, at least `images.size`."""


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """The task that is learnt from them."""

    good: int = setting(10, Integer(2, 256))  # a covariance needs at least two
    """Images of each scene without defects, to which a Gaussian is fitted for each patch."""

    inspected: int = setting(6, Integer(1, 256))
    """Images of each scene with and without defects, which should stand out."""

    channels: int = setting(100, Integer(1, _MOST_CHANNELS))
    """Number of channels of layer1 to layer3 that are kept for it, drawn anew in each step."""

    redundancy: float = setting(0.05, Number(0.0, MOST))
    """Weight of the redundancy of channels."""

    pixels: float = setting(1.0, Number(0.0, MOST))
    """Weight of the prediction of each cell's own pixels from its features."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimisation (AdamW)."""

    steps: int = setting(5600, Integer(1, 10_000_000))
    """Number of steps."""

    scenes: int = setting(4, Integer(1, 4096))
    """Scenes per step, on all devices together."""

    learning_rate: float = setting(2e-3, Number(1e-9, 1.0))
    """Highest learning rate, which falls to 0 along half a cosine."""

    warmup: int = setting(100, Integer(0, 10_000_000))
    """Number of steps in which the rate rises to it, fewer than `steps`."""

    weight_decay: float = setting(0.05, Number(0.0, 1.0))
    """Weight decay."""

    average: float = setting(0.999, Number(0.0, 0.999999))  # in float32 below 1
    """Decay of the exponential moving average of the weights, which is the result."""


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """A complete, valid recipe."""

    seed: int = setting(0, Integer(0, 2**31 - 1))  # JAX takes 32 bits
    """Seed of the initial weights, of the textures and of all images."""

    backbone: str = setting("resnet18", OneOf(BACKBONES))
    """Network to train, up to layer3."""

    start: str = setting("random", checks.text)
    """`random`, or weights to start from: `bundled`, a name or a file, as for
    `config.model.weights`."""

    precision: backbones.Precision = setting("tf32", OneOf(get_args(backbones.Precision)))
    """Arithmetic of the network; `tf32` is float32 on CPUs. Parameters and distances are always
    float32."""

    images: ImagesConfig = schema.group()
    task: TaskConfig = schema.group()
    optimizer: OptimizerConfig = schema.group()
    checkpoint_every: float = setting(300.0, Number(0.0, MOST_SECONDS))
    """Seconds between two saves, from which an interrupted training resumes."""

    @property
    def batch_size(self) -> int:
        """Return the number of images per step."""
        return self.optimizer.scenes * (self.task.good + self.task.inspected)


def get_config() -> ml_collections.ConfigDict:
    """Return the recipe of the bundled weights."""
    return schema.defaults(PretrainConfig)


def validate(values: Mapping[str, Any] | ml_collections.ConfigDict) -> PretrainConfig:
    """Validate a complete recipe.

    Args:
      values: a ConfigDict, or the nested mapping returned by `to_dict`.

    Returns:
      The same settings as frozen dataclasses.

    Raises:
      UserError: a setting is wrong; one line with its name, value and what is allowed.
    """
    config: PretrainConfig = schema.build(PretrainConfig, values)
    _check_together(config)
    return config


def to_dict(config: PretrainConfig) -> dict[str, Any]:
    """Return the recipe as nested JSON values, which `validate` reads."""
    return schema.to_json(config)


def _check_together(config: PretrainConfig) -> None:
    """Check conditions on several settings, or raise UserError."""
    images, optimizer = config.images, config.optimizer
    if images.size % _MULTIPLE:
        raise UserError(
            f"config.images.size={images.size}: expected a multiple of {_MULTIPLE} from "
            f"{_LEAST_SIZE} to {TEXTURE_SIZE}; textures have {TEXTURE_SIZE} pixels a side"
        )
    Integer(images.size, _MOST_PIXELS)("config.images.photo_size", images.photo_size)
    if optimizer.warmup >= optimizer.steps:
        raise UserError(
            f"config.optimizer.warmup={optimizer.warmup}: expected fewer steps than "
            f"config.optimizer.steps={optimizer.steps}"
        )
    if images.classes * images.instances > _MOST_TEXTURES:
        raise UserError(
            f"config.images.instances={images.instances}: of "
            f"config.images.classes={images.classes} these are more than {_MOST_TEXTURES} "
            "textures, which are all kept in memory; expected fewer"
        )
    if config.start == backbones.BUNDLED_WEIGHTS and config.backbone not in backbones.BUNDLED:
        raise UserError(
            f"config.start={config.start!r}: there are bundled weights of "
            f"{', '.join(backbones.BUNDLED)}, and none of config.backbone={config.backbone!r}; "
            f"expected {backbones.RANDOM_WEIGHTS}, "
            f"{', '.join(backbones.WEIGHTS[config.backbone])} or a file"
        )
