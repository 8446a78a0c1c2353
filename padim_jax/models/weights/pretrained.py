"""Names of weights and weight files -> checked variables with batch norm folded.

Files are untrusted: nothing in them is executed, and nothing is decompressed before its
header has been compared with what the backbone needs.
"""

import dataclasses
import difflib
import hashlib
import io
import math
import os
import pathlib
import re
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from padim_jax.config.backbones import (
    BACKBONES,
    BUNDLED,
    BUNDLED_WEIGHTS,
    PINNED,
    RANDOM_WEIGHTS,
    TORCHVISION_FILES,
    WEIGHTS,
    ResNetSpec,
    Spec,
    parts_to_compute,
    require_bundled,
)
from padim_jax.errors import UserError
from padim_jax.models.weights import naming
from padim_jax.models.weights.naming import Convolution

Tensors = dict[str, np.ndarray]  # by the file's names, convolutions OIHW
StoredTensors = Mapping[str, "np.ndarray | Stored"]
Variables = dict[str, Any]

HUB_FILE = "model.safetensors"
RANDOM_ORIGIN = "random (not ImageNet: for trying the program out)"
BUNDLED_ORIGIN = "bundled with padim_jax (trained on procedural images, not ImageNet's)"
BUNDLED_FOLDER = pathlib.Path(__file__).parents[1] / "bundled"
FLOATS = ("float16", "bfloat16", "float32", "float64")
MOST_LISTED = 10  # names of one kind in an error message
MOST_BYTES = 1_500_000_000  # of a file; a wide_resnet101_2 of float64 has 1.02e9
SCHEME = "https"  # of addresses, and of those that they redirect to
_MOST_MEMBERS = 10_000  # of an archive; the largest backbone has 800 tensors
_MEMBER = b"PK\x01\x02"  # what the directory of a zip archive has for each
# numpy refuses to read a longer header, but not before it has been expanded.
_LONGEST_HEADER = 10_000
_LEAST_TORCH = (2, 6)
_LONGEST_ORIGIN = 1000  # characters
_REVISION = re.compile("[0-9A-Za-z][0-9A-Za-z._-]{0,99}")
_SHA256 = re.compile("[0-9a-f]{64}")
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class WeightsIdentity:
    """Identity of the weights that a model was fitted with.

    Attributes:
      origin: hub repository and its commit, file name, or a statement that the weights are
        random or bundled.
      sha256: hex digest of the file's bytes; for random weights, of the tensors' bytes
        (little-endian float32) in the order of their names.
    """

    origin: str
    sha256: str


