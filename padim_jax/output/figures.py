"""Pictures of results: five-panel figures, overlays, overviews, curves.

Pictures of single images are composed with NumPy and Pillow, because a matplotlib
figure per test image would cost more time than PaDiM itself. Only the two diagrams
use matplotlib, imported when one is drawn, through its object interface: no pyplot,
no global state. Composed pictures are returned; the caller saves them with `save`.
"""

import dataclasses
import functools
import io
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

from padim_jax.system import paths
from padim_jax.system.paths import Path

Pixels = UInt8[np.ndarray, "h w 3"]
Mask = Bool[np.ndarray, "h w"]
AnomalyMap = Float[np.ndarray, "h w"]
Box = tuple[float, float, float, float]

# Every 15th of the 256 colours of Turbo (A. Mikhailov, 2019), a rainbow of smooth lightness.
# Its dark red end is omitted: the highest scores must not look dim.
_TURBO = (
    "30123b 3f3e9c 4666dd 458cfd 2fb2f4 1ad4d0 22ebaa 52fa7a"
    "8bff4b b7f735 dbe236 f5c53a fea130 f9751d e84b0c ce2d04"
)
_HEAT = 0.6  # weight of the heat map's colour; the rest is the image

_PAPER, _INK, _FAINT, _FRAME, _VOID = "#ffffff", "#1e1e1e", "#5f5f5f", "#bebebe", "#e8e8e8"
PREDICTED = (255, 32, 32)
TRUTH = (40, 230, 90)  # much lighter than the red, to differ by more than hue

# Okabe and Ito's colours, which colour-blind readers can distinguish.
_BLUE, _VERMILION = "#0072b2", "#d55e00"
_CURVES = (_BLUE, _VERMILION, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

# Of PNG: higher levels take longer and save hardly any space.
_COMPRESS_LEVEL = 1


@dataclasses.dataclass(frozen=True)
class ColorScale:
    """Scores at the two ends of the heat-map colours.

    One scale serves all pictures of a run: only then can their colours be compared,
    and only then does a normal image look cold.

    Attributes:
      low: this score and all below have the coldest colour.
      high: this score and all above have the hottest colour.

    Raises:
      ValueError: `low` is not below `high`, or one of them is not finite.
    """

    low: float
    high: float

    def __post_init__(self):
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"a colour scale needs finite low < high, found {self}")


def color_scale(
    maps: Float[np.ndarray, "n h w"], labels: Integer[np.ndarray, " n"]
) -> ColorScale:
    """Return the fixed colour scale for the anomaly maps of a test set.

    `low` is the median pixel of the normal images, of every fourth row and column, so that
    normal surface is cold. `high` is the median score (maximum of the map) of the anomalous
    images, so that a typical defect just reaches the hottest colour, whatever the share of
    anomalous images and however extreme a single one. If one of the two kinds is missing,
    all images take its place. If `high` is then not above `low`, everything is drawn cold.

    Args:
      maps: anomaly maps of the whole test set.
      labels: 0 normal, 1 anomalous.

    Returns:
      The scale.

    Raises:
      ValueError: `low` or `high` would be NaN or infinite.
    """
    normal = labels == 0 if (labels == 0).any() else slice(None)
    anomalous = labels == 1 if (labels == 1).any() else slice(None)
    # Maps are smooth: a sixteenth of the pixels has nearly the same median.
    low = float(np.median(maps[normal, ::4, ::4]))
    high = float(np.median(maps.max(axis=(1, 2))[anomalous]))
    return ColorScale(low, low + max(1.0, abs(low)) if high <= low else high)


def heat_map(anomaly_map: AnomalyMap, scale: ColorScale) -> Pixels:
    """Return the colours of an anomaly map, from cold (dark blue) to hot (red).

    Args:
      anomaly_map: scores; NaN gets the coldest colour.
      scale: scores of the coldest and the hottest colour; linear between them.

    Returns:
      (h, w, 3) uint8.
    """
    levels = (anomaly_map - scale.low) * (255 / (scale.high - scale.low)) + 0.5
    levels = np.fmin(np.fmax(levels, 0), 255)  # unlike clip, these leave no NaN
    return _palette().take(levels.astype(np.uint8), axis=0)


@functools.cache
def _palette() -> UInt8[np.ndarray, "256 3"]:
    points = np.frombuffer(bytes.fromhex(_TURBO), np.uint8).reshape(-1, 3)
    position = np.linspace(0, len(points) - 1, 256)
    channels = [np.interp(position, range(len(points)), values) for values in points.T]
    return np.stack(channels, axis=1).round().astype(np.uint8)


