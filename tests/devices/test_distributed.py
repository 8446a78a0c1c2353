"""Processes that join, end and fail together: for real, over loopback."""

import asyncio
import concurrent.futures
import dataclasses
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from padim_jax.devices import cluster, distributed
from padim_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]

# For what ends at all, on a machine that is busy with other things.
TIMEOUT = 120

# WORKER ACTION [--coordinator=...] [--processes=...] [--process_id=...]: joins, adds up a one
# from every device of every process, does what ACTION says, and adds up again.
WORKER = """
import os, signal, sys, time
from padim_jax.devices import cluster; from padim_jax.devices import distributed
from padim_jax.errors import Stopped, UserError

action, *flags = [a for a in sys.argv[1:] if a not in ("-m", "padim_jax.main")]
given = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
numbers = [int(given[name]) if name in given else None for name in ("processes", "process_id")]
distributed._MISSED_BEATS = 4

try:
    place = cluster.find(given.get("coordinator"), *numbers, os.environ)
    last = place is not None and place.process_id == place.processes - 1
    first = place is None or place.process_id == 0
    settings = {"--workdir": "a" if first or action != "settings" else "b"}
    timeout = 3 if action == "alone" else 60
    with distributed.session(place, settings, timeout):
        import jax
        import jax.numpy as jnp

        def total():
            ones = jnp.ones(jax.local_device_count())
            return int(jax.pmap(lambda x: jax.lax.psum(x, "i"), "i")(ones)[0])

        print("sum", total())
        # At once: print would write it in pieces, and another's end come between.
        sys.stderr.write(f"error output of {jax.process_index()}\\n")
        if action == "handler":
            signal.signal(signal.SIGTERM, lambda *_: print("handled") or sys.exit(0))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        who, _, what = action.partition(" ")
        if who == "all" or (who == "last" and last) or (who == "first" and first):
            if what == "mistake":
                raise UserError("x.png: not an image")
            if what == "bug":
                raise KeyError("a bug")
            if what == "stopped":
                raise Stopped("stopped by SIGTERM")
            if what == "exit":
                sys.exit(7)
            if what == "late":
                time.sleep(3)
            elif what:
                os.kill(os.getpid(), getattr(signal, what))
        if action == "forever":
            print("idle", os.getpid(), flush=True)
            time.sleep(600)
        print("again", total())
except UserError as error:
    sys.exit(f"error: {error}" if print(f"error: {error}", file=sys.stderr) else 2)
except Stopped as stop:
    print(stop)
"""


@dataclasses.dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if not line.startswith("error output")]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("worker") / "worker.py"
    path.write_text(WORKER)
    return path


