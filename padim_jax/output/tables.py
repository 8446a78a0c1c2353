"""CSV tables: UTF-8 for any name, and text that is safe to open in a spreadsheet."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

# Characters that a spreadsheet takes for the beginning of a formula, or skips before one; the
# wide forms of East Asian input methods count as the signs themselves.
_WIDE = "\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH COMMERCIAL AT}"
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", *_WIDE, "\N{FULLWIDTH HYPHEN-MINUS}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def as_csv(rows: Iterable[Sequence[Any]]) -> bytes:
    r"""Encode rows of a table as CSV in UTF-8.

    Args:
      rows: rows of numbers and text. Text that a spreadsheet would run as a formula is prefixed
        with `./`, which leaves a relative path valid; bytes of a file name that are not valid
        text are escaped (`\udcff`).
    """
    text = io.StringIO(newline="")
    csv.writer(text).writerows(map(_inert, row) for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _inert(cell: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula."""
    if isinstance(cell, str) and cell.startswith(_FORMULA) and not _NUMBER.fullmatch(cell):
        return f"./{cell}"
    return cell
