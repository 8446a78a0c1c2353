"""Image files -> decoded, resized, cropped uint8 batches, ahead of the device.

Pixels leave this module exactly as Pillow makes them; normalisation happens on the
device (see `detector`). Decoding runs in Grain's threads, which Pillow leaves free
of Python's lock, in a deterministic order. What they made of a file in an earlier run
comes from a cache, if one is given.
"""

import dataclasses
import hashlib
import io
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, UnidentifiedImageError

from padim_jax import image_cache, paths
from padim_jax.config import ImageConfig
from padim_jax.datasets.files import read_file
from padim_jax.datasets.records import Record
from padim_jax.errors import UserError
from padim_jax.image_cache import Decoded, ImageCache

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Pillow's modes of 8 bits a channel or less. Deeper ones would be clipped (grey: I;16,
# I, F) or lose their low bytes (colour, which it calls RGB all the same), and no one
# would notice.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")


@runtime_checkable  # the tests check argument types at run time
class Source(Protocol):
    """Images that can be read in any order: what a dataset gives the pipeline."""

    @property
    def records(self) -> Sequence[Record]:
        """What the images are."""
        ...

    def read(self, index: int) -> tuple[bytes, bytes | None]:
        """The encoded image of `records[index]` and its mask's, if it has one."""
        ...


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Reads the files that the records name."""

    records: Sequence[Record]

    def read(self, index: int) -> tuple[bytes, bytes | None]:
        """The bytes of the image's and the mask's file.

        Raises:
          UserError: a file cannot be read.
        """
        record = self.records[index]
        return read_file(record.image), record.mask and read_file(record.mask)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images of equal size; the last batch of a dataset is padded with zeros.

    Attributes:
      images: RGB, as Pillow resized and cropped them.
      valid: False marks padding.
      records: what the valid images are, in order.
      masks: per valid image the defect's pixels, or None where unknown.
      sizes: per valid image the original (height, width).
      digests: SHA-256 of the image's file; of padding zeros.
    """

    images: UInt8[np.ndarray, "b h w 3"]
    valid: Bool[np.ndarray, " b"]
    records: tuple[Record, ...]
    masks: tuple[Bool[np.ndarray, "h w"] | None, ...]
    sizes: tuple[tuple[int, int], ...]
    digests: UInt8[np.ndarray, "b 32"]


@dataclasses.dataclass(frozen=True)
class Share:
    """A process's part of every batch.

    Attributes:
      process: which process, from 0.
      processes: how many there are; each takes as many consecutive images of a batch.
    """

    process: int = 0
    processes: int = 1


@dataclasses.dataclass(frozen=True)
class _Example:
    record: Record
    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"] | None
    size: tuple[int, int]
    digest: bytes


_PADDING = "padding"  # Grain leaves out None


