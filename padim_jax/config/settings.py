'''All settings: default, allowed values and meaning of each, and conditions on several.

To add a setting, add a field with a text below it to the dataclass of its group:

    shift: int = setting(0, Integer(0, 8), later=0)
    """Number of cells that a patch may be displaced by; 0 for none."""

Configuration files, the command line, validation and the documentation follow from it. The
field goes last in its dataclass, and has a `later` value, which leaves scores as they were
before the setting existed, whatever its default is. Models stored without it are read with that
value (`restore`), and at that value it is neither stored (`to_stored`) nor part of a model's
fingerprint (`score_settings`). A new group is declared as `metrics` is, and goes into `_SCORES`
if scores depend on it. A condition on several settings goes into `_check_together`.

Upper bounds are far above useful values; beyond, memory or time would run out first. This
module imports neither JAX nor TensorFlow Datasets, so that a wrong setting is reported before
anything slow.
'''

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

import ml_collections
from ml_collections import config_dict

import padim_jax
from padim_jax.config import backbones, checks, schema
from padim_jax.config.checks import (
    MOST,
    MOST_SECONDS,
    MOST_SEED,
    RGB,
    Integer,
    Number,
    OneOf,
    wrong,
)
from padim_jax.config.datasets import LAYOUTS, MVTEC_AD
from padim_jax.config.schema import setting
from padim_jax.errors import UserError
from padim_jax.system import paths

ALL = "all"  # config.category: one run after the other
_LONGEST_NAME = 255  # of a folder, in bytes, on all file systems
_LONGEST_PATTERN = 1000
_MOST_COUNTS = 65535  # of a pixel in a file
_HIGHEST_RGB = 1.0  # in mean and std; models of earlier versions may have more
_SIDES = (backbones.MIN_INPUT, 16384)  # of an image, in pixels

Size = tuple[int, int]
# Values that become 0 and 255: the limits of the type, or two in the file's own counts.
Range = Literal["full"] | tuple[int, int]
Overrides = Mapping[str, Any]  # values by dotted names ("outputs.figures")


class UnknownSettingError(UserError):
    """A stored model has a setting unknown to this version that scores may depend on."""


def _category(name: str, value: Any) -> str:
    listed = list(value) if isinstance(value, tuple | list) else [value]
    if not listed or not all(isinstance(item, str) for item in listed):
        names: list[str] = [".."]  # not a name
    else:
        names = [part.strip() for item in listed for part in item.split(",")]
    # A category becomes part of paths; it must not lead out of the dataset's root.
    if any(part in (".", "..") or set(part) & set("/\\\0") for part in names):
        raise wrong(
            name,
            value,
            "the name of one folder below config.dataset.root, without path separators; "
            "several with commas between, or all",
        )
    if any(len(part.encode("utf-8", "surrogatepass")) > _LONGEST_NAME for part in names):
        raise wrong(name, value, f"a folder's name, of at most {_LONGEST_NAME} bytes")
    if len(names) > 1 and ("" in names or ALL in names or len(set(names)) < len(names)):
        raise wrong(name, value, "different names with commas between, or all alone")
    return ",".join(names)


def _exclude(name: str, value: Any) -> tuple[str, ...]:
    listed = isinstance(value, tuple | list)
    if not listed or not all(isinstance(item, str) and item for item in value):
        example = "\"('train/good/007.png',)\""
        raise wrong(name, value, f"relative paths of training images, as in {example}")
    return tuple(value)


def _range(name: str, value: Any) -> str | tuple[int, int]:
    if isinstance(value, str) and value in ("full", "train"):
        return value
    pair = tuple(value) if isinstance(value, tuple | list) else ()
    whole = all(map(checks.is_integer, pair))
    if len(pair) == 2 and whole and 0 <= pair[0] < pair[1] <= _MOST_COUNTS:
        return pair
    numbers = f"(low, high) with whole numbers 0 <= low < high <= {_MOST_COUNTS}"
    raise wrong(name, value, f"full, train, or {numbers}")


