"""Cache on disk of decoded, resized and cropped images, which saves later runs the decoding.

An entry is one file, named after a SHA-256 of the source files' bytes and of everything else
that determines its pixels. Source files are therefore still read, which takes a fiftieth of
the time of decoding, and an entry cannot be out of date: after a change of the image, the
mask, the preprocessing or Pillow it is no longer requested, and is removed when space is
needed.
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
from padim_jax.system import paths

# Raise it when the same sources and settings give other pixels or another file.
_FORMAT = 5
# Builds of one Pillow may use different decoders. Lossless formats are unaffected.
_DECODERS = ("jpg", "libjpeg_turbo", "jpg_2000", "libtiff", "webp", "avif")
_VERSIONS = [PIL.__version__, *(features.version(name) for name in _DECODERS)]

# Height and width of the image and of the source, whether there is a mask, number of grey
# levels kept (0: enough), and the mask's `MaskFacts`. The image follows, row by row, then the
# mask's bits and a checksum.
_HEADER = struct.Struct("<IIII?BQIII")
_CHECKSUM = struct.Struct("<I")
_AN_HOUR = 3600 * 10**9  # ns; tolerance for a file server's clock that is ahead
# An entry or, with a further suffix, one being written. Nothing else is removed.
_NAME = re.compile(r"[0-9a-f]{64}\.pixels(\..*)?")


class MaskFacts(NamedTuple):
    """Facts about a mask at its own size, and about its losses in preprocessing.

    Attributes:
      defect: number of defect pixels.
      regions: number of 8-connected regions of them.
      resized_away: number of regions without a pixel after resizing.
      cropped_away: number of other regions without a pixel after rotation and cropping.
    """

    defect: int
    regions: int
    resized_away: int
    cropped_away: int


NO_MASK = MaskFacts(0, 0, 0, 0)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """A decoded and preprocessed image and mask.

    Attributes:
      image: RGB, as Pillow resized and cropped it.
      mask: the defect's pixels, or None without a mask file.
      size: original (height, width).
      levels: number of grey levels kept, if too few; see `decoding.open_rgb`.
      facts: facts about the mask as stored; all 0 without one.
    """

    image: UInt8[np.ndarray, "h w 3"]
    mask: Bool[np.ndarray, "h w"] | None
    size: tuple[int, int]
    levels: int | None = None
    facts: MaskFacts = NO_MASK


class ImageCache:
    """A folder of entries, bounded in size. Threads and processes may share it.

    Before the first entry of a run is written, and again whenever this process has written a
    sixteenth of the bound, the folder is listed and the least recently used entries are removed
    until that sixteenth is free. One process alone never exceeds the bound; n processes exceed
    it by at most n - 1 sixteenths. Reading lists nothing.

    Unreadable or damaged entries count as missing. If writing fails, one warning goes to stderr
    and nothing more is written: results do not depend on the cache.
    """

    def __init__(self, folder: pathlib.Path, limit: int):
        """Prepare a cache without touching files.

        Args:
          folder: created when needed; files with other names than the entries' are left alone.
          limit: maximum size of all entries in bytes.
        """
        self._folder, self._limit = folder, limit
        self._lock = threading.Lock()
        self._room = 0  # bytes that may be written before the folder is listed again
        self._writable = True

    @property
    def limit(self) -> int:
        """Return the maximum size of all entries in bytes."""
        return self._limit

    def get(self, key: str) -> Decoded | None:
        """Return the entry stored under a key, if it is still there and intact."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):  # a read-only cache works as well
            os.utime(path)
        return _unpack(key, content)

    def put(self, key: str, decoded: Decoded) -> None:
        """Store a decoded image.

        Args:
          key: see `entry_key`.
          decoded: result of decoding.
        """
        content = _pack(key, decoded)
        if len(content) > self._limit:
            return
        # One thread at a time, so that another one's half-written file is not miscounted.
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
            # Private, as the XDG specification requires for the user's caches.
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._room = max(self._limit // 16, size)
            _shrink(self._folder, self._limit - self._room)
        self._room -= size

    def _write(self, key: str, content: bytes) -> None:
        path = self._path(key)
        # Complete under its name or absent, even if others write the same entry.
        growing = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        with paths.replacing(path, growing):
            growing.write_bytes(content)


def open_cache(config: CacheConfig) -> ImageCache | None:
    """Return the cache that a configuration asks for, or None.

    Raises:
      UserError: there is no folder for it; see `CacheConfig.folder`.
    """
    limit = int(config.images_gb * 1e9)
    if not limit:
        return None
    folder = config.folder / "images"
    assert isinstance(folder, pathlib.Path)  # as a configuration requires
    return ImageCache(folder, limit)


def entry_key(
    image: bytes, mask: bytes | None, config: ImageConfig, view: tuple[float, int, int]
) -> str:
    """Return a key for a decoded image: equal for equal input, and for no other.

    SHA-256, because CPUs have instructions for it: with them it was the fastest of
    hashlib's, 1.7 GB/s per core against 0.9 for BLAKE2b.

    Args:
      image: the image file's bytes.
      mask: the mask file's bytes, or None.
      config: the preprocessing.
      view: view of the resized image: angle in degrees, top and left of the crop in pixels.

    Returns:
      Hex digest.
    """
    sizes = [len(image), None if mask is None else len(mask)]
    # Mean and std are applied later; of random views only the outcome counts.
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
    # With the key, so that a file under another entry's name is noticed as well.
    return zlib.crc32(content, zlib.crc32(key.encode()))


def _shrink(folder: pathlib.Path, target: int) -> None:
    """Remove the least recently used entries until the rest takes `target` bytes."""
    entries, soon = [], time.time_ns() + _AN_HOUR
    with os.scandir(folder) as found:
        for entry in found:
            if _NAME.fullmatch(entry.name):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # removed or renamed by another process
                    continue
                # With a clock that was set back since, it would stay for years.
                used = 0 if status.st_mtime_ns > soon else status.st_mtime_ns
                entries.append((used, status.st_size, entry.path))
    excess = sum(size for _, size, _ in entries) - target
    for _, size, path in sorted(entries):
        if excess <= 0:
            break
        pathlib.Path(path).unlink(missing_ok=True)
        excess -= size


@functools.cache  # one line per run, however many passes there are
def _warn(text: str) -> None:
    import tqdm  # slow to import, and rarely needed here

    tqdm.tqdm.write(text, file=sys.stderr)  # does not break the progress bar
