"""MVTec AD from its publisher, when the user asks for it: downloaded, checked, unpacked.

It comes as one archive of all fifteen categories: 5.3 GB, and as much again unpacked.
"""

import hashlib
import http.client
import os
import pathlib
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request

import tqdm

from padim_jax.datasets.mvtec_ad import CATEGORIES, URL
from padim_jax.errors import UserError
from padim_jax.paths import Path

# Both as in anomalib 2.7.0. MVTec renews the link from time to time, the archive stays.
ARCHIVE_URL = (
    "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/"
    "download/420938113-1629960298/mvtec_anomaly_detection.tar.xz"
)
SHA256 = "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"
SCHEME = "https"  # of the archive's address, and of all that it redirects to
LICENCE = (
    "MVTec AD, (c) MVTec Software GmbH, is licensed under CC BY-NC-SA 4.0 and not for "
    "commercial use: https://creativecommons.org/licenses/by-nc-sa/4.0/"
)


class _RefusedError(Exception):
    """What came is not what was asked for."""


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
    if category not in CATEGORIES:
        raise UserError(
            f"--download: MVTec AD has no category {category!r}; expected config.category to "
            f"be one of {', '.join(CATEGORIES)}"
        )
    print(LICENCE)
    part = root.resolve().parent / "mvtec_anomaly_detection.tar.xz.part"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Made first: that nothing can be written here should not come up 5 GB later.
        with tempfile.TemporaryDirectory(prefix=".unpacking_", dir=root) as unpacked:
            _download(part)
            _unpack(part, unpacked, root)
        part.unlink()
    except (_RefusedError, OSError, http.client.HTTPException, tarfile.TarError) as error:
        kept = part.stat().st_size if part.is_file() else None
        if kept == 0:
            part.unlink()
        raise UserError(
            f"--download: {ARCHIVE_URL} could not be unpacked into config.dataset.root={root}: "
            f"{error}. Try again, or get MVTec AD from {URL} with a browser and unpack it so "
            f"that {root}/{category}/train/good, {root}/{category}/test and "
            f"{root}/{category}/ground_truth exist."
            + (f" {part} holds {kept} bytes; --download goes on from there." if kept else "")
        ) from error


def _download(part: pathlib.Path) -> None:
    """Makes `part` the complete archive, starting from what it holds already."""
    with part.open("a+b") as file:
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")
        if digest.hexdigest() == SHA256:  # it was the unpacking that did not succeed
            return
        with _request(file.tell()) as response:
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:  # all of it, from the start
                file.seek(0)
                file.truncate()
                digest = hashlib.sha256()
            start = file.tell()
            total = start + int(response.headers.get("Content-Length", 0))
            with tqdm.tqdm(
                desc="download",
                total=total,
                initial=start,
                unit="B",
                unit_scale=True,
                disable=None,
            ) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
        size = file.tell()
    if size < total:
        raise _RefusedError(f"the connection ended after {size} of {total} bytes")
    if digest.hexdigest() != SHA256:
        # Nothing can go on from it, and nothing may take it for the archive.
        part.unlink()
        raise _RefusedError(
            f"it gave {size} bytes with SHA-256 {digest.hexdigest()}, expected {SHA256}; they "
            "were deleted"
        )


def _request(start: int) -> http.client.HTTPResponse:
    """Asks for the archive from byte `start` on; the answer may be all of it."""
    if not _allowed(ARCHIVE_URL):
        raise _RefusedError(f"no {SCHEME} address")
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(ARCHIVE_URL, headers=headers)
    try:
        return urllib.request.build_opener(_Redirects).open(request, timeout=60)
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return _request(0)  # as many bytes as the archive has, but wrong ones
        raise


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if not _allowed(newurl):
            msg = f"redirects to {newurl}, no {SCHEME} address"
            raise urllib.error.HTTPError(req.full_url, code, msg, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _allowed(url: str) -> bool:
    return urllib.parse.urlsplit(url).scheme == SCHEME


def _unpack(archive: pathlib.Path, folder: str, root: pathlib.Path) -> None:
    """Unpacks into `folder`, then moves to `root` what is not there yet."""
    with tarfile.open(archive, "r:xz") as tar:
        members = tqdm.tqdm(tar, "unpack", disable=None, unit="file")
        tar.extractall(folder, members, filter=_inside)
    for entry in sorted(pathlib.Path(folder).iterdir()):
        target = root / entry.name
        if os.path.lexists(target):
            print(f"{target}: is there already, left as it is")
        else:
            entry.rename(target)


def _inside(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    # The data filter refuses what leads out, but makes absolute names relative in silence.
    if member.name.startswith("/"):
        raise tarfile.AbsolutePathError(member)
    return tarfile.data_filter(member, folder)
