"""The configuration: a ConfigDict in, validated frozen dataclasses out.

All faults of settings alone are found here, before anything slow: this module imports neither
JAX nor TensorFlow Datasets.

A new setting goes last in its dataclass, with a default there: the value that leaves scores as
they were before the setting existed, whatever `defaults` has for new models. Models stored
without it are read with that value (`restore`), and at that value it is neither stored
(`to_stored`) nor part of a model's fingerprint (`score_settings`).
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, get_args

import ml_collections

import padim_jax
from padim_jax.config import backbones, checks, defaults
from padim_jax.config.datasets import LAYOUTS, MVTEC_AD
from padim_jax.errors import UserError
from padim_jax.system import paths

SOURCES = ("folder", "tfds")
METHODS = ("nearest", "bilinear", "bicubic", "lanczos")
PRECISIONS = get_args(backbones.Precision)
STATISTICS = ("auto", "moments", "samples")
REDUCTIONS = ("random", "pca", "semi_orthogonal", "none")
STAGE_UPSAMPLINGS = ("nearest", "bilinear")
CROPS = ("centre", "random")
THRESHOLDS = ("auto", "leave_one_out", "held_out", "none")
# Below, float32 cannot distinguish the covariance of features from a singular one.
MIN_REGULARIZATION = 1e-4
ALL = "all"  # config.category: one run after the other
# Far above useful values; beyond, memory or time would run out first.
_MOST_PIXELS = 16384  # per side
_MOST_CELLS = 63  # per side of a neighbourhood, all of which are added
_MOST_SHIFT = 8  # patches; each multiplies the work of scoring
_MOST_IMAGES = 65536  # per batch
_MOST_REPEATS = 1000
_LEAST_STD = 1e-6  # of pixels of 0 to 1: float32 divides by it
_HIGHEST_RGB = 1.0  # in mean and std; models of earlier versions may have more
_LONGEST_PATTERN = 1000
_HIGHEST_RATE = 0.9999
_LONGEST_NAME = 255  # of a folder, in bytes, on all file systems
UPSAMPLINGS = ("bilinear", "bicubic")
IMAGE_SCORES = ("max", "top", "band", "combined")
FIGURES = ("none", "some", "all")
MAPS = ("none", "npy", "tiff")
RESOLUTIONS = ("model", "full")
INVERTED_MASKS = ("check", "no", "yes")

Size = tuple[int, int]
# Values that become 0 and 255: the limits of the type, or two in the file's own counts.
Range = Literal["full"] | tuple[int, int]
Overrides = Mapping[str, Any]  # values by dotted names ("outputs.figures")


class UnknownSettingError(UserError):
    """A stored model has a setting unknown to this version that scores may depend on."""


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Source of the images; `defaults` explains all fields."""

    name: str
    root: paths.Path
    source: str
    tfds_dir: paths.Path | None
    train_images: int
    seed: int
    skip_bad: bool
    exclude: tuple[str, ...] = ()
    inverted_masks: str = "check"


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Preprocessing of image files for the backbone; sizes are (h, w)."""

    resize: Size
    method: str
    crop: Size | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rotation: float
    crop_at: str
    seed: int
    range: str | tuple[int, int] = "full"

    @property
    def counts(self) -> Range:
        """Return `range` for the decoder; "train" before a fit means "full"."""
        return self.range if isinstance(self.range, tuple) else "full"

    @property
    def size(self) -> Size:
        """Return height and width of the backbone's input and of the anomaly maps."""
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
    precision: backbones.Precision
    regularization: float
    statistics: str
    shift: int = 0


@dataclasses.dataclass(frozen=True)
class MapConfig:
    """Conversion of patch distances to anomaly maps."""

    upsample: str
    sigma: float


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Scores of images."""

    image: str = "max"


@dataclasses.dataclass(frozen=True)
class ThresholdConfig:
    """Thresholds from normal images alone."""

    normal: str
    groups: str
    held_out: float
    image_rate: float
    pixel_rate: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Progress of a fit; nothing here changes its result."""

    checkpoint_every: float


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """Comparison of anomaly maps with masks."""

    resolution: str = "model"


