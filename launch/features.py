"""Compares features that need no ImageNet, on drawn categories: one table and one choice.

    python launch/features.py
    python launch/features.py --references=resnet18.tv_in1k,old/resnet18.safetensors

Real test sets are not looked at: features chosen on one are good on that one. Each family of
the drawn categories (a material, a layout, a kind of defect) is left out in turn, the candidate
that localises best on all others is chosen, and measured on the family left out. References
are measured, and never chosen. Finished measurements are kept in --out: the same command goes
on after an interruption.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # see padim_jax/main.py

import argparse
import json
import pathlib
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import drawn
import numpy as np
import study

from padim_jax.config import backbones
from padim_jax.core import metrics
from padim_jax.errors import UserError
from padim_jax.output import results
from padim_jax.output.tables import Table
from padim_jax.system import ending, paths, progress

# Candidates of fixed filters, as they differ from the backbone `scattering`.
FILTERS: dict[str, dict[str, Any]] = {
    "scattering": {},
    "6 orientations": {"orientations": 6},
    "8 orientations": {"orientations": 8},
    "first order": {"second": False},
    "small .05": {"small": 0.05},
    "small .5": {"small": 0.5},
    "box": {"blur": (0.5, 0.5)},
}
RANDOM = ("random", "orthogonal")  # candidates of a ResNet-18 that is not trained
CANDIDATES = (*FILTERS, *RANDOM)
METRICS = ("image_auroc", "pixel_auroc", "aupro")

# By candidate, category, and metric or kind of defect.
Measured = Mapping[str, Mapping[str, Mapping[str, float]]]


def main() -> None:
    """Run the comparison that the command line asks for."""
    ending.show_warnings(strict=False)
    signal.signal(signal.SIGTERM, study.end)
    options = parse(sys.argv[1:])
    try:
        with paths.explained():
            print(compare(options))
    except UserError as error:
        ending.fail(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--candidates", type=study.names, default=list(CANDIDATES), help="comma-separated")
    add("--references", type=study.names, default=[], help="weights of resnet18: names, files")
    add("--presets", type=study.names, default=["best", "anomalib"], help="comma-separated")
    add("--train", type=int, default=48, help="normal images of each category")
    add("--out", type=paths.parse, default="results/features", help="folder of the results")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.candidates if name not in CANDIDATES]:
        parser.error(f"--candidates: no {unknown[0]}; expected of {', '.join(CANDIDATES)}")
    return options


def compare(options: argparse.Namespace) -> str:
    """Measure what is missing, write table.md, and return it as text.

    Raises:
      UserError: weights or earlier results cannot be used, or memory does not suffice.
    """
    names = [*options.candidates, *options.references]
    texts = []
    with progress.bar(len(names) * len(options.presets), "features", unit="fit") as bar:
        for preset in options.presets:
            measured: dict[str, Any] = {}
            for name in names:
                measured[name] = _measured(options, preset, name)
                bar.update()
            heading = f"{preset}, {options.train} normal images"
            texts += [heading, *table(measured).markdown(), ""]
            chosen = {name: measured[name] for name in options.candidates}
            texts += [*left_out(chosen).markdown(), ""]
    text = "\n".join(texts)
    paths.write(options.out / "table.md", text.encode())
    return text


def _measured(options: argparse.Namespace, preset: str, name: str) -> Any:
    label = pathlib.Path(name).stem.replace(" ", "_")
    file = options.out / f"{label}_{preset}_{options.train}.json"
    identity = {"candidate": name, "preset": preset, "train": options.train}
    if file.exists():
        stored = json.loads(file.read_text())
        if {key: stored.get(key) for key in identity} == identity:
            return stored["result"]
        raise UserError(f"{file}: no result of this comparison; name another --out")
    measured = study.in_own_process(measure, name, preset, options.train)
    results.write_json(file, identity | {"result": measured})
    return measured


def measure(name: str, preset: str, train: int) -> dict[str, dict[str, float]]:
    """Fit one candidate to each drawn category, and measure it on the test images.

    Args:
      name: a candidate, or weights of resnet18.
      preset: see `padim_jax.fit`.
      train: number of normal images.

    Returns:
      For each category `METRICS`, and the AUPRO of each kind of defect by its name.
    """
    import padim_jax

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(name, pathlib.Path(folder))
        for category, drawing in drawn.categories().items():
            images = drawn.draw(drawing, train)
            size = images["train"].shape[1:3]
            detector = padim_jax.fit(
                images["train"], preset=preset, thresholds="none", resize=size, **settings
            )
            anomalies = detector.score(images["test"])
            kinds, masks, maps = images["kinds"], images["masks"], anomalies.maps
            good = kinds == "good"
            values = (
                metrics.binary_metrics(~good, anomalies.scores).auroc,
                metrics.binary_metrics(masks.ravel(), maps.ravel()).auroc,
                metrics.aupro(masks, maps),
            )
            found[category] = dict(zip(METRICS, values, strict=True))
            for kind in drawn.DEFECTS:
                some = good | (kinds == kind)
                found[category][kind] = metrics.aupro(masks[some], maps[some])
    return found


def _settings(name: str, folder: pathlib.Path) -> dict[str, Any]:
    """Return the settings of `padim_jax.fit` for a candidate, which is made available."""
    if name in FILTERS:
        _vary(**FILTERS[name])
        few = {} if FILTERS[name].get("second", True) else {"channels": 0}  # 57, and not 100
        return {"backbone": "scattering", **few}
    if name == "orthogonal":
        return {"weights": str(_orthogonal(folder))}
    return {"weights": name}


def _vary(
    orientations: int = 4,
    second: bool = True,
    small: float | None = None,
    blur: tuple[float, ...] | None = None,
) -> None:
    """Change the definition of scattering, in this process."""
    from padim_jax.models import scattering

    class Spec(backbones.ScatteringSpec):
        def channels(self, stage: str) -> int:
            return super().channels(stage) - (0 if second else _second(self, stage))

    for table in (backbones.SCATTERING, backbones.BACKBONES):
        table["scattering"] = Spec(orientations)
    scattering.SMALL = small or scattering.SMALL
    scattering.BINOMIAL = np.array(blur or scattering.BINOMIAL)
    if not second:
        stages = scattering.STAGES.items()
        scattering.STAGES = {stage: (scale, own, ()) for stage, (scale, own, _) in stages}


def _second(spec: backbones.ScatteringSpec, stage: str) -> int:
    return (1 if stage == "layer1" else 2) * spec.orientations**2


def _orthogonal(folder: pathlib.Path) -> pathlib.Path:
    """Write weights of a ResNet-18 like the random ones, with orthogonal filters."""
    from padim_jax.models.weights import initialization, naming

    network = naming.convolutions("resnet18", naming.namings("resnet18")[0])
    tensors = initialization.random_tensors(network, backbones.RESNETS["resnet18"])
    for name, x in tensors.items():
        if x.ndim == 4:
            rows = x.reshape(len(x), -1)
            left, singular, right = np.linalg.svd(rows, full_matrices=False)
            scale = np.sqrt(np.mean(singular**2))  # the same sum of squares
            tensors[name] = (scale * left @ right).reshape(x.shape).astype(np.float32)
    path = folder / "orthogonal.npz"
    np.savez(path, allow_pickle=False, **tensors)
    return path


def table(measured: Measured) -> Table:
    """Return a row for each candidate: the means of the categories' metrics."""
    rows = [
        [name, *(f"{np.mean([x[key] for x in of.values()]):.3f}" for key in METRICS)]
        for name, of in measured.items()
    ]
    return Table(["features", "image AUROC", "pixel AUROC", "AUPRO"], rows)


