"""PaDiM whole: the stages put together into functions from uint8 images to scores.

Training, evaluation, prediction and the Python API all go through `extract`, so that
preprocessing, backbone and embedding are the same everywhere.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int, UInt8
from PIL import Image

from padim_jax import embedding, gaussian, input_pipeline, models, scoring
from padim_jax.config import Config, ImageConfig, MapConfig, ModelConfig
from padim_jax.models import pretrained, resnet
from padim_jax.types import (
    AnomalyMaps,
    Embeddings,
    FeatureMap,
    Gaussian,
    Images,
    Moments,
    Scores,
    Valid,
)

Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Detector:
    """A fitted model: all that scoring an image needs.

    Attributes:
      config: as it was fitted with; preprocessing is part of it.
      index: the channels kept, in the embedding's order.
      variables: the backbone's.
      weights: where the backbone's weights come from.
      gaussian: of every patch position.
    """

    config: Config
    index: Int[np.ndarray, " d"]
    variables: Variables
    weights: pretrained.WeightsIdentity
    gaussian: Gaussian


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
    digest.update(np.asarray(detector.gaussian.mean).tobytes())
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


@functools.partial(jax.jit, static_argnames=("image", "model", "index"))
def extract(
    variables: Variables,
    images: Images,
    *,
    image: ImageConfig,
    model: ModelConfig,
    index: tuple[int, ...],
) -> Embeddings:
    """uint8 images (b, h, w, 3) to embeddings (b, p, d), normalisation included."""
    mean = np.asarray(image.mean, np.float32) * 255
    std = np.asarray(image.std, np.float32) * 255
    pixels = (images.astype(jnp.float32) - mean[None, None, None]) / std[None, None, None]
    spec = models.BACKBONES[model.backbone]
    backbone = resnet.ResNet(spec, model.layers, model.precision)
    features = cast(tuple[FeatureMap, ...], backbone.apply(variables, pixels))
    return embedding.embed(features, np.asarray(index))


@functools.partial(
    jax.jit, static_argnames=("image", "model", "index"), donate_argnames=("moments",)
)
def fit_batch(
    moments: Moments,
    variables: Variables,
    images: Images,
    valid: Valid,
    *,
    image: ImageConfig,
    model: ModelConfig,
    index: tuple[int, ...],
) -> Moments:
    """Adds a batch of normal images to the moments (whose buffers are given up)."""
    embeddings = extract(variables, images, image=image, model=model, index=index)
    return gaussian.update(moments, embeddings, valid)


@functools.partial(jax.jit, static_argnames=("image", "model", "map_", "index"))
def score_batch(
    variables: Variables,
    fitted: Gaussian,
    images: Images,
    *,
    image: ImageConfig,
    model: ModelConfig,
    map_: MapConfig,
    index: tuple[int, ...],
) -> tuple[AnomalyMaps, Scores]:
    """uint8 images (b, h, w, 3) to anomaly maps (b, h, w) and image scores (b,)."""
    embeddings = extract(variables, images, image=image, model=model, index=index)
    maps = scoring.anomaly_maps(
        scoring.mahalanobis(fitted, embeddings),
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
    images: Sequence[UInt8[np.ndarray, "_ _ 3"] | str | os.PathLike[str]],
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
    """
    config = detector.config
    pixels = np.zeros((len(images), *config.image.size, 3), np.uint8)
    for target, item in zip(pixels, images, strict=True):
        if isinstance(item, np.ndarray):
            decoded = Image.fromarray(item)
        else:
            decoded = input_pipeline.read_image(item)
        target[:] = input_pipeline.preprocess(decoded, config.image)
    maps = np.empty(pixels.shape[:3], np.float32)
    scores = np.empty(len(pixels), np.float32)
    for start in range(0, len(pixels), config.batch_size):
        part = slice(start, start + config.batch_size)
        count = len(pixels[part])
        # One shape, one compilation: a short last batch is padded.
        batch = np.pad(pixels[part], ((0, config.batch_size - count), (0, 0), (0, 0), (0, 0)))
        found = score_pixels(detector, batch)
        maps[part], scores[part] = found.maps[:count], found.scores[:count]
    return Anomalies(maps, scores)
