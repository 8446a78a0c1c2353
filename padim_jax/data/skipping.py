"""Removal of unusable images, if requested (`config.dataset.skip_bad`).

They are found in a pass over all images before anything is computed. Images decoded in it
are kept in the image cache for later passes.
"""

import json
from collections.abc import Mapping

from padim_jax.config.settings import Config
from padim_jax.data import input_pipeline, passes, sampling
from padim_jax.data.files import shown
from padim_jax.data.image_cache import ImageCache
from padim_jax.data.records import Skipped, Source
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.system import progress


def readable(
    sources: Mapping[str, Source], config: Config, devices: Devices, cache: ImageCache | None
) -> tuple[dict[str, Source], list[Skipped]]:
    """Return the usable images; all of them, unchecked, unless skipping is requested.

    A collective: each process checks its share of the images.

    Args:
      sources: images, by their name in messages.
      config: configuration that says whether to skip, and how images are preprocessed.
      devices: devices whose processes share the work.
      cache: cache to fill, or None.

    Returns:
      The sources without the unusable images, and these, which are also printed; equal in all
      processes.

    Raises:
      UserError: no image of a source is usable.
    """
    if not config.dataset.skip_bad:
        return dict(sources), []
    found: dict[str, Source] = {}
    skipped: list[Skipped] = []
    for name, source in sources.items():
        faults = _faults(name, source, config, devices, cache)
        records = source.records
        if records and len(faults) == len(records):
            raise UserError(
                f"config.dataset.skip_bad: all {len(records)} {name} images would be skipped. "
                f"The first: {faults[0]}"
            )
        good = [number for number in range(len(records)) if number not in faults]
        found[name] = sampling.part(source, good) if faults else source
        bad = [Skipped(shown(records[i].relative_path), faults[i]) for i in sorted(faults)]
        if bad:
            print(f"{len(bad)} of {len(records)} {name} images skipped:")
        for one in bad:
            print(f"  {one.reason}")
        skipped += bad
    return found, skipped


def _faults(
    name: str, source: Source, config: Config, devices: Devices, cache: ImageCache | None
) -> dict[int, str]:
    """Return the reasons why images cannot be used, by their numbers."""
    passes.listing(source, devices)  # ensures that shares can be exchanged
    total = len(source.records)
    own = range(devices.process, total, devices.processes)
    reasons: dict[int, str] = {}
    with progress.bar(
        total, f"{config.category} check {name}".lstrip(), devices.process == 0
    ) as bar:
        looked = input_pipeline.faults(source, config.image, own, cache)
        for number, reason in zip(own, looked, strict=True):
            if reason is not None:
                reasons[number] = reason
            bar.update(min(devices.processes, total - bar.n))
    said = parallel.gather_bytes(json.dumps(sorted(reasons.items())).encode())
    return {number: reason for part in said for number, reason in json.loads(part)}
