"""How the benchmark measures: repeated times, peak memory, exponents. Standard library only.

Imported by the benchmark and by the processes that it starts, in whatever environment.
"""

import math
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

Seconds = tuple[float, float]  # that passed, and that this process's threads worked


def repeat(
    function: Callable[..., Any],
    *,
    prepare: Callable[[], tuple] = tuple,
    warmup: int = 1,
    seconds: float = 3.0,
    most: int = 50,
) -> list[float]:
    """Times a function: `warmup` calls uncounted, then until `seconds` are over.

    Args:
      function: returns when its work is done (on a GPU: when its result is there).
      prepare: makes the arguments of each call, untimed.
      warmup: calls before, that compile, allocate and fill caches.
      seconds: how long to go on; no call is begun after it.
      most: calls at most.

    Returns:
      The seconds of three calls at least, unless `most` is less.
    """
    for _ in range(warmup):
        function(*prepare())
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < most and (len(times) < 3 or time.perf_counter() - start < seconds):
        arguments = prepare()
        before = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - before)
    return times


def alternate(
    first: Callable[[], Any], second: Callable[[], Any], *, seconds: float, most: int = 200
) -> tuple[list[Seconds], list[Seconds]]:
    """Times two functions in turns, so that what else goes on meets both.

    Args:
      first: returns when its work is done.
      second: the same.
      seconds: how long to go on; no pair is begun after it.
      most: pairs at most.

    Returns:
      Of each, pair by pair, the seconds that passed and those that this process's threads
      worked; three pairs at least.
    """
    times: tuple[list[Seconds], list[Seconds]] = ([], [])
    pairs = list(zip((first, second), times, strict=True))
    for function, _ in pairs:  # compiles
        function()
    start = time.perf_counter()
    while len(times[0]) < most and (len(times[0]) < 3 or time.perf_counter() - start < seconds):
        for function, found in pairs:
            before, worked = time.perf_counter(), time.process_time()
            function()
            found.append((time.perf_counter() - before, time.process_time() - worked))
        pairs.reverse()  # neither is always the one that comes after the other
    return times


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median, spread (the distance between the quartiles) and number of some times."""
    spread = 0.0
    if len(times) > 1:
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        spread = high - low
    return {"median": statistics.median(times), "spread": spread, "repeats": len(times)}


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The k of `cost = c size^k` by least squares on logarithms."""
    slope, _ = statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    )
    return slope


def reset_peak_memory() -> None:
    """Begins anew with this process's peak memory (Linux)."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def memory() -> tuple[int, int]:
    """Bytes of this process in memory: now, and the most since it began or since the reset."""
    status = pathlib.Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    now, most = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def disk_bytes(path: pathlib.Path) -> int:
    """Bytes of all files in a folder, or of one file."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
