"""Processes killed at any moment: the same command, given again, ends as if undisturbed.

A third of the kills come at random times, the others before a random one of the changes that
Python makes to files, so that every kind of writing is met; all are seeded. Three of them and
one Ctrl-C a day; all with PADIM_JAX_EVERYTHING=1.
"""

import dataclasses
import functools
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from padim_jax.data.layouts.synthetic import generate
from padim_jax.devices.parallel import Devices
from padim_jax.store import checkpoint

# Writing to the cache of compiled programs is killed as well: each run has its own.
pytestmark = pytest.mark.usefixtures("no_compilation_cache")

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = {
    "dataset.name": "mvtec_ad",
    "category": "part",
    "image.resize": "(64,64)",
    "model.weights": "random",
    "model.layers": "('layer1',)",
    "model.channels": "8",
    "batch_size": "4",
    "train.checkpoint_every": "0",
    "outputs.maps": "npy",
}

# Runs the program; tells the number of changes below a folder, or dies before one of them.
CHILD = """
import atexit, os, runpy, signal, sys, threading
# A shell's background jobs, of which pytest may be one, ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
below, kill = sys.argv[1], int(sys.argv[2])
count, lock, removals = 0, threading.Lock(), ("os.remove", "os.rmdir")

def hook(event, args):
    global count
    if event == "open":
        writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    else:
        writes = event in ("os.mkdir", "os.rename", *removals)
    # What removes a tree names its entries relative to a folder.
    if writes and (str(args[0]).startswith(below) or (event in removals and args[1] != -1)):
        with lock:
            count += 1
            if count == kill:
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
atexit.register(lambda: print(f"changes: {count}", file=sys.stderr))
sys.argv = sys.argv[2:]
runpy.run_module("padim_jax.main", run_name="__main__", alter_sys=True)
"""


@dataclasses.dataclass(frozen=True)
class Command:
    """What is killed, in a folder of its own.

    Attributes:
      arguments: of the command.
      compared: files whose bytes have to be the same in the end.
      checkpoint: whose statistics have to be.
      prepare: makes what has to be there before.
      signs: of `compared`, those that are there for whole results only: at any time they are
        absent, as they were before, or as they will be.
    """

    arguments: tuple[str, ...]
    compared: tuple[str, ...]
    signs: tuple[str, ...]
    checkpoint: str | None = None
    prepare: Callable[[pathlib.Path], object] = lambda folder: None


def start(folder: pathlib.Path, arguments: tuple[str, ...], kill: int = 0) -> subprocess.Popen:
    given = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(kill), *given],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder: pathlib.Path, arguments: tuple[str, ...]) -> tuple[int, float]:
    """The number of changes, and seconds."""
    begin = time.monotonic()
    process = start(folder, arguments)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    found = re.search(r"changes: (\d+)", err)
    assert found, err
    return int(found[1]), time.monotonic() - begin


def settings(mode: str, **changes: object) -> tuple[str, ...]:
    values = SETTINGS | {"cache.dir": "FOLDER/cache"} | changes
    return (
        *(f"--mode={mode}", f"--config={ROOT}/configs/mvtec.py", "--workdir=FOLDER/run"),
        *(f"--config.{key}={value}" for key, value in values.items()),
    )


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    base = tmp_path_factory.mktemp("base")
    generate(base / "data", n_train=9, n_test_good=3, n_test_per_defect=1, size=96)
    shutil.copytree(base / "data" / "part", base / "data" / "other")
    (base / "data" / "other" / "train" / "good" / "000.png").unlink()
    root = {"dataset.root": base / "data"}
    finish(base, settings("train_and_eval", **root, **{"map.sigma": "2.0"}))

    def earlier(folder: pathlib.Path) -> None:
        shutil.copytree(base / "run", folder / "run")

    results = ("run/metrics.json", "run/scores.csv", "run/config.json")
    part, other = ("run/part/", "run/other/")
    whole = (f"{name}metrics.json" for name in (part, other))
    scores = (f"{name}scores.csv" for name in (part, other))
    good = f"{base}/data/part/test/good"
    wrong = f"{base}/data/part/train/good/003.png"
    tested = base / "data" / "part" / "test"
    names = sorted(str(path.relative_to(tested)) for path in tested.rglob("*.png"))
    masks = (f"run/predictions/masks/{name}.png" for name in names)
    return {
        "train_and_eval": Command(
            settings("train_and_eval", **root), results, results[:1], "run/checkpoint"
        ),
        "train": Command(
            settings("train", **root, **{"model.statistics": "samples"}),
            ("run/checkpoint/calibration.json",),
            ("run/checkpoint/calibration.json",),
            "run/checkpoint",
        ),
        "eval": Command(settings("eval", **root), results, results[:1], None, earlier),
        "sweep": Command(
            settings("train_and_eval", **root, category="all"),
            (*whole, *scores, "run/table.json", "run/table.csv", "run/table.md"),
            ("run/part/metrics.json", "run/other/metrics.json", "run/table.json"),
            "run/other/checkpoint",
        ),
        "packing": Command(
            settings(
                "train",
                **root,
                **{"dataset.source": "tfds", "dataset.tfds_dir": "FOLDER/packed"},
            ),
            ("run/checkpoint/calibration.json",),
            ("run/checkpoint/calibration.json",),
            "run/checkpoint",
        ),
        "drawing": Command(
            settings("train", **{"dataset.name": "synthetic", "dataset.root": "FOLDER/drawn"}),
            ("drawn/part/train/good/059.png", "drawn/part/synthetic.json"),
            ("drawn/part/synthetic.json",),
            "run/checkpoint",
        ),
        "export": Command(
            ("--mode=export", "--workdir=FOLDER/run", "--half"),
            ("run/model.safetensors",),
            ("run/model.safetensors",),
            None,
            earlier,
        ),
        "predict": Command(
            ("--mode=predict", "--workdir=FOLDER/run", f"--input={base}/data/part/test"),
            ("run/predictions/scores.csv", "run/predictions/regions.json", *masks),
            ("run/predictions/scores.csv",),
            None,
            earlier,
        ),
        "forget": Command(
            ("--mode=forget", "--workdir=FOLDER/run", f"--input={wrong}"),
            ("run/checkpoint/calibration.json", "run/suspects.csv"),
            (),
            "run/checkpoint",
            earlier,
        ),
        "calibrate": Command(
            ("--mode=calibrate", "--workdir=FOLDER/run", f"--input={good}"),
            ("run/checkpoint/calibration.json",),
            ("run/checkpoint/calibration.json",),
            "run/checkpoint",
            earlier,
        ),
    }


