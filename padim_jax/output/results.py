"""Outputs of an evaluation: the table, metrics.json, scores.csv, maps, pictures."""

import concurrent.futures
import dataclasses
import importlib
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image

from padim_jax.config.settings import Config
from padim_jax.core import calibration as calibration_lib
from padim_jax.core import metrics, verdicts
from padim_jax.core.calibration import Calibration
from padim_jax.core.regions import Box, Region
from padim_jax.core.suspects import Suspects
from padim_jax.data.files import shown
from padim_jax.data.records import GOOD, Record, Skipped
from padim_jax.errors import UserError
from padim_jax.output import figures, published, regions_file
from padim_jax.output.tables import Table
from padim_jax.system import paths
from padim_jax.system.paths import Path

# With config.outputs.figures="some": number of the highest scored, and of the lowest scored,
# images drawn per defect type.
_SOME = 2

SKIPPED = "skipped.csv"
SUSPECTS = "suspects.csv"
_SUSPECTS_HEADER = ("rank", "path", "score", "expected", "suspect")
FULL = "pixel metrics at the masks' own sizes; published ones are at the model's"
_SHOWN = 3  # leaks, or skipped images, that are named
_LONGEST_NAME = 200  # bytes of a picture's name, of 255 allowed

# Name in the table and key in metrics.json and in the published results.
_ROWS = (
    ("image AUROC", "image_auroc"),
    ("image AP", "image_ap"),
    ("image F1-max", "image_f1_max"),
    ("pixel AUROC", "pixel_auroc"),
    ("pixel AP", "pixel_ap"),
    ("pixel F1-max", "pixel_f1_max"),
    ("AUPRO 0.3", "aupro"),
)


@dataclasses.dataclass(frozen=True)
class Scored:
    """A test set and the detector's results for it.

    Attributes:
      records: records of the n images.
      masks: defect pixels; None where unknown.
      maps: anomaly maps.
      scores: image scores.
      pixels: pixel metrics, at the maps' size or at the masks' own sizes; see `with_pixels`.
      aspects: width over height of the maps' contents, in the proportions of the image files
        (see `input_pipeline.aspect`); None if they are the maps'.
      regions: for each image its regions above the pixel threshold from normal images, in
        pixels of the image file; None without this threshold.
      boxes: their boxes in pixels of the maps.
      inside: pixels of the maps inside the region of interest; None without one.
      called: whether each image is called anomalous by thresholds from normal images, as
        `config.decide` says; None without them.
      in_place: whether the strongest region of each map lies at the image's defect (see
        `locate`), None for images without a known defect pixel; None if that is all images.
    """

    records: Sequence[Record]
    masks: Sequence[Bool[np.ndarray, "h w"] | None]
    maps: Float32[np.ndarray, "n h w"]
    scores: Float32[np.ndarray, " n"]
    pixels: metrics.PixelMetrics | None = None
    aspects: Sequence[float] | None = None
    in_place: Sequence[bool | None] | None = None
    regions: Sequence[Sequence[Region]] | None = None
    boxes: Sequence[Sequence[Box]] | None = None
    called: Bool[np.ndarray, " n"] | None = None
    inside: Bool[np.ndarray, "h w"] | None = None

    @property
    def outside(self) -> Bool[np.ndarray, "h w"] | None:
        """Return the pixels outside of the region of interest, or None."""
        return None if self.inside is None else ~self.inside

    def scored_pixels(self, values: np.ndarray) -> np.ndarray:
        """Return those of values (..., h, w) that are inside: (..., 1, k), or all of them."""
        return values if self.inside is None else values[..., None, self.inside]

    def drawn_size(self, index: int, side: int | None = None) -> tuple[int, int]:
        """Return height and width at which an image is drawn; see `figures.drawn_size`.

        Args:
          index: number of the image.
          side: maximum of the longer side; None for no limit.

        Returns:
          Height and width in pixels.
        """
        aspect = None if self.aspects is None else self.aspects[index]
        return figures.drawn_size(self.maps.shape[1:], aspect, side)

    @property
    def labels(self) -> Bool[np.ndarray, " n"]:
        """Return True for anomalous images."""
        return np.array([record.label == 1 for record in self.records])


