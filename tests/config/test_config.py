"""Settings that hold pass unchanged; each mistake is one line that says what to do."""

import ast
import copy
import importlib.util
import inspect
import itertools
import json
import pathlib
import sys
from typing import Any

import ml_collections
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from padim_jax.config import backbones, checks, defaults
from padim_jax.config import settings as config_lib
from padim_jax.errors import UserError
from padim_jax.system import paths

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
PRESETS = ("anomalib", "seed", "paper", "rd")


def values(preset="anomalib") -> dict[str, Any]:
    """The defaults as plain nested dicts, with every reference resolved."""
    return defaults.get_config(preset).to_dict()


def changed(field, value) -> dict[str, Any]:
    """The defaults with one field, named as in messages, set to `value`."""
    result = copy.deepcopy(values())
    *groups, name = field.removeprefix("config.").split(".")
    group: Any = result
    for step in groups:
        group = group[step]
    group[name] = value
    return result


def message_of(settings):
    with pytest.raises(UserError) as caught:
        config_lib.validate(settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ml_collections still loads files as Python did before 3.4.
loads_file = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def load_file(path, *arguments):
    """What a file of configs/ gives, loaded from its path as a flag would."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arguments)


@pytest.fixture
def command_line(monkeypatch):
    """A function from arguments to the validated configuration."""

    def parse(*arguments):
        # config_flags looks there for the names of overrides.
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        found: Any = flags.FlagValues()
        config_flags.DEFINE_config_file("config", lock_config=True, flag_values=found)
        found(sys.argv)
        return config_lib.validate(found["config"].value)

    return parse


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold_and_survive_json(preset):
    config = config_lib.validate(defaults.get_config(preset))
    stored = json.loads(json.dumps(config_lib.to_dict(config)))
    assert config_lib.validate(stored) == config
    # JSON's lists came back as the tuples that frozen dataclasses need.
    assert hash(config_lib.validate(stored)) == hash(config)


def test_settings_arrive_where_they_belong():
    # Two fields swapped on the way would pass every other test.
    settings = {
        "category": "cap nut",
        "repeats": 3,
        "dataset": {
            "name": "folder",
            "root": "a/b",
            "source": "tfds",
            "tfds_dir": "c",
            "train_images": 60,
            "exclude": ["a.png", "b/c.png"],
            "seed": 8,
            "skip_bad": True,
            "inverted_masks": "yes",
        },
        "image": {
            "resize": [192, 320],
            "method": "lanczos",
            "crop": [160, 256],
            "mean": [0, 0.25, 0.5],
            "std": [1, 0.5, 0.25],
            "rotation": 10,
            "crop_at": "random",
            "seed": 9,
            "range": [100, 4000],
            "roi": "",
        },
        "model": {
            "backbone": "wide_resnet50_2",
            "layers": ["layer2", "layer4"],
            "weights": "a.npz",
            "channels": 550,
            "seed": 7,
            "reduction": "pca",
            "pooling": 3,
            "upsample": "bilinear",
            "precision": "bfloat16",
            "regularization": 0.5,
            "statistics": "moments",
            "shift": 2,
        },
        "map": {"upsample": "bicubic", "sigma": 2},
        "score": {"image": "band"},
        "threshold": {
            "normal": "held_out",
            "groups": "part[0-9]+",
            "held_out": 0.3,
            "image_rate": 0.05,
            "pixel_rate": 0,
        },
        "batch_size": 5,
        "train": {"checkpoint_every": 12.5},
        "metrics": {"resolution": "full"},
        "outputs": {"figures": "all", "maps": "tiff", "report": False, "coco": True},
        "regions": {"min_area": 30, "close": 4.5},
        "decide": "either",
        "cache": {"dir": "d", "images_gb": 0.5, "compilation": False},
    }
    config = config_lib.validate(settings)
    assert config.dataset.root == pathlib.Path("a/b")
    assert config.dataset.tfds_dir == pathlib.Path("c")
    assert config.image.size == (160, 256)
    assert config_lib.to_dict(config) == settings


def test_fields_are_these():
    # Checkpoints, commands and other people's config files know them by these names.
    assert {
        name: sorted(group) if isinstance(group, dict) else None
        for name, group in config_lib.to_dict(config_lib.validate(values())).items()
    } == {
        "category": None,
        "repeats": None,
        "dataset": [
            *("exclude", "inverted_masks", "name", "root", "seed", "skip_bad"),
            *("source", "tfds_dir", "train_images"),
        ],
        "image": [
            *(
                "crop",
                "crop_at",
                "mean",
                "method",
                "range",
                "resize",
                "roi",
                "rotation",
                "seed",
            ),
            "std",
        ],
        "model": [
            "backbone",
            "channels",
            "layers",
            "pooling",
            "precision",
            "reduction",
            "regularization",
            "seed",
            "shift",
            "statistics",
            "upsample",
            "weights",
        ],
        "map": ["sigma", "upsample"],
        "score": ["image"],
        "threshold": ["groups", "held_out", "image_rate", "normal", "pixel_rate"],
        "batch_size": None,
        "train": ["checkpoint_every"],
        "metrics": ["resolution"],
        "regions": ["close", "min_area"],
        "decide": None,
        "outputs": ["coco", "figures", "maps", "report"],
        "cache": ["compilation", "dir", "images_gb"],
    }


# Field, bad value, and what the message must say besides field and value.
ONE_OF = [
    ("config.dataset.name", "mvtec", ["mvtec_ad", "folder", "synthetic"]),
    ("config.dataset.source", "file", ["folder", "tfds"]),
    ("config.image.method", "linear", ["nearest, bilinear, bicubic, lanczos"]),
    ("config.image.method", "Bilinear", ["did you mean 'bilinear'?"]),
    ("config.model.backbone", "resnet-18", ["did you mean 'resnet18'?", "wide_resnet50_2"]),
    ("config.model.backbone", "wideresnet50_2", ["did you mean 'wide_resnet50_2'?"]),
    ("config.model.backbone", "vgg", ["expected one of resnet18"]),
    ("config.model.precision", "float64", ["float32, tf32, bfloat16"]),
    ("config.model.statistics", "sample", ["did you mean 'samples'?", "auto, moments"]),
    ("config.map.upsample", "nearest", ["bilinear, bicubic"]),
    ("config.image.crop_at", "center", ["did you mean 'centre'?"]),
    ("config.model.reduction", "PCA", ["random, pca, semi_orthogonal, none"]),
    ("config.model.upsample", "bicubic", ["nearest, bilinear"]),
    ("config.threshold.normal", "leave-one-out", ["did you mean 'leave_one_out'?"]),
    ("config.threshold.groups", "(part", ["expected a regular expression", "position 0"]),
    ("config.threshold.groups", "(a)(b)", ["at most one group in parentheses"]),
    ("config.threshold.groups", None, ["expected a regular expression"]),
    ("config.outputs.figures", "many", ["none, some, all"]),
    ("config.outputs.maps", "png", ["none, npy, tiff"]),
]
NUMBERS = [
    ("config.batch_size", 0, ["at least 1"]),
    ("config.batch_size", -4, ["at least 1"]),
    ("config.batch_size", 8.0, ["whole number"]),
    ("config.model.channels", -1, ["at least 0"]),
    ("config.model.channels", 100.5, ["whole number"]),
    ("config.model.seed", -1, ["at least 0"]),
    ("config.model.regularization", 0, ["from 0.0001 to 1e+06"]),
    ("config.model.regularization", 9e-5, ["from 0.0001"]),
    ("config.model.regularization", -0.01, ["from 0.0001"]),
    ("config.model.regularization", float("nan"), ["number from"]),
    ("config.model.shift", 9, ["at least 0 and at most 8"]),
    ("config.model.pooling", 2, ["odd"]),
    ("config.model.pooling", 0, ["odd"]),
    ("config.model.pooling", 3.0, ["odd"]),
    ("config.image.rotation", 181, ["from 0 to 180"]),
    ("config.image.rotation", -1.0, ["from 0 to 180"]),
    ("config.repeats", 0, ["at least 1"]),
    ("config.dataset.train_images", -1, ["at least 0"]),
    ("config.threshold.held_out", 1, ["above 0 and below 1"]),
    ("config.threshold.image_rate", -0.1, ["from 0 to 0.9999"]),
    ("config.threshold.pixel_rate", "0.1", ["from 0 to 0.9999"]),
    ("config.map.sigma", -1.0, ["from 0 to 16384"]),
    ("config.map.sigma", float("inf"), ["number"]),
    ("config.train.checkpoint_every", -1.0, ["from 0 to 1e+09"]),
    ("config.train.checkpoint_every", float("inf"), ["number"]),
    ("config.train.checkpoint_every", "300", ["number"]),
    ("config.train.checkpoint_every", None, ["number"]),
    ("config.cache.images_gb", -1, ["from 0 to 1e+06"]),
    ("config.cache.images_gb", float("inf"), ["number"]),
    # What would end in an overflow, without memory, or never.
    ("config.batch_size", 10**9, ["at most 65536"]),
    ("config.repeats", 10**9, ["at most 1000"]),
    ("config.model.seed", 10**30, ["at most"]),
    ("config.model.pooling", 10**9 + 1, ["odd", "up to 63"]),
    ("config.map.sigma", 10**30, ["from 0 to 16384"]),
    ("config.model.regularization", 10**30, ["from 0.0001"]),
    ("config.image.rotation", 10**30, ["from 0 to 180"]),
    ("config.cache.compilation", 1, ["True or False"]),
    ("config.cache.compilation", "False", ["True or False"]),
]
SIZES = [
    ("config.image.resize", (256,), ["(height, width)"]),
    ("config.image.resize", (256, 256, 3), ["(height, width)"]),
    ("config.image.resize", (256, 31), ["at least 32"]),
    ("config.image.resize", (-256, 256), ["at least 32"]),
    ("config.image.resize", (256.0, 256), ["(height, width)"]),
    ("config.image.resize", (True, 256), ["(height, width)"]),
    ("config.image.resize", ((256, 256), 256), ["(height, width)"]),
    ("config.image.resize", (256, 10**9), ["at most 16384"]),
    ("config.image.crop", (224, 16), ["at least 32"]),
    ("config.image.crop", (224, None), ["(height, width)"]),
    ("config.image.crop", [[224, 224]], ["(height, width)"]),
    ("config.image.mean", (0.5, 0.5), ["three numbers"]),
    ("config.image.mean", (0.5, 0.5, "0.5"), ["number"]),
    ("config.image.mean", (0.5, 0.5, (0.5,)), ["number"]),
    ("config.image.std", (0.2, 0.0, 0.2), ["from 1e-06"]),
    ("config.image.std", (0.2, 1e-40, 0.2), ["from 1e-06"]),
    ("config.image.mean", (0.5, 1e39, 0.5), ["from 0 to 1"]),
    ("config.image.mean", (0.5, -0.1, 0.5), ["from 0 to 1"]),
    ("config.image.mean", (123.675, 116.28, 103.53), ["from 0 to 1", "divide", "by 255"]),
    ("config.image.std", (58.395, 57.12, 57.375), ["from 1e-06 to 1", "divide", "by 255"]),
    ("config.image.std", (0.5, 1.5, 0.5), ["from 1e-06 to 1", "by 255"]),
]
LAYERS = [
    ("config.model.layers", (), ["one or more of layer1, layer2, layer3, layer4"]),
    ("config.model.layers", "layer1", ["one or more of"]),
    ("config.model.layers", ("layer2", "layer1"), ["shallowest first"]),
    ("config.model.layers", ("layer1", "layer1"), ["each once"]),
    ("config.model.layers", ("layer1", "layer5"), ["layer1, layer2, layer3, layer4"]),
    ("config.model.layers", ("layer1", 2), ["layer1, layer2, layer3, layer4"]),
    ("config.model.layers", (("layer1", "layer2"),), ["layer1, layer2, layer3, layer4"]),
]
TEXTS = [
    *(
        ("config.category", value, ["one folder below config.dataset.root", "separator"])
        for value in ("a/b", "/bottle", "bottle/", "a\\b", "..", ".", "a\0b")
    ),
    ("config.model.weights", " ", ["weights"]),
    ("config.model.weights", "a\0.npz", ["text"]),
    ("config.dataset.root", "", ["folder"]),
    ("config.dataset.root", "a\0b", ["folder"]),
    ("config.dataset.root", "~no_such_user/data", ["folder", "home directory"]),
    ("config.cache.dir", "~no_such_user/cache", ["folder", "home directory"]),
]


@pytest.mark.parametrize(
    ("field", "value", "said"), [*ONE_OF, *NUMBERS, *SIZES, *LAYERS, *TEXTS]
)
def test_a_wrong_value_is_one_line_with_field_value_and_allowed(field, value, said):
    message = message_of(changed(field, value))
    assert message.startswith(f"{field}=")
    shown = message.removeprefix(f"{field}=")
    # Of a list the wrong item may be shown alone.
    items = value if isinstance(value, tuple | list) else ()
    assert any(shown.startswith(repr(item)) for item in (value, *items))
    for text in said:
        assert text in message


@pytest.mark.parametrize(
    ("check", "allowed", "rejected"),
    [
        (checks.Integer(2, 5), [2, 5], [1, 6]),
        (checks.Number(0.5, 2.0), [0.5, 1, 2.0], [0.499, 2.001]),
        (checks.Number(0.0, 1.0, inside=True), [1e-9, 1 - 1e-9], [0, 1, 0.0, 1.0]),
        (checks.RGB(0.25, 1.0), [(0.25, 0.5, 1.0)], [(0.249, 0.5, 1.0), (0.5, 0.5, 1.001)]),
        (checks.Size(32, 64), [(32, 64), (64, 32)], [(31, 64), (65, 32), None]),
        (checks.Size(32, 64, optional=True), [(32, 64), None], [(31, 64)]),
        (checks.Odd(5), [1, 3, 5], [-1, 2, 7]),
    ],
)
def test_bounds(check, allowed, rejected):
    for value in allowed:
        assert check("config.x", value) == value
    for value in rejected:
        with pytest.raises(UserError, match=r"config\.x=.*: expected "):
            check("config.x", value)


@pytest.mark.parametrize("module", [config_lib])
def test_every_setting_is_explained_below_it(module):
    """The documentation is made of these texts."""
    for group in ast.parse(inspect.getsource(module)).body:
        if not isinstance(group, ast.ClassDef):
            continue
        for statement, text in itertools.pairwise([*group.body, ast.Pass()]):
            if "setting(" in ast.unparse(statement) and isinstance(statement, ast.AnnAssign):
                assert isinstance(text, ast.Expr), ast.unparse(statement)


def leaves(settings, prefix="config"):
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}"


# Of any field, whatever its type.
STRANGE = {
    "bool": True,
    "group": {"a": 1},
    "ConfigDict": ml_collections.ConfigDict({"a": {"b": 1}, "c": 2}),
    "nested list": [[], [[]]],
    "array": np.eye(3),
    "object": object,
}


FLAGS = (
    *("config.cache.compilation", "config.dataset.skip_bad"),
    *("config.outputs.coco", "config.outputs.report"),
)


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("field", list(leaves(values())))
def test_a_value_of_a_wrong_type_is_refused(field, kind):
    if kind == "bool" and field in FLAGS:
        _, group, name = field.split(".")
        config = config_lib.validate(changed(field, STRANGE[kind]))
        assert getattr(getattr(config, group), name) is STRANGE[kind]
    else:
        assert message_of(changed(field, STRANGE[kind])).startswith(f"{field}=")


LONG = {
    "config.category": 300 * "a",
    "config.dataset.root": 5000 * "a",
    "config.dataset.name": 1_000_000 * "a",
    "config.batch_size": 10**5000,
    "config.map.sigma": 10**400,  # more than any float
    "config.threshold.held_out": 10**400,
    "config.image.rotation": 10**5000,
    "config.repeats": [],
}
LONG["config.repeats"].append(LONG["config.repeats"])  # and so on


@pytest.mark.parametrize("field", LONG)
def test_what_is_too_long_to_show_is_shown_in_part(field):
    message = message_of(changed(field, LONG[field]))
    assert message.startswith(f"{field}=")
    assert len(message) < 1000


@pytest.mark.parametrize("value", ["1", None, 3, 0.5])
@pytest.mark.parametrize(
    "group", ["dataset", "image", "model", "map", "train", "outputs", "cache"]
)
def test_a_group_that_is_none_is_refused(group, value):
    assert message_of(changed(f"config.{group}", value)) == (
        f"config.{group}={value!r}: expected a group of settings"
    )


def test_none_and_text_are_refused_where_they_mean_nothing():
    folders = {"config.dataset.tfds_dir", "config.cache.dir"}
    texts = {"config.category", "config.model.weights", "config.dataset.root"}
    texts |= {"config.threshold.groups", "config.image.roi"}
    for field in leaves(values()):
        if field not in folders | {"config.image.crop"}:
            assert message_of(changed(field, None)).startswith(f"{field}=None: expected ")
        if field not in texts | folders:
            assert message_of(changed(field, "1")).startswith(f"{field}='1': expected ")


@pytest.mark.parametrize("crop", [None, (), (None,), [None]])
def test_no_crop(crop):
    config = config_lib.validate(changed("config.image.crop", crop))
    assert config.image.crop is None
    assert config.image.size == (256, 256)


@pytest.mark.parametrize("crop", [(257, 256), (256, 257), (300, 300)])
def test_a_crop_larger_than_the_image(crop):
    message = message_of(changed("config.image.crop", crop))
    assert message.startswith(f"config.image.crop={crop}: larger than")
    assert "config.image.resize=(256, 256)" in message


@pytest.mark.parametrize(
    ("backbone", "layers", "total"),
    [
        ("resnet18", ("layer1", "layer2", "layer3"), 64 + 128 + 256),
        ("resnet34", ("layer1", "layer4"), 64 + 512),
        ("wide_resnet50_2", ("layer1", "layer2", "layer3"), 256 + 512 + 1024),
    ],
)
def test_more_channels_than_there_are(backbone, layers, total):
    settings = values()
    settings["model"] |= {"backbone": backbone, "layers": layers, "channels": total}
    assert config_lib.validate(settings).model.channels == total
    # 0 stands for all of them, without a draw.
    settings["model"]["channels"] = 0
    model = config_lib.validate(settings).model
    assert (model.channels, model.reduction) == (total, "none")
    settings["model"]["channels"] = total + 1
    message = message_of(settings)
    assert message.startswith(f"config.model.channels={total + 1}: {backbone} has {total} ch")
    assert message.endswith(f"expected 1 to {total}")


def test_combined_scores_need_normal_images():
    settings = values("best")
    settings["score"]["image"], settings["threshold"]["normal"] = "combined", "none"
    assert "config.threshold.normal=none there are no normal images" in message_of(settings)


@pytest.mark.parametrize(
    ("group", "name", "meant"),
    [
        (None, "batchsize", "config.batch_size"),
        (None, "model_", "config.model"),
        ("model", "backbones", "config.model.backbone"),
        ("image", "std_", "config.image.std"),
        ("dataset", "path", None),
    ],
)
def test_an_unknown_field(group, name, meant):
    settings = values()
    (settings[group] if group else settings)[name] = 1
    message = message_of(settings)
    assert message.startswith(f"{'.'.join(filter(None, ('config', group, name)))}: no such")
    assert (f"did you mean {meant}?" in message) == (meant is not None)
    assert "Allowed: " in message


def test_a_missing_field():
    for field in ("config.model.seed", "config.image.crop", "config.map", "config.batch_size"):
        settings = values()
        *groups, name = field.split(".")[1:]
        del (settings[groups[0]] if groups else settings)[name]
        assert message_of(settings).startswith(f"{field}: missing; expected ")
    # A misspelt field is both missing and unknown; the suggestion says more.
    settings = values()
    settings["batch"] = settings.pop("batch_size")
    assert "did you mean config.batch_size?" in message_of(settings)


def test_weights_follow_the_backbone_until_they_are_set():
    config: Any = defaults.get_config()
    assert config.model.weights == "resnet18.tv_in1k"
    config.model.backbone = "wide_resnet50_2"
    assert config_lib.validate(config).model.weights == "wide_resnet50_2.tv_in1k"
    config.model.weights = "random"
    config.model.backbone = "resnet34"
    assert config_lib.validate(config).model.weights == "random"


def test_scattering_has_no_weights():
    settings: Any = defaults.get_config()
    settings.model.backbone = "scattering"
    assert config_lib.validate(settings).model.weights == "none"
    settings.model.weights = "none"
    assert config_lib.validate(settings).model.weights == "none"
    settings.model.weights = "resnet18.tv_in1k"
    assert "fixed filters and no weights; leave it out" in message_of(settings)


def test_default_weights_exist_for_every_backbone():
    # configs/efficientnet_b5.py names its own.
    for backbone in backbones.RESNETS:
        config: Any = defaults.get_config()
        config.model.backbone = backbone
        assert config.model.weights in backbones.WEIGHTS[backbone]


def test_an_unknown_preset():
    with pytest.raises(UserError, match="anomalib, seed, paper") as caught:
        defaults.get_config("papr")
    assert "papr" in str(caught.value)


# One of layers alone has presets of its own, see test_layers.
OTHERS = ("layers",)
FILES = sorted(path for path in CONFIGS.glob("*.py") if path.stem not in OTHERS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_file_holds(path):
    # The others are named by their dataset.
    named = {"mvtec": "mvtec_ad", "efficientnet_b5": "mvtec_ad", "demo": "synthetic"}
    name = named.get(path.stem, path.stem)
    assert config_lib.validate(load_file(path)).dataset.name == name
    for preset in PRESETS:
        config = config_lib.validate(load_file(path, preset))
        assert config.dataset.name == name
        # The preset's choices are the file's own.
        expected = config_lib.validate(defaults.get_config(preset))
        assert (config.image, config.map) == (expected.image, expected.map)


def test_layers_are_the_presets_of_their_config_file():
    for layers in ("layer1", "layer3", "layer2+layer3"):
        config = config_lib.validate(load_file(CONFIGS / "layers.py", layers))
        assert config.model.layers == tuple(layers.split("+"))
        assert config.model.reduction == "none"
        widths: dict[str, int] = {"layer1": 64, "layer2": 128, "layer3": 256}
        assert config.model.channels == sum(widths[name] for name in config.model.layers)
    with pytest.raises(UserError, match=r"config\.model\.layers"):
        config_lib.validate(load_file(CONFIGS / "layers.py", "layer7"))


def test_mvtec_presets_are_as_its_docstring_says():
    chosen = {
        preset: config_lib.validate(load_file(CONFIGS / "mvtec.py", preset))
        for preset in PRESETS
    }
    assert {
        preset: (c.image.method, c.image.resize, c.image.crop, c.map.upsample)
        for preset, c in chosen.items()
    } == {
        "anomalib": ("bilinear", (256, 256), None, "bilinear"),
        "seed": ("nearest", (256, 256), (224, 224), "bilinear"),
        "paper": ("bicubic", (256, 256), (224, 224), "bicubic"),
        "rd": ("bicubic", (256, 256), (224, 224), "bicubic"),
    }
    assert {
        preset: (c.image.rotation, c.image.crop_at) for preset, c in chosen.items()
    } == dict.fromkeys(PRESETS, (0.0, "centre")) | {"rd": (10.0, "random")}
    # And all else is common to them, as in the goldens of the PyTorch implementations.
    for config in chosen.values():
        assert (config.model, config.map.sigma) == (
            config_lib.ModelConfig(
                backbone="resnet18",
                layers=("layer1", "layer2", "layer3"),
                weights="resnet18.tv_in1k",
                channels=100,
                seed=42,
                reduction="random",
                pooling=1,
                upsample="nearest",
                precision="tf32",
                regularization=0.01,
                statistics="auto",
            ),
            4.0,
        )
        assert config.image.mean == (0.485, 0.456, 0.406)
        assert config.image.std == (0.229, 0.224, 0.225)
        assert config.category == "bottle"


@loads_file
def test_overrides_on_the_command_line(command_line):
    config = command_line(
        f"--config={CONFIGS / 'mvtec.py'}:seed",
        "--config.category=metal_nut",
        "--config.image.resize=(192, 320)",
        "--config.image.crop=(160, 256)",
        "--config.model.backbone=resnet50",
        "--config.model.layers=('layer2', 'layer3')",
        "--config.map.sigma=2",
        "--config.dataset.tfds_dir=packed",
        "--config.cache.images_gb=0",
        "--config.cache.compilation=False",
    )
    assert config.category == "metal_nut"
    assert config.image.method == "nearest"
    assert config.image.resize == (192, 320)
    assert config.image.size == (160, 256)
    assert config.model.weights == "resnet50.tv_in1k"
    assert config.model.layers == ("layer2", "layer3")
    assert config.map.sigma == 2.0
    assert config.dataset.tfds_dir == pathlib.Path("packed")
    assert config.cache == config_lib.CacheConfig(None, 0.0, compilation=False)


@loads_file
@pytest.mark.parametrize("none", ["None", "(None,)", "()"])
def test_crop_is_taken_back_on_the_command_line(none, command_line):
    config = command_line(
        f"--config={CONFIGS / 'mvtec.py'}:paper", f"--config.image.crop={none}"
    )
    assert config.image.crop is None


@loads_file
def test_one_layer_on_the_command_line(command_line):
    config = command_line(
        f"--config={CONFIGS / 'mvtec.py'}", "--config.model.layers=('layer2',)"
    )
    assert config.model.layers == ("layer2",)


def test_title_names_dataset_and_category():
    assert config_lib.validate(values()).title == "mvtec_ad_bottle"
    settings = changed("config.category", "")
    settings["dataset"].update(name="folder", root="somewhere/left_part")
    assert config_lib.validate(settings).title == "folder_left_part"


@pytest.mark.parametrize(
    ("name", "root", "category", "title"),
    [
        ("mvtec_ad", "anywhere", "bottle", "mvtec_ad_bottle"),
        ("mvtec_ad", "anywhere", "carpet,grid", "mvtec_ad_carpet_grid"),
        ("mvtec_ad", "data/mvtec_ad", "all", "mvtec_ad_all"),
        ("mvtec_ad", "data/parts", "all", "parts_all"),
        ("mvtec_ad", "data/parts", "bracket", "parts_bracket"),
        ("mvtec_ad", "data/bracket", "", "bracket"),
        ("mvtec_ad", "data/bottle", "", "mvtec_ad_bottle"),
        ("magnetic_tile", "data/magnetic_tile", "", "magnetic_tile"),
        ("folder", "data/parts", "", "folder_parts"),
        ("visa", "data/visa", "candle", "visa_candle"),
    ],
)
def test_titles_name_no_data_set_twice_nor_another_one(name, root, category, title):
    settings = changed("config.category", category)
    settings["dataset"].update(name=name, root=root)
    assert config_lib.validate(settings).title == title


def test_home_is_expanded():
    config = config_lib.validate(changed("config.dataset.root", "~/data"))
    assert config.dataset.root == pathlib.Path.home() / "data"


def test_a_checkpoint_keeps_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings: Any = defaults.get_config()
    settings.dataset.root, settings.dataset.tfds_dir = "data", "packed"
    settings.model.weights, settings.cache.dir = "weights/r18.npz", "kept"
    kept = config_lib.with_absolute_paths(config_lib.validate(settings))
    assert kept.dataset.root == tmp_path / "data"
    assert kept.dataset.tfds_dir == tmp_path / "packed"
    assert kept.cache.dir == tmp_path / "kept"
    assert kept.model.weights == str(tmp_path / "weights" / "r18.npz")
    settings.model.weights = "resnet18.tv_in1k"
    settings.dataset.tfds_dir = settings.cache.dir = ""
    named = config_lib.with_absolute_paths(config_lib.validate(settings))
    assert named.model.weights == "resnet18.tv_in1k"
    assert named.dataset.tfds_dir is None
    # Another user's caches lie in that user's home.
    assert named.cache.dir is None


class TestCacheFolder:
    def folder(self, given: str = "") -> paths.Path:
        return config_lib.validate(changed("config.cache.dir", given)).cache.folder

    def test_the_one_given(self, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
        assert self.folder("a/b") == pathlib.Path("a/b")
        assert self.folder("~/b") == pathlib.Path.home() / "b"

    def test_the_users(self, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
        assert self.folder() == pathlib.Path("/elsewhere/padim_jax")
        # Unset, empty and relative are the same to the XDG specification.
        for value in ("", "relative"):
            monkeypatch.setenv("XDG_CACHE_HOME", value)
            assert self.folder() == pathlib.Path.home() / ".cache" / "padim_jax"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert self.folder() == pathlib.Path.home() / ".cache" / "padim_jax"

    def test_of_a_user_without_a_home(self, monkeypatch):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

        def expanduser(path: pathlib.Path) -> pathlib.Path:
            raise RuntimeError("Could not determine home directory.")

        cache = config_lib.validate(values()).cache
        monkeypatch.setattr(pathlib.Path, "expanduser", expanduser)
        with pytest.raises(UserError, match=r"config\.cache\.dir: .* home directory") as caught:
            _ = cache.folder
        # As the message says, both are off then.
        assert "--config.cache.images_gb=0" in str(caught.value)


@pytest.mark.parametrize("given", ["carpet, grid", ["carpet", "grid"], ("carpet,grid",)])
def test_several_categories_are_one_sweep(given):
    config = config_lib.validate(changed("config.category", given))
    assert config.category == "carpet,grid"
    assert config.is_sweep
    assert config.title == "mvtec_ad_carpet_grid"


def test_what_is_a_sweep():
    assert not config_lib.validate(values()).is_sweep
    assert config_lib.validate(changed("config.category", "all")).is_sweep
    assert config_lib.validate(changed("config.repeats", 2)).is_sweep


@pytest.mark.parametrize("given", ["a,a", "a,", "all,a", ["a", ""], [], [1], "a,../b"])
def test_categories_that_are_no_list_of_names(given):
    assert message_of(changed("config.category", given)).startswith("config.category=")


def test_a_random_crop_needs_a_crop():
    said = message_of(changed("config.image.crop_at", "random"))
    assert said.startswith("config.image.crop_at=random")


def test_without_a_reduction_all_channels_are_kept():
    config = config_lib.validate(changed("config.model.reduction", "none"))
    assert config.model.channels == 448
