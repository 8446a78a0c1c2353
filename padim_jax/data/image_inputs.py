"""Images from a Python program -> a source that reads like a folder of files.

Arrays and Pillow images become uncompressed PNG files in memory, so that images of all types
are decoded, compared and identified by the same rules.
"""

import dataclasses
import io
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from padim_jax.data import decoding, input_pipeline, listing
from padim_jax.data.input_pipeline import Input
from padim_jax.data.records import GOOD, Record
from padim_jax.errors import UserError

ANOMALOUS = "anomalous"  # the defect type of anomalous images of unknown kind

Images = str | os.PathLike[str] | np.ndarray | Iterable[Input]
"""A folder, an image file or a glob, a stack of arrays, or any iterable of images."""


@dataclasses.dataclass(frozen=True)
class MemorySource:
    """Images in memory, and masks of some of them.

    Attributes:
      records: records of the images; `image` and `mask` are names for messages.
      images: images in the records' order.
      masks: masks in the records' order; None where there is none.
    """

    records: Sequence[Record]
    images: Sequence[Input]
    masks: Sequence[Input | None]

    def read(self, index: int) -> tuple[bytes, bytes | None]:
        """Return the encoded image of `records[index]`, and its mask if it has one."""
        record, mask = self.records[index], self.masks[index]
        image = _encoded(self.images[index], str(record.image))
        return image, None if mask is None else _encoded_mask(mask, str(record.mask))


def source(images: Images) -> MemorySource:
    """Return normal images as a source.

    Args:
      images: path of a folder or of an image file, or a glob; or images: paths, encoded bytes,
        open files, Pillow images or arrays as `padim_jax.score` takes them. An iterable is
        consumed completely.

    Raises:
      UserError: there is no image.
      TypeError: something else was given.
    """
    items, names = _listed(images)
    records = [
        Record("train", pathlib.Path(os.fspath(item)), None, 0, GOOD, name)
        if isinstance(item, str | os.PathLike)
        else Record("train", pathlib.Path(name), None, 0, GOOD, name)
        for item, name in zip(items, names, strict=True)
    ]
    return MemorySource(records, items, [None] * len(items))


def labelled(
    images: Images, labels: Iterable[bool], masks: Iterable[Input | None] | None
) -> MemorySource:
    """Return test images as a source.

    Args:
      images: see `source`.
      labels: True for an anomalous image.
      masks: mask of each image's defect, nonzero where the defect is, or None for single
        images; None without any.

    Returns:
      The source, of split "test".

    Raises:
      UserError: numbers differ, or a normal image has a mask.
    """
    normal = source(images)
    flags = [bool(label) for label in labels]
    given = [None] * len(flags) if masks is None else list(masks)
    if not len(normal.records) == len(flags) == len(given):
        raise UserError(
            f"{len(normal.records)} images, {len(flags)} labels and {len(given)} masks; "
            "expected one of each for every image"
        )
    records = []
    for i, (record, label) in enumerate(zip(normal.records, flags, strict=True)):
        if given[i] is not None and not label:
            raise UserError(f"masks[{i}]: a mask of an image that is labelled normal")
        mask = None if given[i] is None else pathlib.Path(f"masks[{i}]")
        kind = ANOMALOUS if label else GOOD
        records.append(
            dataclasses.replace(
                record, split="test", label=int(label), defect_type=kind, mask=mask
            )
        )
    return MemorySource(records, normal.images, given)


def _listed(images: Images) -> tuple[list[Input], list[str]]:
    """Return the images one by one, and their names."""
    if isinstance(images, str | os.PathLike):
        found = listing.find(os.fspath(images), "images")
        return [record.image for record in found], [record.relative_path for record in found]
    input_pipeline.require_several(images)
    items = [item.read() if isinstance(item, io.IOBase) else item for item in images]
    # Files are known by their paths, which `threshold.groups` looks at.
    return items, [
        _relative(item) if isinstance(item, str | os.PathLike) else f"images[{i}]"
        for i, item in enumerate(items)
    ]


def _relative(path: str | os.PathLike[str]) -> str:
    """Return a path without its root and without `..`."""
    parts = pathlib.Path(os.fspath(path)).parts
    return "/".join(part for part in parts if part.strip("/") not in ("", ".."))


def _encoded(item: Input, name: str) -> bytes:
    """Return the bytes of an image file."""
    if isinstance(item, bytes):
        return item
    if isinstance(item, str | os.PathLike):
        return input_pipeline.read_bytes(item)
    if isinstance(item, Image.Image):
        deep = item.mode.startswith("I")
        image = item if deep else decoding.from_pillow(item, name)
    elif isinstance(item, np.ndarray):
        deep = item.dtype == np.uint16 and item.squeeze().ndim == 2
        image = decoding.from_array(item, name)  # raises the error of an unsuitable array
        if deep:
            image = Image.fromarray(item.squeeze())
    else:
        raise TypeError(
            f"{name}: {type(item).__name__}; expected a path, a uint8 array, bytes, a file "
            "opened in binary mode or a Pillow image"
        )
    return _png(image)


def _encoded_mask(item: Input, name: str) -> bytes:
    if isinstance(item, np.ndarray):
        if item.ndim != 2:
            raise TypeError(f"{name}: an array {item.shape}; expected (height, width)")
        return _png(Image.fromarray((item != 0).astype(np.uint8) * 255))
    if isinstance(item, Image.Image):
        return _png(item)
    return _encoded(item, name)


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=0)
    return content.getvalue()


def folder(images: Images) -> str:
    """Return the images' path, or ".", for the configuration of a model."""
    return os.fspath(images) if isinstance(images, str | os.PathLike) else "."