def import_libraries() -> None:
    """Import what the functions below import on first use, which takes half a second."""
    for name in ("scipy.ndimage", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        importlib.import_module(name)


def with_pixels(scored: Scored) -> Scored:
    """Return the test set with its pixel metrics at the maps' size, if it has masks."""
    if (masks := _masks(scored)) is None:
        return scored
    types = [record.defect_type for record in scored.records]
    pixels = metrics.pixel_metrics(scored.labels, types, masks, scored.maps, scored.inside)
    return dataclasses.replace(scored, pixels=pixels)


def _masks(scored: Scored) -> Bool[np.ndarray, "n h w"] | None:
    """Return the masks, all False where unknown; None if no anomalous image has one."""
    known = np.array([mask is not None for mask in scored.masks])
    if scored.labels.any() and not known[scored.labels].any():
        return None
    blank = np.zeros(scored.maps.shape[1:], bool)
    return np.stack([blank if mask is None else mask for mask in scored.masks])


def measure(
    scored: Scored, calibration: Calibration | None = None, resolution: str = "model"
) -> dict[str, Any]:
    """Return the contents of metrics.json for a test set.

    Args:
      scored: the test set.
      calibration: calibration of the detector, if it has one.
      resolution: size of `scored.pixels`, "model" or "full".

    Returns:
      All metrics (see `metrics.evaluate`), of which those named f1 come with the thresholds
      that are best on this test set's own labels; `test_images` and `anomalous_images`, their
      numbers; `resolution` at which maps and masks were compared, "model" or "full";
      `transfer`, the comparison of normal test images with those behind the thresholds (see
      `verdicts.Transfer`), or None; `normal_threshold`, the outcome of thresholds from normal
      images alone, always at the model's size (see `calibration.outcome`), or None.
    """
    scored = with_pixels(scored) if scored.pixels is None else scored
    measured = metrics.evaluate(
        scored.labels,
        scored.scores,
        [record.defect_type for record in scored.records],
        _masks(scored),
        scored.maps,
        np.array([mask is not None for mask in scored.masks]),
        scored.pixels,
    )
    masks = [None if mask is None else scored.scored_pixels(mask) for mask in scored.masks]
    maps = scored.scored_pixels(scored.maps)
    outcome = calibration and calibration_lib.outcome(
        calibration, scored.labels, scored.scores, maps, masks, scored.called
    )
    return measured | {
        "test_images": len(scored.records),
        "anomalous_images": int(scored.labels.sum()),
        "resolution": resolution,
        "normal_threshold": outcome,
        "transfer": _transfer(scored, calibration),
    }


def locate(scored: Scored, measured: Mapping[str, Any], patch: tuple[float, float]) -> Scored:
    """Determine whether the strongest region of each map lies at the image's defect.

    The strongest region is bounded like outlines: by the pixel threshold from normal images, or
    without one by that of the best F1. Without either it is the map's peak alone.

    Args:
      scored: the test set.
      measured: result of `measure`.
      patch: height and width of a patch in pixels of the maps.

    Returns:
      The test set with `in_place`; see `verdicts.in_place`.
    """
    threshold, masks = _threshold(measured, "pixel"), scored.masks
    if scored.inside is not None:
        masks = [None if mask is None else mask & scored.inside for mask in masks]
    in_place = [
        verdicts.in_place(anomaly_map, mask, np.inf if threshold is None else threshold, patch)
        if mask is not None and mask.any()
        else None
        for anomaly_map, mask in zip(scored.maps, masks, strict=True)
    ]
    known = any(place is not None for place in in_place)
    return dataclasses.replace(scored, in_place=in_place if known else None)


def with_in_place(scored: Scored, measured: dict[str, Any]) -> dict[str, Any]:
    """Add to metrics the shares of defects found, by whether they are found in place.

    Args:
      scored: result of `locate`.
      measured: result of `measure`.

    Returns:
      `measured` and, if there are defects with masks and an image threshold, `in_place`,
      overall and in `per_defect` for each type that has any: `threshold`, the lowest score
      called anomalous; `found_in_place` and `found_elsewhere`, the shares of the defects with
      masks that are called anomalous with their strongest region at the defect and elsewhere
      (see `verdicts.share`).
    """
    threshold = _threshold(measured, "image")
    if scored.in_place is None or threshold is None:
        return measured
    known = np.array([place is not None for place in scored.in_place])
    on_defect = np.array([bool(place) for place in scored.in_place])
    called = scored.scores >= np.float32(threshold)
    types = np.array([record.defect_type for record in scored.records])

    def shares(chosen: Bool[np.ndarray, " n"]) -> dict[str, Any]:
        return {
            "threshold": threshold,
            "found_in_place": verdicts.share((called & on_defect)[chosen]),
            "found_elsewhere": verdicts.share((called & ~on_defect)[chosen]),
        }

    per_defect = {
        name: values | ({"in_place": shares(chosen)} if chosen.any() else {})
        for name, values in measured["per_defect"].items()
        for chosen in [known & (types == name)]
    }
    return measured | {"per_defect": per_defect, "in_place": shares(known)}


def _transfer(scored: Scored, calibration: Calibration | None) -> dict[str, Any] | None:
    """Compare normal test images with those behind the thresholds; None if impossible.

    Groups are not compared: it is unknown which test images belong together.
    """
    if calibration is None or calibration.groups is not None:
        return None
    normal = np.array(calibration.scores)
    found = verdicts.transfer(normal, scored.scores[~scored.labels].astype(float))
    if found is None:
        return None
    level = verdicts.TRANSFER_LEVEL
    return dataclasses.asdict(found) | {"level": level, "unlike": found.unlike}


def transfer_text(found: Mapping[str, Any]) -> str:
    """Describe for a person `transfer` of metrics.json, if it is `unlike`."""
    return (
        f"normal test images are unlike the training images: {found['images']} of them score "
        f"higher than normal images of the thresholds with a probability of "
        f"{found['higher']:.2f} instead of 0.5 (p = {found['p_value']:.1g}, tested at "
        f"{found['level']:g}); thresholds do not transfer. Fit or calibrate with images as "
        "they will be"
    )


def compare(exact: Scored, half: Scored) -> dict[str, Any]:
    """Return the effect of rounding a model: metrics of both forms, and the largest changes.

    Changes are relative to the largest image score and the largest pixel.

    Args:
      exact: results of the exact form.
      half: results of the half-size form.

    Returns:
      JSON values.
    """
    before, after = measure(exact), measure(half)

    def change(old: np.ndarray, new: np.ndarray) -> float:
        return float(np.max(np.abs(new - old)) / np.max(old))

    return {
        "images": len(exact.records),
        "exact": {key: before[key] for _, key in _ROWS},
        "half": {key: after[key] for _, key in _ROWS},
        "largest_change_of_a_score": change(exact.scores, half.scores),
        "largest_change_of_a_pixel": change(exact.maps, half.maps),
    }


def comparison_table(comparison: dict[str, Any]) -> str:
    """Format the result of `compare` for a person."""
    rows = []
    for name, key in _ROWS:
        exact, half = comparison["exact"][key], comparison["half"][key]
        if exact is None or half is None:
            rows.append([name, "undefined", "", ""])
        else:
            rows.append([name, f"{exact:.4f}", f"{half:.4f}", f"{half - exact:+.4f}"])
    lines = [
        *Table(["", "exact", "half", "change"], rows).text(),
        "",
        f"on {comparison['images']} test images; image scores change by at most "
        f"{comparison['largest_change_of_a_score']:.1e} of the largest, pixels by "
        f"{comparison['largest_change_of_a_pixel']:.1e} of the largest",
    ]
    return "\n".join(lines)


def write(
    workdir: Path,
    config: Config,
    scored: Scored,
    measured: dict[str, Any],
    load_image: Callable[[int], UInt8[np.ndarray, "h w 3"]],
    calibration: Calibration | None = None,
) -> None:
    """Write everything but the table, replacing an earlier evaluation's files.

    metrics.json is deleted first and written last: if it exists, the evaluation is complete.

    Args:
      workdir: folder to write to; exists, except on object stores.
      config: outputs.{figures,maps} select what is written.
      scored: the test set.
      measured: result of `measure`.
      load_image: function from an image's number to the preprocessed image, read again for its
        picture.
      calibration: calibration of the detector, if it has one. Pictures then show its
        thresholds, else those of the best F1.
    """
    (workdir / "metrics.json").unlink(missing_ok=True)
    _write_scores(workdir / "scores.csv", scored, measured["image_f1_threshold"], calibration)
    for folder in ("maps", "figures"):
        paths.remove_folder(workdir / folder)
    for picture in ("roc_curve.png", "score_histogram.png", "overview.jpg"):
        (workdir / picture).unlink(missing_ok=True)
    if config.outputs.maps != "none":
        for record, anomaly_map in zip(scored.records, scored.maps, strict=True):
            save_map(workdir / "maps", record.relative_path, config.outputs.maps, anomaly_map)
    # Decoding and encoding release the GIL: threads use all cores.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        pictures = _draw_figures(
            workdir / "figures", config, scored, measured, load_image, pool
        )
        figures.score_histogram(
            workdir / "score_histogram.png",
            scored.scores,
            scored.labels.astype(int),
            _threshold(measured, "image"),
        )
        if defined := roc_curves(scored, measured):
            figures.roc_figure(workdir / "roc_curve.png", defined, config.title)
        few = [picture for picture in pictures if picture is not None]
    if few:
        figures.save(figures.contact_sheet(few, 1), workdir / "overview.jpg")
    write_json(workdir / "metrics.json", measured)


