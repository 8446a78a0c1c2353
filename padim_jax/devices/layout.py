"""Which devices take part: those of JAX, or the processor that another runtime uses."""

import dataclasses
import sys
from typing import Any

import numpy as np

AXIS = "devices"


def imported_jax() -> Any:
    """Return JAX, or None in a program that has not imported it.

    Such a program scores in another runtime, and is a process on its own.
    """
    return sys.modules.get("jax")


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices that take part.

    Attributes:
      local: number of devices of this process, equal in all processes.
      processes: number of processes.
      process: index of this process, from 0.
    """

    local: int
    processes: int = 1
    process: int = 0

    @property
    def total(self) -> int:
        """Return the number of devices of all processes."""
        return self.local * self.processes

    def padded(self, size: int) -> int:
        """Return the next multiple of the number of devices."""
        return -(-size // self.total) * self.total

    @property
    def mesh(self) -> Any:
        """Return JAX's mesh of all devices, process by process, as `jax.pmap` orders them."""
        import jax
        from jax.sharding import Mesh

        found = [
            device
            for process in range(self.processes)
            for device in jax.local_devices(process)[: self.local]
        ]
        return Mesh(np.array(found), (AXIS,))

    @property
    def local_mesh(self) -> Any:
        """Return JAX's mesh of this process's devices."""
        import jax
        from jax.sharding import Mesh

        return Mesh(np.array(jax.local_devices()[: self.local]), (AXIS,))


def memory_grows() -> bool:
    """Return whether each device has memory of its own, as GPUs do."""
    jax = imported_jax()
    return jax is not None and jax.default_backend() != "cpu"
