"""Whole runs on several devices and in several processes: the same numbers, once."""

import csv
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import small

from padim_jax.config.settings import Config
from padim_jax.data.layouts.synthetic import generate
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.runs import modes
from padim_jax.store import checkpoint

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of a batch of 4, the eighth device has none; test_parallel has several layers.
SETTINGS = small.SETTINGS | {"outputs.figures": "none", "outputs.maps": "npy"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("synthetic")
    generate(folder, n_train=13, n_test_good=3, n_test_per_defect=2, size=96)
    return folder


def make_config(root: pathlib.Path) -> Config:
    return small.config(root, **SETTINGS)


@pytest.fixture(scope="module")
def one(root: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The results of one process with one device."""
    workdir = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "every", lambda: Devices(1))
        modes.run("train_and_eval", make_config(root), workdir, workdir / "checkpoint")
    return workdir


def scores(workdir: pathlib.Path) -> dict[str, float]:
    with (workdir / "scores.csv").open(newline="") as file:
        return {row["path"]: float(row["score"]) for row in csv.DictReader(file)}


def require_same_results(workdir: pathlib.Path, expected: pathlib.Path) -> None:
    found, wanted = scores(workdir), scores(expected)
    assert list(found) == list(wanted)
    # As in test_parallel: roundoffs, amplified by the covariances' condition.
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=2e-5)
    maps = sorted(path.relative_to(expected) for path in (expected / "maps").rglob("*.npy"))
    assert maps
    for path in maps:
        x, y = np.load(workdir / path), np.load(expected / path)
        np.testing.assert_allclose(x, y, rtol=2e-5)
    ours, theirs = (
        json.loads((place / "metrics.json").read_text()) for place in (workdir, expected)
    )
    for name in ("image_auroc", "image_f1_max", "pixel_auroc", "pixel_ap", "aupro"):
        # Ranks: of 53,248 pixels some next to each other may swap.
        assert ours[name] == pytest.approx(theirs[name], abs=1e-5), name


def test_devices(
    root: pathlib.Path,
    one: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(parallel, "every", lambda: Devices(8))
    model = tmp_path / "checkpoint"
    modes.run("train_and_eval", make_config(root), tmp_path, model)
    require_same_results(tmp_path, one)
    # The same images are known of it, in the same order.
    found, expected = (
        checkpoint.load(path / "checkpoint", Devices(1))[0] for path in (tmp_path, one)
    )
    np.testing.assert_array_equal(found.images, expected.images)


@pytest.fixture
def launch(root: pathlib.Path) -> Iterator[Any]:
    started: list[subprocess.Popen] = []

    def start(mode: str, workdir: pathlib.Path, *arguments: str) -> subprocess.Popen:
        command = ["bash", str(ROOT / "launch" / "local_processes.sh"), "2", f"--mode={mode}"]
        if mode in ("train", "train_and_eval"):
            command.append(f"--config={ROOT}/configs/mvtec.py")
            given = SETTINGS | {"dataset.root": root}
            command += [f"--config.{name}={value}" for name, value in given.items()]
        command += [f"--workdir={workdir}", *arguments]
        environment = {**os.environ, "PYTHON": sys.executable, "DEVICES": "2"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def test_processes(launch: Any, root: pathlib.Path, one: pathlib.Path, tmp_path: pathlib.Path):
    process = launch("train_and_eval", tmp_path)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    require_same_results(tmp_path, one)
    assert out.count("fitted 13 images") == 1  # said by one of them
    # What two processes wrote one reads; the other way round: the next test.
    again = tmp_path / "again"
    modes.run("eval", make_config(root), again, tmp_path / "checkpoint")
    require_same_results(again, one)


def test_predictions_of_processes(
    launch: Any, root: pathlib.Path, one: pathlib.Path, tmp_path: pathlib.Path
):
    """Every image once, in order, with the scores of the evaluation."""
    given = f"--input={root}/part/test/*/*.png", f"--checkpoint={one / 'checkpoint'}"
    process = launch("predict", tmp_path, *given)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    found = scores(tmp_path / "predictions")
    assert len(found) == len(scores(one))
    assert not (tmp_path / "predictions.incomplete").exists()
    np.testing.assert_allclose(list(found.values()), list(scores(one).values()), rtol=2e-5)
