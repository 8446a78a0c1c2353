"""Tensor names in a backbone's weight files: torchvision's and timm's."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp

from padim_jax.config.backbones import (
    BACKBONES,
    MIN_INPUT,
    EfficientNetSpec,
    parts_to_compute,
)
from padim_jax.errors import UserError
from padim_jax.models import network

Names = tuple[str, str | None]  # of a convolution and of the batch norm after it, if any
Shape = tuple[int, ...]
MOST_LISTED = 10  # names of one kind in an error message


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution of a network and its names in a weights file.

    Attributes:
      path: names of the modules that lead to it in the network's parameters.
      shape: shape of its kernel: outputs, inputs, height, width.
      name: prefix of its own tensors' names.
      norm: prefix of the names of the batch norm after it; None if there is none, in which case
        the convolution has a bias in all files.
    """

    path: tuple[str, ...]
    shape: Shape
    name: str
    norm: str | None

    def tensors(self, folded: bool) -> dict[str, Shape]:
        """Return names and shapes in a file, with batch norm or with batch norm folded."""
        found = {f"{self.name}.weight": self.shape}
        if folded or self.norm is None:
            return found | {f"{self.name}.bias": self.shape[:1]}
        parts = ("weight", "bias", "running_mean", "running_var")
        return found | {f"{self.norm}.{part}": self.shape[:1] for part in parts}


@dataclasses.dataclass(frozen=True)
class Naming:
    """Tensor names of a network in weight files of one origin.

    Attributes:
      origin: name of the origin.
      names: function from the modules that lead to a convolution to its names.
      head: names of the convolutions behind the last stage.
      classifier: prefix of the last layer's weight and bias.
      epsilon: constant that batch norm adds to variances in networks of this origin.
    """

    origin: str
    names: Callable[[Sequence[str]], Names]
    head: tuple[tuple[str, str], ...]
    classifier: str
    epsilon: float

    def behind(self, folded: bool) -> set[str]:
        """Return the names of the tensors that belong to no stage."""
        found = {f"{self.classifier}.weight", f"{self.classifier}.bias"}
        for names in self.head:
            found |= Convolution((), (), *names).tensors(folded).keys()
        return found


def namings(backbone: str) -> tuple[Naming, ...]:
    """Return the namings that a backbone's files may use, torchvision's first."""
    spec = BACKBONES[backbone]
    if not isinstance(spec, EfficientNetSpec):
        # timm uses the same names.
        return (Naming("torchvision", _resnet, (), "fc", 1e-5),)

    def torchvision(path: Sequence[str]) -> Names:
        return _torchvision(spec, path)

    def timm(path: Sequence[str]) -> Names:
        return _timm(spec, path)

    last = len(spec.groups) + 1
    head = (f"features.{last}.0", f"features.{last}.1")
    return (
        # From TensorFlow, whose default is 1e-3; torchvision uses it for B5 to B7.
        Naming("torchvision", torchvision, (head,), "classifier.1", 1e-3),
        # Networks that timm trained itself use PyTorch's default.
        Naming("timm", timm, (("conv_head", "bn2"),), "classifier", 1e-5),
    )


def convolutions(backbone: str, naming: Naming) -> list[Convolution]:
    """Return all convolutions of a network up to its deepest part.

    Args:
      backbone: key of `padim_jax.config.backbones.BACKBONES`.
      naming: naming to use.

    Returns:
      The convolutions, in the order of the network's parameters.
    """
    return [Convolution(path, shape, *naming.names(path)) for path, shape in _kernels(backbone)]


def used(
    network: Sequence[Convolution], backbone: str, stages: Sequence[str]
) -> list[Convolution]:
    """Return the convolutions up to the deepest stage in use."""
    spec = BACKBONES[backbone]
    behind = set(spec.parts) - set(parts_to_compute(spec, stages))
    # A ResNet's parts have several blocks: layer1_0, layer1_1.
    return [layer for layer in network if layer.path[0].split("_")[0] not in behind]


def tensors(network: Sequence[Convolution], folded: bool) -> dict[str, Shape]:
    """Return names and shapes of the tensors that a file has to hold for these convolutions."""
    return {k: v for layer in network for k, v in layer.tensors(folded).items()}


def recognize(names: Collection[str], backbone: str) -> tuple[Naming, list[Convolution]]:
    """Return the naming that a file's names follow, and the whole network by it."""
    networks = [(naming, convolutions(backbone, naming)) for naming in namings(backbone)]
    return max(networks, key=lambda x: sum(f"{layer.name}.weight" in names for layer in x[1]))


def common_prefix(names: Collection[str], backbone: str, source: str) -> str:
    """Return what the names of a backbone begin with, where it is a part of another module.

    Examples are "module." of DataParallel and "model.feature_extractor." of a Lightning
    checkpoint.

    Args:
      names: names of all tensors of a file.
      backbone: key of `padim_jax.config.backbones.BACKBONES`.
      source: description of the tensors' origin that begins error messages.

    Returns:
      The prefix with the most tensors of the backbone; "" if they have none.

    Raises:
      UserError: the file contains the backbone several times.
    """
    best, prefixes = 0, [""]
    for naming in namings(backbone):
        weights = [f"{layer.name}.weight" for layer in convolutions(backbone, naming)]
        first = weights[0]
        ends = {name.removesuffix(first) for name in names if name.endswith(f".{first}")}
        for prefix in ["", *sorted(ends)]:
            count = sum(prefix + name in names for name in weights)
            if count > best:
                best, prefixes = count, [prefix]
            elif count == best:
                prefixes.append(prefix)
    if "" in prefixes:
        return ""
    if len(prefixes) > 1:
        raise UserError(
            f"{source} holds {backbone} {len(prefixes)} times, by names that begin with "
            f"{listed(prefixes)}; keep one of them"
        )
    return prefixes[0]


def listed(names: Sequence[str]) -> str:
    """Return names as an error message lists them, long ones and long lists cut off."""
    rest = len(names) - MOST_LISTED
    shown = (name if len(name) < 200 else f"{name[:200]}..." for name in names[:MOST_LISTED])
    return "; ".join(shown) + (f"; and {rest} more" if rest > 0 else "")


@functools.cache
def _kernels(backbone: str) -> list[tuple[tuple[str, ...], Shape]]:
    """Return modules and kernel shapes of all convolutions; traced, not computed."""
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
    """Map, for example, layer2_0, conv2 to layer2.0.conv2, layer2.0.bn2."""
    name = ".".join(path).replace("_", ".")
    if path[-1] == "downsample":
        return f"{name}.0", f"{name}.1"
    return name, name.replace("conv", "bn")


def _group(spec: EfficientNetSpec, block: str) -> tuple[int, int]:
    """Return the number of a block's group, and the block's number within it."""
    i = spec.parts.index(block)
    for group, (depth, *_) in enumerate(spec.groups):
        if i < depth:
            return group, i
        i -= depth
    raise ValueError(block)


def _torchvision(spec: EfficientNetSpec, path: Sequence[str]) -> Names:
    """Map, for example, block7, project to features.2.4.block.3.0, features.2.4.block.3.1."""
    if path[0] == "stem":
        return "features.0.0", "features.0.1"
    block, layer = path
    group, i = _group(spec, block)
    # Layers are numbered; blocks without expansion have one less.
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
    """Map, for example, block7, project to blocks.1.4.conv_pwl, blocks.1.4.bn3."""
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
