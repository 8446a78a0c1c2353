"""Which images results are of: told by what was read, and not by a name.

An evaluation keeps `read` of its images in metrics.json. Two evaluations are of the same data
set if their images come from the same folder, though there may be other ones by now, or if all
files, labels and masks are the same, wherever they lie.
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
    """Return where a configuration's images are: the root, and the category below it."""
    path = os.fspath(paths.absolute(config.dataset.root) / config.category)
    return path.encode("utf-8", "backslashreplace").decode()  # for a file that is UTF-8


def read(config: Config, sources: Mapping[str, Source], devices: Devices) -> dict[str, Any]:
    """Read all images and masks, and return what tells them from others.

    A collective: every process reads its share, and gets the same.

    Args:
      config: where they are.
      sources: the splits, by name.
      devices: among whose processes the files are shared out.

    Returns:
      JSON values: `folder`, see there, and `images`, for each split a SHA-256 hex digest of
      every record's label, defect type and relative path, of its file and of its mask's. Of a
      file that cannot be read the name counts alone.
    """
    images = {}
    for split, source in sources.items():

        def digests(index: int, source: Source = source) -> list[str]:
            try:
                files = source.read(index)
            except UserError:  # decoding it will tell
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
    """Return whether two results of `read` are of one data set, grown perhaps, or moved."""
    theirs, ours = stored["images"], now["images"]
    shared = theirs.keys() & ours.keys()
    moved = bool(shared) and all(theirs[split] == ours[split] for split in shared)
    return moved or stored["folder"] == now["folder"]
