"""Download MVTec AD from its publisher, check it and unpack it, when the user asks for it.

It is one archive of all fifteen categories: 5.3 GB, and as much again unpacked.
"""

import contextlib
import lzma
import os
import pathlib
import shutil
import sys
import tarfile
import tempfile
import urllib.parse
from collections.abc import Callable
from typing import Any

import pooch
import tqdm

from padim_jax.config.datasets import MVTEC_AD
from padim_jax.data.layouts.mvtec_ad import URL
from padim_jax.errors import UserError
from padim_jax.system.paths import Path

# Both as in anomalib 2.7.0. MVTec renews the link from time to time; the archive is unchanged.
ARCHIVE_URL = (
    "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/"
    "download/420938113-1629960298/mvtec_anomaly_detection.tar.xz"
)
SHA256 = "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"
ARCHIVE = "mvtec_anomaly_detection.tar.xz"
FOLDER = ".padim_jax_download"  # below the root, so that folders can be renamed into place
MOST_UNPACKED = 12_000_000_000  # bytes; the archive has 5.3e9, and as many unpacked
LICENCE = (
    "MVTec AD, (c) MVTec Software GmbH, is licensed under CC BY-NC-SA 4.0 and not for "
    "commercial use: https://creativecommons.org/licenses/by-nc-sa/4.0/"
)


def mvtec_ad(root: Path, category: str) -> None:
    """Put MVTec AD's category folders below `root`, unless `root/category` exists.

    The archive is downloaded to a hidden folder of `root`. Only if its SHA-256 is right are
    its folders moved to `root`, each in one step and none in place of what exists already.
    An interrupted download starts again from the beginning; a complete archive that could
    not be unpacked is kept for the next call.

    Args:
      root: folder of the category folders; created if missing.
      category: category needed; all fifteen are downloaded.

    Raises:
      UserError: MVTec AD has no such category, or the archive could not be downloaded,
        checked or unpacked; says how to get it by hand.
    """
    if not isinstance(root, pathlib.Path):
        raise UserError(
            f"--download: config.dataset.root={root} is no folder of this machine, and only "
            "there archives are unpacked; download to one, and copy the category folders"
        )
    if (root / category).exists():
        print(f"{root / category}: exists already, nothing downloaded")
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
    folder = root / FOLDER
    try:
        archive = _archive(folder)
        with tempfile.TemporaryDirectory(dir=folder) as unpacked:
            _unpack(archive, unpacked, root)
        shutil.rmtree(folder)
    # Those of the network are OSErrors, a wrong hash is a ValueError.
    except (OSError, ValueError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        kept = folder / ARCHIVE
        raise UserError(
            f"--download: {ARCHIVE_URL} could not be unpacked into config.dataset.root={root}: "
            f"{error}. Try again, or get MVTec AD from {URL} with a browser and unpack it so "
            f"that {root}/{category}/train/good, {root}/{category}/test and "
            f"{root}/{category}/ground_truth exist."
            + (f" {kept} is kept for the next --download." if kept.exists() else "")
        ) from error
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if it is empty


def _archive(folder: pathlib.Path) -> pathlib.Path:
    """Return the archive in `folder`, complete and checked; download it if it is not there."""
    downloader = pooch.HTTPDownloader(
        progressbar=sys.stderr.isatty(),
        chunk_size=1 << 20,
        hooks={"response": require_https_redirect},
    )
    path = pooch.retrieve(
        ARCHIVE_URL,
        f"sha256:{SHA256}",
        fname=ARCHIVE,
        path=folder,
        # Its protocol for downloaders names the arguments otherwise than its own downloader.
        downloader=downloader,  # pyright: ignore[reportArgumentType]
    )
    return pathlib.Path(path)


def require_https_redirect(response: Any, **_: Any) -> None:
    """Refuse a redirect to another scheme than https, before it is followed.

    Args:
      response: a `requests.Response`, of which this is a hook.

    Raises:
      ValueError: it redirects to another scheme.
    """
    if not response.ok:
        response.close()  # pooch raises its error and leaves the connection open
    if response.is_redirect:
        target = urllib.parse.urljoin(response.url, response.headers["Location"])
        if urllib.parse.urlsplit(target).scheme != "https":
            response.close()
            raise ValueError(f"it redirects to {target}; expected an https address")


def _unpack(archive: pathlib.Path, folder: str, root: pathlib.Path) -> None:
    """Unpack into `folder`, then move to `root` what does not exist there yet."""
    with tarfile.open(archive, "r:xz") as tar:
        members = tqdm.tqdm(tar, "unpack", disable=None, unit="file")
        tar.extractall(folder, members, filter=_limited(MOST_UNPACKED))  # noqa: S202 (filter)
    for entry in sorted(pathlib.Path(folder).iterdir()):
        target = root / entry.name
        if os.path.lexists(target):
            print(f"{target}: exists already, left as it is")
        else:
            entry.rename(target)


def _limited(most: int) -> Callable[[tarfile.TarInfo, str], tarfile.TarInfo]:
    """Return a filter that accepts files and folders within, `most` bytes together."""
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
