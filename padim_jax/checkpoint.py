"""Fitted models on disk; the only module that knows Orbax.

A checkpoint is one Orbax folder. Its state holds the statistics (of `Moments` count,
mean and M2, of this the lower triangles where it is symmetric; of `Samples` the images'
embeddings) and the channel index; its custom metadata, JSON, holds the configuration,
the identity of the backbone's weights, the library's version and a checksum of it all.
The statistics and not their factorisation are kept, so that models can be extended and
merged. `model_file` has the form for scoring alone.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int
from orbax.checkpoint import v1 as ocp

import padim_jax
from padim_jax import config as config_lib
from padim_jax.config import Config
from padim_jax.errors import UserError
from padim_jax.models.pretrained import WeightsIdentity
from padim_jax.types import Moments, Samples

# Raised when a reader of the older form would misread the newer.
_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a checkpoint holds.

    Attributes:
      config: as the model was fitted with.
      index: the channels kept, in the embedding's order.
      statistics: of all images fitted.
      weights: identity of the backbone's weights, which the checkpoint does not hold.
    """

    config: Config
    index: Int[np.ndarray, " d"]
    statistics: Moments | Samples
    weights: WeightsIdentity


def save(path: pathlib.Path, fitted: Fitted) -> None:
    """Writes a checkpoint; a crash leaves the old one, the new one or both, never half.

    Args:
      path: the folder to write; an existing checkpoint there is replaced.
      fitted: what to write.

    Raises:
      UserError: see `check_destination`.
    """
    with saving(path, fitted):
        pass


@contextlib.contextmanager
def saving(path: pathlib.Path, fitted: Fitted) -> Iterator[None]:
    """Writes a checkpoint beside `path`; the block's end puts it there, an error drops it.

    The block may use the statistics up, and so need no second copy of them.

    Raises:
      UserError: see `check_destination`.
    """
    check_destination(path)
    path, new, old = _places(path)
    state = _pack(fitted)
    metadata: dict[str, Any] = {
        "format": _FORMAT,
        "version": padim_jax.__version__,
        "config": config_lib.to_dict(fitted.config),
        "weights": dataclasses.asdict(fitted.weights),
    }
    metadata["sha256"] = _digest(state, metadata)
    # Orbax writes atomically, but deletes what it overwrites before it begins.
    with _uncompressed():
        ocp.save(os.fspath(new), state, overwrite=True, custom_metadata=metadata)
    del state  # views of the statistics, which could not be used up
    try:
        yield
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if path.exists():
        path.rename(old)
        new.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(path)


def check_destination(path: pathlib.Path) -> None:
    """Makes sure that `save` would delete nothing but a checkpoint that it replaces.

    Raises:
      UserError: `path` is something else than a checkpoint, or what `save` needs beside
        it is taken.
    """
    path, new, old = _places(path)
    for place in (path, new):
        if place.exists() and _describe(place) is None:
            raise UserError(f"{place}: exists and is no checkpoint; move it away first")
    if path.exists() and old.exists():
        raise UserError(
            f"{old}: in the way, {path} is to be renamed to it while it is replaced. A backup, "
            "or left by a save that was interrupted; move it away or delete it first"
        )


def load(path: str | os.PathLike[str]) -> Fitted:
    """Reads a checkpoint.

    Raises:
      UserError: there is no checkpoint, or it is broken or of another format.
    """
    folder = pathlib.Path(path).absolute()
    info = _describe(folder)
    if info is None:
        raise UserError(_no_checkpoint(folder))
    metadata = info.custom_metadata
    if metadata["format"] != _FORMAT:
        raise UserError(
            f"{folder}: checkpoint of format {metadata['format']} written by padim_jax "
            f"{metadata.get('version')}; this is padim_jax {padim_jax.__version__}, which "
            f"reads format {_FORMAT}"
        )
    try:
        config = config_lib.validate(metadata["config"])
        weights = WeightsIdentity(**metadata["weights"])
        if info.metadata is None:
            raise ValueError("the list of its arrays cannot be read")
        # Read into host arrays; unpacking moves them to the device.
        leaves = info.metadata.items()
        target = {key: np.empty(leaf.shape, leaf.dtype) for key, leaf in leaves}
        arrays: Any = ocp.load(os.fspath(folder), target)
        if _digest(arrays, metadata) != metadata["sha256"]:
            raise ValueError("its contents are not what was saved")
        return Fitted(config, arrays["index"], _unpack(arrays), weights)
    except (KeyError, TypeError, ValueError, OSError, UserError) as error:
        # TensorStore appends its whole specification.
        reason = str(error).partition(" [tensorstore_spec")[0]
        raise UserError(
            f"{folder}: the checkpoint is broken ({type(error).__name__}: {reason}); fit again "
            "or restore it from a copy"
        ) from error


