"""The ResNets against torchvision's numbers, and against a reference in NumPy."""

import json
import pathlib
import runpy
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from padim_jax.config import backbones
from padim_jax.config.backbones import RESNETS
from padim_jax.models.resnet import ResNet
from padim_jax.models.weights import folding, pretrained

STAGES = ("layer1", "layer2", "layer3")


def features(tensors, backbone, stages, images, precision: backbones.Precision = "float32"):
    """Feature maps of NHWC images with the given tensors (torchvision's names)."""
    variables = folding.convert(tensors, backbone, stages, "test")
    model = ResNet(RESNETS[backbone], stages, precision)
    return jax.jit(model.apply)(variables, jnp.asarray(images, jnp.float32))


def relative_error(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def golden(shared):
    """torchvision's shapes and outputs, and the stand-in weights' generator."""
    folder = shared / "golden"
    shapes = json.loads((folder / "torchvision_shapes.json").read_text())
    array = runpy.run_path(str(folder / "torch_weights.py"))["array"]
    return shapes, np.load(folder / "backbones.npz"), array


@pytest.mark.sampled(2)
@pytest.mark.parametrize("backbone", RESNETS)
def test_equals_torchvision(golden, backbone):
    shapes, outputs, array = golden
    tensors = {
        name: array(name, tuple(shape))
        for name, shape in shapes[backbone].items()
        if not name.startswith(("layer4", "fc"))
    }
    variables = folding.convert(tensors, backbone, STAGES, "test")
    images = jnp.asarray(outputs["input"].transpose(0, 2, 3, 1), jnp.float32)
    # Layer by layer: blocks are alike, so that this compiles less than the whole network.
    found: Any = ResNet(RESNETS[backbone], STAGES, "float32").apply(variables, images)
    for stage, map_ in zip(STAGES, found, strict=True):
        expected = outputs[f"{backbone}/{stage}"].transpose(0, 2, 3, 1)
        # Measured: at most 1e-6 on all seven; another summation order on another CPU
        # may give some times that.
        assert relative_error(map_, expected) < 2e-5, stage


def conv(x, weight, stride, padding):
    """torch.nn.functional.conv2d in float64: x (c, h, w), weight OIHW."""
    size = weight.shape[-1]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(1, 2))
    return np.einsum("cijhw,ochw->oij", windows[:, ::stride, ::stride], weight)


def reference(tensors, x):
    """layer1 and layer2 of an unfolded ResNet, from torchvision's definition; x (c, h, w)."""

    def conv_norm(x, name, norm, stride=1):
        weight, gamma, beta, mean, variance = (
            tensors[f"{tensor}"].astype(np.float64)
            for tensor in (
                f"{name}.weight",
                *(
                    f"{norm}.{part}"
                    for part in ("weight", "bias", "running_mean", "running_var")
                ),
            )
        )
        x = conv(x, weight, stride, weight.shape[-1] // 2)
        x = (x - mean[:, None, None]) / np.sqrt(variance[:, None, None] + 1e-5)
        return gamma[:, None, None] * x + beta[:, None, None]

    x = np.maximum(conv_norm(x, "conv1", "bn1", 2), 0)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    x = windows[:, ::2, ::2].max((-2, -1))
    maps = []
    for stage in ("layer1", "layer2"):
        block = 0
        while f"{stage}.{block}.conv1.weight" in tensors:
            prefix = f"{stage}.{block}"
            convs = 3 if f"{prefix}.conv3.weight" in tensors else 2
            stride = 2 if stage == "layer2" and block == 0 else 1
            y = x
            for i in range(1, convs + 1):
                y = conv_norm(
                    np.maximum(y, 0) if i > 1 else y,
                    f"{prefix}.conv{i}",
                    f"{prefix}.bn{i}",
                    stride if i == convs - 1 else 1,
                )
            if f"{prefix}.downsample.0.weight" in tensors:
                x = conv_norm(x, f"{prefix}.downsample.0", f"{prefix}.downsample.1", stride)
            x = np.maximum(x + y, 0)
            block += 1
        maps.append(x)
    return maps


def unfolded_tensors(backbone, seed):
    """Random tensors of a ResNet up to layer2, under torchvision's names and in its shapes."""
    rng = np.random.default_rng(seed)
    spec = RESNETS[backbone]
    tensors = {}

    def add(name, norm, shape):
        tensors[f"{name}.weight"] = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        tensors[f"{norm}.weight"] = rng.uniform(0.2, 0.6, shape[0])
        tensors[f"{norm}.bias"] = rng.normal(0, 0.1, shape[0])
        tensors[f"{norm}.running_mean"] = rng.normal(0, 0.1, shape[0])
        tensors[f"{norm}.running_var"] = rng.uniform(0.5, 1.5, shape[0])

    add("conv1", "bn1", (64, 3, 7, 7))
    channels = 64
    for stage, width in enumerate((64, 128)):
        for block in range(spec.depths[stage]):
            prefix = f"layer{stage + 1}.{block}"
            if spec.block == "basic":
                shapes = [(width, channels, 3, 3), (width, width, 3, 3)]
            else:
                inner = width * spec.width // 64
                shapes = [
                    (inner, channels, 1, 1),
                    (inner, inner, 3, 3),
                    (4 * width, inner, 1, 1),
                ]
            for i, shape in enumerate(shapes, start=1):
                add(f"{prefix}.conv{i}", f"{prefix}.bn{i}", shape)
            if channels != shapes[-1][0]:
                shape = (shapes[-1][0], channels, 1, 1)
                add(f"{prefix}.downsample.0", f"{prefix}.downsample.1", shape)
                channels = shapes[-1][0]
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


@pytest.mark.parametrize("backbone", ["resnet18", "wide_resnet50_2"])
def test_equals_an_unfolded_reference_at_odd_sizes(backbone):
    tensors = unfolded_tensors(backbone, seed=1)
    images = np.random.default_rng(2).normal(size=(2, 35, 46, 3))
    found = features(tensors, backbone, ("layer1", "layer2"), images)
    for i, image in enumerate(images.astype(np.float32).astype(np.float64)):
        for map_, expected in zip(
            found, reference(tensors, image.transpose(2, 0, 1)), strict=True
        ):
            # Float32 sums of up to 4608 products against float64; measured 5e-7.
            assert relative_error(map_[i].transpose(2, 0, 1), expected) < 2e-5


def test_real_weights_give_the_features_of_the_pytorch_padim(shared):
    golden = np.load(shared / "golden" / "bottle_resnet18_nearest256_crop224.npz")
    path = shared / "data" / "mvtec_ad" / "bottle" / "test" / "good" / "000.png"
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize((256, 256), Image.Resampling.NEAREST))
    pixels = pixels[16:240, 16:240] / np.float32(255)
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    std = np.array([0.229, 0.224, 0.225], np.float32)
    variables, _ = pretrained.load(
        str(shared / "weights" / "resnet18.tv_in1k.folded.npz"), "resnet18", STAGES
    )
    model = ResNet(RESNETS["resnet18"], STAGES, "float32")
    maps = jax.jit(model.apply)(variables, (pixels - mean)[None] / std)
    # layer2 and layer3 nearest-upsampled to layer1's 56x56 grid.
    grid = [
        np.asarray(m)[0].repeat(56 // m.shape[1], 0).repeat(56 // m.shape[2], 1) for m in maps
    ]
    embedding = np.concatenate(grid, -1).reshape(56 * 56, 448)[:, golden["channel_index"]]
    # Measured 1.5e-6.
    assert relative_error(embedding, golden["embedding_000"]) < 2e-5


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((67, 93), [(17, 24), (9, 12), (5, 6), (3, 3)]),
        ((224, 256), [(56, 64), (28, 32), (14, 16), (7, 8)]),
        ((33, 32), [(9, 8), (5, 4), (3, 2), (2, 1)]),
    ],
)
def test_shapes_are_torchvisions(backbone, size, expected):
    spec = RESNETS[backbone]
    model = ResNet(spec, spec.stages, "float32")
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    found, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    channels = [spec.channels(stage) for stage in spec.stages]
    assert channels == (
        [64, 128, 256, 512] if backbone == "resnet18" else [256, 512, 1024, 2048]
    )
    assert [map_.shape for map_ in found] == [
        (2, *cells, c) for cells, c in zip(expected, channels, strict=True)
    ]


