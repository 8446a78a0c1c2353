"""Passes over images shared by all processes, with a progress bar."""

import concurrent.futures
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from padim_jax.config.settings import Config
from padim_jax.data import input_pipeline
from padim_jax.data.files import shown
from padim_jax.data.image_cache import ImageCache
from padim_jax.data.input_pipeline import Batch, Share
from padim_jax.data.records import Source
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import DataWarning, UserError
from padim_jax.system import progress


def listing(source: Source, devices: Devices) -> str:
    """Return the SHA-256 hex digest of the list of a source's images. A collective.

    Args:
      source: the images.
      devices: devices of all processes.

    Returns:
      Hex digest of the relative paths.

    Raises:
      UserError: the processes see different images.
    """
    names = "\0".join(record.relative_path for record in source.records)
    digest = hashlib.sha256(names.encode("utf-8", "surrogateescape")).digest()
    every = parallel.gather(np.frombuffer(digest, np.uint8)[None])
    if np.any(every != every[0]):
        raise UserError(
            f"process {devices.process} of {devices.processes} sees {len(source.records)} "
            "images, and another process other ones; expected the same folder for all, as on "
            "a shared file system"
        )
    return digest.hex()


def batches(
    source: Source,
    config: Config,
    what: str,
    cache: ImageCache | None,
    devices: Devices,
    start: int = 0,
) -> Iterator[Batch]:
    """Yield this process's part of a source's batches; the bar counts all processes' images.

    Args:
      source: the images.
      config: configuration with batch size and preprocessing.
      what: the bar's name, shown after the category's.
      cache: see `input_pipeline.batches`.
      devices: devices that share a batch.
      start: number of leading records to leave out.

    Yields:
      Batches in the records' order.

    Raises:
      UserError: an image cannot be read or decoded, or the processes see different images.
    """
    listing(source, devices)
    total, size = len(source.records), batch_size(source, config, devices)
    share = Share(devices.process, devices.processes)
    name = f"{config.category} {what}".lstrip()
    with progress.bar(total, name, devices.process == 0, start) as shown:
        for batch in input_pipeline.batches(source, config.image, size, cache, share, start):
            yield batch
            shown.update(min(size, total - shown.n))


def few_levels(batch: Batch) -> dict[str, int]:
    """Return the grey levels kept, by name, of a batch's images that keep too few."""
    pairs = zip(batch.records, batch.levels, strict=True)
    return {shown(record.image): levels for record, levels in pairs if levels is not None}


def warn_few_levels(own: Mapping[str, int], total: int, devices: Devices) -> None:
    """Warn once of all processes' images with few grey levels, if there are any. A collective.

    Args:
      own: this process's images; see `few_levels`.
      total: number of images read.
      devices: devices of all processes.
    """
    every: dict[str, int] = {}
    for data in parallel.gather_bytes(json.dumps(dict(own)).encode()):
        every |= json.loads(data)
    if every and devices.process == 0:
        text = input_pipeline.few_levels(every, total)
        warnings.warn(DataWarning(text), stacklevel=3)


def of_files(
    source: Source, what: str, devices: Devices, fact: Callable[[int], Any]
) -> list[Any]:
    """Return a fact about each image's file; each process reads its share. A collective.

    Args:
      source: the images.
      what: the bar's name.
      devices: devices whose processes share the work.
      fact: function from the number of a record to a JSON value; called from several threads.

    Returns:
      The facts in the records' order, equal in all processes.

    Raises:
      UserError: the processes see different images.
    """
    listing(source, devices)  # ensures that shares can be exchanged
    own = range(devices.process, len(source.records), devices.processes)
    facts = []
    with (
        concurrent.futures.ThreadPoolExecutor() as threads,
        progress.bar(len(own), what, devices.process == 0) as shown,
    ):
        try:
            for value in threads.map(fact, own):
                facts.append(value)
                shown.update()
        finally:
            threads.shutdown(cancel_futures=True)
    every = [json.loads(part) for part in parallel.gather_bytes(json.dumps(facts).encode())]
    shares = [iter(part) for part in every]
    return [next(shares[i % devices.processes]) for i in range(len(source.records))]


def batch_size(source: Source, config: Config, devices: Devices) -> int:
    """Return the number of images per step, on all devices together.

    A few images need not be padded to a whole batch. The size depends on the complete source,
    so that a pass resumed after an interruption gives bit-identical results.

    Args:
      source: the images.
      config: configuration with the batch size.
      devices: devices that share a batch.

    Returns:
      Number of images, a multiple of the number of devices.
    """
    return devices.padded(max(1, min(config.batch_size, len(source.records))))
