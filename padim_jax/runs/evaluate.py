"""A test set -> its metrics, table, report and pictures in a results folder."""

import dataclasses
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config
from padim_jax.core import calibration as calibration_lib
from padim_jax.core import metrics
from padim_jax.core import suspects as suspects_lib
from padim_jax.core.suspects import Suspects
from padim_jax.data import (
    copies,
    dataset_splits,
    image_cache,
    input_pipeline,
    inputs,
    masks,
    survey,
)
from padim_jax.data import summary as summary_lib
from padim_jax.data.files import shown
from padim_jax.data.records import Skipped, Source
from padim_jax.detector import grid, memory, scoring_pass
from padim_jax.detector import scores as scores_lib
from padim_jax.detector.scores import Scorer
from padim_jax.devices import parallel
from padim_jax.errors import DataWarning
from padim_jax.output import figures, html, predictions, results
from padim_jax.runs import results_folder
from padim_jax.system import paths, progress
from padim_jax.system.paths import Path


def evaluate(
    config: Config, detector: Scorer, source: Source, workdir: Path, overwrite: bool = False
) -> dict:
    """Score a test set and write metrics, scores, maps and pictures.

    Args:
      config: dataset and outputs.
      detector: fitted.
      source: normal and anomalous images.
      workdir: where the results go; files of an earlier evaluation are replaced.
      overwrite: replace those of another data set, which are kept otherwise.

    Returns:
      What metrics.json holds; of several processes, in the first.

    Raises:
      UserError: no test images, an unreadable one, too little memory for their maps,
        another process writes there, or there are results of another data set.
    """
    dataset_splits.require_test_images(config, source)
    tests = len(source.records)
    detector.require_memory(tests)
    with results_folder.writing_results(workdir):
        identity = inputs.read(config, {"test": source}, parallel.every())
        if not overwrite:
            results_folder.require_same_data(workdir, identity)
        seen = dataclasses.replace(config, image=detector.config.image)
        sources, skipped = scoring_pass.readable(seen, {"test": source})
        sources, summary = take_survey(sources, seen, detector)
        return evaluate_unlocked(
            config, detector, sources["test"], workdir, skipped, identity, summary
        )


