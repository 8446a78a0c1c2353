"""The score `combined`, of four summaries of an image's anomaly map; see `image_score`.

On the host, without JAX: measures come from JAX or from another runtime.
"""

import numpy as np
from jaxtyping import Float, Float32, Int

COMBINED = 4  # summaries that `combined` is made of

# A summary that is equal in all normal images says that any other value is anomalous; the
# deviation is then this fraction of its mean, some roundoffs of float32.
_LEAST_DEVIATION = 1e-6


def combine(
    summaries: Float[np.ndarray, "n _k"],
    means: Float[np.ndarray, "*n _k"],
    deviations: Float[np.ndarray, "*n _k"],
) -> Float32[np.ndarray, " n"]:
    """Return `combined` scores.

    Args:
      summaries: summaries (n, 4) of the images.
      means: mean (4,) of each summary over normal images, or (n, 4) for each image its own.
      deviations: their standard deviations, of the same shape.

    Returns:
      (n,) float32, 0 or more.
    """
    excess = (summaries.astype(np.float64) - means) / at_least(means, deviations)
    return np.sqrt(np.sum(np.maximum(excess, 0) ** 2, axis=1)).astype(np.float32)


def at_least(
    means: Float[np.ndarray, "*n _k"], deviations: Float[np.ndarray, "*n _k"]
) -> Float[np.ndarray, "*n _k"]:
    """Return the deviations, raised to the least that `combine` divides by."""
    least = _LEAST_DEVIATION * np.abs(means) + np.finfo(np.float32).tiny
    return np.maximum(deviations, least)


def moments(
    summaries: Float32[np.ndarray, "n _k"],
) -> tuple[Float[np.ndarray, " _k"], Float[np.ndarray, " _k"]]:
    """Return mean and standard deviation (divisor n - 1) of each summary, float64."""
    values = summaries.astype(np.float64)
    return values.mean(axis=0), values.std(axis=0, ddof=1)


def of_normal(
    summaries: Float32[np.ndarray, "n _k"], groups: Int[np.ndarray, " n"] | None = None
) -> Float32[np.ndarray, " n"]:
    """Return the score of each normal image; `combined`, it is measured by the other images.

    A new image is measured by images that it is none of. Measured by themselves as well, normal
    images would score lower than new ones, the more so the fewer they are.

    Args:
      summaries: (n, k), see `summaries`, of images that their model was not fitted to.
      groups: group number of each image, of at least 3 groups; images are not measured by their
        own group. None if each image is independent.

    Returns:
      (n,) float32.
    """
    if summaries.shape[1] == 1:
        return summaries[:, 0]
    values = summaries.astype(np.float64)
    values -= values.mean(axis=0)  # squares then do not cancel
    _, numbers = np.unique(
        np.arange(len(values)) if groups is None else groups, return_inverse=True
    )

    def others(x: Float[np.ndarray, "n _k"]) -> Float[np.ndarray, "n _k"]:
        """Return for each image the sum over all images of other groups."""
        sums = np.zeros((numbers.max() + 1, x.shape[1]))
        np.add.at(sums, numbers, x)
        return x.sum(axis=0) - sums[numbers]

    counts = others(np.ones((len(values), 1)))
    means = others(values) / counts
    squares = np.maximum(others(values**2) - counts * means**2, 0)
    shift = summaries.astype(np.float64) - values
    return combine(summaries, means + shift, np.sqrt(squares / (counts - 1)))