def identity(stored: Any) -> WeightsIdentity:
    """Return the identity stored in a model's file by `dataclasses.asdict`.

    Raises:
      ValueError: `stored` is something else.
    """
    if not isinstance(stored, Mapping) or set(stored) != {"origin", "sha256"}:
        raise ValueError("it does not say which weights it was fitted with")
    origin, sha256 = stored["origin"], stored["sha256"]
    if not isinstance(origin, str) or len(origin) > _LONGEST_ORIGIN:
        raise ValueError("the origin of its weights is no name")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError("its weights have no SHA-256")
    return WeightsIdentity(origin, sha256)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor that is still in its file; `np.asarray` reads it.

    Attributes:
      shape: shape in the file's header.
      dtype: dtype in the file's header.
      read: function that reads the values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def load(
    name_or_path: str, backbone: str, stages: tuple[str, ...]
) -> tuple[Variables, WeightsIdentity]:
    """Load the weights of a backbone cut after the deepest of `stages`.

    Args:
      name_or_path: a name from `backbones.WEIGHTS` (downloaded from the Hugging Face hub once,
        then read from its cache; a suffix @REVISION selects another commit than the pinned
        one); a `.safetensors`, `.npz`, `.pth` or `.pt` file with torchvision's or timm's tensor
        names (with batch norm, or with batch norm already folded into each convolution's weight
        and bias; all names may share a prefix such as "module.", which the origin then states);
        "bundled" (a file of this package; see `padim_jax.config.backbones.BUNDLED`); or
        "random".
      backbone: key of `padim_jax.config.backbones.BACKBONES`.
      stages: stages in use, from the backbone's.

    Returns:
      `{"params": ...}` for the network's `apply`, float32 NumPy arrays (put them on devices
      once, not at each call), and the identity of the weights.

    Raises:
      UserError: the name is unknown or another backbone's, the file cannot be downloaded or
        read, or its tensors are not exactly what the backbone needs.
    """
    if name_or_path == RANDOM_WEIGHTS:
        named = _used(
            naming.convolutions(backbone, naming.namings(backbone)[0]), backbone, stages
        )
        tensors = _random(named, BACKBONES[backbone])
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(tensors[name].tobytes())
        return _variables(tensors, named), WeightsIdentity(RANDOM_ORIGIN, digest.hexdigest())
    if name_or_path == BUNDLED_WEIGHTS:
        return _bundled(backbone, stages)
    name, _, revision = name_or_path.partition("@")
    if any(name in names for names in WEIGHTS.values()):
        if name not in WEIGHTS[backbone]:
            problem = "belongs to another backbone"
            raise UserError(_expectation(name_or_path, backbone, stages, problem))
        path, origin, published = _from_hub(name, revision, _to_bundled(backbone, stages))
    else:
        path = _local_file(name_or_path, backbone, stages)
        origin, published = path.name, ""
        if path.name in TORCHVISION_FILES:  # resnet18-5c106cde.pth
            published = path.stem.rpartition("-")[2]
    content = _read(path)
    identity = WeightsIdentity(origin, hashlib.sha256(content).hexdigest())
    source = f"weights file {path}"
    if not identity.sha256.startswith(published):
        raise UserError(
            f"weights file {path}: {len(content)} bytes with SHA-256 {identity.sha256}; "
            f"published is {published}{'' if len(published) == 64 else '...'}. It is damaged, "
            "incomplete or another file: move it away and get it again"
        )
    tensors = _parse(content, path)
    del content  # as large as the tensors
    prefix = common_prefix(tensors, backbone, source)
    if prefix:
        inside = {name: x for name, x in tensors.items() if name.startswith(prefix)}
        note = f"names below {_some([prefix])}, {len(tensors) - len(inside)} others left out"
        identity = dataclasses.replace(identity, origin=f"{origin} ({note})")
        source = f"{source} ({note})"
        tensors = {name.removeprefix(prefix): x for name, x in inside.items()}
    return convert(tensors, backbone, stages, source), identity


def _bundled(backbone: str, stages: tuple[str, ...]) -> tuple[Variables, WeightsIdentity]:
    expected = require_bundled(backbone, stages).sha256
    path = BUNDLED_FOLDER / f"{backbone}.safetensors"
    again = (
        "Install padim_jax again, with pip's --force-reinstall, or restore the file where "
        "padim_jax runs from a clone of its repository"
    )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"config.model.weights={BUNDLED_WEIGHTS!r}: {path} cannot be read, and is part of "
            f"padim_jax ({error.strerror}). {again}"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected:
        raise UserError(
            f"config.model.weights={BUNDLED_WEIGHTS!r}: {path} has {len(content)} bytes with "
            f"SHA-256 {digest}; expected {expected}. It is damaged, or of another version of "
            f"padim_jax. {again}"
        )
    variables = convert(_parse(content, path), backbone, stages, f"weights file {path}")
    return variables, WeightsIdentity(BUNDLED_ORIGIN, digest)


