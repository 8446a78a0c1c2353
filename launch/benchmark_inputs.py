"""Makes what all contenders of the benchmark read: images where none are given, and weights.

Weights become an .npz of torchvision's names with batch norm folded, which peers read too.
"""

import argparse
import pathlib
from typing import Any

import numpy as np

from padim_jax.data.layouts import synthetic
from padim_jax.models.weights import pretrained

LAYERS = ("layer1", "layer2", "layer3")


def main() -> None:
    """Writes what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=pathlib.Path, help="folder for synthetic images")
    parser.add_argument("--train", type=int, default=209)
    parser.add_argument("--test", type=int, default=83)
    parser.add_argument("--pixels", type=int, default=900)
    parser.add_argument("--weights", help="name or file of weights, or random")
    parser.add_argument("--backbone")
    parser.add_argument("--npz", type=pathlib.Path, help="file to write the weights to")
    arguments = parser.parse_args()
    if arguments.images:
        # A fifth of them normal, as in MVTec AD's bottle: 20 of 83.
        defects = max(1, arguments.test // 5)
        synthetic.generate(
            arguments.images,
            n_train=arguments.train,
            n_test_good=arguments.test - 4 * defects,
            n_test_per_defect=defects,
            size=arguments.pixels,
        )
    if arguments.npz:
        variables, _ = pretrained.load(arguments.weights, arguments.backbone, LAYERS)
        tensors: Any = torchvision_names(variables["params"])
        np.savez(arguments.npz, **tensors)


def torchvision_names(params: dict) -> dict[str, np.ndarray]:
    """Flax's parameters to folded convolutions by torchvision's names, OIHW."""
    tensors = {}
    for module, inner in params.items():
        # The stem is a convolution itself; blocks hold several.
        for name, part in ({"": inner} if "kernel" in inner else inner).items():
            path = ".".join(filter(None, (module.replace("_", "."), name)))
            if name == "downsample":
                path += ".0"
            tensors[f"{path}.weight"] = part["kernel"].transpose(3, 2, 0, 1)
            tensors[f"{path}.bias"] = part["bias"]
    return tensors


if __name__ == "__main__":
    main()
