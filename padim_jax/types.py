"""Array aliases that carry shapes, and the frozen pytrees that flow between stages.

Axis names used throughout: b images in a batch, h/w height and width in pixels
(or in cells of a feature map), c channels of a stage, p patch positions (the first
stage's grid, row-major), d selected channels (the embedding's length).
"""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt8

Images = UInt8[Array, "b h w 3"]
FeatureMap = Float[Array, "b _h _w _c"]  # _: differs from stage to stage
Embeddings = Float32[Array, "b p d"]
Distances = Float32[Array, "b p"]
AnomalyMaps = Float32[Array, "b h w"]
Scores = Float32[Array, " b"]
Valid = Bool[Array, " b"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Sufficient statistics of one Gaussian per patch position.

    Attributes:
      count: number of images seen.
      mean: mean embedding.
      m2: sum of outer products of deviations from the mean, `(count - 1)` times
        the unbiased covariance.
    """

    count: Int32[Array, ""]
    mean: Float32[Array, "p d"]
    m2: Float32[Array, "p d d"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gaussian:
    """One Gaussian per patch position, ready for scoring.

    Attributes:
      mean: mean embedding.
      whitening: inverse of the lower Cholesky factor `L` of the regularized
        covariance `L L^T`; `|whitening (x - mean)|` is the Mahalanobis distance.
    """

    mean: Float32[Array, "p d"]
    whitening: Float32[Array, "p d d"]
