"""A local file of JSON lines, appended to as work is done, that outlives its writer.

Whatever kills the writer, the lines before the last one are whole; a torn end is cut off.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any


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


def write(path: pathlib.Path, entries: Sequence[Any]) -> None:
    """Replaces the file, or makes it, at once."""
    growing = path.with_name(f"{path.name}.incomplete")
    growing.write_bytes(b"".join(map(_line, entries)))
    growing.replace(path)


def append(path: pathlib.Path, entry: Any) -> None:
    """Adds an entry, in one write."""
    with path.open("ab") as file:
        file.write(_line(entry))


def _line(entry: Any) -> bytes:
    return json.dumps(entry, separators=(",", ":"), allow_nan=False).encode() + b"\n"
