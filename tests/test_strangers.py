"""Files from strangers: nothing in them is run, and nothing is written where it should not be.

Malicious ones are tried, of every kind that is read. What they are to do is to make a file
called `ran` (see `bomb`), or one outside of the folder that they are unpacked to or that
results go to.
"""

import csv
import dataclasses
import io
import json
import os
import pathlib
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import fuzzing
import numpy as np
import pytest
import safetensors.numpy
from fuzzing import ONE
from PIL import Image

from padim_jax.config import defaults
from padim_jax.config.settings import Config, validate
from padim_jax.core import embedding
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.layouts import LAYOUTS
from padim_jax.data.records import Record
from padim_jax.detector import geometry, steps
from padim_jax.errors import DataWarning, UserError
from padim_jax.models.weights import pretrained, readers
from padim_jax.output import results, tables
from padim_jax.runs import fitting, loading, train
from padim_jax.store import calibration_file, checkpoint, model_file, statistics_store
from padim_jax.system import ending, paths

# Threads of Orbax, where reading fails; see test_checkpoint.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


class bomb:  # noqa: N801 (a function of one argument)
    """Unpickling it makes a file."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.fixture
def ran(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Nothing makes this file; a control shows that it would be made."""
    pickle.loads(pickle.dumps(bomb(tmp_path / "control")))  # noqa: S301 (our own)
    (tmp_path / "control").unlink()
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists()


def refusal(path: pathlib.Path) -> str:
    with pytest.raises(UserError) as caught:
        pretrained.load(str(path), "resnet18", fuzzing.LAYERS)
    assert str(path) in str(caught.value)
    return str(caught.value)


# Weights.


