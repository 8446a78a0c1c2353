"""Backbones as ONNX: counterparts of `models.resnet` and `models.efficientnet`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from padim_jax.config.backbones import (
    BACKBONES,
    EfficientNetSpec,
    MBConvSpec,
    ResNetSpec,
    parts_to_compute,
)
from padim_jax.export.graph import Graph


def features(
    graph: Graph, images: str, backbone: str, stages: Sequence[str], params: Mapping[str, Any]
) -> list[str]:
    """Add a backbone.

    Args:
      graph: the graph.
      images: normalised images (b, 3, h, w).
      backbone: key of `padim_jax.config.backbones.BACKBONES`.
      stages: stages whose feature maps are returned.
      params: parameters of the Flax module, "params" of its variables.

    Returns:
      The feature map (b, c, h_i, w_i) of each stage.

    Raises:
      ValueError: a parameter has no place in the graph.
    """
    spec, network = BACKBONES[backbone], _Network(graph, params)
    if isinstance(spec, ResNetSpec):
        maps = _resnet(network, images, spec, stages)
    else:
        maps = _efficientnet(network, images, spec, stages)
    if network.unused:
        raise ValueError(f"{sorted(network.unused)}: parameters without a place in the graph")
    return [maps[stage] for stage in stages]


class _Network:
    """Convolutions of a backbone, each with its parameters.

    Attributes:
      graph: the graph.
      unused: parameters of no node so far, by "block.convolution".
    """

    def __init__(self, graph: Graph, params: Mapping[str, Any]) -> None:
        self.graph = graph
        self.unused: dict[str, Mapping[str, Any]] = {}
        for name, part in params.items():
            if "kernel" in part:
                self.unused[name] = part
            else:
                self.unused |= {f"{name}.{inner}": leaf for inner, leaf in part.items()}

    def conv(self, x: str, name: str, stride: int = 1, depthwise: bool = False) -> str:
        """Add a convolution, padded by half its kernel on all sides."""
        part = self.unused.pop(name)
        kernel = np.asarray(part["kernel"]).transpose(3, 2, 0, 1)
        size = kernel.shape[2]
        weights = self.graph.constant(kernel, f"{name}.kernel")
        bias = self.graph.constant(np.asarray(part["bias"]), f"{name}.bias")
        return self.graph.add(
            *("Conv", x, weights, bias),
            kernel_shape=[size, size],
            strides=[stride, stride],
            pads=[size // 2] * 4,
            group=len(kernel) if depthwise else 1,
        )

    def relu(self, x: str) -> str:
        return self.graph.add("Relu", x)

    def silu(self, x: str) -> str:
        return self.graph.add("Mul", x, self.graph.add("Sigmoid", x))


def _resnet(
    network: _Network, images: str, spec: ResNetSpec, stages: Sequence[str]
) -> dict[str, str]:
    x = network.relu(network.conv(images, "conv1", 2))
    x = network.graph.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    maps = {}
    for i, stage in enumerate(parts_to_compute(spec, stages)):
        for j in range(spec.depths[i]):
            x = _residual(network, x, f"{stage}_{j}", spec.block, 2 if i and not j else 1)
        maps[stage] = x
    return maps


def _residual(network: _Network, x: str, name: str, block: str, stride: int) -> str:
    if block == "basic":
        y = network.relu(network.conv(x, f"{name}.conv1", stride))
        y = network.conv(y, f"{name}.conv2")
    else:
        y = network.relu(network.conv(x, f"{name}.conv1"))
        y = network.relu(network.conv(y, f"{name}.conv2", stride))
        y = network.conv(y, f"{name}.conv3")
    if f"{name}.downsample" in network.unused:
        x = network.conv(x, f"{name}.downsample", stride)
    return network.relu(network.graph.add("Add", x, y))


def _efficientnet(
    network: _Network, images: str, spec: EfficientNetSpec, stages: Sequence[str]
) -> dict[str, str]:
    x = network.silu(network.conv(images, "stem", 2))
    maps = {}
    for name in parts_to_compute(spec, stages):
        maps[name] = x = _mbconv(network, x, name, spec.blocks[spec.parts.index(name)])
    return maps


def _mbconv(network: _Network, x: str, name: str, spec: MBConvSpec) -> str:
    graph, y = network.graph, x
    if spec.expansion > 1:
        y = network.silu(network.conv(y, f"{name}.expand"))
    y = network.silu(network.conv(y, f"{name}.depthwise", spec.stride, depthwise=True))
    weight = graph.add("GlobalAveragePool", y)
    weight = network.silu(network.conv(weight, f"{name}.squeeze"))
    weight = graph.add("Sigmoid", network.conv(weight, f"{name}.excite"))
    y = network.conv(graph.add("Mul", weight, y), f"{name}.project")
    return graph.add("Add", x, y) if spec.residual else y