def write_json(path: Path, value: Any) -> None:
    """Write JSON for any reader, without NaN and escapes; the file appears when complete.

    Args:
      path: file to write.
      value: JSON values.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    content = text.encode() + b"\n"
    paths.write(path, content)


def write_skipped(folder: Path, skipped: Sequence[Skipped]) -> None:
    """List images that were left out in skipped.csv; without any, remove the file.

    Args:
      folder: folder to write to.
      skipped: the images.

    Raises:
      UserError: there is another file of this name.
    """
    table, header = folder / SKIPPED, ("path", "reason")
    _require_own_table(table, header)
    if not skipped:
        table.unlink(missing_ok=True)
        return
    paths.write(table, Table(header, [(one.path, one.reason) for one in skipped]).csv())


def write_suspects(folder: Path, suspects: Suspects | None) -> None:
    """List training images by left-out score in suspects.csv; without any, remove the file.

    Args:
      folder: folder to write to.
      suspects: the images, or None.

    Raises:
      UserError: there is another file of this name.
    """
    table, header = folder / SUSPECTS, _SUSPECTS_HEADER
    require_own_suspects(folder)
    if suspects is None:
        table.unlink(missing_ok=True)
        return
    rows = []
    for i, path in enumerate(suspects.paths):
        likely = float(suspects.expected[i])
        expected = "" if np.isnan(likely) else f"{likely:.6g}"
        rows.append((i + 1, path, suspects.scores[i], expected, int(i < suspects.count)))
    paths.write(table, Table(header, rows).csv())


def require_own_suspects(folder: Path) -> None:
    """Raise UserError if there is a file suspects.csv from elsewhere."""
    _require_own_table(folder / SUSPECTS, _SUSPECTS_HEADER)


def _require_own_table(table: Path, header: Sequence[str]) -> None:
    if table.exists() and paths.first_line(table).strip() != ",".join(header).encode():
        raise UserError(
            f"{table}: exists and is not from an earlier run; move it away or name another "
            "--workdir"
        )


def save_map(
    folder: Path, name: str, suffix: str, anomaly_map: Float32[np.ndarray, "h w"]
) -> None:
    """Write one raw map as `folder/name.npy` or `.tiff` (one float32 channel).

    The image's own suffix stays in the name: a.png and a.jpg may exist side by side.

    Args:
      folder: folder of the maps.
      name: relative path of the image.
      suffix: npy or tiff.
      anomaly_map: (h, w).
    """
    content = io.BytesIO()
    if suffix == "npy":
        np.save(content, anomaly_map)
    else:
        Image.fromarray(anomaly_map).save(content, suffix)
    paths.write(paths.below(folder, f"{name}.{suffix}"), content.getvalue())


def table(config: Config, measured: dict[str, Any]) -> str:
    """Format the metrics beside the published ones for a person.

    Args:
      config: configuration of the run.
      measured: contents of metrics.json.

    Returns:
      Several lines.
    """
    sources = _sources(config, measured)
    model = config.model
    lines = [
        f"{config.title}: {model.backbone} {'+'.join(model.layers)}, {model.channels} "
        f"channels, weights {model.weights}",
        "",
    ]
    # The first source has its difference beside it.
    names = [source.name for source in sources]
    head = ["", "this run", *names[:1], *(["difference"] if names else []), *names[1:]]
    rows = []
    for name, key in _ROWS:
        ours = measured[key]
        theirs = [source.values.get(key, {}).get(config.category) for source in sources]
        cells = ["-" if value is None else f"{value:.3f}" for value in theirs]
        if theirs:
            first = theirs[0]
            cells.insert(1, "-" if ours is None or first is None else f"{ours - first:+.3f}")
        rows.append([name, "undefined" if ours is None else f"{ours:.4f}", *cells])
    lines += Table(head, rows).text()
    if why := published.not_compared(config, config.category, measured):
        lines.append(why)
    for source in sources:
        if differing := published.differing_settings(config, source):
            lines.append(published.in_words(source.name, differing))
    if measured.get("resolution") == "full":
        lines.append(FULL)
    lines += [
        "undefined: " + reason
        for reason in dict.fromkeys(measured.get("undefined", {}).values())
    ]
    sentences = _thresholds(measured)
    if in_place := measured.get("in_place"):
        sentences.append(in_place_text(in_place))
    if (found := measured.get("transfer")) and found["unlike"]:
        sentences.append(f"warning: {transfer_text(found)}")
    if leaks := measured.get("leaks"):
        sentences.append(
            f"{len(leaks)} of {measured['test_images']} test images were trained on too: "
            f"{_some(leaks)}"
        )
    if skipped := measured.get("skipped"):
        some = _some([one["path"] for one in skipped])
        sentences.append(f"{len(skipped)} images skipped, see {SKIPPED}: {some}")
    if sentences:
        lines += ["", *sentences]
    if measured["per_defect"]:
        keys = ("image_auroc", "pixel_auroc", "aupro")
        located = bool(measured.get("in_place"))
        head, rows = ["defect type", *keys, *["found in place"] * located], []
        for name, values in measured["per_defect"].items():
            cells = ["undefined" if values[k] is None else f"{values[k]:.4f}" for k in keys]
            if located:
                place = values.get("in_place")
                cells.append(verdicts.share_text(place["found_in_place"]) if place else "-")
            rows.append([name, *cells])
        lines += ["", *Table(head, rows).text()]
    return "\n".join(lines)


def in_place_text(in_place: Mapping[str, Any]) -> str:
    """Describe for a person `in_place` of metrics.json."""
    found, elsewhere = (
        verdicts.share_text(in_place[key]) for key in ("found_in_place", "found_elsewhere")
    )
    return (
        f"found in the right place, from {in_place['threshold']:.4g}: {found} defects with "
        f"masks; {elsewhere} called anomalous elsewhere"
    )


def rate_table(normal: Mapping[str, Any]) -> Table:
    """Return a table of thresholds for other rates, and their outcomes.

    Args:
      normal: `normal_threshold` of `measure`, with its rates.
    """
    rows = []
    for one in normal["rates"]:
        if one["threshold"] is None:
            cells = [f"takes {one['images_needed']} images", "-", "-"]
        else:
            shares = (verdicts.share_text(one[key]) for key in ("found", "false_alarms"))
            cells = [f"{one['threshold']:.4g}", *shares]
        rows.append([f"{100 * one['rate']:g} %", *cells])
    return Table(
        ["false alarms", "image threshold", "found (95 % interval)", "false alarms here"], rows
    )


def comparison_rows(
    config: Config, measured: dict[str, Any]
) -> list[tuple[str, float | None, list[tuple[str, float]]]]:
    """Return the contents of `table` as data.

    Args:
      config: configuration of the run.
      measured: contents of metrics.json.

    Returns:
      For each metric its name, its value (None if undefined) and the published values by the
      name of their source; the source with the settings of this run, if there is one, comes
      first.
    """
    sources = _sources(config, measured)
    return [
        (
            name,
            measured[key],
            [
                (source.name, source.values[key][config.category])
                for source in sources
                if config.category in source.values.get(key, {})
            ],
        )
        for name, key in _ROWS
    ]


def _sources(config: Config, measured: Mapping[str, Any]) -> list[published.Published]:
    """Return sources with results for the category; those with this run's settings first."""
    if published.not_compared(config, config.category, measured):
        return []
    found = [
        source
        for source in published.applicable(config)
        if any(config.category in values for values in source.values.values())
    ]
    return sorted(found, key=lambda one: bool(published.differing_settings(config, one)))


