"""Diagrams as inline SVG; `run.js` moves the threshold in them."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from padim_jax.output.html.document import text

Curve = tuple[Float[np.ndarray, " _"], Float[np.ndarray, " _"]]

_BINS = 48
_POINTS = 400  # per curve, at most: more cannot be distinguished on a screen
_RUG = 1000  # largest number of images with individual marks


@dataclasses.dataclass(frozen=True)
class Axis:
    """Range of scores of the histogram and the slider.

    Attributes:
      low: below all scores, so that all images can be called anomalous.
      high: above all scores, so that none can.
    """

    low: float
    high: float

    def part(self, score: float) -> float:
        """Return the position of a score: 0 at `low`, 1 at `high`."""
        return (score - self.low) / (self.high - self.low)

    def percent(self, score: float) -> str:
        """Return the position as an SVG percentage, clipped to the axis."""
        return f"{100 * min(max(self.part(score), 0.0), 1.0):.2f}%"


def score_axis(scores: Float[np.ndarray, " n"]) -> Axis:
    """Return an axis slightly wider than the scores."""
    low, high = float(scores.min()), float(scores.max())
    margin = 0.03 * (high - low) or 0.05 * max(1.0, abs(low))
    return Axis(low - margin, high + margin)


def histogram(
    scores: Float[np.ndarray, " n"],
    labels: Bool[np.ndarray, " n"],
    axis: Axis,
    marks: list[tuple[str, float]],
) -> str:
    """Return a histogram: normal images upwards, anomalous ones downwards, scaled separately.

    Positions along the axis are percentages, so that the diagram follows the page's width and
    its text keeps its size.

    Args:
      scores: image scores.
      labels: True for anomalous images.
      axis: scores at the left and right edge.
      marks: named thresholds.

    Returns:
      SVG.
    """
    middle, height = 110, 84
    edges = np.linspace(axis.low, axis.high, _BINS + 1)
    parts, words = [], []
    for kind, chosen, up in (("normal", ~labels, True), ("anomalous", labels, False)):
        counts, _ = np.histogram(scores[chosen].astype(float), edges)
        peak = max(int(counts.max()), 1)
        for i, count in enumerate(counts.tolist()):
            if count:
                tall = max(2.0, height * count / peak)
                top = middle - 5 - tall if up else middle + 5
                images = "image" if count == 1 else "images"
                parts.append(
                    f'<rect class="{kind}" x="{100 * i / _BINS:.3f}%" y="{top:.1f}" '
                    f'width="{88 / _BINS:.3f}%" height="{tall:.1f}"><title>{count} {kind} '
                    f"{images}, score {edges[i]:.4g} to {edges[i + 1]:.4g}</title></rect>"
                )
        total = int(chosen.sum())
        label = f"{total} {kind}" + (f", at most {peak} in a bar" if total else "")
        y = 12 if up else 2 * middle - 4
        x, anchor = ("100%", "end") if up else ("0", "start")
        words.append(
            f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{label}</text>'
        )
        if len(scores) <= _RUG:
            y1, y2 = (middle - 4, middle - 1) if up else (middle + 1, middle + 4)
            parts += [
                f'<line class="{kind}" x1="{axis.percent(s)}" x2="{axis.percent(s)}" '
                f'y1="{y1}" y2="{y2}"/>'
                for s in scores[chosen].tolist()
            ]
    bottom = 2 * middle
    parts.append(f'<line class="axis" x1="0" x2="100%" y1="{middle}" y2="{middle}"/>')
    for label, value in marks:
        x = axis.percent(value)
        parts.append(
            f'<line class="mark" x1="{x}" x2="{x}" y1="16" y2="{bottom - 16}">'
            f"<title>{text(label)}: {value:.6g}</title></line>"
        )
    parts.append(
        f'<line id="cut" class="cut" x1="0" x2="0" y1="0" y2="{bottom}" visibility="hidden"/>'
    )
    for tick in _ticks(axis):
        x = axis.percent(tick)
        parts.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(
            f'<text class="tick" x="{x}" y="{bottom + 17}" text-anchor="middle">{tick:g}</text>'
        )
    return (
        f'<svg id="histogram" class="histogram" width="100%" height="{bottom + 22}" role="img" '
        'aria-label="Histogram of the image scores: normal images above the axis, anomalous '
        f'ones below">{"".join(parts + words)}</svg>'
    )


def _ticks(axis: Axis) -> list[float]:
    """Return about four to nine round numbers."""
    rough = (axis.high - axis.low) / 5
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda factor: abs(factor * power - rough))
    numbers = np.arange(np.ceil(axis.low / step), np.floor(axis.high / step) + 1)
    return [round(float(n * step), 12) for n in numbers]


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve of a diagram, with its label and a class that colours it."""

    label: str
    style: str
    curve: Curve


