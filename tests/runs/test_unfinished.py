"""Predictions that are interrupted, at any moment: in the end nothing tells that they were."""

import contextlib
import csv
import hashlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import small
from PIL import Image

from padim_jax.config.settings import ImageConfig
from padim_jax.data import dataset_splits, listing
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.layouts.synthetic import generate
from padim_jax.detector import detector
from padim_jax.detector.detector import Detector
from padim_jax.devices import parallel
from padim_jax.errors import UserError
from padim_jax.output import figures, predictions, results
from padim_jax.runs import predict, train
from padim_jax.system.journal import Journal

CONFIG = ImageConfig(
    (32, 32), "bilinear", None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 0.0, "centre", 0
)
BATCH = 4
IMAGES = 18  # no whole number of batches


class Crash(BaseException):
    """What no handler for errors would catch, as the end of a process is none."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    """Without a calibration: the colours follow the first batch, and have to be kept."""
    root = tmp_path_factory.mktemp("model")
    generate(root / "data", n_train=4, n_test_good=1, n_test_per_defect=1, size=64)
    valid = small.config(root / "data", **{"threshold.normal": "none", "batch_size": BATCH})
    return train.train(valid, dataset_splits.open_dataset(valid), root / "checkpoint")


def draw(path: pathlib.Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def images(tmp_path: pathlib.Path) -> pathlib.Path:
    for number in range(IMAGES):
        draw(tmp_path / "in" / f"{'a, b' if number < 5 else 'ü'}/{number:02}.png", number)
    return tmp_path / "in"


def run_predict(model: Detector, images: pathlib.Path, workdir: pathlib.Path) -> None:
    predict.predict(model, FolderSource(listing.find(str(images))), workdir)


def tree(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many images were scored since it was last asked."""
    scored, score = 0, detector.measure_pixels

    def counted(model: Detector, batch: Any, *args: Any) -> Any:
        nonlocal scored
        scored += len(batch)
        return score(model, batch, *args)

    def since() -> int:
        nonlocal scored
        found, scored = scored, 0
        return found

    monkeypatch.setattr(detector, "measure_pixels", counted)
    return since


