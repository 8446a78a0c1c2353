"""Normal images -> the thresholds of a fitted model, kept beside it."""

import collections
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, UInt8

from padim_jax.config.settings import Config
from padim_jax.core import calibration as calibration_lib
from padim_jax.core import combined_score, regions
from padim_jax.core import suspects as suspects_lib
from padim_jax.core.calibration import Calibration
from padim_jax.core.suspects import Suspects
from padim_jax.data import copies, image_cache, input_pipeline, sampling
from padim_jax.data.records import Record, Source
from padim_jax.detector import detector as detector_lib
from padim_jax.detector import grid, scoring_pass
from padim_jax.detector.detector import Detector
from padim_jax.detector.embeddings import Embeddings
from padim_jax.devices import parallel
from padim_jax.errors import DataWarning, UserError
from padim_jax.store import statistics_store
from padim_jax.store.statistics_store import OnDisk, Store
from padim_jax.system import locks, progress
from padim_jax.system.paths import Path


def require_groups(config: Config, source: Source) -> None:
    """Raise UserError unless the images make up enough groups for thresholds."""
    if not (pattern := config.threshold.groups):
        return
    count = len(set(sampling.groups(source.records, pattern).tolist()))
    if count < calibration_lib.MIN_IMAGES:
        raise UserError(
            f"config.threshold.groups={pattern!r}: {count} group(s) of {len(source.records)} "
            f"normal images; thresholds need at least {calibration_lib.MIN_IMAGES}. More parts "
            "are needed, or no thresholds with --config.threshold.normal=none"
        )


def calibrate(detector: Detector, source: Source, origin: str, path: Path) -> Detector:
    """Find thresholds on normal images, and keep them beside the model.

    Args:
      detector: fitted. For images left out its Gaussians are given up, since those that leave
        images out take their place in memory; go on with the result, or after an error with
        what `load` returns.
      source: normal images. Of files that are the same the first one counts.
      origin: how they relate to the model, one of `calibration.ORIGINS`. "leave_one_out" takes
        all images that were fitted, "leave_some_out" some of them, each once. "held_out" and
        "given" take images that were not fitted: of the former, copies of fitted images are
        left out with a `DataWarning`; of the latter, they are an error.
      path: the checkpoint's folder.

    Returns:
      The detector with its thresholds.

    Raises:
      UserError: too few images, images that contradict `origin`, an unreadable one, or another
        process writes to the checkpoint.
    """
    with locks.held(path, parallel.every().process):
        return find(detector, source, origin, OnDisk(path))


def find(
    detector: Detector,
    source: Source,
    origin: str,
    store: Store,
    embeddings: Embeddings | None = None,
) -> Detector:
    """Find thresholds as `calibrate` does, in a store that no other process uses.

    Args:
      detector: see `calibrate`.
      source: see `calibrate`.
      origin: see `calibrate`.
      store: store of its statistics.
      embeddings: embeddings of the source's images, if they are at hand.

    Returns:
      The detector with its thresholds.
    """
    return find_ranked(detector, source, origin, store, embeddings)[0]


