"""Redundancy of a stage's channels: repeated and silent ones.

PaDiM keeps a random part of the channels: each should carry its own information. The terms are
those of VICReg (Bardes et al., arXiv 2105.04906), applied to unprojected features.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

# Weight of silent channels relative to repeated ones.
_SILENT = 10.0


def redundancy(
    features: Sequence[Float32[Array, "b _h _w _c"]],
    over_devices: Callable[[Array], Array] = lambda x: x,
) -> Float32[Array, ""]:
    """Return the mean redundancy over stages.

    For each stage it is the mean over channels of a channel's summed squared correlations with
    the others, over images and positions; plus the shortfall of channels' deviations below
    all channels' root mean square, relative to it.

    Args:
      features: features of one device's images.
      over_devices: function that takes the mean over devices, if there are several.

    Returns:
      Scalar.
    """
    found = []
    for x in features:
        channels = x.shape[-1]
        x = x.reshape(-1, channels)
        x -= over_devices(jnp.mean(x, 0, keepdims=True))
        covariance = over_devices(x.T @ x / len(x))
        variance = jnp.diag(covariance)
        level = jnp.mean(variance)
        deviation = jnp.sqrt(variance + 1e-4 * level + 1e-12)
        correlation = covariance / deviation[:, None] / deviation[None]
        others = jnp.sum(correlation**2) - jnp.sum(jnp.diag(correlation) ** 2)
        short = jax.nn.relu(1.0 - deviation / jnp.sqrt(level + 1e-12))
        found.append(others / channels + _SILENT * jnp.mean(short))
    return sum(found, jnp.float32(0)) / len(found)