def npy(header: bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    return b"\x93NUMPY" + version + length + header + data


def described(shape: Any, dtype: str = "<f4") -> bytes:
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return content.getvalue()


class TestWeights:
    def test_objects_in_an_npz(self, ran: pathlib.Path, tmp_path: pathlib.Path):
        found: Any = {"conv1.weight": np.array([bomb(ran)], object)}
        np.savez(tmp_path / "a.npz", **found)
        assert "a pickle is a program" in refusal(tmp_path / "a.npz")
        # With a header that promises numbers, or with no header at all.
        whole = pickle.dumps(bomb(ran))
        for name, member in {
            "numbers": npy(described((64, 3, 7, 7)), whole),
            "objects": npy(described((1,), "|O"), whole),
            "bare": whole,
        }.items():
            path = tmp_path / f"{name}.npz"
            path.write_bytes(archive({"conv1.weight.npy": member}))
            refusal(path)
        (tmp_path / "pickle.npz").write_bytes(whole)
        refusal(tmp_path / "pickle.npz")

    @pytest.mark.parametrize(
        "header",
        [
            b"__import__('os').system('touch ran')",
            b"{'descr': ().__class__, 'fortran_order': False, 'shape': (1,)}",
            b"(" * 5000,
            described((64, 3, 7, "__import__('os')")),
            described(("x",)),
            described((-1, 3)),
            described((10**30,)),
        ],
        ids=range(7),
    )
    def test_headers_of_an_npz(self, header: bytes, tmp_path: pathlib.Path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a.npz").write_bytes(archive({"conv1.weight.npy": npy(header)}))
        refusal(tmp_path / "a.npz")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("names", "said"),
        [
            (["conv1.weight"], "has shape"),  # not what the backbone needs: not read
            (["fc.weight", "layer4.0.conv1.weight"], "missing"),  # behind the cut
            (["anything"], "unexpected"),
        ],
    )
    def test_a_zip_bomb_is_not_expanded(self, names, said, tmp_path, monkeypatch):
        """100 MB of zeros each, in 100 kB."""
        squeezed = zlib.compressobj(9, zlib.DEFLATED, -15)
        piece, zeros = squeezed.compress(npy(described((10**4, 2_500)))), bytes(10**7)
        piece += b"".join(squeezed.compress(zeros) for _ in range(10)) + squeezed.flush()
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as made:
            for name in names:
                made.writestr(f"{name}.npy", piece)
                info = made.getinfo(f"{name}.npy")
                info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, 10**8
        (tmp_path / "a.npz").write_bytes(content.getvalue())
        most = 0
        read = zipfile.ZipExtFile.read

        def counted(self, n=-1):
            nonlocal most
            found = read(self, n)
            most += len(found)
            return found

        monkeypatch.setattr(zipfile.ZipExtFile, "read", counted)
        assert said in refusal(tmp_path / "a.npz")
        assert most <= 10_000 * len(names)

    def test_a_member_that_expands_to_more_than_its_header_says(self, tmp_path: pathlib.Path):
        found = fuzzing.tensors()
        members = {}
        for name, tensor in found.items():
            content = io.BytesIO()
            np.save(content, tensor)
            members[f"{name}.npy"] = content.getvalue()
        members["conv1.weight.npy"] += bytes(10**7)
        (tmp_path / "a.npz").write_bytes(archive(members))
        assert "conv1.weight cannot be read" in refusal(tmp_path / "a.npz")

    def test_a_long_header_is_not_expanded(self, tmp_path: pathlib.Path):
        header = described((64, 3, 7, 7)).rstrip() + 10**8 * b" " + b"\n"
        member = npy(header, version=b"\x02\x00")
        (tmp_path / "a.npz").write_bytes(archive({"conv1.weight.npy": member}))
        refusal(tmp_path / "a.npz")

    def test_very_many_members(self, tmp_path: pathlib.Path):
        (tmp_path / "a.npz").write_bytes(archive({f"{i}": b"" for i in range(20_000)}))
        assert "more than 10000 members" in refusal(tmp_path / "a.npz")

    def test_names_lead_nowhere(self, tmp_path: pathlib.Path):
        for name in ("../../evil", "/evil", "a\nb", "\x1b[31m", "x" * 60_000):
            found = {**fuzzing.tensors(), name: np.zeros(1, np.float32)}
            for suffix in (".npz", ".safetensors"):
                path = tmp_path / f"a{suffix}"
                path.write_bytes(fuzzing.encoded(found, suffix))
                message = refusal(path)
                assert "unexpected" in message
                assert len(message) < 2000
        assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "a.safetensors"}

    def test_a_file_that_is_too_large(self, tmp_path: pathlib.Path):
        for suffix in (".npz", ".safetensors", ".pth"):
            path = tmp_path / f"a{suffix}"
            with path.open("wb") as file:
                file.truncate(readers.MOST_BYTES + 1)  # a hole
            assert f"more than {readers.MOST_BYTES} bytes" in refusal(path)

    def test_a_link_to_a_device(self, tmp_path: pathlib.Path):
        (tmp_path / "a.npz").symlink_to("/dev/zero")
        with pytest.raises(UserError, match="no such file"):
            pretrained.load(str(tmp_path / "a.npz"), "resnet18", fuzzing.LAYERS)


class TestTorch:
    @pytest.fixture(autouse=True)
    def torch(self) -> Any:
        return pytest.importorskip("torch")

    def test_objects(self, torch: Any, ran: pathlib.Path, tmp_path: pathlib.Path):
        whole = {name: torch.tensor(x) for name, x in fuzzing.tensors().items()}
        for name, state in {
            "value": whole | {"conv1.weight": bomb(ran)},
            "more": whole | {"x": bomb(ran)},
            "list": [bomb(ran)],
        }.items():
            torch.save(state, tmp_path / f"{name}.pth")
            refusal(tmp_path / f"{name}.pth")
            torch.save(state, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=False)
            refusal(tmp_path / f"{name}.pt")
        (tmp_path / "bare.pth").write_bytes(pickle.dumps(bomb(ran)))
        refusal(tmp_path / "bare.pth")

    def test_a_program(self, tmp_path: pathlib.Path):
        """As `torch.jit.save` makes it, which is deprecated."""
        nothing = pickle.dumps(None)
        members = {"a/data.pkl": nothing, "a/constants.pkl": nothing, "a/version": b"3"}
        (tmp_path / "a.pt").write_bytes(archive(members, zipfile.ZIP_STORED))
        assert "TorchScript" in refusal(tmp_path / "a.pt")

    def test_a_zip_bomb(self, torch: Any, tmp_path: pathlib.Path):
        torch.save({"conv1.weight": torch.zeros(10**7)}, tmp_path / "plain.pth")
        with zipfile.ZipFile(tmp_path / "plain.pth") as plain:
            members = {name: plain.read(name) for name in plain.namelist()}
        (tmp_path / "a.pth").write_bytes(archive(members))
        assert "expands to more than it holds" in refusal(tmp_path / "a.pth")

    def test_an_expanded_view(self, torch: Any, tmp_path: pathlib.Path):
        """Of one number, 10^15 times: of half precision it would be copied."""
        huge = torch.zeros(1, dtype=torch.float16).expand(10**5, 10**5, 10**5)
        torch.save({"conv1.weight": huge}, tmp_path / "a.pth")
        assert "has shape" in refusal(tmp_path / "a.pth")

    def test_an_old_version_is_not_used(self, torch: Any, tmp_path: pathlib.Path, monkeypatch):
        torch.save({}, tmp_path / "a.pth")
        monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
        assert "CVE-2025-32434" in refusal(tmp_path / "a.pth")

    def test_another_file_by_a_published_name(self, torch: Any, tmp_path: pathlib.Path):
        path = tmp_path / "resnet18-5c106cde.pth"
        torch.save({}, path)
        assert "published is 5c106cde..." in refusal(path)


