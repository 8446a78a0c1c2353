"""PaDiM on a handful of images of one scene, differentiable: the task that is trained for.

The good images of a scene give a Gaussian for every patch; the others' Mahalanobis distances
are to be larger where there are defects. Of features of any scale the same comes out, as
each stage's are standardised first.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

Mean = Callable[[Array], Array]

# PaDiM's default, and the deviation that features are brought to: that of a stage's channels
# over all images and places, in quadratic mean. Above 1, as what differs between images of one
# thing is a small part of it, and would drown in epsilon; measured, see the recipe.
EPSILON = 0.01
DEVIATION = 5.0
# What distances are compared by is sharpened by this much.
_SHARPNESS = 2.0
# Part of a patch that has to be spoilt for it to count in full.
_PLAIN = 0.25


def standardised(
    features: Sequence[Float32[Array, "b _h _w _c"]], over_devices: Mean = lambda x: x
) -> tuple[Float32[Array, "b _h _w _c"], ...]:
    """Every stage's features times one number, for `DEVIATION`.

    Args:
      features: of one device's images.
      over_devices: takes the mean over devices, where there are several.
    """

    def mean(x: Array) -> Array:
        return over_devices(jnp.mean(x, (0, 1, 2), keepdims=True))

    found = []
    for x in features:
        variance = jnp.mean(mean((x - mean(x)) ** 2))
        found.append(x * (DEVIATION / jnp.sqrt(variance + 1e-6)))
    return tuple(found)


def log_distances(
    features: Sequence[Float32[Array, "s b _h _w _c"]],
    kept: Sequence[Float32[Array, " _c"]],
    good: int,
) -> Float32[Array, "s q h w"]:
    """Logarithms of the squared Mahalanobis distances of patches, per channel.

    Only the images count, not the channels, in what is inverted (Woodbury; see
    `padim_jax.core.low_rank`), and deeper stages' products are computed on their own grids.

    Args:
      features: of all scenes' images, the finest stage first; grids divide the first one.
      kept: 1 for the channels of each stage that are kept, 0 for others.
      good: how many images of every scene, the first ones, make the Gaussians.

    Returns:
      Of the other q = b - good images, on the first stage's grid.
    """
    height, width = features[0].shape[2:4]
    products, squares = [], []
    for x, chosen in zip(features, kept, strict=True):
        x = (x * jnp.array(chosen, ndmin=5)).transpose(0, 2, 3, 1, 4)  # s h w b c
        x -= jnp.mean(x[..., :good, :], -2, keepdims=True)
        product = jnp.einsum("shwic,shwjc->shwij", x, x[..., :good, :], precision="highest")
        square = jnp.sum(x[..., good:, :] ** 2, -1)
        times = height // x.shape[1], width // x.shape[2]
        products.append(_repeated(product, times))
        squares.append(_repeated(square, times))
    product = functools.reduce(jnp.add, products)
    square = functools.reduce(jnp.add, squares)
    ridge = (good - 1) * EPSILON
    root = jnp.linalg.cholesky(product[..., :good, :] + ridge * jnp.eye(good)[None, None, None])
    explained = lax.linalg.triangular_solve(
        root, product[..., good:, :], left_side=False, lower=True, transpose_a=True
    )
    distance = jnp.maximum(square - jnp.sum(explained**2, -1), 0.0) / EPSILON
    return jnp.log(distance / sum(jnp.sum(x) for x in kept) + 1e-3).transpose(0, 3, 1, 2)


def _repeated(x: Float[Array, "s h w *n"], times: tuple[int, int]) -> Float[Array, "s i j *n"]:
    return jnp.repeat(jnp.repeat(x, times[0], 1), times[1], 2)


def ranking(
    distances: Float32[Array, "s q h w"], defect: Float32[Array, "s q h w"]
) -> tuple[Float32[Array, " s"], Float32[Array, " s"]]:
    """How far defects stand out from all that is normal in the same scene.

    Args:
      distances: from `log_distances`.
      defect: how much of each patch is spoilt.

    Returns:
      The loss of each scene, the mean over spoilt patches of -log p, p being the part of the
      patch itself when all normal patches of the scene together weigh as much as one,
      softmax-wise; 0 without defects. And the AUROC of its patches; NaN without defects.
    """
    count = len(distances)
    distance, part = distances.reshape(count, -1), defect.reshape(count, -1)
    sharp, normal = _SHARPNESS * distance, part <= 0
    others = jax.nn.logsumexp(jnp.where(normal, sharp, -1e9), -1)
    others -= jnp.log(jnp.maximum(jnp.sum(normal, -1), 1))
    weight = jnp.minimum(part / _PLAIN, 1.0)
    loss = jnp.sum(weight * jax.nn.softplus(others[:, None] - sharp), -1)
    loss /= jnp.maximum(jnp.sum(weight, -1), 1.0)
    return loss, jax.vmap(_auroc)(distance, part >= _PLAIN, normal)


def _auroc(
    scores: Float32[Array, " n"], positive: Bool[Array, " n"], negative: Bool[Array, " n"]
) -> Float32[Array, ""]:
    """NaN without positives or negatives."""
    above = scores[:, None] > scores[None]
    pairs = positive[:, None] & negative[None]
    return jnp.sum(above & pairs) / jnp.sum(pairs)
