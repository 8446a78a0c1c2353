"""Packed sets: the same bytes and records as the folder's, and never stale or half-made."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from padim_jax.config.settings import ImageConfig
from padim_jax.data import input_pipeline, packing
from padim_jax.data.layouts.mvtec_ad import mvtec_ad
from padim_jax.errors import UserError

CATEGORY = "Flasche groß"
ALIGNED = (0.0, "centre", 0)  # neither turned nor cropped at random


def draw(path: pathlib.Path, rng: np.random.Generator, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def root(tmp_path):
    """A category in MVTec AD's layout whose names are neither ASCII nor without spaces."""
    rng = np.random.default_rng(0)
    base = tmp_path / "source" / CATEGORY
    # 12 images: sorted as text or shuffled by key, 10 and 11 would come before 2.
    for number in range(12):
        draw(base / f"train/good/bild {number:03}.png", rng)
    draw(base / "test/good/ö.jpg", rng)
    draw(base / "test/Kratzer (tief)/日本.png", rng, "L")
    draw(base / "test/Kratzer (tief)/é.png", rng)
    draw(base / "ground_truth/Kratzer (tief)/日本_mask.png", rng, "1")
    draw(base / "ground_truth/Kratzer (tief)/é_mask.png", rng, "L")
    return tmp_path / "source"


@pytest.fixture
def records(root):
    return mvtec_ad(root, CATEGORY)


@pytest.fixture
def packed(tmp_path):
    return tmp_path / "packed sets" / "größe"


def contents(source):
    return [source.read(index) for index in range(len(source.records))]


def split(records, name):
    return [record for record in records if record.split == name]


def files(folder: pathlib.Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_packs_and_reads_the_same_records_and_bytes_in_order(records, packed):
    builder = packing.prepare(packed, records)
    for name in ("train", "test"):
        expected = split(records, name)
        source = packing.open_split(builder, name)
        assert list(source.records) == expected
        # The files as they are: a re-encoded image would give the same pixels at best.
        assert contents(source) == [
            (r.image.read_bytes(), r.mask.read_bytes() if r.mask else None) for r in expected
        ]


def test_batches_are_the_same_from_both_sources(records, packed):
    config = ImageConfig(
        (48, 64), "bicubic", (32, 41), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), *ALIGNED
    )
    builder = packing.prepare(packed, records)
    for name in ("train", "test"):
        sources = (
            input_pipeline.FolderSource(split(records, name)),
            packing.open_split(builder, name),
        )
        pairs = zip(*(input_pipeline.batches(s, config, 5) for s in sources), strict=True)
        for one, other in pairs:
            np.testing.assert_array_equal(one.images, other.images)
            np.testing.assert_array_equal(one.valid, other.valid)
            assert one.records == other.records
            assert one.sizes == other.sizes
            for mask, other_mask in zip(one.masks, other.masks, strict=True):
                np.testing.assert_array_equal(mask, other_mask)


def test_packs_once(records, packed):
    packing.prepare(packed, records)
    before = files(packed)
    builder = packing.prepare(packed, records)
    assert files(packed) == before
    assert list(packing.open_split(builder, "test").records) == split(records, "test")


def test_a_packed_set_needs_no_source_folder(root, records, packed):
    test = split(records, "test")
    packing.prepare(packed, records)
    expected = contents(input_pipeline.FolderSource(test))
    shutil.rmtree(root)
    moved = packed.rename(packed.with_name("elsewhere"))
    source = packing.open_split(packing.prepare(moved, None), "test")
    assert list(source.records) == test
    assert contents(source) == expected


def repaint(base):
    path = base / "train/good/bild 003.png"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # same name, same size
    path.write_bytes(data)


def repaint_mask(base):
    draw(base / "ground_truth/Kratzer (tief)/é_mask.png", np.random.default_rng(9), "L")


def add_image(base):
    shutil.copy(base / "train/good/bild 000.png", base / "train/good/bild 012.png")


def rename_image(base):
    (base / "train/good/bild 003.png").rename(base / "train/good/bild 003b.png")


