"""Region of interest: a mask image, a polygon or a box -> the pixels that take part.

A configuration names a file or lists points; a model keeps the pixels themselves as a text of
run lengths (`encode`), so that it needs no file, and equal regions are equal settings. They
are pixels of the original image, and reach the model's input through the same resizing
(nearest) and crop as images do.
"""

import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from padim_jax.config import checks
from padim_jax.config.settings import ImageConfig
from padim_jax.data import files, input_pipeline, masks
from padim_jax.errors import UserError
from padim_jax.system import paths

# Largest relative difference of two aspect ratios that are taken for the same: rounding, where
# a mask was drawn on a copy of reduced size.
_ASPECT = 0.01


def encode(inside: Bool[np.ndarray, "_h _w"]) -> str:
    """Return pixels as text: height, width, and run lengths row by row, the first one outside.

    Args:
      inside: (h, w), True inside.

    Returns:
      As in "rle:2x3:1,4,1".
    """
    flat = inside.reshape(-1)
    edges = np.flatnonzero(np.diff(flat, prepend=False, append=not flat[-1]))
    runs = np.diff(edges, prepend=0)
    return f"rle:{inside.shape[0]}x{inside.shape[1]}:{','.join(map(str, runs.tolist()))}"


def from_array(mask: np.ndarray) -> str:
    """Return the text of an array (h, w) that is not 0 inside.

    Raises:
      UserError: it has another shape.
    """
    if mask.ndim != 2 or not mask.size:
        raise UserError(f"roi: an array of shape {mask.shape}; expected a mask (h, w)")
    return encode(mask != 0)


def decode(text: str) -> Bool[np.ndarray, "_h _w"]:
    """Return the pixels of a text of `encode`, which a configuration has validated."""
    size, runs = text.removeprefix(checks.RUNS).split(":")
    height, width = map(int, size.split("x"))
    lengths = np.array(runs.split(","), int)
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(height, width)


def resolve(value: str | Sequence, size: tuple[int, int], config: ImageConfig) -> str:
    """Return `config.image.roi` as a model keeps it.

    Args:
      value: path of a mask image, whose pixels that are not 0 are inside by the rule of
        `masks`; or a box (left, top, right, bottom) or a polygon ((x, y), ...) in pixels of the
        original image; or what this function returns.
      size: height and width of the original images.
      config: preprocessing.

    Returns:
      The text of the pixels inside, or "" if the model sees no other.

    Raises:
      UserError: the mask cannot be read or has another aspect than the images, a point is
        outside of the image, or nothing is inside.
    """
    inside = _pixels(value, size)
    if not inside.any():
        raise _wrong(value, "nothing is inside of it; expected a part of the image")
    text = encode(inside)
    return "" if at_input_size(text, config).all() else text


@functools.lru_cache(maxsize=16)
def at_input_size(text: str, config: ImageConfig) -> Bool[np.ndarray, "h w"]:
    """Return a region of interest in pixels of the model's input.

    Args:
      text: see `encode`.
      config: preprocessing.

    Raises:
      UserError: nothing of it is left, or no two pixels side by side and one above the other.
    """
    height, width = config.resize
    image = Image.fromarray(decode(text).astype(np.uint8))
    resized = np.asarray(image.resize((width, height), Image.Resampling.NEAREST))
    top, left = input_pipeline.crop_offset(config) if config.crop else (0, 0)
    rows, columns = config.size
    inside = resized[top : top + rows, left : left + columns] > 0
    if not ((inside[1:] & inside[:-1]).any() and (inside[:, 1:] & inside[:, :-1]).any()):
        raise _wrong(
            text,
            f"less than 2x2 pixels are left of it at the model's {rows}x{columns}, after "
            "resizing and cropping; expected a larger region, or a larger config.image.resize",
        )
    inside.setflags(write=False)
    return inside


def at_size(text: str, size: tuple[int, int]) -> Bool[np.ndarray, "_h _w"]:
    """Return a region of interest in pixels of an original image of any size.

    Args:
      text: see `encode`.
      size: height and width of the image.
    """
    inside = decode(text)
    if inside.shape == size:
        return inside
    height, width = size
    return np.asarray(Image.fromarray(inside).resize((width, height), Image.Resampling.NEAREST))


def original_size(text: str) -> tuple[int, int]:
    """Return height and width of the images that a region of interest was given for."""
    height, width = map(int, text.removeprefix(checks.RUNS).split(":")[0].split("x"))
    return height, width


def shown(value: str | Sequence) -> str:
    """Return a region of interest for a message: a model's pixels by number and digest."""
    if not isinstance(value, str) or not checks.is_runs(value):
        return checks.shown(value)
    height, width = original_size(value)
    runs = np.array(value.split(":")[2].split(","), int)
    digest = hashlib.sha256(value.encode()).hexdigest()[:12]
    return f"{runs[1::2].sum()} of {width}x{height} pixels ({digest})"


def _wrong(value: str | Sequence, reason: str) -> UserError:
    return UserError(f"config.image.roi={shown(value)}: {reason}")


def require_aspect(text: str, size: Sequence[int], image: str) -> None:
    """Raise UserError for an image of another aspect ratio than a region of interest's."""
    height, width = original_size(text)
    if not _is_similar((height, width), size):
        raise UserError(
            f"{image}: {size[1]}x{size[0]} pixels, and config.image.roi is for images of "
            f"{width}x{height}; expected images of one aspect ratio"
        )


def _is_similar(a: Sequence[int], b: Sequence[int]) -> bool:
    return abs(a[1] * b[0] / (a[0] * b[1]) - 1) <= _ASPECT


def _pixels(value: str | Sequence, size: tuple[int, int]) -> Bool[np.ndarray, "_h _w"]:
    if not isinstance(value, str):
        return _polygon(value, size)
    if checks.is_runs(value):
        inside = decode(value)
    else:
        path = paths.parse(value)
        inside = masks.decode(files.read_file(path), files.shown(path))
    (height, width), (rows, columns) = inside.shape, size
    if not _is_similar(inside.shape, size):
        raise _wrong(
            value,
            f"a mask of {width}x{height} pixels for images of {columns}x{rows}; expected one "
            "of their size, or of the same aspect ratio: draw it on one of the images",
        )
    return inside


def _polygon(value: Sequence[Any], size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Return the pixels whose centres are inside a polygon, by the even-odd rule, or a box."""
    height, width = size
    if not isinstance(value[0], Sequence):
        left, top, right, bottom = value
        points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    else:
        points = list(value)
    if not all(0 <= x <= width and 0 <= y <= height for x, y in points):
        raise _wrong(
            value,
            f"a point outside of the image of {width}x{height} pixels; expected x from 0 to "
            f"{width} and y from 0 to {height}",
        )
    y, x = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
    inside = np.zeros(size, bool)
    for (x0, y0), (x1, y1) in itertools.pairwise([*points, points[0]]):
        crossed = (y0 <= y) != (y1 <= y)
        inside ^= crossed & (x < x0 + (x1 - x0) * (y - y0) / ((y1 - y0) or 1))
    return inside
