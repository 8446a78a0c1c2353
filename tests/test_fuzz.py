"""Settings and files of any kind: a clear error or what was there before, nothing else.

A few examples, always the same; `reliability/test_fuzz_long` tries many.
"""

import dataclasses
import json
import pathlib
import re
import shutil
from typing import Any

import fuzzing
import hypothesis
import jax
import numpy as np
import pytest
from fuzzing import FORMS, ONE, examples

from padim_jax.core.types import Moments
from padim_jax.errors import UserError
from padim_jax.store import calibration_file, checkpoint, model_file, statistics_store

# Threads of Orbax, where reading fails; see test_checkpoint.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    # Which draw random numbers while the strategies do.
    pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies"),
]


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    fuzzing.prepare()


@examples(60)
@hypothesis.given(fuzzing.settings())
def test_settings(values):
    fuzzing.check_settings(values)


@examples(25)
@hypothesis.given(fuzzing.weights())
def test_weights(file):
    suffix, content = file
    fuzzing.check_weights(suffix, content.data)


@examples(25)
@hypothesis.given(fuzzing.damages(), fuzzing.st.sampled_from([".npz", ".safetensors", ".pth"]))
def test_damaged_weights(damage, suffix):
    fuzzing.check_weights(suffix, damage(fuzzing.encoded(fuzzing.tensors(), suffix)))


@examples(40)
@hypothesis.given(fuzzing.model_files())
def test_model_files_whose_checksum_is_right(file):
    form, content = file
    fuzzing.check_model_file(form, content.data)


@examples(40)
@hypothesis.given(fuzzing.st.sampled_from(FORMS), fuzzing.damages())
def test_damaged_model_files(form, damage):
    fuzzing.check_model_file(form, damage(fuzzing.model_content(form)), damaged=True)


@examples(12)
@hypothesis.given(fuzzing.checkpoints())
def test_checkpoints(case):
    fuzzing.check_checkpoint(*case)


@examples(60)
@hypothesis.given(fuzzing.calibrations())
def test_calibrations(content):
    fuzzing.check_calibration(content)


def test_what_is_whole_is_taken(tmp_path: pathlib.Path):
    """Or all of this would show nothing."""
    fuzzing.check_settings(fuzzing.defaults.get_config().to_dict())
    for suffix in (".npz", ".safetensors"):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(fuzzing.encoded(fuzzing.tensors(), suffix))
        fuzzing.pretrained.load(str(path), "resnet18", fuzzing.LAYERS)
    for form in FORMS:
        path = tmp_path / "model.safetensors"
        path.write_bytes(fuzzing.model_content(form))
        model = model_file.load(path, ONE)
        statistics_store.require_whole(path, model, model.fitted)
        exact = fuzzing.scores(model, model.fitted)
        np.testing.assert_array_equal(exact, fuzzing.expected_scores(form))
        statistics_store.load_checkpoint(fuzzing.checkpoint_folder(form), ONE)
    stored = calibration_file.to_dict(fuzzing.THRESHOLDS, "a detector")
    (tmp_path / calibration_file.NAME).write_text(json.dumps(stored))
    assert calibration_file.read(tmp_path, "a detector") == fuzzing.THRESHOLDS


# Numbers that are none, in files whose checksum is right.


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_with_numbers_that_are_not_finite(form, value, part, tmp_path):
    fitted = fuzzing.fitted(form)
    leaves, structure = jax.tree.flatten(fitted.statistics)
    place = 1 if form == "samples" else 1 + part  # count, then means and squares, or samples
    array = np.array(leaves[place])
    array[0, 9] = value  # of one device, region 9: row 0, column 9 of 8x10
    leaves[place] = jax.numpy.asarray(array)
    broken = dataclasses.replace(fitted, statistics=structure.unflatten(leaves))
    checkpoint.save(tmp_path / "a", broken, ONE)
    found, identity = statistics_store.load_checkpoint(tmp_path / "a", ONE)
    with pytest.raises(UserError) as caught:
        statistics_store.ready(found, identity, found.config, fuzzing.random_variables())
    assert re.search(r"not finite.*rows 0 to 0 and columns 9 to 9, of 8x10", str(caught.value))


@pytest.mark.parametrize("form", FORMS)
def test_a_model_file_with_numbers_that_are_not_finite(form, tmp_path):
    described, arrays = fuzzing.parts(fuzzing.model_content(form))
    for name in arrays:
        if arrays[name].dtype.kind != "f" or name == "regularization":
            continue
        broken = arrays | {name: arrays[name].copy()}
        broken[name].reshape(-1)[-1] = np.nan
        described["sha256"] = fuzzing.validation.digest(described, broken)
        metadata = {"padim_jax": json.dumps(described)}
        path = tmp_path / "model.safetensors"
        fuzzing.safetensors.numpy.save_file(broken, path, metadata)
        model = model_file.load(path, ONE)
        with pytest.raises(UserError, match="the model holds numbers that are not finite"):
            fuzzing.scores(model, model.fitted)


def crafted(fitted: Any, **changes: Any) -> Any:
    return dataclasses.replace(fitted, **changes)


@pytest.mark.parametrize(
    "index", [[0, 1], [0, 1, 1], [0, 1, 64], [-1, 0, 1], [0, 1, 2, 3]], ids=str
)
def test_a_checkpoint_of_channels_that_there_are_not(index, tmp_path):
    """JAX would take others in silence."""
    fitted = crafted(fuzzing.fitted("moments"), index=np.array(index))
    checkpoint.save(tmp_path / "a", fitted, ONE)
    with pytest.raises(UserError, match="a: the model is broken"):
        statistics_store.load_checkpoint(tmp_path / "a", ONE)


def test_a_checkpoint_of_another_backbone(tmp_path):
    fitted = fuzzing.fitted("moments")
    model = fitted.config.model
    for change in (
        {"layers": ("layer2",)},
        {"layers": ("layer1", "layer2")},
        {"reduction": "pca"},
        {"channels": 4},
    ):
        config = dataclasses.replace(fitted.config, model=dataclasses.replace(model, **change))
        checkpoint.save(tmp_path / "a", crafted(fitted, config=config), ONE)
        with pytest.raises(UserError, match="broken"):
            statistics_store.load_checkpoint(tmp_path / "a", ONE)


def test_a_checkpoint_of_another_number_of_images(tmp_path):
    fitted = fuzzing.fitted("moments")
    checkpoint.save(tmp_path / "a", crafted(fitted, images=fitted.images[:3]), ONE)
    with pytest.raises(UserError, match="statistics are of 4 images, and not of 3"):
        statistics_store.load_checkpoint(tmp_path / "a", ONE)
    assert isinstance(fitted.statistics, Moments)


@pytest.mark.parametrize("left", ["half of the files", "an empty folder", "no description"])
def test_a_checkpoint_that_is_half_there(left, tmp_path):
    path = tmp_path / "a"
    shutil.copytree(fuzzing.checkpoint_folder("moments"), path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if left == "an empty folder" or (
            file.name == "_CHECKPOINT_METADATA"
            if left == "no description"
            else files.index(file) % 2
        ):
            file.unlink()
    with pytest.raises(UserError, match=str(path)):
        statistics_store.load_checkpoint(path, ONE)
