"""Selection of the images that a page shows, and their reduction in size."""

import concurrent.futures
import dataclasses
import io
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image

from padim_jax.output import figures
from padim_jax.output.html.document import data_url
from padim_jax.output.results import Scored

LoadImage = Callable[[int], UInt8[np.ndarray, "h w 3"]]

# Characters of pictures, so that a page, with little else, stays below 15 MB.
_BUDGET = 12_000_000
_MOST = 1000  # pictures, which a browser still scrolls well
_SIDE = 384  # maximum side of a picture in pixels
_SMALL = 128  # side of a picture beside its heat map
_TELLING = 3  # highest and lowest scored images per defect type that come first


@dataclasses.dataclass(frozen=True)
class Picture:
    """Layers of an image in the gallery, as data: URLs.

    Attributes:
      image: image as the model sees it.
      heat: its anomaly map in the run's colours, at half the size: it is smooth.
      mask: ground truth, white on black; "" if unknown or without defect pixel.
      lines: outlines of ground truth and prediction, elsewhere transparent; "" for none.
      size: width and height in pixels.
    """

    image: str
    heat: str
    mask: str
    lines: str
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.image) + len(self.heat) + len(self.mask) + len(self.lines)


def encode(
    scored: Scored,
    order: Sequence[int],
    scale: figures.ColorScale,
    threshold: float | None,
    load_image: LoadImage,
) -> dict[int, Picture]:
    """Return pictures of as many images as a page may hold.

    Args:
      scored: the test set.
      order: numbers of the images, the most important first.
      scale: scores of the heat maps' colours.
      threshold: pixels of at least this score are outlined; None for no prediction.
      load_image: function from an image's number to the preprocessed image.

    Returns:
      Pictures of the first images of `order`, by number.
    """

    def picture(index: int) -> Picture:
        return _picture(
            load_image(index),
            scored.masks[index],
            scored.maps[index],
            scale,
            threshold,
            scored.drawn_size(index, _SIDE),
            scored.outside,
            () if scored.boxes is None else scored.boxes[index],
        )

    shown: dict[int, Picture] = {}
    size = 0
    # Decoding and encoding release the GIL: threads use all cores.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for start in range(0, min(len(order), _MOST), 64):
            chunk = order[start : min(start + 64, _MOST)]
            for index, made in zip(chunk, pool.map(picture, chunk), strict=True):
                size += len(made)
                if size > _BUDGET:
                    return shown
                shown[index] = made
    return shown


def telling_order(
    scores: Float[np.ndarray, " n"],
    labels: Bool[np.ndarray, " n"],
    types: list[str],
    thresholds: Sequence[float],
    elsewhere: Sequence[int] = (),
) -> list[int]:
    """Return the images by their importance for a page.

    First come all images on the wrong side of one of the thresholds, the furthest first; then
    defects found at a wrong place; then the highest and lowest scored images of each type; then
    the rest, ordered such that any number of them is an even sample of the scores.

    Args:
      scores: image scores.
      labels: True for anomalous images.
      types: defect types.
      thresholds: lowest scores that may be called anomalous.
      elsewhere: numbers of the images found at a wrong place.

    Returns:
      Numbers of all images.
    """
    scores = scores.astype(float)
    wrong = [np.where(labels, t - scores, scores - t) for t in thresholds]
    is_wrong = [(scores >= t) != labels for t in thresholds]
    order: list[int] = []
    if thresholds:
        distance = np.where(is_wrong, wrong, -np.inf).max(axis=0)
        errors = np.any(is_wrong, axis=0)
        order += [i for i in np.argsort(-distance, kind="stable").tolist() if errors[i]]
    order += elsewhere
    ranked: list[int] = np.argsort(-scores, kind="stable").tolist()
    by_type: dict[str, list[int]] = {}
    for index in ranked:
        by_type.setdefault(types[index], []).append(index)
    for group in by_type.values():
        order += group[:_TELLING] + group[-_TELLING:]
    # Ends, middle, quarters, eighths ...: van der Corput's sequence over the ranks.
    bits = max(1, (len(ranked) - 1).bit_length())
    spread = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    order += [ranked[place] for place in spread if place < len(ranked)]
    return list(dict.fromkeys(order))


def thumbnails(
    scored: Scored, scale: figures.ColorScale, load_image: LoadImage, each: int = 3
) -> list[dict[str, str]]:
    """Return a model's weakest results: the lowest defects and the highest normal images.

    Args:
      scored: the test set.
      scale: scores of the heat maps' colours.
      load_image: function from an image's number to the preprocessed image.
      each: number of images of either kind.

    Returns:
      For JSON, `caption`, plain text, and `url` of each: image and heat map side by side.
    """
    ranked = np.argsort(scored.scores, kind="stable")
    labels = scored.labels[ranked]
    defects, normals = ranked[labels][:each], ranked[~labels][::-1][:each]

    def thumbnail(index: int) -> dict[str, str]:
        record = scored.records[index]
        size = scored.drawn_size(index, _SMALL)
        caption = f"{record.defect_type}, {scored.scores[index]:.2f}: {record.relative_path}"
        url = _side_by_side(load_image(index), scored.maps[index], scale, size, scored.outside)
        return {"caption": caption, "url": url}

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(thumbnail, [*defects.tolist(), *normals.tolist()]))


