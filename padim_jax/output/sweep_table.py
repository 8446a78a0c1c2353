"""The table of a sweep: all categories beside the published results, as data and as text.

`build` turns finished runs into the contents of table.json; the rest only renders that.
"""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from padim_jax.config.datasets import MVTEC_AD
from padim_jax.config.settings import Config
from padim_jax.output import published
from padim_jax.output.published import AVERAGE, METRICS, TOLERANCE, Published
from padim_jax.output.tables import Table, markdown_text
from padim_jax.system import paths
from padim_jax.system.paths import Path

MARK = "!"
CSV_KEYS = ("metric", "source", "quantity")  # columns before those of the categories
NAMES = ("table.csv", "table.md", "table.json")  # in the order in which they are written


def build(
    config: Config,
    finished: Mapping[tuple[str, int], Mapping[str, Any]],
    failed: Mapping[str, str],
    categories: Iterable[str],
) -> dict[str, Any]:
    """Combine the runs of a sweep.

    Args:
      config: configuration of the sweep.
      finished: contents of metrics.json of each finished run, by category and number of the
        repeat.
      failed: error messages, by category, or by "category/repeat".
      categories: all categories of the sweep. Those neither finished nor failed are missing.

    Returns:
      JSON values, with the metrics under their keys in metrics.json:

        title, settings (text by name), tolerance (by metric), failed, missing,
        legend (sentences that belong below the table)
        categories: those with a finished run; textures first, as published
        metrics: keys, in the order of the tables
        this_run: by metric, then by category or "Avg": mean, std (n - 1; None for one
          run) and values of the repeats; mean is None if undefined. "Avg" is over the
          categories that have a mean, its std and values over the repeats that have
          them all.
        published: for each source its name as source, reference (publication or page),
          url, read, note, settings (a sentence), differing_settings (ours and theirs),
          same_settings, and by metric values, differences (this run minus published) and
          out_of_tolerance (categories). "Avg" is over the same categories as this run's,
          and absent if that is impossible. A category with other numbers of images than
          the published ones has no values; see `published.not_compared`.
    """
    finished = {
        (_name(config, category), repeat): measured
        for (category, repeat), measured in finished.items()
    }
    done = sorted({category for category, _ in finished}, key=_place)
    tried = {*done, *(name.partition("/")[0] for name in failed)}
    this_run = {key: _statistics(key, done, finished) for key in METRICS}
    apart = _not_compared(config, finished)
    sources = [
        _compare(config, item, this_run, finished, apart)
        for item in published.applicable(config)
    ]
    table = {
        "title": config.title,
        "settings": _settings(config),
        "categories": done,
        "metrics": list(METRICS),
        "this_run": this_run,
        "published": [source for source in sources if any(source["values"].values())],
        "tolerance": TOLERANCE,
        "failed": dict(failed),
        "missing": sorted({_name(config, one) for one in categories} - tried, key=_place),
    }
    return table | {"legend": _legend(config, table, finished)}


