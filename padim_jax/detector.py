"""PaDiM whole: the stages put together into functions from uint8 images to scores.

Training, evaluation, prediction and the Python API all go through `extract`, so that
preprocessing, backbone and embedding are the same everywhere.
"""

import dataclasses
import functools
import hashlib
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int, UInt8
from PIL import Image

from padim_jax import embedding, gaussian, input_pipeline, low_rank, models, scoring
from padim_jax.config import Config, ImageConfig, MapConfig, ModelConfig
from padim_jax.embedding import Pyramid
from padim_jax.models import pretrained, resnet
from padim_jax.types import (
    AnomalyMaps,
    FeatureMap,
    Gaussian,
    Images,
    Levels,
    LowRank,
    Moments,
    Samples,
    Scores,
    Valid,
)

Shape = tuple[int, int, int]  # regions, cells a region and channels of a level
Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Detector:
    """A fitted model: all that scoring an image needs.

    Attributes:
      config: in use; what the statistics depend on is as it was fitted with.
      index: the channels kept, in the embedding's order.
      variables: the backbone's.
      weights: where the backbone's weights come from.
      gaussian: of every patch position.
    """

    config: Config
    index: Int[np.ndarray, " d"]
    variables: Variables
    weights: pretrained.WeightsIdentity
    gaussian: Gaussian | LowRank


@dataclasses.dataclass(frozen=True)
class Anomalies:
    """What a detector says of n images.

    Attributes:
      maps: Mahalanobis distance per pixel of the preprocessed image, blurred.
      scores: the maximum of each map.
    """

    maps: Float32[np.ndarray, "n h w"]
    scores: Float32[np.ndarray, " n"]


def fingerprint(detector: Detector) -> str:
    """SHA-256 hex digest that tells detectors apart: thresholds belong to one of them.

    Covers the mean embeddings, which change with every image fitted, and what turns
    images into maps.
    """
    config = dataclasses.replace(detector.config.model, weights=detector.weights.sha256)
    described = repr((detector.config.image, config, detector.config.map))
    digest = hashlib.sha256(described.encode())
    for mean in detector.gaussian.mean:
        digest.update(np.asarray(mean).data)
    return digest.hexdigest()


def channel_index(config: ModelConfig) -> Int[np.ndarray, " d"]:
    """The channels that a configuration keeps; see `embedding.channel_index`."""
    spec = models.BACKBONES[config.backbone]
    total = sum(models.stage_channels(spec, layer) for layer in config.layers)
    return embedding.channel_index(total, config.channels, config.seed)


