"""A fitted model for scoring alone: one safetensors file, ready to use.

A checkpoint keeps statistics that can be extended; this keeps their factorisation:
loading reads the file and computes nothing. Its arrays are stored raw, one after the other,
so that any program can map them into memory. The half-size form keeps the factorisation in
float16, together with the measured change of each metric; computation is in float32.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt8

import padim_jax
from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config
from padim_jax.core.types import Gaussian, LowRank, Projection
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.models.weights import identity as weights_identity
from padim_jax.models.weights.identity import WeightsIdentity
from padim_jax.store import validation
from padim_jax.system import paths
from padim_jax.system.paths import Path

SUFFIX = ".safetensors"
_DTYPES = ("float32", "float16")
_FORMAT = "padim_jax model 4"
# Arrays that are not part of the Gaussians.
_SMALL = ("index", "images", "projection")


@dataclasses.dataclass(frozen=True)
class Model:
    """Contents of a model file.

    Attributes:
      config: configuration that the model was fitted with.
      index: channels kept, in the embedding's order.
      fitted: Gaussians, float32, on the devices.
      weights: identity of the backbone's weights, which the file does not hold.
      identity: digest of the statistics, and of their rounding.
      images: SHA-256 of each fitted file.
      half: whether the file holds the factorisation in float16.
      comparison: for the half-size form, metrics of both forms on the test set; see
        `export.export`.
      calibration: thresholds from normal images; see `calibration_file.to_dict`.
      projection: matrix of a reduction by projection, or None.
    """

    config: Config
    index: Int[np.ndarray, " d"]
    fitted: Gaussian | LowRank
    weights: WeightsIdentity
    identity: str
    images: UInt8[np.ndarray, "s 32"]
    half: bool = False
    comparison: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    projection: Projection | None = None


def rounded(fitted: Gaussian | LowRank) -> Gaussian | LowRank:
    """Return the Gaussians as the half-size form restores them.

    Raises:
      ValueError: a number is too large for float16.
    """
    parts = {
        name: jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), part)
        for name, part in _large(fitted).items()
    }
    if not all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(parts)):
        raise ValueError(f"numbers above {np.finfo(np.float16).max:.0f} do not fit float16")
    return dataclasses.replace(fitted, **parts)


def save(path: Path, model: Model, regions: int) -> int:
    """Write a model file; a crash leaves an earlier file unchanged.

    Args:
      path: file to write.
      model: model on the devices of a single process.
      regions: number of regions.

    Returns:
      Size of its arrays in bytes.

    Raises:
      UserError: it cannot be written.
    """
    import safetensors.numpy

    fitted, large = model.fitted, _large(model.fitted)
    parts = _named("mean", fitted.mean)
    for name, part in large.items():
        parts |= _named(name, part)
    if isinstance(fitted, LowRank):
        parts["regularization"] = fitted.regularization
    arrays = {"index": model.index, "images": model.images}
    if model.projection is not None:
        arrays["projection"] = model.projection
    arrays |= parallel.join(parts, regions)
    if model.half:
        names = [name for name in arrays if name.partition("_")[0] in large]
        arrays |= {name: arrays[name].astype(np.float16) for name in names}
    described: dict[str, Any] = {
        "format": _FORMAT,
        "version": padim_jax.__version__,
        "form": type(fitted).__name__,
        "half": model.half,
        "identity": model.identity,
        "config": config_lib.to_stored(model.config),
        "weights": dataclasses.asdict(model.weights),
        "comparison": model.comparison,
        "calibration": model.calibration,
    }
    described["sha256"] = validation.digest(described, arrays)
    header = {"padim_jax": json.dumps(described)}
    try:
        # Replace the target of a link, not the link.
        target = path.resolve() if isinstance(path, pathlib.Path) else path
        with paths.replacing(target) as growing:
            growing.touch()
            mode = growing.stat().st_mode  # by the umask; the library makes files private
            safetensors.numpy.save_file(arrays, growing, header)
            growing.chmod(mode)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    return sum(array.nbytes for array in arrays.values())


def require_own(path: Path) -> None:
    """Check that a model file would replace nothing but another model file.

    Raises:
      UserError: there is something else, such as weights of that name.
    """
    import safetensors

    if not path.exists():
        return
    try:
        with _local(path) as local, safetensors.safe_open(local, "np") as file:
            if "padim_jax" in (file.metadata() or {}):
                return
    except (OSError, safetensors.SafetensorError):
        pass
    raise UserError(
        f"{path}: exists and is no model file of padim_jax; move it away or name another "
        "--workdir"
    )


def load(path: Path, devices: Devices) -> Model:
    """Read a model file onto the devices.

    Args:
      path: file to read.
      devices: devices to place the model on.

    Returns:
      The model.

    Raises:
      UserError: the file is not a model file, is damaged or of another format.
    """
    import safetensors

    try:
        with _local(path) as local, safetensors.safe_open(local, "np") as file:
            header = (file.metadata() or {}).get("padim_jax")
            if header is None:
                raise UserError(
                    f"{path}: a safetensors file, but no model of padim_jax; expected what "
                    "--mode=export writes"
                )
            described = json.loads(header)
            if described["format"] != _FORMAT:
                raise UserError(
                    f"{path}: {described['format']!r}, written by padim_jax "
                    f"{described.get('version')}; this is padim_jax {padim_jax.__version__}, "
                    f"which reads {_FORMAT!r}"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        validation.require_digest(described, arrays)
        try:
            config = config_lib.restore(described["config"], described.get("version"))
        except config_lib.UnknownSettingError as error:
            raise UserError(f"{path}: {error}") from error
        except UserError as error:
            raise ValueError(str(error)) from error
        weights = weights_identity.identity(described["weights"])
        _require_types(described, arrays)
        return Model(
            config,
            arrays["index"],
            _restore(described["form"], arrays, devices),
            weights,
            described["identity"],
            arrays["images"],
            described["half"],
            described["comparison"],
            described["calibration"],
            arrays.get("projection"),
        )
    except (UserError, jax.errors.JaxRuntimeError):  # the latter: out of memory, say
        raise
    # Parsers raise arbitrary exceptions on damaged files.
    except Exception as error:
        raise UserError(
            f"{path}: no model file, or a broken one ({validation.reason(error)}); "
            "export it again (--mode=export) or restore it from a copy"
        ) from error


def _require_types(described: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Check types and axes, which the checksum of an untrusted file does not guarantee.

    `detector.require_fitting` compares shapes with the configuration.

    Raises:
      ValueError: something is of another type or number of axes.
    """
    if (
        not isinstance(described["identity"], str)
        or type(described["half"]) is not bool
        or not isinstance(described["comparison"], dict | None)
        or not isinstance(described["calibration"], dict | None)
    ):
        raise ValueError("its description is of other types")
    regions = len(arrays["mean_0"])
    by_region = (regions, None, None, None)
    expected = {
        "index": (("int64",), (None,)),
        "images": (("uint8",), (None, 32)),
        "projection": (_DTYPES, (None, None)),
        "regularization": (("float32",), ()),
        "mean_[0-9]": (_DTYPES, by_region[:3]),
        "root|deviations_[0-9]|factor_[0-9]_[0-9]": (_DTYPES, by_region),
    }
    validation.require_arrays(arrays, expected)
    if not 0 < float(arrays.get("regularization", 1)) < math.inf:
        raise ValueError(f"a regularization of {arrays['regularization']}")