def evaluate_unlocked(
    config: Config,
    detector: Scorer,
    source: Source,
    workdir: Path,
    skipped: Sequence[Skipped],
    identity: Mapping[str, Any],
    summary: summary_lib.Summary,
    suspects: Suspects | None = None,
) -> dict:
    """Evaluate as `evaluate` does, in a results folder that the caller has locked."""
    if parallel.every().process == 0:  # which keeps the maps
        memory.require_for_maps(config, len(source.records))
    # While the device computes, for the results that follow.
    threading.Thread(target=results.import_libraries).start()
    scored, read = score(detector, source)
    found = _summarize_masks(config, source, scored, read)
    summary = dataclasses.replace(summary, masks=found)
    said = (
        []
        if found is None
        else summary_lib.mask_warnings(found, config.image.size, config.metrics.resolution)
    )
    survey.warn(said, parallel.every())
    if scored is None:
        return {}
    resolution = config.metrics.resolution
    if resolution == "full":
        seen = dataclasses.replace(config, image=detector.config.image)
        scored = dataclasses.replace(scored, pixels=_full_pixels(seen, source, scored, read))
    defects = sum(int(mask.sum()) for mask in scored.masks if mask is not None)
    memory.require_for_maps(config, len(source.records), defects / scored.maps.size)
    if resolution == "model":
        scored = results.with_pixels(scored)
    measured = results.measure(scored, detector.calibration, resolution)
    scored = results.locate(scored, measured, grid.patch_size(detector.config))
    measured = results.with_in_place(scored, measured)
    if suspects is not None and suspects.count:
        measured["suspects"] = suspects_lib.to_dict(suspects)
    if (transfer := measured["transfer"]) and transfer["unlike"]:
        warnings.warn(DataWarning(results.transfer_text(transfer)), stacklevel=2)
    maps = grid.scored_pixels(detector.config.image, scored.maps)
    scale = figures.color_scale(maps, scored.labels.astype(int))
    measured["color_scale"] = [scale.low, scale.high]
    measured["detector"] = detector.fingerprints[0]
    measured[inputs.KEY] = {**identity, "weights": detector.weights.sha256}
    line = None if found is None else summary_lib.mask_line(found, config.image.size)
    if line is not None:
        print(line)
    levels = [  # warned of by the passes that decode
        input_pipeline.few_levels(split.few_levels, split.images)
        for split in summary.splits.values()
        if split.few_levels
    ]
    measured["data"] = summary_lib.to_dict(summary) | {
        "mask_line": line,
        "warnings": [
            *summary_lib.warnings(summary),
            *levels,
            *said,
        ],
    }
    known = {digest.tobytes() for digest in detector.images}
    measured["leaks"] = [
        record.relative_path
        for record, digest in zip(source.records, read.digests, strict=True)
        if digest.tobytes() in known
    ]
    measured["train_images"] = detector.count
    measured["skipped"] = [dataclasses.asdict(one) for one in skipped]
    cache = image_cache.open_cache(config.cache)

    def load_image(index: int) -> UInt8[np.ndarray, "h w 3"]:
        return input_pipeline.load_image(source, detector.config.image, index, cache)

    with results_folder.replacing_results(workdir) as place:
        results.write_json(place / results_folder.CONFIG, config_lib.to_dict(config))
        if config.outputs.report:
            page = html.run_page(config, scored, measured, load_image, suspects)
            paths.write(place / results_folder.REPORT, page.encode())
            worst = html.thumbnails(scored, scale, load_image)
            results.write_json(place / results_folder.THUMBNAILS, worst)
        results.write_skipped(place, skipped)
        results.write(place, config, scored, measured, load_image, detector.calibration)
    print(f"\n{results.table(config, measured)}\n\nresults: {workdir}")
    return measured


@dataclasses.dataclass(frozen=True)
class _Read:
    """Facts read in a pass over a test set; see `scoring_pass.Part`."""

    digests: UInt8[np.ndarray, "n 32"]
    sizes: Int32[np.ndarray, "n 2"]
    facts: Int32[np.ndarray, "n 4"]


def score(detector: Scorer, source: Source) -> tuple[results.Scored | None, _Read]:
    """Score a test set; return scores, in the first process, and facts that were read.

    Raises:
      UserError: most of the masks are a defect by more than half; see `masks.FullCheck`.
    """
    scores_lib.require_scorable(detector)
    check = masks.FullCheck(sum(record.mask is not None for record in source.records))
    checked = detector.config.dataset.inverted_masks == "check"
    cache = image_cache.open_cache(detector.config.cache)
    parts = []
    read: list[_Read] = []
    for part in scoring_pass.measure(detector, source, "evaluate", cache):
        read.append(_Read(part.digests, part.sizes, part.facts))
        if checked:
            for record, (defect, *_), size in zip(
                part.records, part.facts, part.sizes, strict=True
            ):
                if record.mask is not None:
                    check.add(shown(record.mask), int(defect), int(np.prod(size)))
        if parallel.every().process == 0:
            parts.append(part)
    every = _Read(
        *(
            np.concatenate([getattr(part, field.name) for part in read])
            for field in dataclasses.fields(_Read)
        )
    )
    if not parts:
        return None, every
    known_masks = [
        mask if known else None
        for part in parts
        for mask, known in zip(part.masks, part.known, strict=True)
    ]
    maps = np.concatenate([part.maps for part in parts])
    scores = scores_lib.image_scores(
        detector, np.concatenate([part.summaries for part in parts])
    )
    scored = results.Scored(
        source.records,
        known_masks,
        maps,
        scores,
        aspects=[
            input_pipeline.aspect(detector.config.image, size) for size in every.sizes.tolist()
        ],
        inside=grid.inside(detector.config.image),
    )
    return _with_regions(detector, scored, every.sizes), every


