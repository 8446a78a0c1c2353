"""The configuration: a ConfigDict goes in, frozen dataclasses that hold come out.

Everything that can be wrong with a setting alone is found here, before anything
slow: this module imports neither JAX nor TensorFlow Datasets.
"""

import dataclasses
import difflib
import math
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, cast, get_args

import ml_collections

from padim_jax import models, paths
from padim_jax.datasets import LAYOUTS
from padim_jax.errors import UserError

SOURCES = ("folder", "tfds")
METHODS = ("nearest", "bilinear", "bicubic", "lanczos")
PRECISIONS = get_args(models.Precision)
STATISTICS = ("auto", "moments", "samples")
REDUCTIONS = ("random", "pca", "semi_orthogonal", "none")
STAGE_UPSAMPLINGS = ("nearest", "bilinear")
CROPS = ("centre", "random")
THRESHOLDS = ("auto", "leave_one_out", "held_out", "none")
# Below, float32 cannot tell the covariance of features from a singular one.
MIN_REGULARIZATION = 1e-4
ALL = "all"  # config.category: one run after the other
UPSAMPLINGS = ("bilinear", "bicubic")
FIGURES = ("none", "some", "all")
MAPS = ("none", "npy", "tiff")

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Where the images come from; `defaults` explains every field."""

    name: str
    root: paths.Path
    source: str
    tfds_dir: paths.Path | None
    train_images: int
    seed: int


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """From an image file to the pixels that the backbone sees; sizes are (h, w)."""

    resize: Size
    method: str
    crop: Size | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rotation: float
    crop_at: str
    seed: int

    @property
    def size(self) -> Size:
        """Height and width of the backbone's input and of the anomaly maps."""
        return self.crop or self.resize


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Backbone, embedding and covariance."""

    backbone: str
    layers: tuple[str, ...]
    weights: str
    channels: int
    seed: int
    reduction: str
    pooling: int
    upsample: str
    precision: models.Precision
    regularization: float
    statistics: str


@dataclasses.dataclass(frozen=True)
class MapConfig:
    """From patch distances to the anomaly map."""

    upsample: str
    sigma: float


@dataclasses.dataclass(frozen=True)
class ThresholdConfig:
    """Thresholds from normal images alone."""

    normal: str
    held_out: float
    image_rate: float
    pixel_rate: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a fit goes on; nothing here changes its result."""

    checkpoint_every: float


@dataclasses.dataclass(frozen=True)
class OutputsConfig:
    """What is written besides metrics and scores."""

    figures: str
    maps: str
    report: bool


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What is kept between runs for speed alone; it may be deleted at any time."""

    dir: paths.Path | None
    images_gb: float
    compilation: bool

    @property
    def folder(self) -> paths.Path:
        """Where caches lie: `dir`, or padim_jax in the user's folder for caches.

        Raises:
          UserError: there is no such folder, since the user has no home.
        """
        if self.dir is not None:
            return self.dir
        # A relative path is to be ignored (XDG Base Directory Specification).
        given = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
        try:
            base = given if given.is_absolute() else pathlib.Path("~/.cache").expanduser()
        except RuntimeError as error:
            raise UserError(
                f"config.cache.dir: {error} Name a folder for caches, or switch them off with "
                "--config.cache.images_gb=0 --config.cache.compilation=False"
            ) from error
        return base / "padim_jax"


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole, valid configuration.

    Of a sweep `category` is "all" or names with commas between, `repeats` above 1; `sweep`
    makes configurations of single runs of it.
    """

    category: str
    repeats: int
    dataset: DatasetConfig
    image: ImageConfig
    model: ModelConfig
    map: MapConfig
    threshold: ThresholdConfig
    batch_size: int
    train: TrainConfig
    outputs: OutputsConfig
    cache: CacheConfig

    @property
    def title(self) -> str:
        """Dataset and category in one word, as in the default workdir's name.

        Without a category the root's own name tells one part's folder from another's.
        """
        category = self.category or paths.absolute(self.dataset.root).name
        return f"{self.dataset.name}_{category.replace(',', '_')}"

    @property
    def is_sweep(self) -> bool:
        """Whether this is more than one run: of several categories, or repeated."""
        return self.category == ALL or "," in self.category or self.repeats > 1


