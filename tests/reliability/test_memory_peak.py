"""Whole runs take the memory that is estimated before them: within a fifth, at several sizes.

Two fits and one prediction a day; all with PADIM_JAX_EVERYTHING=1, in minutes.
"""

import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from padim_jax.config import defaults
from padim_jax.config import settings as config
from padim_jax.detector import memory
from padim_jax.devices.parallel import Devices

# The peak of the program's own memory: what `resource` says of a child may be its parent's.
CODE = """
import json, pathlib, re, sys, warnings
from padim_jax.config import settings as config
from padim_jax.config import defaults
from padim_jax.runs import loading, predict, train
warnings.simplefilter("ignore")  # of random images
values = defaults.get_config()
settings = json.loads(sys.argv[2])
values.update_from_flattened_dict({k: tuple(v) if isinstance(v, list) else v
    for k, v in settings.items()})
work = pathlib.Path(sys.argv[1])
train.train_and_eval(config.validate(values), work / "results", work / "checkpoint")
status = pathlib.Path("/proc/self/status").read_text()
print("peak", 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]))
"""


def write_dataset(root: pathlib.Path, train: int, test: int) -> None:
    """Images of many sizes; half of the test images with defects of 5 % of their pixels."""
    rng = np.random.default_rng(0)

    def write(place: pathlib.Path, pixels: np.ndarray) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place, compress_level=1)

    def image() -> np.ndarray:
        height, width = rng.integers(60, 200, 2)
        small = Image.fromarray(rng.integers(60, 200, (6, 6, 3), np.uint8))
        return np.array(small.resize((width, height)))

    part = root / "part"
    for number in range(train):
        write(part / f"train/good/{number:03}.png", image())
    for number in range(test // 2):
        write(part / f"test/good/{number:03}.png", image())
        pixels = image()
        mask = np.zeros(pixels.shape[:2], np.uint8)
        height, width = (int(side * 0.05**0.5) for side in mask.shape)
        pixels[:height, :width] = 255
        mask[:height, :width] = 255
        write(part / f"test/crack/{number:03}.png", pixels)
        write(part / f"ground_truth/crack/{number:03}_mask.png", mask)


def validated(flat: dict[str, Any]) -> config.Config:
    values: Any = defaults.get_config()
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in flat.items()}
    values.update_from_flattened_dict(tuples)
    return config.validate(values)


def measured_peak(codes: list[str], folder: pathlib.Path, flat: dict[str, Any]) -> int:
    """Run programs one after the other; the bytes that the last one took at its peak."""
    printed = ""
    for code in codes:
        command = [sys.executable, "-c", code, str(folder), json.dumps(flat)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    return int(printed.rsplit("peak ", 1)[1])


# Of one stage and few channels, as the backbone's work is most of a run's time.
FAST = {"model.layers": ["layer1"], "model.channels": 10}


@pytest.mark.sampled(2)
@pytest.mark.skipif(sys.platform != "linux", reason="Linux says what a process took at most")
@pytest.mark.parametrize(
    ("train", "test", "settings"),
    [
        # Most of it is the program, the statistics, the batch, and the evaluation.
        (8, 8, {"image.resize": [96, 96], "batch_size": 1}),
        (
            8,
            8,
            {
                "image.resize": [256, 256],
                "batch_size": 8,
                "model.channels": 448,
                "model.statistics": "moments",
                "threshold.normal": "none",
            },
        ),
        (40, 8, {"image.resize": [512, 512], "batch_size": 32, **FAST}),
        (8, 600, {"image.resize": [256, 256], "batch_size": 8, **FAST}),
        (8, 200, {"image.resize": [512, 512], "batch_size": 8, **FAST}),
    ],
    ids=["program", "statistics", "batch", "evaluation", "large maps"],
)
def test_estimate_and_peak(train: int, test: int, settings: dict, tmp_path: pathlib.Path):
    write_dataset(tmp_path / "data", train, test)
    flat: dict[str, Any] = {
        "dataset.root": str(tmp_path / "data"),
        "category": "part",
        "model.weights": "random",
        "cache.images_gb": 0.0,
        "cache.dir": str(tmp_path / "cache"),
        **settings,
    }
    peak = measured_peak([CODE], tmp_path, flat)
    valid, one = validated(flat), Devices(1)
    fit = memory.estimate(valid, train, one).total
    estimate = max(fit, memory.estimate_evaluation(valid, train, test, one))
    print(f"estimate {estimate / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB")
    assert abs(estimate - peak) <= 0.2 * peak


FITTING = """
import json, pathlib, sys, warnings
from padim_jax.config import settings as config
from padim_jax.data import dataset_splits
from padim_jax.config import defaults
from padim_jax.runs import train
warnings.simplefilter("ignore")  # of random images
values = defaults.get_config()
values.update_from_flattened_dict({k: tuple(v) if isinstance(v, list) else v
    for k, v in json.loads(sys.argv[2]).items()})
valid = config.validate(values)
path = pathlib.Path(sys.argv[1]) / "checkpoint"
train.train(valid, dataset_splits.open_dataset(valid), path)
"""
PREDICTING = """
import pathlib, re, sys, warnings
from padim_jax.data import listing
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.runs import loading, predict
warnings.simplefilter("ignore")
work = pathlib.Path(sys.argv[1])
source = FolderSource(listing.find(str(work / "data/part/test")))
predict.predict(loading.load(work / "checkpoint"), source, work)
status = pathlib.Path("/proc/self/status").read_text()
print("peak", 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]))
"""


@pytest.mark.sampled(1)
@pytest.mark.skipif(sys.platform != "linux", reason="Linux says what a process took at most")
@pytest.mark.parametrize(
    "settings",
    [
        {"image.resize": [256, 256], "batch_size": 32},
        {"image.resize": [256, 256], "batch_size": 8, "model.channels": 448},
        {"image.resize": [512, 512], "batch_size": 32, **FAST},
    ],
    ids=["batch", "model", "large batch"],
)
def test_estimate_and_peak_of_predictions(settings: dict, tmp_path: pathlib.Path):
    write_dataset(tmp_path / "data", 12, 80)
    flat: dict[str, Any] = {
        "dataset.root": str(tmp_path / "data"),
        "category": "part",
        "model.weights": "random",
        "model.statistics": "moments",
        "threshold.normal": "none",
        "cache.images_gb": 0.0,
        "cache.dir": str(tmp_path / "cache"),
        **settings,
    }
    peak = measured_peak([FITTING, PREDICTING], tmp_path, flat)
    estimate = memory.estimate_prediction(validated(flat), 12, Devices(1))
    print(f"estimate {estimate / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB")
    assert abs(estimate - peak) <= 0.2 * peak
