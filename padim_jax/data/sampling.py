"""Seeded draws of records: a subset to fit, a part to hold out.

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
    """Some images of a source, as a source; see `part`.

    Attributes:
      source: source of all images.
      numbers: positions of the selected images in `source`.
      records: their records.
    """

    source: Source
    numbers: Sequence[int]
    records: Sequence[Record]

    def read(self, index: int) -> tuple[bytes, bytes | None]:
        """Return the encoded image of `records[index]` and its mask's, if it has one."""
        return self.source.read(self.numbers[index])


def part(source: Source, numbers: Sequence[int]) -> Part:
    """Return the images of a source at some positions; none is read.

    Args:
      source: source of all images.
      numbers: positions of the images to select, in order.

    Returns:
      A source of these images.
    """
    return Part(source, numbers, [source.records[number] for number in numbers])


def subset(items: Sequence[_Item], count: int, seed: int) -> list[_Item]:
    """Draw items without replacement: `random.Random(seed).sample`, in their original order.

    Args:
      items: records, or numbers of records.
      count: number of items to draw; 0, or at least their number, selects all.
      seed: seed of the draw.

    Returns:
      The items drawn.
    """
    if count == 0 or count >= len(items):
        return list(items)
    chosen = random.Random(seed).sample(range(len(items)), count)
    return [items[number] for number in sorted(chosen)]


def groups(records: Sequence[Record], pattern: str) -> Int[np.ndarray, " n"]:
    """Number the groups of images that belong together, as `config.threshold.groups` defines.

    Args:
      records: records of the images.
      pattern: regular expression, searched in the images' relative paths. The text of its
        group, or else of its whole match, names the image's group. "" makes each image a group
        of its own.

    Returns:
      Group number of each image; groups are numbered in the order of their first images.

    Raises:
      UserError: the expression does not match an image's path.
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
    """Split normal images at random into those to fit and those to hold out.

    Args:
      items: records, or numbers of records or groups.
      fraction: fraction to hold out, rounded to the nearest number of images; at least one
        image is held out and at least one is left.
      seed: seed of the draw.

    Returns:
      Items to fit and items held out, each in the original order.

    Raises:
      UserError: there are fewer than two items.
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
