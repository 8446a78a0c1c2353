"""Fitted models on disk, with Orbax.

A checkpoint is a folder of steps, 0, 1, ..., each written completely by Orbax: the newest
finished one is the model, a newer unfinished one is a fit in progress. A step's state
holds the statistics (for `Moments` count, mean and M2, symmetric blocks as lower triangles;
for `Samples` the images' embeddings), the channel index, the projection if there is one, and
the digest of each fitted image; its custom metadata, JSON, holds the configuration, the
identity of the backbone's weights, the library's version and a checksum of everything. It
keeps the statistics rather than their factorisation, so that models can be extended and
merged. `model_file` has the form for scoring alone.

Each device writes and reads only its own regions, whatever number of devices wrote them:
region-wise arrays are padded or truncated at the end.

Checkpoints are untrusted: they are arrays and JSON, nothing in them is executed, and no memory
is allocated for an array before its name, type and shape have been compared with those
expected.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float32, Int, UInt8
from orbax.checkpoint import v1 as ocp

import padim_jax
from padim_jax.config import backbones
from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config
from padim_jax.core.types import Moments, Projection, Samples
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.models.weights import identity as weights_identity
from padim_jax.models.weights.identity import WeightsIdentity
from padim_jax.store import calibration_file, validation
from padim_jax.system import library_logs, paths
from padim_jax.system.paths import Path

# Raised when a reader of the older form would misread the newer.
_FORMAT = 5
_STEP = re.compile("0|[1-9][0-9]*")
# Suffix of a mark beside a step during its deletion: what is left of the step is not damage.
_DELETED = ".deleted"
# Leftovers of a killed save or deletion.
_LEFTOVER = re.compile(rf"[0-9]+(\.orbax-checkpoint-tmp.*|{re.escape(_DELETED)})")
# The last file that Orbax writes where folders cannot be renamed.
_COMMITTED = "commit_success.txt"
_DIGEST = hashlib.sha256
# Replicated state, with its type and shape; all other arrays are by region.
_SMALL = {
    "count": (("int32",), ()),
    "digests": (("uint8",), (None, 32)),
    "images": (("uint8",), (None, 32)),
    "index": (("int64",), (None,)),
    "projection": (("float32",), (None, None)),
}
_OPTIONAL = ("projection",)
# Descriptions in JSON, which have a few kilobytes.
_DESCRIPTIONS = ("_CHECKPOINT_METADATA", "state/_METADATA", "state/_sharding")
_LONGEST_DESCRIPTION = 64_000_000
_MOST_IMAGES = 10**7
_ORBAX = importlib.metadata.version("orbax-checkpoint")
# Version assumed for checkpoints that do not state it.
_FIRST_ORBAX = "0.12"


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Contents of a checkpoint.

    Attributes:
      config: configuration that the model was fitted with.
      index: channels kept, in the embedding's order.
      statistics: statistics of all fitted images, on the devices.
      weights: identity of the backbone's weights, which the checkpoint does not hold.
      regions: number of regions; the last device may have additional ones, of zeros.
      images: SHA-256 of each image's file, in the order of fitting.
      unfinished: for a fit in progress, identity of its images.
      projection: matrix of a reduction by projection, or None.
      forgotten: SHA-256 of images that were fitted once and have been removed since.
    """

    config: Config
    index: Int[np.ndarray, " d"]
    statistics: Moments | Samples
    weights: WeightsIdentity
    regions: int
    images: UInt8[np.ndarray, "s 32"]
    unfinished: str | None = None
    projection: Projection | None = None
    forgotten: UInt8[np.ndarray, "f 32"] = dataclasses.field(
        default_factory=lambda: np.zeros((0, 32), np.uint8)
    )


def save(path: Path, fitted: Fitted, devices: Devices) -> str:
    """Write a checkpoint; a crash leaves the earlier one, the new one or both, never a part.

    An unfinished fit replaces an earlier unfinished one, a finished fit replaces all.

    Args:
      path: folder to write.
      fitted: contents to write.
      devices: devices of the statistics.

    Returns:
      The model's identity: a SHA-256 hex digest of its statistics.

    Raises:
      UserError: see `check_destination`.
    """
    with saving(path, fitted, devices) as identity:
        return identity


