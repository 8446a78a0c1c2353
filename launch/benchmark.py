"""Measures padim_jax on this machine, beside other PaDiMs in the same run.

    python launch/benchmark.py --data=data/mvtec_ad/bottle --weights=resnet18.tv_in1k
    python launch/benchmark.py --against=torch --against=anomalib --json=results/benchmark.json
    python launch/benchmark.py --measure=growth --cases=resnet18-100
    python launch/benchmark.py --devices=1,2,4,8

What is measured (--measure; but for startup all of one case before the next):

  startup    how long it takes to import padim_jax, to print --help and to refuse a mistake.
  processes  whole commands from start to exit: wall time, peak memory, size of the fitted
             model. With --against also those of the peers, in turns with ours.
  stages     each stage alone, with warm-up and repetitions, and its peak memory.
  growth     a fit, and the stages, at four or more numbers of images, channels, image sizes
             and batch sizes, with the exponent k of cost = c size^k fitted to them.
  devices    1, 2, ... devices (--devices): what they send each other, read from the compiled
             programs, beside the theory; whether they agree with one; their times. What
             jax.pmap costs on one device beside plain jax.jit. Then what 1 to 64 H100s are
             predicted to take, and what of the prediction this machine bears out.

Peers run in environments of their own, .venv-torch and .venv-anomalib, which are made with
pip on first use (with what Python runs this; PyTorch for Linux from PyPI brings gigabytes
of CUDA). --torch-python and --anomalib-python name interpreters to use instead.

Times are medians; the spread is the distance between the quartiles. A process's peak memory
is what the kernel reports when it ends: of the largest of the process and its workers, not
of their sum. Nothing else should run meanwhile. Linux only.

Without a GPU, devices are virtual: parts of one processor, which show what is right and what
is sent, not how fast. With GPUs the same command takes 1, 2, ... of them, and the H100's
measured times stand beside the predicted ones; --batch-size is of all devices together.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import platform
import shutil
import sys
from collections.abc import Sequence
from typing import Any

# This process stays small: Linux counts its memory as that of each process it starts.
import benchmark_measure as measure
import benchmark_tables as tables
from benchmark_processes import (
    HERE,
    PEERS,
    ROOT,
    Case,
    device_settings,
    devices_command,
    execute,
    make_environment,
    our_command,
    runs,
    stages_command,
)

CASES = ("resnet18-100", "resnet18-448", "wide_resnet50_2-550")
# What is varied, and the values; all else stays as in the case.
GROWTH = {
    "images": (250, 500, 1000, 2000, 4000),
    "channels": (25, 50, 100, 200, 400),
    "size": (128, 192, 256, 384, 512),
    "batch_size": (4, 8, 16, 32, 64),
}
QUICK_GROWTH = {"images": (4, 8)}


def main() -> None:
    """Measures what the command line asks for, prints tables and writes JSON."""
    options = parse(sys.argv[1:])
    pythons = {
        peer: getattr(options, f"{peer}_python") or make_environment(peer)
        for peer in dict.fromkeys(options.against)
    }
    cases = make_inputs(options)
    report: dict[str, Any] = {"machine": machine(), "command": sys.argv}
    print(f"{report['machine']}")
    if "startup" in options.measure:
        report["startup"] = startup(options)
        print(f"\nstart-up\n\n{tables.startup(report['startup'])}")
    for case in cases:
        report[case.name] = found = {}
        if "processes" in options.measure:
            found["processes"] = processes(case, options, pythons)
            print(f"\n{case.name}, whole processes\n\n{tables.processes(found['processes'])}")
            print(f"\n{case.name}, images in memory\n\n{tables.scoring(found['processes'])}")
            print(f"\n{tables.versions(found['processes'])}")
        if "stages" in options.measure:
            found["stages"] = stages(case, options)
            print(f"\n{case.name}, stages\n\n{tables.stages(found['stages'])}")
        if "growth" in options.measure:
            found["growth"] = growth(case, options)
            for axis, points in found["growth"].items():
                print(f"\n{case.name}, by {axis}\n\n{tables.growth(axis, points)}")
        if "devices" in options.measure:
            found |= devices(case, options)
            print(f"\n{case.name}, one device\n\n{tables.overhead(found['single'])}")
        write(report, options.json)  # after every case: the next may take long
    if "devices" in options.measure:
        report["prediction"] = predicted = prediction(report, options)
        print(f"\ndevices\n\n{tables.devices(report)}")
        print(f"\npredicted, never measured\n\n{tables.prediction(predicted)}")
        print(f"\nhow good such a prediction is\n\n{tables.validation(predicted)}")
        write(report, options.json)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; see the flags' help."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--measure",
        type=names("startup", "processes", "stages", "growth", "devices"),
        help="some of startup,processes,stages,growth,devices; default: the first three, or "
        "devices alone if --devices is given",
    )
    add("--cases", type=names(), default=CASES, help="BACKBONE-CHANNELS, comma-separated")
    add("--against", action="append", choices=PEERS, default=[], help="a peer; repeatable")
    add("--data", type=pathlib.Path, help="a category in MVTec AD's layout; default: drawn")
    add("--weights", default="random", help="of resnet18: a name, a file or random")
    add("--rounds", type=int, default=3, help="how often each process is run")
    add("--seconds", type=float, default=3.0, help="how long each stage is repeated")
    add("--size", type=int, default=256, help="height and width of the resized images")
    add("--batch-size", type=int, default=32)
    add("--devices", type=counts, help="how many; comma-separated; default: 1,2,4,8")
    add("--json", type=pathlib.Path, help="file for all that was measured")
    add("--workdir", type=pathlib.Path, default=ROOT / "results" / "benchmark")
    add("--torch-python", help="an interpreter with PyTorch and torchvision")
    add("--anomalib-python", help="an interpreter with anomalib")
    add("--quick", action="store_true", help="tiny and meaningless: to try the benchmark out")
    if "--quick" in arguments:
        parser.set_defaults(
            cases=("resnet18-20",),
            rounds=1,
            seconds=0.0,
            size=64,
            batch_size=4,
        )
    options = parser.parse_args(arguments)
    options.measure = options.measure or (
        ("devices",) if options.devices else ("startup", "processes", "stages")
    )
    options.devices = options.devices or ((1, 2) if options.quick else (1, 2, 4, 8))
    return options


def names(*allowed: str) -> Any:
    """A parser of comma-separated names, of `allowed` ones if there are any."""

    def parse_names(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        unknown = [name for name in found if allowed and name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected {', '.join(allowed)}")
        return found

    return parse_names


def counts(text: str) -> tuple[int, ...]:
    """Parses comma-separated numbers of devices."""
    found = tuple(int(count) for count in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers from 1 on")
    return found


def machine() -> str:
    """The processor, its cores as this process may use them, and the memory."""
    described = pathlib.Path("/proc/cpuinfo").read_text()
    model = next(
        (line.split(": ")[1] for line in described.splitlines() if "model name" in line),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {memory / 1e9:.0f} GB of memory, {platform.platform()}"


def make_inputs(options: argparse.Namespace) -> list[Case]:
    """The cases, with their images and weights made where need be."""
    inputs = options.workdir / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    script = (sys.executable, str(HERE / "benchmark_inputs.py"))
    data = options.data and options.data.resolve()
    if data is None:
        data = inputs / "part"
        few = ("--train=6", "--test=10", "--pixels=64") if options.quick else ()
        execute((*script, f"--images={inputs}", *few), options.workdir / "images.log")
    images = len(list((data / "train" / "good").glob("*.png")))
    if not images:
        sys.exit(f"--data={data}: no train/good/*.png in it; expected MVTec AD's layout")
    cases = []
    for name in options.cases:
        backbone, _, channels = name.rpartition("-")
        npz = inputs / f"{backbone}.npz"
        weights = options.weights if backbone == "resnet18" else "random"
        execute(
            (*script, f"--weights={weights}", f"--backbone={backbone}", f"--npz={npz}"),
            options.workdir / "weights.log",
        )
        size, batch_size = options.size, options.batch_size
        cases.append(Case(backbone, int(channels), data, npz, size, batch_size, images))
    return cases


def startup(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Times what should not need to wait for anything: seconds by what is done."""
    python, log = sys.executable, options.workdir / "startup.log"
    program = (python, "-m", "padim_jax.main")
    mistake = (*program, f"--config={ROOT}/configs/mvtec.py", "--config.batch_siz=1")
    found = {
        "python alone": ((python, "-c", ""), 0),
        "import padim_jax": ((python, "-c", "import padim_jax"), 0),
        "--help": ((*program, "--help"), 0),
        "a mistaken setting": (mistake, 2),
    }
    rounds = range(2 * options.rounds + 1)
    return {
        name: measure.summary([execute(command, log, code)["seconds"] for _ in rounds])
        for name, (command, code) in found.items()
    }


