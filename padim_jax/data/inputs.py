"""Identity of the images behind results: by content, not by name.

An evaluation stores `read` of its images in metrics.json. Two evaluations have the same data
set if their images come from the same folder, even if it has changed since, or if all files,
labels and masks are equal, wherever they lie.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from padim_jax.config.settings import Config
from padim_jax.data import passes
from padim_jax.data.records import Source
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.system import paths

KEY = "inputs"  # in metrics.json


def folder(config: Config) -> str:
    """Return the folder of a configuration's images: the root, and the category below it."""
    path = os.fspath(paths.absolute(config.dataset.root) / config.category)
    return path.encode("utf-8", "backslashreplace").decode()  # for a UTF-8 file


def read(config: Config, sources: Mapping[str, Source], devices: Devices) -> dict[str, Any]:
    """Read all images and masks, and return their identity. A collective.

    Args:
      config: configuration with the dataset's folder.
      sources: splits, by name.
      devices: devices whose processes share the files.

    Returns:
      JSON values, equal in all processes: `folder`, see there, and `images`: for each split a
      SHA-256 hex digest of all records' labels, defect types and relative paths, of their files
      and masks. Unreadable files count by name only.
    """
    images = {}
    for split, source in sources.items():

        def digests(index: int, source: Source = source) -> list[str]:
            try:
                files = source.read(index)
            except UserError:  # decoding it will report the error
                return ["", ""]
            return ["" if x is None else hashlib.sha256(x).hexdigest() for x in files]

        whole = hashlib.sha256()
        facts = passes.of_files(source, "compare", devices, digests)
        for record, files in zip(source.records, facts, strict=True):
            described = [record.label, record.defect_type, record.relative_path, *files]
            whole.update(json.dumps(described).encode())
        images[split] = whole.hexdigest()
    return {"folder": folder(config), "images": images}


def are_same_data(stored: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether two results of `read` are of one data set, possibly grown or moved.

    Args:
      stored: result stored earlier.
      now: result of the current images.

    Returns:
      True if the folders or all digests of the splits in common are equal.
    """
    theirs, ours = stored["images"], now["images"]
    shared = theirs.keys() & ours.keys()
    moved = bool(shared) and all(theirs[split] == ours[split] for split in shared)
    return moved or stored["folder"] == now["folder"]
