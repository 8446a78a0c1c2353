"""Fits that are interrupted: at any moment, and in the end nothing tells that they were.

Real processes are killed, and some fits in this process, where the moment can be chosen.
"""

import dataclasses
import os
import pathlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest
import small
from PIL import Image

from padim_jax.config.settings import Config
from padim_jax.data import dataset_splits
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.layouts.synthetic import generate
from padim_jax.data.records import Record
from padim_jax.detector import steps
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import Stopped, UserError
from padim_jax.runs import fitting, loading
from padim_jax.store import checkpoint, statistics_store
from padim_jax.store.checkpoint import Fitted

ROOT = pathlib.Path(__file__).resolve().parents[2]
IMAGES = 11  # no whole number of batches
FORMS = ("moments", "samples")
GOING_ON = "going on with an interrupted"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("synthetic")
    generate(folder, n_train=IMAGES, n_test_good=1, n_test_per_defect=1, size=72)
    return folder


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint on the host."""

    identity: str
    fitted: Fitted
    statistics: list[np.ndarray]


def saved(path: pathlib.Path) -> Saved:
    fitted, identity = checkpoint.load(path, Devices(1))
    leaves = jax.tree.leaves(fitted.statistics)
    return Saved(identity, fitted, parallel.join(leaves, fitted.regions))


def require_identical(found: Saved, expected: Saved) -> None:
    """To the last bit, and in all that is said beside the statistics."""
    np.testing.assert_array_equal(found.fitted.images, expected.fitted.images)
    for a, b in zip(found.statistics, expected.statistics, strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()
    assert found.identity == expected.identity


# Here, where the moment can be chosen.


def make_config(root: pathlib.Path, form: str = "moments", **settings: Any) -> Config:
    ours = {"model.statistics": form, "train.checkpoint_every": 0.0}
    return small.config(root, **(ours | settings))


def normal(config: Config) -> FolderSource:
    source = dataset_splits.open_dataset(config)["train"]
    assert isinstance(source, FolderSource)
    return source


def fit(config: Config, path: pathlib.Path, source: FolderSource | None = None) -> None:
    fitting.train(config, source or normal(config), path)


class Crash(BaseException):
    """What no handler for errors would catch, as the end of a process is none."""


def at_save(number: int, act: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Calls `act` after the given save of an unfinished fit."""
    save, count = checkpoint.save, 0

    def counted(*args: Any) -> str:
        nonlocal count
        identity = save(*args)
        count += 1
        if count == number:
            act()
        return identity

    patch.setattr(checkpoint, "save", counted)


def crash() -> None:
    raise Crash


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def uninterrupted(
    root: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Saved]:
    found = {}
    for form in FORMS:
        path = tmp_path_factory.mktemp(form) / "checkpoint"
        fit(make_config(root, form), path)
        found[form] = saved(path)
    return found


