"""Records of a dataset's images; no pixels are read here."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from padim_jax.errors import UserError
from padim_jax.system import paths
from padim_jax.system.paths import Path

Split = Literal["train", "validation", "test"]
GOOD = "good"  # the defect type of normal images in every layout


@dataclasses.dataclass(frozen=True)
class Record:
    """One image of a dataset and what is known about it.

    Attributes:
      split: "train" (normal images that the model is fitted to), "validation" (normal images
        that it is not fitted to, for thresholds) or "test".
      image: path of the image file.
      mask: path of the ground-truth mask, or None: a normal image then has no defect pixel, an
        anomalous one has a defect at an unknown place. The path is an image file, a folder of
        image files (the mask is their union), or, with `mask_frame`, an .npy file; see `masks`.
      label: 0 normal, 1 anomalous.
      defect_type: "good" for normal images, else the name of the defect's folder.
      relative_path: POSIX path below the dataset's root; identifies the image in tables and
        file names.
      mask_frame: index into a mask file with one mask for each frame of a video (n, h, w).
    """

    split: Split
    image: Path
    mask: Path | None
    label: int
    defect_type: str
    relative_path: str
    mask_frame: int | None = None

    def __post_init__(self) -> None:
        """Reject names that leave the folder of results: they may come from untrusted data."""
        for name in (self.relative_path, self.defect_type):
            if not paths.is_below(name):
                raise UserError(
                    f"{self.image}: called {name!r}, which leads out of the folder of results; "
                    "expected a relative path without .."
                )


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An image that was left out because it cannot be used.

    Attributes:
      path: its `relative_path`, with unprintable characters escaped.
      reason: the error that it would have raised.
    """

    path: str
    reason: str


@runtime_checkable  # the tests check argument types at run time
class Source(Protocol):
    """Images that can be read in any order: a dataset's interface to the pipeline."""

    @property
    def records(self) -> Sequence[Record]:
        """Return the records of the images."""
        ...

    def read(self, index: int) -> tuple[bytes, bytes | None]:
        """Return the encoded image of `records[index]` and its mask's, if it has one."""
        ...
