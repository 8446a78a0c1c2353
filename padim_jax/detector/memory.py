"""How much memory a run takes, and how much there is: before it, not by being killed."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import psutil

from padim_jax.config import backbones
from padim_jax.config.settings import Config, ModelConfig
from padim_jax.core import embedding, metrics
from padim_jax.detector import detector
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.system import progress

_GB = 1e9
# Python with its libraries (0.25 GB), JAX, compiled programs, the decoders and what they have
# in the works: peak of a run of 20 images of 96x96 pixels.
_PROGRAM = 0.6 * _GB
# Feature maps in float32, as XLA's compiled programs report it at most: bytes for a pixel
# of the batch.
_FEATURES = {"basic": 90, "bottleneck": 345, "mbconv": 320}
# Of an evaluation, bytes for a pixel of the test set: its score and whether it is a defect's;
# what metrics, curves and report make of it at most; and on top of it for a defect's pixel.
# Measured with 39 million pixels, of which 0.05, 2.5 and 20 % defects: 18.0, 18.5 and 45.7
# bytes beside the scores.
_SCORED, _MEASURED, _DEFECT = 5, 16, 160
# For a pixel of a batch of predictions: images that are decoded ahead, maps, and pictures.
# Measured 46 at 512x512, 28 at 256x256, in batches of 32.
_WRITTEN = 45
_AT_ONCE = 40  # for a pixel of the largest image, or of a group that is sorted together
_USUAL_DEFECTS = 0.05  # the share of pixels, before masks are read
_CGROUPS = pathlib.Path("/sys/fs/cgroup")
_OWN_CGROUPS = pathlib.Path("/proc/self/cgroup")
_V2 = ("memory.max", "memory.high"), "memory.current", "memory.stat", "inactive_file"
# Where control groups are; the files of their limits, of what is used and of what of it; the
# cached files there.
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
    """Bytes that a fit takes at its peak, of each memory: a GPU's, or the machine's.

    Attributes:
      form: of the statistics, "moments" or "samples".
      statistics: of the normal images.
      fitted: the model that scores; moments become it in place.
      batch: feature maps and embeddings of a batch, and the backbone.
      total: the most that is there at once, with the program itself.
    """

    form: str
    statistics: int
    fitted: int
    batch: int
    total: int


def estimate(config: Config, images: int, devices: Devices) -> Estimate:
    """Estimates what fitting a number of images takes; nothing is allocated.

    Args:
      config: what to fit.
      images: how many.
      devices: that share the statistics and a batch. CPU devices of a process share their
        memory, too.
    """
    model = config.model
    spec = backbones.BACKBONES[model.backbone]
    shapes = _shapes(config)
    form = detector.choose_form(shapes, images, model.statistics)
    # As many for every device: some may have regions of zeros.
    shapes = [(devices.padded(regions), cells, d) for regions, cells, d in shapes]
    # Every mean, or one image's embeddings.
    embeddings = 4 * sum(regions * cells * channels for regions, cells, channels in shapes)
    fitted = 4 * detector.fitted_size(shapes, images, form) + embeddings
    statistics = fitted if form == "moments" else images * embeddings
    height, width = config.image.size
    features = _FEATURES[spec.block] * height * width
    # CPUs compute basic blocks in float32 all the same, depthwise convolutions all devices.
    if model.precision == "bfloat16" and spec.block == "bottleneck":
        features //= 2
    sharing = parallel.sharing_memory(devices)
    part = sharing / devices.total
    size = devices.padded(min(config.batch_size, images)) * part
    statistics, fitted = int(statistics * part), int(fitted * part)
    weights = sharing * _weights(model)
    batch = int(size * (features + embeddings)) + 3 * weights
    # A copy of the statistics is on its way to the disk, or they become the model.
    finish = max(statistics, fitted - statistics) + weights
    fit = statistics + max(batch, finish)
    score = fitted + batch
    first = 0
    if model.reduction == "pca":
        first = int(size * (features + _all_channels(config))) + 3 * weights
        # Of every device a matrix and its making; in float64 the sum, its parts and vectors.
        first += (2 * 4 * devices.local + 5 * 8) * detector.total_channels(model) ** 2
    total = int(_PROGRAM) + max(first, fit, score)
    return Estimate(form, statistics, fitted, batch, total)


def estimate_evaluation(config: Config, images: int, tests: int, devices: Devices) -> int:
    """Estimate the bytes of the machine's memory that an evaluation takes at its peak.

    Anomaly maps are kept until the end, in the first process. Masks are not read yet: a usual
    share of defect pixels is assumed.

    Args:
      config: of model and images.
      images: how many were fitted.
      tests: images of the test set.
      devices: that score.
    """
    needed = estimate(config, images, devices)
    maps = _maps(config, tests)
    if parallel.free_memory() is not None:  # the model is in the devices' own
        return int(_PROGRAM) + maps
    return int(_PROGRAM) + needed.fitted + max(needed.batch, maps)


def require(
    config: Config, images: int, devices: Devices, tests: int = 0, kept: bool = False
) -> None:
    """Says what a run will take of each memory, and stops one that there is too little for.

    Args:
      config: what to fit.
      images: how many.
      devices: that share the statistics and a batch.
      tests: images that are evaluated next; 0 for none.
      kept: whether a copy of the statistics stays in the machine's memory.

    Raises:
      UserError: what it takes, what there is, and what would take less.
    """
    needed, free = estimate(config, images, devices), available()
    copy = needed.statistics if kept and not parallel.memory_grows() else 0
    needed = dataclasses.replace(needed, total=needed.total + copy)
    said = (
        f"about {needed.total / _GB:.1f} GB of memory to fit {images} images: "
        f"{needed.statistics / _GB:.2f} GB of statistics ({needed.form}), "
        f"{needed.batch / _GB:.2f} GB for a batch"
    )
    if needed.total <= free:
        evaluated = ""
        if tests and devices.process == 0:  # which keeps the maps
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
    """Stops an evaluation whose anomaly maps, which are kept until the end, have no room.

    Args:
      config: of the images' size.
      images: of the test set.
      defects: the share of defect pixels, where the maps are in memory already; None before
        the evaluation.

    Raises:
      UserError: what it takes, what there is, and what would take less.
    """
    _require_for_evaluation(config, images, _maps(config, images, defects))


def require_for_scores(config: Config, images: int, devices: Devices, tests: int = 0) -> None:
    """Say what scoring with a loaded model takes; stop where there is too little memory.

    Args:
      config: of a model that is loaded: its memory is taken already.
      images: how many were fitted.
      devices: that score.
      tests: images that are evaluated, of which the maps are kept; 0 for predictions.

    Raises:
      UserError: what a batch takes, what there is, and what would take less.
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
    """Estimate the bytes that predictions take at their peak; nothing is allocated.

    Images at full size are apart: they have half of what is free; see `input_pipeline.ROOM`.

    Args:
      config: of the model.
      images: how many were fitted.
      devices: that score.
    """
    needed, (height, width) = estimate(config, images, devices), config.image.size
    written = _WRITTEN * config.batch_size * height * width
    return int(_PROGRAM) + needed.fitted + needed.batch + written