def patch_grid(config: ImageConfig, layers: Sequence[str]) -> tuple[int, int]:
    """Height and width of the first layer's feature map, in patches."""
    stride = 4 * 2 ** models.STAGES.index(layers[0])
    height, width = config.size
    return -(-height // stride), -(-width // stride)


def pyramid(image: ImageConfig, model: ModelConfig, index: Sequence[int]) -> Pyramid:
    """How the stages' grids of a configuration lie upon each other; see `embedding`."""
    spec = models.BACKBONES[model.backbone]
    grids = tuple(patch_grid(image, (layer,)) for layer in model.layers)
    channels = tuple(models.stage_channels(spec, layer) for layer in model.layers)
    return embedding.pyramid(grids, channels, tuple(index))


def init(shapes: Sequence[Shape], images: int, form: str) -> Moments | Samples:
    """Statistics of no image yet, in the form that suits the number of images.

    Both forms are exact. Fitted, `Samples` take s values a channel and s^2 a patch for s
    images, `Moments` every level's channels times its own and the coarser levels'; time
    to fit and to score goes with these sizes, too.

    Args:
      shapes: `Pyramid.shapes`.
      images: how many there are to fit.
      form: "moments", "samples", or "auto" for the smaller.
    """
    form = choose_form(shapes, images, form)
    return gaussian.init(shapes) if form == "moments" else low_rank.init(shapes, images)


def choose_form(shapes: Sequence[Shape], images: int, form: str = "auto") -> str:
    """The form that `init` takes: "moments" or "samples"."""
    if form != "auto":
        return form
    return min(("moments", "samples"), key=lambda form: fitted_size(shapes, images, form))


def fitted_size(shapes: Sequence[Shape], images: int, form: str) -> int:
    """How many numbers a fitted model of a form takes, means aside; see `init`."""
    cells = [regions * cells for regions, cells, _ in shapes]
    channels = [channels for _, _, channels in shapes]
    if form == "samples":
        return images * sum(map(operator.mul, cells, channels)) + images**2 * cells[0]
    rows = map(operator.mul, cells, channels)
    return sum(n * sum(channels[i:]) for i, n in enumerate(rows))


def finalize(statistics: Moments | Samples, regularization: float) -> Gaussian | LowRank:
    """The fitted Gaussians; the statistics are used up. See the forms' own functions."""
    if isinstance(statistics, Moments):
        return gaussian.finalize(statistics, regularization)
    return low_rank.finalize(statistics, regularization)


@functools.partial(jax.jit, static_argnames=("image", "model", "index"))
def extract(
    variables: Variables,
    images: Images,
    *,
    image: ImageConfig,
    model: ModelConfig,
    index: tuple[int, ...],
) -> Levels:
    """uint8 images (b, h, w, 3) to embeddings by level (r, n, d, b), normalisation included.

    `embedding.concatenate` makes the paper's embeddings (b, p, d) of them.
    """
    mean = np.asarray(image.mean, np.float32) * 255
    std = np.asarray(image.std, np.float32) * 255
    pixels = (images.astype(jnp.float32) - mean[None, None, None]) / std[None, None, None]
    spec = models.BACKBONES[model.backbone]
    backbone = resnet.ResNet(spec, model.layers, model.precision)
    features = cast(tuple[FeatureMap, ...], backbone.apply(variables, pixels))
    return embedding.select(features, pyramid(image, model, index))


@functools.partial(
    jax.jit, static_argnames=("image", "model", "index"), donate_argnames=("statistics",)
)
def fit_batch(
    statistics: Moments | Samples,
    variables: Variables,
    images: Images,
    valid: Valid,
    *,
    image: ImageConfig,
    model: ModelConfig,
    index: tuple[int, ...],
) -> Moments | Samples:
    """Adds a batch of normal images to the statistics (whose buffers are given up)."""
    levels = extract(variables, images, image=image, model=model, index=index)
    if isinstance(statistics, Moments):
        return gaussian.update(statistics, levels, valid)
    return low_rank.update(statistics, levels, valid)


@functools.partial(jax.jit, static_argnames=("image", "model", "map_", "index"))
def score_batch(
    variables: Variables,
    fitted: Gaussian | LowRank,
    images: Images,
    *,
    image: ImageConfig,
    model: ModelConfig,
    map_: MapConfig,
    index: tuple[int, ...],
) -> tuple[AnomalyMaps, Scores]:
    """uint8 images (b, h, w, 3) to anomaly maps (b, h, w) and image scores (b,)."""
    levels = extract(variables, images, image=image, model=model, index=index)
    maps = scoring.anomaly_maps(
        scoring.mahalanobis(fitted, levels, pyramid(image, model, index).patches),
        grid=patch_grid(image, model.layers),
        size=image.size,
        upsample=map_.upsample,
        sigma=map_.sigma,
    )
    return maps, scoring.image_scores(maps)


def score_pixels(detector: Detector, images: UInt8[np.ndarray, "b h w 3"]) -> Anomalies:
    """Scores images that are preprocessed already (resized and cropped, uint8)."""
    config = detector.config
    maps, scores = score_batch(
        detector.variables,
        detector.gaussian,
        jnp.asarray(images),
        image=config.image,
        model=config.model,
        map_=config.map,
        index=tuple(detector.index.tolist()),
    )
    return Anomalies(np.asarray(maps), np.asarray(scores))


def score(
    detector: Detector,
    images: Sequence[np.ndarray | str | os.PathLike[str]],
) -> Anomalies:
    """Scores images of any size, given as RGB arrays or as paths.

    They are resized and cropped as in training, and computed in batches of
    `config.batch_size`.

    Args:
      detector: a fitted model.
      images: uint8 arrays (h, w, 3) or paths of image files, also mixed.

    Returns:
      Maps at the size of the detector's input, and scores.

    Raises:
      UserError: a file cannot be read, or is no image (it is named).
      TypeError: an array is not uint8 RGB, or a single path was given.
    """
    if isinstance(images, str | os.PathLike):
        raise TypeError(f"images={images!r}: expected a sequence of images, as in [{images!r}]")
    config = detector.config
    maps = np.empty((len(images), *config.image.size), np.float32)
    scores = np.empty(len(images), np.float32)
    # Few shapes, few compilations: up to a batch the next power of two, then whole batches.
    size = min(config.batch_size, 1 << max(0, len(images) - 1).bit_length())
    for start in range(0, len(images), size):
        part = images[start : start + size]
        pixels = np.zeros((size, *config.image.size, 3), np.uint8)
        for i, item in enumerate(part):
            decoded = _decode(item, start + i)
            pixels[i] = input_pipeline.preprocess(decoded, config.image)
        found = score_pixels(detector, pixels)
        done = slice(start, start + len(part))
        maps[done], scores[done] = found.maps[: len(part)], found.scores[: len(part)]
    return Anomalies(maps, scores)


def _decode(item: np.ndarray | str | os.PathLike[str], index: int) -> Image.Image:
    if not isinstance(item, np.ndarray):
        return input_pipeline.read_image(item)
    if item.dtype == np.uint8 and item.ndim == 3 and item.shape[-1] == 3:
        return Image.fromarray(item)
    raise TypeError(
        f"images[{index}]: an array {item.shape} of {item.dtype}; expected uint8 RGB "
        "(height, width, 3)"
    )
