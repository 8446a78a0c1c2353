"""Checks of stored models, which are untrusted."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_LONGEST_REASON = 1000  # characters of a library's error
_NONE: dict[str, np.ndarray] = {}


def digest(stored: Mapping[str, Any], arrays: Mapping[str, np.ndarray] = _NONE) -> str:
    """Return the SHA-256 hex digest of JSON values, without "sha256" itself, and of arrays."""
    said = {key: value for key, value in stored.items() if key != "sha256"}
    found = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name in sorted(arrays):
        found.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        found.update(np.ascontiguousarray(arrays[name]).data)
    return found.hexdigest()


def require_digest(stored: Mapping[str, Any], arrays: Mapping[str, np.ndarray] = _NONE) -> None:
    """Raise ValueError unless `stored` and the arrays have the digest that `stored` states."""
    if stored.get("sha256") != digest(stored, arrays):
        raise ValueError("its contents are not what was saved")


def require_arrays(
    arrays: Mapping[str, Any],
    expected: Mapping[str, tuple[Sequence[str], Sequence[int | None]]],
) -> None:
    """Check names, types and shapes of arrays.

    Args:
      arrays: by name; or what has their `dtype` and `shape`, before memory is allocated.
      expected: types and shape by regular expression of the name; None for any length of an
        axis.

    Raises:
      ValueError: an array has another name, type or shape.
    """
    for name, array in arrays.items():
        types, shape = next((x for k, x in expected.items() if re.fullmatch(k, name)), ((), ()))
        wanted = tuple(zip(shape, array.shape, strict=False))
        equal = len(shape) == len(array.shape) and all(n in (None, m) for n, m in wanted)
        if not equal or str(array.dtype) not in types:
            raise ValueError(f"an array {name[:100]!r} of {array.dtype}, shape {array.shape}")


def reason(error: Exception) -> str:
    """Describe in one line an error of a parser, which may be of any type and length."""
    # TensorStore appends its complete specification.
    text = " ".join(str(error).partition(" [tensorstore_spec")[0].split())
    return f"{type(error).__name__}: {text[:_LONGEST_REASON]}"
