"""Distances -> maps, scores and verdicts as ONNX.

Counterpart of `core.scoring.anomaly_maps`, `core.image_score` and `core.calibration`.
"""

import numpy as np
import onnx
from jaxtyping import Bool

from padim_jax.core import combined_score, image_score, scoring
from padim_jax.core.calibration import Calibration
from padim_jax.export.graph import Graph

Mask = Bool[np.ndarray, "_h _w"]


def anomaly_maps(
    graph: Graph,
    distances: str,
    grid: tuple[int, int],
    size: tuple[int, int],
    upsample: str,
    sigma: float,
) -> str:
    """Add upsampling and blur of distances (b, rows, columns): (b, h, w).

    Args:
      graph: the graph.
      distances: distances on the patch grid.
      grid: height and width in patches.
      size: height and width in pixels.
      upsample: see `scoring.anomaly_maps`.
      sigma: see `scoring.anomaly_maps`.

    Returns:
      Name of the maps.
    """
    rows, columns = (
        scoring.axis_matrix(m, n, upsample, sigma).astype(np.float32)
        for m, n in zip(grid, size, strict=True)
    )
    maps = graph.add("MatMul", graph.constant(rows), distances)
    return graph.add("MatMul", maps, graph.constant(columns.T))


def score(
    graph: Graph,
    maps: str,
    distances: str,
    grid: tuple[int, int],
    size: tuple[int, int],
    kind: str,
    calibration: Calibration | None,
    inside: image_score.Inside | None = None,
) -> str:
    """Add the image score (b,).

    Args:
      graph: the graph.
      maps: anomaly maps (b, h, w), 0 outside of a region of interest.
      distances: distances (b, rows, columns).
      grid: height and width in patches.
      size: height and width of the maps.
      kind: see `image_score.summaries`.
      calibration: thresholds, which `combined` needs.
      inside: region of interest, or None.

    Returns:
      Name of the scores.

    Raises:
      ValueError: `kind` is unknown.
    """
    if kind == "max":
        return graph.add("ReduceMax", maps, axes=[1, 2], keepdims=0)
    pixels = None if inside is None else inside.pixels
    patches = None if inside is None else inside.patches
    if kind == "top":
        return _top(graph, maps, size, pixels)
    if kind == "band":
        return _band(graph, distances, grid, patches)
    if kind == "variation":
        return _total_variation(graph, maps, grid, size, pixels)
    if kind != "combined" or calibration is None:
        raise ValueError(f"{kind}: no such score, or one that needs thresholds")
    parts = [
        _top(graph, maps, size, pixels),
        _deviation(graph, maps, pixels),
        _total_variation(graph, maps, grid, size, pixels),
        _band(graph, distances, grid, patches),
    ]
    # In float64, as `combined_score.combine`.
    columns = [graph.reshape(part, -1, 1) for part in parts]
    summaries = _double(graph, graph.add("Concat", *columns, axis=1))
    means = np.array(calibration.summary_means)
    deviations = combined_score.at_least(means, np.array(calibration.summary_deviations))
    excess = graph.add("Sub", summaries, graph.constant(means, "summary_means"))
    excess = graph.add("Div", excess, graph.constant(deviations, "summary_deviations"))
    excess = graph.add("Max", excess, graph.constant(np.array(0.0)))
    squared = graph.sum(graph.add("Mul", excess, excess), 1)
    combined = graph.add("Sqrt", graph.reshape(squared, -1))
    return graph.add("Cast", combined, to=onnx.TensorProto.FLOAT)


