"""Fewer channels by a matrix: semi-orthogonal projection and principal components.

PaDiM (arXiv 2011.08785) draws channels at random, and finds that better than PCA; the matrix
of a random semi-orthogonal projection is better still (Kim et al. 2021, "Semi-orthogonal
embedding for efficient unsupervised anomaly segmentation", arXiv 2105.14737). Embeddings x of
C channels become z = x W with orthonormal columns W (C, D); `embedding.project` applies it.

Components are not whitened: Mahalanobis distances are the same in any invertible mixture of
the D channels, but for epsilon, which is to weigh as it does for channels.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Float64

from padim_jax.core import interpolation
from padim_jax.core.types import FeatureMap, Projection, Valid


@dataclasses.dataclass(frozen=True)
class Scatter:
    """How the embeddings of images' patches vary, over all patches alike.

    Attributes:
      count: number of images.
      mean: of all embeddings.
      m2: outer products of the deviations from it: mean over a grid's patches, sum over
        images.
    """

    count: int
    mean: Float64[np.ndarray, " c"]
    m2: Float64[np.ndarray, "c c"]


def semi_orthogonal(total: int, channels: int, seed: int) -> Projection:
    """A random matrix (C, D) with orthonormal columns, uniform among all (Haar's measure).

    The Q of a Gaussian matrix's QR decomposition, with R's diagonal positive (Mezzadri 2007,
    "How to generate random matrices from the classical compact groups").

    Args:
      total: C, channels of all stages together.
      channels: D, at most C.
      seed: any integer of at least 0.
    """
    random = np.random.default_rng(seed).standard_normal((total, channels))
    q, r = np.linalg.qr(random)
    return (q * np.sign(np.diag(r))).astype(np.float32)


def components(scatter: Scatter, channels: int) -> Projection:
    """The leading principal components: the D directions in which embeddings vary most.

    Args:
      scatter: of all images.
      channels: D.

    Returns:
      Orthonormal columns, the leading one first; each one's largest entry is positive.

    Raises:
      ValueError: the scatter is not finite.
    """
    if not np.all(np.isfinite(scatter.m2)):
        raise ValueError(
            "the backbone's features are not finite: they overflow or its weights are broken"
        )
    _, vectors = np.linalg.eigh(scatter.m2 / max(scatter.count, 1))  # ascending
    found = vectors[:, ::-1][:, :channels]
    largest = found[np.argmax(np.abs(found), axis=0), np.arange(channels)]
    return (found * np.sign(largest)).astype(np.float32)


def empty(total: int) -> Scatter:
    """The scatter of no image, of C channels."""
    return Scatter(0, np.zeros(total), np.zeros((total, total)))


def merge(a: Scatter, b: Scatter) -> Scatter:
    """The scatter of two disjoint sets of images together (Chan et al., eq. 2.1)."""
    count = a.count + b.count
    delta = b.mean - a.mean
    weight = b.count / max(count, 1)
    m2 = a.m2 + b.m2 + a.count * weight * np.outer(delta, delta)
    return Scatter(count, a.mean + weight * delta, m2)


def scatter(
    features: Sequence[FeatureMap], valid: Valid, upsample: str
) -> tuple[Float32[Array, " c"], Float32[Array, "c c"]]:
    """Mean and m2 of a `Scatter`, of a batch of images.

    Upsampling is linear: what embeddings on the finest grid sum up to is computed on the
    stages' own, of two stages on the coarser one's.

    Args:
      features: feature maps (b, h_i, w_i, c_i), pooled, the one with the finest grid first.
      valid: (b,); False marks padding.
      upsample: "nearest" or "bilinear"; static under jit.
    """
    grid = features[0].shape[1:3]
    weights = valid.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weights), 1)
    matrices = [
        [interpolation.matrix(m, n, upsample) for m, n in zip(x.shape[1:3], grid, strict=True)]
        for x in features
    ]
    means, centred = [], []
    for x, (rows, columns) in zip(features, matrices, strict=True):
        x = jnp.where(valid[:, None, None, None], x.astype(jnp.float32), 0)
        means.append(_einsum("i,j,bijc->c", rows.mean(0), columns.mean(0), x) / count)
        centred.append((x - means[-1][None, None, None]) * weights[:, None, None, None])
    m2 = []
    for i, coarse in enumerate(centred):
        row = []
        for fine, (rows, columns) in zip(centred[: i + 1], matrices, strict=False):
            height = matrices[i][0].T @ rows / grid[0]
            width = matrices[i][1].T @ columns / grid[1]
            there = _einsum("yi,xj,bijc->byxc", height, width, fine)
            row.append(_einsum("byxc,byxd->cd", there, coarse))
        m2.append(row)
    blocks = [
        [m2[max(i, j)][min(i, j)] if i <= j else m2[i][j].T for j in range(len(m2))]
        for i in range(len(m2))
    ]
    return jnp.concatenate(means), jnp.block(blocks)


def _einsum(form: str, *operands: Array | Float[np.ndarray, "..."]) -> Array:
    arrays = (jnp.asarray(x, jnp.float32) for x in operands)
    return jnp.einsum(form, *arrays, precision=lax.Precision.HIGHEST)
