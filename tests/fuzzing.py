"""What must hold of any file and any setting, and how to make very many of them.

`test_fuzz` tries a few of them, the same ones each time; `reliability/test_fuzz_long` many.
Outcome is a UserError, or what was there before, or something whole: never another exception
(a traceback), never a number that is not finite.
"""

import copy
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import shutil
import struct
import tempfile
from collections.abc import Callable
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from padim_jax.config import defaults
from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config
from padim_jax.core import calibration, gaussian, low_rank
from padim_jax.detector import detector, geometry
from padim_jax.detector import statistics as statistics_lib
from padim_jax.detector.detector import Detector
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.models.weights import pretrained
from padim_jax.store import (
    calibration_file,
    checkpoint,
    model_file,
    statistics_store,
    validation,
)
from padim_jax.store.checkpoint import Fitted
from padim_jax.store.model_file import Model

set_hypothesis_home_dir(os.path.join(os.environ["XDG_CACHE_HOME"], "hypothesis"))  # noqa: PTH118
ONE = Devices(1)
FORMS = ("moments", "samples")


def examples(count: int) -> hypothesis.settings:
    """So many; the same in every run, but with PADIM_JAX_NEW_EXAMPLES=1 others."""
    same = "PADIM_JAX_NEW_EXAMPLES" not in os.environ
    return hypothesis.settings(
        max_examples=count,
        derandomize=same,
        database=None,
        deadline=None,
        suppress_health_check=list[Any](hypothesis.HealthCheck),
        print_blob=not same,
    )


NUMBERS = (
    st.integers()
    | st.sampled_from([10**400, -(10**400), 2**31, 2**63, 10**9, -1, 0, 1])
    | st.floats()
    | st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 1e-320, -0.0])
)
TEXTS = (
    st.text(max_size=20)
    | st.sampled_from(["", "\0", "..", "a\0b", "../../etc", "\ud800", "x" * 5000, "~nobody/x"])
    | st.sampled_from(["all", "a,b", ",", "resnet18", "s3://", "gs://b/c", "ftp://x", "\n"])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(TEXTS, inner, max_size=3)
    ),
    max_leaves=8,
)
# What comes of a file.
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def require_said(error: UserError, part: str = "", lines: int = 20) -> None:
    """An error that a person can read."""
    assert part in str(error)
    assert len(str(error)) < 5000
    assert len(str(error).splitlines()) <= lines


def alter(tree: dict[str, Any], draw: st.DrawFn, values: st.SearchStrategy) -> None:
    """Replaces, takes away or adds something, at any depth."""
    group = tree
    while True:
        name = draw(st.sampled_from(sorted(group))) if group else ""
        if not isinstance(group.get(name), dict) or draw(st.integers(0, 4)) == 0:
            break
        group = group[name]
    kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if kind == "add" or name not in group:
        group[draw(TEXTS)] = draw(values)
    elif kind == "remove":
        del group[name]
    else:
        group[name] = draw(values)


# Configurations.


@st.composite
def settings(draw: st.DrawFn) -> Any:
    values = defaults.get_config(draw(st.sampled_from(list(defaults.PRESETS)))).to_dict()
    for _ in range(draw(st.integers(1, 3))):
        alter(values, draw, VALUES)
    return values


def check_settings(values: Any) -> None:
    """A valid configuration that JSON brings back, or one line."""
    try:
        config = config_lib.validate(values)
    except UserError as error:
        require_said(error, "config", lines=1)
        return
    assert isinstance(config, Config)
    kept = json.loads(json.dumps(config_lib.to_dict(config), allow_nan=False))
    assert config_lib.validate(kept) == config


# Bytes of a file.


class Content:
    """What a file holds, too long to be printed."""

    def __init__(self, data: bytes):
        self.data = data

    def __repr__(self) -> str:
        return f"{len(self.data)} bytes"


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    kind = draw(st.sampled_from(["flip", "flip", "cut", "add", "zero", "double", "other"]))
    # Where: beginnings, where headers are, more often than the rest.
    place = draw(st.floats(0, 1) | st.floats(0, 1e-3))
    bit, count = draw(st.integers(0, 7)), draw(st.integers(1, 64))
    extra = draw(st.binary(max_size=64))

    def damage(content: bytes) -> bytes:
        at = min(int(place * len(content)), max(len(content) - 1, 0))
        if kind == "flip" and content:
            return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
        if kind == "cut":
            return content[:at]
        if kind == "add":
            return content[:at] + extra + content[at:]
        if kind == "zero":
            return content[:at] + bytes(min(count, len(content) - at)) + content[at + count :]
        return content[:at] + content if kind == "double" else extra

    return damage