def environment(**more: str) -> dict[str, str]:
    """Without what launched the tests themselves, and with a proxy that does not answer."""
    ours = ("SLURM_", "OMPI_", "PMIX_", "JAX_", "JOB_", "CUDA_", "XLA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    proxy = "http://127.0.0.1:9"
    network = {"http_proxy": proxy, "https_proxy": proxy, "no_proxy": ""}
    return kept | network | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | more


def free_port() -> int:
    """One that no outgoing connection is given."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def connect(port: int) -> socket.socket:
    """To what will listen there before long."""
    end = time.monotonic() + TIMEOUT
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.1)


def flags(port: int, processes: int, process_id: int) -> list[str]:
    return [
        f"--coordinator=localhost:{port}",
        f"--processes={processes}",
        f"--process_id={process_id}",
    ]


def run(commands: Sequence[tuple[Sequence[object], dict[str, str]]]) -> list[Ended]:
    """Runs commands, with their environments, at the same time; leaves none behind."""
    started = [
        subprocess.Popen(
            [str(word) for word in command],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for command, variables in commands
    ]
    end = time.monotonic() + TIMEOUT
    try:
        outputs = [x.communicate(timeout=end - time.monotonic()) for x in started]
    finally:
        for process in started:
            # What was stopped too; none has processes of its own.
            process.kill()
            process.wait()
    return [Ended(x.returncode, *output) for x, output in zip(started, outputs, strict=True)]


Outcomes = Callable[[str], list[Ended]]
Run = Callable[..., concurrent.futures.Future[list[Ended]]]


@pytest.fixture(scope="module")
def start(worker: pathlib.Path) -> Iterator[Run]:
    """Starts processes of a worker for an action, three such groups at the same time."""
    with concurrent.futures.ThreadPoolExecutor(3) as pool:

        def submit(action: str, processes: int = 2, **variables: str):
            port = free_port()
            commands = [
                (
                    [sys.executable, worker, action, *flags(port, processes, number)],
                    environment(**variables),
                )
                for number in range(processes)
            ]
            return pool.submit(run, commands)

        yield submit
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def ended(start: Run) -> Outcomes:
    """The outcome of what most tests look at: pairs of processes, by their action."""
    actions = (
        "last mistake",
        "first mistake",
        "all mistake",
        "last bug",
        "all stopped",
        "last exit",
        "handler",
        "last SIGKILL",
        "first SIGKILL",
        "last SIGTERM",
        "first late",
    )
    futures = {action: start(action) for action in actions}
    futures["three"] = start("sum", processes=3)
    futures["two devices each"] = start("sum", JAX_NUM_CPU_DEVICES="2")
    futures["one of three"] = start("last SIGKILL", processes=3)
    return lambda name: futures[name].result()


class TestTogether:
    def test_devices_of_all_processes(self, ended: Outcomes):
        assert [process.code for process in ended("three")] == [0, 0, 0]
        assert ended("three")[0].out == "sum 3\nagain 3\n"

    def test_several_devices_each(self, ended: Outcomes):
        first, other = ended("two devices each")
        assert (first.code, other.code) == (0, 0)
        assert first.out == "sum 4\nagain 4\n"

    def test_only_process_0_prints_and_nothing_else_does(self, ended: Outcomes):
        """Not Gloo either."""
        first, *others = ended("three")
        assert [process.out for process in others] == ["", ""]
        for number, process in enumerate([first, *others]):
            assert process.err == f"error output of {number}\n"

    def test_the_end_waits_for_the_slowest(self, ended: Outcomes):
        first, other = ended("first late")
        assert (first.code, other.code) == (0, 0)
        assert first.out == "sum 2\nagain 2\n"

    def test_stopped_is_no_failure(self, ended: Outcomes):
        first, other = ended("all stopped")
        assert (first.code, other.code) == (0, 0)
        assert first.out == "sum 2\nstopped by SIGTERM\n"
        assert first.errors == other.errors == []

    def test_sigterm_is_left_to_handlers(self, ended: Outcomes):
        first, other = ended("handler")
        assert (first.code, other.code) == (0, 0)
        assert first.out == "sum 2\nhandled\n"


def reported(process: Ended, number: int, reason: str, code: int = 1) -> None:
    """One line about another process."""
    assert process.code == code, process.err
    (line,) = process.errors
    assert line.startswith(f"error: process {number} of 2 (")
    assert line.endswith(f") ended: {reason}")


LOST = "killed (out of memory?), or its machine was lost"


class TestFailure:
    @pytest.mark.parametrize(("who", "number"), [("first", 0), ("last", 1)])
    def test_mistake_is_told_to_the_others(self, who: str, number: int, ended: Outcomes):
        processes = ended(f"{who} mistake")
        own, other = processes[number], processes[1 - number]
        assert own.code == 2
        assert own.errors == ["error: x.png: not an image"]
        reported(other, number, "x.png: not an image", code=2)

    def test_mistake_of_all(self, ended: Outcomes):
        """Each tells of it once, as its own or as another one's."""
        for process in ended("all mistake"):
            assert process.code == 2
            (line,) = process.errors
            assert line.startswith("error: ")
            assert line.endswith("x.png: not an image")

    def test_bug(self, ended: Outcomes):
        other, own = ended("last bug")
        assert own.code == 1
        assert own.errors[0].startswith("Traceback")
        assert own.errors[-1] == "KeyError: 'a bug'"
        reported(other, 1, "KeyError: 'a bug'")

    def test_exit_code(self, ended: Outcomes):
        other, own = ended("last exit")
        assert own.code == 7
        reported(other, 1, "exit code 7")

    @pytest.mark.parametrize(("who", "number"), [("first", 0), ("last", 1)])
    def test_killed(self, who: str, number: int, ended: Outcomes):
        processes = ended(f"{who} SIGKILL")
        assert processes[number].code == -signal.SIGKILL
        reported(processes[1 - number], number, LOST)

    def test_killed_before_the_others_compute(self, ended: Outcomes):
        """All of three hear of it, whatever else they notice."""
        *others, own = ended("one of three")
        assert own.code == -signal.SIGKILL
        for other in others:
            assert other.code == 1
            (line,) = other.errors
            assert line.startswith("error: process 2 of 3 (")

    def test_sigterm_without_a_handler(self, ended: Outcomes):
        other, own = ended("last SIGTERM")
        assert own.code == -signal.SIGTERM
        reported(other, 1, LOST)

    @pytest.mark.parametrize(("who", "number"), [("first", 0), ("last", 1)])
    def test_no_sign_of_life(self, who: str, number: int, worker: pathlib.Path):
        """It is there, but stands still: as a machine that has lost its network."""
        port = free_port()
        started = [
            subprocess.Popen(
                [sys.executable, worker, f"{who} SIGSTOP", *flags(port, 2, process)],
                env=environment(),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process in range(2)
        ]
        try:
            other = started[1 - number]
            out, err = other.communicate(timeout=TIMEOUT)
            reported(Ended(other.returncode, out, err), number, "no sign of life for 4 s")
        finally:
            for process in started:
                process.kill()
                process.communicate()


class TestStart:
    def start_differently(
        self, worker: pathlib.Path, *processes: tuple[str, int, int]
    ) -> list[Ended]:
        """Processes of (action, --processes, --process_id)."""
        port = free_port()
        return run(
            [
                ([sys.executable, worker, action, *flags(port, count, number)], environment())
                for action, count, number in processes
            ]
        )

    def test_numbers_of_processes_differ(self, worker: pathlib.Path):
        for process in self.start_differently(worker, ("sum", 3, 0), ("sum", 2, 1)):
            assert process.code == 2
            (line,) = process.errors
            assert line.startswith("error: --processes is 2 for process 1 (on ")
            assert line.endswith("), but 3 for process 0; expected the same")

    def test_same_number_twice(self, worker: pathlib.Path):
        """Before all are there: none starts."""
        given = [("sum", 3, number) for number in (0, 1, 1)]
        for process in self.start_differently(worker, *given):
            assert process.code == 2
            (line,) = process.errors
            assert line.startswith("error: --process_id=1 came twice to localhost:")

    def test_late_comer_does_not_disturb(self, worker: pathlib.Path):
        """After all are there: they go on without the one that is too many."""
        given = [("first late", 2, number) for number in (0, 1, 1)]
        processes = self.start_differently(worker, *given)
        assert sorted(process.code for process in processes) == [0, 0, 1]
        assert processes[0].out == "sum 2\nagain 2\n"
        (failed,) = [process for process in processes if process.code]
        (line,) = failed.errors
        assert line.startswith("error: --process_id=1 came twice to localhost:")

    def test_other_settings(self, worker: pathlib.Path):
        given = [("settings", 2, number) for number in (0, 1)]
        for process in self.start_differently(worker, *given):
            assert process.code == 2
            (line,) = process.errors
            assert line.startswith("error: --workdir is b for process 1 (on ")
            assert line.endswith("), but a for process 0; expected the same")

    def test_numbers_of_devices_differ(self, worker: pathlib.Path):
        port = free_port()
        processes = run(
            [
                (
                    [sys.executable, worker, "sum", *flags(port, 2, number)],
                    environment(JAX_NUM_CPU_DEVICES=str(1 + number)),
                )
                for number in range(2)
            ]
        )
        for process in processes:
            assert process.code == 2
            (line,) = process.errors
            assert "the processes have different numbers of devices: 1, 2. " in line

    def test_others_do_not_come(self, worker: pathlib.Path):
        (process,) = self.start_differently(worker, ("alone", 3, 0))
        assert process.code == 1
        (line,) = process.errors
        assert line.startswith("error: process 1, 2 of 3 did not come within 3 s to localhost:")

    def test_process_0_is_not_reached(self, worker: pathlib.Path):
        (process,) = self.start_differently(worker, ("alone", 2, 1))
        assert process.code == 1
        (line,) = process.errors
        assert line.startswith("error: --coordinator=localhost:")
        assert "process 0 is not reached from" in line

    def test_port_is_taken(self, worker: pathlib.Path):
        with socket.create_server(("", 0)) as server:
            given = flags(server.getsockname()[1], 2, 0)
            (process,) = run([([sys.executable, worker, "sum", *given], environment())])
        assert process.code == 2
        (line,) = process.errors
        assert line.startswith("error: --coordinator=localhost:")
        assert "(Address already in use); choose another" in line

    def test_something_else_listens(self, worker: pathlib.Path):
        with socket.create_server(("127.0.0.1", 0)) as server:
            given = flags(server.getsockname()[1], 2, 1)
            command = [sys.executable, str(worker), "sum", *given]
            process = subprocess.Popen(
                command, env=environment(), stderr=subprocess.PIPE, text=True
            )
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                _, err = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 2
        assert "is not process 0 of a run; choose another port" in err

    def test_the_port_for_jax_is_given_to_nobody_else(self):
        """Or another process's relay could get it, and be connected with itself."""
        with distributed._reserve_port() as reserved:
            address = ("", reserved.getsockname()[1])
            with pytest.raises(OSError, match="in use"):
                socket.create_server(address)
            # As JAX's gRPC does.
            with socket.create_server(address, reuse_port=True):
                pass

    @pytest.mark.parametrize(
        ("host", "reached"), [("127.0.0.1", False), ("localhost", False), ("node1", True)]
    )
    def test_processes_of_one_machine_are_not_reached_from_others(
        self, host: str, reached: bool
    ):
        port = free_port()

        async def listen() -> bool:
            coordinator = distributed._Coordinator(cluster.Place(f"{host}:{port}", 2, 0), {})
            await coordinator.listen()
            socket.create_connection(("127.0.0.1", port)).close()
            with socket.socket() as elsewhere:  # another address that this machine has
                code = elsewhere.connect_ex(("127.0.0.2", port))
            coordinator.release()
            coordinator._server.close()
            return code == 0

        assert asyncio.run(listen()) is reached

    def test_strangers_do_not_disturb(self, worker: pathlib.Path):
        """Port scanners, and what asks whether a service is up."""
        port = free_port()
        commands = [
            [sys.executable, str(worker), "sum", *flags(port, 2, number)] for number in (0, 1)
        ]
        first = subprocess.Popen(commands[0], env=environment(), stdout=subprocess.PIPE)
        try:
            for sent in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"process": 1}\n', b"[]\n"):
                with connect(port) as stranger:
                    stranger.sendall(sent)
            (other,) = run([(commands[1], environment())])
            out, _ = first.communicate(timeout=TIMEOUT)
            assert (first.returncode, other.code) == (0, 0)
            assert out == b"sum 2\nagain 2\n"
        finally:
            first.kill()
            first.wait()


SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}
OPEN_MPI_4 = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "PMIX_NAMESPACE": "745144321",
    "OMPI_MCA_orte_hnp_uri": "745144320.0;tcp://192.0.2.2,10.0.0.2:59611;tcp6://[fd00::2]:4063",
}
OPEN_MPI_5 = OPEN_MPI_4 | {
    "PMIX_NAMESPACE": "prterun-node-1-14504@1",
    "OMPI_MCA_orte_hnp_uri": "",
}
KUBERNETES = {
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "JAX_COORDINATOR_ADDRESS": "padim-jax-workers-0-0.padim-jax:8476",
    "JAX_NUM_PROCESSES": "2",
    "JOB_COMPLETION_INDEX": "1",
}


