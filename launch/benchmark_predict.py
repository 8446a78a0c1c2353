"""Predicts what a fit takes on many GPUs; prints tables, and JSON on its last line.

    python launch/benchmark_predict.py --measured=results/devices.json

benchmark.py --measure=devices starts it and makes that file (--json).

Nothing here is a measurement. A fit is counted as arithmetic, bytes of memory, loops and
bytes sent, which follow from its configuration; a `Machine` says how fast it does each; a
stage takes the sum of its parts. What a machine reaches of its data sheet is not known
before it is measured, hence two machines, "cautious" and "hopeful". The same model with
this machine's numbers is held against what was measured on it.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import benchmark_tables as tables
import jax
import jax.numpy as jnp
import numpy as np

from padim_jax.config import backbones, defaults
from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config
from padim_jax.detector import geometry, memory
from padim_jax.detector import statistics as statistics_lib
from padim_jax.devices.parallel import Devices
from padim_jax.models import resnet

CASES = (
    ("resnet18", 100),
    ("resnet18", 448),
    ("wide_resnet50_2", 550),
    ("wide_resnet50_2", 1792),  # all
)
SIZES = (224, 256, 512, 1024)
GPUS = (1, 2, 4, 8, 16, 32, 64)
IMAGES = (10**3, 10**4, 10**5, 10**6)
BATCH = 32  # images of a batch, for each GPU
LIMIT = 0.75 * 80e9  # of a GPU's memory JAX takes three quarters, unless told otherwise
SAVED_EVERY = 300.0  # seconds: the default of config.train.checkpoint_every

_LARGEST_BLOCK = 256  # cells, as in gaussian.py


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device does in a stage.

    Attributes:
      flops: multiplications and additions.
      bytes: read from its memory or written to it.
      loops: steps of loops on the device, each of some ten kernels.
    """

    flops: float
    bytes: float
    loops: int = 0


@dataclasses.dataclass(frozen=True)
class Machine:
    """How fast a device does what, and what is around it.

    Attributes:
      backbone: FLOP/s of convolutions.
      products: FLOP/s of small float32 products, of the moments.
      factorise: FLOP/s of small float32 Cholesky factorisations.
      memory: bytes/s.
      loop: seconds of a loop's step beside its arithmetic.
      link: bytes/s that leave a device for others of its node.
      network: bytes/s that leave it for other nodes.
      node: devices of a node.
      collective: seconds that a collective takes to begin.
      cores: processor cores for each device.
      decode: seconds a core takes for an image.
      disk: bytes/s of a node to where checkpoints are.
      apart: whether decoding takes nothing from the devices' time.
    """

    backbone: float
    products: float
    factorise: float
    memory: float
    decode: float
    disk: float
    loop: float = 0.0
    link: float = math.inf
    network: float = math.inf
    node: int = 1
    collective: float = 0.0
    cores: int = 1
    apart: bool = False

    def seconds(self, work: Work, rate: float) -> float:
        """Time of a stage whose arithmetic runs at a rate."""
        return work.flops / rate + work.bytes / self.memory + work.loops * self.loop


# NVIDIA's data sheet of the H100 SXM: dense TF32, the backbone's default precision; FP32;
# HBM3; NVLink in one direction; and 400 Gb/s of network for each GPU, as in DGX H100.
_TF32, _FP32, _HBM = 495e12, 67e12, 3.35e12
_NVLINK, _NETWORK = 450e9, 50e9


def h100(
    backbone: float, products: float, factorise: float, rest: float, **of: float
) -> Machine:
    """An H100 that reaches these fractions of its data sheet.

    Args:
      backbone: of TF32.
      products: of FP32.
      factorise: of FP32.
      rest: of memory, links and network.
      **of: `Machine.decode` and `Machine.disk`.
    """
    return Machine(
        backbone=backbone * _TF32,
        products=products * _FP32,
        factorise=factorise * _FP32,
        memory=rest * _HBM,
        loop=2e-4,  # forty kernels of 5 microseconds
        link=rest * _NVLINK,
        network=rest * _NETWORK,
        node=8,
        collective=5e-5,
        cores=16,
        apart=True,
        **of,
    )


# ---- what there is to do


