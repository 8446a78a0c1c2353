"""Measures variants of features and image scores on a folder of categories: one table.

    python launch/study.py --root=data/mvtec_ad
    python launch/study.py --root=data/mvtec_ad --categories=screw,bottle --variants=all,shift1

Each variant is fitted once per category, and once per seed where channels are drawn. One pass
over the test images gives all image scores. Each fit runs in a process of its own, whose peak
memory is that of the fit and of the pass. Finished fits are kept in --out: the same command
goes on after an interruption, and computes again only what differs in settings, images, weights
or version. Times include the compilation of the fit, and compare within one quiet run only.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # see padim_jax/main.py

import argparse
import hashlib
import json
import multiprocessing
import pathlib
import resource
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

import padim_jax
from padim_jax.core import metrics
from padim_jax.data import dataset_splits, files
from padim_jax.data.layouts.mvtec_ad import mvtec_ad
from padim_jax.errors import UserError
from padim_jax.output import results
from padim_jax.output.tables import Table
from padim_jax.system import ending, paths, progress

_POOL3 = {"reduction": "none", "pooling": 3}
_FINE = {**_POOL3, "regularization": 1e-3}
PRESET = "anomalib"
# Settings of each variant, as they differ from the preset.
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},  # 100 random channels, regularization 0.01
    "all": {"reduction": "none"},
    "pool3": _POOL3,
    "pool3-.003": {**_POOL3, "regularization": 3e-3},  # that of the preset `best`
    "pool3-.001": _FINE,
    "layer2+3": {**_POOL3, "layers": ("layer2", "layer3")},
    "bilinear": {**_FINE, "model_upsample": "bilinear"},
    "shift1": {**_FINE, "shift": 1},
}
OPTIONAL = ("bilinear", "shift1")  # of much memory or time
_WEIGHTS = "of resnet18: a name, a file or random; none: the filters of scattering"
SCORES = ("max", "top", "band", "variation", "combined")
# Columns of the table: heading, format and unit of each value of a result.
COLUMNS = {
    **{f"image_auroc_{score}": (score, ".3f", 1) for score in SCORES},
    "pixel_auroc": ("pixel AUROC", ".3f", 1),
    "aupro": ("AUPRO", ".3f", 1),
    "pixel_ap": ("pixel AP", ".3f", 1),
    "fit_seconds": ("fit [s]", ".0f", 1),
    "image_seconds": ("image [ms]", ".0f", 1e-3),
    "model_bytes": ("model [MB]", ".0f", 1e6),
    "peak_bytes": ("peak [GB]", ".1f", 1e9),
}
RANKED = ("image_auroc_variation", "aupro", "pixel_ap")  # the score of the preset `best`


class Job(NamedTuple):
    """One fit: where its result goes, and what decides whether that is still valid."""

    category: str
    variant: str
    seed: int
    file: pathlib.Path
    settings: dict[str, Any]
    identity: dict[str, Any]


def main() -> None:
    """Run the study that the command line asks for."""
    ending.show_warnings(strict=False)
    signal.signal(signal.SIGTERM, end)
    options = parse(sys.argv[1:])
    try:
        with paths.explained():
            print(study(options))
    except UserError as error:
        ending.fail(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


def end(*_: Any) -> None:
    """End with the process of the running fit, which would go on alone."""
    for process in multiprocessing.active_children():
        process.terminate()
    raise KeyboardInterrupt


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--root", required=True, type=paths.parse, help="folder of categories, as MVTec AD's")
    add("--categories", type=names, help="some of its folders, comma-separated; default: all")
    usual = [name for name in VARIANTS if name not in OPTIONAL]
    text = f"of {', '.join(VARIANTS)}; default: all but {', '.join(OPTIONAL)}"
    add("--variants", type=names, default=usual, help=text)
    add("--weights", default="resnet18.tv_in1k", help=_WEIGHTS)
    add("--image_size", type=int, default=256, help="side of the resized images")
    add("--seeds", type=int, default=5, help="draws of the channels, where they are random")
    add("--out", type=paths.parse, default="results/study", help="folder of the results")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds={options.seeds}: expected 1 or more")
    if unknown := [name for name in options.variants if name not in VARIANTS]:
        parser.error(f"--variants: no {unknown[0]}; expected some of {', '.join(VARIANTS)}")
    return options


def names(text: str) -> list[str]:
    """Return the names in a comma-separated list, each once."""
    return list(dict.fromkeys(text.split(",")))


def study(options: argparse.Namespace) -> str:
    """Compute what is missing, write table.md and table.csv, and return the table as text.

    Raises:
      UserError: images, weights, settings or earlier results cannot be used, or memory does
        not suffice.
    """
    jobs = [job for category in _categories(options) for job in _jobs(options, category)]
    missing = [job for job in jobs if not _is_done(job)]
    done = len(jobs) - len(missing)
    with progress.bar(len(jobs), "study", start=done, unit="fit") as bar:
        for job in missing:
            bar.set_postfix_str(f"{job.category}, {job.variant}, seed {job.seed}")
            measured = in_own_process(measure, options.root, job.category, job.settings)
            results.write_json(job.file, job.identity | {"result": measured})
            bar.update()
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for job in jobs:
        result = json.loads(job.file.read_text())["result"]
        measured.setdefault((job.category, job.variant), []).append(result)
    made = table(measured)
    paths.write(options.out / "table.md", "\n".join([*made.markdown(), ""]).encode())
    paths.write(options.out / "table.csv", made.csv())
    return "\n".join(made.text())


def _categories(options: argparse.Namespace) -> list[str]:
    if options.categories:
        return options.categories
    if not paths.is_folder(options.root):
        raise UserError(f"--root={options.root}: no such folder; expected one of categories")
    folders = files.subfolders(options.root)
    names = [folder.name for folder in folders if paths.is_folder(folder / "train")]
    if not names:
        raise UserError(
            f"--root={options.root}: no category; expected folders with train/good and test, "
            "as MVTec AD's (docs/datasets.md)"
        )
    return names


def _jobs(options: argparse.Namespace, category: str) -> list[Job]:
    """Return the fits of a category."""
    digest = hashlib.sha256()
    for record in mvtec_ad(options.root, category):
        for path in filter(None, (record.image, record.mask)):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{record.split} {record.relative_path} {content}\n".encode())
    weights = pathlib.Path(options.weights)
    known = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else ""
    jobs = []
    for variant in options.variants:
        chosen = VARIANTS[variant] | {"resize": 2 * (options.image_size,)}
        for seed in range(1 if "reduction" in chosen else options.seeds):
            settings = chosen | {"model_seed": seed}
            identity = {
                "version": padim_jax.__version__,
                "images": digest.hexdigest(),
                "weights": known or options.weights,
                "settings": json.loads(json.dumps(settings)),
            }
            file = options.out / category / f"{variant}_{seed}.json"
            backbone = "scattering" if options.weights == "none" else "resnet18"
            settings = settings | {"backbone": backbone, "weights": options.weights}
            jobs.append(Job(category, variant, seed, file, settings, identity))
    return jobs


def _is_done(job: Job) -> bool:
    if not job.file.exists():
        return False
    try:
        stored = json.loads(job.file.read_text())
        return {key: stored[key] for key in job.identity} == job.identity
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{job.file}: no result of this study; remove it, or name another --out"
        ) from error


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)` of a new process, which then ends.

    Raises:
      UserError: the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, ending.show_warnings, (False,)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise UserError(
                "the process of a fit was killed, most likely for lack of memory; make room, "
                "or take a smaller --image_size or other --variants"
            ) from error


def measure(root: pathlib.Path, category: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Fit one variant to a category's training images and measure it on the test images.

    Args:
      root: folder of categories.
      category: one of them.
      settings: of `padim_jax.fit`.

    Returns:
      The metrics, times in seconds, and sizes in bytes; see `COLUMNS`.
    """
    import jax

    from padim_jax.detector import detector as detector_lib
    from padim_jax.detector import scoring_pass

    splits = dataset_splits.by_split(mvtec_ad(root, category))
    test, train = splits["test"], [record.image for record in splits["train"].records]
    start = time.perf_counter()
    fixed = {"preset": PRESET, "thresholds": "leave_one_out", "score_image": "combined"}
    detector = padim_jax.fit(train, **fixed, **settings)
    fit_seconds = time.perf_counter() - start
    with progress.showing(lines=False, bars=False):
        parts = list(scoring_pass.measure(detector, test, "score", None))
    config = detector.config
    pixels = np.zeros((config.batch_size, *config.image.size, 3), np.uint8)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        detector_lib.measure_pixels(detector, pixels)
        times.append(time.perf_counter() - start)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    maps, summaries, masks, known = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("maps", "summaries", "masks", "known")
    )
    labels = np.array([bool(record.label) for record in test.records])
    top, _, variation, band = summaries.T
    combined = detector_lib.image_scores(detector, summaries)
    values = (maps.max(axis=(1, 2)), top, band, variation, combined)
    scores = dict(zip(SCORES, values, strict=True))
    types = [record.defect_type for record in test.records]
    measured = metrics.evaluate(labels, combined, types, masks, maps, known)
    if undefined := measured.get("undefined"):
        key, reason = next(iter(undefined.items()))
        raise UserError(f"{root / category}: {key} is undefined ({reason}); leave it out")
    return {
        **{
            f"image_auroc_{name}": metrics.binary_metrics(labels, values).auroc
            for name, values in scores.items()
        },
        **{name: measured[name] for name in ("pixel_auroc", "aupro", "pixel_ap")},
        "fit_seconds": fit_seconds,
        "image_seconds": statistics.median(times) / config.batch_size,
        "model_bytes": sum(x.nbytes for x in jax.tree.leaves(detector.gaussian)),
        "peak_bytes": peak,
    }