# Models.


class TestModels:
    def test_a_pickle_in_a_checkpoint(self, ran: pathlib.Path, tmp_path: pathlib.Path):
        """In the place of each of its files."""
        whole = fuzzing.checkpoint_folder("moments")
        for file in sorted(whole.rglob("*")):
            if not file.is_file() or file.stat().st_size == 0:
                continue
            path = tmp_path / "a"
            shutil.copytree(whole, path)
            (path / file.relative_to(whole)).write_bytes(pickle.dumps(bomb(ran)))
            try:  # some are not looked at
                statistics_store.load_checkpoint(path, ONE)
            except UserError as error:
                assert str(path) in str(error)  # noqa: PT017
            shutil.rmtree(path)

    def test_a_pickle_for_a_model_file_or_a_calibration(self, ran, tmp_path):
        path = tmp_path / "model.safetensors"
        path.write_bytes(pickle.dumps(bomb(ran)))
        with pytest.raises(UserError, match=r"model\.safetensors: no model file"):
            model_file.load(path, ONE)
        (tmp_path / calibration_file.NAME).write_bytes(pickle.dumps(bomb(ran)))
        with pytest.raises(UserError, match=calibration_file.NAME):
            calibration_file.read(tmp_path, "a detector")

    @pytest.mark.parametrize("depth", [10**5])
    def test_deeply_nested_json(self, depth: int, tmp_path: pathlib.Path):
        deep = depth * "[" + depth * "]"
        (tmp_path / calibration_file.NAME).write_text(deep)
        with pytest.raises(UserError, match=calibration_file.NAME):
            calibration_file.read(tmp_path, "a detector")
        path = tmp_path / "model.safetensors"
        arrays = {"index": np.zeros(1)}
        safetensors.numpy.save_file(arrays, path, {"padim_jax": deep})
        with pytest.raises(UserError, match="no model file"):
            model_file.load(path, ONE)
        shutil.copytree(fuzzing.checkpoint_folder("moments"), tmp_path / "a")
        (tmp_path / "a" / "0" / "_CHECKPOINT_METADATA").write_text(deep)
        with pytest.raises(UserError, match="or a damaged one"):
            checkpoint.load(tmp_path / "a", ONE)

    def test_a_large_description(self, tmp_path: pathlib.Path):
        (tmp_path / calibration_file.NAME).write_text("[" + 6_000_000 * "0," + "0]")
        with pytest.raises(UserError, match="more than 10000000 bytes"):
            calibration_file.read(tmp_path, "a detector")
        shutil.copytree(fuzzing.checkpoint_folder("moments"), tmp_path / "a")
        with (tmp_path / "a" / "0" / "_CHECKPOINT_METADATA").open("r+b") as file:
            file.truncate(10**10)
        with pytest.raises(UserError, match="or a damaged one"):
            checkpoint.load(tmp_path / "a", ONE)

    def test_arrays_that_claim_all_memory(self, tmp_path: pathlib.Path):
        """By descriptions alone: what is not stored reads as zeros."""
        shutil.copytree(fuzzing.checkpoint_folder("moments"), tmp_path / "a")
        info = checkpoint._describe(tmp_path / "a" / "0")
        regions = fuzzing.fitted("moments").regions
        claimed = dict(info.metadata)

        @dataclasses.dataclass
        class Claim:
            shape: tuple[int, ...]
            dtype: Any

        for name, shape in {
            "m2_0_0": (regions, 1, 10**12),
            "mean_0": (10**12, 1, 3),
            "images": (10**12, 32),
            "../x": (1,),
            "mean_1": (regions, 1, 10**9),
        }.items():
            kind = np.dtype("uint8" if name == "images" else "float32")
            with pytest.raises(ValueError, match=r"shape|images|numbers|an array|it has no"):
                checkpoint._require_plausible(
                    claimed | {name: Claim(shape, kind)}, regions, fuzzing.config()
                )

    def test_metadata_lead_nowhere(self, tmp_path: pathlib.Path):
        """A model's own configuration names places; loading it writes to none of them."""
        fitted = fuzzing.fitted("moments")
        outside = tmp_path / "outside"
        config = fitted.config
        config = dataclasses.replace(
            config,
            dataset=dataclasses.replace(config.dataset, root=outside / "root"),
            cache=dataclasses.replace(config.cache, dir=outside / "cache"),
        )
        checkpoint.save(tmp_path / "a", dataclasses.replace(fitted, config=config), ONE)
        loading.load(tmp_path / "a")
        assert not outside.exists()