class TestGoesOn:
    @pytest.mark.parametrize(("form", "batches"), [("moments", 1), ("samples", 2)])
    def test_after_any_batch(
        self,
        batches: int,
        form: str,
        root: pathlib.Path,
        uninterrupted: dict[str, Saved],
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        """Before the last batch as well, which is not full."""
        config, path = make_config(root, form), tmp_path / "checkpoint"
        with monkeypatch.context() as patch:
            at_save(batches, crash, patch)
            with pytest.raises(Crash):
                fit(config, path)
        read: list[Any] = []
        watch_reading(read, monkeypatch)
        fit(config, path)
        require_identical(saved(path), uninterrupted[form])
        done = 4 * batches
        assert f"{GOING_ON} fit, after {done} of {IMAGES} images" in capsys.readouterr().out
        # Each once for its digest, and those that were not fitted yet to be fitted.
        images = [record.image for record in normal(config).records]
        assert sorted(read) == sorted(images + images[done:])

    def test_interrupted_over_and_over(
        self,
        root: pathlib.Path,
        uninterrupted: dict[str, Saved],
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        config, path = make_config(root), tmp_path / "checkpoint"
        for _ in range(2):
            with monkeypatch.context() as patch:
                at_save(1, crash, patch)
                with pytest.raises(Crash):
                    fit(config, path)
        fit(config, path)
        assert capsys.readouterr().out.count(GOING_ON) == 2
        require_identical(saved(path), uninterrupted["moments"])

    def test_nothing_saved_yet(
        self,
        root: pathlib.Path,
        uninterrupted: dict[str, Saved],
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        config, path = make_config(root), tmp_path / "checkpoint"
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", lambda *args: crash())
            with pytest.raises(Crash):
                fit(config, path)
        fit(config, path)
        assert GOING_ON not in capsys.readouterr().out
        require_identical(saved(path), uninterrupted["moments"])

    def test_over_an_earlier_model(
        self,
        root: pathlib.Path,
        uninterrupted: dict[str, Saved],
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        """Which stays until the new one is there."""
        config, path = make_config(root), tmp_path / "checkpoint"
        earlier = FolderSource(normal(config).records[:5])
        fit(config, path, earlier)
        before = saved(path)
        with monkeypatch.context() as patch:
            at_save(2, crash, patch)
            with pytest.raises(Crash):
                fit(config, path)
        require_identical(saved(path), before)
        fit(config, path)
        require_identical(saved(path), uninterrupted["moments"])


def watch_reading(read: list[Any], patch: pytest.MonkeyPatch) -> None:
    original = FolderSource.read

    def watched(self: FolderSource, index: int) -> Any:
        read.append(self.records[index].image)
        return original(self, index)

    patch.setattr(FolderSource, "read", watched)


@pytest.mark.parametrize(("seconds", "expected"), [(1e6, []), (0.0, [4, 8])])
def test_saved_by_the_clock(
    seconds: float,
    expected: list[int],
    root: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Not before `checkpoint_every` seconds have passed, after every batch with 0."""
    saves: list[int] = []
    save = checkpoint.save

    def counted(path: Any, fitted: Fitted, devices: Devices) -> str:
        saves.append(len(fitted.images))
        return save(path, fitted, devices)

    monkeypatch.setattr(checkpoint, "save", counted)
    config = make_config(root, "moments", **{"train.checkpoint_every": seconds})
    fit(config, tmp_path / "checkpoint")
    assert saves == expected


class TestTerminated:
    @pytest.fixture(autouse=True)
    def handler(self) -> Iterator[None]:
        """A signal that nobody handles would end the tests; it is handled as before."""

        def mine(*_: Any) -> None:
            raise AssertionError("SIGTERM came through")

        before = signal.signal(signal.SIGTERM, mine)
        yield
        assert signal.signal(signal.SIGTERM, before) is mine

    def test_in_a_batch(
        self,
        root: pathlib.Path,
        uninterrupted: dict[str, Saved],
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        config = make_config(root, "samples", **{"train.checkpoint_every": 1e6})
        path, fit_batch = tmp_path / "checkpoint", steps.fit_batch

        def terminated(*args: Any) -> Any:
            terminate()
            return fit_batch(*args)

        for done in (4, 8):
            with monkeypatch.context() as patch:
                patch.setattr(steps, "fit_batch", terminated)
                with pytest.raises(Stopped) as caught:
                    fit(config, path)
            message = str(caught.value)
            assert f"stopped by SIGTERM after {done} of {IMAGES} images" in message
            assert f"saved in {path}; the same command goes on" in message
        fit(config, path)
        found = saved(path)
        for a, b in zip(found.statistics, uninterrupted["samples"].statistics, strict=True):
            assert a.tobytes() == b.tobytes()

    def test_before_the_first_batch(
        self,
        root: pathlib.Path,
        uninterrupted: dict[str, Saved],
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        config, path = make_config(root), tmp_path / "checkpoint"
        open_cache = fitting.image_cache.open_cache

        def terminated(*args: Any) -> Any:
            terminate()
            return open_cache(*args)

        with monkeypatch.context() as patch:
            patch.setattr(fitting.image_cache, "open_cache", terminated)
            with pytest.raises(Stopped) as caught:
                fit(config, path)
        assert f"after 0 of {IMAGES} images" in str(caught.value)
        assert "saved" not in str(caught.value)  # there is nothing
        assert not path.exists()
        fit(config, path)
        require_identical(saved(path), uninterrupted["moments"])

    def test_after_the_last_batch(
        self,
        root: pathlib.Path,
        uninterrupted: dict[str, Saved],
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        path, ready = tmp_path / "checkpoint", statistics_store.ready

        def terminated(*args: Any) -> Any:
            terminate()
            return ready(*args)

        monkeypatch.setattr(statistics_store, "ready", terminated)
        with pytest.raises(Stopped, match="the fit is finished and saved"):
            fit(make_config(root), path)
        require_identical(saved(path), uninterrupted["moments"])


class TestAnother:
    """An interrupted fit of something else: neither gone on with nor lost."""

    @pytest.fixture
    def path(
        self, root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> pathlib.Path:
        path = tmp_path / "checkpoint"
        with monkeypatch.context() as patch:
            at_save(1, crash, patch)
            with pytest.raises(Crash):
                fit(make_config(root), path)
        return path

    def refuse(self, path: pathlib.Path, function: Callable[[], None]) -> str:
        before = checkpoint.load_unfinished(path, Devices(1))
        with pytest.raises(UserError) as caught:
            function()
        message = str(caught.value)
        assert message.startswith(f"{path}: holds an interrupted fit of other images or ")
        for advice in ("Finish it", "move it away", "another --checkpoint"):
            assert advice in message
        after = checkpoint.load_unfinished(path, Devices(1))
        assert before is not None
        assert after is not None
        np.testing.assert_array_equal(before.images, after.images)
        return message

    @pytest.mark.parametrize(
        ("setting", "value"),
        [("model.seed", 1), ("model.channels", 13), ("image.method", "nearest")],
    )
    def test_settings(self, setting: str, value: Any, root: pathlib.Path, path: pathlib.Path):
        config = make_config(root, **{setting: value})
        assert f"config.{setting}={value}" in self.refuse(path, lambda: fit(config, path))

    @pytest.mark.parametrize("change", ["fewer", "more", "another order"])
    def test_images(
        self, change: str, root: pathlib.Path, path: pathlib.Path, tmp_path: pathlib.Path
    ):
        config = make_config(root)
        records: Sequence[Record] = normal(config).records
        other = tmp_path / "other.png"
        Image.new("RGB", (64, 64), (9, 8, 7)).save(other)
        another = dataclasses.replace(records[0], image=other, relative_path="other.png")
        chosen: Any = {
            "fewer": records[:-1],
            "more": [*records, another],
            "another order": records[::-1],
        }[change]
        self.refuse(path, lambda: fit(config, path, FolderSource(chosen)))

    def test_contents(self, root: pathlib.Path, path: pathlib.Path, tmp_path: pathlib.Path):
        """Under the same name another image: of those fitted, or of those to come."""
        config = make_config(root)
        source = normal(config)
        other = tmp_path / "other.png"
        other.write_bytes(source.read(0)[0] + b"appended")

        def exchanged(number: int) -> FolderSource:
            records = list(source.records)
            records[number] = dataclasses.replace(records[number], image=other)
            return FolderSource(records)

        message = self.refuse(path, lambda: fit(config, path, exchanged(3)))
        assert message.endswith(f"({other} has changed since)")
        fit(config, path, exchanged(-1))

    def test_settings_that_do_not_matter(
        self, root: pathlib.Path, path: pathlib.Path, uninterrupted: dict[str, Saved]
    ):
        config = make_config(
            root, "moments", **{"map.sigma": 2.0, "train.checkpoint_every": 1e6}
        )
        fit(config, path)
        found = saved(path).statistics
        for a, b in zip(found, uninterrupted["moments"].statistics, strict=True):
            assert a.tobytes() == b.tobytes()

    def test_no_model_yet(self, path: pathlib.Path):
        with pytest.raises(UserError, match="holds a fit that was interrupted"):
            loading.load(path)


class TestUpdate:
    @pytest.mark.parametrize(("form", "batches"), [("moments", 2), ("samples", 1)])
    def test_after_any_batch(
        self,
        batches: int,
        form: str,
        root: pathlib.Path,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        config = make_config(root, form)
        source = normal(config)
        paths = [tmp_path / name for name in ("whole", "interrupted")]
        for path in paths:
            fit(config, path, FolderSource(source.records[:2]))
        before = saved(paths[1])
        fitting.update(paths[0], source)
        with monkeypatch.context() as patch:
            at_save(batches, crash, patch)
            with pytest.raises(Crash):
                fitting.update(paths[1], source)
        require_identical(saved(paths[1]), before)
        fitting.update(paths[1], source)
        done, new = 4 * batches, IMAGES - 2
        assert f"{GOING_ON} update, after {done} of {new} images" in capsys.readouterr().out
        require_identical(saved(paths[1]), saved(paths[0]))
