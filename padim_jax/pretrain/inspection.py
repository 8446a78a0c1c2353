"""Differentiable PaDiM on a few images of one scene: the training task.

The good images of a scene give a Gaussian for each patch; the others' Mahalanobis distances
should be larger where there are defects. The result is independent of the features' scale, as
each stage's are standardised first.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

Mean = Callable[[Array], Array]

# PaDiM's default, and the deviation that features are scaled to: the root mean square over a
# stage's channels, over all images and positions. Above 1, because differences between images
# of one thing are a small part of it and would vanish beside epsilon; measured, see the recipe.
EPSILON = 0.01
DEVIATION = 5.0
# Factor that sharpens distances before they are compared.
_SHARPNESS = 2.0
# Fraction of a patch that has to be defective for it to count fully.
_PLAIN = 0.25


def standardised(
    features: Sequence[Float32[Array, "b _h _w _c"]], over_devices: Mean = lambda x: x
) -> tuple[Float32[Array, "b _h _w _c"], ...]:
    """Scale the features of each stage by one number, to reach `DEVIATION`.

    Args:
      features: features of one device's images.
      over_devices: function that takes the mean over devices, if there are several.

    Returns:
      Features of the same shapes.
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
    """Return logarithms of the patches' squared Mahalanobis distances per channel.

    The size of the inverted matrix depends on the images, not the channels (Woodbury; see
    `padim_jax.core.low_rank`), and deeper stages' products are computed on their own grids.

    Args:
      features: features of all scenes' images, the finest stage first; grids divide the first
        one.
      kept: per stage 1 for the channels that are kept, 0 for others.
      good: number of leading images of each scene that the Gaussians are fitted to.

    Returns:
      (s, q, h, w) for the other q = b - good images, on the first stage's grid.
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
    """Return how far defects stand out from all normal patches of the same scene.

    Args:
      distances: result of `log_distances`.
      defect: defective fraction of each patch.

    Returns:
      The loss of each scene, the mean over defective patches of -log p, where p is the softmax
      probability of the patch itself if all normal patches of the scene together weigh as much
      as one; 0 without defects. And the AUROC of its patches; NaN without defects.
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
    """Return the AUROC; NaN without positives or negatives."""
    above = scores[:, None] > scores[None]
    pairs = positive[:, None] & negative[None]
    return jnp.sum(above & pairs) / jnp.sum(pairs)
