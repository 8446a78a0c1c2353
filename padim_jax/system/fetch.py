"""A file from the internet: over TLS alone, of a known size, by its hash, resumed.

What it is to become is the caller's; here it grows in a file that nobody takes for whole.
"""

import hashlib
import http.client
import pathlib
import urllib.error
import urllib.parse
import urllib.request

import tqdm

SCHEME = "https"  # of addresses, and of all that they redirect to


class RefusedError(Exception):
    """What came is not what was asked for."""


def fetch(url: str, part: pathlib.Path, sha256: str, most: int, scheme: str = SCHEME) -> None:
    """Makes `part` the complete file, starting from what it holds already.

    If that turns out to be no beginning of the file, it is deleted.

    Args:
      url: the file's.
      part: where it grows, by a name that is nobody else's; an interrupted download goes on
        from there.
      sha256: the file's, hex.
      most: bytes; where there are more the download ends.
      scheme: of the addresses.

    Raises:
      RefusedError: another scheme, too many bytes, or others than published.
      OSError: of the network or the disk.
      http.client.HTTPException: of the network.
    """
    try:
        _fetch(url, part, sha256, most, scheme)
    except BaseException:
        if part.is_file() and part.stat().st_size == 0:
            part.unlink()
        raise


def _fetch(url: str, part: pathlib.Path, sha256: str, most: int, scheme: str) -> None:
    with part.open("a+b") as file:
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")
        if digest.hexdigest() == sha256:  # it was what follows that did not succeed
            return
        with _request(url, file.tell(), scheme) as response:
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:  # all of it, from the start
                file.seek(0)
                file.truncate()
                digest = hashlib.sha256()
            start = file.tell()
            total = start + int(response.headers.get("Content-Length", 0))
            size = start
            with tqdm.tqdm(
                desc="download",
                total=total,
                initial=start,
                unit="B",
                unit_scale=True,
                disable=None,
            ) as bar:
                while size <= most and total <= most and (chunk := response.read(1 << 20)):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
                    size += len(chunk)
    if (offered := max(size, total)) > most:
        part.unlink()
        raise RefusedError(f"it gives {offered} bytes or more; expected at most {most}")
    if size < total:
        raise RefusedError(f"the connection ended after {size} of {total} bytes")
    if digest.hexdigest() != sha256:
        # Nothing can go on from it, and nothing may take it for the file.
        part.unlink()
        raise RefusedError(
            f"it gave {size} bytes with SHA-256 {digest.hexdigest()}, expected {sha256}; they "
            "were deleted"
        )


def require(url: str, scheme: str = SCHEME) -> None:
    """Makes sure of an address's scheme.

    Raises:
      RefusedError: it is another.
    """
    if urllib.parse.urlsplit(url).scheme != scheme:
        raise RefusedError(f"{url}: no {scheme} address")


def _request(url: str, start: int, scheme: str) -> http.client.HTTPResponse:
    """Asks for the file from byte `start` on; the answer may be all of it."""
    require(url, scheme)
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 (just seen to)
    try:
        return urllib.request.build_opener(_Redirects(scheme)).open(request, timeout=60)
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return _request(url, 0, scheme)  # as many bytes as the file has, but wrong ones
        raise


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, scheme: str):
        self._scheme = scheme

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        try:
            require(newurl, self._scheme)
        except RefusedError:
            msg = f"redirects to {newurl}, no {self._scheme} address"
            raise urllib.error.HTTPError(req.full_url, code, msg, headers, fp) from None
        return super().redirect_request(req, fp, code, msg, headers, newurl)
