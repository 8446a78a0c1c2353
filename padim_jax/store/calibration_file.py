"""Calibration of a stored model: calibration.json in the checkpoint's folder."""

import json
from typing import Any

from padim_jax.core import calibration as calibration_lib
from padim_jax.core.calibration import Calibration
from padim_jax.errors import UserError
from padim_jax.system import paths
from padim_jax.system.paths import Path

NAME = "calibration.json"
_LONGEST = 10_000_000  # bytes; it has a few thousand


def write(folder: Path, calibration: Calibration, detector: str) -> None:
    """Write `folder/calibration.json`; a crash leaves an earlier file unchanged.

    Args:
      folder: the checkpoint's folder.
      calibration: calibration to write.
      detector: fingerprint of the detector that gave the scores.

    Raises:
      UserError: it cannot be written.
    """
    stored = calibration_lib.to_dict(calibration, detector)
    content = json.dumps(stored, indent=1, allow_nan=False).encode() + b"\n"
    try:
        with paths.replacing(folder / NAME) as growing:  # the folder may have been removed
            growing.write_bytes(content)
    except OSError as error:
        raise UserError(f"{folder / NAME}: cannot be written ({error})") from error


def read(folder: Path, *detector: str) -> Calibration | None:
    """Read a calibration written by `write`.

    Args:
      folder: the checkpoint's folder.
      detector: fingerprints of the detector in use. A calibration of another detector (extended
        by images since, or with other map settings) is not used, and a line is printed.

    Returns:
      The calibration, or None if there is none for this detector.

    Raises:
      UserError: the file is damaged.
    """
    path = folder / NAME
    try:
        if not path.exists():
            return None
        with path.open("rb") as file:
            content = file.read(_LONGEST + 1)
        if len(content) > _LONGEST:
            raise ValueError(f"more than {_LONGEST} bytes")
        stored = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, error) from error
    return restore(path, stored, *detector)


def restore(path: Path, stored: Any, *detector: str) -> Calibration | None:
    """Return the calibration stored by `calibration.to_dict` in any file; see `read`.

    Args:
      path: path of the file, for messages.
      stored: result of `calibration.to_dict`.
      detector: fingerprints of the detector in use.

    Returns:
      The calibration, or None if it belongs to another detector.

    Raises:
      UserError: the file is damaged.
    """
    try:
        found = calibration_lib.from_dict(stored, *detector)
    except ValueError as error:
        raise _broken(path, error) from error
    if found is None:
        print(
            f"{path}: thresholds of another state of the model, or of other map settings; not "
            "used. For new ones: --mode=calibrate --input=<normal images that were not fitted>"
        )
    return found


def _broken(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path}: thresholds that cannot be read ({error}); move a checkpoint's {NAME} away "
        "(then --mode=calibrate finds new ones), export a model file again"
    )
