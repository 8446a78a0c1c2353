"""Small made folders of images, and what is checked of the records found in them."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from padim_jax.errors import UserError


def write(root: pathlib.Path, *names: str) -> None:
    """Writes a small image under each name below `root`."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path, format="PNG")


def listing(root: pathlib.Path) -> dict[str, int]:
    """Every path below `root` with its time of change."""
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


def rows(records):
    """(split, type, label, relative path, mask's name) of each record."""
    return [
        (r.split, r.defect_type, r.label, r.relative_path, r.mask and r.mask.name)
        for r in records
    ]


def fails(expected, function, *arguments):
    """Checks that a one-line UserError contains each of the expected texts."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    for text in expected:
        assert str(text) in message