def left_out(measured: Measured) -> Table:
    """Return a row for each family left out: what is chosen without it, and how good that is.

    Args:
      measured: what `measure` returned, by candidate.

    Returns:
      The table: AUPRO of the one chosen without the family, and of the best, on the family.
    """
    rows = []
    for family, inside in _families():
        without, within = (
            {name: _mean_aupro(of, inside, part) for name, of in measured.items()}
            for part in (False, True)
        )
        chosen, best = max(without, key=without.__getitem__), max(within.values())
        rows.append([family, chosen, f"{within[chosen]:.3f}", f"{best:.3f}"])
    return Table(["left out", "chosen", "its AUPRO there", "the best there"], rows)


def _families() -> Iterator[tuple[str, set[tuple[str, str]]]]:
    """Yield names of families with their (category, kind of defect)."""
    names = list(drawn.categories())
    for part in (*drawn.MATERIALS, *drawn.LAYOUTS):
        yield part, {(x, kind) for x in names if part in x.split("-") for kind in drawn.DEFECTS}
    for kind in drawn.DEFECTS:
        yield kind, {(x, kind) for x in names}


def _mean_aupro(
    of: Mapping[str, Mapping[str, float]], inside: set[tuple[str, str]], within: bool
) -> float:
    values = (
        of[category][kind]
        for category in of
        for kind in drawn.DEFECTS
        if ((category, kind) in inside) == within
    )
    return float(np.mean(list(values)))


if __name__ == "__main__":
    main()
