"""Weight files and names: what is read, and what is refused with which words."""

import hashlib
import http.server
import pathlib
import pickle
import re
import sys
import threading
import zipfile

import huggingface_hub
import huggingface_hub.constants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from padim_jax.config.backbones import (
    BACKBONES,
    PINNED,
    TORCHVISION_FILES,
    WEIGHTS,
    Pin,
    ResNetSpec,
)
from padim_jax.errors import UserError
from padim_jax.models.weights import folding, pretrained, readers
from padim_jax.models.weights import hub as hub_files
from padim_jax.models.weights.naming import Convolution

LAYER1 = ("layer1",)
WITHOUT = "--config.model.backbone=scattering --config.model.weights=none"
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
    found = folding.fold_batch_norm(layer, tensors, epsilon=1e-5)
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


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "model.feature_extractor.", "a.layer1."]
)
def test_a_prefix_of_all_names_is_taken_off(tmp_path, unfolded, prefix):
    named = {prefix + name: tensor for name, tensor in unfolded.items()}
    others = {"head.weight": np.zeros(3, np.float32), "threshold": np.zeros(1, np.float32)}
    path = save(tmp_path / "a.safetensors", named | others)
    variables, identity = load(path)
    assert_same(variables, load(save(tmp_path / "b.npz", unfolded))[0])
    assert identity.origin == f"a.safetensors (names below {prefix}, 2 others left out)"


def test_a_backbone_that_is_there_twice_is_refused(tmp_path, unfolded):
    both = {
        f"{who}.{name}": x for name, x in unfolded.items() for who in ("student", "teacher")
    }
    message = refusal(save(tmp_path / "both.npz", both))
    assert "holds resnet18 2 times" in message
    assert "student.; teacher.; keep one" in message


def test_what_is_missing_below_a_prefix_is_named(tmp_path, unfolded):
    named = {f"module.{name}": tensor for name, tensor in unfolded.items()}
    del named["module.bn1.weight"]
    message = refusal(save(tmp_path / "part.npz", named))
    assert "(names below module., 0 others left out) does not hold" in message
    assert "missing: bn1.weight" in message


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
    assert message.endswith(f"lower than with ImageNet's: {WITHOUT}")
    assert "resnet18.tv_in1k, random" in refusal("resnet18")
    assert "did you mean 'random'?" in refusal("randon")
    # Of earlier versions.
    assert "no such weights" in refusal("bundled")
    assert "belongs to another backbone" in refusal("resnet50.tv_in1k", "resnet18")
    assert "no such file" in refusal(tmp_path / "nowhere.npz")
    (tmp_path / "weights.bin").write_bytes(b"")
    message = refusal(tmp_path / "weights.bin")
    assert "not a weights file" in message
    assert ".safetensors, .npz, .pth, .pt" in message


# The hub: its own client, asking a server here.

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "resnet18.tv_in1k"
REPOSITORY = f"/timm/{NAME}/resolve"


class Hub(http.server.ThreadingHTTPServer):
    """Has one file, at one commit, which is `main`; `asked` are its requests."""

    content = b""
    size: int | None = None  # as stated
    sha256: str | None = None
    ends_after: int | None = None  # bytes of an answer
    location: str | None = None  # redirects there

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.asked: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def files(self) -> list[tuple[str, str]]:
        """Method and revision of the requests for the file (the client has others)."""
        return [
            (method, path.split("/")[-2])
            for method, path in self.asked
            if path.startswith(REPOSITORY)
        ]


