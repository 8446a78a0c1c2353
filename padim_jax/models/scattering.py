"""Scattering as a feature extractor: fixed filters instead of a trained network.

A scattering network cascades wavelet filters, moduli and local averages (Mallat, "Group
invariant scattering", arXiv 1101.2286; Bruna and Mallat, arXiv 1203.1513). It has nothing to
train and nothing to download. Oriented filters find edges, as a trained network's first layers
do, and moduli change little where a structure moves by less than a filter's width.

With x_j the image at stride 2^j, A the blur and subsampling of `halve`, and psi_t the filter of
orientation t (`filters`)::

    x_0 = luma, red-blue and green-magenta,   x_j+1 = A x_j
    u_j,t     = |psi_t * x_j|                 first order: energy at scale j, orientation t
    v_i,j,t,s = |psi_s * A^(j-i) u_i,t|       second order, of luma: how that energy varies

and the stages have the strides of a ResNet's first three, so that all behind them is the same::

    layer1   stride 4    x_2, u_0, u_1, v_0,1
    layer2   stride 8    x_3, u_2, v_0,2, v_1,2
    layer3   stride 16   x_4, u_3, v_1,3, v_2,3

Energies are averaged to the stage's grid and compressed, log(1 + u / SMALL), so that a change
of light adds to the features instead of multiplying them.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from padim_jax.config.backbones import Precision, ScatteringSpec

# Energy below which the logarithm is nearly linear; images have deviations around 1.
SMALL = 0.2
SIDE = 7  # of the filters, in pixels
_WIDTH, _SLANT, _FREQUENCY = 1.0, 0.6, 0.675 * np.pi  # see `filters`

# Weights of the pixels along an axis that a halved pixel is the mean of.
BINOMIAL = np.array([1, 5, 10, 10, 5, 1]) / 32

# Per stage: its scale j, scales of its first-order energies, pairs (i, j) of its second-order.
STAGES = {
    "layer1": (2, (0, 1), ((0, 1),)),
    "layer2": (3, (2,), ((0, 2), (1, 2))),
    "layer3": (4, (3,), ((1, 3), (2, 3))),
}

# Columns are luma, red-blue and green-magenta: orthonormal, so that none counts more.
OPPONENT = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]).T / np.sqrt([3, 2, 6])


def filters(orientations: int) -> Float32[np.ndarray, "7 7 1 _k"]:
    """Return the Gabor filters.

    psi(u, v) = g(u, v) (exp(i f u) - c), with u along the orientation, f = 0.675 pi, g a
    Gaussian of deviation 1 along u and 1 / 0.6 along v, and c such that the sum is 0. Its norm
    is 1.

    Args:
      orientations: number of orientations, at equal angles.

    Returns:
      HWIO: all real parts, then all imaginary parts; rounded to 6 digits, so that they are the
      same on every machine.
    """
    radius = SIDE // 2
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(float)
    waves = []
    for angle in np.arange(orientations) * np.pi / orientations:
        u = x * np.cos(angle) + y * np.sin(angle)
        v = y * np.cos(angle) - x * np.sin(angle)
        envelope = np.exp(-(u**2 + (_SLANT * v) ** 2) / (2 * _WIDTH**2))
        wave = np.exp(1j * _FREQUENCY * u)
        psi = envelope * (wave - (envelope * wave).sum() / envelope.sum())
        waves.append(psi / np.linalg.norm(psi))
    parts = [psi.real for psi in waves] + [psi.imag for psi in waves]
    return np.round(np.stack(parts, axis=-1), 6).astype("<f4")[:, :, None, :]


def at_pixels(gabor: Any) -> Float[Array, "8 8 1 _k"]:
    """Return the filters at each pixel of a 2x2 cell: a convolution with stride 2 for all.

    Args:
      gabor: the filters (7, 7, 1, k).

    Returns:
      (8, 8, 1, 4 k), those of a pixel side by side.
    """
    ends = ((0, 1), (1, 0))
    shifted = [jnp.pad(gabor, (y, x, (0, 0), (0, 0))) for y in ends for x in ends]
    return jnp.concatenate(shifted, axis=-1)


class Scattering(nn.Module):
    """The feature maps of the module's docstring.

    Its one parameter, `gabor/kernel`, has the constants that `filters` returns.

    Attributes:
      spec: specification.
      stages: stages to return, from `spec.stages`.
      precision: precision of the filters' convolutions; see `resnet.ResNet`.

    Example:
      >>> from padim_jax.config.backbones import SCATTERING
      >>> spec = SCATTERING["scattering"]
      >>> model = Scattering(spec, ("layer1", "layer2", "layer3"), "float32")
      >>> variables = {"params": {"gabor": {"kernel": filters(spec.orientations)}}}
      >>> [f.shape for f in model.apply(variables, jnp.zeros((1, 224, 224, 3)))]
      [(1, 56, 56, 43), (1, 28, 28, 47), (1, 14, 14, 47)]
    """

    spec: ScatteringSpec
    stages: tuple[str, ...]
    precision: Precision

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"]
    ) -> tuple[Float32[Array, "b _ _ _"], ...]:
        """Return the feature maps of `stages`.

        Args:
          images: RGB, normalised to deviations around 1.

        Returns:
          The float32 feature map of each of `stages`, in that order: (b, ceil(h / s), ceil(w /
          s), c) with s = 4, 8, 16 for layer1 to layer3.
        """
        count = self.spec.orientations
        kernel = at_pixels(_Gabor(count, name="gabor")())
        averages = [images @ jnp.asarray(OPPONENT, jnp.float32)]
        while len(averages) < 5:
            averages.append(halve(averages[-1]))
        first = [_energy(x, kernel, self.precision) for x in averages[:4]]
        maps = []
        for stage in self.stages:
            scale, own, pairs = STAGES[stage]
            energies = [(j, first[j]) for j in own]
            for i, j in pairs:
                u = halve(first[i][..., :count], j - i - 1)
                energies.append((j, _energy(u, kernel, self.precision)))
            parts = [jnp.log1p(halve(u, scale - j - 1) / SMALL) for j, u in energies]
            maps.append(jnp.concatenate([averages[scale], *parts], axis=-1))
        return tuple(maps)


class _Gabor(nn.Module):
    orientations: int

    @nn.compact
    def __call__(self) -> Float32[Array, "7 7 1 _k"]:
        kernel = self.param("kernel", lambda _: jnp.asarray(filters(self.orientations)))
        return jnp.asarray(kernel)


def _energy(
    x: Float32[Array, "b h w c"], kernel: Float[Array, "8 8 1 _k"], precision: Precision
) -> Float32[Array, "b i j d"]:
    """Return |psi * x| averaged over 2x2 pixels; the orientations of a channel side by side."""
    b, h, w, c = x.shape
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    x = jnp.moveaxis(x, -1, 1).reshape(b * c, h, w, 1)
    before = SIDE // 2
    pads = ((0, 0), (before, before + h % 2), (before, before + w % 2), (0, 0))
    y = lax.conv_general_dilated(
        jnp.pad(x, pads, mode="edge").astype(dtype),
        kernel.astype(dtype),
        (2, 2),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST if precision == "float32" else lax.Precision.DEFAULT,
    )
    count = kernel.shape[-1] // 8
    y = y.astype(jnp.float32).reshape(b, c, *y.shape[1:3], 4, 2, count)
    y = jnp.mean(jnp.sqrt(jnp.sum(jnp.square(y), axis=5)), axis=4)
    return jnp.moveaxis(y, 1, 3).reshape(b, *y.shape[2:4], c * count)


def halve(x: Float32[Array, "b h w c"], times: int = 1) -> Float32[Array, "b i j c"]:
    """Blur by binomial weights and keep every second pixel, along both axes.

    Args:
      x: images or energies; pixels outside are those of the border.
      times: how often.

    Returns:
      (b, ceil(h / 2), ceil(w / 2), c) for `times` of 1.
    """
    for _ in range(times):
        for axis in (1, 2):
            size, before = x.shape[axis], len(BINOMIAL) // 2 - 1
            last = size + size % 2 - 1
            pads = [(0, 0)] * 4
            pads[axis] = (before, before + 1 + size % 2)
            x = jnp.pad(x, pads, mode="edge")
            total = jnp.zeros(())
            for i, weight in enumerate(BINOMIAL.astype(np.float32)):
                total = total + weight * lax.slice_in_dim(x, i, i + last, 2, axis)
            x = total
    return x