def crash_at(call: int, place: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends the run in the given call of a function, half of what it writes being written."""
    function, calls = getattr(place, name), 0

    def crashing(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            for path in (x for x in args if isinstance(x, pathlib.Path) and x.is_file()):
                with path.open("ab") as file:
                    file.write(b"half")
            raise Crash
        return function(*args, **keywords)

    monkeypatch.setattr(place, name, crashing)


def interrupt(
    call: int,
    place: Any,
    name: str,
    model: Detector,
    images: pathlib.Path,
    workdir: pathlib.Path,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        crash_at(call, place, name, patch)
        with pytest.raises(Crash):
            run_predict(model, images, workdir)


@pytest.mark.parametrize(
    ("call", "place", "name", "redone"),
    [
        (1, Journal, "keep", IMAGES),  # before there is anything
        (11, results, "save_map", IMAGES - 8),
        (3, Journal, "add", IMAGES - 8),
        (5, Journal, "_append", IMAGES - 12),  # in the journal, and not in the table
        (1, predict, "_remove_predictions", 0),
    ],
)
def test_goes_on_to_the_same_results(
    call: int,
    place: Any,
    name: str,
    redone: int,
    model: Detector,
    images: pathlib.Path,
    count: Callable[[], int],
    tmp_path: pathlib.Path,
):
    run_predict(model, images, tmp_path / "whole")
    interrupt(call, place, name, model, images, tmp_path / "cut")
    count()
    run_predict(model, images, tmp_path / "cut")
    # Padded to whole batches.
    assert count() == -(-redone // BATCH) * BATCH
    assert tree(tmp_path / "cut" / "predictions") == tree(tmp_path / "whole" / "predictions")
    assert not (tmp_path / "cut" / "predictions.incomplete").exists()


def test_interrupted_again_and_again(
    model: Detector, images: pathlib.Path, count: Callable[[], int], tmp_path: pathlib.Path
):
    run_predict(model, images, tmp_path / "whole")
    for _ in range(3):  # each gets one batch further
        interrupt(2 * BATCH, results, "save_map", model, images, tmp_path / "cut")
    count()
    run_predict(model, images, tmp_path / "cut")
    assert count() == 8
    assert tree(tmp_path / "cut" / "predictions") == tree(tmp_path / "whole" / "predictions")


def test_killed_while_earlier_ones_are_removed(
    model: Detector, images: pathlib.Path, tmp_path: pathlib.Path
):
    """What is left of them is still known to be ours."""
    run_predict(model, images, tmp_path)
    before = tree(tmp_path / "predictions")
    interrupt(3, predict.paths, "remove_folder", model, images, tmp_path)
    assert set(tree(tmp_path / "predictions")) == {"scores.csv"}
    run_predict(model, images, tmp_path)
    assert tree(tmp_path / "predictions") == before


Change = Callable[[pathlib.Path, pathlib.Path], object]


class TestWhatIsKept:
    """Without a detector: of 18 images three batches are done, 0-3, 4-7 and 8-11."""

    def source(self, images: pathlib.Path) -> FolderSource:
        return FolderSource(listing.find(str(images)))

    def open(self, folder: pathlib.Path, **settings: Any) -> Journal:
        values = {"model": "abc", "batch size": BATCH, "threshold": (0.1, None), **settings}
        return predictions.open_journal(folder, values)

    def resume(self, images: pathlib.Path, folder: pathlib.Path, **settings: Any) -> int:
        with contextlib.closing(self.open(folder, **settings)) as opened:
            source = self.source(images)
            return predictions.resume(
                opened, folder, "tiff", source, BATCH, parallel.Devices(1), True
            )

    @pytest.fixture
    def folder(self, images: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
        folder, source = tmp_path / "out", self.source(images)
        folder.mkdir()
        assert self.resume(images, folder) == 0
        with (
            contextlib.closing(self.open(folder)) as opened,
            predictions.Writer(
                *(folder, small.preprocessed(CONFIG), "tiff"),
                *(predictions.Thresholds(pixel=8.5), None, opened),
            ) as writer,
        ):
            for start in (0, 4, 8):
                records = source.records[start : start + BATCH]
                maps = np.random.default_rng(start).uniform(1, 9, (BATCH, 32, 32))
                maps = maps.astype(np.float32)
                digests = [hashlib.sha256(x.image.read_bytes()).digest() for x in records]
                stacked = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
                writer.add(records, maps, maps.max((1, 2)), stacked)
        # And what a killed process may leave of the next one.
        (folder / "maps/ü/12.png.tiff").write_bytes(b"half")
        with (folder / "scores.csv").open("ab") as table:
            table.write(b"\xc3\xbc/12.png,0.")
        return folder

    @pytest.mark.parametrize(
        ("change", "kept"),
        [
            (lambda i, o: None, 12),
            (lambda i, o: draw(i / "ü/09.png", 99), 8),
            (lambda i, o: draw(i / "a, b/02.png", 99), 0),
            (lambda i, o: (i / "ü/06.png").unlink(), 4),
            (lambda i, o: draw(i / "A.png", 99), 0),  # a new first
            (lambda i, o: draw(i / "ü/99.png", 99), 12),
            (lambda i, o: [x.unlink() for x in i.glob("ü/1*")], 8),
            (lambda i, o: os.utime(i / "ü/09.png", (0, 0)), 12),  # the same content
            (lambda i, o: (o / "maps/ü/05.png.tiff").unlink(), 4),
            (lambda i, o: (o / "overlays/ü/08.png.jpg").unlink(), 8),
            (lambda i, o: (o / "masks/ü/08.png.png").unlink(), 8),
            # As a power cut leaves them.
            (lambda i, o: os.truncate(o / "scores.csv", 100), 12),
            (lambda i, o: (o / "scores.csv").unlink(), 12),
            (lambda i, o: (o / "journal.sqlite").write_bytes(b""), 0),
            (lambda i, o: (o / "journal.sqlite").unlink(), 0),
        ],
    )
    def test_up_to_what_has_changed(
        self,
        change: Change,
        kept: int,
        images: pathlib.Path,
        folder: pathlib.Path,
        capsys: pytest.CaptureFixture,
    ):
        change(images, folder)
        with contextlib.closing(self.open(folder)) as opened:
            before = opened.count()
        capsys.readouterr()
        assert self.resume(images, folder) == kept
        out = capsys.readouterr().out
        assert (f"after {kept} of " in out) == (kept > 0)
        assert ("are redone: images or results have changed" in out) == (kept < before)
        # Pictures and rows of these images only, whole.
        names = [record.relative_path for record in self.source(images).records[:kept]]
        expected = {f"maps/{x}.tiff" for x in names} | {f"overlays/{x}.jpg" for x in names}
        expected |= {f"masks/{x}.png" for x in names}
        assert {x for x in tree(folder) if "/" in x} == expected
        with (folder / "scores.csv").open(encoding="utf-8", newline="") as table:
            assert [row["path"] for row in csv.DictReader(table)] == names
        # Once more, nothing is different.
        assert self.resume(images, folder) == kept

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"model": "xyz"}, "made with another model\n"),
            ({"batch size": 8, "model": ""}, "made with another batch size, another model\n"),
            ({"threshold": [0.2, None]}, "made with another threshold\n"),
            ({"new": 1}, "made with another new\n"),
        ],
    )
    def test_nothing_of_other_settings(
        self,
        settings: dict[str, Any],
        said: str,
        images: pathlib.Path,
        folder: pathlib.Path,
        capsys: pytest.CaptureFixture,
    ):
        assert self.resume(images, folder, **settings) == 0
        assert said in capsys.readouterr().out
        assert self.resume(images, folder, **settings) == 0
        assert "redone" not in capsys.readouterr().out

    def test_colours_are_kept(self, images: pathlib.Path, folder: pathlib.Path):
        self.resume(images, folder)
        with contextlib.closing(self.open(folder)) as opened:
            scale = figures.ColorScale(*opened.fact("scale"))
        maps = np.random.default_rng(0).uniform(1, 9, (BATCH, 32, 32)).astype(np.float32)
        assert scale == figures.color_scale(maps, np.zeros(BATCH, int))


def test_a_broken_image_keeps_the_rows_before_it(
    model: Detector, images: pathlib.Path, count: Callable[[], int], tmp_path: pathlib.Path
):
    whole = (images / "ü/10.png").read_bytes()
    run_predict(model, images, tmp_path / "whole")
    (images / "ü/10.png").write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"10\.png"):
        run_predict(model, images, tmp_path / "cut")
    (images / "ü/10.png").write_bytes(whole)
    count()
    run_predict(model, images, tmp_path / "cut")
    assert count() == 12
    assert tree(tmp_path / "cut" / "predictions") == tree(tmp_path / "whole" / "predictions")


def test_results_are_no_input(model: Detector, images: pathlib.Path, tmp_path: pathlib.Path):
    """Their pictures would be found, and scored, when the command is given again."""
    run_predict(model, images, tmp_path)
    before = tree(tmp_path / "predictions")
    with pytest.raises(UserError, match="is of the results in"):
        run_predict(model, tmp_path, tmp_path)
    assert tree(tmp_path / "predictions") == before


def test_an_image_that_changes_while_it_is_scored(
    model: Detector, images: pathlib.Path, tmp_path: pathlib.Path, monkeypatch
):
    """A map of the one over a picture of the other would tell lies."""
    score = detector.measure_pixels

    def scored(*args: Any) -> Any:
        draw(images / "a, b/01.png", 99)
        return score(*args)

    monkeypatch.setattr(detector, "measure_pixels", scored)
    with pytest.raises(UserError, match=r"01\.png: was written to while it was scored"):
        run_predict(model, images, tmp_path)


def test_a_table_that_is_removed_meanwhile_is_whole_in_the_end(
    model: Detector, images: pathlib.Path, tmp_path: pathlib.Path, monkeypatch
):
    run_predict(model, images, tmp_path / "whole")
    score = detector.measure_pixels

    def scored(*args: Any) -> Any:
        (tmp_path / "cut" / "predictions.incomplete" / "scores.csv").unlink()
        return score(*args)

    monkeypatch.setattr(detector, "measure_pixels", scored)
    run_predict(model, images, tmp_path / "cut")
    assert tree(tmp_path / "cut" / "predictions") == tree(tmp_path / "whole" / "predictions")


def test_an_earlier_version_was_interrupted(
    model: Detector, images: pathlib.Path, tmp_path: pathlib.Path, capsys
):
    run_predict(model, images, tmp_path / "whole")
    growing = tmp_path / "out" / "predictions.incomplete"
    growing.mkdir(parents=True)
    (growing / "journal.jsonl").write_text('{"model":"m","format of the journal":1}\n')
    (growing / "scores.csv").write_text("path,score,predicted,calibrated\nx.png,1,,\n")
    run_predict(model, images, tmp_path / "out")
    assert "of an earlier version of padim_jax are redone\n" in capsys.readouterr().out
    assert tree(tmp_path / "out" / "predictions") == tree(tmp_path / "whole" / "predictions")