def table(measured: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]) -> Table:
    """Return a row for each category and variant, then the means over the categories.

    Args:
      measured: what `measure` returned for each seed, by category and variant: category by
        category, the same variants of each.

    Returns:
      The table. Values of several seeds are means ± standard deviations (divisor n - 1). The
      rank is the mean over categories and `RANKED`: 1 for the best, equals share theirs.
    """
    categories, variants = (list(dict.fromkeys(x)) for x in zip(*measured, strict=True))
    rows = [
        [f"{category}, {variant}", *(_cell([x[key] for x in of], key) for key in COLUMNS), ""]
        for (category, variant), of in measured.items()
    ]
    shape = len(categories), len(variants)
    means = {
        key: np.reshape([np.mean([x[key] for x in of]) for of in measured.values()], shape)
        for key in COLUMNS
    }
    ranks = np.concatenate([stats.rankdata(-means[key], axis=1) for key in RANKED]).mean(axis=0)
    for i, variant in enumerate(variants):
        cells = [_cell([means[key][:, i].mean()], key) for key in COLUMNS]
        rows.append([f"mean, {variant}", *cells, f"{ranks[i]:.1f}"])
    return Table(
        ["category, variant", *(heading for heading, *_ in COLUMNS.values()), "rank"], rows
    )


def _cell(values: Sequence[float], key: str) -> str:
    _, form, unit = COLUMNS[key]
    scaled = [value / unit for value in values]
    spread = f" ± {statistics.stdev(scaled):{form}}" if len(scaled) > 1 else ""
    return f"{statistics.mean(scaled):{form}}{spread}"


if __name__ == "__main__":
    main()