def drawn_size(
    shape: tuple[int, int], aspect: float | None = None, side: int | None = None
) -> tuple[int, int]:
    """Return the height and width at which a picture is drawn.

    Args:
      shape: height and width of its pixels. The longer one is kept, or reduced to `side`.
      aspect: width over height to draw; None for that of its pixels.
      side: maximum of the longer side; None for no limit.

    Returns:
      Height and width in pixels.
    """
    height, width = shape
    aspect = width / height if aspect is None else aspect
    longest = max(shape) if side is None else min(side, max(shape))
    if aspect >= 1:
        return max(1, round(longest / aspect)), longest
    return longest, max(1, round(longest * aspect))


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return an image or an anomaly map at another size, interpolated.

    Args:
      pixels: (h, w, 3) uint8, or (h, w) float32.
      size: height and width.

    Returns:
      Array of the same type.
    """
    if pixels.shape[:2] == size:
        return pixels
    height, width = size
    return np.asarray(
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    )


def resize_region(region: Mask, size: tuple[int, int]) -> Bool[np.ndarray, "_h _w"]:
    """Return a region at another size.

    A pixel belongs to it if it covers any part of the region, so that no region is lost.

    Args:
      region: (h, w), True inside.
      size: height and width.

    Returns:
      The region at that size.
    """
    if region.shape == size:
        return region
    height, width = size
    part = Image.fromarray(region.astype(np.float32))
    return np.asarray(part.resize((width, height), Image.Resampling.BOX)) > 0


def outline(mask: Mask, width: int = 1) -> Mask:
    """Return the pixels of a region that are at most `width` steps away from its outside.

    A step leads to one of the four neighbours. Beyond the image's edge is outside, so
    that the outline of a region at the edge is closed.

    Args:
      mask: (h, w), True inside.
      width: width of the outline in pixels.

    Returns:
      (h, w), True on the outline.
    """
    inside = mask
    for _ in range(width):
        padded = np.pad(inside, 1)
        across = padded[1:-1, :-2] & padded[1:-1, 2:]
        inside = inside & across & padded[:-2, 1:-1] & padded[2:, 1:-1]
    return mask & ~inside


def _line_width(image_width: int) -> int:
    return max(1, round(image_width / 170))


def hatch(picture: Pixels, image: Pixels, outside: Mask | None) -> UInt8[np.ndarray, "h w 3"]:
    """Return a picture with what is outside of the region of interest dimmed and hatched.

    Args:
      picture: picture of the result.
      image: image under it, of the same size.
      outside: (h, w), True outside of the region of interest; None without one.

    Returns:
      The picture; outside, the dimmed image under diagonal lines.
    """
    if outside is None:
        return picture
    step = max(8, outside.shape[1] // 32)
    diagonal = np.add.outer(*map(np.arange, outside.shape)) % step
    lines = np.where(diagonal == 0, np.uint8(210), np.uint8(40))[..., None]  # on any ground
    hatched = np.where((diagonal < 2)[..., None], lines, image // 4 * 3)
    return np.where(outside[..., None], hatched, picture)


def _blend(image: Pixels, anomaly_map: AnomalyMap, scale: ColorScale) -> Image.Image:
    # The image in grey, so that colour encodes only the score.
    grey = Image.fromarray(image).convert("L").convert("RGB")
    return Image.blend(grey, Image.fromarray(heat_map(anomaly_map, scale)), _HEAT)


def overlay(
    image: Pixels,
    anomaly_map: AnomalyMap,
    scale: ColorScale,
    predicted: Mask | None,
    boxes: Sequence[Box] = (),
    outside: Mask | None = None,
) -> Image.Image:
    """Return the heat map over the image, with predicted regions outlined and boxed in white.

    Args:
      image: image at its original size.
      anomaly_map: scores at that size; NaN where nothing was scored (outside a crop): the image
        keeps its colours there, slightly dimmed.
      scale: scores of the colours.
      predicted: (h, w), True in the predicted regions; None for no outline.
      boxes: left, top, right and bottom of each region, in pixels.
      outside: see `hatch`.

    Returns:
      An RGB picture of the image's size.
    """
    picture = np.array(_blend(image, anomaly_map, scale))
    unscored = np.isnan(anomaly_map)
    picture[unscored] = image[unscored] // 4 * 3
    picture = hatch(picture, image, outside)
    width = _line_width(image.shape[1])
    if predicted is not None:
        picture[outline(predicted, width + 1)] = 0  # a dark inner line: white fades on white
        picture[outline(predicted, (width + 1) // 2)] = 255
    for box in boxes:
        picture[box_outline(box, image.shape[:2], 2 * width, 4 * width)] = 0
        picture[box_outline(box, image.shape[:2], width, 4 * width)] = 255
    return Image.fromarray(picture)


def box_outline(
    box: Box, size: tuple[int, int], width: int = 1, margin: int = 0
) -> Bool[np.ndarray, "_h _w"]:
    """Return the pixels of a box's border.

    Args:
      box: left, top, right and bottom, in pixels.
      size: height and width of the picture.
      width: width of the border, inwards.
      margin: distance by which the box is enlarged on all sides, as far as there is room.

    Returns:
      (h, w), True on the border.
    """
    height, wide = size
    left, top = (max(0, math.floor(edge) - margin) for edge in box[:2])
    right, bottom = (
        min(end, math.ceil(edge) + margin)
        for edge, end in zip(box[2:], (wide, height), strict=True)
    )
    border = np.zeros(size, bool)
    border[top:bottom, left:right] = True
    border[top + width : bottom - width, left + width : right - width] = False
    return border


def panels(
    image: Pixels,
    mask: Mask | None,
    anomaly_map: AnomalyMap,
    threshold: float | None,
    scale: ColorScale,
    caption: str,
    size: tuple[int, int] | None = None,
    outside: Mask | None = None,
) -> Image.Image:
    """Return the result for one test image: five panels side by side, under a caption.

    The panels are: the image; the ground truth; the heat map over the image, with a bar that
    explains the colours and marks the threshold; the predicted mask; the image with the
    ground truth outlined in green and, on top of it, the prediction in red.

    Images whose longer side is below 192 pixels are enlarged by an integer factor, each
    pixel to a square, so that nothing in the panels is interpolated, unless `size` changes
    their proportions.

    Args:
      image: image as the model sees it.
      mask: ground truth, True at defects (nowhere in a normal image); None if the defect's
        place is unknown.
      anomaly_map: scores.
      threshold: pixels of at least this score are predicted anomalous; None without a
        threshold.
      scale: scores of the colours.
      caption: text above the panels; a long one widens the picture. The font, Pillow's own, has
        ASCII characters only.
      size: height and width of a panel before it is enlarged; None for the image's.
      outside: (h, w), True outside of the region of interest, which is hatched in the heat map;
        None without one.

    Returns:
      An RGB picture.
    """
    size = anomaly_map.shape if size is None else size
    factor = math.ceil(192 / max(size))
    predicted = None if threshold is None else anomaly_map >= threshold
    image, anomaly_map = (
        _enlarge(resize(pixels, size), factor) for pixels in (image, anomaly_map)
    )
    mask, predicted, outside = (
        None if region is None else _enlarge(resize_region(region, size), factor)
        for region in (mask, predicted, outside)
    )

    height, width = anomaly_map.shape
    segmentation = image.copy()
    for region, color in ((mask, TRUTH), (predicted, PREDICTED)):
        if region is not None:
            segmentation[outline(region, _line_width(width))] = color

    heat = hatch(np.asarray(_blend(image, anomaly_map, scale)), image, outside)
    layout = _Layout(width, height)
    form = _form(layout, scale, threshold, mask is not None)
    picture = _under_caption(form, caption, layout.text)
    top = picture.height - form.height + layout.top
    for column, panel in enumerate((image, mask, heat, predicted, segmentation)):
        if panel is not None:
            picture.paste(Image.fromarray(panel), (layout.left(column), top))
    return picture


def _enlarge(pixels: np.ndarray, factor: int) -> np.ndarray:
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1) if factor > 1 else pixels


class _Layout(NamedTuple):
    """Positions in a five-panel picture below the caption, in pixels."""

    width: int  # of a panel
    height: int

    @property
    def text(self) -> int:
        """Return the font size, the unit of everything but the panels."""
        return max(12, self.width // 18)

    @property
    def column(self) -> int:
        """Return a panel's width, or more if headings and legends need it."""
        return max(self.width, 14 * self.text)

    def left(self, column: int) -> int:
        """Return the left edge of a panel; for column 5, the right edge of the page."""
        return self.text + column * (self.column + self.text)

    @property
    def top(self) -> int:
        """Return the upper edge of the panels."""
        return 2 * self.text