def find(given: dict[str, str], *flags_: object) -> cluster.Place | None:
    coordinator, processes, process_id = flags_ or (None, None, None)
    return cluster.find(coordinator, processes, process_id, given)  # pyright: ignore


class TestDetection:
    @pytest.mark.parametrize(
        "given",
        [
            {},
            # A container that merely runs on Kubernetes; one of many independent runs.
            {"KUBERNETES_SERVICE_HOST": "10.96.0.1"},
            {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "JOB_COMPLETION_INDEX": "3"},
            # A batch script for two tasks, before its srun; a shell of salloc.
            {
                "SLURM_JOB_ID": "1",
                "SLURM_NTASKS": "2",
                "SLURM_PROCID": "0",
                "SLURM_LOCALID": "0",
            },
            SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
            OPEN_MPI_4 | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
            # For torchrun's processes; of which many a shell has some left.
            {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "1"},
        ],
    )
    def test_a_process_on_its_own(self, given: dict[str, str]):
        assert find(given) is None

    @pytest.mark.parametrize("given", [SLURM, OPEN_MPI_4, OPEN_MPI_5, KUBERNETES])
    def test_switched_off(self, given: dict[str, str]):
        assert find(given | {"JAX_PROCESS_ID": "broken"}, None, 1, None) is None

    @pytest.mark.parametrize(
        ("nodes", "host"),
        [
            ("localhost", "localhost"),
            ("node1,node2", "node1"),
            ("node-[001-004,007],login", "node-001"),
            ("gpu[7,9]", "gpu7"),
            ("rack[1-2]node[05,08].site", "rack1node05.site"),
            ("a[3]b,c[1-2]", "a3b"),
        ],
    )
    def test_slurm(self, nodes: str, host: str):
        place = find(SLURM | {"SLURM_STEP_NODELIST": nodes})
        assert place is not None
        assert (place.processes, place.process_id) == (2, 1)
        assert place.address[0] == host
        assert 61440 <= place.address[1] < 65536

    def test_steps_of_a_job_do_not_share_a_port(self):
        places = [find(SLURM | {"SLURM_STEP_ID": str(step)}) for step in range(4)]
        assert len({place.coordinator for place in places if place}) == 4

    @pytest.mark.parametrize(
        ("given", "host"),
        [
            (OPEN_MPI_4, "127.0.0.1"),
            (OPEN_MPI_5, "127.0.0.1"),
            (OPEN_MPI_4 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "192.0.2.2"),
            (OPEN_MPI_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "node-1"),
            (
                OPEN_MPI_4
                | {
                    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
                    "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fd00::2,fe80::3]:43370",
                },
                "fd00::2",
            ),
            # mpirun starts its daemons through srun, one per machine.
            (
                SLURM | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "7"} | OPEN_MPI_4,
                "127.0.0.1",
            ),
        ],
    )
    def test_open_mpi(self, given: dict[str, str], host: str):
        place = find(given)
        assert place is not None
        assert (place.processes, place.process_id) == (2, 1)
        assert place.address[0] == host

    def test_indexed_job(self):
        place = find(KUBERNETES)
        assert place is not None
        assert (place.processes, place.process_id) == (2, 1)
        assert place.address == ("padim-jax-workers-0-0.padim-jax", 8476)

    def test_flags_win(self):
        place = find(KUBERNETES, "[::1]:99", 3, 2)
        assert place is not None
        assert (place.processes, place.process_id) == (3, 2)
        assert place.address == ("::1", 99)

    def test_flags_complete_what_is_found(self):
        place = find(SLURM, "login:99", None, None)
        assert place is not None
        assert (place.coordinator, place.processes, place.process_id) == ("login:99", 2, 1)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (("node:1", None, None), "--processes: missing"),
            (("node:1", 2, None), "--process_id: missing; expected .* 0 to 1"),
            ((None, 2, 0), "--coordinator: missing; expected HOST:PORT"),
            ((None, None, 0), "--processes: missing"),
            (("node:1", 2, 2), "--process_id=2: expected 0 to 1"),
            (("node:1", 2, -1), "--process_id=-1: expected 0 to 1"),
            (("node:1", 0, 0), "--processes=0: expected 1 or more"),
            (("node", 2, 0), "--coordinator=node: expected HOST:PORT"),
            (("http://node:1", 2, 0), "expected HOST:PORT"),
            (("node:0", 2, 0), "expected HOST:PORT"),
            (("node:65536", 2, 0), "expected HOST:PORT"),
        ],
    )
    def test_wrong_flags(self, given: tuple, message: str):
        with pytest.raises(UserError, match=message):
            find({}, *given)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                KUBERNETES | {"JAX_NUM_PROCESSES": "two"},
                "JAX_NUM_PROCESSES=two: expected a num",
            ),
            (KUBERNETES | {"JAX_COORDINATOR_ADDRESS": ""}, "--coordinator: missing"),
            (KUBERNETES | {"JOB_COMPLETION_INDEX": ""}, "--process_id: missing"),
            (KUBERNETES | {"JOB_COMPLETION_INDEX": "2"}, "--process_id=2: expected 0 to 1"),
            (
                OPEN_MPI_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "PMIX_NAMESPACE": "other"},
                "--coordinator: this Open MPI does not tell",
            ),
        ],
    )
    def test_wrong_environment(self, given: dict[str, str], message: str):
        with pytest.raises(UserError, match=message):
            find(given)

    @pytest.mark.parametrize("launcher", ["SLURM", "Open MPI", "Kubernetes"])
    def test_for_real(self, launcher: str, worker: pathlib.Path):
        """The worker gets no flags at all."""
        job, port = str(random.SystemRandom().randrange(10**9)), free_port()
        local: dict[str, Callable[[int], dict[str, str]]] = {
            "SLURM": lambda n: SLURM | {"SLURM_JOB_ID": job, "SLURM_PROCID": str(n)},
            "Open MPI": lambda n: (
                OPEN_MPI_4 | {"PMIX_NAMESPACE": job, "OMPI_COMM_WORLD_RANK": str(n)}
            ),
            "Kubernetes": lambda n: (
                KUBERNETES
                | {
                    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                    "JOB_COMPLETION_INDEX": str(n),
                }
            ),
        }
        processes = run(
            [
                ([sys.executable, worker, "sum"], environment(**local[launcher](number)))
                for number in range(2)
            ]
        )
        assert [process.code for process in processes] == [0, 0], processes
        assert processes[0].out == "sum 2\nagain 2\n"


