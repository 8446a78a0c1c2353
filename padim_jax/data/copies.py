"""Repeated images: exact copies count once, near copies cause a warning.

Statistics of normal images, and above all the thresholds' promise, assume independent
images. A copy adds no information, and a training image whose copy stays in the model scores
lower than any new image would.
"""

import dataclasses
import hashlib
import warnings
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Int, UInt8

from padim_jax.data import passes, sampling
from padim_jax.data.files import shown
from padim_jax.data.records import Source
from padim_jax.devices.parallel import Devices
from padim_jax.errors import DataWarning

# Near copies. The distances of an image to all others, in ascending order, have a gap where its
# copies end: the farthest copy is nearer than _NEAR times the median distance of any two
# images, and the next image is at least _GAP times as far. Independent images have no such gap.
# Measured on images of MVTec AD with ResNet-18, at 96, 128 and 256 pixels: all copies of 30
# bottles (each twice as JPEG, 2 and 4 frames with noise of 4 grey levels, 3 bottles 40 times)
# have gaps of 1.6 to 9; of screws, seen from all sides, and tires at most 1.5; of bottles only
# 069 and 070, one bottle photographed twice.
_NEAR, _GAP = 0.75, 1.5
# A larger group is not taken for copies: it may be a variant of the product.
_LARGEST_GROUP = 1 / 3
# Fewer copies than this fraction of all images raise a promised rate by less than a third.
_LEAST_SHARE, _LEAST_COPIES = 0.25, 4
MOST_COMPARED = 4096  # images; frames of one part are consecutive
_NAMED = 3  # pairs named in a warning
# Relative to the median distance: equal pixels in two files have distance 0.
_LEAST_DISTANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Distinct(sampling.Part):
    """Images of which no two have the same file; see `distinct`.

    Attributes:
      digests: SHA-256 of the files.
    """

    digests: UInt8[np.ndarray, "n 32"]

    def part(self, numbers: Int[np.ndarray, " m"]) -> "Distinct":
        """Return some of the images, by their positions."""
        some = sampling.part(self, numbers.tolist())
        return Distinct(self, some.numbers, some.records, self.digests[numbers])


def distinct(
    source: Source, devices: Devices, hashes: UInt8[np.ndarray, "n 32"] | None = None
) -> Distinct:
    """Remove images whose files are byte for byte those of earlier ones. A collective.

    Args:
      source: images.
      devices: devices whose processes share the work.
      hashes: SHA-256 of the files; None reads all files.

    Returns:
      The first image of each file, in the order of `source`. A `DataWarning` states the number
      of others.

    Raises:
      UserError: a file cannot be read, or the processes see different images.
    """
    if isinstance(source, Distinct):
        return source
    if hashes is None:
        hashes = digests(source, devices)
    first: dict[bytes, int] = {}
    same = [first.setdefault(digest.tobytes(), i) for i, digest in enumerate(hashes)]
    names = [record.relative_path for record in source.records]
    pairs = [(names[i], names[j]) for j, i in enumerate(same) if i < j]
    if pairs and devices.process == 0:
        copies = f"{len(pairs)} of {len(names)} images are copies"
        if len(pairs) == 1:
            copies = f"1 of {len(names)} images is a copy"
        warnings.warn(
            DataWarning(
                f"{copies} of others, byte for byte ({_named(pairs)}): each image counts once"
            ),
            stacklevel=2,
        )
    numbers = list(first.values())
    records = [source.records[i] for i in numbers]
    return Distinct(source, numbers, records, hashes[numbers])


def digests(source: Source, devices: Devices) -> UInt8[np.ndarray, "n 32"]:
    """Return the SHA-256 of each image's file. A collective.

    Args:
      source: images.
      devices: devices whose processes share the work.

    Returns:
      (n, 32) uint8, in the records' order.
    """
    if isinstance(source, Distinct):
        return source.digests

    def digest(index: int) -> str:
        return hashlib.sha256(source.read(index)[0]).hexdigest()

    hashes = passes.of_files(source, "compare", devices, digest)
    return np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(-1, 32)


def near_copies(samples: Float32[np.ndarray, "n s"]) -> list[tuple[int, int]]:
    """Find images with others far nearer than independent images are.

    Examples are frames of one part, or one photograph compressed twice. The first 4,096 images
    are compared, each with all others.

    Args:
      samples: features of the images, at the same positions for all images.

    Returns:
      Each such image and its nearest one, by number; nothing if there are too few to matter.
    """
    x = samples[:MOST_COMPARED].astype(np.float64)
    count, largest = len(x), int(len(x) * _LARGEST_GROUP)
    if largest < 2:
        return []
    deviation = x.std(axis=0)
    x = (x - x.mean(axis=0))[:, deviation > 0] / deviation[deviation > 0]
    squares = np.sum(x * x, axis=1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * x @ x.T, 0))
    typical = np.median(distances[~np.eye(count, dtype=bool)])
    if not typical > 0:
        return []
    np.fill_diagonal(distances, np.inf)
    ordered = np.sort(distances, axis=1)[:, :largest]
    ordered = np.maximum(ordered, _LEAST_DISTANCE * typical)
    last, following = ordered[:, :-1], ordered[:, 1:]
    gap = (last < _NEAR * typical) & (following >= _GAP * last)
    found = np.flatnonzero(np.any(gap, axis=1))
    if len(found) < max(_LEAST_COPIES, _LEAST_SHARE * count):
        return []
    nearest: Int[np.ndarray, " n"] = np.argmin(distances, axis=1)
    return [(int(i), int(nearest[i])) for i in found]


def near_copies_text(pairs: Sequence[tuple[int, int]], names: Sequence[str]) -> str:
    """Describe for a person what `near_copies` means for thresholds.

    Args:
      pairs: see `near_copies`.
      names: names of all images.

    Returns:
      One sentence with advice; "" without pairs.
    """
    if not pairs:
        return ""
    unique = dict.fromkeys(tuple(sorted(pair)) for pair in pairs)
    named = _named([(names[i], names[j]) for i, j in unique])
    return (
        f"{len(pairs)} of {len(names)} normal images are near copies of others ({named}): "
        "new images will be called anomalous more often than promised. Say with "
        "config.threshold.groups which images belong together, or remove the copies"
    )


def _named(pairs: Sequence[tuple[str, str]]) -> str:
    listed = ", ".join(f"{shown(a)} = {shown(b)}" for a, b in pairs[:_NAMED])
    return listed + ", ..." * (len(pairs) > _NAMED)
