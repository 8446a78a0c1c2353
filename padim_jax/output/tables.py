"""CSV tables: UTF-8 whatever the names are, and text for a spreadsheet that opens them."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

# What a spreadsheet takes for the beginning of a formula, or skips in front of one; the wide
# forms of East Asian input methods count as the signs themselves.
_WIDE = "\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH COMMERCIAL AT}"
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", *_WIDE, "\N{FULLWIDTH HYPHEN-MINUS}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def as_csv(rows: Iterable[Sequence[Any]]) -> bytes:
    r"""Encode rows of a table as CSV in UTF-8.

    Args:
      rows: of numbers and text. Text that a spreadsheet would run as a formula is written
        with `./` in front, which leaves a relative path what it is; bytes of a file's name
        that are no text are written as escapes (`\udcff`).
    """
    text = io.StringIO(newline="")
    csv.writer(text).writerows(map(_inert, row) for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _inert(cell: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula."""
    if isinstance(cell, str) and cell.startswith(_FORMULA) and not _NUMBER.fullmatch(cell):
        return f"./{cell}"
    return cell
