"""The benchmark's arithmetic, and a smallest run of it."""

import argparse
import dataclasses
import importlib
import pathlib
import sys
from typing import Any

import jax
import numpy as np
import pytest

from padim_jax.config import backbones
from padim_jax.models import resnet
from padim_jax.models.weights import pretrained

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "launch")


def module(name: str) -> Any:
    return importlib.import_module(name)


class Clock:
    """Stands still unless something says that it takes time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(module("benchmark_measure").time, "perf_counter", lambda: self.now)

    def takes(self, *seconds: float):
        """A function whose calls take these seconds, and the last of them from then on."""
        rest = list(seconds)

        def function(*_: Any) -> tuple:
            self.now += rest.pop(0) if len(rest) > 1 else rest[0]
            return ()

        return function


class TestMeasure:
    def test_repeat_counts_neither_warmup_nor_preparation(self, monkeypatch):
        clock = Clock(monkeypatch)
        times = module("benchmark_measure").repeat(
            clock.takes(100, 100, 1, 2, 3), prepare=clock.takes(50), warmup=2, seconds=0
        )
        assert times == [1, 2, 3]

    def test_repeat_ends_when_the_time_is_over(self, monkeypatch):
        repeat = module("benchmark_measure").repeat
        assert len(repeat(Clock(monkeypatch).takes(1), seconds=10)) == 10
        assert len(repeat(Clock(monkeypatch).takes(1), seconds=10, most=4)) == 4

    def test_summary_is_not_moved_by_an_outlier(self):
        summary = module("benchmark_measure").summary
        assert summary([3, 1, 2, 5, 4]) == {"median": 3, "spread": 2, "repeats": 5}
        assert summary([3, 1, 2, 500, 4]) == {"median": 3, "spread": 2, "repeats": 5}
        assert summary([7]) == {"median": 7, "spread": 0, "repeats": 1}

    def test_alternated_functions_take_turns_at_being_first(self):
        calls: list[str] = []
        first, second = module("benchmark_measure").alternate(
            lambda: calls.append("a"), lambda: calls.append("b"), seconds=0
        )
        assert "".join(calls) == "ab" + "abbaab"  # the first pair compiles
        assert len(first) == len(second) == 3

    def test_alternated_times_stay_with_their_function(self, monkeypatch):
        clock = Clock(monkeypatch)
        first, second = module("benchmark_measure").alternate(
            clock.takes(9, 1, 2, 3), clock.takes(9, 10, 20, 30), seconds=0
        )
        assert [seconds for seconds, _ in first] == [1, 2, 3]
        assert [seconds for seconds, _ in second] == [10, 20, 30]

    @pytest.mark.parametrize("k", [0.0, 1.0, 1.5, 3.0])
    def test_exponent_of_a_power_law(self, k: float):
        sizes = [25, 50, 100, 400, 1000]
        found = module("benchmark_measure").exponent(sizes, [7e-3 * size**k for size in sizes])
        assert found == pytest.approx(k, abs=1e-9)

    def test_exponent_is_least_squares_on_logarithms(self):
        sizes, costs = np.array([1, 2, 4, 8, 16]), np.array([3, 4, 11, 19, 50])
        expected = np.polyfit(np.log(sizes), np.log(costs), 1)[0]
        found = module("benchmark_measure").exponent(sizes.tolist(), costs.tolist())
        assert found == pytest.approx(expected)

    def test_peak_memory_is_that_since_the_reset(self):
        measure = module("benchmark_measure")
        measure.reset_peak_memory()
        before, _ = measure.memory()
        np.ones(100_000_000, np.uint8)
        now, peak = measure.memory()
        # What else goes on in this process is far below a quarter of it.
        assert peak - before > 75_000_000
        assert now - before < 25_000_000
        measure.reset_peak_memory()
        assert measure.memory()[1] - before < 25_000_000

    def test_disk_bytes(self, tmp_path: pathlib.Path):
        (tmp_path / "model" / "deep").mkdir(parents=True)
        (tmp_path / "model" / "a").write_bytes(b"12345")
        (tmp_path / "model" / "deep" / "b").write_bytes(b"123")
        (tmp_path / "link").symlink_to(tmp_path / "model" / "a")
        disk_bytes = module("benchmark_measure").disk_bytes
        assert disk_bytes(tmp_path / "model") == 8
        assert disk_bytes(tmp_path / "link") == 5


class TestProcesses:
    def test_execute_measures_the_process_that_it_runs(self, tmp_path: pathlib.Path):
        script = (
            "import json; x = b'1' * 200_000_000; print('hello'); print(json.dumps({'a': 1}))"
        )
        found = module("benchmark_processes").execute(
            (sys.executable, "-c", script), tmp_path / "log"
        )
        assert found["a"] == 1
        assert found["seconds"] > 0
        assert 0 <= found["others"] <= 1.01  # the kernel counts in hundredths of a second
        assert found["peak_bytes"] > 200_000_000
        assert (tmp_path / "log").read_text().startswith("hello")

    def test_failure_is_shown(self, tmp_path: pathlib.Path):
        command = (sys.executable, "-c", "raise SystemExit('the reason')")
        execute = module("benchmark_processes").execute
        with pytest.raises(SystemExit, match=r"(?s)exit code 1: .*the reason"):
            execute(command, tmp_path / "log")
        execute(command, tmp_path / "log", exit_code=1)
        command = (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
        with pytest.raises(SystemExit, match="too little memory"):
            execute(command, tmp_path / "log")

    def test_contenders_take_turns_with_the_same_work(self, tmp_path: pathlib.Path):
        processes = module("benchmark_processes")
        case = processes.Case(
            "resnet18", 448, tmp_path / "part", tmp_path / "w.npz", 256, 32, 9
        )
        options = argparse.Namespace(workdir=tmp_path / "work", seconds=1.0)
        found = list(
            processes.runs(case, options, {"torch": "python-t", "anomalib": "python-a"})
        )
        assert [run.contender for run in found[:6]] == ["padim_jax", "torch", "anomalib"] * 2
        for peer in ("torch", "anomalib"):
            runs = [run for run in found if run.contender == peer]
            assert [run.task for run in runs] == ["fit", "test", "score"]
            assert {run.command[0] for run in runs} == {f"python-{peer[0]}"}
            # A fit begins anew; what comes after reads its model.
            assert [bool(run.fresh) for run in runs] == [True, False, False]
        for run in found:
            line = " ".join(run.command)
            assert "channels=448" in line or run.task == "eval"
            assert str(tmp_path / "w.npz") in line

    def test_environment_is_made_once(self, tmp_path: pathlib.Path, monkeypatch):
        processes = module("benchmark_processes")
        commands: list[list] = []

        def run(command: list, check: bool) -> None:
            assert check
            commands.append([str(part) for part in command])
            (tmp_path / ".venv-torch").mkdir(exist_ok=True)
            if "pip" in command and len(commands) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(processes, "ROOT", tmp_path)
        monkeypatch.setattr(processes.subprocess, "run", run)
        with pytest.raises(KeyboardInterrupt):
            processes.make_environment("torch")
        processes.make_environment("torch")
        assert processes.make_environment("torch") == str(
            tmp_path / ".venv-torch" / "bin" / "python"
        )
        # The interrupted installation was begun again, the finished one was not.
        assert len(commands) == 4
        assert commands[-1][-4:] == list(processes.PEERS["torch"])


class TestTables:
    def cells(self, table: str) -> list[list[str]]:
        rows = [row.strip("| ").split("|") for row in table.splitlines()]
        assert len({len(row) for row in table.splitlines()}) == 1  # aligned
        return [[cell.strip() for cell in row] for row in rows[2:]]

    def run(self, contender: str, task: str, seconds: float, peak: float, **more: Any) -> dict:
        return {
            "contender": contender,
            "task": task,
            "seconds": seconds,
            "peak_bytes": peak * 1e9,
            "others": 0.0,
            **more,
        }

    def test_peers_are_compared_with_our_part_of_the_same_work(self):
        ours = [
            self.run("padim_jax", "train_and_eval, compiled before", 8, 1, model_bytes=5e8),
            self.run("padim_jax", "train", 4, 0.5),
            self.run("padim_jax", "eval", 5, 1),
        ]
        peers = [self.run("torch", "fit", 40, 3), self.run("torch", "test", 20, 2)]
        rows = self.cells(module("benchmark_tables").processes([*peers, *ours]))
        assert [row[0] for row in rows] == ["padim_jax"] * 3 + ["torch"] * 3
        by_task = {row[1]: row[2:] for row in rows}
        assert by_task["train_and_eval, compiled before"][3] == "0.50"
        assert by_task["fit"] == ["40.0", "0.0", "3.00", "", "10.0", "6.0", "0%"]
        assert by_task["test"] == ["20.0", "0.0", "2.00", "", "4.0", "2.0", "0%"]
        # One after the other: times add up, peaks do not.
        assert by_task["fit + test"] == ["60.0", "0.0", "3.00", "", "7.5", "3.0", "0%"]

    def test_rounds_are_summed_up_by_their_median(self):
        found = [self.run("padim_jax", "train", seconds, 1) for seconds in (5, 4, 90)]
        (row,) = self.cells(module("benchmark_tables").processes(found))
        assert row[2] == "5.0"

    def test_a_busy_machine_is_told(self):
        tables = module("benchmark_tables")
        quiet, busy = self.run("padim_jax", "train", 5, 1), self.run("padim_jax", "eval", 5, 1)
        assert "Not to be quoted" not in tables.processes([quiet])
        assert "Not to be quoted" in tables.processes([quiet, busy | {"others": 0.3}])

    def test_scoring(self):
        def score(contender: str, batch: float, single: float) -> dict:
            parts = {"batch_32": batch, "single": single}
            times = {key: {"median": s, "spread": s / 10} for key, s in parts.items()}
            return self.run(contender, "score", 9, 1, **times)

        found = [score("padim_jax", 0.5, 0.02), score("torch", 2.0, 0.05)]
        assert self.cells(module("benchmark_tables").scoring(found)) == [
            ["padim_jax", "64.0", "10%", "20.0", "10%", "1.0", "1.0"],
            ["torch", "16.0", "10%", "50.0", "10%", "4.0", "2.5"],
        ]

    def test_stages(self):
        stage = {"median": 0.064, "spread": 0.002, "repeats": 7, "peak_bytes": 2.5e9}
        found = {
            "backbone": {**stage, "of": "a batch", "images": 32},
            "finalise": {**stage, "of": "the model", "images": 0},
        }
        assert self.cells(module("benchmark_tables").stages({"stages": found})) == [
            ["backbone", "a batch", "64.0", "2.0", "7", "2.00", "2.50"],
            ["finalise", "the model", "64.0", "2.0", "7", "", "2.50"],
        ]

    def test_overhead_is_told_as_what_is_added(self):
        times = {"mapped": 0.103, "plain": 0.1, "ratio": 1.03, "spread": 0.01}
        single = {"overhead": {"fit": {**times, "work_ratio": 0.99, "pairs": 7}}, "others": 0.0}
        (row,) = self.cells(module("benchmark_tables").overhead(single))
        assert row == ["fit", "103.0", "100.0", "+3.0%", "1.0%", "-1.0%", "7"]

    def test_predictions_say_where_a_fit_does_not_fit(self):
        def row(gpus: int, memory: float) -> dict:
            return {"backbone": "b", "channels": 9, "size": 8, "gpus": gpus, "memory": memory}

        unfit = module("benchmark_tables").unfit
        rows = [row(1, 9e10), row(2, 5e10), row(4, 3e10)]
        assert unfit({"rows": rows, "memory_limit": 6e10}) == "b-9 at 8 from 2 GPUs on"
        assert unfit({"rows": rows, "memory_limit": 1e10}) == "b-9 at 8 from more GPUs on"
        assert unfit({"rows": rows, "memory_limit": 9e10}) == "nothing"

    @pytest.mark.parametrize(
        ("seconds", "shown"),
        [(0.0123, "12 ms"), (1.26, "1.3 s"), (359, "6 min"), (7e3, "1.9 h"), (4e6, "1100 h")],
    )
    def test_duration(self, seconds: float, shown: str):
        assert module("benchmark_tables").duration(seconds) == shown

    def test_growth_ends_with_the_exponents(self):
        def point(size: int) -> dict:
            fit = {"seconds": size / 100, "peak_bytes": 1e9, "model_bytes": 4e4 * size**2}
            return {"size": size, "fit": fit, "stages": {"score": {"median": 1e-6 * size**3}}}

        points = [point(size) for size in (100, 200, 400, 800)]
        rows = self.cells(module("benchmark_tables").growth("size", points))
        assert rows[0] == ["100", "1", "1", "0.4", "1e+03"]
        assert rows[-1] == ["exponent", "1.00", "0.00", "2.00", "3.00"]


# As XLA wrote them for four devices: its CPU backend, and (from its documents) GPUs.
CPU_PROGRAM = """
  %all_gather.3 = pred[8]{0} all-gather(%bitcast.1), channel_id=1, replica_groups={{0,1,2,3}}
  %all-to-all = (f32[4,1,54,2]{3,2,1,0}, f32[4,1,54,2]{3,2,1,0}, f32[4,1,54,2]{3,2,1,0}, \
f32[4,1,54,2]{3,2,1,0}) all-to-all(%a, %b, %c, %d), metadata={op_name="jit/all_to_all"}
  %get-tuple-element = f32[4,1,54,2]{3,2,1,0} get-tuple-element(%all-to-all), index=0
