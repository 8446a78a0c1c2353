"""Journal of a folder of predictions: the images that are done, and their results.

`predict` and `--watch` keep it in an SQLite file. The tables for people are written from
its rows, and never read. A row is committed, together with the sizes of the tables, before it
is appended to a table; the next process repeats an interrupted append. No row is lost or
duplicated, whatever ends this process.
"""

import contextlib
import json
import os
import pathlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from padim_jax.errors import RemovedError, UserError
from padim_jax.system import paths
from padim_jax.system.paths import Path

NAME = "journal.sqlite"
EARLIER = "journal.jsonl"  # of versions that kept JSON lines
SUFFIXES = (".sqlite", ".sqlite-journal")  # SQLite creates the latter during a commit

_MAGIC, _APPLICATION, _VERSION = b"SQLite format 3\0", 0x5061446D, 1
_SCHEMA = (
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE images (number INTEGER PRIMARY KEY, identity BLOB NOT NULL, "
    "status TEXT NOT NULL, row TEXT NOT NULL)",
)


class Row(NamedTuple):
    """Result of an image that is done.

    Attributes:
      identity: digest of its content.
      status: "scored" or "refused".
      fields: cells of its table row, by column; strings and numbers.
    """

    identity: bytes
    status: str
    fields: dict[str, Any]


class Table(NamedTuple):
    """A table for people: its first bytes, and a function from a row's fields to a line."""

    header: bytes
    encode: Callable[[dict[str, Any]], bytes]


class Journal:
    """An SQLite file, and the tables written from it.

    The caller ensures that there is one writer (see `locks`), and closes it.

    Args:
      path: local file, created if missing; None keeps the rows in memory.
      settings: everything besides the images that rows depend on, for JSON; keys are names for
        a person.
      tables: local files beside it; one that was moved away is written anew.

    Attributes:
      other_settings: names of the settings that differ from those of the existing rows.

    Raises:
      UserError: the file is damaged, of another version, in use, or cannot be written.
    """

    def __init__(
        self,
        path: pathlib.Path | None,
        settings: Mapping[str, Any],
        tables: Mapping[pathlib.Path, Table] | None = None,
    ):
        self._path, self._tables = path or pathlib.Path(":memory:"), tables or {}
        self._settings = json.loads(json.dumps(settings))  # as it is read back
        with writing(self._path):
            self._db = sqlite3.connect(self._path, isolation_level=None)
        try:
            self.other_settings = self._open()
            if not self.other_settings:
                self._append()
        except BaseException:
            self.close()
            raise

    def _open(self) -> list[str]:
        # Not a write-ahead log, whose shared memory network file systems lack. EXTRA makes a
        # commit survive a power cut before its rows are appended to tables; FULL does not
        # synchronise the removal of SQLite's journal, without which the commit is undone.
        for pragma in ("journal_mode = DELETE", "synchronous = EXTRA"):
            next(self._select(f"PRAGMA {pragma}"), None)
        ((version,),) = self._select("PRAGMA user_version")
        if version == 0:
            with self._transaction():
                for statement in _SCHEMA:
                    self._db.execute(statement)
                self._set(settings=self._settings)
        elif version != _VERSION:
            raise UserError(
                f"{self._path}: of another version of padim_jax (format {version}, expected "
                f"{_VERSION}); use that one, or move {self._path.parent} away, and all images "
                "are scored again"
            )
        stored, settings = self.fact("settings"), self._settings
        return [x for x in sorted({*stored, *settings}) if stored.get(x) != settings.get(x)]

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def count(self) -> int:
        """Return the number of images done."""
        return next(self._select("SELECT count(*) FROM images"))[0]

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Yield the rows in the order of `add`, without the first `start`."""
        query = "SELECT identity, status, row FROM images WHERE number > ? ORDER BY number"
        for identity, status, fields in self._select(query, start):
            yield Row(identity, status, self._decode(fields))

    def fact(self, name: str) -> Any:
        """Return the value that `add` stored under a name; None if there is none."""
        value = next(self._select("SELECT value FROM facts WHERE name = ?", name), None)
        return None if value is None else self._decode(value[0])

    def open_queue(self) -> None:
        """Keep a list of pending rows, if there is none yet: of those that `add` puts on it."""
        with self._transaction():
            # Beside the schema of version 1, which earlier versions use as it is.
            self._db.execute("CREATE TABLE IF NOT EXISTS pending (number INTEGER PRIMARY KEY)")

    def pending(self, start: int, limit: int) -> list[tuple[int, dict[str, Any]]]:
        """Return the number and the fields of the next pending rows, in order.

        Args:
          start: number of the row before them.
          limit: most rows to return.
        """
        query = (
            "SELECT number, row FROM pending JOIN images USING (number) WHERE number > ? "
            "ORDER BY number LIMIT ?"
        )
        found = self._select(query, start, limit)
        return [(number, self._decode(fields)) for number, fields in found]

    def count_pending(self) -> int:
        """Return the number of pending rows."""
        return next(self._select("SELECT count(*) FROM pending"))[0]

    def delivered(self, numbers: Sequence[int]) -> None:
        """Take rows off the list of pending ones."""
        with self._transaction():
            query = "DELETE FROM pending WHERE number = ?"
            self._db.executemany(query, [(number,) for number in numbers])

    def add(self, rows: Sequence[Row], queued: bool = False, **facts: Any) -> None:
        """Add rows and facts in one transaction, then append the rows to the tables.

        Args:
          rows: rows to add.
          queued: whether they are pending; see `open_queue`.
          facts: JSON values to store by name.

        Raises:
          UserError: something cannot be written.
          RemovedError: the file has been removed.
        """
        sizes = {x.name: x.stat().st_size if x.exists() else 0 for x in self._tables}
        with self._transaction():
            self._set(**facts, appending={"start": self.count(), "sizes": sizes})
            query = "INSERT INTO images (identity, status, row) VALUES (?, ?, ?)"
            values = [(*row[:2], json.dumps(row.fields)) for row in rows]
            if not queued:
                self._db.executemany(query, values)
            for one in values if queued else ():
                number = self._db.execute(query, one).lastrowid
                self._db.execute("INSERT INTO pending VALUES (?)", (number,))
        self._append()

    def keep(self, count: int) -> None:
        """Keep only the first `count` rows (for 0, no facts either), and rewrite the tables."""
        with self._transaction():
            self._db.execute("DELETE FROM images WHERE number > ?", (count,))
            if not count:
                self._db.execute("DELETE FROM facts")
            sizes = {path.name: 0 for path in self._tables}
            self._set(settings=self._settings, appending={"start": 0, "sizes": sizes})
        self.other_settings = []
        self._append()

    def _append(self) -> None:
        """Append to the tables the rows that they lack."""
        if (appending := self.fact("appending")) is None:
            return
        for path, table in self._tables.items():
            with writing(path), path.open("ab") as file:
                # Remove an interrupted append. A table that was moved away is smaller.
                size = min(file.tell(), appending["sizes"][path.name])
                file.truncate(size)
                if not size:
                    file.write(table.header)
                for row in self.rows(appending["start"]):
                    file.write(table.encode(row.fields))
                file.flush()
                os.fsync(file.fileno())
                if not size:
                    paths.sync(path.parent)
        with self._transaction():
            self._set(appending=None)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with writing(self._path), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield

    def _set(self, **facts: Any) -> None:
        pairs = [(name, json.dumps(value)) for name, value in facts.items()]
        self._db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", pairs)

    def _select(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        with writing(self._path):
            yield from self._db.execute(query, values)

    def _decode(self, text: str) -> Any:
        with writing(self._path):
            return json.loads(text)


def is_ours(path: pathlib.Path) -> bool:
    """Return whether a file is a journal, or left of a new one by a killed process."""
    try:
        with path.open("rb") as file:
            start = file.read(100)
    except (FileNotFoundError, IsADirectoryError):
        return False
    ours = start.startswith(_MAGIC) and start[68:72] == _APPLICATION.to_bytes(4)
    return ours or not start.strip(b"\0")  # zeros are left by a power cut


# Message and advice, by the prefix of SQLite's error name.
_ERRORS = {
    "SQLITE_BUSY": "another process uses it; end that one, and give the same command again",
    "SQLITE_FULL": "cannot be written, the disk is full; make room, and the command goes on",
    "SQLITE_NOTADB": "damaged; move {folder} away, and all images are scored again",
    "SQLITE_CORRUPT": "damaged; move {folder} away, and all images are scored again",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise a UserError for an error of a file of results or of the SQLite file."""
    try:
        yield
    except (OSError, sqlite3.Error, json.JSONDecodeError) as error:
        damaged = isinstance(error, json.JSONDecodeError)  # a damaged row
        name = "SQLITE_CORRUPT" if damaged else getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_READONLY_DBMOVED":
            raise RemovedError(
                f"{path}: was removed while results were written; leave the folder alone until "
                "they are done. The same command scores the images again"
            ) from error
        reason = getattr(error, "strerror", None) or error
        text = f"cannot be written ({reason}). When this is mended, the same command goes on"
        text = next((x for start, x in _ERRORS.items() if name.startswith(start)), text)
        raise UserError(f"{path}: {text.format(folder=path.parent)}") from error
