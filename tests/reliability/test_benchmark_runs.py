"""The smallest runs of the benchmarks, in processes of their own."""

import json
import os
import pathlib
import subprocess
import sys

from test_benchmark import ROOT, launch, module

__all__ = ["launch"]  # a fixture, of all tests


def test_smallest_run(tmp_path: pathlib.Path):
    found = tmp_path / "found.json"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "launch" / "benchmark.py", "--quick"),
            *("--measure=stages", f"--workdir={tmp_path}", f"--json={found}"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    assert done.returncode == 0, done.stderr
    stages = json.loads(found.read_text())["resnet18-20"]["stages"]["stages"]
    order = ["decode", "backbone", "embed", "moments", "finalise", "score", "metrics"]
    assert [name for name in stages if name in order] == order
    assert all(stage["median"] > 0 for stage in stages.values())
    assert all(f"| {name} " in done.stdout for name in stages)


def test_smallest_run_of_devices(tmp_path: pathlib.Path):
    found = tmp_path / "found.json"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "launch" / "benchmark.py", "--quick"),
            *("--measure=devices", "--devices=1,2"),
            *(f"--workdir={tmp_path}", f"--json={found}"),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "default", "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert "not how fast" in done.stdout
    assert "predicted, never measured" in done.stdout
    report = json.loads(found.read_text())
    one, two = report["resnet18-20"]["devices"]
    assert (one["devices"], two["devices"]) == (1, 2)
    tables = module("benchmark_tables")
    beside = report["prediction"]["batches"]["resnet18-20"]
    for point, theory in zip((one, two), (of["theory"] for of in beside), strict=True):
        # The theory of the program that XLA made, to the byte.
        assert tables.sent(point, "fit")[0] == theory["embeddings"]
        assert tables.sent(point, "score")[0] == sum(theory.values())
    assert two["statistics_bytes"] <= one["statistics_bytes"] / 2 + 4  # each has the count
    # Summed in another order: some rounding errors of float32, 6e-8.
    assert two["statistics_difference"] < 1e-5
    assert two["map_difference"] < 1e-4