"""
GPU_PROGRAM = """
  %s = (f32[16,16]{1,0:T(8,128)}, f32[64,16]{1,0}) all-gather-start(%p), dimensions={0}
  %d = f32[64,16]{1,0} all-gather-done(%s)
  %a = bf16[16,4,54,2]{3,2,1,0} all-to-all(%x), dimensions={0}
  %r = f32[] all-reduce(%y), to_apply=%add
  %e = f32[2]{0} reduce-scatter(%z), to_apply=%add
"""


class TestCollectives:
    def test_what_leaves_a_device(self):
        read = module("benchmark_devices").collectives
        # Of a tuple of four slices three are for others; a gathered byte goes to three.
        assert read(CPU_PROGRAM, 4) == [
            {"name": "all-gather", "bytes": 8 // 4 * 3},
            {"name": "all-to-all", "bytes": 4 * 4 * 54 * 2 * 3},
        ]

    def test_shapes_of_other_backends(self):
        found = module("benchmark_devices").collectives(GPU_PROGRAM, 4)
        assert {each["name"]: each["bytes"] for each in found} == {
            "all-gather": 16 * 16 * 4 * 3,  # the operand is in the tuple, too
            "all-to-all": 16 * 4 * 54 * 2 * 2 * 3 / 4,
            "all-reduce": 2 * 4 * 3 / 4,
            "reduce-scatter": 2 * 4 * 3,
        }

    def test_a_device_alone_sends_nothing(self):
        found = module("benchmark_devices").collectives(CPU_PROGRAM, 1)
        assert sum(each["bytes"] for each in found) == 0

    def test_children_get_their_devices(self, monkeypatch: pytest.MonkeyPatch):
        settings = module("benchmark_processes").device_settings
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        assert settings(2)["CUDA_VISIBLE_DEVICES"] == "0,1"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
        assert settings(2) == {"JAX_NUM_CPU_DEVICES": "2", "CUDA_VISIBLE_DEVICES": "4,6"}


class TestPrediction:
    def machine(self, **of: Any) -> Any:
        given = {"decode": 0.03, "disk": 5e8, **of}
        return module("benchmark_predict").h100(0.1, 0.1, 0.01, 0.5, **given)

    def config(self, size: int = 256, batch: int = 32) -> Any:
        return module("benchmark_predict").configuration("resnet18", 100, size, batch)

    def test_network_is_counted_as_xla_counts_it(self):
        predict = module("benchmark_predict")
        spec = backbones.RESNETS["resnet18"]
        network = resnet.ResNet(spec, ("layer1", "layer2"), "float32")
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
        variables = jax.eval_shape(network.init, jax.random.key(0), image)
        analysis: Any = jax.jit(network.apply).lower(variables, image).cost_analysis()
        counted = analysis["flops"]
        flops, _ = predict.backbone("resnet18", ("layer1", "layer2"), (64, 64))
        # Products with padding's zeros are ours alone: up to a row and a column in 16.
        assert counted < flops < 1.13 * counted

    def test_feature_maps_of_one_layer(self):
        # conv1 reads 32x32x3 and writes 16x16x64; layer1, at 8x8x64: four times both.
        _, read_and_written = module("benchmark_predict").backbone(
            "resnet18", ("layer1",), (32, 32)
        )
        assert read_and_written == 4 * (32 * 32 * 3 + 16 * 16 * 64 + 8 * 8 * 8 * 64)

    @pytest.mark.parametrize("devices", [1, 2, 3, 8])
    def test_volumes_are_those_of_the_embeddings(self, devices: int):
        predict = module("benchmark_predict")
        config = self.config(size=224)  # 14x14 regions: 3 and 8 do not divide them
        shapes = predict.levels(config, devices)
        whole = -(-196 // devices) * devices
        d = sum(n * channels for _, n, channels in shapes)
        found = predict.volumes(shapes, devices)
        assert found["embeddings"] == pytest.approx(4 * whole * d * (1 - 1 / devices))
        assert found["distances"] == pytest.approx(4 * whole * 16 * (1 - 1 / devices))

    def test_update_is_bounded_by_its_two_kinds_of_work(self):
        predict = module("benchmark_predict")
        shapes = predict.levels(self.config(), 1)
        numbers = sum(
            r * n * d * sum(e for _, _, e in shapes[i:]) for i, (r, n, d) in enumerate(shapes)
        )
        work = predict.moments(shapes, 1, 31)
        assert work.flops == 2 * 32 * numbers
        assert work.bytes == 8 * numbers
        assert work.loops == 16  # of 256 regions of 16 cells, 256 cells a step
        shared = predict.moments(predict.levels(self.config(), 4), 4, 31)
        assert (shared.flops, shared.bytes) == (work.flops / 4, work.bytes / 4)
        assert shared.loops == 4

    def test_one_level_is_factorised_in_four_thirds_of_cubes(self):
        assert module("benchmark_predict").finalise([(5, 2, 30)], 1).flops == 10 * 30**3 * 4 / 3

    def test_checkpoint_is_as_large_as_what_is_packed(self):
        # Two levels: symmetric 3x3 and 2x2 blocks as 6 and 3 numbers, and 3x2 ones.
        found = module("benchmark_predict").checkpoint_bytes([(4, 4, 3), (4, 1, 2)])
        means = 4 * (4 * 3 + 2)
        assert found == 4 * (4 * (4 * (6 + 6) + 3) + means)

    def test_more_devices_take_less_time_at_the_same_batch_each(self):
        predict = module("benchmark_predict")
        fits = [
            predict.fit(self.config(batch=32 * k), 10**5, k, self.machine())
            for k in (1, 2, 4, 8, 16, 32, 64)
        ]
        for part in ("total", "decode", "backbone", "moments", "finalise"):
            times = [fit[part] for fit in fits]
            assert times == sorted(times, reverse=True)
        assert fits[0]["all_to_all"] == 0
        # Half of the images each; of the batches half as many, on half of the regions.
        assert fits[1]["decode"] == pytest.approx(fits[0]["decode"] / 2)
        assert fits[1]["backbone"] == pytest.approx(fits[0]["backbone"] / 2, rel=1e-3)
        assert fits[1]["moments"] < fits[0]["moments"] / 2

    def test_time_grows_with_images_and_their_size(self):
        predict = module("benchmark_predict")
        few, many = (
            predict.fit(self.config(), images, 1, self.machine()) for images in (3200, 32000)
        )
        for part in ("decode", "backbone", "moments"):
            assert many[part] == pytest.approx(10 * few[part])
        assert many["finalise"] == few["finalise"]
        large = predict.fit(self.config(size=512), 3200, 1, self.machine())
        assert large["backbone"] == pytest.approx(4 * few["backbone"])

    def test_decoding_hides_behind_the_devices_or_they_behind_it(self):
        predict = module("benchmark_predict")
        for decode in (1e-4, 1.0):
            found = predict.fit(self.config(), 3200, 1, self.machine(decode=decode))
            computed = found["backbone"] + found["moments"]
            rest = found["finalise"] + found["checkpoint"]
            assert found["total"] == pytest.approx(max(found["decode"], computed) + rest)
        ours = dataclasses.replace(self.machine(), apart=False)
        found = predict.fit(self.config(), 3200, 1, ours)
        assert found["total"] == pytest.approx(
            sum(value for part, value in found.items() if part != "total")
        )

    def test_other_nodes_are_reached_through_the_network(self):
        predict = module("benchmark_predict")
        machine = dataclasses.replace(self.machine(), collective=0.0)
        slow = dataclasses.replace(machine, network=machine.network / 2)

        def sending(devices: int, machine: Any) -> float:
            config = self.config(batch=32 * devices)
            return predict.batch_seconds(config, devices, 32 * devices, machine)["all_to_all"]

        assert sending(8, slow) == sending(8, machine)
        sent = 32 * predict.volumes(predict.levels(self.config(), 16), 16)["embeddings"]
        # Of 15 other devices 7 are on the same node.
        expected = sent * (7 / 15 / machine.link + 8 / 15 / machine.network)
        assert sending(16, machine) == pytest.approx(expected)
        assert sending(16, slow) > sending(16, machine)

    def test_memory_is_shared_out_as_the_fit_itself_estimates_it(self):
        predict = module("benchmark_predict")
        one, eight = (predict.needed(self.config(), 10**4, k) for k in (1, 8))
        assert eight.statistics == pytest.approx(one.statistics / 8, rel=1e-6)

    def test_what_a_machine_reached_is_predicted_of_it(self):
        predict = module("benchmark_predict")
        stages = {"backbone": 0.5, "moments": 0.03, "finalise": 0.06, "checkpoint": 0.1}
        single = {
            "batch": 32,
            "images": 320,
            "cores": 4,
            "speed": {"backbone": 3e11, "products": 3e11, "memory": 4e10},
            "decode": {"files": 0.006, "cached": 0.001},
            "stages": {**stages, "checkpoint_bytes": 36e6},
            "train": {"median": 8.0},
        }
        machine = predict.this_machine([single], [self.config()])
        rows = predict.validate({"case": single}, {"case": self.config()}, machine)
        found = {row["what"]: row["predicted"] for row in rows}
        assert found.pop("fit") == pytest.approx(320 * 0.006 + 10 * 0.53 + 0.16, rel=1e-3)
        assert found == pytest.approx(stages, rel=1e-2)


class TestInputs:
    @pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
    def test_weights_are_the_same_for_all(self, backbone: str, tmp_path: pathlib.Path):
        layers = ("layer1", "layer2", "layer3")
        variables, _ = pretrained.load("random", backbone, layers)
        inputs = module("benchmark_inputs")
        np.savez(tmp_path / "w.npz", **inputs.torchvision_names(variables["params"]))
        again, _ = pretrained.load(str(tmp_path / "w.npz"), backbone, layers)
        jax.tree.map(np.testing.assert_array_equal, variables, again)

    def test_peers_networks_compute_what_the_folded_weights_say(self, tmp_path: pathlib.Path):
        torch = pytest.importorskip("torch")
        peer = module("benchmark_peer")
        rng = np.random.default_rng(0)
        tensors = {
            "conv1.weight": rng.standard_normal((4, 3, 3, 3), np.float32),
            "conv1.bias": rng.standard_normal(4, np.float32),
        }
        np.savez(tmp_path / "w.npz", **tensors)  # pyright: ignore[reportArgumentType]
        network = torch.nn.Sequential()
        network.add_module("conv1", torch.nn.Conv2d(3, 4, 3, bias=False))
        network.add_module("bn1", torch.nn.BatchNorm2d(4))
        peer.load_weights(network.eval(), tmp_path / "w.npz")
        images = torch.from_numpy(rng.standard_normal((2, 3, 8, 8), np.float32))
        expected = torch.nn.functional.conv2d(images, *map(torch.from_numpy, tensors.values()))
        # 1 - epsilon is rounded to float32: 3e-8 relative.
        torch.testing.assert_close(network(images), expected, rtol=1e-6, atol=1e-6)
        assert peer.convolution_before("layer2.0.bn2") == "layer2.0.conv2"
        assert peer.convolution_before("layer2.0.downsample.1") == "layer2.0.downsample.0"


class TestCommandLine:
    def test_devices_alone_are_measured_when_they_are_named(self):
        benchmark = module("benchmark")
        named = benchmark.parse(["--devices=1,4"])
        assert (named.measure, named.devices) == (("devices",), (1, 4))
        assert "devices" not in benchmark.parse([]).measure
        both = benchmark.parse(["--measure=stages,devices", "--devices=2"])
        assert both.measure == ("stages", "devices")
        assert benchmark.parse(["--measure=devices"]).devices == (1, 2, 4, 8)

    def test_mistakes(self, capsys: pytest.CaptureFixture[str]):
        benchmark = module("benchmark")
        with pytest.raises(SystemExit):
            benchmark.parse(["--devices=1,0"])
        assert "expected numbers from 1 on" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            benchmark.parse(["--measure=stages,everything"])
        assert "'everything': expected" in capsys.readouterr().err

    def test_links_repeat_the_images(self, tmp_path: pathlib.Path):
        data = tmp_path / "part"
        (data / "train" / "good").mkdir(parents=True)
        for number in range(3):
            (data / "train" / "good" / f"{number}.png").write_text(str(number))
        linked = module("benchmark").link_images(data, tmp_path / "linked", 8)
        files = sorted((linked / "train" / "good").iterdir())
        assert [file.read_text() for file in files] == list("01201201")