def _maps(config: Config, tests: int, defects: float | None = None) -> int:
    """Bytes of what an evaluation keeps and makes of all pixels; see `require_for_maps`."""
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
    """Stops an evaluation at the masks' own sizes that there is too little memory for.

    Args:
      largest: pixels of the largest test image.
      defects: defect pixels of all masks, as they are stored.

    Raises:
      UserError: what it takes, what there is, and what would take less.
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
    """Bytes free where the statistics go: the device's own memory, or the machine's.

    Args:
      cgroups: see `available_to_host`.
      own: likewise.
    """
    free = parallel.free_memory()
    return available_to_host(cgroups, own) if free is None else free


def available_to_host(
    cgroups: pathlib.Path = _CGROUPS, own: pathlib.Path = _OWN_CGROUPS
) -> int:
    """Bytes free of the machine's memory, or what a limit leaves to this process, if less.

    Limits are those of the control groups that the process is in (of a container, a job of
    SLURM, a service of systemd) and of all that these are in, and the process's own
    (`ulimit -v`, `ulimit -d`).

    Args:
      cgroups: where Linux has its control groups.
      own: the file that names those of this process.
    """
    limits = [*_cgroup_limits(cgroups, own), *_process_limits()]
    return max(0, min([psutil.virtual_memory().available, *limits]))


def _cgroup_limits(root: pathlib.Path, own: pathlib.Path) -> Iterator[int]:
    """What Linux' control groups leave, of version 2 and 1; nothing where there are none."""
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
        # A container may see its own group as the root, by whatever name it goes outside:
        # groups that are not there limit nothing.
        folder = root / base / places[kind].strip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root / base):
                break
            try:
                used = int((group / usage).read_text())
                entries = map(str.split, (group / stat).read_text().splitlines())
                # Files that were read count as used until something else needs the room.
                droppable = sum(int(value) for name, value in entries if name == cache)
            except (OSError, ValueError):
                continue
            for limit in most:
                with contextlib.suppress(OSError, ValueError):  # "max": no limit
                    yield int((group / limit).read_text()) - used + droppable