def _layers(name: str, value: Any, backbone: str) -> tuple[str, ...]:
    stages = backbones.BACKBONES[backbone].stages
    if isinstance(value, tuple | list) and value:
        layers = tuple(OneOf(stages)(name, item) for item in value)
        if layers == tuple(stage for stage in stages if stage in layers):
            return layers
    raise wrong(
        name,
        value,
        f"one or more of {', '.join(stages)} (the stages of {backbone}), shallowest first, "
        f"each once, as in {stages[:2]}",
    )


def _groups(name: str, value: Any) -> str:
    expected = (
        "a regular expression that is found in each image's relative path, with at most one "
        "group in parentheses, as in '(part[0-9]+)_frame'; '' for images that are all "
        "independent"
    )
    if not isinstance(value, str) or len(value) > _LONGEST_PATTERN:
        raise wrong(name, value, expected)
    try:
        if re.compile(value).groups > 1:
            raise wrong(name, value, expected)
    except (re.error, RecursionError, OverflowError) as error:
        raise wrong(name, value, f"{expected} ({error})") from error
    return value


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """Source of the images."""

    name: str = setting("mvtec_ad", OneOf(LAYOUTS))
    """Folder layout; see `docs/datasets.md`."""

    root: paths.Path = setting("data/mvtec_ad", checks.path)
    """Folder that holds the category folders."""

    source: str = setting("folder", OneOf(("folder", "tfds")))
    """`folder`: read the files in place. `tfds`: pack them once into array_record files below
    `tfds_dir` and read those. Results are identical."""

    tfds_dir: paths.Path | None = setting("", checks.optional_path)
    """Folder of packed datasets; `""` for TensorFlow Datasets' default, `$TFDS_DATA_DIR` or
    `~/tensorflow_datasets`."""

    train_images: int = setting(0, Integer(0, MOST_SEED))
    """Maximum number of training images, drawn with `dataset.seed`; 0 for all."""

    seed: int = setting(0, Integer(0, MOST_SEED))
    """Seed of draws from a dataset: `train_images`, `threshold.held_out`, and the split of
    datasets that are published without one."""

    skip_bad: bool = setting(False, checks.flag)
    """Leave unreadable images out and list them in the results, instead of ending the run
    (`docs/bad_inputs.md`). A separate pass finds them."""

    exclude: tuple[str, ...] = setting((), _exclude, later=())
    """Training images to leave out, such as those in suspects.csv, by the paths given there:
    `("train/good/007.png",)`. They are relative to the category's or root folder."""

    inverted_masks: str = setting("check", OneOf(("check", "no", "yes")), later="check")
    """Defect pixels of a mask. `no`: those that are not 0. `yes`: those that are 0. `check`:
    those that are not 0, but an error if they cover more than half of the image in more than a
    tenth of the masks, as in inverted masks; `no` is for data with defects that large."""


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Preprocessing of images for the backbone; sizes are (height, width)."""

    resize: Size = setting((256, 256), checks.Size(*_SIDES))
    """Size that all images are resized to, whatever their aspect ratio."""

    method: str = setting("bilinear", OneOf(("nearest", "bilinear", "bicubic", "lanczos")))
    """Pillow's filter for resizing."""

    crop: Size | None = setting(
        lambda _: config_dict.placeholder(tuple),
        checks.Size(*_SIDES, optional=True),
    )
    """Size of the crop after resizing, at most `resize`; None for no crop."""

    mean: tuple[float, float, float] = setting(
        (0.485, 0.456, 0.406), RGB(0.0, _HIGHEST_RGB), earlier=RGB(0.0, MOST)
    )
    """Mean of each channel (red, green, blue) that the backbone was trained with, of pixel
    values in 0..1: ImageNet's. Divide values of 0..255 by 255."""

    # float32 divides by it.
    std: tuple[float, float, float] = setting(
        (0.229, 0.224, 0.225), RGB(1e-6, _HIGHEST_RGB), earlier=RGB(1e-6, MOST)
    )
    """Standard deviation of each channel, likewise."""

    rotation: float = setting(0.0, Number(0.0, 180.0))
    """Largest angle in degrees, in either direction, of the random rotation of each image
    before cropping, in training and evaluation; 0 for none."""

    crop_at: str = setting("centre", OneOf(("centre", "random")))
    """Position of the crop: in the centre, or random for each image, in training and
    evaluation (the paper's Rd-MVTec AD)."""

    seed: int = setting(0, Integer(0, MOST_SEED))
    """Seed of random angles and crops."""

    range: str | tuple[int, int] = setting(
        lambda _: config_dict.FieldReference("full", field_type=object), _range, later="full"
    )
    """Pixel values of a file that become 0 and 255. `full`: the limits of 8 or 16 bits. (low,
    high): these two; values outside are clipped. `train`: the 0.1 and 99.9
    percentiles of all training pixels, which the fit determines and stores. For images that use
    a part of 16 bits (thermal images, 12-bit cameras); not for colours of 16 bits."""

    roi: str | tuple[Any, ...] = setting(
        lambda _: config_dict.FieldReference("", field_type=object), checks.roi, later=""
    )
    """Region of interest: the part of the image that is modelled and scored (`docs/roi.md`).
    The path of a mask image (0 outside), a box (left, top, right, bottom) or a polygon ((x, y),
    (x, y), (x, y), ...), in pixels of the original image; `""` for the whole image. A fit
    stores the pixels, and needs the file no more."""

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

    backbone: str = setting("resnet18", OneOf(backbones.BACKBONES))
    """Network that computes the features: a ResNet, efficientnet_b5, or `scattering`, fixed
    filters that need no weights."""

    layers: tuple[str, ...] = setting(
        ("layer1", "layer2", "layer3"), _layers, depends_on="backbone"
    )
    """Stages whose feature maps form the embedding, shallowest first: of layer1 to layer4; for
    efficientnet_b5 of block7, block20 and block26."""

    weights: str = setting(
        lambda model: model.get_ref("backbone") + backbones.DEFAULT_WEIGHTS, checks.text
    )
    """Weights of the backbone; the default follows `backbone`. One of

    - a name: `<backbone>.tv_in1k` or `<backbone>.tv2_in1k`, torchvision's first and second
      ImageNet weights, or `efficientnet_b5.sw_in12k_ft_in1k`; downloaded once from the Hugging
      Face hub. A suffix `@REVISION` selects another commit than the pinned one;
    - a .safetensors, .npz or .pth file;
    - `random`;
    - `none`, for `scattering`, whose filters are fixed: lower accuracy than ImageNet's, but no
      download and none of its terms."""

    channels: int = setting(100, Integer(0, MOST_SEED))
    """Number of the stages' channels that are kept, drawn at random unless `reduction` says
    otherwise; 0 for all of them. The paper uses 100 of 448 for resnet18, and 550 of 1792 for
    wide_resnet50_2."""

    seed: int = setting(42, Integer(0, MOST_SEED))
    """Seed of the draw of channels: `random.Random(seed).sample`, as in the PyTorch
    projects."""

    reduction: str = setting("random", OneOf(("random", "pca", "semi_orthogonal", "none")))
    """Reduction of the stages' channels. `random`: draw `channels` of them. `none`: keep all,
    whatever `channels` is. `semi_orthogonal`: `channels` random orthonormal mixtures of all
    (Kim et al. 2021). `pca`: the `channels` principal components of the normal patches."""

    pooling: int = setting(1, checks.Odd(63))
    """Side of the square of cells that each stage's features are averaged over."""

    upsample: str = setting("nearest", OneOf(("nearest", "bilinear")))
    """Upsampling of deeper stages to the first one's grid; nearest as published."""

    precision: backbones.Precision = setting("tf32", OneOf(get_args(backbones.Precision)))
    """Arithmetic of the backbone. `tf32` is float32 on CPUs, and PyTorch's default on NVIDIA
    GPUs. Statistics and distances are always float32."""

    # Below, float32 cannot distinguish the covariance of features from a singular one.
    regularization: float = setting(0.01, Number(1e-4, MOST))
    """Added to the covariance's diagonal: the paper's epsilon."""

    statistics: str = setting("auto", OneOf(("auto", "moments", "samples")))
    """What is kept of the normal images. `moments`: mean and covariance. `samples`: the
    embeddings themselves, smaller for few images. `auto`: the smaller of both. Results agree up
    to rounding."""

    shift: int = setting(0, Integer(0, 8), later=0)
    """Tolerance to displaced parts, in patches. Each patch is compared with the Gaussians of
    all patches this near, in rows and in columns, and gets the smallest distance. 1 multiplies
    the work of the distances by about 9."""


