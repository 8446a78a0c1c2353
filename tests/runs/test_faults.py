"""Faults of the machine: full disks, folders that cannot be written, two processes, clocks.

Processes that are killed: tests/reliability/test_kills.py.
"""

import contextlib
import errno
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import small

from padim_jax.config.settings import Config
from padim_jax.data import dataset_splits, image_cache, inputs, listing, passes
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.layouts.synthetic import generate
from padim_jax.detector import memory, steps
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.output import results
from padim_jax.runs import evaluate, fitting, loading, modes, predict, sweep, train
from padim_jax.store import checkpoint
from padim_jax.system import library_logs, locks, paths

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("faults")
    generate(folder, n_train=5, n_test_good=3, n_test_per_defect=1, size=72)
    return folder


def settings(root: pathlib.Path, **changes: Any) -> Config:
    return small.config(root, **({"outputs.maps": "npy", "cache.images_gb": 0.0} | changes))


@pytest.fixture(scope="module")
def finished(root: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of a run."""
    workdir = tmp_path_factory.mktemp("finished")
    run("train_and_eval", settings(root), workdir)
    return workdir


def run(mode: str, config: Config | None, workdir: pathlib.Path, **options: Any) -> None:
    """As the command line does."""
    with paths.explained():
        modes.run(mode, config, workdir, workdir / "checkpoint", **options)


def content(folder: pathlib.Path) -> dict[str, bytes]:
    """Files by name, but for locks, which are there for good."""
    found = {
        str(x.relative_to(folder)): x.read_bytes() for x in folder.rglob("*.*") if x.is_file()
    }
    return {name: data for name, data in found.items() if not name.startswith(locks.FOLDER)}


@contextlib.contextmanager
def full_disk(write: int) -> Iterator[list[str]]:
    """The given write of a whole file, from 0, finds the disk full, and all that follow.

    Half of the file is there by then. Yields the names that were to be written.
    """
    names: list[str] = []
    original = pathlib.Path.open

    def open_(self: pathlib.Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file: Any = original(self, mode, *args, **options)
        if mode not in ("w", "wb", "xb") or self.parent.name == locks.FOLDER:
            return file
        names.append(str(self))
        return file if len(names) <= write else HalfWritten(file)

    def write_bytes(self: pathlib.Path, data: bytes) -> int:
        with self.open("wb") as file:
            return file.write(data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pathlib.Path, "open", open_)
        patch.setattr(pathlib.Path, "write_bytes", write_bytes)
        yield names


class HalfWritten(contextlib.AbstractContextManager):
    """A file on a disk that is full after half of what is written to it."""

    def __init__(self, file: Any):
        self.file = file

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.file.write(bytes(data)[: len(data) // 2])
        # As the system says it, of a file that is open: without a name.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def writelines(self, text: Iterable[str]) -> None:
        content = "".join(text)
        self.file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestFullDisk:
    def test_every_write_of_an_evaluation(
        self, root: pathlib.Path, finished: pathlib.Path, tmp_path: pathlib.Path
    ):
        """One after the other: told with the file's name, and the earlier results stay."""
        workdir = tmp_path / "run"
        shutil.copytree(finished, workdir)
        before = content(workdir)
        other = settings(root, **{"map.sigma": 1.0, "outputs.figures": "none"})
        fitted = loading.load(workdir / "checkpoint", other)
        source = dataset_splits.open_dataset(other)["test"]
        with full_disk(10**6) as names:
            evaluate.evaluate(other, fitted, source, tmp_path / "all")
        assert len(names) > 10
        for write in range(0, len(names), 4):  # all sorts of files are among them
            with full_disk(write), pytest.raises(UserError) as caught, paths.explained():
                evaluate.evaluate(other, fitted, source, workdir)
            message = str(caught.value)
            assert message.startswith(str(workdir / "results.incomplete"))
            assert "No space left on device; make room there" in message
            assert content(workdir) == before
        evaluate.evaluate(other, fitted, source, workdir)
        assert content(workdir).keys() < before.keys()  # without pictures
        expected = (tmp_path / "all" / "metrics.json").read_bytes()
        assert (workdir / "metrics.json").read_bytes() == expected

    def test_every_write_of_predictions(
        self, root: pathlib.Path, finished: pathlib.Path, tmp_path: pathlib.Path
    ):
        """Maps, overlays, masks and regions: told, and the same command goes on."""
        workdir, images = tmp_path / "run", root / "part" / "test" / "good"
        shutil.copytree(finished, workdir)
        fitted = loading.load(workdir / "checkpoint", {"outputs.coco": True})
        source = FolderSource(listing.find(str(images)))
        with full_disk(10**6) as names:
            predict.predict(fitted, source, tmp_path / "all")
        expected = content(tmp_path / "all" / "predictions")
        assert {"regions.json", "regions.coco.json"} <= expected.keys()
        # Three pictures of each image, and both files of regions, by names for the meantime.
        assert len(names) == 3 * len(source.records) + 2
        for write in range(len(names)):
            shutil.rmtree(workdir / "predictions.incomplete", ignore_errors=True)
            with full_disk(write), pytest.raises(UserError) as caught, paths.explained():
                predict.predict(fitted, source, workdir)
            assert str(caught.value).startswith(str(workdir / "predictions.incomplete"))
            assert "No space left on device" in str(caught.value)
            assert not (workdir / "predictions").exists()
            if write % 3:  # goes on with what is there
                predict.predict(fitted, source, workdir)
                assert content(workdir / "predictions") == expected
                shutil.rmtree(workdir / "predictions")

    def test_of_the_checkpoint(
        self,
        root: pathlib.Path,
        finished: pathlib.Path,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """In the words of the library that writes it, which is C++."""
        workdir = tmp_path / "run"
        shutil.copytree(finished, workdir)
        _, earlier = checkpoint.load(workdir / "checkpoint", Devices(1))

        def full(place: str, *_: Any, **__: Any) -> None:
            half = pathlib.Path(f"{place}.orbax-checkpoint-tmp")
            half.mkdir()
            (half / "data").touch()
            raise ValueError(
                "RESOURCE_EXHAUSTED: Failed to write 247 bytes to file 30: No space left on "
                "device [tensorstore_spec='{...}']"
            )

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.ocp, "save", full)
            with pytest.raises(UserError) as caught:
                run("train", settings(root, **{"model.channels": 9}), workdir)
        message = str(caught.value)
        assert message.startswith(f"{workdir / 'checkpoint'}: cannot be read or written: No sp")
        assert "tensorstore" not in message
        assert content(workdir) == content(finished)
        assert checkpoint.load(workdir / "checkpoint", Devices(1))[1] == earlier

    @pytest.mark.parametrize("mode", ["export", "calibrate"])
    def test_of_a_file(
        self,
        mode: str,
        root: pathlib.Path,
        finished: pathlib.Path,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        import safetensors.numpy

        def full(arrays: Any, place: pathlib.Path, *_: Any) -> None:
            place.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        workdir = tmp_path / "run"
        shutil.copytree(finished, workdir)
        monkeypatch.setattr(safetensors.numpy, "save_file", full)
        given = {"pattern": f"{root}/part/test/good"} if mode == "calibrate" else {}
        with full_disk(0), pytest.raises(UserError, match="No space left on device"):
            run(mode, None, workdir, **given)
        assert content(workdir) == content(finished)

    @pytest.mark.usefixtures("no_compilation_cache")
    def test_of_the_caches_alone(
        self,
        root: pathlib.Path,
        finished: pathlib.Path,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        """Results do not depend on them: told once each."""
        import jax
        from etils import epath

        from padim_jax.system import compilation_cache

        def write_bytes(self: Any, data: bytes) -> int:
            with open(self, "wb") as file:  # noqa: PTH123 (for both kinds)
                return (HalfWritten(file) if "cache" in self.parts else file).write(data)

        config = settings(
            root, **{"cache.images_gb": 1.0, "cache.dir": str(tmp_path / "cache")}
        )
        image_cache._warn.cache_clear()
        jax.clear_caches()
        compilation_cache.compilation_cache.reset_cache()
        with monkeypatch.context() as patch:
            # What image_cache and JAX write with.
            for kind in (pathlib.Path, type(epath.Path(tmp_path))):
                patch.setattr(kind, "write_bytes", write_bytes)
            source = dataset_splits.open_dataset(config)["train"]
            with compilation_cache.enabled(config.cache.programs):
                fitting.train(config, source, tmp_path / "c")
        told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning")]
        assert len(told) == 2
        assert all("cannot be kept for the next run (" in line for line in told)
        found = checkpoint.load(tmp_path / "c", Devices(1))[1]
        assert found == checkpoint.load(finished / "checkpoint", Devices(1))[1]


class TestRemoved:
    """The folder of a run is removed in the middle of it: one line that names the folder."""

    @pytest.mark.parametrize(
        ("mode", "stage"),
        [
            ("train_and_eval", "calibrate"),
            ("train_and_eval", "evaluate"),
            ("eval", "evaluate"),
            ("calibrate", "calibrate"),
        ],
    )
    def test_while_images_are_scored(
        self,
        mode: str,
        stage: str,
        root: pathlib.Path,
        finished: pathlib.Path,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        workdir, batches = tmp_path / "run", passes.batches
        shutil.copytree(finished, workdir)
        # Thresholds take a second pass.
        monkeypatch.setattr(memory, "embeddings_to_keep", lambda *_, **__: 0)

        def removing(source: Any, config: Any, what: str, *given: Any) -> Iterator[Any]:
            for batch in batches(source, config, what, *given):
                if what == stage:
                    shutil.rmtree(workdir)
                yield batch

        monkeypatch.setattr(passes, "batches", removing)
        given = {"pattern": f"{root}/part/test/good"} if mode == "calibrate" else {}
        with pytest.raises(UserError, match=rf"^{workdir}: was removed, or files in it, while"):
            run(mode, settings(root) if "train" in mode else None, workdir, **given)
        assert not (workdir / "metrics.json").exists()
        assert not (workdir / "results.incomplete").exists()

    def test_while_the_report_is_drawn(
        self,
        finished: pathlib.Path,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """What comes after it would make the folder again, without what came before."""
        workdir = tmp_path / "run"
        shutil.copytree(finished, workdir)

        def removing(*_: Any) -> str:
            shutil.rmtree(workdir)
            return "<html>"

        monkeypatch.setattr(evaluate.html, "run_page", removing)
        with pytest.raises(UserError, match=r"results\.incomplete: was removed while results"):
            run("eval", None, workdir)
        assert not (workdir / "metrics.json").exists()

    def test_while_a_model_is_saved(
        self, root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        workdir, save = tmp_path / "run", checkpoint.ocp.save

        def removing(*given: Any, **named: Any) -> None:
            save(*given, **named)
            shutil.rmtree(workdir)
            raise ValueError("NOT_FOUND: [tensorstore_spec=...]\nand so on")

        monkeypatch.setattr(checkpoint.ocp, "save", removing)
        with pytest.raises(UserError) as caught:
            run("train", settings(root), workdir)
        assert str(caught.value).startswith(f"{workdir}: was removed, or files in it, while")
        assert "\n" not in str(caught.value)

    def test_errors_of_others_stay_what_they_are(self, tmp_path: pathlib.Path):
        with pytest.raises(ZeroDivisionError), locks.held(tmp_path / "place"):
            raise ZeroDivisionError


@pytest.fixture
def open_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system on which files `.nfs...` cannot be removed."""
    unlink, path_unlink = os.unlink, pathlib.Path.unlink

    def busy(path: Any, *given: Any, **named: Any) -> None:
        if pathlib.Path(path).name.startswith(".nfs"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        unlink(path, *given, **named)

    def path_busy(path: pathlib.Path, missing_ok: bool = False) -> None:
        if path.name.startswith(".nfs"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        path_unlink(path, missing_ok)

    monkeypatch.setattr(os, "unlink", busy)
    monkeypatch.setattr(pathlib.Path, "unlink", path_busy)


class TestFilesOfOthers:
    @pytest.mark.usefixtures("open_elsewhere")
    def test_of_systems_are_in_nobodys_way(
        self, root: pathlib.Path, finished: pathlib.Path, tmp_path: pathlib.Path
    ):
        """What is open on a network file system, and what file managers leave."""
        workdir = tmp_path / "run"
        shutil.copytree(finished, workdir)
        (workdir / "predictions").mkdir()
        (workdir / "results.incomplete").mkdir()
        (workdir / "results.incomplete" / ".padim_jax").touch()
        run("predict", None, workdir, pattern=f"{root}/part/test/good")
        for folder in [workdir, *(path for path in workdir.rglob("*") if path.is_dir())]:
            for name in (".nfs000000012", ".DS_Store"):
                (folder / name).write_bytes(b"theirs")
        for _ in range(2):  # the second time what the first has made is replaced
            run("train", settings(root, **{"threshold.normal": "none"}), workdir)
            run("eval", None, workdir)
            run("predict", None, workdir, pattern=f"{root}/part/test/good")
        assert loading.load(workdir / "checkpoint").count == 5
        for name in ("scores.csv", "predictions/scores.csv"):
            assert (workdir / name).exists()
        assert sorted((workdir / "maps").rglob("*.npy"))

    def test_of_people_are_named(
        self, root: pathlib.Path, finished: pathlib.Path, tmp_path: pathlib.Path
    ):
        workdir = tmp_path / "run"
        shutil.copytree(finished, workdir)
        run("predict", None, workdir, pattern=f"{root}/part/test/good")
        for mode, place in (("eval", "maps"), ("eval", "figures"), ("predict", "predictions")):
            notes = workdir / place / "notes.txt"
            notes.write_text("mine")
            given = {"pattern": f"{root}/part/test/good"} if mode == "predict" else {}
            with pytest.raises(UserError, match=rf"^{notes}: is not from an earlier run"):
                run(mode, None, workdir, **given)
            assert notes.read_text() == "mine"
            notes.unlink()
            run(mode, None, workdir, **given)


class TestLibraries:
    """What libraries log of an error that is told in one line is not shown."""

    def run(self, root: pathlib.Path, workdir: pathlib.Path, *given: str) -> tuple[int, str]:
        command = [
            *(sys.executable, "-m", "padim_jax.main", f"--config={ROOT}/configs/mvtec.py"),
            *(f"--config.dataset.root={root}", "--config.category=part", "--mode=train"),
            *("--config.model.weights=random", "--config.model.channels=100"),
            *("--config.image.resize=(64, 64)", "--config.model.statistics=moments"),
            *("--config.cache.images_gb=0", "--config.cache.compilation=False"),
            *(f"--workdir={workdir}", *given),
        ]
        done = subprocess.run(
            ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *command],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stderr

    def test_orbax(self, root: pathlib.Path, tmp_path: pathlib.Path):
        code, err = self.run(root, tmp_path / "run")
        assert err.startswith(f"error: {tmp_path / 'run' / 'checkpoint'}: cannot be read or")
        assert (code, err.count("\n")) == (2, 1)

    def test_tensorflow_datasets(self, root: pathlib.Path, tmp_path: pathlib.Path):
        packed = ("--config.dataset.source=tfds", f"--config.dataset.tfds_dir={tmp_path}")
        code, err = self.run(root, tmp_path / "run", *packed)
        assert err.startswith(f"error: {tmp_path / 'mvtec_ad_part'}: cannot be read or written")
        assert (code, err.count("\n")) == (2, 1)

    def test_what_no_error_tells_is_logged(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ):
        logger = logging.getLogger("absl")
        own, theirs = (
            logger.makeRecord("absl", logging.ERROR, f"/a/{name}/b.py", 1, "text", (), None)
            for name in ("other", "library")
        )
        monkeypatch.setattr(logger, "propagate", True)
        with contextlib.suppress(ValueError), library_logs.held_back("library"):
            logger.handle(own)
            logger.handle(theirs)
            raise ValueError
        assert caplog.records == [own]
        with library_logs.held_back("library"):
            logger.handle(theirs)
            assert caplog.records == [own]
        assert caplog.records == [own, theirs]


# Without what root may do, if it is root who runs the tests.
AS_NOBODY = """
import os, pathlib, sys
sys.path.insert(0, sys.argv[1])
from padim_jax.system import locks; from padim_jax.system import paths
from padim_jax.errors import UserError
if os.getuid() == 0:  # only now: Python itself may be root's alone
    os.setgid(65534)
    os.setuid(65534)
place = pathlib.Path(sys.argv[2])
for act in (lambda: locks.held(place / "checkpoint").__enter__(),
            lambda: paths.write(place / "metrics.json", b"new")):
    try:
        with paths.explained():
            act()
    except UserError as error:
        print(error)
"""


class TestNoPermission:
    def test_to_write(self):
        """Told with the place's name; nothing changes."""
        # Not pytest's, which are private.
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            (folder / "metrics.json").write_text("old")
            folder.chmod(0o555)
            done = subprocess.run(
                [sys.executable, "-c", AS_NOBODY, str(ROOT), name],
                capture_output=True,
                text=True,
                check=False,
            )
            folder.chmod(0o755)
            assert done.returncode == 0, done.stderr
            lock, file = done.stdout.splitlines()
            assert lock.startswith(f"{name}: cannot be made a folder, or no file can be locked")
            assert "Permission denied" in lock
            assert file.startswith(
                f"{folder / 'metrics.json'}: cannot be read or written: Perm"
            )
            assert [path.name for path in folder.iterdir()] == ["metrics.json"]
            assert (folder / "metrics.json").read_text() == "old"

    @pytest.mark.parametrize("mode", ["train_and_eval", "train", "eval", "calibrate", "export"])
    def test_of_a_disk_that_is_only_read(
        self,
        mode: str,
        root: pathlib.Path,
        finished: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        before = content(finished)

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(finished))

        monkeypatch.setattr(locks.filelock.FileLock, "acquire", refuse)
        given = {"pattern": f"{root}/part/test/good"} if mode == "calibrate" else {}
        with pytest.raises(UserError, match=r"Read-only file system\); name another place"):
            run(mode, settings(root), finished, **given)
        assert content(finished) == before


def test_names_with_spaces_and_of_other_languages(
    root: pathlib.Path, tmp_path: pathlib.Path, finished: pathlib.Path
):
    place = tmp_path / "Prüfung 1 — 検査"
    shutil.copytree(root / "part", place / "Teile ß" / "part")
    config = settings(
        place / "Teile ß", **{"cache.dir": str(place / "z w"), "cache.images_gb": 1.0}
    )
    workdir = place / "Ergebnisse №5"
    run("train_and_eval", config, workdir)
    run("export", None, workdir)
    run("predict", None, workdir, pattern=str(place / "Teile ß" / "part" / "test" / "*" / "*"))
    assert (workdir / "scores.csv").read_bytes() == (finished / "scores.csv").read_bytes()
    assert loading.load(workdir / "model.safetensors").count == 5
    assert len((workdir / "predictions" / "scores.csv").read_text().splitlines()) == 8


class TestTwoProcesses:
    @pytest.fixture
    def other(self, tmp_path: pathlib.Path) -> Iterator[subprocess.Popen[str]]:
        """Another process that writes to a checkpoint, results and a model file."""
        code = (
            "import contextlib, pathlib, sys, time; from padim_jax.system import locks\n"
            "with contextlib.ExitStack() as stack:\n"
            "    for name in ('checkpoint', 'results', 'model.safetensors'):\n"
            "        stack.enter_context(locks.held(pathlib.Path(sys.argv[1], name)))\n"
            "    print('there', flush=True); time.sleep(100)"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "run")],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        yield process
        process.kill()
        process.communicate()

    def test_the_second_says_why_not(
        self,
        root: pathlib.Path,
        finished: pathlib.Path,
        tmp_path: pathlib.Path,
        other: subprocess.Popen[str],
    ):
        workdir = tmp_path / "run"
        shutil.copytree(finished, workdir, dirs_exist_ok=True)
        before = content(workdir)
        for mode in (
            "train",
            "train_and_eval",
            "eval",
            "update",
            "forget",
            "calibrate",
            "export",
            "merge",
        ):
            given: dict[str, Any] = {}
            if mode in ("update", "forget", "calibrate"):
                given = {"pattern": f"{root}/part/test/good"}
            if mode == "merge":
                given = {"models": (str(finished / "checkpoint"), str(workdir / "checkpoint"))}
            config = settings(root) if mode != "merge" else None
            with pytest.raises(UserError) as caught:
                run(mode, config, workdir, **given)
            message = str(caught.value)
            assert message.startswith(str(workdir)), mode
            assert f"process {other.pid} on {os.uname().nodename} (since 20" in message, mode
            assert "wait for its end" in message
        # By another name as well.
        (tmp_path / "link").symlink_to(workdir)
        with pytest.raises(UserError, match="is writing there"):
            run("train", settings(root), tmp_path / "link")
        assert content(workdir) == before
        # And not once it is gone, in whatever way.
        other.kill()
        other.wait()
        run("export", None, workdir)

    def test_one_after_the_other(self, tmp_path: pathlib.Path):
        for _ in range(2):
            with locks.held(tmp_path / "a"), locks.held(tmp_path / "b"):
                with pytest.raises(UserError), locks.held(tmp_path / "a"):
                    pass
                assert (tmp_path / ".locks" / "a.json").exists()
        left = [path.name for path in (tmp_path / ".locks").iterdir()]
        assert sorted(left) == ["a.lock", "b.lock"]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a sweep take no time."""

    def pretend(
        config: Config, workdir: pathlib.Path, _: Any, backbone: Any = None, *__: Any
    ) -> dict[str, Any]:
        names = ["image_auroc", "pixel_auroc", "aupro", "image_f1_max", "pixel_ap"]
        read = inputs.read(config, dataset_splits.open_dataset(config), Devices(1))
        found: dict[str, Any] = dict.fromkeys(names, 0.5)
        found["inputs"] = {**read, "weights": backbone[1].sha256 if backbone else ""}
        results.write_json(workdir / "config.json", sweep.config_lib.to_dict(config))
        results.write_json(workdir / "metrics.json", found)
        return found

    monkeypatch.setattr(train, "train_and_eval", pretend)


class TestClock:
    """Set back or forward by years."""

    def test_during_a_fit(
        self,
        root: pathlib.Path,
        finished: pathlib.Path,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """Saved neither after every batch nor never, and gone on with all the same."""
        real, offset = time.time, 0.0
        fit_batch, saves = steps.fit_batch, []

        def jump(*args: Any) -> Any:
            nonlocal offset
            offset = 3e8 if offset <= 0 else -3e8
            return fit_batch(*args)

        save = checkpoint.save
        monkeypatch.setattr(checkpoint, "save", lambda *x: saves.append(1) or save(*x))
        monkeypatch.setattr(steps, "fit_batch", jump)
        monkeypatch.setattr(time, "time", lambda: real() + offset)
        for seconds, expected in ((1e5, 0), (0.0, 1)):
            config = settings(root, **{"train.checkpoint_every": seconds})
            fitting.train(config, dataset_splits.open_dataset(config)["train"], tmp_path / "c")
            assert len(saves) == expected
        found = checkpoint.load(tmp_path / "c", Devices(1))[1]
        assert found == checkpoint.load(finished / "checkpoint", Devices(1))[1]

    def test_what_was_cached_in_the_future(self, tmp_path: pathlib.Path):
        """Goes first; it would stay, and all that is new would go, for years."""
        found = image_cache.Decoded(np.zeros((9, 9, 3), np.uint8), None, (9, 9))
        image_cache.ImageCache(tmp_path, 10**6).put("0" * 64, found)
        (old,) = tmp_path.iterdir()
        os.utime(old, (4e9, 4e9))
        size = old.stat().st_size
        for number in (1, 2):
            image_cache.ImageCache(tmp_path, 2 * size + 1).put(f"{number}" * 64, found)
        assert not old.exists()
        assert len(list(tmp_path.iterdir())) == 2

    @pytest.mark.usefixtures("pretended")
    @pytest.mark.parametrize("seconds", [4e9, 1e6])
    def test_results_of_another_time(
        self, seconds: float, root: pathlib.Path, tmp_path: pathlib.Path
    ):
        """Are finished; and done again, once, when that is asked for."""
        config, metrics = settings(root), tmp_path / "part" / "metrics.json"
        sweep.run(config, tmp_path)
        os.utime(metrics, (seconds, seconds))
        sweep.run(config, tmp_path)
        assert metrics.stat().st_mtime == seconds
        sweep.run(config, tmp_path, overwrite=True)
        assert metrics.stat().st_mtime != seconds

    @pytest.mark.usefixtures("pretended")
    def test_an_error_from_the_future_is_tried_again(
        self, root: pathlib.Path, tmp_path: pathlib.Path
    ):
        (tmp_path / "part").mkdir()
        error = tmp_path / "part" / "error.txt"
        error.write_text("an image is broken")
        (tmp_path / "part" / "log.txt").write_text("padim_jax 0.1.0: part\n")  # a sweep's
        os.utime(error, (4e9, 4e9))
        sweep.run(settings(root), tmp_path)
        assert not error.exists()
        assert (tmp_path / "part" / "metrics.json").exists()


@pytest.mark.usefixtures("pretended")
def test_half_done_again_is_not_finished(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """What an earlier run left is not taken for the new one's, of which half was done."""
    config = settings(root)
    sweep.run(config, tmp_path)

    class KilledError(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_and_eval", killed)
        with pytest.raises(KilledError):
            sweep.run(config, tmp_path, overwrite=True)
    assert not (tmp_path / "part" / "metrics.json").exists()
    sweep.run(config, tmp_path)
    assert json.loads((tmp_path / "table.json").read_text())["missing"] == []


class TestMemory:
    def test_maps_that_have_no_room_are_refused_before_the_fit(
        self, root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        config = settings(root)
        memory.require_for_maps(config, 20)
        monkeypatch.setattr(memory, "available_to_host", lambda: 10**9)
        with pytest.raises(UserError) as caught:
            memory.require_for_maps(config, 10_000)
        assert str(caught.value).startswith(
            "not enough memory: about 1.2 GB to compare the anomaly maps of 10000 test images "
            "of 64x64 pixels with their masks; 1.0 GB are free. Less is taken by "
        )
        # Half of the pixels defects: known once masks are read.
        memory.require_for_maps(config, 4000)
        with pytest.raises(UserError, match=r"about 1\.6 GB"):
            memory.require_for_maps(config, 4000, 0.5)
        monkeypatch.setattr(memory, "available_to_host", lambda: 10**5)
        with pytest.raises(UserError, match="anomaly maps of 7 test images"):
            run("train_and_eval", config, tmp_path)
        assert not (tmp_path / "checkpoint").exists()


# A program that never comes back to Python's main thread, as C++ that computes.
BUSY = """
import signal, time
# A shell's background jobs, of which pytest may be one, ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from padim_jax.system import interrupts
interrupts.install()
print("there", flush=True)
time.sleep(100)
"""


def test_interrupted():
    """Ctrl-C: at once, with its own exit code, and no traceback."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "\ninterrupted\n")
