"""What backbones there are: their shapes and the names of their weights, as plain data.

Importing this module imports neither JAX nor Flax, so that a config can be checked
before anything heavy is loaded.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

STAGES = ("layer1", "layer2", "layer3", "layer4")

# The stride of layer4: the smallest input whose deepest feature map is a whole cell.
MIN_INPUT = 32

Precision = Literal["float32", "tf32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class ResNetSpec:
    """One member of the ResNet family (He et al., arXiv 1512.03385, as torchvision has it).

    Attributes:
      block: "basic" is two 3x3 convolutions; "bottleneck" is 1x1, 3x3, 1x1 with the
        stride in the 3x3 (the v1.5 variant) and four times the channels at its end.
      depths: number of blocks in each of the four stages.
      width: channels of the first stage's 3x3 convolutions; 64, or 128 for the wide
        networks (torchvision's `width_per_group`), whose stages end in the same
        number of channels all the same.
    """

    block: Literal["basic", "bottleneck"]
    depths: tuple[int, int, int, int]
    width: int = 64


BACKBONES: dict[str, ResNetSpec] = {
    "resnet18": ResNetSpec("basic", (2, 2, 2, 2)),
    "resnet34": ResNetSpec("basic", (3, 4, 6, 3)),
    "resnet50": ResNetSpec("bottleneck", (3, 4, 6, 3)),
    "resnet101": ResNetSpec("bottleneck", (3, 4, 23, 3)),
    "resnet152": ResNetSpec("bottleneck", (3, 8, 36, 3)),
    "wide_resnet50_2": ResNetSpec("bottleneck", (3, 4, 6, 3), width=128),
    "wide_resnet101_2": ResNetSpec("bottleneck", (3, 4, 23, 3), width=128),
}

# Weights that can be had by name: torchvision's, as timm re-published them in the
# Hugging Face hub under `timm/<name>`; tv is torchvision's V1, tv2 its V2 training
# recipe. See third_party/pretrained_weights.md for where they come from and their terms.
WEIGHTS: dict[str, tuple[str, ...]] = {
    "resnet18": ("resnet18.tv_in1k",),
    "resnet34": ("resnet34.tv_in1k",),
    "resnet50": ("resnet50.tv_in1k", "resnet50.tv2_in1k"),
    "resnet101": ("resnet101.tv_in1k", "resnet101.tv2_in1k"),
    "resnet152": ("resnet152.tv_in1k", "resnet152.tv2_in1k"),
    "wide_resnet50_2": ("wide_resnet50_2.tv_in1k", "wide_resnet50_2.tv2_in1k"),
    "wide_resnet101_2": ("wide_resnet101_2.tv_in1k", "wide_resnet101_2.tv2_in1k"),
}

RANDOM_WEIGHTS = "random"

# Suffixes of the weight files that can be read.
WEIGHT_FILES = (".safetensors", ".npz", ".pth", ".pt")


def stage_channels(spec: ResNetSpec, stage: str) -> int:
    """Number of channels of the feature map of one of `STAGES`."""
    expansion = 4 if spec.block == "bottleneck" else 1
    return 64 * 2 ** STAGES.index(stage) * expansion


def stages_to_compute(stages: Sequence[str]) -> tuple[str, ...]:
    """The stages from the first to the deepest of `stages`, in the order they are computed."""
    return STAGES[: max(STAGES.index(stage) for stage in stages) + 1]
