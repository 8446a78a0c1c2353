"""Paths of object stores: the same records, pixels and files as on a local disk.

The store is in memory, behind the interface that gcsfs and s3fs have, and as they are: no
folders, files that appear whole when they are closed, other errors than the system's.
"""

import contextlib
import csv
import dataclasses
import errno
import hashlib
import importlib
import io
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import beartype
import beartype.roar
import jax
import numpy as np
import pytest
import small
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from PIL import Image

from padim_jax.config import defaults
from padim_jax.config import settings as config_lib
from padim_jax.config.settings import CacheConfig, Config, ImageConfig
from padim_jax.core.types import Gaussian
from padim_jax.data import (
    dataset_splits,
    download,
    input_pipeline,
    inputs,
    listing,
    masks,
    packing,
)
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.layouts import LAYOUTS, synthetic
from padim_jax.data.records import Record
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.models.weights.identity import WeightsIdentity
from padim_jax.output import predictions, results
from padim_jax.output.results import Scored
from padim_jax.runs import sweep, train
from padim_jax.store import checkpoint, model_file
from padim_jax.system import compilation_cache, paths

ROOT = pathlib.Path(__file__).resolve().parents[2]
IMAGE = ImageConfig(
    (32, 32), "bilinear", None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 0.0, "centre", 0
)


class ClientError(Exception):
    """As the clients have them: no OSError."""


ClientError.__module__ = "botocore.exceptions"


class Growing(io.BytesIO):
    """A file on its way: it is there once it is closed."""

    def __init__(self, store: "Store", path: str):
        super().__init__()
        self._store, self._path = store, path

    def close(self) -> None:
        if self.closed:
            return
        content = self.getvalue()
        super().close()
        if self._store.full:
            raise ClientError("no more room")
        self._store.store[self._path] = MemoryFile(self._store, self._path, content)