def rarity(graph: Graph, scores: str, calibration: Calibration) -> str:
    """Add the calibrated score (b,), float64: counterpart of `Calibration.calibrated`."""
    scores = _double(graph, graph.reshape(scores, -1, 1))
    quantiles, levels = (np.array(x) for x in (calibration.quantiles, calibration.levels))
    # The piece of each score is the number of quantiles that it reaches.
    reached = graph.add("GreaterOrEqual", scores, graph.constant(quantiles, "quantiles"))
    counts = graph.add("Cast", reached, to=onnx.TensorProto.INT64)
    piece = graph.reshape(graph.sum(counts, 1), -1)
    slopes = np.append(np.diff(levels) / np.diff(quantiles), 0.0)
    scores = graph.reshape(scores, -1)
    start, level, slope = (
        graph.add("Gather", graph.constant(np.append(0.0, x)), piece)
        for x in (quantiles, levels, slopes)
    )
    body = graph.add("Mul", slope, graph.add("Sub", scores, start))
    body = graph.add("Add", body, level)
    excess = graph.add("Sub", scores, graph.constant(np.array(quantiles[-1])))
    zero = graph.constant(np.array(0.0))
    is_beyond = graph.add("Greater", excess, zero)
    one = graph.constant(np.array(1.0))
    if calibration.tail_excess > 0:
        scale = calibration.tail_images * calibration.tail_excess
        ratio = graph.add(
            "Div", graph.add("Max", excess, zero), graph.constant(np.array(scale))
        )
        tail = graph.add("Log", graph.add("Add", one, ratio))
        tail = graph.add("Mul", tail, graph.constant(np.array(-float(calibration.tail_images))))
        beyond = graph.add("Exp", tail)
        beyond = graph.add("Mul", beyond, graph.constant(np.array(1 - levels[-1])))
    else:
        beyond = graph.constant(np.array(1 / (calibration.independent + 1)))
    found = graph.add("Where", is_beyond, graph.add("Sub", one, beyond), body)
    return graph.add("Min", found, graph.constant(np.array(np.nextafter(1.0, 0.0))))


def _double(graph: Graph, x: str) -> str:
    return graph.add("Cast", x, to=onnx.TensorProto.DOUBLE)


def only_inside(graph: Graph, maps: str, inside: image_score.Inside | None) -> str:
    """Add what sets maps to 0 outside of a region of interest, if there is one."""
    if inside is None:
        return maps
    return graph.add("Mul", maps, graph.constant(inside.pixels.astype(np.float32)))


def _mean(graph: Graph, x: str, inside: Mask | None = None, keepdims: int = 0) -> str:
    if inside is None:
        return graph.add("ReduceMean", x, axes=[1, 2], keepdims=keepdims)
    weights = (inside / np.count_nonzero(inside)).astype(np.float32).reshape(-1, 1)
    mean = graph.add("MatMul", graph.reshape(x, -1, inside.size), graph.constant(weights))
    return graph.reshape(mean, -1, *(keepdims * [1, 1]))


def _deviation(graph: Graph, x: str, inside: Mask | None = None) -> str:
    centred = graph.add("Sub", x, _mean(graph, x, inside, keepdims=1))
    return graph.add("Sqrt", _mean(graph, graph.add("Mul", centred, centred), inside))


def _top(graph: Graph, maps: str, size: tuple[int, int], inside: Mask | None) -> str:
    pixels = size[0] * size[1]
    scored = pixels if inside is None else np.count_nonzero(inside)
    count = graph.constant(np.array([image_score.top_count(int(scored))], np.int64))
    highest = graph.add("TopK", graph.reshape(maps, -1, pixels), count, outputs=2, axis=1)
    return graph.add("ReduceMean", highest, axes=[1], keepdims=0)


def _band(graph: Graph, distances: str, grid: tuple[int, int], inside: Mask | None) -> str:
    fine, coarse = (
        anomaly_maps(graph, distances, grid, grid, "bilinear", sigma)
        for sigma in (image_score.FINE, image_score.COARSE)
    )
    return _deviation(graph, graph.add("Sub", fine, coarse), inside)


def _total_variation(
    graph: Graph,
    maps: str,
    grid: tuple[int, int],
    size: tuple[int, int],
    inside: Mask | None,
) -> str:
    total = ""
    pairs = (None, None) if inside is None else image_score.neighbours(inside)
    for axis, (pixels, cells) in enumerate(zip(size, grid, strict=True), 1):
        first, last, end, along = (
            graph.constant(np.array([i], np.int64)) for i in (0, 1, pixels - 1, axis)
        )
        whole = graph.constant(np.array([pixels], np.int64))
        earlier = graph.add("Slice", maps, first, end, along)
        later = graph.add("Slice", maps, last, whole, along)
        change = graph.add("Abs", graph.add("Sub", later, earlier))
        change = _mean(graph, change, pairs[axis - 1])
        width = graph.constant(np.array(pixels / cells, np.float32))
        change = graph.add("Mul", change, width)
        total = graph.add("Add", total, change) if total else change
    return total