def _some(names: Sequence[str]) -> str:
    """Return the first few names."""
    return ", ".join(map(shown, names[:_SHOWN])) + ", ..." * (len(names) > _SHOWN)


def _thresholds(measured: dict[str, Any]) -> list[str]:
    """Return sentences on the available thresholds."""
    sentences = []
    if normal := measured["normal_threshold"]:
        wanted = f"{100 * normal['image_rate']:.3g} % false alarms asked for"
        if (decide := normal.get("decide")) is not None:
            wanted += f" of verdicts by {'score or regions' if decide == 'either' else decide}"
        if normal["image_promised_rate"] > normal["image_rate"]:
            wanted += f" ({100 * normal['image_promised_rate']:.2g} % promised)"
        found = [
            f"{verdicts.share_text(normal[key])} {images}"
            for key, images in (
                ("image_false_alarms", "good images"),
                ("image_found", "anomalous ones"),
            )
            if normal[key]["total"]
        ]
        of = f"{normal['images']} normal images"
        if normal["groups"] is not None:
            of += f" in {normal['groups']} groups"
        sentences.append(
            f"threshold of {of} "
            f"({normal['origin'].replace('_', ' ')}), {wanted}: "
            f"{normal['image_threshold']:.4g}; here {', '.join(found)}"
        )
        if normal["rates"]:
            sentences += ["", *rate_table(normal).text(), ""]
        if normal["warning"]:
            sentences.append(f"warning: {normal['warning']}")
    if measured["image_f1_threshold"] is not None:
        sentences.append(
            "threshold of the best F1 on these very labels: "
            f"{measured['image_f1_threshold']:.4g}"
        )
    return sentences


