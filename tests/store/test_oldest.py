"""Models of the oldest version that is supported load for ever; see `oldest_models`.

What breaks these tests breaks the models that people have.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import oldest_models
import pytest

from padim_jax.config import checks, defaults, schema, settings
from padim_jax.config.schema import setting
from padim_jax.config.settings import Config
from padim_jax.data import dataset_splits
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.detector import detector
from padim_jax.detector.detector import Detector
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.runs import fitting, loading
from padim_jax.store import calibration_file, checkpoint

EXPECTED = json.loads((oldest_models.FOLDER / "expected.json").read_text(encoding="utf-8"))
MODELS = (*oldest_models.FORMS, *(f"{kind}.safetensors" for kind in oldest_models.FILES))
# Sums of float32 in another order change distances by 2.4e-6 (test_experiment), other versions
# of XLA and of linear algebra by some times that; half the numbers' bits change 1.8e-4.
TOLERANCE = 5e-5
ONE = Devices(1)


def make_settings(root: pathlib.Path, weights: pathlib.Path, form: str) -> Any:
    return oldest_models.settings(defaults.get_config(), root, weights, form)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return oldest_models.write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return oldest_models.write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def models(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy, which may be written to."""
    return shutil.copytree(oldest_models.FOLDER, tmp_path / "models")


def load(path: pathlib.Path, weights: pathlib.Path, wanted: Config | None = None) -> Detector:
    return loading.load(path, wanted, str(weights))


def scores(model: Detector) -> np.ndarray:
    return detector.score(model, oldest_models.tested()).scores


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_thresholds(name: str, weights: pathlib.Path):
    model, expected = load(oldest_models.FOLDER / name, weights), EXPECTED[name]
    assert model.weights.sha256 == EXPECTED["weights"]
    np.testing.assert_allclose(scores(model), expected["scores"], rtol=TOLERANCE)
    assert model.calibration is not None
    assert model.calibration.image_threshold == expected["image_threshold"]
    assert model.calibration.pixel_threshold == expected["pixel_threshold"]
    assert model.count == oldest_models.FITTED


@pytest.mark.parametrize("name", MODELS)
def test_the_same_settings_are_accepted(name: str, root: pathlib.Path, weights: pathlib.Path):
    form = name if name in oldest_models.FORMS else "samples"
    wanted = settings.validate(make_settings(root, weights, form))
    model = load(oldest_models.FOLDER / name, weights, wanted)
    assert model.calibration is not None  # of these settings, too
    other = dataclasses.replace(wanted.map, sigma=2.0)
    model = load(oldest_models.FOLDER / name, weights, dataclasses.replace(wanted, map=other))
    assert model.calibration is None
    image = dataclasses.replace(wanted.image, method="bicubic")
    with pytest.raises(UserError, match=r"config\.image\.method=bicubic.* with bilinear"):
        load(oldest_models.FOLDER / name, weights, dataclasses.replace(wanted, image=image))


@pytest.mark.parametrize("form", oldest_models.FORMS)
def test_checkpoints_are_extended(
    form: str, models: pathlib.Path, root: pathlib.Path, weights: pathlib.Path
):
    # Once by itself, and once by a model that is fitted now: the same in the end.
    values = make_settings(root, weights, form)
    dataset = dataset_splits.open_dataset(settings.validate(values))
    others = FolderSource([r for r in dataset["test"].records if not r.label])
    fitting.train(settings.validate(values), others, models / "new")
    fitting.merge([models / form, models / "new"], models / "merged")
    fitting.update(models / form, others, weights=str(weights))
    merged, updated = load(models / "merged", weights), load(models / form, weights)
    assert merged.count == updated.count == oldest_models.FITTED + oldest_models.TEST
    np.testing.assert_allclose(scores(updated), scores(merged), rtol=TOLERANCE)
    assert np.all(scores(updated)[:3] < EXPECTED[form]["scores"][:3])  # now they are fitted


def test_thresholds_of_this_version_have_its_fingerprint(
    models: pathlib.Path, weights: pathlib.Path
):
    model = load(models / "moments", weights)
    first, now = EXPECTED["moments"]["fingerprint"], detector.fingerprint(model)
    assert detector.fingerprints(model) == (now, first)
    assert model.calibration is not None
    calibration_file.write(models / "moments", model.calibration, now)
    assert load(models / "moments", weights).calibration == model.calibration