@dataclasses.dataclass(frozen=True)
class MapConfig:
    """Conversion of patch distances to anomaly maps."""

    upsample: str = setting("bilinear", OneOf(("bilinear", "bicubic")))
    """Interpolation of patch distances to the input's size."""

    sigma: float = setting(4.0, Number(0.0, 16384.0))
    """Standard deviation of the Gaussian blur, in pixels of the input; 0 for none."""


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """Scores of images."""

    image: str = setting(
        "max", OneOf(("max", "top", "band", "variation", "combined")), later="max"
    )
    """Summary of an anomaly map that is the image's score. `max`: its maximum, as published.
    `top`: the mean of its highest 1 %. `band`: the standard deviation of the distances between
    blurs of 1 and of 10 patches. `variation`: the total variation of the map, its mean absolute
    change from patch to patch. `combined`: `top`, `band`, `variation` and the standard
    deviation of the map together, each measured in what the normal images of the thresholds
    show; needs these."""


@dataclasses.dataclass(frozen=True)
class ThresholdConfig:
    """Thresholds from normal images alone, and calibrated scores."""

    normal: str = setting("auto", OneOf(("auto", "leave_one_out", "held_out", "none")))
    """Normal images to use. `leave_one_out`: each training image as scored by the model without
    it. `held_out`: images that are not fitted, the dataset's validation images, or a part of
    the training images if there are none. `auto`: validation images if there are any, else
    leave_one_out."""

    groups: str = setting("", _groups)
    """Groups of images that belong together, such as frames of one part: a regular expression
    that is found in each image's relative path. Its match, or the match of its parentheses,
    names the group. Groups are left out and held out as a whole, and promises count groups
    instead of images. `""` if all images are independent."""

    held_out: float = setting(0.2, Number(0.0, 1.0, inside=True))
    """Fraction of the training images that `held_out` keeps back, where the dataset has no
    validation images."""

    image_rate: float = setting(0.0, Number(0.0, 0.9999))
    """Fraction of normal images that may be called anomalous. 0: 1 %, or 1 / (n + 1) if n
    images (or groups) promise no less. Other rates that cannot be promised are extrapolated."""

    pixel_rate: float = setting(0.0, Number(0.0, 0.9999))
    """Fraction of the pixels of normal images that may be outlined. 0: the pixel threshold is
    such that at most `image_rate` of normal images have any outline."""