KILLS = {
    **{"train_and_eval": 3, "train": 1, "eval": 2, "sweep": 2, "packing": 1},
    **{"drawing": 1, "export": 1, "calibrate": 1, "predict": 2, "forget": 1},
}


def content(folder: pathlib.Path, names: tuple[str, ...]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def files(folder: pathlib.Path) -> set[str]:
    """All files but the cache's; of a checkpoint's steps that there is one."""
    found = set()
    for path in folder.rglob("*"):
        name = re.sub(r"checkpoint/[0-9]+(?=/|$).*", "step", str(path.relative_to(folder)))
        if not name.startswith("cache"):
            found.add(name)
    return found


def statistics(folder: pathlib.Path, command: Command) -> str:
    if command.checkpoint is None:
        return ""
    return checkpoint.load(folder / command.checkpoint, Devices(1))[1]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "number"), [(name, i) for name, count in KILLS.items() for i in range(count)]
)
def test_killed(
    name: str, number: int, commands: dict[str, Command], tmp_path: pathlib.Path
) -> None:
    """And given once more; in the end nothing tells of it, and no file is left over."""
    command, expected, folder = commands[name], tmp_path / "undisturbed", tmp_path / "killed"
    expected.mkdir()
    command.prepare(expected)
    changes, seconds = finish(expected, command.arguments)
    # The day's moment.
    rng = random.Random(f"{os.environ['PADIM_JAX_SAMPLE']} {name} {number}")
    at_a_change = (list(KILLS).index(name) + number) % 3
    kill = rng.randint(1, changes) if at_a_change else 0
    print(f"{name} before change {kill} of {changes}")
    # Not in the imports, of which there is little to be learned.
    delay = 200.0 if kill else seconds * rng.uniform(0.3, 0.9)
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        command.prepare(folder)
        before = content(folder, command.signs)
        process = start(folder, command.arguments, kill)
        try:
            process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            print(f"after {delay:.2f} of {seconds:.2f} s")
        if process.returncode == -signal.SIGKILL:
            break
        # It was faster this time.
        delay, kill = 0.7 * delay, int(0.9 * kill)
    wanted = content(expected, command.compared)
    same = functools.partial(_same, folder=folder, expected=expected)
    for sign, found in content(folder, command.signs).items():
        assert same(found, wanted[sign]) or found == before.get(sign), sign
    finish(folder, command.arguments)
    found = content(folder, command.compared)
    assert found.keys() == wanted.keys()
    for file in wanted:
        assert same(found[file], wanted[file]), file
    assert statistics(folder, command) == statistics(expected, command)
    assert files(folder) == files(expected)


def _same(found: bytes, wanted: bytes, folder: pathlib.Path, expected: pathlib.Path) -> bool:
    """But for the names of the two folders."""
    return found.replace(str(folder).encode(), b"") == wanted.replace(
        str(expected).encode(), b""
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("number", range(4))
def test_interrupted(number: int, commands: dict[str, Command], tmp_path: pathlib.Path) -> None:
    """Ctrl-C: gone within two seconds, without a traceback; given once more it is done."""
    command = commands["train_and_eval"]
    rng = random.Random(f"{os.environ['PADIM_JAX_SAMPLE']} {number}")
    process = start(tmp_path, command.arguments)
    # From the imports on, which a run's first second is.
    time.sleep(rng.uniform(0.3, 5.0))
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    out, err = process.communicate(timeout=60)
    seconds = time.monotonic() - begin
    print(f"ended after {seconds:.2f} s")
    assert seconds < 2
    assert "Traceback" not in out + err
    if process.returncode:  # else it was done before
        assert process.returncode == 130, err
        assert "interrupted" in err
    finish(tmp_path, command.arguments)
    assert not list((tmp_path / "run").glob("*incomplete*"))
