"""What the benchmark prints: Markdown tables of what was measured. Standard library only."""

import math
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


def overhead(single: dict[str, Any]) -> str:
    """What is mapped over one device, beside the same under plain jit."""
    rows = [
        [
            what,
            f"{times['mapped'] * 1e3:.1f}",
            f"{times['plain'] * 1e3:.1f}",
            f"{times['ratio'] - 1:+.1%}",
            f"{times['spread']:.1%}",
            f"{times['work_ratio'] - 1:+.1%}",
            str(times["pairs"]),
        ]
        for what, times in single["overhead"].items()
    ]
    head = ["of a batch", "pmap ms", "jit ms", "pmap adds", "spread", "to the cores' work"]
    shown = table([*head, "pairs"], rows)
    if single["others"] > QUIET:
        shown += f"\n\nOther processes took {single['others']:.0%} of the machine."
    return shown


def devices(report: dict[str, Any]) -> str:
    """What devices send beside the theory, and how they agree with one."""
    rows = []
    for name, case in report.items():
        for number, point in enumerate(points_of(case)):
            beside = report["prediction"]["batches"][name][number]
            theory = beside["theory"]
            fit, fit_flags = sent(point, "fit")
            score, _ = sent(point, "score")
            rows.append(
                [
                    name if number == 0 else "",
                    str(point["devices"]),
                    f"{point['statistics_bytes'] / 1e6:.1f}",
                    f"{fit / 1e3:.1f}",
                    f"{theory['embeddings'] / 1e3:.1f}",
                    f"{score / 1e3:.1f}",
                    f"{sum(theory.values()) / 1e3:.1f}",
                    f"{fit_flags:.0f}",
                    f"{point['statistics_difference']:.0e}",
                    f"{max(point['map_difference'], point['score_difference']):.0e}",
                    f"{point['fit']['median'] * 1e3:.1f}",
                    ", ".join(f"{s * 1e3:.1f} ({of})" for of, s in beside["seconds"].items()),
                ]
            )
    head = ["", "devices", "statistics MB a device", "fit sends kB/image", "theory"]
    head += ["scoring sends kB/image", "theory", "flags B/image", "statistics differ"]
    head += ["maps, scores differ", "fit ms a batch", "predicted ms"]
    if any(p["device_kind"] != "cpu" for c in report.values() for p in points_of(c)):
        return table(head, rows)
    shown = table(head[:-2], [row[:-2] for row in rows])
    return (
        f"{shown}\n\nDevices are parts of one processor: they show what is right and what is "
        "sent, not how fast."
    )


def points_of(case: Any) -> Sequence[dict[str, Any]]:
    """A case's numbers of devices; nothing of what else is in a report."""
    return case["devices"] if isinstance(case, dict) and "single" in case else ()


def sent(point: dict[str, Any], what: str) -> tuple[float, float]:
    """Bytes that leave all devices for an image: of all-to-alls, and of all else."""
    exchanged = rest = 0.0
    for collective in point[what]["collectives"]:
        each = collective["bytes"] * point["devices"] / point["batch"]
        if collective["name"] == "all-to-all":
            exchanged += each
        else:
            rest += each
    return exchanged, rest


def prediction(found: dict[str, Any]) -> str:
    """Predicted fits: in all and memory, then what they are made of."""
    limit, gpus = found["memory_limit"], (1, 8, 64)
    groups: dict[tuple[str, int], dict[tuple[int, int], Any]] = {}
    for row in found["rows"]:
        if row["channels"] < 1792:  # of which only the memory is of interest
            key = (f"{row['backbone']}-{row['channels']}", row["size"])
            groups.setdefault(key, {})[row["images"], row["gpus"]] = row
    counts = sorted({row["images"] for row in found["rows"]})

    def total(row: dict[str, Any], kind: str) -> str:
        return duration(row[kind]["total"]) if row["memory"] <= limit else "-"

    def totals(kind: str) -> str:
        lines = [
            [
                case,
                str(size),
                *(" / ".join(total(rows[n, k], kind) for k in gpus) for n in counts),
            ]
            for (case, size), rows in groups.items()
        ]
        return table(["", "pixels", *(f"{n:,} images" for n in counts)], lines)

    sizes = sorted({size for _, size in groups})
    held = [
        [
            case,
            *(
                " / ".join(gigabytes(groups[case, size][counts[-1], k]["memory"]) for k in gpus)
                for size in sizes
            ),
        ]
        for case in dict.fromkeys(case for case, _ in groups)
    ]
    parts = []
    stages_ = ("decode", "all_to_all", "moments", "finalise", "checkpoint")
    for (case, size), rows in groups.items():
        for k in gpus if size in (256, 1024) else ():
            row = rows[100_000, k]
            decode, *rest = (duration(row["cautious"][stage]) for stage in stages_)
            cells = [case, str(size), str(k), decode]
            cells += [duration(row["cautious, cached"]["decode"])]
            cells += [duration(row[kind]["backbone"]) for kind in ("cautious", "hopeful")]
            parts.append([*cells, *rest])
    head = ["", "pixels", "GPUs", "decode", "cached", "backbone", "backbone, hopeful"]
    return (
        f"Fits on {' / '.join(map(str, gpus))} GPUs, cautious, images decoded\n\n"
        f"{totals('cautious')}\n\nThe same, images cached\n\n{totals('cautious, cached')}\n\n"
        f"100,000 images, cautious, by stage\n\n"
        f"{table([*head, 'all-to-all', 'moments', 'finalise', 'checkpoint'], parts)}\n\n"
        f"GB of memory a GPU at the peak, of {' / '.join(map(str, gpus))} GPUs\n\n"
        f"{table(['', *(f'{size} pixels' for size in sizes)], held)}\n\n"
        f"More than {limit / 1e9:.0f} GB on a single GPU: {unfit(found)}."
    )


def unfit(found: dict[str, Any]) -> str:
    """What needs more than one GPU, and from how many on it fits."""
    least: dict[str, int | None] = {}
    for row in found["rows"]:
        name = f"{row['backbone']}-{row['channels']} at {row['size']}"
        least.setdefault(name, None)
        if row["memory"] <= found["memory_limit"]:
            known = least[name]
            least[name] = min(row["gpus"], known) if known else row["gpus"]
    said = [
        f"{name} from {gpus or 'more'} GPUs on" for name, gpus in least.items() if gpus != 1
    ]
    return "; ".join(said) or "nothing"


def validation(found: dict[str, Any]) -> str:
    """The same model with this machine's numbers, beside what was measured on it."""
    cases: dict[str, dict[str, str]] = {}
    for row in found["validation"]:
        predicted, measured = row["predicted"], row["measured"]
        cases.setdefault(row["case"], {})[row["what"]] = (
            f"{predicted:.3g} / {measured:.3g} ({predicted / measured:.2f})"
        )
    head = ["predicted / measured seconds", *next(iter(cases.values()))]
    return table(head, [[case, *stages_.values()] for case, stages_ in cases.items()])


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    units = ((0.1, 1e-3, "ms"), (100, 1, "s"), (6000, 60, "min"), (math.inf, 3600, "h"))
    size, unit = next((size, unit) for limit, size, unit in units if seconds < limit)
    return f"{float(f'{seconds / size:.2g}'):g} {unit}"  # two digits, no exponent


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
