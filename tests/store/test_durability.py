"""Power cuts at any moment, whatever has reached the disk: nothing twice, nothing lost."""

import contextlib
import csv
import hashlib
import json
import os
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import numpy as np
import small
from hypothesis import strategies as st
from PIL import Image

from padim_jax.config.settings import ImageConfig
from padim_jax.data import listing
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.records import Record
from padim_jax.devices.parallel import Devices
from padim_jax.output import figures, predictions
from padim_jax.runs import watch
from padim_jax.system import journal
from padim_jax.system.journal import Journal

SETTINGS = hypothesis.settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=True,
)
SCALE = figures.ColorScale(0.0, 1.0)


class PowerCut(BaseException):
    """What no handler for errors would catch."""


class Disk:
    """A folder of which only what was synchronised is sure to outlast a power cut.

    SQLite's own files are: that what it has committed is there, and nothing else of it, is its
    promise (`PRAGMA synchronous`). The power is cut before its transactions as well.
    """

    def __init__(self, root: pathlib.Path):
        self._root, self._safe = root, {}
        self.left = 10**9  # calls of fsync until the power is cut

    def fsync(self, opened: int | None, really: Callable[[int], None] = os.fsync) -> None:
        del really  # the machine that runs the test keeps its power
        self.left -= 1
        if self.left < 0:
            raise PowerCut
        if opened is None:
            return
        status = os.fstat(opened)
        self._safe[status.st_ino] = status.st_size

    def cut(self, generator: random.Random) -> None:
        """Takes from every file a part of what need not be there, from none to all."""
        for path in sorted(self._root.rglob("*")):
            if path.is_file() and path.suffix not in journal.SUFFIXES:
                status = path.stat()
                safe = min(self._safe.get(status.st_ino, 0), status.st_size)
                os.truncate(
                    path,
                    safe + round((status.st_size - safe) * generator.choice((0, 0.3, 0.7, 1))),
                )
        self.left = 10**9


@contextlib.contextmanager
def disk() -> Iterator[tuple[pathlib.Path, Disk]]:
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        made = Disk(root)
        before, transaction = os.fsync, Journal._transaction

        def begin(self: Journal) -> Any:
            made.fsync(None)
            return transaction(self)

        # pytest's monkeypatch is not for the many examples of a test
        os.fsync, Journal._transaction = made.fsync, begin
        try:
            yield root, made
        finally:
            os.fsync, Journal._transaction = before, transaction


@SETTINGS
@hypothesis.given(st.data())
def test_watch(data: st.DataObject):
    """Whatever arrives together and wherever it ends: each file has one row and one line."""
    arriving = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5), "batches")
    cuts = data.draw(st.lists(st.integers(0, 14), max_size=4), "calls until a power cut")
    arrivals = [
        watch.Arrival(pathlib.Path(f"{n}.png"), f"{n}.png", watch.Stamp(n, n), 0.0)
        for n in range(sum(arriving))
    ]

    def score(folder: pathlib.Path) -> watch.Log:
        with contextlib.closing(watch.Log(folder, {"model": "m"})) as log:
            return score_all(log)

    def score_all(log: watch.Log) -> watch.Log:
        start = 0
        for count in arriving:
            batch = arrivals[start : start + count]
            start += count
            results = [
                watch.Result(
                    x,
                    "ab",
                    dict(zip(predictions.COLUMNS, (x.name, "0.5", 1, "", 0, 0.0), strict=True)),
                )
                if x.stamp.size % 3
                else watch.Result(x, "", None, "no image")
                for x in batch
                if x.key not in log.seen
            ]
            if results:
                log.write(results, SCALE)
        return log

    generator = random.Random(data.draw(st.integers(0, 99), "what is lost"))
    with disk() as (root, device):
        (root / "out").mkdir()
        for calls in cuts:
            device.left = calls
            with contextlib.suppress(PowerCut):
                score(root / "out")
            device.cut(generator)
        log = score(root / "out")
        with (root / "out" / watch.TABLE).open(newline="") as table:
            rows = [row["path"] for row in csv.DictReader(table)]
        lines = (root / "out" / watch.LINES).read_text().splitlines()
    names = [arrival.name for arrival in arrivals]
    assert rows == [json.loads(line)["path"] for line in lines] == names
    bad = len(range(0, len(names), 3))
    assert log.summary() == f"{len(names) - bad} images are scored, {bad} refused"
    assert len(log.seen) == len(names)


CONFIG = ImageConfig(
    (4, 4), "bilinear", None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 0.0, "centre", 0
)


def draw_images(folder: pathlib.Path, count: int) -> list[Record]:
    folder.mkdir()
    generator, records = np.random.default_rng(0), []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.fromarray(generator.integers(0, 256, (5, 6, 3), np.uint8)).save(path)
        records.append(Record("test", path, None, 0, listing.UNKNOWN, path.name))
    return records


def predict(folder: pathlib.Path, records: list[Record], batch: int) -> int:
    """As `predict.predict` with made-up scores; how many images were scored already."""
    folder.mkdir(exist_ok=True)
    known = predictions.Thresholds()  # the colours are those of the first batch
    with contextlib.closing(predictions.open_journal(folder, {"batch": batch})) as opened:
        source = FolderSource(records)
        kept = predictions.resume(opened, folder, "npy", source, batch, Devices(1), False)
        with predictions.Writer(
            folder, small.preprocessed(CONFIG), "npy", known, None, opened
        ) as writer:
            for start in range(kept, len(records), batch):
                part = records[start : start + batch]
                scores = np.asarray([int(x.relative_path[:-4]) for x in part], np.float32)
                maps = scores[:, None, None] + np.arange(16, dtype=np.float32).reshape(4, 4)
                files = [hashlib.sha256(x.image.read_bytes()).digest() for x in part]
                digests = np.frombuffer(b"".join(files), np.uint8).reshape(-1, 32)
                writer.add(part, maps, scores, digests)
            writer.finish()
    return kept


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    files = (x for x in folder.rglob("*") if x.is_file() and x.suffix not in journal.SUFFIXES)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@SETTINGS
@hypothesis.given(st.data())
def test_predict(data: st.DataObject):
    """Whatever the batches and wherever it ends: in the end the same bytes."""
    count, batch = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 4))
    cuts = data.draw(st.lists(st.integers(0, 30), max_size=3), "calls until a power cut")
    generator = random.Random(data.draw(st.integers(0, 99), "what is lost"))
    with disk() as (root, device):
        records = draw_images(root / "in", count)
        predict(root / "whole", records, batch)
        expected = contents(root / "whole")
        (root / "out").mkdir()
        for calls in cuts:
            device.left = calls
            with contextlib.suppress(PowerCut):
                predict(root / "out", records, batch)
            images = contents(root / "in")
            device.cut(generator)
            for name, content in images.items():  # these were there before
                (root / "in" / name).write_bytes(content)
        predict(root / "out", records, batch)
        found: dict[str, Any] = contents(root / "out")
        found = {x: y for x, y in found.items() if not x.endswith(".incomplete")}
        shutil.rmtree(root / "out")
    assert found == expected
