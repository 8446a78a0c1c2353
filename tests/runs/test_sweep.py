"""Many runs in one command: each once, whoever does it, and a table of them all."""

import errno
import json
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import filelock
import jax
import pytest
import small

from padim_jax.config import defaults
from padim_jax.config.settings import Config, validate
from padim_jax.data import dataset_splits, inputs
from padim_jax.data.layouts.synthetic import generate
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.runs import sweep, train
from padim_jax.system import paths

CATEGORIES = ("bolt", "nut", "washer")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Three categories in MVTec AD's layout."""
    folder = tmp_path_factory.mktemp("parts")
    generate(folder / "drawn", n_train=6, n_test_good=2, n_test_per_defect=1, size=64)
    for name in CATEGORIES:
        shutil.copytree(folder / "drawn" / "part", folder / "root" / name)
    # Different images in each, of those that are alike but for their number.
    (folder / "root" / "nut" / "train" / "good" / "000.png").unlink()
    (folder / "root" / "washer" / "train" / "good" / "001.png").unlink()
    return folder / "root"


def settings(root: pathlib.Path, **changes: Any) -> Config:
    values = small.values(root, category="all", **{"outputs.figures": "none"})
    values.update(changes)
    return validate(values)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that were done, which here takes no time at all."""
    names: list[str] = []

    def pretend(config: Config, workdir: pathlib.Path, *given: Any) -> dict[str, Any]:
        names.append(config.category)
        print(f"this is {config.category}")
        if (pathlib.Path(str(config.dataset.root)) / config.category / "broken").exists():
            raise UserError("an image is broken")
        return finish(config, workdir, *given)

    monkeypatch.setattr(train, "train_and_eval", pretend)
    return names


def finish(
    config: Config, workdir: pathlib.Path, _: Any = None, backbone: Any = None, *__: Any
) -> dict[str, Any]:
    read = inputs.read(config, dataset_splits.open_dataset(config), Devices(1))
    measured = {
        "inputs": {**read, "weights": backbone[1].sha256 if backbone else ""},
        "image_auroc": 0.9,
        "pixel_auroc": 0.8,
        "image_f1_max": None,
        "aupro": 0.7,
        "pixel_ap": 0.6,
    }
    (workdir / "config.json").write_text(json.dumps(sweep.config_lib.to_dict(config)))
    (workdir / "metrics.json").write_text(json.dumps(measured))
    return measured


def table(workdir: pathlib.Path) -> dict[str, Any]:
    return json.loads((workdir / "table.json").read_text())


def test_a_plan_has_every_category_and_repeat(root: pathlib.Path, tmp_path: pathlib.Path):
    config = settings(root, repeats=2)
    runs = sweep.plan(config, tmp_path)
    assert [run.name for run in runs] == [
        f"{category}/seed_{seed}" for category in CATEGORIES for seed in (42, 43)
    ]
    assert [run.config.model.seed for run in runs[:2]] == [42, 43]
    assert [run.config.image.seed for run in runs[:2]] == [0, 1]
    assert not any(run.config.is_sweep for run in runs)
    assert [run.workdir for run in runs[:1]] == [tmp_path / "bolt" / "seed_42"]


def test_a_list_of_categories_in_its_own_order(root: pathlib.Path, tmp_path: pathlib.Path):
    runs = sweep.plan(settings(root, category="washer,bolt"), tmp_path)
    assert [(run.category, run.workdir.name) for run in runs] == [
        ("washer", "washer"),
        ("bolt", "bolt"),
    ]


@pytest.mark.parametrize("name", ["all", "left,right"])
@pytest.mark.parametrize("category", ["all", None])
def test_folders_whose_names_mean_several_categories(
    name: str, category: str | None, root: pathlib.Path, tmp_path: pathlib.Path
):
    (tmp_path / name / "train").mkdir(parents=True)
    (tmp_path / "bolt" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match=f"{name} is a folder's name .* rename the folder"):
        sweep.plan(settings(tmp_path, category=category or name), tmp_path)
    # A folder of that name elsewhere is nobody's category.
    (root / "notes,2").mkdir(exist_ok=True)
    assert len(sweep.plan(settings(root), tmp_path)) == len(CATEGORIES)


def test_repeats_of_nothing_drawn_are_refused(root: pathlib.Path, tmp_path: pathlib.Path):
    values: Any = defaults.get_config()
    values.repeats, values.model.reduction = 3, "none"
    with pytest.raises(UserError, match=r"config\.repeats=3: nothing is drawn"):
        sweep.plan(validate(values), tmp_path)


def test_all_categories_equal_single_runs(
    root: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
    config = settings(root)
    single = settings(root, category="nut")
    alone = tmp_path / "alone"
    train.train_and_eval(single, alone, alone / "checkpoint")
    with jax.log_compiles():
        sweep.run(config, tmp_path / "all")
    # Compiled once for all of them, by the name that JAX gives what is mapped over devices.
    said = [record.getMessage() for record in caplog.records]
    assert not any(x.startswith("Compiling jit(_fun)") for x in said)
    together = tmp_path / "all" / "nut"
    for name in ("metrics.json", "scores.csv", "config.json"):
        assert (together / name).read_bytes() == (alone / name).read_bytes()
    found = table(tmp_path / "all")
    metrics = json.loads((alone / "metrics.json").read_text())
    assert found["this_run"]["image_auroc"]["nut"]["mean"] == metrics["image_auroc"]
    assert found["categories"] == list(CATEGORIES)
    assert "fitted 5 images" in (together / "log.txt").read_text()
    for name in ("table.md", "table.csv", "report.html"):
        assert (tmp_path / "all" / name).stat().st_size > 0


def test_finished_runs_are_left_alone(
    root: pathlib.Path, tmp_path: pathlib.Path, done: list[str]
):
    sweep.run(settings(root, category="bolt,nut"), tmp_path)
    sweep.run(settings(root), tmp_path)
    assert done == ["bolt", "nut", "washer"]
    sweep.run(settings(root), tmp_path, overwrite=True)
    assert done[3:] == list(CATEGORIES)


def test_finished_with_other_settings(
    root: pathlib.Path, tmp_path: pathlib.Path, done: list[str]
):
    sweep.run(settings(root), tmp_path)
    # Not what results depend on.
    sweep.run(settings(root, batch_size=2), tmp_path)
    values = settings(root, model={"channels": 11})
    with pytest.raises(UserError, match=r"bolt: finished with config\.model\.channels=8"):
        sweep.run(values, tmp_path)
    assert len(done) == 3
    sweep.run(values, tmp_path, overwrite=True)
    assert len(done) == 6


def test_a_failed_run_stops_no_other(
    root: pathlib.Path,
    tmp_path: pathlib.Path,
    done: list[str],
    capsys: pytest.CaptureFixture[str],
):
    (root / "bolt" / "broken").touch()
    try:
        with pytest.raises(UserError, match=r"1 of 3 runs failed:\n  bolt: an image is broken"):
            sweep.run(settings(root), tmp_path)
    finally:
        (root / "bolt" / "broken").unlink()
    assert done == list(CATEGORIES)
    assert "bolt: failed: an image is broken" in capsys.readouterr().out
    found = table(tmp_path)
    assert found["failed"] == {"bolt": "an image is broken"}
    assert found["this_run"]["image_auroc"]["Avg"]["mean"] == 0.9
    # Mended, it is done, and it alone.
    sweep.run(settings(root), tmp_path)
    assert done[3:] == ["bolt"]
    assert table(tmp_path)["failed"] == {}


def test_a_bug_stops_no_other_either(
    root: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def pretend(config: Config, workdir: pathlib.Path, *_: Any) -> dict[str, Any]:
        if config.category == "nut":
            raise IndexError("a bug")
        return finish(config, workdir)

    monkeypatch.setattr(train, "train_and_eval", pretend)
    with pytest.raises(IndexError, match="a bug"):
        sweep.run(settings(root), tmp_path)
    assert (tmp_path / "washer" / "metrics.json").exists()
    assert table(tmp_path)["failed"] == {"nut": "IndexError: a bug"}
    assert "Traceback" in capsys.readouterr().err


def test_what_another_process_is_at_is_left_to_it(
    root: pathlib.Path,
    tmp_path: pathlib.Path,
    done: list[str],
    capsys: pytest.CaptureFixture[str],
):
    (tmp_path / ".locks").mkdir()
    with filelock.FileLock(tmp_path / ".locks" / "nut.lock"):
        sweep.run(settings(root), tmp_path)
    assert done == ["bolt", "washer"]
    assert "nut: another process is at it" in capsys.readouterr().out
    assert table(tmp_path)["missing"] == ["nut"]
    sweep.run(settings(root), tmp_path)
    assert done[2:] == ["nut"]


# A process that needs a moment for each run, and notes it, as this one does meanwhile.
SLOW = """
import pathlib, sys, time
sys.path[:0] = {path!r}
from padim_jax.runs import train; from padim_jax.runs import sweep
from tests.runs.test_sweep import finish, settings

