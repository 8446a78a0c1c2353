"""MVTec AD from its publisher, when the user asks for it: downloaded, checked, unpacked.

It comes as one archive of all fifteen categories: 5.3 GB, and as much again unpacked.
"""

import http.client
import lzma
import os
import pathlib
import tarfile
import tempfile
from collections.abc import Callable

import tqdm

from padim_jax.config.datasets import MVTEC_AD
from padim_jax.data.layouts.mvtec_ad import URL
from padim_jax.errors import UserError
from padim_jax.system import fetch
from padim_jax.system.paths import Path

# Both as in anomalib 2.7.0. MVTec renews the link from time to time, the archive stays.
ARCHIVE_URL = (
    "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/"
    "download/420938113-1629960298/mvtec_anomaly_detection.tar.xz"
)
SHA256 = "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"
SCHEME = fetch.SCHEME
# The archive has 5.3e9, and as many unpacked.
MOST_BYTES = 6_000_000_000
MOST_UNPACKED = 2 * MOST_BYTES
LICENCE = (
    "MVTec AD, (c) MVTec Software GmbH, is licensed under CC BY-NC-SA 4.0 and not for "
    "commercial use: https://creativecommons.org/licenses/by-nc-sa/4.0/"
)


def mvtec_ad(root: Path, category: str) -> None:
    """Puts MVTec AD's category folders below `root`, unless `root/category` exists.

    The archive grows in a `.part` file beside `root`, from which an interrupted download
    goes on. Only once its SHA-256 is right are its folders moved to `root`, each in one
    step and none in place of what is there already.

    Args:
      root: the folder that holds, or is to hold, the category folders.
      category: the one that is needed; all fifteen are downloaded.

    Raises:
      UserError: MVTec AD has no such category, or the archive could not be had, checked
        or unpacked; with where to get it by hand.
    """
    if not isinstance(root, pathlib.Path):
        raise UserError(
            f"--download: config.dataset.root={root} is no folder of this machine, and only "
            "there archives are unpacked; download to one, and copy the category folders"
        )
    if (root / category).exists():
        print(f"{root / category}: is there already, nothing downloaded")
        return
    if not hasattr(tarfile, "data_filter"):
        raise UserError(
            "--download: this Python cannot unpack archives safely (tarfile has no filters); "
            f"expected 3.11.4 or later. Or get MVTec AD from {URL} and unpack it into {root}"
        )
    if category not in MVTEC_AD:
        raise UserError(
            f"--download: MVTec AD has no category {category!r}; expected config.category to "
            f"be one of {', '.join(MVTEC_AD)}"
        )
    print(LICENCE)
    # A browser's unfinished download, say, would have another name.
    part = root.resolve().parent / "mvtec_anomaly_detection.tar.xz.padim_jax.part"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Made first: that nothing can be written here should not come up 5 GB later.
        with tempfile.TemporaryDirectory(prefix=".unpacking_", dir=root) as unpacked:
            fetch.fetch(ARCHIVE_URL, part, SHA256, MOST_BYTES, SCHEME)
            _unpack(part, unpacked, root)
        part.unlink()
    except (
        *(fetch.RefusedError, OSError, http.client.HTTPException),
        *(tarfile.TarError, lzma.LZMAError, EOFError, ValueError),
    ) as error:
        kept = part.stat().st_size if part.is_file() else 0
        raise UserError(
            f"--download: {ARCHIVE_URL} could not be unpacked into config.dataset.root={root}: "
            f"{error}. Try again, or get MVTec AD from {URL} with a browser and unpack it so "
            f"that {root}/{category}/train/good, {root}/{category}/test and "
            f"{root}/{category}/ground_truth exist."
            + (f" {part} holds {kept} bytes; --download goes on from there." if kept else "")
        ) from error


def _unpack(archive: pathlib.Path, folder: str, root: pathlib.Path) -> None:
    """Unpacks into `folder`, then moves to `root` what is not there yet."""
    with tarfile.open(archive, "r:xz") as tar:
        members = tqdm.tqdm(tar, "unpack", disable=None, unit="file")
        tar.extractall(folder, members, filter=_limited(MOST_UNPACKED))  # noqa: S202 (filter)
    for entry in sorted(pathlib.Path(folder).iterdir()):
        target = root / entry.name
        if os.path.lexists(target):
            print(f"{target}: is there already, left as it is")
        else:
            entry.rename(target)


def _limited(most: int) -> Callable[[tarfile.TarInfo, str], tarfile.TarInfo]:
    """A filter of files and folders that lie within, of at most so many bytes together."""
    left = most

    def inside(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
        nonlocal left
        # The data filter refuses what leads out, but makes absolute names relative in silence.
        if member.name.startswith("/"):
            raise tarfile.AbsolutePathError(member)
        # Links could lead out with some versions of Python's filter; there are none.
        if not (member.isreg() or member.isdir()):
            raise tarfile.SpecialFileError(member)
        left -= member.size  # before a byte of it is written; of a sparse file what it claims
        if left < 0:
            raise tarfile.FilterError(f"{member.name!r}: more than {most} bytes unpacked")
        return tarfile.data_filter(member, folder)

    return inside
