"""What the peers of the benchmark share: arguments, weights, timing. Needs PyTorch only.

Peers run in environments of their own and import nothing of padim_jax. Each prints one JSON
object on its last line.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any

import benchmark_measure as measure
import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Task:
    """What a peer is to do.

    Attributes:
      name: "fit" (images to a saved model), "test" (a saved model and images to metrics,
        maps and pictures) or "score" (time the model alone, on images in memory).
      data: the category's folder, in MVTec AD's layout.
      workdir: for the fitted model and the results.
      backbone: by torchvision's name.
      weights: .npz of torchvision's names with batch norm folded.
      channels: to keep.
      size: height and width of the resized images.
      batch_size: of fit and test.
      seconds: how long to repeat what is timed.
    """

    name: str
    data: pathlib.Path
    workdir: pathlib.Path
    backbone: str
    weights: pathlib.Path
    channels: int
    size: int
    batch_size: int
    seconds: float


def main(peer: Callable[[Task], dict[str, Any]]) -> None:
    """Runs a peer as the command line says, and prints what it measured."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("name", choices=("fit", "test", "score"))
    for name in ("data", "workdir", "weights"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--backbone", required=True)
    for name in ("channels", "size", "batch_size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    task = Task(**vars(parser.parse_args()))
    task.workdir.mkdir(parents=True, exist_ok=True)
    measured = peer(task)
    measured["threads"] = torch.get_num_threads()
    measured["versions"] = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "timm", "lightning", "anomalib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            measured["versions"][name] = importlib.metadata.version(name)
    print(json.dumps(measured))


def import_torchvision() -> Any:
    """Imports torchvision, also beside a PyTorch that its compiled part was not built for.

    On machines with a CPU build of PyTorch and torchvision from PyPI (built for CUDA) that
    part does not load, and the import ends at two detection operators which the part
    would have brought. Nothing here uses them; declaring them is enough.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{name}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )
        import torchvision
    return torchvision


def load_weights(network: torch.nn.Module, path: pathlib.Path) -> None:
    """Puts convolutions with folded batch norm into a network that has batch norms.

    The bias becomes the batch norm's; the norm itself becomes the identity.

    Raises:
      KeyError: a tensor that the network needs is missing.
    """
    with np.load(path) as archive:
        tensors = {name: torch.from_numpy(archive[name]) for name in archive.files}
    state = {}
    for name, value in network.state_dict().items():
        module, _, part = name.rpartition(".")
        if name.startswith(("layer4", "fc")):
            state[name] = value  # behind what PaDiM uses
        elif value.ndim == 4:
            state[name] = tensors[name]
        elif part == "bias":
            state[name] = tensors[f"{convolution_before(module)}.bias"]
        elif part == "running_var":
            state[name] = torch.full_like(value, 1 - 1e-5)  # + epsilon = 1
        elif part == "weight":
            state[name] = torch.ones_like(value)
        else:
            state[name] = torch.zeros_like(value)
    network.load_state_dict(state)


def convolution_before(batch_norm: str) -> str:
    """The convolution that a batch norm follows: bn2 -> conv2, downsample.1 -> .0."""
    if batch_norm.endswith("downsample.1"):
        return batch_norm.removesuffix("1") + "0"
    return batch_norm.replace("bn", "conv")


def time_scoring(
    score: Callable[[torch.Tensor], Any], size: int, seconds: float
) -> dict[str, Any]:
    """Times a model on images in memory: batches of 32, and single images.

    Args:
      score: normalised images (b, 3, h, w) to maps and scores.
      size: h and w.
      seconds: how long to repeat each.
    """
    images = torch.randn(32, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return {
            "batch_32": measure.summary(
                measure.repeat(lambda: score(images), warmup=2, seconds=seconds)
            ),
            "single": measure.summary(
                measure.repeat(lambda: score(images[:1]), warmup=2, seconds=seconds)
            ),
        }