def convert(
    tensors: StoredTensors, backbone: str, stages: tuple[str, ...], source: str
) -> Variables:
    """Check the tensors of a weights file and convert them to variables.

    Args:
      tensors: contents of a weights file, by torchvision's names or timm's (whichever matches
        more): convolutions (OIHW), either all with batch norm or all with batch norm already
        folded into weight and bias, as decided from all names. Float16, bfloat16, float32 or
        float64. `Stored` tensors are read only if needed, and after their shapes have been
        compared.
      backbone: key of `padim_jax.config.backbones.BACKBONES`.
      stages: stages in use; tensors behind the deepest are accepted and left out.
      source: description of the tensors' origin that begins error messages.

    Returns:
      `{"params": ...}` for the network's `apply`: kernels (HWIO) and biases, float32.

    Raises:
      UserError: names each tensor that is missing, unexpected, set twice, of the wrong shape or
        dtype, or not finite.
    """
    origin, network = _recognise(tensors, backbone)
    used = _used(network, backbone, stages)
    biases = {f"{layer.name}.bias" for layer in network if layer.norm}
    folded = (_expected(network, False).keys() - _expected(network, True)).isdisjoint(tensors)
    expected = _expected(used, folded)
    # Tensors behind the cut are accepted; batch norm's counters serve training only, and
    # torchvision's oldest files have none.
    allowed = _expected(network, folded).keys() | origin.behind(folded)
    if not folded:
        norms = [layer.norm for layer in network] + [norm for _, norm in origin.head]
        allowed |= biases | {f"{norm}.num_batches_tracked" for norm in norms if norm}
    found: Tensors = {}
    wrong = []
    for name, shape in expected.items():
        if name not in tensors:
            continue
        problem = _mismatch(tensors[name], shape)
        if not problem:
            found[name] = _values(tensors[name], f"{source}: {name}")
            problem = _fault(name, found[name])
        if problem:
            wrong.append(f"{name} {problem}")
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "set twice, by batch norm too": [
            name for name in tensors if name in biases and not folded
        ],
        "unexpected": [name for name in tensors if name not in allowed],
        "wrong": wrong,
    }
    if any(problems.values()):
        layout = "batch norm folded, as it holds none" if folded else "with batch norm"
        known = " or ".join(f"{each.origin}'s" for each in naming.namings(backbone))
        raise UserError(
            f"{source} does not hold what {backbone} needs up to "
            f"{parts_to_compute(BACKBONES[backbone], stages)[-1]} (read as {layout}, by "
            f"{origin.origin}'s names).\n"
            + "".join(
                f"  {kind}: {_some(names)}\n" for kind, names in problems.items() if names
            )
            + f"Expected {known} names and shapes; is it a file of {backbone}, "
            "as config.model.backbone says?"
        )
    values = {}
    for layer in used:
        if folded or layer.norm is None:
            for name in layer.tensors(folded):
                values[name] = np.asarray(found[name], np.float32)
        else:
            with np.errstate(over="ignore", invalid="ignore"):  # checked on the next line
                folded_in = _fold(layer, found, origin.epsilon)
            if not all(np.isfinite(tensor).all() for tensor in folded_in.values()):
                raise UserError(
                    f"{source}: with the batch norm {layer.norm} the weights of {layer.name} "
                    "are too large for float32: it is damaged"
                )
            values |= folded_in
    return _variables(values, used)


def common_prefix(tensors: StoredTensors, backbone: str, source: str) -> str:
    """Return the common prefix of a backbone's tensors that are part of another module.

    Examples are "module." of DataParallel and "model.feature_extractor." of a Lightning
    checkpoint.

    Args:
      tensors: contents of a weights file.
      backbone: key of `padim_jax.config.backbones.BACKBONES`.
      source: description of the tensors' origin that begins error messages.

    Returns:
      The prefix with the most tensors of the backbone; "" if they have none.

    Raises:
      UserError: the file contains the backbone several times.
    """
    best, prefixes = 0, [""]
    for origin in naming.namings(backbone):
        weights = [f"{layer.name}.weight" for layer in naming.convolutions(backbone, origin)]
        first = weights[0]
        ends = {name.removesuffix(first) for name in tensors if name.endswith(f".{first}")}
        for prefix in ["", *sorted(ends)]:
            count = sum(prefix + name in tensors for name in weights)
            if count > best:
                best, prefixes = count, [prefix]
            elif count == best:
                prefixes.append(prefix)
    if "" in prefixes:
        return ""
    if len(prefixes) > 1:
        raise UserError(
            f"{source} holds {backbone} {len(prefixes)} times, by names that begin with "
            f"{_some(prefixes)}; keep one of them"
        )
    return prefixes[0]


def _recognise(
    tensors: StoredTensors, backbone: str
) -> tuple[naming.Naming, list[Convolution]]:
    """Return the naming that the tensors use, and the whole network by it."""
    found = [
        (origin, naming.convolutions(backbone, origin)) for origin in naming.namings(backbone)
    ]
    return max(found, key=lambda x: sum(f"{layer.name}.weight" in tensors for layer in x[1]))


def _used(
    network: Sequence[Convolution], backbone: str, stages: Sequence[str]
) -> list[Convolution]:
    """Return the convolutions up to the deepest stage in use."""
    spec = BACKBONES[backbone]
    behind = set(spec.parts) - set(parts_to_compute(spec, stages))
    # A ResNet's parts have several blocks: layer1_0, layer1_1.
    return [layer for layer in network if layer.path[0].split("_")[0] not in behind]


def _expectation(found: str, backbone: str, stages: Sequence[str], problem: str) -> str:
    bundled = (BUNDLED_WEIGHTS,) if backbone in BUNDLED else ()
    names = (*WEIGHTS[backbone], *bundled, RANDOM_WEIGHTS)
    close = difflib.get_close_matches(found, names, n=1)
    return (
        f"config.model.weights={found!r}: {problem}"
        + (f"; did you mean {close[0]!r}?" if close else ".")
        + f" Expected for {backbone}: {', '.join(names)}, or the path of a file that ends in "
        + f"{', '.join(READERS)}. {_to_bundled(backbone, stages)}"
    )


