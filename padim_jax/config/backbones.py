"""Supported backbones: their shapes and the names of their weights, as plain data.

Importing this module imports neither JAX nor Flax, so that a config can be checked
before anything heavy is loaded.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

# Input pixels per cell, for each stage whose feature map is available.
STRIDES = {
    "layer1": 4,
    "layer2": 8,
    "layer3": 16,
    "layer4": 32,
    "block7": 4,
    "block20": 16,
    "block26": 16,
}

# The smallest input whose deepest feature map is a whole cell.
MIN_INPUT = max(STRIDES.values())

Precision = Literal["float32", "tf32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class ResNetSpec:
    """One member of the ResNet family (He et al., arXiv 1512.03385, as in torchvision).

    Attributes:
      stages: names of the available feature maps, the shallowest first.
      block: "basic" is two 3x3 convolutions; "bottleneck" is 1x1, 3x3, 1x1 with the stride in
        the 3x3 (the v1.5 variant) and four times the channels at its end.
      depths: number of blocks in each of the four stages.
      width: number of channels of the first stage's 3x3 convolutions; 64, or 128 for the wide
        networks (torchvision's `width_per_group`), whose stages still end in the same number of
        channels.
    """

    stages: ClassVar = ("layer1", "layer2", "layer3", "layer4")

    block: Literal["basic", "bottleneck"]
    depths: tuple[int, int, int, int]
    width: int = 64

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of the parts behind the stem, in the order they are computed."""
        return self.stages

    def channels(self, stage: str) -> int:
        """Return the number of channels of a stage's feature map."""
        expansion = 4 if self.block == "bottleneck" else 1
        return 64 * 2 ** self.stages.index(stage) * expansion

    def kernels(self, stage: str) -> int:
        """Return roughly a stage's number of weights: those of its blocks' widest kernels."""
        i = self.stages.index(stage)
        inner = self.width * 2**i
        if self.block == "basic":
            return self.depths[i] * 2 * 9 * inner**2
        return self.depths[i] * (9 * inner**2 + 2 * inner * self.channels(stage))


@dataclasses.dataclass(frozen=True)
class MBConvSpec:
    """A mobile inverted bottleneck with squeeze-and-excitation; see `efficientnet.MBConv`.

    Attributes:
      inputs: number of input channels.
      outputs: number of output channels.
      expansion: ratio of the depthwise convolution's channels to `inputs`; 1 omits the 1x1
        convolution before it.
      kernel: height and width of the depthwise convolution.
      stride: stride of the depthwise convolution.
    """

    inputs: int
    outputs: int
    expansion: int
    kernel: int
    stride: int

    @property
    def hidden(self) -> int:
        """Return the number of channels of the depthwise convolution."""
        return self.inputs * self.expansion

    @property
    def squeezed(self) -> int:
        """Return the channels between squeeze and excitation: a quarter of `inputs`."""
        return self.inputs // 4

    @property
    def residual(self) -> bool:
        """Return whether the input is added to the output."""
        return self.stride == 1 and self.inputs == self.outputs


@dataclasses.dataclass(frozen=True)
class EfficientNetSpec:
    """One EfficientNet (Tan and Le, arXiv 1905.11946, as in torchvision).

    Attributes:
      block: kind of all blocks.
      stages: names of the available feature maps, the shallowest first: blocks, counted from 0
        over all groups.
      stem: number of channels of the first convolution.
      groups: groups of blocks that differ only in the first one's inputs: number of blocks, and
        their `expansion`, `kernel`, first `stride` and `outputs`.
    """

    block: ClassVar = "mbconv"

    stages: tuple[str, ...]
    stem: int
    groups: tuple[tuple[int, int, int, int, int], ...]

    @property
    def blocks(self) -> tuple[MBConvSpec, ...]:
        """Return all blocks, in the order they are computed."""
        found, inputs = [], self.stem
        for depth, expansion, kernel, stride, outputs in self.groups:
            found.append(MBConvSpec(inputs, outputs, expansion, kernel, stride))
            found += [MBConvSpec(outputs, outputs, expansion, kernel, 1)] * (depth - 1)
            inputs = outputs
        return tuple(found)

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of the parts behind the stem, in the order they are computed."""
        return tuple(f"block{i}" for i in range(len(self.blocks)))

    def channels(self, stage: str) -> int:
        """Return the number of channels of the feature map of any of `parts`."""
        return self.blocks[self.parts.index(stage)].outputs

    def kernels(self, stage: str) -> int:
        """Return the number of weights of any of `parts`, without biases."""
        block = self.blocks[self.parts.index(stage)]
        expand = block.inputs if block.expansion > 1 else 0
        return block.hidden * (expand + block.kernel**2 + 2 * block.squeezed + block.outputs)


@dataclasses.dataclass(frozen=True)
class ScatteringSpec:
    """Fixed filters instead of a trained network; see `padim_jax.models.scattering`.

    Attributes:
      block: kind of all blocks.
      stages: names of the available feature maps, the shallowest first.
      orientations: number of orientations of the filters.
    """

    block: ClassVar = "scattering"
    stages: ClassVar = ("layer1", "layer2", "layer3")

    orientations: int

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the stages, in the order they are computed."""
        return self.stages

    def channels(self, stage: str) -> int:
        """Return the number of channels of a stage's feature map."""
        first, second = (6, 1) if stage == "layer1" else (3, 2)
        return 3 + first * self.orientations + second * self.orientations**2

    def kernels(self, stage: str) -> int:
        """Return the number of weights of all stages, which share them."""
        return 2 * self.orientations * 7**2


Spec = ResNetSpec | EfficientNetSpec | ScatteringSpec

RESNETS: dict[str, ResNetSpec] = {
    "resnet18": ResNetSpec("basic", (2, 2, 2, 2)),
    "resnet34": ResNetSpec("basic", (3, 4, 6, 3)),
    "resnet50": ResNetSpec("bottleneck", (3, 4, 6, 3)),
    "resnet101": ResNetSpec("bottleneck", (3, 4, 23, 3)),
    "resnet152": ResNetSpec("bottleneck", (3, 8, 36, 3)),
    "wide_resnet50_2": ResNetSpec("bottleneck", (3, 4, 6, 3), width=128),
    "wide_resnet101_2": ResNetSpec("bottleneck", (3, 4, 23, 3), width=128),
}

EFFICIENTNETS: dict[str, EfficientNetSpec] = {
    # Width 1.6, depth 2.2; the stages that the PaDiM paper uses.
    "efficientnet_b5": EfficientNetSpec(
        stages=("block7", "block20", "block26"),
        stem=48,
        groups=(
            (3, 1, 3, 1, 24),
            (5, 6, 3, 2, 40),
            (5, 6, 5, 2, 64),
            (7, 6, 3, 2, 128),
            (7, 6, 5, 1, 176),
            (9, 6, 5, 2, 304),
            (3, 6, 3, 1, 512),
        ),
    ),
}

SCATTERING = {"scattering": ScatteringSpec(orientations=4)}

BACKBONES: dict[str, Spec] = {**RESNETS, **EFFICIENTNETS, **SCATTERING}

# Weights available by name from the Hugging Face hub, under `timm/<name>`: for the ResNets
# torchvision's, as timm re-published them (tv is torchvision's V1, tv2 its V2 training recipe),
# for EfficientNet-B5 timm's own. See third_party/pretrained_weights.md for their sources and
# terms.
WEIGHTS: dict[str, tuple[str, ...]] = {
    "resnet18": ("resnet18.tv_in1k",),
    "resnet34": ("resnet34.tv_in1k",),
    "resnet50": ("resnet50.tv_in1k", "resnet50.tv2_in1k"),
    "resnet101": ("resnet101.tv_in1k", "resnet101.tv2_in1k"),
    "resnet152": ("resnet152.tv_in1k", "resnet152.tv2_in1k"),
    "wide_resnet50_2": ("wide_resnet50_2.tv_in1k", "wide_resnet50_2.tv2_in1k"),
    "wide_resnet101_2": ("wide_resnet101_2.tv_in1k", "wide_resnet101_2.tv2_in1k"),
    "efficientnet_b5": ("efficientnet_b5.sw_in12k_ft_in1k",),
    "scattering": (),
}


@dataclasses.dataclass(frozen=True)
class Pin:
    """File of the hub that a name stands for.

    Attributes:
      revision: commit of its repository.
      sha256: digest of the file, in that commit and in any other.
    """

    revision: str
    sha256: str


# Where known; third_party/pretrained_weights.md states the sources.
PINNED = {
    "resnet18.tv_in1k": Pin(
        "bbd144b3e5565108aad885f145491d11bc6ce807",
        "694f673df6520a3158624e8a89af086f59923ee4cd7436fe5bc3bc71d295ad81",
    ),
    "resnet34.tv_in1k": Pin(
        "1b7b21cca82ff974d341713f777bf740c2db38c4",
        "0bb82595a564991a9d424708b33f5d843f5aaed7f6c0886ff10849ff97022235",
    ),
    "resnet50.tv_in1k": Pin(
        "78f3ecfdb38e06d9b8397f662e7ab8fee96026fa",
        "5d061a3c593d795bfe682d9b152bafbcf550579873492def3515b46db1189888",
    ),
    "wide_resnet50_2.tv_in1k": Pin(
        "343c5fa59ca8a131e0cdf42144a641b36a0387c2",
        "df6fb6c4824769769de18e14088475fd6ee94236849aa4e5d8022ba9d9a9a16c",
    ),
}

# torchvision's own files, whose names end in the first digits of their SHA-256.
TORCHVISION_FILES = (
    "resnet18-5c106cde.pth",
    "resnet18-f37072fd.pth",
    "resnet34-333f7ec4.pth",
    "resnet34-b627a593.pth",
    "resnet50-19c8e357.pth",
    "resnet50-0676ba61.pth",
    "resnet50-11ad3fa6.pth",
    "resnet101-5d3b4d8f.pth",
    "resnet101-63fe2227.pth",
    "resnet101-cd907fc2.pth",
    "resnet152-b121ed2d.pth",
    "resnet152-394f9c45.pth",
    "resnet152-f82ba261.pth",
    "wide_resnet50_2-95faca4d.pth",
    "wide_resnet50_2-9ba9bcbe.pth",
    "wide_resnet101_2-32ee1156.pth",
    "wide_resnet101_2-d733dc28.pth",
    "efficientnet_b5_lukemelas-1a07897c.pth",
)

# Behind the name of a ResNet: its weights unless others are set.
DEFAULT_WEIGHTS = ".tv_in1k"

RANDOM_WEIGHTS = "random"

# Of backbones that have none.
NO_WEIGHTS = "none"

# Suffixes of supported weight files.
WEIGHT_FILES = (".safetensors", ".npz", ".pth", ".pt")


def parts_to_compute(spec: Spec, stages: Sequence[str]) -> tuple[str, ...]:
    """Return the parts from the first to the deepest of `stages`, in the order of computation.

    Args:
      spec: specification of the backbone.
      stages: stages in use.

    Returns:
      Names of the parts.
    """
    return spec.parts[: max(spec.parts.index(stage) for stage in stages) + 1]
