"""The page of one run: metrics, thresholds to try, curves and a gallery."""

import concurrent.futures
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool

from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config
from padim_jax.core import metrics, verdicts
from padim_jax.core.suspects import Suspects
from padim_jax.core.suspects import text as suspects_text
from padim_jax.data import roi
from padim_jax.output import figures, published, results
from padim_jax.output.html import charts, document, pictures
from padim_jax.output.html.document import name, number, text
from padim_jax.output.results import Scored
from padim_jax.output.tables import Table

# Names of the four outcomes, as in `run.js`.
_FOUND, _MISSED, _ALARM, _PASSED = "found", "missed", "false alarm", "passed"
_ELSEWHERE = "found elsewhere"  # called anomalous, but not at the defect
_STEPS = 1000  # of the slider
_INTERVALS = "In brackets: 95 % intervals (Clopper-Pearson)"
_PER_DEFECT = (
    ("image AUROC", "image_auroc"),
    ("pixel AUROC", "pixel_auroc"),
    ("AUPRO", "aupro"),
)


def run_page(
    config: Config,
    scored: Scored,
    measured: Mapping[str, Any],
    load_image: pictures.LoadImage,
    suspects: Suspects | None = None,
) -> str:
    """Return `report.html` of one evaluation, below 15 MB for any number of images.

    Histogram, curves and counts cover all images. If not all pictures fit, the page has those
    with errors first, and states how many it shows. It opens with the threshold from normal
    images, or if there is none with that of the best F1.

    Args:
      config: configuration of the run; its paths are not shown.
      scored: test set of at least one image.
      measured: contents of metrics.json.
      load_image: function from an image's number to the preprocessed image; called from several
        threads.
      suspects: training images by their left-out scores, if this run fitted them.

    Returns:
      HTML, all of which can be encoded.

    Raises:
      ValueError: there is no image.
    """
    if not len(scored.scores):
        raise ValueError("a report needs at least one image")
    named, labels = _named(measured), scored.labels
    elsewhere = _elsewhere(scored)
    types = [record.defect_type for record in scored.records]
    scale = figures.ColorScale(*measured["color_scale"])
    pixel, pixel_meaning = _pixel_threshold(measured)
    thresholds = [value for _, value, _ in named]
    order = pictures.telling_order(scored.scores, labels, types, thresholds, elsewhere)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        diagrams = pool.submit(_diagrams, scored, measured)
        shown = pictures.encode(scored, order, scale, pixel, load_image)
        drawn = diagrams.result()

    axis = charts.score_axis(scored.scores)
    start = thresholds[0] if thresholds else None
    body = "\n".join(
        [
            _header(config, scored),
            '<main id="main">',
            _metrics(config, scored, measured, start),
            _thresholds(scored, axis, named, start),
            _rates(measured["normal_threshold"]),
            _suspects(suspects, scale, scored.outside),
            drawn,
            _gallery(scored, shown, start, _legend(scale, pixel_meaning)),
            _data(measured.get("data")),
            _settings(config),
            "</main>",
        ]
    )
    of_types = [labels & (np.array(types) == kind) for kind in measured["per_defect"]]
    groups = [~labels, *of_types]
    in_place = np.array([place is True for place in scored.in_place or ()])
    known = np.array([place is not None for place in scored.in_place or ()])
    data = {
        # Normal images first, then each defect type as in the table, each ascending.
        "groups": [document.floats(np.sort(scored.scores[group])) for group in groups],
        # Upper limits of shares by count: for normal images, for defects, for each type.
        "limits": [_limits(group) for group in (~labels, labels, *of_types)],
        # For all defects with masks, then for each type: scores of those whose strongest region
        # lies at the defect, and limits.
        "places": None
        if scored.in_place is None
        else [
            [document.floats(np.sort(scored.scores[group & in_place])), _limits(group & known)]
            for group in (labels, *of_types)
        ],
        "low": axis.low,
        "high": axis.high,
        "steps": _STEPS,
        "start": start,
        "named": thresholds,
    }
    return document.page(f"{config.title}: PaDiM report", body, data, ["run.js"])