def write(folder: Path, table: Mapping[str, Any]) -> None:
    """Write table.csv, table.md and, last, table.json.

    Args:
      folder: existing folder.
      table: result of `build`.
    """
    as_json = json.dumps(table, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    contents = (csv_table(table), markdown(table).encode(), as_json.encode())
    for name, content in zip(NAMES, contents, strict=True):
        paths.write(folder / name, content)


def markdown(table: Mapping[str, Any]) -> str:
    """Return one Markdown table per metric, with the columns of the published ones."""
    columns = [AVERAGE, *table["categories"]]
    settings = ", ".join(f"{name} {value}" for name, value in table["settings"].items())
    lines = [f"# {markdown_text(table['title'])}", "", markdown_text(settings)]
    for key in table["metrics"]:
        ours = table["this_run"][key]
        rows = [["this run", *(_mean(ours.get(column)) for column in columns)]]
        for source in _sources_with(table, key):
            theirs, marked = source["values"][key], source["out_of_tolerance"][key]
            differences = source["differences"][key]
            rows.append([source["source"], *(_number(theirs.get(x)) for x in columns)])
            cells = (_difference(differences.get(x), x in marked) for x in columns)
            rows.append([f"difference to {source['source']}", *cells])
        lines += ["", f"## {METRICS[key]}", ""]
        lines += Table(["", *map(_heading, columns)], rows).markdown()
    lines += ["", *(f"- {markdown_text(sentence)}" for sentence in table["legend"]), ""]
    return "\n".join(lines)


def csv_table(table: Mapping[str, Any]) -> bytes:
    """Return CSV with a row for each metric, source and quantity, and a column per category.

    Quantities: mean, std and runs of this run; value, difference and mark ("!" beyond the
    tolerance) of each source. An empty cell is undefined or unknown.
    """
    columns = [AVERAGE, *table["categories"]]
    rows: list[tuple[Any, ...]] = []

    def write_row(key: str, source: str, quantity: str, values: Mapping[str, Any]) -> None:
        cells = (values.get(column) for column in columns)
        shown = (f"{cell:.6f}" if isinstance(cell, float) else cell for cell in cells)
        rows.append((key, source, quantity, *shown))

    for key in table["metrics"]:
        ours = table["this_run"][key]
        for quantity in ("mean", "std"):
            row = {column: found[quantity] for column, found in ours.items()}
            write_row(key, "this run", quantity, row)
        runs = {column: len(found["values"]) for column, found in ours.items()}
        write_row(key, "this run", "runs", runs)
        for source in _sources_with(table, key):
            write_row(key, source["source"], "value", source["values"][key])
            write_row(key, source["source"], "difference", source["differences"][key])
            marks = dict.fromkeys(source["out_of_tolerance"][key], MARK)
            write_row(key, source["source"], "mark", marks)
    return Table((*CSV_KEYS, *columns), rows).csv()


def text(table: Mapping[str, Any]) -> str:
    """Return text for a terminal: a row per category, with differences to one source."""
    sources = table["published"]
    reference = next((source for source in sources if source["same_settings"]), None)
    reference = reference or next(iter(sources), None)
    names = [*table["categories"], AVERAGE]
    columns = [["", *names]]
    for key in table["metrics"]:
        ours = table["this_run"][key]
        columns.append([METRICS[key], *(_mean(ours.get(name)) for name in names)])
        if reference and reference["values"][key]:
            differences = reference["differences"][key]
            marked = reference["out_of_tolerance"][key]
            cells = (_difference(differences.get(x), x in marked, "") for x in names)
            # Room for a mark, so that numbers stay aligned.
            columns.append(["diff ", *(x if x.endswith(MARK) else f"{x} " for x in cells)])
    head, *rows = zip(*columns, strict=True)
    lines = [line.rstrip() for line in Table(head, rows).text(" ")]
    foot = [f"diff: to {reference['source']}"] if reference else []
    return "\n".join([table["title"], "", *lines, "", *foot, *table["legend"]])


def _name(config: Config, category: str) -> str:
    """Return a category's name in the tables: without categories the name of the root."""
    return category or paths.absolute(config.dataset.root).name


def _statistics(
    key: str, categories: Sequence[str], finished: Mapping[tuple[str, int], Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return mean, std and values of one metric by category, and of their average."""
    runs = {
        category: {
            repeat: measured[key]
            for (name, repeat), measured in sorted(finished.items())
            if name == category and measured[key] is not None
        }
        for category in categories
    }
    found = {category: _spread(list(runs[category].values())) for category in categories}
    defined = [category for category in categories if runs[category]]
    repeats = [set(runs[category]) for category in defined]
    # Channels are drawn once for all categories, so the average has a spread of its own.
    average = _spread(
        [
            statistics.fmean(runs[category][repeat] for category in defined)
            for repeat in sorted(set.intersection(*repeats) if repeats else ())
        ]
    )
    if defined:
        average["mean"] = statistics.fmean(found[category]["mean"] for category in defined)
    return {AVERAGE: average, **found}


def _spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values) if values else None,
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def _compare(
    config: Config,
    item: Published,
    this_run: Mapping[str, Mapping[str, Mapping[str, Any]]],
    finished: Mapping[tuple[str, int], Mapping[str, Any]],
    apart: Mapping[str, str],
) -> dict[str, Any]:
    """Compare one source with this run, without the categories that are not comparable."""
    differing = published.differing_settings(config, item)
    if item.settings.get("model.seed") in _seeds(config, finished):
        differing.pop("model.seed", None)  # one of those that are averaged
    values, differences, beyond = {}, {}, {}
    for key in METRICS:
        ours = {
            column: found["mean"]
            for column, found in this_run[key].items()
            if found["mean"] is not None
        }
        theirs = {
            category: value
            for category, value in item.values.get(key, {}).items()
            if category not in apart and not (category == AVERAGE and apart)
        }
        average = _average(theirs, [name for name in ours if name != AVERAGE])
        theirs.pop(AVERAGE, None)
        if average is not None:
            theirs[AVERAGE] = average
        values[key] = {column: theirs[column] for column in ours if column in theirs}
        # Rounded, so that 0.983 - 0.973 is not above 0.01; never -0.0.
        differences[key] = {
            column: round(ours[column] - value, 6) + 0.0
            for column, value in values[key].items()
        }
        beyond[key] = [
            column
            for column, difference in differences[key].items()
            if abs(difference) > TOLERANCE[key]
        ]
    return {
        "source": item.name,
        "reference": item.source,
        "url": item.url,
        "read": item.read,
        "note": item.note,
        "settings": published.in_words(item.name, differing),
        "differing_settings": differing,
        "same_settings": not differing,
        "values": values,
        "differences": differences,
        "out_of_tolerance": beyond,
    }


def _not_compared(
    config: Config, finished: Mapping[tuple[str, int], Mapping[str, Any]]
) -> dict[str, str]:
    """Return why categories are not compared, by category; one run suffices."""
    reasons = {}
    for (category, _), measured in finished.items():
        if why := published.not_compared(config, category, measured):
            reasons.setdefault(category, why)
    return reasons


def _average(theirs: Mapping[str, float], ours: Sequence[str]) -> float | None:
    """Return the published average over the categories `ours`; None if unknown."""
    if set(ours) == set(MVTEC_AD) and AVERAGE in theirs:
        return theirs[AVERAGE]
    if ours and all(category in theirs for category in ours):
        return round(statistics.fmean(theirs[category] for category in ours), 6)
    return None


def _seeds(
    config: Config, finished: Mapping[tuple[str, int], Mapping[str, Any]]
) -> Sequence[int]:
    """Return channel seeds of the repeats, if there is more than one."""
    repeats = sorted({repeat for _, repeat in finished})
    return [config.model.seed + repeat for repeat in repeats] if config.repeats > 1 else []


def _settings(config: Config) -> dict[str, str]:
    model, image, map_ = config.model, config.image, config.map
    size = f"{image.resize[0]}x{image.resize[1]} {image.method}"
    if image.crop:
        size += f", {image.crop_at} crop {image.crop[0]}x{image.crop[1]}"
    if image.rotation:
        size += f", turned by up to {image.rotation:g} degrees"
    seeds = str(model.seed)
    if config.repeats > 1:
        seeds += f" to {model.seed + config.repeats - 1}"
    changed = {
        "train_images": (config.dataset.train_images, 0),
        "pooling": (model.pooling, 1),
        "upsample": (model.upsample, "nearest"),
        "regularization": (model.regularization, 0.01),
    }
    return {
        "dataset": config.dataset.name,
        "backbone": f"{model.backbone} {'+'.join(model.layers)}",
        "weights": model.weights,
        "channels": f"{model.channels} ({model.reduction})",
        "seed": seeds,
        "images": size,
        "map": f"{map_.upsample}, sigma {map_.sigma:g}",
        **{name: str(value) for name, (value, usual) in changed.items() if value != usual},
    }


def _legend(
    config: Config,
    table: Mapping[str, Any],
    finished: Mapping[tuple[str, int], Mapping[str, Any]],
) -> list[str]:
    sentences = []
    done = table["categories"]
    if done:
        sentences.append(
            f"{AVERAGE}: of {len(done)} "
            + ("category" if len(done) == 1 else "categories")
            + ("; of published figures the average over the same" if table["published"] else "")
        )
    if config.repeats > 1:
        sentences.append(
            f"mean ± standard deviation of {config.repeats} runs, with model.seed "
            f"{table['settings']['seed']}"
        )
        for category in done:
            count = sum(name == category for name, _ in finished)
            if count < config.repeats:
                sentences.append(f"{category}: {count} of {config.repeats} runs")
    if table["published"]:
        compared = {
            key for source in table["published"] for key in METRICS if source["values"][key]
        }
        limits = (f"{METRICS[key]} {TOLERANCE[key]:g}" for key in METRICS if key in compared)
        sentences.append(
            f"difference: this run minus published; {MARK} marks what rounding and another "
            f"draw of the channels do not explain: above {', '.join(limits)}"
        )
        sentences += [source["settings"] for source in table["published"]]
    apart = _not_compared(config, finished)
    sentences += [f"{category}: {apart[category]}" for category in done if category in apart]
    if apart and table["published"]:
        sentences.append(
            f"no published {AVERAGE}: it would be of other categories than this run's"
        )
    for category in done:
        runs = [found for (name, _), found in finished.items() if name == category]
        if leaks := {leak for found in runs for leak in found.get("leaks", ())}:
            sentences.append(
                f"{category}: {len(leaks)} of {runs[0]['test_images']} test images were "
                "trained on too"
            )
        if skipped := {one["path"] for found in runs for one in found.get("skipped", ())}:
            sentences.append(f"{category}: {len(skipped)} images skipped, see skipped.csv")
        reasons = {
            (METRICS[key], reason)
            for found in runs
            for key, reason in found.get("undefined", {}).items()
            if key in METRICS
        }
        sentences += [
            f"{category}: {metric} undefined, {reason}" for metric, reason in sorted(reasons)
        ]
    failed = table["failed"].items()
    sentences += [f"failed: {name}: {' '.join(text.split())}" for name, text in failed]
    if table["missing"]:
        sentences.append(f"not evaluated: {', '.join(table['missing'])}")
    return sentences


def _sources_with(table: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    return [source for source in table["published"] if source["values"][key]]


def _place(category: str) -> tuple[int, str]:
    """Return a sort key: the published tables' order, then other categories by name."""
    known = MVTEC_AD.index(category) if category in MVTEC_AD else len(MVTEC_AD)
    return known, category


def _heading(column: str) -> str:
    return column.replace("_", " ").title() if column in MVTEC_AD else column


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(found: Mapping[str, Any] | None) -> str:
    if found is None or found["mean"] is None:
        return "-"
    std = found["std"]
    return _number(found["mean"]) + ("" if std is None else f" ± {std:.3f}")


def _difference(value: float | None, marked: bool, space: str = " ") -> str:
    return "-" if value is None else f"{value:+.3f}" + (space + MARK if marked else "")