def _process_limits() -> Iterator[int]:
    """What `setrlimit` leaves; elsewhere than on Linux memory is not limited by it."""
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


def _shapes(config: Config) -> list[detector.Shape]:
    """`Pyramid.shapes`, without the pyramid: that of a large image takes much memory itself.

    Rows and columns of grids lie upon each other independently: what holds for a grid is
    the product of what holds for its two sides.
    """
    model = config.model
    if detector.has_one_level(model):
        height, width = detector.patch_grid(config.image, model.layers)
        return [(height * width, 1, model.channels)]
    spec = backbones.BACKBONES[model.backbone]
    ends = np.cumsum([spec.channels(layer) for layer in model.layers])
    index = detector.channel_index(model)
    kept = np.bincount(np.searchsorted(ends, index, side="right"), minlength=len(ends))
    stages = tuple(np.flatnonzero(kept).tolist())
    ones = (1,) * len(ends)
    grids = [detector.patch_grid(config.image, (layer,)) for layer in model.layers]
    rows = embedding.pyramid(tuple((height, 1) for height, _ in grids), ones, stages)
    columns = embedding.pyramid(tuple((1, width) for _, width in grids), ones, stages)
    return [
        (r1 * r2, n1 * n2, int(channels))
        for (r1, n1, _), (r2, n2, _), channels in zip(
            rows.shapes, columns.shapes, kept[list(stages)], strict=True
        )
    ]


def _all_channels(config: Config) -> int:
    """Bytes of an image's embeddings of all channels by stage, centred and moved once each."""
    spec, found = backbones.BACKBONES[config.model.backbone], 0
    for layer in config.model.layers:
        height, width = detector.patch_grid(config.image, (layer,))
        found += height * width * spec.channels(layer)
    return 3 * 4 * found


def _most_channels(config: Config, images: int, devices: Devices, free: int) -> int:
    """The most channels of which the fit has room; 0 if none."""
    # All of them are tried: where the form changes, more channels take less memory.
    for channels in range(config.model.channels - 1, 0, -1):
        fewer = _with(config, channels=channels, reduction=_fewer(config))
        if estimate(fewer, images, devices).total <= free:
            return channels
    return 0


def _fewer(config: Config) -> str:
    """A reduction that takes a number of channels: the configuration's, if it is one."""
    return "random" if config.model.reduction == "none" else config.model.reduction


def _with(config: Config, **model: Any) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def _weights(model: ModelConfig) -> int:
    """Bytes of a backbone's weights, roughly."""
    spec = backbones.BACKBONES[model.backbone]
    return 4 * sum(map(spec.kernels, backbones.parts_to_compute(spec, model.layers)))
