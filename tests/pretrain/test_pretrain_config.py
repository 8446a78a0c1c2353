"""Recipes that hold pass unchanged; each mistake is one line that says what to do."""

import copy
import importlib.util
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from padim_jax.config import backbones
from padim_jax.errors import UserError
from padim_jax.pretrain import config as config_lib

FILE = pathlib.Path(__file__).parents[2] / "configs" / "pretrain.py"


def values() -> dict[str, Any]:
    return config_lib.get_config().to_dict()


def changed(**fields: Any) -> dict[str, Any]:
    """The defaults with some fields set, named as in images__size."""
    result = copy.deepcopy(values())
    for field, value in fields.items():
        *groups, name = field.split("__")
        (result[groups[0]] if groups else result)[name] = value
    return result


def message_of(settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        config_lib.validate(settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def leaves(settings: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in settings.items():
        deeper = leaves(value, f"{prefix}{name}__") if isinstance(value, dict) else []
        found += deeper or [prefix + name]
    return found


def test_the_config_file_is_the_defaults():
    spec = importlib.util.spec_from_file_location("pretrain", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = config_lib.validate(module.get_config())
    assert recipe == config_lib.validate(config_lib.get_config())
    # It needs nothing that is not drawn.
    assert recipe.start == "random"
    assert recipe.images.photos is None


def test_settings_arrive_where_they_belong():
    # Two fields swapped on the way would pass every other test.
    settings = {
        "seed": 3,
        "backbone": "resnet34",
        "start": "a.npz",
        "precision": "bfloat16",
        "images": {
            "size": 96,
            "classes": 13,
            "instances": 7,
            "photos": "a/b",
            "photo_part": 1,
            "photo_size": 300,
        },
        "task": {"good": 5, "inspected": 2, "channels": 448, "redundancy": 2, "pixels": 0.5},
        "optimizer": {
            "steps": 20,
            "scenes": 6,
            "learning_rate": 0.01,
            "warmup": 19,
            "weight_decay": 0.3,
            "average": 0,
        },
        "checkpoint_every": 12.5,
    }
    recipe = config_lib.validate(settings)
    assert recipe.images.photos == pathlib.Path("a/b")
    assert recipe.batch_size == 6 * (5 + 2)
    stored = json.loads(json.dumps(config_lib.to_dict(recipe)))
    assert stored == settings
    assert config_lib.validate(stored) == recipe


def test_no_photographs_survive_json():
    recipe = config_lib.validate(values())
    stored = json.loads(json.dumps(config_lib.to_dict(recipe)))
    assert config_lib.validate(stored) == recipe


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("backbone", "resnet50", "expected one of resnet18, resnet34; did you mean 'resnet"),
        ("backbone", "efficientnet_b5", "expected one of resnet18, resnet34"),
        ("precision", "float16", "expected one of float32, tf32, bfloat16"),
        ("start", "", "expected a non-empty text"),
        ("seed", -1, "at least 0"),
        ("seed", 2**31, "at most 2147483647"),
        ("checkpoint_every", -1, "from 0 to 1e+09"),
        ("images__size", 16, "at least 32"),
        ("images__size", 144, "at most 128"),
        ("images__size", 72, "multiple of 16 from 32 to 128"),
        ("images__size", 64.0, "whole number"),
        ("images__classes", 12, "at least 13"),
        ("images__classes", 10**6, "at most 100000"),
        ("images__instances", 0, "at least 1"),
        ("images__instances", 10**6, "at most 100000"),
        ("images__photos", "~no_such_user/a", "home directory"),
        ("images__photo_part", 0, "from 0.001 to 1"),
        ("images__photo_part", 1.1, "from 0.001 to 1"),
        ("images__photo_size", 63, "at least 64"),
        ("images__photo_size", 10**6, "at most 4096"),
        ("task__good", 1, "at least 2"),
        ("task__good", 10**6, "at most 256"),
        ("task__inspected", 0, "at least 1"),
        ("task__inspected", 10**6, "at most 256"),
        ("task__channels", 0, "at least 1"),
        ("task__channels", 449, "at most 448"),
        ("task__redundancy", -0.1, "from 0 to 1e+06"),
        ("task__pixels", -0.1, "from 0 to 1e+06"),
        ("optimizer__steps", 0, "at least 1"),
        ("optimizer__steps", 10**9, "at most 10000000"),
        ("optimizer__scenes", 0, "at least 1"),
        ("optimizer__scenes", 10**9, "at most 4096"),
        ("optimizer__learning_rate", 0, "from 1e-09 to 1"),
        ("optimizer__learning_rate", float("nan"), "from 1e-09 to 1"),
        ("optimizer__warmup", -1, "at least 0"),
        ("optimizer__warmup", 10**9, "at most 10000000"),
        ("optimizer__weight_decay", -0.1, "from 0 to 1"),
        ("optimizer__average", 1, "from 0 to 0.999999"),
        ("optimizer__average", -0.1, "from 0 to 0.999999"),
    ],
)
def test_a_wrong_value_is_one_line_with_field_value_and_allowed(
    field: str, value: Any, said: str
):
    message = message_of(changed(**{field: value}))
    assert message.startswith(f"config.{field.replace('__', '.')}={value!r}: ")
    assert said in message


# Of any field, whatever its type.
STRANGE = {
    "bool": True,
    "group": {"a": 1},
    "list": [[]],
    "array": np.eye(2),
    "object": object,
    "long": 10**5000,
}


@pytest.mark.parametrize("field", leaves(values()))
@pytest.mark.parametrize("kind", STRANGE)
def test_a_value_of_a_wrong_type_is_refused(field: str, kind: str):
    message = message_of(changed(**{field: STRANGE[kind]}))
    assert message.startswith(f"config.{field.replace('__', '.')}=")
    assert len(message) < 1000


@pytest.mark.parametrize("group", ["images", "task", "optimizer"])
def test_groups(group: str):
    assert message_of(changed(**{group: 3})) == (
        f"config.{group}=3: expected a group of settings"
    )
    settings = values()
    settings[group]["stepz"] = 1
    assert message_of(settings).startswith(f"config.{group}.stepz: no such setting")
    settings = values()
    name = next(iter(settings[group]))
    del settings[group][name]
    assert message_of(settings).startswith(f"config.{group}.{name}: missing")


def test_a_rate_that_never_gets_to_its_height():
    message = message_of(changed(optimizer__steps=50, optimizer__warmup=50))
    assert message.startswith("config.optimizer.warmup=50: ")
    assert "config.optimizer.steps=50" in message
    config_lib.validate(changed(optimizer__steps=50, optimizer__warmup=49))
    config_lib.validate(changed(optimizer__steps=1, optimizer__warmup=0))


def test_textures_that_are_too_many_for_memory():
    config_lib.validate(changed(images__classes=1000, images__instances=100))
    message = message_of(changed(images__classes=1000, images__instances=101))
    assert message.startswith("config.images.instances=101: ")
    assert "config.images.classes=1000" in message


def test_photographs_are_as_large_as_what_is_cut_from_them():
    config_lib.validate(changed(images__size=96, images__photo_size=96))
    message = message_of(changed(images__size=96, images__photo_size=95))
    assert message.startswith("config.images.photo_size=95: ")
    assert "at least 96" in message


def test_bundled_weights_to_go_on_from():
    assert config_lib.validate(changed(start="bundled")).start == "bundled"
    message = message_of(changed(start="bundled", backbone="resnet34"))
    assert message.startswith("config.start='bundled': ")
    assert "config.backbone='resnet34'" in message
    assert "random, resnet34.tv_in1k or a file" in message


def test_what_is_trained_has_stages_for_the_bundled_weights():
    assert set(backbones.BUNDLED) <= set(config_lib.BACKBONES)
    for bundled in backbones.BUNDLED.values():
        assert bundled.stages == config_lib.STAGES


def test_a_configuration_of_padim_is_no_recipe():
    assert message_of({"dataset": {}}).startswith("config.dataset: no such setting")
