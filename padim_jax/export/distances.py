"""Mahalanobis distances as ONNX: counterpart of `core.scoring`'s.

Values are (cells, channels, images), cells region by region, as the levels are. With
`model.shift` a cell's variants (see `core.embedding.Shifts`) stand beside the images, as in
`core.scoring`: (cells, channels, variants times images).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from padim_jax.core.embedding import Shifts
from padim_jax.export.graph import Graph

Store = Callable[[np.ndarray, str], str]  # adds a large constant


class _Cells:
    """The correspondence of the levels' cells, and of their variants.

    Attributes:
      graph: the graph.
      counts: number of cells of each level.
      shifts: neighbours with all levels' cells in one axis, or None.
    """

    def __init__(self, graph: Graph, counts: Sequence[int], shifts: Shifts | None) -> None:
        self.graph, self.counts = graph, counts
        self.sources: list[np.ndarray] = []
        self.coarser: list[list[np.ndarray]] = []
        if shifts is not None:
            self.sources = [_flat(x) for x in shifts.sources]
            self.coarser = [[_flat(x) for x in each] for each in shifts.coarser]

    def variants(self, x: str, level: int, channels: int) -> str:
        """Return the embeddings of all variants, side by side as images."""
        if not self.sources:
            return x
        x = self.graph.take(x, self.sources[level], 0, 0)  # (cells, v, d, b)
        x = self.graph.transpose(x, 0, 2, 1, 3)
        return self.graph.reshape(x, self.counts[level], channels, -1)

    def pick(self, x: str, level: int, coarse: int, channels: int) -> str:
        """Return what belongs to a level's variants, of a coarser level's at its cells."""
        if not self.sources:
            return x
        count, index = self.counts[level], self.coarser[level][coarse - level - 1]
        x = self._by_variant(x, count, channels, coarse)
        flat = np.arange(count)[:, None] * self.sources[coarse].shape[1] + index
        x = self.graph.transpose(self.graph.take(x, flat, 0, 0), 0, 2, 1, 3)
        return self.graph.reshape(x, count, channels, -1)

    def at_finest(self, x: str, level: int, channels: int) -> str:
        """With shifts: return a level's values at the finest's variants, (n, v, d, b)."""
        count, finest = self.counts[level], self.counts[0]
        width = self.sources[level].shape[1]
        index = self.coarser[0][level - 1] if level else np.arange(width)[None]
        above = np.arange(finest)[:, None] // (finest // count)
        x = self._by_variant(x, count, channels, level)
        return self.graph.take(x, above * width + index, 0, 0)

    def add_up(self, parts: Sequence[str], channels: int) -> str:
        """Return the sum of all levels' values for the finest level's cells."""
        graph, total = self.graph, ""
        for level in reversed(range(len(parts))):
            x = parts[level]
            if self.sources:
                x = self.at_finest(x, level, channels)
                total = graph.add("Add", total, x) if total else x
            elif not total:
                total = x
            else:
                above = self.counts[level + 1]
                total = graph.reshape(total, above, 1, channels, -1)
                fan = self.counts[level] // above
                total = graph.add("Add", total, graph.reshape(x, above, fan, channels, -1))
                total = graph.reshape(total, self.counts[level], channels, -1)
        if self.sources:
            total = graph.transpose(total, 0, 2, 1, 3)
            total = graph.reshape(total, self.counts[0], channels, -1)
        return total

    def _by_variant(self, x: str, cells: int, channels: int, level: int) -> str:
        """Return (cells, d, v b) as (cells v, d, b)."""
        variants = self.sources[level].shape[1]
        x = self.graph.reshape(x, cells, channels, variants, -1)
        x = self.graph.transpose(x, 0, 2, 1, 3)
        return self.graph.reshape(x, cells * variants, channels, -1)


def _flat(x: Any) -> np.ndarray:
    return np.asarray(x).reshape(-1, x.shape[-1])


def full_rank(
    graph: Graph,
    mean: Sequence[np.ndarray],
    factor: Sequence[Sequence[np.ndarray]],
    levels: Sequence[str],
    shifts: Shifts | None,
    store: Store,
) -> str:
    """Add distances from `core.types.Gaussian`.

    Args:
      graph: the graph.
      mean: mean embeddings (r, n, d) per level.
      factor: blocks (r, n, d, e) of the Cholesky factors.
      levels: embeddings (cells, d, b).
      shifts: neighbours, or None.
      store: adds a large constant.

    Returns:
      (cells, b) of the finest level.
    """
    cells = _Cells(graph, [x.shape[0] * x.shape[1] for x in mean], shifts)
    white: dict[int, str] = {}
    squares = [""] * len(levels)
    for i in reversed(range(len(levels))):
        count, channels = cells.counts[i], mean[i].shape[2]
        rest = cells.variants(levels[i], i, channels)
        centre = graph.constant(mean[i].reshape(count, channels, 1), f"mean_{i}")
        rest = graph.add("Sub", rest, centre)
        inverse, *cross = factor[i]
        for j, rows in enumerate(cross, i + 1):
            # One product serves a coarse cell and the rows of all cells above it.
            stacked = rows.reshape(cells.counts[j], -1, rows.shape[-1])
            explained = graph.add("MatMul", store(stacked, f"factor_{i}_{j - i}"), white[j])
            explained = graph.reshape(explained, count, channels, -1)
            rest = graph.add("Sub", rest, cells.pick(explained, i, j, channels))
        own = store(inverse.reshape(count, channels, channels), f"factor_{i}_0")
        white[i] = graph.add("MatMul", own, rest)
        squares[i] = graph.sum(graph.add("Mul", white[i], white[i]), 1)
    return _nearest(graph, cells, cells.add_up(squares, 1))


def low_rank(
    graph: Graph,
    mean: Sequence[np.ndarray],
    deviations: Sequence[np.ndarray],
    root: np.ndarray,
    regularization: float,
    levels: Sequence[str],
    shifts: Shifts | None,
    store: Store,
) -> str:
    """Add distances from `core.types.LowRank`; see `core.scoring._low_rank`.

    Args:
      graph: the graph.
      mean: mean embeddings (r, n, d) per level.
      deviations: deviations (r, n, s, d) per level.
      root: (r, n, s, s).
      regularization: epsilon.
      levels: embeddings (cells, d, b).
      shifts: neighbours, or None.
      store: adds a large constant.

    Returns:
      (cells, b) of the finest level.
    """
    cells = _Cells(graph, [x.shape[0] * x.shape[1] for x in mean], shifts)
    images, finest = root.shape[-1], cells.counts[0]
    deltas, images_by_level, products = [], [], []
    for i, (x, m, d) in enumerate(zip(levels, mean, deviations, strict=True)):
        count, channels = cells.counts[i], m.shape[2]
        centre = graph.constant(m.reshape(count, channels, 1), f"mean_{i}")
        deltas.append(graph.add("Sub", cells.variants(x, i, channels), centre))
        images_by_level.append(store(d.reshape(count, images, channels), f"deviations_{i}"))
        products.append(graph.add("MatMul", images_by_level[i], deltas[i]))
    kernel = store(root.reshape(finest, images, images), "root")
    weights = graph.add("MatMul", kernel, cells.add_up(products, images))
    # Transposed, so that neither the root nor the deviations need to be.
    weights = graph.add("MatMul", graph.transpose(weights, 0, 2, 1), kernel)
    scale = graph.constant(np.array(images - 1, np.float32))
    squared = graph.sum(graph.add("Mul", weights, weights), 2)
    total = graph.add("Mul", graph.reshape(squared, finest, 1, -1), scale)
    epsilon = graph.constant(np.array(regularization, np.float32))
    for i, m in enumerate(mean):
        count, channels = cells.counts[i], m.shape[2]
        grouped = graph.reshape(weights, count, -1, images)
        explained = graph.add("MatMul", grouped, images_by_level[i])
        explained = graph.reshape(explained, count, finest // count, -1, channels)
        if cells.sources:
            delta = graph.transpose(cells.at_finest(deltas[i], i, channels), 0, 1, 3, 2)
            delta = graph.reshape(delta, count, finest // count, -1, channels)
        else:
            delta = graph.transpose(deltas[i], 0, 2, 1)
            delta = graph.reshape(delta, count, 1, -1, channels)
        rest = graph.add("Sub", delta, explained)
        squared = graph.sum(graph.add("Mul", rest, rest), 3)
        squared = graph.add("Div", graph.reshape(squared, finest, 1, -1), epsilon)
        total = graph.add("Add", total, squared)
    return _nearest(graph, cells, total)


def _nearest(graph: Graph, cells: _Cells, squared: str) -> str:
    """Return the distances (cells, b), of squares (cells, 1, v b): the smallest variant's."""
    if cells.sources:
        squared = graph.reshape(squared, cells.counts[0], cells.sources[0].shape[1], -1)
        squared = graph.add("ReduceMin", squared, axes=[1], keepdims=1)
    return graph.add("Sqrt", graph.reshape(squared, cells.counts[0], -1))