def _to_bundled(backbone: str, stages: Sequence[str]) -> str:
    """Return the alternative to state when weights cannot be obtained.

    It is only suggested, never applied automatically: results differ.
    """
    known = backbone if backbone in BUNDLED else next(iter(BUNDLED))
    settings = [] if known == backbone else [f"--config.model.backbone={known}"]
    settings.append(f"--config.model.weights={BUNDLED_WEIGHTS}")
    if not set(stages) <= set(BUNDLED[known].stages):
        settings.append(f'--config.model.layers="{BUNDLED[known].stages}"')
    return (
        "Weights that come with padim_jax need no download and come without ImageNet's terms, "
        f"but results are lower than with ImageNet's: {' '.join(settings)}"
    )


def _local_file(name_or_path: str, backbone: str, stages: Sequence[str]) -> pathlib.Path:
    path = pathlib.Path(name_or_path).expanduser()
    if path.suffix not in READERS:
        if path.exists():
            raise UserError(_expectation(name_or_path, backbone, stages, "not a weights file"))
        raise UserError(_expectation(name_or_path, backbone, stages, "no such weights"))
    if not path.is_file():
        raise UserError(f"config.model.weights={name_or_path!r}: no such file")
    return path


def _read(path: pathlib.Path) -> bytes:
    # Read at once, so that the bytes hashed are the bytes parsed.
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(size + 1) if size <= MOST_BYTES else b""
    except OSError as error:
        raise UserError(f"weights file {path} cannot be read: {error}") from error
    if max(size, len(content)) > MOST_BYTES:
        raise UserError(
            f"weights file {path}: more than {MOST_BYTES} bytes, and so none of a backbone "
            "that there is"
        )
    return content


