"""Decoded, resized and cropped images on disk, so that a second run need not decode.

An entry is one file, named after a SHA-256 over the bytes of the source files and over
all else that decides on its pixels. So the source files are still read, which takes a
fiftieth of the time that decoding does, and an entry can not be out of date: after a
change of the image, the mask, the preprocessing or Pillow it is simply not asked for any
more, and goes when the room is needed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import secrets
import struct
import sys
import threading
import time
import zlib
from typing import NamedTuple

import numpy as np
import PIL
from jaxtyping import Bool, UInt8
from PIL import features

from padim_jax.config.settings import CacheConfig, ImageConfig

# To be raised when the same sources and settings give other pixels or another file.
_FORMAT = 5
# Two builds of one Pillow may bring different decoders. The lossless ones have no choice.
_DECODERS = ("jpg", "libjpeg_turbo", "jpg_2000", "libtiff", "webp", "avif")
_VERSIONS = [PIL.__version__, *(features.version(name) for name in _DECODERS)]

# Height and width of the image, the same of the source, whether there is a mask, how many
# grey levels are kept, or 0, and the mask's `MaskFacts`. Then follow the image, row by row, the
# mask's bits and a checksum.
_HEADER = struct.Struct("<IIII?BQIII")
_CHECKSUM = struct.Struct("<I")
_AN_HOUR = 3600 * 10**9  # ns; by so much the clock of where the files are may be ahead
# An entry or, with a further suffix, one that is being written. Nothing else is removed.
_NAME = re.compile(r"[0-9a-f]{64}\.pixels(\..*)?")


class MaskFacts(NamedTuple):
    """A mask at its own size, and what preprocessing makes of it.

    Attributes:
      defect: defect pixels.
      regions: 8-connected regions of them.
      resized_away: regions of which no pixel is left after resizing.
      cropped_away: of the others, those of which none is left after turning and cropping.
    """

    defect: int
    regions: int
    resized_away: int
    cropped_away: int


NO_MASK = MaskFacts(0, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What decoding and preprocessing make of an image's file and its mask's.

    Attributes:
      image: RGB, as Pillow resized and cropped it.
      mask: the defect's pixels, or None without a mask file.
      size: the original (height, width).
      levels: grey levels kept, where they are too few; see `decoding.open_rgb`.
      facts: of the mask as it is stored; all 0 without one.
    """

    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"] | None
    size: tuple[int, int]
    levels: int | None = None
    facts: MaskFacts = NO_MASK


