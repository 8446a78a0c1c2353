"""The memory estimate: what arrays and compiled programs really take, and what is advised."""

import dataclasses
import functools
import pathlib
import re
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from padim_jax.config import backbones, defaults
from padim_jax.config.settings import Config, validate
from padim_jax.core import gaussian, low_rank
from padim_jax.core.types import Moments, Samples
from padim_jax.detector import geometry, memory, steps
from padim_jax.detector import statistics as statistics_lib
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.models import network

GB = 10**9
ONE = Devices(1)


def make_config(backbone: str = "resnet18", **settings: Any) -> Config:
    values = defaults.get_config()
    base = {
        "model.backbone": backbone,
        "model.weights": "random",
        "model.layers": backbones.BACKBONES[backbone].stages[:3],
    }
    values.update_from_flattened_dict(base | settings)
    return validate(values)


def size(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def statistics(config: Config, images: int) -> Moments | Samples:
    """As `fitting.train` starts with, on one device."""
    return statistics_lib.init(shapes_of(config), images, config.model.statistics, ONE)


def shapes_of(config: Config) -> tuple[geometry.Shape, ...]:
    index = geometry.channel_index(config.model)
    return geometry.pyramid(config.image, config.model, tuple(index.tolist())).shapes


class TestArrays:
    @pytest.mark.parametrize(
        ("backbone", "settings", "images", "form"),
        [
            ("resnet18", {}, 209, "moments"),
            ("resnet18", {}, 20, "samples"),
            ("resnet18", {"model.statistics": "samples"}, 209, "samples"),
            ("wide_resnet50_2", {"model.channels": 550}, 100, "samples"),
            ("wide_resnet50_2", {"model.channels": 550}, 209, "moments"),
            ("wide_resnet50_2", {"model.channels": 1792}, 209, "samples"),
            ("resnet18", {"model.layers": ("layer3",)}, 209, "moments"),
            ("resnet18", {"model.layers": ("layer1",), "model.channels": 64}, 9, "samples"),
            ("resnet18", {"model.layers": ("layer1", "layer4")}, 209, "moments"),
            # The only channel is one of layer3, on layer1's grid.
            ("resnet18", {"model.channels": 1}, 209, "moments"),
            ("resnet18", {"image.crop": (224, 192)}, 209, "moments"),
            # Grids that do not divide each other are padded: this one to 2.3 times as much.
            ("resnet18", {"image.resize": (500, 500)}, 209, "moments"),
            ("resnet18", {"image.resize": (300, 420)}, 20, "samples"),
            ("resnet50", {"image.resize": (33, 75)}, 209, "moments"),
            # Every patch has its own channels.
            ("resnet18", {"model.reduction": "pca"}, 209, "moments"),
            ("resnet18", {"model.upsample": "bilinear", "model.channels": 300}, 100, "samples"),
            ("resnet18", {"model.reduction": "none"}, 209, "moments"),
        ],
    )
    def test_statistics(self, backbone: str, settings: dict, images: int, form: str):
        config = make_config(backbone, **settings)
        found = memory.estimate(config, images, ONE)
        assert found.form == form
        leaves = jax.eval_shape(lambda: jax.tree.leaves(statistics(config, images)))
        assert found.statistics == size(leaves) - 4  # the count

    @pytest.mark.parametrize(("form", "resize"), [("moments", (64, 96)), ("samples", (75, 50))])
    def test_fitted(self, form: str, resize: tuple[int, int]):
        settings: dict[str, Any] = {"image.resize": resize, "model.statistics": form}
        config = make_config("resnet18", **settings, **{"model.channels": 20})
        images, empty = 7, statistics(config, 7)
        full = dataclasses.replace(empty, count=jnp.asarray([images], jnp.int32))
        fitted = statistics_lib.finalize(full, config.model.regularization)
        regularization = 4 * (form == "samples")
        assert memory.estimate(config, images, ONE).fitted == size(fitted) - regularization

    def test_an_image_of_any_size(self):
        """Nothing is allocated: 4000 x 4000 patches."""
        found = memory.estimate(
            make_config("resnet18", **{"image.resize": (16_000, 16_000)}), 209, ONE
        )
        assert found.statistics > 10**11


@functools.cache
def weights(config: Config) -> Any:
    model = network.build(config.model.backbone, config.model.layers, config.model.precision)
    images = jnp.zeros((1, *config.image.size, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images))


class TestBatch:
    @pytest.mark.parametrize(
        ("backbone", "settings", "batch_size"),
        [
            ("resnet18", {"model.statistics": "moments"}, 32),
            ("resnet18", {"image.resize": (300, 420), "model.channels": 448}, 8),
            ("resnet18", {"model.reduction": "none", "model.upsample": "bilinear"}, 8),
            ("wide_resnet50_2", {"model.channels": 550, "model.precision": "bfloat16"}, 32),
            ("efficientnet_b5", {"model.layers": ("block7",), "model.channels": 20}, 16),
        ],
    )
    def test_what_xla_says(
        self, backbone: str, settings: dict, batch_size: int, optimized: None
    ):
        config = make_config(backbone, **settings, batch_size=batch_size)
        index = tuple(geometry.channel_index(config.model).tolist())
        variables = weights(config)
        if geometry.is_projected(config.model):
            shape = geometry.total_channels(config.model), config.model.channels
            matrix = jax.ShapeDtypeStruct(shape, jnp.float32)
            variables = {**variables, steps.PROJECTION: matrix}
        # Flat, since JAX would fill the statistics' class with descriptions of arrays.
        leaves, structure = jax.tree.flatten(statistics(config, batch_size))

        def fit(leaves, levels, valid):
            return steps._fit_batch(structure.unflatten(leaves), levels, valid)

        shape = (1, batch_size, *config.image.size, 3)
        images = jax.ShapeDtypeStruct(shape, jnp.uint8)
        valid = jax.ShapeDtypeStruct((1, batch_size), bool)
        embed: Any = steps.embed_batch
        most = steps.at_a_time(config, ONE)
        static = config.image, config.model, index, most
        lowered = embed.lower(variables, images, *static)
        mapped: Any = parallel.mapped(fit, donated=(0,))
        each = [lowered, mapped.lower(leaves, lowered.out_info, valid)]
        taken = [one.compile().memory_analysis() for one in each]
        found = memory.estimate(config, batch_size, ONE).batch
        # Enough, and of the feature maps 1.07 to 1.47 times what is needed (measured with
        # two versions of XLA, of 14 configurations), of the weights three times.
        backbone_size = size(weights(config))
        temporary = max(one.temp_size_in_bytes for one in taken) + taken[0].output_size_in_bytes
        assert found >= temporary + backbone_size
        assert found <= 1.6 * temporary + 3.4 * backbone_size

    @pytest.mark.parametrize(
        ("backbone", "deepest"),
        [
            *(("resnet18", 0), ("resnet18", -1), ("resnet34", 1), ("resnet50", -1)),
            *(("wide_resnet50_2", 1), ("efficientnet_b5", 0)),
        ],
    )
    def test_weights(self, backbone: str, deepest: int):
        """They are counted three times, of the stages that are there."""
        layers = (backbones.BACKBONES[backbone].stages[deepest],)
        config = make_config(backbone, **{"model.layers": layers, "model.channels": 20})
        empty = dataclasses.replace(config, batch_size=0)
        counted = memory.estimate(empty, 9, ONE).batch / 3
        # By the widest kernels; the stem, the downsampling and the biases are not.
        assert counted == pytest.approx(size(weights(config)), rel=0.13)


class TestGrowth:
    @pytest.mark.parametrize("form", ["moments", "samples"])
    def test_with_channels(self, form: str):
        totals = [
            memory.estimate(
                make_config(
                    "resnet18", **{"model.channels": channels, "model.statistics": form}
                ),
                100,
                ONE,
            ).total
            for channels in range(10, 448, 20)
        ]
        assert totals == sorted(set(totals))

    def test_with_images(self):
        counts = (40, 200, 1000, 4000)
        for form, grows in (("samples", True), ("moments", False)):
            config = make_config("resnet18", **{"model.statistics": form})
            totals = [memory.estimate(config, images, ONE).total for images in counts]
            assert totals == sorted(totals)
            assert len(set(totals)) == (len(counts) if grows else 1)

    def test_with_the_batch_size(self):
        """Up to all images: no batch is larger."""
        sizes = (1, 16, 64, 256)
        totals = [
            memory.estimate(make_config(batch_size=n), 100, ONE).batch for n in (*sizes, 999)
        ]
        assert totals[:-1] == sorted(set(totals))
        assert totals[-1] == memory.estimate(make_config(batch_size=100), 100, ONE).batch

    def test_auto_is_never_above_both(self):
        for images in (20, 100, 500):
            auto, *forms = (
                memory.estimate(
                    make_config("resnet18", **{"model.statistics": form}), images, ONE
                )
                for form in ("auto", "moments", "samples")
            )
            assert auto.fitted == min(form.fitted for form in forms)


DEVICES = [Devices(2), Devices(8), Devices(4, processes=16), Devices(1, processes=3)]


class TestDevices:
    """Statistics and batches are shared out; CPU devices of a process share one memory."""

    @pytest.fixture
    def gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As if every device had a memory of its own."""
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    @pytest.mark.parametrize("devices", DEVICES, ids=str)
    @pytest.mark.parametrize(
        ("settings", "images"),
        [
            ({}, 209),
            ({}, 20),
            # 12 regions: on 8 devices there are 16 of them, on 64 there are 64.
            ({"image.resize": (64, 48)}, 209),
            ({"image.resize": (64, 48)}, 3),
        ],
        ids=str,
    )
    def test_statistics_of_a_gpu(
        self, settings: dict, images: int, devices: Devices, gpus: None
    ):
        config = make_config("resnet18", **settings)
        found = memory.estimate(config, images, devices)
        # The form does not depend on the devices.
        assert found.form == memory.estimate(config, images, ONE).form
        own = [(devices.padded(r) // devices.total, n, d) for r, n, d in shapes_of(config)]
        form = gaussian.init if found.form == "moments" else room_for(images)
        leaves = jax.eval_shape(lambda: jax.tree.leaves(form(own)))
        assert found.statistics == size(leaves) - 4  # the count

    @pytest.mark.parametrize("devices", DEVICES, ids=str)
    def test_statistics_of_a_machine(self, devices: Devices):
        config = make_config()
        whole = memory.estimate(config, 209, ONE).statistics
        found = memory.estimate(config, 209, devices).statistics
        # 256 regions, of which 3 processes have 86 each.
        assert found == pytest.approx(whole / devices.processes, rel=0.01)

    @pytest.mark.parametrize("devices", DEVICES, ids=str)
    def test_a_batch(self, devices: Devices, monkeypatch: pytest.MonkeyPatch):
        """What every device has of it, and the backbone, which each has whole."""
        config = make_config(batch_size=8)  # of which a CPU computes all at a time
        one_image = memory.estimate(dataclasses.replace(config, batch_size=1), 209, ONE).batch
        backbone = memory.estimate(dataclasses.replace(config, batch_size=0), 209, ONE).batch
        own = -(-8 // devices.total)  # rounded up, as are the regions by a process in 86
        expected = own * (one_image - backbone) + backbone
        on_a_machine = memory.estimate(config, 209, devices).batch
        assert on_a_machine == pytest.approx(devices.local * expected, rel=0.01)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        on_a_gpu = memory.estimate(config, 209, devices).batch
        assert on_a_gpu == pytest.approx(expected, rel=0.01)

    @pytest.mark.parametrize("form", ["moments", "samples"])
    def test_what_a_device_has_fitted(self, form: str, gpus: None):
        settings: dict[str, Any] = {"image.resize": (64, 48), "model.statistics": form}
        config = make_config("resnet18", **settings, **{"model.channels": 20})
        devices, images, shapes = Devices(8), 7, shapes_of(config)
        empty = statistics_lib.init(shapes, images, form, devices)
        count = jnp.full_like(empty.count, images)
        fitted = statistics_lib.finalize(dataclasses.replace(empty, count=count), 0.01)
        regularization = 4 * (form == "samples")
        found = memory.estimate(config, images, devices).fitted
        assert found == size(fitted) / devices.total - regularization

    @pytest.mark.parametrize("form", ["moments", "samples"])
    def test_more_of_them_take_less_each(self, form: str, gpus: None):
        config = make_config("resnet18", **{"model.statistics": form})
        counts = (1, 2, 4, 8, 16, 32)
        totals = [memory.estimate(config, 209, Devices(n)).total for n in counts]
        assert totals == sorted(set(totals), reverse=True)

    @pytest.mark.parametrize(("backend", "advised"), [("cpu", False), ("gpu", True)])
    def test_more_devices_are_advised_where_they_help(
        self, backend: str, advised: bool, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        monkeypatch.setattr(memory, "available", lambda: GB // 10)
        with pytest.raises(UserError) as caught:
            memory.require(make_config(), 209, Devices(2))
        assert ("more devices" in str(caught.value)) == advised


def room_for(images: int) -> Any:
    return lambda shapes: low_rank.init(shapes, images)


class TestRequire:
    @pytest.fixture
    def free(self, monkeypatch: pytest.MonkeyPatch):
        """Sets how much there is."""

        def to(free: int) -> None:
            monkeypatch.setattr(memory, "available", lambda: free)

        return to

    def test_enough(self, free, capsys: pytest.CaptureFixture[str]):
        config = make_config()
        needed = memory.estimate(config, 209, ONE)
        free(needed.total)
        memory.require(config, 209, ONE)
        out = capsys.readouterr().out
        assert re.fullmatch(
            r"about (\d\.\d) GB of memory to fit 209 images: 0.04 GB of statistics "
            r"\(moments\), 0\.\d\d GB for a batch; (\d\.\d) GB are free\n",
            out,
        ), out

    def test_a_copy_of_the_statistics(self, free):
        config = make_config()
        needed = memory.estimate(config, 209, ONE)
        free(needed.total + needed.statistics)
        memory.require(config, 209, ONE, kept=True)
        free(needed.total + needed.statistics - 1)
        with pytest.raises(UserError, match="not enough memory"):
            memory.require(config, 209, ONE, kept=True)

    def test_a_byte_too_little(self, free, capsys: pytest.CaptureFixture[str]):
        config = make_config("wide_resnet50_2", **{"model.channels": 550})
        needed = memory.estimate(config, 100, ONE)
        free(needed.total - 1)
        with pytest.raises(UserError) as caught:
            memory.require(config, 100, ONE)
        message, gigabytes = str(caught.value), f"{needed.total / GB:.1f} GB"
        assert message.startswith(f"not enough memory: about {gigabytes} of memory")
        assert f"; {gigabytes} are free" in message
        assert "0.24 GB of statistics (samples)" in message
        for setting in (
            "config.model.channels=549 (the most that fit)",
            "config.batch_size",
            "config.image.resize",
            "config.model.layers",
            "config.model.precision=bfloat16",
        ):
            assert setting in message
        assert "\n" not in message
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(
        ("backbone", "settings", "images", "free_gb"),
        [
            ("resnet18", {"model.channels": 448}, 1000, 1.2),
            # Fewer channels as moments would take more than these as samples.
            ("wide_resnet50_2", {"model.channels": 1792}, 209, 2.5),
        ],
    )
    def test_the_most_channels_that_fit(
        self, backbone: str, settings: dict, images: int, free_gb: float, free
    ):
        config, most = make_config(backbone, **settings), int(free_gb * GB)

        def total(channels: int) -> int:
            model = dataclasses.replace(config.model, channels=channels)
            return memory.estimate(dataclasses.replace(config, model=model), images, ONE).total

        free(most)
        with pytest.raises(UserError) as caught:
            memory.require(config, images, ONE)
        found = re.search(r"config\.model\.channels=(\d+) \(the most", str(caught.value))
        assert found
        channels = int(found[1])
        assert total(channels) <= most
        assert all(total(n) > most for n in range(channels + 1, config.model.channels, 61))
        assert total(channels + 1) > most

    def test_no_number_of_channels_fits(self, free):
        free(GB // 10)
        with pytest.raises(UserError, match=r"0\.1 GB are free") as caught:
            memory.require(make_config(), 209, ONE)
        assert "config.model.channels" not in str(caught.value)
        assert "config.batch_size" in str(caught.value)

    @pytest.mark.parametrize(
        ("backbone", "settings", "there", "missing"),
        [
            # CPUs compute its blocks in float32 anyway.
            ("resnet18", {}, "config.image.resize", "bfloat16"),
            ("resnet50", {"model.precision": "bfloat16"}, "config.image.resize", "precision"),
            ("resnet50", {"image.crop": (224, 224)}, "config.image.crop", "resize"),
        ],
    )
    def test_only_what_helps_is_advised(
        self, backbone: str, settings: dict, there: str, missing: str, free
    ):
        free(GB // 10)
        with pytest.raises(UserError) as caught:
            memory.require(make_config(backbone, **settings), 209, ONE)
        assert there in str(caught.value)
        assert missing not in str(caught.value)


class TestEvaluation:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine with 8 GB free, of which no device has a part of its own."""
        monkeypatch.setattr(memory, "available", lambda: 8 * GB)
        monkeypatch.setattr(memory, "available_to_host", lambda: 8 * GB)

    def test_it_is_the_model_and_the_maps(self):
        config = make_config(batch_size=1)
        needed = memory.estimate(config, 209, ONE)
        few, many, more = (
            memory.estimate_evaluation(config, 209, tests, ONE) for tests in (1, 1000, 2000)
        )
        # A batch of images is larger than one image's map.
        assert few == pytest.approx(needed.total - needed.statistics + needed.fitted, rel=0.1)
        # Scores, masks, what is sorted and counted of them, and what 5 % of defects take.
        assert more - many == pytest.approx(1000 * 256 * 256 * 29, rel=1e-6)

    def test_it_is_said_with_the_fit(self, capsys: pytest.CaptureFixture[str]):
        config = make_config()
        memory.require(config, 60, ONE, 582)
        out = capsys.readouterr().out
        assert re.fullmatch(
            r"about 0\.8 GB of memory to fit 60 images: .* for a batch; "
            r"about 1\.7 GB to evaluate 582 test images; 8\.0 GB are free\n",
            out,
        ), out

    def test_a_fit_that_cannot_be_evaluated_does_not_start(self):
        config = make_config()
        memory.require(config, 60, ONE)
        with pytest.raises(UserError, match=r"anomaly maps of 5000 test images .* 8\.0 GB"):
            memory.require(config, 60, ONE, 5000)
        # The first process alone keeps the maps.
        memory.require(config, 60, Devices(1, processes=2, process=1), 5000)

    def test_on_a_gpu_the_model_is_not_in_the_machine_s_memory(self, monkeypatch):
        config = make_config("resnet18", **{"model.channels": 448})
        cpu, maps = memory.estimate_evaluation(config, 209, 600, ONE), 600 * 256 * 256 * 29
        monkeypatch.setattr(parallel, "free_memory", lambda: 60 * GB)
        gpu = memory.estimate_evaluation(config, 209, 600, ONE)
        assert cpu - gpu == memory.estimate(config, 209, ONE).fitted
        assert gpu == pytest.approx(maps + 0.6 * GB, rel=1e-6)

    @pytest.mark.parametrize("tests", [0, 10])
    def test_scoring_with_a_model_that_is_loaded(
        self, tests: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ):
        config = make_config()
        memory.require_for_scores(config, 60, ONE, tests)
        what = r"0\.8 GB of memory to evaluate 10 test images"
        if not tests:  # and writes as it goes
            what = r"0\.8 GB of memory to score in batches of 32"
        assert re.match(f"about {what}", capsys.readouterr().out)
        monkeypatch.setattr(memory, "available", lambda: GB // 20)
        with pytest.raises(
            UserError, match=r"score a batch of 32; 0\.1 GB are free.*batch_size"
        ):
            memory.require_for_scores(config, 60, ONE, tests)

    def test_maps_that_have_no_room_beside_a_loaded_model(self):
        config = make_config()
        with pytest.raises(UserError, match="anomaly maps of 5000 test images"):
            memory.require_for_scores(config, 60, ONE, 5000)


V2 = ("memory.max", "memory.current", "memory.stat", "inactive_file")
V1 = (
    "memory/memory.limit_in_bytes",
    "memory/memory.usage_in_bytes",
    "memory/memory.stat",
    "total_inactive_file",
)
BOTH = pytest.mark.parametrize("names", [V2, V1], ids=["v2", "v1"])


def write_cgroup(
    root: pathlib.Path, names: tuple[str, ...], limit: str, used: int, droppable: int
) -> None:
    most, current, stat, cache = names
    (root / stat).parent.mkdir(parents=True, exist_ok=True)
    (root / most).write_text(f"{limit}\n")
    (root / current).write_text(f"{used}\n")
    (root / stat).write_text(f"anon 5\nactive_file 6\nin{cache} 7\n{cache} {droppable}\n")


class TestAvailable:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine with 8 GB free."""
        free = types.SimpleNamespace(available=8 * GB)
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: free)

    def test_machine(self, tmp_path: pathlib.Path):
        assert memory.available(tmp_path / "no such folder") == 8 * GB

    @BOTH
    def test_container(self, names: tuple[str, ...], tmp_path: pathlib.Path):
        write_cgroup(tmp_path, names, str(4 * GB), used=3 * GB, droppable=2 * GB)
        # Files that were read are given up.
        assert memory.available(tmp_path) == 3 * GB

    @BOTH
    def test_container_larger_than_the_machine(
        self, names: tuple[str, ...], tmp_path: pathlib.Path
    ):
        # The latter is version 1's way to say that there is no limit.
        for limit in (16 * GB, 2**63 - 4096):
            write_cgroup(tmp_path, names, str(limit), used=GB, droppable=0)
            assert memory.available(tmp_path) == 8 * GB

    def test_no_limit(self, tmp_path: pathlib.Path):
        write_cgroup(tmp_path, V2, "max", used=GB, droppable=0)
        assert memory.available(tmp_path) == 8 * GB

    def test_the_smaller_of_both_versions(self, tmp_path: pathlib.Path):
        write_cgroup(tmp_path, V2, str(4 * GB), used=GB, droppable=0)
        write_cgroup(tmp_path, V1, str(3 * GB), used=GB, droppable=0)
        assert memory.available(tmp_path) == 2 * GB

    @pytest.mark.parametrize("missing", V2[:3])
    def test_unknown_use(self, missing: str, tmp_path: pathlib.Path):
        write_cgroup(tmp_path, V2, str(4 * GB), used=GB, droppable=0)
        (tmp_path / missing).unlink()
        assert memory.available(tmp_path) == 8 * GB

    @pytest.mark.parametrize(
        ("line", "base", "names"),
        [
            ("0::/a.slice/b.service", "", V2),
            ("0::/a.slice/b.service", "unified", V2),
            ("7:cpu,memory:/a.slice/b.service", "", V1),
        ],
    )
    def test_nested(self, line: str, base: str, names: tuple[str, ...], tmp_path: pathlib.Path):
        """Any of the groups that the process's own is in may have the tightest limit."""
        own, root = tmp_path / "own", tmp_path / "cgroup" / base
        own.write_text(f"3:pids:/x:y\n{line}\n1:name=systemd:/\n")
        first, *others = names[:3]
        folder = pathlib.Path(first).parent
        groups = [folder, folder / "a.slice", folder / "a.slice" / "b.service"]

        def write(limits: list[int]) -> None:
            for group, limit in zip(groups, limits, strict=True):
                inside = [str(group / pathlib.Path(name).name) for name in (first, *others)]
                write_cgroup(root, (*inside, names[3]), str(limit * GB), 2 * GB, GB // 2)

        for tightest in range(3):
            limits = [7, 7, 7]
            limits[tightest] = 4
            write(limits)
            assert memory.available(tmp_path / "cgroup", own) == 2.5 * GB
        # A limit that is passed leaves nothing.
        write([7, 1, 7])
        assert memory.available(tmp_path / "cgroup", own) == 0
        # Groups beside it are others' affair.
        write([7, 7, 7])
        for group in (groups[1] / "c.service", folder / "d"):
            inside = [str(group / pathlib.Path(name).name) for name in (first, *others)]
            write_cgroup(root, (*inside, names[3]), str(GB), GB, 0)
        assert memory.available(tmp_path / "cgroup", own) == 5.5 * GB
        # A container's group has another name outside of it.
        own.write_text(f"{line}/unknown\n{line.partition('/')[0]}/../x\n")
        assert memory.available(tmp_path / "cgroup", own) == 5.5 * GB

    def test_a_limit_above_which_a_group_is_slowed_down(self, tmp_path: pathlib.Path):
        write_cgroup(tmp_path, V2, "max", used=GB, droppable=0)
        (tmp_path / "memory.high").write_text(f"{3 * GB}\n")
        assert memory.available(tmp_path) == 2 * GB

    @pytest.mark.skipif(not memory.psutil.LINUX, reason="memory is limited so on Linux alone")
    def test_limits_of_the_process(self):
        """What is mapped already counts; so much and no more can then be had."""
        code = """
import resource
from padim_jax.detector import memory
for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
    resource.setrlimit(kind, (3 * 10**9, -1))
    free = memory.available_to_host()
    assert 10**8 < free < 3 * 10**9, free
    held = bytearray(free * 9 // 10)
    left = memory.available_to_host()
    assert left < free // 8, (left, free)
    try:
        bytearray(free // 5)
    except MemoryError:
        print("as said")
    del held
    resource.setrlimit(kind, (-1, -1))
"""
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == "as said\n" * 2

    def test_device_with_memory_of_its_own(
        self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        gpu = types.SimpleNamespace(
            memory_stats=lambda: {"bytes_limit": 60 * GB, "bytes_in_use": GB}
        )
        monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
        write_cgroup(tmp_path, V2, str(4 * GB), used=GB, droppable=0)
        assert memory.available(tmp_path) == 59 * GB
