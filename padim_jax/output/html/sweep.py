"""The page of a sweep: tables of metrics beside the published ones, and the worst images."""

import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from padim_jax.output.html import document
from padim_jax.output.html.document import name, text
from padim_jax.output.published import AVERAGE, METRICS
from padim_jax.output.tables import Table


def sweep_page(
    sweep: Mapping[str, Any],
    links: Mapping[str, str] | None = None,
    pictures: Mapping[str, Sequence[Mapping[str, str]]] | None = None,
) -> str:
    """Return `report.html` of a sweep.

    Args:
      sweep: contents of table.json (see `sweep_table.build`).
      links: path of each category's own report, relative to this page.
      pictures: worst images of each category, from `thumbnails`.

    Returns:
      HTML, all of which can be encoded.
    """
    links, pictures = links or {}, pictures or {}
    settings = dict(sweep["settings"])
    if "weights" in settings:  # the folder is private
        settings["weights"] = pathlib.PurePath(settings["weights"]).name
    body = "\n".join(
        [
            document.header(
                sweep["title"], " · ".join(f"{key} {value}" for key, value in settings.items())
            ),
            '<main id="main">',
            _troubles(sweep),
            *(_metric(sweep, key, links) for key in sweep["metrics"]),
            _notes(sweep),
            _worst(sweep, links, pictures),
            "</main>",
        ]
    )
    return document.page(f"{sweep['title']}: PaDiM report", body)


def _troubles(sweep: Mapping[str, Any]) -> str:
    items = [
        f"<li>{what}: {', '.join(name(category) for category in listed)}</li>"
        for what, listed in (("failed", sweep["failed"]), ("missing", sweep["missing"]))
        if listed
    ]
    if not items:
        return ""
    return (
        '<section class="trouble" aria-label="What is missing"><p>This sweep is not whole; its '
        f'averages are of the rest (see the <a href="#notes">notes</a>).</p>'
        f"<ul>{''.join(items)}</ul></section>"
    )


def _metric(sweep: Mapping[str, Any], key: str, links: Mapping[str, str]) -> str:
    columns = [AVERAGE, *sweep["categories"]]
    head = ["", *(_category(column, links) for column in columns)]
    ours = sweep["this_run"].get(key, {})
    rows, styles = [["this run", *(_ours(ours.get(c)) for c in columns)]], ["ours"]
    for published in sweep["published"]:
        values = published["values"].get(key, {})
        if not values:
            continue
        source = name(published["source"])
        if not published["same_settings"]:
            source += ' <small class="faint">other settings</small>'
        rows.append([source, *(document.number(values.get(c), 3) for c in columns)])
        differences = published["differences"].get(key, {})
        off = published["out_of_tolerance"].get(key, ())
        cells = [_difference(differences.get(c), c in off) for c in columns]
        rows.append(['<span class="faint">difference</span>', *cells])
        styles += ["", "differences"]
    table = document.table(Table(head, rows), text(METRICS[key]), styles)
    return f'<section class="wide">{table}</section>'


def _category(category: str, links: Mapping[str, str]) -> str:
    if category not in links:
        return name(category)
    return f'<a href="{text(_url(links[category]))}">{name(category)}</a>'


def _url(path: str) -> str:
    """Return the URL of a relative path; a folder's name may look like a scheme or a query."""
    return "./" + urllib.parse.quote(path, errors="surrogateescape")


def _ours(found: Mapping[str, Any] | None) -> str | tuple[str, str]:
    if found is None or found["mean"] is None:
        return "&ndash;"
    shown = document.number(found["mean"], 3)
    if found["std"] is None:
        return shown
    values = ", ".join(document.number(value) for value in found["values"])
    spread = f"<small>±{document.number(found['std'], 3)}</small>"
    return f"{shown} {spread}", f'title="{text(values)}"'


def _difference(value: float | None, off: bool) -> str | tuple[str, str]:
    shown = document.difference(value)
    if not off:
        return shown
    return f'{shown}<span aria-label=", out of tolerance">!</span>', 'class="off"'


def _notes(sweep: Mapping[str, Any]) -> str:
    items = [name(sentence) for sentence in sweep["legend"]]
    for published in sweep["published"]:
        source = name(published["source"])
        # Nothing that a click could run.
        if published["url"].startswith("https://"):
            source = f'<a href="{text(published["url"])}" rel="noreferrer">{source}</a>'
        items.append(f"{source}: {name(published['reference'])}")
    listed = "".join(f"<li>{item}</li>" for item in items)
    return f'<section id="notes" aria-label="Notes"><ul class="notes">{listed}</ul></section>'


def _worst(
    sweep: Mapping[str, Any],
    links: Mapping[str, str],
    pictures: Mapping[str, Sequence[Mapping[str, str]]],
) -> str:
    parts = []
    for category in sweep["categories"]:
        strip = "".join(_thumbnail(**shown) for shown in pictures.get(category, ()))
        if strip or category in links:
            parts.append(f'<h3>{_category(category, links)}</h3><ul class="strip">{strip}</ul>')
    if not parts:
        return ""
    return (
        '<section aria-labelledby="worst"><h2 id="worst">Where it is weakest</h2>'
        '<p class="faint">'
        "The least suspicious defects and the most suspicious normal images, each beside its "
        f"heat map.</p>{''.join(parts)}</section>"
    )


def _thumbnail(caption: str, url: str) -> str:
    caption = text(caption)
    return (
        f'<li><figure><img src="{text(url)}" alt="{caption}" title="{caption}" loading="lazy">'
        f"<figcaption><bdi>{caption}</bdi></figcaption></figure></li>"
    )
