"""Names of weights -> files in the cache of the Hugging Face hub's client.

The files are timm's, published at https://huggingface.co/timm.
"""

import hashlib
import pathlib
import re
import urllib.parse

from padim_jax.config.backbones import PINNED
from padim_jax.errors import UserError
from padim_jax.models.weights import readers

HUB_FILE = "model.safetensors"
SCHEME = "https"  # of addresses, and of those that they redirect to
_REVISION = re.compile("[0-9A-Za-z][0-9A-Za-z._-]{0,99}")
_SHA256 = re.compile("[0-9a-f]{64}")
_COMMIT = re.compile("[0-9a-f]{40}")


def fetch(name: str, revision: str, otherwise: str) -> tuple[pathlib.Path, str, str]:
    """Return the file of named weights from the client's cache; download it if it is not there.

    Args:
      name: of the weights.
      revision: a commit, tag or branch; "" for the pinned commit, or for the newest where
        none is pinned. A cached file is not renewed.
      otherwise: what else can be done, for error messages.

    Returns:
      The path; where the file comes from; the SHA-256 that is published for it, or "".

    Raises:
      UserError: the file is not cached and could not be downloaded.
    """
    if revision and not _REVISION.fullmatch(revision):
        raise UserError(
            f"config.model.weights='{name}@{revision}': expected the name of a commit, tag or "
            "branch behind the @"
        )
    repository = f"timm/{name}"
    pin = None if revision else PINNED.get(name)
    wanted = pin.revision if pin else revision or "main"
    try:
        path = _cached(repository, wanted)
        if path is None and pin and (other := _cached(repository, "main")):
            # Cached earlier: only the bytes count, not the commit.
            path = other if _sha256(other) == pin.sha256 else None
        if path is None:
            path = _download(repository, wanted)
    except UserError as error:
        raise UserError(f"config.model.weights={name!r}: {error}. {otherwise}") from error
    # No common base: OSErrors of the hub and of the disk, httpx's and hf-xet's own.
    except Exception as error:
        reason = error.__cause__ or error
        raise UserError(
            f"config.model.weights={name!r}: {HUB_FILE} could not be downloaded from "
            f"https://huggingface.co/{repository} ({type(reason).__name__}: {reason}). "
            f"Where there is no connection, download {HUB_FILE} from that page with a browser "
            f"and pass --config.model.weights=/path/to/{HUB_FILE}. {otherwise}"
        ) from error
    published = pin.sha256 if pin else _stated_sha256(path)
    commit = path.parent.name
    origin = f"huggingface.co/{repository}"
    return path, f"{origin}@{commit}" if _COMMIT.fullmatch(commit) else origin, published


def _cached(repository: str, revision: str) -> pathlib.Path | None:
    import huggingface_hub

    path = huggingface_hub.try_to_load_from_cache(repository, HUB_FILE, revision=revision)
    return pathlib.Path(path) if isinstance(path, str) else None


def _download(repository: str, revision: str) -> pathlib.Path:
    """Download a file of the hub into its client's cache.

    Raises:
      UserError: it is not offered over https, too large, or not what the hub states.
    """
    import huggingface_hub as hub

    url = hub.hf_hub_url(repository, HUB_FILE, revision=revision)
    _require_https(url)
    metadata = hub.get_hf_file_metadata(url)
    _require_https(metadata.location)  # it may be stored elsewhere
    if (metadata.size or 0) > readers.MOST_BYTES:
        raise UserError(f"{url}: {metadata.size} bytes; expected at most {readers.MOST_BYTES}")
    path = pathlib.Path(hub.hf_hub_download(repository, HUB_FILE, revision=revision))
    stated = _stated_sha256(path)
    if stated and (digest := _sha256(path)) != stated:  # the client compares sizes only
        (path.parent / path.readlink()).unlink()
        path.unlink()
        raise UserError(
            f"{url}: it gave a file with SHA-256 {digest}, expected {stated}; it was deleted"
        )
    return path


def _require_https(url: str) -> None:
    if urllib.parse.urlsplit(url).scheme != SCHEME:
        raise UserError(f"{url} is no {SCHEME} address; nothing is downloaded from there")


def _stated_sha256(path: pathlib.Path) -> str:
    """Return the SHA-256 that the hub states of a file in its cache, or "" if unknown.

    snapshots/<commit>/model.safetensors links to blobs/<SHA-256>, unless the file system has
    no links. The blob may itself be a link, to a file by another hash.
    """
    blob = path.readlink().name if path.is_symlink() else ""
    return blob if _SHA256.fullmatch(blob) else ""


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
