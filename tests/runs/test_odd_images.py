"""Odd training images in a whole fit: named, and left out as the report says."""

import ast
import csv
import pathlib
import shlex
from typing import Any

import numpy as np
import pytest
import small
from PIL import Image

from padim_jax.config.settings import validate
from padim_jax.data import dataset_splits
from padim_jax.data.layouts.synthetic import generate
from padim_jax.errors import UserError
from padim_jax.runs import train


def read(folder: pathlib.Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "suspects.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A dataset with one picture among the training images that is no part at all."""
    folder = tmp_path_factory.mktemp("synthetic")
    generate(folder, n_train=24, n_test_good=2, n_test_per_defect=1, size=96)
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    Image.fromarray(noise).save(folder / "part/train/good/odd.png")
    return folder


def settings(root: pathlib.Path, **dataset: Any) -> Any:
    layers = ("layer1", "layer2", "layer3")
    values = small.values(root, **{"model.layers": layers, "outputs.figures": "none"})
    values.dataset.update(dataset)
    return values


def test_a_fit_names_them_and_goes_without(
    root: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    path = "part/train/good/odd.png"
    config = validate(settings(root))
    measured = train.train_and_eval(config, tmp_path, tmp_path / "checkpoint")
    rows = read(tmp_path)
    assert len(rows) == 25
    assert (rows[0]["path"], rows[0]["suspect"]) == (path, "1")
    said = capsys.readouterr().out
    assert "suspects: 1 of 25 training images score far beyond the others" in said
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "suspects-title" in page
    assert page.count(path) >= 2
    stored = measured["suspects"]
    assert stored["images"] == [{"path": path, "score": float(np.float32(rows[0]["score"]))}]
    assert stored["threshold"] == measured["normal_threshold"]["image_threshold"]
    # As the printed option says.
    option = said.partition("dataset.exclude=")[2].split("\n")[0]
    value = ast.literal_eval(shlex.split(option)[0])
    config = validate(settings(root, exclude=value))
    again = train.train_and_eval(config, tmp_path, tmp_path / "checkpoint")
    assert "suspects" not in again
    normal = again["normal_threshold"]
    assert normal["image_threshold"] == pytest.approx(stored["threshold_without"], rel=0.1)
    assert normal["images"] == 24
    assert normal["image_threshold"] < 0.7 * measured["normal_threshold"]["image_threshold"]


def test_unknown_names(root: pathlib.Path):
    config = validate(settings(root, exclude=("part/train/good/none.png",)))
    with pytest.raises(
        UserError, match=r"exclude: 'part/train/good/none.png' is none of the 25"
    ):
        dataset_splits.open_dataset(config)
    with pytest.raises(UserError, match="expected relative paths"):
        validate(settings(root, exclude=("",)))
