"""Fitted models on disk; the only module that knows Orbax.

A checkpoint is one Orbax folder. Its state holds the statistics (count, mean, the
lower triangles of M2) and the channel index; its custom metadata, JSON, holds the
configuration, the identity of the backbone's weights and the library's version.
The moments and not their factorisation are kept, so that models can be extended and
merged; factorising takes well under a second.
"""

import dataclasses
import os
import pathlib
import shutil
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
from padim_jax.types import Moments

# Raised when a reader of the older form would misread the newer.
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a checkpoint holds.

    Attributes:
      config: as the model was fitted with.
      index: the channels kept, in the embedding's order.
      moments: of all images fitted.
      weights: identity of the backbone's weights, which the checkpoint does not hold.
    """

    config: Config
    index: Int[np.ndarray, " d"]
    moments: Moments
    weights: WeightsIdentity


def save(path: pathlib.Path, fitted: Fitted) -> None:
    """Writes a checkpoint; a crash leaves the old one, the new one or both, never half.

    Args:
      path: the folder to write; an existing checkpoint there is replaced.
      fitted: what to write.

    Raises:
      UserError: `path` exists and is no checkpoint.
    """
    path = path.absolute()
    if path.exists() and not ocp.is_orbax_checkpoint(os.fspath(path)):
        raise UserError(f"{path}: exists and is no checkpoint; move it away first")
    new, old = (path.with_name(f"{path.name}.{suffix}") for suffix in ("new", "old"))
    state = {
        "count": np.asarray(fitted.moments.count),
        "mean": np.asarray(fitted.moments.mean),
        "m2": np.asarray(_pack(fitted.moments.m2)),
        "index": fitted.index,
    }
    metadata = {
        "format": _FORMAT,
        "version": padim_jax.__version__,
        "config": config_lib.to_dict(fitted.config),
        "weights": dataclasses.asdict(fitted.weights),
    }
    # Orbax writes atomically, but deletes what it overwrites before it begins.
    ocp.save(os.fspath(new), state, overwrite=True, custom_metadata=metadata)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def load(path: str | os.PathLike[str]) -> Fitted:
    """Reads a checkpoint.

    Raises:
      UserError: there is no checkpoint, or it is broken or of another format.
    """
    folder = pathlib.Path(path).absolute()
    if not ocp.is_orbax_checkpoint(os.fspath(folder)):
        raise UserError(_no_checkpoint(folder))
    try:
        info = ocp.metadata(os.fspath(folder))
        metadata: Any = info.custom_metadata
        _check_format(folder, metadata)
        config = config_lib.validate(metadata["config"])
        weights = WeightsIdentity(**metadata["weights"])
        # Read into host arrays; unpacking moves them to the device.
        leaves: Any = info.metadata
        target = {key: np.empty(leaf.shape, leaf.dtype) for key, leaf in leaves.items()}
        arrays: Any = ocp.load(os.fspath(folder), target)
        channels = arrays["mean"].shape[1]
        moments = Moments(
            count=jnp.asarray(arrays["count"]),
            mean=jnp.asarray(arrays["mean"]),
            m2=_unpack(jnp.asarray(arrays["m2"]), channels),
        )
        return Fitted(config, arrays["index"], moments, weights)
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(
            f"{folder}: the checkpoint is broken ({type(error).__name__}: {error}); fit again "
            "or restore it from a copy"
        ) from error


def _check_format(folder: pathlib.Path, metadata: dict[str, Any]) -> None:
    if metadata["format"] != _FORMAT:
        raise UserError(
            f"{folder}: checkpoint of format {metadata['format']} written by padim_jax "
            f"{metadata['version']}; this is padim_jax {padim_jax.__version__}, which reads "
            f"format {_FORMAT}"
        )


def _no_checkpoint(folder: pathlib.Path) -> str:
    old = folder.with_name(f"{folder.name}.old")
    if old.is_dir() and not folder.exists():
        return (
            f"{folder}: not there, but {old} is: saving was interrupted while the old "
            f"checkpoint was being replaced. Rename {old} to {folder.name} to use it"
        )
    what = "is no checkpoint" if folder.exists() else "no such checkpoint"
    return f"{folder}: {what}; fit a model first (--mode=train) or name one with --checkpoint"


@jax.jit
def _pack(m2: Float32[Array, "p d d"]) -> Float32[Array, "p k"]:
    rows, columns = np.tril_indices(m2.shape[-1])
    return m2[:, rows, columns]


def _unpack(packed: Float32[Array, "p k"], channels: int) -> Float32[Array, "p d d"]:
    rows, columns = np.tril_indices(channels)
    where = np.zeros((channels, channels), np.int32)
    where[rows, columns] = where[columns, rows] = np.arange(len(rows))
    return jnp.take(packed, where, axis=1)
