"""Names of weights and weight files -> checked variables with batch norm folded."""

import dataclasses
import difflib
import hashlib
import io
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from padim_jax.errors import UserError
from padim_jax.models import (
    BACKBONES,
    RANDOM_WEIGHTS,
    WEIGHTS,
    ResNetSpec,
    Spec,
    naming,
    parts_to_compute,
)
from padim_jax.models.naming import Convolution

Tensors = dict[str, np.ndarray]  # by a file's names, convolutions OIHW
Variables = dict[str, Any]

HUB_FILE = "model.safetensors"
RANDOM_ORIGIN = "random (not ImageNet: for trying the program out)"
FLOATS = ("float16", "bfloat16", "float32", "float64")
MOST_LISTED = 10  # names of one kind in an error message


@dataclasses.dataclass(frozen=True)
class WeightsIdentity:
    """Which weights a model was made with.

    Attributes:
      origin: hub repository, file name, or that the weights are random.
      sha256: hex digest of the file's bytes; for random weights of the tensors' bytes
        (little-endian float32) in the order of their names.
    """

    origin: str
    sha256: str


def load(
    name_or_path: str, backbone: str, stages: tuple[str, ...]
) -> tuple[Variables, WeightsIdentity]:
    """Gets the weights of a backbone cut after the deepest of `stages`.

    Args:
      name_or_path: a name from `padim_jax.models.WEIGHTS` (downloaded from the Hugging
        Face hub once, then taken from its cache), a `.safetensors`, `.npz`, `.pth` or
        `.pt` file with torchvision's or timm's tensor names (with batch norm, or with
        batch norm already folded into each convolution's weight and bias), or "random".
      backbone: a key of `padim_jax.models.BACKBONES`.
      stages: stages in use, of the backbone's.

    Returns:
      `{"params": ...}` for the network's `apply`, float32 NumPy arrays (put them on devices
      once, not at each call), and what identifies the weights.

    Raises:
      UserError: the name is unknown or another backbone's, the file cannot be had or
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
    if any(name_or_path in names for names in WEIGHTS.values()):
        if name_or_path not in WEIGHTS[backbone]:
            raise UserError(_expectation(name_or_path, backbone, "belongs to another backbone"))
        path, origin = _download(name_or_path), f"huggingface.co/timm/{name_or_path}"
    else:
        path = _local_file(name_or_path, backbone)
        origin = path.name
    content = _read(path)
    identity = WeightsIdentity(origin, hashlib.sha256(content).hexdigest())
    tensors = _parse(content, path)
    del content  # as large as the tensors
    return convert(tensors, backbone, stages, f"weights file {path}"), identity


def convert(tensors: Tensors, backbone: str, stages: tuple[str, ...], source: str) -> Variables:
    """Checks the tensors of a weights file and makes variables of them.

    Args:
      tensors: what a weights file holds, by torchvision's names or timm's (decided by which
        more are there of): convolutions (OIHW) each with its batch norm, or each with
        batch norm already folded into weight and bias; decided from all names. Float16,
        bfloat16, float32 or float64.
      backbone: a key of `padim_jax.models.BACKBONES`.
      stages: stages in use; tensors behind the deepest may be there and are left out.
      source: where the tensors are from, as an error message begins.

    Returns:
      `{"params": ...}` for the network's `apply`: kernels (HWIO) and biases, float32.

    Raises:
      UserError: names every tensor that is missing, unexpected, set twice, of the wrong
        shape or dtype, or not finite.
    """
    origin, network = _recognise(tensors, backbone)
    used = _used(network, backbone, stages)
    biases = {f"{layer.name}.bias" for layer in network if layer.norm}
    folded = (_expected(network, False).keys() - _expected(network, True)).isdisjoint(tensors)
    expected = _expected(used, folded)
    # What lies behind the cut may be there; batch norm's counters serve training only,
    # and torchvision's oldest files have none.
    allowed = _expected(network, folded).keys() | origin.behind(folded)
    if not folded:
        norms = [layer.norm for layer in network] + [norm for _, norm in origin.head]
        allowed |= biases | {f"{norm}.num_batches_tracked" for norm in norms if norm}
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "set twice, by batch norm too": [
            name for name in tensors if name in biases and not folded
        ],
        "unexpected": [name for name in tensors if name not in allowed],
        "wrong": [
            f"{name} {problem}"
            for name, shape in expected.items()
            if name in tensors and (problem := _problem(name, tensors[name], shape))
        ],
    }
    if any(problems.values()):
        layout = "batch norm folded, as it holds none" if folded else "with batch norm"
        known = " or ".join(f"{found.origin}'s" for found in naming.namings(backbone))
        raise UserError(
            f"{source} does not hold what {backbone} needs up to "
            f"{parts_to_compute(BACKBONES[backbone], stages)[-1]} (read as {layout}, by "
            f"{origin.origin}'s names).\n"
            + "".join(
                f"  {kind}: {_some(found)}\n" for kind, found in problems.items() if found
            )
            + f"Expected {known} names and shapes; is it a file of {backbone}, "
            "as config.model.backbone says?"
        )
    values = {}
    for layer in used:
        if folded or layer.norm is None:
            for name in layer.tensors(folded):
                values[name] = np.asarray(tensors[name], np.float32)
        else:
            values |= _fold(layer, tensors, origin.epsilon)
    return _variables(values, used)


def _recognise(tensors: Tensors, backbone: str) -> tuple[naming.Naming, list[Convolution]]:
    """Whose names the tensors have, and the whole network by them."""
    found = [
        (origin, naming.convolutions(backbone, origin)) for origin in naming.namings(backbone)
    ]
    return max(found, key=lambda x: sum(f"{layer.name}.weight" in tensors for layer in x[1]))


def _used(
    network: Sequence[Convolution], backbone: str, stages: Sequence[str]
) -> list[Convolution]:
    """The convolutions up to the deepest stage in use."""
    spec = BACKBONES[backbone]
    behind = set(spec.parts) - set(parts_to_compute(spec, stages))
    # A ResNet's parts have several blocks: layer1_0, layer1_1.
    return [layer for layer in network if layer.path[0].split("_")[0] not in behind]


def _expectation(found: str, backbone: str, problem: str) -> str:
    names = (*WEIGHTS[backbone], RANDOM_WEIGHTS)
    close = difflib.get_close_matches(found, names, n=1)
    return (
        f"config.model.weights={found!r}: {problem}"
        + (f"; did you mean {close[0]!r}?" if close else ".")
        + f" Expected for {backbone}: {', '.join(names)}, or the path of a file that ends in "
        + ", ".join(READERS)
    )


def _local_file(name_or_path: str, backbone: str) -> pathlib.Path:
    path = pathlib.Path(name_or_path).expanduser()
    if path.suffix not in READERS:
        if path.exists():
            raise UserError(_expectation(name_or_path, backbone, "not a weights file"))
        raise UserError(_expectation(name_or_path, backbone, "no such weights"))
    if not path.is_file():
        raise UserError(f"config.model.weights={name_or_path!r}: no such file")
    return path


def _read(path: pathlib.Path) -> bytes:
    # Read whole, so that what is hashed is what is parsed.
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"weights file {path} cannot be read: {error}") from error


def _download(name: str) -> pathlib.Path:
    import huggingface_hub

    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(f"timm/{name}", HUB_FILE))
    # No common base: OSErrors of the hub and of the disk, httpx's and hf-xet's own.
    except Exception as error:
        reason = error.__cause__ or error
        raise UserError(
            f"config.model.weights={name!r}: {HUB_FILE} could not be had from "
            f"https://huggingface.co/timm/{name} ({type(reason).__name__}: {reason}). "
            f"Where there is no connection, download {HUB_FILE} from that page with a browser "
            f"and pass --config.model.weights=/path/to/{HUB_FILE}"
        ) from error


def _parse(content: bytes, path: pathlib.Path) -> Tensors:
    try:
        return READERS[path.suffix](content)
    except UserError as error:
        raise UserError(f"weights file {path}: {error}") from error
    # The parsers raise whatever a damaged file makes them trip over.
    except Exception as error:
        raise UserError(
            f"weights file {path} cannot be read as {path.suffix}: it is damaged, incomplete "
            f"or something else ({type(error).__name__}: {_first_line(error)}). "
            "Compare its size and sha256 with the source's, or get it again"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _read_safetensors(content: bytes) -> Tensors:
    import safetensors

    # `safetensors.numpy.load` does not know bfloat16, so the views are made here. Integers
    # occur as batch norm's counters, which are not used.
    dtypes = {"F16": "<f2", "BF16": jnp.bfloat16, "F32": "<f4", "F64": "<f8", "I64": "<i8"}
    tensors = {}
    for name, view in safetensors.deserialize(content):
        if view["dtype"] not in dtypes:
            raise UserError(f"{name} is {view['dtype']}; expected {', '.join(FLOATS)}")
        array = np.frombuffer(view["data"], np.dtype(dtypes[view["dtype"]]))
        tensors[name] = array.reshape(view["shape"])
    return tensors


def _read_npz(content: bytes) -> Tensors:
    archive = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError("holds a single array; expected an .npz archive of named arrays")
    with archive:
        twice = sorted({name for name in archive.files if archive.files.count(name) > 1})
        if twice:
            raise UserError(f"sets {', '.join(twice)} twice")
        return {name: archive[name] for name in archive.files}


def _read_torch(content: bytes) -> Tensors:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            'reading it needs PyTorch: pip install "padim-jax[torch]", '
            "or convert it to .safetensors"
        ) from error
    # weights_only: a pickle is a program, and anything but tensors is refused unrun.
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise UserError("holds something else than a state_dict (tensor names -> tensors)")
    # NumPy has no bfloat16 of its own; float32 holds both half precisions exactly.
    halves = (torch.float16, torch.bfloat16)
    return {
        name: (value.detach().float() if value.dtype in halves else value.detach()).numpy()
        for name, value in state.items()
    }


READERS = {  # of models.WEIGHT_FILES
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": _read_torch,
    ".pt": _read_torch,
}


def _expected(network: Sequence[Convolution], folded: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a file has to hold for these convolutions."""
    return {k: v for layer in network for k, v in layer.tensors(folded).items()}


