"""Checks of single settings, for all kinds of configurations.

Each takes the setting's `name` and `value`, and returns the value or raises a UserError of one
line: name, value, and what is expected.
"""

import dataclasses
import difflib
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import ml_collections

from padim_jax.errors import UserError
from padim_jax.system import paths

# Far above useful values; beyond, numbers would overflow before the work is done.
MOST_SEED = 2**63 - 1
MOST_SECONDS = 1e9
MOST = 1e6  # of numbers with a meaning around 1: float32 squares them
_LONGEST_PATH = 4095
_LARGEST_BYTE = 255
_MOST_SHOWN = 200  # characters of a wrong value in a message


def fields(name: str, value: Any, schema: type) -> None:
    """Require a group of exactly the fields of a dataclass, or raise UserError.

    Args:
      name: name of the group.
      value: its value.
      schema: dataclass with the fields.
    """
    group(name, value)
    expected = {field.name for field in dataclasses.fields(schema)}
    found = set(value.keys())
    # Names in a file's JSON may be any text.
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
    """Require a group of settings, or raise UserError."""
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
        raise UserError(f"{name}={shown(value)}: expected a group of settings")


def one_of(name: str, value: Any, allowed: Collection[str]) -> str:
    """Require one of some words, and return it.

    Args:
      name: name of the setting.
      value: its value.
      allowed: the words.

    Returns:
      The value.

    Raises:
      UserError: it is another value.
    """
    if isinstance(value, str) and value in allowed:
        return value
    short = isinstance(value, str) and len(value) <= _MOST_SHOWN
    close = difflib.get_close_matches(value, allowed, n=1) if short else []
    raise UserError(
        f"{name}={shown(value)}: expected one of {', '.join(allowed)}"
        + (f"; did you mean {close[0]!r}?" if close else "")
    )


def text(name: str, value: Any) -> str:
    """Require a text that is not blank, and return it."""
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{name}={shown(value)}: expected a non-empty text")
    return value


def path(name: str, value: Any) -> paths.Path:
    """Require the path of a folder, which need not exist, and return it."""
    given = str(value) if isinstance(value, str | pathlib.PurePath) else ""
    if not given or "\0" in given or len(given) > _LONGEST_PATH:
        raise UserError(f"{name}={shown(value)}: expected a folder")
    try:
        # A model's own configuration may name a place that cannot be reached from here.
        return paths.parse(given, needed=False)
    except UserError as error:
        reason = str(error).removeprefix(f"{value}: ")
        raise UserError(f"{name}={shown(value)}: {reason}") from error


def optional_path(name: str, value: Any) -> paths.Path | None:
    """Require the path of a folder and return it; None for None and ""."""
    if value is None or (isinstance(value, str) and not value):
        return None
    return path(name, value)


def integer(name: str, value: Any, low: int, high: int) -> int:
    """Require an integer from `low` to `high`, and return it.

    Args:
      name: name of the setting.
      value: its value.
      low: smallest allowed value.
      high: largest allowed value.

    Returns:
      The value.

    Raises:
      UserError: it is another value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        limit = "" if is_number(value) and value <= high else f" and at most {high}"
        raise UserError(
            f"{name}={shown(value)}: expected a whole number of at least {low}{limit}"
        )
    return value


def within(name: str, value: Any, low: float, high: float) -> float:
    """Require a number from `low` to `high`, and return it.

    Args:
      name: name of the setting.
      value: its value.
      low: smallest allowed value.
      high: largest allowed value.

    Returns:
      The value.

    Raises:
      UserError: it is another value.
    """
    # Compared before conversion: integers may be larger than any float.
    if not is_number(value) or not low <= value <= high:
        raise UserError(f"{name}={shown(value)}: expected a number from {low:g} to {high:g}")
    return float(value)


def fraction(name: str, value: Any) -> float:
    """Require a number above 0 and below 1, and return it."""
    if not is_number(value) or not 0 < value < 1:
        raise UserError(f"{name}={shown(value)}: expected a number above 0 and below 1")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Require True or False, not a number that stands for them, and return it."""
    if not isinstance(value, bool):
        raise UserError(f"{name}={shown(value)}: expected True or False")
    return value


def rgb(name: str, value: Any, low: float, high: float) -> tuple[float, float, float]:
    """Require three numbers from `low` to `high`, for pixel values in 0..1.

    Args:
      name: name of the setting.
      value: its value.
      low: smallest allowed value.
      high: largest allowed value.

    Returns:
      Red, green and blue.

    Raises:
      UserError: it is another value.
    """
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
    """Return whether a value is an int or a float, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


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
