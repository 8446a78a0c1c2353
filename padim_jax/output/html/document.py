"""The frame of a page, and safe embedding of text, data and pictures in HTML."""

import base64
import hashlib
import html
import importlib.resources
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from padim_jax.output.tables import Table


def text(value: object) -> str:
    """Escape text for HTML, also for use in quoted attributes.

    Bytes of a file name that are not UTF-8, which Python keeps as lone surrogates, become
    replacement characters: a page with surrogates could not be written.
    """
    plain = str(value).encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return html.escape(plain, quote=True)


def name(value: object) -> str:
    """Escape untrusted text, isolating its writing direction."""
    return f"<bdi>{text(value)}</bdi>"


def number(value: float | None, digits: int = 4) -> str:
    """Format a metric as HTML.

    Args:
      value: the metric, or None.
      digits: number of decimals.

    Returns:
      The number; a dash for None.
    """
    return "&ndash;" if value is None else f"{value:.{digits}f}"


def difference(value: float | None) -> str:
    """Format a signed difference with a real minus sign, or a dash; never a negative zero."""
    if value is None:
        return "&ndash;"
    shown = f"{value:+.3f}"
    return "±0.000" if float(shown) == 0 else shown.replace("-", "&minus;")


def table(contents: Table, caption: str, styles: Sequence[str] = ()) -> str:
    """Return a table that scrolls by itself if it is too wide.

    Args:
      contents: HTML of the headings and cells; or of a cell its HTML and its attributes.
      caption: HTML above the table.
      styles: class of each row; "" or () for none.

    Returns:
      HTML.
    """
    headings = "".join(f'<th scope="col">{heading}</th>' for heading in contents.columns)
    rows = []
    for (first, *others), style in itertools.zip_longest(contents.rows, styles):
        attribute = f' class="{style}"' if style else ""
        pairs = (x if isinstance(x, tuple) else (x, "") for x in others)
        cells = "".join(f"<td{more and ' ' + more}>{content}</td>" for content, more in pairs)
        rows.append(f'<tr{attribute}><th scope="row">{first}</th>{cells}</tr>')
    # A scrolling region must be reachable by keyboard, and therefore named.
    return (
        '<div class="scroll" tabindex="0" role="group" aria-label="table"><table>'
        f"<caption>{caption}</caption><thead><tr>{headings}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def data_url(content: bytes, kind: str) -> str:
    """Return a picture as a data: URL.

    Args:
      content: bytes of the image file.
      kind: its format, "png" or "jpeg".

    Returns:
      The URL.
    """
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def floats(values: Float32[np.ndarray, " n"]) -> str:
    """Encode numbers for the page's script: little-endian float32 in base64, lossless."""
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode("ascii")


def header(title: str, facts: str) -> str:
    """Return the head of a page.

    Args:
      title: plain text.
      facts: plain text below the title.

    Returns:
      HTML.
    """
    return (
        '<a class="visually-hidden" href="#main">to the content</a>'
        f'<header class="top"><div><h1>{name(title)}</h1>'
        f'<p class="faint">{name(facts)}</p></div>'
        '<button type="button" id="theme" class="script">dark</button></header>'
    )


def page(
    title: str, body: str, data: dict[str, Any] | None = None, scripts: Iterable[str] = ()
) -> str:
    """Return a complete HTML document.

    Args:
      title: plain text.
      body: HTML.
      data: JSON for the page's script, as the element `data`.
      scripts: names of the package's scripts to run, besides the one for light and dark.

    Returns:
      HTML.
    """
    style = _asset("report.css")
    code = "".join(_asset(script) for script in ("theme.js", *scripts))
    # Only this style and this script, no network, no frames, no forms: anything injected into
    # the page does not run, and cannot connect anywhere.
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(code)}'; base-uri 'none'; form-action 'none'"
    )
    embedded = ""
    if data is not None:
        embedded = f'<script type="application/json" id="data">{_json(data)}</script>\n'
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{text(policy)}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}
{embedded}<script>{code}</script>
</body>
</html>
"""


def _asset(file: str) -> str:
    path = importlib.resources.files("padim_jax.output.html") / file
    content = path.read_text(encoding="utf-8")
    # HTML reads line ends as \n, and the digest is of what it reads.
    return content.replace("\r\n", "\n")


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode(
        "ascii"
    )


def _json(value: Any) -> str:
    """Return JSON in which no HTML parser finds an end: `</script>`, `<!--` have no `<`."""
    # ASCII only, to be independent of the encoding.
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