def _with_regions(
    detector: Scorer, scored: results.Scored, sizes: Int32[np.ndarray, "n 2"]
) -> results.Scored:
    """Return the test set with its regions and verdicts, if there are thresholds."""
    config, thresholds = detector.config, detector.calibration
    if thresholds is None:
        return scored
    regions, boxes = [], []
    for record, anomaly_map, size in zip(scored.records, scored.maps, sizes, strict=True):
        seen = input_pipeline.view(config.image, record.relative_path)
        place = input_pipeline.frame(config.image, size.tolist(), seen)
        found = scores_lib.find_regions(
            config, anomaly_map, thresholds.pixel_threshold, size.tolist(), seen
        )
        regions.append(found)
        boxes.append([place.on_map(region.box) for region in found])
    has_region = np.array([bool(found) for found in regions], bool)
    high = scored.scores >= np.float32(thresholds.image_threshold)
    called = calibration_lib.decided(config.decide, high, has_region)
    return dataclasses.replace(scored, regions=regions, boxes=boxes, called=called)


def _summarize_masks(
    config: Config, source: Source, scored: results.Scored | None, read: _Read
) -> summary_lib.Masks | None:
    """In the first process, which alone has the masks; None in the others."""
    if scored is None:
        return None
    pixels = config.image.size[0] * config.image.size[1]
    found = []
    for i, record in enumerate(source.records):
        mask = scored.masks[i]
        if record.mask is not None and mask is not None:
            defect, *regions = read.facts[i].tolist()
            size, left = int(np.prod(read.sizes[i])), int(np.count_nonzero(mask))
            found.append(
                summary_lib.Mask(record.relative_path, size, defect, pixels, left, *regions)
            )
    return summary_lib.summarize_masks(found)


def _full_pixels(
    config: Config, source: Source, scored: results.Scored, read: _Read
) -> metrics.PixelMetrics:
    """Pixel metrics at the masks' own sizes; masks are read again, and never kept."""
    areas = np.prod(read.sizes.astype(np.int64), axis=1)
    memory.require_for_full(int(areas.max()), int(read.facts[:, 0].sum(dtype=np.int64)))
    known = np.array([mask is not None for mask in scored.masks])

    def load(index: int) -> tuple[np.ndarray, np.ndarray]:
        record, (height, width) = source.records[index], read.sizes[index].tolist()
        seen = input_pipeline.view(config.image, record.relative_path)
        bar.update()
        full = predictions.restore_map(scored.maps[index], (height, width), config.image, seen)
        if record.mask is None:
            return np.zeros(full.shape, bool), full
        content = source.read(index)[1]
        assert content is not None
        return masks.decode(content, shown(record.mask)), full

    kinds = [record.defect_type for record in source.records]
    total = len(known) + int(np.count_nonzero(known & scored.labels))
    with progress.bar(total, "full resolution", parallel.every().process == 0) as bar:
        return metrics.stream_pixels(scored.labels, kinds, load, known)


def take_survey(
    sources: Mapping[str, Source],
    config: Config,
    detector: Scorer | None = None,
    cached: bool = True,
) -> tuple[dict[str, Source], summary_lib.Summary]:
    """Read the images' files, print what they are, and warn of what is implausible.

    Args:
      sources: images, by the name of their split.
      config: how images are decoded.
      detector: whose images must not be among them, if it is fitted already.
      cached: keep what is decoded; not of images that are seen once.

    Returns:
      The same images, of which copies among those to be fitted count once; and the summary.
    """
    devices = parallel.every()
    fitted = detector and {digest.tobytes() for digest in detector.images}
    cache = image_cache.open_cache(config.cache) if cached else None
    files = survey.read(sources, devices, config.image, cache)
    summary = summary_lib.summarize(files, fitted)
    survey.tell(summary, devices)
    known = dict(sources)
    if "train" in known:  # read once more for it otherwise
        hashes = survey.hashes(files["train"])
        known["train"] = copies.distinct(known["train"], devices, hashes)
    return known, summary
