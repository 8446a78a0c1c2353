"""Backbones as ONNX: counterparts of the networks in `models`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from padim_jax.config.backbones import (
    BACKBONES,
    EfficientNetSpec,
    MBConvSpec,
    ResNetSpec,
    ScatteringSpec,
    parts_to_compute,
)
from padim_jax.export.graph import Graph
from padim_jax.models import scattering


def features(
    graph: Graph,
    images: str,
    size: tuple[int, int],
    backbone: str,
    stages: Sequence[str],
    params: Mapping[str, Any],
) -> list[str]:
    """Add a backbone.

    Args:
      graph: the graph.
      images: normalised images (b, 3, h, w).
      size: their height and width.
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
    elif isinstance(spec, ScatteringSpec):
        maps = _scattering(network, images, size, spec, stages)
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


def _scattering(
    network: _Network,
    images: str,
    size: tuple[int, int],
    spec: ScatteringSpec,
    stages: Sequence[str],
) -> dict[str, str]:
    graph, count = network.graph, spec.orientations
    kernel = np.asarray(scattering.at_pixels(network.unused.pop("gabor")["kernel"]))
    gabor = graph.constant(kernel.transpose(3, 2, 0, 1), "gabor.kernel")
    binomial = scattering.BINOMIAL.astype(np.float32)
    blur = graph.constant(np.outer(binomial, binomial)[None, None], "blur.kernel")
    opponent = scattering.OPPONENT.T.astype(np.float32)[:, :, None, None]
    small = graph.constant(np.array(scattering.SMALL, np.float32))
    one = graph.constant(np.array(1, np.float32))
    sizes = [size]
    while len(sizes) < 5:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))

    def filtered(x: str, scale: int, weights: str, before: int, after: int) -> str:
        """Convolve each channel at a scale, with stride 2; odd sides get a pixel more."""
        height, width = sizes[scale]
        ends = [0, 0, before, before, 0, 0, after + height % 2, after + width % 2]
        x = graph.reshape(x, -1, 1, height, width)
        x = graph.add("Pad", x, graph.constant(np.array(ends, np.int64)), mode="edge")
        return graph.add("Conv", x, weights, strides=[2, 2])

    def halved(x: str, channels: int, scale: int, times: int = 1) -> str:
        for j in range(scale, scale + times):
            x = graph.reshape(filtered(x, j, blur, 2, 3), -1, channels, *sizes[j + 1])
        return x

    def energy(x: str, channels: int, scale: int) -> str:
        x = graph.reshape(filtered(x, scale, gabor, 3, 3), -1, 2, count, *sizes[scale + 1])
        x = graph.add("Sqrt", graph.sum(graph.add("Mul", x, x), 1))
        x = graph.reshape(x, -1, 4, count, *sizes[scale + 1])
        x = graph.add("ReduceMean", x, axes=[1], keepdims=0)
        return graph.reshape(x, -1, channels * count, *sizes[scale + 1])

    averages = [graph.add("Conv", images, graph.constant(opponent, "opponent"))]
    for j in range(4):
        averages.append(halved(averages[j], 3, j))
    first = [energy(x, 3, j) for j, x in enumerate(averages[:4])]
    maps = {}
    for stage in stages:
        scale, own, pairs = scattering.STAGES[stage]
        energies = [(j, first[j], 3 * count) for j in own]
        for i, j in pairs:
            luma = graph.take(first[i], np.arange(count), 1, 3 * count)
            u = halved(luma, count, i + 1, j - i - 1)
            energies.append((j, energy(u, count, j), count**2))
        parts = [averages[scale]]
        for j, u, channels in energies:
            u = graph.add("Div", halved(u, channels, j + 1, scale - j - 1), small)
            parts.append(graph.add("Log", graph.add("Add", u, one)))
        maps[stage] = graph.add("Concat", *parts, axis=1)
    return maps


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
