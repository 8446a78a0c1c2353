"""Weight files and names: what is read, and what is refused with which words."""

import hashlib
import pickle
import sys
import zipfile

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from padim_jax.errors import UserError
from padim_jax.models import BACKBONES, WEIGHTS, ResNetSpec, pretrained
from padim_jax.models.naming import Convolution

LAYER1 = ("layer1",)
NAMES = ["conv1", *(f"layer1.{block}.conv{i}" for block in (0, 1) for i in (1, 2))]


def norm_of(name):
    return name.replace("conv", "bn")


@pytest.fixture(scope="module")
def unfolded():
    """ResNet-18 up to layer1 as torchvision saves it; convolutions with their batch norm."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name in NAMES:
        shape = (64, 3, 7, 7) if name == "conv1" else (64, 64, 3, 3)
        tensors[f"{name}.weight"] = rng.normal(0, 0.05, shape).astype(np.float32)
        tensors[f"{norm_of(name)}.weight"] = rng.uniform(0.2, 0.6, 64).astype(np.float32)
        tensors[f"{norm_of(name)}.bias"] = rng.normal(0, 0.1, 64).astype(np.float32)
        tensors[f"{norm_of(name)}.running_mean"] = rng.normal(0, 0.1, 64).astype(np.float32)
        tensors[f"{norm_of(name)}.running_var"] = rng.uniform(0.5, 1.5, 64).astype(np.float32)
        tensors[f"{norm_of(name)}.num_batches_tracked"] = np.array(7)
    return tensors


@pytest.fixture(scope="module")
def folded(unfolded):
    """The same network with batch norm folded: another computation than the code's."""
    tensors = {}
    for name in NAMES:
        weight = unfolded[f"{name}.weight"].astype(np.float64)
        gamma, beta, mean, variance = (
            unfolded[f"{norm_of(name)}.{part}"].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = np.diag(gamma) @ np.diag((variance + 1e-5) ** -0.5)
        tensors[f"{name}.weight"] = np.tensordot(scale, weight, 1).astype(np.float32)
        tensors[f"{name}.bias"] = (beta - scale @ mean).astype(np.float32)
    return tensors


def save(path, tensors):
    if path.suffix == ".npz":
        np.savez(path, **tensors)
    else:
        safetensors.numpy.save_file(tensors, path)
    return str(path)


def load(path, backbone="resnet18", stages=LAYER1):
    return pretrained.load(str(path), backbone, stages)


def refusal(name_or_path, backbone="resnet18", stages=LAYER1):
    with pytest.raises(UserError) as info:
        pretrained.load(str(name_or_path), backbone, stages)
    return str(info.value)


def kernel(variables, *modules):
    params = variables["params"]
    for module in modules:
        params = params[module]
    return params["kernel"]


def assert_same(found, expected):
    assert found["params"].keys() == expected["params"].keys()
    for name in NAMES:
        # "layer1.0.conv2" -> params["layer1_0"]["conv2"]
        *block, convolution = name.rsplit(".", 1)
        modules = [block[0].replace(".", "_"), convolution] if block else [convolution]
        a, b = found["params"], expected["params"]
        for module in modules:
            a, b = a[module], b[module]
        for part in ("kernel", "bias"):
            # One rounding to float32 of nearly the same float64.
            np.testing.assert_allclose(a[part], b[part], rtol=2e-7, atol=1e-12)


def test_batch_norm_is_folded_into_the_convolution():
    # One output, one input, 1x1: by hand, 2 (3 x - 1) / sqrt(4) + 5 = 3 x + 4.
    one = np.ones(1, np.float32)
    tensors = {
        "conv1.weight": 3 * np.ones((1, 1, 1, 1), np.float32),
        "bn1.weight": 2 * one,
        "bn1.bias": 5 * one,
        "bn1.running_mean": one,
        "bn1.running_var": (4 - 1e-5) * one,
    }
    layer = Convolution(("conv1",), (1, 1, 1, 1), "conv1", "bn1")
    found = pretrained._fold(layer, tensors, epsilon=1e-5)
    np.testing.assert_allclose(found["conv1.weight"], 3, rtol=1e-6)
    np.testing.assert_allclose(found["conv1.bias"], 4, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_folded_and_unfolded_files_give_the_same_variables(tmp_path, unfolded, folded, suffix):
    a, a_identity = load(save(tmp_path / f"unfolded{suffix}", unfolded))
    b, b_identity = load(save(tmp_path / f"folded{suffix}", folded))
    assert_same(a, b)
    # OIHW -> HWIO.
    np.testing.assert_array_equal(
        b["params"]["layer1_1"]["conv2"]["kernel"][2, 0, 5, 7],
        folded["layer1.1.conv2.weight"][7, 5, 2, 0],
    )
    assert a_identity.origin == f"unfolded{suffix}"
    content = (tmp_path / f"folded{suffix}").read_bytes()
    assert b_identity.sha256 == hashlib.sha256(content).hexdigest()


def test_what_lies_behind_the_cut_is_left_out(tmp_path, unfolded):
    rest = {
        "layer2.0.conv1.weight": np.zeros((128, 64, 3, 3), np.float32),
        "layer2.0.downsample.1.running_var": np.zeros(128, np.float32),
        "layer4.1.bn2.num_batches_tracked": np.array(7),
        "fc.weight": np.zeros((1000, 512), np.float32),
        "fc.bias": np.zeros(1000, np.float32),
    }
    counters = {k: v for k, v in unfolded.items() if "num_batches" not in k}
    found, _ = load(save(tmp_path / "all.npz", unfolded | rest))
    oldest, _ = load(save(tmp_path / "without_counters.npz", counters))
    assert_same(found, oldest)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_other_float_types_are_read_exactly(tmp_path, folded, dtype):
    tensors = {name: np.asarray(tensor, dtype) for name, tensor in folded.items()}
    found, _ = load(save(tmp_path / "model.safetensors", tensors))
    for name, parameter in (("weight", "kernel"), ("bias", "bias")):
        value = found["params"]["conv1"][parameter]
        assert value.dtype == np.float32
        expected = tensors[f"conv1.{name}"].astype(np.float32)
        np.testing.assert_array_equal(
            value, expected.transpose(2, 3, 1, 0) if name == "weight" else expected
        )


def test_every_fault_of_a_file_is_named_at_once(tmp_path, unfolded):
    tensors = dict(unfolded)
    del tensors["layer1.0.bn2.running_mean"]
    tensors["module.conv1.weight"] = tensors["conv1.weight"]
    tensors["layer1.2.conv1.weight"] = tensors["layer1.0.conv1.weight"]
    tensors["layer1.0.conv1.bias"] = np.zeros(64, np.float32)
    tensors["conv1.weight"] = np.zeros((64, 3, 3, 3), np.float32)
    tensors["bn1.bias"] = np.zeros(64, np.int64)
    tensors["bn1.weight"] = np.array([np.nan, np.inf] + [1] * 62, np.float32)
    tensors["bn1.running_var"] = np.full(64, -1, np.float32)
    path = save(tmp_path / "bad.npz", tensors)
    message = refusal(path)
    assert path in message
    assert "resnet18" in message
    assert "missing: layer1.0.bn2.running_mean\n" in message
    assert "unexpected: module.conv1.weight; layer1.2.conv1.weight\n" in message
    assert "set twice, by batch norm too: layer1.0.conv1.bias\n" in message
    assert "conv1.weight has shape (64, 3, 3, 3), not (64, 3, 7, 7)" in message
    assert "bn1.bias is int64" in message
    assert "bn1.weight has 2 values that are not finite" in message
    assert "bn1.running_var has negative variances" in message


def test_a_file_of_another_backbone_is_refused(tmp_path, unfolded):
    path = save(tmp_path / "resnet18.npz", unfolded)
    message = refusal(path, "wide_resnet50_2", ResNetSpec.stages)
    assert "layer1.0.conv1.weight has shape (64, 64, 3, 3), not (128, 64, 1, 1)" in message
    assert "more" in message  # hundreds are missing
    assert len(message) < 2000
    # ResNet-34 holds all that ResNet-18 needs, in the same shapes, and one block more -
    # or, behind the cut, three.
    for name in ("layer1.2.conv1.weight", "layer3.4.conv1.weight"):
        other = unfolded | {name: np.zeros((1,), np.float32)}
        assert f"unexpected: {name}" in refusal(save(tmp_path / "resnet34.npz", other))


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "html"])
def test_damaged_files_are_named(tmp_path, folded, suffix, damage):
    path = tmp_path / f"model{suffix}"
    save(path, folded)
    content = path.read_bytes()
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "html": b"<html>404 not found</html>",
        }[damage]
    )
    assert str(path) in refusal(path)