@functools.lru_cache(maxsize=8)
def _form(
    layout: _Layout, scale: ColorScale, threshold: float | None, mask_known: bool
) -> Image.Image:
    """Return the elements shared by all pictures of a run: headings, frames, legends.

    Cached, because text takes longer to draw than all panels.
    """
    text, top, bottom = layout.text, layout.top, layout.top + layout.height
    font = ImageFont.load_default(text)
    form = Image.new("RGB", (layout.left(5), bottom + 5 * text // 2), _PAPER)
    draw = ImageDraw.Draw(form)

    notes, key = {}, []
    if threshold is None:
        notes[3] = "no threshold"
    else:
        key.append(("predicted", PREDICTED))
    if mask_known:
        key.append(("ground truth", TRUTH))
    else:
        notes[1] = "no mask"

    headings = ("image", "ground truth", "anomaly map", "predicted mask", "segmentation")
    for column, heading in enumerate(headings):
        left = layout.left(column)
        draw.text((left, top - text // 2), heading, _FAINT, font, anchor="ls")
        draw.rectangle((left - 1, top - 1, left + layout.width, bottom), _VOID, _FRAME)
        centre = (left + layout.width // 2, top + layout.height // 2)
        draw.text(centre, notes.get(column, ""), _FAINT, font, anchor="mm")

    bar = _color_bar(layout.column, text, scale, threshold)
    form.paste(bar, (layout.left(2), bottom + text // 2))
    form.paste(_key(layout.column, text, key), (layout.left(4), bottom + text // 2))
    if threshold is not None:
        start = (layout.left(3), bottom + text // 2 + bar.height // 2)
        draw.text(start, f"score >= {threshold:.3g}", _FAINT, font, anchor="lm")
    return form


def _color_bar(
    width: int, text: int, scale: ColorScale, threshold: float | None
) -> Image.Image:
    """Return the colours between their lowest and highest score, with the threshold marked."""
    legend = Image.new("RGB", (width, 3 * text // 2), _PAPER)
    draw, font = ImageDraw.Draw(legend), ImageFont.load_default(text)
    middle = legend.height // 2
    low, high = f"{scale.low:.3g}", f"{scale.high:.3g}"
    draw.text((0, middle), low, _FAINT, font, anchor="lm")
    draw.text((width, middle), high, _FAINT, font, anchor="rm")
    start = math.ceil(draw.textlength(low, font)) + text // 2
    stop = width - math.ceil(draw.textlength(high, font)) - text // 2
    bar = Image.fromarray(_palette()[None]).resize((stop - start, text // 2))
    legend.paste(bar, (start, middle - text // 4))
    if threshold is not None and scale.low <= threshold <= scale.high:
        part = (threshold - scale.low) / (scale.high - scale.low)
        x = start + round(part * (stop - start - 1))
        mark = (x, middle - text // 2, x, middle + text // 2)
        draw.line(mark, _INK, max(2, text // 6))
    return legend


def _key(
    width: int, text: int, entries: Sequence[tuple[str, tuple[int, int, int]]]
) -> Image.Image:
    """Return the legend of the outlines' colours."""
    legend = Image.new("RGB", (width, 3 * text // 2), _PAPER)
    draw, font = ImageDraw.Draw(legend), ImageFont.load_default(text)
    x, middle = 0, legend.height // 2
    for name, color in entries:
        draw.rectangle((x, middle - text // 4, x + text // 2, middle + text // 4), color)
        x += text
        draw.text((x, middle), name, _FAINT, font, anchor="lm")
        x += math.ceil(draw.textlength(name, font)) + text
    return legend


def _under_caption(form: Image.Image, caption: str, text: int) -> Image.Image:
    font = ImageFont.load_default(text)
    ruler = ImageDraw.Draw(Image.new("L", (1, 1)))
    width, height = map(math.ceil, ruler.textbbox((text, text // 2), caption, font)[2:])
    size = (max(form.width, width + text), height + text // 4 + form.height)
    page = Image.new("RGB", size, _PAPER)
    ImageDraw.Draw(page).text((text, text // 2), caption, _INK, font)
    page.paste(form, (0, size[1] - form.height))
    return page


def contact_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Return one overview picture: the images row by row in a grid of equal cells.

    Args:
      images: at least one picture; each is placed at its cell's top left.
      columns: number of pictures side by side.

    Returns:
      An RGB picture.

    Raises:
      ValueError: there are no images, or `columns` is below 1.
    """
    if not images or columns < 1:
        raise ValueError(
            f"a contact sheet needs images and columns, found {len(images)} and {columns}"
        )
    columns = min(columns, len(images))
    width, height = max(i.width for i in images), max(i.height for i in images)
    rows = math.ceil(len(images) / columns)
    gap = 8
    size = (columns * (width + gap) - gap, rows * (height + gap) - gap)
    sheet = Image.new("RGB", size, _PAPER)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet.paste(image, (column * (width + gap), row * (height + gap)))
    return sheet


def save(image: Image.Image, path: Path) -> None:
    """Write a picture in the format of the path's suffix.

    Use `.jpg` for the many pictures of a test set: five panels of 256x256 pixels of a
    photograph take about 2 ms and 85 kB, against 13 ms and 180 kB as `.png`, which
    keeps the exact values.

    Args:
      image: the picture.
      path: file to write.

    Raises:
      ValueError: the suffix is no image format's.
      OSError: the file cannot be written.
    """
    # JPEG at full colour resolution, because of the outlines. Each format ignores the other's
    # settings.
    suffix = path.suffix.lower()
    kind = Image.registered_extensions().get(suffix)
    if kind is None:
        raise ValueError(f"{path}: unknown file extension {suffix!r}")
    content = io.BytesIO()
    image.save(content, kind, quality=90, subsampling=0, compress_level=_COMPRESS_LEVEL)
    paths.write(path, content.getvalue())


def roc_figure(
    path: Path,
    curves: Sequence[tuple[str, Float[np.ndarray, " _"], Float[np.ndarray, " _"]]],
    title: str,
) -> None:
    """Write receiver operating characteristic curves as a PNG.

    Args:
      path: file to write.
      curves: label, false positive rates and true positive rates of each curve; both rates
        ascend, and the points are joined by straight lines.
      title: text above the diagram.
    """
    figure = diagram(5.0, 5.0)
    axes = figure.add_subplot()
    for (label, fpr, tpr), color in zip(curves, itertools.cycle(_CURVES), strict=False):
        # A curve over all pixels has millions of points. fpr + tpr grows along a curve: one
        # point per thousandth of it gives the same picture.
        position = fpr + tpr
        shown = np.searchsorted(position, np.linspace(position[0], position[-1], 2001))
        shown = np.unique([0, *shown, len(position) - 1])
        axes.plot(fpr[shown], tpr[shown], color=color, linewidth=2, label=label)
    axes.plot([0, 1], [0, 1], color="#8c8c8c", linestyle=":", label="chance")
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.set_title(title, parse_math=False)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    save_diagram(figure, path)


def score_histogram(
    path: Path,
    scores: Float[np.ndarray, " n"],
    labels: Integer[np.ndarray, " n"],
    threshold: float | None,
) -> None:
    """Write a histogram of the image scores, normal against anomalous, as a PNG.

    Args:
      path: file to write.
      scores: image scores.
      labels: 0 normal, 1 anomalous.
      threshold: lowest score predicted anomalous, drawn as a line; None for no line.
    """
    figure = diagram(6.0, 4.0)
    axes = figure.add_subplot()
    scores = scores.astype(float)  # 30 bins may be too narrow for float32
    edges = np.histogram_bin_edges(scores, bins=30)
    for label, name, color in ((0, "normal", _BLUE), (1, "anomalous", _VERMILION)):
        chosen = scores[labels == label]
        style = {"histtype": "stepfilled", "facecolor": (color, 0.45), "edgecolor": color}
        axes.hist(chosen, edges.tolist(), label=f"{name} ({len(chosen)})", **style)
    if threshold is not None:
        label = f"threshold {threshold:.3g}"
        axes.axvline(threshold, color="black", linestyle="--", label=label)
    axes.locator_params(axis="y", integer=True)
    axes.set(xlabel="image score", ylabel="images")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend()
    save_diagram(figure, path)


def save_diagram(figure, path: Path) -> None:
    """Write a matplotlib figure as a PNG.

    Args:
      figure: a matplotlib `Figure`.
      path: file to write.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", pil_kwargs={"compress_level": _COMPRESS_LEVEL})
    paths.write(path, content.getvalue())


def diagram(width: float, height: float):
    """Return an empty matplotlib figure.

    Args:
      width: width in inches.
      height: height in inches.
    """
    from matplotlib.figure import Figure

    # Without pyplot a figure belongs to its caller alone, and is drawn by Agg.
    return Figure(figsize=(width, height), dpi=150, layout="constrained")
