"""Embeddings by level as ONNX: counterpart of `core.embedding`."""

from collections.abc import Sequence

import numpy as np

from padim_jax.config.settings import Config
from padim_jax.core import interpolation
from padim_jax.core.embedding import Pyramid
from padim_jax.core.types import Projection
from padim_jax.export.graph import Graph

Grid = tuple[int, int]


def levels(
    graph: Graph,
    features: Sequence[str],
    grids: Sequence[Grid],
    channels: Sequence[int],
    config: Config,
    index: np.ndarray,
    projection: Projection | None,
    pyramid: Pyramid,
) -> list[str]:
    """Add the way from feature maps to embeddings.

    Args:
      graph: the graph.
      features: feature maps (b, c_i, h_i, w_i), the finest first.
      grids: their heights and widths.
      channels: their numbers of channels.
      config: settings.
      index: channels kept.
      projection: matrix (C, D), or None.
      pyramid: pyramid of the levels.

    Returns:
      One value (cells, d, b) per level, cells region by region.
    """
    pooling, upsample = config.model.pooling, config.model.upsample
    if projection is not None:
        ends = np.cumsum(channels)
        parts = np.split(projection, ends[:-1])
        features = [_project(graph, features, parts, grids, pooling, upsample)]
    elif upsample != "nearest":
        features = [_assemble(graph, features, grids, channels, index, pooling, upsample)]
    if len(features) < len(grids) or projection is not None or upsample != "nearest":
        grids, channels, pooling = grids[:1], (len(index),), 1
    found = []
    for level in pyramid.levels:
        x = graph.take(features[level.stage], level.channels, 1, channels[level.stage])
        x = _pool(graph, x, pooling)
        height, width = grids[level.stage]
        x = graph.reshape(x, -1, len(level.channels), height * width)
        x = graph.transpose(x, 2, 1, 0)
        found.append(graph.take(x, level.source.reshape(-1), 0, height * width))
    return found


def _assemble(
    graph: Graph,
    features: Sequence[str],
    grids: Sequence[Grid],
    channels: Sequence[int],
    index: np.ndarray,
    pooling: int,
    upsample: str,
) -> str:
    offsets = np.cumsum([0, *channels])
    parts, orders = [], []
    for i, stage in enumerate(features):
        (order,) = np.nonzero((index >= offsets[i]) & (index < offsets[i + 1]))
        if not len(order):
            continue
        x = graph.take(stage, index[order] - offsets[i], 1, channels[i])
        parts.append(_upsample(graph, _pool(graph, x, pooling), grids[i], grids[0], upsample))
        orders.append(order)
    order = np.argsort(np.concatenate(orders))
    return graph.take(graph.add("Concat", *parts, axis=1), order, 1, len(index))


def _project(
    graph: Graph,
    features: Sequence[str],
    parts: Sequence[np.ndarray],
    grids: Sequence[Grid],
    pooling: int,
    upsample: str,
) -> str:
    total = ""
    for i, (stage, part) in enumerate(zip(features, parts, strict=True)):
        weights = graph.constant(part.T[:, :, None, None], f"projection_{i}")
        x = _pool(graph, graph.add("Conv", stage, weights), pooling)
        x = _upsample(graph, x, grids[i], grids[0], upsample)
        total = graph.add("Add", total, x) if total else x
    return total


def _pool(graph: Graph, x: str, size: int) -> str:
    if size == 1:
        return x
    return graph.add(
        "AveragePool", x, kernel_shape=[size, size], pads=[size // 2] * 4, count_include_pad=0
    )


def _upsample(graph: Graph, x: str, grid: Grid, target: Grid, method: str) -> str:
    if grid == target:
        return x
    if method == "nearest":
        for axis, (m, n) in enumerate(zip(grid, target, strict=True), 2):
            x = graph.take(x, interpolation.nearest(m, n), axis, m)
        return x
    rows, columns = (
        interpolation.matrix(m, n, method).astype(np.float32)
        for m, n in zip(grid, target, strict=True)
    )
    x = graph.add("MatMul", graph.constant(rows), x)
    return graph.add("MatMul", x, graph.constant(columns.T))