def _limits(group: Bool[np.ndarray, " n"]) -> list[float]:
    """Return upper limits of shares of these images, by count."""
    return np.round(verdicts.upper_limits(int(np.count_nonzero(group))), 6).tolist()


def _elsewhere(scored: Scored) -> list[int]:
    """Return defects whose map is highest at a wrong place, the highest scored first."""
    places = scored.in_place or ()
    ranked = np.argsort(-scored.scores, kind="stable").tolist()
    return [index for index in ranked if places and places[index] is False]


def _named(measured: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Return label, value and meaning of the image thresholds, the initial one first."""
    named = []
    transfer = measured.get("transfer")
    if normal := measured["normal_threshold"]:
        images = f"{normal['images']} normal images"
        if normal["groups"] is not None:
            images += f" in {normal['groups']} groups"
        meaning = (
            f"from {images} ({normal['origin'].replace('_', ' ')}), "
            f"{_percent(normal['image_rate'])} false alarms asked for"
        )
        if normal["image_promised_rate"] > normal["image_rate"]:
            meaning += f", {100 * normal['image_promised_rate']:.2g} % promised by so few"
        label = "recommended"
        if normal["warning"]:
            meaning += f". Warning: {normal['warning']}"
            label = "normal images"
        if transfer and transfer["unlike"]:
            meaning += ". Warning: normal test images are unlike the training images"
            label = "normal images"
        if odd := measured.get("suspects"):
            meaning += f". Set by {len(odd['images'])} odd training images, see below"
            if odd["threshold_without"] is not None:
                meaning += f"; {odd['threshold_without']:.4g} without them"
        named.append((label, _float32(normal["image_threshold"]), meaning))
    if measured["image_f1_threshold"] is not None:
        meaning = "the best F1 on these very labels: optimistic, only to compare"
        named.append(("best F1", _float32(measured["image_f1_threshold"]), meaning))
    return named


def _pixel_threshold(measured: Mapping[str, Any]) -> tuple[float | None, str]:
    """Return the pixel threshold, and its meaning."""
    if normal := measured["normal_threshold"]:
        value = normal["pixel_threshold"]
        if not normal["pixel_rate"]:
            share = normal["image_rate"] / (2 if normal.get("decide") == "either" else 1)
            have = f"as {_percent(share)} of normal images have any"
            return value, f"pixels from {value:.4g}, {have}; boxes around regions that count"
        rate = _percent(normal["pixel_rate"])
        return value, f"pixels from {value:.4g}, as {rate} of normal pixels are"
    if (value := measured["pixel_f1_threshold"]) is not None:
        return value, f"pixels from {value:.4g}, the best F1 on these very masks"
    return None, "no pixel threshold, nothing outlined"


def _float32(threshold: float) -> float:
    # As NumPy compares it with the scores, and so does the page's script.
    return float(np.float32(threshold))


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g} %"


def _share(called: Bool[np.ndarray, " n"]) -> str:
    """Format the number of these images called anomalous, with the 95 % interval, as HTML."""
    if not len(called):
        return "&ndash;"
    count, _, interval = verdicts.share_text(verdicts.share(called)).partition(" (")
    return f"{count} <small>({interval}</small>"


def _header(config: Config, scored: Scored) -> str:
    model, (height, width) = config.model, config.image.size
    weights = pathlib.PurePath(model.weights).name  # its folder is private
    anomalous = int(scored.labels.sum())
    facts = (
        f"{model.backbone} · {' + '.join(model.layers)} · {model.channels} channels "
        f"({model.reduction.replace('_', '-')}) · {weights} · {width}x{height} px · "
        f"{len(scored.records)} test images: {len(scored.records) - anomalous} normal, "
        f"{anomalous} anomalous"
    )
    return document.header(config.title, facts)


def _metrics(
    config: Config, scored: Scored, measured: Mapping[str, Any], start: float | None
) -> str:
    rows = results.comparison_rows(config, dict(measured))
    sources = list(dict.fromkeys(source for *_, theirs in rows for source, _ in theirs))
    head = ["metric", "this run"]
    head += [f"{name(source)}<small>and difference</small>" for source in sources]
    lines = []
    for metric, ours, theirs in rows:
        cells = [text(metric), "undefined" if ours is None else number(ours)]
        values = dict(theirs)
        for source in sources:
            value = values.get(source)
            off = None if ours is None or value is None else ours - value
            shown = f' <span class="diff">{document.difference(off)}</span>'
            cells.append(number(value, 3) + (shown if off is not None else ""))
        lines.append(cells)
    found = document.table(Table(head, lines), "Metrics of the test set")
    if notes := _notes(config, measured, sources):
        found += f'<ul class="notes">{"".join(f"<li>{name(note)}</li>" for note in notes)}</ul>'
    parts = [f"<div>{found}</div>"]
    if measured["per_defect"]:
        parts.append(f"<div>{_per_defect(scored, measured, start)}</div>")
    return f'<section class="columns" aria-label="Metrics">{"".join(parts)}</section>'


def _notes(config: Config, measured: Mapping[str, Any], sources: list[str]) -> list[str]:
    """Return notes on the numbers in the table."""
    notes = [
        published.in_words(source.name, differing)
        for source in published.applicable(config)
        if source.name in sources
        and (differing := published.differing_settings(config, source))
    ]
    if measured.get("resolution") == "full":
        notes.append(results.FULL)
    if (normal := measured["normal_threshold"]) and "decide" in normal:
        notes.append(_decided(normal))
    if why := published.not_compared(config, config.category, measured):
        notes.append(why)
    notes += dict.fromkeys(f"undefined: {r}" for r in measured.get("undefined", {}).values())
    if (found := measured.get("transfer")) and found["unlike"]:
        notes.append(f"warning: {results.transfer_text(found)}")
    if leaks := measured.get("leaks"):
        some = ", ".join(leaks[:3]) + ", …" * (len(leaks) > 3)
        notes.append(f"{len(leaks)} test images were trained on too: {some}")
    if skipped := measured.get("skipped"):
        some = ", ".join(one["path"] for one in skipped[:3]) + ", …" * (len(skipped) > 3)
        notes.append(f"{len(skipped)} images skipped, listed in skipped.csv: {some}")
    return notes


def _decided(normal: Mapping[str, Any]) -> str:
    """Describe the outcome of verdicts that are not by the score alone."""
    by = "regions" if normal["decide"] == "regions" else "score or regions"
    found, alarms = (
        verdicts.share_text(normal[key]) if normal[key]["total"] else "none"
        for key in ("image_found", "image_false_alarms")
    )
    return (
        f"images are called anomalous by {by} (config.decide={normal['decide']}): {found} "
        f"defects found, {alarms} false alarms; counts at a threshold below are by score alone"
    )


def _per_defect(scored: Scored, measured: Mapping[str, Any], start: float | None) -> str:
    types, lines = np.array([record.defect_type for record in scored.records]), []
    for row, (kind, values) in enumerate(measured["per_defect"].items()):
        chosen = scored.labels & (types == kind)
        found = "&ndash;" if start is None else _share(scored.scores[chosen] >= start)
        cells = [name(kind), f'<span data-found="{row}">{found}</span>']
        if scored.in_place is not None:
            place = _found_in_place(scored, chosen, start)
            cells.append(f'<span data-place="{row}">{place}</span>')
        lines.append([*cells, *(number(values[key]) for _, key in _PER_DEFECT)])
    head = ["type", "found at the threshold"]
    head += ["in the right place"] * (scored.in_place is not None)
    head += [n for n, _ in _PER_DEFECT]
    caption = "By defect type, each against all normal images"
    return document.table(Table(head, lines), f"{caption}<small>{_INTERVALS}</small>")


def _found_in_place(scored: Scored, chosen: Bool[np.ndarray, " n"], start: float | None) -> str:
    """Format the share of the selected defects with masks that are found in place, as HTML."""
    places = scored.in_place or ()
    if start is None:
        return "&ndash;"
    known = [i for i in np.flatnonzero(chosen).tolist() if places[i] is not None]
    found = [bool(places[i]) and scored.scores[i] >= start for i in known]
    return _share(np.array(found, bool))


def _thresholds(
    scored: Scored, axis: charts.Axis, named: list[tuple[str, float, str]], start: float | None
) -> str:
    labels = scored.labels
    marks = [(label, value) for label, value, _ in named]
    histogram = charts.histogram(scored.scores, labels, axis, marks)
    position = _STEPS if start is None else round(_STEPS * axis.part(start))
    choices = "".join(
        f'<li><button type="button" data-named="{i}">{text(label)}: {value:.4g}</button> '
        f"<span>{text(meaning)}</span> {_cost(scored, value)}</li>"
        for i, (label, value, meaning) in enumerate(named)
    )
    if not any(label == "recommended" for label, *_ in named):
        choices += (
            "<li>No threshold is recommended: that takes normal images which are independent "
            "and like those to come.</li>"
        )

    def outcome(which: str, label: str, chosen: Bool[np.ndarray, " n"], above: bool) -> str:
        kind = which.replace(" ", "-")
        count = 0
        if start is not None:
            count = int(np.count_nonzero((scored.scores[chosen] >= start) == above))
        shown = count if start is not None and chosen.any() else "&ndash;"
        nothing = "" if count else ' class="nothing"'
        return (
            f'<td class="{kind}"><button type="button" data-filter="{which}" '
            f'title="show these in the gallery"><b id="count-{kind}"{nothing}>{shown}</b> '
            f"{label}</button></td>"
        )

    def rate(key: str, label: str, shown: str = "&ndash;") -> str:
        return f'<div><dt>{label}</dt><dd id="rate-{key}">{shown}</dd></div>'

    def called(chosen: Bool[np.ndarray, " n"]) -> str:
        return "&ndash;" if start is None else _share(scored.scores[chosen] >= start)

    counts = (
        '<table class="outcomes"><caption>Images at this threshold</caption>'
        "<thead><tr><td></td>"
        '<th scope="col">called anomalous</th><th scope="col">called normal</th></tr></thead>'
        '<tbody><tr><th scope="row">anomalous</th>'
        + outcome(_FOUND, "found", labels, True)
        + outcome(_MISSED, "missed", labels, False)
        + '</tr><tr><th scope="row">normal</th>'
        + outcome(_ALARM, "false alarms", ~labels, True)
        + outcome(_PASSED, "passed", ~labels, False)
        + "</tr></tbody></table>"
    )
    place = ""
    if scored.in_place is not None:
        shown = _found_in_place(scored, labels, start)
        place = rate("place", "found in the right place", shown)
    rates = (
        '<dl class="rates">'
        + rate("recall", "found of the anomalous (recall)", called(labels))
        + place
        + rate("alarms", "false alarms of the normal", called(~labels))
        + rate("precision", "anomalous of those called so (precision)")
        + rate("f1", "F1")
        + f'</dl><p class="faint">{_INTERVALS}</p>'
    )
    value = "" if start is None else f"{start:.6g}"
    return f"""<section class="columns wide-left" aria-labelledby="threshold-title">
<div><h2 id="threshold-title">Image scores and threshold</h2>
<div class="plot">{histogram}
<input type="range" id="slider" class="script" min="0" max="{_STEPS}" step="1"
 value="{position}" autocomplete="off" aria-label="threshold of the image score"
 aria-describedby="slider-help"></div>
<p class="script threshold"><label>threshold <input type="number" id="threshold" step="any"
 value="{value}" autocomplete="off"></label>
<span id="slider-help" class="faint">drag, click into the histogram, or arrow keys</span></p>
<ul class="named">{choices}</ul></div>
<div>{counts}{rates}</div>
<p class="visually-hidden" id="spoken" role="status"></p>
</section>"""


def _cost(scored: Scored, threshold: float) -> str:
    """Format the outcome of a threshold on the test images as HTML."""
    called, labels = scored.scores >= np.float32(threshold), scored.labels
    costs = [
        f"{words} {_share(called[chosen])}"
        for words, chosen in (("false alarms", ~labels), ("defects found", labels))
        if chosen.any()
    ]
    return f'<span class="cost">On the test images: {", ".join(costs)}</span>'


def _rates(normal: Mapping[str, Any] | None) -> str:
    """Return a table of thresholds by the false alarms they promise, and their outcomes."""
    if not normal or not normal["rates"]:
        return ""
    plain = results.rate_table(normal)
    escaped = Table(plain.columns, [list(map(text, row)) for row in plain.rows])
    caption = "Thresholds by the false alarms that they promise, and what they do here"
    return f"<section>{document.table(escaped, caption)}</section>"


def _suspects(
    found: Suspects | None,
    scale: figures.ColorScale,
    outside: Bool[np.ndarray, "h w"] | None,
) -> str:
    """Return the training images of the highest left-out scores, which set the threshold."""
    if found is None or not found.images:
        return ""
    items = []
    strips = pictures.strip(found.images, found.maps, found.aspects, scale, outside)
    for i, url in enumerate(strips):
        expected = float(found.expected[i])
        facts = f"{found.scores[i]:.4g}"
        if not np.isnan(expected):
            facts += f" (expected at this rank: {expected:.4g})"
        if i < found.count:
            facts += ", suspect"
        items.append(
            f'<li class="pair"><img src="{url}" alt="{text(found.paths[i])}">'
            f"<p><b>{text(facts)}</b></p><p class='what'>{name(found.paths[i])}</p></li>"
        )
    said = "".join(f"<p>{name(line.strip())}</p>" for line in suspects_text(found).split("\n"))
    return (
        '<section aria-labelledby="suspects-title"><h2 id="suspects-title">Training images of '
        f"the highest scores, each left out</h2>{said}"
        f'<ol class="gallery pairs">{"".join(items)}</ol></section>'
    )


def _diagrams(scored: Scored, measured: Mapping[str, Any]) -> str:
    lines = [
        charts.Line(label, "second" if label.startswith("pixel") else "first", (fpr, tpr))
        for label, fpr, tpr in results.roc_curves(scored, measured)
    ]
    pro = []
    if measured["pixel_auroc"] is not None:
        assert scored.pixels is not None
        assert scored.pixels.curves is not None
        label = f"AUPRO {measured['aupro']:.4f}"
        pro.append(charts.Line(label, "second", scored.pixels.curves[1]))

    def words(title: str, shown: list[charts.Line]) -> str:
        return f"{title}: {'; '.join(line.label for line in shown) or 'undefined'}"

    rate = "false positive rate"
    roc = charts.curves(
        lines, 1.0, rate, "true positive rate", words("ROC curves", lines), dot="dot"
    )
    limit = metrics.AUPRO_MAX_FPR
    overlap = charts.curves(
        pro, limit, f"{rate} of pixels", "mean overlap of regions", words("PRO curve", pro)
    )
    return (
        '<section class="columns diagrams" aria-label="Curves">'
        f"<figure><figcaption><h2>ROC</h2> the dot is the threshold above</figcaption>{roc}"
        "</figure><figure><figcaption><h2>Per-region overlap</h2> area up to "
        f"{limit:g}</figcaption>{overlap}</figure></section>"
    )


def _legend(scale: figures.ColorScale, predicted: str) -> str:
    colors = figures.heat_map(np.linspace(scale.low, scale.high, 24)[None], scale)[0]
    bar = "".join(
        f'<rect x="{5 * i}" width="5.5" height="10" fill="rgb({r},{g},{b})"/>'
        for i, (r, g, b) in enumerate(colors.tolist())
    )
    return (
        f'<p class="legend"><span>heat map: {scale.low:.3g} '
        f'<svg width="120" height="10" aria-hidden="true">{bar}</svg> {scale.high:.3g}, '
        "the same for all images</span>"
        '<span><i class="truth"></i> ground truth</span>'
        f'<span><i class="predicted"></i> predicted: {predicted}</span></p>'
    )


def _gallery(
    scored: Scored, shown: Mapping[int, pictures.Picture], start: float | None, legend: str
) -> str:
    order = sorted(shown, key=lambda index: (-scored.scores[index], index))
    total = len(scored.records)
    some = ""
    if len(shown) < total:
        some = (
            f'<p class="some">{len(shown)} of {total} images shown, to keep this page below '
            "15 MB: errors first, then defects found elsewhere, the highest and lowest scores "
            "of each type, and an even sample. Counts, histogram and curves above are of all "
            "images.</p>"
        )
    kinds = dict.fromkeys(
        sorted((r.defect_type for r in scored.records), key=lambda k: (k == "good", k))
    )
    numbers = {
        kind: sum(scored.records[i].defect_type == kind for i in order) for kind in kinds
    }
    options = "".join(
        f'<option value="{row}">{text(kind)} ({numbers[kind]})</option>'
        for row, kind in enumerate(kinds)
    )
    rows = {kind: row for row, kind in enumerate(kinds)}
    cards = "\n".join(
        _card(scored, index, shown[index], start, rows[scored.records[index].defect_type])
        for index in order
    )
    views = "".join(
        f'<label><input type="radio" name="view" id="view-{key}" value="{key}"'
        f"{' checked' if key == 'image' else ''}>{label}<kbd>{i + 1}</kbd></label>"
        for i, (key, label) in enumerate(
            (("image", "image"), ("heat", "heat map"), ("mask", "mask"), ("lines", "outline"))
        )
    )
    outcomes = "".join(
        f'<option value="{value}">{label}</option>'
        for value, label in (
            ("", "all"),
            ("errors", "any error"),
            (_MISSED, "missed"),
            (_ALARM, "false alarms"),
            (_FOUND, "found"),
            *[("elsewhere", _ELSEWHERE)] * (scored.in_place is not None),
            (_PASSED, "passed"),
        )
    )
    return f"""<section aria-labelledby="gallery-title">
<h2 id="gallery-title">Images</h2>
{some}
<form class="toolbar" id="toolbar" autocomplete="off">
<fieldset class="views"><legend class="visually-hidden">show</legend>{views}</fieldset>
<label class="script">type <select id="type"><option value="">all</option>
{options}</select></label>
<label class="script">outcome <select id="outcome">{outcomes}</select></label>
<label class="script">order <select id="order"><option value="high">highest score</option>
<option value="low">lowest score</option><option value="near">nearest to the threshold</option>
<option value="wrong">furthest on the wrong side</option></select></label>
<output id="shown" class="faint">{len(order)} of {len(order)}</output>
</form>
{legend}
<ol class="gallery" id="gallery">
{cards}
</ol>
<p id="none" class="faint" hidden>No image is of this type and outcome.</p>
<dialog id="zoom" aria-labelledby="zoom-title">
<header><h2 id="zoom-title"></h2>
<button type="button" id="previous" aria-label="previous image">←</button>
<button type="button" id="next" aria-label="next image">→</button>
<button type="button" id="close" aria-label="close">&times;</button></header>
<p id="zoom-facts"></p><div id="panels"></div></dialog>
</section>"""


def _card(
    scored: Scored, index: int, picture: pictures.Picture, start: float | None, row: int
) -> str:
    record, score = scored.records[index], float(scored.scores[index])
    verdict = ""
    if start is not None:
        called = score >= start
        verdict = (
            (_FOUND if called else _MISSED) if record.label else (_ALARM if called else _PASSED)
        )
    place = None if scored.in_place is None else scored.in_place[index]
    shown = _ELSEWHERE if verdict == _FOUND and place is False else verdict
    located = "" if place is None else f' data-in-place="{int(place)}"'
    width, height = picture.size
    size = f'width="{width}" height="{height}" loading="lazy" decoding="async"'
    layers = [
        f'<img class="image" src="{picture.image}" alt="{text(record.relative_path)}" {size}>',
        f'<img class="heat" src="{picture.heat}" alt="" {size}>',
    ]
    if picture.mask:
        layers.append(f'<img class="mask" src="{picture.mask}" alt="" {size}>')
    else:
        known = scored.masks[index] is not None
        layers.append(f'<span class="mask">{"" if known else "mask unknown"}</span>')
    if picture.lines:
        layers.append(f'<img class="lines" src="{picture.lines}" alt="" {size}>')
    # The score at full precision, so that the script agrees with the counts.
    return (
        f'<li class="card" data-score="{score!r}" data-label="{record.label}" '
        f'data-type="{row}" data-verdict="{verdict}"{located}>'
        f'<button type="button" class="frame">{"".join(layers)}</button>'
        f'<p><b>{score:.2f}</b> <span class="verdict">{shown}</span></p>'
        f'<p class="what" title="{text(record.relative_path)}"><span class="kind">'
        f'{name(record.defect_type)}</span> <span class="file">'
        f"{name(pathlib.PurePosixPath(record.relative_path).name)}</span></p></li>"
    )


def _data(data: Mapping[str, Any] | None) -> str:
    """Return a section on the data: images by split, sizes, masks and warnings."""
    if data is None:
        return ""
    lines = []
    for split, values in data["splits"].items():
        types = ", ".join(f"{kind} {count}" for kind, count in values["types"].items())
        sizes = [f"{count} of {size}" for size, count in values["sizes"].items()]
        some = "; ".join(sizes[:3]) + "; …" * (len(sizes) > 3)
        counts = (len(values["copies"]), len(values["few_levels"]))
        lines.append([text(split), *map(name, (values["images"], types, some, *counts))])
    head = ["split", "images", "types", "sizes", "copies", "few grey levels"]
    found = document.table(Table(head, lines), "Images by their files")
    notes = [*([data["mask_line"]] if data["mask_line"] else []), *data["warnings"]]
    if notes:
        found += f'<ul class="notes">{"".join(f"<li>{name(note)}</li>" for note in notes)}</ul>'
    return (
        f'<section aria-labelledby="data-title"><h2 id="data-title">Data</h2>{found}</section>'
    )


def _settings(config: Config) -> str:
    """Return the settings that determine the numbers, without the private paths of files."""
    values = config_lib.to_dict(config)
    values["dataset"] = {
        key: values["dataset"][key]
        for key in ("name", "train_images", "seed", "inverted_masks")
    }
    values["image"]["roi"] = roi.shown(config.image.roi)
    values["model"]["weights"] = pathlib.PurePath(config.model.weights).name
    lines = []
    groups = ("dataset", "image", "model", "map", "score", "threshold", "regions", "metrics")
    for group in groups:
        for key, value in values[group].items():
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append([f"{text(group)}.{text(key)}", name(shown)])
    table = document.table(
        Table(["setting", "value"], lines), "Settings that decide the numbers"
    )
    return f"<details><summary>Settings</summary>{table}</details>"
