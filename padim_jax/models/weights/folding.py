"""Tensors of a weights file -> checked variables, with batch norm folded into convolutions."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from padim_jax.config.backbones import BACKBONES, parts_to_compute
from padim_jax.errors import UserError
from padim_jax.models.weights import naming, readers
from padim_jax.models.weights.naming import Convolution
from padim_jax.models.weights.readers import Stored, StoredTensors

Tensors = dict[str, np.ndarray]  # by the file's names, convolutions OIHW
Variables = dict[str, Any]


def convert(
    tensors: StoredTensors, backbone: str, stages: tuple[str, ...], source: str
) -> Variables:
    """Check the tensors of a weights file and make variables of them.

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
    origin, network = naming.recognize(tensors, backbone)
    used = naming.used(network, backbone, stages)
    biases = {f"{layer.name}.bias" for layer in network if layer.norm}
    norm_tensors = naming.tensors(network, False).keys() - naming.tensors(network, True)
    folded = norm_tensors.isdisjoint(tensors)
    expected = naming.tensors(used, folded)
    # Tensors behind the cut are accepted; batch norm's counters serve training only, and
    # torchvision's oldest files have none.
    allowed = naming.tensors(network, folded).keys() | origin.behind(folded)
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
            found[name] = readers.values(tensors[name], f"{source}: {name}")
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
                f"  {kind}: {naming.listed(names)}\n"
                for kind, names in problems.items()
                if names
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
                folded_in = fold_batch_norm(layer, found, origin.epsilon)
            if not all(np.isfinite(tensor).all() for tensor in folded_in.values()):
                raise UserError(
                    f"{source}: with the batch norm {layer.norm} the weights of {layer.name} "
                    "are too large for float32: it is damaged"
                )
            values |= folded_in
    return to_variables(values, used)


def _mismatch(tensor: "np.ndarray | Stored", shape: tuple[int, ...]) -> str:
    if tensor.shape != shape:
        return f"has shape {tensor.shape}, not {shape}"
    if tensor.dtype.name not in readers.FLOATS:
        return f"is {tensor.dtype.name}, not one of {', '.join(readers.FLOATS)}"
    return ""


def _fault(name: str, tensor: np.ndarray) -> str:
    values = tensor.astype(np.float64)
    with np.errstate(over="ignore"):  # of float64
        finite = np.isfinite(values.astype(np.float32))
    if not finite.all():
        return f"has {np.count_nonzero(~finite)} values that are not finite"
    if name.endswith("running_var") and values.min() < 0:
        return "has negative variances"
    return ""


def fold_batch_norm(layer: Convolution, tensors: Tensors, epsilon: float) -> Tensors:
    """Fold batch norm into the convolution before it, in float64.

    gamma (w * x - mean) / sqrt(var + eps) + beta = (s w) * x + (beta - s mean) with
    s = gamma / sqrt(var + eps).

    Args:
      layer: a convolution with a batch norm.
      tensors: of a file, the layer's among them.
      epsilon: added to the variances.

    Returns:
      The convolution's weight (OIHW) and bias by their names, float32.
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


def to_variables(tensors: Tensors, network: Sequence[Convolution]) -> Variables:
    """Return the network's nested parameters.

    Args:
      tensors: weights (OIHW) and biases by a file's names, batch norm folded.
      network: the convolutions in use.

    Returns:
      `{"params": ...}`, kernels HWIO.
    """
    params: dict[str, Any] = {}
    for layer in network:
        module = params
        for name in layer.path:
            module = module.setdefault(name, {})
        weight = tensors[f"{layer.name}.weight"]
        module["kernel"] = np.ascontiguousarray(weight.transpose(2, 3, 1, 0))
        module["bias"] = tensors[f"{layer.name}.bias"]
    return {"params": params}