@contextlib.contextmanager
def saving(path: Path, fitted: Fitted, devices: Devices) -> Iterator[str]:
    """Write a checkpoint, and delete the earlier one at the block's end unless it fails.

    The block may consume the statistics, and so needs no second copy of them.

    Args:
      path: folder to write.
      fitted: contents to write.
      devices: devices of the statistics.

    Yields:
      The model's identity; see `save`.

    Raises:
      UserError: see `check_destination`; or writing fails, on a full disk for example.
    """
    check_destination(path)
    folder = _absolute(path)
    step = parallel.agreed(max(_numbered(folder), default=-1) + 1)
    metadata: dict[str, Any] = {
        "format": _FORMAT,
        "version": padim_jax.__version__,
        "orbax": _ORBAX,
        "config": config_lib.to_stored(fitted.config),
        "weights": dataclasses.asdict(fitted.weights),
        "regions": fitted.regions,
        "unfinished": fitted.unfinished,
    }
    if len(fitted.forgotten):
        metadata["forgotten"] = fitted.forgotten.tobytes().hex()
    kept, made = _pack(fitted.statistics)
    state = _small_state(fitted, kept | made, devices)
    # The digest has always described the count as an array of one axis.
    metadata["sha256"] = validation.digest(metadata, state | {"count": state["count"][None]})
    identity = _identity(state, fitted.weights)
    state |= parallel.as_global(kept, devices) | parallel.as_global(made, devices, donate=True)
    del kept, made  # references to the statistics, which would keep them from being donated
    if devices.process == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
    try:
        with _uncompressed(), library_logs.held_back("orbax"):
            ocp.save(os.fspath(folder / str(step)), state, custom_metadata=metadata)
        paths.flush(folder / str(step))
    except Exception as error:
        if devices.process == 0:
            with contextlib.suppress(OSError):  # a partial save fills a full disk
                _remove_leftovers(folder)
        if (reason := paths.explanation(error, path)) is None:
            raise
        raise UserError(f"{reason}. What was saved before is as it was") from error
    del state
    try:
        yield identity
    except BaseException:
        if devices.process == 0:
            _remove(folder / str(step))
        raise
    if devices.process == 0:
        for number in _numbered(folder):
            earlier = folder / str(number)
            if number < step and (fitted.unfinished is None or not _is_finished(earlier)):
                _remove(earlier)
    parallel.agreed(step)  # no process may find a step that another one is deleting


def identity(fitted: Fitted, devices: Devices) -> str:
    """Return the model's identity, as `save` does, without writing.

    Args:
      fitted: the model.
      devices: devices of the statistics.

    Returns:
      Hex digest.
    """
    kept, made = _pack(fitted.statistics)
    return _identity(_small_state(fitted, kept | made, devices), fitted.weights)


def _small_state(fitted: Fitted, packed: dict[str, Array], devices: Devices) -> dict[str, Any]:
    """Return a model's state, with digests in place of the statistics' arrays."""
    state: dict[str, Any] = {
        "index": fitted.index,
        "count": np.asarray(fitted.statistics.count[0]),
        "images": fitted.images,
        "digests": _region_digests(packed, fitted.regions, devices),
    }
    if fitted.projection is not None:
        state["projection"] = fitted.projection
    return state


def check_destination(path: Path) -> None:
    """Check that `save` would delete nothing but a checkpoint that it replaces.

    Raises:
      UserError: `path` is something other than a checkpoint.
    """
    folder = _absolute(path)
    if not paths.is_folder(folder):
        if folder.exists():
            raise UserError(f"{path}: exists and is no checkpoint; move it away first")
        return
    for entry in folder.iterdir():
        if _is_leftover(entry) or _is_deleted(entry) or entry.name == calibration_file.NAME:
            continue
        if paths.is_system_file(entry.name) or paths.is_growing(entry):
            continue
        if not _STEP.fullmatch(entry.name) or _describe(entry) is None:
            raise UserError(
                f"{path}: exists and is no checkpoint of padim_jax {padim_jax.__version__} "
                f"(it holds {entry.name}); move it away first"
            )


def load(path: str | os.PathLike[str], devices: Devices) -> tuple[Fitted, str]:
    """Read the newest finished checkpoint.

    Args:
      path: its folder.
      devices: devices to place the statistics on; any number, not only that which wrote it.

    Returns:
      The checkpoint, and its identity.

    Raises:
      UserError: there is no checkpoint, or it is damaged or of another format.
    """
    if (step := _newest(path)) is None:
        raise UserError(_no_checkpoint(_absolute(path)))
    return _load(step, devices)


