"""Array aliases with shapes, and the frozen pytrees passed between stages.

Axis names used throughout: b images in a batch, h/w height and width in pixels
(or in cells of a feature map), c channels of a stage, p patch positions (the first
stage's grid, row-major), d selected channels (of one level, or of all levels: the
embedding's length), r regions and n cells of a level in a region (see `embedding`),
e selected channels of the same or a coarser level.

Statistics and fitted Gaussians are written for one device. Outside of functions that are
mapped over devices they have one more leading axis, k devices of this process; r is then
the number of a device's regions (see `parallel`).
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

Images = UInt8[Array, "b h w 3"]
FeatureMap = Float[Array, "b _h _w _c"]  # _: differs from stage to stage
Embeddings = Float32[Array, "b p d"]
Levels = tuple[Float32[Array, "r _n _d b"], ...]  # the embeddings, finest level first
# Per level, the finest first: one matrix for each level from itself to the coarsest.
LevelMatrices = tuple[tuple[Float32[Array, "*k r _n _d _e"], ...], ...]
Distances = Float32[Array, "b p"]
AnomalyMaps = Float32[Array, "b h w"]
# From all stages' channels to the embedding's; columns are orthonormal. See `reduction`.
Projection = Float32[np.ndarray, "c d"]
Valid = Bool[Array, " b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Sufficient statistics of one Gaussian per patch position, by level.

    Attributes:
      count: number of images seen.
      mean: mean embedding.
      m2: sum of outer products of deviations from the mean, of each level with itself and with
        the coarser levels at the same place: `count - 1` times the unbiased covariances. Blocks
        shared by several patches are stored once.
    """

    count: Int32[Array, "*k"]
    mean: tuple[Float32[Array, "*k r _n _d"], ...]
    m2: LevelMatrices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """One Gaussian per patch position, ready for scoring, by level.

    Attributes:
      mean: mean embedding.
      factor: blocks of the Cholesky factor L of the regularized covariances; diagonal blocks (a
        level with itself) are inverted. `|L^-1 (x - mean)|` is a patch's Mahalanobis distance.
    """

    mean: tuple[Float32[Array, "*k r _n _d"], ...]
    factor: LevelMatrices


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """Embeddings of the normal images: smaller than `Moments` for few images.

    Attributes:
      count: number of images seen.
      values: embeddings by level; rows from `count` on are unused.
    """

    count: Int32[Array, "*k"]
    values: tuple[Float32[Array, "*k r _n s _d"], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """Counterpart of `Gaussian` for s images, fewer than channels; see `low_rank`.

    Attributes:
      mean: mean embedding.
      deviations: deviation of each image's embedding from the mean.
      root: per patch, R with R^T R the inverse of (s - 1) epsilon I + X X^T + t 1 1^T. The rows
        of X are the patch's deviations; they sum to 0, so that any t gives the same distances.
      regularization: epsilon.
    """

    mean: tuple[Float32[Array, "*k r _n _d"], ...]
    deviations: tuple[Float32[Array, "*k r _n s _d"], ...]
    root: Float32[Array, "*k r n s s"]
    regularization: Float32[Array, "*k"]
