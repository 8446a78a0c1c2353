"""The journal of a folder of predictions: which images are done, and what was found of them.

`predict` and `--watch` keep it in an SQLite file. The tables that people read are written from
its rows, and never read. A row is committed before it is appended to a table, together with
the sizes of the tables, so that an append that was interrupted is repeated by the next process:
whatever ends this one, no row is lost and none is there twice.
"""

import contextlib
import json
import os
import pathlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from padim_jax import paths
from padim_jax.errors import RemovedError, UserError
from padim_jax.paths import Path

NAME = "journal.sqlite"
EARLIER = "journal.jsonl"  # of versions that kept JSON lines
SUFFIXES = (".sqlite", ".sqlite-journal")  # SQLite has the latter beside it while it commits

_MAGIC, _APPLICATION, _VERSION = b"SQLite format 3\0", 0x5061446D, 1
_SCHEMA = (
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE images (number INTEGER PRIMARY KEY, identity BLOB NOT NULL, "
    "status TEXT NOT NULL, row TEXT NOT NULL)",
)


class Row(NamedTuple):
    """What is known of an image that is done.

    Attributes:
      identity: tells the image's content from others.
      status: "scored" or "refused".
      fields: what tables say of it, by column; strings, numbers and None.
    """

    identity: bytes
    status: str
    fields: dict[str, Any]


class Table(NamedTuple):
    """A file for people that gets a line of each row.

    Attributes:
      header: its first bytes.
      encode: the fields of a row -> its line.
    """

    header: bytes
    encode: Callable[[dict[str, Any]], bytes]


class Journal:
    """An SQLite file, and the tables that are written from it.

    The caller makes sure that there is one writer (see `locks`).

    Args:
      path: a local file, which is made where there is none; None keeps the rows in memory.
      settings: all that rows depend on beside the images, for JSON; keys are names for a
        person.
      tables: local files beside it; one that has been moved away begins again.

    Attributes:
      other_settings: the names of those that the rows were made with others of.

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
        self._settings = json.loads(json.dumps(settings))  # as it is read again
        with writing(self._path):
            self._db = sqlite3.connect(self._path, isolation_level=None)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        with writing(self._path):
            # Not a write-ahead log, whose shared memory network file systems do not have. EXTRA
            # also makes the end of a transaction outlast a power cut, before rows that depend
            # on it are appended to tables: FULL might undo it.
            self._db.execute("PRAGMA journal_mode = DELETE")
            self._db.execute("PRAGMA synchronous = EXTRA")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
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
        stored = self.fact("settings")
        names = sorted(stored.keys() | self._settings.keys())
        self.other_settings = [x for x in names if stored.get(x) != self._settings.get(x)]
        if not self.other_settings:
            self._append()

    def __enter__(self) -> "Journal":
        """Return itself; it is closed at the end of the block."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def count(self, status: str = "%") -> int:
        """Return how many images are done, or have a status."""
        with writing(self._path):
            query = "SELECT count(*) FROM images WHERE status LIKE ?"
            return self._db.execute(query, (status,)).fetchone()[0]

    def identities(self) -> Iterator[bytes]:
        """Yield what tells the images that are done from others, in order."""
        with writing(self._path):
            query = "SELECT identity FROM images ORDER BY number"
            yield from (identity for (identity,) in self._db.execute(query))

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Yield the rows in the order of `add`, without the first `start`."""
        with writing(self._path):
            query = "SELECT identity, status, row FROM images WHERE number > ? ORDER BY number"
            for identity, status, fields in self._db.execute(query, (start,)):
                yield Row(identity, status, json.loads(fields))

    def fact(self, name: str) -> Any:
        """Return what `add` was told by a name; None if nothing."""
        with writing(self._path):
            query = "SELECT value FROM facts WHERE name = ?"
            found = self._db.execute(query, (name,)).fetchone()
            return None if found is None else json.loads(found[0])

    def add(self, rows: Sequence[Row], **facts: Any) -> None:
        """Add rows and facts, which are there together or not at all, then to the tables.

        Raises:
          UserError: something cannot be written.
          RemovedError: the file is not there any more.
        """
        sizes = {x.name: x.stat().st_size if x.exists() else 0 for x in self._tables}
        values = [
            (row.identity, row.status, json.dumps(row.fields, allow_nan=False)) for row in rows
        ]
        with self._transaction():
            self._set(**facts, appending={"start": self.count(), "sizes": sizes})
            query = "INSERT INTO images (identity, status, row) VALUES (?, ?, ?)"
            self._db.executemany(query, values)
        self._append()

    def keep(self, count: int) -> None:
        """Forget the rows but the first `count`, without any all; write the tables anew."""
        with self._transaction():
            self._db.execute("DELETE FROM images WHERE number > ?", (count,))
            if not count:
                self._db.execute("DELETE FROM facts")
            self._set(
                settings=self._settings,
                appending={"start": 0, "sizes": {x.name: 0 for x in self._tables}},
            )
        self.other_settings = []
        self._append()

    def _append(self) -> None:
        """Append to the tables the rows that they lack."""
        if (appending := self.fact("appending")) is None:
            return
        for path, table in self._tables.items():
            with writing(path), path.open("ab") as file:
                # Of an append that was interrupted. A table that was moved away is smaller.
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


def is_ours(path: pathlib.Path) -> bool:
    """Return whether a file is a journal, or what a killed process left of a new one."""
    try:
        with path.open("rb") as file:
            start = file.read(100)
    except (FileNotFoundError, IsADirectoryError):
        return False
    ours = start.startswith(_MAGIC) and start[68:72] == _APPLICATION.to_bytes(4)
    return ours or not start.strip(b"\0")  # zeros are of a power cut


# By the beginning of SQLite's name of an error: what is wrong, and what to do.
_ERRORS = {
    "SQLITE_BUSY": "another process uses it; end that one, and give the same command again",
    "SQLITE_FULL": "cannot be written, the disk is full; make room, and the command goes on",
    "SQLITE_NOTADB": "damaged; move {folder} away, and all images are scored again",
    "SQLITE_CORRUPT": "damaged; move {folder} away, and all images are scored again",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Tell the user of an error of a file of results, or of the SQLite file there."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}). When this is mended, the "
            "same command goes on"
        ) from error
    except (sqlite3.Error, json.JSONDecodeError) as error:
        is_text = isinstance(error, json.JSONDecodeError)  # in a row, that is
        name = "SQLITE_CORRUPT" if is_text else getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_READONLY_DBMOVED":
            raise RemovedError(
                f"{path}: was removed while results were written; leave the folder alone until "
                "they are done. The same command scores the images again"
            ) from error
        for start, text in _ERRORS.items():
            if name.startswith(start):
                raise UserError(f"{path}: {text.format(folder=path.parent)}") from error
        raise UserError(
            f"{path}: cannot be read or written ({error}, {name}). When this is mended, the "
            "same command goes on"
        ) from error
