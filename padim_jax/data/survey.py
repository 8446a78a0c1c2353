"""Survey of images before a fit or an evaluation: read once, summarized, checked."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import UInt8

from padim_jax.config.settings import ImageConfig
from padim_jax.data import decoding, input_pipeline, passes
from padim_jax.data import summary as summary_lib
from padim_jax.data.image_cache import ImageCache
from padim_jax.data.records import Source
from padim_jax.data.summary import File, Summary
from padim_jax.devices.parallel import Devices
from padim_jax.errors import DataWarning


def read(
    sources: Mapping[str, Source],
    devices: Devices,
    image: ImageConfig | None = None,
    cache: ImageCache | None = None,
) -> dict[str, list[File]]:
    """Read the bytes of all images; each process reads its share. A collective.

    Args:
      sources: images, by the name of their split.
      devices: devices whose processes share the work.
      image: preprocessing. If given, images that may lose grey levels are decoded to count the
        levels kept: 16-bit files, and all files under `config.image.range`.
      cache: cache that keeps decoded images for later passes.

    Returns:
      Facts in the records' order, equal in all processes.

    Raises:
      UserError: a file cannot be read or decoded, or the processes see different images.
    """
    return {name: _read(source, devices, image, cache) for name, source in sources.items()}


def hashes(files: Sequence[File]) -> UInt8[np.ndarray, "n 32"]:
    """Return the SHA-256 of files, as `copies.distinct` takes them."""
    return np.frombuffer(b"".join(file.digest for file in files), np.uint8).reshape(-1, 32)


def _read(
    source: Source, devices: Devices, image: ImageConfig | None, cache: ImageCache | None
) -> list[File]:
    def fact(index: int) -> tuple[str, tuple[int, int] | None, str | None, int | None]:
        content, _ = source.read(index)
        size, mode = decoding.describe(content) or (None, None)
        levels = None
        if image and (image.counts != "full" or (mode and mode.endswith("16 bit"))):
            levels = input_pipeline.load_levels(source, image, index, cache)
        return hashlib.sha256(content).hexdigest(), size, mode, levels

    facts = passes.of_files(source, "read", devices, fact)
    return [
        File(
            record.relative_path,
            record.defect_type,
            bytes.fromhex(digest),
            None if size is None else (size[0], size[1]),
            mode,
            levels,
        )
        for record, (digest, size, mode, levels) in zip(source.records, facts, strict=True)
    ]


def tell(summary: Summary, devices: Devices) -> None:
    """Print a summary of files and warn of implausible ones, in the first process.

    Args:
      summary: summary of the files.
      devices: devices of this process.
    """
    if devices.process == 0:
        print("\n".join(summary_lib.lines(summary)))
    warn(summary_lib.warnings(summary), devices)


def warn(lines: Sequence[str], devices: Devices) -> None:
    """Issue a `DataWarning` for each line, in the first process.

    Args:
      lines: warnings, one line each.
      devices: devices of this process.
    """
    if devices.process == 0:
        for line in lines:
            warnings.warn(DataWarning(line), stacklevel=3)