def _threshold(measured: Mapping[str, Any], level: str) -> float | None:
    """Return the threshold from normal images if there is one, else that of the best F1."""
    if normal := measured["normal_threshold"]:
        return normal[f"{level}_threshold"]
    return measured[f"{level}_f1_threshold"]


def _write_scores(
    path: Path, scored: Scored, f1_threshold: float | None, calibration: Calibration | None
) -> None:
    located = scored.in_place is not None
    header = ("path", "label", "defect_type", "score", "predicted", "predicted_f1")
    rows = []
    in_place = scored.in_place or [None] * len(scored.records)
    threshold = calibration and calibration.image_threshold
    calibrated = (
        [""] * len(scored.records)
        if calibration is None
        else map(calibration_lib.shown, calibration.calibrated(scored.scores))
    )
    called = scored.called
    if called is None and threshold is not None:
        called = scored.scores >= threshold
    regions = scored.regions
    for i, (record, score, rarity, place) in enumerate(
        zip(scored.records, scored.scores, calibrated, in_place, strict=True)
    ):
        areas = [x.area for x in regions[i]] if regions is not None else []
        rows.append(
            (
                record.relative_path,
                record.label,
                record.defect_type,
                score,
                "" if called is None else int(called[i]),
                "" if f1_threshold is None else int(score >= f1_threshold),
                rarity,
                *("" if place is None else int(place),) * located,
                *(len(areas), regions_file.rounded(max(areas, default=0.0)))
                * (regions is not None),
            )
        )
    columns = (*header, "calibrated", *["in_place"] * located)
    columns += ("regions", "largest_area") * (regions is not None)
    paths.write(path, Table(columns, rows).csv())


