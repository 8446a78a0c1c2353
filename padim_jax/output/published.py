"""Published results of PaDiM, and how their settings differ from a run's.

The results are stored in third_party/published_results.json with source, settings and the date
they were read.
"""

import dataclasses
import functools
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

from padim_jax.config import backbones
from padim_jax.config.settings import Config

AVERAGE = "Avg"

# Training and test images of each category, in MVTec AD as distributed (Bergmann et al., CVPR
# 2019, table 1): the published results are for all of them.
IMAGES = {
    "carpet": (280, 117), "grid": (264, 78), "leather": (245, 124), "tile": (230, 117),
    "wood": (247, 79), "bottle": (209, 83), "cable": (224, 150), "capsule": (219, 132),
    "hazelnut": (391, 110), "metal_nut": (220, 115), "pill": (267, 167), "screw": (320, 160),
    "toothbrush": (60, 42), "transistor": (213, 100), "zipper": (240, 151),
}  # fmt: skip

# Metrics of the published tables, in their order, by their keys in metrics.json.
METRICS = {
    "image_auroc": "image AUROC",
    "pixel_auroc": "pixel AUROC",
    "image_f1_max": "image F1-max",
    "aupro": "AUPRO 0.3",
    "pixel_ap": "pixel AP",
}

# Differences up to this are explained by rounding and another draw of the channels.
#
# Rounding to three decimals: 0.0005. Draws: for bottle (ResNet-18, seeds 42 to 49) the standard
# deviations over seeds are 0.0019, 0.0011, 0.0064, 0.0032 and 0.015. Other categories spread
# about 3 times as much as this easy one: between xiahaifeng1995's and the paper's pixel AUROC,
# measured alike up to seed and resampling, the 15 differences have a root mean square of
# 0.0049, which gives 0.0035 per draw. A difference of two draws stays within 2 sqrt(2) times
# that: 0.0005 + 3 * 2.8 * 0.0011 = 0.01 for pixel AUROC, and likewise for each, rounded up.
TOLERANCE = {
    "image_auroc": 0.02,
    "pixel_auroc": 0.01,
    "image_f1_max": 0.06,
    "aupro": 0.03,
    "pixel_ap": 0.15,
}

# Results for one of these views say nothing about another: the images differ.
_VIEWS = {"image.rotation": 0.0, "image.crop_at": "centre"}
_UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Published:
    """One source's results for one backbone.

    Attributes:
      name: short name, for a column's heading; several names if their results agree.
      source: publication or page that states the results.
      url: URL of the source; of the first one of several.
      read: date of reading, ISO.
      note: what is known about the measurement, besides `settings`.
      backbone: as in config.model.backbone.
      settings: known settings by dotted name.
      values: by key of metrics.json, then by category or `AVERAGE`; fractions, rounded to three
        decimals.
    """

    name: str
    source: str
    url: str
    read: str
    note: str
    backbone: str
    settings: Mapping[str, Any]
    values: Mapping[str, Mapping[str, float]]


def applicable(config: Config) -> tuple[Published, ...]:
    """Return the published results that a run may be compared with.

    They were measured with ImageNet weights on MVTec AD; runs with other weights, data,
    backbone or random views of the images than the source's are not compared, nor those of a
    region of interest.

    Returns:
      One for each source; sources that agree in all results and settings are merged.
    """
    not_imagenet = (backbones.RANDOM_WEIGHTS, backbones.NO_WEIGHTS)
    if config.dataset.name != "mvtec_ad" or config.model.weights in not_imagenet:
        return ()
    if config.image.roi:
        return ()
    views = {name: _setting(config, name) for name in _VIEWS}
    found: list[Published] = []
    for item in everything():
        if item.backbone != config.model.backbone:
            continue
        if views != {name: item.settings.get(name, usual) for name, usual in _VIEWS.items()}:
            continue
        for place, other in enumerate(found):
            if (item.values, item.settings) == (other.values, other.settings):
                found[place] = _merged(other, item)
                break
        else:
            found.append(item)
    return tuple(found)


def not_compared(config: Config, category: str, measured: Mapping[str, Any]) -> str:
    """Return a sentence on why a run is not compared with published results, or "".

    Results are compared only if the numbers of images are the published ones.

    Args:
      config: configuration of the run.
      category: category of the run.
      measured: contents of metrics.json. Without `train_images`, as in older files, that number
        is unknown.

    Returns:
      The sentence, or "".
    """
    if category not in IMAGES or not applicable(config):
        return ""
    train, test = measured.get("train_images"), measured["test_images"]
    if (train, test) == IMAGES[category]:
        return ""
    fitted = "an unknown number of" if train is None else train
    return (
        f"no published numbers beside these: they are of {IMAGES[category][0]} training and "
        f"{IMAGES[category][1]} test images, and this run is of {fitted} and {test}"
    )


@functools.cache
def everything() -> tuple[Published, ...]:
    """Return all results in third_party/published_results.json, in its order."""
    file = importlib.resources.files("padim_jax.output") / "published_results.json"
    found = []
    for source in json.loads(file.read_text(encoding="utf-8")):
        about = {key: source[key] for key in ("name", "source", "url", "read", "note")}
        for backbone, result in source["results"].items():
            settings = source["settings"] | result["settings"]
            known = {name: value for name, value in settings.items() if value != _UNKNOWN}
            found.append(
                Published(**about, backbone=backbone, settings=known, values=result["values"])
            )
    return tuple(found)


def differing_settings(config: Config, item: Published) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ between a run and a published one.

    Settings unknown for the source are left out, and so are weights from a file.

    Args:
      config: configuration of the run.
      item: published results.

    Returns:
      Value of the run and published value, by dotted name.
    """
    differing = {}
    for name, theirs in item.settings.items():
        ours = _setting(config, name)
        if name == "model.weights":
            backbone, _, ours = ours.partition("@")[0].rpartition(".")  # whatever the commit
            if backbone != config.model.backbone:
                continue
        if ours != theirs:
            differing[name] = (ours, theirs)
    return differing


def in_words(name: str, differing: Mapping[str, Sequence[Any]]) -> str:
    """Return one sentence on the settings of a source.

    Args:
      name: name of the source.
      differing: result of `differing_settings`, or read back from JSON.

    Returns:
      The sentence.
    """
    if not differing:
        return f"{name}: same settings, as far as they are known"
    others = (f"{setting} {_shown(theirs)}" for setting, (_, theirs) in differing.items())
    return f"{name} had other settings: {', '.join(others)}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "(" + ", ".join(str(item) for item in value) + ")"
    return str(value)


def _setting(config: Config, name: str) -> Any:
    group, _, field = name.partition(".")
    value = getattr(getattr(config, group), field)
    return list(value) if isinstance(value, tuple) else value


def _merged(first: Published, second: Published) -> Published:
    return dataclasses.replace(
        first,
        name=f"{first.name}, {second.name}",
        source=f"{first.source}; {second.source}",
        note=f"{first.name}: {first.note} {second.name}: {second.note}",
    )
