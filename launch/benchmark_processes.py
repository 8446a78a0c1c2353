"""The processes that the benchmark runs, ours and the peers', and what they cost."""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = {
    "torch": ("torch==2.13.0", "torchvision==0.28.0", "scikit-learn", "matplotlib"),
    "anomalib": ("torch==2.13.0", "torchvision==0.28.0", "anomalib==2.7.0"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is fitted and scored.

    Attributes:
      backbone: by torchvision's name.
      channels: kept of its three stages.
      data: the category's folder, in MVTec AD's layout.
      weights: .npz with batch norm folded.
      size: height and width of the resized images.
      batch_size: of fit and evaluation.
      images: training images that the stages are measured with.
    """

    backbone: str
    channels: int
    data: pathlib.Path
    weights: pathlib.Path
    size: int
    batch_size: int
    images: int

    @property
    def name(self) -> str:
        """As --cases names it."""
        return f"{self.backbone}-{self.channels}"


@dataclasses.dataclass(frozen=True)
class Run:
    """A process to measure.

    Attributes:
      contender: "padim_jax" or a peer.
      task: what it does, as the table calls it.
      command: the command line.
      fresh: folders that must not be there before.
      model: where the fitted model is afterwards, if the task fits one.
    """

    contender: str
    task: str
    command: tuple[str, ...]
    fresh: tuple[pathlib.Path, ...] = ()
    model: pathlib.Path | None = None


def our_command(
    case: Case, mode: str, workdir: pathlib.Path, cache: pathlib.Path, cache_images: bool
) -> tuple[str, ...]:
    """The command line of padim_jax for a case."""
    return (
        *(sys.executable, "-m", "padim_jax.main", f"--config={ROOT}/configs/mvtec.py"),
        *(f"--mode={mode}", f"--workdir={workdir}"),
        f"--config.dataset.root={case.data.parent}",
        f"--config.category={case.data.name}",
        f"--config.image.resize=({case.size}, {case.size})",
        f"--config.model.backbone={case.backbone}",
        f"--config.model.weights={case.weights}",
        f"--config.model.channels={case.channels}",
        f"--config.batch_size={case.batch_size}",
        f"--config.cache.dir={cache}",
        *(() if cache_images else ("--config.cache.images_gb=0",)),
    )


def stages_command(
    case: Case, task: str, workdir: pathlib.Path, seconds: float
) -> tuple[str, ...]:
    """Our stages in a process of their own."""
    script = (sys.executable, str(HERE / "benchmark_stages.py"), task)
    return (*script, *arguments(case, workdir, seconds), f"--images={case.images}")


def devices_command(
    case: Case, task: str, count: int, workdir: pathlib.Path, seconds: float
) -> tuple[str, ...]:
    """One device's measurement, or several devices', in a process of their own."""
    script = (sys.executable, str(HERE / "benchmark_devices.py"), task)
    given = (*arguments(case, workdir, seconds), f"--images={case.images}")
    return (*script, *given, f"--devices={count}")


def device_settings(count: int) -> dict[str, str]:
    """The environment in which JAX has so many devices: GPUs, or parts of the processor."""
    # Of GPUs that somebody chose already, the first.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    gpus = ",".join(visible.split(",")[:count])
    return {"JAX_NUM_CPU_DEVICES": str(count), "CUDA_VISIBLE_DEVICES": gpus}


def arguments(case: Case, workdir: pathlib.Path, seconds: float) -> tuple[str, ...]:
    """A case as the scripts beside this one take it."""
    fields = ("backbone", "channels", "data", "weights", "size", "batch_size")
    given = tuple(f"--{name}={getattr(case, name)}" for name in fields)
    return (*given, f"--workdir={workdir}", f"--seconds={seconds}")


def runs(case: Case, options: argparse.Namespace, pythons: dict[str, str]) -> Iterator[Run]:
    """One round of a case: all contenders' processes, in turns."""
    place = options.workdir / case.name
    ours, cache = place / "padim_jax", place / "cache"
    fitted = ours / "checkpoint"

    def our_run(task: str, *, cached: bool, first: bool = False) -> Run:
        command = our_command(case, task.partition(",")[0], ours, cache, cached)
        model = fitted if "train" in task else None
        return Run("padim_jax", task, command, (ours, cache) if first else (), model)

    contenders = [
        [
            our_run("train_and_eval, first run ever", cached=True, first=True),
            our_run("train_and_eval, compiled before", cached=False),
            our_run("train_and_eval, images cached too", cached=True),
            our_run("train", cached=False),
            our_run("eval", cached=False),
            Run("padim_jax", "score", stages_command(case, "score", ours, options.seconds)),
        ]
    ]
    for peer, python in pythons.items():
        folder = place / peer
        script = (python, str(HERE / f"benchmark_{peer}.py"))
        rest = arguments(case, folder, options.seconds)
        contenders.append(
            [
                Run(peer, "fit", (*script, "fit", *rest), (folder,), folder / "model"),
                Run(peer, "test", (*script, "test", *rest)),
                Run(peer, "score", (*script, "score", *rest)),
            ]
        )
    for turn in itertools.zip_longest(*contenders):
        yield from filter(None, turn)


def make_environment(peer: str) -> str:
    """Makes the environment that a peer runs in, unless it is there; its interpreter."""
    folder = ROOT / f".venv-{peer}"
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(PEERS[peer])
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {' '.join(PEERS[peer])} into {folder} (once)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PEERS[peer]], check=True)
        stamp.write_text(wanted)  # an interrupted installation leaves none
    return str(python)


def execute(
    command: Sequence[str],
    log: pathlib.Path,
    exit_code: int = 0,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Runs a process to its end, and ends this one if it does not end with `exit_code`.

    Args:
      command: its command line.
      log: file for its output.
      exit_code: expected.
      settings: of its environment, beside this process's own.

    Returns:
      "seconds" of wall time, "peak_bytes" of memory, "others" (the share of all cores that
      other processes took meanwhile) and, if the last line of its output is a JSON
      object, what that holds.
    """
    # The package is found from a checkout too, without being installed.
    environment = {**os.environ, **settings, "PYTHONPATH": str(ROOT)}
    with log.open("w+") as output:
        start, busy = time.perf_counter(), busy_seconds()
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        # Not process.wait(): only wait4 tells how much memory this one took.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        others = busy_seconds() - busy - usage.ru_utime - usage.ru_stime
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        lines = output.read().rstrip().splitlines()
    if process.returncode != exit_code:
        end = "\n".join(lines[-15:])
        killed = " (too little memory?)" if process.returncode == -signal.SIGKILL else ""
        shown = f"exit code {process.returncode}{killed}: {' '.join(command)}"
        sys.exit(f"{shown}\n{end}\nall of its output: {log}")
    printed = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return {
        "seconds": seconds,
        "peak_bytes": usage.ru_maxrss * 1024,
        "others": max(0.0, others / (seconds * (os.cpu_count() or 1))),
        **printed,
    }


def busy_seconds() -> float:
    """What all cores have worked for all processes, and for other virtual machines."""
    _, *ticks = pathlib.Path("/proc/stat").read_text().splitlines()[0].split()
    idle, waiting = int(ticks[3]), int(ticks[4])
    # The last two, for guests, are part of the first two.
    return (sum(map(int, ticks[:8])) - idle - waiting) / os.sysconf("SC_CLK_TCK")