class HubHandler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        hub = self.server
        assert isinstance(hub, Hub)
        hub.asked.append((self.command, self.path))
        known = {f"{REPOSITORY}/{name}/model.safetensors" for name in (COMMIT, "main")}
        self.send_response((302 if hub.location else 200) if self.path in known else 404)
        if hub.location:
            self.send_header("Location", hub.location)
        self.send_header("X-Repo-Commit", COMMIT)
        digest = hub.sha256 or hashlib.sha256(hub.content).hexdigest()
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(hub.size or len(hub.content)))
        self.send_header("Content-Length", str(len(hub.content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(hub.content[: hub.ends_after])

    def log_message(self, format, *args):  # noqa: A002
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the client's, in which the weights have no hash that we know."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_files, "PINNED", {})
    return tmp_path / "cache" / f"models--timm--{NAME}"


@pytest.fixture
def hub(tmp_path, unfolded, monkeypatch, cache):
    monkeypatch.setenv("no_proxy", "*")
    with Hub() as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        save(tmp_path / "there.safetensors", unfolded)
        served.content = (tmp_path / "there.safetensors").read_bytes()
        constants = huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        path = template.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + path)
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        # The made server has no certificate; whatever the scheme is, it is the only one.
        monkeypatch.setattr(hub_files, "SCHEME", "http")
        yield served
        served.shutdown()
        thread.join()


def pin(monkeypatch, content, revision=COMMIT):
    pinned = Pin(revision, hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(hub_files, "PINNED", {NAME: pinned})


def files(folder):
    return {p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


def test_a_name_is_had_from_the_hub_once(tmp_path, hub, cache):
    expected, _ = load(tmp_path / "there.safetensors")
    found, identity = load(NAME)
    assert_same(found, expected)
    # Which commit and which bytes is known for good.
    assert identity.origin == f"huggingface.co/timm/{NAME}@{COMMIT}"
    assert identity.sha256 == hashlib.sha256(hub.content).hexdigest()
    assert hub.files()[0] == ("HEAD", "main")  # looked at before it is asked for
    assert [kind for kind, _ in hub.files()].count("GET") == 1
    hub.asked.clear()
    assert load(f"{NAME}@{COMMIT}")[1] == identity
    assert load(NAME)[1] == identity
    assert hub.files() == []  # from the cache


def test_the_pinned_commit_is_asked_for(hub, monkeypatch):
    pin(monkeypatch, hub.content)
    load(NAME)
    assert {revision for _, revision in hub.files()} == {COMMIT}


def test_another_file_than_the_pinned_one_is_refused_and_left(hub, cache, monkeypatch):
    pin(monkeypatch, b"other")
    message = refusal(NAME)
    assert hashlib.sha256(b"other").hexdigest() in message
    assert hashlib.sha256(hub.content).hexdigest() in message
    (kept,) = files(cache / "blobs")
    assert str(cache) in message
    assert kept.read_bytes() == hub.content
    # Whoever wants it all the same says so.
    assert load(f"{NAME}@main")[1].sha256 == kept.name


def test_other_bytes_than_the_hub_states_are_no_part_of_the_cache(hub, cache):
    hub.sha256 = hashlib.sha256(b"what was published").hexdigest()
    message = refusal(NAME)
    assert hub.sha256 in message
    assert hashlib.sha256(hub.content).hexdigest() in message
    assert not files(cache / "blobs") | files(cache / "snapshots")
    hub.sha256 = None
    load(NAME)


def test_a_file_damaged_in_the_cache_is_noticed_and_left(hub, cache):
    load(NAME)
    (blob,) = files(cache / "blobs")
    damaged = bytearray(blob.read_bytes())
    damaged[-1] ^= 1
    blob.write_bytes(damaged)
    assert blob.name in refusal(NAME)
    assert blob.read_bytes() == damaged


def test_a_blob_may_link_to_a_store_of_the_cache(hub, cache):
    load(NAME)
    (blob,) = files(cache / "blobs")
    shared = cache.parent / "blobs" / "ab" / ("ab" * 32)  # by another kind of hash
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(shared)
    assert load(NAME)[1].sha256 == blob.name
    shared.write_bytes(shared.read_bytes()[:-1] + b"?")
    assert f"published is {blob.name}" in refusal(NAME)


def test_an_interrupted_download_leaves_nothing(hub, cache, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's tries
    hub.ends_after = 1000
    assert "could not be downloaded" in refusal(NAME)
    assert not [path for path in files(cache) if path.parent.name == "blobs"]
    hub.ends_after = None
    load(NAME)


def test_a_file_of_another_size_than_stated_is_not_taken(hub, cache):
    hub.size = 999
    assert "of size 999" in refusal(NAME)
    assert not files(cache / "blobs")


def test_a_file_that_is_too_large_is_not_downloaded(hub, cache):
    hub.size = readers.MOST_BYTES + 1
    assert f"at most {readers.MOST_BYTES}" in refusal(NAME)
    assert {kind for kind, _ in hub.files()} == {"HEAD"}
    assert not files(cache)


@pytest.mark.parametrize("which", ["hub", "redirect"])
def test_only_https_is_downloaded_from(hub, cache, monkeypatch, which):
    if which == "hub":
        monkeypatch.setattr(hub_files, "SCHEME", "https")
    else:
        hub.location = "ftp://127.0.0.1/model.safetensors"
    message = refusal(NAME)
    assert f"no {hub_files.SCHEME} address" in message
    assert message.endswith(WITHOUT)
    assert not files(cache)


@pytest.mark.parametrize("revision", ["../../x", "a/b", "a b", "", "-x", "a\n"])
def test_a_revision_is_a_plain_name(hub, revision):
    if revision:
        assert "behind the @" in refusal(f"{NAME}@{revision}")
        assert hub.files() == []
    else:
        load(f"{NAME}@")


@pytest.fixture
def offline(monkeypatch):
    """The client in offline mode, as with HF_HUB_OFFLINE=1."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_offline_without_a_cached_file_says_what_to_do(cache):
    message = refusal(NAME)
    assert f"https://huggingface.co/timm/{NAME} " in message
    assert "HF_HUB_OFFLINE" in message
    assert "--config.model.weights=/path/to/model.safetensors" in message
    # Another way, which is never taken unasked.
    assert message.endswith(f"results are lower than with ImageNet's: {WITHOUT}")
    deep = refusal(NAME, stages=("layer1", "layer4"))
    layers = "('layer1', 'layer2', 'layer3')"
    assert deep.endswith(f'{WITHOUT} --config.model.layers="{layers}"')


@pytest.mark.usefixtures("offline")
def test_offline_takes_the_cached_file(cache, unfolded, monkeypatch):
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(COMMIT)
    (cache / "snapshots" / COMMIT).mkdir(parents=True)
    path = save(cache / "snapshots" / COMMIT / "model.safetensors", unfolded)
    _, identity = load(NAME)
    assert identity.origin == f"huggingface.co/timm/{NAME}@{COMMIT}"
    # Of another commit than the pinned one, but the same bytes.
    content = (cache / "snapshots" / COMMIT / "model.safetensors").read_bytes()
    pin(monkeypatch, content, revision="f" * 40)
    assert load(NAME)[1] == identity
    pin(monkeypatch, b"other", revision="f" * 40)
    assert "HF_HUB_OFFLINE" in refusal(NAME)
    assert pathlib.Path(path).read_bytes() == content


# The client's errors have no common base: hf-xet's, for one, are RuntimeErrors.
@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("403 Forbidden")])
@pytest.mark.parametrize("function", ["get_hf_file_metadata", "hf_hub_download"])
def test_a_failing_hub_says_what_to_do(hub, monkeypatch, function, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, function, fail)
    message = refusal(NAME)
    assert str(error) in message
    assert "--config.model.weights=/path/to/model.safetensors" in message


def test_pins_are_of_weights_that_there_are():
    for name, pinned in PINNED.items():
        assert any(name in names for names in WEIGHTS.values())
        assert re.fullmatch("[0-9a-f]{40}", pinned.revision)
        assert re.fullmatch("[0-9a-f]{64}", pinned.sha256)
    for name in TORCHVISION_FILES:
        assert name.split("-")[0].removesuffix("_lukemelas") in BACKBONES
        assert re.fullmatch(r"\w+-[0-9a-f]{8}\.pth", name)


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


def test_scattering_has_fixed_filters():
    found, identity = load("none", "scattering", ("layer1", "layer2"))
    (kernel,) = jax.tree.leaves(found)
    assert kernel.shape == (7, 7, 1, 8)
    assert "not ImageNet" in identity.origin
    assert identity.sha256 == hashlib.sha256(kernel.tobytes()).hexdigest()
    # Pins the definition: the same with any version of NumPy, and on any machine.
    assert identity.sha256 == "915f81a9ff29c108f25d6834eaaebf14946ca6ae850a2db012ff6f1b32317d3b"


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
    pickle.loads(pickle.dumps(Bomb(tmp_path / "control")))  # noqa: S301 (the control)
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