# Weights.

LAYERS = ("layer1",)


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    """ResNet-18 up to layer1, with batch norm, as torchvision saves it."""
    rng, found = np.random.default_rng(0), {}
    for name in ["conv1", *(f"layer1.{b}.conv{i}" for b in (0, 1) for i in (1, 2))]:
        shape = (64, 3, 7, 7) if name == "conv1" else (64, 64, 3, 3)
        norm = name.replace("conv", "bn")
        found[f"{name}.weight"] = rng.normal(0, 0.05, shape).astype(np.float32)
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{norm}.{part}"] = rng.uniform(0.2, 1.5, 64).astype(np.float32)
    return found


DTYPES = ("float16", "float32", "float64", "int8", "int64", "uint8", "bool")


@st.composite
def weights(draw: st.DrawFn) -> tuple[str, Content]:
    """A file's suffix and content."""
    found = dict(tensors())
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(found)))
        kind = draw(
            st.sampled_from(["drop", "rename", "type", "shape", "value", "transpose", "add"])
        )
        if kind == "drop":
            del found[name]
        elif kind == "rename":
            found[draw(st.text(max_size=10).filter(lambda x: "\0" not in x))] = found.pop(name)
        elif kind == "type":
            with np.errstate(all="ignore"):
                found[name] = found[name].astype(draw(st.sampled_from(DTYPES)))
        elif kind == "shape":
            shape = draw(st.lists(st.integers(0, 4), max_size=5))
            found[name] = np.zeros(shape, np.float32)
        elif kind == "value" and found[name].dtype.kind == "f":
            array = found[name].copy()
            odd = draw(st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -1.0, 0.0]))
            start = draw(st.integers(0, max(array.size - 1, 0)))
            with np.errstate(over="ignore"):  # in float16, infinity
                array.reshape(-1)[start:] = odd
            found[name] = array
        elif kind == "transpose":
            found[name] = np.asfortranarray(found[name])
        else:
            found[f"fc.{draw(st.text(max_size=5))}"] = np.zeros(3, np.float32)
    suffix = draw(st.sampled_from([".npz", ".npz compressed", ".safetensors", ".pth"]))
    return suffix.split()[0], Content(encoded(found, suffix))


def encoded(found: dict[str, np.ndarray], suffix: str) -> bytes:
    content = io.BytesIO()
    if suffix.startswith(".npz"):
        save = np.savez_compressed if "compressed" in suffix else np.savez
        # Names may not be those of the function's own arguments.
        named: Any = {x: y for x, y in found.items() if x not in ("file", "allow_pickle")}
        save(content, **named)
    elif suffix == ".safetensors":
        whole = {name: np.ascontiguousarray(x) for name, x in found.items()}
        return safetensors.numpy.save(whole)
    else:
        try:
            import torch  # pyright: ignore[reportMissingImports]
        except ImportError:
            return b""
        torch.save({name: torch.tensor(x) for name, x in found.items()}, content)
    return content.getvalue()


