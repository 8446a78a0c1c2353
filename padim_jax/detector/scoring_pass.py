"""A fitted model's pass over images: maps by batch, identical in all processes."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from padim_jax.config.settings import Config
from padim_jax.data import image_cache, input_pipeline, passes, skipping
from padim_jax.data.records import Record, Skipped, Source
from padim_jax.detector.embeddings import Embeddings
from padim_jax.detector.scores import Scorer
from padim_jax.devices import parallel
from padim_jax.system import progress

AnyScorer = TypeVar("AnyScorer", bound=Scorer)


def readable(
    config: Config, sources: Mapping[str, Source], cached: bool = True
) -> tuple[dict[str, Source], list[Skipped]]:
    """Remove unusable images, if the configuration asks for it; see `skipping`.

    Args:
      config: configuration of the run.
      sources: images by role.
      cached: whether to use the image cache. Images read only once should not be cached: they
        would evict those that are read again.

    Returns:
      The remaining sources, and the images skipped.
    """
    cache = image_cache.open_cache(config.cache) if cached else None
    return skipping.readable(sources, config, parallel.every(), cache)


def for_new_images(detector: AnyScorer) -> AnyScorer:
    """Return the detector with centred views; random views are for a dataset's own images."""
    config = detector.config
    image = input_pipeline.centred(config.image)
    config = dataclasses.replace(config, image=image)
    return dataclasses.replace(cast(Any, detector), config=config)


@dataclasses.dataclass(frozen=True)
class Part:
    """Measures of consecutive images of a source, from all processes.

    Attributes:
      records: records of the images.
      maps: anomaly maps.
      summaries: summaries of the maps; see `image_score.summaries`.
      masks: defect pixels; all False if unknown.
      known: whether the mask is known.
      digests: SHA-256 of the image files.
      samples: see `scores.Anomalies`.
      sizes: sizes of the images as stored, (height, width).
      facts: facts about the masks; see `image_cache.MaskFacts`.
    """

    records: Sequence[Record]
    maps: Float32[np.ndarray, "n h w"]
    summaries: Float32[np.ndarray, "n _k"]
    masks: Bool[np.ndarray, "n h w"]
    known: Bool[np.ndarray, " n"]
    digests: UInt8[np.ndarray, "n 32"]
    samples: Float32[np.ndarray, "n _s"]
    sizes: Int32[np.ndarray, "n 2"]
    facts: Int32[np.ndarray, "n 4"]


def measure(
    detector: Scorer,
    source: Source,
    what: str,
    cache: image_cache.ImageCache | None,
    start: int = 0,
    embeddings: Embeddings | None = None,
) -> Iterator[Part]:
    """Measure a source batch by batch; each process gets all processes' measures.

    Args:
      detector: fitted model. If it leaves images out, the source consists of such groups; see
        `detector.measure_pixels`.
      source: images to measure.
      what: description of the pass for the progress bar.
      cache: cache of preprocessed images, or None.
      start: number of leading images to pass over, a multiple of the batch size.
      embeddings: embeddings of images without masks. If it has all of the source's, no file is
        read.

    Yields:
      Measures of consecutive images, padding removed.
    """
    config, devices, left_out = detector.config, parallel.every(), detector.left_out
    if left_out > 1:  # whole groups
        least = math.lcm(left_out, devices.total)
        size = max(1, config.batch_size // least) * least
        config = dataclasses.replace(config, batch_size=size)
    if embeddings is not None and embeddings.hold(source.records):
        yield from _measure_kept(detector, source, config, what, embeddings)
        return
    few: dict[str, int] = {}
    for batch in passes.batches(source, config, what, cache, devices, start):
        names = [str(record.image) for record in batch.records]
        measures = detector.measure(batch.images, names)
        padding = len(batch.images) - len(batch.records)
        nothing = np.zeros(config.image.size, bool)
        masks = [nothing if mask is None else mask for mask in batch.masks]
        own: dict[str, Any] = {
            **vars(measures),
            "masks": np.stack(masks + padding * [nothing]),
            "known": np.array([mask is not None for mask in batch.masks] + padding * [False]),
            "digests": batch.digests,
            "sizes": np.array([*batch.sizes, *(padding * [(0, 0)])], np.int32),
            "facts": np.array([*batch.facts, *(padding * [image_cache.NO_MASK])], np.int32),
        }
        valid, every = parallel.gather((batch.valid, own))
        every = {name: x[valid] for name, x in every.items()}
        end = start + int(np.sum(valid))
        few |= passes.few_levels(batch)
        yield Part(source.records[start:end], **every)
        start = end
    if not left_out:  # otherwise the fit has warned
        passes.warn_few_levels(few, len(source.records), devices)


def _measure_kept(
    detector: Scorer, source: Source, config: Config, what: str, embeddings: Embeddings
) -> Iterator[Part]:
    # Not above: it imports JAX, which other runtimes do without.
    from padim_jax.detector import detector as detector_lib

    assert isinstance(detector, detector_lib.Detector)
    devices, records = parallel.every(), source.records
    size = passes.batch_size(source, config, devices)
    name = f"{config.category} {what}".lstrip()
    with progress.bar(len(records), name, devices.process == 0) as shown:
        for start in range(0, len(records), size):
            part = records[start : start + size]
            levels = embeddings.take(part, size)
            names = [str(record.image) for record in part]
            own = size // devices.processes
            measures = detector_lib.measure_levels(
                detector, levels, names[devices.process * own :][:own]
            )
            every: dict[str, Any] = parallel.gather(vars(measures))
            count, facts = (
                len(part),
                [embeddings.facts[record.relative_path] for record in part],
            )
            yield Part(
                part,
                **{name: x[:count] for name, x in every.items()},
                masks=np.broadcast_to(False, (count, *config.image.size)),
                known=np.zeros(count, bool),
                digests=np.stack([fact.digest for fact in facts]),
                sizes=np.stack([fact.size for fact in facts]),
                facts=np.array(count * [image_cache.NO_MASK], np.int32),
            )
            shown.update(count)
