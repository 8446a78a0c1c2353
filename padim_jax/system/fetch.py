"""Download of a file: TLS only, of known size, verified by its hash, resumable.

The caller names the final file; here it grows in a file that is never taken for complete.
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
    """The download is not what was requested."""


def fetch(url: str, part: pathlib.Path, sha256: str, most: int, scheme: str = SCHEME) -> None:
    """Complete the file `part`, starting from its present contents.

    If these turn out not to be the file's beginning, they are deleted.

    Args:
      url: address of the file.
      part: path of the growing file, with a name that nobody else uses; an interrupted download
        is resumed from it.
      sha256: the file's hex digest.
      most: maximum size in bytes; a longer download is stopped.
      scheme: scheme required of all addresses.

    Raises:
      RefusedError: another scheme, too many bytes, or another digest.
      OSError: the network or the disk failed.
      http.client.HTTPException: the network failed.
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
        if digest.hexdigest() == sha256:  # complete already: a later step had failed
            return
        with _request(url, file.tell(), scheme) as response:
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:  # from the start
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
        # It cannot be resumed, and must not be taken for the file.
        part.unlink()
        raise RefusedError(
            f"it gave {size} bytes with SHA-256 {digest.hexdigest()}, expected {sha256}; they "
            "were deleted"
        )


def require(url: str, scheme: str = SCHEME) -> None:
    """Require an address's scheme.

    Args:
      url: the address.
      scheme: scheme required.

    Raises:
      RefusedError: it has another scheme.
    """
    if urllib.parse.urlsplit(url).scheme != scheme:
        raise RefusedError(f"{url}: no {scheme} address")


def _request(url: str, start: int, scheme: str) -> http.client.HTTPResponse:
    """Request the file from byte `start` on; the answer may be the complete file."""
    require(url, scheme)
    headers = {"Range": f"bytes={start}-"} if start else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 (just checked)
    try:
        return urllib.request.build_opener(_Redirects(scheme)).open(request, timeout=60)
    except urllib.error.HTTPError as error:
        error.close()
        if start and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return _request(url, 0, scheme)  # complete in size, but wrong
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