@dataclasses.dataclass(frozen=True)
class OutputsConfig:
    """Outputs besides metrics and scores."""

    figures: str
    maps: str
    report: bool


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Caches between runs, for speed alone; they may be deleted at any time."""

    dir: paths.Path | None
    images_gb: float
    compilation: bool

    @property
    def folder(self) -> paths.Path:
        """Return the folder of the caches: `dir`, or padim_jax in the user's cache folder.

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

    @property
    def programs(self) -> paths.Path | None:
        """Return the folder of compiled programs, or None."""
        return self.folder / "compilation" if self.compilation else None


@dataclasses.dataclass(frozen=True)
class Config:
    """A complete, valid configuration.

    For a sweep `category` is "all" or names separated by commas, or `repeats` is above 1;
    `sweep` makes configurations of single runs of it.
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
    metrics: MetricsConfig = MetricsConfig()
    score: ScoreConfig = ScoreConfig()

    @property
    def title(self) -> str:
        """Return dataset and category in one word, as in the default workdir's name.

        Without a category the root's own name distinguishes one part's folder from another's;
        images in MVTec AD's layout that are not MVTec AD's have the root's name instead of the
        dataset's.
        """
        root, dataset = paths.absolute(self.dataset.root).name, self.dataset.name
        category = self.category or root
        known = MVTEC_AD
        if category == ALL:
            theirs = "mvtec" in root.lower()
        else:
            theirs = all(name in known for name in category.split(","))
        if dataset == "mvtec_ad" and root and not theirs:
            dataset = root
        category = category.replace(",", "_")
        return dataset if category == dataset else f"{dataset}_{category}"

    @property
    def packed_name(self) -> str:
        """Return the folder of the packed data set, independent of the images' place."""
        category = self.category or paths.absolute(self.dataset.root).name
        return f"{self.dataset.name}_{category}"

    @property
    def is_sweep(self) -> bool:
        """Return whether this is more than one run: of several categories, or repeated."""
        return self.category == ALL or "," in self.category or self.repeats > 1


# Groups of settings that scores depend on. Others state places and further outputs.
_SCORES = ("image", "model", "map", "score")
# Those of them that statistics depend on.
FITTED = ("image", "model")