def pretend(config, workdir, *given):
    with open({log!r}, "a") as log:
        log.write(config.category + "\\n")
    time.sleep(0.2)
    return finish(config, workdir, *given)

train.train_and_eval = pretend
print("ready", flush=True)
sweep.run(settings({root!r}, repeats=4), pathlib.Path({workdir!r}))
"""


def test_processes_share_a_sweep(
    root: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    script = SLOW.format(
        path=[str(pathlib.Path(__file__).parents[i]) for i in (1, 2)],
        log=str(tmp_path / "log"),
        root=str(root),
        workdir=str(tmp_path / "results"),
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"

    def pretend(config: Config, workdir: pathlib.Path, *given: Any) -> dict[str, Any]:
        with (tmp_path / "log").open("a") as log:
            log.write(config.category + "\n")
        time.sleep(0.2)
        return finish(config, workdir, *given)

    monkeypatch.setattr(train, "train_and_eval", pretend)
    sweep.run(settings(root, repeats=4), tmp_path / "results")
    said = [other.communicate()[0], capsys.readouterr().out]
    assert other.returncode == 0
    found = sorted((tmp_path / "log").read_text().split())
    assert found == sorted(4 * CATEGORIES)
    # Both had their part, and the last table has them all.
    assert all("another process is at it" in text or "finished" in text for text in said)
    whole = table(tmp_path / "results")
    assert whole["missing"] == []
    assert whole["this_run"]["aupro"]["nut"]["values"] == [0.7] * 4


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "[" * 100_000),
        ("metrics.json", "3"),
        ("metrics.json", "{}"),
        ("metrics.json", '{"image_auroc": "high"}'),
    ],
)
def test_broken_results_are_named(
    name: str, content: str, root: pathlib.Path, tmp_path: pathlib.Path, done: list[str]
):
    sweep.run(settings(root), tmp_path)
    path = tmp_path / "nut" / name
    path.write_text(content)
    with pytest.raises(UserError, match=f"nut/{name}: cannot be read .* --overwrite"):
        sweep.run(settings(root), tmp_path)
    sweep.run(settings(root), tmp_path, overwrite=True)


def test_another_data_set_is_neither_shown_nor_replaced(
    root: pathlib.Path, tmp_path: pathlib.Path, done: list[str]
):
    site = tmp_path / "site"
    shutil.copytree(root, site)
    sweep.run(settings(root), tmp_path / "out")
    sweep.run(settings(site), tmp_path / "out")  # the same images, moved
    assert len(done) == 3
    (site / "nut" / "train" / "good" / "001.png").unlink()
    before = (tmp_path / "out" / "table.json").read_bytes()
    with pytest.raises(UserError, match=r"nut: holds the results of another data set.*--over"):
        sweep.run(settings(site), tmp_path / "out")
    assert len(done) == 3
    assert (tmp_path / "out" / "table.json").read_bytes() == before
    sweep.run(settings(site), tmp_path / "out", overwrite=True)
    assert len(done) == 6


def test_changed_images_are_done_again(
    root: pathlib.Path,
    tmp_path: pathlib.Path,
    done: list[str],
    capsys: pytest.CaptureFixture[str],
):
    site = tmp_path / "site"
    shutil.copytree(root, site)
    sweep.run(settings(site), tmp_path / "out")
    folder = site / "washer" / "test"
    (folder / "good" / "000.png").rename(folder / "good" / "999.png")
    sweep.run(settings(site), tmp_path / "out")
    assert done[3:] == ["washer"]
    assert "washer: done again: other images, labels or masks (test)" in capsys.readouterr().out
    sweep.run(settings(site), tmp_path / "out")
    assert len(done) == 4


def test_what_a_killed_process_left_is_done(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """By a sweep that is amid another run."""
    script = """
import sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from padim_jax.runs import train; from padim_jax.runs import sweep
from tests.runs.test_sweep import settings

def pretend(config, *given):
    (Path({folder!r}) / f"at {{config.category}}").touch()
    time.sleep(120)

train.train_and_eval = pretend
sweep.run(settings({root!r}), Path({folder!r}) / "results")
"""
    script = script.format(
        path=[str(pathlib.Path(__file__).parents[i]) for i in (1, 2)],
        folder=str(tmp_path),
        root=str(root),
    )
    other = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    while not (tmp_path / "at bolt").exists():
        assert other.poll() is None
        time.sleep(0.01)
    done = []

    def pretend(config: Config, workdir: pathlib.Path, *given: Any) -> dict[str, Any]:
        done.append(config.category)
        other.kill()
        other.wait()
        return finish(config, workdir, *given)

    monkeypatch.setattr(train, "train_and_eval", pretend)
    sweep.run(settings(root), tmp_path / "results")
    assert done == ["nut", "washer", "bolt"]
    assert table(tmp_path / "results")["missing"] == []


def test_failures_count_where_nothing_can_be_written(
    root: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(paths, "write", full)
    monkeypatch.setattr(train, "train_and_eval", full)
    with pytest.raises(UserError, match=r"3 of 3 runs failed:\n  bolt: somewhere: .*room"):
        sweep.run(settings(root), tmp_path)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["table.md", "report.html", "nut/log.txt", "nut/error.txt"])
def test_files_of_others_are_kept(
    name: str, root: pathlib.Path, tmp_path: pathlib.Path, done: list[str]
):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="exists and is not from an earlier sweep"):
        sweep.run(settings(root), tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert not done