def strip(
    images: Sequence[UInt8[np.ndarray, "h w 3"]],
    maps: Sequence[Float32[np.ndarray, "h w"]],
    aspects: Sequence[float],
    scale: figures.ColorScale,
    outside: Bool[np.ndarray, "h w"] | None = None,
) -> list[str]:
    """Return small images and their heat maps side by side, as data: URLs.

    Args:
      images: images as the model sees them.
      maps: their anomaly maps.
      aspects: width over height of each; see `figures.drawn_size`.
      scale: scores of the heat maps' colours.
      outside: see `figures.hatch`.

    Returns:
      A URL per image.
    """
    return [
        _side_by_side(
            image, heat, scale, figures.drawn_size(heat.shape, aspect, _SMALL), outside
        )
        for image, heat, aspect in zip(images, maps, aspects, strict=True)
    ]


def _side_by_side(
    image: UInt8[np.ndarray, "h w 3"],
    anomaly_map: Float32[np.ndarray, "h w"],
    scale: figures.ColorScale,
    size: tuple[int, int],
    outside: Bool[np.ndarray, "h w"] | None,
) -> str:
    image, anomaly_map = figures.resize(image, size), figures.resize(anomaly_map, size)
    outside = None if outside is None else figures.resize_region(outside, size)
    heat = np.asarray(figures.overlay(image, anomaly_map, scale, None, outside=outside))
    return _jpeg(np.concatenate([image, heat], axis=1))


def _picture(
    image: UInt8[np.ndarray, "h w 3"],
    mask: Bool[np.ndarray, "h w"] | None,
    anomaly_map: Float32[np.ndarray, "h w"],
    scale: figures.ColorScale,
    threshold: float | None,
    size: tuple[int, int],
    outside: Bool[np.ndarray, "h w"] | None = None,
    boxes: Sequence[figures.Box] = (),
) -> Picture:
    height, width = size
    down, right = height / anomaly_map.shape[0], width / anomaly_map.shape[1]
    boxes = [(x0 * right, y0 * down, x1 * right, y1 * down) for x0, y0, x1, y1 in boxes]
    predicted = None if threshold is None else anomaly_map >= threshold
    mask, predicted = (
        None if region is None else figures.resize_region(region, size)
        for region in (mask, predicted)
    )
    half = (max(1, height // 2), max(1, width // 2))
    heat = figures.heat_map(figures.resize(anomaly_map, half), scale)
    if outside is not None:
        outside = figures.resize_region(outside, half)
        heat = figures.hatch(heat, figures.resize(image, half), outside)
    return Picture(
        _jpeg(figures.resize(image, size)),
        _jpeg(heat),
        _png(mask.astype(np.uint8), (0, 0, 0, 255, 255, 255))
        if mask is not None and mask.any()
        else "",
        _outlines(mask, predicted, boxes),
        (width, height),
    )


def _outlines(
    mask: Bool[np.ndarray, "h w"] | None,
    predicted: Bool[np.ndarray, "h w"] | None,
    boxes: Sequence[figures.Box],
) -> str:
    """Outline the ground truth in green and, on top of it, the prediction in red, and boxes."""
    drawn = [(i, r) for i, r in ((1, mask), (2, predicted)) if r is not None and r.any()]
    if not drawn:
        return ""
    shape = drawn[0][1].shape
    colors = np.zeros(shape, np.uint8)
    for color, region in drawn:
        colors[figures.outline(region, max(1, round(shape[1] / 128)))] = color
    for box in boxes:
        colors[figures.box_outline(box, (shape[0], shape[1]), 1, 3)] = 2
    return _png(colors, (0, 0, 0, *figures.TRUTH, *figures.PREDICTED), transparency=0)


def _png(
    values: UInt8[np.ndarray, "h w"], palette: Sequence[int], transparency: int | None = None
) -> str:
    height, width = values.shape
    picture = Image.frombytes("P", (width, height), values.tobytes())
    picture.putpalette(palette)
    content = io.BytesIO()
    extra = {} if transparency is None else {"transparency": transparency}
    picture.save(content, "PNG", bits=1 if len(palette) == 6 else 2, **extra)
    return data_url(content.getvalue(), "png")


def _jpeg(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=80, optimize=True)
    return data_url(content.getvalue(), "jpeg")
