"""What identifies a backbone's weights, in the files of models; without JAX."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

_LONGEST_ORIGIN = 1000  # characters
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class WeightsIdentity:
    """Identity of the weights that a model was fitted with.

    Attributes:
      origin: hub repository and its commit, file name, or a statement that the weights are
        random or fixed.
      sha256: hex digest of the file's bytes; for random weights and filters, of the tensors'
        bytes (little-endian float32) in the order of their names.
    """

    origin: str
    sha256: str


def identity(stored: Any) -> WeightsIdentity:
    """Return the identity that a model's file states, as `dataclasses.asdict` made it.

    Raises:
      ValueError: it states something else.
    """
    if not isinstance(stored, Mapping) or set(stored) != {"origin", "sha256"}:
        raise ValueError("it does not say which weights it was fitted with")
    origin, sha256 = stored["origin"], stored["sha256"]
    if not isinstance(origin, str) or len(origin) > _LONGEST_ORIGIN:
        raise ValueError("the origin of its weights is no name")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError("its weights have no SHA-256")
    return WeightsIdentity(origin, sha256)
