"""Thresholds: of which images they may come, and that models that grow have them again."""

import csv
import dataclasses
import errno
import pathlib
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import small
from PIL import Image

from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config, validate
from padim_jax.data import copies, dataset_splits, input_pipeline
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.layouts.synthetic import generate
from padim_jax.data.records import Record
from padim_jax.detector import detector
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import DataWarning, UserError
from padim_jax.runs import calibrate, export, fitting, grow, loading, modes, train
from padim_jax.store import calibration_file, checkpoint, statistics_store
from padim_jax.store.statistics_store import OnDisk


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("drawn")
    generate(folder / "drawn", n_train=14, n_test_good=1, n_test_per_defect=1, size=64)
    return folder


@pytest.fixture
def root(drawn: pathlib.Path) -> pathlib.Path:
    """A new dataset for each test, at one place, so that tests can share models."""
    folder = drawn / "data"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(drawn / "drawn", folder)
    return folder


def make_config(root: pathlib.Path, form: str = "moments", **changes: Any) -> Config:
    ours = {"model.statistics": form, "threshold.image_rate": 0.2}
    return small.config(root, **(ours | changes))


def normal(root: pathlib.Path, start: int, stop: int) -> FolderSource:
    """Some of the fourteen normal images."""
    config = make_config(root)
    return FolderSource(dataset_splits.open_dataset(config)["train"].records[start:stop])


def with_validation(root: pathlib.Path, copies: int, others: int) -> pathlib.Path:
    """MVTec LOCO's layout: validation images, of which some are training images again."""
    folder = root / "part" / "validation" / "good"
    folder.mkdir(parents=True)
    files = sorted((root / "part" / "train" / "good").iterdir())
    for file in files[:copies]:
        shutil.copy(file, folder / f"copy_{file.name}")
    for file in files[len(files) - others :]:
        file.replace(folder / file.name)
    for mask in list((root / "part" / "ground_truth").glob("*/*_mask.png")):
        own = mask.parent / mask.stem.removesuffix("_mask")
        own.mkdir()
        mask.replace(own / "000.png")
    return root


def fit_model(config: Config, path: pathlib.Path, source: FolderSource | None = None) -> None:
    dataset = dataset_splits.open_dataset(config)
    if source is not None:
        dataset = {"train": source, "validation": FolderSource([]), "test": FolderSource([])}
    train.train(config, dataset, path)


MODELS: dict[Any, pathlib.Path] = {}


@pytest.fixture
def fitted(
    root: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., pathlib.Path]:
    """Put a model of some of the normal images at a path; fitted once for all tests."""

    def copy(
        path: pathlib.Path, config: Config, start: int = 0, stop: int = 14
    ) -> pathlib.Path:
        key = config, start, stop
        if key not in MODELS:
            MODELS[key] = tmp_path_factory.mktemp("fitted") / "model"
            fit_model(config, MODELS[key], normal(root, start, stop))
        return pathlib.Path(shutil.copytree(MODELS[key], path, dirs_exist_ok=True))

    return copy


def thresholds(path: pathlib.Path) -> Any:
    return loading.load(path).calibration