def validate(values: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """Checks a configuration whole.

    Args:
      values: a ConfigDict, or the nested mapping that `to_dict` returned.

    Returns:
      The same settings as frozen dataclasses.

    Raises:
      UserError: one line that names the field, its value and what is allowed.
    """
    _fields("config", values, Config)
    groups: Any = values  # unchecked yet: anything
    dataset, image = groups["dataset"], groups["image"]
    model, map_, outputs = groups["model"], groups["map"], groups["outputs"]
    train, cache, threshold = groups["train"], groups["cache"], groups["threshold"]
    _fields("config.dataset", dataset, DatasetConfig)
    _fields("config.image", image, ImageConfig)
    _fields("config.model", model, ModelConfig)
    _fields("config.map", map_, MapConfig)
    _fields("config.threshold", threshold, ThresholdConfig)
    _fields("config.train", train, TrainConfig)
    _fields("config.outputs", outputs, OutputsConfig)
    _fields("config.cache", cache, CacheConfig)
    config = Config(
        category=_category(values["category"]),
        repeats=_integer("config.repeats", values["repeats"], minimum=1),
        dataset=DatasetConfig(
            name=_one_of("config.dataset.name", dataset["name"], LAYOUTS),
            root=_path("config.dataset.root", dataset["root"]),
            source=_one_of("config.dataset.source", dataset["source"], SOURCES),
            tfds_dir=_optional_path("config.dataset.tfds_dir", dataset["tfds_dir"]),
            train_images=_integer(
                "config.dataset.train_images", dataset["train_images"], minimum=0
            ),
            seed=_integer("config.dataset.seed", dataset["seed"], minimum=0),
        ),
        image=ImageConfig(
            resize=_size("config.image.resize", image["resize"]),
            method=_one_of("config.image.method", image["method"], METHODS),
            crop=_crop(image["crop"]),
            mean=_rgb("config.image.mean", image["mean"], positive=False),
            std=_rgb("config.image.std", image["std"], positive=True),
            rotation=_within("config.image.rotation", image["rotation"], 0.0, 180.0),
            crop_at=_one_of("config.image.crop_at", image["crop_at"], CROPS),
            seed=_integer("config.image.seed", image["seed"], minimum=0),
        ),
        model=ModelConfig(
            backbone=_one_of("config.model.backbone", model["backbone"], models.BACKBONES),
            layers=_layers(model["layers"], model["backbone"]),
            weights=_text("config.model.weights", model["weights"]),
            channels=_integer("config.model.channels", model["channels"], minimum=1),
            seed=_integer("config.model.seed", model["seed"], minimum=0),
            reduction=_one_of("config.model.reduction", model["reduction"], REDUCTIONS),
            pooling=_pooling(model["pooling"]),
            upsample=_one_of("config.model.upsample", model["upsample"], STAGE_UPSAMPLINGS),
            precision=cast(
                models.Precision,
                _one_of("config.model.precision", model["precision"], PRECISIONS),
            ),
            regularization=_within(
                "config.model.regularization",
                model["regularization"],
                MIN_REGULARIZATION,
                math.inf,
            ),
            statistics=_one_of("config.model.statistics", model["statistics"], STATISTICS),
        ),
        map=MapConfig(
            upsample=_one_of("config.map.upsample", map_["upsample"], UPSAMPLINGS),
            sigma=_number("config.map.sigma", map_["sigma"], positive=False),
        ),
        threshold=ThresholdConfig(
            normal=_one_of("config.threshold.normal", threshold["normal"], THRESHOLDS),
            held_out=_fraction("config.threshold.held_out", threshold["held_out"]),
            image_rate=_fraction("config.threshold.image_rate", threshold["image_rate"]),
            pixel_rate=_fraction("config.threshold.pixel_rate", threshold["pixel_rate"]),
        ),
        batch_size=_integer("config.batch_size", values["batch_size"], minimum=1),
        train=TrainConfig(
            checkpoint_every=_number(
                "config.train.checkpoint_every", train["checkpoint_every"], positive=False
            )
        ),
        outputs=OutputsConfig(
            figures=_one_of("config.outputs.figures", outputs["figures"], FIGURES),
            maps=_one_of("config.outputs.maps", outputs["maps"], MAPS),
            report=_flag("config.outputs.report", outputs["report"]),
        ),
        cache=CacheConfig(
            dir=_optional_path("config.cache.dir", cache["dir"]),
            images_gb=_number("config.cache.images_gb", cache["images_gb"], positive=False),
            compilation=_flag("config.cache.compilation", cache["compilation"]),
        ),
    )
    config = _keep_all(config)
    _check_together(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested JSON values; `validate` takes it back."""

    def plain(value: Any) -> Any:
        if isinstance(value, pathlib.PurePath):
            return str(value)
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value

    return plain(dataclasses.asdict(config))


def with_absolute_paths(config: Config) -> Config:
    """The same settings for use from any folder: what a checkpoint keeps."""
    dataset, weights, cache = config.dataset, config.model.weights, config.cache
    if pathlib.Path(weights).suffix in models.WEIGHT_FILES:
        weights = str(pathlib.Path(weights).expanduser().absolute())
    root, tfds_dir = paths.absolute(dataset.root), dataset.tfds_dir
    return dataclasses.replace(
        config,
        dataset=dataclasses.replace(
            dataset, root=root, tfds_dir=tfds_dir and paths.absolute(tfds_dir)
        ),
        model=dataclasses.replace(config.model, weights=weights),
        cache=dataclasses.replace(cache, dir=cache.dir and paths.absolute(cache.dir)),
    )


def _keep_all(config: Config) -> Config:
    """Without a reduction `channels` is what there is."""
    model = config.model
    if model.reduction != "none":
        return config
    spec = models.BACKBONES[model.backbone]
    total = sum(map(spec.channels, model.layers))
    return dataclasses.replace(config, model=dataclasses.replace(model, channels=total))


def _check_together(config: Config) -> None:
    resize, crop = config.image.resize, config.image.crop
    if crop and (crop[0] > resize[0] or crop[1] > resize[1]):
        raise UserError(
            f"config.image.crop={crop}: larger than config.image.resize={resize}; expected "
            "(height, width), each at most the resized one, or None for no crop"
        )
    if config.image.crop_at == "random" and crop is None:
        raise UserError(
            "config.image.crop_at=random: without config.image.crop there is nothing to place; "
            "the paper crops 224x224 of 256x256 (--config=...:rd)"
        )
    cache = config.cache
    if cache.images_gb and cache.dir and not isinstance(cache.dir, pathlib.Path):
        raise UserError(
            f"config.cache.dir={cache.dir}: decoded images are kept on this machine's disks "
            "only, from where they come faster than decoding takes. Name a folder there, or "
            "keep compiled programs alone: --config.cache.images_gb=0"
        )
    spec = models.BACKBONES[config.model.backbone]
    total = sum(map(spec.channels, config.model.layers))
    if config.model.channels > total:
        raise UserError(
            f"config.model.channels={config.model.channels}: {config.model.backbone} has "
            f"{total} channels in {', '.join(config.model.layers)}; expected 1 to {total}"
        )


def _fields(name: str, value: Any, schema: type) -> None:
    if not isinstance(value, Mapping) and not hasattr(value, "keys"):
        raise UserError(f"{name}={_shown(value)}: expected a group of settings")
    expected = {field.name for field in dataclasses.fields(schema)}
    found = set(value.keys())
    if unknown := sorted(map(str, found - expected)):
        close = difflib.get_close_matches(unknown[0], expected, n=1)
        raise UserError(
            f"{name}.{unknown[0]}: no such setting"
            + (f"; did you mean {name}.{close[0]}?" if close else ".")
            + f" Allowed: {', '.join(sorted(expected))}"
        )
    if missing := sorted(expected - found):
        raise UserError(f"{name}.{missing[0]}: missing; expected {', '.join(sorted(expected))}")


def _shown(value: Any) -> str:
    # A group of settings, an array: their text has several lines.
    return " ".join(repr(value).splitlines())


def _one_of(name: str, value: Any, allowed: Collection[str]) -> str:
    if isinstance(value, str) and value in allowed:
        return value
    close = difflib.get_close_matches(str(value), allowed, n=1)
    raise UserError(
        f"{name}={_shown(value)}: expected one of {', '.join(allowed)}"
        + (f"; did you mean {close[0]!r}?" if close else "")
    )


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{name}={_shown(value)}: expected a non-empty text")
    return value


def _path(name: str, value: Any) -> paths.Path:
    if not isinstance(value, str | pathlib.PurePath) or not str(value):
        raise UserError(f"{name}={_shown(value)}: expected a folder")
    try:
        # A model's own configuration may name what is not to be reached from here.
        return paths.parse(str(value), needed=False)
    except UserError as error:
        reason = str(error).removeprefix(f"{value}: ")
        raise UserError(f"{name}={_shown(value)}: {reason}") from error


def _optional_path(name: str, value: Any) -> paths.Path | None:
    if value is None or (isinstance(value, str) and not value):
        return None
    return _path(name, value)


def _category(value: Any) -> str:
    listed = list(value) if isinstance(value, tuple | list) else [value]
    if not listed or not all(isinstance(item, str) for item in listed):
        names: list[str] = [".."]  # no name at all
    else:
        names = [name.strip() for item in listed for name in item.split(",")]
    # A category becomes part of paths; it must not lead out of the dataset's root.
    if any(name in (".", "..") or set(name) & set("/\\\0") for name in names):
        raise UserError(
            f"config.category={_shown(value)}: expected the name of one folder below "
            "config.dataset.root, without path separators; several with commas between, or all"
        )
    if len(names) > 1 and ("" in names or ALL in names or len(set(names)) < len(names)):
        raise UserError(
            f"config.category={_shown(value)}: expected different names with commas between, "
            "or all alone"
        )
    return ",".join(names)


def _integer(name: str, value: Any, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise UserError(
            f"{name}={_shown(value)}: expected a whole number of at least {minimum}"
        )
    return value


def _number(name: str, value: Any, *, positive: bool) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (positive and value == 0):
        wanted = "above 0" if positive else "of at least 0"
        raise UserError(f"{name}={_shown(value)}: expected a number {wanted}")
    return float(value)


def _within(name: str, value: Any, low: float, high: float) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        wanted = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise UserError(f"{name}={_shown(value)}: expected a number {wanted}")
    return float(value)


def _fraction(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < 1:
        raise UserError(f"{name}={_shown(value)}: expected a number above 0 and below 1")
    return float(value)


def _pooling(value: Any) -> int:
    number = isinstance(value, int) and not isinstance(value, bool)
    if not number or value < 1 or value % 2 == 0:
        raise UserError(
            f"config.model.pooling={_shown(value)}: expected an odd number of cells, as in 3 "
            "for a neighbourhood of 3x3; 1 is the cell itself"
        )
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{name}={_shown(value)}: expected True or False")
    return value


def _size(name: str, value: Any) -> Size:
    if isinstance(value, tuple | list) and len(value) == 2:
        height, width = (
            n if isinstance(n, int) and not isinstance(n, bool) else 0 for n in value
        )
        if min(height, width) >= models.MIN_INPUT:
            return height, width
    raise UserError(
        f"{name}={_shown(value)}: expected (height, width) in pixels, each at least "
        f"{models.MIN_INPUT}, as in '(256, 256)'"
    )


def _crop(value: Any) -> Size | None:
    # On the command line `None` arrives as a tuple of one None.
    if value is None or (isinstance(value, tuple | list) and tuple(value) in [(None,), ()]):
        return None
    return _size("config.image.crop", value)


def _rgb(name: str, value: Any, *, positive: bool) -> tuple[float, float, float]:
    if isinstance(value, tuple | list) and len(value) == 3:
        red, green, blue = (_number(name, item, positive=positive) for item in value)
        return red, green, blue
    raise UserError(f"{name}={_shown(value)}: expected three numbers (red, green, blue)")


def _layers(value: Any, backbone: str) -> tuple[str, ...]:
    stages = models.BACKBONES[backbone].stages
    if isinstance(value, tuple | list) and value:
        layers = tuple(_one_of("config.model.layers", item, stages) for item in value)
        if layers == tuple(stage for stage in stages if stage in layers):
            return layers
    raise UserError(
        f"config.model.layers={_shown(value)}: expected one or more of {', '.join(stages)} "
        f"(the stages of {backbone}), shallowest first, each once, as in {stages[:2]}"
    )
