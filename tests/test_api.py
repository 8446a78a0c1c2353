"""The Python API: what it takes, what it returns, and that it agrees with the command line."""

import dataclasses
import doctest
import io
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import padim_jax
from padim_jax import api
from padim_jax.config import defaults
from padim_jax.config import settings as config
from padim_jax.data import dataset_splits
from padim_jax.data.layouts.synthetic import generate
from padim_jax.errors import DataWarning, UserError
from padim_jax.runs import train

SIZE = 64
# Batches of four and moments, whatever is fitted: few programs to compile.
SETTINGS: dict[str, Any] = {
    "backbone": "scattering",
    "layers": ("layer1",),
    "channels": 8,
    "statistics": "moments",
    "resize": (SIZE, SIZE),
    "batch_size": 4,
}
GOOD = 8


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("data")
    generate(root, n_train=GOOD + 4, n_test_good=3, n_test_per_defect=2, size=SIZE)
    return root / "part"


@pytest.fixture(scope="module")
def paths(part: pathlib.Path) -> list[pathlib.Path]:
    return sorted((part / "train" / "good").iterdir())


@pytest.fixture(scope="module")
def arrays(paths: list[pathlib.Path]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


@pytest.fixture(scope="module")
def fitted(arrays: np.ndarray) -> padim_jax.Detector:
    return padim_jax.fit(arrays[:GOOD], **SETTINGS)


def maps(detector: padim_jax.Detector, images: np.ndarray) -> np.ndarray:
    return detector.score(images).maps


class TestFit:
    def test_equals_the_command_line(self, part: pathlib.Path, tmp_path: pathlib.Path):
        values = defaults.get_config("best")
        values.update_from_flattened_dict(
            {
                "dataset.root": str(part.parent),
                "category": "part",
                "model.backbone": "scattering",
                "model.layers": ("layer1",),
                "model.channels": 8,
                "model.statistics": "moments",
                "image.resize": (SIZE, SIZE),
                "batch_size": SETTINGS["batch_size"],
            }
        )
        valid = config.validate(values)
        splits = dataset_splits.open_dataset(valid)
        expected = train.train(valid, splits, tmp_path / "model")
        found = padim_jax.fit(part / "train" / "good", **SETTINGS)
        assert found.identity == expected.identity
        assert found.thresholds == expected.calibration
        for ours, theirs in zip(
            jax.tree.leaves(found.gaussian), jax.tree.leaves(expected.gaussian), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)

    def test_takes_images_in_any_form(
        self, arrays: np.ndarray, paths: list[pathlib.Path], fitted: padim_jax.Detector
    ):
        def files() -> Iterator[bytes]:
            for path in paths[:GOOD]:
                yield path.read_bytes()

        forms = {
            "paths": [str(path) for path in paths[:GOOD]],
            "Pillow images": [Image.open(path) for path in paths[:GOOD]],
            "an iterator of files' bytes": files(),
            "a mixture": [*arrays[:4], *paths[4:GOOD]],
        }
        expected = maps(fitted, arrays[GOOD:])
        for name, images in forms.items():
            found = padim_jax.fit(images, **SETTINGS)
            np.testing.assert_array_equal(maps(found, arrays[GOOD:]), expected, name)
            assert found.thresholds == fitted.thresholds, name

    def test_grey_images(self, arrays: np.ndarray):
        grey = arrays[..., 0]
        three = np.repeat(grey[..., None], 3, axis=-1)
        found, expected = (padim_jax.fit(list(x[:4]), **SETTINGS) for x in (grey, three))
        np.testing.assert_array_equal(maps(found, three[GOOD:]), maps(expected, three[GOOD:]))

    def test_prints_and_writes_nothing(
        self,
        arrays: np.ndarray,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        handlers = [signal.getsignal(number) for number in signal.Signals]
        detector = padim_jax.fit(arrays[:GOOD], **SETTINGS)
        detector.evaluate(arrays[:4], [False, False, True, True])
        detector.update(arrays[GOOD:])
        assert [signal.getsignal(number) for number in signal.Signals] == handlers
        assert capfd.readouterr() == ("", "")
        assert list(tmp_path.iterdir()) == []

    def test_thresholds(self, arrays: np.ndarray):
        none = padim_jax.fit(arrays[:4], thresholds="none", **SETTINGS)
        assert none.thresholds is None
        found = none.score(arrays[4:5])
        assert (found.is_anomalous, found.rarity) == (None, None)
        held_out = padim_jax.fit(arrays[:4], thresholds=arrays[4:], **SETTINGS)
        assert held_out.thresholds is not None
        assert (held_out.thresholds.origin, held_out.thresholds.images) == ("held_out", 8)
        np.testing.assert_array_equal(
            held_out.thresholds.scores, np.sort(none.score(arrays[4:]).scores)
        )

    def test_groups_are_found_in_paths(self, paths: list[pathlib.Path], tmp_path: pathlib.Path):
        """In a list of paths as in a folder; two images a group."""
        for i, path in enumerate(paths[:6]):
            (tmp_path / f"part{i // 2}_{i}.png").write_bytes(path.read_bytes())
        found = padim_jax.fit(sorted(tmp_path.iterdir()), groups=r"part\d+", **SETTINGS)
        assert found.thresholds is not None
        assert (found.thresholds.images, found.thresholds.groups) == (6, 3)

    def test_copies_count_once(self, arrays: np.ndarray, fitted: padim_jax.Detector):
        with pytest.warns(padim_jax.DataWarning, match="3 of 11 images are copies"):
            found = padim_jax.fit([*arrays[:GOOD], *arrays[:3]], **SETTINGS)
        assert found.identity == fitted.identity

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"chanels": 20}, "chanels: no such setting; did you mean channels?"),
            ({"seed": 1}, "seed: a setting of several groups; expected .*model_seed"),
            ({"channels": -1}, "config.model.channels=-1: expected"),
            ({"preset": "best of all"}, "expected one of anomalib"),
            ({"normal": "none"}, "normal: no such setting"),
        ],
    )
    def test_wrong_settings(self, arrays: np.ndarray, settings: dict, message: str):
        with pytest.raises(padim_jax.UserError, match=message):
            padim_jax.fit(arrays, **{**SETTINGS, **settings})

    def test_short_names(self, arrays: np.ndarray):
        found = padim_jax.fit(arrays[:4], **SETTINGS, model_seed=7, map_upsample="bicubic")
        own = found.config
        assert (own.model.seed, own.map.upsample, own.batch_size) == (7, "bicubic", 4)
        silent = dataclasses.replace(
            own, threshold=dataclasses.replace(own.threshold, normal="none")
        )
        again = padim_jax.fit(arrays[:4], config=silent)
        assert again.config.model == own.model
        assert again.thresholds is None

    @pytest.mark.parametrize(
        ("images", "error", "message"),
        [
            ([], padim_jax.UserError, "0 normal image"),
            ("nowhere/", padim_jax.UserError, "images=nowhere/: no image there"),
            (np.zeros((8, 8)), TypeError, "a single image"),
            (b"GIF", TypeError, "images"),
            ([1, 2], TypeError, "images"),
            ([np.zeros((8, 8, 3))] * 2, TypeError, "float64"),
        ],
    )
    def test_no_images(self, images, error: type[Exception], message: str):
        with pytest.raises(error, match=message):
            padim_jax.fit(images, **SETTINGS)


