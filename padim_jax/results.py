"""What an evaluation leaves behind: the table, metrics.json, scores.csv, maps, pictures."""

import concurrent.futures
import csv
import dataclasses
import importlib.resources
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image

from padim_jax import figures, metrics, paths
from padim_jax.config import Config
from padim_jax.datasets.records import GOOD, Record
from padim_jax.paths import Path

# With config.outputs.figures="some", of each defect type this many of the highest
# scored images and as many of the lowest.
_SOME = 2

# Name in the table and keys of metrics.json and of the published numbers.
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
    """A test set and what the detector said of it.

    Attributes:
      records: the n images.
      masks: their defect pixels; None where unknown.
      maps: anomaly maps.
      scores: image scores.
    """

    records: Sequence[Record]
    masks: Sequence[Bool[np.ndarray, "h w"] | None]
    maps: Float32[np.ndarray, "n h w"]
    scores: Float32[np.ndarray, " n"]

    @property
    def labels(self) -> Bool[np.ndarray, " n"]:
        """True for anomalous images."""
        return np.array([record.label == 1 for record in self.records])


def import_libraries() -> None:
    """Imports what the functions below import on first use, which takes half a second."""
    for name in ("scipy.ndimage", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        importlib.import_module(name)


def measure(scored: Scored) -> dict[str, Any]:
    """All metrics; the keys are those of metrics.json. See `metrics.evaluate`."""
    known = np.array([mask is not None for mask in scored.masks])
    blank = np.zeros(scored.maps.shape[1:], bool)
    no_masks = scored.labels.any() and not known[scored.labels].any()
    return metrics.evaluate(
        scored.labels,
        scored.scores,
        [record.defect_type for record in scored.records],
        None
        if no_masks
        else np.stack([blank if mask is None else mask for mask in scored.masks]),
        scored.maps,
        known,
    )


def compare(exact: Scored, half: Scored) -> dict[str, Any]:
    """What rounding a model changed: metrics of both, and the largest changes.

    These are in parts of the largest image score and of the largest pixel.
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
    """What `compare` found, as a person reads it."""
    lines = [f"{'':14}{'exact':>10}{'half':>10}{'change':>10}"]
    for name, key in _ROWS:
        exact, half = comparison["exact"][key], comparison["half"][key]
        if exact is None or half is None:
            lines.append(f"{name:14}{'undefined':>10}")
        else:
            lines.append(f"{name:14}{exact:10.4f}{half:10.4f}{half - exact:+10.4f}")
    lines += [
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
) -> None:
    """Writes everything but the table; what an earlier evaluation wrote is replaced.

    Args:
      workdir: exists, where there are folders.
      config: outputs.{figures,maps} choose what is written.
      scored: the test set.
      measured: from `measure`.
      load_image: the preprocessed image by its number, read again for its picture.
    """
    write_json(workdir / "metrics.json", measured)
    _write_scores(workdir / "scores.csv", scored, measured["image_f1_threshold"])
    for folder in ("maps", "figures"):
        paths.remove_folder(workdir / folder)
    for picture in ("roc_curve.png", "score_histogram.png", "overview.jpg"):
        (workdir / picture).unlink(missing_ok=True)
    if config.outputs.maps != "none":
        for record, anomaly_map in zip(scored.records, scored.maps, strict=True):
            save_map(workdir / "maps", record.relative_path, config.outputs.maps, anomaly_map)
    # Sorting, decoding and encoding leave Python's lock free: threads use all cores.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        curves = pool.submit(_roc_curves, scored, measured)
        pictures = _draw_figures(
            workdir / "figures", config, scored, measured, load_image, pool
        )
        figures.score_histogram(
            workdir / "score_histogram.png",
            scored.scores,
            scored.labels.astype(int),
            measured["image_f1_threshold"],
        )
        if defined := curves.result():
            figures.roc_figure(workdir / "roc_curve.png", defined, config.title)
        few = [picture for picture in pictures if picture is not None]
    if few:
        figures.save(figures.contact_sheet(few, 1), workdir / "overview.jpg")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that any reader takes: no NaN, text as it is."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def save_map(
    folder: Path, name: str, suffix: str, anomaly_map: Float32[np.ndarray, "h w"]
) -> None:
    """Writes one raw map as `folder/name.npy` or `.tiff` (one float32 channel).

    The image's own suffix stays in the name: a.png and a.jpg may lie side by side.
    """
    content = io.BytesIO()
    if suffix == "npy":
        np.save(content, anomaly_map)
    else:
        Image.fromarray(anomaly_map).save(content, suffix)
    paths.write(folder / f"{name}.{suffix}", content.getvalue())


def table(config: Config, measured: dict[str, Any]) -> str:
    """The metrics beside the published PyTorch numbers, as a person reads them."""
    published = published_metrics(config) or {}
    otherwise = _unlike_published(config) if published else ""
    model = config.model
    lines = [
        f"{config.title}: {model.backbone} {'+'.join(model.layers)}, {model.channels} "
        f"channels, weights {model.weights}",
        "",
        f"{'':14}{'this run':>10}{'published':>11}{'difference':>12}",
    ]
    for name, key in _ROWS:
        ours, theirs = measured[key], published.get(key)
        cells = [
            "undefined" if ours is None else f"{ours:.4f}",
            "-" if theirs is None else f"{theirs:.3f}",
            "-" if ours is None or theirs is None else f"{ours - theirs:+.3f}",
        ]
        lines.append(f"{name:14}{cells[0]:>10}{cells[1]:>11}{cells[2]:>12}")
    if otherwise:
        lines.append(f"the published run had other settings: {otherwise}")
    lines += [
        "undefined: " + reason
        for reason in dict.fromkeys(measured.get("undefined", {}).values())
    ]
    if measured["per_defect"]:
        width = max(14, *(len(name) + 2 for name in measured["per_defect"]))
        keys = ("image_auroc", "pixel_auroc", "aupro")
        lines += ["", f"{'defect type':{width}}" + "".join(f"{key:>13}" for key in keys)]
        for name, values in measured["per_defect"].items():
            row = ["undefined" if values[k] is None else f"{values[k]:.4f}" for k in keys]
            lines.append(f"{name:{width}}" + "".join(f"{cell:>13}" for cell in row))
    return "\n".join(lines)


def published_metrics(config: Config) -> dict[str, float] | None:
    """The published PyTorch numbers for a category and backbone, or None.

    From third_party/published_results.json, which names its source. They were measured
    with ImageNet weights on MVTec AD; nothing is compared with them otherwise.
    """
    if config.dataset.name != "mvtec_ad" or config.model.weights == "random":
        return None
    return _published()["mvtec_ad"].get(config.model.backbone, {}).get(config.category)


def _published() -> dict[str, Any]:
    file = importlib.resources.files("padim_jax") / "published_results.json"
    return json.loads(file.read_text(encoding="utf-8"))


def _unlike_published(config: Config) -> str:
    """In which settings a run differs from the published one, as a person reads it."""
    settings = _published()["settings"]
    pairs = {
        "layers": (list(config.model.layers), settings["layers"]),
        "channels": (config.model.channels, settings["channels"][config.model.backbone]),
        "seed": (config.model.seed, settings["seed"]),
        "resize": (list(config.image.resize), settings["resize"]),
        "crop": (config.image.crop, settings["crop"]),
        "method": (config.image.method, settings["method"]),
        "upsample": (config.map.upsample, settings["upsample"]),
        "sigma": (config.map.sigma, settings["sigma"]),
    }
    if config.model.weights.endswith(".tv2_in1k"):
        pairs["weights"] = (config.model.weights, f"{config.model.backbone}.tv_in1k")
    return ", ".join(f"{k} {theirs}" for k, (ours, theirs) in pairs.items() if ours != theirs)


def _write_scores(path: Path, scored: Scored, threshold: float | None) -> None:
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(("path", "label", "defect_type", "score", "predicted"))
    for record, score in zip(scored.records, scored.scores, strict=True):
        predicted = "" if threshold is None else int(score >= threshold)
        writer.writerow(
            (record.relative_path, record.label, record.defect_type, score, predicted)
        )
    path.write_bytes(table.getvalue().encode())


def _roc_curves(
    scored: Scored, measured: dict[str, Any]
) -> list[tuple[str, Float[np.ndarray, " _"], Float[np.ndarray, " _"]]]:
    """Label, false and true positive rates of each curve that is defined."""
    curves = []
    if curve := metrics.roc_curve(scored.labels, scored.scores):
        curves.append((f"image, AUROC {measured['image_auroc']:.4f}", *curve))
    if measured["pixel_auroc"] is not None:
        masks = np.stack([mask for mask in scored.masks if mask is not None])
        curve = metrics.roc_curve(masks.ravel(), scored.maps.ravel())
        assert curve is not None
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
    """Saves the chosen pictures; yields them, or None where there may be many."""
    which = config.outputs.figures
    if which == "none":
        return iter(())
    threshold = measured["image_f1_threshold"]
    scale = figures.ColorScale(*measured["color_scale"])
    if isinstance(folder, pathlib.Path):  # an object store knows none
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
            measured["pixel_f1_threshold"],
            scale,
            f"{record.relative_path}   score {score:.2f}   "
            f"{'anomalous' if record.label else 'normal'}{verdict}",
        )
        stem = pathlib.PurePosixPath(record.relative_path).stem
        figures.save(picture, folder / f"{place:04d}_{record.defect_type}_{stem}.jpg")
        return picture if which == "some" else None

    chosen = _chosen(scored, which)
    return pool.map(draw, range(len(chosen)), chosen)


def _chosen(scored: Scored, which: str) -> list[int]:
    """Numbers of the images to draw: defects first, by type, highest score first."""
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