def find_ranked(
    detector: Detector,
    source: Source,
    origin: str,
    store: Store,
    embeddings: Embeddings | None = None,
) -> tuple[Detector, Suspects | None]:
    """Find thresholds as `find` does, and rank left-out images in the first process."""
    config, given = detector.config, origin == "given"
    left_out = origin in ("leave_one_out", "leave_some_out")
    source = copies.distinct(source, parallel.every())
    if origin == "held_out":
        source = without_fitted(detector.images, source)
    if given:  # before the pass, which compares what it reads
        fitted_images = set(map(bytes, detector.images))
        for record, digest in zip(source.records, map(bytes, source.digests), strict=True):
            _require_unknown(record, digest in fitted_images, origin)
    count, pattern = len(source.records), config.threshold.groups
    fitted = len(set(map(bytes, detector.images)))
    if origin == "leave_some_out" and pattern and count < fitted:
        raise UserError(
            f"thresholds: {count} of the {fitted} images that were fitted, and "
            f"config.threshold.groups={pattern!r}; expected all of them, since those of a "
            "group that stay in the model lower the scores of the others"
        )
    if origin == "leave_one_out" and count != fitted:
        raise UserError(
            f"thresholds: {count} images to leave out one by one, and the model was fitted to "
            f"{fitted}; expected all of those, each once"
        )
    groups = sampling.groups(source.records, pattern)
    # One pass for each size of a group, of which each takes other Gaussians.
    passes = _by_size(groups) if left_out else [(0, np.arange(count))]
    order = np.concatenate([numbers for _, numbers in passes])
    seen = scoring_pass.for_new_images(detector) if given else detector
    # Given ones are seen once; see `predict`.
    cache = None if given else image_cache.open_cache(config.cache)
    samples: list[np.ndarray] = []
    summaries: list[np.ndarray] = []

    def parts() -> Iterator[tuple[np.ndarray, ...]]:
        nonlocal seen
        unused = collections.Counter(map(bytes, detector.images))
        for size, numbers in passes:
            chosen = sampling.part(source, numbers.tolist())
            if size:
                seen = statistics_store.refinalize(seen, store, size)
            for part in scoring_pass.measure(
                seen, chosen, "calibrate", cache, embeddings=embeddings
            ):
                for record, digest in zip(part.records, map(bytes, part.digests), strict=True):
                    if not left_out:
                        _require_unknown(record, digest in unused, origin)
                        continue
                    _require_fitted(record, digest in unused, unused[digest])
                    unused[digest] -= 1
                if sum(map(len, samples)) < copies.MOST_COMPARED:
                    samples.append(part.samples)
                summaries.append(part.summaries)
                pixels = grid.scored_pixels(config.image, part.maps)
                yield pixels, part.summaries, *_peaks(config, part)

    within = groups[order] if pattern else None
    thresholds = _thresholds(detector, parts(), count, origin, within)
    names = [record.relative_path for record in source.records]
    if not pattern:  # the order is then the source's
        thresholds = _with_warning(thresholds, samples, names)
    if not left_out:
        return _keep_thresholds(detector, thresholds, store), None
    scores = combined_score.of_normal(np.concatenate(summaries), within)
    scores = scores[np.argsort(order)]  # in the source's order
    shown = np.argsort(-scores, kind="stable")[: suspects_lib.SHOWN].tolist()
    seen, measured = _measure_again(
        seen, store, source, passes, groups, shown, cache, embeddings
    )
    detector = statistics_store.refinalize(seen, store)
    detector = _keep_thresholds(detector, thresholds, store)
    if parallel.every().process > 0:
        return detector, None
    ranked = _rank(config, names, scores, groups, thresholds)
    images = [input_pipeline.load_image(source, config.image, i, cache) for i in shown]
    maps = [measured[i][0] for i in shown]
    aspects = [input_pipeline.aspect(config.image, measured[i][1]) for i in shown]
    return detector, dataclasses.replace(ranked, images=images, maps=maps, aspects=aspects)


def _measure_again(
    detector: Detector,
    store: Store,
    source: Source,
    passes: Sequence[tuple[int, Int[np.ndarray, " _n"]]],
    groups: Int[np.ndarray, " n"],
    images: Sequence[int],
    cache: image_cache.ImageCache | None,
    embeddings: Embeddings | None,
) -> tuple[Detector, dict[int, tuple[Float32[np.ndarray, "h w"], list[int]]]]:
    """Return the left-out map and the file's size (height, width) of a few images.

    Args:
      detector: model that leaves out groups of the last pass's size.
      store: store of its statistics.
      source: images that were fitted.
      passes: size of the groups, and numbers of their images, of each pass.
      groups: group number of each image of the source.
      images: numbers of the images in the source.
      cache: cache of preprocessed images, or None.
      embeddings: see `find`.

    Returns:
      The detector, which may leave out groups of another size, and map and size by number.
    """
    measured = {}
    for size, numbers in reversed(passes):
        numbers = numbers[np.isin(groups[numbers], groups[images])]  # groups are left out whole
        if not len(numbers):
            continue
        detector = statistics_store.refinalize(detector, store, size)
        left = iter(numbers.tolist())
        part = sampling.part(source, numbers.tolist())
        for measures in scoring_pass.measure(
            detector, part, "calibrate", cache, embeddings=embeddings
        ):
            for anomaly_map, pixels in zip(measures.maps, measures.sizes.tolist(), strict=True):
                if (number := next(left)) in images:
                    measured[number] = anomaly_map.copy(), pixels
    return detector, measured


