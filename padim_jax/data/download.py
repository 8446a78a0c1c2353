"""Download of MVTec AD from its publisher on request, with check and unpacking.

It is one archive of all fifteen categories: 5.3 GB, and as much again when unpacked.
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

# Both as in anomalib 2.7.0. MVTec renews the link from time to time; the archive is unchanged.
ARCHIVE_URL = (
    "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/"
    "download/420938113-1629960298/mvtec_anomaly_detection.tar.xz"
)
SHA256 = "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"
SCHEME = fetch.SCHEME
# The archive has 5.3e9 bytes, and as many when unpacked.
MOST_BYTES = 6_000_000_000
MOST_UNPACKED = 2 * MOST_BYTES
LICENCE = (
    "MVTec AD, (c) MVTec Software GmbH, is licensed under CC BY-NC-SA 4.0 and not for "
    "commercial use: https://creativecommons.org/licenses/by-nc-sa/4.0/"
)


def mvtec_ad(root: Path, category: str) -> None:
    """Download MVTec AD's category folders to `root`, unless `root/category` exists.

    The archive is written to a `.part` file beside `root`, from which an interrupted download
    is resumed. After its SHA-256 has been verified, its folders are moved to `root`, each in
    one step; existing ones are not replaced.

    Args:
      root: folder of the category folders; created if missing.
      category: category needed; all fifteen are downloaded.

    Raises:
      UserError: MVTec AD has no such category, or the archive could not be downloaded, verified
        or unpacked; states how to get it by hand.
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
    # A name of our own, so as not to use a browser's unfinished download.
    part = root.resolve().parent / "mvtec_anomaly_detection.tar.xz.padim_jax.part"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Created first, so that a folder that is not writable is noticed before 5 GB are
        # downloaded.
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
    """Unpack into `folder`, then move to `root` what is not there yet."""
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
    """Return a filter that accepts contained files and folders of at most `most` bytes."""
    left = most

    def inside(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
        nonlocal left
        # The data filter rejects paths that lead out, but silently makes absolute names
        # relative.
        if member.name.startswith("/"):
            raise tarfile.AbsolutePathError(member)
        # Links could lead out with some versions of Python's filter; the archive has none.
        if not (member.isreg() or member.isdir()):
            raise tarfile.SpecialFileError(member)
        left -= member.size  # before a byte is written; a sparse file counts as it claims
        if left < 0:
            raise tarfile.FilterError(f"{member.name!r}: more than {most} bytes unpacked")
        return tarfile.data_filter(member, folder)

    return inside