@functools.cache
def configuration(backbone: str, channels: int, size: int, batch: int) -> Config:
    """The default configuration with some settings; what is kept is moments."""
    settings: Any = defaults.get_config()
    settings.model.statistics = "moments"
    settings.model.backbone, settings.model.weights = backbone, backbones.RANDOM_WEIGHTS
    settings.model.channels, settings.batch_size = channels, batch
    settings.image.resize = (size, size)
    return config_lib.validate(settings)


@functools.cache
def backbone(name: str, layers: tuple[str, ...], size: tuple[int, int]) -> tuple[int, int]:
    """FLOPs of an image, and bytes of feature maps that convolutions read and write.

    Counted in the traced network: nothing is computed or allocated.
    """
    network = resnet.ResNet(backbones.RESNETS[name], layers, "float32")
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), image)
    traced = jax.make_jaxpr(network.apply)(variables, image)
    found = [
        (
            2 * out.size * math.prod(kernel.shape) // kernel.shape[-1],
            4 * (image.size + out.size),
        )
        for image, kernel, out in _convolutions(traced.jaxpr)
    ]
    flops, read_and_written = np.sum(found, axis=0).tolist()
    return flops, read_and_written


def _convolutions(jaxpr: Any) -> list[tuple[Any, Any, Any]]:
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            image, kernel = equation.invars
            found.append((image.aval, kernel.aval, equation.outvars[0].aval))
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)  # of a closed jaxpr
            if hasattr(inner, "eqns"):
                found += _convolutions(inner)
    return found


@functools.cache
def levels(config: Config, devices: int) -> tuple[geometry.Shape, ...]:
    """`Pyramid.shapes` of all devices' regions, those included that fill up the last one."""
    index = tuple(geometry.channel_index(config.model).tolist())
    shapes = geometry.pyramid(config.image, config.model, index).shapes
    return tuple((Devices(1, devices).padded(r), n, d) for r, n, d in shapes)


