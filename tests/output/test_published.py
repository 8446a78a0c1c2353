"""The published figures: whole, as printed, with their origin, compared with the like only."""

import datetime
import pathlib

import numpy as np
import pytest

from padim_jax.config import backbones, defaults
from padim_jax.config.datasets import MVTEC_AD
from padim_jax.config.settings import Config, validate
from padim_jax.output import published
from padim_jax.output.published import AVERAGE, METRICS, TOLERANCE, Published

ROOT = pathlib.Path(__file__).resolve().parents[2]


def make_config(preset: str = "anomalib", **settings: object) -> Config:
    values = defaults.get_config(preset)
    values.update_from_flattened_dict(settings)
    return validate(values)


def by_name(backbone: str) -> dict[str, Published]:
    return {item.name: item for item in published.everything() if item.backbone == backbone}


TABLES = [
    pytest.param(item, key, id=f"{item.name}-{item.backbone}-{key}")
    for item in published.everything()
    for key in item.values
]


@pytest.mark.parametrize(("item", "key"), TABLES)
def test_each_table_has_all_categories_and_its_own_average(item: Published, key: str):
    values = item.values[key]
    assert all(0.7 < value <= 1 and value == round(value, 3) for value in values.values())
    assert key in METRICS
    if set(values) == {AVERAGE}:
        return  # no more than that is known
    assert tuple(values) == (AVERAGE, *MVTEC_AD)
    # Both roundings to three decimals together: at most 0.0005 each.
    average = np.mean([values[category] for category in MVTEC_AD])
    assert average == pytest.approx(values[AVERAGE], abs=1e-3)


def test_numbers_of_images_add_up_to_the_dataset():
    assert sorted(published.IMAGES) == sorted(MVTEC_AD)
    assert np.sum(list(published.IMAGES.values()), 0).tolist() == [3629, 1725]


def test_every_metric_has_a_tolerance():
    assert set(TOLERANCE) == set(METRICS)


@pytest.mark.parametrize(
    ("backbone", "name", "key", "category", "value"),
    [
        ("resnet18", "Lornatang", "image_auroc", "bottle", 0.994),
        ("resnet18", "anomalib", "image_auroc", "hazelnut", 0.750),
        ("resnet18", "anomalib", "pixel_auroc", "bottle", 0.983),
        ("resnet18", "anomalib", "image_f1_max", "transistor", 0.796),
        ("wide_resnet50_2", "anomalib", "image_f1_max", "leather", 1.0),
        ("wide_resnet50_2", "anomalib", "pixel_auroc", "screw", 0.988),
        ("resnet18", "xiahaifeng1995", "image_auroc", "zipper", 0.741),
        ("resnet18", "xiahaifeng1995", "pixel_auroc", "tile", 0.917),
        ("wide_resnet50_2", "xiahaifeng1995", "image_auroc", "cable", 0.922),
        ("wide_resnet50_2", "xiahaifeng1995", "pixel_auroc", "metal_nut", 0.971),
        ("resnet18", "paper", "pixel_auroc", "grid", 0.949),
        ("resnet18", "paper", "aupro", AVERAGE, 0.901),
        ("wide_resnet50_2", "paper", "pixel_auroc", "wood", 0.949),
        ("wide_resnet50_2", "paper", "aupro", "transistor", 0.845),
        ("wide_resnet50_2", "paper", "image_auroc", AVERAGE, 0.953),
        ("efficientnet_b5", "paper", "image_auroc", AVERAGE, 0.979),
        ("wide_resnet50_2", "paper, Rd-MVTec AD", "pixel_auroc", AVERAGE, 0.922),
    ],
)
def test_figures_are_as_printed(
    backbone: str, name: str, key: str, category: str, value: float
):
    assert by_name(backbone)[name].values[key][category] == value


def test_each_source_says_where_when_and_how():
    for item in published.everything():
        assert item.source
        assert item.note
        assert item.url.startswith("https://")
        assert datetime.date.fromisoformat(item.read).year >= 2026
        assert item.backbone in backbones.BACKBONES
        # The names are those of settings that there are.
        published.differing_settings(make_config(), item)


def test_settings_of_each_source_can_be_asked_for():
    """A configuration with exactly those settings is valid, and differs in nothing."""
    for item in published.everything():
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in item.settings.items()}
        lists.pop("model.weights", None)
        config = make_config(**{"model.backbone": item.backbone, **lists})
        assert published.differing_settings(config, item) == {}
        assert any(item.name in found.name for found in published.applicable(config))


def test_the_defaults_are_those_of_anomalibs_table():
    both, xia, paper = published.applicable(make_config())
    # Their figures are the same, and so one column.
    assert both.name == "Lornatang, anomalib"
    assert both.values == by_name("resnet18")["anomalib"].values
    assert published.differing_settings(make_config(), both) == {}
    assert published.differing_settings(make_config(), xia) == {
        "image.method": ("bilinear", "lanczos"),
        "image.crop": (None, [224, 224]),
        "model.seed": (42, 1024),
    }
    assert published.differing_settings(make_config("paper"), paper) == {}


def test_what_is_not_known_does_not_differ():
    """The paper tells no seed; of a weights file only its owner knows what it is."""
    paper = by_name("resnet18")["paper"]
    config = make_config("paper", **{"model.seed": 7, "model.weights": "/my/weights.npz"})
    assert published.differing_settings(config, paper) == {}
    config = make_config("paper", **{"model.weights": "resnet18.tv2_in1k"})
    assert published.differing_settings(config, paper) == {
        "model.weights": ("tv2_in1k", "tv_in1k")
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"model.weights": "random"},
        {"model.weights": "none", "model.backbone": "scattering"},
        {"dataset.name": "folder"},
        {"dataset.name": "synthetic"},
        {"model.backbone": "resnet50"},
        {"image.rotation": 10.0},
        {"image.rotation": 10.0, "image.crop": (224, 224), "image.crop_at": "random"},
    ],
)
def test_nothing_else_is_compared(settings: dict):
    assert published.applicable(make_config(**settings)) == ()


def test_random_views_are_compared_with_the_like():
    """Rd-MVTec AD is another data set than MVTec AD, in either direction."""
    wide = {"model.backbone": "wide_resnet50_2", "model.channels": 550}
    assert [item.name for item in published.applicable(make_config("rd", **wide))] == [
        "paper, Rd-MVTec AD"
    ]
    aligned = published.applicable(make_config("paper", **wide))
    assert "paper" in {item.name for item in aligned}
    assert not any("Rd" in item.name for item in aligned)


def test_the_package_carries_the_file():
    ours = (ROOT / "padim_jax" / "output" / "published_results.json").read_bytes()
    assert ours == (ROOT / "third_party" / "published_results.json").read_bytes()