def check_weights(suffix: str, content: bytes) -> None:
    """All that the network needs, finite, and known by these very bytes; or a UserError."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, f"model{suffix}")
        path.write_bytes(content)
        try:
            variables, identity = pretrained.load(str(path), "resnet18", LAYERS)
        except UserError as error:
            require_said(error, str(path))
            return
        assert identity.sha256 == hashlib.sha256(content).hexdigest()
        leaves = jax.tree.leaves(variables)
        shapes = [leaf.shape for leaf in leaves]
        assert shapes == [leaf.shape for leaf in jax.tree.leaves(random_variables())]
        assert all(leaf.dtype == np.float32 and np.isfinite(leaf).all() for leaf in leaves)


@functools.cache
def random_variables() -> Any:
    return pretrained.load("random", "resnet18", LAYERS)[0]


# Models: as small as they can be, and whole, so that they score.

IMAGES = 4


@functools.cache
def config() -> Config:
    values = defaults.get_config()
    values.update_from_flattened_dict(
        {
            "dataset.root": "/nowhere",
            "image.resize": (32, 40),
            "model.weights": "random",
            "model.layers": LAYERS,
            "model.channels": 3,
            "map.sigma": 1.0,
        }
    )
    return config_lib.validate(values)


@functools.cache
def fitted(form: str) -> Fitted:
    """Fitted to random embeddings; statistics on one device."""
    index = geometry.channel_index(config().model)
    ((regions, cells, channels),) = geometry.pyramid(
        config().image, config().model, index.tolist()
    ).shapes
    rng = np.random.default_rng(0)
    levels = (jnp.asarray(rng.normal(size=(regions, cells, channels, IMAGES)), jnp.float32),)
    shapes, valid = [(regions, cells, channels)], jnp.ones(IMAGES, bool)
    if form == "moments":
        statistics: Any = gaussian.update(gaussian.init(shapes), levels, valid)
    else:
        statistics = low_rank.update(low_rank.init(shapes, IMAGES), levels, valid)
    digests = rng.integers(256, size=(IMAGES, 32), dtype=np.uint8)
    identity = pretrained.load("random", "resnet18", LAYERS)[1]
    return Fitted(config(), index, parallel.split(statistics, ONE), identity, regions, digests)


@functools.cache
def model(form: str) -> Model:
    whole = fitted(form)
    statistics = jax.tree.map(jnp.copy, whole.statistics)
    return Model(
        whole.config,
        whole.index,
        statistics_lib.finalize(statistics, 0.01),
        whole.weights,
        "0123456789abcdef" * 4,
        whole.images,
        calibration=calibration_file.to_dict(THRESHOLDS, "nobody's"),
    )


def scores(found: Model | Fitted, gaussians: Any) -> np.ndarray:
    """Of two images, which are always the same."""
    pixels = np.random.default_rng(1).integers(256, size=(2, *found.config.image.size, 3))
    ready = Detector(
        *(found.config, found.index, random_variables(), found.weights),
        *(gaussians, "", found.images),
    )
    return detector.score_pixels(ready, pixels.astype(np.uint8)).scores


# In a model's configuration what changes its shapes would have each compiled anew.
FIXED = ("image", "model", "map", "layers")


@functools.cache
def model_content(form: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.safetensors")
        model_file.save(path, model(form), fitted(form).regions)
        return path.read_bytes()


def parts(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A model file's description and arrays."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    return json.loads(header["__metadata__"]["padim_jax"]), safetensors.numpy.load(content)


@st.composite
def model_files(draw: st.DrawFn) -> tuple[str, Content]:
    """By somebody who knows how to make the checksum right."""
    form = draw(st.sampled_from(FORMS))
    described, arrays = copy.deepcopy(parts(model_content(form)))
    for _ in range(draw(st.integers(0, 2))):
        alter(described, draw, JSON)
    for _ in range(draw(st.integers(0, 2))):
        alter_array(arrays, draw)
    text = json.dumps(described)
    if isinstance(described, dict):
        described["sha256"] = validation.digest(json.loads(text), arrays)
        text = json.dumps(described)
    return form, Content(safetensors.numpy.save(arrays, {"padim_jax": text}))


def alter_array(arrays: dict[str, np.ndarray], draw: st.DrawFn) -> None:
    name = draw(st.sampled_from(sorted(arrays)))
    kind = draw(st.sampled_from(["drop", "type", "shape", "value", "index", "add", "cut"]))
    array = arrays[name].copy()
    if kind == "drop" and len(arrays) > 1:
        del arrays[name]
    elif kind == "type":
        with np.errstate(all="ignore"):
            arrays[name] = array.astype(draw(st.sampled_from(DTYPES)))
    elif kind == "shape":
        arrays[name] = np.zeros(draw(st.lists(st.integers(0, 3), max_size=5)), array.dtype)
    elif kind == "value" and array.dtype.kind == "f" and array.size:
        array.reshape(-1)[draw(st.integers(0, array.size - 1))] = draw(
            st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -1.0])
        )
        arrays[name] = array
    elif kind == "index":
        arrays["index"] = np.array(draw(st.lists(st.integers(-9, 99), max_size=4)), np.int64)
    elif kind == "add":
        arrays[draw(st.sampled_from(["mean_1", "factor_0_1", "x", "root", "../x"]))] = array
    elif array.ndim:
        arrays[name] = array[: draw(st.integers(0, len(array)))]


def check_model_file(form: str, content: bytes, damaged: bool = False) -> None:
    """Refused, or it scores; one that is only damaged scores as before."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.safetensors")
        path.write_bytes(content)
        try:
            found = model_file.load(path, ONE)
            statistics_store.require_whole(path, found, found.fitted)
            if (found.config.image, found.config.model) != (config().image, config().model):
                return
            scored = scores(found, found.fitted)
            if found.calibration is not None:
                calibration_file.restore(path, found.calibration, "a detector")
        except UserError as error:
            require_said(error)
            return
    assert np.isfinite(scored).all()
    if damaged:
        np.testing.assert_array_equal(scored, scores(model(form), model(form).fitted))