@contextlib.contextmanager
def _local(path: Path) -> Iterator[pathlib.Path]:
    """Yield the file itself, or a local copy of a remote one, as the library requires."""
    if isinstance(path, pathlib.Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as work:
        local = pathlib.Path(work, path.name)
        paths.download(path, local)
        yield local


def _large(fitted: Gaussian | LowRank) -> dict[str, Any]:
    """Return the parts that take nearly all memory, which the half-size form halves."""
    if isinstance(fitted, Gaussian):
        return {"factor": fitted.factor}
    return {"deviations": fitted.deviations, "root": fitted.root}


def _named(name: str, part: Any) -> dict[str, jax.Array]:
    """Return the arrays of a nested tuple, as "name_0_1": level 0 with the next coarser one."""
    if not isinstance(part, tuple):
        return {name: part}
    return {k: v for i, item in enumerate(part) for k, v in _named(f"{name}_{i}", item).items()}


def _restore(form: str, arrays: dict[str, np.ndarray], devices: Devices) -> Gaussian | LowRank:
    # Converted on the device: NumPy takes more than twice as long.
    floats = {
        name: array.astype(jnp.float32)
        for name, array in parallel.split(
            {name: array for name, array in arrays.items() if name not in _SMALL}, devices
        ).items()
    }
    levels = range(sum(name.startswith("mean_") for name in floats))
    mean = tuple(floats[f"mean_{i}"] for i in levels)
    if form == LowRank.__name__:
        deviations = tuple(floats[f"deviations_{i}"] for i in levels)
        return LowRank(mean, deviations, floats["root"], floats["regularization"])
    if form != Gaussian.__name__:
        raise ValueError(f"a form {form!r}")
    # A level's matrices with itself and the coarser ones.
    rows = [range(len(levels) - i) for i in levels]
    return Gaussian(
        mean, tuple(tuple(floats[f"factor_{i}_{j}"] for j in rows[i]) for i in levels)
    )