class Store(MemoryFileSystem):
    """An object store; `asked` counts the questions that it is sent."""

    store: dict[str, Any] = {}  # noqa: RUF012 as the base class has it
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    asked = 0
    full = False
    down = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(os.fspath(path).partition("://")[2] or path)

    def mkdir(self, path: str, create_parents: bool = True, **kwargs: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def ls(self, path: str, detail: bool = True) -> list:  # pyright: ignore
        self.ask()
        return super().ls(path, detail)

    def info(self, path: str, **kwargs: Any) -> dict:
        self.ask()
        return super().info(path, **kwargs)

    def _open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> io.BytesIO:  # pyright: ignore
        self.ask()
        path = self._strip_protocol(path)
        if mode == "wb":
            return Growing(self, path)
        if path not in self.store:
            raise FileNotFoundError(path)
        return io.BytesIO(self.store[path].getvalue())

    def ask(self) -> None:
        type(self).asked += 1
        if self.down:
            raise ClientError("no credentials")


@pytest.fixture(params=["s3"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """What gs:// or s3:// leads to; `url` is where it begins."""
    # One of its own, so that nothing stays.
    fresh = type("Fresh", (Store,), {"store": {}, "pseudo_dirs": [""]})
    fresh.url = f"{request.param}://bucket"  # pyright: ignore[reportAttributeAccessIssue]
    known = importlib.import_module("fsspec.registry")._registry
    for name in {"gs": ("gs", "gcs"), "s3": ("s3",)}[request.param]:
        monkeypatch.setitem(known, name, fresh)
    forget()
    yield fresh
    forget()


both_stores = pytest.mark.parametrize("store", ["gs", "s3"], indirect=True)


def forget() -> None:
    # epath makes a file system for each scheme once.
    from etils.epath import backend

    backend.fsspec_backend._get_filesystem.cache_clear()


def upload(folder: pathlib.Path, url: str) -> paths.Path:
    """The folder's files, in the store."""
    for path in folder.rglob("*"):
        if path.is_file():
            place = paths.parse(f"{url}/{path.relative_to(folder).as_posix()}")
            place.write_bytes(path.read_bytes())
    return paths.parse(url)


def contents(folder: paths.Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in paths.files_below(folder)
    }


def draw(path: pathlib.Path, seed: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def draw_mvtec(root: pathlib.Path, train: int = 3) -> None:
    for number in range(train):
        draw(root / f"die Flasche/train/good/bild {number:03}.png", number)
    draw(root / "die Flasche/test/good/ö.jpg", 90)
    draw(root / "die Flasche/test/Riß (tief)/a#1?.png", 91)
    draw(root / "die Flasche/test/Riß (tief)/b.png", 92)
    draw(root / "die Flasche/ground_truth/Riß (tief)/a#1?_mask.png", 93, "1")
    draw(root / "die Flasche/ground_truth/Riß (tief)/b_mask.png", 94, "1")
    draw(root / "die Flasche/test/.thumbs/b.png", 95)
    (root / "die Flasche/train/good/notes.txt").write_text("no image")


def draw_folder(root: pathlib.Path, train: int = 3) -> None:
    for number in range(train):
        draw(root / f"die Flasche/train/good/{number:03}.png", number)
    draw(root / "die Flasche/val/good/0.png", 90)
    draw(root / "die Flasche/val/bad/0.png", 91)
    draw(root / "die Flasche/masks/bad/0.png", 92, "1")


DRAWN = {"mvtec_ad": draw_mvtec, "folder": draw_folder}
layouts = pytest.mark.parametrize("layout", DRAWN)


def make_config(**settings: Any) -> Config:
    values = defaults.get_config()
    values.update_from_flattened_dict({"model.weights": "random"} | settings)
    return config_lib.validate(values)


class TestParse:
    @pytest.mark.parametrize(
        "text", ["a", "a b/ü", "./a", "/a/b", ".", "a:b", "C:/a", "a/http://b", "~", "~/a"]
    )
    def test_paths_of_this_machine_are_pathlibs(self, text: str):
        path = paths.parse(text)
        assert path == pathlib.Path(text).expanduser()
        assert type(path) is type(pathlib.Path(text))

    @both_stores
    def test_remote(self, store: Any):
        path = paths.parse(f"{store.url}/a b//c/")
        assert not isinstance(path, pathlib.Path)
        assert str(path) == os.fspath(path) == f"{store.url}/a b/c"
        assert str(path / "d") == f"{store.url}/a b/c/d"
        assert paths.absolute(path) is path
        assert paths.parse(str(path)) == path

    @pytest.mark.parametrize("text", ["gs:", "gs://", "gs:///", "gs:/bucket/a", "s3:a"])
    def test_without_a_bucket(self, text: str):
        with pytest.raises(UserError, match=r"(gs|s3)://bucket/folder") as error:
            paths.parse(text)
        assert str(error.value).startswith(f"{text}: ")

    @pytest.mark.parametrize(
        "text", ["http://a/b", "memory://a", "GS://a", "az://a", "file:///a"]
    )
    def test_another_scheme(self, text: str):
        with pytest.raises(UserError, match="gs:// or s3://") as error:
            paths.parse(text)
        assert str(error.value).startswith(f"{text}: ")

    def test_no_such_home(self):
        with pytest.raises(UserError, match=r"^~no_such_user/a: .*home directory"):
            paths.parse("~no_such_user/a")

    @pytest.mark.parametrize(("scheme", "package"), paths.SCHEMES.items())
    def test_a_missing_package_is_named(
        self, scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
    ):
        registry = importlib.import_module("fsspec.registry")
        monkeypatch.delitem(registry._registry, scheme, raising=False)
        missing = {"class": "no_such_module.FileSystem", "err": "get it"}
        monkeypatch.setitem(registry.known_implementations, scheme, missing)
        text = f"{scheme}://bucket/a"
        with pytest.raises(UserError, match=rf"{package}.*padim-jax\[{scheme}\]"):
            paths.parse(text)
        # Not to be reached from here, and perhaps not needed.
        assert str(paths.parse(text, needed=False)) == text
        config = make_config(**{"dataset.root": text})
        with pytest.raises(UserError, match=package):
            LAYOUTS["mvtec_ad"].records(config.dataset.root, "bottle", 0)

    def test_local_paths_cost_no_imports(self):
        code = """if True:
            import sys
            from padim_jax.config import settings as config
            from padim_jax.config import defaults
            from padim_jax.system import paths
            from padim_jax import main
            config.validate(defaults.get_config())
            paths.parse("~/a")
            print([name for name in ("etils", "fsspec", "jax") if name in sys.modules])
        """
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert found.stdout.strip() == "[]"

    def test_types_are_checked_at_run_time(self, store: Any):
        @beartype.beartype
        def take(path: paths.Path) -> None:
            pass

        take(pathlib.Path("a"))
        take(paths.parse(store.url))
        with pytest.raises(beartype.roar.BeartypeCallHintParamViolation):
            take("a")  # pyright: ignore[reportArgumentType]


class TestConfig:
    def test_remote_roots_stay_as_they_are(self, store: Any):
        config = make_config(
            **{
                "dataset.root": f"{store.url}/a b",
                "cache.dir": f"{store.url}/c",
                "cache.images_gb": 0.0,
            }
        )
        moved = config_lib.with_absolute_paths(config)
        assert moved == config
        kept = json.loads(json.dumps(config_lib.to_dict(moved)))
        assert kept["dataset"]["root"] == f"{store.url}/a b"
        assert config_lib.validate(kept) == config
        assert str(config.cache.folder) == f"{store.url}/c"

    def test_title_without_a_category(self, store: Any):
        root = f"{store.url}/parts/left"
        assert make_config(**{"dataset.root": root, "category": ""}).title == "left"

    def test_local_ones_become_absolute(self):
        config = make_config(**{"dataset.root": "a b", "cache.dir": "c"})
        moved = config_lib.with_absolute_paths(config)
        assert moved.dataset.root == pathlib.Path.cwd() / "a b"
        assert moved.cache.dir == pathlib.Path.cwd() / "c"

    def test_a_mistake_names_the_setting(self):
        with pytest.raises(UserError, match=r"^config\.dataset\.root='http://a': files cannot"):
            make_config(**{"dataset.root": "http://a"})

    def test_images_are_cached_locally_only(self, store: Any):
        with pytest.raises(UserError, match=r"config\.cache\.dir=.*images_gb=0"):
            make_config(**{"cache.dir": store.url})

    def test_command_line(self):
        command = [sys.executable, "-m", "padim_jax.main", "--mode=eval", "--workdir=ftp://a/b"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 2
        assert found.stderr.startswith("error: ftp://a/b: files cannot be reached by ftp://")


class TestListing:
    @both_stores
    def test_same_as_locally(self, store: Any, tmp_path: pathlib.Path):
        for name in ("b/c", "a 1", "B", "d/e/f", ".g/h", "i.png/j"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        remote = upload(tmp_path, f"{store.url}/x")

        def names(folder: paths.Path) -> list[list[str]]:
            return [[path.name for path in part] for part in paths.listing(folder)]

        assert names(remote) == names(tmp_path) == [[".g", "b", "d", "i.png"], ["B", "a 1"]]
        assert contents(remote) == contents(tmp_path)
        assert all(str(path).startswith(store.url) for path in paths.files_below(remote))

    def test_a_folders_own_empty_object_is_none_of_its_files(self, store: Any):
        """As other tools leave them for folders that they show."""
        folder = paths.parse(f"{store.url}/x")
        (folder / "a").write_bytes(b"1")
        store.ls = lambda self, path, detail=True: [
            {"name": "/bucket/x", "size": 0, "type": "file"},
            {"name": "/bucket/x/a", "size": 1, "type": "file"},
        ]
        assert paths.listing(folder) == ([], [folder / "a"])

    def test_what_is_no_folder(self, store: Any):
        file = paths.parse(f"{store.url}/x/a")
        file.write_bytes(b"1")
        with pytest.raises(NotADirectoryError):
            paths.listing(file)
        with pytest.raises(FileNotFoundError):
            paths.listing(file.parent / "b")
        assert paths.is_folder(file.parent)
        assert not paths.is_folder(file)
        assert not paths.is_folder(file.parent / "b")

    def test_a_store_that_refuses_is_not_an_empty_one(self, store: Any):
        store.down = True
        folder = paths.parse(f"{store.url}/x")
        for ask in (paths.listing, paths.is_folder, lambda path: paths.glob(f"{path}/*.png")):
            with pytest.raises(UserError, match=r"x.*: cannot be reached .*no credentials"):
                ask(folder)


class TestWriting:
    def test_a_folder_that_cannot_be_written_to(self, store: Any):
        folder = paths.parse(f"{store.url}/x")
        paths.make_folder(folder)
        assert store.store == {}
        store.full = True
        with pytest.raises(OSError, match="no more room") as error:
            paths.make_folder(folder)
        assert error.value.strerror  # which messages quote

    @both_stores
    def test_write_makes_folders(self, store: Any, tmp_path: pathlib.Path):
        for root in (tmp_path, paths.parse(store.url)):
            paths.write(root / "a/b/c", b"1")
            paths.write(root / "a/b/c", b"23")
            assert contents(root) == {"a/b/c": b"23"}

    def test_a_file_is_replaced_at_the_end_or_not_at_all(
        self, store: Any, tmp_path: pathlib.Path
    ):
        def half_written(growing: pathlib.Path) -> None:
            growing.write_bytes(b"23")
            raise OSError(errno.ENOSPC, "full")

        for root in (tmp_path, paths.parse(store.url)):
            paths.write(root / "a", b"1")
            with pytest.raises(OSError, match="full"), paths.replacing(root / "a") as growing:
                half_written(growing)
            assert contents(root) == {"a": b"1"}
            with paths.replacing(root / "a") as growing:
                growing.write_bytes(b"23")
            assert contents(root) == {"a": b"23"}

    def test_modified(self, store: Any, tmp_path: pathlib.Path):
        for root in (tmp_path, paths.parse(store.url)):
            paths.write(root / "a", b"1")
            # A store's time is in whole seconds, and its clock not the processor's.
            assert abs(paths.modified(root / "a") - time.time()) < 60

    def test_remove_folder(self, store: Any, tmp_path: pathlib.Path):
        for root in (tmp_path, paths.parse(store.url)):
            for name in ("a/b/c", "a/d", "ab"):
                paths.write(root / name, b"1")
            paths.remove_folder(root / "a")
            paths.remove_folder(root / "not there")
            assert contents(root) == {"ab": b"1"}

    def test_move_folder(self, store: Any, tmp_path: pathlib.Path):
        for root in (tmp_path, paths.parse(store.url)):
            for name in ("a/b/c 1", "a/d", "a/sign", "ab"):
                paths.write(root / name, name.encode())
            paths.move_folder(root / "a", root / "e", last="sign")
            found = {"e/b/c 1": b"a/b/c 1", "e/d": b"a/d", "e/sign": b"a/sign", "ab": b"ab"}
            assert contents(root) == found

    def test_a_move_that_is_cut_off_has_no_sign(self, store: Any):
        root = paths.parse(store.url)
        for name in ("a/sign", "a/x", "a/y"):
            paths.write(root / name, b"1")

        def copy(self: Store, path1: str, path2: str, **kwargs: Any) -> None:
            if path1.endswith("y"):
                raise ClientError("gone")
            MemoryFileSystem.cp_file(self, path1, path2, **kwargs)

        store.cp_file = copy
        with pytest.raises(ClientError):
            paths.move_folder(root / "a", root / "b", last="sign")
        assert set(contents(root)) - {"b/x"} == {"a/sign", "a/x", "a/y"}

    def test_errors_of_a_client_are_explained_and_others_are_not(self):
        explained = paths.explanation(ClientError("no credentials"))
        assert explained
        assert "botocore" in explained
        assert "no credentials" in explained
        assert paths.explanation(ValueError("a bug")) is None


class TestDatasets:
    @layouts
    def test_same_records_and_pixels(self, layout: str, store: Any, tmp_path: pathlib.Path):
        DRAWN[layout](tmp_path)
        remote = upload(tmp_path, f"{store.url}/data sets")
        here = LAYOUTS[layout].records(tmp_path, "die Flasche", 0)
        there = LAYOUTS[layout].records(remote, "die Flasche", 0)

        def moved(record: Record) -> Record:
            mask = record.mask and remote / record.mask.relative_to(tmp_path).as_posix()
            image = remote / record.image.relative_to(tmp_path).as_posix()
            return dataclasses.replace(record, image=image, mask=mask)

        assert there == [moved(record) for record in here]
        assert any(record.mask for record in there)
        batches = [
            list(input_pipeline.batches(FolderSource(records), IMAGE, 4))
            for records in (here, there)
        ]
        for a, b in zip(*batches, strict=True):
            np.testing.assert_array_equal(a.images, b.images)
            np.testing.assert_equal(a.masks, b.masks)
        local = input_pipeline.read_image(here[0].image)
        assert input_pipeline.read_image(there[0].image).tobytes() == local.tobytes()
        assert input_pipeline.read_image(str(there[0].image)).tobytes() == local.tobytes()

    @layouts
    def test_no_question_a_file(self, layout: str, store: Any, tmp_path: pathlib.Path):
        asked = []
        for count in (2, 40):
            DRAWN[layout](tmp_path / str(count), count)
            remote = upload(tmp_path / str(count), f"{store.url}/{count}")
            before = store.asked
            LAYOUTS[layout].records(remote, "die Flasche", 0)
            asked.append(store.asked - before)
        assert asked[0] == asked[1]

    @layouts
    def test_mistakes_are_told_as_locally(
        self, layout: str, store: Any, tmp_path: pathlib.Path
    ):
        DRAWN[layout](tmp_path)
        test = {"mvtec_ad": "test", "folder": "val"}[layout]
        masks = {"mvtec_ad": "ground_truth/Riß (tief)/b_mask.png", "folder": "masks/bad/0.png"}
        category = tmp_path / "die Flasche"
        remote = upload(tmp_path, f"{store.url}/x")

        def messages(category: str) -> list[str]:
            found = []
            for root in (tmp_path, remote):
                with pytest.raises(UserError) as error:
                    LAYOUTS[layout].records(root, category, 0)
                found.append(str(error.value).replace(str(root), "ROOT"))
            return found

        def same(category: str = "die Flasche") -> str:
            here, there = messages(category)
            assert here == there
            return here

        assert "no_such" in same("no_such")
        for folder in (category, remote / "die Flasche"):
            extra = folder / test / "good/deeper/a.png"
            paths.write(extra, b"1")
        assert "deeper: holds images, but they are expected in" in same()
        for folder in (category, remote / "die Flasche"):
            paths.remove_folder(folder / test / "good/deeper")
            (folder / masks[layout]).unlink()
        if layout == "mvtec_ad":
            assert "ground-truth mask" in same()
        else:
            for folder in (category, remote / "die Flasche"):
                paths.write(folder / "masks/bad/other.png", b"1")
            assert "no mask for 0.png; no image for other.png" in same()

    def test_masks_of_videos_and_in_folders(self, store: Any, tmp_path: pathlib.Path):
        video = np.zeros((3, 8, 9), np.uint8)
        video[1, 2:5, 3], video[2, 4] = 1, 1
        np.save(tmp_path / "01.npy", video)
        (tmp_path / "000").mkdir()
        for number, mask in enumerate(video):
            Image.fromarray(mask).save(tmp_path / "000" / f"{number:03}.png")
        remote = upload(tmp_path, store.url)
        for name, frame in (("01.npy", 1), ("01.npy", 2), ("000", None)):
            here, there = (
                masks.read(Record("test", root / "a.png", root / name, 1, "x", "a.png", frame))
                for root in (tmp_path, remote)
            )
            assert here == there
            assert here
        missing = Record("test", remote / "a.png", remote / "2.npy", 1, "x", "a.png", 0)
        with pytest.raises(UserError, match=rf"^{store.url}/2.npy: cannot be read"):
            masks.read(missing)

    def test_unreadable_image(self, store: Any):
        image = paths.parse(f"{store.url}/a.png")
        source = FolderSource([Record("test", image, None, 0, "good", "a.png")])
        with pytest.raises(UserError, match=rf"^{store.url}/a.png: cannot be read: .*a.png"):
            list(input_pipeline.batches(source, IMAGE, 1))
        image.write_bytes(b"text")
        with pytest.raises(UserError, match=rf"^{store.url}/a.png: not an image"):
            list(input_pipeline.batches(source, IMAGE, 1))

    def test_made_here_only(self, store: Any):
        root = paths.parse(store.url)
        with pytest.raises(UserError, match=rf"config.dataset.root={store.url}: the synthetic"):
            LAYOUTS["synthetic"].records(root, "part", 0)
        with pytest.raises(UserError, match=f"--download: config.dataset.root={store.url}"):
            download.mvtec_ad(root, "bottle")

    def test_packed_here_from_there(self, store: Any, tmp_path: pathlib.Path):
        draw_mvtec(tmp_path / "source")
        remote = upload(tmp_path / "source", store.url)
        records = LAYOUTS["mvtec_ad"].records(remote, "die Flasche", 0)
        builder = packing.prepare(tmp_path / "packed", records)
        for split in ("train", "test"):
            packed = packing.open_split(builder, split)
            source = FolderSource([record for record in records if record.split == split])
            assert list(packed.records) == list(source.records)
            numbers = range(len(source.records))
            assert [packed.read(i) for i in numbers] == [source.read(i) for i in numbers]

    def test_packed_there(self, store: Any, tmp_path: pathlib.Path, monkeypatch: Any):
        """array_record writes local files, and reads them and gs://."""
        draw_mvtec(tmp_path / "source")
        records = LAYOUTS["mvtec_ad"].records(tmp_path / "source", "die Flasche", 0)
        packing.prepare(tmp_path / "packed/a title", records)
        remote = upload(tmp_path / "packed", store.url)
        monkeypatch.setenv("TFDS_DATA_DIR", store.url)
        if store.url.startswith("s3"):
            with pytest.raises(UserError, match=rf"^config.dataset.tfds_dir={remote}: .*gs://"):
                packing.packed_dir(remote, "a title")
            with pytest.raises(UserError, match=rf"^TFDS_DATA_DIR .*={remote}: "):
                packing.packed_dir(None, "a title")
            return
        for given in (remote, None):
            place = packing.packed_dir(given, "a title")
            for source in (records, None):
                builder = packing.prepare(place, source)
                packed = packing.open_split(builder, "train")
                # Their bytes come by a client of array_record's own.
                assert list(packed.records) == [r for r in records if r.split == "train"]
        with pytest.raises(UserError, match="differ from the 4"):
            packing.prepare(place, records[:4])
        before = contents(remote)
        with pytest.raises(
            UserError, match=r"no packed set in .*other, .* copy its other there"
        ):
            packing.prepare(packing.packed_dir(remote, "other"), records)
        assert contents(remote) == before


def make_scored(root: paths.Path) -> Scored:
    records, masks = LAYOUTS["mvtec_ad"].records(root, "die Flasche", 0)[3:], []
    maps = np.random.default_rng(0).uniform(0, 1, (len(records), 32, 32)).astype(np.float32)
    for record, anomaly_map in zip(records, maps, strict=True):
        square = np.zeros((32, 32), bool)
        square[4:9, 4:9] = record.label == 1
        anomaly_map[square] += 1
        masks.append(square)
    return results.with_pixels(Scored(records, masks, maps, maps.max((1, 2))))


class TestResults:
    @pytest.mark.parametrize(("suffix", "figures"), [("npy", "all"), ("tiff", "some")])
    def test_same_files(self, suffix: str, figures: str, store: Any, tmp_path: pathlib.Path):
        draw_mvtec(tmp_path / "data")
        scored = make_scored(tmp_path / "data")
        config = make_config(**{"outputs.maps": suffix, "outputs.figures": figures})
        measured = results.measure(scored) | {"color_scale": [0.0, 2.0]}
        written = []
        for workdir in (tmp_path / "work dir", paths.parse(f"{store.url}/work dir")):
            paths.make_folder(workdir)
            # Of an earlier run.
            for name in ("figures/old.jpg", "maps/old.npy"):
                paths.write(workdir / name, b"1")
            results.write(
                workdir,
                config,
                scored,
                measured,
                lambda index: np.full((32, 32, 3), index, np.uint8),
            )
            written.append(contents(workdir))
        assert written[0] == written[1]
        names = set(written[1])
        assert {"metrics.json", "scores.csv", "score_histogram.png", "roc_curve.png"} <= names
        assert ("overview.jpg" in names) == (figures == "some")
        assert f"maps/die Flasche/test/good/ö.jpg.{suffix}" in names
        assert not any("old" in name for name in names)

    def test_an_evaluations_thresholds_are_read(self, store: Any):
        path = paths.parse(f"{store.url}/metrics.json")
        assert predictions.read_evaluation(path, "me").image is None
        measured = {
            "detector": "me",
            "image_f1_threshold": 1.5,
            "pixel_f1_threshold": 2.5,
            "color_scale": [0.0, 4.0],
        }
        results.write_json(path, measured)
        assert predictions.read_evaluation(path, "me").image == 1.5


class TestSweep:
    def test_what_is_finished_is_left(
        self, store: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        synthetic.generate(tmp_path / "root", n_train=3, n_test_good=1, n_test_per_defect=1)
        done = []

        def pretend(
            config: Any, workdir: Any, _: Any, backbone: Any, *__: Any
        ) -> dict[str, Any]:
            done.append(workdir)
            read = inputs.read(config, dataset_splits.open_dataset(config), Devices(1))
            paths.write(
                workdir / "config.json", json.dumps(config_lib.to_dict(config)).encode()
            )
            names = ("image_auroc", "pixel_auroc", "aupro", "pixel_ap", "image_f1_max")
            found: dict[str, Any] = dict.fromkeys(names, 0.5)
            found["inputs"] = {**read, "weights": backbone[1].sha256}
            paths.write(workdir / "metrics.json", json.dumps(found).encode())
            return found

        monkeypatch.setattr(train, "train_and_eval", pretend)
        values: Any = defaults.get_config()
        values.dataset.root, values.category, values.repeats = str(tmp_path / "root"), "all", 2
        values.model.weights = "random"
        workdir = paths.parse(f"{store.url}/sweep")
        for overwrite in (False, False, True):
            sweep.run(config_lib.validate(values), workdir, overwrite)
        names = ["part/seed_42", "part/seed_43"]
        assert done == [workdir / name for name in names * 2]
        assert {"table.json", "table.md", "report.html"} <= set(contents(workdir))


class TestPredictions:
    @pytest.mark.parametrize(
        "pattern",
        [
            "",
            "/",
            "/b 1.png",
            "/*.png",
            "/**/*.png",
            "/c/*/*",
            "/c/**/f.*",
            "/[ab]*.png",
            "/?/d.jpg",
        ],
    )
    def test_finds_the_same(self, pattern: str, store: Any, tmp_path: pathlib.Path):
        for name in ("a.png", "b 1.png", "c/d.jpg", "c/e/f.png", "c/e/g.txt", ".h/i.png"):
            paths.write(tmp_path / name, b"1")
        remote = upload(tmp_path, f"{store.url}/x")
        here = listing.find(f"{tmp_path}{pattern}")
        there = listing.find(f"{remote}{pattern}")
        assert [r.relative_path for r in there] == [r.relative_path for r in here]
        assert all(
            record.image == remote / original.image.relative_to(tmp_path).as_posix()
            for record, original in zip(there, here, strict=True)
        )

    def test_paths_of_this_machine(
        self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Relative ones, with spaces, and with ~."""
        paths.write(tmp_path / "a b/~c.png", b"1")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        for pattern, image in {
            "a b": "a b/~c.png",
            "a b/*.png": "a b/~c.png",
            "~/a b": f"{tmp_path}/a b/~c.png",
            "~/a*/*": f"{tmp_path}/a b/~c.png",
        }.items():
            (record,) = listing.find(pattern)
            assert str(record.image) == image
            assert record.relative_path == "~c.png"

    @pytest.mark.parametrize("pattern", ["", "/*.png", "/a.png"])
    def test_nothing_there(self, pattern: str, store: Any):
        with pytest.raises(UserError, match="no image there"):
            listing.find(f"{store.url}/x{pattern}")

    @both_stores
    def test_writes_the_same(self, store: Any, tmp_path: pathlib.Path):
        for number in range(3):
            draw(tmp_path / f"in/a b/{number}.png", number)
        remote = upload(tmp_path / "in", f"{store.url}/in")
        maps = np.random.default_rng(0).uniform(1, 9, (3, 32, 32)).astype(np.float32)
        places = {tmp_path / "in": tmp_path / "out", remote: paths.parse(f"{store.url}/out")}
        config = small.preprocessed(IMAGE, **{"outputs.coco": True})
        written = []
        for source, place in places.items():
            records = listing.find(str(source))
            known = predictions.Thresholds(image=2.0, pixel=8.0)
            paths.make_folder(place)
            with (
                contextlib.closing(predictions.open_journal(place, {})) as journal,
                predictions.Writer(place, config, "npy", known, None, journal) as writer,
            ):
                journal.keep(0)
                for i in range(3):
                    part = slice(i, i + 1)
                    digest = hashlib.sha256(records[i].image.read_bytes()).digest()
                    digests = np.frombuffer(digest, np.uint8)[None]
                    writer.add(records[part], maps[part], maps.max((1, 2))[part], digests)
                    # From the first batch on: a sign whose folder this is.
                    assert contents(place)["scores.csv"].startswith(b"path,score,predicted")
                writer.finish()
            found = contents(place)
            found.pop("journal.sqlite", None)
            written.append(found)
        assert written[0] == written[1]
        rows = list(csv.reader(io.StringIO(written[1]["scores.csv"].decode())))
        assert [row[0] for row in rows] == ["path", "a b/0.png", "a b/1.png", "a b/2.png"]
        assert "overlays/a b/2.png.jpg" in written[1]
        assert {"masks/a b/2.png.png", "regions.json", "regions.coco.json"} <= set(written[1])


def make_model() -> model_file.Model:
    rng = np.random.default_rng(0)
    devices = parallel.every()
    mean = (parallel.split(rng.normal(size=(4, 2, 3)).astype(np.float32), devices),)
    factor = ((parallel.split(rng.normal(size=(4, 2, 3, 3)).astype(np.float32), devices),),)
    return model_file.Model(
        make_config(**{"dataset.root": "/nowhere"}),
        np.arange(3),
        Gaussian(mean, factor),
        WeightsIdentity("somewhere", "0123456789abcdef" * 4),
        "identity",
        np.zeros((3, 32), np.uint8),
    )


class TestModelFile:
    @both_stores
    def test_round_trip(self, store: Any, tmp_path: pathlib.Path):
        model, devices = make_model(), parallel.every()
        written = []
        for path in (tmp_path / "model.safetensors", paths.parse(f"{store.url}/model")):
            model_file.save(path, model, 4)
            model_file.save(path, model, 4)  # again: it is replaced
            loaded = model_file.load(path, devices)
            assert loaded.config == model.config
            pairs = zip(*map(jax.tree.leaves, (loaded.fitted, model.fitted)), strict=True)
            assert all(np.array_equal(a, b) for a, b in pairs)
            written.append(path.read_bytes())
        assert written[0] == written[1]
        assert list(store.store) == ["/bucket/model"]
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_save_that_fails_keeps_the_earlier_file(self, store: Any):
        path, model = paths.parse(f"{store.url}/model"), make_model()
        model_file.save(path, model, 4)
        before = path.read_bytes()
        store.full = True
        with pytest.raises(UserError, match=rf"^{path}: cannot be written \(.*no more room"):
            model_file.save(path, dataclasses.replace(model, identity="other"), 4)
        assert path.read_bytes() == before

    def test_broken_or_missing(self, store: Any):
        path = paths.parse(f"{store.url}/model")
        with pytest.raises(UserError, match=f"^{path}: no model file"):
            model_file.load(path, parallel.every())
        model_file.save(path, make_model(), 4)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(UserError, match=f"^{path}: no model file"):
            model_file.load(path, parallel.every())


@pytest.mark.usefixtures("no_compilation_cache")
class TestCompilationCache:
    @pytest.fixture
    def run(self, store: Any) -> Iterator[Callable[[], list[str]]]:
        config = CacheConfig(paths.parse(f"{store.url}/cache"), 0.0, True)
        events = []

        def listen(event: str, **_: object) -> None:
            if event.startswith("/jax/compilation_cache/cache_"):
                events.append(event.rpartition("_")[2])

        def compute() -> list[str]:
            del events[:]
            with compilation_cache.enabled(config.programs):
                found = jax.jit(lambda x: 2 * x)(np.arange(4, dtype=np.float32))
            assert found.tolist() == [0, 2, 4, 6]
            return [*events]

        jax.monitoring.register_event_listener(listen)
        yield compute
        jax.monitoring.unregister_event_listener(listen)

    def test_second_run_loads_what_the_first_compiled(self, run: Callable, store: Any):
        assert [run(), run()] == [["misses"], ["hits"]]
        assert {name.rpartition("-")[2] for name in store.store} == {"cache"}

    def test_a_store_that_cannot_be_written_to_is_told(
        self, run: Callable, store: Any, capsys: pytest.CaptureFixture[str]
    ):
        store.full = True
        assert run() == []
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"warning: {store.url}/cache/compilation: compiled programs ")
        assert "no more room" in line


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_checkpoints_go_where_orbax_can_write(store: Any):
    with pytest.raises(UserError, match=r"s3://bucket/model: Orbax keeps no checkpoints on s3"):
        checkpoint.check_destination(paths.parse(f"{store.url}/model"))


@pytest.mark.parametrize("store", ["gs"], indirect=True)
def test_a_save_that_was_killed_on_a_store_is_no_checkpoint(store: Any):
    folder = paths.parse(f"{store.url}/run/checkpoint")
    checkpoint.check_destination(folder)
    paths.write(folder / "0" / "_METADATA", b"half")
    checkpoint.check_destination(folder)
    with pytest.raises(UserError, match="is no checkpoint; fit a model first"):
        checkpoint.load(folder, parallel.every())
    assert checkpoint.load_unfinished(folder, parallel.every()) is None
    checkpoint._remove_leftovers(folder)
    assert not paths.is_folder(folder)
    paths.write(folder / "notes.txt", b"mine")
    with pytest.raises(UserError, match="is no checkpoint of padim_jax"):
        checkpoint.check_destination(folder)
