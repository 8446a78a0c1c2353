"""Storage of a fitted model's statistics while its Gaussians are in use.

Finalizing consumes statistics in place: they are as large as the Gaussians. Whoever needs them
again, to leave images out or to add some, takes them from their store: a checkpoint's
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
from padim_jax.detector import geometry
from padim_jax.detector import statistics as statistics_lib
from padim_jax.detector.detector import Detector
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.store import calibration_file, checkpoint, model_file
from padim_jax.store.checkpoint import Fitted
from padim_jax.system.paths import Path


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """Statistics in a checkpoint's folder."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def statistics(self) -> tuple[Fitted, str]:
        """Return the statistics, on the devices and free to be consumed, and their identity."""
        return load_checkpoint(self.path, parallel.every())

    def write_thresholds(self, thresholds: Calibration, fingerprint: str) -> None:
        """Store thresholds in the checkpoint's folder, in the first process only.

        Args:
          thresholds: the thresholds.
          fingerprint: fingerprint of their detector.
        """
        if parallel.every().process == 0:
            calibration_file.write(self.path, thresholds, fingerprint)

    def read_thresholds(self, fingerprint: str) -> Calibration | None:
        """Return the thresholds of the detector with this fingerprint, or None."""
        return calibration_file.read(self.path, fingerprint)

    @property
    def calibration(self) -> str:
        """Return how to calibrate the detector, for a message."""
        return (
            f"--mode=calibrate --checkpoint={self.path} --input=<normal images that were not "
            "fitted>"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory:
    """Statistics in the memory of this process, which is the only one.

    Attributes:
      arrays: leaves of the statistics, on the host.
      structure: tree structure of the statistics.
      others: all other fields of a `Fitted`.
      identity: identity of the statistics.
    """

    arrays: Sequence[np.ndarray]
    structure: Any
    others: Mapping[str, Any]
    identity: str

    def __str__(self) -> str:
        return "the detector"

    @classmethod
    def keep(cls, fitted: Fitted, devices: Devices) -> "InMemory":
        """Copy statistics from the devices, where they stay unchanged.

        Args:
          fitted: the model.
          devices: devices of the statistics.

        Returns:
          The copy.
        """
        leaves, structure = jax.tree.flatten(fitted.statistics)
        others = {
            field.name: getattr(fitted, field.name)
            for field in dataclasses.fields(fitted)
            if field.name != "statistics"
        }
        identity = checkpoint.identity(fitted, devices)
        return cls([np.array(x) for x in leaves], structure, others, identity)

    def statistics(self) -> tuple[Fitted, str]:
        """Return the statistics, on the devices and free to be consumed, and their identity."""
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
        """Return how to calibrate the detector, for a message."""
        return "update(images, thresholds=<normal images that are not fitted>)"


Store = OnDisk | InMemory
"""Storage of one model's statistics and thresholds; `str` names the place."""


def load_checkpoint(path: Path, devices: Devices) -> tuple[Fitted, str]:
    """Load a checkpoint whose arrays match its configuration; see `checkpoint.load`.

    Args:
      path: its folder.
      devices: devices to place the statistics on.

    Returns:
      The checkpoint, and its identity.

    Raises:
      UserError: see there; or the arrays do not match.
    """
    fitted, identity = checkpoint.load(path, devices)
    require_whole(path, fitted, fitted.statistics)
    return fitted, identity


def require_whole(
    path: Path,
    model: Fitted | model_file.Model,
    arrays: Moments | Samples | Gaussian | LowRank,
) -> None:
    """Check what a checksum does not guarantee, which an untrusted file may set.

    Args:
      path: file or folder that was read.
      model: its contents.
      arrays: its statistics or Gaussians.

    Raises:
      UserError: the arrays do not match its configuration.
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
    """Return the detector of a model, whose statistics are consumed.

    Args:
      fitted: the model.
      identity: identity of its statistics.
      config: configuration in use.
      variables: variables of the backbone, and the projection.
      left_out: see `statistics.finalize`.

    Returns:
      The detector, without thresholds.

    Raises:
      UserError: see `statistics.finalize`.
    """
    return Detector(
        *(config, fitted.index, variables, fitted.weights, _finalize(fitted, left_out)),
        *(identity, fitted.images),
        left_out=left_out,
    )


def refinalize(detector: Detector, store: Store, left_out: int = 0) -> Detector:
    """Return the detector with Gaussians for `left_out` images left out at a time.

    The former Gaussians are deleted first, so that there is only one set of them in memory.

    Args:
      detector: fitted model; unusable afterwards, unless it already leaves out as many.
      store: store of its statistics.
      left_out: see `statistics.finalize`.

    Returns:
      The detector.

    Raises:
      UserError: the store holds another model by now, or see `statistics.finalize`.
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
    """Statistics that are not finite because of some image."""


def _finalize(fitted: Fitted, left_out: int = 0) -> Gaussian | LowRank:
    config = fitted.config
    regularization = config.model.regularization
    try:
        return statistics_lib.finalize(fitted.statistics, regularization, left_out)
    except statistics_lib.RegionError as error:
        index = fitted.index.tolist()
        place = geometry.place(config.image, config.model, index, error.region)
        if not error.finite:
            raise NotFiniteError(f"{error} ({place})") from error
        raise UserError(f"config.model.regularization: {error} ({place})") from error
    except ValueError as error:
        raise UserError(f"config.model.regularization: {error}") from error
