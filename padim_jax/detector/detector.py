"""The complete detector: a fitted model, its identity, and functions from images to scores."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config
from padim_jax.core import embedding
from padim_jax.core.calibration import Calibration
from padim_jax.core.types import Gaussian, LowRank, Moments, Projection, Samples
from padim_jax.detector import geometry, memory, steps
from padim_jax.detector.geometry import Shape
from padim_jax.detector.scores import (  # noqa: F401 (offered here as well)
    Anomalies,
    Measures,
    Scorer,
    find_regions,
    image_scores,
    require_own_process,
    require_scorable,
    score,
    score_pixels,
    stream,
)
from padim_jax.detector.steps import Embedded, Variables
from padim_jax.devices import parallel
from padim_jax.errors import UserError
from padim_jax.models.weights.identity import WeightsIdentity

# Settings that scores depended on in padim_jax 0.1.0, in that order; see `_first_fingerprint`.
_FIRST_SETTINGS = {
    "image": ("resize", "method", "crop", "mean", "std", "rotation", "crop_at", "seed"),
    "model": (
        *("backbone", "layers", "weights", "channels", "seed", "reduction", "pooling"),
        *("upsample", "precision", "regularization", "statistics"),
    ),
    "map": ("upsample", "sigma"),
}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Detector(Scorer):
    """A fitted model: everything needed to score an image. Compared by identity.

    Attributes:
      config: configuration in use; settings that affect the statistics are those of the fit.
      index: channels kept, in the embedding's order.
      variables: variables of the backbone, and the projection; see `steps.with_projection`.
      weights: origin and digest of the backbone's weights.
      gaussian: Gaussians of all patch positions, on the devices that score.
      identity: digest of the statistics, as stored with them.
      images: SHA-256 of each fitted file.
      calibration: thresholds from normal images, or None.
      left_out: number of images that `gaussian` is prepared to leave out at a time; 0 to score
        images with the complete model.
      process: id of the process that created the detector; no other process can use it.
    """

    config: Config
    index: Int[np.ndarray, " d"]
    variables: Variables
    weights: WeightsIdentity
    gaussian: Gaussian | LowRank
    identity: str
    images: UInt8[np.ndarray, "s 32"]
    calibration: Calibration | None = None
    left_out: int = 0
    process: int = dataclasses.field(default_factory=os.getpid, repr=False, compare=False)

    @property
    def projection(self) -> Projection | None:
        """Return the matrix of a reduction by projection, or None."""
        found = self.variables.get(steps.PROJECTION)
        return None if found is None else np.asarray(found)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Return `fingerprints` of itself."""
        return fingerprints(self)

    @property
    def versions(self) -> dict[str, str]:
        """Return JAX's version."""
        return {"version of jax": jax.__version__}

    def measure(
        self, images: UInt8[np.ndarray, "b h w 3"], names: Sequence[str] = ()
    ) -> Measures:
        """Return `measure_pixels` of itself."""
        return measure_pixels(self, images, names)

    def require_memory(self, tests: int = 0) -> None:
        """Print the memory that scoring needs; see `memory.require_for_scores`."""
        memory.require_for_scores(self.config, self.count, parallel.every(), tests)


@dataclasses.dataclass(frozen=True)
class _Static:
    """Static fields of a detector; equal for equal models in use.

    Attributes:
      key: values by which detectors are compared.
      values: the fields.
    """

    key: tuple[Any, ...]
    values: Mapping[str, Any] = dataclasses.field(compare=False)


def register(cls: type[Detector]) -> None:
    """Register a detector class as a pytree: arrays are leaves, all else is static."""

    def flatten(detector: Detector) -> tuple[tuple[Any, Any], _Static]:
        values = {field.name: getattr(detector, field.name) for field in fields}
        arrays = values.pop("variables"), values.pop("gaussian")
        key = (fingerprint(detector), detector.config, detector.calibration, detector.left_out)
        return arrays, _Static(key, values)

    def unflatten(static: _Static, arrays: tuple[Any, Any]) -> Detector:
        detector = object.__new__(cls)  # leaves may be anything
        variables, fitted = arrays
        for name, value in {
            **static.values,
            "variables": variables,
            "gaussian": fitted,
        }.items():
            object.__setattr__(detector, name, value)
        return detector

    fields = dataclasses.fields(cls)
    jax.tree_util.register_pytree_node(cls, flatten, unflatten)


register(Detector)
jax.tree_util.register_dataclass(Anomalies)


