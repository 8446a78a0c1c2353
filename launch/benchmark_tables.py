"""What the benchmark prints: Markdown tables of what was measured. Standard library only."""

import statistics
from collections.abc import Sequence
from typing import Any

import benchmark_measure as measure

# Our task that does what a peer's does.
COUNTERPARTS = {"fit": "train", "test": "eval", "fit + test": "train_and_eval, compiled before"}
# Of two processes, one after the other.
TOGETHER = {"seconds": lambda a, b: a + b, "peak_bytes": max, "others": max}
# The share of the machine that others may take. With more, PyTorch's threads wait for each
# other in vain: measured with half of four cores taken, it is 3 to 100 times slower.
QUIET = 0.05


def startup(found: dict[str, dict[str, float]]) -> str:
    """Median and spread of each command."""
    rows = [
        [name, f"{times['median']:.2f}", f"{times['spread']:.2f}"]
        for name, times in found.items()
    ]
    return table(["process", "wall s", "spread"], rows)


def processes(found: Sequence[dict[str, Any]]) -> str:
    """Wall time, memory and model size of whole processes, beside ours."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in found:
        if run["task"] != "score":
            groups.setdefault((run["contender"], run["task"]), []).append(run)
    for peer in {contender for contender, task in groups if task == "fit"}:
        groups[peer, "fit + test"] = [
            {key: combine(fit[key], test[key]) for key, combine in TOGETHER.items()}
            for fit, test in zip(groups[peer, "fit"], groups[peer, "test"], strict=True)
        ]
    rows = []
    for (contender, task), group in sorted(groups.items(), key=lambda item: order(item[0])):
        seconds = measure.summary([run["seconds"] for run in group])
        peak = statistics.median(run["peak_bytes"] for run in group)
        model = group[0].get("model_bytes")
        row = [contender, task, f"{seconds['median']:.1f}", f"{seconds['spread']:.1f}"]
        row += [gigabytes(peak), gigabytes(model) if model else ""]
        ours = groups.get(("padim_jax", COUNTERPARTS.get(task, "")))
        if ours:
            our_seconds = statistics.median(run["seconds"] for run in ours)
            our_peak = statistics.median(run["peak_bytes"] for run in ours)
            row += [f"{seconds['median'] / our_seconds:.1f}", f"{peak / our_peak:.1f}"]
        else:
            row += ["", ""]
        rows.append([*row, f"{max(run['others'] for run in group):.0%}"])
    head = ["", "process", "wall s", "spread", "peak GB", "model GB", "time / ours"]
    shown = table([*head, "peak / ours", "others' CPU"], rows)
    if max(run["others"] for run in found) > QUIET:
        shown += "\n\nNot to be quoted: other processes were running (others' CPU)."
    return shown


def order(key: tuple[str, str]) -> tuple[bool, str]:
    """Ours first, then peer by peer."""
    return key[0] != "padim_jax", key[0]


def scoring(found: Sequence[dict[str, Any]]) -> str:
    """Images a second of a batch of 32 and milliseconds of a single image."""
    contenders = dict.fromkeys(run["contender"] for run in found)
    rows: list[list[str]] = []
    ours: list[float] = []
    for contender in contenders:
        scored = [r for r in found if r["contender"] == contender and r["task"] == "score"]
        row = [contender]
        seconds = []
        for size, key in ((32, "batch_32"), (1, "single")):
            seconds.append(statistics.median(run[key]["median"] for run in scored))
            spread = statistics.median(run[key]["spread"] for run in scored)
            shown = size / seconds[-1] if size > 1 else seconds[-1] * 1e3
            row += [f"{shown:.1f}", f"{spread / seconds[-1]:.0%}"]
        ours = ours or seconds
        rows.append([*row, *(f"{s / o:.1f}" for s, o in zip(seconds, ours, strict=True))])
    head = ["", "img/s at batch 32", "spread", "single image ms", "spread"]
    return table([*head, "batch time / ours", "single time / ours"], rows)


def versions(found: Sequence[dict[str, Any]]) -> str:
    """A line a contender: what it ran with."""
    named = {run["contender"]: run["versions"] for run in found if "versions" in run}
    return "\n".join(
        f"{contender}: {', '.join(f'{name} {version}' for name, version in of.items())}"
        for contender, of in named.items()
    )


def stages(found: dict[str, Any]) -> str:
    """Median, spread, time an image and peak memory of every stage."""
    rows = []
    for name, stage in found["stages"].items():
        median, spread = stage["median"], stage["spread"]
        each = median / stage["images"] * 1e3 if stage["images"] else None
        row = [name, stage["of"], f"{median * 1e3:.1f}", f"{spread * 1e3:.1f}"]
        row += [str(stage["repeats"]), f"{each:.2f}" if each is not None else ""]
        rows.append([*row, gigabytes(stage["peak_bytes"])])
    head = ["stage", "of", "ms", "spread", "repeats", "ms an image", "peak GB of the process"]
    return table(head, rows)


def growth(axis: str, points: Sequence[dict[str, Any]]) -> str:
    """A row a point, and the exponents below."""
    columns = {
        "fit s": [point["fit"]["seconds"] for point in points],
        "fit peak GB": [point["fit"]["peak_bytes"] / 1e9 for point in points],
        "model GB": [point["fit"]["model_bytes"] / 1e9 for point in points],
    }
    for name in points[0]["stages"]:
        columns[f"{name} ms"] = [point["stages"][name]["median"] * 1e3 for point in points]
    values = [point[axis] for point in points]
    rows = [
        [str(value), *(f"{column[number]:.3g}" for column in columns.values())]
        for number, value in enumerate(values)
    ]
    exponents = [f"{measure.exponent(values, column):.2f}" for column in columns.values()]
    return table([axis, *columns], [*rows, ["exponent", *exponents]])


def gigabytes(count: float) -> str:
    """Bytes in units of 10^9."""
    return f"{count / 1e9:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first on the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return (
            " | ".join(
                [f"| {first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in rest)]
            )
            + " |"
        )

    rule = "|".join(["|" + "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])])
    return "\n".join([line(head), rule + "|", *map(line, rows)])
