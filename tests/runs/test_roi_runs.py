"""Runs with a region of interest: a mask file, which the model no longer needs."""

import pathlib
from typing import Any

import numpy as np
import pytest
import small
from PIL import Image

from padim_jax.config.settings import Config
from padim_jax.core import metrics
from padim_jax.data import dataset_splits, listing, roi
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.layouts.synthetic import generate
from padim_jax.detector import steps
from padim_jax.errors import Stopped, UserError
from padim_jax.output import predictions
from padim_jax.runs import evaluate, fitting, loading, predict, train

INSIDE = np.zeros((96, 96), bool)
INSIDE[9:81, 9:48] = True


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("drawn")
    generate(folder, n_train=12, n_test_good=2, n_test_per_defect=1, size=96)
    return folder


@pytest.fixture
def mask(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "mask.png"
    Image.fromarray(INSIDE.astype(np.uint8) * np.uint8(255)).save(path)
    return path


def make_config(root: pathlib.Path, mask: pathlib.Path, **changes: Any) -> Config:
    return small.config(root, **({"image.roi": str(mask), "outputs.figures": "all"} | changes))


def test_whole_run(root: pathlib.Path, mask: pathlib.Path, tmp_path: pathlib.Path):
    config, work = make_config(root, mask, **{"outputs.maps": "npy"}), tmp_path / "work"
    measured = train.train_and_eval(config, work, work / "checkpoint")
    mask.unlink()
    detector = loading.load(work / "checkpoint")
    assert detector.config.image.roi == roi.encode(INSIDE)
    # Pixel metrics of the pixels inside alone.
    inside = roi.at_input_size(roi.encode(INSIDE), config.image)
    test = dataset_splits.open_dataset(config)["test"]
    truth, maps = [], []
    for record in test.records:
        anomaly_map = np.load(work / "maps" / f"{record.relative_path}.npy")
        defect = np.zeros(inside.shape, bool)
        if record.mask is not None:
            size = inside.shape[::-1]
            defect = np.asarray(Image.open(str(record.mask)).resize(size, 0).convert("L")) > 0
        assert not anomaly_map[~inside].any()
        truth.append(defect[inside])
        maps.append(anomaly_map[inside])
    found = metrics.binary_metrics(np.concatenate(truth), np.concatenate(maps))
    assert measured["pixel_auroc"] == found.auroc
    assert measured["pixel_f1_max"] == found.f1_max
    # The model alone, and at the masks' own size.
    settings = {"metrics.resolution": "full", "outputs.report": False}
    again = loading.load(work / "checkpoint", settings)
    full = evaluate.evaluate(again.config, again, test, tmp_path / "full")
    truth, maps = [], []
    for record in test.records:
        anomaly_map = np.load(work / "maps" / f"{record.relative_path}.npy")
        restored = predictions.restore_map(anomaly_map, (96, 96), again.config.image)
        np.testing.assert_array_equal(np.isnan(restored), ~INSIDE)
        defect = np.zeros(INSIDE.shape, bool)
        if record.mask is not None:
            defect = np.asarray(Image.open(str(record.mask)).convert("L")) > 0
        truth.append(defect[INSIDE])
        maps.append(restored[INSIDE])
    found = metrics.binary_metrics(np.concatenate(truth), np.concatenate(maps))
    assert full["pixel_auroc"] == found.auroc
    assert full["image_auroc"] == measured["image_auroc"]


def test_predictions_show_what_is_not_scored(
    root: pathlib.Path, mask: pathlib.Path, tmp_path: pathlib.Path
):
    config = make_config(root, mask)
    train.train(config, dataset_splits.open_dataset(config), tmp_path / "model")
    mask.unlink()
    detector = loading.load(tmp_path / "model")
    source = FolderSource(listing.find(str(root / "part" / "test")))
    predict.predict(detector, source, tmp_path / "work")
    folder = tmp_path / "work" / "predictions"
    for record in source.records:
        anomaly_map = np.asarray(Image.open(folder / "maps" / f"{record.relative_path}.tiff"))
        np.testing.assert_array_equal(np.isnan(anomaly_map), ~INSIDE)
        predicted = np.asarray(Image.open(folder / "masks" / f"{record.relative_path}.png"))
        assert not predicted[~INSIDE].any()
        image = np.asarray(Image.open(str(record.image)).convert("RGB")).astype(int)
        overlay = np.asarray(Image.open(folder / "overlays" / f"{record.relative_path}.jpg"))
        dimmed = np.abs(overlay - image * 0.75)[~INSIDE].mean(axis=-1) < 12
        assert 0.4 < dimmed.mean() < 0.95  # lines elsewhere


def test_interrupted_fit_goes_on_with_the_same_region(
    root: pathlib.Path,
    mask: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
):
    config = make_config(root, mask, **{"train.checkpoint_every": 0.0})
    dataset = dataset_splits.open_dataset(config)
    whole = train.train(config, dataset, tmp_path / "whole")
    fit_batch, calls = steps.fit_batch, []

    def stop(*arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            raise Stopped("here")
        return fit_batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "fit_batch", stop)
        with pytest.raises(Stopped):
            train.train(config, dataset, tmp_path / "cut")
    other = make_config(root, mask, **{"image.roi": (9, 9, 48, 80)})
    with pytest.raises(UserError, match="holds an interrupted fit of other images or settings"):
        train.train(other, dataset, tmp_path / "cut")
    assert train.train(config, dataset, tmp_path / "cut").identity == whole.identity


def test_other_regions_are_neither_extended_nor_merged(
    root: pathlib.Path, mask: pathlib.Path, tmp_path: pathlib.Path
):
    config = make_config(root, mask, **{"threshold.normal": "none"})
    records = dataset_splits.open_dataset(config)["train"].records
    halves = [FolderSource(part) for part in (records[:6], records[6:])]
    nothing = FolderSource([])
    for name, value, part in (
        ("a", str(mask), halves[0]),
        ("b", (9, 9, 48, 81), halves[1]),  # the same pixels
        ("c", (9, 9, 48, 80), halves[1]),
        ("d", "", halves[1]),
    ):
        changes = {"threshold.normal": "none", "image.roi": value}
        dataset = {"train": part, "validation": nothing, "test": nothing}
        train.train(make_config(root, mask, **changes), dataset, tmp_path / name)
    merged, _ = fitting.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert merged.count == 12
    for name in ("c", "d"):
        with pytest.raises(UserError, match=r"image\.roi=2808 of 96x96 pixels \(.*with"):
            fitting.merge([tmp_path / "a", tmp_path / name], tmp_path / "no")
    extended = fitting.update(tmp_path / "a", halves[1], config)
    assert extended.changed == 6
    other = make_config(root, mask, **{"image.roi": (9, 9, 48, 80)})
    with pytest.raises(UserError, match=r"config\.image\.roi=2769 of 96x96 pixels \(.*with 28"):
        fitting.update(tmp_path / "a", halves[1], other)


def test_mask_that_is_wrong_is_refused_before_the_fit(
    root: pathlib.Path, mask: pathlib.Path, tmp_path: pathlib.Path
):
    config = make_config(root, mask)
    dataset = dataset_splits.open_dataset(config)
    for content, reason in (
        (b"", "mask.png: "),
        (b"no image", "mask.png: "),
        (np.zeros((96, 96), np.uint8), "nothing is inside of it"),
        (np.full((96, 60), 255, np.uint8), "a mask of 60x96 pixels for images of 96x96"),
    ):
        if isinstance(content, bytes):
            mask.write_bytes(content)
        else:
            Image.fromarray(content).save(mask)
        with pytest.raises(UserError) as error:
            train.train(config, dataset, tmp_path / "model")
        assert reason in str(error.value)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "model").exists()
