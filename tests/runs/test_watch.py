"""A watched folder: what arrives, however it comes, is scored once and for all."""

import contextlib
import csv
import datetime
import errno
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import small
from PIL import Image

from padim_jax.data import dataset_splits, files, input_pipeline, listing
from padim_jax.data.layouts.synthetic import generate
from padim_jax.detector.detector import Detector, score
from padim_jax.devices import parallel
from padim_jax.errors import UserError
from padim_jax.output import predictions
from padim_jax.runs import train, watch
from padim_jax.runs.watch import Arrival, Delays, Folder, Log, Result, Stamp, Timing


def draw(path: pathlib.Path, seed: int, size: tuple[int, int] = (48, 40)) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


class TestFolder:
    """Which files have arrived, at given times."""

    def poll(self, folder: Folder, now: float) -> list[str]:
        return [arrival.name for arrival in folder.poll(now)]

    def test_what_has_not_changed_for_a_while(self, tmp_path: pathlib.Path):
        folder, path = Folder(tmp_path, 0.5, set()), tmp_path / "a.png"
        assert self.poll(folder, 0.0) == []
        path.write_bytes(b"half")
        assert self.poll(folder, 1.0) == []
        assert self.poll(folder, 1.4) == []
        path.write_bytes(b"half, and the rest")
        # From the change on, whatever the file's date says.
        os.utime(path, (0, 0))
        assert self.poll(folder, 1.6) == []
        assert self.poll(folder, 2.0) == []
        assert self.poll(folder, 2.1) == ["a.png"]
        assert self.poll(folder, 9.0) == ["a.png"]  # until it is seen

    def test_a_date_that_changes_alone(self, tmp_path: pathlib.Path):
        """A file of its whole size from the start on, as some copy."""
        folder, path = Folder(tmp_path, 0.5, set()), tmp_path / "a.png"
        path.write_bytes(b"1234")
        os.utime(path, (1, 1))
        assert self.poll(folder, 0.0) == []
        os.utime(path, (2, 2))
        assert self.poll(folder, 0.5) == []
        assert self.poll(folder, 1.0) == ["a.png"]

    def test_at_once_where_nothing_has_to_settle(self, tmp_path: pathlib.Path):
        (tmp_path / "a.png").write_bytes(b"")
        assert self.poll(Folder(tmp_path, 0.0, set()), 5.0) == ["a.png"]

    def test_seen_until_written_anew(self, tmp_path: pathlib.Path):
        seen: set[bytes] = set()
        folder, path = Folder(tmp_path, 0.0, seen), tmp_path / "a.png"
        path.write_bytes(b"1")
        (arrival,) = folder.poll(0.0)
        seen.add(arrival.key)
        assert folder.poll(1.0) == []
        path.rename(tmp_path / "away")
        assert folder.poll(2.0) == []
        (tmp_path / "away").rename(path)  # a share that was gone and is there again
        assert folder.poll(3.0) == []
        path.write_bytes(b"22")
        assert len(folder.poll(4.0)) == 1
        path.write_bytes(b"1")
        os.utime(path, ns=(5, arrival.stamp.modified + 1))
        assert len(folder.poll(5.0)) == 1
        os.utime(path, ns=(5, arrival.stamp.modified))
        assert folder.poll(6.0) == []
        shutil.copy2(path, tmp_path / "b.png")
        assert self.poll(folder, 7.0) == ["b.png"]

    def test_which_files(self, tmp_path: pathlib.Path):
        """As --mode=predict finds them."""
        for name in ("b.JPG", "sub/deep ü/a.png", ".c.png", "d.txt", "e.png.part", "[x].tif"):
            draw_nothing = tmp_path / name
            draw_nothing.parent.mkdir(parents=True, exist_ok=True)
            draw_nothing.write_bytes(b"")
        for name in (".Trash-1000/files/000.png", "sub/@eaDir/a.png"):
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).write_bytes(b"")
        (tmp_path / "loop").symlink_to(tmp_path)
        outside = tmp_path.with_name(f"{tmp_path.name} outside")
        draw(outside / "linked.png", 0)
        (tmp_path / "link").symlink_to(outside)
        (tmp_path / "link.png").symlink_to(tmp_path / "d.txt")
        (tmp_path / "nowhere.png").symlink_to(tmp_path / "nothing")
        (tmp_path / "folder.png").mkdir()
        found = self.poll(Folder(tmp_path, 0.0, set()), 0.0)
        listed = listing.find(str(tmp_path))
        assert sorted(found) == sorted(record.relative_path for record in listed)
        assert {"sub/deep ü/a.png", "link/linked.png"} <= set(found)

    def test_results_are_not_watched_through_a_link(self, tmp_path: pathlib.Path):
        draw(tmp_path / "out" / "overlays" / "a.png", 0)
        draw(tmp_path / "in" / "b.png", 0)
        for target in (tmp_path, tmp_path / "out", tmp_path / "out" / "overlays"):
            (tmp_path / "in" / f"to {target.name}").symlink_to(target)
        folder = Folder(tmp_path / "in", 0.0, set(), tmp_path / "out")
        assert self.poll(folder, 0.0) == ["b.png"]

    def test_a_folder_that_is_gone(self, tmp_path: pathlib.Path):
        folder = Folder(tmp_path / "in", 0.0, set())
        with pytest.raises(FileNotFoundError):
            folder.poll(0.0)
        draw(tmp_path / "in" / "sub" / "a.png", 0)
        assert self.poll(folder, 1.0) == ["sub/a.png"]

    def test_a_file_takes_a_hundred_bytes_for_good(self, tmp_path: pathlib.Path):
        seen = {Arrival(tmp_path, f"{n}.png", Stamp(n, n), 0.0).key for n in range(2000)}
        # The set's own table has 2 to 4 times as many slots of 16 bytes.
        taken = sys.getsizeof(seen) + sum(map(sys.getsizeof, seen))
        assert taken / len(seen) < 120