@dataclasses.dataclass(frozen=True)
class RegionsConfig:
    """Regions of anomaly maps above the pixel threshold, in pixels of the original image."""

    min_area: float = setting(0.0, Number(0.0, 1e9), later=0.0)
    """Smallest area of a region; smaller ones do not count."""

    close: float = setting(0.0, Number(0.0, 65536.0), later=0.0)
    """Longest gap between parts of one region."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Progress of a fit; nothing here changes its result."""

    checkpoint_every: float = setting(300.0, Number(0.0, MOST_SECONDS))
    """Seconds between saves of an unfinished fit, which resumes from the last one after an
    interruption; 0 saves after each batch."""


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """Comparison of anomaly maps with masks."""

    resolution: str = setting("model", OneOf(("model", "full")), later="model")
    """Size at which they are compared. `model`: masks are resized (nearest) and cropped like
    the images, as for published numbers; a small defect may vanish, with a warning. `full`:
    maps are resized to each mask (bilinear), so that all defects count; pixels outside the crop
    are excluded."""


@dataclasses.dataclass(frozen=True)
class OutputsConfig:
    """Outputs besides metrics and scores."""

    figures: str = setting("some", OneOf(("none", "some", "all")))
    """Five-panel pictures of test images; `some` for the best and worst scored of each defect
    type."""

    maps: str = setting("none", OneOf(("none", "npy", "tiff")))
    """Raw anomaly maps, one file per image, float32. `--mode=predict` always writes them; as
    tiff for `none`."""

    report: bool = setting(True, checks.flag)
    """Write report.html: all results of an evaluation on one page."""

    coco: bool = setting(False, checks.flag, later=False)
    """Write the regions of predictions as regions.coco.json, too: annotations as COCO has
    them."""


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """Caches between runs, for speed alone; they may be deleted at any time."""

    dir: paths.Path | None = setting("", checks.optional_path)
    """Folder of the caches; `""` for `$XDG_CACHE_HOME/padim_jax` or `~/.cache/padim_jax`."""

    images_gb: float = setting(4.0, Number(0.0, MOST))
    """Maximum size in gigabytes (10^9 bytes) of decoded and resized images, of which the least
    recently used are removed first; 0 keeps none."""

    compilation: bool = setting(True, checks.flag)
    """Keep programs compiled by XLA."""

    @property
    def folder(self) -> paths.Path:
        """Return the folder of the caches: `dir`, or padim_jax in the user's cache folder.

        Raises:
          UserError: there is no such folder, since the user has no home.
        """
        if self.dir is not None:
            return self.dir
        # A relative path is to be ignored (XDG Base Directory Specification).
        xdg = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
        try:
            base = xdg if xdg.is_absolute() else pathlib.Path("~/.cache").expanduser()
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

    category: str = setting("bottle", _category)
    """Folder below `dataset.root`: one of the dataset's, or your own; `""` if there is none.
    `all`, or names separated by commas: one run after the other, with a table of all."""

    repeats: int = setting(1, Integer(1, 1000))
    """Runs of each category. `model.seed`, and `image.seed` for random crops and rotations,
    increase by 1 from run to run; the table then has means and standard deviations."""

    dataset: DatasetConfig = schema.group()
    image: ImageConfig = schema.group()
    model: ModelConfig = schema.group()
    map: MapConfig = schema.group()
    threshold: ThresholdConfig = schema.group()
    batch_size: int = setting(32, Integer(1, 65536))
    """Images per step, on all devices together; bounds memory, does not change results."""

    train: TrainConfig = schema.group()
    outputs: OutputsConfig = schema.group()
    cache: CacheConfig = schema.group()
    metrics: MetricsConfig = MetricsConfig()
    score: ScoreConfig = ScoreConfig()
    regions: RegionsConfig = RegionsConfig()
    decide: str = setting("score", OneOf(("score", "regions", "either")), later="score")
    """What makes an image anomalous. `score`: a score from the image threshold on. `regions`: a
    region from the pixel threshold on. `either`: one or the other. Thresholds are found for
    this, so that at most `threshold.image_rate` of normal images are called anomalous by it."""

    @property
    def title(self) -> str:
        """Return dataset and category in one word, as in the default workdir's name.

        Without a category the root's own name distinguishes one part's folder from another's;
        images in MVTec AD's layout that are not MVTec AD's have the root's name instead of the
        dataset's.
        """
        root, dataset = paths.absolute(self.dataset.root).name, self.dataset.name
        category = self.category or root
        if category == ALL:
            is_mvtec = "mvtec" in root.lower()
        else:
            is_mvtec = all(name in MVTEC_AD for name in category.split(","))
        if dataset == "mvtec_ad" and root and not is_mvtec:
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
# Those of them that statistics depend on, and what they do not depend on in there.
_FITTED, _SCORED_ALONE = ("image.", "model."), ("model.shift",)


