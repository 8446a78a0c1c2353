"""Shapes that follow from a configuration alone: channels, patch grids, levels and shifts."""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from PIL import Image

from padim_jax.config import backbones, checks
from padim_jax.config.settings import ImageConfig, ModelConfig
from padim_jax.core import embedding
from padim_jax.core.embedding import Pyramid
from padim_jax.core.image_score import Inside
from padim_jax.data import roi
from padim_jax.detector.grid import patch_grid
from padim_jax.errors import UserError

Shape = tuple[int, int, int]  # regions, cells per region and channels of a level


def total_channels(config: ModelConfig) -> int:
    """Return the number of channels of all stages in use together."""
    return sum(map(backbones.BACKBONES[config.backbone].channels, config.layers))


def channel_index(config: ModelConfig) -> Int[np.ndarray, " d"]:
    """Return the channels that a configuration keeps; see `embedding.channel_index`.

    Without random selection they are numbered: all channels, or those of a projection.
    """
    if config.reduction != "random":
        return np.arange(config.channels)
    return embedding.channel_index(total_channels(config), config.channels, config.seed)


def is_projected(config: ModelConfig) -> bool:
    """Return whether channels are reduced by a matrix, which belongs to the model."""
    return config.reduction in ("semi_orthogonal", "pca")


def has_one_level(config: ModelConfig) -> bool:
    """Return whether patches share no features, so that each patch is a region."""
    return is_projected(config) or config.upsample != "nearest"


@functools.lru_cache(maxsize=16)
def inside(image: ImageConfig, layers: tuple[str, ...]) -> Inside | None:
    """Return what the region of interest covers, or None without one.

    A patch takes part if a pixel of its cell is inside, so that every pixel inside has its own
    patch.

    Args:
      image: image settings of a model; see `roi.resolve`.
      layers: names of the stages in use, the finest first.

    Raises:
      UserError: see `roi.at_input_size`.
    """
    if not image.roi:
        return None
    if not checks.is_runs(image.roi):
        raise ValueError("a region of interest is resolved before a model is made")
    pixels = roi.at_input_size(str(image.roi), image)
    cells = Image.fromarray(pixels.astype(np.float32))
    rows, columns = patch_grid(image, layers)
    return Inside(pixels, np.asarray(cells.resize((columns, rows), Image.Resampling.BOX)) > 0)


def pyramid(image: ImageConfig, model: ModelConfig, index: Sequence[int]) -> Pyramid:
    """Return the correspondence between the stages' grids; see `embedding`.

    Args:
      image: image settings.
      model: model settings.
      index: channels kept.

    Returns:
      The pyramid, restricted to the region of interest; the same object for the same arguments.
    """
    if has_one_level(model):
        grid, channels = patch_grid(image, model.layers), len(index)
        whole = embedding.pyramid((grid,), (channels,), tuple(range(channels)))
    else:
        spec = backbones.BACKBONES[model.backbone]
        grids = tuple(patch_grid(image, (layer,)) for layer in model.layers)
        channels = tuple(map(spec.channels, model.layers))
        whole = embedding.pyramid(grids, channels, tuple(index))
    covered = inside(image, model.layers)
    return whole if covered is None else _restricted(whole, covered)


@functools.lru_cache(maxsize=16)
def _restricted(whole: Pyramid, covered: Inside) -> Pyramid:
    return embedding.restrict(whole, covered.patches)


def place(image: ImageConfig, model: ModelConfig, index: Sequence[int], region: int) -> str:
    """Describe for a message which patches of the grid belong to a region.

    Args:
      image: image settings.
      model: model settings.
      index: channels kept.
      region: index of the region.

    Returns:
      Ranges of rows and columns, and the grid's size.
    """
    laid, (height, width) = pyramid(image, model, index), patch_grid(image, model.layers)
    cells = laid.shapes[0][1]
    of_region = laid.inside & (laid.patches // cells == region)
    rows, columns = np.divmod(np.flatnonzero(of_region), width)
    return (
        f"patches of rows {rows.min()} to {rows.max()} and columns {columns.min()} to "
        f"{columns.max()}, of {height}x{width}"
    )


def shifts(image: ImageConfig, model: ModelConfig, index: tuple[int, ...]) -> embedding.Shifts:
    """Return the neighbours of all regions' patches."""
    laid = pyramid(image, model, index)
    try:
        return embedding.shifts(laid, patch_grid(image, model.layers), model.shift)
    except ValueError as error:
        raise UserError(
            f"config.model.shift={model.shift}: {error} by config.model.channels="
            f"{model.channels}, and its patches are those that are shifted; take more channels"
        ) from error
