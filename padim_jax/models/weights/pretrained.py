"""The weights of a backbone, by their name or from a file, and what identifies them."""

import dataclasses
import difflib
import hashlib
import pathlib
from collections.abc import Sequence

from padim_jax.config.backbones import (
    BACKBONES,
    NO_WEIGHTS,
    RANDOM_WEIGHTS,
    SCATTERING,
    TORCHVISION_FILES,
    WEIGHTS,
    EfficientNetSpec,
    ResNetSpec,
    ScatteringSpec,
)
from padim_jax.errors import UserError
from padim_jax.models import scattering
from padim_jax.models.weights import folding, hub, initialization, naming, readers
from padim_jax.models.weights.folding import Variables
from padim_jax.models.weights.identity import WeightsIdentity

RANDOM_ORIGIN = "random (not ImageNet: for trying the program out)"
FIXED_ORIGIN = "fixed filters of padim_jax (no training, not ImageNet)"


def load(
    name_or_path: str, backbone: str, stages: tuple[str, ...]
) -> tuple[Variables, WeightsIdentity]:
    """Return the weights of a backbone cut after the deepest of `stages`.

    Args:
      name_or_path: a name from `backbones.WEIGHTS` (downloaded from the Hugging Face hub once,
        then read from its cache; a suffix @REVISION selects another commit than the pinned
        one); a `.safetensors`, `.npz`, `.pth` or `.pt` file with torchvision's or timm's tensor
        names (with batch norm, or with batch norm already folded into each convolution's weight
        and bias; all names may share a prefix such as "module.", which the origin then states);
        "random"; or "none", for scattering.
      backbone: key of `padim_jax.config.backbones.BACKBONES`.
      stages: stages in use, from the backbone's.

    Returns:
      `{"params": ...}` for the network's `apply`, float32 NumPy arrays (put them on devices
      once, not at each call), and the identity of the weights.

    Raises:
      UserError: the name is unknown or another backbone's, the file cannot be
        downloaded or read, or its tensors are not exactly what the backbone needs.
    """
    spec = BACKBONES[backbone]
    if isinstance(spec, ScatteringSpec):
        return _fixed(spec)
    if name_or_path == RANDOM_WEIGHTS:
        return _random(backbone, spec, stages)
    name, _, revision = name_or_path.partition("@")
    if any(name in names for names in WEIGHTS.values()):
        if name not in WEIGHTS[backbone]:
            problem = "belongs to another backbone"
            raise UserError(_expectation(name_or_path, backbone, stages, problem))
        path, origin, published = hub.fetch(name, revision, _without_download(stages))
    else:
        path = _local_file(name_or_path, backbone, stages)
        origin, published = path.name, ""
        if path.name in TORCHVISION_FILES:  # resnet18-5c106cde.pth
            published = path.stem.rpartition("-")[2]
    content = readers.read(path)
    identity = WeightsIdentity(origin, hashlib.sha256(content).hexdigest())
    source = f"weights file {path}"
    if not identity.sha256.startswith(published):
        raise UserError(
            f"weights file {path}: {len(content)} bytes with SHA-256 {identity.sha256}; "
            f"published is {published}{'' if len(published) == 64 else '...'}. It is damaged, "
            "incomplete or another file: move it away and get it again"
        )
    tensors = readers.parse(content, path)
    del content  # as large as the tensors
    prefix = naming.common_prefix(tensors, backbone, source)
    if prefix:
        inside = {name: x for name, x in tensors.items() if name.startswith(prefix)}
        others = len(tensors) - len(inside)
        note = f"names below {naming.listed([prefix])}, {others} others left out"
        identity = dataclasses.replace(identity, origin=f"{origin} ({note})")
        source = f"{source} ({note})"
        tensors = {name.removeprefix(prefix): x for name, x in inside.items()}
    return folding.convert(tensors, backbone, stages, source), identity


def _random(
    backbone: str, spec: ResNetSpec | EfficientNetSpec, stages: tuple[str, ...]
) -> tuple[Variables, WeightsIdentity]:
    network = naming.convolutions(backbone, naming.namings(backbone)[0])
    used = naming.used(network, backbone, stages)
    tensors = initialization.random_tensors(used, spec)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].tobytes())
    identity = WeightsIdentity(RANDOM_ORIGIN, digest.hexdigest())
    return folding.to_variables(tensors, used), identity


def _fixed(spec: ScatteringSpec) -> tuple[Variables, WeightsIdentity]:
    kernel = scattering.filters(spec.orientations)
    identity = WeightsIdentity(FIXED_ORIGIN, hashlib.sha256(kernel.tobytes()).hexdigest())
    return {"params": {"gabor": {"kernel": kernel}}}, identity


def _expectation(weights: str, backbone: str, stages: Sequence[str], problem: str) -> str:
    names = (*WEIGHTS[backbone], RANDOM_WEIGHTS)
    close = difflib.get_close_matches(weights, names, n=1)
    return (
        f"config.model.weights={weights!r}: {problem}"
        + (f"; did you mean {close[0]!r}?" if close else ".")
        + f" Expected for {backbone}: {', '.join(names)}, or the path of a file that ends in "
        + f"{', '.join(readers.READERS)}. {_without_download(stages)}"
    )


def _without_download(stages: Sequence[str]) -> str:
    """Return the alternative that messages about unavailable weights offer.

    It is used only when requested: the results differ.
    """
    (name, spec), settings = next(iter(SCATTERING.items())), ""
    if not set(stages) <= set(spec.stages):
        settings = f' --config.model.layers="{spec.stages}"'
    return (
        "Fixed filters need no download and come without ImageNet's terms, but results are "
        f"lower than with ImageNet's: --config.model.backbone={name} "
        f"--config.model.weights={NO_WEIGHTS}{settings}"
    )


def _local_file(name_or_path: str, backbone: str, stages: Sequence[str]) -> pathlib.Path:
    path = pathlib.Path(name_or_path).expanduser()
    if path.suffix not in readers.READERS:
        if path.exists():
            raise UserError(_expectation(name_or_path, backbone, stages, "not a weights file"))
        raise UserError(_expectation(name_or_path, backbone, stages, "no such weights"))
    if not path.is_file():
        raise UserError(f"config.model.weights={name_or_path!r}: no such file")
    return path
