"""Checks of single settings, for every kind of configuration.

Each takes the setting's name and the value that was found, and returns the value or raises
a UserError of one line: the name, the value, what is expected.
"""

import dataclasses
import difflib
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from padim_jax.errors import UserError
from padim_jax.system import paths

# Far beyond what is of use; above, numbers would overflow before the work is done.
MOST_SEED = 2**63 - 1
MOST_SECONDS = 1e9
MOST = 1e6  # of numbers that have a meaning around 1: float32 squares them
_LONGEST_PATH = 4095
_LARGEST_BYTE = 255
_MOST_SHOWN = 200  # characters of a wrong value in a message


def fields(name: str, value: Any, schema: type) -> None:
    """Raises UserError for what is not a group of exactly the fields of a dataclass."""
    group(name, value)
    expected = {field.name for field in dataclasses.fields(schema)}
    found = set(value.keys())
    # A file's JSON may have any text for a name.
    if unknown := sorted(one_line(str(key)) for key in found - expected):
        close = difflib.get_close_matches(unknown[0], expected, n=1)
        raise UserError(
            f"{name}.{unknown[0]}: no such setting"
            + (f"; did you mean {name}.{close[0]}?" if close else ".")
            + f" Allowed: {', '.join(sorted(expected))}"
        )
    if missing := sorted(expected - found):
        raise UserError(f"{name}.{missing[0]}: missing; expected {', '.join(sorted(expected))}")


def group(name: str, value: Any) -> None:
    """Raises UserError for what is not a group of settings."""
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise UserError(f"{name}={shown(value)}: expected a group of settings")


def one_of(name: str, value: Any, allowed: Collection[str]) -> str:
    """One of some words."""
    if isinstance(value, str) and value in allowed:
        return value
    short = isinstance(value, str) and len(value) <= _MOST_SHOWN
    close = difflib.get_close_matches(value, allowed, n=1) if short else []
    raise UserError(
        f"{name}={shown(value)}: expected one of {', '.join(allowed)}"
        + (f"; did you mean {close[0]!r}?" if close else "")
    )


def text(name: str, value: Any) -> str:
    """Any text that says something."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{name}={shown(value)}: expected a non-empty text")
    return value


def path(name: str, value: Any) -> paths.Path:
    """A folder's path; whether there is one is not looked at."""
    given = str(value) if isinstance(value, str | pathlib.PurePath) else ""
    if not given or "\0" in given or len(given) > _LONGEST_PATH:
        raise UserError(f"{name}={shown(value)}: expected a folder")
    try:
        # A model's own configuration may name what is not to be reached from here.
        return paths.parse(given, needed=False)
    except UserError as error:
        reason = str(error).removeprefix(f"{value}: ")
        raise UserError(f"{name}={shown(value)}: {reason}") from error


def optional_path(name: str, value: Any) -> paths.Path | None:
    """A folder's path, or None for None and ""."""
    if value is None or (isinstance(value, str) and not value):
        return None
    return path(name, value)


def integer(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        limit = "" if is_number(value) and value <= high else f" and at most {high}"
        raise UserError(
            f"{name}={shown(value)}: expected a whole number of at least {low}{limit}"
        )
    return value


def within(name: str, value: Any, low: float, high: float) -> float:
    """A number from `low` to `high`."""
    # Compared and not converted first: integers may be larger than any float.
    if not is_number(value) or not low <= value <= high:
        raise UserError(f"{name}={shown(value)}: expected a number from {low:g} to {high:g}")
    return float(value)


def fraction(name: str, value: Any) -> float:
    """A number between 0 and 1, and neither."""
    if not is_number(value) or not 0 < value < 1:
        raise UserError(f"{name}={shown(value)}: expected a number above 0 and below 1")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """True or False, and no number that stands for them."""
    if not isinstance(value, bool):
        raise UserError(f"{name}={shown(value)}: expected True or False")
    return value


def rgb(name: str, value: Any, low: float, high: float) -> tuple[float, float, float]:
    """Three numbers from `low` to `high`, of pixel values in 0..1."""
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise UserError(f"{name}={shown(value)}: expected three numbers (red, green, blue)")
    if any(is_number(item) and high < item <= _LARGEST_BYTE for item in value):
        raise UserError(
            f"{name}={shown(value)}: expected three numbers from {low:g} to {high:g}, of pixel "
            f"values in 0..1; divide those of 0..{_LARGEST_BYTE} by {_LARGEST_BYTE}"
        )
    red, green, blue = (within(name, item, low, high) for item in value)
    return red, green, blue


def is_number(value: Any) -> bool:
    """Whether it is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A wrong value as a message shows it: on one line, and not all of what is long."""
    try:
        return one_line(repr(value))
    except (ValueError, RecursionError):  # an integer of 5,000 digits, lists 1,000 deep
        return f"a value of the type {type(value).__name__} that is too large to show"


def one_line(words: str) -> str:
    """A text without line breaks, cut where it is too long to show."""
    # A group of settings, an array: their text has several lines.
    words = " ".join(words.splitlines())
    return words if len(words) <= _MOST_SHOWN else f"{words[:_MOST_SHOWN]}..."
