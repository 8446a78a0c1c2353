"""Predictions that were interrupted: what of them is kept.

A journal in their folder says of each batch which images it was, and what its rows are. Of
another model, other settings or other images nothing is kept; of the rest everything up to
the first batch that is not as it was written, whatever ended the run.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from padim_jax.data.files import shown
from padim_jax.data.records import Record, Source
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.output import figures, predictions
from padim_jax.system import journal, paths, progress

NAME = "journal.jsonl"


@dataclasses.dataclass(frozen=True)
class Kept:
    """What there is already.

    Attributes:
      images: how many of the first ones are scored, with everything written.
      table: bytes of the table that hold their rows.
      scale: colours of their heat maps.
    """

    images: int = 0
    table: int = 0
    scale: figures.ColorScale | None = None


class Progress:
    """The journal of one folder of predictions.

    Args:
      folder: local.
      map_suffix: of the maps' files.
      settings: all else that results depend on beside the images, for JSON; keys are names
        for a person.
    """

    def __init__(self, folder: pathlib.Path, map_suffix: str, settings: Mapping[str, Any]):
        self._folder, self._suffix = folder, map_suffix
        said = {**settings, journal.FORMAT: 1, "format of maps": map_suffix}
        self._settings = json.loads(json.dumps(said))  # as it is read again
        self._journal, self._table = folder / NAME, folder / predictions.TABLE
        self._done = Kept()

    def take_up(self, source: Source, batch_size: int, devices: Devices) -> Kept:
        """What an interrupted run left that is what this run would write; the rest is removed.

        The files of images that are scored already are read again: their contents count, not
        their dates.

        Args:
          source: the images of this run.
          batch_size: of this run. Scores depend, in their last bit, on an image's place in its
            batch: only whole batches are kept.
          devices: for a progress bar.
        """
        entries = journal.read(self._journal)
        header, batches = (entries[0], entries[1:]) if entries else (None, [])
        kept, reason = [], ""
        if header == self._settings:
            with progress.bar(len(source.records), "compare", devices.process == 0) as shown:
                for entry in batches:
                    done = self._done.images
                    if reason := self._difference(entry, source, batch_size):
                        break
                    kept.append(entry)
                    shown.update(self._done.images - done)
        elif isinstance(header, dict):
            names = self._settings.keys() | header.keys()
            other = [x for x in sorted(names) if self._settings.get(x) != header.get(x)]
            reason = f"those were made with another {', another '.join(other)}"
        total, done = len(source.records), self._done.images
        if done:
            print(f"going on with interrupted predictions, after {done} of {total} images")
        if reason:
            print(f"interrupted predictions {'behind these' * bool(done)} are redone: {reason}")
        self._remove_others(source.records[:done] if done else [])
        if not entries:
            journal.append(self._journal, self._settings)  # a sign whose folder this is
        elif entries != [self._settings, *kept]:
            journal.write(self._journal, [self._settings, *kept])
        return self._done

    def add(
        self, images: int, inputs: str, table: int, scale: figures.ColorScale | None
    ) -> None:
        """Notes that a batch is written, its rows and all files.

        Args:
          images: how many are scored by now.
          inputs: `identity` of the batch's images.
          table: bytes of the table by now.
          scale: colours of the heat maps.
        """
        assert scale is not None
        entry = {
            "images": images,
            "inputs": inputs,
            "table": table,
            "rows": _digest_of_part(self._table, self._done.table, table),
            "scale": [scale.low, scale.high],
        }
        with predictions.writing(self._journal):
            journal.append(self._journal, entry)
        self._done = Kept(images, table, scale)

    def finish(self, folder: pathlib.Path) -> None:
        """Removes the journal from the finished predictions."""
        (folder / NAME).unlink(missing_ok=True)

    def _difference(self, entry: Any, source: Source, batch_size: int) -> str:
        """Goes on behind a batch, if it is as it was written; else says what is not."""
        before = self._done
        try:
            after = Kept(entry["images"], entry["table"], figures.ColorScale(*entry["scale"]))
            inputs, rows = entry["inputs"], entry["rows"]
            counts = all(isinstance(x, int) for x in (after.images, after.table))
            fits = counts and before.images < after.images and before.table < after.table
        except (KeyError, TypeError, ValueError):
            return f"{self._journal} is damaged"
        records = source.records[before.images : after.images]
        if not fits or len(records) < after.images - before.images:
            return "there were other images"
        if after.images % batch_size and after.images < len(source.records):
            return "more images have come"
        if _digest_of_part(self._table, before.table, after.table) != rows:
            return f"rows of {self._table} are damaged"
        numbers = range(before.images, after.images)
        if identity(records, _digests(source, numbers)) != inputs:
            names = " to ".join(
                shown(record.relative_path) for record in (records[0], records[-1])
            )
            return f"images have changed, among {names}"
        for record in records:
            if not all(map(_has_content, self._files(record))):
                return f"files of {shown(record.relative_path)} are missing"
        self._done = after
        return ""

    def _files(self, record: Record) -> tuple[paths.Path, paths.Path]:
        return predictions.files(self._folder, record.relative_path, self._suffix)

    def _remove_others(self, records: Sequence[Record]) -> None:
        """Removes what was drawn of images that are not among the records."""
        known = {path for record in records for path in self._files(record)}
        for name in ("maps", "overlays"):
            if paths.is_folder(self._folder / name):
                for path in paths.files_below(self._folder / name):
                    if path not in known and not paths.is_system_file(path.name):
                        path.unlink()


def identity(records: Sequence[Record], digests: Iterable[bytes]) -> str:
    """SHA-256 hex digest of images: their names and the SHA-256 of their files."""
    known = hashlib.sha256()
    for record, digest in zip(records, digests, strict=True):
        name = record.relative_path.encode("utf-8", "surrogateescape")
        known.update(hashlib.sha256(name).digest() + digest)
    return known.hexdigest()


def _digests(source: Source, numbers: Sequence[int]) -> list[bytes]:
    def digest(number: int) -> bytes:
        try:
            return hashlib.sha256(source.read(number)[0]).digest()
        except UserError:  # scoring it again will tell
            return b""

    with concurrent.futures.ThreadPoolExecutor() as threads:
        return list(threads.map(digest, numbers))


def _digest_of_part(path: pathlib.Path, start: int, end: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(end - start)).hexdigest()
    except FileNotFoundError:
        return ""


def _has_content(path: paths.Path) -> bool:
    assert isinstance(path, pathlib.Path)
    try:
        return path.stat().st_size > 0
    except OSError:
        return False