def validate(
    values: Mapping[str, Any] | ml_collections.ConfigDict, *, earlier: bool = False
) -> Config:
    """Validate a complete configuration.

    Args:
      values: a ConfigDict, or the nested mapping returned by `to_dict`.
      earlier: whether to allow what earlier versions allowed.

    Returns:
      The same settings as frozen dataclasses.

    Raises:
      UserError: a setting is wrong; one line with its name, value and what is allowed.
    """
    config = _keep_all(_without_weights(schema.build(Config, values, earlier=earlier)))
    _check_together(config)
    return config


def _without_weights(config: Config) -> Config:
    """Set `weights` to "none" where the backbone has none."""
    model = config.model
    if model.backbone not in backbones.SCATTERING:
        return config
    if model.weights not in (backbones.NO_WEIGHTS, model.backbone + backbones.DEFAULT_WEIGHTS):
        raise UserError(
            f"config.model.weights={model.weights!r}: {model.backbone} has fixed filters "
            f"and no weights; leave it out, or at {backbones.NO_WEIGHTS!r}"
        )
    model = dataclasses.replace(model, weights=backbones.NO_WEIGHTS)
    return dataclasses.replace(config, model=model)


def _keep_all(config: Config) -> Config:
    """Set `channels` to all channels where all are kept."""
    model = config.model
    if model.channels and model.reduction != "none":
        return config
    reduction = "none" if model.reduction == "random" else model.reduction
    model = dataclasses.replace(model, channels=_total_channels(model), reduction=reduction)
    return dataclasses.replace(config, model=model)


