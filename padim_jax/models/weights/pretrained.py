"""The weights of a backbone, by their name or from a file, and what identifies them."""

import dataclasses
import difflib
import hashlib
import pathlib
from collections.abc import Sequence

from padim_jax.config.backbones import (
    BACKBONES,
    BUNDLED,
    BUNDLED_WEIGHTS,
    RANDOM_WEIGHTS,
    TORCHVISION_FILES,
    WEIGHTS,
    require_bundled,
)
from padim_jax.errors import UserError
from padim_jax.models.weights import folding, hub, initialization, naming, readers
from padim_jax.models.weights.folding import Variables
from padim_jax.models.weights.identity import WeightsIdentity

RANDOM_ORIGIN = "random (not ImageNet: for trying the program out)"
BUNDLED_ORIGIN = "bundled with padim_jax (trained on procedural images, not ImageNet's)"
BUNDLED_FOLDER = pathlib.Path(__file__).parents[1] / "bundled"


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
        "bundled" (a file of this package; see `padim_jax.config.backbones.BUNDLED`); or
        "random".
      backbone: key of `padim_jax.config.backbones.BACKBONES`.
      stages: stages in use, from the backbone's.

    Returns:
      `{"params": ...}` for the network's `apply`, float32 NumPy arrays (put them on devices
      once, not at each call), and the identity of the weights.

    Raises:
      UserError: the name is unknown or another backbone's, the file cannot be
        downloaded or read, or its tensors are not exactly what the backbone needs.
    """
    if name_or_path == RANDOM_WEIGHTS:
        return _random(backbone, stages)
    if name_or_path == BUNDLED_WEIGHTS:
        return _bundled(backbone, stages)
    name, _, revision = name_or_path.partition("@")
    if any(name in names for names in WEIGHTS.values()):
        if name not in WEIGHTS[backbone]:
            problem = "belongs to another backbone"
            raise UserError(_expectation(name_or_path, backbone, stages, problem))
        path, origin, published = hub.fetch(name, revision, _to_bundled(backbone, stages))
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


def _random(backbone: str, stages: tuple[str, ...]) -> tuple[Variables, WeightsIdentity]:
    network = naming.convolutions(backbone, naming.namings(backbone)[0])
    used = naming.used(network, backbone, stages)
    tensors = initialization.random_tensors(used, BACKBONES[backbone])
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].tobytes())
    identity = WeightsIdentity(RANDOM_ORIGIN, digest.hexdigest())
    return folding.to_variables(tensors, used), identity


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
    variables = folding.convert(
        readers.parse(content, path), backbone, stages, f"weights file {path}"
    )
    return variables, WeightsIdentity(BUNDLED_ORIGIN, digest)


def _expectation(weights: str, backbone: str, stages: Sequence[str], problem: str) -> str:
    bundled = (BUNDLED_WEIGHTS,) if backbone in BUNDLED else ()
    names = (*WEIGHTS[backbone], *bundled, RANDOM_WEIGHTS)
    close = difflib.get_close_matches(weights, names, n=1)
    return (
        f"config.model.weights={weights!r}: {problem}"
        + (f"; did you mean {close[0]!r}?" if close else ".")
        + f" Expected for {backbone}: {', '.join(names)}, or the path of a file that ends in "
        + f"{', '.join(readers.READERS)}. {_to_bundled(backbone, stages)}"
    )


def _to_bundled(backbone: str, stages: Sequence[str]) -> str:
    """Return the alternative that messages about unavailable weights offer.

    It is used only when requested: the results differ.
    """
    offered = backbone if backbone in BUNDLED else next(iter(BUNDLED))
    settings = [] if offered == backbone else [f"--config.model.backbone={offered}"]
    settings.append(f"--config.model.weights={BUNDLED_WEIGHTS}")
    if not set(stages) <= set(BUNDLED[offered].stages):
        settings.append(f'--config.model.layers="{BUNDLED[offered].stages}"')
    return (
        "Weights that come with padim_jax need no download and come without ImageNet's terms, "
        f"but results are lower than with ImageNet's: {' '.join(settings)}"
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
