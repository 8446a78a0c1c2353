"""The journal of predictions: all of a batch is kept or nothing; errors say what to do."""

import pathlib
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from typing import Any

import pytest

from padim_jax.errors import RemovedError, UserError
from padim_jax.system import journal
from padim_jax.system.journal import Journal, Row, Table

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = {"model": "abc", "threshold": (0.5, None)}


def encode(fields: dict[str, Any]) -> bytes:
    return fields["path"].encode() + b"\n"


def tables(folder: pathlib.Path) -> dict[pathlib.Path, Table]:
    return {folder / name: Table(b"header\n", encode) for name in ("one", "two")}


def row(name: str, status: str = "scored") -> Row:
    return Row(name.encode(), status, {"path": name, "score": "0.1", "odd": "\udcff\n"})


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    """Of a journal with one row."""
    with closing(Journal(tmp_path / "journal.sqlite", SETTINGS, tables(tmp_path))) as opened:
        opened.add([row("a")])
    return tmp_path / "journal.sqlite"


def test_rows_and_facts_are_there_again(path: pathlib.Path):
    with closing(Journal(path, SETTINGS)) as opened:
        opened.add([row("b"), row("c", "refused")], scale=[0.1, 0.2])
    with closing(Journal(path, SETTINGS)) as opened:
        assert list(opened.rows()) == [row("a"), row("b"), row("c", "refused")]
        assert list(opened.rows(2)) == [row("c", "refused")]
        assert opened.count() == 3
        assert opened.fact("scale") == [0.1, 0.2]
        assert opened.fact("other") is None
    assert [x.name for x in path.parent.glob("journal*")] == ["journal.sqlite"]


def test_other_settings_are_named_and_touch_nothing(path: pathlib.Path):
    (path.parent / "one").write_bytes(b"mine")
    with closing(Journal(path, {"model": "x", "new": 1}, tables(path.parent))) as opened:
        assert opened.other_settings == ["model", "new", "threshold"]
    assert (path.parent / "one").read_bytes() == b"mine"
    with closing(Journal(path, SETTINGS)) as opened:
        assert opened.other_settings == []


def test_only_the_first_rows_are_kept(path: pathlib.Path):
    with closing(Journal(path, {"model": "x"}, tables(path.parent))) as opened:
        opened.add([row("b"), row("c")], scale=1)
        opened.keep(2)
        assert opened.fact("scale") == 1
        assert (path.parent / "one").read_bytes() == b"header\na\nb\n"
        opened.add([row("d")])
        assert (path.parent / "two").read_bytes() == b"header\na\nb\nd\n"
        opened.keep(0)
        assert (opened.count(), opened.fact("scale")) == (0, None)
        assert (path.parent / "one").read_bytes() == b"header\n"
    with closing(Journal(path, {"model": "x"})) as opened:
        assert opened.other_settings == []


# Processes that add rows, and die before a given event: an SQL statement, COMMIT among them, or
# fsync of a table. Forked from one that has no threads, as pytest's may have.
CHILD = """
import os, pathlib, signal, sqlite3, sys
from contextlib import closing
from padim_jax.system import journal
from padim_jax.system.journal import Journal, Row, Table
left = 0

def event(*_):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

class Traced(sqlite3.Connection):
    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.set_trace_callback(event)

    def execute(self, sql, *given):  # a killed process needs no disk that is slow to be sure
        return super().execute(sql.replace("EXTRA", "OFF"), *given)

connect = sqlite3.connect
sqlite3.connect = lambda *given, **named: connect(*given, factory=Traced, **named)
os.fsync = event
header, path = b"header\\n", lambda fields: fields["path"].encode() + b"\\n"

def add(folder):
    names = {folder / name: Table(header, path) for name in ("one", "two")}
    with closing(Journal(folder / "journal.sqlite", {"model": "m"}, names)) as opened:
        done = {row.identity for row in opened.rows()}
        for part in ("ab", "c"):
            new = [x for x in part if x.encode() not in done]
            if new:
                opened.add([Row(x.encode(), "", {"path": x}) for x in new])

def run(folder, kill):
    global left
    left, child = kill, os.fork()
    if not child:
        add(folder)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status == 0

kill, finished = 0, False
while not finished:
    kill += 1
    for again in (5, 0):  # is the next one killed as well
        folder = pathlib.Path(sys.argv[1]) / f"{kill} {again}"
        folder.mkdir()
        finished = run(folder, kill)
        # Whoever comes next knows whose folder it is.
        assert journal.is_ours(folder / "journal.sqlite") or not list(folder.iterdir())
        run(folder, again)
        assert run(folder, 0)
        for table in ("one", "two"):
            assert (folder / table).read_bytes() == header + b"a\\nb\\nc\\n", folder
print(kill)
"""


