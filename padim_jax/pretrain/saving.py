"""A training in progress, in Orbax checkpoints: one folder per save, the newest one counts."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.system import library_logs, paths
from padim_jax.system.paths import Path

Tree = TypeVar("Tree")
History = list[list[float | int]]

# Part of Orbax's names of what is not, or not yet, completely written.
_UNFINISHED = ".orbax-checkpoint-tmp"


def save(
    folder: Path,
    step: int,
    state: Any,
    recipe: Mapping[str, Any],
    history: History,
    devices: Devices,
) -> None:
    """Save, and then remove the earlier save.

    Args:
      folder: folder for all saves of one training.
      step: number of steps done.
      state: host arrays, equal in all processes.
      recipe: recipe of the training, for JSON: only the same recipe can resume it.
      history: measurements.
      devices: devices of all processes, which call this together.

    Raises:
      UserError: for example a full disk; the earlier save is unchanged.
    """
    place = paths.absolute(folder) / str(step)
    leaves = {f"{i:04d}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    metadata = {"recipe": dict(recipe), "history": history}
    if devices.process == 0:
        paths.make_folder(folder)
        _remove_leftovers(folder)
        paths.remove_folder(place)
    parallel.agreed(step)
    try:
        with library_logs.held_back("orbax"):
            ocp.save(os.fspath(place), leaves, custom_metadata=metadata)
        paths.flush(place)  # before the earlier one is removed
    except Exception as error:
        if devices.process == 0:
            with contextlib.suppress(OSError):  # a partial save fills a full disk
                _remove_leftovers(folder)
        if (reason := paths.explanation(error, folder)) is None:
            raise
        raise UserError(f"{reason}. What was saved before is as it was") from error
    if devices.process == 0:
        for number in _numbered(folder):
            if number != step:
                paths.remove_folder(folder / str(number))
    parallel.agreed(step)


def load(
    folder: Path, state: Tree, recipe: Mapping[str, Any], devices: Devices
) -> tuple[int, Tree, History] | None:
    """Return the newest save.

    Args:
      folder: see `save`.
      state: a state of the same structure, shapes and types.
      recipe: recipe to resume.
      devices: devices of all processes, which call this together.

    Returns:
      Steps done, the state, and the history; None if there is no save.

    Raises:
      UserError: it was made with another recipe, or cannot be read.
    """
    numbers = sorted(_numbered(folder)) if paths.is_folder(folder) else []
    step = parallel.agreed(numbers[-1] if numbers else -1)
    if step < 0:
        return None
    place = paths.absolute(folder) / str(step)
    leaves, structure = jax.tree.flatten(state)
    target = {
        f"{i:04d}": jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=parallel.everywhere(devices)
        )
        for i, x in enumerate(leaves)
    }
    try:
        with library_logs.held_back("orbax"):
            metadata: Any = ocp.metadata(os.fspath(place)).custom_metadata
            theirs = metadata["recipe"]
        if theirs != dict(recipe):
            raise UserError(
                f"{folder}: holds an unfinished training by another recipe or of other images "
                "or first weights; go on with those, name another --workdir, or move the "
                "folder away"
            )
        with library_logs.held_back("orbax"):
            found: Any = ocp.load(os.fspath(place), target)
        history = metadata["history"]
    except UserError:
        raise
    # Readers raise arbitrary exceptions on damaged files.
    except Exception as error:
        raise UserError(
            f"{place}: cannot be read ({type(error).__name__}): damaged, or written by "
            "another version of Orbax; move it away, and training begins anew"
        ) from error
    values = [np.asarray(found[f"{i:04d}"]) for i in range(len(leaves))]
    return step, jax.tree.unflatten(structure, values), history


def _numbered(folder: Path) -> list[int]:
    return [int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()]


def _remove_leftovers(folder: Path) -> None:
    for entry in list(folder.iterdir()):
        if _UNFINISHED in entry.name:
            paths.remove_folder(entry)