@pytest.fixture
def python(worker: pathlib.Path, tmp_path: pathlib.Path) -> str:
    """What the scripts take for the interpreter: it runs the worker instead of the program."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{worker}" "$@"\n')
    path.chmod(0o755)
    return str(path)


def script(name: str, *arguments: str, **variables: str) -> Ended:
    (ended,) = run([(["bash", ROOT / "launch" / name, *arguments], environment(**variables))])
    return ended


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class TestLocalProcesses:
    def test_all_devices(self, python: str):
        ended = script("local_processes.sh", "2", "sum", PYTHON=python, DEVICES="2")
        assert ended.code == 0
        assert ended.out == "sum 4\nagain 4\n"
        assert sorted(ended.err.splitlines()) == ["[1] error output of 1", "error output of 0"]

    def test_one_process(self, python: str):
        ended = script("local_processes.sh", "1", "sum", PYTHON=python, DEVICES="3")
        assert (ended.code, ended.out) == (0, "sum 3\nagain 3\n")

    def test_exit_code_of_the_one_that_failed_first(self, python: str):
        ended = script("local_processes.sh", "2", "last mistake", PYTHON=python)
        assert ended.code == 2
        assert "[1] error: x.png: not an image" in ended.err
        assert "ended: x.png: not an image" in ended.err

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
    def test_signals_reach_all(self, name: str, python: str, tmp_path: pathlib.Path):
        process = subprocess.Popen(
            ["bash", ROOT / "launch" / "local_processes.sh", "2", "forever"],
            env=environment(PYTHON=python),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "sum 2\n"
            pid = int(process.stdout.readline().split()[1])
            process.send_signal(getattr(signal, name))
            _, err = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 128 + getattr(signal, name)
            assert "Traceback" not in err
            assert not is_running(pid)
        finally:
            process.kill()
            process.wait()

    def test_gpus_are_shared_out(self, tmp_path: pathlib.Path):
        path = tmp_path / "python"
        path.write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES"\n')
        path.chmod(0o755)
        given = {"PYTHON": str(path), "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
        ended = script("local_processes.sh", "2", **given)
        assert sorted(ended.out.split()) == ["4,5", "6,7"]
        ended = script("local_processes.sh", "3", **given)
        assert ended.code == 2
        assert "4 GPUs cannot be shared out to 3 processes" in ended.err

    @pytest.mark.parametrize("arguments", [[], ["0"], ["--config=configs/demo.py"]])
    def test_usage(self, arguments: list[str]):
        ended = script("local_processes.sh", *arguments)
        assert ended.code == 2
        assert ended.err.startswith("usage: ")

    def test_the_program_itself(self, tmp_path: pathlib.Path):
        """A mistake that all find: told by each, without a traceback."""
        given = ("--config=configs/folder.py", f"--config.dataset.root={tmp_path}/none")
        ended = script(
            "local_processes.sh", "2", *given, f"--workdir={tmp_path}/w", PYTHON=sys.executable
        )
        assert ended.code == 2
        assert ended.out == ""
        lines = ended.err.splitlines()
        assert len(lines) == 2
        for line in lines:
            assert line.removeprefix("[1] ").startswith("error: ")
            assert f"{tmp_path}/none" in line


# Tells its tasks what the real one does, for one node.
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do shift; done
pids=()
for task in 0 1; do
  SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost \\
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""


class TestSlurmScript:
    def test_runs_the_program_under_srun(self, worker: pathlib.Path, tmp_path: pathlib.Path):
        srun, python = tmp_path / "srun", tmp_path / "python"
        srun.write_text(SRUN)
        log = tmp_path / "arguments"
        python.write_text(
            f'#!/bin/sh\necho "$@" >> {log}\nexec "{sys.executable}" "{worker}" sum\n'
        )
        for path in (srun, python):
            path.chmod(0o755)
        ended = script(
            "slurm.sbatch",
            "--config=configs/mvtec.py",
            PYTHON=str(python),
            PATH=f"{tmp_path}:{os.environ['PATH']}",
            SLURM_SUBMIT_DIR=str(tmp_path),
            # As in a batch script.
            SLURM_JOB_ID=str(random.SystemRandom().randrange(10**9)),
            SLURM_NTASKS="2",
            SLURM_PROCID="0",
        )
        assert ended.code == 0, ended.err
        assert ended.out == "sum 2\nagain 2\n"
        (arguments,) = set(log.read_text().splitlines())
        assert arguments.startswith("-m padim_jax.main ")
        assert arguments.endswith(" --config=configs/mvtec.py")


class TestJobSet:
    def test_pods_find_each_other(self):
        """By names that follow from others in the manifest."""
        yaml = pytest.importorskip("yaml")
        jobset = yaml.safe_load((ROOT / "launch" / "k8s-jobset.yaml").read_text())
        (workers,) = jobset["spec"]["replicatedJobs"]
        job = workers["template"]["spec"]
        (container,) = job["template"]["spec"]["containers"]
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert (jobset["kind"], workers["replicas"]) == ("JobSet", 1)
        assert job["completionMode"] == "Indexed"
        assert job["completions"] == job["parallelism"]
        place = find(variables | {"JOB_COMPLETION_INDEX": "1"})
        assert place is not None
        assert (place.processes, place.process_id) == (job["completions"], 1)
        name = jobset["metadata"]["name"]
        assert place.address == (
            f"{name}-{workers['name']}-0-0.{name}",
            container["ports"][0]["containerPort"],
        )
        # Only what the user has to mend is not tried again.
        (rule,) = job["podFailurePolicy"]["rules"]
        assert rule["onExitCodes"]["containerName"] == container["name"]
        assert rule["onExitCodes"]["values"] == [2]
