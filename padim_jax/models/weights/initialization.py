"""Random weights, for trying the program out: reproducible on every machine."""

import zlib
from collections.abc import Sequence

import numpy as np

from padim_jax.config.backbones import EfficientNetSpec, ResNetSpec
from padim_jax.models.weights.naming import Convolution


def random_tensors(
    network: Sequence[Convolution], spec: ResNetSpec | EfficientNetSpec
) -> dict[str, np.ndarray]:
    """Draw normal weights that keep the scale of activations; biases are zero.

    Each tensor has its own generator, seeded by its name, so that it is the same wherever the
    network is cut.

    Args:
      network: the convolutions in use.
      spec: of their backbone.

    Returns:
      Float32 tensors by the names of a file with batch norm folded, convolutions OIHW.
    """
    tensors: dict[str, np.ndarray] = {}
    for layer in network:
        rng = np.random.default_rng(zlib.crc32(f"{layer.name}.weight".encode()))
        weight = rng.standard_normal(layer.shape, np.float32)
        scale = np.sqrt(_gain(layer.path, spec) / np.prod(layer.shape[1:]))
        tensors[f"{layer.name}.weight"] = weight * np.float32(scale)
        tensors[f"{layer.name}.bias"] = np.zeros(layer.shape[0], np.float32)
    return {name: tensor.astype("<f4") for name, tensor in tensors.items()}


def _gain(path: Sequence[str], spec: ResNetSpec | EfficientNetSpec) -> float:
    """Return the variance of random weights times fan-in.

    It is one over the mean square of the input, for outputs of variance 1: 2 after a ReLU
    (He et al., arXiv 1502.01852), 2.8 after a SiLU. Excitation is around 1/2 of it.
    Residual branches are scaled by blocks ** -0.5: without that, and without batch norm's
    statistics, activations would double at each block, to 1e7 in a resnet152, beyond what
    a float32 covariance can hold.
    """
    if isinstance(spec, ResNetSpec):
        last = "conv2" if spec.block == "basic" else "conv3"
        return 2 / sum(spec.depths) if path[-1] == last else 2.0
    if path[-1] == "depthwise":
        return 2.8
    if path[-1] != "project":
        return 1.0
    block = spec.blocks[spec.parts.index(path[0])]
    return 4 * 2.8 / (len(spec.blocks) if block.residual else 1)
