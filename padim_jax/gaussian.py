"""One multivariate Gaussian per patch position, fitted in one pass over batches.

PaDiM (arXiv 2011.08785), section III-B, eq. 1. Moments are kept as (count, mean, M2)
and combined by the pairwise formulas of Chan, Golub and LeVeque (1983), which do not
cancel as E[x x^T] - E[x] E[x]^T does. Any split of the images into batches or models
gives the same moments up to float rounding.

Functions are written for one patch and mapped over patches with `vmap`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from padim_jax.types import Embeddings, Gaussian, Moments, Valid

_Sums = tuple[Float32[Array, "p d"], Float32[Array, "p d d"]]

_LARGEST_BLOCK = 256  # patches that are computed together

# float32 products, also on GPUs, where the default would be TF32's 10-bit mantissa.
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def init(patches: int, channels: int) -> Moments:
    """Moments of no image at all: `patches` Gaussians of `channels` dimensions."""
    return Moments(
        count=jnp.zeros((), jnp.int32),
        mean=jnp.zeros((patches, channels), jnp.float32),
        m2=jnp.zeros((patches, channels, channels), jnp.float32),
    )


def update(moments: Moments, embeddings: Embeddings, valid: Valid) -> Moments:
    """Adds a batch of images.

    Args:
      moments: what was seen before.
      embeddings: (b, p, d) float32.
      valid: (b,); False marks padding, which counts nothing.

    Returns:
      Moments of both.
    """
    added = jnp.sum(valid, dtype=jnp.int32)
    count = moments.count + added
    weight = added / jnp.maximum(count, 1).astype(jnp.float32)
    scale = moments.count * weight
    patches = len(moments.mean)
    block = _block(patches)
    update_block = jax.vmap(_update_patch, in_axes=(0, 0, 1, None, None, None))

    # Block by block and in place: beside the moments only one block is in memory.
    def step(i: Int32[Array, ""], state: _Sums) -> _Sums:
        mean, m2 = (lax.dynamic_slice_in_dim(part, i * block, block) for part in state)
        x = lax.dynamic_slice_in_dim(embeddings, i * block, block, axis=1)
        mean, m2 = update_block(mean, m2, x, valid, weight, scale)
        return (
            lax.dynamic_update_slice_in_dim(state[0], mean, i * block, axis=0),
            lax.dynamic_update_slice_in_dim(state[1], m2, i * block, axis=0),
        )

    mean, m2 = lax.fori_loop(0, patches // block, step, (moments.mean, moments.m2))
    return Moments(count, mean, m2)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of two disjoint sets of images together (Chan et al., eq. 2.1)."""
    count = a.count + b.count
    total = jnp.maximum(count, 1).astype(jnp.float32)
    weight = b.count / total
    mean, m2 = jax.vmap(_merge_patch, in_axes=(0, 0, 0, 0, None, None))(
        a.mean, a.m2, b.mean, b.m2, weight, a.count * weight
    )
    return Moments(count, mean, m2)


def finalize(moments: Moments, regularization: float) -> Gaussian:
    """The Gaussians, factorised for scoring.

    The covariance is unbiased (divided by count - 1) plus `regularization` on its
    diagonal, as in the paper and in `numpy.cov`.

    Args:
      moments: of at least two images.
      regularization: epsilon, above 0.

    Returns:
      Means and the inverses of the covariances' Cholesky factors.

    Raises:
      ValueError: fewer than two images, or moments that are not finite or a covariance
        that is not positive definite in float32 (the patch is named).
    """
    if int(moments.count) < 2:
        raise ValueError(
            f"a covariance needs at least 2 images, the moments hold {int(moments.count)}"
        )
    gaussian, finite, definite = _factorise(moments, jnp.asarray(regularization, jnp.float32))
    if not np.all(finite):
        raise ValueError(
            f"the moments of patch {int(np.argmin(finite))} are not finite: the backbone's "
            "features overflow or its weights are broken"
        )
    if not np.all(definite):
        patch = int(np.argmin(definite))
        raise ValueError(
            f"the covariance of patch {patch} is not positive definite in float32; "
            f"raise the regularization ({regularization})"
        )
    return gaussian


@jax.jit
def _factorise(
    moments: Moments, regularization: Float[Array, ""]
) -> tuple[Gaussian, Bool[Array, " p"], Bool[Array, " p"]]:
    # Mapped with vmap a block at a time: beside the result one block is in memory.
    whitening = lax.map(
        lambda m2: _patch_whitening(m2, moments.count, regularization),
        moments.m2,
        batch_size=_block(len(moments.m2)),
    )
    # Of their own: an infinite variance gives a finite factor, its channel never counts.
    finite = jnp.all(jnp.isfinite(moments.m2), axis=(1, 2))
    definite = jnp.all(jnp.isfinite(whitening), axis=(1, 2))
    return Gaussian(moments.mean, whitening), finite, definite


def _block(patches: int) -> int:
    """The largest admissible block that divides `patches`: a remainder costs a copy."""
    return max(n for n in range(1, _LARGEST_BLOCK + 1) if patches % n == 0)


def _update_patch(
    mean: Float32[Array, " d"],
    m2: Float32[Array, "d d"],
    x: Float32[Array, "b d"],
    valid: Valid,
    weight: Float32[Array, ""],
    scale: Float32[Array, ""],
) -> tuple[Float32[Array, " d"], Float32[Array, "d d"]]:
    # weight = n_b / n, scale = n_a n_b / n, as in `_merge_patch`, whose outer product
    # here is one more row of the batch's.
    counts = valid.astype(jnp.float32)[:, None]
    batch_mean = jnp.sum(counts * x, axis=0) / jnp.maximum(jnp.sum(counts), 1)
    delta = batch_mean - mean
    centred = counts * (x - batch_mean[None])
    rows = jnp.concatenate([centred, jnp.sqrt(scale) * delta[None]])
    return mean + weight * delta, m2 + _matmul(rows.T, rows)


def _merge_patch(
    mean_a: Float32[Array, " d"],
    m2_a: Float32[Array, "d d"],
    mean_b: Float32[Array, " d"],
    m2_b: Float32[Array, "d d"],
    weight: Float32[Array, ""],
    scale: Float32[Array, ""],
) -> tuple[Float32[Array, " d"], Float32[Array, "d d"]]:
    # weight = n_b / n, scale = n_a n_b / n.
    delta = mean_b - mean_a
    return mean_a + weight * delta, m2_a + m2_b + scale * jnp.outer(delta, delta)


def _patch_whitening(
    m2: Float32[Array, "d d"], count: Int32[Array, ""], regularization: Float[Array, ""]
) -> Float32[Array, "d d"]:
    identity = jnp.eye(len(m2), dtype=jnp.float32)
    covariance = m2 / (count - 1).astype(jnp.float32) + regularization * identity
    factor = lax.linalg.cholesky(covariance, symmetrize_input=False)
    return lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)
