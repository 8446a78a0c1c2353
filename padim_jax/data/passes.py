"""Passes over images that all processes take part in, with a progress bar."""

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
    """SHA-256 hex digest of which images a source has.

    Raises:
      UserError: the processes see different ones.
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
    """This process's part of a source's batches, with a bar of all processes' images.

    Args:
      source: the images.
      config: batch size and preprocessing.
      what: the bar's name, behind the category's.
      cache: see `input_pipeline.batches`.
      devices: that a batch is shared out to.
      start: of the records, how many to leave out.

    Raises:
      UserError: an image cannot be read or decoded, or the processes see different ones.
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
    """Of a batch's images, those of which too few grey levels are kept: how many, by name."""
    pairs = zip(batch.records, batch.levels, strict=True)
    return {shown(record.image): levels for record, levels in pairs if levels is not None}


def warn_few_levels(own: Mapping[str, int], total: int, devices: Devices) -> None:
    """Warns of all processes' images with few grey levels, once, if there are any.

    Args:
      own: of this process; see `few_levels`.
      total: images that were read.
      devices: of all processes.
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
    """Return a fact of every image's file, of which each process reads its share.

    A collective: every process gets the same.

    Args:
      source: the images.
      what: the bar's name.
      devices: among whose processes the work is shared out.
      fact: takes the number of a record and returns a JSON value; called from several threads.

    Raises:
      UserError: the processes see different images.
    """
    listing(source, devices)  # or they could not tell each other their parts
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
    """Images a step, of all devices together.

    A few images need not be padded to a whole batch. What is left of a source that was
    interrupted is, as it would have been without the interruption: to the last bit.
    """
    return devices.padded(max(1, min(config.batch_size, len(source.records))))
