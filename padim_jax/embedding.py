"""Feature maps of several depths -> one embedding per patch position.

PaDiM (arXiv 2011.08785), section III-A. Channels are selected before upsampling, so
that only the kept ones are ever repeated or stored; the result is the same.
"""

import random
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from padim_jax.types import Embeddings, FeatureMap


def channel_index(total: int, channels: int, seed: int) -> Int[np.ndarray, " d"]:
    """Draws the channels to keep out of the concatenated stages' channels.

    The PyTorch projects call `random.seed(seed); random.sample(range(total), channels)`;
    the same generator makes a published seed give the published channels.

    Args:
      total: number of channels of all stages together.
      channels: how many to keep, at most `total`.
      seed: any integer.

    Returns:
      int64 channel numbers in the order drawn, which is the embedding's order.
    """
    return np.array(random.Random(seed).sample(range(total), channels), np.int64)


def embed(features: Sequence[FeatureMap], index: Int[np.ndarray, " d"]) -> Embeddings:
    """Concatenates the selected channels of all stages on the first stage's grid.

    Deeper stages are brought to that grid by nearest upsampling, as
    `torch.nn.functional.interpolate(mode="nearest")` does.

    Args:
      features: feature maps (b, h_i, w_i, c_i), the one with the finest grid first.
      index: channel numbers into the stages' concatenated channels; static under jit.

    Returns:
      Embeddings (b, p, d), float32; p runs over the first stage's grid row by row.
    """
    batch, height, width, _ = features[0].shape
    parts, positions, offset = [], [], 0
    for stage in features:
        channels = stage.shape[-1]
        (chosen,) = np.nonzero((index >= offset) & (index < offset + channels))
        if len(chosen):
            selected = stage[..., index[chosen] - offset].astype(jnp.float32)
            parts.append(_upsample_nearest(selected, height, width))
            positions.append(chosen)
        offset += channels
    # Stages hold their channels side by side; the embedding keeps the drawn order.
    order = np.argsort(np.concatenate(positions))
    embedding = jnp.concatenate(parts, axis=-1)[..., order]
    return embedding.reshape(batch, height * width, len(index))


def _upsample_nearest(
    x: Float[Array, "b h w c"], height: int, width: int
) -> Float[Array, "b height width c"]:
    for axis, size in ((1, height), (2, width)):
        if x.shape[axis] != size:
            # In float32, as PyTorch: a whole number may round to the cell before it.
            source = np.arange(size, dtype=np.float32) * np.float32(x.shape[axis] / size)
            x = jnp.take(x, source.astype(np.int32), axis=axis)
    return x
