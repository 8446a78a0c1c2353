"""Which of how many processes this one is: from flags, or from what launched it."""

import dataclasses
import re
import zlib
from collections.abc import Mapping

from padim_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Place:
    """This process's place among all.

    Attributes:
      coordinator: HOST:PORT, where process 0 listens.
      processes: how many there are, at least 2.
      process_id: this one's number, from 0.
    """

    coordinator: str
    processes: int
    process_id: int

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the environment tells of a launch; None where it tells nothing."""

    source: str
    coordinator: str | None = None
    processes: int | None = None
    process_id: int | None = None
    no_coordinator: str = "missing"


def find(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str],
) -> Place | None:
    """Where this process stands among others: from flags, and else from its environment.

    Args:
      coordinator: --coordinator, or None.
      processes: --processes, or None; 1 asks for nothing to be looked for.
      process_id: --process_id, or None.
      environment: as `os.environ`: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
        JAX_PROCESS_ID (on Kubernetes also JOB_COMPLETION_INDEX), or what Open MPI's mpirun
        or SLURM's srun set for several tasks.

    Returns:
      None for a process on its own.

    Raises:
      UserError: only a part is known, or it is no address and no number in range.
    """
    if processes == 1:
        return None
    found = _detect(environment)
    coordinator = coordinator or found.coordinator
    source = found.source if processes is None else "flags"
    if processes is None:
        processes = found.processes
    if process_id is None:
        process_id = found.process_id
    if processes == 1 or (processes is None and coordinator is None and process_id is None):
        return None
    if processes is None:
        raise UserError(
            "--processes: missing; how many processes take part, or 1 for this one alone"
        )
    if processes < 1:
        raise UserError(f"--processes={processes}: expected 1 or more")
    if process_id is None:
        raise UserError(
            f"--process_id: missing; expected this process's number, 0 to {processes - 1}"
        )
    if not 0 <= process_id < processes:
        raise UserError(
            f"--process_id={process_id}: expected 0 to {processes - 1}, "
            f"for {processes} processes ({source})"
        )
    if coordinator is None:
        raise UserError(
            f"--coordinator: {found.no_coordinator}; expected HOST:PORT, where all processes "
            "reach process 0"
        )
    if not re.fullmatch(r"(\[[^\]]+\]|[^:\[\]/\s]+):\d{1,5}", coordinator) or not (
        0 < int(coordinator.rpartition(":")[2]) < 2**16
    ):
        raise UserError(f"--coordinator={coordinator}: expected HOST:PORT, as node1:8476")
    return Place(coordinator, processes, process_id)


def _detect(environment: Mapping[str, str]) -> _Found:
    # mpirun starts its helpers through srun, whose variables its processes then inherit:
    # Open MPI's own come first.
    launchers = (_named, _open_mpi, _slurm)
    found = (launcher(environment) for launcher in launchers)
    launched = [launch for launch in found if launch is not None]
    if not launched:
        return _Found("environment")
    merged = {
        name: next((v for launch in launched if (v := getattr(launch, name)) is not None), None)
        for name in ("coordinator", "processes", "process_id")
    }
    return dataclasses.replace(launched[-1], **merged)


def _named(environment: Mapping[str, str]) -> _Found | None:
    """Variables that say it outright; JAX_COORDINATOR_ADDRESS is JAX's own."""
    coordinator = environment.get("JAX_COORDINATOR_ADDRESS") or None
    processes = _number(environment, "JAX_NUM_PROCESSES")
    process_id = _number(environment, "JAX_PROCESS_ID")
    if coordinator is None and processes is None and process_id is None:
        return None
    if process_id is None and "OMPI_COMM_WORLD_RANK" not in environment:
        # Of every pod of an Indexed Job; alone it may as well number independent runs.
        process_id = _number(environment, "JOB_COMPLETION_INDEX")
    return _Found("JAX_NUM_PROCESSES", coordinator, processes, process_id)


def _open_mpi(environment: Mapping[str, str]) -> _Found | None:
    processes = _number(environment, "OMPI_COMM_WORLD_SIZE")
    if processes is None or processes < 2:
        return None
    # Where mpirun was started: Open MPI 5 says "prterun-node1-14504@1", 4 says
    # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911".
    job, uri = (
        environment.get(name, "") for name in ("PMIX_NAMESPACE", "OMPI_MCA_orte_hnp_uri")
    )
    namespace = re.fullmatch(r"prterun-(.+)-\d+@\d+", job)
    address = re.search(r"tcp6?://(?:\[([^,\]]+)|([^,:\[]+))", uri)
    if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(processes):
        host = "127.0.0.1"
    elif namespace:
        host = namespace[1]
    elif address:
        host = f"[{address[1]}]" if address[1] else address[2]
    else:
        host = None
    job = job or uri
    return _Found(
        "Open MPI",
        f"{host}:{_port(job)}" if host else None,
        processes,
        _number(environment, "OMPI_COMM_WORLD_RANK"),
        "this Open MPI does not tell on which machine process 0 runs",
    )


def _slurm(environment: Mapping[str, str]) -> _Found | None:
    # Of the step, which only srun makes. SLURM_NTASKS is also set in a batch script and in
    # a shell of salloc, of which there is one however many tasks there are to be.
    processes = _number(environment, "SLURM_STEP_NUM_TASKS")
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    if processes is None or processes < 2 or not nodes:
        return None
    # The first of "gpu[01-04,07],login", "gpu7" or "rack[1-2]node[05,08]".
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else nodes
    step = f"{environment.get('SLURM_JOB_ID')}.{environment.get('SLURM_STEP_ID')}"
    return _Found(
        "SLURM", f"{host}:{_port(step)}", processes, _number(environment, "SLURM_PROCID")
    )


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "")
    if not value:
        return None
    if not value.isdecimal():
        raise UserError(f"{name}={value}: expected a number; it is set in the environment")
    return int(value)


def _port(job: str) -> int:
    """A port that all processes of a job find, above those that systems hand out."""
    return 61440 + zlib.crc32(job.encode()) % 4096