def _rank(
    config: Config,
    names: Sequence[str],
    scores: Float32[np.ndarray, " n"],
    groups: Int[np.ndarray, " n"],
    found: Calibration,
) -> Suspects:
    """Rank images by the scores that they have left out, and print the odd ones."""
    rate = config.threshold.image_rate
    ranked = suspects_lib.rank(names, scores, groups, rate, found.image_threshold)
    progress.say(suspects_lib.text(ranked))
    return ranked


def _peaks(config: Config, part: scoring_pass.Part) -> list[Float32[np.ndarray, " n"]]:
    """Return the maps' peaks, if images are called anomalous by regions."""
    if config.decide == "score":
        return []
    rule, found = config.regions, []
    pixels = grid.scored_pixels(config.image, part.maps[:1]).size
    for record, anomaly_map, size in zip(part.records, part.maps, part.sizes, strict=True):
        frame = input_pipeline.frame(config.image, size.tolist())
        try:
            found.append(regions.peak(anomaly_map, frame, rule.min_area, rule.close, pixels))
        except ValueError as error:
            raise UserError(
                f"config.regions.min_area={rule.min_area:g}: {record.image}: {error}"
            ) from error
    return [np.array(found, np.float32)]


def find_from_model(
    detector: Detector, store: Store, names: Sequence[str] | None = None
) -> tuple[Detector, Suspects | None]:
    """Thresholds of all images fitted, whose embeddings the model holds.

    Args:
      detector: see `calibrate`.
      store: where its statistics are kept.
      names: of the images, in the order they were fitted, if they are known.

    Returns:
      The detector with its thresholds; and, if there are names, how the images rank, in the
      first process.
    """
    left_out = statistics_store.refinalize(detector, store, 1)
    samples: list[np.ndarray] = []
    summaries: list[np.ndarray] = []

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for measures, valid in detector_lib.measure_samples(left_out):
            own: Any = (valid, measures.maps, measures.summaries, measures.samples)
            valid, maps, part, sample = parallel.gather(own)
            samples.append(sample[valid])
            summaries.append(part[valid])
            pixels = grid.scored_pixels(detector.config.image, maps[valid])
            yield pixels, part[valid]

    thresholds = _thresholds(detector, parts(), detector.count, "leave_one_out")
    numbered = [f"image {i + 1}" for i in range(detector.count)]
    thresholds = _with_warning(thresholds, samples, names or numbered)
    detector = statistics_store.refinalize(left_out, store)
    detector = _keep_thresholds(detector, thresholds, store)
    if names is None or parallel.every().process > 0:
        return detector, None
    groups = np.arange(len(names))
    scores = combined_score.of_normal(np.concatenate(summaries))
    return detector, _rank(detector.config, names, scores, groups, thresholds)


def _thresholds(
    detector: Detector,
    parts: Iterable[tuple[np.ndarray, ...]],
    count: int,
    origin: str,
    groups: Int[np.ndarray, " n"] | None = None,
) -> Calibration:
    """Return thresholds from the measures of `count` normal images."""
    config, threshold = detector.config, detector.config.threshold
    rates = threshold.image_rate, threshold.pixel_rate
    try:
        found = calibration_lib.calibrate(parts, count, origin, *rates, groups, config.decide)
    except ValueError as error:
        raise UserError(
            f"thresholds: {error}. More normal images are needed, or none at all with "
            "--config.threshold.normal=none"
        ) from error
    if config.decide == "score":
        return found
    rule = config.regions
    return dataclasses.replace(found, min_area=rule.min_area, close=rule.close)