def _places(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
    """Where the checkpoint, the new one until it is complete and the old one go."""
    # What a link leads to is replaced, and not the link.
    path = path.resolve()
    return path, path.with_name(f"{path.name}.new"), path.with_name(f"{path.name}.old")


def _describe(folder: pathlib.Path) -> Any:
    """Orbax's description of a checkpoint of this program; None of anything else.

    `ocp.is_orbax_checkpoint` does not serve: it takes any folder for a checkpoint.
    """
    try:
        info = ocp.metadata(os.fspath(folder))
    except (OSError, ValueError):
        return None
    return info if "format" in (info.custom_metadata or {}) else None


def _no_checkpoint(folder: pathlib.Path) -> str:
    old = _places(folder)[2]
    if old.is_dir() and not folder.exists():
        return (
            f"{folder}: not there, but {old} is: saving was interrupted while the old "
            f"checkpoint was being replaced. Rename {old} to {folder.name} to use it"
        )
    what = "is no checkpoint, or a damaged one" if folder.exists() else "no such checkpoint"
    return f"{folder}: {what}; fit a model first (--mode=train) or name one with --checkpoint"


def _digest(state: dict[str, np.ndarray], metadata: dict[str, Any]) -> str:
    """SHA-256 of all that a checkpoint says; Orbax's files have no checksum of their own."""
    said = {key: value for key, value in metadata.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(state):
        digest.update(np.ascontiguousarray(state[name]).data)
    return digest.hexdigest()


def _uncompressed() -> ocp.Context:
    # Features' statistics shrink by 8 %, in twice the time to read and write them.
    context = ocp.Context()
    context.array.saving.use_compression = False
    return context


def _pack(fitted: Fitted) -> dict[str, np.ndarray]:
    """A checkpoint's arrays by name; level numbers follow an underscore."""
    statistics = fitted.statistics
    state = {"index": fitted.index, "count": np.asarray(statistics.count)}
    if isinstance(statistics, Samples):
        return state | {f"values_{i}": np.asarray(x) for i, x in enumerate(statistics.values)}
    for i, (mean, (own, *cross)) in enumerate(zip(statistics.mean, statistics.m2, strict=True)):
        state[f"mean_{i}"] = np.asarray(mean)
        state[f"m2_{i}_{i}"] = np.asarray(_lower_triangle(own))
        for j, block in enumerate(cross, i + 1):
            state[f"m2_{i}_{j}"] = np.asarray(block)
    return state


def _unpack(state: dict[str, np.ndarray]) -> Moments | Samples:
    count = jnp.asarray(state["count"])
    levels = range(sum(name.startswith(("mean", "values")) for name in state))
    if "values_0" in state:
        return Samples(count, tuple(jnp.asarray(state[f"values_{i}"]) for i in levels))
    means = tuple(jnp.asarray(state[f"mean_{i}"]) for i in levels)
    m2 = tuple(
        tuple(
            _symmetric(state[f"m2_{i}_{j}"], means[i].shape[-1])
            if i == j
            else jnp.asarray(state[f"m2_{i}_{j}"])
            for j in levels[i:]
        )
        for i in levels
    )
    return Moments(count, means, m2)


@jax.jit
def _lower_triangle(m2: Float32[Array, "r n d d"]) -> Float32[Array, "r n k"]:
    rows, columns = np.tril_indices(m2.shape[-1])
    return m2[:, :, rows, columns]


def _symmetric(packed: Float32[np.ndarray, "r n k"], size: int) -> Float32[Array, "r n d d"]:
    rows, columns = np.tril_indices(size)
    where = np.zeros((size, size), np.int32)
    where[rows, columns] = where[columns, rows] = np.arange(len(rows))
    return jnp.take(jnp.asarray(packed), where, axis=2)
