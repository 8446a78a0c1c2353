"""Image files -> decoded, resized, cropped uint8 batches, ahead of the device.

Pixels leave this module exactly as Pillow makes them; normalisation happens on the
device (see `detector`). Decoding runs in threads, where Pillow releases the GIL, in
a deterministic order. Images decoded in an earlier run come from a cache, if one is given.

Images of a dataset may be seen in random views (`view`), their masks in the same ones;
an image keeps its label even if the crop excludes its defect.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import itertools
import os
import pathlib
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from padim_jax.config.settings import ImageConfig
from padim_jax.core.regions import Frame
from padim_jax.data import decoding, image_cache, masks
from padim_jax.data.decoding import Range, open_rgb
from padim_jax.data.files import read_file, shown
from padim_jax.data.image_cache import NO_MASK, Decoded, ImageCache, MaskFacts
from padim_jax.data.records import Record, Source
from padim_jax.errors import MachineError, UserError
from padim_jax.system import paths

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# Pillow rotates images with no other filter.
_TURNING = {**FILTERS, "lanczos": Image.Resampling.BICUBIC}


# Bytes per pixel, at most, while an image is decoded, converted and resized, and while it is
# drawn. Peaks measured with 20 megapixels: decoding 4 for RGB (PNG, JPEG, TIFF, BMP), 5 for
# grey or palette, 9 for 16 bits, 16 for WebP, 17 for RGBA; a mask 9 besides the image; drawing
# 31, 39 for WebP.
DECODING, DRAWING = 17, 40


class Room:
    """Bound on the memory of all threads for full-size images."""

    def __init__(self, limit: int):
        """Args: limit: bytes; an image of any size is admitted if it is alone."""
        self.limit = limit
        self._used = 0
        self._change = threading.Condition()

    @contextlib.contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Wait until `size` bytes are free, and reserve them in the block.

        A thread must not wait for more while it holds a reservation.
        """
        with self._change:
            self._change.wait_for(lambda: not self._used or self._used + size <= self.limit)
            self._used += size
        try:
            yield
        finally:
            with self._change:
                self._used -= size
                self._change.notify_all()


# Of this process. The caller that knows how much memory is free sets the limit.
ROOM = Room(2**31)


