"""Fits that are ended by a signal, for real, and go on."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest
import small
from PIL import Image
from test_processes import launch
from test_resume import (
    GOING_ON,
    ROOT,
    fit,
    make_config,
    normal,
    require_identical,
    saved,
)

from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.layouts.synthetic import generate
from padim_jax.devices.parallel import Devices
from padim_jax.store import checkpoint

__all__ = ["launch"]  # a fixture


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("synthetic")
    generate(folder, n_train=37, n_test_good=1, n_test_per_defect=1, size=72)
    return folder


def start(
    mode: str, root: pathlib.Path, workdir: pathlib.Path, form: str, *settings: str
) -> subprocess.Popen[str]:
    """The command that is interrupted, and given again."""
    arguments = small.SETTINGS | {
        "dataset.root": root,
        "model.statistics": form,
        "train.checkpoint_every": 0,
        "cache.dir": root / "cache",
    }
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "padim_jax.main", f"--mode={mode}"),
            *(f"--config={ROOT}/configs/mvtec.py", f"--workdir={workdir}"),
            *(f"--config.{key}={value}" for key, value in arguments.items()),
            *settings,
        ],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    return out


def wait_for_a_save(process: subprocess.Popen[str], path: pathlib.Path, newest: int) -> None:
    """Until there is an unfinished fit with a higher number."""
    while process.poll() is None:
        if path.is_dir() and any(
            entry.name.isdigit() and int(entry.name) > newest for entry in path.iterdir()
        ):
            return
        time.sleep(0.005)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("mode", "number"),
    [
        ("train", signal.SIGTERM),
        ("update", signal.SIGTERM),
        ("update", signal.SIGKILL),  # train: tests/reliability/test_kills.py
    ],
)
def test_ended_for_real(
    mode: str,
    number: signal.Signals,
    root: pathlib.Path,
    tmp_path: pathlib.Path,
):
    """SIGTERM ends it with 0 and a message; the same command finishes it in any case."""
    path, newest = tmp_path / "checkpoint", -1
    if mode == "update":
        config = make_config(root)
        records = normal(config).records
        for place in (path, tmp_path / "other" / "checkpoint"):
            fit(config, place, FolderSource(records[:5]))
        newest = max(int(entry.name) for entry in path.iterdir())
    finish(start(mode, root, tmp_path / "other", "moments"))
    expected = saved(tmp_path / "other" / "checkpoint")
    process = start(mode, root, tmp_path, "moments")
    wait_for_a_save(process, path, newest)
    process.send_signal(number)
    if number == signal.SIGTERM:
        out = finish(process)
        expression = r"^stopped by SIGTERM after \d+ of \d+ images, saved in "
        assert re.search(expression, out, re.MULTILINE), out
        assert "Traceback" not in out
    else:
        process.communicate()
        assert process.returncode == -number
    out = finish(start(mode, root, tmp_path, "moments"))
    assert GOING_ON in out
    require_identical(saved(path), expected)


def test_processes_stop_together(launch: Any, root: pathlib.Path, tmp_path: pathlib.Path):
    """SIGTERM to one of them saves and stops all; the same command goes on."""
    images = sorted((root / "part" / "train" / "good").iterdir())
    many = tmp_path / "data" / "part" / "train" / "good"
    many.mkdir(parents=True)
    pictures = [Image.open(path) for path in images]
    for number in range(240):  # files that differ: copies count once
        picture = pictures[number % len(pictures)]
        picture.save(many / f"{number:03}.png", compress_level=1, dpi=(1000 + number, 1000))
    given = f"--config.dataset.root={tmp_path / 'data'}", "--config.batch_size=12"
    process = launch("train", tmp_path, *given, "--config.train.checkpoint_every=0")
    while not (tmp_path / "checkpoint" / "3").exists():  # saved after every batch
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    (second,) = (child for child in children if "--process_id=1" in child.cmdline())
    second.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    stopped = re.search(r"stopped by SIGTERM after (\d+) of 240 images", out)
    assert stopped, out
    assert 12 < int(stopped[1]) < 240
    process = launch("train", tmp_path, *given)
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert f"after {stopped[1]} of 240 images" in out
    assert out.count("fitted 240 images") == 1
    fitted, _ = checkpoint.load(tmp_path / "checkpoint", Devices(1))
    assert len(fitted.images) == int(fitted.statistics.count[0]) == 240
