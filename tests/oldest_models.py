"""What the models in `tests/oldest` were made of, and with.

They are the oldest that every later version has to load: two checkpoints (moments, samples)
and two model files (exact, half), each with thresholds. `expected.json` holds the scores and
thresholds that they had. They are never made again; this is how they were made, by padim_jax
0.1.0 of commit 5117158 with JAX 0.12.0, Orbax 0.12.8 and NumPy 2.5.5:

    PYTHONPATH=. python tests/oldest_models.py tests/oldest

Nothing here depends on a library's random numbers or file formats: weights and images are
made by integer arithmetic and written byte by byte.
"""

import hashlib
import importlib
import json
import pathlib
import struct
import sys
import tempfile
from typing import Any, cast

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "oldest"
FORMS = ("moments", "samples")
FILES = ("exact", "half")
FITTED, TEST = 6, 3
SIDE = 32


def integers(count: int, seed: int) -> np.ndarray:
    """Return `count` numbers of 32 bits, scattered by multiplication (Knuth's constant)."""
    x = (np.arange(count, dtype=np.uint64) + np.uint64(seed * 7919)) * np.uint64(2654435761)
    x = x % np.uint64(2**32)
    return ((x ^ (x >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(2**32)).astype(
        np.uint32
    )


def tensors() -> dict[str, np.ndarray]:
    """Return weights of ResNet-18's first two stages, batch norm folded."""
    shapes: dict[str, tuple[int, ...]] = {"conv1": (64, 3, 7, 7)}
    for layer, inputs, outputs in (("layer1", 64, 64), ("layer2", 64, 128)):
        for block in (0, 1):
            first = inputs if block == 0 else outputs
            shapes[f"{layer}.{block}.conv1"] = (outputs, first, 3, 3)
            shapes[f"{layer}.{block}.conv2"] = (outputs, outputs, 3, 3)
    shapes["layer2.0.downsample.0"] = (128, 64, 1, 1)
    found: dict[str, np.ndarray] = {}
    for seed, (name, shape) in enumerate(sorted(shapes.items())):
        numbers = integers(int(np.prod(shape)), seed) >> np.uint32(24)
        # A power of two near the square root of 6 / inputs (He et al. 2015, a uniform one's).
        scale = 2.0 ** round(np.log2((6 / np.prod(shape[1:])) ** 0.5))
        weight = (numbers.astype(np.float32) - 127.5) / 128 * np.float32(scale)
        found[f"{name}.weight"] = weight.reshape(shape)
        found[f"{name}.bias"] = np.zeros(shape[0], np.float32)
    return found


def write_weights(path: pathlib.Path) -> pathlib.Path:
    """Write them as .safetensors, always the same bytes."""
    header, data = {}, b""
    for name, array in sorted(tensors().items()):
        content = array.astype("<f4").tobytes()
        ends = [len(data), len(data) + len(content)]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": ends}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def image(number: int, defect: bool = False) -> np.ndarray:
    """Return one of many similar images, uint8 (h, w, 3)."""
    y, x = np.mgrid[:SIDE, :SIDE]
    base = 64 + 4 * np.minimum(x, SIDE - x)[..., None] + np.array([0, 8, 16]) + y[..., None]
    noise = (integers(base.size, 100 + number) >> np.uint32(27)).reshape(base.shape)
    found = base + noise
    if defect:
        found[12:18, 8:16] = 255 - found[12:18, 8:16]
    return found.astype(np.uint8)


def write_image(path: pathlib.Path, pixels: np.ndarray) -> None:
    """Write a .bmp of 24 bits, always the same bytes."""
    height, width, _ = pixels.shape  # rows of a multiple of 4 bytes, the lowest first
    data = pixels[::-1, :, ::-1].tobytes()
    header = struct.pack("<2sIHHI", b"BM", 54 + len(data), 0, 0, 54)
    header += struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, len(data), 0, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + data)


def write_dataset(root: pathlib.Path) -> pathlib.Path:
    """Write the category `part` in MVTec AD's layout."""
    for i in range(FITTED):
        write_image(root / f"part/train/good/{i}.bmp", image(i))
    for i in range(TEST):
        write_image(root / f"part/test/good/{i}.bmp", image(50 + i))
        write_image(root / f"part/test/bad/{i}.bmp", image(80 + i, defect=True))
        mask = np.zeros((SIDE, SIDE, 3), np.uint8)
        mask[12:18, 8:16] = 255
        write_image(root / f"part/ground_truth/bad/{i}_mask.bmp", mask)
    return root


def tested() -> list[np.ndarray]:
    """Return the images that `expected.json` has scores of."""
    return [image(50 + i) for i in range(TEST)] + [image(80 + i, True) for i in range(TEST)]


def settings(values: Any, root: pathlib.Path, weights: pathlib.Path, form: str) -> Any:
    """Return the configuration of the models, made of that version's defaults."""
    values.update_from_flattened_dict(
        {
            "category": "part",
            "dataset.root": str(root),
            "image.resize": (SIDE, SIDE),
            "model.weights": str(weights),
            "model.layers": ("layer1", "layer2"),
            "model.channels": 6,
            "model.precision": "float32",
            "model.statistics": form,
            "map.sigma": 1.0,
            "batch_size": 4,
            "threshold.normal": "leave_one_out",
            "threshold.image_rate": 0.2,
            "cache.images_gb": 0.0,
            "cache.compilation": False,
        }
    )
    return values


def main(folder: pathlib.Path) -> None:
    """Make the models."""
    modules = [  # where that version has them
        importlib.import_module(f"padim_jax.{name}")
        for name in ("config", "defaults", "detector", "experiment")
    ]
    config, defaults, detector, experiment = cast(list[Any], modules)

    work = pathlib.Path(tempfile.mkdtemp())
    root, weights = write_dataset(work / "data"), write_weights(work / "weights.safetensors")
    expected: dict[str, Any] = {
        "weights": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "images": hashlib.sha256(np.stack(tested()).tobytes()).hexdigest(),
    }
    plain = defaults.get_config
    dataset = experiment.open_dataset(config.validate(settings(plain(), root, weights, "auto")))
    for form in FORMS:
        wanted = config.validate(settings(plain(), root, weights, form))
        experiment.train(wanted, dataset, folder / form)
    model = experiment.load(folder / "samples")
    for kind in FILES:
        path = folder / f"{kind}.safetensors"
        experiment.export(model, path, kind == "half", dataset["test"])
    for name in (*FORMS, *(f"{kind}.safetensors" for kind in FILES)):
        model = experiment.load(folder / name)
        assert model.calibration is not None
        expected[name] = {
            "scores": detector.score(model, tested()).scores.tolist(),
            "image_threshold": model.calibration.image_threshold,
            "pixel_threshold": model.calibration.pixel_threshold,
            "fingerprint": detector.fingerprint(model),
        }
    text = json.dumps(expected, indent=1) + "\n"
    (folder / "expected.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