def batches(
    source: Source,
    config: ImageConfig,
    batch_size: int,
    cache: ImageCache | None = None,
    share: Share = Share(),
    start: int = 0,
) -> Iterator[Batch]:
    """Decodes a dataset in order, in batches of one static shape.

    Args:
      source: the images.
      config: resizing and cropping.
      batch_size: images a batch of all processes, padding included; a multiple of their
        number.
      cache: where decoded images are kept from run to run; None decodes each.
      share: which part of every batch is wanted; no other image is read.
      start: of the records, how many to leave out.

    Yields:
      Batches in the records' order, as many for every process; one that is past the end
      may have no valid image.

    Raises:
      UserError: an image cannot be read or decoded (the file is named).
    """
    end, own = len(source.records), batch_size // share.processes
    count = -(-(end - start) // batch_size)

    def load(position: int) -> _Example | str:
        batch, number = divmod(position, own)
        index = start + batch * batch_size + share.process * own + number
        return _load(source, config, index, cache) if index < end else _PADDING

    dataset = (
        grain.MapDataset.range(count * own)
        .map(load)
        .to_iter_dataset(
            grain.ReadOptions(
                num_threads=_threads(), prefetch_buffer_size=max(2 * own, _threads())
            )
        )
        .batch(own, batch_fn=_collate(config.size))
    )
    yield from dataset


def load_image(
    source: Source, config: ImageConfig, index: int, cache: ImageCache | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """One image as `batches` gives it."""
    return _load(source, config, index, cache).image


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Reads and decodes one image file to RGB; see `decode`.

    Raises:
      UserError: the file cannot be read or is no image.
    """
    name = os.fspath(path)
    place = paths.parse(name) if "://" in name else pathlib.Path(name)
    return decode(read_file(place), name)


def decode(data: bytes, name: str) -> Image.Image:
    """Decodes an image file to RGB.

    Alpha is dropped, palettes and grey levels are expanded, of an animation the first
    frame is taken; an EXIF orientation is not applied, as in the PyTorch projects.

    Args:
      data: the file's bytes.
      name: how to call it in an error.

    Raises:
      UserError: not an image, a broken one, or one deeper than 8 bits a channel.
    """
    return _open(data, name).convert("RGB")


def preprocess(image: Image.Image, config: ImageConfig) -> UInt8[np.ndarray, "h w 3"]:
    """Resizes and centre-crops, as torchvision does on Pillow images."""
    return np.asarray(_resize_crop(image, config, _FILTERS[config.method]))


def _load(
    source: Source, config: ImageConfig, index: int, cache: ImageCache | None
) -> _Example:
    record = source.records[index]
    image, mask = source.read(index)
    if cache is None:
        decoded = _decode(record, image, mask, config)
    else:
        key = image_cache.entry_key(image, mask, config)
        decoded = cache.get(key)
        if decoded is None:
            decoded = _decode(record, image, mask, config)
            cache.put(key, decoded)
    defect = decoded.mask
    if mask is None and record.label == 0:
        defect = np.zeros(config.size, bool)
    digest = hashlib.sha256(image).digest()
    return _Example(record, decoded.image, defect, decoded.size, digest)


def _decode(
    record: Record, image_bytes: bytes, mask_bytes: bytes | None, config: ImageConfig
) -> Decoded:
    image = decode(image_bytes, str(record.image))
    mask = None
    if mask_bytes is not None:
        mask_image = _open(mask_bytes, str(record.mask)).convert("L")
        if mask_image.size != image.size:
            raise UserError(
                f"{record.mask}: a mask of {_size_text(mask_image)} pixels for the image "
                f"{record.image} of {_size_text(image)}; expected equal sizes"
            )
        brightest = int(np.asarray(mask_image).max())
        if 0 < brightest <= 127:
            raise UserError(
                f"{record.mask}: a mask of values up to {brightest}; expected defect pixels "
                "above 127 (255, usually) and all others 0"
            )
        mask = np.asarray(_resize_crop(mask_image, config, Image.Resampling.NEAREST)) > 127
    return Decoded(preprocess(image, config), mask, (image.height, image.width))


def _open(data: bytes, name: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        encoding = str(image.tile)  # names the file's own depth; gone after load()
        image.load()
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow raises SyntaxError and ValueError for some broken files.
        raise UserError(f"{name}: the image cannot be decoded: {error}") from error
    if image.mode not in _MODES or ";16" in encoding:
        raise UserError(
            f"{name}: more than 8 bits a channel (Pillow mode {image.mode}); convert it to "
            "8-bit grey or RGB first"
        )
    # Transparency is dropped; Pillow would warn that a palette's is.
    image.info.pop("transparency", None)
    return image


def _resize_crop(
    image: Image.Image, config: ImageConfig, resample: Image.Resampling
) -> Image.Image:
    height, width = config.resize
    image = image.resize((width, height), resample)
    if config.crop is None:
        return image
    crop_height, crop_width = config.crop
    top, left = crop_offset(config)
    return image.crop((left, top, left + crop_width, top + crop_height))


def crop_offset(config: ImageConfig) -> tuple[int, int]:
    """Top and left of the centre crop in the resized image, as torchvision rounds."""
    (height, width), (crop_height, crop_width) = config.resize, config.size
    return round((height - crop_height) / 2), round((width - crop_width) / 2)


def _collate(size: tuple[int, int]) -> Callable[[Sequence[_Example | str]], Batch]:
    def collate(slots: Sequence[_Example | str]) -> Batch:
        examples = [example for example in slots if isinstance(example, _Example)]
        images = np.zeros((len(slots), *size, 3), np.uint8)
        digests = np.zeros((len(slots), 32), np.uint8)
        for i, example in enumerate(examples):
            images[i] = example.image
            digests[i] = np.frombuffer(example.digest, np.uint8)
        return Batch(
            images=images,
            valid=np.arange(len(slots)) < len(examples),
            records=tuple(example.record for example in examples),
            masks=tuple(example.mask for example in examples),
            sizes=tuple(example.size for example in examples),
            digests=digests,
        )

    return collate


def _size_text(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _threads() -> int:
    return min(32, os.cpu_count() or 1)
