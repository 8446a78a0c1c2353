"""Calibration of a stored model: calibration.json in the checkpoint's folder."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

import padim_jax
from padim_jax.core import combined_score
from padim_jax.core.calibration import MIN_IMAGES, ORIGINS, Calibration
from padim_jax.errors import UserError
from padim_jax.store import validation
from padim_jax.system import paths
from padim_jax.system.paths import Path

NAME = "calibration.json"
_LONGEST = 10_000_000  # bytes; it has a few thousand
_FORMAT = "padim_jax calibration 2"
_SUMMARIES = ("summary_means", "summary_deviations")
_LISTS = ("quantiles", "levels", "rates", "rate_thresholds", "scores", *_SUMMARIES)
_ASIDE = {"format", "version", "detector", "sha256"}
_LONGEST_WARNING = 100_000
_LARGEST = float(np.finfo(np.float32).max)  # of values compared with scores
_MOST_IMAGES = 2**31


def write(folder: Path, calibration: Calibration, detector: str) -> None:
    """Write `folder/calibration.json`; a crash leaves an earlier file unchanged.

    Args:
      folder: the checkpoint's folder.
      calibration: calibration to write.
      detector: fingerprint of the detector that gave the scores.

    Raises:
      UserError: it cannot be written.
    """
    stored = to_dict(calibration, detector)
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
    """Return the calibration stored by `to_dict` in any file; see `read`.

    Args:
      path: path of the file, for messages.
      stored: result of `to_dict`.
      detector: fingerprints of the detector in use.

    Returns:
      The calibration, or None if it belongs to another detector.

    Raises:
      UserError: the file is damaged.
    """
    try:
        found = from_dict(stored, *detector)
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


def to_dict(calibration: Calibration, detector: str) -> dict[str, Any]:
    """Convert to a dict ready for JSON, which `from_dict` reads.

    Args:
      calibration: calibration to store.
      detector: fingerprint of the detector that gave the scores.

    Returns:
      The fields with format, version, detector and digest.
    """
    fields = {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(calibration)
        # Defaults are left out, so that older versions can read the file if it needs no new
        # field.
        if (value := getattr(calibration, field.name)) != field.default
    }
    about = {"format": _FORMAT, "version": padim_jax.__version__, "detector": detector}
    said = about | fields
    return said | {"sha256": validation.digest(said)}


def from_dict(stored: Any, *detector: str) -> Calibration | None:
    """Return the stored calibration, or None if it belongs to another detector.

    Args:
      stored: result of `to_dict`, from this version or another one.
      detector: fingerprints accepted as this detector's.

    Returns:
      The calibration; None if it belongs to another detector (fitted again since, say).

    Raises:
      ValueError: `stored` was not made by `to_dict`, or has a field unknown to this version.
    """
    if not isinstance(stored, Mapping) or stored.get("format") != _FORMAT:
        raise ValueError(f"expected a group with format {_FORMAT!r}")
    every = dataclasses.fields(Calibration)
    known = {x.name: None if x.default is dataclasses.MISSING else x.default for x in every}
    if unknown := sorted(map(str, set(stored) - known.keys() - _ASIDE)):
        raise ValueError(
            f"{', '.join(unknown)[:200]}: unknown to padim_jax {padim_jax.__version__}; "
            f"padim_jax {str(stored.get('version'))[:60]} wrote it"
        )
    fields: dict[str, Any] = {name: stored.get(name, known[name]) for name in known}
    _check(fields)
    if not isinstance(stored.get("detector"), str):
        raise ValueError("it does not say of which detector it is")
    validation.require_digest(stored)
    if stored["detector"] not in detector:
        return None
    fields |= {name: tuple(fields[name]) for name in _LISTS}
    return Calibration(**fields)


def _check(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if not _valid(name, value):
            raise ValueError(f"{name}={repr(value)[:60]}")
    if not fields["tail_images"] <= (fields["groups"] or fields["images"]) <= fields["images"]:
        raise ValueError("more groups than images, or more images in the tail than there are")
    if len(fields["quantiles"]) != len(fields["levels"]):
        raise ValueError("as many levels as quantiles were expected")
    if len(fields["rates"]) != len(fields["rate_thresholds"]):
        raise ValueError("as many thresholds as rates were expected")
    if {len(fields[name]) for name in _SUMMARIES} not in ({0}, {combined_score.COMBINED}):
        raise ValueError(
            f"{combined_score.COMBINED} means and deviations of summaries, or none"
        )


def _valid(name: str, value: Any) -> bool:
    if name == "origin":
        return isinstance(value, str) and value in ORIGINS
    if name == "decide":
        return isinstance(value, str) and value in ("score", "regions", "either")
    if name == "warning":
        return isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST_WARNING
    if name == "groups" and value is None:
        return True
    if name in ("images", "groups", "tail_images"):
        least = 1 if name == "tail_images" else MIN_IMAGES
        return type(value) is int and least <= value <= _MOST_IMAGES
    if name in _LISTS:
        return _valid_list(name, value)
    if type(value) is not float or not abs(value) <= _LARGEST:
        return False
    if name.endswith("rate"):
        return 0 < value < 1 or (name == "pixel_rate" and value == 0)
    return value >= 0 if name in ("tail_excess", "min_area", "close") else True


def _valid_list(name: str, value: Any) -> bool:
    # Fields added later are empty in files written before.
    later = ("rates", "rate_thresholds", "scores", *_SUMMARIES)
    if name in later and value in ((), []):
        return True
    if not isinstance(value, list) or not value or {type(x) for x in value} != {float}:
        return False
    array = np.array(value)
    if not np.all(np.abs(array) <= _LARGEST):  # false for NaN
        return False
    if name in _SUMMARIES:
        return name == "summary_means" or bool(np.all(array >= 0))
    steps = np.diff(array)
    if name in ("rate_thresholds", "scores"):  # some may be equal
        return bool(np.all((steps if name == "scores" else -steps) >= 0))
    shares = name == "quantiles" or 0 < array[0] <= array[-1] < 1
    return bool(shares and np.all(steps > 0))
