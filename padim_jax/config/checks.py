"""Checks of single settings.

A check takes a setting's name and value, and returns the value in its final type or raises a
UserError of one line: name, value, and what is expected. `str` of a check with parameters says
what it allows.
"""

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Collection
from typing import Any

from padim_jax.errors import UserError
from padim_jax.system import paths

# Far above useful values; beyond, numbers would overflow before the work is done.
MOST_SEED = 2**63 - 1
MOST_SECONDS = 1e9
MOST = 1e6  # of numbers with a meaning around 1: float32 squares them
RUNS = "rle:"  # begins the text of a region of interest; see `data.roi.encode`
_RUNS = re.compile(r"rle:([0-9]{1,5})x([0-9]{1,5}):([0-9]{1,9}(?:,[0-9]{1,9})*)")
_LONGEST_PATH = 4095
_MOST_PIXELS = 178_956_970  # of a region of interest: as of an image
_MOST_POINTS = 1000
_LARGEST_BYTE = 255
_MOST_SHOWN = 200  # characters of a wrong value in a message


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of some words."""

    words: Collection[str]

    def __call__(self, name: str, value: Any) -> str:
        """Return the word, or raise UserError."""
        if isinstance(value, str) and value in self.words:
            return value
        short = isinstance(value, str) and len(value) <= _MOST_SHOWN
        close = difflib.get_close_matches(value, self.words, n=1) if short else []
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise wrong(name, value, f"{self}{hint}")

    def __str__(self) -> str:
        return f"one of {', '.join(self.words)}"


@dataclasses.dataclass(frozen=True)
class Integer:
    """A whole number from `low` to `high`."""

    low: int
    high: int

    def __call__(self, name: str, value: Any) -> int:
        """Return the number, or raise UserError."""
        if not is_integer(value) or not self.low <= value <= self.high:
            small = is_number(value) and value <= self.high
            limit = "" if small else f" and at most {self.high}"
            raise wrong(name, value, f"a whole number of at least {self.low}{limit}")
        return value

    def __str__(self) -> str:
        bits = self.high.bit_length()
        high = f"2^{bits} - 1" if self.high == 2**bits - 1 and bits > 30 else self.high
        return f"a whole number from {self.low} to {high}"


@dataclasses.dataclass(frozen=True)
class Number:
    """A number from `low` to `high`; with `inside`, neither of these two."""

    low: float
    high: float
    inside: bool = False

    def __call__(self, name: str, value: Any) -> float:
        """Return the number as a float, or raise UserError."""
        # Compared before conversion: integers may be larger than any float.
        allowed = is_number(value) and self.low <= value <= self.high
        if not allowed or (self.inside and value in (self.low, self.high)):
            raise wrong(name, value, self)
        return float(value)

    def __str__(self) -> str:
        if self.inside:
            return f"a number above {self.low:g} and below {self.high:g}"
        return f"a number from {self.low:g} to {self.high:g}"


@dataclasses.dataclass(frozen=True)
class RGB:
    """Three numbers from `low` to `high`, for pixel values in 0..1."""

    low: float
    high: float

    def __call__(self, name: str, value: Any) -> tuple[float, float, float]:
        """Return red, green and blue, or raise UserError."""
        if not isinstance(value, tuple | list) or len(value) != 3:
            raise wrong(name, value, "three numbers (red, green, blue)")
        if any(is_number(item) and self.high < item <= _LARGEST_BYTE for item in value):
            hint = f"divide those of 0..{_LARGEST_BYTE} by {_LARGEST_BYTE}"
            raise wrong(name, value, f"{self}, of pixel values in 0..1; {hint}")
        channel = Number(self.low, self.high)
        red, green, blue = (channel(name, item) for item in value)
        return red, green, blue

    def __str__(self) -> str:
        return f"three numbers from {self.low:g} to {self.high:g}"


@dataclasses.dataclass(frozen=True)
class Size:
    """Height and width in pixels, each from `low` to `high`; None if it is `optional`."""

    low: int
    high: int
    optional: bool = False

    def __call__(self, name: str, value: Any) -> tuple[int, int] | None:
        """Return the size, or raise UserError."""
        is_list = isinstance(value, tuple | list)
        # On the command line `None` arrives as a tuple of one None.
        if value is None or (is_list and len(value) < 2 and all(x is None for x in value)):
            if self.optional:
                return None
        elif is_list and len(value) == 2 and all(map(is_integer, value)):
            height, width = value
            if min(value) >= self.low and max(value) <= self.high:
                return height, width
        raise wrong(name, value, f"{self}, as in '(256, 256)'")

    def __str__(self) -> str:
        return f"(height, width) in pixels, each at least {self.low} and at most {self.high}"


@dataclasses.dataclass(frozen=True)
class Odd:
    """An odd number of cells from 1 to `high`."""

    high: int

    def __call__(self, name: str, value: Any) -> int:
        """Return the number, or raise UserError."""
        if not is_integer(value) or not 1 <= value <= self.high or value % 2 == 0:
            hint = "as in 3 for a neighbourhood of 3x3; 1 is the cell itself"
            raise wrong(name, value, f"{self}, {hint}")
        return value

    def __str__(self) -> str:
        return f"an odd number of cells up to {self.high}"


def text(name: str, value: Any) -> str:
    """Require a text that is not blank, and return it."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise wrong(name, value, "a non-empty text")
    return value


