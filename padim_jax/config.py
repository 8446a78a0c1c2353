"""The configuration: a ConfigDict goes in, frozen dataclasses that hold come out.

Everything that can be wrong with a setting alone is found here, before anything
slow: this module imports neither JAX nor TensorFlow Datasets.
"""

import dataclasses
import difflib
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
# Far beyond what is of use; above, memory or time would end before the work does.
_MOST_PIXELS = 16384  # a side
_MOST_CELLS = 63  # a side of a neighbourhood, of which all are added
_MOST_IMAGES = 65536  # a batch
_MOST_REPEATS = 1000
_MOST_SEED = 2**63 - 1
_MOST = 1e6  # of numbers that have a meaning around 1: float32 squares them
_MOST_SECONDS = 1e9
_LEAST_STD = 1e-6  # of pixels of 0 to 1: float32 divides by it
_LONGEST_NAME = 255  # of a folder, in bytes, wherever folders are
_LONGEST_PATH = 4095
_MOST_SHOWN = 200  # characters of a wrong value in a message
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
    skip_bad: bool


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
        repeats=_integer("config.repeats", values["repeats"], 1, _MOST_REPEATS),
        dataset=DatasetConfig(
            name=_one_of("config.dataset.name", dataset["name"], LAYOUTS),
            root=_path("config.dataset.root", dataset["root"]),
            source=_one_of("config.dataset.source", dataset["source"], SOURCES),
            tfds_dir=_optional_path("config.dataset.tfds_dir", dataset["tfds_dir"]),
            train_images=_integer(
                "config.dataset.train_images", dataset["train_images"], 0, _MOST_SEED
            ),
            seed=_integer("config.dataset.seed", dataset["seed"], 0, _MOST_SEED),
            skip_bad=_flag("config.dataset.skip_bad", dataset["skip_bad"]),
        ),
        image=ImageConfig(
            resize=_size("config.image.resize", image["resize"]),
            method=_one_of("config.image.method", image["method"], METHODS),
            crop=_crop(image["crop"]),
            mean=_rgb("config.image.mean", image["mean"], 0.0),
            std=_rgb("config.image.std", image["std"], _LEAST_STD),
            rotation=_within("config.image.rotation", image["rotation"], 0.0, 180.0),
            crop_at=_one_of("config.image.crop_at", image["crop_at"], CROPS),
            seed=_integer("config.image.seed", image["seed"], 0, _MOST_SEED),
        ),
        model=ModelConfig(
            backbone=_one_of("config.model.backbone", model["backbone"], models.BACKBONES),
            layers=_layers(model["layers"], model["backbone"]),
            weights=_text("config.model.weights", model["weights"]),
            channels=_integer("config.model.channels", model["channels"], 1, _MOST_SEED),
            seed=_integer("config.model.seed", model["seed"], 0, _MOST_SEED),
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
                _MOST,
            ),
            statistics=_one_of("config.model.statistics", model["statistics"], STATISTICS),
        ),
        map=MapConfig(
            upsample=_one_of("config.map.upsample", map_["upsample"], UPSAMPLINGS),
            sigma=_within("config.map.sigma", map_["sigma"], 0.0, float(_MOST_PIXELS)),
        ),
        threshold=ThresholdConfig(
            normal=_one_of("config.threshold.normal", threshold["normal"], THRESHOLDS),
            held_out=_fraction("config.threshold.held_out", threshold["held_out"]),
            image_rate=_fraction("config.threshold.image_rate", threshold["image_rate"]),
            pixel_rate=_fraction("config.threshold.pixel_rate", threshold["pixel_rate"]),
        ),
        batch_size=_integer("config.batch_size", values["batch_size"], 1, _MOST_IMAGES),
        train=TrainConfig(
            checkpoint_every=_within(
                "config.train.checkpoint_every", train["checkpoint_every"], 0.0, _MOST_SECONDS
            )
        ),
        outputs=OutputsConfig(
            figures=_one_of("config.outputs.figures", outputs["figures"], FIGURES),
            maps=_one_of("config.outputs.maps", outputs["maps"], MAPS),
            report=_flag("config.outputs.report", outputs["report"]),
        ),
        cache=CacheConfig(
            dir=_optional_path("config.cache.dir", cache["dir"]),
            images_gb=_within("config.cache.images_gb", cache["images_gb"], 0.0, _MOST),
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
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise UserError(f"{name}={_shown(value)}: expected a group of settings")
    expected = {field.name for field in dataclasses.fields(schema)}
    found = set(value.keys())
    # A file's JSON may have any text for a name.
    if unknown := sorted(_one_line(str(key)) for key in found - expected):
        close = difflib.get_close_matches(unknown[0], expected, n=1)
        raise UserError(
            f"{name}.{unknown[0]}: no such setting"
            + (f"; did you mean {name}.{close[0]}?" if close else ".")
            + f" Allowed: {', '.join(sorted(expected))}"
        )
    if missing := sorted(expected - found):
        raise UserError(f"{name}.{missing[0]}: missing; expected {', '.join(sorted(expected))}")


def _shown(value: Any) -> str:
    try:
        return _one_line(repr(value))
    except (ValueError, RecursionError):  # an integer of 5,000 digits, lists 1,000 deep
        return f"a value of the type {type(value).__name__} that is too large to show"


def _one_line(text: str) -> str:
    # A group of settings, an array: their text has several lines.
    text = " ".join(text.splitlines())
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _one_of(name: str, value: Any, allowed: Collection[str]) -> str:
    if isinstance(value, str) and value in allowed:
        return value
    short = isinstance(value, str) and len(value) <= _MOST_SHOWN
    close = difflib.get_close_matches(value, allowed, n=1) if short else []
    raise UserError(
        f"{name}={_shown(value)}: expected one of {', '.join(allowed)}"
        + (f"; did you mean {close[0]!r}?" if close else "")
    )


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{name}={_shown(value)}: expected a non-empty text")
    return value


def _path(name: str, value: Any) -> paths.Path:
    text = str(value) if isinstance(value, str | pathlib.PurePath) else ""
    if not text or "\0" in text or len(text) > _LONGEST_PATH:
        raise UserError(f"{name}={_shown(value)}: expected a folder")
    try:
        # A model's own configuration may name what is not to be reached from here.
        return paths.parse(text, needed=False)
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
    for name in names:
        if len(name.encode("utf-8", "surrogatepass")) > _LONGEST_NAME:
            raise UserError(
                f"config.category={_shown(value)}: expected a folder's name, of at most "
                f"{_LONGEST_NAME} bytes"
            )
    if len(names) > 1 and ("" in names or ALL in names or len(set(names)) < len(names)):
        raise UserError(
            f"config.category={_shown(value)}: expected different names with commas between, "
            "or all alone"
        )
    return ",".join(names)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        limit = "" if _is_number(value) and value <= high else f" and at most {high}"
        raise UserError(
            f"{name}={_shown(value)}: expected a whole number of at least {low}{limit}"
        )
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _within(name: str, value: Any, low: float, high: float) -> float:
    # Compared and not converted first: integers may be larger than any float.
    if not _is_number(value) or not low <= value <= high:
        raise UserError(f"{name}={_shown(value)}: expected a number from {low:g} to {high:g}")
    return float(value)


def _fraction(name: str, value: Any) -> float:
    if not _is_number(value) or not 0 < value < 1:
        raise UserError(f"{name}={_shown(value)}: expected a number above 0 and below 1")
    return float(value)


def _pooling(value: Any) -> int:
    number = isinstance(value, int) and not isinstance(value, bool)
    if not number or not 1 <= value <= _MOST_CELLS or value % 2 == 0:
        raise UserError(
            f"config.model.pooling={_shown(value)}: expected an odd number of cells up to "
            f"{_MOST_CELLS}, as in 3 for a neighbourhood of 3x3; 1 is the cell itself"
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
        if min(height, width) >= models.MIN_INPUT and max(height, width) <= _MOST_PIXELS:
            return height, width
    raise UserError(
        f"{name}={_shown(value)}: expected (height, width) in pixels, each at least "
        f"{models.MIN_INPUT} and at most {_MOST_PIXELS}, as in '(256, 256)'"
    )


def _crop(value: Any) -> Size | None:
    # On the command line `None` arrives as a tuple of one None.
    if value is None or (isinstance(value, tuple | list) and tuple(value) in [(None,), ()]):
        return None
    return _size("config.image.crop", value)


def _rgb(name: str, value: Any, low: float) -> tuple[float, float, float]:
    if isinstance(value, tuple | list) and len(value) == 3:
        red, green, blue = (_within(name, item, low, _MOST) for item in value)
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