def processes(
    case: Case, options: argparse.Namespace, pythons: dict[str, str]
) -> list[dict[str, Any]]:
    """Runs all processes of a case; a dict each, in the order they were run."""
    (options.workdir / case.name).mkdir(parents=True, exist_ok=True)
    log = options.workdir / case.name / "process.log"
    found = []
    for round_ in range(options.rounds):
        for run in runs(case, options, pythons):
            for folder in run.fresh:
                shutil.rmtree(folder, ignore_errors=True)
            result = execute(run.command, log)
            if run.model:
                result["model_bytes"] = measure.disk_bytes(run.model)
            tell(
                f"{round_ + 1}/{options.rounds} {case.name} {run.contender} {run.task}", result
            )
            found.append({"contender": run.contender, "task": run.task, **result})
    return found


def stages(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Measures our stages."""
    command = stages_command(case, "stages", options.workdir, options.seconds)
    return execute(command, options.workdir / "stages.log")


def growth(case: Case, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measures a fit and the stages at several values of each axis."""
    found: dict[str, list[dict[str, Any]]] = {}
    for axis, values in (QUICK_GROWTH if options.quick else GROWTH).items():
        found[axis] = []
        for value in values:
            point = dataclasses.replace(case, **{axis: value})
            place = options.workdir / "growth"
            shutil.rmtree(place, ignore_errors=True)
            point = dataclasses.replace(
                point, data=link_images(case.data, place / "linked" / "part", point.images)
            )
            command = our_command(point, "train", place, place / "cache", False)
            execute(command, options.workdir / "growth.log")  # compiles
            fit = execute(command, options.workdir / "growth.log")
            fit["model_bytes"] = measure.disk_bytes(place / "checkpoint")
            command = stages_command(point, "growth", place, options.seconds)
            parts = execute(command, options.workdir / "growth.log")["stages"]
            found[axis].append({axis: value, "fit": fit, "stages": parts})
            tell(f"{case.name} {axis}={value} fit", fit)
    return found


def devices(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Measures one device, and some numbers of them."""
    log, place = options.workdir / "devices.log", options.workdir / "devices" / case.name
    place.mkdir(parents=True, exist_ok=True)

    def run(task: str, count: int) -> dict[str, Any]:
        command = devices_command(case, task, count, place, options.seconds)
        found = execute(command, log, settings=device_settings(count))
        tell(f"{case.name} {task} {count}", found)
        return found

    return {
        **{name: getattr(case, name) for name in ("backbone", "channels", "size")},
        "single": run("single", 1),
        "devices": [run("devices", count) for count in options.devices],
    }


def prediction(report: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Predicts many GPUs from what was measured."""
    measured = options.workdir / "devices.json"
    write(report, measured)
    command = (sys.executable, str(HERE / "benchmark_predict.py"), f"--measured={measured}")
    return execute(command, options.workdir / "prediction.log")


def write(report: dict[str, Any], path: pathlib.Path | None) -> None:
    """Writes what was measured so far, if it is wanted."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1))


def tell(what: str, result: dict[str, Any]) -> None:
    """Reports progress, and how much else went on meanwhile."""
    others = f"{result['others']:.0%} of the machine"
    line = f"{what}: {result['seconds']:.2f} s (other processes: {others})"
    print(line, file=sys.stderr, flush=True)


def link_images(data: pathlib.Path, linked: pathlib.Path, count: int) -> pathlib.Path:
    """A category of `count` training images: links, more than one to each if need be."""
    (linked / "train" / "good").mkdir(parents=True)
    images = sorted((data / "train" / "good").iterdir())
    for number, image in zip(range(count), itertools.cycle(images), strict=False):
        (linked / "train" / "good" / f"{number:05}{image.suffix}").symlink_to(image)
    for split in ("test", "ground_truth"):
        (linked / split).symlink_to(data / split)
    return linked


if __name__ == "__main__":
    main()