def arrival(name: str, number: int = 0) -> Arrival:
    return Arrival(pathlib.Path(name), name, Stamp(10, number), 0.0)


def result(name: str, error: str = "") -> Result:
    row = {"path": name, "score": "0.1", "predicted": 1, "calibrated": "0.9991"}
    row |= {"regions": 2, "largest_area": 12.5}
    row = None if error else row
    return Result(arrival(name), "" if error else "ab", row, error)


def lines(folder: pathlib.Path) -> list[dict[str, Any]]:
    text = (folder / "scores.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def table(folder: pathlib.Path) -> list[dict[str, str]]:
    text = (folder / "scores.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text, newline="")))


SAID = {"model": "abc", "threshold": (0.5, None)}


class TestDelays:
    def test_later_and_later(self, capsys: pytest.CaptureFixture[str]):
        delays, a, b = Delays(), arrival("a.png"), arrival("b.png")
        assert delays.due([a, b], 0.0) == [a, b]
        delays.postpone(a, "busy", 0.0)
        waits, now = [], 0.0
        for _ in range(8):
            start = now
            while delays.due([a, b], now) == [b]:
                now += 0.5
            waits.append(now - start)
            delays.postpone(a, "busy", now)
        assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
        delays.postpone(a, "no memory", now)
        out = capsys.readouterr().out
        assert out == "tried again later: busy\ntried again later: no memory\n"

    def test_only_of_what_is_there_still(self):
        delays, a = Delays(), arrival("a.png")
        delays.postpone(a, "busy", 0.0)
        changed = arrival("a.png", number=1)
        assert delays.due([changed], 0.0) == [changed]
        assert not len(delays)
        delays.postpone(changed, "busy", 0.0)
        delays.forget([changed])
        assert delays.due([changed], 0.0) == [changed]

    def test_groups(self, monkeypatch: pytest.MonkeyPatch):
        """Of bounded size; what failed before is scored alone."""
        monkeypatch.setattr(watch, "_TOGETHER", 3)
        monkeypatch.setattr(watch, "_TOGETHER_BYTES", 25)  # two and a half of them
        arrivals, delays = [arrival(f"{n}.png") for n in range(5)], Delays()
        for n in (1, 3):
            delays.postpone(arrivals[n], "busy", 0.0)
        groups = watch._groups(arrivals, delays)
        names = [[x.name for x in group] for group in groups]
        assert names == [["0.png", "2.png"], ["4.png"], ["1.png"], ["3.png"]]


class TestLog:
    def test_rows_and_lines(self, tmp_path: pathlib.Path):
        with contextlib.closing(Log(tmp_path / "out", SAID)) as log:
            log.write([result("a, b.png"), result("ü\n.png")], None)
            log.write([result("bad\udcff.png", "not an image")], None)
        rows, found = table(tmp_path / "out"), lines(tmp_path / "out")
        names = ["a, b.png", "ü\n.png", "bad\udcff.png"]
        assert [line["path"] for line in found] == names
        assert [row["path"] for row in rows] == [*names[:2], "bad\\udcff.png"]
        assert list(rows[0].values()) == ["a, b.png", "0.1", "1", "0.9991", "2", "12.5", ""]
        assert list(rows[2].values()) == ["bad\\udcff.png", *5 * [""], "not an image"]
        assert (found[0]["score"], found[0]["predicted"]) == (0.1, 1)
        assert (found[0]["calibrated"], found[0]["error"]) == (0.9991, None)
        assert found[0]["sha256"] == "ab"
        assert (found[2]["score"], found[2]["error"]) == (None, "not an image")
        when = datetime.datetime.fromisoformat(found[0]["time"])
        assert abs(when - datetime.datetime.now(datetime.UTC)).total_seconds() < 60

    def test_the_next_one_knows_what_was_seen(self, tmp_path: pathlib.Path):
        scale = predictions.figures.ColorScale(0.1, 0.3)
        with contextlib.closing(Log(tmp_path, SAID)) as log:
            log.write([result("a.png"), result("b.png", "bad")], scale)
            summary = log.summary()
        with contextlib.closing(Log(tmp_path, SAID)) as again:
            assert again.seen == {arrival("a.png").key, arrival("b.png").key}
            assert again.scale == scale
            assert again.summary() == summary == "1 images are scored, 1 refused"
            again.write([result("c.png")], None)
        assert [row["path"] for row in table(tmp_path)] == ["a.png", "b.png", "c.png"]
        with contextlib.closing(Log(tmp_path, SAID)) as again:
            assert again.scale == scale

    @pytest.mark.parametrize("name", ["scores.csv", "scores.jsonl"])
    def test_a_table_that_is_moved_away_begins_again(self, name: str, tmp_path: pathlib.Path):
        with contextlib.closing(Log(tmp_path, SAID)) as log:
            log.write([result("a.png")], None)
            (tmp_path / name).rename(tmp_path / f"{name}.1")
            log.write([result("b.png")], None)
        expected = {"scores.csv": ["a.png", "b.png"], "scores.jsonl": ["a.png", "b.png"]}
        expected[name] = ["b.png"]
        assert [row["path"] for row in table(tmp_path)] == expected["scores.csv"]
        assert [line["path"] for line in lines(tmp_path)] == expected["scores.jsonl"]
        # What is seen stays so, and a new process cuts nothing off.
        with contextlib.closing(Log(tmp_path, SAID)) as log:
            assert len(log.seen) == 2
        assert [row["path"] for row in table(tmp_path)] == expected["scores.csv"]

    def test_a_table_of_an_earlier_version_keeps_its_columns(self, tmp_path: pathlib.Path):
        columns = ("path", "score", "predicted", "calibrated", "error")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(watch, "COLUMNS", columns)
            with contextlib.closing(Log(tmp_path, SAID)) as log:
                log.write([result("a.png")], None)
        for name in ("b.png", "c.png"):
            with contextlib.closing(Log(tmp_path, SAID)) as log:
                log.write([result(name)], None)
            if name == "b.png":
                assert [tuple(row) for row in table(tmp_path)] == 2 * [columns]
                (tmp_path / "scores.csv").unlink()
        assert table(tmp_path)[0]["largest_area"] == "12.5"
        assert lines(tmp_path)[1]["largest_area"] == 12.5

    def test_results_of_something_else_are_not_added_to(self, tmp_path: pathlib.Path):
        with contextlib.closing(Log(tmp_path / "out", SAID)):
            pass
        with pytest.raises(UserError, match=r"of another model, another threshold;"):
            Log(tmp_path / "out", {"model": "x", "threshold": (0.4, None)})
        for name in ("notes.txt", "journal.sqlite"):
            folder = tmp_path / f"mine {name}"
            folder.mkdir()
            (folder / name).write_text("precious")
            with pytest.raises(UserError, match="not of a watched folder"):
                Log(folder, SAID)
            assert [(x.name, x.read_text()) for x in folder.iterdir()] == [(name, "precious")]

    def test_results_of_an_earlier_version_are_not_added_to(self, tmp_path: pathlib.Path):
        (tmp_path / "journal.jsonl").write_text('{"model":"abc","format of the journal":1}\n')
        with pytest.raises(UserError, match=r"of an earlier version; move it away or name"):
            Log(tmp_path, SAID)
        assert [x.name for x in tmp_path.iterdir()] == ["journal.jsonl"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Detector:
    root = tmp_path_factory.mktemp("model")
    generate(root / "data", n_train=8, n_test_good=1, n_test_per_defect=1, size=64)
    valid = small.config(root / "data")
    return train.train(valid, dataset_splits.open_dataset(valid), root / "checkpoint")


Watching = Callable[..., Any]
FAST = Timing(poll=0.01, settle=0.05)


@pytest.fixture
def watching(
    model: Detector, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Watching:
    """Watches tmp_path/in in a thread while the block runs."""
    monkeypatch.setattr(watch, "_PATIENCE_SECONDS", 0.2)
    (tmp_path / "in").mkdir()

    @contextlib.contextmanager
    def running(timing: Timing = FAST, send: Any = None) -> Iterator[None]:
        stop, errors = threading.Event(), []

        def run() -> None:
            try:
                known = predictions.thresholds(model.calibration)  # pyright: ignore
                given = (tmp_path / "in", tmp_path / "work" / "watch", "npy", SAID, timing)
                watch.run(model, known, *given, stop, send)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
        assert not errors, errors

    return running


def wait_for(count: int, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Until so many lines are there; they and the table agree then."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (folder / "scores.jsonl").exists() and len(found := lines(folder)) >= count:
            assert len(found) == count
            return found
        time.sleep(0.01)
    raise AssertionError((folder / "scores.jsonl").read_text())


class TestRun:
    def test_whatever_way_they_come(
        self, watching: Watching, model: Detector, tmp_path: pathlib.Path, capsys
    ):
        into, out = tmp_path / "in", tmp_path / "work" / "watch"
        draw(into / "there already.png", 0)
        for number in range(1, 6):
            draw(tmp_path / f"{number}.png", number)
        with watching():
            wait_for(1, out)
            (tmp_path / "1.png").rename(into / "moved.png")
            wait_for(2, out)
            # Written slowly, with pauses in which it has settled.
            data = (tmp_path / "2.png").read_bytes()
            with (into / "slow.png").open("wb") as file:
                for start in range(0, len(data), 1 + len(data) // 3):
                    file.write(data[start : start + 1 + len(data) // 3])
                    file.flush()
                    time.sleep(0.1)
            wait_for(3, out)
            (into / "sub" / "deep").mkdir(parents=True)
            shutil.copy(tmp_path / "3.png", into / "sub" / "deep" / "3.png")
            wait_for(4, out)
            # Another content by the same name.
            (tmp_path / "4.png").replace(into / "moved.png")
            wait_for(5, out)
            (into / "bad.png").write_bytes(data[:-40])
            wait_for(6, out)
            shutil.copy(tmp_path / "2.png", into / "bad.png")  # mended
            found = wait_for(7, out)
        names = ["there already", "moved", "slow", "sub/deep/3", "moved", "bad", "bad"]
        assert [line["path"] for line in found] == [f"{name}.png" for name in names]
        rows = table(out)
        assert [row["path"] for row in rows] == [line["path"] for line in found]
        errors = [line["error"] is not None for line in found]
        assert errors == [False, False, False, False, False, True, False]
        assert "bad.png" in rows[5]["error"]
        assert f"passed over: {rows[5]['error']}" in capsys.readouterr().out
        assert (rows[5]["score"], found[5]["score"]) == ("", None)
        # The score is that of the file of this digest.
        kept = {into / "slow.png": 2, into / "moved.png": 4, into / "sub/deep/3.png": 3}
        for path, number in kept.items():
            assert found[number]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            # Scored alone, whatever else came: to the last bit.
            expected = str(score(model, [path]).scores[0])
            assert rows[number]["score"] == expected
            assert found[number]["score"] == float(expected)
            name = path.relative_to(into).as_posix()
            assert np.load(out / "maps" / f"{name}.npy").shape == (48, 40)
            with Image.open(out / "overlays" / f"{name}.jpg") as overlay:
                assert overlay.size == (40, 48)

    def test_a_restart_scores_what_is_new(self, watching: Watching, tmp_path: pathlib.Path):
        into, out = tmp_path / "in", tmp_path / "work" / "watch"
        for number in range(6):  # more than a batch
            draw(into / f"{number}.png", number)
        (into / "x.png").write_bytes(b"no image")
        with watching():
            wait_for(7, out)
        draw(into / "6.png", 6)
        draw(into / "0.png", 7)  # another one by now
        with watching():
            found = wait_for(9, out)
        assert sorted(line["path"] for line in found[7:]) == ["0.png", "6.png"]

    def test_results_are_handed_over(self, watching: Watching, tmp_path: pathlib.Path):
        """The lines of scores.jsonl, one after a restart; those of bad images, too."""
        into, out, sent = tmp_path / "in", tmp_path / "work" / "watch", []

        def send(line: bytes) -> str:
            if json.loads(line)["path"] == "b.png" and len(sent) < 2:
                return "no answer"
            sent.append(line)
            return ""

        draw(into / "a.png", 1)
        with watching(send=send):
            wait_for(1, out)
            draw(into / "b.png", 2)
            wait_for(2, out)
        (into / "x.png").write_bytes(b"no image")
        with watching(send=send):
            wait_for(3, out)
            end = time.monotonic() + 30
            while len(sent) < 3 and time.monotonic() < end:
                time.sleep(0.01)
        expected = (out / "scores.jsonl").read_bytes().splitlines(keepends=True)
        assert sorted(sent) == sorted(expected)

    def test_images_at_full_size_share_the_room(
        self, watching: Watching, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Eight that arrive together are not decoded and drawn all at once."""
        sizes: list[int] = []
        now, most, lock = 0, 0, threading.Lock()

        class Recording(input_pipeline.Room):
            @contextlib.contextmanager
            def held(self, size: int) -> Iterator[None]:
                nonlocal now, most
                with lock:
                    now += 1
                    sizes.append(size)
                    most = max(most, now)
                try:
                    with super().held(size):
                        time.sleep(0.05)  # for the others to come as well
                        yield
                finally:
                    with lock:
                        now -= 1

        monkeypatch.setattr(input_pipeline, "ROOM", Recording(2**20))
        for number in range(8):
            draw(tmp_path / "new" / f"{number}.png", number)
        with watching():
            for path in sorted((tmp_path / "new").iterdir()):
                path.rename(tmp_path / "in" / path.name)
            wait_for(8, tmp_path / "work" / "watch")
        pixels = 48 * 40
        expected = [input_pipeline.DECODING * pixels] * 8 + [
            input_pipeline.DRAWING * pixels
        ] * 8
        assert sorted(sizes) == sorted(expected)
        assert most <= (os.cpu_count() or 1)

    def test_the_folder_is_waited_for(
        self, watching: Watching, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
    ):
        into, out = tmp_path / "in", tmp_path / "work" / "watch"
        draw(into / "a.png", 0)
        with watching():
            wait_for(1, out)
            into.rename(tmp_path / "away")
            said, end = "", time.monotonic() + 60
            while "waiting for it" not in said and time.monotonic() < end:
                said += capsys.readouterr().out
                time.sleep(0.01)
            (tmp_path / "away").rename(into)
            draw(into / "b.png", 1)
            wait_for(2, out)
        said += capsys.readouterr().out
        assert said.count(f"{into}: No such file or directory; waiting for it\n") == 1
        assert said.count("the folder is there again\n") == 1

    def test_names_that_no_table_can_hold(
        self, watching: Watching, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
    ):
        data = draw(tmp_path / "a.png", 0)
        for name in (b"\xff.png", b"n" * 245 + b".png", b"two\nlines.png"):
            pathlib.Path(os.fsdecode(bytes(tmp_path / "in") + b"/" + name)).write_bytes(data)
        os.mkfifo(tmp_path / "in" / "pipe.png")
        with watching():
            found = wait_for(4, tmp_path / "work" / "watch")
        errors = {line["path"]: line["error"] for line in found}
        assert errors["two\nlines.png"] is None
        assert sum(error is not None for error in errors.values()) == 3

    @pytest.mark.parametrize("fault", ["read", "memory", "score", "draw"])
    def test_a_fault_of_the_machine_passes(
        self,
        fault: str,
        watching: Watching,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        """No good image is given up for it, by the next process either."""
        out, ended = tmp_path / "work" / "watch", threading.Event()
        error: BaseException = MemoryError()
        if fault == "read":
            error = OSError(errno.EMFILE, "Too many open files")
        place, name = {
            "read": (files.os, "open"),
            "memory": (watch.input_pipeline, "decode"),
            "score": (watch.scores_lib, "score_pixels"),
            "draw": (predictions.figures, "overlay"),
        }[fault]
        function = getattr(place, name)

        def failing(*args: Any, **keywords: Any) -> Any:
            # Only where it is asked of the watched images.
            ours = fault != "read" or pathlib.Path(args[0]).parent == tmp_path / "in"
            ours &= fault != "score" or bool(args[1].any())  # the first one compiles
            if ours and not ended.is_set():
                raise error
            return function(*args, **keywords)

        monkeypatch.setattr(place, name, failing)
        monkeypatch.setattr(watch, "_FIRST_DELAY", 0.1)
        for number in range(3):
            draw(tmp_path / "in" / f"{number}.png", number)
        (tmp_path / "in" / "empty.png").write_bytes(b"")  # the file's own fault
        said = []
        with watching():
            while "".join(said).count("tried again later") < 3:
                said.append(capsys.readouterr().out)
                time.sleep(0.01)
            time.sleep(0.5)  # some more tries
            if fault != "read" and fault != "memory":
                assert [x["path"] for x in wait_for(1, out)] == ["empty.png"]
        said.append(capsys.readouterr().out)
        text = "".join(said)
        for number in range(3):
            assert text.count(f"tried again later: {tmp_path}/in/{number}.png: ") == 1
        assert re.search(r"stopped, .*, [34] are tried again by the next --watch\n$", text)
        ended.set()
        with watching():
            found = wait_for(4, out)
        assert {x["path"]: x["error"] is None for x in found} == {
            **{f"{number}.png": True for number in range(3)},
            "empty.png": False,
        }
        assert "stopped, 3 images are scored, 1 refused\n" in capsys.readouterr().out

    def test_an_image_without_a_finite_score(
        self, watching: Watching, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        score, calls = watch.scores_lib.score_pixels, []

        def scored(*args: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:  # the first one compiles
                raise UserError("not finite")
            return score(*args)

        monkeypatch.setattr(watch.scores_lib, "score_pixels", scored)
        for number in range(3):
            draw(tmp_path / "in" / f"{number}.png", number)
        with watching():
            found = wait_for(3, tmp_path / "work" / "watch")
        errors = {line["path"]: line["error"] for line in found}
        assert errors["0.png"] is errors["2.png"] is None
        assert errors["1.png"].endswith("1.png: not finite")

    def test_refused(self, model: Detector, tmp_path: pathlib.Path, monkeypatch):
        def run(folder: str, output: str) -> None:
            known, paths = predictions.Thresholds(), (tmp_path / folder, tmp_path / output)
            watch.run(model, known, *paths, "npy", SAID, FAST, threading.Event())

        (tmp_path / "in").mkdir()
        with pytest.raises(UserError, match=r"nowhere: no such folder"):
            run("nowhere", "out")
        with pytest.raises(UserError, match="lies in the folder to watch"):
            run("in", "in/results/watch")
        monkeypatch.setattr(parallel, "every", lambda: parallel.Devices(1, 2))
        with pytest.raises(UserError, match="one process watches a folder"):
            run("in", "out")

    def test_sigterm_ends_it(self, model: Detector, tmp_path: pathlib.Path, capsys):
        draw(tmp_path / "in" / "a.png", 0)
        out, before = tmp_path / "work" / "watch", signal.getsignal(signal.SIGTERM)

        def kill() -> None:
            wait_for(1, out)
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=kill)
        thread.start()
        watch.watch(model, tmp_path / "in", tmp_path / "work", FAST)
        thread.join()
        assert signal.getsignal(signal.SIGTERM) == before
        assert capsys.readouterr().out.endswith("stopped, 1 images are scored\n")
