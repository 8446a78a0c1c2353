"""Predictions for months: of memory that does not grow, and through any number of kills.

Commands as a person would give them, looked at from outside. With PADIM_JAX_EVERYTHING=1 of
5,000 images and with five kills, else of 2,000 and with two.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from padim_jax.config import defaults, settings
from padim_jax.data import dataset_splits
from padim_jax.data.layouts.synthetic import generate
from padim_jax.runs import train

ROOT = pathlib.Path(__file__).resolve().parents[2]
IMAGES, KILLS = (5000, 5) if "PADIM_JAX_EVERYTHING" in os.environ else (2000, 2)
SIDE = 64
# Between 200 images and the last. Measured: 9.4 MB by image 2,000, which is malloc's, and
# nothing after that. If only the maps of 2,000 images were kept, it were 30 MB more; the
# decoded images, 22 MB.
GROWTH = 25e6


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """With a model."""
    root = tmp_path_factory.mktemp("model")
    generate(root / "data", n_train=10, n_test_good=1, n_test_per_defect=1, size=SIDE)
    values: Any = defaults.get_config()
    values.update_from_flattened_dict(
        {
            "dataset.name": "mvtec_ad",
            "dataset.root": str(root / "data"),
            "category": "part",
            "image.resize": (SIDE, SIDE),
            "model.weights": "random",
            "model.channels": 20,
        }
    )
    valid = settings.validate(values)
    train.train(valid, dataset_splits.open_dataset(valid), root / "checkpoint")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = rng.integers(0, 256, (12, 12, 3), np.uint8)
        path = folder / f"{number // 1000}" / f"{number:04}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((96, 96)).save(path)
    return folder


Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start(workdir: pathlib.Path, tmp_path: pathlib.Path):
    """Starts --mode=predict; what it prints is in tmp_path/output."""
    running = []

    def started(folder: pathlib.Path, place: pathlib.Path, *more: str) -> subprocess.Popen:
        given = ["--mode=predict", f"--checkpoint={workdir / 'checkpoint'}"]
        given += [f"--input={folder}", f"--workdir={place}", *more]
        with (tmp_path / "output").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "padim_jax.main", *given],
                cwd=tmp_path,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=output,
            )
        running.append(process)
        return process

    yield started
    for process in running:
        process.kill()
        process.wait()


def rows(path: pathlib.Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def memory_by_rows(process: subprocess.Popen, table: pathlib.Path, end: int) -> dict[int, int]:
    """Resident bytes of a process by the rows that it has written, until there are `end`."""
    seen, found = psutil.Process(process.pid), {}
    while process.poll() is None:
        if done := rows(table):
            found[done] = seen.memory_info().rss
        if done >= end:
            break
        time.sleep(0.05)
    return found


def require_flat(found: dict[int, int]) -> None:
    before = max(memory for done, memory in found.items() if done <= 250)
    after = max(memory for done, memory in found.items() if done > 250)
    shown = {done: f"{found[done] / 1e6:.1f} MB" for done in sorted(found)[:: len(found) // 20]}
    print(shown)
    assert after - before < GROWTH, shown


def tree(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_memory_is_flat(start: Start, images: pathlib.Path, tmp_path: pathlib.Path):
    process = start(images, tmp_path / "work")
    table = tmp_path / "work" / "predictions.incomplete" / "scores.csv"
    found = memory_by_rows(process, table, IMAGES + 1)
    assert process.wait(60) == 0, (tmp_path / "output").read_text()
    assert rows(tmp_path / "work" / "predictions" / "scores.csv") == IMAGES + 1
    require_flat(found)


def test_killed_again_and_again(start: Start, images: pathlib.Path, tmp_path: pathlib.Path):
    some = tmp_path / "some"
    some.mkdir()
    for path in sorted((images / "0").iterdir())[:400]:
        shutil.copy(path, some)
    assert start(some, tmp_path / "whole").wait(120) == 0
    cut, kills, draw = tmp_path / "cut", [], random.Random(os.environ["PADIM_JAX_SAMPLE"])
    table = cut / "predictions.incomplete" / "scores.csv"
    for number in range(KILLS):
        process, before = start(some, cut), rows(table)
        if number in (1, 3):  # anywhere before the next batch, or in it
            time.sleep(draw.uniform(0, 3))
        else:  # anywhere in what a batch takes
            while process.poll() is None and rows(table) <= max(before, 1):  # a header
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.wait()
        kills.append(rows(table))
    print("rows at each kill:", kills)
    assert start(some, cut).wait(120) == 0
    output = (tmp_path / "output").read_text()
    assert "Traceback" not in output
    # The next process may be killed before it says so; the last one is not.
    assert "going on with interrupted predictions" in output
    assert tree(cut / "predictions") == tree(tmp_path / "whole" / "predictions")


def test_watched_memory_is_flat_and_kills_lose_nothing(
    start: Start, images: pathlib.Path, tmp_path: pathlib.Path
):
    into, out = tmp_path / "in", tmp_path / "work" / "watch"
    into.mkdir()
    paths = sorted(images.rglob("*.jpg"))[:2000]
    draw = random.Random(os.environ["PADIM_JAX_SAMPLE"])
    for path in paths[:1000]:
        shutil.copy(path, into)
    fast = ("--watch", "--poll_seconds=0.05", "--settle_seconds=0.1")
    for _ in range(KILLS):
        process, before = start(into, tmp_path / "work", *fast), rows(out / "scores.jsonl")
        while process.poll() is None and rows(out / "scores.jsonl") <= before:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        process.wait()
    process = start(into, tmp_path / "work", *fast)
    for path in paths[1000:]:  # moved in, as they come
        shutil.copy(path, tmp_path / path.name)
        (tmp_path / path.name).rename(into / path.name)
    found = memory_by_rows(process, out / "scores.jsonl", len(paths))
    first = min(found)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    output = (tmp_path / "output").read_text()
    assert "Traceback" not in output, output
    assert output.endswith(f"stopped, {len(paths)} images are scored\n")
    lines = [json.loads(x) for x in (out / "scores.jsonl").read_text().splitlines()]
    names = sorted(path.name for path in paths)
    assert sorted(line["path"] for line in lines) == names
    table = (out / "scores.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in table] == [line["path"] for line in lines]
    require_flat({done - first: memory for done, memory in found.items()})
