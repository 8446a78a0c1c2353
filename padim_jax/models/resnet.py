"""The ResNet family as a feature extractor: images in, feature maps of some stages out."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from padim_jax.config.backbones import Precision, ResNetSpec, parts_to_compute

# Layout and formulation were measured on XLA's CPU backend (ResNet-18 to layer3, 4 cores): NHWC
# convolutions run 20 % faster than NCHW, near the machine's peak; 1x1 convolutions as matrix
# products, im2col, and max pooling as a maximum over strided slices gain nothing. Hence plain
# `nn.Conv` and `lax.reduce_window`. Batch norm is folded into the convolutions when weights are
# loaded: each has a bias and none is followed by a norm.


def _residual(
    x: Float[Array, "b h w c"],
    y: Float[Array, "b i j d"],
    stride: int,
    conv: Callable[..., nn.Module],
) -> Float[Array, "b i j d"]:
    """Return ReLU(shortcut(x) + y); the shortcut is a 1x1 convolution if channels change."""
    # A stride implies a change of channels.
    if x.shape[-1] != y.shape[-1]:
        x = conv(y.shape[-1], (1, 1), strides=stride, padding=0, name="downsample")(x)
    return nn.relu(x + y)


def _max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
    """Return the maximum of 3x3 windows with stride 2 and padding 1, as torchvision does."""
    no, one = (0, 0), (1, 1)
    return lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding=(no, one, one, no)
    )


class BasicBlock(nn.Module):
    """torchvision's `BasicBlock`: 3x3 with the stride, 3x3.

    Attributes:
      channels: number of channels of both convolutions.
      stride: stride of the first convolution and the shortcut.
      conv: `nn.Conv` with its dtype and precision bound.
    """

    channels: int
    stride: int
    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Apply the block: `h, w` shrink by the stride, `c` becomes `channels`."""
        y = self.conv(self.channels, (3, 3), strides=self.stride, padding=1, name="conv1")(x)
        y = self.conv(self.channels, (3, 3), padding=1, name="conv2")(nn.relu(y))
        return _residual(x, y, self.stride, self.conv)


class Bottleneck(nn.Module):
    """torchvision's `Bottleneck`: 1x1, 3x3 with the stride (v1.5), 1x1.

    Attributes:
      channels: number of channels of the last convolution.
      inner_channels: number of channels of the first two.
      stride: stride of the 3x3 convolution and the shortcut.
      conv: `nn.Conv` with its dtype and precision bound.
    """

    channels: int
    inner_channels: int
    stride: int
    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Apply the block: `h, w` shrink by the stride, `c` becomes `channels`."""
        inner = self.inner_channels
        y = self.conv(inner, (1, 1), padding=0, name="conv1")(x)
        y = self.conv(inner, (3, 3), strides=self.stride, padding=1, name="conv2")(nn.relu(y))
        y = self.conv(self.channels, (1, 1), padding=0, name="conv3")(nn.relu(y))
        return _residual(x, y, self.stride, self.conv)


class ResNet(nn.Module):
    """A ResNet cut after the deepest requested stage.

    Parameters are named like torchvision's tensors: `layer2.0.conv1.weight` is
    `params["layer2_0"]["conv1"]["kernel"]` (HWIO) and `layer2.0.downsample.0.weight` is
    `params["layer2_0"]["downsample"]["kernel"]`; see `naming`. Stages behind the cut
    have no parameters.

    Padding is torchvision's, never 'SAME': with stride 2 the latter pads even sizes by one less
    at the top and the left, which shifts all feature maps.

    Attributes:
      spec: specification of the ResNet.
      stages: stages to return, from `spec.stages`.
      precision: precision of the convolutions. "float32" is full precision everywhere; "tf32"
        is PyTorch's default: TF32 products on NVIDIA GPUs (float32 on CPUs); "bfloat16"
        computes and stores all intermediate values in bfloat16.

    Example:
      >>> from padim_jax.config.backbones import BACKBONES
      >>> from padim_jax.models.weights import pretrained
      >>> model = ResNet(BACKBONES["resnet18"], ("layer1", "layer2", "layer3"), "tf32")
      >>> variables, identity = pretrained.load("random", "resnet18", model.stages)
      >>> [f.shape for f in model.apply(variables, jnp.zeros((1, 224, 224, 3)))]
      [(1, 56, 56, 64), (1, 28, 28, 128), (1, 14, 14, 256)]
    """

    spec: ResNetSpec
    stages: tuple[str, ...]
    precision: Precision

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"]
    ) -> tuple[Float32[Array, "b _ _ _"], ...]:
        """Return the feature maps of `stages`.

        Args:
          images: RGB, normalised with the mean and deviation that the weights expect.

        Returns:
          The float32 feature map of each of `stages`, in that order: (b, ceil(h / s), ceil(w /
          s), c) with s = 4, 8, 16, 32 for layer1 to layer4.
        """
        conv = functools.partial(
            nn.Conv,
            dtype=jnp.bfloat16 if self.precision == "bfloat16" else jnp.float32,
            precision=(
                lax.Precision.HIGHEST if self.precision == "float32" else lax.Precision.DEFAULT
            ),
        )
        x = nn.relu(conv(64, (7, 7), strides=2, padding=3, name="conv1")(images))
        x = _max_pool(x)
        maps = {}
        for i, stage in enumerate(parts_to_compute(self.spec, self.stages)):
            channels = self.spec.channels(stage)
            for j in range(self.spec.depths[i]):
                stride = 2 if i > 0 and j == 0 else 1
                name = f"{stage}_{j}"
                if self.spec.block == "basic":
                    block = BasicBlock(channels, stride, conv, name=name)
                else:
                    inner = self.spec.width * 2**i
                    block = Bottleneck(channels, inner, stride, conv, name=name)
                x = block(x)
            maps[stage] = x
        return tuple(maps[stage].astype(jnp.float32) for stage in self.stages)