def roc_curves(
    scored: Scored, measured: Mapping[str, Any]
) -> list[tuple[str, Float[np.ndarray, " _"], Float[np.ndarray, " _"]]]:
    """Return label, false and true positive rates of the images' curve and of the pixels'.

    Args:
      scored: result of `with_pixels`.
      measured: result of `measure`.

    Returns:
      The curves that are defined.
    """
    curves = []
    if curve := metrics.roc_curve(scored.labels, scored.scores):
        curves.append((f"image, AUROC {measured['image_auroc']:.4f}", *curve))
    if measured["pixel_auroc"] is not None:
        assert scored.pixels is not None
        assert scored.pixels.curves is not None
        curve, _ = scored.pixels.curves
        curves.append((f"pixel, AUROC {measured['pixel_auroc']:.4f}", *curve))
    return curves


def _draw_figures(
    folder: Path,
    config: Config,
    scored: Scored,
    measured: dict[str, Any],
    load_image: Callable[[int], UInt8[np.ndarray, "h w 3"]],
    pool: concurrent.futures.Executor,
) -> Iterator[Image.Image | None]:
    """Save the selected pictures, and yield them, or None if there may be many."""
    which = config.outputs.figures
    if which == "none":
        return iter(())
    threshold = _threshold(measured, "image")
    scale = figures.ColorScale(*measured["color_scale"])
    if isinstance(folder, pathlib.Path):  # object stores have no folders
        folder.mkdir()

    def draw(place: int, index: int) -> Image.Image | None:
        record, score = scored.records[index], scored.scores[index]
        verdict = ""
        if threshold is not None:
            verdict = f", predicted {'anomalous' if score >= threshold else 'normal'}"
        picture = figures.panels(
            load_image(index),
            scored.masks[index],
            scored.maps[index],
            _threshold(measured, "pixel"),
            scale,
            f"{record.relative_path}   score {score:.2f}   "
            f"{'anomalous' if record.label else 'normal'}{verdict}",
            scored.drawn_size(index),
            scored.outside,
        )
        stem = pathlib.PurePosixPath(record.relative_path).stem
        name = f"{place:04d}_{record.defect_type}_{stem}".encode()[:_LONGEST_NAME]
        figures.save(picture, folder / f"{name.decode(errors='ignore')}.jpg")
        return picture if which == "some" else None

    chosen = _chosen(scored, which)
    return pool.map(draw, range(len(chosen)), chosen)


def _chosen(scored: Scored, which: str) -> list[int]:
    """Return numbers of the images to draw: defects first, by type, highest score first."""
    by_type: dict[str, list[int]] = {}
    for index in np.argsort(-scored.scores, kind="stable"):
        by_type.setdefault(scored.records[index].defect_type, []).append(int(index))
    chosen = []
    for defect in sorted(by_type, key=lambda name: (name == GOOD, name)):
        ranked = by_type[defect]
        if which == "some" and len(ranked) > 2 * _SOME:
            ranked = ranked[:_SOME] + ranked[-_SOME:]
        chosen += ranked
    return chosen