def fingerprint(detector: Detector) -> str:
    """Return the SHA-256 hex digest that identifies a detector: thresholds belong to one.

    It covers the statistics, the weights, and the settings that scores depend on. A setting
    added by a later version does not change the fingerprints of models without it.
    """
    said = {
        "identity": detector.identity,
        "weights": detector.weights.sha256,
        **config_lib.score_settings(detector.config),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def fingerprints(detector: Detector) -> tuple[str, ...]:
    """Return all fingerprints that stored thresholds of a detector may have.

    The first is this version's; see `fingerprint`.
    """
    first = _first_fingerprint(detector)
    return (fingerprint(detector), *([] if first is None else [first]))


def _first_fingerprint(detector: Detector) -> str | None:
    """Return the fingerprint of padim_jax 0.1.0, made of its dataclasses' text.

    None for a model with settings added later.
    """
    config = detector.config
    stored = config_lib.to_stored(config)
    texts = []
    if "score" in stored:
        return None
    for group, names in _FIRST_SETTINGS.items():
        if set(stored[group]) != set(names):
            return None
        values = {name: getattr(getattr(config, group), name) for name in names}
        if group == "model":
            values |= {"weights": detector.weights.sha256, "statistics": ""}
        listed = ", ".join(f"{name}={value!r}" for name, value in values.items())
        texts.append(f"{group.capitalize()}Config({listed})")
    said = f"({detector.identity!r}, {', '.join(texts)})"
    return hashlib.sha256(said.encode()).hexdigest()


def require_fitting(
    config: Config,
    index: np.ndarray,
    fitted: Moments | Samples | Gaussian | LowRank,
    images: int,
    projection: np.ndarray | None,
) -> None:
    """Check that a file's arrays match its configuration.

    Args:
      config: configuration of the model.
      index: channels kept.
      fitted: statistics or Gaussians, on the devices.
      images: number of image digests in the file.
      projection: projection matrix (C, D), or None.

    Raises:
      ValueError: they do not match.
    """
    model, total = config.model, geometry.total_channels(config.model)
    matrix = (total, model.channels) if geometry.is_projected(model) else None
    if (None if projection is None else projection.shape) != matrix:
        raise ValueError("its projection is not of its configuration")
    if projection is not None and not np.all(np.isfinite(projection)):
        raise ValueError("its projection is not finite")
    if not np.array_equal(index, geometry.channel_index(model)):
        raise ValueError("its channels are not those of its configuration")
    shapes = geometry.pyramid(config.image, model, index.tolist()).shapes
    arrays = [x for x in jax.tree.leaves(fitted) if x.ndim > 1]
    room = fitted.values[0].shape[-2] if isinstance(fitted, Samples) else images
    devices = len(arrays[0]) * parallel.every().processes
    own = -(-shapes[0][0] // devices)  # regions per device, as `parallel.split` has them
    if [x.shape[1:] for x in arrays] != [(own, *s) for s in _shapes(fitted, shapes, room)]:
        raise ValueError("its numbers have other shapes than its configuration says")
    if isinstance(fitted, Moments | Samples):
        count = int(np.asarray(fitted.count)[0])
        if count != images or room < images:
            raise ValueError(f"its statistics are of {count} images, and not of {images}")


def _shapes(
    fitted: Moments | Samples | Gaussian | LowRank, shapes: Sequence[Shape], images: int
) -> list[tuple[int, ...]]:
    """Return the shapes of a region's arrays, in the order of JAX's leaves."""
    means = [(n, d) for _, n, d in shapes]
    if isinstance(fitted, Moments | Gaussian):
        return [
            *means,
            *((n, d, e) for i, (_, n, d) in enumerate(shapes) for _, _, e in shapes[i:]),
        ]
    rows = [(n, images, d) for _, n, d in shapes]
    if isinstance(fitted, Samples):
        return [*rows]
    return [*means, *rows, (shapes[0][1], images, images)]


def measure_pixels(
    detector: Detector, images: UInt8[np.ndarray, "b h w 3"], names: Sequence[str] = ()
) -> Measures:
    """Compute maps and their summaries of images that are already preprocessed.

    With several processes, each passes the same number of its own images and gets their
    measures. A detector that leaves k images out at a time (`Detector.left_out`) accepts fitted
    images only: those of all processes together are groups of k, each image is scored by the
    model without its group, and only padding follows the last complete group.

    Args:
      detector: fitted model.
      images: (b, h, w, 3), as from `input_pipeline.preprocess`.
      names: names of the images for error messages.

    Returns:
      The measures.

    Raises:
      UserError: a summary is not finite (the image is named), or this process was forked from
        the one that loaded the detector.
      ValueError: fewer than two images would be left, which give no covariance; or the detector
        was given up by `calibrate.calibrate`.
    """
    levels = embed_pixels(detector, images)
    measures = measure_levels(detector, levels, names)
    count = len(images)
    return Measures(measures.maps[:count], measures.summaries[:count], measures.samples[:count])


def embed_pixels(detector: Detector, images: UInt8[np.ndarray, "b h w 3"]) -> Embedded:
    """Return the embeddings by level of images that are already preprocessed.

    Args:
      detector: fitted model.
      images: (b, h, w, 3), as from `input_pipeline.preprocess`; filled up with zeros to a
        multiple of the number of devices.

    Returns:
      Embeddings of all processes' images in the devices' regions; see `steps.embed_batch`.

    Raises:
      UserError: this process was forked from the one that loaded the detector.
    """
    _require_usable(detector)
    config, local = detector.config, len(detector.gaussian.mean[0])
    if padding := -len(images) % local:
        images = np.pad(images, ((0, padding), (0, 0), (0, 0), (0, 0)))
    devices = parallel.Devices(local, parallel.every().processes)
    shared, index = parallel.share(images, devices), tuple(detector.index.tolist())
    return steps.embed(detector.variables, shared, config, index, devices)


def measure_levels(detector: Detector, levels: Embedded, names: Sequence[str] = ()) -> Measures:
    """Compute maps and their summaries from embeddings.

    Args:
      detector: fitted model; see `measure_pixels` for one that leaves images out.
      levels: embeddings of all processes' images, as from `embed_pixels`.
      names: names of this process's images for error messages; others are padding.

    Returns:
      The measures of this process's images.

    Raises:
      UserError: see `measure_pixels`.
      ValueError: see `measure_pixels`.
    """
    _require_usable(detector)
    if not detector.left_out:
        each = steps.score_batch(detector.gaussian, levels, *_static(detector))
    elif detector.count - detector.left_out < 2:
        raise ValueError(
            f"{detector.count} images fitted: without {detector.left_out} there is no "
            "covariance"
        )
    else:
        static = (*_static(detector), detector.left_out)
        fitted = np.int32(detector.count)
        each = steps.score_left_out_batch(detector.gaussian, fitted, levels, *static)
    measures = Measures(*(np.asarray(x).reshape(-1, *x.shape[2:]) for x in each))
    _require_finite(detector, measures.summaries, names)
    return measures


def measure_samples(
    detector: Detector,
) -> Iterator[tuple[Measures, Bool[np.ndarray, " _b"]]]:
    """Measure each fitted image by the model without it, from the model alone.

    The low-rank form holds the embeddings of all its images; no file is read.

    Args:
      detector: model in the low-rank form, fitted to at least three images, that leaves one
        image out at a time.

    Yields:
      In the order of fitting, batch by batch: the measures of this process's part of a batch,
      and which of them are not padding.

    Raises:
      UserError: a summary is not finite.
      ValueError: the model has another form, has too few images, or leaves none out.
    """
    _require_usable(detector)
    devices, fitted = parallel.every(), detector.gaussian
    if detector.left_out != 1:
        raise ValueError(f"the detector leaves {detector.left_out} images out; expected 1")
    if not isinstance(fitted, LowRank):
        raise ValueError("the model does not hold the embeddings of its images")
    size = devices.padded(min(detector.config.batch_size, detector.count))
    own = size // devices.processes
    for start in range(0, detector.count, size):
        levels = steps.held_batch(fitted, np.int32(detector.count), np.int32(start), size)
        first = start + devices.process * own
        numbers = range(first, first + own)
        measures = measure_levels(detector, levels, [f"fitted image {i}" for i in numbers])
        yield measures, np.array(numbers) < detector.count


def _static(detector: Detector) -> tuple[Any, ...]:
    """Return the static arguments of the mapped functions that score."""
    config, index = detector.config, tuple(detector.index.tolist())
    return config.image, config.model, config.map, config.score.image, index


def _require_usable(detector: Detector) -> None:
    """Reject a forked detector (JAX does not survive forks) and one with deleted arrays."""
    require_own_process(detector)
    arrays = [x for x in jax.tree.leaves(detector.gaussian) if isinstance(x, jax.Array)]
    if any(x.is_deleted() for x in arrays):
        raise ValueError(
            "the detector was given up to find thresholds; go on with the one that "
            "calibrate.calibrate returned, or load the checkpoint again"
        )


def _require_finite(
    detector: Detector, summaries: Float32[np.ndarray, "b _k"], names: Sequence[str]
) -> None:
    """Reject summaries that are not finite; they are finite only if the whole map is."""
    finite = np.isfinite(summaries).all(axis=1)
    if finite.all():
        return
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(detector.gaussian)):
        raise UserError(
            "the model holds numbers that are not finite, and scores nothing; fit again, or "
            "restore it from a copy"
        )
    i = int(np.argmin(finite))
    raise UserError(
        f"{names[i] if i < len(names) else f'image {i}'}: a score of {summaries[i, 0]}: the "
        "backbone's features of it are not finite, or too large for float32. Its weights "
        f"({detector.weights.origin}) are broken, or config.image.std is too small"
    )


def embed(
    detector: Detector, images: UInt8[np.ndarray, "b h w 3"]
) -> Float32[np.ndarray, "b _h _w _d"]:
    """Return the patch embeddings of images that are already preprocessed.

    These are the vectors that the Gaussians model: the paper's embedding vectors, after the
    reduction of channels (PaDiM, section III-A).

    Args:
      detector: fitted model.
      images: (b, h, w, 3), as from `input_pipeline.preprocess`.

    Returns:
      (b, h, w, d) float32 on the patch grid.
    """
    _require_usable(detector)
    config, index = detector.config, tuple(detector.index.tolist())
    levels = steps.extract(
        detector.variables, images, image=config.image, model=config.model, index=index
    )
    laid = geometry.pyramid(config.image, config.model, index)
    grid = geometry.patch_grid(config.image, config.model.layers)
    embeddings = np.asarray(embedding.concatenate(levels, laid))
    return embeddings.reshape(len(images), *grid, -1)
