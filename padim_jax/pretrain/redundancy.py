"""How much the channels of a stage repeat each other, or say nothing.

PaDiM keeps a random part of the channels: what each says should be its own. The terms are
those of VICReg (Bardes et al., arXiv 2105.04906), of features as they are.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

# Weight of silent channels beside repeated ones.
_SILENT = 10.0


def redundancy(
    features: Sequence[Float32[Array, "b _h _w _c"]],
    over_devices: Callable[[Array], Array] = lambda x: x,
) -> Float32[Array, ""]:
    """The mean over stages.

    Of each stage it is the sum of a channel's squared correlations with the others, over
    images and places, the mean over channels; and how far channels' deviations fall short of
    all channels' quadratic mean, as a part of it.

    Args:
      features: of one device's images.
      over_devices: takes the mean over devices, where there are several.
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
