"""Training and evaluation end to end on small synthetic data with random weights."""

import base64
import dataclasses
import hashlib
import io
import json
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from PIL import Image

from padim_jax.config import backbones
from padim_jax.config.settings import validate
from padim_jax.core import scoring
from padim_jax.core.types import Moments, Samples
from padim_jax.data import dataset_splits, sampling
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.layouts.synthetic import generate
from padim_jax.data.synthetic_part import DEFECTS
from padim_jax.detector import detector, steps
from padim_jax.detector import statistics as statistics_lib
from padim_jax.devices import parallel
from padim_jax.errors import DataWarning, UserError
from padim_jax.runs import evaluate, fitting, loading, modes, results_folder, train
from padim_jax.store import checkpoint


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("synthetic")
    generate(folder, n_train=10, n_test_good=3, n_test_per_defect=2, size=96)
    return folder


def settings(root: pathlib.Path, **model: Any) -> Any:
    values = small.values(root, **{"outputs.figures": "none"})
    values.model.update(model)
    return values


ALL_LAYERS = ("layer1", "layer2", "layer3")


def run(values: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Fits to all training images, and evaluates."""
    config = validate(values)
    dataset = dataset_splits.open_dataset(config)
    fitted = fitting.train(config, dataset["train"], workdir / "checkpoint")
    return evaluate.evaluate(config, fitted, dataset["test"], workdir)


def run_for_maps(values: Any, workdir: pathlib.Path) -> np.ndarray:
    values.outputs.maps = "npy"
    run(values, workdir)
    files = sorted((workdir / "maps").rglob("*.npy"))
    return np.stack([np.load(file) for file in files])


def test_another_kind_of_backbone(root: pathlib.Path, tmp_path: pathlib.Path):
    """Features of all of them: test_resnet and test_efficientnet."""
    layers = backbones.BACKBONES["efficientnet_b5"].stages[:1]
    measured = run(settings(root, backbone="efficientnet_b5", layers=layers), tmp_path)
    # Chance is 0.5. The parts moved and missing are seen even by random weights, on an 8x8
    # grid.
    assert measured["pixel_auroc"] > 0.7
    assert set(measured["per_defect"]) == set(DEFECTS)


def test_rectangular_input(root: pathlib.Path, tmp_path: pathlib.Path):
    values, size = settings(root), (75, 50)
    values.image.resize, values.outputs.maps = size, "npy"
    measured = run(values, tmp_path)
    assert measured["pixel_auroc"] > 0.8
    assert np.load(tmp_path / "maps/part/test/good/000.png.npy").shape == size


def test_normal_test_images_that_are_unlike_the_training_images(
    root: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    folder = tmp_path / "data"
    shutil.copytree(root / "part", folder / "part")
    for path in (folder / "part/train/good").iterdir():
        image = np.asarray(Image.open(path))
        Image.fromarray(image // 3).save(folder / "part/test/good" / f"dark_{path.name}")
    said = "normal test images are unlike the training images"
    with pytest.warns(DataWarning, match=said):
        measured = train.train_and_eval(
            validate(settings(folder)), tmp_path / "run", tmp_path / "checkpoint"
        )
    transfer = measured["transfer"]
    assert transfer["unlike"]
    assert (transfer["images"], transfer["level"]) == (13, 0.01)
    assert transfer["p_value"] < 0.01
    assert f"warning: {said}" in capsys.readouterr().out
    assert said in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def test_pictures_keep_the_proportions_of_the_files(root: pathlib.Path, tmp_path: pathlib.Path):
    """Files of 96x48 pixels, of which the model sees squares."""
    for path in (root / "part").rglob("*.png"):
        flat = tmp_path / "data" / path.relative_to(root)
        flat.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).resize((96, 48), Image.Resampling.NEAREST).save(flat)
    config = validate(settings(tmp_path / "data"))
    train.train_and_eval(config, tmp_path, tmp_path / "checkpoint")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    cards, pairs = (
        re.findall(rf'<li class="{name}".*?</li>', page, re.DOTALL) for name in ("card", "pair")
    )
    assert len(cards) == 11
    assert len(pairs) == 10
    assert all('width="64" height="32"' in card for card in cards)
    pictures = [
        *json.loads((tmp_path / "report_thumbnails.json").read_text()),
        *({"url": re.findall('src="(.*?)"', pair)[0]} for pair in pairs),
    ]
    for picture in pictures:  # an image beside its heat map
        content = base64.b64decode(picture["url"].partition(",")[2])
        assert Image.open(io.BytesIO(content)).size == (128, 32)


def test_results_do_not_depend_on_the_batch_size(root: pathlib.Path, tmp_path: pathlib.Path):
    maps = []
    for batch_size in (4, 32):  # uneven batches, one padded batch; single ones: test_detector
        values = settings(root)
        values.batch_size = batch_size
        maps.append(run_for_maps(values, tmp_path / str(batch_size)))
    # Sums of float32 in another order; measured 2.4e-6 with two versions of XLA.
    np.testing.assert_allclose(maps[1], maps[0], rtol=2e-5)


def test_results_do_not_depend_on_the_form(root: pathlib.Path, tmp_path: pathlib.Path):
    """Fewer images than channels and more: test_low_rank."""
    moments, samples = (
        run_for_maps(settings(root, statistics=form), tmp_path / form)
        for form in ("moments", "samples")
    )
    assert np.all(np.isfinite(moments))
    # Two ways of computing in float32; measured 2.3e-6.
    np.testing.assert_allclose(samples, moments, rtol=2e-5)


@pytest.mark.parametrize(("channels", "form"), [(448, Samples), (8, Moments)])
def test_the_form_follows_the_number_of_channels(
    channels: int,
    form: type,
    root: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
):
    layers = ALL_LAYERS if channels == 448 else ("layer1",)
    values = settings(root, layers=layers, channels=channels, statistics="auto")
    config = validate(values)
    fitting.train(config, dataset_splits.open_dataset(config)["train"], tmp_path / "checkpoint")
    name = form.__name__.lower()
    said = f"fitted 10 images, 16x16 patches of {channels} channels ({name}) -> "
    assert said in capsys.readouterr().out
    fitted, _ = checkpoint.load(tmp_path / "checkpoint", parallel.every())
    assert isinstance(fitted.statistics, form)
    if channels == 448:
        model = loading.load(tmp_path / "checkpoint")
        test = dataset_splits.open_dataset(config)["test"]
        assert evaluate.evaluate(config, model, test, tmp_path)["pixel_auroc"] > 0.8
    assert np.all(np.asarray(fitted.statistics.count) == 10)
    # Which form it is, is the checkpoint's: any configuration may use it.
    for statistics in ("auto", "moments", "samples"):
        values.model.statistics = statistics
        loading.load(tmp_path / "checkpoint", validate(values))


def test_a_fit_that_fails_keeps_the_earlier_model(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    run(settings(root), tmp_path)
    _, earlier = checkpoint.load(tmp_path / "checkpoint", parallel.every())
    # More than there can be.
    monkeypatch.setattr(statistics_lib, "LEAST_KEPT", 2.0)
    with pytest.raises(UserError, match=r"config\.model\.regularization: .* region \d+;"):
        run(settings(root), tmp_path)
    _, kept = checkpoint.load(tmp_path / "checkpoint", parallel.every())
    assert kept == earlier
    assert not list(tmp_path.glob("checkpoint.*"))


def test_packed_dataset_gives_identical_results(root: pathlib.Path, tmp_path: pathlib.Path):
    values = settings(root)
    folder = run(values, tmp_path / "folder")
    values.dataset.source, values.dataset.tfds_dir = "tfds", str(tmp_path / "tfds")
    assert run(values, tmp_path / "packed") == folder
    for name in ("metrics.json", "scores.csv"):
        assert (tmp_path / "packed" / name).read_bytes() == (
            tmp_path / "folder" / name
        ).read_bytes()


def test_packed_dataset_alone_is_said(
    root: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    values = settings(root)
    values.dataset.source, values.dataset.tfds_dir = "tfds", str(tmp_path / "tfds")
    packed = dataset_splits.open_dataset(validate(values))
    values.dataset.root = str(tmp_path / "elsewhere")
    alone = dataset_splits.open_dataset(validate(values))
    assert "elsewhere/part; reading what is packed in" in capsys.readouterr().out
    assert alone["test"].records == packed["test"].records
    values.category = "typo"
    with pytest.raises(UserError, match="no packed set"):
        dataset_splits.open_dataset(validate(values))


def test_thresholds_of_images_held_back(root: pathlib.Path, tmp_path: pathlib.Path):
    values = settings(root)
    values.threshold.normal, values.threshold.held_out = "held_out", 0.3
    config = validate(values)
    every = dataset_splits.open_dataset(config)["train"].records
    train.train_and_eval(config, tmp_path, tmp_path / "checkpoint")
    fitted = loading.load(tmp_path / "checkpoint")
    assert fitted.count == 7
    assert fitted.calibration is not None
    assert (fitted.calibration.origin, fitted.calibration.images) == ("held_out", 3)
    held = sampling.held_out(range(10), 0.3, 0)[1]
    digests = {
        hashlib.sha256(record.image.read_bytes()).digest()
        for number, record in enumerate(every)
        if number not in held
    }
    assert {digest.tobytes() for digest in fitted.images} == digests


def in_groups(root: pathlib.Path, tmp_path: pathlib.Path, sizes: list[int]) -> FolderSource:
    """Images of the dataset under names that say of which group they are, out of order."""
    records = FolderSource(
        dataset_splits.open_dataset(validate(settings(root)))["train"].records
    )
    names = [
        f"{number}_part{group}.png"
        for group, size in enumerate(sizes)
        for number in range(size)
    ]
    found = []
    for name, record in zip(names, records.records, strict=False):
        path = tmp_path / name
        path.write_bytes(record.image.read_bytes())
        found.append(dataclasses.replace(record, image=path, relative_path=name))
    return FolderSource(sorted(found, key=lambda record: record.relative_path))


def test_left_out_thresholds_are_those_of_fits_without_the_group(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    # Three devices have groups of images that they do not share out evenly.
    monkeypatch.setattr(parallel, "every", lambda: parallel.Devices(3))
    values = settings(root)
    # Images of the largest group are more than a batch.
    values.threshold.groups, values.batch_size = "part[0-9]+", 3
    values.threshold.image_rate, values.threshold.pixel_rate = 0.3, 0.3
    source = in_groups(root, tmp_path, [2, 2, 4])
    dataset = {"train": source, "validation": FolderSource([])}
    whole = train.train(validate(values), dataset, tmp_path / "whole")
    assert whole.calibration is not None
    assert (whole.calibration.images, whole.calibration.groups) == (8, 3)
    highest = []
    values.threshold.normal = "none"
    for group in range(3):
        ours = [r for r in source.records if f"part{group}" in r.relative_path]
        others = [r for r in source.records if r not in ours]
        dataset["train"] = FolderSource(others)
        model = train.train(validate(values), dataset, tmp_path / f"without{group}")
        scores = detector.score(model, [record.image for record in ours]).scores
        highest.append(float(scores.max()))
    # Of three, at 30 %: the highest. Roundoffs of two computations; measured 2e-5.
    expected = max(highest)
    np.testing.assert_allclose(whole.calibration.image_threshold, expected, rtol=1e-4)
    # And the detector scores new images as one that left nothing out.
    values.threshold.normal = "none"
    dataset["train"] = source
    plain = train.train(validate(values), dataset, tmp_path / "plain")
    images = [record.image for record in source.records]
    found, alone = (detector.score(model, images) for model in (whole, plain))
    np.testing.assert_array_equal(found.maps, alone.maps)


def test_too_few_groups_are_told_before_the_fit(root: pathlib.Path, tmp_path: pathlib.Path):
    values = settings(root)
    values.threshold.groups = "good"
    with pytest.raises(UserError, match=r"groups='good': 1 group\(s\) of 10 normal images"):
        modes.run("train", validate(values), tmp_path, tmp_path / "checkpoint")
    values.threshold.groups = "part[0-9]+_"
    with pytest.raises(UserError, match=r"groups='part.*not found in part/train/good/000\.png"):
        modes.run("train", validate(values), tmp_path, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_groups_are_held_back_whole(root: pathlib.Path, tmp_path: pathlib.Path):
    values = settings(root)
    values.threshold.groups, values.threshold.normal = "part[0-9]+", "held_out"
    values.threshold.held_out = 0.6
    source = in_groups(root, tmp_path, [2, 2, 2, 2, 2])
    dataset = {"train": source, "validation": FolderSource([])}
    fitted = train.train(validate(values), dataset, tmp_path / "model")
    known = {bytes(digest) for digest in fitted.images}
    left = [
        record.relative_path[2:]
        for record in source.records
        if hashlib.sha256(record.image.read_bytes()).digest() in known
    ]
    assert fitted.count == 4
    assert len(set(left)) == 2
    assert fitted.calibration is not None
    assert (fitted.calibration.images, fitted.calibration.groups) == (6, 3)


def test_copies_change_nothing(root: pathlib.Path, tmp_path: pathlib.Path):
    config = validate(settings(root))
    source = dataset_splits.open_dataset(config)["train"]
    models = []
    for name, times in (("once", 1), ("thrice", 3)):
        records = [
            dataclasses.replace(record, relative_path=f"{i}/{record.relative_path}")
            for i in range(times)
            for record in source.records
        ]
        dataset = {"train": FolderSource(records), "validation": FolderSource([])}
        if times == 1:
            models.append(train.train(config, dataset, tmp_path / name))
            continue
        with pytest.warns(DataWarning, match="^20 of 30 images are copies of others") as seen:
            models.append(train.train(config, dataset, tmp_path / name))
        assert len(seen) == 1
    once, thrice = models
    assert thrice.identity == once.identity
    assert thrice.calibration == once.calibration
    new = FolderSource(dataset["train"].records[::-1])
    with pytest.warns(DataWarning, match="^20 of 30"):
        fitting.update(tmp_path / "once", new)
    assert loading.load(tmp_path / "once").count == 10


def test_too_little_memory(root: pathlib.Path, tmp_path: pathlib.Path):
    # 4000 x 4000 patches of 448 channels: more bytes than any machine has.
    values = settings(root, layers=ALL_LAYERS, channels=448)
    values.image.resize = (16_000, 16_000)
    with pytest.raises(UserError, match=r"not enough memory"):
        modes.run("train", validate(values), tmp_path, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_less_memory_than_estimated(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    # As where a batch takes more than is left: 35 TB, which XLA refuses in its own words.
    monkeypatch.setattr(steps, "fit_batch", lambda *_, **__: jnp.zeros(2**45, jnp.uint8))
    with pytest.raises(UserError, match=r"not enough memory.*config\.model\.channels"):
        modes.run("train", validate(settings(root)), tmp_path, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_one_trace_per_function(
    root: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """Static shapes: batches, runs and the last, short batch share one compilation."""
    traces = []

    def traced(name: str, function: Any) -> Any:
        def call(*arguments: Any, **settings: Any) -> Any:
            traces.append(name)
            return function(*arguments, **settings)

        return call

    # Called while a device's function is traced, and never else.
    monkeypatch.setattr(steps, "_update", traced("fit", steps._update))
    score = traced("score", scoring.mahalanobis)
    monkeypatch.setattr(scoring, "mahalanobis", score)
    jax.clear_caches()
    for compiles in (True, False):
        caplog.clear()
        with jax.log_compiles():
            run(settings(root), tmp_path)
        assert traces == ["fit", "score"]
        said = [record.getMessage() for record in caplog.records]
        # Of what is mapped over devices, by the name that JAX gives it.
        assert any(x.startswith("Compiling jit(_fun)") for x in said) == compiles


class TestWhoseResults:
    @pytest.mark.parametrize(
        "name", ["results.incomplete/thesis.tex", "maps/a.npy", "scores.csv", "config.json"]
    )
    def test_files_of_others_are_kept(self, name: str, tmp_path: pathlib.Path):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
        with pytest.raises(UserError, match="exists and is not from an earlier run"):
            results_folder.require_own_results(tmp_path)
        assert (tmp_path / name).read_text() == "{}"

    def test_of_another_data_set(self, tmp_path: pathlib.Path):
        stored = {"folder": "/a/parts", "images": {"train": "1", "test": "2"}}
        text = json.dumps({"inputs": stored})
        (tmp_path / "metrics.json").write_text(text)
        for same in (
            {"folder": "/a/parts", "images": {"train": "3", "test": "4"}},  # grown
            {"folder": "/b/parts", "images": {"train": "1", "test": "2"}},  # moved
            {"folder": "/b/parts", "images": {"test": "2"}},  # evaluated alone
        ):
            results_folder.require_same_data(tmp_path, same)
        other = {"folder": "/b/parts", "images": {"train": "3", "test": "2"}}
        with pytest.raises(
            UserError, match=r"data set, /a/parts, and not of /b/parts; .*--over"
        ):
            results_folder.require_same_data(tmp_path, other)
