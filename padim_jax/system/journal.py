"""A local file of JSON lines, appended to as work is done, that outlives its writer.

Whatever kills the writer, the lines before the last one are whole; a torn end is cut off.
What was written outlasts a power cut once the function that wrote it has returned, so that the
order of calls is the order in which things are on the disk.
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from padim_jax.system import paths

FORMAT = "format of the journal"  # in the first entry of each, whatever else it says


def read(path: pathlib.Path) -> list[Any]:
    """The whole entries from the first on; what follows them is cut off the file.

    Without a file there are none.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    entries, end = [], 0
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            entries.append(json.loads(line))
        except ValueError:  # as a power cut may leave it
            break
        end += len(line)
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
    return entries


def is_ours(path: paths.Path) -> bool:
    """Return whether a file is a journal, or what a killed writer left of one."""
    line = paths.first_line(path).strip(b"\0")  # a power cut may leave zeros
    if not line.endswith(b"\n"):
        return not line or b'{"'.startswith(line[:2])
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(header, dict) and FORMAT in header


def write(path: pathlib.Path, entries: Sequence[Any]) -> None:
    """Replaces the file, or makes it, at once."""
    growing = paths.growing_file(path)
    growing.write_bytes(b"".join(map(_line, entries)))
    paths.sync(growing)
    growing.replace(path)
    paths.sync(path.parent)


def append(path: pathlib.Path, entry: Any) -> None:
    """Adds an entry, in one write."""
    append_bytes(path, _line(entry))


def append_bytes(path: pathlib.Path, data: bytes) -> None:
    """Append to a file, or make it."""
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        is_new = file.tell() == len(data)
    if is_new:
        paths.sync(path.parent)


def _line(entry: Any) -> bytes:
    return json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n"