def _from_hub(name: str, revision: str, otherwise: str) -> tuple[pathlib.Path, str, str]:
    """Return a file of the hub's cache, downloaded if missing.

    Args:
      name: name of the weights.
      revision: commit, tag or branch; "" for the pinned commit, or the newest if none is
        pinned. A file cached under that name is not updated.
      otherwise: alternative to state in error messages.

    Returns:
      Its path; its origin; the SHA-256 published for it, or "".
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
            # From before: whatever the commit, the bytes count.
            path = other if _sha256(other) == pin.sha256 else None
        if path is None:
            path = _download(repository, wanted)
    except UserError as error:
        raise UserError(f"config.model.weights={name!r}: {error}. {otherwise}") from error
    # No common base: OSErrors of the hub and of the disk, httpx's and hf-xet's own.
    except Exception as error:
        reason = error.__cause__ or error
        raise UserError(
            f"config.model.weights={name!r}: {HUB_FILE} could not be had from "
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

    found = huggingface_hub.try_to_load_from_cache(repository, HUB_FILE, revision=revision)
    return pathlib.Path(found) if isinstance(found, str) else None


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(repository: str, revision: str) -> pathlib.Path:
    """Download a file of the hub into its client's cache.

    Raises:
      UserError: the hub offers something else, or from somewhere else.
    """
    import huggingface_hub as hub

    url = hub.hf_hub_url(repository, HUB_FILE, revision=revision)
    _require_https(url)
    metadata = hub.get_hf_file_metadata(url)
    _require_https(metadata.location)  # it may be stored elsewhere
    if (metadata.size or 0) > MOST_BYTES:
        raise UserError(f"{url}: {metadata.size} bytes; expected at most {MOST_BYTES}")
    path = pathlib.Path(hub.hf_hub_download(repository, HUB_FILE, revision=revision))
    stated = _stated_sha256(path)
    if stated and (digest := _sha256(path)) != stated:  # the client compares sizes only
        path.resolve().unlink()
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


def _parse(content: bytes, path: pathlib.Path) -> StoredTensors:
    try:
        return READERS[path.suffix](content)
    except UserError as error:
        raise UserError(f"weights file {path}: {error}") from error
    # Parsers raise arbitrary exceptions on damaged files.
    except Exception as error:
        raise UserError(
            f"weights file {path} cannot be read as {path.suffix}: it is damaged, incomplete "
            f"or something else ({type(error).__name__}: {_first_line(error)}). "
            "Compare its size and sha256 with the source's, or get it again"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _read_safetensors(content: bytes) -> StoredTensors:
    import safetensors

    # `safetensors.numpy.load` does not support bfloat16, so the views are made here. Integers
    # are batch norm's counters, which are not used.
    dtypes = {"F16": "<f2", "BF16": jnp.bfloat16, "F32": "<f4", "F64": "<f8", "I64": "<i8"}
    tensors = {}
    for name, view in safetensors.deserialize(content):
        if view["dtype"] not in dtypes:
            raise UserError(f"{name} is {view['dtype']}; expected {', '.join(FLOATS)}")
        array = np.frombuffer(view["data"], np.dtype(dtypes[view["dtype"]]))
        tensors[name] = array.reshape(view["shape"])
    return tensors


def _read_npz(content: bytes) -> StoredTensors:
    # Not with np.load, which decompresses a member to whatever size it claims.
    if content.startswith(np.lib.format.MAGIC_PREFIX):
        raise UserError("holds a single array; expected an .npz archive of named arrays")
    archive = _open_zip(content)
    names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"sets {_some(twice)} twice")
    return {
        name: _npz_member(archive, info, name)
        for name, info in zip(names, archive.infolist(), strict=True)
    }


def _open_zip(content: bytes) -> zipfile.ZipFile:
    if content.count(_MEMBER) > _MOST_MEMBERS:
        raise UserError(f"an archive of more than {_MOST_MEMBERS} members")
    return zipfile.ZipFile(io.BytesIO(content))


def _npz_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Stored:
    with archive.open(info) as file:
        header = io.BytesIO(file.read(_LONGEST_HEADER))
    version = np.lib.format.read_magic(header)
    if version == (1, 0):
        found = np.lib.format.read_array_header_1_0(header)
    elif version == (2, 0):
        found = np.lib.format.read_array_header_2_0(header)
    else:
        raise UserError(f"{name} is of version {version} of NumPy's format, for other arrays")
    (shape, columns_first, dtype), start = found, header.tell()
    if dtype.hasobject:
        raise UserError(
            f"{name} holds Python objects, which only a pickle could make: a pickle is a "
            "program, and is not run (allow_pickle=False)"
        )

    def read() -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        with archive.open(info) as file:
            file.read(start)
            data = file.read(size + 1)  # to the end, where its checksum is compared
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes or more, expected {size}")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if columns_first else "C")

    return Stored(shape, dtype, read)


def _read_torch(content: bytes) -> StoredTensors:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            'reading it needs PyTorch: pip install "padim-jax[torch]", '
            "or convert it to .safetensors"
        ) from error
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < _LEAST_TORCH:
        raise UserError(
            f"PyTorch {torch.__version__} can be made to run programs that such files hold "
            "(CVE-2025-32434); install 2.6 or later, or convert it to .safetensors"
        )
    if content.startswith(b"PK"):
        _require_plain(_open_zip(content), len(content))
    # weights_only: a pickle is a program; anything but tensors is rejected without running it.
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor)
        for name, value in state.items()
    ):
        raise UserError("holds something else than a state_dict (tensor names -> tensors)")
    return {name: _torch_tensor(value, name) for name, value in state.items()}


def _require_plain(archive: zipfile.ZipFile, size: int) -> None:
    """Reject compressed archives and programs: torch.save compresses nothing."""
    infos = archive.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos) or (
        sum(info.file_size for info in infos) > size
    ):
        raise UserError("expands to more than it holds, as nothing that torch.save writes")
    if any(info.filename.endswith("/constants.pkl") for info in infos):
        raise UserError("a TorchScript archive: a program, and not only weights")


def _torch_tensor(value: Any, name: str) -> Stored:
    kind = str(value.dtype).removeprefix("torch.")
    if kind not in (*FLOATS, "int64"):  # batch norm's counters
        raise UserError(f"{_some([name])} is {kind}; expected {', '.join(FLOATS)}")

    def read() -> np.ndarray:
        # NumPy has no bfloat16 of its own; float32 represents both half precisions exactly.
        half = kind in ("float16", "bfloat16")
        return (value.detach().float() if half else value.detach()).numpy()

    dtype = np.dtype(jnp.bfloat16) if kind == "bfloat16" else np.dtype(kind)
    return Stored(tuple(value.shape), dtype, read)


READERS = {  # one for each of backbones.WEIGHT_FILES
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": _read_torch,
    ".pt": _read_torch,
}


def _expected(network: Sequence[Convolution], folded: bool) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that a file must hold for these convolutions."""
    return {k: v for layer in network for k, v in layer.tensors(folded).items()}