def _some(names: Sequence[str]) -> str:
    rest = len(names) - MOST_LISTED
    return "; ".join(names[:MOST_LISTED]) + (f"; and {rest} more" if rest > 0 else "")


def _problem(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> str:
    if tensor.shape != shape:
        return f"has shape {tensor.shape}, not {shape}"
    if tensor.dtype.name not in FLOATS:
        return f"is {tensor.dtype.name}, not one of {', '.join(FLOATS)}"
    values = tensor.astype(np.float64)
    if not np.isfinite(values).all():
        return f"has {np.count_nonzero(~np.isfinite(values))} values that are not finite"
    if name.endswith("running_var") and values.min() < 0:
        return "has negative variances"
    return ""


def _fold(layer: Convolution, tensors: Tensors, epsilon: float) -> Tensors:
    """Folds batch norm into the convolution before it.

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
    """Normal weights that keep the scale of activations, zero biases.

    Each tensor has a generator of its own, seeded by its name, so that it is the same
    wherever the network is cut.
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
    """Variance of random weights times fan-in.

    One over the mean square of what comes in, for outputs of variance 1: 2 behind a ReLU
    (He et al., arXiv 1502.01852), 2.8 behind a SiLU. Excitation is around 1/2 of it.
    Residual branches are scaled by blocks ** -0.5: without that, and without batch norm's
    statistics, activations would double at each block, to 1e7 in a resnet152, past what
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
    """Folded tensors by a file's names, OIHW -> the network's nested parameters, HWIO."""
    params: dict[str, Any] = {}
    for layer in network:
        module = params
        for name in layer.path:
            module = module.setdefault(name, {})
        weight = tensors[f"{layer.name}.weight"]
        module["kernel"] = np.ascontiguousarray(weight.transpose(2, 3, 1, 0))
        module["bias"] = tensors[f"{layer.name}.bias"]
    return {"params": params}