@pytest.mark.parametrize("change", [repaint, repaint_mask, add_image, rename_image])
def test_a_source_that_changed_is_noticed(root, records, packed, change):
    packing.prepare(packed, records)
    before = files(packed)
    change(root / CATEGORY)
    changed = mvtec_ad(root, CATEGORY)
    with pytest.raises(UserError) as caught:
        packing.prepare(packed, changed)
    message = str(caught.value)
    assert str(packed) in message
    assert f"packed from 15 images that differ from the {len(changed)}" in message
    assert f"Move {packed} away" in message
    assert files(packed) == before  # and the old one is left as it was
    shutil.rmtree(packed)
    builder = packing.prepare(packed, changed)
    assert list(packing.open_split(builder, "train").records) == split(changed, "train")


def test_a_mask_that_went_is_noticed(records, packed):
    packing.prepare(packed, records)
    without = [dataclasses.replace(record, mask=None) for record in records]
    with pytest.raises(UserError, match="differ"):
        packing.prepare(packed, without)


def test_a_source_of_equal_files_elsewhere_is_the_same(root, records, packed):
    # The path of the root is no content: the data may lie elsewhere on another machine.
    packing.prepare(packed, records)
    copy = shutil.copytree(root, root.with_name("copy"))
    packing.prepare(packed, mvtec_ad(copy, CATEGORY))


def test_nothing_packed_and_no_source(packed):
    with pytest.raises(UserError, match="no packed set") as caught:
        packing.prepare(packed, None)
    for text in (str(packed), "config.dataset.root", "config.dataset.tfds_dir"):
        assert text in str(caught.value)
    assert not packed.exists()


def test_a_set_for_fitting_only(records, packed):
    train = split(records, "train")
    builder = packing.prepare(packed, train)
    assert list(packing.open_split(builder, "train").records) == train
    assert list(packing.open_split(builder, "test").records) == []


def test_an_image_without_a_known_mask_stays_so(records, packed):
    test = [dataclasses.replace(record, mask=None) for record in split(records, "test")]
    source = packing.open_split(packing.prepare(packed, test), "test")
    assert [mask for _, mask in contents(source)] == [None] * 3


def test_a_broken_image_fails_as_from_the_folder(records, packed):
    config = ImageConfig((32, 32), "nearest", None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), *ALIGNED)
    test = split(records, "test")
    test[0].image.write_bytes(b"")
    test[1].mask.write_bytes(b"")  # must not be taken for "no mask"
    source = packing.open_split(packing.prepare(packed, test), "test")
    for index, name in ((0, test[0].image), (1, test[1].mask)):
        messages = set()
        for either in (source, input_pipeline.FolderSource(test)):
            with pytest.raises(UserError) as caught:
                input_pipeline.load_image(either, config, index)
            messages.add(str(caught.value))
        assert len(messages) == 1
        assert str(name) in messages.pop()


def test_a_file_that_cannot_be_read_is_named(records, packed):
    path = records[3].image
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="a folder, not an image file") as caught:
        packing.prepare(packed, records)
    assert str(path) in str(caught.value)


def fail_after(count, failure):
    """A generator that gives `count` examples and then fails."""
    complete = packing.PadimDataset._generate_examples

    def examples(self, records):
        for number, example in enumerate(complete(self, records)):
            if number == count:
                failure()
            yield example

    return examples


