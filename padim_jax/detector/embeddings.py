"""Embeddings of fitted images, kept in memory: thresholds need no second pass over files."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from padim_jax.data.records import Record
from padim_jax.devices import parallel

Embedded = tuple[Any, ...]  # see `steps.Embedded`, which needs JAX


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts about a fitted image.

    Attributes:
      digest: SHA-256 of its file.
      size: height and width of the stored image.
    """

    digest: UInt8[np.ndarray, "32"]
    size: Int32[np.ndarray, "2"]


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Embeddings of a fit's images, as `steps.embed_batch` returned them.

    They are on the host. On CPUs that is where they were computed, and nothing is copied.

    Attributes:
      batches: embeddings by batch.
      places: batch and column of each image, by its relative path.
      facts: facts about each image, by its relative path.
    """

    batches: list[Embedded] = dataclasses.field(default_factory=list)
    places: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    facts: dict[str, Facts] = dataclasses.field(default_factory=dict)

    def add(
        self,
        levels: Embedded,
        valid: Bool[np.ndarray, " b"],
        records: Sequence[Record],
        digests: UInt8[np.ndarray, "n 32"],
        sizes: Int32[np.ndarray, "n 2"],
    ) -> None:
        """Keep a batch.

        Args:
          levels: embeddings of b images.
          valid: which of them are not padding.
          records: records of the n images that are not padding.
          digests: SHA-256 of their files.
          sizes: heights and widths of the stored images.
        """
        on_gpu = parallel.memory_grows()
        number = len(self.batches)
        self.batches.append(tuple(np.asarray(x) if on_gpu else x for x in levels))
        columns = np.flatnonzero(valid).tolist()
        for record, column, digest, size in zip(records, columns, digests, sizes, strict=True):
            self.places[record.relative_path] = number, column
            self.facts[record.relative_path] = Facts(digest, size)

    def hold(self, records: Sequence[Record]) -> bool:
        """Return whether the embeddings of all these images are kept."""
        return all(record.relative_path in self.places for record in records)

    def take(self, records: Sequence[Record], size: int) -> Embedded:
        """Return the embeddings of some images.

        Args:
          records: records of the images, of which all are kept.
          size: number of columns; those after the images are padding.

        Returns:
          Embeddings by level.
        """
        places = [self.places[record.relative_path] for record in records]
        first = self.batches[places[0][0]]
        if first[0].shape[-1] == size and places == [
            (places[0][0], i) for i in range(len(places))
        ]:
            return first
        places += (size - len(places)) * places[-1:]
        return tuple(
            np.stack([np.asarray(self.batches[batch][i])[..., j] for batch, j in places], -1)
            for i in range(len(first))
        )