# Checkpoints.


@functools.cache
def checkpoint_folder(form: str) -> pathlib.Path:
    path = pathlib.Path(os.environ["XDG_CACHE_HOME"], f"checkpoint of {form}")
    checkpoint.save(path, fitted(form), ONE)
    return path


@functools.cache
def small_arrays(form: str) -> dict[str, np.ndarray]:
    step = checkpoint_folder(form) / "0"
    described = dict(checkpoint._describe(step).metadata)
    found = checkpoint._read(step, described, fitted(form).regions, ONE)
    return {x: np.atleast_1d(found[x]) for x in checkpoint._SMALL if x in found}


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[str, Callable[[pathlib.Path], None]]:
    """What is done to a whole one: to its bytes, or by somebody who knows the checksum."""
    form = draw(st.sampled_from(FORMS))
    step = checkpoint_folder(form) / "0"
    names = sorted(str(x.relative_to(step)) for x in step.rglob("*") if x.is_file())
    kind = draw(st.sampled_from(["bytes", "bytes", "remove", "metadata", "metadata", "deep"]))
    name, damage = draw(st.sampled_from(names)), draw(damages())
    described = json.loads((step / "_CHECKPOINT_METADATA").read_text())
    metadata = described["custom_metadata"]
    alter(metadata, draw, JSON)
    if draw(st.booleans()):
        small = small_arrays(form)
        metadata["sha256"] = validation.digest(json.loads(json.dumps(metadata)), small)

    def change(path: pathlib.Path) -> None:
        file = path / "0" / name
        if kind == "bytes":
            file.write_bytes(damage(file.read_bytes()))
        elif kind == "remove":
            file.unlink()
        else:
            text = json.dumps(described)
            if kind == "deep":
                text = text.replace('"custom_metadata": {', '"custom_metadata": ' + 9999 * "[")
            (path / "0" / "_CHECKPOINT_METADATA").write_text(text)

    return form, change


def check_checkpoint(form: str, change: Callable[[pathlib.Path], None]) -> None:
    """Refused by its name, or the very same scores."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "checkpoint")
        shutil.copytree(checkpoint_folder(form), path)
        change(path)
        try:
            found, _ = statistics_store.load_checkpoint(path, ONE)
            ready = statistics_store.ready(found, "", found.config, random_variables())
        except UserError as error:
            # What is found out when the Gaussians are made has no path.
            require_said(error, "not finite" if "finite" in str(error) else str(path))
            return
    if (found.config.image, found.config.model) == (config().image, config().model):
        np.testing.assert_array_equal(scores(found, ready.gaussian), expected_scores(form))


@functools.cache
def expected_scores(form: str) -> np.ndarray:
    return scores(model(form), model(form).fitted)


def prepare() -> None:
    """Makes what the strategies alter: inside of them no other draws may happen."""
    for form in FORMS:
        model_content(form)
        small_arrays(form)
        expected_scores(form)


# Calibrations.

THRESHOLDS = calibration.calibrate(
    [
        (np.full((1, 4, 4), value, np.float32), np.array([[value]], np.float32))
        for value in np.random.default_rng(0).gamma(4, size=30).astype(np.float32)
    ],
    30,
    "held_out",
    0.05,
    0.01,
)


@st.composite
def calibrations(draw: st.DrawFn) -> bytes:
    """Damaged, or by somebody who knows the checksum."""
    stored = calibration_file.to_dict(THRESHOLDS, "a detector")
    if draw(st.booleans()):
        return draw(damages())(json.dumps(stored).encode())
    for _ in range(draw(st.integers(1, 2))):
        alter(stored, draw, JSON)
    stored.pop("sha256", None)
    stored["sha256"] = validation.digest(json.loads(json.dumps(stored)))
    return json.dumps(stored).encode()


def check_calibration(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, calibration_file.NAME)
        path.write_bytes(content)
        try:
            found = calibration_file.read(pathlib.Path(folder), "a detector")
        except UserError as error:
            require_said(error, str(path))
            return
    if found is not None:
        assert calibration.text(found)
        levels = found.calibrated(np.array([-1e30, 0, 3, 1e30]))
        assert np.all((levels >= 0) & (levels < 1))
        assert np.all(np.diff(levels) >= 0)
