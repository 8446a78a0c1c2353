"""Times one detector in JAX, ONNX Runtime and OpenVINO, and prints a table.

    python launch/benchmark_runtimes.py [--size=256] [--channels=100] [--repeats=10]

All in one run and in turns, so that what else the machine does concerns all of them alike. The
detector has the published settings (ResNet-18, max of the map) and random weights; images are
noise, which takes as long as any other. Times are medians from uint8 images to maps and scores;
decoding is not part of them.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import padim_jax
from padim_jax.detector import detector as detector_lib
from padim_jax.export import runtimes

BATCHES = (1, 32)


def main() -> None:
    """Fit, export, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("size", 256), ("channels", 100), ("repeats", 10), ("images", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    size = (arguments.size, arguments.size)
    normal = rng.integers(0, 256, (arguments.images, *size, 3), np.uint8)
    detector = padim_jax.fit(
        normal,
        preset="anomalib",
        weights="random",
        resize=size,
        channels=arguments.channels,
        statistics="moments",
        thresholds="none",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "part.onnx")
        detector.export(path)
        started = {
            "JAX": lambda: lambda x: detector_lib.score_pixels(detector, x),
            "ONNX Runtime": lambda: runtimes.open_file(path),
            "OpenVINO, float32": lambda: runtimes.open_file(path, "openvino"),
            "OpenVINO, bfloat16": lambda: runtimes.open_file(path, "openvino", True),
        }
        programs = {name: start() for name, start in started.items()}
        print(f"{path.stat().st_size / 1e6:.0f} MB, {size[0]}x{size[1]} pixels")
        rows = {b: _times(programs, b, arguments.repeats, rng, size) for b in BATCHES}
    print(f"{'':20}" + "".join(f"{f'batch {b}, ms':>16}{'img/s':>8}" for b in BATCHES))
    for name in programs:
        cells = [(1e3 * rows[b][name], b / rows[b][name]) for b in BATCHES]
        print(f"{name:20}" + "".join(f"{ms:16.1f}{rate:8.1f}" for ms, rate in cells))


def _times(
    programs: dict[str, Callable[[np.ndarray], Any]],
    batch: int,
    repeats: int,
    rng: np.random.Generator,
    size: tuple[int, int],
) -> dict[str, float]:
    """Return the median seconds of each program for a batch."""
    images = rng.integers(0, 256, (batch, *size, 3), np.uint8)
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program(images)
            if i:  # the first compiles
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


if __name__ == "__main__":
    main()