def _some(names: Sequence[str]) -> str:
    rest = len(names) - MOST_LISTED
    shown = (name if len(name) < 200 else f"{name[:200]}..." for name in names[:MOST_LISTED])
    return "; ".join(shown) + (f"; and {rest} more" if rest > 0 else "")


def _mismatch(tensor: "np.ndarray | Stored", shape: tuple[int, ...]) -> str:
    if tensor.shape != shape:
        return f"has shape {tensor.shape}, not {shape}"
    if tensor.dtype.name not in FLOATS:
        return f"is {tensor.dtype.name}, not one of {', '.join(FLOATS)}"
    return ""


def _values(tensor: "np.ndarray | Stored", name: str) -> np.ndarray:
    try:
        return np.asarray(tensor)
    # Damage in an archive is noticed only when a member is read.
    except Exception as error:
        raise UserError(
            f"{name} cannot be read: it is damaged or incomplete "
            f"({type(error).__name__}: {_first_line(error)}). Get the file again"
        ) from error


def _fault(name: str, tensor: np.ndarray) -> str:
    values = tensor.astype(np.float64)
    with np.errstate(over="ignore"):  # of float64
        finite = np.isfinite(values.astype(np.float32))
    if not finite.all():
        return f"has {np.count_nonzero(~finite)} values that are not finite"
    if name.endswith("running_var") and values.min() < 0:
        return "has negative variances"
    return ""


def _fold(layer: Convolution, tensors: Tensors, epsilon: float) -> Tensors:
    """Fold batch norm into the convolution before it.

    gamma (w * x - mean) / sqrt(var + eps) + beta = (s w) * x + (beta - s mean) with
    s = gamma / sqrt(var + eps), in float64.
    """
    gamma, beta, mean, variance = (
        tensors[f"{layer.norm}.{part}"].astype(np.float64)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(variance + epsilon)
    weight = tensors[f"{layer.name}.weight"].astype(np.float64)
    return {
        f"{layer.name}.weight": (weight * scale[:, None, None, None]).astype(np.float32),
        f"{layer.name}.bias": (beta - mean * scale).astype(np.float32),
    }


def _random(network: Sequence[Convolution], spec: Spec) -> Tensors:
    """Return normal weights that preserve the scale of activations, and zero biases.

    Each tensor has its own generator, seeded by its name, so that it is the same wherever the
    network is cut.
    """
    tensors = {}
    for layer in network:
        rng = np.random.default_rng(zlib.crc32(f"{layer.name}.weight".encode()))
        weight = rng.standard_normal(layer.shape, np.float32)
        scale = np.sqrt(_gain(layer.path, spec) / np.prod(layer.shape[1:]))
        tensors[f"{layer.name}.weight"] = weight * np.float32(scale)
        tensors[f"{layer.name}.bias"] = np.zeros(layer.shape[0], np.float32)
    return {name: tensor.astype("<f4") for name, tensor in tensors.items()}


def _gain(path: Sequence[str], spec: Spec) -> float:
    """Return the variance of random weights times fan-in.

    It is one over the mean square of the input, for outputs of variance 1: 2 after a ReLU
    (He et al., arXiv 1502.01852), 2.8 after a SiLU. Excitation is around 1/2 of it.
    Residual branches are scaled by blocks ** -0.5: without that, and without batch norm's
    statistics, activations would double at each block, to 1e7 in a resnet152, beyond what
    a float32 covariance can hold.
    """
    if isinstance(spec, ResNetSpec):
        last = "conv2" if spec.block == "basic" else "conv3"
        return 2 / sum(spec.depths) if path[-1] == last else 2.0
    if path[-1] == "depthwise":
        return 2.8
    if path[-1] != "project":
        return 1.0
    block = spec.blocks[spec.parts.index(path[0])]
    return 4 * 2.8 / (len(spec.blocks) if block.residual else 1)


def _variables(tensors: Tensors, network: Sequence[Convolution]) -> Variables:
    """Map folded tensors (a file's names, OIHW) to the network's nested parameters (HWIO)."""
    params: dict[str, Any] = {}
    for layer in network:
        module = params
        for name in layer.path:
            module = module.setdefault(name, {})
        weight = tensors[f"{layer.name}.weight"]
        module["kernel"] = np.ascontiguousarray(weight.transpose(2, 3, 1, 0))
        module["bias"] = tensors[f"{layer.name}.bias"]
    return {"params": params}
