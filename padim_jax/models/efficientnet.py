"""EfficientNet as a feature extractor: images in, feature maps of some blocks out."""

import functools
import itertools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from padim_jax.config.backbones import EfficientNetSpec, MBConvSpec, Precision, parts_to_compute

# Depthwise convolutions were measured on XLA's CPU backend (up to block 26, 256 px, 4 cores):
# as convolutions with as many groups as channels (NCHW is no faster than NHWC) the network
# processes 4.1 images per second; as sums of shifted slices, which XLA fuses, 15 to 18.
# Barriers around the sums or the padding, and strides applied after the sum, gain nothing
# beyond measurement noise.


class Depthwise(nn.Module):
    """A convolution with one kernel per channel, padded as torchvision does.

    Attributes:
      kernel: height and width, odd.
      stride: stride in both directions.
      dtype: dtype of the output; sums are float32.
    """

    kernel: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
        """Apply the convolution: `h, w` shrink by the stride."""
        size, stride, channels = self.kernel, self.stride, x.shape[-1]
        shape = (size, size, 1, channels)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        # From the first cell that a tap of the kernel meets to the last.
        height, width = (stride * ((n - 1) // stride) + 1 for n in x.shape[1:3])
        pad = (size // 2, size // 2)
        x = jnp.pad(x.astype(jnp.float32), ((0, 0), pad, pad, (0, 0)))
        total = bias[None, None, None]
        for i, j in itertools.product(range(size), repeat=2):
            end = (x.shape[0], i + height, j + width, channels)
            cells = lax.slice(x, (0, i, j, 0), end, (1, stride, stride, 1))
            tap = lax.slice(kernel, (i, j, 0, 0), (i + 1, j + 1, 1, channels))
            total = total + cells * tap
        return total.astype(self.dtype)


class MBConv(nn.Module):
    """torchvision's `MBConv`: expand, depthwise, squeeze and excite, project.

    1x1 convolution, depthwise convolution, channel weights computed from the mean over all
    cells, 1x1 convolution; SiLU after the first two. The input is added if shapes allow.

    Attributes:
      spec: specification of the block.
      conv: `nn.Conv` with its dtype and precision bound.
      depthwise: `Depthwise` with its dtype bound.
    """

    spec: MBConvSpec
    conv: Callable[..., nn.Module]
    depthwise: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Apply the block: `h, w` shrink by the stride, `c` becomes `spec.outputs`."""
        spec = self.spec
        conv = functools.partial(self.conv, kernel_size=(1, 1))
        y = x
        if spec.expansion > 1:
            y = nn.silu(conv(spec.hidden, name="expand")(y))
        y = nn.silu(self.depthwise(spec.kernel, spec.stride, name="depthwise")(y))
        weight = jnp.mean(y, (1, 2), keepdims=True)
        weight = nn.silu(conv(spec.squeezed, name="squeeze")(weight))
        weight = nn.sigmoid(conv(spec.hidden, name="excite")(weight))
        y = conv(spec.outputs, name="project")(weight * y)
        return x + y if spec.residual else y


class EfficientNet(nn.Module):
    """An EfficientNet cut after the deepest requested block.

    Parameters are named by their function, `params["block7"]["project"]["kernel"]`
    (HWIO); see `naming` for the names in weight files. Blocks behind the cut have none.
    Batch norm is folded into the convolutions when weights are loaded.

    Padding is torchvision's, never 'SAME' (see `resnet.ResNet`). Stochastic depth and
    dropout, which only training uses, are absent.

    Attributes:
      spec: specification of the EfficientNet.
      stages: blocks to return, from `spec.parts`.
      precision: precision of the convolutions; see `resnet.ResNet`. Depthwise ones sum in
        float32.

    Example:
      >>> from padim_jax.config.backbones import BACKBONES
      >>> from padim_jax.models.weights import pretrained
      >>> stages = ("block7", "block20", "block26")
      >>> model = EfficientNet(BACKBONES["efficientnet_b5"], stages, "tf32")
      >>> variables, identity = pretrained.load("random", "efficientnet_b5", model.stages)
      >>> [f.shape for f in model.apply(variables, jnp.zeros((1, 224, 224, 3)))]
      [(1, 56, 56, 40), (1, 14, 14, 176), (1, 14, 14, 176)]
    """

    spec: EfficientNetSpec
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
          s), c), where s is the product of the strides so far.
        """
        dtype = jnp.bfloat16 if self.precision == "bfloat16" else jnp.float32
        conv = functools.partial(
            nn.Conv,
            padding=0,
            dtype=dtype,
            precision=(
                lax.Precision.HIGHEST if self.precision == "float32" else lax.Precision.DEFAULT
            ),
        )
        depthwise = functools.partial(Depthwise, dtype=dtype)
        stem = conv(self.spec.stem, (3, 3), strides=2, padding=1, name="stem")
        x = nn.silu(stem(images))
        maps = {}
        for name in parts_to_compute(self.spec, self.stages):
            block = self.spec.blocks[self.spec.parts.index(name)]
            maps[name] = x = MBConv(block, conv, depthwise, name=name)(x)
        return tuple(maps[stage].astype(jnp.float32) for stage in self.stages)
