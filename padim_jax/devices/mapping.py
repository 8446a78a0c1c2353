r"""The distribution of data over devices.

Images are distributed for extraction, regions of patches (see `embedding`) for statistics
and distances. Devices exchange only embeddings, in one all-to-all per batch and level, and
for scoring the patches' distances in return:

    images b/k a device -> levels (r, n, d, b/k) --to_regions--> (r/k, n, d, b) -> statistics
                                                                      \-> distances (r/k, n, b)
              anomaly maps of b/k images a device <-- (r, n, b/k) <--to_images--/

Covariances and factors never move. `detector`'s functions are written for one
device, refer to the others only by the axis `AXIS`, and are mapped by `jax.pmap` over all
devices of all processes; a single device is the case of an axis of size 1. A process sees its
own devices' parts of mapped arguments and results, along a leading axis of this size.

If the number of devices does not divide that of regions, regions of zeros are appended.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32

from padim_jax.core.types import Levels, Valid
from padim_jax.devices.layout import AXIS, Devices, memory_grows

Tree = TypeVar("Tree")


def mapped(
    function: Callable[..., Any],
    replicated: Iterable[int] = (),
    static: Iterable[int] = (),
    donated: Iterable[int] = (),
) -> Callable[..., Any]:
    """Map a function of one device over all devices, compiled.

    Args:
      function: function of positional arguments.
      replicated: positions of arguments that are equal on all devices, as made by `replicate`.
        All others have a leading axis of this process's devices.
      static: positions of arguments that are not arrays; each value is compiled separately.
      donated: positions of arguments whose memory is donated.

    Returns:
      The mapped function.
    """
    replicated, static = tuple(replicated), tuple(static)
    count = len(inspect.signature(function).parameters)
    axes = tuple(None if i in (*replicated, *static) else 0 for i in range(count))
    return jax.pmap(
        function,
        axis_name=AXIS,
        in_axes=axes,
        static_broadcasted_argnums=static,
        donate_argnums=tuple(donated),
    )


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for `mapped` as a function of this process's first device alone.

    Args:
      function: function of the arrays of one device; see `mapped`.

    Returns:
      The same function, which `jax.jit` compiles and `jax.export` exports.
    """
    spec = PartitionSpec()
    return jax.shard_map(
        function, mesh=Devices(1).local_mesh, in_specs=spec, out_specs=spec, check_vma=False
    )


def replicate(tree: Tree, devices: Devices) -> Tree:
    """Return the same arrays on each of this process's devices.

    Args:
      tree: arrays.
      devices: devices that take part.

    Returns:
      Replicated arrays of the same shapes.
    """
    return jax.device_put(tree, NamedSharding(devices.local_mesh, PartitionSpec()))


def total(tree: Tree) -> Tree:
    """Inside `mapped`: return the sum of each array over all devices."""
    return lax.psum(tree, AXIS)


def count() -> int:
    """Inside `mapped`: return the number of devices."""
    return lax.psum(1, AXIS)


def to_regions(levels: Levels) -> tuple[Float32[Array, "_k _n _d _b"], ...]:
    """Inside `mapped`: exchange all regions of own images for all images of own regions.

    Args:
      levels: (r, n, d, b / k) each.

    Returns:
      (r / k, n, d, b) each, with r rounded up.
    """
    size = lax.psum(1, AXIS)

    def exchange(x: Array) -> Array:
        x = jnp.pad(x, ((0, -len(x) % size), (0, 0), (0, 0), (0, 0)))
        return lax.all_to_all(x, AXIS, split_axis=0, concat_axis=3, tiled=True)

    return tuple(exchange(x) for x in levels)


