"""EfficientNet-B5 against torchvision's numbers; its weight files; its embedding."""

import json
import pathlib
import re
import runpy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from padim_jax.config import backbones, defaults
from padim_jax.config.settings import validate
from padim_jax.core import embedding, gaussian, scoring
from padim_jax.detector import geometry
from padim_jax.errors import UserError
from padim_jax.models import network
from padim_jax.models.efficientnet import Depthwise
from padim_jax.models.weights import folding, naming, pretrained

B5 = "efficientnet_b5"
SPEC = backbones.EFFICIENTNETS[B5]
STAGES = SPEC.stages
CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "efficientnet_b5.py"


IMAGES = np.random.default_rng(2).normal(size=(1, 128, 128, 3))  # the goldens' size


def relative_error(found, expected):
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def features(variables, stages, images, precision: backbones.Precision = "float32") -> Any:
    # Layer by layer: blocks are alike, so that this compiles less than the whole network.
    model = network.build(B5, stages, precision)
    return model.apply(variables, jnp.asarray(images, jnp.float32))


def test_equals_torchvision(shared):
    folder = shared / "golden"
    shapes = json.loads((folder / "torchvision_shapes.json").read_text())[B5]
    array = runpy.run_path(str(folder / "torch_weights.py"))["array"]
    # The whole file; what lies behind the cut, with head and classifier, is not looked at.
    behind = ("features.6", "features.7", "features.8", "classifier")
    tensors = {
        name: np.zeros(0) if name.startswith(behind) else array(name, tuple(shape))
        for name, shape in shapes.items()
    }
    outputs = np.load(folder / "backbones.npz")
    variables = folding.convert(tensors, B5, STAGES, "test")
    found = features(variables, STAGES, outputs["input"].transpose(0, 2, 3, 1))
    for stage, map_ in zip(STAGES, found, strict=True):
        # Measured: 2.4e-7.
        expected = outputs[f"{B5}/{stage}"].transpose(0, 2, 3, 1)
        assert relative_error(map_, expected) < 2e-5, stage