def test_an_npz_is_never_unpickled(tmp_path):
    path = tmp_path / "objects.npz"
    np.savez(path, np.array([Bomb(tmp_path / "boom")], object))
    assert "allow_pickle=False" in refusal(path)
    assert not (tmp_path / "boom").exists()


def test_an_npz_that_sets_a_name_twice_is_refused(tmp_path, folded):
    path = tmp_path / "twice.npz"
    save(path, folded)
    with zipfile.ZipFile(path) as archive:
        member = archive.read("conv1.bias.npy")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("conv1.bias", member)
    assert "sets conv1.bias twice" in refusal(path)


def test_a_single_array_is_no_weights_file(tmp_path):
    with (tmp_path / "array.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    assert "array.npz" in refusal(tmp_path / "array.npz")


def test_types_that_hold_no_weights_are_refused(tmp_path, folded):
    tensors = {name: np.zeros(tensor.shape, np.uint8) for name, tensor in folded.items()}
    path = save(tmp_path / "quantised.safetensors", tensors)
    assert "U8; expected float16, bfloat16, float32, float64" in refusal(path)


def test_unknown_names_and_paths(tmp_path):
    message = refusal("resnet50.tv_in1", "resnet50")
    assert "did you mean 'resnet50.tv_in1k'?" in message
    assert "resnet50.tv_in1k, resnet50.tv2_in1k, random" in message
    assert "belongs to another backbone" in refusal("resnet50.tv_in1k", "resnet18")
    assert "no such file" in refusal(tmp_path / "nowhere.npz")
    (tmp_path / "weights.bin").write_bytes(b"")
    message = refusal(tmp_path / "weights.bin")
    assert "not a weights file" in message
    assert ".safetensors, .npz, .pth, .pt" in message


def test_a_name_is_had_from_the_hub(tmp_path, unfolded, monkeypatch):
    file = tmp_path / "model.safetensors"
    path = save(file, unfolded)
    asked = []

    def hf_hub_download(repo_id, filename):
        asked.append((repo_id, filename))
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    found, identity = load("resnet18.tv_in1k")
    assert asked == [("timm/resnet18.tv_in1k", "model.safetensors")]
    assert identity.origin == "huggingface.co/timm/resnet18.tv_in1k"
    assert identity.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert_same(found, load(path)[0])


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """The real client in offline mode, as with HF_HUB_OFFLINE=1, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path / "models--timm--resnet18.tv_in1k"


def test_offline_without_a_cached_file_says_what_to_do(offline_hub):
    message = refusal("resnet18.tv_in1k")
    assert "https://huggingface.co/timm/resnet18.tv_in1k " in message
    assert "HF_HUB_OFFLINE" in message
    assert "--config.model.weights=/path/to/model.safetensors" in message


def test_offline_takes_the_cached_file(offline_hub, unfolded):
    commit = "0" * 40
    (offline_hub / "refs").mkdir(parents=True)
    (offline_hub / "refs" / "main").write_text(commit)
    (offline_hub / "snapshots" / commit).mkdir(parents=True)
    save(offline_hub / "snapshots" / commit / "model.safetensors", unfolded)
    _, identity = load("resnet18.tv_in1k")
    assert identity.origin == "huggingface.co/timm/resnet18.tv_in1k"


# The client's errors have no common base: hf-xet's, for one, are RuntimeErrors.
@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("403 Forbidden")])
def test_a_failing_hub_says_what_to_do(monkeypatch, error):
    def hf_hub_download(repo_id, filename):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    message = refusal("resnet18.tv_in1k")
    assert str(error) in message
    assert "--config.model.weights=/path/to/model.safetensors" in message


def test_each_backbone_has_weights_of_its_own_name():
    assert WEIGHTS.keys() == BACKBONES.keys()
    for backbone, names in WEIGHTS.items():
        assert all(name.split(".")[0] == backbone for name in names)


def test_random_weights_are_the_same_everywhere_and_at_any_cut():
    found, identity = load("random")
    deeper, other = load("random", stages=("layer1", "layer2"))
    assert_same(
        found, {"params": {k: v for k, v in deeper["params"].items() if "layer2" not in k}}
    )
    assert identity != other
    assert "not ImageNet" in identity.origin
    # Pins generator, seeds, scale and order: the same with any version of NumPy and JAX.
    assert identity.sha256 == "18e4570c24f2e93ce8e43d2ff1cddca17c0da431bc556c119bfe67f9fac2f15f"


def test_random_weights_are_he_normal():
    found, _ = load("random", "resnet50", ("layer2",))
    # std = sqrt(2 / (kh kw inputs)), in the last convolution of a branch of the network's
    # 16 blocks a quarter of that; 4 standard errors of n values.
    for modules, variance in [
        (("conv1",), 2 / (49 * 3)),
        (("layer1_0", "conv3"), 2 / 64 / 16),
        (("layer2_0", "downsample"), 2 / 256),
        (("layer2_3", "conv2"), 2 / (9 * 128)),
    ]:
        values = kernel(found, *modules)
        assert abs(values.std() / np.sqrt(variance) - 1) < 4 / np.sqrt(2 * values.size)
        assert abs(values.mean()) < 4 * np.sqrt(variance / values.size)


def test_pth_without_torch_names_the_extra(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refusal(path)
    assert str(path) in message
    assert 'pip install "padim-jax[torch]"' in message


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_pth_gives_the_same_variables(tmp_path, unfolded, suffix):
    torch = pytest.importorskip("torch")
    path = tmp_path / f"model{suffix}"
    torch.save({name: torch.tensor(tensor) for name, tensor in unfolded.items()}, path)
    found, identity = load(path)
    assert_same(found, load(save(tmp_path / "model.npz", unfolded))[0])
    assert identity.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_pth_in_half_precision_and_with_gradients(tmp_path, folded):
    torch = pytest.importorskip("torch")
    tensors = {
        name: torch.nn.Parameter(torch.tensor(tensor).bfloat16())
        for name, tensor in folded.items()
    }
    torch.save(tensors, tmp_path / "model.pth")
    found, _ = load(tmp_path / "model.pth")
    expected = folded["conv1.bias"].astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(found["params"]["conv1"]["bias"], expected)


def test_pth_never_runs_what_it_holds(tmp_path):
    torch = pytest.importorskip("torch")
    pickle.loads(pickle.dumps(Bomb(tmp_path / "control")))
    assert (tmp_path / "control").exists()
    mark = tmp_path / "boom"
    torch.save({"conv1.weight": Bomb(mark)}, tmp_path / "zipped.pth")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Bomb(mark)))
    for name in ("zipped.pth", "bare.pth"):
        assert name in refusal(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("content", [{"epoch": 3, "state_dict": {}}, [1, 2]])
def test_pth_that_is_no_state_dict(tmp_path, content):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "checkpoint.pth")
    assert "state_dict" in refusal(tmp_path / "checkpoint.pth")


def test_damaged_pth(tmp_path, folded):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    torch.save({name: torch.tensor(tensor) for name, tensor in folded.items()}, path)
    path.write_bytes(path.read_bytes()[:1000])
    assert str(path) in refusal(path)