def _total_channels(model: ModelConfig) -> int:
    return sum(map(backbones.BACKBONES[model.backbone].channels, model.layers))


def _check_together(config: Config) -> None:
    """Check conditions on several settings, or raise UserError."""
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
    if config.image.roi and (config.image.rotation or config.image.crop_at == "random"):
        raise UserError(
            "config.image.roi: with random rotations or crops (config.image.rotation, "
            "config.image.crop_at) a place on the image is another patch each time; use one or "
            "the other"
        )
    if config.image.roi and config.model.reduction == "pca":
        raise UserError(
            "config.image.roi: config.model.reduction=pca takes its components from whole "
            "images; use random or semi_orthogonal"
        )
    cache = config.cache
    if cache.images_gb and cache.dir and not isinstance(cache.dir, pathlib.Path):
        raise UserError(
            f"config.cache.dir={cache.dir}: decoded images are kept on this machine's disks "
            "only, from where they come faster than decoding takes. Name a folder there, or "
            "keep compiled programs alone: --config.cache.images_gb=0"
        )
    if config.score.image == "combined" and config.threshold.normal == "none":
        raise UserError(
            "config.score.image=combined: with config.threshold.normal=none there are no "
            "normal images to measure it by; use another of these, or another score"
        )
    if config.decide != "score" and config.threshold.pixel_rate:
        raise UserError(
            f"config.decide={config.decide}: with config.threshold.pixel_rate="
            f"{config.threshold.pixel_rate:g} the pixel threshold promises nothing of images; "
            "leave it at 0, or decide by the score"
        )
    model = config.model
    if model.channels > (total := _total_channels(model)):
        raise UserError(
            f"config.model.channels={model.channels}: {model.backbone} has {total} channels in "
            f"{', '.join(model.layers)}; expected 1 to {total}"
        )


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as nested JSON values, which `validate` reads."""
    return schema.to_json(config)


def to_stored(config: Config) -> dict[str, Any]:
    """Return the configuration of a stored model as JSON, which `restore` reads.

    Like `to_dict`, without settings whose value makes no difference to versions before them:
    those versions can then read the model, too.
    """
    return _without_later(config)


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
    defaults = schema.defaults(Config).to_dict()
    values = _complete("config", stored, Config, defaults, version)
    config = validate(values, earlier=True)
    if config.image.roi and not checks.is_runs(config.image.roi):  # a file of the reader's own
        raise wrong("config.image.roi", config.image.roi, "run lengths, as fits store them")
    return config


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
                f"config.{name}: no such setting; padim_jax/config/settings.py lists them"
            )
        settings[field] = value
    resolved = validate(values, earlier=bool(implausible(stored)))
    if resolved.is_sweep:
        raise UserError(
            "config.category, config.repeats: several runs, and a stored model is of one; name "
            "one category and leave config.repeats at 1"
        )
    return resolved


def score_settings(config: Config) -> dict[str, Any]:
    """Return the settings that scores depend on, by dotted names ("image.resize").

    Left out are weights, which count by their content, the form of the statistics, which agree
    up to rounding, seeds that nothing is drawn with, and later settings whose value makes no
    difference.

    Args:
      config: a configuration.

    Returns:
      JSON values by name.
    """
    aside = {"model.weights", "model.statistics"}
    if not config.image.rotation and config.image.crop_at != "random":
        aside.add("image.seed")
    if config.model.reduction not in ("random", "semi_orthogonal"):
        aside.add("model.seed")
    stored = to_stored(config)
    settings = {
        f"{group}.{name}": value
        for group in _SCORES
        for name, value in stored.get(group, {}).items()  # none of a group added later
    }
    return {name: value for name, value in settings.items() if name not in aside}


def fitted_settings(config: Config) -> dict[str, Any]:
    """Return those of `score_settings` that statistics depend on.

    Others can differ between a model and its use.

    Args:
      config: a configuration.

    Returns:
      JSON values by name.
    """
    return {
        name: value
        for name, value in score_settings(config).items()
        if name.startswith(_FITTED) and name not in _SCORED_ALONE
    }


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


def _without_later(group: Any) -> dict[str, Any]:
    """Return a group as JSON values, without later settings at their `later` value."""
    kept = {}
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if value != field.default:
            is_group = schema.is_group(field)
            kept[field.name] = _without_later(value) if is_group else schema.to_json(value)
    return kept


def _complete(
    name: str, stored: Any, group: Any, defaults: Mapping[str, Any], version: Any
) -> dict[str, Any]:
    """Return a stored group with exactly the settings of this version."""
    schema.require_group(name, stored)
    fields = {field.name: field for field in dataclasses.fields(group)}
    needed = name.removeprefix("config.") in _SCORES
    unknown = sorted(set(stored) - set(fields))
    if unknown and (needed or group is Config):
        setting = f"{name}.{checks.one_line(str(unknown[0]))}"
        raise UnknownSettingError(
            f"{setting}={checks.shown(stored[unknown[0]])}: unknown to padim_jax "
            f"{padim_jax.__version__}, and scores may depend on it; padim_jax "
            f"{checks.one_line(str(version))} wrote it. Use that version or a later one"
        )
    values = {}
    for key, field in fields.items():
        if schema.is_group(field):
            part, path = stored.get(key, {}), f"{name}.{key}"
            values[key] = _complete(path, part, field.type, defaults[key], version)
        elif key in stored:
            values[key] = stored[key]
        elif field.default is not dataclasses.MISSING:
            values[key] = field.default
        elif not needed:
            values[key] = defaults[key]
    return values