def curves(
    lines: list[Line], limit: float, x_name: str, y_name: str, summary: str, dot: str = ""
) -> str:
    """Return curves over false positive rates in [0, limit], with heights in [0, 1].

    Args:
      lines: curves that are defined.
      limit: right edge.
      x_name: label of the horizontal axis.
      y_name: label of the vertical axis.
      summary: description for readers who do not see the diagram.
      dot: id of a point that the page's script moves; "" for none.

    Returns:
      SVG.
    """
    left, top, side = 50, 10, 260
    right, bottom = left + side, top + side
    parts = []
    for i in range(5):
        x, y = left + side * i / 4, bottom - side * i / 4
        parts.append(
            f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>'
            f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'
            f'<text class="tick" x="{x}" y="{bottom + 15}" text-anchor="middle">'
            f"{limit * i / 4:.3g}</text>"
            f'<text class="tick" x="{left - 6}" y="{y + 4}" text-anchor="end">{i / 4:g}</text>'
        )
    for line in lines:
        x, y = _thin(line.curve, limit)
        points = " ".join(
            f"{left + side * a / limit:.1f},{bottom - side * b:.1f}"
            for a, b in zip(x.tolist(), y.tolist(), strict=True)
        )
        parts.append(f'<polyline class="{line.style}" points="{points}"/>')
    for i, line in enumerate(lines):
        y = bottom - 14 - 18 * (len(lines) - 1 - i)
        parts.append(
            f'<line class="{line.style}" x1="{left + 96}" x2="{left + 116}" y1="{y - 4}" '
            f'y2="{y - 4}"/><text x="{left + 122}" y="{y}">{text(line.label)}</text>'
        )
    if not lines:
        parts.append(
            f'<text class="tick" x="{left + side / 2}" y="{top + side / 2}" '
            'text-anchor="middle">undefined</text>'
        )
    if dot:
        parts.append(
            f'<svg class="plane" x="{left}" y="{top}" width="{side}" height="{side}">'
            f'<circle id="{dot}" class="dot" r="5" visibility="hidden"/></svg>'
        )
    parts.append(
        f'<text class="tick" x="{left + side / 2}" y="{bottom + 31}" text-anchor="middle">'
        f"{text(x_name)}</text>"
        f'<text class="tick" transform="translate(11 {top + side / 2}) rotate(-90)" '
        f'text-anchor="middle">{text(y_name)}</text>'
    )
    return (
        f'<svg class="curves" viewBox="0 0 {right + 12} {bottom + 36}" role="img" '
        f'aria-label="{text(summary)}">{"".join(parts)}</svg>'
    )


def _thin(curve: Curve, limit: float) -> Curve:
    """Return a curve's part within the limit, reduced to points that look the same."""
    x, y = curve
    inside = int(np.searchsorted(x, limit, "right"))
    if inside < len(x):
        end = np.interp(limit, x[inside - 1 : inside + 1], y[inside - 1 : inside + 1])
        x, y = np.append(x[:inside], limit), np.append(y[:inside], end)
    # Both ascend: even steps along the curve are even steps of their sum.
    along = x / limit + y
    chosen = np.searchsorted(along, np.linspace(along[0], along[-1], _POINTS))
    chosen = np.unique([0, *chosen.tolist(), len(x) - 1])
    return x[chosen], y[chosen]


def course(
    numbers: Float[np.ndarray, " n"],
    values: Float[np.ndarray, " n"],
    bounds: tuple[float, float],
    y_name: str,
) -> str:
    """Return a value in [0, 1] over the numbers of images, between two bounds.

    Where there are more images than points, each point's lowest and highest value is shown.

    Args:
      numbers: ascending numbers of the images.
      values: values after each of them; NaN where there is none.
      bounds: lower and upper bound; not drawn where it is 0 or 1.
      y_name: label of the vertical axis.

    Returns:
      SVG.
    """
    left, top, width, height = 50, 10, 700, 150
    right, bottom = left + width, top + height
    axis = Axis(float(numbers[0]), max(float(numbers[-1]), float(numbers[0]) + 1))
    parts = []
    for i in range(5):
        y = bottom - height * i / 4
        parts.append(
            f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'
            f'<text class="tick" x="{left - 6}" y="{y + 4}" text-anchor="end">{i / 4:g}</text>'
        )
    parts += [
        f'<text class="tick" x="{left + width * axis.part(x):.1f}" y="{bottom + 15}" '
        f'text-anchor="middle">{x:.0f}</text>'
        for x in _ticks(axis)
        if x == round(x)
    ]
    parts += [
        f'<polyline class="second" points="{left},{bottom - height * y:.1f} '
        f'{right},{bottom - height * y:.1f}"/>'
        for y in bounds
        if 0 < y < 1
    ]
    known = np.flatnonzero(~np.isnan(values))
    points = []
    for part in np.array_split(known, min(_POINTS, len(known)) or 1):
        ends = {int(part[f(values[part])]) for f in (np.argmin, np.argmax)} if len(part) else ()
        for i in sorted(ends):
            x = left + width * axis.part(float(numbers[i]))
            points.append(f"{x:.1f},{bottom - height * values[i]:.1f}")
    parts.append(f'<polyline class="first" points="{" ".join(points)}"/>')
    parts.append(
        f'<text class="tick" x="{left + width / 2}" y="{bottom + 31}" text-anchor="middle">'
        "number of the image</text>"
        f'<text class="tick" transform="translate(11 {top + height / 2}) rotate(-90)" '
        f'text-anchor="middle">{text(y_name)}</text>'
    )
    last = f"{values[known[-1]]:.3f} at the end" if len(known) else "unknown"
    return (
        f'<svg class="curves wide" viewBox="0 0 {right + 12} {bottom + 36}" role="img" '
        f'aria-label="{text(y_name)}: {last}">{"".join(parts)}</svg>'
    )
