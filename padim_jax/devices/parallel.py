"""The devices and processes that run a program, and what they tell each other.

Functions of arrays on devices are those of `mapping`, which imports JAX on their first use:
without them this module works in programs that score without JAX.
"""

import contextlib
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from padim_jax.devices.layout import AXIS, Devices, imported_jax, memory_grows
from padim_jax.errors import UserError

if TYPE_CHECKING:
    from padim_jax.devices.mapping import (
        alone,
        as_global,
        count,
        everywhere,
        from_global,
        join,
        mapped,
        number,
        of_all_images,
        of_all_regions,
        on_devices,
        own_regions,
        parts,
        replicate,
        sharding,
        share,
        split,
        to_images,
        to_regions,
        total,
    )

__all__ = [
    "AXIS",
    "Devices",
    "agreed",
    "alone",
    "as_global",
    "count",
    "every",
    "everywhere",
    "first_process_first",
    "free_memory",
    "from_global",
    "gather",
    "gather_bytes",
    "join",
    "mapped",
    "memory_grows",
    "number",
    "of_all_images",
    "of_all_regions",
    "on_devices",
    "own_regions",
    "parts",
    "replicate",
    "sharding",
    "share",
    "sharing_memory",
    "split",
    "to_images",
    "to_regions",
    "total",
]

Tree = TypeVar("Tree")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("padim_jax.devices.mapping"), name)


def every() -> Devices:
    """Return all devices of all processes that run this program; without JAX, one processor.

    Raises:
      UserError: there are none of the kind named by JAX_PLATFORMS, or the processes have
        different numbers of them.
    """
    if (jax := imported_jax()) is None:
        return Devices(1)
    platforms = jax.config.jax_platforms
    try:
        jax.local_device_count()
    # AssertionError for a platform that is unknown, such as cuda without its plugin.
    except (RuntimeError, AssertionError) as error:
        if not platforms:
            raise
        reason = " ".join(str(error).split()) or "no such device"
        raise UserError(
            f"JAX_PLATFORMS={platforms}: JAX cannot use that ({reason}); install its driver "
            'and JAX plugin, as with pip install "padim-jax[cuda12]", or unset JAX_PLATFORMS'
        ) from error
    counts = [len(jax.local_devices(process)) for process in range(jax.process_count())]
    if len(set(counts)) > 1:
        numbers = ", ".join(str(count) for count in counts)
        raise UserError(
            f"the processes have different numbers of devices: {numbers}. Give each as many "
            "with CUDA_VISIBLE_DEVICES or, on CPUs, JAX_NUM_CPU_DEVICES"
        )
    return Devices(jax.local_device_count(), jax.process_count(), jax.process_index())


def sharing_memory(devices: Devices) -> int:
    """Return how many of this process's devices share one memory: those of a CPU do."""
    return 1 if memory_grows() else devices.local


def free_memory() -> int | None:
    """Return the fewest free bytes of this process's devices; None for host memory."""
    if (jax := imported_jax()) is None:
        return None
    found = [device.memory_stats() for device in jax.local_devices()]
    free = [x["bytes_limit"] - x["bytes_in_use"] for x in found if x and "bytes_limit" in x]
    return min(free) if free else None


def agreed(value: int) -> int:
    """Return process 0's value in all processes. A collective."""
    if _is_alone():
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """Run the block in process 0 first, then in the others, which find its results."""
    jax = imported_jax()
    if jax and jax.process_index() > 0:
        agreed(0)
    yield
    if jax and jax.process_index() == 0:
        agreed(0)


def gather(tree: Tree) -> Tree:
    """Concatenate host arrays (b, ...) of all processes, in all processes.

    A collective: all processes call it, with equal shapes.
    """
    if _is_alone():
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def gather_bytes(data: bytes) -> list[bytes]:
    """Return each process's bytes, in all processes. A collective."""
    lengths = gather(np.array([len(data)], np.int32))
    padded = np.zeros((1, max(1, *lengths.tolist())), np.uint8)
    padded[0, : len(data)] = np.frombuffer(data, np.uint8)
    return [row[:length].tobytes() for row, length in zip(gather(padded), lengths, strict=True)]


def _is_alone() -> bool:
    jax = imported_jax()
    return jax is None or jax.process_count() == 1