def test_stages_come_in_the_order_asked_for_and_nothing_lies_behind_the_cut():
    tensors = unfolded_tensors("resnet18", seed=3)
    images = np.random.default_rng(4).normal(size=(1, 32, 32, 3))
    layer1, layer2 = features(tensors, "resnet18", ("layer1", "layer2"), images)
    swapped = features(tensors, "resnet18", ("layer2", "layer1"), images)
    np.testing.assert_array_equal(swapped[0], layer2)
    np.testing.assert_array_equal(swapped[1], layer1)

    variables = folding.convert(
        {k: v for k, v in tensors.items() if "layer2" not in k}, "resnet18", ("layer1",), "test"
    )
    assert sorted(variables["params"]) == ["conv1", "layer1_0", "layer1_1"]
    # Flax would refuse to apply if it wanted any more parameters than these.
    model = ResNet(RESNETS["resnet18"], ("layer1",), "float32")
    alone = model.apply(variables, jnp.asarray(images, jnp.float32))[0]
    np.testing.assert_allclose(alone, layer1, rtol=1e-5, atol=1e-5)


def convolutions(precision: backbones.Precision):
    """The convolutions that are traced, as JAX's equations."""
    model = ResNet(RESNETS["resnet18"], ("layer1",), precision)
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    jaxpr = jax.make_jaxpr(model.apply)(variables, images)
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "conv_general_dilated"]
    assert len(found) == 5
    return found


def dtypes(equation):
    return {variable.aval.dtype for variable in equation.invars}


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("float32", jax.lax.Precision.HIGHEST), ("tf32", jax.lax.Precision.DEFAULT)],
)
def test_precision_is_written_into_every_convolution(precision, expected):
    # Whatever the caller has set for the rest of the program.
    with jax.default_matmul_precision("bfloat16"):
        for eqn in convolutions(precision):
            assert eqn.params["precision"] == (expected, expected)
            assert dtypes(eqn) == {jnp.dtype("float32")}


def test_bfloat16_computes_in_bfloat16_and_returns_float32():
    for eqn in convolutions("bfloat16"):
        assert dtypes(eqn) == {jnp.dtype("bfloat16")}
    tensors = unfolded_tensors("resnet18", seed=5)
    images = np.random.default_rng(6).normal(size=(1, 64, 64, 3))
    full = features(tensors, "resnet18", ("layer1", "layer2"), images)
    half = features(tensors, "resnet18", ("layer1", "layer2"), images, "bfloat16")
    for expected, found in zip(full, half, strict=True):
        assert found.dtype == jnp.float32
        # Eight bits of mantissa, 2^-9 a rounding, some ten roundings deep; measured 0.7 %.
        assert 1e-4 < relative_error(found, np.asarray(expected)) < 0.03


def test_the_list_of_backbones_is_light():
    # Config validation imports it, which must not cost the seconds that JAX does.
    code = "import sys, padim_jax.config.backbones as b; sys.exit('jax' in sys.modules)"
    root = pathlib.Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
