"""Tables as plain text, Markdown and CSV; `html.document.table` renders them as HTML."""

import csv
import dataclasses
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

# Characters that a spreadsheet takes for the beginning of a formula, or skips before one; the
# wide forms of East Asian input methods count as the signs themselves.
_WIDE = "\N{FULLWIDTH EQUALS SIGN}\N{FULLWIDTH PLUS SIGN}\N{FULLWIDTH COMMERCIAL AT}"
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", *_WIDE, "\N{FULLWIDTH HYPHEN-MINUS}")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table, of which the first cell of each row is its heading.

    Attributes:
      columns: headings of the columns.
      rows: cells of each row; text, for CSV also numbers.
    """

    columns: Sequence[Any]
    rows: Sequence[Sequence[Any]]

    def text(self, gap: str = "  ") -> list[str]:
        """Return lines: the first column left-aligned, the others right-aligned."""
        every = [self.columns, *self.rows]
        first, *widths = (max(map(len, column)) for column in zip(*every, strict=True))
        return [
            f"{row[0]:{first}}"
            + "".join(f"{gap}{x:>{width}}" for x, width in zip(row[1:], widths, strict=True))
            for row in every
        ]

    def markdown(self) -> list[str]:
        """Return lines of Markdown: the first column left-aligned, the others centred."""
        alignment = ["---", *(":---:" for _ in self.columns[1:])]
        rows = [self.columns, alignment, *self.rows]
        return [f"| {' | '.join(map(markdown_text, row))} |" for row in rows]

    def csv(self) -> bytes:
        """Return CSV; see `as_csv`."""
        return as_csv([self.columns, *self.rows])


def markdown_text(text: str) -> str:
    """Escape text so that it ends no cell or line and begins no element, link or picture."""
    escaped = re.sub(r"([\\|`\[\]])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))
    return " ".join(escaped.split())


def as_csv(rows: Iterable[Sequence[Any]]) -> bytes:
    r"""Encode rows of a table as CSV in UTF-8, safe to open in a spreadsheet.

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