def test_an_interrupted_preparation_is_no_packed_set(records, packed, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        examples = fail_after(7, interrupt)
        patch.setattr(packing.PadimDataset, "_generate_examples", examples)
        with pytest.raises(KeyboardInterrupt):
            packing.prepare(packed, records)
    with pytest.raises(UserError, match="no packed set"):
        packing.prepare(packed, None)
    builder = packing.prepare(packed, records)
    assert list(packing.open_split(builder, "train").records) == split(records, "train")


def test_half_a_copy_is_no_packed_set(records, packed):
    builder = packing.prepare(packed, records)
    (pathlib.Path(builder.data_path) / "dataset_info.json").unlink()
    for source in (records, None):
        with pytest.raises(UserError, match="incomplete packed set") as caught:
            packing.prepare(packed, source)
        assert f"move {packed} away" in str(caught.value)


def test_default_folder_is_that_of_tfds(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert packing.packed_dir(None, "mvtec_ad_bottle") == tmp_path / "mvtec_ad_bottle"
    monkeypatch.delenv("TFDS_DATA_DIR")
    home = pathlib.Path.home()
    expected = home / "tensorflow_datasets/mvtec_ad_bottle"
    assert packing.packed_dir(None, "mvtec_ad_bottle") == expected
    assert packing.packed_dir(pathlib.Path("~/x"), "y") == home / "x/y"


def python(code: str, *arguments: pathlib.Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_tensorflow_is_not_imported(root, packed):
    done = python(
        f"""
        import pathlib, sys
        from padim_jax.data import packing as tfds_builder
        from padim_jax.data.layouts.mvtec_ad import mvtec_ad

        records = mvtec_ad(pathlib.Path(sys.argv[1]), {CATEGORY!r})
        builder = tfds_builder.prepare(pathlib.Path(sys.argv[2]), records)
        source = tfds_builder.open_split(builder, "test")
        assert source.read(1)[0] == source.records[1].image.read_bytes()
        assert "tensorflow" not in sys.modules
        assert "jax" not in sys.modules
        """,
        root,
        packed,
    )
    assert done.returncode == 0, done.stderr


def test_a_killed_preparation_is_no_packed_set(root, records, packed):
    done = python(
        f"""
        import os, pathlib, sys
        sys.path.insert(0, sys.argv[3])
        from test_packing import fail_after
        from padim_jax.data import packing as tfds_builder
        from padim_jax.data.layouts.mvtec_ad import mvtec_ad

        examples = fail_after(7, lambda: os._exit(9))  # nothing is cleaned up
        tfds_builder.PadimDataset._generate_examples = examples
        records = mvtec_ad(pathlib.Path(sys.argv[1]), {CATEGORY!r})
        tfds_builder.prepare(pathlib.Path(sys.argv[2]), records)
        """,
        root,
        packed,
        pathlib.Path(__file__).parent,
    )
    assert done.returncode == 9, done.stderr
    assert any(packed.rglob("*"))  # what it left behind
    with pytest.raises(UserError, match="no packed set"):
        packing.prepare(packed, None)
    builder = packing.prepare(packed, records)
    assert list(packing.open_split(builder, "train").records) == split(records, "train")


def test_a_strangers_metadata_are_not_trusted(root, records, packed):
    """Maps and pictures are called after the images, in the workdir."""
    packing.prepare(packed, records)
    shutil.rmtree(root)  # as a set from elsewhere
    (path,) = packed.rglob("metadata.json")
    whole = json.loads(path.read_text(encoding="utf-8"))

    def refused(message: str, **more: object) -> None:
        path.write_text(json.dumps(more), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            packing.open_split(packing.prepare(packed, None), "test")

    first, *others = whole["records"]
    for name in ("../a.png", "test/../../a.png", "/etc/a.png"):
        refused("which leads out of", records=[*others, {**first, "relative_path": name}])
    for wrong in ("text", {}, {**first, "more": 1}, {**first, "label": 2}):
        refused("a damaged packed set", records=[wrong, *others])
    refused("a damaged packed set", records=[{**first, "image": 7}])
    refused("a damaged packed set", records={})
    refused("a damaged packed set")


ON_A_FULL_DISK = """
import pathlib, subprocess, sys
from padim_jax.data import packing as tfds_builder
from padim_jax.data.layouts.mvtec_ad import mvtec_ad
from padim_jax.errors import UserError

place, category = pathlib.Path(sys.argv[2]), sys.argv[3]
records = mvtec_ad(pathlib.Path(sys.argv[1]), category)
options = ""
for size in sys.argv[4:]:
    mount = ["mount", "-t", "tmpfs", "-o", f"{options}size={size}k", "none", place]
    subprocess.run(mount, check=True)
    options = "remount,"
    try:
        source = tfds_builder.open_split(tfds_builder.prepare(place / "set", records), "train")
        read = [source.read(i)[0] for i in range(len(source.records))]
        print(read == [record.image.read_bytes() for record in source.records], len(read))
    except UserError as error:
        print(error)
        print([path.name for path in place.rglob("*") if path.is_file()])
"""


def test_a_disk_that_fills_up(root, tmp_path):
    """A real one, in memory, too small by more and by less: all is packed, or nothing."""
    namespace = ["unshare", "--map-root-user", "--mount"]
    try:
        subprocess.run([*namespace, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system does not let its users mount file systems")
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = [root, disk, CATEGORY, "8", "64", "100", "4000"]
    done = subprocess.run(
        [*namespace, sys.executable, "-c", ON_A_FULL_DISK, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if "prepar" not in line]  # TFDS's
    refused = (
        f"{disk / 'set'}: cannot be read or written: No space left on device; make room "
        "there. Nothing is packed yet"
    )
    assert lines == [*(refused, "['set.lock']") * 3, "True 12"]