class TestScoring:
    def test_stream_equals_score(self, arrays: np.ndarray, fitted: padim_jax.Detector):
        whole = fitted.score(arrays)
        for size in (1, 5, 12, 20):
            parts = list(fitted.stream(iter(arrays), size))
            assert [len(x.scores) for x in parts] == [
                min(size, 12 - start) for start in range(0, 12, size)
            ]
            # Batches of another shape sum in another order; see test_detector.
            together = np.concatenate([x.maps for x in parts])
            np.testing.assert_allclose(together, whole.maps, rtol=2e-5)

    def test_stream_is_lazy(self, arrays: np.ndarray, fitted: padim_jax.Detector):
        taken = []

        def images() -> Iterator[np.ndarray]:
            for i in range(1000):
                taken.append(i)
                yield arrays[i % len(arrays)]

        stream = fitted.stream(images(), batch_size=4)
        next(stream)
        stream.close()
        assert len(taken) == 8

    def test_stream_says_which_image_is_wrong(
        self, arrays: np.ndarray, fitted: padim_jax.Detector
    ):
        with pytest.raises(TypeError, match=r"images\[5\]"):
            list(fitted.stream([*arrays[:5], arrays[0] / 255], batch_size=2))
        with pytest.raises(ValueError, match="batch_size=0"):
            next(fitted.stream(arrays, batch_size=0))

    def test_verdicts(self, arrays: np.ndarray, fitted: padim_jax.Detector):
        spoilt = arrays.copy()
        spoilt[::2, 20:40, 20:40] = 255
        found = fitted.score(spoilt)
        thresholds = fitted.thresholds
        assert thresholds is not None
        assert found.is_anomalous is not None
        assert found.is_anomalous[::2].all()
        np.testing.assert_array_equal(
            found.is_anomalous, found.scores >= thresholds.image_threshold
        )
        np.testing.assert_array_equal(found.rarity, thresholds.calibrated(found.scores))

    def test_regions(self, arrays: np.ndarray, fitted: padim_jax.Detector):
        """In pixels of the image given, which may be of any size."""
        spoiled = arrays[GOOD].copy()
        spoiled[16:32, 40:56] = 255 - spoiled[16:32, 40:56]
        large = Image.fromarray(spoiled).resize((2 * SIZE, 3 * SIZE), Image.Resampling.NEAREST)
        found = fitted.score([spoiled, large])
        assert found.regions is not None
        assert fitted.calibration is not None
        for (regions, scale), anomaly_map in zip(
            zip(found.regions, [(1, 1), (2, 3)], strict=True), found.maps, strict=True
        ):
            left, top, right, bottom = regions[0].box
            assert left < 48 * scale[0] < right
            assert top < 24 * scale[1] < bottom
            assert regions[0].peak == anomaly_map.max()
            high = anomaly_map >= np.float32(fitted.calibration.pixel_threshold)
            assert sum(x.area for x in regions) == high.sum() * scale[0] * scale[1]
        assert jax.tree.map(np.copy, found).regions == found.regions

    @pytest.mark.parametrize("form", ["moments", "samples"])
    def test_decide(self, arrays: np.ndarray, form: str):
        """By regions alone: what is scored high but has no region is normal."""
        rule = {"decide": "regions", "min_area": 200.0}
        settings: dict[str, Any] = SETTINGS | {"statistics": form, **rule}
        fitted = padim_jax.fit(arrays[:GOOD], **settings)
        assert (known := fitted.calibration) is not None
        assert (known.decide, known.min_area, known.close) == ("regions", 200.0, 0.0)
        spoiled = arrays[GOOD].copy()
        spoiled[:, 40:56] = 255 - spoiled[:, 40:56]
        found = fitted.score([arrays[0], spoiled])
        assert found.is_anomalous is not None
        assert found.regions is not None
        assert found.is_anomalous.tolist() == [bool(x) for x in found.regions] == [False, True]
        assert min(x.area for x in found.regions[1]) >= 200
        extended = fitted.update(arrays[GOOD:])
        assert extended.calibration is None or extended.calibration.decide == "regions"
        plain: dict[str, Any] = SETTINGS | {"statistics": form}
        other = padim_jax.fit(arrays[:GOOD], **plain)
        config = dataclasses.replace(other.config, decide="either")
        with pytest.raises(UserError, match=r"decide=either: the model needs .*decide=score"):
            dataclasses.replace(other, config=config).score(arrays[:1])

    def test_regions_larger_than_an_image(self, arrays: np.ndarray):
        with pytest.raises(UserError, match=r"min_area=5000: images.*4096 pixels"):
            padim_jax.fit(arrays[:GOOD], **SETTINGS, decide="either", min_area=5000.0)

    def test_embeddings_have_the_mean_of_the_gaussians(self, arrays: np.ndarray):
        """For one level; the others' means are of the same features."""
        detector = padim_jax.fit(arrays[:GOOD], **SETTINGS)
        found = detector.embed(arrays[:GOOD])
        assert found.shape == (GOOD, SIZE // 4, SIZE // 4, 8)
        expected = found.astype(np.float64).mean(axis=0).reshape(-1, 8)
        mean = np.asarray(detector.gaussian.mean[0])[0].reshape(-1, 8)
        order = np.argsort(mean[:, 0])
        # Sums of eight numbers around 1 in float32.
        np.testing.assert_allclose(mean[order], expected[np.argsort(expected[:, 0])], atol=2e-6)

    def test_evaluate(self, part: pathlib.Path, fitted: padim_jax.Detector):
        good = sorted((part / "test" / "good").iterdir())
        bad = sorted(
            path for path in (part / "test").rglob("*.png") if path.parent.name != "good"
        )
        masks = [
            part / "ground_truth" / path.parent.name / f"{path.stem}_mask.png" for path in bad
        ]
        labels = [False] * len(good) + [True] * len(bad)
        found = fitted.evaluate([*good, *bad], labels, [None] * len(good) + masks)
        scores = fitted.score([*good, *bad]).scores
        pairs = np.subtract.outer(scores[len(good) :], scores[: len(good)])
        assert found["image_auroc"] == pytest.approx(np.mean((pairs > 0) + (pairs == 0) / 2))
        assert 0.5 < found["pixel_auroc"] <= 1
        assert found["normal_threshold"] is not None
        as_arrays = [None if mask is None else np.asarray(Image.open(mask)) for mask in masks]
        again = fitted.evaluate([*good, *bad], labels, [None] * len(good) + as_arrays)
        assert again == found
        unknown = fitted.evaluate([*good, *bad], labels)
        assert unknown["image_auroc"] == found["image_auroc"]
        assert unknown["pixel_auroc"] is None

    def test_evaluate_numbers_differ(self, arrays: np.ndarray, fitted: padim_jax.Detector):
        with pytest.raises(padim_jax.UserError, match="12 images, 1 labels and 1 masks"):
            fitted.evaluate(arrays, [True])
        with pytest.raises(padim_jax.UserError, match=r"masks\[0\]: .* labelled normal"):
            fitted.evaluate(arrays[:1], [False], [np.ones((SIZE, SIZE))])


class TestGrowing:
    def test_update_equals_one_fit(self, arrays: np.ndarray, fitted: padim_jax.Detector):
        samples = {**SETTINGS, "statistics": "samples"}
        small = padim_jax.fit(arrays[:GOOD], **samples)
        found = small.update(arrays)  # those that are known are left out
        expected = padim_jax.fit(arrays, **samples)
        assert found.count == expected.count == len(arrays)
        # The statistics are the embeddings themselves.
        np.testing.assert_array_equal(maps(found, arrays), maps(expected, arrays))
        assert found.thresholds is not None
        assert found.thresholds.images == len(arrays)
        # The embeddings themselves, with their mean taken off and put back; see test_growing.
        assert expected.thresholds is not None
        assert found.thresholds.image_threshold == pytest.approx(
            expected.thresholds.image_threshold, rel=1e-4
        )
        assert fitted.update(arrays[:GOOD]) is fitted

    def test_update_of_moments(self, arrays: np.ndarray):
        small = padim_jax.fit(arrays[:4], **SETTINGS)
        found = small.update(arrays[4:], thresholds=arrays[:0].tolist() or None)
        expected = padim_jax.fit(arrays, **SETTINGS)
        # Chan's merge rounds otherwise than one stream; measured 2e-5.
        np.testing.assert_allclose(maps(found, arrays), maps(expected, arrays), rtol=1e-3)
        assert found.thresholds is not None
        assert found.thresholds.origin == "leave_some_out"

    @pytest.mark.parametrize("form", ["moments", "samples"])
    def test_forget_equals_one_fit(self, form: str, arrays: np.ndarray):
        settings = {**SETTINGS, "statistics": form}
        whole, expected = (padim_jax.fit(x, **settings) for x in (arrays, arrays[:GOOD]))
        if form == "moments":
            with pytest.warns(DataWarning, match="no thresholds now: 0 of the 8 images"):
                found = whole.forget(arrays[GOOD:])
            assert found.thresholds is None
        else:
            found = whole.forget(arrays[GOOD:])
            assert found.thresholds == expected.thresholds
        np.testing.assert_array_equal(found.images, expected.images)
        np.testing.assert_allclose(maps(found, arrays), maps(expected, arrays), rtol=1e-4)
        assert found.forget(arrays[GOOD:]) is found  # as a command that is given twice
        with pytest.warns(DataWarning, match="4 of the images to add were forgotten before"):
            again = found.update(arrays[GOOD:])
        np.testing.assert_array_equal(again.images, whole.images)
        np.testing.assert_allclose(maps(again, arrays), maps(whole, arrays), rtol=1e-4)

    def test_forget_only_what_was_fitted(self, arrays: np.ndarray, fitted: padim_jax.Detector):
        with pytest.raises(
            UserError, match=r"images\[2\], images\[3\]: 2 of 4 .* never fitted"
        ):
            fitted.forget(arrays[GOOD - 2 : GOOD + 2])
        with pytest.raises(UserError, match="fitted to 8 images, of which 1 would be left"):
            fitted.forget(arrays[: GOOD - 1])
        bright = np.full_like(arrays[:1], 255)
        odd = padim_jax.fit(
            np.concatenate([arrays[:3], bright]), **SETTINGS, regularization=1e-4
        )
        with pytest.raises(UserError, match=r"cannot forget them: .* rounding .* fit again"):
            odd.forget(bright)

    def test_merge(self, arrays: np.ndarray):
        samples = {**SETTINGS, "statistics": "samples"}
        parts = [padim_jax.fit(x, **samples) for x in (arrays[:GOOD], arrays[GOOD:])]
        found, expected = padim_jax.merge(parts), padim_jax.fit(arrays, **samples)
        np.testing.assert_array_equal(maps(found, arrays), maps(expected, arrays))
        assert found.thresholds is not None
        with pytest.raises(padim_jax.UserError, match="would count twice"):
            padim_jax.merge([parts[0], parts[0]])
        with pytest.raises(padim_jax.UserError, match="at least 2"):
            padim_jax.merge(parts[:1])

    def test_saved_and_loaded(
        self, arrays: np.ndarray, fitted: padim_jax.Detector, tmp_path: pathlib.Path
    ):
        fitted.save(tmp_path / "part")
        loaded = padim_jax.load(tmp_path / "part")
        np.testing.assert_array_equal(maps(loaded, arrays), maps(fitted, arrays))
        assert loaded.thresholds == fitted.thresholds
        assert loaded.identity == fitted.identity
        with pytest.raises(padim_jax.UserError, match="holds a model"):
            fitted.save(tmp_path / "part")
        fitted.save(tmp_path / "part", overwrite=True)
        larger = loaded.update(arrays)
        expected = fitted.update(arrays)
        np.testing.assert_array_equal(maps(larger, arrays), maps(expected, arrays))
        larger.save(tmp_path / "larger")
        assert padim_jax.load(tmp_path / "larger").count == len(arrays)
        larger.save(tmp_path / "part", overwrite=True)
        with pytest.raises(padim_jax.UserError, match="holds another model by now"):
            loaded.update(arrays)

    def test_exported(
        self, arrays: np.ndarray, fitted: padim_jax.Detector, tmp_path: pathlib.Path
    ):
        fitted.export(tmp_path / "part.safetensors")
        loaded = padim_jax.load(tmp_path / "part.safetensors")
        np.testing.assert_array_equal(maps(loaded, arrays), maps(fitted, arrays))
        with pytest.raises(padim_jax.UserError, match="no statistics"):
            loaded.update(arrays)

    def test_verdicts_by_regions_are_not_exported_as_those_by_scores(
        self, fitted: padim_jax.Detector, tmp_path: pathlib.Path
    ):
        config = dataclasses.replace(fitted.config, decide="either")
        with pytest.raises(UserError, match=r"config.decide=either: .* find no regions"):
            dataclasses.replace(fitted, config=config).export(tmp_path / "part.stablehlo")
        assert not list(tmp_path.iterdir())


class TestDetector:
    def test_is_a_pytree(self, arrays: np.ndarray, fitted: padim_jax.Detector):
        leaves, structure = jax.tree.flatten(fitted)
        assert all(isinstance(leaf, jax.Array) for leaf in leaves)
        again = jax.tree.unflatten(structure, leaves)
        np.testing.assert_array_equal(maps(again, arrays), maps(fitted, arrays))
        other = padim_jax.fit(arrays[:GOOD], **SETTINGS)
        assert jax.tree.structure(other) == structure  # of the same model
        assert jax.tree.structure(padim_jax.fit(arrays, **SETTINGS)) != structure
        assert jax.tree.map(lambda x: x, fitted.score(arrays)).maps.shape == (12, SIZE, SIZE)

    def test_is_equal_to_itself_alone(self, arrays: np.ndarray, fitted: padim_jax.Detector):
        other = padim_jax.fit(arrays[:GOOD], **SETTINGS)
        assert fitted == fitted
        assert fitted != other
        assert len({fitted, other}) == 2

    def test_repr_has_two_lines(self, arrays: np.ndarray, fitted: padim_jax.Detector):
        for shown in (repr(fitted), repr(fitted.score(arrays))):
            assert len(shown.splitlines()) == 2
        assert "scattering" in repr(fitted)
        assert "fitted to 8 images" in repr(fitted)


def test_examples_in_docstrings():
    for module in (padim_jax, api):
        failed, count = doctest.testmod(module)
        assert count
        assert not failed


def test_single_images_are_told(fitted: padim_jax.Detector, arrays: np.ndarray):
    single: list[Any] = [arrays[0], io.BytesIO(b""), Image.fromarray(arrays[0])]
    for image in single:
        with pytest.raises(TypeError):
            padim_jax.score(fitted, image)
        with pytest.raises(TypeError):
            fitted.score(image)
