"""Names of weights and weight files -> checked variables with batch norm folded."""

import dataclasses
import difflib
import hashlib
import io
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from padim_jax.errors import UserError
from padim_jax.models import (
    BACKBONES,
    MIN_INPUT,
    RANDOM_WEIGHTS,
    STAGES,
    WEIGHTS,
    ResNetSpec,
    stages_to_compute,
)
from padim_jax.models.resnet import ResNet

Tensors = dict[str, np.ndarray]  # by torchvision's names, convolutions OIHW
Variables = dict[str, Any]

BATCH_NORM_EPSILON = 1e-5  # torch.nn.BatchNorm2d's default, which all these networks use
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
        `.pt` file with torchvision's tensor names (with batch norm, or with batch norm
        already folded into each convolution's weight and bias), or "random".
      backbone: a key of `padim_jax.models.BACKBONES`.
      stages: stages in use, of `padim_jax.models.STAGES`.

    Returns:
      `{"params": ...}` for `ResNet.apply`, float32 NumPy arrays (put them on devices
      once, not at each call), and what identifies the weights.

    Raises:
      UserError: the name is unknown or another backbone's, the file cannot be had or
        read, or its tensors are not exactly what the backbone needs.
    """
    if name_or_path == RANDOM_WEIGHTS:
        tensors = _random(_convolutions(backbone, stages), BACKBONES[backbone])
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(tensors[name].tobytes())
        return _variables(tensors), WeightsIdentity(RANDOM_ORIGIN, digest.hexdigest())
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
    """Checks tensors by torchvision's names and makes variables of them.

    Args:
      tensors: what a weights file holds: convolutions (OIHW) each with its batch norm, or
        each with batch norm already folded into weight and bias; decided from all names.
        Float16, bfloat16, float32 or float64.
      backbone: a key of `padim_jax.models.BACKBONES`.
      stages: stages in use; tensors behind the deepest may be there and are left out.
      source: where the tensors are from, as an error message begins.

    Returns:
      `{"params": ...}` for `ResNet.apply`: kernels (HWIO) and biases, float32.

    Raises:
      UserError: names every tensor that is missing, unexpected, set twice, of the wrong
        shape or dtype, or not finite.
    """
    network = _convolutions(backbone, STAGES)
    computed = ("conv1", *stages_to_compute(stages))
    used = {name: shape for name, shape in network.items() if name.split(".")[0] in computed}
    biases = _expected(network, folded=True).keys() - _expected(network, folded=False).keys()
    norms = _expected(network, folded=False).keys() - _expected(network, folded=True).keys()
    folded = norms.isdisjoint(tensors)
    expected = _expected(used, folded)
    # What lies behind the cut may be there; batch norm's counters serve training only,
    # and torchvision's oldest files have none.
    allowed = {*_expected(network, folded), "fc.weight", "fc.bias"}
    if not folded:
        allowed |= biases | {
            f"{_batch_norm_name(name)}.num_batches_tracked" for name in network
        }
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
        raise UserError(
            f"{source} does not hold what {backbone} needs up to "
            f"{stages_to_compute(stages)[-1]} (read as {layout}).\n"
            + "".join(
                f"  {kind}: {_some(found)}\n" for kind, found in problems.items() if found
            )
            + f"Expected torchvision's names and shapes; is the file of a {backbone}, "
            "as config.model.backbone says?"
        )
    if folded:
        return _variables({name: np.asarray(tensors[name], np.float32) for name in expected})
    return _variables({k: v for name in used for k, v in _fold(name, tensors).items()})


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


def _convolutions(backbone: str, stages: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Names (torchvision's) and OIHW kernel shapes of all convolutions up to the cut."""
    model = ResNet(BACKBONES[backbone], tuple(stages), "float32")
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, MIN_INPUT, MIN_INPUT, 3)))
    )["params"]
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *modules, parameter = (key.key for key in path)
        if parameter == "kernel":
            height, width, inputs, outputs = leaf.shape
            shapes[_convolution_name(modules)] = (outputs, inputs, height, width)
    return shapes


def _convolution_name(modules: Sequence[str]) -> str:
    """From Flax to torchvision, e.g. layer2_0/downsample to layer2.0.downsample.0."""
    name = ".".join(modules).replace("_", ".")
    return f"{name}.0" if name.endswith("downsample") else name


def _module_path(convolution: str) -> list[str]:
    """The inverse of `_convolution_name`."""
    parts = convolution.split(".")
    return parts if len(parts) == 1 else [f"{parts[0]}_{parts[1]}", parts[2]]


def _batch_norm_name(convolution: str) -> str:
    """The batch norm after a convolution: conv2 -> bn2, downsample.0 -> downsample.1."""
    if convolution.endswith("downsample.0"):
        return convolution[:-1] + "1"
    return convolution.replace("conv", "bn")


def _expected(
    convolutions: Mapping[str, tuple[int, ...]], folded: bool
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a file has to hold for these convolutions."""
    shapes = {}
    for name, shape in convolutions.items():
        shapes[f"{name}.weight"] = shape
        if folded:
            shapes[f"{name}.bias"] = shape[:1]
        else:
            for part in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{_batch_norm_name(name)}.{part}"] = shape[:1]
    return shapes


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


def _fold(convolution: str, tensors: Tensors) -> Tensors:
    """Folds batch norm into the convolution before it.

    gamma (w * x - mean) / sqrt(var + eps) + beta = (s w) * x + (beta - s mean) with
    s = gamma / sqrt(var + eps), in float64.
    """
    norm = _batch_norm_name(convolution)
    gamma, beta, mean, variance = (
        tensors[f"{norm}.{part}"].astype(np.float64)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gamma / np.sqrt(variance + BATCH_NORM_EPSILON)
    weight = tensors[f"{convolution}.weight"].astype(np.float64)
    return {
        f"{convolution}.weight": (weight * scale[:, None, None, None]).astype(np.float32),
        f"{convolution}.bias": (beta - mean * scale).astype(np.float32),
    }


def _random(convolutions: Mapping[str, tuple[int, ...]], spec: ResNetSpec) -> Tensors:
    """He-normal weights (fan-in), zero biases, residual branches scaled by blocks ** -0.5.

    Without that scale and without batch norm's statistics, activations would double at
    each block: to 1e7 in a resnet152, past what a float32 covariance can hold.

    Each tensor has a generator of its own, seeded by its name, so that it is the same
    wherever the network is cut.
    """
    last = "conv2" if spec.block == "basic" else "conv3"
    tensors = {}
    for name, (outputs, inputs, height, width) in convolutions.items():
        rng = np.random.default_rng(zlib.crc32(f"{name}.weight".encode()))
        weight = rng.standard_normal((outputs, inputs, height, width), np.float32)
        scale = np.sqrt(2 / (inputs * height * width))
        if name.endswith(last):
            scale /= np.sqrt(sum(spec.depths))
        tensors[f"{name}.weight"] = weight * np.float32(scale)
        tensors[f"{name}.bias"] = np.zeros(outputs, np.float32)
    return {name: tensor.astype("<f4") for name, tensor in tensors.items()}


def _variables(tensors: Tensors) -> Variables:
    """Folded tensors by torchvision's names, OIHW -> Flax's nested parameters, HWIO."""
    params: dict[str, Any] = {}
    for key, tensor in tensors.items():
        convolution, _, part = key.rpartition(".")
        module = params
        for name in _module_path(convolution):
            module = module.setdefault(name, {})
        if part == "weight":
            module["kernel"] = np.ascontiguousarray(tensor.transpose(2, 3, 1, 0))
        else:
            module["bias"] = tensor
    return {"params": params}
