"""Memory that a run needs and that is free, checked before it starts."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil

from padim_jax.config import backbones
from padim_jax.config.settings import Config, ModelConfig
from padim_jax.core import metrics
from padim_jax.data import input_pipeline
from padim_jax.detector import grid
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.system import progress

_GB = 1e9
# Python with its libraries (0.25 GB), JAX, compiled programs, decoders and the images they are
# decoding: peak of a run with 20 images of 96x96 pixels.
_PROGRAM = 0.6 * _GB
# Bytes per pixel of a batch for float32 feature maps, at most, as reported for XLA's compiled
# programs.
_FEATURES = {"basic": 90, "bottleneck": 345, "mbconv": 320, "scattering": 60}
# Bytes per pixel of the test set in an evaluation: score and mask; peak of metrics, curves and
# report; additional bytes per defect pixel. Measured with 39 million pixels, of which 0.05, 2.5
# and 20 % were defects: 18.0, 18.5 and 45.7 bytes besides the scores.
_SCORED, _MEASURED, _DEFECT = 5, 16, 160
# Bytes per pixel of a batch of predictions: images decoded ahead, maps, and pictures. With it
# the estimate is 1.1 times the peak at 256x256 and at 512x512, in batches of 32.
_WRITTEN = 20
_AT_ONCE = 40  # bytes per pixel of the largest image, or of a group sorted together
_USUAL_DEFECTS = 0.05  # fraction of defect pixels assumed before masks are read
_CGROUPS = pathlib.Path("/sys/fs/cgroup")
_OWN_CGROUPS = pathlib.Path("/proc/self/cgroup")
_V2 = ("memory.max", "memory.high"), "memory.current", "memory.stat", "inactive_file"
# Per kind: root folder of the control groups; files of their limits, of the memory used, and of
# its breakdown; entry of that breakdown for cached files.
_CGROUP_FILES = {
    "v2": ("", *_V2),
    "hybrid": ("unified", *_V2),
    "v1": (
        "memory",
        ("memory.limit_in_bytes",),
        "memory.usage_in_bytes",
        "memory.stat",
        "total_inactive_file",
    ),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes that a fit needs at its peak, per memory: a GPU's, or the machine's.

    Attributes:
      form: form of the statistics, "moments" or "samples".
      statistics: statistics of the normal images.
      fitted: model that scores; moments become it in place.
      batch: feature maps and embeddings of a batch, and the backbone.
      total: peak, including the program itself.
    """

    form: str
    statistics: int
    fitted: int
    batch: int
    total: int