def test_killed_before_any_change_no_row_is_lost_or_doubled(tmp_path: pathlib.Path):
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 30


def test_a_full_disk(path: pathlib.Path):
    many = [row(f"{number}" * 50) for number in range(999)]
    with closing(Journal(path, SETTINGS, tables(path.parent))) as opened:
        opened._db.execute("PRAGMA max_page_count = 6")
        with pytest.raises(UserError, match=r"journal\.sqlite: .*the disk is full; make room"):
            opened.add(many, scale=1)
        assert (opened.count(), opened.fact("scale")) == (1, None)
        opened._db.execute("PRAGMA max_page_count = 9999")
        opened.add(many)
    assert (path.parent / "one").read_bytes().count(b"\n") == 1001


def test_a_table_that_cannot_be_written_gets_its_rows_later(path: pathlib.Path):
    kept = (path.parent / "two").read_bytes()
    (path.parent / "two").unlink()
    (path.parent / "two").mkdir()
    with (
        closing(Journal(path, SETTINGS, tables(path.parent))) as opened,
        pytest.raises(UserError, match=r"two: cannot be written \(Is a directory\)\. When"),
    ):
        opened.add([row("b")])
    (path.parent / "two").rmdir()
    (path.parent / "two").write_bytes(kept)
    with closing(Journal(path, SETTINGS, tables(path.parent))):
        pass
    for table in tables(path.parent):
        assert table.read_bytes() == b"header\na\nb\n"


def test_in_use(path: pathlib.Path):
    with (
        closing(Journal(path, SETTINGS)) as opened,
        closing(sqlite3.connect(path)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        opened._db.execute("PRAGMA busy_timeout = 0")
        with pytest.raises(UserError, match=r"journal\.sqlite: another process uses it; end"):
            opened.add([row("b")])


def test_removed(path: pathlib.Path):
    with closing(Journal(path, SETTINGS)) as opened:
        shutil.rmtree(path.parent)
        with pytest.raises(RemovedError, match=r"journal\.sqlite: was removed while"):
            opened.add([row("b")])


@pytest.mark.parametrize("damage", ["header", "pages", "row"])
def test_damaged(damage: str, path: pathlib.Path):
    if damage == "row":
        with closing(sqlite3.connect(path)) as other:
            other.execute("UPDATE images SET row = '{'")
            other.commit()
    else:
        content = path.read_bytes()
        start = 0 if damage == "header" else 100
        path.write_bytes(content[:start] + b"x" * (len(content) - start))
    with (
        pytest.raises(UserError, match=r"journal\.sqlite: damaged; move .* away, and all"),
        closing(Journal(path, SETTINGS)) as opened,
    ):
        list(opened.rows())


def test_another_version(path: pathlib.Path):
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 7")
    with pytest.raises(UserError, match=r"of another version .*\(format 7, expected 1\)"):
        Journal(path, SETTINGS)


def test_whose_file_it_is(path: pathlib.Path, tmp_path: pathlib.Path):
    other = tmp_path / "other"
    assert journal.is_ours(path)
    assert not journal.is_ours(other)
    for content, ours in ((b"", True), (bytes(4096), True), (b"{}\n", False)):
        other.write_bytes(content)
        assert journal.is_ours(other) == ours
    other.unlink()
    with closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE images (number INTEGER)")
    assert not journal.is_ours(other)
