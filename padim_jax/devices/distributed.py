"""Many processes that compute as one, through `jax.distributed`.

JAX lets them find each other, joins their devices, and ends all when one is lost: at once if
it is process 0, otherwise after `HEARTBEAT_SECONDS`. This module compares their settings, and
tells the others why a process fails, for whom JAX would only have an abort.
"""

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed  # its key-value store has no public name

from padim_jax.devices import parallel
from padim_jax.errors import NO_MEMORY, Stopped, UserError, is_out_of_memory
from padim_jax.system import streams

# A thread of JAX's sends heartbeats, whatever Python does; when they stay out all are ended.
HEARTBEAT_SECONDS = 30
# At the end all wait for the slowest: process 0 may have much to write.
_END_SECONDS = 10**6
# Keys of JAX's store, which is in process 0: why a process ended.
_ENDED = "padim_jax/ended/"
_POLL_SECONDS = 0.5
_ending = threading.Lock()  # held by the one thread that ends this process
# Above 1 where several processes were started: by srun, by mpirun, by a manifest.
_LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")


def arguments(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    detect: bool,
    environment: Mapping[str, str],
) -> dict[str, Any] | None:
    """Return the arguments of `jax.distributed.initialize`; None for a process on its own.

    Args:
      coordinator: HOST:PORT, where process 0 listens, or None.
      processes: how many there are, or None; 1 for a process on its own.
      process_id: which one this is, or None.
      detect: whether JAX is to find what is None.
      environment: as `os.environ`.

    Raises:
      UserError: several processes were started, and nothing says what for.
    """
    flags = (coordinator, processes, process_id)
    if processes == 1 or (not detect and flags == (None, None, None)):
        for name in _LAUNCHERS if processes is None else ():
            if environment.get(name, "") not in ("", "1"):
                raise UserError(
                    f"{name}={environment[name]}: several processes were started; add "
                    "--distributed for them to compute together (launch/README.md), or "
                    "--processes=1 for each to run on its own"
                )
        return None
    host, _, port = (coordinator or "").rpartition(":")
    # Other machines do not reach process 0 where all processes are on this one.
    local = host in ("127.0.0.1", "localhost")
    return {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process_id,
        "coordinator_bind_address": f"127.0.0.1:{port}" if local else None,
        "cluster_detection_method": None if detect else "deactivate",
        # All that this process sees; under SLURM and Open MPI JAX would take only one.
        "local_device_ids": [],
    }


@contextlib.contextmanager
def session(
    launch: Mapping[str, Any] | None, settings: Mapping[str, str], timeout: float = 300.0
) -> Iterator[None]:
    """Join the processes, before anything else touches a device; leave them at the end.

    Within, `jax.devices()` are those of all processes, and only process 0 prints to standard
    output. An error that leaves the block is printed and ends this process, with exit code 2
    for a `UserError` and otherwise 1; the others print it too and end likewise.

    Args:
      launch: from `arguments`; with None nothing happens.
      settings: what has to be the same in all processes; values are shown when they differ.
      timeout: seconds after which a process ends, with exit code 1, if not all have come.

    Raises:
      UserError: JAX cannot join the processes as `launch` says.
    """
    if launch is None:
        yield
        return
    _join(launch, timeout)
    left = threading.Event()
    follower = threading.Thread(target=_follow, args=(left,), daemon=True)
    follower.start()
    try:
        _silence(parallel.every().process)
        _require_same({**settings, "--processes": str(launch["num_processes"])})
        yield
    except Stopped:
        raise
    except BaseException as error:
        _end(error)
    finally:
        # Python would abort at its end while a thread is in JAX's client.
        left.set()
        follower.join()
        jax.distributed.shutdown()


