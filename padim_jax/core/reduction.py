"""Channel reduction by a matrix: semi-orthogonal projection and principal components.

PaDiM (arXiv 2011.08785) selects random channels and reports better results than with PCA; a
random semi-orthogonal projection does better still (Kim et al. 2021, "Semi-orthogonal
embedding for efficient unsupervised anomaly segmentation", arXiv 2105.14737). Embeddings x of
C channels become z = x W with orthonormal columns W (C, D); `embedding.project` applies it.

Components are not whitened: Mahalanobis distances are invariant to invertible mixtures of
the D channels except for epsilon, which should weigh as much as it does for plain channels.
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
    """Mean and scatter matrix of patch embeddings, pooled over all patches.

    Attributes:
      count: number of images.
      mean: mean of all embeddings.
      m2: outer products of deviations from the mean: averaged over a grid's patches, summed
        over images.
    """

    count: int
    mean: Float64[np.ndarray, " c"]
    m2: Float64[np.ndarray, "c c"]


def semi_orthogonal(total: int, channels: int, seed: int) -> Projection:
    """Return a random matrix (C, D) with orthonormal columns, uniform in Haar measure.

    It is the Q of a Gaussian matrix's QR decomposition, with R's diagonal positive (Mezzadri
    2007, "How to generate random matrices from the classical compact groups").

    Args:
      total: C, number of channels of all stages together.
      channels: D, at most C.
      seed: integer of at least 0.

    Returns:
      (C, D) float32.
    """
    random = np.random.default_rng(seed).standard_normal((total, channels))
    q, r = np.linalg.qr(random)
    return (q * np.sign(np.diag(r))).astype(np.float32)


def components(scatter: Scatter, channels: int) -> Projection:
    """Return the D leading principal components.

    Args:
      scatter: scatter of all images.
      channels: D.

    Returns:
      (C, D) float32 with orthonormal columns, the leading one first; the largest entry of each
      column is positive.

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
    """Return the scatter of zero images with C channels."""
    return Scatter(0, np.zeros(total), np.zeros((total, total)))


def merge(a: Scatter, b: Scatter) -> Scatter:
    """Return the scatter of two disjoint sets of images together (Chan et al., eq. 2.1).

    Args:
      a: scatter of one set.
      b: scatter of the other set.

    Returns:
      Scatter of both.
    """
    count = a.count + b.count
    delta = b.mean - a.mean
    weight = b.count / max(count, 1)
    m2 = a.m2 + b.m2 + a.count * weight * np.outer(delta, delta)
    return Scatter(count, a.mean + weight * delta, m2)


def scatter(
    features: Sequence[FeatureMap], valid: Valid, upsample: str
) -> tuple[Float32[Array, " c"], Float32[Array, "c c"]]:
    """Return mean and m2 of a batch's `Scatter`.

    Upsampling is linear: sums over embeddings on the finest grid are computed on the stages'
    own grids, and for two stages on the coarser one's grid.

    Args:
      features: pooled feature maps (b, h_i, w_i, c_i), the finest grid first.
      valid: (b,); False marks padding.
      upsample: "nearest" or "bilinear"; static under jit.

    Returns:
      Mean (C,) and m2 (C, C), float32.
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
