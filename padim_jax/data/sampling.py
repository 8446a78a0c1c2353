"""Seeded draws of records: a subset to fit, a part to hold back.

Both are pure functions of any sequence, of records or of their numbers, and keep its order.
"""

import dataclasses
import random
import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from padim_jax.data.records import Record, Source
from padim_jax.errors import UserError

_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True)
class Part:
    """Some images of a source, which is one itself; see `part`.

    Attributes:
      source: all of them.
      numbers: the places of the chosen ones.
      records: what these are.
    """

    source: Source
    numbers: Sequence[int]
    records: Sequence[Record]

    def read(self, index: int) -> tuple[bytes, bytes | None]:
        """The encoded image of `records[index]` and its mask's, if it has one."""
        return self.source.read(self.numbers[index])


def part(source: Source, numbers: Sequence[int]) -> Part:
    """The images of a source in these places, in this order; none is read."""
    return Part(source, numbers, [source.records[number] for number in numbers])


def subset(items: Sequence[_Item], count: int, seed: int) -> list[_Item]:
    """Draws some without replacement: `random.Random(seed).sample`, in the given order.

    Args:
      items: records, or numbers of them.
      count: how many; 0, or as many as there are or more, takes them all.
      seed: of the draw.
    """
    if count == 0 or count >= len(items):
        return list(items)
    chosen = random.Random(seed).sample(range(len(items)), count)
    return [items[number] for number in sorted(chosen)]


def groups(records: Sequence[Record], pattern: str) -> Int[np.ndarray, " n"]:
    """Number the groups of images that belong together, as `config.threshold.groups` says.

    Args:
      records: the images.
      pattern: a regular expression, searched in the images' relative paths. The text of its
        group, or else of its whole match, names the image's group. "" makes each image a
        group of its own.

    Returns:
      The number of each image's group, in the order of their first images.

    Raises:
      UserError: an image in which the expression finds nothing.
    """
    if not pattern:
        return np.arange(len(records))
    expression, numbers = re.compile(pattern), {}
    found = []
    for record in records:
        match = expression.search(record.relative_path)
        name = match and match[expression.groups]
        if name is None:
            raise UserError(
                f"config.threshold.groups={pattern!r}: not found in {record.relative_path}; "
                "expected a regular expression that is found in the relative path of every "
                "normal image"
            )
        found.append(numbers.setdefault(name, len(numbers)))
    return np.array(found, int)


def held_out(
    items: Sequence[_Item], fraction: float, seed: int
) -> tuple[list[_Item], list[_Item]]:
    """Splits normal images into those to fit and those to hold back, drawn at random.

    Args:
      items: records, or numbers of them or of groups.
      fraction: the part to hold back, of which the nearest number, but at least one image
        and not all, is taken.
      seed: of the draw.

    Returns:
      Those to fit and those held back, each in the given order.

    Raises:
      UserError: fewer than two.
    """
    if len(items) < 2:
        raise UserError(
            f"config.threshold.normal=held_out: {len(items)} training image (or group of "
            "images that belong together); expected at least two, to fit and to hold back. Use "
            "leave_one_out or none"
        )
    count = min(max(1, round(fraction * len(items))), len(items) - 1)
    held = set(random.Random(seed).sample(range(len(items)), count))
    return (
        [item for number, item in enumerate(items) if number not in held],
        [item for number, item in enumerate(items) if number in held],
    )