class TestImagesThatWereFitted:
    def loco(self, root: pathlib.Path, **changes: Any) -> Config:
        return make_config(root, **{"dataset.name": "mvtec_loco", **changes})

    def test_copies_among_validation_images_are_left_out(
        self, root: pathlib.Path, tmp_path: pathlib.Path
    ):
        config = self.loco(with_validation(root, copies=3, others=4))
        with pytest.warns(DataWarning, match=r"3 of 7 validation images .*copy_000\.png"):
            fit_model(config, tmp_path / "model")
        found = thresholds(tmp_path / "model")
        assert (found.origin, found.images) == ("held_out", 4)
        # As if the copies had never been there.
        for copy in (root / "part" / "validation" / "good").glob("copy_*"):
            copy.unlink()
        fit_model(config, tmp_path / "model")
        assert thresholds(tmp_path / "model") == found

    def test_too_few_others(self, root: pathlib.Path, tmp_path: pathlib.Path):
        config = self.loco(with_validation(root, copies=12, others=2))
        with pytest.raises(UserError, match=r"12 of 14 validation .*; 2 are left.*at least 3"):
            fit_model(config, tmp_path / "model")
        assert not (tmp_path / "model").exists()

    def test_strict_ends_before_the_fit(
        self, root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Training, alone and in a sweep, updates by configuration and folder, calibration."""
        config, path = self.loco(with_validation(root, copies=0, others=4)), tmp_path / "model"
        dataset = dict(dataset_splits.open_dataset(config))
        fit_model(config, path, FolderSource(dataset["train"].records[:6]))
        with_copies = self.loco(root)
        folder = root / "part" / "validation" / "good"
        for record in dataset["train"].records[6:8]:
            shutil.copy(record.image, folder / f"copy_{record.image.name}")

        def too_late(*_: Any, **__: Any) -> None:
            raise AssertionError

        monkeypatch.setattr(fitting, "_fit", too_late)
        other, match = tmp_path / "other", "2 of 6 validation images are copies of images"
        with warnings.catch_warnings():
            warnings.simplefilter("error", DataWarning)
            for mode, place, given in (
                ("train", other, None),
                ("train_and_eval", other, None),
                ("update", path, None),
                ("update", path, f"{root}/part/train/good"),
            ):
                with pytest.raises(UserError, match=match):
                    modes.run(mode, with_copies, tmp_path / "run", place, given)
            with pytest.raises(UserError, match=match):
                modes.run("update", None, tmp_path, path, f"{root}/part/train/good")
        monkeypatch.setattr(calibrate.scoring_pass, "measure", too_late)
        with pytest.raises(UserError, match="is one of the images that the model was fitted"):
            modes.run("calibrate", None, tmp_path, path, f"{root}/part/train/good")
        assert not other.exists()
        assert loading.load(path).count == 6

    def test_those_that_are_given_are_refused(
        self, root: pathlib.Path, fitted: Any, tmp_path: pathlib.Path
    ):
        path = fitted(tmp_path / "model", make_config(root))
        with pytest.raises(UserError, match=r"--input: .*000\.png is one of the images that"):
            calibrate.calibrate(loading.load(path), normal(root, 0, 3), "given", path)

    def test_leave_one_out_takes_all_fitted_images_once(
        self, root: pathlib.Path, fitted: Any, tmp_path: pathlib.Path
    ):
        path = fitted(tmp_path / "model", make_config(root), 0, 7)
        model, before = loading.load(path), (path / "calibration.json").read_bytes()
        first = normal(root, 0, 7)
        image = np.zeros((1, 64, 64, 3), np.uint8)
        for records, message in (
            (first.records[:6], r"6 images to leave out .* fitted to 7"),
            ([*first.records[:6], *normal(root, 12, 13).records], r"012\.png is none of the"),
            ([*first.records[:6], first.records[0]], r"1 of 7 images is a copy of others"),
        ):
            with pytest.raises(UserError, match=message):  # a DataWarning is one here
                calibrate.calibrate(model, FolderSource(records), "leave_one_out", path)
        # The second error came amid leaving out.
        with pytest.raises(ValueError, match=r"given up to find thresholds.*load"):
            detector.score_pixels(model, image)
        assert (path / "calibration.json").read_bytes() == before
        found = calibrate.calibrate(model, first, "leave_one_out", path)
        detector.score_pixels(found, image)
        assert (path / "calibration.json").read_bytes() == before

    def test_part_of_the_fitted_images(
        self, root: pathlib.Path, fitted: Any, tmp_path: pathlib.Path
    ):
        path = fitted(tmp_path / "model", make_config(root))
        model = loading.load(path)
        found = calibrate.calibrate(model, normal(root, 3, 9), "leave_some_out", path)
        assert found.calibration is not None
        assert found.calibration.images == 6
        assert thresholds(path) == found.calibration


def test_scores_of_samples_are_those_of_the_files(
    root: pathlib.Path, fitted: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """Without a file, in batches that do not divide the images, on four devices."""
    config = make_config(root, "samples")
    source = normal(root, 0, 14)
    store = OnDisk(fitted(tmp_path / "model", config))
    batch = next(input_pipeline.batches(source, config.image, 14))
    left_out = statistics_store.refinalize(loading.load(store.path), store, 1)
    expected = detector.score_pixels(left_out, batch.images)
    monkeypatch.setattr(parallel, "every", lambda: Devices(4))
    model = statistics_store.refinalize(loading.load(store.path), store, 1)
    parts = list(detector.measure_samples(model))
    maps = np.concatenate([found.maps[valid] for found, valid in parts])
    scores = np.concatenate([found.summaries[valid, 0] for found, valid in parts])
    # The mean is taken off and put back, of which a roundoff remains: measured 4e-6.
    np.testing.assert_allclose(maps, expected.maps, rtol=1e-4)
    np.testing.assert_allclose(scores, expected.scores, rtol=1e-4)


def frames(folder: pathlib.Path, start: int, stop: int, size: int = 64) -> FolderSource:
    """Three frames of each drawn part, with noise of four grey levels."""
    generate(folder / "drawn", n_train=stop, n_test_good=1, n_test_per_defect=1, size=size)
    rng, records = np.random.default_rng(start), []
    for part, file in enumerate(sorted((folder / "drawn/part/train/good").iterdir())):
        pixels = np.asarray(Image.open(file).convert("RGB"), float)
        for frame in range(3 if part >= start else 0):
            path = folder / f"part{part:02}_{frame}.png"
            noisy = np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255)
            Image.fromarray(noisy.astype(np.uint8)).save(path)
            records.append(Record("train", path, None, 0, "good", path.name))
    return FolderSource(records)


def noisy(root: pathlib.Path, form: str = "moments", **changes: Any) -> Config:
    """Of fewer channels, among which frames of a part are alike."""
    return make_config(root, form, **({"model.channels": 6} | changes))


class TestFramesOfParts:
    def test_without_groups_a_warning(self, root: pathlib.Path, tmp_path: pathlib.Path):
        path, source = tmp_path / "model", frames(tmp_path, 0, 12)
        with pytest.warns(DataWarning, match="36 of 36 normal images are near copies"):
            fit_model(noisy(root), path, source)
        assert thresholds(path).warning.startswith("36 of 36 normal images are near copies")
        given = frames(tmp_path, 12, 18)
        with pytest.warns(DataWarning, match="of 18 normal images are near copies"):
            calibrate.calibrate(loading.load(path), given, "given", path)

    def test_with_groups_the_promise_holds(self, root: pathlib.Path, tmp_path: pathlib.Path):
        source, new = frames(tmp_path, 0, 12), frames(tmp_path, 12, 24)
        path, shares = tmp_path / "model", []
        images = np.stack([np.asarray(Image.open(r.image)) for r in new.records])
        for pattern in ("", "part[0-9]+"):
            config = noisy(root, **{"threshold.groups": pattern})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DataWarning)  # see above
                fit_model(config, path, source)
            scores = detector.score_pixels(loading.load(path), images).scores
            called = scores >= np.float32(thresholds(path).image_threshold)
            shares.append(np.mean(called.reshape(-1, 3).any(axis=1)))
        assert shares[0] > 0.5  # of parts, where a fifth was asked for
        assert shares[1] <= 0.25
        assert not thresholds(path).warning

    def test_of_the_model_alone(self, root: pathlib.Path, tmp_path: pathlib.Path):
        """Updated and merged models of samples, whose files nobody looks at."""
        source = frames(tmp_path, 0, 10)
        config = noisy(root, "samples", **{"threshold.image_rate": 0.1})
        parts = [FolderSource(source.records[:15]), FolderSource(source.records[15:])]
        for name, part in zip("ab", parts, strict=True):
            with pytest.warns(DataWarning, match="of 15 normal images are near copies"):
                fit_model(config, tmp_path / name, part)
        with pytest.warns(
            DataWarning, match=r"of 30 normal images are near copies.*\(image \d+ = image "
        ):
            grow.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
        assert thresholds(tmp_path / "merged").warning
        with pytest.warns(DataWarning, match="of 30 normal images are near copies"):
            grow.update(tmp_path / "a", parts[1])
        assert thresholds(tmp_path / "a").warning

    def test_groups_of_which_not_all_is_at_hand(
        self, root: pathlib.Path, tmp_path: pathlib.Path
    ):
        path, source = tmp_path / "model", frames(tmp_path, 0, 6)
        config = noisy(root, **{"threshold.groups": "part[0-9]+"})
        fit_model(config, path, FolderSource(source.records[:10]))
        some = FolderSource(source.records[:8])
        with pytest.raises(UserError, match=r"8 of the 10 images that were fitted.*groups="):
            calibrate.calibrate(loading.load(path), some, "leave_some_out", path)
        with pytest.warns(DataWarning, match="8 of the 18 .* at hand, and of which groups"):
            grow.update(path, FolderSource(source.records[10:]))
        assert thresholds(path) is None

    def test_copies_in_an_older_model(
        self, root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Fitted when each copy counted: what is left out then stays in."""
        records = normal(root, 0, 10).records
        with monkeypatch.context() as patch:
            patch.setattr(fitting.copies, "distinct", as_it_is)
            config = make_config(root, **{"threshold.normal": "none"})
            fit_model(config, tmp_path / "model", FolderSource([*records, records[0]]))
        fitted = loading.load(tmp_path / "model")
        with pytest.warns(DataWarning, match="1 of the 11 images that were fitted are copies"):
            calibrate.calibrate(
                fitted, FolderSource(records), "leave_one_out", tmp_path / "model"
            )


def as_it_is(source: FolderSource, devices: Devices) -> copies.Distinct:
    numbers = range(len(source.records))
    return copies.Distinct(source, numbers, source.records, copies.digests(source, devices))


def same(found: Any, expected: Any) -> None:
    """The same thresholds up to the rounding of a model that has grown."""
    assert (found.origin, found.images) == (expected.origin, expected.images)
    for name in ("image_threshold", "pixel_threshold", "typical_pixel"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-3)


def moved(root: pathlib.Path, tmp_path: pathlib.Path, start: int) -> pathlib.Path:
    """The normal images from `start` on at another place, and none at their own."""
    more = tmp_path / "more"
    shutil.move(root / "part" / "train" / "good", more)
    for file in sorted(more.iterdir())[:start]:
        file.unlink()
    return more


class TestUpdate:
    def test_thresholds_are_those_of_one_fit(
        self, root: pathlib.Path, fitted: Any, tmp_path: pathlib.Path
    ):
        """Of moments; samples: the next test."""
        whole = fitted(tmp_path / "whole", make_config(root))
        path = fitted(tmp_path / "grown", make_config(root), 0, 7)
        grown = grow.update(path, normal(root, 7, 14))
        assert thresholds(path) == grown.calibration
        same(thresholds(path), thresholds(whole))

    def test_samples_need_no_files(
        self, root: pathlib.Path, fitted: Any, tmp_path: pathlib.Path
    ):
        config = make_config(root, "samples")
        whole = fitted(tmp_path / "whole", config)
        path = fitted(tmp_path / "grown", config, 0, 7)
        modes.run("update", None, tmp_path, path, str(moved(root, tmp_path, 7)))
        same(thresholds(path), thresholds(whole))

    def test_moments_take_the_images_at_hand(
        self,
        root: pathlib.Path,
        fitted: Any,
        tmp_path: pathlib.Path,
        capsys: pytest.CaptureFixture[str],
    ):
        path = fitted(tmp_path / "model", make_config(root), 0, 7)
        more = moved(root, tmp_path, 9)
        capsys.readouterr()
        modes.run("update", None, tmp_path, path, str(more))
        found = thresholds(path)
        assert (found.origin, found.images) == ("leave_some_out", 5)
        out = capsys.readouterr().out
        assert "5 of the 12 images that were fitted are at hand" in out
        assert "thresholds of 5 normal images (some of the training images" in out

    def test_too_few_at_hand(self, root: pathlib.Path, fitted: Any, tmp_path: pathlib.Path):
        path = fitted(tmp_path / "model", make_config(root), 0, 7)
        more = moved(root, tmp_path, 12)
        with pytest.warns(DataWarning, match=r"no thresholds now: 2 of the 9 .*calibrate"):
            modes.run("update", None, tmp_path, path, str(more))
        assert thresholds(path) is None

    def test_validation_images(self, root: pathlib.Path, tmp_path: pathlib.Path):
        """Those of the model's dataset, without any that are fitted now."""
        with_validation(root, copies=0, others=5)
        config = make_config(root, **{"dataset.name": "mvtec_loco"})
        fit_model(config, tmp_path / "model")
        assert thresholds(tmp_path / "model").images == 5
        more = tmp_path / "more"
        more.mkdir()
        for file in sorted((root / "part" / "validation" / "good").iterdir())[:2]:
            shutil.copy(file, more)
        with pytest.warns(DataWarning, match="2 of 5 validation images are copies"):
            modes.run("update", None, tmp_path, tmp_path / "model", str(more))
        found = thresholds(tmp_path / "model")
        assert (found.origin, found.images) == ("held_out", 3)

    def test_images_held_back_are_not_added(self, root: pathlib.Path, tmp_path: pathlib.Path):
        config = make_config(root, **{"threshold.normal": "held_out"})
        fit_model(config, tmp_path / "model")
        fitted, before = loading.load(tmp_path / "model"), thresholds(tmp_path / "model")
        modes.run("update", config, tmp_path, tmp_path / "model")
        after = loading.load(tmp_path / "model")
        assert after.identity == fitted.identity
        assert after.calibration == before

    def test_an_update_that_was_killed_before_its_thresholds(
        self,
        root: pathlib.Path,
        fitted: Any,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        fitted(tmp_path / "model", make_config(root), 0, 7)
        more = normal(root, 7, 14)

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(calibration_file, "write", killed)
            with pytest.raises(KeyboardInterrupt):
                grow.update(tmp_path / "model", more)
        assert thresholds(tmp_path / "model") is None
        grow.update(tmp_path / "model", more)
        found = thresholds(tmp_path / "model")
        assert (found.origin, found.images) == ("leave_one_out", 14)
        before = (tmp_path / "model" / "calibration.json").stat().st_mtime_ns
        grow.update(tmp_path / "model", more)  # nothing to do
        assert (tmp_path / "model" / "calibration.json").stat().st_mtime_ns == before

    def test_none_stays_none(
        self,
        root: pathlib.Path,
        fitted: Any,
        tmp_path: pathlib.Path,
        capsys: pytest.CaptureFixture[str],
    ):
        config = make_config(root, **{"threshold.normal": "none"})
        fitted(tmp_path / "model", config, 0, 7)
        calibrate.calibrate(
            loading.load(tmp_path / "model"),
            normal(root, 10, 14),
            "given",
            tmp_path / "model",
        )
        assert thresholds(tmp_path / "model") is not None
        capsys.readouterr()
        grow.update(tmp_path / "model", normal(root, 7, 10))
        # Those that it had are of the model before, which is said at once.
        assert "thresholds of another state of the model" in capsys.readouterr().out

    def test_random_views_of_fitted_images(self, root: pathlib.Path, tmp_path: pathlib.Path):
        """They depend on the names: of moments nothing can be left out from new ones."""
        config = make_config(root, "moments", **{"image.rotation": 5.0})
        fit_model(config, tmp_path / "model", normal(root, 0, 5))
        with pytest.warns(DataWarning, match="no thresholds now: random views"):
            grow.update(tmp_path / "model", normal(root, 9, 11))


def moments(path: pathlib.Path) -> Any:
    return statistics_store.load_checkpoint(path, Devices(1))[0].statistics


class TestForget:
    @pytest.mark.parametrize("devices", [1, 4])
    def test_is_the_inverse_of_update(
        self,
        devices: int,
        root: pathlib.Path,
        fitted: Any,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """Moments within 1e-5, thresholds and suspects as of one fit to the others."""
        config = make_config(root)
        expected = fitted(tmp_path / "expected", config, 0, 10)
        path = fitted(tmp_path / "model", config, 0, 10)
        monkeypatch.setattr(parallel, "every", lambda: Devices(devices))
        grow.update(path, normal(root, 10, 14))
        place = tmp_path / "wrong"
        place.mkdir()
        for record in normal(root, 10, 14).records:
            shutil.move(record.image, place / f"other_{record.image.name}")
        modes.run("forget", None, tmp_path, path, str(place))
        found, wanted = loading.load(path), loading.load(expected)
        np.testing.assert_array_equal(found.images, wanted.images)
        same(found.calibration, wanted.calibration)
        assert len(suspects(tmp_path)) == 10
        a, b = moments(path), moments(expected)
        for x, y in ((a.mean, b.mean), (a.m2, b.m2)):
            x, y = np.asarray(x[0]), np.asarray(y[0])
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())

    def test_samples_lose_rows(self, root: pathlib.Path, fitted: Any, tmp_path: pathlib.Path):
        """No image is needed but those that are to be forgotten, of which none is decoded."""
        config = make_config(root, "samples")
        path = fitted(tmp_path / "model", config)
        values = np.asarray(moments(path).values[0])
        more = moved(root, tmp_path, 12)
        modes.run("forget", None, tmp_path, path, str(more))
        np.testing.assert_array_equal(np.asarray(moments(path).values[0]), values[..., :12, :])
        found = thresholds(path)
        assert (found.origin, found.images) == ("leave_one_out", 12)

    def test_refused(self, root: pathlib.Path, fitted: Any, tmp_path: pathlib.Path):
        path = fitted(tmp_path / "model", make_config(root), 0, 7)
        before = {x: x.read_bytes() for x in path.rglob("*") if x.is_file()}
        views = make_config(root, "moments", **{"image.rotation": 5.0})
        fit_model(views, tmp_path / "views", normal(root, 0, 5))
        for place, start, stop, message in (
            (path, 6, 9, r"007\.png, .*008\.png: 2 of 3 images to forget were never fitted"),
            (path, 0, 6, "fitted to 7 images, of which 1 would be left"),
            (tmp_path / "views", 0, 2, "random views of fitted images cannot be drawn again"),
        ):
            with pytest.raises(UserError, match=message):
                grow.forget(place, normal(root, start, stop))
        with pytest.raises(UserError, match="--input: missing; expected images that the model"):
            modes.check("forget", {"checkpoint": "x"}, None)
        assert {x: x.read_bytes() for x in path.rglob("*") if x.is_file()} == before

    def test_none_of_the_images_makes_thresholds(
        self, root: pathlib.Path, tmp_path: pathlib.Path
    ):
        """Not even those of validation that are copies of them."""
        config = make_config(
            with_validation(root, copies=1, others=4), **{"dataset.name": "mvtec_loco"}
        )
        with pytest.warns(DataWarning, match="1 of 5 validation images"):
            fit_model(config, tmp_path / "model")
        wrong = root / "part" / "train" / "good" / "000.png"
        with pytest.warns(DataWarning, match="1 of 5 validation images"):
            modes.run("forget", None, tmp_path, tmp_path / "model", str(wrong))
        assert thresholds(tmp_path / "model").images == 4

    @pytest.mark.parametrize("place", ["before the model", "before its thresholds"])
    def test_killed(
        self,
        place: str,
        root: pathlib.Path,
        fitted: Any,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """The model is as before, or whole; the same command ends as if undisturbed."""
        path, wrong = fitted(tmp_path / "model", make_config(root)), normal(root, 3, 5)
        other = fitted(tmp_path / "other", make_config(root))
        grow.forget(other, wrong)

        def killed(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            owner, name = (fitting, "finalize"), (calibration_file, "write")
            patch.setattr(*(owner if place == "before the model" else name), killed)
            with pytest.raises(KeyboardInterrupt):
                grow.forget(path, wrong)
        left = 14 if place == "before the model" else 12
        assert loading.load(path).count == left
        grow.forget(path, wrong)
        assert loading.load(path).identity == loading.load(other).identity
        assert thresholds(path) == thresholds(other)
        before = (path / "calibration.json").stat().st_mtime_ns
        grow.forget(path, wrong)  # nothing to do
        assert (path / "calibration.json").stat().st_mtime_ns == before

    def test_full_disk(
        self,
        root: pathlib.Path,
        fitted: Any,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        path = fitted(tmp_path / "model", make_config(root))

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.ocp, "save", full)
            with pytest.raises(UserError, match=r"What was saved before is as it was"):
                grow.forget(path, normal(root, 3, 5))
        assert loading.load(path).count == 14
        assert thresholds(path).images == 14

    def test_images_that_come_back(
        self, root: pathlib.Path, fitted: Any, tmp_path: pathlib.Path
    ):
        """Told, after a merge as well, until they have come back."""
        path = fitted(tmp_path / "model", make_config(root), 0, 7)
        grow.forget(path, normal(root, 2, 3))
        fitted(tmp_path / "other", make_config(root), 7, 10)
        grow.merge([path, tmp_path / "other"], tmp_path / "merged")
        for place in (path, tmp_path / "merged"):
            with pytest.warns(DataWarning, match=r"002\.png: 1 of the images to add were forg"):
                grow.update(place, normal(root, 0, 7))
            grow.forget(place, normal(root, 5, 6))
            fitted_again, _ = statistics_store.load_checkpoint(place, Devices(1))
            assert len(fitted_again.forgotten) == 1


def suspects(workdir: pathlib.Path) -> dict[str, float]:
    """The ranking in suspects.csv."""
    with (workdir / "suspects.csv").open(newline="") as file:
        return {row["path"]: float(row["score"]) for row in csv.DictReader(file)}


class TestSuspects:
    """suspects.csv is of the model that has grown, or there is none."""

    # Of samples nobody looks at the images, but for the names.
    def test_is_that_of_one_fit(self, root: pathlib.Path, fitted: Any, tmp_path: pathlib.Path):
        config = make_config(root, "samples")
        modes.run("train", config, tmp_path / "whole", tmp_path / "whole" / "model")
        expected = suspects(tmp_path / "whole")
        workdir = tmp_path / "grown"
        fitted(workdir / "model", config, 0, 7)
        modes.run("update", config, workdir, workdir / "model")
        assert thresholds(workdir / "model").origin == "leave_one_out"
        # Up to the rounding of a model that has grown.
        assert suspects(workdir) == pytest.approx(expected, rel=1e-3)
        before = (workdir / "suspects.csv").stat().st_mtime_ns
        modes.run("update", config, workdir, workdir / "model")  # nothing to add
        assert (workdir / "suspects.csv").stat().st_mtime_ns == before

        fitted(tmp_path / "a", config, 0, 7)
        fitted(tmp_path / "b", config, 7, 14)
        models = [str(tmp_path / "a"), str(tmp_path / "b")]
        (workdir / "suspects.csv").unlink()
        modes.run("merge", None, workdir, workdir / "model", models=models)
        assert suspects(workdir) == pytest.approx(expected, rel=1e-3)
        # Without the images their names are not known.
        shutil.rmtree(root)
        modes.run("merge", None, workdir, workdir / "model", models=models)
        assert not (workdir / "suspects.csv").exists()

    def test_an_old_one_goes(self, root: pathlib.Path, fitted: Any, tmp_path: pathlib.Path):
        """Moments; and an update by the configuration's images."""
        config = make_config(root)
        fitted(tmp_path / "model", config, 0, 7)
        modes.run("update", config, tmp_path, tmp_path / "model")
        found = thresholds(tmp_path / "model")
        assert (found.origin, found.images) == ("leave_one_out", 14)
        assert len(suspects(tmp_path)) == 14
        old = (tmp_path / "suspects.csv").read_text()
        for normal_images in ("none", "held_out"):
            (tmp_path / "suspects.csv").write_text(old)
            shutil.rmtree(tmp_path / "model")
            fitted(tmp_path / "model", config, 0, 5)
            other = make_config(root, **{"threshold.normal": normal_images})
            modes.run("update", other, tmp_path, tmp_path / "model")
            assert not (tmp_path / "suspects.csv").exists()

    @pytest.mark.parametrize("mode", ["train", "train_and_eval", "update"])
    def test_a_file_of_the_users_stays(
        self, mode: str, root: pathlib.Path, tmp_path: pathlib.Path
    ):
        (tmp_path / "suspects.csv").write_text("name,alibi\n")
        config = make_config(root)
        with pytest.raises(UserError, match=r"suspects\.csv: exists and is not from an"):
            modes.run(mode, config, tmp_path, tmp_path / "model")
        assert (tmp_path / "suspects.csv").read_text() == "name,alibi\n"
        assert not (tmp_path / "model").exists()


def test_models_of_settings_that_are_refused_now(root: pathlib.Path, tmp_path: pathlib.Path):
    """Earlier versions took a standard deviation of 0..255: such models go on being used."""
    config = make_config(root, **{"threshold.normal": "none"})
    image = dataclasses.replace(config.image, std=(58.0, 57.0, 57.5))
    old = dataclasses.replace(config, image=image)
    for name, start in (("a", 0), ("b", 5)):
        fit_model(old, tmp_path / name, normal(root, start, start + 5))
    match = r"config\.image\.std=\(58\.0, .*divided by 255"
    with pytest.warns(DataWarning, match=match):
        fitted = loading.load(tmp_path / "a", {"outputs.figures": "none"})
    assert fitted.config.image.std == image.std
    export.export(fitted, tmp_path / "model.safetensors")
    with pytest.warns(DataWarning, match=match):
        assert loading.load(tmp_path / "model.safetensors").config.image == image
    with pytest.warns(DataWarning, match=match):
        grow.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "merged")
    with pytest.warns(DataWarning, match=match):
        assert grow.update(tmp_path / "a", normal(root, 10, 12)).count == 7
    # Fitted anew without a word about the model that is replaced.
    fit_model(config, tmp_path / "b", normal(root, 5, 10))
    values = config_lib.to_dict(old)
    with pytest.raises(UserError, match=r"config\.image\.std=.*divide those of 0\.\.255"):
        validate(values)
    with pytest.raises(UserError, match=r"config\.image\.std=.*divide those of 0\.\.255"):
        config_lib.resolve({"image.std": image.std}, config)


class TestMerge:
    def models(self, fitted: Any, config: Config, tmp_path: pathlib.Path) -> list:
        fitted(tmp_path / "whole", config)
        return [fitted(tmp_path / "a", config, 0, 7), fitted(tmp_path / "b", config, 7, 14)]

    @pytest.mark.parametrize("form", ["moments", "samples"])
    def test_thresholds_are_those_of_one_fit(
        self, form: str, root: pathlib.Path, fitted: Any, tmp_path: pathlib.Path
    ):
        paths = self.models(fitted, make_config(root, form), tmp_path)
        if form == "samples":  # which need no files
            shutil.rmtree(root)
        grow.merge(paths, str(tmp_path / "merged"))
        same(thresholds(tmp_path / "merged"), thresholds(tmp_path / "whole"))

    def test_moments_without_files(
        self, root: pathlib.Path, fitted: Any, tmp_path: pathlib.Path
    ):
        paths = self.models(fitted, make_config(root), tmp_path)
        shutil.rmtree(root)
        with pytest.warns(
            DataWarning, match=r"merged: .* no thresholds now: 0 of the 14"
        ) as said:
            grow.merge(paths, tmp_path / "merged")
        assert f"--mode=calibrate --checkpoint={tmp_path / 'merged'} --input=" in str(
            said[0].message
        )
        assert thresholds(tmp_path / "merged") is None

    def test_none_stays_none(self, root: pathlib.Path, fitted: Any, tmp_path: pathlib.Path):
        config = make_config(root, **{"threshold.normal": "none"})
        paths = self.models(fitted, config, tmp_path)
        assert grow.merge(paths, tmp_path / "merged").calibration is None

    def test_weights_that_are_gone(
        self,
        root: pathlib.Path,
        fitted: Any,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        paths = self.models(fitted, make_config(root), tmp_path)

        def gone(*_: Any) -> None:
            raise UserError("weights: no such file")

        monkeypatch.setattr(fitting, "load_weights", gone)
        with pytest.warns(DataWarning, match="no thresholds now"):
            grow.merge(paths, tmp_path / "merged")
