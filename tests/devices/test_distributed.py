"""Processes that join, end and fail together: for real, over loopback."""

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

from padim_jax.devices import distributed
from padim_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]

# For what ends at all, on a machine that is busy with other things.
TIMEOUT = 120

# WORKER ACTION [--coordinator=...] [--processes=...] [--process_id=...] [--distributed]: joins,
# adds up a one from every device of every process, does what ACTION says, and adds up again.
WORKER = """
import os, signal, sys, time
from padim_jax.devices import distributed
from padim_jax.system import interrupts
from padim_jax.errors import Stopped, UserError

action, *flags = [a for a in sys.argv[1:] if a not in ("-m", "padim_jax.main")]
values = dict(flag.removeprefix("--").partition("=")[::2] for flag in flags)
numbers = [int(values[x]) if x in values else None for x in ("processes", "process_id")]
distributed.HEARTBEAT_SECONDS = 6
interrupts.install()

try:
    detect = "distributed" in values
    launch = distributed.arguments(values.get("coordinator"), *numbers, detect, os.environ)
    first, last = numbers[1] == 0, numbers[1] == 1
    settings = {"--mode": "eval", "--workdir": "b" if last and action == "settings" else "a"}
    with distributed.session(launch, settings, 3 if action == "alone" else 100):
        import jax
        import jax.numpy as jnp

        def total():
            ones = jnp.ones(jax.local_device_count())
            return int(jax.pmap(lambda x: jax.lax.psum(x, "i"), "i")(ones)[0])

        print("sum", total())
        # At once: print would write it in pieces, and another's end come between.
        sys.stderr.write(f"error output of {jax.process_index()}\\n")
        if action == "handler":
            signal.signal(signal.SIGTERM, lambda *_: print("handled"))
            os.kill(os.getpid(), signal.SIGTERM)
            raise Stopped("stopped by SIGTERM")
        if action == "forever":
            print("idle", os.getpid(), flush=True)
            time.sleep(600)
        who, _, what = action.partition(" ")
        if (who == "last" and last) or (who == "first" and first):
            if what == "mistake":
                raise UserError("x.png: not an image")
            if what == "bug":
                raise KeyError("a bug")
            os.kill(os.getpid(), getattr(signal, what))
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


def flags(port: int, process_id: int) -> list[str]:
    return [f"--coordinator=localhost:{port}", "--processes=2", f"--process_id={process_id}"]


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
            process.kill()
            process.wait()
    return [Ended(x.returncode, *output) for x, output in zip(started, outputs, strict=True)]


Outcomes = Callable[[str], list[Ended]]


@pytest.fixture(scope="module")
def ended(worker: pathlib.Path) -> Iterator[Outcomes]:
    """The outcome of pairs of processes with two devices each, by their action.

    All are started with the first that is asked for, two pairs at a time.
    """

    def pair(action: str) -> list[Ended]:
        port = free_port()
        commands = ([sys.executable, worker, action, *flags(port, i)] for i in range(2))
        return run([(command, environment(JAX_NUM_CPU_DEVICES="2")) for command in commands])

    actions = ("sum", "settings", "handler", "first mistake", "last mistake", "last bug")
    actions += ("first SIGKILL", "last SIGKILL")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = {action: pool.submit(pair, action) for action in actions}
        yield lambda action: futures[action].result()
        pool.shutdown(cancel_futures=True)


class TestTogether:
    def test_devices_of_all_processes(self, ended: Outcomes):
        """Only process 0 prints; Gloo does not either."""
        first, other = ended("sum")
        assert (first.code, other.code) == (0, 0)
        assert (first.out, other.out) == ("sum 4\nagain 4\n", "")
        assert first.err == "error output of 0\n"
        assert other.err == "error output of 1\n"

    def test_sigterm_is_left_to_handlers_and_stopping_is_no_failure(self, ended: Outcomes):
        first, other = ended("handler")
        assert (first.code, other.code) == (0, 0)
        assert first.out == "sum 4\nhandled\nstopped by SIGTERM\n"
        assert first.errors == other.errors == []


def reported(process: Ended, number: int, reason: str, code: int) -> None:
    """One line about another process."""
    assert process.code == code, process.err
    (line,) = process.errors
    assert line.startswith(f"error: process {number} of 2 (on ")
    assert line.endswith(f") ended: {reason}")


class TestFailure:
    def test_settings_differ(self, ended: Outcomes):
        for process in ended("settings"):
            assert process.code == 2
            (line,) = process.errors  # its own, or another one's
            assert line.startswith("error: ")
            assert line.endswith(
                "--workdir is b for process 1, but a for process 0; expected the same"
            )

    @pytest.mark.parametrize(("who", "number"), [("first", 0), ("last", 1)])
    def test_mistake_is_told_to_the_others(self, who: str, number: int, ended: Outcomes):
        processes = ended(f"{who} mistake")
        own, other = processes[number], processes[1 - number]
        assert (own.code, own.errors) == (2, ["error: x.png: not an image"])
        reported(other, number, "x.png: not an image", code=2)

    def test_bug(self, ended: Outcomes):
        other, own = ended("last bug")
        assert own.code == 1
        assert own.errors[0].startswith("Traceback")
        assert own.errors[-1] == "KeyError: 'a bug'"
        reported(other, 1, "KeyError: 'a bug'", code=1)

    @pytest.mark.parametrize(("who", "number"), [("first", 0), ("last", 1)])
    def test_killed(self, who: str, number: int, ended: Outcomes):
        """JAX ends the other one, before Python prints that it lost a connection."""
        processes = ended(f"{who} SIGKILL")
        own, other = processes[number], processes[1 - number]
        assert own.code == -signal.SIGKILL
        assert other.code == -signal.SIGABRT, other.err
        assert "another task died" in other.err
        assert "Traceback" not in other.err

    def test_a_killed_process_ends_the_others_within_a_minute(self):
        assert 2 * distributed.HEARTBEAT_SECONDS <= 60


class TestStart:
    def start(self, worker: pathlib.Path, action: str, *given: str, **variables: str) -> Ended:
        command = [sys.executable, worker, action, *given]
        (process,) = run([(command, environment(**variables))])
        return process

    def test_numbers_of_devices_differ(self, worker: pathlib.Path):
        port = free_port()
        commands = [[sys.executable, worker, "sum", *flags(port, i)] for i in range(2)]
        devices = [environment(JAX_NUM_CPU_DEVICES=str(1 + i)) for i in range(2)]
        for process in run(list(zip(commands, devices, strict=True))):
            assert process.code == 2
            (line,) = process.errors
            assert "the processes have different numbers of devices: 1, 2. " in line

    def test_others_do_not_come(self, worker: pathlib.Path):
        commands = [[sys.executable, worker, "alone", *flags(free_port(), i)] for i in (0, 1)]
        for process in run([(command, environment()) for command in commands]):
            assert process.code == 1
            (line,) = process.errors
            assert line.startswith("error: not all processes came within 3 s (--join_seconds)")

    def test_port_is_taken(self, worker: pathlib.Path):
        with socket.create_server(("", 0)) as server:
            process = self.start(worker, "sum", *flags(server.getsockname()[1], 0))
        assert process.code == 2
        (line,) = process.errors
        assert line.startswith("error: the processes cannot be joined (")
        assert "Address already in use" in line
        assert "a free port of process 0" in line

    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            (("--coordinator=localhost:1", "--processes=2"), "must be defined"),
            (("--coordinator=x:1", "--processes=2", "--process_id=2"), "Got process_id=2"),
            (("--distributed",), "coordinator_address should be defined"),
        ],
    )
    def test_wrong_flags(self, given: Sequence[str], reason: str, worker: pathlib.Path):
        process = self.start(worker, "sum", *given)
        assert process.code == 2
        (line,) = process.errors
        assert line.startswith("error: the processes cannot be joined (")
        assert reason in line
        assert "expected --coordinator=HOST:PORT, " in line


SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "745144320.0;tcp://127.0.0.1,10.0.0.2:59611",
}


class TestArguments:
    @pytest.mark.parametrize(
        "environment",
        [
            {},
            # A container that merely runs on Kubernetes, with or without an Indexed Job.
            {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "JOB_COMPLETION_INDEX": "3"},
            # A batch script for two tasks, before its srun; a step of one task.
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
            SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
            OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
            # For torchrun's processes; of which many a shell has some left.
            {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "1"},
        ],
    )
    def test_a_process_on_its_own(self, environment: dict[str, str]):
        assert distributed.arguments(None, None, None, False, environment) is None

    @pytest.mark.parametrize("environment", [SLURM, OPEN_MPI, {"JAX_NUM_PROCESSES": "2"}])
    def test_several_tasks_are_not_joined_unasked(self, environment: dict[str, str]):
        with pytest.raises(UserError, match=r"=2: several .* --distributed .* --processes=1 "):
            distributed.arguments(None, None, None, False, environment)
        assert distributed.arguments(None, 1, None, False, environment) is None
        assert distributed.arguments(None, 1, None, True, environment) is None

    def test_flags_complete_what_is_detected(self):
        launch = distributed.arguments("login:99", None, None, True, SLURM)
        assert launch is not None
        assert launch["coordinator_address"] == "login:99"
        assert launch["num_processes"] is launch["cluster_detection_method"] is None

    @pytest.mark.parametrize(
        ("host", "bind"),
        [("127.0.0.1", "127.0.0.1:99"), ("localhost", "127.0.0.1:99"), ("node1", None)],
    )
    def test_processes_of_one_machine_are_not_reached_from_others(
        self, host: str, bind: str | None
    ):
        launch = distributed.arguments(f"{host}:99", 2, 0, False, {})
        assert launch is not None
        assert launch["coordinator_bind_address"] == bind

    def test_open_mpi_for_real(self, worker: pathlib.Path):
        """JAX detects it. SLURM: by its script, below."""
        uri = f"{2**12 * random.SystemRandom().randrange(10**6)}.0;tcp://127.0.0.1:59611"
        processes = run(
            [
                (
                    [sys.executable, worker, "sum", "--distributed"],
                    environment(
                        **OPEN_MPI | {"OMPI_COMM_WORLD_RANK": i, "OMPI_MCA_orte_hnp_uri": uri}
                    ),
                )
                for i in "01"
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

    def test_others_than_one_that_was_killed(self, tmp_path: pathlib.Path):
        """They are killed too, ahead of JAX."""
        path = tmp_path / "python"
        path.write_text(
            '#!/bin/sh\ncase "$*" in *id=1) kill -KILL $$;; *) exec sleep 100;; esac\n'
        )
        path.chmod(0o755)
        ended = script("local_processes.sh", "3", PYTHON=str(path))
        assert ended.code == 128 + signal.SIGKILL
        assert "error: a process failed; killed the 2 that waited for it" in ended.err

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
            f'#!/bin/sh\necho "$@" >> {log}\n'
            f'exec "{sys.executable}" "{worker}" sum --distributed\n'
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
        assert arguments.startswith("-m padim_jax.main --distributed ")
        assert arguments.endswith(" --config=configs/mvtec.py")


class TestJobSet:
    def test_pods_find_each_other(self):
        """By names that follow from others in the manifest."""
        yaml = pytest.importorskip("yaml")
        jobset = yaml.safe_load((ROOT / "launch" / "k8s-jobset.yaml").read_text())
        (workers,) = jobset["spec"]["replicatedJobs"]
        job = workers["template"]["spec"]
        (container,) = job["template"]["spec"]["containers"]
        given = dict(flag.partition("=")[::2] for flag in container["command"])
        assert (jobset["kind"], workers["replicas"]) == ("JobSet", 1)
        assert job["completionMode"] == "Indexed"
        assert given["--process_id"] == "$(JOB_COMPLETION_INDEX)"
        assert int(given["--processes"]) == job["completions"] == job["parallelism"]
        name, port = jobset["metadata"]["name"], container["ports"][0]["containerPort"]
        assert given["--coordinator"] == f"{name}-{workers['name']}-0-0.{name}:{port}"
        # Only what the user has to mend is not tried again.
        (rule,) = job["podFailurePolicy"]["rules"]
        assert rule["onExitCodes"]["containerName"] == container["name"]
        assert rule["onExitCodes"]["values"] == [2]
