"""Where a fitted model keeps its statistics while its Gaussians are in use.

Finalizing uses statistics up, in place: they are as large as the Gaussians. Whoever needs them
again, to leave images out or to add some, takes them from where they are kept: a checkpoint's
folder, or the memory of the process that fitted the model.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from padim_jax.config.settings import Config
from padim_jax.core.calibration import Calibration
from padim_jax.core.types import Gaussian, LowRank, Moments, Samples
from padim_jax.detector import detector as detector_lib
from padim_jax.detector.detector import Detector
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.store import calibration_file, checkpoint, model_file
from padim_jax.store.checkpoint import Fitted
from padim_jax.system.paths import Path


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """A checkpoint's folder."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def statistics(self) -> tuple[Fitted, str]:
        """Return the statistics, on the devices and free to be used up, and their identity."""
        return load_checkpoint(self.path, parallel.every())

    def write_thresholds(self, thresholds: Calibration, fingerprint: str) -> None:
        """Keep the thresholds of the detector with this fingerprint; in the first process."""
        if parallel.every().process == 0:
            calibration_file.write(self.path, thresholds, fingerprint)

    def read_thresholds(self, fingerprint: str) -> Calibration | None:
        """Return those of the detector with this fingerprint, if there are any."""
        return calibration_file.read(self.path, fingerprint)

    @property
    def calibration(self) -> str:
        """How a person finds thresholds, for a message."""
        return (
            f"--mode=calibrate --checkpoint={self.path} --input=<normal images that were not "
            "fitted>"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory:
    """The memory of this process, which is the only one.

    Attributes:
      arrays: the statistics' numbers, on the host.
      structure: of the tree that they are the leaves of.
      others: all else of a `Fitted`.
      identity: of the statistics.
    """

    arrays: Sequence[np.ndarray]
    structure: Any
    others: Mapping[str, Any]
    identity: str

    def __str__(self) -> str:
        return "the detector"

    @classmethod
    def keep(cls, fitted: Fitted, devices: Devices) -> "InMemory":
        """Copy statistics from the devices, where they stay as they are."""
        leaves, structure = jax.tree.flatten(fitted.statistics)
        others = {
            field.name: getattr(fitted, field.name)
            for field in dataclasses.fields(fitted)
            if field.name != "statistics"
        }
        identity = checkpoint.identity(fitted, devices)
        return cls([np.array(x) for x in leaves], structure, others, identity)

    def statistics(self) -> tuple[Fitted, str]:
        """Return the statistics, on the devices and free to be used up, and their identity."""
        placed = parallel.on_devices(self.arrays, parallel.every())
        fitted = Fitted(statistics=self.structure.unflatten(placed), **self.others)
        return fitted, self.identity

    def write_thresholds(self, thresholds: Calibration, fingerprint: str) -> None:
        """Do nothing: the detector itself has them."""

    def read_thresholds(self, fingerprint: str) -> Calibration | None:
        """Return None; see `OnDisk`."""
        return None

    @property
    def calibration(self) -> str:
        """See `OnDisk`."""
        return "update(images, thresholds=<normal images that are not fitted>)"


Store = OnDisk | InMemory
"""Where the statistics and the thresholds of one model are kept; `str` names the place."""


def load_checkpoint(path: Path, devices: Devices) -> tuple[Fitted, str]:
    """`checkpoint.load` of a model whose arrays are those of its configuration.

    Raises:
      UserError: see there; or they are not.
    """
    fitted, identity = checkpoint.load(path, devices)
    require_whole(path, fitted, fitted.statistics)
    return fitted, identity


def require_whole(
    path: Path,
    model: Fitted | model_file.Model,
    arrays: Moments | Samples | Gaussian | LowRank,
) -> None:
    """Makes sure of what a file's checksum does not tell: a stranger's is right for anything.

    Args:
      path: the file or folder.
      model: what was read from it.
      arrays: its statistics or Gaussians.

    Raises:
      UserError: the arrays are not those of its configuration.
    """
    try:
        detector_lib.require_fitting(
            model.config, model.index, arrays, len(model.images), model.projection
        )
    except ValueError as error:
        raise UserError(
            f"{path}: the model is broken ({error}); fit again or restore it from a copy"
        ) from error


def ready(
    fitted: Fitted, identity: str, config: Config, variables: Any, left_out: int = 0
) -> Detector:
    """Return the detector of a model, whose statistics are used up.

    Args:
      fitted: the model.
      identity: of its statistics.
      config: in use.
      variables: the backbone's, and the projection.
      left_out: see `detector.finalize`.

    Raises:
      UserError: see `detector.finalize`.
    """
    return Detector(
        *(config, fitted.index, variables, fitted.weights, _finalize(fitted, left_out)),
        *(identity, fitted.images),
        left_out=left_out,
    )


def refinalize(detector: Detector, store: Store, left_out: int = 0) -> Detector:
    """Return the same detector with Gaussians for so many images left out at a time.

    The former Gaussians are given up first, so that there is never more than one of them in
    memory.

    Args:
      detector: fitted; not to be used any more, unless it is what is asked for already.
      store: where its statistics are kept.
      left_out: see `detector.finalize`.

    Raises:
      UserError: the store has another model by now, or see `detector.finalize`.
    """
    if detector.left_out == left_out:
        return detector
    for array in jax.tree.leaves(detector.gaussian):
        array.delete()
    fitted, identity = store.statistics()
    if identity != detector.identity:
        raise UserError(f"{store}: replaced by another model meanwhile; start again")
    gaussian = _finalize(fitted, left_out)
    return dataclasses.replace(detector, gaussian=gaussian, left_out=left_out)


class NotFiniteError(UserError):
    """Statistics to which some image has added what is no number."""


def _finalize(fitted: Fitted, left_out: int = 0) -> Gaussian | LowRank:
    config = fitted.config
    regularization = config.model.regularization
    try:
        return detector_lib.finalize(fitted.statistics, regularization, left_out)
    except detector_lib.RegionError as error:
        index = fitted.index.tolist()
        place = detector_lib.place(config.image, config.model, index, error.region)
        if not error.finite:
            raise NotFiniteError(f"{error} ({place})") from error
        raise UserError(f"config.model.regularization: {error} ({place})") from error
    except ValueError as error:
        raise UserError(f"config.model.regularization: {error}") from error