@pytest.mark.parametrize(
    ("kernel", "stride", "size"),
    [(3, 1, (7, 10)), (5, 1, (2, 1)), (3, 2, (8, 7)), (5, 2, (8, 7))],
)
def test_depthwise_convolution(kernel, stride, size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 6)).astype(np.float32)
    weight = rng.normal(size=(kernel, kernel, 1, 6)).astype(np.float32)
    bias = rng.normal(size=6).astype(np.float32)
    depthwise = jax.jit(Depthwise(kernel, stride, jnp.float32).apply)
    found = depthwise({"params": {"kernel": weight, "bias": bias}}, x)
    pad = (kernel // 2, kernel // 2)
    expected = lax.conv_general_dilated(
        jnp.asarray(x),
        jnp.asarray(weight),
        (stride, stride),
        (pad, pad),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=6,
    )
    # Sums of 25 float32 products in another order.
    np.testing.assert_allclose(found, expected + bias[None, None, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(67, 93)])
def test_shapes(size):
    model = network.build(B5, STAGES, "float32")
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    found: Any = jax.eval_shape(model.init_with_output, jax.random.key(0), images)[0]
    for stage, channels, map_ in zip(STAGES, (40, 176, 176), found, strict=True):
        stride = backbones.STRIDES[stage]
        assert SPEC.channels(stage) == channels
        assert map_.shape == (2, -(-size[0] // stride), -(-size[1] // stride), channels)


@pytest.fixture(scope="module")
def unfolded():
    """The first three groups as torchvision saves them: up to block 12."""
    rng = np.random.default_rng(1)
    (origin, _) = naming.namings(B5)
    tensors = {}
    for layer in naming.convolutions(B5, origin):
        if layer.path[0] == "stem" or SPEC.parts.index(layer.path[0]) <= 12:
            for name, shape in layer.tensors(folded=False).items():
                if name == f"{layer.name}.weight":
                    value = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
                elif name.endswith(("weight", "running_var")):
                    value = rng.uniform(0.5, 1.5, shape)
                else:
                    value = rng.normal(0, 0.1, shape)
                tensors[name] = value.astype(np.float32)
            if layer.norm:
                tensors[f"{layer.norm}.num_batches_tracked"] = np.array(7)
    return tensors


def fold(tensors, epsilon):
    """Batch norm folded by another computation than the code's."""
    folded = {}
    for name, value in tensors.items():
        if name.endswith(".0.weight") and value.ndim == 4:
            norm = re.sub(r"0\.weight$", "1", name)
            gamma, beta, mean, variance = (
                tensors[f"{norm}.{part}"].astype(np.float64)
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            scale = np.diag(gamma) @ np.diag((variance + epsilon) ** -0.5)
            folded[name] = np.tensordot(scale, value.astype(np.float64), 1).astype(np.float32)
            folded[name[:-6] + "bias"] = (beta - scale @ mean).astype(np.float32)
        elif ".fc" in name:
            folded[name] = value
    return folded


def timm(name):
    """timm's name of a tensor, from torchvision's."""
    name = name.replace("features.0.0.", "conv_stem.").replace("features.0.1.", "bn1.")
    found = re.fullmatch(r"features\.(\d)\.(\d)\.block\.(\d)\.(\w+)\.(.*)", name)
    if not found:
        return name
    group, block, layer, part, rest = found.groups()
    prefix = f"blocks.{int(group) - 1}.{block}"
    if part.startswith("fc"):
        return f"{prefix}.se.{ {'fc1': 'conv_reduce', 'fc2': 'conv_expand'}[part] }.{rest}"
    # Without expansion the first of four is missing.
    layers = {"0": "conv_pw", "1": "conv_dw", "3": "conv_pwl"}
    if group == "1":
        layers = {"0": "conv_dw", "2": "conv_pw"}
    if part == "0":
        return f"{prefix}.{layers[layer]}.{rest}"
    return f"{prefix}.bn{list(layers).index(layer) + 1}.{rest}"


def assert_same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-9), a, b)


def refusal(tensors, stages=("block7",)):
    with pytest.raises(UserError) as caught:
        folding.convert(tensors, B5, stages, "weights file w.npz")
    return str(caught.value)


def test_folded_and_unfolded_files_give_the_same_variables(unfolded):
    folded = fold(unfolded, 1e-3)
    # Squeeze and excitation have biases and no batch norm in either.
    assert sum(".fc" in name for name in folded) == 13 * 4
    assert_same(
        folding.convert(unfolded, B5, ("block7",), "test"),
        folding.convert(folded, B5, ("block7",), "test"),
    )


def test_timms_names_are_read_with_timms_epsilon(unfolded):
    folded = fold(unfolded, 1e-5)
    expected = folding.convert(folded, B5, ("block7",), "test")
    head = {
        "conv_head.weight": np.zeros((2048, 512, 1, 1)),
        "bn2.weight": np.zeros(2048),
        "bn2.num_batches_tracked": np.array(7),
        "classifier.weight": np.zeros((1000, 2048)),
        "classifier.bias": np.zeros(1000),
    }
    renamed = {timm(name): value for name, value in unfolded.items()}
    assert "blocks.0.0.conv_pw.weight" in renamed
    assert "blocks.1.4.bn3.running_var" in renamed
    assert_same(folding.convert(renamed | head, B5, ("block7",), "test"), expected)
    renamed = {timm(name): value for name, value in folded.items()}
    assert_same(folding.convert(renamed, B5, ("block7",), "test"), expected)
    message = refusal(renamed | {"conv_stem.weight": np.zeros((48, 3, 3), np.float32)})
    assert "by timm's names" in message
    assert "conv_stem.weight has shape (48, 3, 3), not (48, 3, 3, 3)" in message


def test_every_fault_of_a_file_is_named(unfolded):
    tensors = dict(unfolded)
    del tensors["features.2.4.block.3.1.running_var"]
    del tensors["features.1.0.block.1.fc2.bias"]
    tensors["features.2.5.block.0.0.weight"] = tensors["features.2.4.block.0.0.weight"]
    tensors["features.2.0.block.0.0.bias"] = np.zeros(144, np.float32)
    tensors["features.1.0.block.0.0.weight"] = np.zeros((48, 48, 3, 3), np.float32)
    message = refusal(tensors)
    assert "weights file w.npz does not hold what efficientnet_b5 needs up to block7" in message
    missing = "features.1.0.block.1.fc2.bias; features.2.4.block.3.1.running_var"
    assert f"missing: {missing}\n" in message
    assert "unexpected: features.2.5.block.0.0.weight\n" in message
    assert "set twice, by batch norm too: features.2.0.block.0.0.bias\n" in message
    assert "block.0.0.weight has shape (48, 48, 3, 3), not (48, 1, 3, 3)" in message
    assert "torchvision's or timm's names" in message
    assert "missing: features.4.0" in refusal(unfolded, STAGES)


def test_a_resnets_file_is_refused():
    tensors = {"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)}
    message = refusal(tensors)
    assert "missing: features.1.0.block.0.0.weight" in message
    assert "unexpected: conv1.weight" in message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("efficientnet_b5.tv_in1k", "did you mean 'efficientnet_b5.sw_in12k_ft_in1k'?"),
        # TensorFlow's padding: another network under the same names.
        ("tf_efficientnet_b5.ns_jft_in1k", "no such weights"),
    ],
)
def test_weights_that_are_not_there(name, said):
    with pytest.raises(UserError, match=re.escape(said)):
        pretrained.load(name, B5, STAGES)


def test_nothing_lies_behind_the_cut_and_stages_come_in_the_order_asked_for(unfolded):
    behind = ("features.2.3", "features.2.4", "features.3")
    shallow = {k: v for k, v in unfolded.items() if not k.startswith(behind)}
    variables = folding.convert(shallow, B5, ("block5",), "test")
    names = ["stem", *(f"block{i}" for i in range(6))]
    assert sorted(variables["params"]) == sorted(names)
    # Flax would refuse to apply if it wanted any more parameters than these.
    (alone,) = features(variables, ("block5",), IMAGES)
    deeper = folding.convert(unfolded, B5, ("block9", "block5"), "test")
    block9, block5 = features(deeper, ("block9", "block5"), IMAGES)
    np.testing.assert_allclose(alone, block5, rtol=1e-5, atol=1e-5)
    assert block9.shape == (1, 16, 16, 64)


def test_bfloat16_computes_in_bfloat16_and_returns_float32(unfolded):
    variables = folding.convert(unfolded, B5, ("block3",), "test")
    model = network.build(B5, ("block3",), "bfloat16")
    traced = jax.make_jaxpr(model.apply)(variables, jnp.asarray(IMAGES, jnp.float32))
    found: Any = [eqn for eqn in traced.eqns if eqn.primitive.name == "conv_general_dilated"]
    assert len(found) == 1 + 3 * 3 + 4
    assert {v.aval.dtype for eqn in found for v in eqn.invars} == {jnp.dtype("bfloat16")}
    (full,) = features(variables, ("block3",), IMAGES)
    (half,) = features(variables, ("block3",), IMAGES, "bfloat16")
    assert half.dtype == jnp.float32
    # Eight bits of mantissa, 2^-9 a rounding, some ten roundings deep; measured 0.5 %.
    assert 1e-4 < relative_error(half, np.asarray(full)) < 0.03


def test_random_weights_keep_the_scale():
    variables, _ = pretrained.load("random", B5, STAGES)
    maps = features(variables, SPEC.parts[:27], IMAGES)
    for name, map_ in zip(SPEC.parts, maps, strict=False):
        # Measured 0.8 to 2.3.
        assert 0.3 < np.asarray(map_).std() < 5, name


def test_embedding_and_distances_where_two_stages_share_a_grid():
    """Of features as seven images of 64 x 96 pixels have them."""
    values: Any = defaults.get_config()
    values.model.backbone, values.model.layers, values.model.weights = B5, STAGES, "random"
    values.model.channels, values.image.resize = 30, (64, 96)
    config, rng = validate(values), np.random.default_rng(4)
    grids = ((16, 24, 40), (4, 6, 176), (4, 6, 176))
    maps = [rng.normal(size=(7, *grid)).astype(np.float32) for grid in grids]
    index = geometry.channel_index(config.model)
    pyramid = geometry.pyramid(config.image, config.model, tuple(index.tolist()))
    assert [shape[:2] for shape in pyramid.shapes] == [(24, 16), (24, 1), (24, 1)]

    @jax.jit
    def run(maps):
        levels = embedding.select(maps, pyramid)
        moments = gaussian.update(gaussian.init(pyramid.shapes), levels, jnp.ones(7, bool))
        gaussians, *_ = gaussian.finalize(moments, jnp.float32(0.01))
        by_region = scoring.mahalanobis(gaussians, levels)
        return (
            embedding.concatenate(levels, pyramid),
            scoring.on_grid(by_region, pyramid.patches),
        )

    block7, block20, block26 = maps
    found, distances = run((block7, block20, block26))
    coarse = (np.asarray(x).repeat(4, 1).repeat(4, 2) for x in (block20, block26))
    expected = np.concatenate([block7, *coarse], -1).reshape(7, 16 * 24, 392)[..., index]
    np.testing.assert_array_equal(found, expected)

    values = expected.astype(np.float64)
    deviations = values - values.mean(0)
    covariances = np.einsum("bpd,bpe->pde", deviations, deviations) / 6 + 0.01 * np.eye(30)
    solved = np.linalg.solve(covariances, deviations.transpose(1, 2, 0))
    reference = np.sqrt(np.einsum("bpd,pdb->bp", deviations, solved))
    # Condition numbers up to 1e4 in float32; measured 2e-5.
    np.testing.assert_allclose(distances, reference, rtol=1e-3)


@pytest.mark.parametrize(
    "layers",
    [("layer1", "layer2", "layer3"), ("block20", "block7"), ("block7", "block7"), ("block8",)],
)
def test_layers_of_another_backbone_are_refused(layers):
    values: Any = defaults.get_config()
    values.model.backbone, values.model.layers = B5, layers
    with pytest.raises(UserError, match=r"config\.model\.layers=.* block7, block20, block26"):
        validate(values)


def test_the_configuration_file():
    values = runpy.run_path(str(CONFIG))["get_config"]()
    config = validate(values)
    assert config.model.backbone == B5
    assert config.model.layers == STAGES
    assert config.model.weights in backbones.WEIGHTS[B5]
