"""The recipe of a pretraining: a ConfigDict in, validated frozen dataclasses out.

`defaults` explains all settings. Like `padim_jax.config`, this imports nothing heavy.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast, get_args

import ml_collections

from padim_jax.config import backbones, checks
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
# Far above useful values; beyond, memory or time would run out first.
_MOST_TEXTURES = 100_000  # of one byte per pixel, 1.6 GB
_MOST_PIXELS = 4096  # per side of a photograph
_MOST_SCENES = 4096  # per step
_MOST_IMAGES = 256  # per scene
_MOST_STEPS = 10_000_000
_MOST_SEED = 2**31 - 1  # JAX takes 32 bits
_LEAST_PART = 1e-3
_LEAST_RATE = 1e-9
_MOST_AVERAGE = 0.999999  # in float32 still below 1


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
    """Contents of the images."""

    size: int
    classes: int
    instances: int
    photos: paths.Path | None
    photo_part: float
    photo_size: int


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """The task learnt from them."""

    good: int
    inspected: int
    channels: int
    redundancy: float
    pixels: float


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Optimisation."""

    steps: int
    scenes: int
    learning_rate: float
    warmup: int
    weight_decay: float
    average: float


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """A complete, valid recipe.

    Attributes:
      seed: seed of weights, textures and images.
      backbone: key of `backbones.RESNETS`, with basic blocks.
      start: "random", or weights to start from: a name or a file.
      precision: precision of the network's arithmetic.
      checkpoint_every: interval of saves in seconds.
    """

    seed: int
    backbone: str
    start: str
    precision: backbones.Precision
    images: ImagesConfig
    task: TaskConfig
    optimizer: OptimizerConfig
    checkpoint_every: float

    @property
    def batch_size(self) -> int:
        """Return the number of images per step."""
        return self.optimizer.scenes * (self.task.good + self.task.inspected)


def validate(values: Mapping[str, Any] | ml_collections.ConfigDict) -> PretrainConfig:
    """Validate a complete recipe.

    Args:
      values: a ConfigDict, or the nested mapping returned by `to_dict`.

    Returns:
      The same settings as frozen dataclasses.

    Raises:
      UserError: a setting is wrong; one line with its name, value and what is allowed.
    """
    checks.fields("config", values, PretrainConfig)
    groups: Any = values  # not validated yet: any type
    images, task, optimizer = groups["images"], groups["task"], groups["optimizer"]
    checks.fields("config.images", images, ImagesConfig)
    checks.fields("config.task", task, TaskConfig)
    checks.fields("config.optimizer", optimizer, OptimizerConfig)
    backbone = checks.one_of("config.backbone", values["backbone"], BACKBONES)
    size = _size(images["size"])
    steps = checks.integer("config.optimizer.steps", optimizer["steps"], 1, _MOST_STEPS)
    config = PretrainConfig(
        seed=checks.integer("config.seed", values["seed"], 0, _MOST_SEED),
        backbone=backbone,
        start=checks.text("config.start", values["start"]),
        precision=cast(
            backbones.Precision,
            checks.one_of(
                "config.precision", values["precision"], get_args(backbones.Precision)
            ),
        ),
        images=ImagesConfig(
            size=size,
            classes=checks.integer(
                "config.images.classes", images["classes"], FAMILIES, _MOST_TEXTURES
            ),
            instances=checks.integer(
                "config.images.instances", images["instances"], 1, _MOST_TEXTURES
            ),
            photos=checks.optional_path("config.images.photos", images["photos"]),
            photo_part=checks.within(
                "config.images.photo_part", images["photo_part"], _LEAST_PART, 1.0
            ),
            photo_size=checks.integer(
                "config.images.photo_size", images["photo_size"], size, _MOST_PIXELS
            ),
        ),
        task=TaskConfig(
            # A covariance needs at least two.
            good=checks.integer("config.task.good", task["good"], 2, _MOST_IMAGES),
            inspected=checks.integer(
                "config.task.inspected", task["inspected"], 1, _MOST_IMAGES
            ),
            channels=checks.integer(
                "config.task.channels",
                task["channels"],
                1,
                sum(map(backbones.RESNETS[backbone].channels, STAGES)),
            ),
            redundancy=checks.within(
                "config.task.redundancy", task["redundancy"], 0.0, checks.MOST
            ),
            pixels=checks.within("config.task.pixels", task["pixels"], 0.0, checks.MOST),
        ),
        optimizer=OptimizerConfig(
            steps=steps,
            scenes=checks.integer(
                "config.optimizer.scenes", optimizer["scenes"], 1, _MOST_SCENES
            ),
            learning_rate=checks.within(
                "config.optimizer.learning_rate", optimizer["learning_rate"], _LEAST_RATE, 1.0
            ),
            warmup=_warmup(optimizer["warmup"], steps),
            weight_decay=checks.within(
                "config.optimizer.weight_decay", optimizer["weight_decay"], 0.0, 1.0
            ),
            average=checks.within(
                "config.optimizer.average", optimizer["average"], 0.0, _MOST_AVERAGE
            ),
        ),
        checkpoint_every=checks.within(
            "config.checkpoint_every", values["checkpoint_every"], 0.0, checks.MOST_SECONDS
        ),
    )
    _check_together(config)
    return config


def to_dict(config: PretrainConfig) -> dict[str, Any]:
    """Return the recipe as nested JSON values, which `validate` reads."""
    values = dataclasses.asdict(config)
    photos = config.images.photos
    values["images"]["photos"] = None if photos is None else str(photos)
    return values


def _size(value: Any) -> int:
    name = "config.images.size"
    size = checks.integer(name, value, _LEAST_SIZE, TEXTURE_SIZE)
    if size % _MULTIPLE:
        raise UserError(
            f"{name}={size}: expected a multiple of {_MULTIPLE} from {_LEAST_SIZE} to "
            f"{TEXTURE_SIZE}; textures have {TEXTURE_SIZE} pixels a side"
        )
    return size


def _warmup(value: Any, steps: int) -> int:
    name = "config.optimizer.warmup"
    warmup = checks.integer(name, value, 0, _MOST_STEPS)
    if warmup >= steps:
        raise UserError(
            f"{name}={warmup}: expected fewer steps than config.optimizer.steps={steps}"
        )
    return warmup


def _check_together(config: PretrainConfig) -> None:
    images = config.images
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