def estimate(config: Config, images: int, devices: Devices) -> Estimate:
    """Estimate the memory of fitting a number of images; nothing is allocated.

    Args:
      config: configuration to fit.
      images: number of images.
      devices: devices that share the statistics and a batch. CPU devices of a process also
        share their memory.

    Returns:
      Bytes per memory.
    """
    # Not above: they import JAX, which checks of maps do without.
    from padim_jax.detector import geometry, steps
    from padim_jax.detector import statistics as statistics_lib

    model = config.model
    spec = backbones.BACKBONES[model.backbone]
    shapes = _shapes(config)
    form = statistics_lib.choose_form(shapes, images, model.statistics)
    # All devices get the same number of regions; some may be padded with zeros.
    shapes = [(devices.padded(regions), cells, d) for regions, cells, d in shapes]
    # All means, or one image's embeddings.
    embeddings = 4 * sum(regions * cells * channels for regions, cells, channels in shapes)
    fitted = 4 * statistics_lib.fitted_size(shapes, images, form) + embeddings
    statistics = fitted if form == "moments" else images * embeddings
    height, width = config.image.size
    features = _FEATURES[spec.block] * height * width
    # CPUs compute basic blocks in float32 regardless; all devices do so for depthwise
    # convolutions.
    if model.precision == "bfloat16" and spec.block == "bottleneck":
        features //= 2
    sharing = parallel.sharing_memory(devices)
    part = sharing / devices.total
    size = devices.padded(min(config.batch_size, images)) * part
    statistics, fitted = int(statistics * part), int(fitted * part)
    weights = sharing * _weights(model)
    at_once = min(size, sharing * steps.at_a_time(config, devices))
    # Embeddings are computed in parts, and then put side by side.
    batch = int(at_once * features + 2 * size * embeddings) + 3 * weights
    # Either the statistics are being copied to disk, or they become the model. CPUs write them
    # from where they are, except diagonal blocks, whose lower triangles are packed.
    copied = statistics
    if not parallel.memory_grows():
        triangles = sum(4 * regions * cells * d * (d + 1) // 2 for regions, cells, d in shapes)
        copied = int(triangles * part) if form == "moments" else 0
    finish = max(copied, fitted - statistics) + weights
    fit = statistics + max(batch, finish)
    score = fitted + batch
    first = 0
    if model.reduction == "pca":
        first = int(size * (features + _all_channels(config))) + 3 * weights  # not in parts
        # Per device a matrix and the intermediate for it; in float64 the sum, its parts and
        # eigenvectors.
        first += (2 * 4 * devices.local + 5 * 8) * geometry.total_channels(model) ** 2
    total = int(_PROGRAM) + max(first, fit, score)
    return Estimate(form, statistics, fitted, batch, total)


def estimate_evaluation(config: Config, images: int, tests: int, devices: Devices) -> int:
    """Estimate the machine's memory that an evaluation needs at its peak.

    Anomaly maps are kept until the end, in the first process. Masks are not read yet: a typical
    fraction of defect pixels is assumed.

    Args:
      config: model and image settings.
      images: number of fitted images.
      tests: number of test images.
      devices: devices that score.

    Returns:
      Bytes.
    """
    needed = estimate(config, images, devices)
    maps = _maps(config, tests)
    if parallel.free_memory() is not None:  # the model is in the devices' own memory
        return int(_PROGRAM) + maps
    return int(_PROGRAM) + needed.fitted + max(needed.batch, maps)


def embeddings_to_keep(
    config: Config, images: int, devices: Devices, kept: bool = False
) -> int:
    """Return the bytes that a process needs to keep the embeddings of a fit for its thresholds.

    Thresholds are bit-identical with and without them; with groups up to rounding, since their
    batches have other sizes.

    Args:
      config: configuration to fit.
      images: number of images.
      devices: devices that share the statistics and a batch.
      kept: see `require`.

    Returns:
      Bytes of the machine's memory; 0 if a process would then take more than half of what is
      free to it.
    """
    shapes = _shapes(config)
    floats = sum(devices.padded(regions) * cells * d for regions, cells, d in shapes)
    bytes_ = 4 * images * floats // devices.processes
    needed = estimate(config, images, devices)
    total = 0 if parallel.memory_grows() else needed.total + kept * needed.statistics
    fits = 2 * (total + bytes_) <= available_to_host()
    return bytes_ if np.all(parallel.gather(np.array([fits]))) else 0


def require(
    config: Config,
    images: int,
    devices: Devices,
    tests: int = 0,
    kept: bool = False,
    embeddings: int = 0,
) -> None:
    """Print the memory a run needs, and stop it if there is too little.

    Args:
      config: configuration to fit.
      images: number of images.
      devices: devices that share the statistics and a batch.
      tests: number of images evaluated next; 0 for none.
      kept: whether a copy of the statistics stays in the machine's memory.
      embeddings: see `embeddings_to_keep`.

    Raises:
      UserError: there is too little memory; states the need, what is free, and what would
        reduce the need.
    """
    needed, free = estimate(config, images, devices), available()
    copy = 0 if parallel.memory_grows() else kept * needed.statistics + embeddings
    needed = dataclasses.replace(needed, total=needed.total + copy)
    said = (
        f"about {needed.total / _GB:.1f} GB of memory to fit {images} images: "
        f"{needed.statistics / _GB:.2f} GB of statistics ({needed.form}), "
        f"{needed.batch / _GB:.2f} GB for a batch"
    )
    if embeddings:
        said += f", {embeddings / _GB:.2f} GB of embeddings for thresholds"
    if needed.total <= free:
        evaluated = ""
        if tests and devices.process == 0:  # the first process keeps the maps
            evaluation = estimate_evaluation(config, images, tests, devices)
            _require_for_evaluation(config, tests, evaluation)
            evaluated = f"; about {evaluation / _GB:.1f} GB to evaluate {tests} test images"
        progress.say(f"{said}{evaluated}; {free / _GB:.1f} GB are free")
        return
    advice = [
        "a smaller config.batch_size",
        f"a smaller config.image.{'crop' if config.image.crop else 'resize'}",
        "config.model.layers that start at a deeper one",
    ]
    if estimate(_with(config, precision="bfloat16"), images, devices).total < needed.total:
        advice.append("config.model.precision=bfloat16 (half the feature maps)")
    if parallel.memory_grows():
        advice.append("more devices, which share the statistics out")
    if channels := _most_channels(config, images, devices, free - copy):
        choice = f"config.model.channels={channels} (the most that fit)"
        if config.model.reduction == "none":
            choice = f"config.model.reduction={_fewer(config)} with {choice}"
        advice.insert(0, choice)
    raise UserError(
        f"not enough memory: {said}; {free / _GB:.1f} GB are free. Less is taken by "
        + ", ".join(advice)
    )


def require_for_maps(config: Config, images: int, defects: float | None = None) -> None:
    """Stop an evaluation whose anomaly maps, kept until the end, do not fit into memory.

    Args:
      config: configuration with the images' size.
      images: number of test images.
      defects: fraction of defect pixels, if the maps are already in memory; None before the
        evaluation.

    Raises:
      UserError: there is too little memory; states the need, what is free, and what would
        reduce the need.
    """
    _require_for_evaluation(config, images, _maps(config, images, defects))


def require_for_scores(config: Config, images: int, devices: Devices, tests: int = 0) -> None:
    """Print the memory that scoring with a loaded model needs; stop if there is too little.

    Args:
      config: configuration of a loaded model, whose memory is already in use.
      images: number of fitted images.
      devices: devices that score.
      tests: number of images to evaluate, whose maps are kept; 0 for predictions.

    Raises:
      UserError: there is too little memory; states the need, what is free, and what would
        reduce the need.
    """
    needed, free = estimate(config, images, devices), available()
    if needed.batch > free:
        raise UserError(
            f"not enough memory: {needed.batch / _GB:.2f} GB to score a batch of "
            f"{config.batch_size}; {free / _GB:.1f} GB are free. Less is taken by a smaller "
            "config.batch_size"
        )
    if devices.process > 0:
        return
    if tests:
        require_for_maps(config, tests)
        total = estimate_evaluation(config, images, tests, devices)
        what = f"to evaluate {tests} test images"
    else:
        total = estimate_prediction(config, images, devices)
        what = f"to score in batches of {config.batch_size}, images at full size apart"
    progress.say(f"about {total / _GB:.1f} GB of memory {what}; {free / _GB:.1f} GB are free")


def estimate_prediction(config: Config, images: int, devices: Devices) -> int:
    """Estimate the memory that predictions need at their peak; nothing is allocated.

    Images at full size are not included: they may use half of what is free; see
    `input_pipeline.ROOM`.

    Args:
      config: configuration of the model.
      images: number of fitted images.
      devices: devices that score.

    Returns:
      Bytes.
    """
    needed, (height, width) = estimate(config, images, devices), config.image.size
    written = _WRITTEN * config.batch_size * height * width
    return int(_PROGRAM) + needed.fitted + needed.batch + written


def _maps(config: Config, tests: int, defects: float | None = None) -> int:
    """Return the bytes that an evaluation needs for all pixels; see `require_for_maps`."""
    height, width = config.image.size
    pixel = _MEASURED + _DEFECT * (_USUAL_DEFECTS if defects is None else defects)
    return int(tests * height * width * (pixel + (_SCORED if defects is None else 0)))


def _require_for_evaluation(config: Config, tests: int, needed: int) -> None:
    height, width = config.image.size
    free = available_to_host()
    if needed > free:
        raise UserError(
            f"not enough memory: about {needed / _GB:.1f} GB to compare the anomaly maps of "
            f"{tests} test images of {height}x{width} pixels with their masks; "
            f"{free / _GB:.1f} GB are free. Less is taken by a part of the test images, or a "
            f"smaller config.image.{'crop' if config.image.crop else 'resize'}; scores alone, "
            "of any number of images, --mode=predict gives"
        )


def require_for_full(largest: int, defects: int) -> None:
    """Stop an evaluation at the masks' own sizes if there is too little memory.

    Args:
      largest: pixels of the largest test image.
      defects: defect pixels of all masks, as stored.

    Raises:
      UserError: there is too little memory; states the need, what is free, and what would
        reduce the need.
    """
    needed = _AT_ONCE * (largest + metrics.GROUP) + _DEFECT * defects
    free = available_to_host()
    if needed > free:
        raise UserError(
            f"not enough memory: about {needed / _GB:.1f} GB to compare anomaly maps with "
            f"masks at their own size, of up to {largest / 1e6:.1f} million pixels and "
            f"{defects / 1e6:.1f} million of defects in all; {free / _GB:.1f} GB are free. "
            "Less is taken by --config.metrics.resolution=model, or a part of the test images"
        )


def available(cgroups: pathlib.Path = _CGROUPS, own: pathlib.Path = _OWN_CGROUPS) -> int:
    """Return the free bytes where the statistics go: device memory, or the machine's.

    Args:
      cgroups: see `available_to_host`.
      own: see `available_to_host`.

    Returns:
      Bytes.
    """
    free = parallel.free_memory()
    return available_to_host(cgroups, own) if free is None else free


def limit_images() -> None:
    """Leave half of the free memory to images at full size, the other half to all else."""
    input_pipeline.ROOM.limit = available_to_host() // 2


def available_to_host(
    cgroups: pathlib.Path = _CGROUPS, own: pathlib.Path = _OWN_CGROUPS
) -> int:
    """Return the free bytes of the machine's memory, or of this process's limits if less.

    Limits are those of the process's control groups (of a container, a SLURM job, a systemd
    service) and of all their parents, and the process's own (`ulimit -v`, `ulimit -d`).

    Args:
      cgroups: root folder of Linux' control groups.
      own: file that names those of this process.

    Returns:
      Bytes, at least 0.
    """
    limits = [*_cgroup_limits(cgroups, own), *_process_limits()]
    return max(0, min([psutil.virtual_memory().available, *limits]))


def _cgroup_limits(root: pathlib.Path, own: pathlib.Path) -> Iterator[int]:
    """Yield what Linux' control groups (versions 2 and 1) leave free; nothing without them."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    places = dict.fromkeys(_CGROUP_FILES, "")
    for line in lines:
        number, controllers, place = line.split(":", 2)
        if number == "0":
            places["v2"] = places["hybrid"] = place
        elif "memory" in controllers.split(","):
            places["v1"] = place
    for kind, (base, most, usage, stat, cache) in _CGROUP_FILES.items():
        # A container may see its own group as the root, whatever its name outside: groups that
        # do not exist limit nothing.
        folder = root / base / places[kind].strip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root / base):
                break
            try:
                used = int((group / usage).read_text())
                entries = map(str.split, (group / stat).read_text().splitlines())
                # Cached files count as used until the memory is needed.
                droppable = sum(int(value) for name, value in entries if name == cache)
            except (OSError, ValueError):
                continue
            for limit in most:
                with contextlib.suppress(OSError, ValueError):  # "max": no limit
                    yield int((group / limit).read_text()) - used + droppable


def _process_limits() -> Iterator[int]:
    """Yield what `setrlimit` leaves free; it limits memory on Linux only."""
    if not psutil.LINUX:
        return
    process = psutil.Process()
    mapped = process.memory_info()
    for limit, used in (
        (psutil.RLIMIT_AS, mapped.vms),
        (psutil.RLIMIT_DATA, mapped.data),
    ):
        soft, _ = process.rlimit(limit)
        if soft != psutil.RLIM_INFINITY:
            yield soft - used


def _shapes(config: Config) -> list[tuple[int, int, int]]:
    """Return `Pyramid.shapes` without a pyramid, which takes much memory for large images.

    Rows and columns of the grids correspond independently: a grid's numbers are the products of
    its two sides' numbers.
    """
    from padim_jax.core import embedding
    from padim_jax.detector import geometry

    model = config.model
    if geometry.has_one_level(model):
        height, width = grid.patch_grid(config.image, model.layers)
        covered = geometry.inside(config.image, model.layers)
        count = height * width if covered is None else np.count_nonzero(covered.patches)
        return [(int(count), 1, model.channels)]
    spec = backbones.BACKBONES[model.backbone]
    ends = np.cumsum([spec.channels(layer) for layer in model.layers])
    index = geometry.channel_index(model)
    kept = np.bincount(np.searchsorted(ends, index, side="right"), minlength=len(ends))
    stages = tuple(np.flatnonzero(kept).tolist())
    ones = (1,) * len(ends)
    grids = [grid.patch_grid(config.image, (layer,)) for layer in model.layers]
    rows = embedding.pyramid(tuple((height, 1) for height, _ in grids), ones, stages)
    columns = embedding.pyramid(tuple((1, width) for _, width in grids), ones, stages)
    regions = rows.shapes[0][0] * columns.shapes[0][0]
    if (covered := geometry.inside(config.image, model.layers)) is not None:
        down, right = (axis.patches // axis.shapes[0][1] for axis in (rows, columns))
        numbers = down[:, None] * columns.shapes[0][0] + right
        regions = len(np.unique(numbers[covered.patches]))
    return [
        (regions, n1 * n2, int(channels))
        for (_, n1, _), (_, n2, _), channels in zip(
            rows.shapes, columns.shapes, kept[list(stages)], strict=True
        )
    ]


def _all_channels(config: Config) -> int:
    """Return the bytes of an image's embeddings of all channels: as is, centred, and moved."""
    spec, found = backbones.BACKBONES[config.model.backbone], 0
    for layer in config.model.layers:
        height, width = grid.patch_grid(config.image, (layer,))
        found += height * width * spec.channels(layer)
    return 3 * 4 * found


def _most_channels(config: Config, images: int, devices: Devices, free: int) -> int:
    """Return the largest number of channels that fits into memory; 0 if none does."""
    # All numbers are tried: where the form changes, more channels need less memory.
    for channels in range(config.model.channels - 1, 0, -1):
        fewer = _with(config, channels=channels, reduction=_fewer(config))
        if estimate(fewer, images, devices).total <= free:
            return channels
    return 0


def _fewer(config: Config) -> str:
    """Return a reduction with a number of channels: the configured one if it has one."""
    return "random" if config.model.reduction == "none" else config.model.reduction


def _with(config: Config, **model: Any) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def _weights(model: ModelConfig) -> int:
    """Return the approximate bytes of a backbone's weights."""
    spec = backbones.BACKBONES[model.backbone]
    return 4 * sum(map(spec.kernels, backbones.parts_to_compute(spec, model.layers)))