def with_setting(values: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    group, _, key = name.rpartition(".")
    changed = json.loads(json.dumps(values))
    (changed[group] if group else changed)[key] = value
    return changed


@pytest.fixture
def stored(root: pathlib.Path, weights: pathlib.Path) -> dict[str, Any]:
    wanted = settings.validate(make_settings(root, weights, "moments"))
    return settings.to_stored(wanted)


class TestSettingsOfOtherVersions:
    def test_what_is_stored_is_restored(self, stored: dict[str, Any]):
        assert settings.to_stored(settings.restore(stored, "0.1.0")) == stored

    @pytest.mark.parametrize("name", ["image.more", "model.more", "map.more", "fusion"])
    def test_unknown_and_scores_may_depend_on_it(self, name: str, stored: dict[str, Any]):
        changed = with_setting(stored, name, "7")
        with pytest.raises(settings.UnknownSettingError) as caught:
            settings.restore(changed, "9.9.9")
        for said in (f"config.{name}='7'", "padim_jax 9.9.9 wrote", "padim_jax 0.1.0"):
            assert said in str(caught.value)

    @pytest.mark.parametrize("group", ["dataset", "threshold", "train", "outputs", "cache"])
    def test_unknown_and_no_matter(self, group: str, stored: dict[str, Any]):
        changed = with_setting(stored, f"{group}.more", [1])
        assert settings.restore(changed, "9.9.9") == settings.restore(stored, "0.1.0")
        del changed[group]
        restored = settings.restore(changed, "9.9.9")
        assert settings.score_settings(restored) == settings.score_settings(
            settings.restore(stored, "0.1.0")
        )

    def test_what_every_model_has_is_needed(self, stored: dict[str, Any]):
        del stored["image"]["resize"]
        with pytest.raises(UserError, match=r"config\.image\.resize: missing"):
            settings.restore(stored, "0.1.0")


@dataclasses.dataclass(frozen=True)
class Later(settings.MapConfig):
    mode: str = setting("better", checks.text, later="as ever")
    shares: tuple[float, ...] = setting((1, 2), lambda name, value: tuple(value), later=(1, 1))


@dataclasses.dataclass(frozen=True)
class Group:
    size: int = setting(5, checks.Integer(0, 9), later=3)


@dataclasses.dataclass(frozen=True)
class Whole(Config):
    map: Later = schema.group()  # pyright: ignore[reportIncompatibleVariableOverride]
    group: Group = Group()


def test_a_new_setting_that_changes_nothing(
    root: pathlib.Path, weights: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """It is neither stored nor part of a fingerprint; with another value it is both."""
    was = settings.validate(make_settings(root, weights, "auto"))
    stored, scores = settings.to_stored(was), settings.score_settings(was)
    monkeypatch.setattr(settings, "Config", Whole)
    monkeypatch.setattr(settings, "_SCORES", (*settings._SCORES, "group"))
    same: Any = settings.restore(stored, "0.1.0")
    assert (same.map.mode, same.map.shares, same.group.size) == ("as ever", (1, 1), 3)
    assert settings.to_stored(same) == stored
    assert settings.score_settings(same) == scores
    # A new model has the new default.
    new: Any = settings.validate(schema.defaults(Whole))
    assert (new.map.mode, new.map.shares, new.group.size) == ("better", (1, 2), 5)
    changed = settings.to_stored(new)
    assert changed["map"]["shares"] == [1, 2]
    assert changed["group"] == {"size": 5}
    scores = settings.score_settings(new)
    assert (scores["map.shares"], scores["group.size"]) == ([1, 2], 5)
    assert settings.restore(changed, "0.1.0") == new


SYSTEM_FILES = (
    *(".DS_Store", ".nfs000000000123", "desktop.ini", "Thumbs.db", "._0", ".directory"),
    *("@eaDir/x", "lost+found/x"),
)


def test_files_of_the_operating_system(models: pathlib.Path, weights: pathlib.Path):
    """They neither keep a model from being replaced nor are they deleted."""
    for name in SYSTEM_FILES:
        (models / "moments" / name).parent.mkdir(exist_ok=True)
        (models / "moments" / name).write_text("x")
    fitted, _ = checkpoint.load(models / "moments", ONE)
    checkpoint.save(models / "moments", fitted, ONE)
    assert all((models / "moments" / name).exists() for name in SYSTEM_FILES)
    assert not (models / "moments/0").exists()
    (models / "moments/letter.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds letter\.txt"):
        checkpoint.check_destination(models / "moments")


class TestOrbaxOfAnotherVersion:
    """It cannot read a sound checkpoint: nobody is told to delete that."""

    def test_it_has_other_functions(self, models: pathlib.Path, monkeypatch: Any):
        monkeypatch.delattr(checkpoint.ocp, "metadata")  # as in 0.11
        monkeypatch.setattr(checkpoint, "_ORBAX", "0.11.36")
        with pytest.raises(UserError) as caught:
            checkpoint.load(models / "moments", ONE)
        message = str(caught.value)
        for said in ("written with Orbax 0.12", "read with Orbax 0.11.36", "moments/0: "):
            assert said in message
        assert "delete" not in message

    def test_it_reads_otherwise(self, models: pathlib.Path, monkeypatch: Any):
        fitted, _ = checkpoint.load(models / "moments", ONE)
        checkpoint.save(models / "moments", fitted, ONE)
        installed = checkpoint._ORBAX

        def load(*_: Any) -> None:
            raise TypeError("not so")

        monkeypatch.setattr(checkpoint.ocp, "load", load)
        monkeypatch.setattr(checkpoint, "_ORBAX", "0.99.0")
        with pytest.raises(UserError, match=f"Orbax {installed}, read with Orbax 0.99.0"):
            checkpoint.load(models / "moments", ONE)

    def test_a_damaged_one(self, models: pathlib.Path):
        (models / "moments/0/_CHECKPOINT_METADATA").write_text("{")
        with pytest.raises(UserError, match="or a damaged one") as caught:
            checkpoint.load(models / "moments", ONE)
        assert "delete" not in str(caught.value)
        assert "one before it" not in str(caught.value)  # there is none
