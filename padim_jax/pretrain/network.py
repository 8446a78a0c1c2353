"""The trained network: the backbone with batch norm, and a head on each stage."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from padim_jax.config.backbones import RESNETS, Precision
from padim_jax.devices import parallel
from padim_jax.models.resnet import ResNet

STAGES = ("layer1", "layer2", "layer3")
# Side in pixels of the patch that a cell predicts: its own, averaged for deeper stages.
PATCH = 4
EPSILON = 1e-5
_MOMENTUM = 0.98


class ConvNorm(nn.Module):
    """A convolution and its batch norm, with `nn.Conv`'s arguments.

    Statistics are those of the images on all devices.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1
    padding: int = 0
    dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Apply both; with the batch's own statistics if `batch_stats` is mutable."""
        training = self.is_mutable_collection("batch_stats") and not self.is_initializing()
        x = nn.Conv(
            self.features,
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            use_bias=False,
            dtype=self.dtype,
            precision=self.precision,
            kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            name="conv",
        )(x)
        return nn.BatchNorm(
            use_running_average=not training,
            momentum=_MOMENTUM,
            epsilon=EPSILON,
            dtype=self.dtype,
            axis_name=parallel.AXIS if training else None,
            name="norm",
        )(x)


class Network(nn.Module):
    """A backbone up to layer3, and predictions of each cell's own pixels.

    Attributes:
      backbone: key of `padim_jax.config.backbones.RESNETS`, with basic blocks.
      precision: see `ResNet`.
    """

    backbone: str
    precision: Precision

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"]
    ) -> tuple[
        tuple[Float32[Array, "b _h _w _c"], ...], tuple[Float32[Array, "b _h _w _p"], ...]
    ]:
        """Return features and predicted pixels.

        Args:
          images: normalised.

        Returns:
          For each of `STAGES` the features (b, h / s, w / s, c), with s = 4, 8, 16, and the
          predicted pixels (b, h / s, w / s, 3 * PATCH^2).
        """
        features = ResNet(
            RESNETS[self.backbone], STAGES, self.precision, ConvNorm, name="backbone"
        )(images)
        told = tuple(
            nn.Dense(3 * PATCH**2, name=f"pixels_{stage}")(x)
            for stage, x in zip(STAGES, features, strict=True)
        )
        return features, told


def channels(backbone: str) -> tuple[int, ...]:
    """Return the number of channels of each of `STAGES`."""
    return tuple(map(RESNETS[backbone].channels, STAGES))


def with_weights(
    variables: Mapping[str, Any],
    weights: Mapping[str, Any],
    images: Float[Array, "b h w 3"],
    backbone: str,
) -> dict[str, Any]:
    """Put a backbone's weights with folded norms into a network with norms.

    Each norm's scale and bias undo its effect on some images, so that training begins
    with the function of the weights.

    Args:
      variables: variables of `Network`, for everything else.
      weights: `params` of the plain backbone.
      images: normalised images, whose statistics become the norms'.
      backbone: backbone of the weights.

    Returns:
      Variables of `Network`.
    """
    plain = ResNet(RESNETS[backbone], STAGES, "float32")
    _, found = plain.apply(
        {"params": weights},
        images,
        capture_intermediates=lambda module, _: isinstance(module, nn.Conv),
    )

    def norms(weights: Mapping[str, Any], outputs: Mapping[str, Any]) -> tuple[Any, Any]:
        if "kernel" not in weights:
            parts = {name: norms(weights[name], outputs[name]) for name in weights}
            first = {name: part[0] for name, part in parts.items()}
            return first, {name: part[1] for name, part in parts.items()}
        (output,) = outputs["__call__"]
        mean, variance = jnp.mean(output, (0, 1, 2)), jnp.var(output, (0, 1, 2))
        norm = {"scale": jnp.sqrt(variance + EPSILON), "bias": mean}
        running = {"mean": mean - weights["bias"], "var": variance}
        return {"conv": {"kernel": weights["kernel"]}, "norm": norm}, {"norm": running}

    params, stats = norms(weights, found["intermediates"])
    return {
        "params": {**variables["params"], "backbone": params},
        "batch_stats": {"backbone": stats},
    }


def folded(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the backbone's weights with folded norms, by torchvision's names, float32.

    Args:
      variables: params and batch_stats of `Network`.
    """
    found = {}

    def walk(
        params: Mapping[str, Any], stats: Mapping[str, Any], path: tuple[str, ...]
    ) -> None:
        if "conv" not in params:
            for name in params:
                walk(params[name], stats[name], (*path, name))
            return
        norm, running = params["norm"], stats["norm"]
        scale = np.asarray(norm["scale"], np.float64) / np.sqrt(
            np.asarray(running["var"], np.float64) + EPSILON
        )
        kernel = np.asarray(params["conv"]["kernel"], np.float64) * scale
        bias = np.asarray(norm["bias"], np.float64) - np.asarray(running["mean"]) * scale
        name = ".".join(path).replace("_", ".")
        name = f"{name}.0" if path[-1] == "downsample" else name
        found[f"{name}.weight"] = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1), np.float32)
        found[f"{name}.bias"] = bias.astype(np.float32)

    walk(variables["params"]["backbone"], variables["batch_stats"]["backbone"], ())
    return found


def rescaled(
    tensors: Mapping[str, np.ndarray], factors: Mapping[str, Float32[np.ndarray, " c"]]
) -> dict[str, np.ndarray]:
    """Return the same network with each channel of the feature maps scaled.

    ReLU commutes with positive factors, so layers that read a scaled channel divide by its
    factor: the function is unchanged up to these factors.

    Args:
      tensors: tensors of a ResNet of basic blocks, as from `folded`.
      factors: positive factors of the channels for each of `STAGES`.

    Returns:
      Tensors of the same names and shapes.
    """
    found = {}
    for name, value in tensors.items():
        path = name.split(".")
        before = after = None
        if path[0] == "conv1":
            after = factors[STAGES[0]]
        else:
            i, last = STAGES.index(path[0]), path[-2] == "conv2"
            own, earlier = factors[path[0]], factors[STAGES[max(i - 1, 0)]]
            before = None if last else earlier if path[1] == "0" else own
            after = own if last or "downsample" in path else None
        if after is not None:
            value = value * after.reshape(-1, *[1] * (value.ndim - 1))
        if before is not None and path[-1] == "weight":
            value = value / before[:, None, None]
        found[name] = value.astype(np.float32)
    return found
