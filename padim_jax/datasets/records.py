"""What a dataset is made of: records, without any pixels read yet."""

import dataclasses
from typing import Literal

from padim_jax.paths import Path

GOOD = "good"  # the defect type of normal images in every layout


@dataclasses.dataclass(frozen=True)
class Record:
    """One image of a dataset and what is known about it.

    Attributes:
      split: "train" (normal images that the model is fitted to) or "test".
      image: path of the image file.
      mask: path of the ground-truth mask (defect pixels > 127), or None where
        there is none: for a normal image that means "no defect pixel", for an
        anomalous one "the defect's place is unknown".
      label: 0 normal, 1 anomalous.
      defect_type: "good" for normal images, else the defect's folder name.
      relative_path: POSIX path below the dataset's root; identifies the image in
        tables and file names.
    """

    split: Literal["train", "test"]
    image: Path
    mask: Path | None
    label: int
    defect_type: str
    relative_path: str