class ImageCache:
    """A folder of entries, bounded in size. Threads and processes may share it.

    Before the first entry of a run is written, and again whenever this process has
    written a sixteenth of the bound, the folder is listed and entries go, the least
    recently used first, until that sixteenth is free. One process alone never exceeds
    the bound, n of them do by n - 1 sixteenths at most. Reading lists nothing.

    What cannot be read, or is not as it was written, is as if it were not there. What
    cannot be written is told once, on stderr, and no more is written: results do not
    depend on the cache.
    """

    def __init__(self, folder: pathlib.Path, limit: int):
        """Touches no file yet.

        Args:
          folder: is made when needed; files of other names than the entries' are left be.
          limit: bytes that all entries may take.
        """
        self._folder, self._limit = folder, limit
        self._lock = threading.Lock()
        self._room = 0  # bytes that may be written before the folder is listed again
        self._writable = True

    @property
    def limit(self) -> int:
        """Bytes that all entries may take."""
        return self._limit

    def get(self, key: str) -> Decoded | None:
        """What was put under this key, if it is still there and intact."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):  # a cache that can only be read serves as well
            os.utime(path)
        return _unpack(key, content)

    def put(self, key: str, decoded: Decoded) -> None:
        """Keeps what decoding gave."""
        content = _pack(key, decoded)
        if len(content) > self._limit:
            return
        # One thread at a time, so that no other one's half-written file is miscounted.
        with self._lock:
            if not self._writable:
                return
            try:
                self._make_room(len(content))
                self._write(key, content)
            except OSError as error:
                self._writable = False
                _warn(
                    f"warning: {self._folder}: decoded images cannot be kept for the next run "
                    f"({error.strerror}); name another folder with --config.cache.dir, or "
                    "switch this off with --config.cache.images_gb=0"
                )

    def _path(self, key: str) -> pathlib.Path:
        return self._folder / f"{key}.pixels"

    def _make_room(self, size: int) -> None:
        if self._room < size:
            # As private as the XDG specification wants the user's caches.
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._room = max(self._limit // 16, size)
            _shrink(self._folder, self._limit - self._room)
        self._room -= size

    def _write(self, key: str, content: bytes) -> None:
        path = self._path(key)
        # Complete under its name or not there at all, whoever else writes the same.
        growing = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        try:
            growing.write_bytes(content)
            growing.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                growing.unlink()
            raise


def open_cache(config: CacheConfig) -> ImageCache | None:
    """The cache that a configuration asks for, or None.

    Raises:
      UserError: there is no folder for it; see `CacheConfig.folder`.
    """
    limit = int(config.images_gb * 1e9)
    if not limit:
        return None
    folder = config.folder / "images"
    assert isinstance(folder, pathlib.Path)  # as a configuration has to have it
    return ImageCache(folder, limit)


def entry_key(
    image: bytes, mask: bytes | None, config: ImageConfig, view: tuple[float, int, int]
) -> str:
    """A name for what decoding gives: the same for the same input, and for no other.

    SHA-256, because CPUs have instructions for it: with them it was the fastest of
    hashlib's, 1.7 GB/s a core against 0.9 for BLAKE2b.

    Args:
      image: the source file's bytes.
      mask: the mask file's bytes, or None.
      config: the preprocessing.
      view: what is seen of the resized image: angle, top and left of the crop.
    """
    sizes = [len(image), None if mask is None else len(mask)]
    # Mean and std come later; of what is drawn only the outcome counts.
    pixels = [config.resize, config.method, config.crop, view, config.range]
    digest = hashlib.sha256(json.dumps([_FORMAT, _VERSIONS, pixels, sizes]).encode())
    digest.update(image)
    digest.update(mask or b"")
    return digest.hexdigest()


def _pack(key: str, decoded: Decoded) -> bytes:
    height, width, _ = decoded.image.shape
    mask = b"" if decoded.mask is None else np.packbits(decoded.mask).tobytes()
    header = _HEADER.pack(
        *(height, width, *decoded.size, decoded.mask is not None),
        *(decoded.levels or 0, *decoded.facts),
    )
    content = b"".join((header, decoded.image.tobytes(), mask))
    return content + _CHECKSUM.pack(_checksum(key, content))


def _unpack(key: str, content: bytes) -> Decoded | None:
    body = memoryview(content)[: -_CHECKSUM.size]
    if len(body) < _HEADER.size or content[len(body) :] != _CHECKSUM.pack(_checksum(key, body)):
        return None
    *shape, height, width, has_mask, levels, defect, regions, resized, cropped = (
        _HEADER.unpack_from(body)
    )
    pixels = shape[0] * shape[1]
    image = np.frombuffer(body, np.uint8, 3 * pixels, _HEADER.size).reshape(*shape, 3)
    mask = None
    if has_mask:
        bits = np.frombuffer(body, np.uint8, offset=_HEADER.size + 3 * pixels)
        mask = np.unpackbits(bits, count=pixels).view(bool).reshape(shape)
    facts = MaskFacts(defect, regions, resized, cropped)
    return Decoded(image, mask, (height, width), levels or None, facts)


def _checksum(key: str, content: bytes | memoryview) -> int:
    # With the key, so that a file under another one's name is noticed as well.
    return zlib.crc32(content, zlib.crc32(key.encode()))


def _shrink(folder: pathlib.Path, target: int) -> None:
    """Removes the least recently used entries until the rest takes `target` bytes."""
    entries, soon = [], time.time_ns() + _AN_HOUR
    with os.scandir(folder) as found:
        for entry in found:
            if _NAME.fullmatch(entry.name):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # another process has removed or renamed it
                    continue
                # A clock that was set back since would let it stay for years.
                used = 0 if status.st_mtime_ns > soon else status.st_mtime_ns
                entries.append((used, status.st_size, entry.path))
    excess = sum(size for _, size, _ in entries) - target
    for _, size, path in sorted(entries):
        if excess <= 0:
            break
        pathlib.Path(path).unlink(missing_ok=True)
        excess -= size


@functools.cache  # one line a run, however often the data are gone through
def _warn(text: str) -> None:
    import tqdm  # takes its time, and is rarely needed here

    tqdm.tqdm.write(text, file=sys.stderr)  # beside the progress bar