# Where results are written.


def draw(path: pathlib.Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(256, size=(32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def make_config(root: pathlib.Path, **settings: Any) -> Config:
    values = defaults.get_config()
    base = {
        "category": "",
        "dataset.name": "folder",
        "dataset.root": str(root),
        "image.resize": (32, 32),
        "model.weights": "random",
        "model.layers": ("layer1",),
        "model.channels": 3,
        "threshold.normal": "none",
        "outputs.maps": "npy",
        "outputs.figures": "all",
        "cache.images_gb": 0,
        "cache.compilation": False,
    }
    values.update_from_flattened_dict(base | settings)
    return validate(values)


LEADING_OUT = ["../x.png", "a/../../x.png", "/srv/x.png", "..", "/", "", "a/..", "a\0b"]


class TestResults:
    @pytest.mark.parametrize("name", LEADING_OUT)
    def test_a_record_that_leads_out(self, name: str):
        """As a packed dataset of a stranger's may have them."""
        image = pathlib.Path("image.png")
        with pytest.raises(UserError, match="leads out"):
            Record("test", image, None, 0, "good", name)
        if "/" in name or name in ("..", ""):
            with pytest.raises(UserError, match="leads out"):
                Record("test", image, None, 1, f"../{name}", "a.png")

    @pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/srv/x.png", "/", "a\0b"])
    def test_a_map_that_leads_out(self, name: str, tmp_path: pathlib.Path):
        (tmp_path / "maps").mkdir()
        before = set(tmp_path.rglob("*"))
        with pytest.raises(UserError, match="leads out"):
            results.save_map(tmp_path / "maps", name, "npy", np.zeros((2, 2), np.float32))
        assert set(tmp_path.rglob("*")) == before

    def test_a_packed_dataset_of_a_strangers(self, tmp_path: pathlib.Path):
        tfds_builder = pytest.importorskip("padim_jax.data.packing")
        draw(tmp_path / "image.png")
        record = Record("train", tmp_path / "image.png", None, 0, "good", "image.png")
        packed = tmp_path / "packed"
        tfds_builder.prepare(packed, [record])
        (file,) = packed.rglob("metadata.json")
        text = file.read_text()
        for name in ("../../x.png", "/srv/x.png"):
            file.write_text(text.replace('"image.png"', json.dumps(name)))
            with pytest.raises(UserError, match="leads out"):
                tfds_builder.open_split(tfds_builder.prepare(packed, None), "train")

    def test_a_link_is_not_written_or_removed_through(self, tmp_path: pathlib.Path):
        precious = tmp_path / "elsewhere" / "precious.txt"
        precious.parent.mkdir()
        precious.write_text("mine")
        workdir = tmp_path / "workdir"
        workdir.mkdir()
        link = workdir / "maps"
        link.symlink_to(precious.parent)
        with pytest.raises(UserError, match="is a link to"):
            paths.remove_folder(link)
        link.unlink()
        (workdir / "maps").mkdir()
        (workdir / "maps" / "within").symlink_to(precious.parent)
        paths.remove_folder(workdir / "maps")  # links within go, not what they lead to
        assert not (workdir / "maps").exists()
        # A file that is a link is replaced by a file.
        for name in ("scores.csv", "metrics.json"):
            (workdir / name).symlink_to(precious)
            paths.write(workdir / name, b"results")
            assert not (workdir / name).is_symlink()
            assert (workdir / name).read_bytes() == b"results"
        assert precious.read_text() == "mine"

    def test_a_link_in_a_strangers_workdir(self, tmp_path: pathlib.Path):
        root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
        for i in range(3):
            draw(root / "train" / "good" / f"{i}.png", i)
        draw(root / "val" / "good" / "a.png", 7)
        draw(root / "val" / "bad" / "b.png", 8)
        elsewhere.mkdir()
        (elsewhere / "precious.txt").write_text("mine")
        for name in ("maps", "figures"):
            workdir = tmp_path / f"workdir {name}"
            workdir.mkdir()
            groups = {group: {} for group in ("dataset", "image", "model", "map")}
            (workdir / "config.json").write_text(json.dumps(groups))  # as of an earlier run
            (workdir / name).symlink_to(elsewhere)
            config = make_config(root)
            with pytest.raises(UserError, match="is a link to"):
                train.train_and_eval(config, workdir, workdir / "checkpoint")
        assert {path.name for path in elsewhere.iterdir()} == {"precious.txt"}

    def test_links_in_a_dataset(self, tmp_path: pathlib.Path):
        """They are followed to read, as people keep images elsewhere; what is no image is
        refused."""
        root = tmp_path / "root"
        for i in range(3):
            draw(root / "train" / "good" / f"{i}.png", i)
        draw(tmp_path / "elsewhere.png", 9)
        (root / "train" / "good" / "9.png").symlink_to(tmp_path / "elsewhere.png")
        records = LAYOUTS["folder"].records(root, "", 0)
        assert len(records) == 4
        config = make_config(root)
        fitting.train(config, FolderSource(records), tmp_path / "a")
        secret = tmp_path / "secret"
        secret.write_text("root:x:0:0")
        (root / "train" / "good" / "x.png").symlink_to(secret)
        records = LAYOUTS["folder"].records(root, "", 0)
        with pytest.raises(UserError, match=r"x\.png"):
            fitting.train(config, FolderSource(records), tmp_path / "b")


# Numbers that are none.


class TestNumbers:
    """Found where they come up, with the file named."""

    def weights(self, tmp_path: pathlib.Path, bright: float) -> str:
        """An image with a bright pixel overflows float32; darker ones do not."""
        found: Any = {name: x.copy() for name, x in fuzzing.tensors().items()}
        found["conv1.weight"][:] = 0
        found["conv1.weight"][:, :, 3, 3] = 1e30
        found["bn1.bias"][:] = -bright * 1e30
        for name in found:
            if name.startswith("bn1.") and name != "bn1.bias":
                found[name][:] = 0.0 if name.endswith("mean") else 1.0
            if "layer1" in name and "conv" in name:
                found[name][:] = 0
                found[name][:, :, 1, 1] = 1e9 * np.eye(64)
            if "layer1" in name and "bn" in name:
                found[name][:] = float(name.endswith(("running_var", ".weight")))
        np.savez(tmp_path / "w.npz", **found)
        return str(tmp_path / "w.npz")

    def test_an_image_whose_features_overflow(self, tmp_path: pathlib.Path):
        root = tmp_path / "root"
        for i, level in enumerate([10, 20, 30, 250, 40]):
            path = root / "train" / "good" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (level, level, level)).save(path)
        settings = {
            "image.mean": (0.0, 0.0, 0.0),
            "image.std": (1.0, 1.0, 1.0),
            "batch_size": 2,
            "model.weights": self.weights(tmp_path, 3 * 0.5),
        }
        config = make_config(root, **settings)
        records = LAYOUTS["folder"].records(root, "", 0)
        with pytest.raises(UserError) as caught:
            fitting.train(config, FolderSource(records), tmp_path / "a")
        assert str(caught.value).startswith(f"{root / 'train' / 'good' / '3.png'}: ")
        assert "not finite" in str(caught.value)
        assert "rows" in str(caught.value)
        assert not list((tmp_path / "a").glob("[0-9]*"))  # no model is left
        # Without it there is a model, which says so of the image when it is to score it.
        good = [record for record in records if record.image.name != "3.png"]
        detector = fitting.train(config, FolderSource(good), tmp_path / "b")
        with pytest.raises(UserError, match=r"3\.png: a score of (nan|inf)"):
            loading.detector_lib.score(detector, [records[0].image, records[3].image])

    @pytest.mark.parametrize("statistics", ["moments", "samples"])
    @pytest.mark.parametrize("level", [0, 99])
    def test_images_that_are_all_the_same(self, level, statistics, tmp_path):
        """Exact: distances are deviations over the regularization's root; and it is said."""
        root = tmp_path / "root"
        for i in range(4):
            path = root / "train" / "good" / f"{i}.{'png' if i % 2 else 'bmp'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            # Files that differ, or they would count once.
            Image.new("RGB", (32, 32), (level, level, level)).save(path, dpi=(100 + i, 100))
        config = make_config(root, **{"model.statistics": statistics, "map.sigma": 0.0})
        records = LAYOUTS["folder"].records(root, "", 0)
        said = f"all 4 images are the same, pixel for pixel, as {records[0].image}"
        with pytest.warns(DataWarning, match=re.escape(said)):
            detector = fitting.train(config, FolderSource(records), tmp_path / "a")
        other = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
        same = np.full((32, 32, 3), level, np.uint8)
        found = loading.detector_lib.score(detector, [same, other])
        assert found.scores[0] < 1e-3
        embeddings = embedding.concatenate(
            steps.extract(
                detector.variables,
                np.stack([same, other]),
                image=config.image,
                model=config.model,
                index=tuple(detector.index.tolist()),
            ),
            geometry.pyramid(config.image, config.model, detector.index.tolist()),
        )
        deviation = np.linalg.norm(np.diff(np.asarray(embeddings), axis=0)[0], axis=-1)
        expected = deviation.max() / np.sqrt(config.model.regularization)
        # Of float32; and of interpolation, which keeps maxima where patches' centres lie.
        assert 0.5 * expected < found.scores[1] < 1.01 * expected

    def test_images_that_differ_are_not_warned_of(self, tmp_path, capsys):
        for i in range(3):
            path = tmp_path / "train" / "good" / f"{i}.png"
            draw(path, i % 2)  # two of them the same, in files that differ
            with Image.open(path) as image:
                image.save(path, dpi=(100 + i, 100))
        records = LAYOUTS["folder"].records(tmp_path, "", 0)
        fitting.train(make_config(tmp_path), FolderSource(records), tmp_path / "a")
        assert "warning" not in capsys.readouterr().out


def test_what_a_terminal_would_act_on_is_not_printed(tmp_path, capsys):
    name = "a\x1b]0;title\x07\x1b[2J\r\udcff é.npz"
    with pytest.raises(SystemExit) as caught:
        ending.fail(f"{tmp_path / name}: cannot be read\nat all")
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.endswith(
        "a\\x1b]0;title\\x07\\x1b[2J\\r\\udcff é.npz: cannot be read\nat all\n"
    )


def test_tables_hold_no_formulas(tmp_path: pathlib.Path):
    wide = "\uff1d\uff0b\uff0d\uff20"
    names = [f"{sign}cmd|'C calc'!A0.png" for sign in "=+-@\t\r\n" + wide]
    text = tables.as_csv([names]).decode()
    (row,) = csv.reader(io.StringIO(text, newline=""))
    assert row == [f"./{name}" for name in names]
    # The same file still.
    for name, cell in zip(names, row, strict=True):
        (tmp_path / name).write_text("x")
        assert (tmp_path / cell).samefile(tmp_path / name)
    assert tables.as_csv([("a/b=c.png", -0.5, "-0.5", "+1e-3", "")]) == (
        b"a/b=c.png,-0.5,-0.5,+1e-3,\r\n"
    )


def test_tables_are_utf_8_whatever_the_names_are():
    assert tables.as_csv([("b\udcffd.png", "\u00fc")]).decode() == "b\\udcffd.png,\u00fc\r\n"