def path(name: str, value: Any) -> paths.Path:
    """Require the path of a folder, which need not exist, and return it."""
    folder = str(value) if isinstance(value, str | pathlib.PurePath) else ""
    if not folder or "\0" in folder or len(folder) > _LONGEST_PATH:
        raise wrong(name, value, "a folder")
    try:
        # A model's own configuration may name a place that cannot be reached from here.
        return paths.parse(folder, needed=False)
    except UserError as error:
        reason = str(error).removeprefix(f"{value}: ")
        raise UserError(f"{name}={shown(value)}: {reason}") from error


def optional_path(name: str, value: Any) -> paths.Path | None:
    """Require the path of a folder and return it; None for None and ""."""
    if value is None or (isinstance(value, str) and not value):
        return None
    return path(name, value)


def roi(name: str, value: Any) -> str | tuple[Any, ...]:
    """Require a region of interest, and return it: text, a box or a polygon."""
    if is_runs(value):
        found = _RUNS.fullmatch(value)
        height, width, runs = found.groups() if found else ("0", "0", "0")
        pixels, lengths = int(height) * int(width), list(map(int, runs.split(",")))
        if 0 < pixels <= _MOST_PIXELS and sum(lengths) == pixels and all(lengths[1:]):
            return value
        raise wrong(name, value, "run lengths that add up to the pixels of an image")
    if isinstance(value, str) and "\0" not in value and len(value) <= _LONGEST_PATH:
        return value
    listed = tuple(value) if isinstance(value, tuple | list) else ()
    if len(listed) == 4 and all(map(is_number, listed)):
        if listed[0] < listed[2] and listed[1] < listed[3]:
            return listed
    elif 3 <= len(listed) <= _MOST_POINTS and all(map(_is_point, listed)):
        return tuple(map(tuple, listed))
    raise wrong(
        name,
        value,
        "the path of a mask image, a box (left, top, right, bottom) or a polygon ((x, y), "
        f"(x, y), (x, y), ...) of 3 to {_MOST_POINTS} points in pixels of the original image, "
        "or '' for the whole image",
    )


def is_runs(value: Any) -> bool:
    """Return whether a region of interest is given by its pixels, not by a file or points."""
    return isinstance(value, str) and value.startswith(RUNS)


def _is_point(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(is_number, value))


def flag(name: str, value: Any) -> bool:
    """Require True or False, not a number that stands for them, and return it."""
    if not isinstance(value, bool):
        raise wrong(name, value, "True or False")
    return value


def wrong(name: str, value: Any, expected: object) -> UserError:
    """Return the error of a setting's wrong value.

    Args:
      name: name of the setting.
      value: its value.
      expected: what is allowed, in words.
    """
    return UserError(f"{name}={shown(value)}: expected {expected}")


def is_integer(value: Any) -> bool:
    """Return whether a value is an int, and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is an int or a float, and not a bool."""
    return isinstance(value, float) or is_integer(value)


def shown(value: Any) -> str:
    """Format a wrong value for a message: on one line, shortened if it is long."""
    try:
        return one_line(repr(value))
    except (ValueError, RecursionError):  # an integer of 5,000 digits, lists 1,000 deep
        return f"a value of the type {type(value).__name__} that is too large to show"


def one_line(words: str) -> str:
    """Return a text without line breaks, shortened if it is too long to show."""
    # The text of a group of settings or an array has several lines.
    words = " ".join(words.splitlines())
    return words if len(words) <= _MOST_SHOWN else f"{words[:_MOST_SHOWN]}..."