def volumes(shapes: Sequence[geometry.Shape], devices: int) -> dict[str, float]:
    """Bytes that leave all devices for an image: the theory.

    Args:
      shapes: see `levels`.
      devices: among which a (devices - 1) / devices part of everything is sent on.

    Returns:
      "embeddings", all that a fit sends; "distances" and "samples", what scoring sends back.
    """
    others = (devices - 1) / devices
    r, n, _ = shapes[0]
    embeddings = 4 * sum(math.prod(shape) for shape in shapes)
    # About 2,048 numbers of an image, evenly from each device's regions; see `steps`.
    own = [-(-regions // devices) * cells * d for regions, cells, d in shapes]
    stride = -(-devices * sum(own) // 2048)
    samples = 4 * devices * sum(-(-size // stride) for size in own)
    return {
        "embeddings": embeddings * others,
        "distances": 4 * r * n * others,
        "samples": samples * others,
    }


def extraction(config: Config, images: float) -> Work:
    """Backbone and embedding of some images."""
    model = config.model
    flops, read_and_written = backbone(model.backbone, model.layers, config.image.size)
    selected = 2 * 4 * sum(math.prod(shape) for shape in levels(config, 1))
    return Work(images * flops, images * (read_and_written + selected))


def moments(shapes: Sequence[geometry.Shape], devices: int, batch: int) -> Work:
    """One batch's update of a device's moments: `gaussian.update`."""
    numbers = _moments_size(shapes) / devices
    # The batch's mean is one image more; second moments are read and written.
    return Work(2 * (batch + 1) * numbers, 2 * 4 * numbers, _loops(shapes, devices))


def finalise(shapes: Sequence[geometry.Shape], devices: int) -> Work:
    """`gaussian.finalize` of a device's regions: block Cholesky factorisation."""
    flops = 0.0
    for i, (r, n, d) in enumerate(shapes):
        coarser = [e for _, _, e in shapes[i + 1 :]]
        for j, e in enumerate(coarser):
            # Substitution from what is coarser still, the inverse, what is left of its own.
            flops += 2 * r * n * d * e * (sum(coarser[j + 1 :]) + e + d)
        flops += r * n * d**3 * 4 / 3  # the Cholesky factor and its inverse
    numbers = _moments_size(shapes) / devices
    return Work(flops / devices, 2 * 4 * numbers, _loops(shapes, devices))


def checkpoint_bytes(shapes: Sequence[geometry.Shape]) -> float:
    """Of the moments on disk, which has each symmetric block once."""
    numbers = sum(r * n * d * (1 - (d - 1) / 2) for r, n, d in shapes)
    return 4 * (_moments_size(shapes) + numbers)


def _moments_size(shapes: Sequence[geometry.Shape]) -> float:
    return statistics_lib.fitted_size(shapes, 0, "moments")


def _loops(shapes: Sequence[geometry.Shape], devices: int) -> int:
    regions, cells = shapes[0][0] // devices, shapes[0][1]
    most = max(1, _LARGEST_BLOCK // cells)
    return regions // max(n for n in range(1, most + 1) if regions % n == 0)


# ---- how long it takes


def batch_seconds(
    config: Config, devices: int, batch: int, machine: Machine
) -> dict[str, float]:
    """Seconds of one batch of all devices, by stage."""
    shapes = levels(config, devices)
    own = batch / devices
    sent = volumes(shapes, devices)["embeddings"] * own  # by each device
    # Of the other devices those on other nodes get theirs through the network.
    outside = max(0, devices - machine.node) / max(1, devices - 1)
    collectives = (len(shapes) + 1) * machine.collective if devices > 1 else 0.0
    extracted = extraction(config, own)
    return {
        "backbone": machine.seconds(extracted, machine.backbone),
        "all_to_all": collectives
        + sent * ((1 - outside) / machine.link + outside / machine.network),
        "moments": machine.seconds(moments(shapes, devices, batch), machine.products),
    }


def fit(config: Config, images: int, devices: int, machine: Machine) -> dict[str, float]:
    """Seconds of a fit by stage and in all, start-up and compilation aside.

    Args:
      config: what to fit; its batch is that of all devices.
      images: how many.
      devices: how many.
      machine: of which devices.
    """
    every = Devices(1, devices)
    shapes = levels(config, devices)
    batch = every.padded(min(config.batch_size, images))
    count = -(-images // batch)
    found = {
        "decode": images * machine.decode / (machine.cores * devices),
        **{
            stage: count * seconds
            for stage, seconds in batch_seconds(config, devices, batch, machine).items()
        },
        "finalise": machine.seconds(finalise(shapes, devices), machine.factorise),
    }
    computed = found["backbone"] + found["all_to_all"] + found["moments"]
    steps = max(found["decode"], computed) if machine.apart else found["decode"] + computed
    nodes = -(-devices // machine.node)
    saves = 1 + int(steps // SAVED_EVERY)
    found["checkpoint"] = saves * checkpoint_bytes(shapes) / (machine.disk * nodes)
    found["total"] = steps + found["finalise"] + found["checkpoint"]
    return found


def needed(config: Config, images: int, devices: int) -> memory.Estimate:
    """`memory.estimate` of one of several GPUs, each with a memory of its own."""
    # A device a process: on a CPU several of a process would share its memory.
    return memory.estimate(config, images, Devices(1, devices))


# ---- from measurements


def this_machine(singles: Sequence[dict[str, Any]], configs: Sequence[Config]) -> Machine:
    """The machine that `benchmark_devices.py` measured on one device.

    Speeds of large products are not those of a network and of small matrices: what is
    reached of them is the median of the cases. How far one number carries shows in each
    case's error.
    """
    pairs = list(zip(singles, configs, strict=True))

    def median(of: Callable[[dict[str, Any], Config], float]) -> float:
        return statistics.median(of(single, config) for single, config in pairs)

    memory = median(lambda single, _: single["speed"]["memory"])

    def reached(stage: str, work: Callable[[Config, int], Work]) -> float:
        def rate(single: dict[str, Any], config: Config) -> float:
            done, seconds = work(config, single["batch"]), single["stages"][stage]
            return done.flops / max(seconds - done.bytes / memory, 0.1 * seconds)

        return median(rate)

    return Machine(
        backbone=reached("backbone", extraction),
        products=reached("moments", lambda config, batch: moments(levels(config, 1), 1, batch)),
        factorise=reached("finalise", lambda config, _: finalise(levels(config, 1), 1)),
        memory=memory,
        decode=median(lambda single, _: single["decode"]["files"] * single["cores"]),
        # Small checkpoints are many small files: the largest shows what a disk takes.
        disk=max(
            single["stages"]["checkpoint_bytes"] / single["stages"]["checkpoint"]
            for single in singles
        ),
        cores=singles[0]["cores"],
    )


def validate(
    found: dict[str, dict[str, Any]], configs: dict[str, Config], machine: Machine
) -> list[dict[str, Any]]:
    """Predicted and measured seconds on this machine, of each case's stages and fit."""
    rows = []
    for name, single in found.items():
        config, stages = configs[name], single["stages"]
        seconds = batch_seconds(config, 1, single["batch"], machine)
        whole = fit(config, single["images"], 1, machine)
        predicted = {
            "backbone": seconds["backbone"],
            "moments": seconds["moments"],
            "finalise": whole["finalise"],
            "checkpoint": whole["checkpoint"],
            "fit": whole["total"],
        }
        measured = {**stages, "fit": single["train"]["median"]}
        rows += [
            {"case": name, "what": what, "predicted": value, "measured": measured[what]}
            for what, value in predicted.items()
        ]
    return rows


def main() -> None:
    """Predicts from what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", type=pathlib.Path, required=True, help="of benchmark.py")
    options = parser.parse_args()
    report = json.loads(options.measured.read_text())
    cases = {name: of for name, of in report.items() if isinstance(of, dict) and "single" in of}
    singles = {name: of["single"] for name, of in cases.items()}
    configs = {
        name: configuration(of["backbone"], of["channels"], of["size"], single["batch"])
        for (name, of), single in zip(cases.items(), singles.values(), strict=True)
    }
    found = predict(cases, singles, configs)
    print(f"{tables.prediction(found)}\n\n{tables.validation(found)}")
    print(json.dumps(found))


def predict(
    cases: dict[str, Any], singles: dict[str, Any], configs: dict[str, Config]
) -> dict[str, Any]:
    """All predictions that follow from a benchmark's report."""
    ours = this_machine(list(singles.values()), list(configs.values()))
    # Of the machine's best, in whatever process it was seen.
    best = {
        kind: max(single["speed"][kind] for single in singles.values())
        for kind in ("backbone", "products")
    }
    reached = {
        "backbone": ours.backbone / best["backbone"],
        "products": ours.products / best["products"],
        "factorise": ours.factorise / best["products"],
    }
    around = {"decode": ours.decode, "disk": ours.disk}
    read = statistics.median(
        of["decode"]["cached"] * of["cores"] / cases[name]["size"] ** 2
        for name, of in singles.items()
    )
    scenarios = {
        # NVIDIA's ResNet-50 reaches a fifth of a V100's tensor cores; here half of that.
        "cautious": h100(0.1, 0.1, 0.01, 0.5, **around),
        "hopeful": h100(**reached, rest=0.8, **around),
    }
    rows = []
    for (network, channels), size, gpus in (
        (case, size, gpus) for case in CASES for size in SIZES for gpus in GPUS
    ):
        config = configuration(network, channels, size, BATCH * gpus)
        for images in IMAGES:
            estimate = needed(config, images, gpus)
            row = {"backbone": network, "channels": channels, "size": size, "gpus": gpus}
            row |= {"images": images, "memory": estimate.total}
            row |= {"statistics": estimate.statistics}
            for scenario, machine in scenarios.items():
                row[scenario] = fit(config, images, gpus, machine)
                # Cached images are raw: their cost goes with their pixels.
                cached = dataclasses.replace(machine, decode=read * size**2)
                row[f"{scenario}, cached"] = fit(config, images, gpus, cached)
            rows.append(row)
    found: dict[str, Any] = {
        "scenarios": {name: dataclasses.asdict(of) for name, of in scenarios.items()},
        "reached": reached,
        "memory_limit": LIMIT,
        "rows": rows,
    }
    found["this_machine"] = dataclasses.asdict(ours)
    found["validation"] = validate(singles, configs, ours)
    found["batches"] = {
        case: [beside(point, configs[case], scenarios, ours) for point in of["devices"]]
        for case, of in cases.items()
    }
    return found


def beside(
    point: dict[str, Any],
    config: Config,
    scenarios: dict[str, Machine],
    ours: Machine,
) -> dict[str, Any]:
    """What is to be compared with a measured number of devices.

    Returns:
      "theory" of what is sent, and "seconds" predicted for a fit's batch: of H100s by
      scenario, of another machine on one device.
    """
    count = point["devices"]
    machines = scenarios if "H100" in point["device_kind"] else {}
    if not machines and count == 1:
        machines = {"this machine": ours}
    return {
        "theory": volumes(levels(config, count), count),
        "seconds": {
            name: sum(batch_seconds(config, count, point["batch"], machine).values())
            for name, machine in machines.items()
        },
    }


if __name__ == "__main__":
    main()