def _join(launch: Mapping[str, Any], timeout: float) -> None:
    # SIGTERM stays with Python's handlers, or ends the process: JAX's service would take it.
    jax.config.update("jax_enable_preemption_service", False)
    # Processes reach each other directly, whatever proxy the environment names.
    jax.config.update("jax_check_proxy_envs", False)
    os.environ["grpc_proxy"] = ""  # noqa: SIM112 (gRPC's spelling)
    # Ahead of JAX's own time-out, which aborts with a stack trace.
    late = threading.Timer(timeout, _give_up, (timeout,))
    late.daemon = True
    late.start()
    try:
        if launch["process_id"] == 0 and launch["coordinator_address"]:
            # JAX may crash on a port that is taken.
            host = "127.0.0.1" if launch["coordinator_bind_address"] else ""
            port = launch["coordinator_address"].rpartition(":")[2]
            socket.create_server((host, int(port))).close()
        jax.distributed.initialize(
            **launch,
            initialization_timeout=math.ceil(timeout) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_END_SECONDS,
        )
    except (RuntimeError, ValueError, LookupError, OSError) as error:
        raise UserError(
            f"the processes cannot be joined ({' '.join(str(error).split())}); expected "
            "--coordinator=HOST:PORT, a free port of process 0, --processes=N and "
            "--process_id=I, 0 to N-1; or --distributed under SLURM, Open MPI or Kubernetes"
        ) from error
    finally:
        late.cancel()


def _give_up(timeout: float) -> None:
    message = (
        f"error: not all processes came within {timeout:g} s (--join_seconds); was each "
        "started, with the same --coordinator and --processes, and do they reach each other?\n"
    )
    os.write(2, message.encode())
    os._exit(1)


def _silence(process: int) -> None:
    """Leave standard output to Python's prints of process 0.

    The others would repeat them, and Gloo's lines about its connections help nobody.
    """
    sys.stdout.flush()
    if process == 0:
        sys.stdout = streams.opened(os.dup(1))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _require_same(settings: Mapping[str, str]) -> None:
    texts = parallel.gather_bytes(json.dumps(settings).encode())
    first, *others = (json.loads(text) for text in texts)
    for process, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise UserError(
                    f"{name} is {other.get(name)} for process {process}, but {first.get(name)} "
                    "for process 0; expected the same"
                )


def _follow(left: threading.Event) -> None:
    """End this process, whatever it waits for, when another one says that it ended."""
    client: Any = jax_distributed.global_state.client
    own = f"{_ENDED}{jax_distributed.global_state.process_id}"
    with contextlib.suppress(RuntimeError):  # when this process has left
        while not left.is_set():
            for key, message in client.key_value_dir_get(_ENDED):
                if key != own:
                    _exit(**json.loads(message))
            left.wait(_POLL_SECONDS)


def _end(error: BaseException) -> NoReturn:
    """Print an error, tell it to the other processes, and end this one."""
    if is_out_of_memory(error):
        error = UserError(NO_MEMORY)
    if isinstance(error, jax.errors.JaxRuntimeError):
        # Where another process was lost, its connections break first; JAX ends this one too.
        time.sleep(HEARTBEAT_SECONDS + 5)
    if isinstance(error, UserError):
        code, reason = 2, str(error)
        text = f"error: {reason}\n"
    else:
        code, reason = 1, f"{type(error).__name__}: {' '.join(str(error).split())}"
        text = "".join(traceback.format_exception(error))
    state: Any = jax_distributed.global_state
    who = f"process {state.process_id} of {state.num_processes} (on {socket.gethostname()})"
    message = json.dumps({"text": f"error: {who} ended: {reason}\n", "code": code})
    with contextlib.suppress(RuntimeError):  # process 0 may be gone
        state.client.key_value_set(f"{_ENDED}{state.process_id}", message)
    _exit(text, code)


def _exit(text: str, code: int) -> NoReturn:
    _ending.acquire()
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, text.encode())
    if jax_distributed.global_state.process_id == 0:
        time.sleep(4 * _POLL_SECONDS)  # for the others to hear of it
    # Not sys.exit: JAX would wait for the others.
    os._exit(code)