def own_regions(tree: Tree) -> Tree:
    """Inside `mapped`: return this device's regions of constant arrays (r, ...)."""
    size = lax.psum(1, AXIS)

    def part(x: np.ndarray) -> Array:
        own = -(-len(x) // size)
        x = np.pad(x, ((0, own * size - len(x)), *[(0, 0)] * (x.ndim - 1)))
        return lax.dynamic_slice_in_dim(jnp.asarray(x), lax.axis_index(AXIS) * own, own)

    return jax.tree.map(part, tree)


def to_images(distances: Float32[Array, "r n b"]) -> Float32[Array, "_r n _b"]:
    """Inside `mapped`: undo `to_regions` for distances, (r / k, n, b) to (r, n, b / k)."""
    return lax.all_to_all(distances, AXIS, split_axis=2, concat_axis=0, tiled=True)


def of_all_images(valid: Valid) -> Bool[Array, " _b"]:
    """Inside `mapped`: gather values of a device's images (b / k,) to all images' (b,)."""
    return lax.all_gather(valid, AXIS, tiled=True)


def of_all_regions(flags: Array) -> Array:
    """Inside `mapped`: gather values of a device's regions (r / k,) to all regions' (r,)."""
    return lax.all_gather(flags, AXIS, tiled=True)


def share(array: np.ndarray, devices: Devices) -> np.ndarray:
    """Reshape this process's images (b, ...) for its devices.

    Args:
      array: (b, ...).
      devices: devices that take part.

    Returns:
      (k, b / k, ...).
    """
    return array.reshape(devices.local, -1, *array.shape[1:])


def split(tree: Any, devices: Devices) -> Any:
    """Place arrays of all regions on the devices.

    Args:
      tree: arrays (r, ...), or () for numbers without regions.
      devices: devices that take part.

    Returns:
      Arrays (k, r / k, ...), or (k,).
    """

    def place(x: Array | np.ndarray) -> Array:
        x = np.asarray(x)
        if not x.ndim:
            return number(x, devices)
        own = devices.padded(len(x)) // devices.processes
        x = x[devices.process * own :][:own]
        x = np.pad(x, ((0, own - len(x)), *[(0, 0)] * (x.ndim - 1))) if len(x) < own else x
        spec = PartitionSpec(AXIS)
        return jax.device_put(share(x, devices), NamedSharding(devices.local_mesh, spec))

    return jax.tree.map(place, tree)


def join(tree: Any, regions: int) -> Any:
    """Return host arrays of all regions from the devices of one process; undoes `split`.

    Args:
      tree: tuple, list or dict of arrays (k, r / k, ...) or (k,).
      regions: number of regions; padding beyond it is cut off.

    Returns:
      Arrays (r, ...) or ().
    """

    def gathered(x: Array) -> np.ndarray:
        array = np.asarray(x)
        if array.ndim == 1:
            return np.asarray(array[0])
        return array.reshape(-1, *array.shape[2:])[:regions]

    return jax.tree.map(gathered, tree)


def on_devices(tree: Tree, devices: Devices) -> Tree:
    """Copy host arrays onto this process's devices, a part on each.

    Args:
      tree: arrays with a leading axis of the process's devices, (k, ...).
      devices: devices that take part.

    Returns:
      The arrays on the devices.
    """
    spec = NamedSharding(devices.local_mesh, PartitionSpec(AXIS))
    return jax.device_put(tree, spec, may_alias=False)  # they may be donated


def number(value: np.ndarray | int, devices: Devices) -> Array:
    """Return the same number for each of this process's devices.

    Args:
      value: the number.
      devices: devices that take part.

    Returns:
      (k,).
    """
    values = np.broadcast_to(value, devices.local)
    return jax.device_put(values, NamedSharding(devices.local_mesh, PartitionSpec(AXIS)))


def as_global(tree: Tree, devices: Devices, donate: bool = False) -> Tree:
    """Combine all processes' arrays to global ones, for storage.

    Each device keeps its regions. On CPUs, arrays that are not donated share their memory with
    the result, which must be gone before they are donated.

    Args:
      tree: arrays (k, r / k, ...) of this process.
      devices: devices of all processes.
      donate: whether to donate the arrays.

    Returns:
      Global arrays (r, ...).
    """
    if not donate and not memory_grows():
        return jax.tree.map(lambda x: _aliased(x, devices), tree)
    spec = PartitionSpec(AXIS)
    whole = multihost_utils.host_local_array_to_global_array(tree, devices.mesh, spec)
    return _merge(devices, donate)(whole)


def _aliased(array: Array, devices: Devices) -> Array:
    shards = [
        jax.device_put(np.asarray(shard.data)[0], shard.device, may_alias=True)
        for shard in array.addressable_shards
    ]
    shape = devices.processes * len(shards) * len(shards[0]), *array.shape[2:]
    return jax.make_array_from_single_device_arrays(shape, sharding(devices), shards)


def from_global(tree: Tree, devices: Devices) -> Tree:
    """Return this process's part of global arrays, which are donated; undoes `as_global`.

    Args:
      tree: global arrays (r, ...).
      devices: devices of all processes.

    Returns:
      Arrays (k, r / k, ...).
    """
    spec = PartitionSpec(AXIS)
    divided = _divide(devices)(tree)
    return multihost_utils.global_array_to_host_local_array(divided, devices.mesh, spec)


def sharding(devices: Devices) -> NamedSharding:
    """Return the sharding of `as_global`'s arrays: consecutive regions on each device."""
    return NamedSharding(devices.mesh, PartitionSpec(AXIS))


def everywhere(devices: Devices) -> NamedSharding:
    """Return the sharding of global arrays that are equal on all devices."""
    return NamedSharding(devices.mesh, PartitionSpec())


def parts(tree: Any, devices: Devices) -> Iterator[tuple[int, Any]]:
    """Yield the arrays of each local device on the host.

    Args:
      tree: arrays (k, r / k, ...).
      devices: devices of all processes.

    Yields:
      Number of the device's first region, and its arrays (r / k, ...).
    """
    leaves, structure = jax.tree.flatten(tree)
    each = [sorted(x.addressable_shards, key=lambda y: y.index[0].start or 0) for x in leaves]
    for number, shards in enumerate(zip(*each, strict=True)):
        arrays = [np.asarray(shard.data)[0] for shard in shards]
        first = (devices.process * devices.local + number) * len(arrays[0])
        yield first, structure.unflatten(arrays)


@functools.cache  # otherwise each call would compile anew
def _merge(devices: Devices, donate: bool) -> Callable[[Any], Any]:
    return jax.jit(
        lambda tree: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree),
        out_shardings=sharding(devices),
        donate_argnums=(0,) if donate else (),
    )


@functools.cache
def _divide(devices: Devices) -> Callable[[Any], Any]:
    size = devices.total
    return jax.jit(
        lambda tree: jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), tree),
        out_shardings=sharding(devices),
        donate_argnums=(0,),
    )