def validate(values: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """Validate a complete configuration.

    Args:
      values: a ConfigDict, or the nested mapping returned by `to_dict`.

    Returns:
      The same settings as frozen dataclasses.

    Raises:
      UserError: a setting is wrong; one line with its name, value and what is allowed.
    """
    return _validate(values, _HIGHEST_RGB)


def _validate(
    values: Mapping[str, Any] | ml_collections.ConfigDict, highest_rgb: float
) -> Config:
    """Validate, with the largest number allowed in `image.mean` and `image.std`."""
    checks.fields("config", values, Config)
    groups: Any = values  # not validated yet: any type
    dataset, image = groups["dataset"], groups["image"]
    model, map_, outputs = groups["model"], groups["map"], groups["outputs"]
    train, cache, threshold = groups["train"], groups["cache"], groups["threshold"]
    checks.fields("config.dataset", dataset, DatasetConfig)
    checks.fields("config.image", image, ImageConfig)
    checks.fields("config.model", model, ModelConfig)
    checks.fields("config.map", map_, MapConfig)
    checks.fields("config.score", groups["score"], ScoreConfig)
    checks.fields("config.threshold", threshold, ThresholdConfig)
    checks.fields("config.train", train, TrainConfig)
    checks.fields("config.metrics", groups["metrics"], MetricsConfig)
    checks.fields("config.outputs", outputs, OutputsConfig)
    checks.fields("config.cache", cache, CacheConfig)
    config = Config(
        category=_category(values["category"]),
        repeats=checks.integer("config.repeats", values["repeats"], 1, _MOST_REPEATS),
        dataset=DatasetConfig(
            name=checks.one_of("config.dataset.name", dataset["name"], LAYOUTS),
            root=checks.path("config.dataset.root", dataset["root"]),
            source=checks.one_of("config.dataset.source", dataset["source"], SOURCES),
            tfds_dir=checks.optional_path("config.dataset.tfds_dir", dataset["tfds_dir"]),
            train_images=checks.integer(
                "config.dataset.train_images", dataset["train_images"], 0, checks.MOST_SEED
            ),
            seed=checks.integer("config.dataset.seed", dataset["seed"], 0, checks.MOST_SEED),
            skip_bad=checks.flag("config.dataset.skip_bad", dataset["skip_bad"]),
            exclude=_exclude(dataset["exclude"]),
            inverted_masks=checks.one_of(
                "config.dataset.inverted_masks", dataset["inverted_masks"], INVERTED_MASKS
            ),
        ),
        image=ImageConfig(
            resize=_size("config.image.resize", image["resize"]),
            method=checks.one_of("config.image.method", image["method"], METHODS),
            crop=_crop(image["crop"]),
            mean=checks.rgb("config.image.mean", image["mean"], 0.0, highest_rgb),
            std=checks.rgb("config.image.std", image["std"], _LEAST_STD, highest_rgb),
            rotation=checks.within("config.image.rotation", image["rotation"], 0.0, 180.0),
            crop_at=checks.one_of("config.image.crop_at", image["crop_at"], CROPS),
            seed=checks.integer("config.image.seed", image["seed"], 0, checks.MOST_SEED),
            range=_range(image["range"]),
        ),
        model=ModelConfig(
            backbone=checks.one_of(
                "config.model.backbone", model["backbone"], backbones.BACKBONES
            ),
            layers=_layers(model["layers"], model["backbone"]),
            weights=checks.text("config.model.weights", model["weights"]),
            channels=checks.integer(
                "config.model.channels", model["channels"], 1, checks.MOST_SEED
            ),
            seed=checks.integer("config.model.seed", model["seed"], 0, checks.MOST_SEED),
            reduction=checks.one_of("config.model.reduction", model["reduction"], REDUCTIONS),
            pooling=_pooling(model["pooling"]),
            upsample=checks.one_of(
                "config.model.upsample", model["upsample"], STAGE_UPSAMPLINGS
            ),
            precision=cast(
                backbones.Precision,
                checks.one_of("config.model.precision", model["precision"], PRECISIONS),
            ),
            regularization=checks.within(
                "config.model.regularization",
                model["regularization"],
                MIN_REGULARIZATION,
                checks.MOST,
            ),
            statistics=checks.one_of(
                "config.model.statistics", model["statistics"], STATISTICS
            ),
            shift=checks.integer("config.model.shift", model["shift"], 0, _MOST_SHIFT),
        ),
        map=MapConfig(
            upsample=checks.one_of("config.map.upsample", map_["upsample"], UPSAMPLINGS),
            sigma=checks.within("config.map.sigma", map_["sigma"], 0.0, float(_MOST_PIXELS)),
        ),
        score=ScoreConfig(
            image=checks.one_of("config.score.image", groups["score"]["image"], IMAGE_SCORES)
        ),
        threshold=ThresholdConfig(
            normal=checks.one_of("config.threshold.normal", threshold["normal"], THRESHOLDS),
            groups=_groups(threshold["groups"]),
            held_out=checks.fraction("config.threshold.held_out", threshold["held_out"]),
            image_rate=checks.within(
                "config.threshold.image_rate", threshold["image_rate"], 0.0, _HIGHEST_RATE
            ),
            pixel_rate=checks.within(
                "config.threshold.pixel_rate", threshold["pixel_rate"], 0.0, _HIGHEST_RATE
            ),
        ),
        batch_size=checks.integer("config.batch_size", values["batch_size"], 1, _MOST_IMAGES),
        train=TrainConfig(
            checkpoint_every=checks.within(
                "config.train.checkpoint_every",
                train["checkpoint_every"],
                0.0,
                checks.MOST_SECONDS,
            )
        ),
        metrics=MetricsConfig(
            resolution=checks.one_of(
                "config.metrics.resolution", groups["metrics"]["resolution"], RESOLUTIONS
            )
        ),
        outputs=OutputsConfig(
            figures=checks.one_of("config.outputs.figures", outputs["figures"], FIGURES),
            maps=checks.one_of("config.outputs.maps", outputs["maps"], MAPS),
            report=checks.flag("config.outputs.report", outputs["report"]),
        ),
        cache=CacheConfig(
            dir=checks.optional_path("config.cache.dir", cache["dir"]),
            images_gb=checks.within(
                "config.cache.images_gb", cache["images_gb"], 0.0, checks.MOST
            ),
            compilation=checks.flag("config.cache.compilation", cache["compilation"]),
        ),
    )
    config = _keep_all(config)
    _check_together(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as nested JSON values, which `validate` reads."""
    return _plain(dataclasses.asdict(config))


def to_stored(config: Config) -> dict[str, Any]:
    """Return the configuration of a stored model as JSON, which `restore` reads.

    Like `to_dict`, without settings whose value makes no difference to versions before them:
    those versions can then read the model, too.
    """
    return _without_later(to_dict(config), type(config))


def restore(stored: Any, version: Any) -> Config:
    """Return the configuration of a stored model, of any version of this program.

    Settings added later take the value that makes no difference. Unknown settings are ignored
    if scores do not depend on them. Ranges narrowed later do not apply; see `implausible`.

    Args:
      stored: result of `to_stored`.
      version: version of padim_jax that wrote the model, for messages.

    Returns:
      The configuration.

    Raises:
      UnknownSettingError: an unknown setting that scores may depend on.
      UserError: a setting is wrong.
    """
    values = _complete("config", stored, Config, defaults.get_config().to_dict(), version)
    return _validate(values, checks.MOST)


def implausible(config: Config) -> str:
    """Return a message about stored settings that would be rejected now; "" for none."""
    for name in ("mean", "std"):
        if max(value := getattr(config.image, name)) > _HIGHEST_RGB:
            return (
                f"fitted with config.image.{name}={value}, which looks like values of 0..255, "
                "where pixels are numbers of 0..1: the backbone sees hardly any contrast. Fit "
                "again with these values divided by 255"
            )
    return ""


def resolve(config: Config | Overrides | None, stored: Config) -> Config:
    """Return the configuration to use a stored model with.

    Args:
      config: a complete configuration, used unchanged; or settings that replace some of the
        model's own; or None for the model's own.
      stored: the model's own.

    Returns:
      The configuration.

    Raises:
      UserError: a setting is unknown or wrong, or the settings are for several runs.
    """
    if config is None or isinstance(config, Config):
        return config or stored
    values = to_dict(stored)
    for name, value in config.items():
        group, _, field = name.rpartition(".")
        settings = values.get(group) if group else values
        if not isinstance(settings, dict) or field not in settings:
            raise UserError(
                f"config.{name}: no such setting; padim_jax/config/defaults.py lists them"
            )
        settings[field] = value
    resolved = _validate(values, max(_HIGHEST_RGB, *stored.image.mean, *stored.image.std))
    if resolved.is_sweep:
        raise UserError(
            "config.category, config.repeats: several runs, and a stored model is of one; name "
            "one category and leave config.repeats at 1"
        )
    return resolved


def score_settings(config: Config, groups: Sequence[str] = _SCORES) -> dict[str, Any]:
    """Return the settings that scores depend on, by dotted names ("image.resize").

    Left out are weights, which count by their content, the form of the statistics, which agree
    up to rounding, seeds that nothing is drawn with, and later settings whose value makes no
    difference.

    Args:
      config: a configuration.
      groups: `FITTED` for only those that the statistics depend on.

    Returns:
      JSON values by name.
    """
    aside = {"model.weights", "model.statistics"}
    if not config.image.rotation and config.image.crop_at != "random":
        aside.add("image.seed")
    if config.model.reduction not in ("random", "semi_orthogonal"):
        aside.add("model.seed")
    stored = to_stored(config)
    found = {f"{g}.{name}": value for g in groups for name, value in stored.get(g, {}).items()}
    return {name: value for name, value in found.items() if name not in aside}


def with_absolute_paths(config: Config) -> Config:
    """Return the settings for use from any folder, as a checkpoint keeps them."""
    dataset, weights, cache = config.dataset, config.model.weights, config.cache
    if pathlib.Path(weights).suffix in backbones.WEIGHT_FILES:
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


def _without_later(values: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    kept = {}
    for field in dataclasses.fields(schema):
        value = values[field.name]
        if dataclasses.is_dataclass(field.type):
            value = _without_later(value, field.type)
            # A group added later, with nothing in it.
            if value or any(map(_is_first, dataclasses.fields(field.type))):
                kept[field.name] = value
        elif _is_first(field) or value != _plain(field.default):
            kept[field.name] = value
    return kept


def _is_first(field: dataclasses.Field) -> bool:
    """Return whether a setting is in all stored models."""
    return field.default is dataclasses.MISSING


def _complete(
    name: str, stored: Any, schema: Any, otherwise: Mapping[str, Any], version: Any
) -> dict[str, Any]:
    """Return a stored group with exactly the settings of this version."""
    checks.group(name, stored)
    known = {field.name: field for field in dataclasses.fields(schema)}
    needed = name.removeprefix("config.") in _SCORES
    unknown = sorted(set(stored) - set(known))
    if unknown and (needed or schema is Config):
        setting = f"{name}.{checks.one_line(str(unknown[0]))}"
        raise UnknownSettingError(
            f"{setting}={checks.shown(stored[unknown[0]])}: unknown to padim_jax "
            f"{padim_jax.__version__}, and scores may depend on it; padim_jax "
            f"{checks.one_line(str(version))} wrote it. Use that version or a later one"
        )
    values = {}
    for key, field in known.items():
        if dataclasses.is_dataclass(field.type):
            values[key] = _complete(
                f"{name}.{key}", stored.get(key, {}), field.type, otherwise[key], version
            )
        elif key in stored:
            values[key] = stored[key]
        elif not _is_first(field):
            values[key] = field.default
        elif not needed:
            values[key] = otherwise[key]
    return values


def _plain(value: Any) -> Any:
    """Return a setting as a JSON value."""
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _keep_all(config: Config) -> Config:
    """Set `channels` to all channels if there is no reduction."""
    model = config.model
    if model.reduction != "none":
        return config
    spec = backbones.BACKBONES[model.backbone]
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
    if config.score.image == "combined" and config.threshold.normal == "none":
        raise UserError(
            "config.score.image=combined: with config.threshold.normal=none there are no "
            "normal images to measure it by; use another of these, or max, top or band"
        )
    cache = config.cache
    if cache.images_gb and cache.dir and not isinstance(cache.dir, pathlib.Path):
        raise UserError(
            f"config.cache.dir={cache.dir}: decoded images are kept on this machine's disks "
            "only, from where they come faster than decoding takes. Name a folder there, or "
            "keep compiled programs alone: --config.cache.images_gb=0"
        )
    if config.model.weights == backbones.BUNDLED_WEIGHTS:
        backbones.require_bundled(config.model.backbone, config.model.layers)
    spec = backbones.BACKBONES[config.model.backbone]
    total = sum(map(spec.channels, config.model.layers))
    if config.model.channels > total:
        raise UserError(
            f"config.model.channels={config.model.channels}: {config.model.backbone} has "
            f"{total} channels in {', '.join(config.model.layers)}; expected 1 to {total}"
        )


def _range(value: Any) -> str | tuple[int, int]:
    if isinstance(value, str) and value in ("full", "train"):
        return value
    pair = tuple(value) if isinstance(value, tuple | list) else ()
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in pair)
    if len(pair) == 2 and whole and 0 <= pair[0] < pair[1] <= 65535:
        return pair
    raise UserError(
        f"config.image.range={checks.shown(value)}: expected full, train, or (low, high) with "
        "whole numbers 0 <= low < high <= 65535"
    )


def _category(value: Any) -> str:
    listed = list(value) if isinstance(value, tuple | list) else [value]
    if not listed or not all(isinstance(item, str) for item in listed):
        names: list[str] = [".."]  # not a name
    else:
        names = [name.strip() for item in listed for name in item.split(",")]
    # A category becomes part of paths; it must not lead out of the dataset's root.
    if any(name in (".", "..") or set(name) & set("/\\\0") for name in names):
        raise UserError(
            f"config.category={checks.shown(value)}: expected the name of one folder below "
            "config.dataset.root, without path separators; several with commas between, or all"
        )
    for name in names:
        if len(name.encode("utf-8", "surrogatepass")) > _LONGEST_NAME:
            raise UserError(
                f"config.category={checks.shown(value)}: expected a folder's name, of at most "
                f"{_LONGEST_NAME} bytes"
            )
    if len(names) > 1 and ("" in names or ALL in names or len(set(names)) < len(names)):
        raise UserError(
            f"config.category={checks.shown(value)}: expected different names with commas "
            "between, or all alone"
        )
    return ",".join(names)


def _groups(value: Any) -> str:
    expected = (
        "expected a regular expression that is found in each image's relative path, with at "
        "most one group in parentheses, as in '(part[0-9]+)_frame'; '' for images that are all "
        "independent"
    )
    found = f"config.threshold.groups={checks.shown(value)}: {expected}"
    if not isinstance(value, str) or len(value) > _LONGEST_PATTERN:
        raise UserError(found)
    try:
        if re.compile(value).groups > 1:
            raise UserError(found)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{found} ({error})") from error
    return value


def _exclude(value: Any) -> tuple[str, ...]:
    listed = isinstance(value, tuple | list)
    if not listed or not all(isinstance(name, str) and name for name in value):
        raise UserError(
            f"config.dataset.exclude={checks.shown(value)}: expected relative paths of "
            "training images, as in \"('train/good/007.png',)\""
        )
    return tuple(value)


def _pooling(value: Any) -> int:
    number = isinstance(value, int) and not isinstance(value, bool)
    if not number or not 1 <= value <= _MOST_CELLS or value % 2 == 0:
        raise UserError(
            f"config.model.pooling={checks.shown(value)}: expected an odd number of cells up "
            f"to {_MOST_CELLS}, as in 3 for a neighbourhood of 3x3; 1 is the cell itself"
        )
    return value


def _size(name: str, value: Any) -> Size:
    if isinstance(value, tuple | list) and len(value) == 2:
        height, width = (
            n if isinstance(n, int) and not isinstance(n, bool) else 0 for n in value
        )
        if min(height, width) >= backbones.MIN_INPUT and max(height, width) <= _MOST_PIXELS:
            return height, width
    raise UserError(
        f"{name}={checks.shown(value)}: expected (height, width) in pixels, each at least "
        f"{backbones.MIN_INPUT} and at most {_MOST_PIXELS}, as in '(256, 256)'"
    )


def _crop(value: Any) -> Size | None:
    # On the command line `None` arrives as a tuple of one None.
    if value is None or (isinstance(value, tuple | list) and tuple(value) in [(None,), ()]):
        return None
    return _size("config.image.crop", value)


def _layers(value: Any, backbone: str) -> tuple[str, ...]:
    stages = backbones.BACKBONES[backbone].stages
    if isinstance(value, tuple | list) and value:
        layers = tuple(checks.one_of("config.model.layers", item, stages) for item in value)
        if layers == tuple(stage for stage in stages if stage in layers):
            return layers
    raise UserError(
        f"config.model.layers={checks.shown(value)}: expected one or more of "
        f"{', '.join(stages)} (the stages of {backbone}), shallowest first, each once, as in "
        f"{stages[:2]}"
    )