class View(NamedTuple):
    """View of a resized image.

    Attributes:
      angle: rotation about the centre in degrees, counter-clockwise.
      top, left: corner of the crop, in pixels of the rotated image.
    """

    angle: float
    top: int
    left: int


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Source that reads the files named by the records."""

    records: Sequence[Record]

    def read(self, index: int) -> tuple[bytes, bytes | None]:
        """Return the encoded image of `records[index]` and its mask's; see `masks.read`.

        Raises:
          UserError: a file cannot be read.
        """
        record = self.records[index]
        return read_file(record.image), masks.read(record)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images of equal size; the last batch of a dataset is padded with zeros.

    Attributes:
      images: RGB, as Pillow resized and cropped them.
      valid: False marks padding.
      records: records of the valid images, in order.
      masks: per valid image the defect's pixels, or None if unknown.
      sizes: per valid image the original (height, width).
      facts: per valid image those of its mask; `NO_MASK` without one.
      digests: SHA-256 of the image's file; zeros for padding.
      levels: per valid image the number of grey levels kept if too few, else None; see
        `decoding.open_rgb`.
    """

    images: UInt8[np.ndarray, "b h w 3"]
    valid: Bool[np.ndarray, " b"]
    records: tuple[Record, ...]
    masks: tuple[Bool[np.ndarray, "h w"] | None, ...]
    sizes: tuple[tuple[int, int], ...]
    facts: tuple[MaskFacts, ...]
    digests: UInt8[np.ndarray, "b 32"]
    levels: tuple[int | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Share:
    """A process's part of each batch.

    Attributes:
      process: index of the process, from 0.
      processes: number of processes; all take the same number of consecutive images of a batch.
    """

    process: int = 0
    processes: int = 1


@dataclasses.dataclass(frozen=True)
class _Example:
    record: Record
    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"] | None
    size: tuple[int, int]
    facts: MaskFacts
    digest: bytes
    levels: int | None


def batches(
    source: Source,
    config: ImageConfig,
    batch_size: int,
    cache: ImageCache | None = None,
    share: Share = Share(),
    start: int = 0,
) -> Iterator[Batch]:
    """Decode a dataset in order, in batches of one static shape.

    Args:
      source: the images.
      config: resizing and views (see `view`; for new images, which belong to no dataset, use
        `centred(config)`).
      batch_size: images per batch of all processes, padding included; a multiple of their
        number.
      cache: cache of decoded images for later runs; None decodes each image.
      share: part of each batch to read; no other image is read.
      start: number of leading records to leave out.

    Yields:
      Batches in the records' order, the same number for all processes; a batch past the end may
      have no valid image.

    Raises:
      UserError: an image cannot be read or decoded (the file is named).
    """
    end, own = len(source.records), batch_size // share.processes
    count = -(-(end - start) // batch_size)

    def load(position: int) -> _Example | None:
        batch, number = divmod(position, own)
        index = start + batch * batch_size + share.process * own + number
        return _load(source, config, index, cache) if index < end else None

    with concurrent.futures.ThreadPoolExecutor(_threads()) as threads:
        positions = iter(range(count * own))
        ahead = itertools.islice(positions, max(2 * own, _threads()))
        pending = collections.deque(threads.submit(load, position) for position in ahead)
        try:
            for _ in range(count):
                slots = []
                for _ in range(own):
                    slots.append(pending.popleft().result())
                    for position in itertools.islice(positions, 1):
                        pending.append(threads.submit(load, position))
                yield _collate(slots, config.size)
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def load_image(
    source: Source, config: ImageConfig, index: int, cache: ImageCache | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Return one image as `batches` gives it.

    Args:
      source: the images.
      config: as for `batches`.
      index: number of the record.
      cache: as for `batches`.

    Returns:
      (h, w, 3) uint8.
    """
    return _load(source, config, index, cache).image


def load_levels(
    source: Source, config: ImageConfig, index: int, cache: ImageCache | None = None
) -> int | None:
    """Return the number of grey levels kept of one image if too few; see `Batch.levels`.

    Args:
      source: the images.
      config: as for `batches`.
      index: number of the record.
      cache: as for `batches`.

    Returns:
      The number, or None.
    """
    return _load(source, config, index, cache).levels


def warm(source: Source, config: ImageConfig, cache: ImageCache, stop: threading.Event) -> None:
    """Decode a dataset into the cache, where `batches` will find it later.

    Meant for a background thread: it runs at low priority and fills at most half of the cache,
    so that entries in use stay. Unreadable images are left out here; `batches` reports them.

    Args:
      source: the images, processed in order.
      config: as for `batches`.
      cache: cache to fill.
      stop: once set, this returns after the images in progress.
    """
    height, width = config.size
    end = min(len(source.records), cache.limit // 2 // (3 * height * width))
    threads = max(1, _threads() // 4)

    def work(first: int) -> None:
        _yield_to_others()
        for index in range(first, end, threads):
            if stop.is_set():
                return
            try:
                _load(source, config, index, cache)
            except (UserError, MemoryError):
                continue

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def faults(
    source: Source, config: ImageConfig, numbers: Sequence[int], cache: ImageCache | None = None
) -> Iterator[str | None]:
    """Check images for errors.

    Args:
      source: the images.
      config: as for `batches`.
      numbers: numbers of the records to check.
      cache: filled with the usable images; see `batches`.

    Yields:
      The message of the error that `batches` would raise, or None for a usable image.

    Raises:
      MachineError: an image cannot be read at present, which says nothing about it. (Missing
        permission makes an image unusable and is yielded.)
    """

    def fault(number: int) -> str | None:
        try:
            _load(source, config, number, cache)
        except MachineError as error:
            if isinstance(error.__cause__, PermissionError):
                return str(error)
            raise
        except UserError as error:
            return str(error)
        return None

    with concurrent.futures.ThreadPoolExecutor(_threads()) as pool:
        try:
            yield from pool.map(fault, numbers)
        finally:
            pool.shutdown(cancel_futures=True)


def read_image(path: str | os.PathLike[str], counts: Range = "full") -> Image.Image:
    """Read and decode one image file to RGB; see `decode`.

    Args:
      path: path of the file.
      counts: see `decoding.open_rgb`.

    Returns:
      The image.

    Raises:
      UserError: the file cannot be read or is not an image.
    """
    return decode(read_bytes(path), shown(os.fspath(path)), counts)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read one file, local or remote.

    Raises:
      UserError: it cannot be read.
    """
    name = os.fspath(path)
    return read_file(paths.parse(name) if "://" in name else pathlib.Path(name))


Input = np.ndarray | str | os.PathLike[str] | bytes | Image.Image | io.IOBase


def require_several(images: object) -> None:
    """Raise TypeError for a single image.

    A three-dimensional array is a stack of grey images; with 1, 3 or 4 as its last length, it
    is one image.
    """
    single = isinstance(images, bytes | Image.Image) or hasattr(images, "read")
    if isinstance(images, np.ndarray):
        single = images.ndim < 3 or (images.ndim == 3 and images.shape[2] in (1, 3, 4))
    if single:
        raise TypeError("images: a single image; expected several, as in [image]")


def open_input(item: Input, name: str, counts: Range) -> Image.Image:
    """Convert an image from a Python program to RGB, all types by the same rules.

    Args:
      item: array (see `decoding.from_array`), path, file's bytes, open binary file or Pillow
        image.
      name: name of the image in error messages, unless it is a path.
      counts: see `decoding.open_rgb`.

    Returns:
      The image.

    Raises:
      TypeError: `item` has another type.
      UserError: see `decoding.open_rgb`.
    """
    if isinstance(item, np.ndarray):
        return decoding.from_array(item, name, counts)
    if isinstance(item, Image.Image):
        return decoding.from_pillow(item, name, counts)
    if isinstance(item, str | os.PathLike):
        return read_image(item, counts)
    data = item if isinstance(item, bytes) else getattr(item, "read", lambda: None)()
    if not isinstance(data, bytes):
        raise TypeError(
            f"{name}: {type(item).__name__}; expected a uint8 array, a path, bytes, a file "
            "opened in binary mode or a Pillow image"
        )
    return decode(data, name, counts)


def load_input(
    item: Input, name: str, config: ImageConfig
) -> tuple[UInt8[np.ndarray, "h w 3"], int | None, tuple[int, int]]:
    """Convert, resize and crop an image from a Python program.

    Args:
      item: see `open_input`.
      name: name of the image in error messages, unless it is a path.
      config: preprocessing.

    Returns:
      The pixels (h, w, 3); the number of grey levels kept, if too few; and the image's own
      height and width.

    Raises:
      TypeError: see `open_input`.
      UserError: see `open_input`.
    """
    if isinstance(item, str | os.PathLike):
        name, item = shown(os.fspath(item)), read_bytes(item)
    size = DECODING * (decoding.pixel_count(item) if isinstance(item, bytes) else 0)
    with ROOM.held(size):
        image = open_input(item, name, config.counts)
        levels, size = image.info.get(decoding.LEVELS), (image.height, image.width)
        return preprocess(image, config), levels, size


def decode(data: bytes, name: str, counts: Range = "full") -> Image.Image:
    """Decode an image file to RGB; see `decoding.open_rgb`.

    Args:
      data: the file's bytes.
      name: name of the file in error messages.
      counts: `config.image.range`.

    Returns:
      The image.

    Raises:
      UserError: the file is not an image, is damaged, or is of an unsupported kind.
    """
    return open_rgb(data, name, counts)


def few_levels(levels: Mapping[str, int], total: int) -> str:
    """Return a warning about images that keep too few grey levels.

    Args:
      levels: number of levels of each such image, by name.
      total: number of images read.

    Returns:
      The text.
    """
    names = ", ".join(f"{name} ({count})" for name, count in sorted(levels.items())[:3])
    more = ", ..." if len(levels) > 3 else ""
    return (
        f"{len(levels)} of {total} images keep fewer than {decoding.FEWEST_LEVELS} of their "
        f"grey levels: {names}{more}. Set config.image.range=train (from the training images), "
        "or to the (low, high) that matter"
    )


def preprocess(
    image: Image.Image, config: ImageConfig, view: View | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """Resize, rotate and crop, as torchvision does on Pillow images.

    Args:
      image: RGB, of any size.
      config: sizes, and the filter for resizing and rotation (bicubic for rotation if it is
        lanczos).
      view: view of the image; None for the centre, not rotated, whatever `config` says.

    Returns:
      (h, w, 3) uint8.
    """
    view = view or _centre(config)
    method = config.method
    return np.asarray(_resize_crop(image, config, view, FILTERS[method], _TURNING[method]))


def view(config: ImageConfig, name: str) -> View:
    """Return the view of a dataset's image: Rd-MVTec AD (PaDiM, section IV-A).

    The angle is uniform in [-rotation, rotation], the crop's corner uniform over all positions
    in the resized image (with `crop_at` random; else the crop is central). Both come from a
    hash: they depend on seed and name alone, not on order, process or library.

    Args:
      config: ranges and seed.
      name: a record's `relative_path`.

    Returns:
      The view.
    """
    angle, top, left = _centre(config)
    # File names may contain bytes that are not valid text.
    text = f"{config.seed} {name}".encode(errors="surrogateescape")
    digest = hashlib.sha256(text).digest()
    # With 53 bits, so that none is rounded up to 1.
    draws = [(int.from_bytes(digest[i : i + 8], "little") >> 11) / 2**53 for i in (0, 8, 16)]
    if config.rotation:
        angle = config.rotation * (2 * draws[0] - 1)
    if config.crop_at == "random":
        (height, width), (crop_height, crop_width) = config.resize, config.size
        top = int(draws[1] * (height - crop_height + 1))
        left = int(draws[2] * (width - crop_width + 1))
    return View(angle, top, left)


def aspect(config: ImageConfig, size: Sequence[int]) -> float:
    """Return width over height of the visible part of an image, in its file's proportions.

    Args:
      config: preprocessing, which may change an image's proportions.
      size: height and width of the image file.

    Returns:
      The ratio.
    """
    (height, width), (rows, columns) = config.resize, config.size
    return (columns / width * size[1]) / (rows / height * size[0])


def frame(config: ImageConfig, size: Sequence[int], seen: View | None = None) -> Frame:
    """Return the place of an anomaly map on the original image.

    Args:
      config: preprocessing.
      size: height and width of the image file.
      seen: view of the image, whose rotation does not count; None for the centre.
    """
    scale = size[0] / config.resize[0], size[1] / config.resize[1]
    top, left = crop_offset(config) if seen is None else seen[1:]
    return Frame(scale, (top * scale[0], left * scale[1]))


def centred(config: ImageConfig) -> ImageConfig:
    """Return the settings without random views: for new images, which are in no dataset."""
    return dataclasses.replace(config, rotation=0.0, crop_at="centre", seed=0)


def _load(
    source: Source, config: ImageConfig, index: int, cache: ImageCache | None
) -> _Example:
    record = source.records[index]
    image, mask = source.read(index)
    seen = view(config, record.relative_path)
    if cache is None:
        decoded = _decode(record, image, mask, config, seen)
    else:
        key = image_cache.entry_key(image, mask, config, seen)
        decoded = cache.get(key)
        if decoded is None:
            decoded = _decode(record, image, mask, config, seen)
            cache.put(key, decoded)
    defect = decoded.mask
    if mask is None and record.label == 0:
        defect = np.zeros(config.size, bool)
    digest = hashlib.sha256(image).digest()
    return _Example(
        *(record, decoded.image, defect, decoded.size, decoded.facts, digest, decoded.levels)
    )


def _decode(
    record: Record,
    image_bytes: bytes,
    mask_bytes: bytes | None,
    config: ImageConfig,
    seen: View,
) -> Decoded:
    with ROOM.held(DECODING * decoding.pixel_count(image_bytes)):
        return _decode_alone(record, image_bytes, mask_bytes, config, seen)


def _decode_alone(
    record: Record,
    image_bytes: bytes,
    mask_bytes: bytes | None,
    config: ImageConfig,
    seen: View,
) -> Decoded:
    name, mask_name = shown(record.image), shown(record.mask or "")
    image = decode(image_bytes, name, config.counts)
    mask, facts = None, NO_MASK
    if mask_bytes is not None:
        defect = masks.decode(mask_bytes, mask_name)
        height, width = defect.shape
        if (width, height) != image.size:
            raise UserError(
                f"{mask_name}: a mask of {width}x{height} pixels for the image "
                f"{name} of {_size_text(image)}; expected equal sizes"
            )
        mask, facts = _preprocess_mask(defect, config, seen)
    levels = image.info.get(decoding.LEVELS)
    pixels = preprocess(image, config, seen)
    return Decoded(pixels, mask, (image.height, image.width), levels, facts)


def _preprocess_mask(
    defect: Bool[np.ndarray, "h w"], config: ImageConfig, seen: View
) -> tuple[Bool[np.ndarray, "_h _w"], MaskFacts]:
    """Resize (nearest), rotate and crop a mask, and count the regions lost."""
    # Region numbers are transformed like the mask, to see which regions survive.
    labels, regions = masks.label_regions(defect)
    height, width = config.resize
    resized = Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST)
    arrived = np.asarray(_turn_crop(resized, config, seen, Image.Resampling.NEAREST))
    after_resizing, at_last = (
        np.count_nonzero(np.bincount(np.ravel(found))[1:]) for found in (resized, arrived)
    )
    facts = MaskFacts(
        defect=int(np.count_nonzero(defect)),
        regions=regions,
        resized_away=regions - int(after_resizing),
        cropped_away=int(after_resizing - at_last),
    )
    return arrived > 0, facts


def _resize_crop(
    image: Image.Image,
    config: ImageConfig,
    seen: View,
    resize_by: Image.Resampling,
    turn_by: Image.Resampling,
) -> Image.Image:
    height, width = config.resize
    return _turn_crop(image.resize((width, height), resize_by), config, seen, turn_by)


def _turn_crop(
    image: Image.Image, config: ImageConfig, seen: View, turn_by: Image.Resampling
) -> Image.Image:
    if seen.angle:
        image = image.rotate(seen.angle, turn_by)  # the corners become black
    if config.crop is None:
        return image
    crop_height, crop_width = config.crop
    return image.crop((seen.left, seen.top, seen.left + crop_width, seen.top + crop_height))


def _centre(config: ImageConfig) -> View:
    return View(0.0, *crop_offset(config))


def crop_offset(config: ImageConfig) -> tuple[int, int]:
    """Return top and left of the centre crop in pixels, rounded as in torchvision."""
    (height, width), (crop_height, crop_width) = config.resize, config.size
    return round((height - crop_height) / 2), round((width - crop_width) / 2)


def _collate(slots: Sequence[_Example | None], size: tuple[int, int]) -> Batch:
    examples = [example for example in slots if example is not None]
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
        facts=tuple(example.facts for example in examples),
        digests=digests,
        levels=tuple(example.levels for example in examples),
    )


def _size_text(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _threads() -> int:
    return min(32, os.cpu_count() or 1)


def _yield_to_others() -> None:
    """Lower the priority of this thread alone, permanently."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
