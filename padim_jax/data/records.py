"""What a dataset is made of: records, without any pixels read yet."""

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
      split: "train" (normal images that the model is fitted to), "validation" (normal
        images that it is not fitted to, for thresholds) or "test".
      image: path of the image file.
      mask: where the ground-truth mask is, or None where there is none: for a normal
        image that means "no defect pixel", for an anomalous one "the defect's place is
        unknown". An image file, a folder of image files (a pixel is a defect's if one of
        them says so), or, with `mask_frame`, an .npy file; see `masks`.
      label: 0 normal, 1 anomalous.
      defect_type: "good" for normal images, else the defect's folder name.
      relative_path: POSIX path below the dataset's root; identifies the image in
        tables and file names.
      mask_frame: of a mask file with one mask for each frame of a video (n, h, w), which.
    """

    split: Split
    image: Path
    mask: Path | None
    label: int
    defect_type: str
    relative_path: str
    mask_frame: int | None = None

    def __post_init__(self) -> None:
        """Results are written to paths that are made of these, which may be a stranger's."""
        for name in (self.relative_path, self.defect_type):
            if not paths.is_below(name):
                raise UserError(
                    f"{self.image}: called {name!r}, which leads out of the folder of results; "
                    "expected a relative path without .."
                )


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An image that was left out, since it cannot be used.

    Attributes:
      path: its `relative_path`, written so that it can be printed.
      reason: the error that it would have been.
    """

    path: str
    reason: str


@runtime_checkable  # the tests check argument types at run time
class Source(Protocol):
    """Images that can be read in any order: what a dataset gives the pipeline."""

    @property
    def records(self) -> Sequence[Record]:
        """What the images are."""
        ...

    def read(self, index: int) -> tuple[bytes, bytes | None]:
        """The encoded image of `records[index]` and its mask's, if it has one."""
        ...