def _with_warning(
    found: Calibration, samples: Sequence[np.ndarray], names: Sequence[str]
) -> Calibration:
    """The same thresholds, with a warning if many of their images are near copies."""
    near = copies.near_copies(np.concatenate(samples))
    return dataclasses.replace(found, warning=copies.near_copies_text(near, names))


def _keep_thresholds(detector: Detector, found: Calibration, store: Store) -> Detector:
    """The detector with thresholds, which are kept beside the model."""
    copied = detector.count - len(set(map(bytes, detector.images)))
    if copied and found.origin.startswith("leave_") and not found.warning:
        # Fitted by an older version, to which each copy counted.
        warning = (
            f"{copied} of the {detector.count} images that were fitted are copies of others: "
            "new images will be called anomalous more often than promised. Fit again, which "
            "counts each image once"
        )
        found = dataclasses.replace(found, warning=warning)
    store.write_thresholds(found, detector_lib.fingerprint(detector))
    if found.warning and parallel.every().process == 0:
        warnings.warn(DataWarning(f"thresholds: {found.warning}"), stacklevel=2)
    progress.say(calibration_lib.text(found))
    return dataclasses.replace(detector, calibration=found)


def without_fitted(images: UInt8[np.ndarray, "n 32"], source: Source) -> copies.Distinct:
    """Leave out the validation images that a model is fitted to, with a `DataWarning`.

    Args:
      images: SHA-256 of the files that the model is, or will be, fitted to.
      source: validation images. Of files that are the same the first one counts.

    Raises:
      UserError: too few are left for thresholds.
    """
    devices = parallel.every()
    source, fitted = copies.distinct(source, devices), set(map(bytes, images))
    known = [digest in fitted for digest in map(bytes, source.digests)]
    if not any(known):
        return source
    names = [str(source.records[i].image) for i in np.flatnonzero(known).tolist()]
    message = (
        f"{len(names)} of {len(known)} validation images are copies of images that the model "
        f"is fitted to ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    )
    others = np.flatnonzero(~np.array(known)).tolist()
    if len(others) < calibration_lib.MIN_IMAGES:
        raise UserError(
            f"{message}; {len(others)} are left, and thresholds need at least "
            f"{calibration_lib.MIN_IMAGES}. Expected other images, or "
            "--config.threshold.normal=leave_one_out"
        )
    if devices.process == 0:
        warnings.warn(
            DataWarning(
                f"{message}: left out of the thresholds, which say nothing of new images "
                f"otherwise; {len(others)} images remain. Check how the dataset was split"
            ),
            stacklevel=2,
        )
    return source.part(np.array(others))


def _by_size(
    groups: Int[np.ndarray, " n"],
) -> list[tuple[int, Int[np.ndarray, " _n"]]]:
    """Each size of a group, and the images of such groups, those of a group side by side."""
    sizes = np.bincount(groups)[groups]
    order = np.lexsort([groups, sizes])
    return [(int(size), order[sizes[order] == size]) for size in np.unique(sizes)]


def _require_unknown(record: Record, fitted: bool, origin: str) -> None:
    """Refuse images that the model was fitted to: they score lower than others."""
    if fitted:
        raise UserError(
            f"{'--input' if origin == 'given' else 'thresholds'}: {record.image} is one of the "
            "images that the model was fitted to, and scores lower than others do; expected "
            "normal images that it does not know"
        )


def _require_fitted(record: Record, fitted: bool, unused: int) -> None:
    """Only images that were fitted can be left out, each as often as it was fitted."""
    if not fitted:
        raise UserError(
            f"thresholds: {record.image} is none of the images that the model was fitted to; "
            "expected those, since no others can be left out of it"
        )
    if not unused:
        raise UserError(
            f"thresholds: {record.image} is there more often than it was fitted; expected each "
            "image once"
        )
