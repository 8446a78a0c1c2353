"""What weight files call the tensors of a backbone: torchvision's names, and timm's."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from padim_jax.config.backbones import BACKBONES, MIN_INPUT, EfficientNetSpec
from padim_jax.models import network

Names = tuple[str, str | None]  # of a convolution and of the batch norm after it, if any
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution of a network, and what a weights file calls it.

    Attributes:
      path: the modules that lead to it in the network's parameters.
      shape: of its kernel: outputs, inputs, height, width.
      name: what the names of its own tensors begin with.
      norm: what those of the batch norm after it begin with; None where there is none,
        and the convolution has a bias in every file.
    """

    path: tuple[str, ...]
    shape: Shape
    name: str
    norm: str | None

    def tensors(self, folded: bool) -> dict[str, Shape]:
        """Names and shapes in a file, with batch norm or with batch norm folded."""
        found = {f"{self.name}.weight": self.shape}
        if folded or self.norm is None:
            return found | {f"{self.name}.bias": self.shape[:1]}
        parts = ("weight", "bias", "running_mean", "running_var")
        return found | {f"{self.norm}.{part}": self.shape[:1] for part in parts}


@dataclasses.dataclass(frozen=True)
class Naming:
    """How the weight files of one origin call a network's tensors.

    Attributes:
      origin: whose names these are.
      names: from the modules that lead to a convolution to its names.
      head: of the convolutions behind the last stage.
      classifier: what the names of the last layer's weight and bias begin with.
      epsilon: that batch norm adds to variances in the networks of this origin.
    """

    origin: str
    names: Callable[[Sequence[str]], Names]
    head: tuple[tuple[str, str], ...]
    classifier: str
    epsilon: float

    def behind(self, folded: bool) -> set[str]:
        """Names of the tensors that belong to no stage."""
        found = {f"{self.classifier}.weight", f"{self.classifier}.bias"}
        for names in self.head:
            found |= Convolution((), (), *names).tensors(folded).keys()
        return found


def namings(backbone: str) -> tuple[Naming, ...]:
    """The namings that a backbone's files may have, torchvision's first."""
    spec = BACKBONES[backbone]
    if not isinstance(spec, EfficientNetSpec):
        # timm's names are the same.
        return (Naming("torchvision", _resnet, (), "fc", 1e-5),)

    def torchvision(path: Sequence[str]) -> Names:
        return _torchvision(spec, path)

    def timm(path: Sequence[str]) -> Names:
        return _timm(spec, path)

    last = len(spec.groups) + 1
    head = (f"features.{last}.0", f"features.{last}.1")
    return (
        # From TensorFlow, where 1e-3 is the default; torchvision has it for B5 to B7.
        Naming("torchvision", torchvision, (head,), "classifier.1", 1e-3),
        # What timm trained itself has PyTorch's default.
        Naming("timm", timm, (("conv_head", "bn2"),), "classifier", 1e-5),
    )


def convolutions(backbone: str, naming: Naming) -> list[Convolution]:
    """All convolutions of a network up to its deepest part."""
    return [Convolution(path, shape, *naming.names(path)) for path, shape in _kernels(backbone)]


@functools.cache
def _kernels(backbone: str) -> list[tuple[tuple[str, ...], Shape]]:
    """Modules and kernel shapes of all convolutions; traced, not computed."""
    model = network.build(backbone, (BACKBONES[backbone].parts[-1],), "float32")
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, MIN_INPUT, MIN_INPUT, 3)))
    )["params"]
    found = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        *modules, parameter = (key.key for key in keys)
        if parameter == "kernel":
            height, width, inputs, outputs = leaf.shape
            found.append((tuple(modules), (outputs, inputs, height, width)))
    return found


def _resnet(path: Sequence[str]) -> Names:
    """E.g. layer2_0, conv2 -> layer2.0.conv2, layer2.0.bn2."""
    name = ".".join(path).replace("_", ".")
    if path[-1] == "downsample":
        return f"{name}.0", f"{name}.1"
    return name, name.replace("conv", "bn")


def _group(spec: EfficientNetSpec, block: str) -> tuple[int, int]:
    """The number of a block's group, and its own number in the group."""
    i = spec.parts.index(block)
    for group, (depth, *_) in enumerate(spec.groups):
        if i < depth:
            return group, i
        i -= depth
    raise ValueError(block)


def _torchvision(spec: EfficientNetSpec, path: Sequence[str]) -> Names:
    """E.g. block7, project -> features.2.4.block.3.0, features.2.4.block.3.1."""
    if path[0] == "stem":
        return "features.0.0", "features.0.1"
    block, layer = path
    group, i = _group(spec, block)
    # Layers are numbered; without expansion one less.
    layers = ["expand", "depthwise", "squeeze", "project"]
    if spec.groups[group][1] == 1:
        del layers[0]
    squeeze = {"squeeze": "fc1", "excite": "fc2"}
    number = layers.index("squeeze" if layer in squeeze else layer)
    name = f"features.{group + 1}.{i}.block.{number}"
    if layer in squeeze:
        return f"{name}.{squeeze[layer]}", None
    return f"{name}.0", f"{name}.1"


def _timm(spec: EfficientNetSpec, path: Sequence[str]) -> Names:
    """E.g. block7, project -> blocks.1.4.conv_pwl, blocks.1.4.bn3."""
    if path[0] == "stem":
        return "conv_stem", "bn1"
    block, layer = path
    group, i = _group(spec, block)
    expanded = {
        "expand": ("conv_pw", "bn1"),
        "depthwise": ("conv_dw", "bn2"),
        "project": ("conv_pwl", "bn3"),
    }
    plain = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}
    squeeze = {"squeeze": "se.conv_reduce", "excite": "se.conv_expand"}
    prefix = f"blocks.{group}.{i}"
    if layer in squeeze:
        return f"{prefix}.{squeeze[layer]}", None
    conv, norm = (plain if spec.groups[group][1] == 1 else expanded)[layer]
    return f"{prefix}.{conv}", f"{prefix}.{norm}"