def fitted_config(path: Path) -> Config | None:
    """Read the configuration of the newest finished checkpoint; None if there is none.

    Raises:
      UserError: it is damaged or of another format.
    """
    if (step := _newest(path)) is None:
        return None
    metadata = _describe(step).custom_metadata
    with _explained(step, metadata):
        return config_lib.restore(metadata["config"], metadata.get("version"))


def fitted_images(path: Path) -> UInt8[np.ndarray, "s 32"]:
    """Read only the images' SHA-256 from the newest finished checkpoint.

    Raises:
      UserError: it is damaged or of another format.
    """
    step = _newest(path)
    assert step is not None
    info = _describe(step)
    metadata = info.custom_metadata
    with _explained(step, metadata):
        described: dict[str, Any] = dict(info.metadata)
        config = config_lib.restore(metadata["config"], metadata.get("version"))
        _require_plausible(described, info.custom_metadata["regions"], config)
        target = {
            name: np.empty(leaf.shape, leaf.dtype) if name == "images" else ocp.PLACEHOLDER
            for name, leaf in described.items()
        }
        with library_logs.held_back("orbax"):
            loaded: Any = ocp.load(os.fspath(step), target)
    return loaded["images"]


def _newest(path: str | os.PathLike[str]) -> Path | None:
    """Return the newest finished step. A collective."""
    folder = _absolute(path)
    finished = [number for number, step in _steps(folder) if step.get("unfinished") is None]
    chosen = parallel.agreed(finished[-1] if finished else -1)
    return None if chosen < 0 else folder / str(chosen)


def load_unfinished(path: Path, devices: Devices) -> Fitted | None:
    """Read the unfinished fit newer than any finished one, if there is one.

    Args:
      path: folder of the checkpoint.
      devices: devices to place the statistics on.

    Returns:
      The fit, or None.

    Raises:
      UserError: it is damaged or of another format.
    """
    folder = _absolute(path)
    steps = [(number, metadata.get("unfinished")) for number, metadata in _steps(folder)]
    finished = max((number for number, marker in steps if marker is None), default=-1)
    newer = [number for number, _ in steps if number > finished]
    while (chosen := parallel.agreed(newer.pop() if newer else -1)) >= 0:
        try:
            return _load(folder / str(chosen), devices)[0]
        except UserError as error:
            # A power cut can leave the last one incomplete; an earlier one still exists then.
            # Processes may differ in what they can read, so several of them stop together.
            if not newer or devices.processes > 1:
                raise
            print(f"{error}. Going back to what was saved before it")
    return None


def _load(step: Path, devices: Devices) -> tuple[Fitted, str]:
    info = _describe(step)
    assert info is not None
    metadata = info.custom_metadata
    with _explained(step, metadata):
        config = config_lib.restore(metadata["config"], metadata.get("version"))
        weights = weights_identity.identity(metadata["weights"])
        regions = metadata["regions"]
        if not isinstance(metadata["unfinished"], str | None):
            raise ValueError("its metadata are of other types")
        if info.metadata is None:
            raise ValueError("the list of its arrays cannot be read")
        _require_plausible(info.metadata, regions, config)  # before memory is allocated
        arrays = _read(step, dict(info.metadata), regions, devices)
        small = {name: arrays.pop(name) for name in _SMALL if name in arrays}
        packed = parallel.from_global(arrays, devices)
        validation.require_digest(metadata, small | {"count": small["count"][None]})
        if np.any(_region_digests(packed, regions, devices) != small["digests"]):
            raise ValueError("its statistics are not what was saved")
        statistics = _unpack(packed, parallel.number(small["count"], devices))
        fitted = Fitted(
            config,
            small["index"],
            statistics,
            weights,
            regions,
            small["images"],
            metadata["unfinished"],
            small.get("projection"),
            np.frombuffer(bytes.fromhex(metadata.get("forgotten", "")), np.uint8).reshape(
                -1, 32
            ),
        )
        return fitted, _identity(small, weights)


