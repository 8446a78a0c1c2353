"""Weight files -> tensors by their names: `.safetensors`, `.npz`, `.pth` and `.pt`.

Files are untrusted: nothing in them is executed, and nothing is decompressed before its
header has been compared with what the backbone needs.
"""

import dataclasses
import io
import math
import os
import pathlib
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from padim_jax.errors import UserError
from padim_jax.models.weights import naming

StoredTensors = Mapping[str, "np.ndarray | Stored"]  # by a file's names

FLOATS = ("float16", "bfloat16", "float32", "float64")
MOST_BYTES = 1_500_000_000  # per file; a wide_resnet101_2 in float64 has 1.02e9
_MOST_MEMBERS = 10_000  # per archive; the largest backbone has 800 tensors
_MEMBER = b"PK\x01\x02"  # entry of a member in a zip archive's directory
# NumPy rejects longer headers, but only after decompressing them.
_LONGEST_HEADER = 10_000
_LEAST_TORCH = (2, 6)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor that is still in its file; `np.asarray` reads it.

    Attributes:
      shape: as the file's header states it.
      dtype: likewise.
      read: returns the values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def read(path: pathlib.Path) -> bytes:
    """Return a weights file's content, as a whole, so that what is hashed is what is parsed.

    Raises:
      UserError: it cannot be read, or has more than `MOST_BYTES` bytes.
    """
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


def parse(content: bytes, path: pathlib.Path) -> StoredTensors:
    """Return the tensors of a weights file by their names.

    Args:
      content: of the file.
      path: of the file; its suffix, one of `READERS`, says what it is.

    Raises:
      UserError: the content is something else, or damaged.
    """
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


def values(tensor: "np.ndarray | Stored", name: str) -> np.ndarray:
    """Return a tensor's values, read from its file if they are not yet.

    Args:
      tensor: of `parse`.
      name: of file and tensor, as an error message begins.

    Raises:
      UserError: they cannot be read.
    """
    try:
        return np.asarray(tensor)
    # Damage in an archive is noticed only when a member is read.
    except Exception as error:
        raise UserError(
            f"{name} cannot be read: it is damaged or incomplete "
            f"({type(error).__name__}: {_first_line(error)}). Get the file again"
        ) from error


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
        raise UserError(f"sets {naming.listed(twice)} twice")
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
        raise UserError(f"{naming.listed([name])} is {kind}; expected {', '.join(FLOATS)}")

    def read() -> np.ndarray:
        # NumPy has no bfloat16 of its own; float32 represents both half precisions exactly.
        half = kind in ("float16", "bfloat16")
        return (value.detach().float() if half else value.detach()).numpy()

    dtype = np.dtype(jnp.bfloat16) if kind == "bfloat16" else np.dtype(kind)
    return Stored(tuple(value.shape), dtype, read)


READERS = {  # by the suffixes of backbones.WEIGHT_FILES
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": _read_torch,
    ".pt": _read_torch,
}