@contextlib.contextmanager
def _explained(step: Path, metadata: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except jax.errors.JaxRuntimeError:  # for example out of memory
        raise
    except config_lib.UnknownSettingError as error:
        raise UserError(f"{step}: {error}") from error
    # Parsers raise arbitrary exceptions on damaged files.
    except Exception as error:
        versions = _orbax_versions(metadata)
        raise UserError(
            f"{step}: the checkpoint is broken ({validation.reason(error)}){versions}; "
            "fit again or restore it from a copy"
        ) from error


def _require_plausible(described: Mapping[str, Any], regions: Any, config: Config) -> None:
    """Compare the arrays that a checkpoint declares with those expected.

    Raises:
      ValueError: they differ, or are larger than those of a model with this configuration.
    """
    expected = _SMALL | _expected_statistics(described)
    validation.require_arrays(described, expected)
    if missing := [name for name in expected if name not in (*described, *_OPTIONAL)]:
        raise ValueError(f"it has no {', '.join(missing)}")
    if type(regions) is not int or described["digests"].shape[0] != regions:
        raise ValueError(f"it is not of {regions} regions")
    images = described["images"].shape[0]
    if images > _MOST_IMAGES:
        raise ValueError(f"it is not of {images} images")
    # A description of a few bytes could request all memory.
    stride = backbones.STRIDES[config.model.layers[0]]
    patches = math.prod(-(-size // stride) for size in config.image.size)
    channels = config.model.channels
    most = 64 + 4 * patches * channels * (channels + images + 2)  # a patch may be stored twice
    statistics = [x.shape for name, x in described.items() if name not in _SMALL]
    if statistics[0][0] < regions:
        raise ValueError(f"its statistics are of {statistics[0][0]} regions, not {regions}")
    numbers = sum(map(math.prod, statistics))
    if numbers > most:
        raise ValueError(f"{numbers} numbers, more than a model of its configuration has")


def _expected_statistics(described: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return types and shapes of the statistics' arrays, as those of one kind imply them."""
    kind, axes = ("values", 4) if "values_0" in described else ("mean", 3)
    levels = range(max(1, sum(name.startswith(kind) for name in described)))
    shapes = [described[x].shape for i in levels if (x := f"{kind}_{i}") in described]
    if len(shapes) < len(levels) or any(len(shape) != axes for shape in shapes):
        raise ValueError(f"its statistics have the shapes {shapes}")
    padded = shapes[0][0]  # for the number of devices that wrote it
    expected: dict[str, tuple[int, ...]] = {}
    for i, (_, cells, *_, channels) in enumerate(shapes):
        if kind == "values":
            expected[f"values_{i}"] = (padded, cells, shapes[0][2], channels)
            continue
        expected[f"mean_{i}"] = (padded, cells, channels)
        expected[f"m2_{i}_{i}"] = (padded, cells, channels * (channels + 1) // 2)
        for j in levels[i + 1 :]:
            expected[f"m2_{i}_{j}"] = (padded, cells, channels, shapes[j][-1])
    return {name: (("float32",), shape) for name, shape in expected.items()}


def _read(
    step: Path, described: dict[str, Any], regions: int, devices: Devices
) -> dict[str, Any]:
    """Return the arrays by name; those by region are on the devices, each with its own."""
    target = {}
    for name, leaf in described.items():
        if name in _SMALL:
            target[name] = np.empty(leaf.shape, leaf.dtype)
        else:
            shape = (devices.padded(regions), *leaf.shape[1:])
            place = parallel.sharding(devices)
            target[name] = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=place)
    context = ocp.Context()
    context.array.loading.enable_padding_and_truncation = True
    with context, library_logs.held_back("orbax"):
        loaded: Any = ocp.load(os.fspath(step), target)
    return loaded


def _absolute(path: str | os.PathLike[str]) -> Path:
    found = paths.parse(os.fspath(path))
    if isinstance(found, pathlib.Path):
        return found.resolve()  # replace the target of a link, not the link
    if str(found).startswith("s3://"):
        raise UserError(
            f"{path}: Orbax keeps no checkpoints on s3://; name a place for it on gs:// or on "
            "a file system with --checkpoint"
        )
    return found


def _numbered(folder: Path) -> list[int]:
    """Return the numbers of all steps, whatever their state."""
    if not paths.is_folder(folder):
        return []
    names = (entry.name for entry in folder.iterdir())
    return sorted(int(name) for name in names if _STEP.fullmatch(name))


def _steps(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the steps and their metadata, the newest last.

    Raises:
      UserError: one is damaged, or of another format.
    """
    found = []
    if (old := _describe(folder)) is not None:  # a checkpoint without steps: formats 1 and 2
        _require_format(folder, old.custom_metadata)
    for number in _numbered(folder):
        step = folder / str(number)
        if _is_deleted(step) or _is_leftover(step):
            continue
        info = _describe(step)
        if info is None:
            raise UserError(f"{step}: {_unreadable(step)}; {_restore_advice(bool(found))}")
        _require_format(step, info.custom_metadata)
        found.append((number, info.custom_metadata))
    return found


def _is_finished(step: Path) -> bool:
    info = _describe(step)
    return info is not None and info.custom_metadata.get("unfinished") is None


def _require_format(place: Path, metadata: dict[str, Any]) -> None:
    if metadata["format"] != _FORMAT:
        raise UserError(
            f"{place}: checkpoint of format {metadata['format']} written by padim_jax "
            f"{metadata.get('version')}; this is padim_jax {padim_jax.__version__}, which "
            f"reads format {_FORMAT}"
        )


def _remove(step: Path) -> None:
    mark = step.with_name(step.name + _DELETED)
    mark.touch()
    paths.remove_folder(step)
    mark.unlink()


def _is_deleted(step: Path) -> bool:
    return step.with_name(step.name + _DELETED).exists()


def _is_leftover(entry: Path) -> bool:
    """Return whether an entry is left by a killed save, not finished by Orbax."""
    if isinstance(entry, pathlib.Path):
        return _LEFTOVER.fullmatch(entry.name) is not None
    # On object stores, where nothing is renamed, a file marks completion.
    return _STEP.fullmatch(entry.name) is not None and not (entry / _COMMITTED).exists()


def _remove_leftovers(folder: Path) -> None:
    if not paths.is_folder(folder):  # mkdir does nothing on object stores
        return
    for entry in list(folder.iterdir()):
        if entry.name.endswith(_DELETED):
            step = entry.with_name(entry.name.removesuffix(_DELETED))
            if step.exists():
                paths.remove_folder(step)
            entry.unlink()
        elif _is_leftover(entry) or paths.is_growing(entry):
            paths.remove_folder(entry)


def _describe(folder: Path) -> Any:
    """Return Orbax's description of a checkpoint of this program; None for anything else.

    `ocp.is_orbax_checkpoint` is unsuitable: it accepts any folder.
    """
    try:
        if isinstance(folder, pathlib.Path):
            for name in _DESCRIPTIONS:
                if (path := folder / name).is_file() and (
                    path.stat().st_size > _LONGEST_DESCRIPTION
                ):
                    return None
        with library_logs.held_back("orbax"):
            info = ocp.metadata(os.fspath(folder))
            metadata: Any = info.custom_metadata
            return info if type(metadata["format"]) is int else None
    except jax.errors.JaxRuntimeError:
        raise
    # Orbax raises arbitrary exceptions on damaged files and on anything but a checkpoint.
    except Exception:
        return None


def _unreadable(step: Path) -> str:
    """Return why Orbax cannot describe a step, as far as its own JSON tells."""
    try:
        with (step / _DESCRIPTIONS[0]).open("rb") as file:
            content = file.read(_LONGEST_DESCRIPTION)
        metadata = json.loads(content)["custom_metadata"]
        whole = type(metadata["format"]) is int
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole, metadata = False, {}
    if not whole:
        return f"no checkpoint that Orbax {_ORBAX} can read, or a damaged one (a power cut?)"
    versions = _orbax_versions(metadata) or f" (both with Orbax {_ORBAX})"
    return (
        "its description is whole, but the rest cannot be read: damaged, or written otherwise "
        f"than is read here{versions}"
    )


def _orbax_versions(metadata: Mapping[str, Any]) -> str:
    """Return the Orbax versions that wrote and read a checkpoint, if they differ."""
    wrote = metadata.get("orbax")
    if wrote == _ORBAX or (wrote is None and _ORBAX.startswith(f"{_FIRST_ORBAX}.")):
        return ""
    by = str(wrote)[:60] if wrote is not None else _FIRST_ORBAX
    return f" (written with Orbax {by}, read with Orbax {_ORBAX}: install that one to read it)"


def _restore_advice(earlier: bool) -> str:
    """Return advice on a damaged step, which may still be of value."""
    back = "move this folder away to go back to the one before it, " if earlier else ""
    return f"{back}restore it from a copy, or fit to another --checkpoint"


def _no_checkpoint(folder: Path) -> str:
    if not folder.exists():
        what = "no such checkpoint"
    elif _steps(folder):
        return (
            f"{folder}: holds a fit that was interrupted, and no model yet; the command that "
            "began it goes on with it"
        )
    else:
        what = "is no checkpoint"
    return f"{folder}: {what}; fit a model first (--mode=train) or name one with --checkpoint"


def _identity(state: dict[str, Any], weights: WeightsIdentity) -> str:
    """Return the SHA-256 of the statistics, independent of the images' place and the file."""
    digest = _DIGEST(weights.sha256.encode())
    for name in sorted(state):
        digest.update(np.ascontiguousarray(state[name]).data)
    return digest.hexdigest()


def _region_digests(
    packed: dict[str, Array], regions: int, devices: Devices
) -> UInt8[np.ndarray, "r 32"]:
    """Return the SHA-256 of each region's numbers, computed locally and gathered."""
    names = sorted(packed)
    found = np.zeros((devices.padded(regions) // devices.processes, 32), np.uint8)
    shapes = [(name, str(x.dtype), x.shape[2:]) for name, x in sorted(packed.items())]
    begin = _DIGEST(repr(shapes).encode())
    start = devices.process * len(found)
    for first, arrays in parallel.parts(packed, devices):

        def digest(region: int, first: int = first, arrays: Any = arrays) -> None:
            own = begin.copy()
            for name in names:
                own.update(np.ascontiguousarray(arrays[name][region]).data)
            found[first - start + region] = np.frombuffer(own.digest(), np.uint8)

        # In threads: hashlib releases the GIL.
        with concurrent.futures.ThreadPoolExecutor() as threads:
            list(threads.map(digest, range(len(arrays[names[0]]))))
    return parallel.gather(found)[:regions]


def _uncompressed() -> ocp.Context:
    # Compression shrinks features' statistics by 8 % and doubles the time to read and write
    # them.
    context = ocp.Context()
    context.array.saving.use_compression = False
    return context


def _pack(statistics: Moments | Samples) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the statistics' own arrays, and new ones, by name with level numbers."""
    if isinstance(statistics, Samples):
        return {f"values_{i}": x for i, x in enumerate(statistics.values)}, {}
    kept = {f"mean_{i}": mean for i, mean in enumerate(statistics.mean)}
    made = {}
    for i, (own, *cross) in enumerate(statistics.m2):
        made[f"m2_{i}_{i}"] = _lower_triangle(own)
        kept |= {f"m2_{i}_{j}": block for j, block in enumerate(cross, i + 1)}
    return kept, made


def _unpack(packed: dict[str, Array], count: Array) -> Moments | Samples:
    levels = range(sum(name.startswith(("mean", "values")) for name in packed))
    if "values_0" in packed:
        return Samples(count, tuple(packed[f"values_{i}"] for i in levels))
    means = tuple(packed[f"mean_{i}"] for i in levels)
    m2 = tuple(
        (
            _symmetric(packed[f"m2_{i}_{i}"], means[i].shape[-1]),
            *(packed[f"m2_{i}_{j}"] for j in levels[i + 1 :]),
        )
        for i in levels
    )
    return Moments(count, means, m2)


def _lower_triangle_regions(m2: Float32[Array, "r n d d"]) -> Float32[Array, "r n e"]:
    rows, columns = np.tril_indices(m2.shape[-1])
    return m2[:, :, rows, columns]


def _symmetric_regions(packed: Float32[Array, "r n e"], size: int) -> Float32[Array, "r n d d"]:
    rows, columns = np.tril_indices(size)
    where = np.zeros((size, size), np.int32)
    where[rows, columns] = where[columns, rows] = np.arange(len(rows))
    return packed[:, :, where]


_lower_triangle = parallel.mapped(_lower_triangle_regions)
_symmetric = parallel.mapped(_symmetric_regions, static=(1,))
