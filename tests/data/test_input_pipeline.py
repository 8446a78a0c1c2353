"""Decoding, resizing, cropping and batching against plain Pillow and NumPy."""

import concurrent.futures
import dataclasses
import errno
import hashlib
import io
import os
import pathlib
import struct
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from padim_jax.config.settings import ImageConfig
from padim_jax.data import decoding, files, input_pipeline
from padim_jax.data.image_cache import ImageCache
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.layouts.mvtec_ad import mvtec_ad
from padim_jax.data.records import Record
from padim_jax.errors import MachineError, UserError

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def image_config(
    resize=(40, 56), method="bilinear", crop=None, rotation=0.0, crop_at="centre", seed=0
):
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return ImageConfig(resize, method, crop, mean, std, rotation, crop_at, seed)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def record(path, mask=None, label=0):
    return Record("test", path, mask, label, "bad" if label else "good", path.name)


def save(path, pixels):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path)
    return path


def run(records, config, batch_size, cache=None, **part):
    source = input_pipeline.FolderSource(records)
    return list(input_pipeline.batches(source, config, batch_size, cache, **part))


def load_one(path, config, **known):
    """The only image of a dataset of one, as a batch."""
    (batch,) = run([record(path, **known)], config, 1)
    return batch


def reference(pixels, config, resample):
    """Pillow takes (width, height); torchvision's crop starts at int(round(rest / 2))."""
    height, width = config.resize
    resized = np.array(Image.fromarray(pixels).resize((width, height), resample))
    if config.crop is None:
        return resized
    top = int(round((height - config.crop[0]) / 2.0))  # noqa: RUF046 - as torchvision has it
    left = int(round((width - config.crop[1]) / 2.0))  # noqa: RUF046
    return resized[top : top + config.crop[0], left : left + config.crop[1]]


@pytest.mark.parametrize("method", RESAMPLING)
@pytest.mark.parametrize("crop", [None, (128, 256)])
def test_pixels_are_pillows(tmp_path, method, crop):
    config = image_config((192, 320), method, crop)
    pixels = noise(230, 150)  # one side shrinks, the other grows
    batch = load_one(save(tmp_path / "a.png", pixels), config)
    assert batch.images.dtype == np.uint8
    assert batch.images.shape == (1, *(crop or (192, 320)), 3)
    np.testing.assert_array_equal(
        batch.images[0], reference(pixels, config, RESAMPLING[method])
    )


# Half-way offsets go to the even number: 0.5 to 0, 1.5 to 2, 2.5 to 2.
@pytest.mark.parametrize(
    ("rest", "offset"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4)]
)
def test_crop_starts_where_torchvisions_does(tmp_path, rest, offset):
    config = image_config((32 + rest, 64), "nearest", (32, 64 - rest))
    pixels = noise(32 + rest, 64)
    mask = (pixels[..., 0] > 99).astype(np.uint8) * 255
    known = {"mask": save(tmp_path / "mask.png", mask), "label": 1}
    batch = load_one(save(tmp_path / "a.png", pixels), config, **known)
    inside = np.s_[offset : offset + 32, offset : offset + 64 - rest]
    np.testing.assert_array_equal(batch.images[0], pixels[inside])
    np.testing.assert_array_equal(batch.masks[0], mask[inside] > 0)
    assert input_pipeline.crop_offset(config) == (offset, offset)


def test_masks_are_resized_nearest_and_cut_above_127(tmp_path):
    config = image_config((96, 160), "lanczos", (64, 128))
    mask = np.random.default_rng(1).choice(
        np.array([0, 126, 127, 128, 255], np.uint8), (70, 90)
    )
    known = {"mask": save(tmp_path / "mask.png", mask), "label": 1}
    batch = load_one(save(tmp_path / "a.png", noise(70, 90)), config, **known)
    # Nearest takes the source pixel under the destination pixel's centre.
    rows = np.floor((np.arange(96) + 0.5) * 70 / 96).astype(int)
    columns = np.floor((np.arange(160) + 0.5) * 90 / 160).astype(int)
    expected = (mask > 127)[np.ix_(rows, columns)][16:80, 16:144]
    assert batch.masks[0] is not None
    assert batch.masks[0].dtype == bool
    np.testing.assert_array_equal(batch.masks[0], expected)


def test_one_bit_masks(tmp_path):
    mask = np.zeros((40, 56), bool)
    mask[3:9, 20:31] = True
    known = {"mask": save(tmp_path / "mask.png", mask), "label": 1}
    batch = load_one(save(tmp_path / "a.png", noise(40, 56)), image_config(), **known)
    np.testing.assert_array_equal(batch.masks[0], mask)


@pytest.mark.parametrize("crop", [None, (32, 40)])
def test_masks_of_normal_images_are_empty_and_of_others_unknown(tmp_path, crop):
    config = image_config(crop=crop)
    path = save(tmp_path / "a.png", noise(20, 30))
    (batch,) = run([record(path, label=0), record(path, label=1)], config, 2)
    np.testing.assert_array_equal(batch.masks[0], np.zeros(config.size, bool))
    assert batch.masks[1] is None


@pytest.fixture
def numbered(tmp_path):
    """Eleven images of different sizes; image k is filled with k."""
    records = []
    for number in range(11):
        pixels = np.full((30 + 3 * number, 60 - 2 * number, 3), number, np.uint8)
        path = save(tmp_path / f"{number}.png", pixels)
        records.append(record(path, label=number % 2))
    return records


@pytest.mark.parametrize("batch_size", [1, 2, 3, 11, 16])
def test_batches_keep_the_order_and_pad_the_last(numbered, batch_size):
    found = run(numbered, image_config(), batch_size)
    assert len(found) == -(-11 // batch_size)
    assert {batch.images.shape for batch in found} == {(batch_size, 40, 56, 3)}
    assert [r for batch in found for r in batch.records] == numbered
    sizes = [size for batch in found for size in batch.sizes]
    assert sizes == [(30 + 3 * number, 60 - 2 * number) for number in range(11)]
    assert [mask is None for batch in found for mask in batch.masks] == [
        r.label == 1 for r in numbered
    ]
    valid = np.concatenate([batch.valid for batch in found])
    np.testing.assert_array_equal(valid, np.arange(len(valid)) < 11)
    images = np.concatenate([batch.images for batch in found])
    filled = np.where(valid, np.arange(len(valid)), 0).astype(np.uint8)  # padding is 0
    np.testing.assert_array_equal(
        images, np.broadcast_to(filled[:, None, None, None], images.shape)
    )


def test_no_images_give_no_batches():
    assert run([], image_config(), 4) == []


class Counting:
    """A source that notes which images are read."""

    def __init__(self, records):
        self.records, self.reads = records, []

    def read(self, index):
        self.reads.append(index)
        return input_pipeline.FolderSource(self.records).read(index)


@pytest.mark.parametrize("start", [0, 4, 10])
@pytest.mark.parametrize("images", [1, 6, 11])
@pytest.mark.parametrize(("processes", "batch_size"), [(1, 4), (2, 4), (3, 3), (3, 6), (2, 24)])
class TestShares:
    """Processes that take a part of every batch each: side by side they are the batches."""

    def test_together_they_are_the_batches(
        self, numbered, images, processes, batch_size, start
    ):
        sources = [Counting(numbered[:images]) for _ in range(processes)]
        parts = [
            list(
                input_pipeline.batches(
                    source,
                    image_config(),
                    batch_size,
                    share=input_pipeline.Share(process, processes),
                    start=start,
                )
            )
            for process, source in enumerate(sources)
        ]
        expected = run(numbered[start:images], image_config(), batch_size)
        # Equally many for every process: each batch is computed by all of them together.
        assert {len(part) for part in parts} == {len(expected)}
        for number, whole in enumerate(expected):
            found = [part[number] for part in parts]
            for one in found:
                assert len(one.images) == len(one.valid) == batch_size // processes
                assert len(one.digests) == batch_size // processes
                assert len(one.records) == len(one.masks) == len(one.sizes) == sum(one.valid)
            for name in ("images", "valid", "digests"):
                together = np.concatenate([getattr(one, name) for one in found])
                np.testing.assert_array_equal(together, getattr(whole, name))
            for name in ("records", "sizes"):
                assert sum((getattr(one, name) for one in found), ()) == getattr(whole, name)
            masks = sum((one.masks for one in found), ())
            for mask, expected_mask in zip(masks, whole.masks, strict=True):
                np.testing.assert_array_equal(mask, expected_mask)
        # Each reads its own images only.
        for source, part in zip(sources, parts, strict=True):
            read = [source.records[index] for index in sorted(source.reads)]
            assert read == [r for batch in part for r in batch.records]
        every = sorted(index for source in sources for index in source.reads)
        assert every == list(range(start, images))


def test_a_process_past_the_end_has_a_batch_of_padding(numbered):
    share = input_pipeline.Share(1, 2)
    (batch,) = run(numbered[:3], image_config(), 8, share=share)
    assert batch.images.shape == (4, 40, 56, 3)
    assert not np.any(batch.images)
    assert not np.any(batch.valid)
    assert not np.any(batch.digests)
    assert (batch.records, batch.masks, batch.sizes) == ((), (), ())


@pytest.mark.parametrize("cached", [False, True])
def test_digests_are_the_files(numbered, cached, tmp_path):
    cache = ImageCache(tmp_path / "cache", 10**9) if cached else None
    for _ in range(2):  # decoded, and out of the cache
        found = np.concatenate([b.digests for b in run(numbered, image_config(), 4, cache)])
        expected = [hashlib.sha256(r.image.read_bytes()).digest() for r in numbered]
        assert [digest.tobytes() for digest in found] == [*expected, bytes(32)]


def test_digests_are_of_the_image_not_of_its_mask(tmp_path):
    image, mask = save(tmp_path / "a.png", noise(40, 56)), tmp_path / "mask.png"
    found = []
    for value in (0, 255):
        save(mask, np.full((40, 56), value, np.uint8))
        found.append(load_one(image, image_config(), mask=mask, label=1).digests)
    np.testing.assert_array_equal(found[0], found[1])


def test_one_image_is_as_in_its_batch(numbered):
    config = image_config((40, 57), "bicubic", (32, 32))
    source = input_pipeline.FolderSource(numbered)
    batch = next(iter(input_pipeline.batches(source, config, 11)))
    for index in (0, 10):
        one = input_pipeline.load_image(source, config, index)
        np.testing.assert_array_equal(one, batch.images[index])


def named(number):
    return f"bottle/test/good/{number:03}.png"


@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [
        (image_config((256, 256)), (900, 900), 1.0),
        (image_config((256, 256)), (64, 128), 2.0),
        (image_config((64, 128)), (300, 300), 1.0),
        (image_config((256, 256), crop=(224, 224)), (100, 300), 3.0),
        (image_config((200, 200), crop=(100, 200)), (50, 50), 2.0),
    ],
)
def test_aspect(config, size, expected):
    assert input_pipeline.aspect(config, size) == pytest.approx(expected)


class TestView:
    """Random views: Rd-MVTec AD of the paper, section IV-A."""

    CONFIG = image_config((256, 256), "bicubic", (224, 224), 10.0, "random")

    def change(self, **values):
        return dataclasses.replace(self.CONFIG, **values)

    def test_depends_on_seed_and_name_alone(self):
        seen = [
            input_pipeline.view(self.change(seed=seed), named(number))
            for seed in range(5)
            for number in range(100)
        ]
        assert len(set(seen)) == 500
        other = self.change(method="nearest", mean=(1.0, 1.0, 1.0))
        assert [input_pipeline.view(other, named(n)) for n in range(100)] == seen[:100]
        # Angle and place are drawn apart: the one does not move with the other's setting.
        for number in range(20):
            turned = input_pipeline.view(self.change(crop_at="centre"), named(number))
            placed = input_pipeline.view(self.change(rotation=0.0), named(number))
            assert turned == (seen[number].angle, 16, 16)
            assert placed == (0.0, *seen[number][1:])

    def test_stays_as_it_is(self):
        # A published seed gives the published views, in every process and version.
        found = input_pipeline.view(self.CONFIG, "bottle/test/good/000.png")
        digest = hashlib.sha256(b"0 bottle/test/good/000.png").digest()
        first, second, third = struct.unpack("<QQQ", digest[:24])
        assert found.angle == pytest.approx(20 * first / 2**64 - 10, abs=1e-12)
        assert found[1:] == (second * 33 // 2**64, third * 33 // 2**64)

    def test_is_uniform(self):
        seen = np.array([input_pipeline.view(self.CONFIG, named(n)) for n in range(20_000)])
        angles, corners = seen[:, 0], seen[:, 1:].astype(int)
        assert np.all(np.abs(angles) < 10)
        # Kolmogorov-Smirnov: exceeds 1.95 / sqrt(n) once in a thousand draws.
        gaps = np.sort(angles) - np.linspace(-10, 10, len(angles))
        assert np.abs(gaps).max() / 20 < 1.95 / len(angles) ** 0.5
        for side in corners.T:  # chi-squared with 32 degrees of freedom: as rarely above 62.5
            counts = np.bincount(side, minlength=33)
            assert len(counts) == 33  # from 0 to 256 - 224
            expected = len(side) / 33
            assert np.sum((counts - expected) ** 2 / expected) < 62.5
        # Apart from each other, within 3.3 standard deviations.
        correlations = np.corrcoef(np.column_stack([angles, corners]), rowvar=False)
        assert np.abs(correlations[np.triu_indices(3, 1)]).max() < 3.3 / len(angles) ** 0.5

    def test_names_that_are_no_text(self):
        name = os.fsdecode(b"caf\xe9.png")
        assert input_pipeline.view(self.CONFIG, name) != self.view_of("café.png")

    def view_of(self, name):
        return input_pipeline.view(self.CONFIG, name)

    @pytest.mark.parametrize("crop", [None, (32, 24)])
    def test_off_it_is_the_centre(self, crop):
        config = image_config((40, 57), crop=crop, seed=3)
        seen = {input_pipeline.view(config, named(number)) for number in range(20)}
        assert seen == {(0.0, *input_pipeline.crop_offset(config))}
        on = dataclasses.replace(config, rotation=5.0, crop_at="random" if crop else "centre")
        found = input_pipeline.centred(on)
        assert {input_pipeline.view(found, named(number)) for number in range(9)} == seen


def turned_by_hand(pixels, angle):
    """Nearest: each pixel's source, about the centre of the image; black outside."""
    height, width = pixels.shape
    y, x = np.mgrid[:height, :width]
    y, x = y + 0.5 - height / 2, x + 0.5 - width / 2
    radians = np.deg2rad(angle)  # counter-clockwise as one sees it, y pointing down
    source_x = np.cos(radians) * x - np.sin(radians) * y + width / 2
    source_y = np.sin(radians) * x + np.cos(radians) * y + height / 2
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    rows, columns = source_y.clip(0, height - 1), source_x.clip(0, width - 1)
    return np.where(inside, pixels[rows.astype(int), columns.astype(int)], 0)


class TestViews:
    """Images and masks in them."""

    CONFIG = image_config((64, 80), "nearest", (48, 56), 30.0, "random", seed=1)

    def dataset(self, folder, count=6):
        """Images of black and white, and the same as their masks; of different sizes."""
        records = []
        for number in range(count):
            size = (50 + 9 * number, 70 + 5 * number)
            pixels = np.kron(noise(7, 7, number)[..., 0] > 127, np.ones((20, 20), bool))
            image = Image.fromarray(np.where(pixels, 255, 0).astype(np.uint8))
            path = save(folder / f"{number}.png", image.resize(size, RESAMPLING["nearest"]))
            records.append(record(path, path, label=1))
        return records

    def test_masks_move_with_their_images(self, tmp_path):
        records = self.dataset(tmp_path)
        (batch,) = run(records, self.CONFIG, len(records))
        for image, mask in zip(batch.images, batch.masks, strict=True):
            np.testing.assert_array_equal(image, np.where(mask, 255, 0)[..., None].repeat(3, 2))
        centred = input_pipeline.centred(self.CONFIG)
        (plain,) = run(records, centred, len(records))
        for image, still in zip(batch.images, plain.images, strict=True):
            assert np.mean(image != still) > 0.1

    def test_turned_about_the_centre_then_cropped(self, tmp_path):
        records = self.dataset(tmp_path)
        (batch,) = run(records, self.CONFIG, len(records))
        for one, image in zip(records, batch.images, strict=True):
            angle, top, left = input_pipeline.view(self.CONFIG, one.relative_path)
            with Image.open(one.image) as opened:
                resized = np.asarray(opened.resize((80, 64), Image.Resampling.NEAREST))
            turned = turned_by_hand(resized, angle)
            expected = turned[top : top + 48, left : left + 56]
            # Sources within rounding of a pixel's edge may be taken from either side.
            assert np.mean(image[..., 0] != expected) < 0.005

    @pytest.mark.parametrize("method", RESAMPLING)
    def test_filters(self, method):
        config = image_config((64, 80), method, (48, 56), 30.0, "random")
        pixels = noise(70, 90)
        view = input_pipeline.View(-17.25, 3, 11)
        found = input_pipeline.preprocess(Image.fromarray(pixels), config, view)
        resized = Image.fromarray(pixels).resize((80, 64), RESAMPLING[method])
        by = RESAMPLING["bicubic" if method == "lanczos" else method]
        turned = np.asarray(resized.rotate(-17.25, by, fillcolor=(0, 0, 0)))
        np.testing.assert_array_equal(found, turned[3:51, 11:67])
        # New images are seen as they are.
        plain = input_pipeline.preprocess(Image.fromarray(pixels), config)
        np.testing.assert_array_equal(plain, np.asarray(resized)[8:56, 12:68])

    def test_every_way_to_an_image_shows_the_same(self, tmp_path):
        records = self.dataset(tmp_path, 5)
        (batch,) = run(records, self.CONFIG, 5)
        source = input_pipeline.FolderSource(records)
        for index in (0, 4):
            one = input_pipeline.load_image(source, self.CONFIG, index)
            np.testing.assert_array_equal(one, batch.images[index])
        (back,) = run(records[::-1], self.CONFIG, 5)
        np.testing.assert_array_equal(back.images, batch.images[::-1])

    def test_the_cache_keeps_views_apart(self, tmp_path):
        records = self.dataset(tmp_path, 3)
        cache = ImageCache(tmp_path / "cache", 10**9)
        entries = 0
        for config, more in [
            (self.CONFIG, 3),
            (self.CONFIG, 0),
            (dataclasses.replace(self.CONFIG, seed=2), 3),
            (input_pipeline.centred(self.CONFIG), 3),
            # Whatever the seed: there is nothing to draw.
            (dataclasses.replace(input_pipeline.centred(self.CONFIG), seed=7), 0),
        ]:
            (expected,) = run(records, config, 3)
            for _ in range(2):
                (found,) = run(records, config, 3, cache)
                np.testing.assert_array_equal(found.images, expected.images)
                np.testing.assert_array_equal(np.stack(found.masks), np.stack(expected.masks))
            entries += more
            assert len(list((tmp_path / "cache").iterdir())) == entries


class TestFaults:
    """What is wrong with images (`config.dataset.skip_bad`), and what is not."""

    @pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE])
    def test_a_fault_of_the_machine_is_none_of_an_image(self, number, numbered, monkeypatch):
        source = input_pipeline.FolderSource(numbered)
        opened = os.open

        def failing(path, *args):
            if path == numbered[1].image:
                raise OSError(number, os.strerror(number))
            return opened(path, *args)

        monkeypatch.setattr(files.os, "open", failing)
        with pytest.raises(MachineError, match=r"cannot be read: "):
            list(input_pipeline.faults(source, image_config(), [0, 1]))

    def test_a_file_that_may_not_be_read_cannot_be_used(self, numbered, monkeypatch):
        def failing(path, *_):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)

        source = input_pipeline.FolderSource(numbered)
        monkeypatch.setattr(files.os, "open", failing)
        (reason,) = input_pipeline.faults(source, image_config(), [0])
        assert reason is not None
        assert "cannot be read: Permission denied" in reason

    def test_too_little_memory_is_none_either(self, numbered, monkeypatch):
        def exhausted(*_):
            raise MemoryError

        source = input_pipeline.FolderSource(numbered)
        monkeypatch.setattr(input_pipeline, "open_rgb", exhausted)
        with pytest.raises(MemoryError):
            list(input_pipeline.faults(source, image_config(), [0]))

    def test_of_a_file(self, numbered, tmp_path):
        (tmp_path / "link.png").symlink_to("nowhere")
        (tmp_path / "loop.png").symlink_to("loop.png")
        (tmp_path / "folder.png").mkdir()
        (tmp_path / "text.png").write_text("no image")
        names = ["link.png", "loop.png", "folder.png", "text.png", "text.png/a.png"]
        records = [record(tmp_path / name) for name in names]
        source = input_pipeline.FolderSource([*records, numbered[0]])
        *bad, good = input_pipeline.faults(source, image_config(), range(len(names) + 1))
        assert all(bad)
        assert good is None

    @pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
    def test_a_decoder_without_memory_does_not_call_a_file_broken(self, tmp_path):
        """Of libwebp's want of memory Pillow says "could not create decoder object"."""
        path = tmp_path / "a.webp"
        Image.fromarray(noise(3000, 4000)).save(path, method=0)
        code = f"""
import pathlib, resource
import psutil
from padim_jax.data.decoding import open_rgb
from padim_jax.errors import UserError
data = pathlib.Path({os.fspath(path)!r}).read_bytes()
mapped = psutil.Process().memory_info().vms
outcomes = []
for room in range(0, 200_000_000, 20_000_000):
    resource.setrlimit(resource.RLIMIT_AS, (mapped + room, -1))
    try:
        open_rgb(data, "a.webp")
    except (MemoryError, UserError) as error:
        outcomes.append(type(error).__name__)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
open_rgb(data, "a.webp")
print(len(outcomes) > 2, set(outcomes))
"""
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == "True {'MemoryError'}\n"


class TestWarm:
    """Decoding ahead, into the cache."""

    def test_leaves_nothing_to_decode(self, numbered, tmp_path, monkeypatch):
        cache = ImageCache(tmp_path / "cache", 10**9)
        config = image_config((40, 56), "bilinear", (32, 48), 10.0, "random")
        expected = run(numbered, config, 4)
        input_pipeline.warm(
            input_pipeline.FolderSource(numbered), config, cache, threading.Event()
        )
        monkeypatch.setattr(Image, "open", None)
        for one, other in zip(run(numbered, config, 4, cache), expected, strict=True):
            np.testing.assert_array_equal(one.images, other.images)

    def test_stops_when_asked(self, numbered, tmp_path):
        stop = threading.Event()

        class Stopping(Counting):
            def read(self, index):
                if len(self.reads) == 3:
                    stop.set()
                return super().read(index)

        cache, source = ImageCache(tmp_path / "cache", 10**9), Stopping(10 * numbered)
        input_pipeline.warm(source, image_config(), cache, stop)
        in_hand = max(1, input_pipeline._threads() // 4)
        assert 3 < len(source.reads) <= 3 + in_hand
        before = len(source.reads)
        input_pipeline.warm(source, image_config(), cache, stop)  # it is set already
        assert len(source.reads) == before

    def test_leaves_unreadable_images_to_who_needs_them(self, numbered, tmp_path):
        numbered[4].image.write_bytes(b"text")
        cache = ImageCache(tmp_path / "cache", 10**9)
        source = input_pipeline.FolderSource(numbered)
        input_pipeline.warm(source, image_config(), cache, threading.Event())
        assert len(list((tmp_path / "cache").iterdir())) == 10
        with pytest.raises(UserError, match=r"4\.png: not an image"):
            run(numbered, image_config(), 4, cache)

    def test_leaves_half_of_the_cache(self, numbered, tmp_path):
        size = 40 * 56 * 3
        cache = ImageCache(tmp_path / "cache", 9 * size)
        source = Counting(numbered)
        input_pipeline.warm(source, image_config(), cache, threading.Event())
        assert sorted(source.reads) == [0, 1, 2, 3]

    def test_gives_this_threads_priority_to_no_one(self, numbered, tmp_path):
        before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        cache = ImageCache(tmp_path / "cache", 10**9)
        source = input_pipeline.FolderSource(numbered)
        input_pipeline.warm(source, image_config(), cache, threading.Event())
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def on_white(pixels, alpha):
    opacity = alpha[..., None] / 255
    return np.floor(pixels * opacity + 255 * (1 - opacity) + 0.5).astype(np.uint8)


def palette_image(pixels):
    """Grey levels as indices into a palette that maps v to (255 - v, v, 7)."""
    image = Image.fromarray(pixels)
    image.putpalette([part for v in range(256) for part in (255 - v, v, 7)])
    return image


def colour_modes():
    """Name -> (image, its expected RGB, what to save it as)."""
    rgb = noise(8, 9)
    grey = rgb[..., 0]
    alpha = noise(8, 9, seed=1)[..., 0]
    repeated = np.repeat(grey[..., None], 3, axis=2)
    indexed = np.stack([255 - grey, grey, np.full_like(grey, 7)], axis=2)
    black = np.zeros_like(grey)
    return {
        "grey": (Image.fromarray(grey), repeated, "PNG", {}),
        "grey with a transparent level": (
            Image.fromarray(grey), np.where(repeated == 3, 255, repeated), "PNG",
            {"transparency": 3},
        ),
        "palette": (palette_image(grey), indexed, "PNG", {}),
        "palette with alpha": (
            palette_image(grey), on_white(indexed, grey), "PNG",
            {"transparency": bytes(range(256))},
        ),
        # What is transparent is put on white.
        "RGBA": (Image.fromarray(np.dstack([rgb, alpha])), on_white(rgb, alpha), "PNG", {}),
        "LA": (
            Image.fromarray(np.dstack([grey, alpha])), on_white(repeated, alpha), "PNG", {},
        ),
        "1 bit": (
            Image.fromarray(grey > 127), np.where(repeated > 127, 255, 0), "PNG", {},
        ),
        "CMYK": (
            Image.frombytes("CMYK", (9, 8), np.dstack([255 - rgb, black]).tobytes()),
            rgb, "TIFF", {},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", colour_modes())
def test_every_kind_of_8_bit_image_becomes_rgb(tmp_path, name):
    image, expected, file_format, options = colour_modes()[name]
    path = tmp_path / f"a.{file_format.lower()}"
    image.save(path, format=file_format, **options)
    with Image.open(path) as stored:
        assert stored.mode == image.mode  # the file is of the kind that the test is about
    decoded = input_pipeline.read_image(path)
    assert decoded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decoded), expected)


def test_exif_orientation_is_not_applied(tmp_path):
    # PyTorch's pipelines do not apply it; doing so would swap height and width.
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(noise(20, 30)).save(tmp_path / "a.jpg", exif=exif)
    batch = load_one(tmp_path / "a.jpg", image_config())
    assert batch.sizes == ((20, 30),)
    plain = np.asarray(Image.open(tmp_path / "a.jpg").resize((56, 40), RESAMPLING["bilinear"]))
    np.testing.assert_array_equal(batch.images[0], plain)


def png_of_16_bits(pixels):
    """An RGB PNG of 16 bits a channel, which Pillow reads but cannot write."""

    def chunk(name, data):
        checksum = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", ["png16", "tiff16", "int32", "float32", "rgb16"])
@pytest.mark.parametrize("bits", [12, 16])
def test_deep_images_and_masks(tmp_path, kind, bits):
    # 12 bits of a camera, as they usually come: in clipped or high bytes all is white or
    # all is black.
    grey = noise(40, 56)[..., 0].astype(np.uint16) * 16
    if bits == 16:
        grey = grey * 16 + 15
    path = tmp_path / ("deep.png" if kind in ("png16", "rgb16") else "deep.tif")
    if kind == "rgb16":
        path.write_bytes(png_of_16_bits(np.dstack([grey] * 3)))
    else:
        dtype = {"int32": np.int32, "float32": np.float32}.get(kind, np.uint16)
        Image.fromarray(grey.astype(dtype)).save(path)
    plain = save(tmp_path / "plain.png", noise(40, 56))
    numbers = {"int32": "pixels of 32-bit", "float32": "pixels of floating"}.get(kind)
    # A region of number 1 would be lost: masks are of 8 bits.
    with pytest.raises(UserError, match=numbers or "more than 8 bits a channel") as caught:
        run([record(plain, mask=path, label=1)], image_config(), 1)
    assert str(caught.value).startswith(str(path))
    if numbers is None and bits == 16:
        (batch,) = run([record(path)], image_config(), 1)
        np.testing.assert_array_equal(batch.images[0], np.dstack([grey // 256] * 3))
        return
    with pytest.raises(UserError, match=numbers or "no value above 4095") as caught:
        run([record(path)], image_config(), 1)
    assert str(caught.value).startswith(str(path))


def encoded(file_format, height=40, width=56, **options):
    data = io.BytesIO()
    Image.fromarray(noise(height, width)).save(data, file_format, **options)
    return data.getvalue()


FILES = {
    "png": encoded("PNG"),
    "jpg": encoded("JPEG"),
    "bmp": encoded("BMP"),
    "tif": encoded("TIFF"),
    "lzw.tif": encoded("TIFF", compression="tiff_lzw"),
    "webp": encoded("WEBP"),
}
BROKEN = {
    **{f"truncated.{suffix}": data[: len(data) // 2] for suffix, data in FILES.items()},
    "empty.png": b"",
    "text.png": b"this is no image",
    "no_end.png": FILES["png"][:-30],
    # Large enough for two chunks of data, the second of which has lost its name.
    "chunk.png": b"\0\0\0\0".join(encoded("PNG", 160, 160).rsplit(b"IDAT", 1)),
}


# Pillow also warns of some of them.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", [*BROKEN, "missing.png", "folder.png"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_what_cannot_be_read_is_named_out_of_threads(tmp_path, name, batch_size):
    good = save(tmp_path / "good.png", noise(30, 30))
    path = tmp_path / name
    if name in BROKEN:
        path.write_bytes(BROKEN[name])
    elif name == "folder.png":
        path.mkdir()
    records = [record(good)] * 7 + [record(path)] + [record(good)] * 7
    with pytest.raises(UserError) as caught:
        run(records, image_config(), batch_size)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    with pytest.raises(UserError, match=name):
        input_pipeline.read_image(path)


@pytest.mark.parametrize("suffix", FILES)
def test_damaged_files_decode_or_are_a_user_error(suffix):
    # Pillow's plugins raise whatever comes of the bytes that they find.
    rng = np.random.default_rng(0)
    messages = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(150):
            data = bytearray(FILES[suffix])
            for place in rng.integers(0, min(len(data), 300), 3):  # mostly in the header
                data[place] = rng.integers(0, 256)
            try:
                input_pipeline.decode(bytes(data), "x")
            except UserError as error:
                messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("suffix", FILES)
def test_enormous_images_are_refused(suffix, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 40 * 56 - 1)
    with pytest.raises(UserError, match=r"x\.png: 56x40 pixels .* at most 2239 pixels"):
        input_pipeline.decode(FILES[suffix], "x.png")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 40 * 56)
    input_pipeline.decode(FILES[suffix], "x.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", FILES)
def test_a_truncated_image_is_never_shown_in_part(suffix):
    whole = FILES[suffix]
    expected = np.asarray(input_pipeline.decode(whole, "x"))
    taken = 0
    for kept in np.unique(np.linspace(0, len(whole) - 1, 120).astype(int)).tolist():
        try:
            found = np.asarray(input_pipeline.decode(whole[:kept], "x"))
        except UserError:
            continue
        # What is missing is no pixel's: the padding of a last row.
        np.testing.assert_array_equal(found, expected)
        taken += 1
    assert taken <= 1


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_tail_of_zeros_is_no_image(suffix):
    # As a power cut leaves a file: Pillow alone shows a half grey JPEG.
    whole = encoded("JPEG" if suffix == "jpg" else "PNG", quality=90)
    for kept in range(600, len(whole) - 1, 97):
        with pytest.raises(UserError, match=r"x: the image cannot be decoded: .*(cut|damaged)"):
            input_pipeline.decode(whole[:kept] + bytes(len(whole) - kept), "x")


def test_a_flipped_bit_of_a_png_is_noticed_anywhere():
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(FILES["png"]), 300):
        damaged = bytearray(FILES["png"])
        damaged[place] ^= 1 << rng.integers(0, 8)
        with pytest.raises(UserError):
            input_pipeline.decode(bytes(damaged), "x")


def test_a_failure_ends_the_program(tmp_path):
    # Neither the error nor leaving early may wait for Grain's threads.
    good = save(tmp_path / "good.png", noise(30, 30))
    (tmp_path / "bad.png").write_bytes(b"")
    code = """
        import pathlib, sys
        from padim_jax.data import input_pipeline
        from padim_jax.config.settings import ImageConfig
        from padim_jax.data.records import Record
        from padim_jax.errors import UserError

        def batches(*names):
            files = map(pathlib.Path, names)
            records = [Record("test", file, None, 0, "good", file.name) for file in files]
            source = input_pipeline.FolderSource(records)
            sizes = (32, 32), "nearest", None
            config = ImageConfig(*sizes, (0.,) * 3, (1.,) * 3, 0.0, "centre", 0)
            return input_pipeline.batches(source, config, 2)

        good, bad = sys.argv[1:]
        left = batches(*[good] * 100)
        next(left)
        try:
            for _ in batches(*[good] * 9, bad, *[good] * 90):
                pass
        except UserError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(good), str(tmp_path / "bad.png")],
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "bad.png") in done.stdout


def test_a_mask_of_another_size_is_refused(tmp_path):
    image = save(tmp_path / "a.png", noise(30, 50))
    mask = save(tmp_path / "m.png", np.full((50, 30), 255, np.uint8))  # equally many pixels
    with pytest.raises(UserError, match="expected equal sizes") as caught:
        load_one(image, image_config(), mask=mask, label=1)
    for text in (str(image), str(mask), "30x50", "50x30"):
        assert text in str(caught.value)


def test_masks_are_read_by_the_rule_for_them_before_they_are_resized(tmp_path):
    # Numbered regions, of which nearest may lose the areas by which they are known.
    values = np.array([0, 60, 0, 240, 0], np.uint8)
    regions = np.repeat(values, [20, 3, 20, 3, 10])[:, None]
    path = save(tmp_path / "m.png", regions.repeat(50, 1))
    image = save(tmp_path / "a.png", noise(56, 50))
    config = image_config((28, 50))
    batch = load_one(image, config, mask=path, label=1)
    expected = (regions[1::2] > 0).repeat(50, 1)
    np.testing.assert_array_equal(batch.masks[0], expected)
    assert np.any(expected[:15])


def test_a_mask_without_a_defect_pixel_is_known(tmp_path):
    image = save(tmp_path / "a.png", noise(30, 50))
    empty = save(tmp_path / "m.png", np.zeros((30, 50), np.uint8))
    batch = load_one(image, image_config(), mask=empty, label=1)
    np.testing.assert_array_equal(batch.masks[0], np.zeros((40, 56), bool))


def test_masks_of_other_forms(tmp_path):
    image = save(tmp_path / "a.png", noise(40, 56))
    masks = np.zeros((3, 40, 56), np.uint8)
    masks[1, 3:9, 5:30] = masks[2, 20:25, 8:50] = 1
    np.save(tmp_path / "video.npy", masks)
    (tmp_path / "000").mkdir()
    for number, mask in enumerate(masks):
        save(tmp_path / "000" / f"{number:03}.png", mask)
    known = {"mask": tmp_path / "000", "label": 1}
    batch = load_one(image, image_config(), **known)
    np.testing.assert_array_equal(batch.masks[0], masks.any(axis=0))
    records = [
        dataclasses.replace(record(image, tmp_path / "video.npy", 1), mask_frame=number)
        for number in (2, 0, 1)
    ]
    cache = ImageCache(tmp_path / "cache", 10**9)  # of one image and one file of masks
    for _ in range(2):
        (batch,) = run(records, image_config(), 3, cache)
        np.testing.assert_array_equal(np.stack(batch.masks), masks[[2, 0, 1]])
    other = save(tmp_path / "b.png", noise(56, 40))
    with pytest.raises(UserError, match=r"video.npy: a mask of 56x40 pixels .* of 40x56"):
        run([dataclasses.replace(records[0], image=other)], image_config(), 1)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (image_config((256, 256), "nearest", (224, 224)), Image.Resampling.NEAREST),
        (image_config((256, 256), "bilinear", None), Image.Resampling.BILINEAR),
    ],
    ids=["nearest256_crop224", "bilinear256"],
)
def test_bottle_is_decoded_as_by_hand(shared, config, method):
    records = mvtec_ad(shared / "data/mvtec_ad", "bottle")
    chosen = [
        next(r for r in records if r.relative_path.endswith(f"test/{kind}/000.png"))
        for kind in ("good", "broken_large")
    ]
    (batch,) = run(chosen, config, 2)
    inside = np.s_[16:240, 16:240] if config.crop else np.s_[:, :]
    for number, kind in enumerate(("good", "broken_large")):
        path = shared / f"data/mvtec_ad/bottle/test/{kind}/000.png"
        by_hand = np.asarray(Image.open(path).convert("RGB").resize((256, 256), method))
        np.testing.assert_array_equal(batch.images[number], by_hand[inside])
    path = shared / "data/mvtec_ad/bottle/ground_truth/broken_large/000_mask.png"
    mask = np.asarray(Image.open(path).resize((256, 256), Image.Resampling.NEAREST)) > 127
    np.testing.assert_array_equal(batch.masks[1], mask[inside])
    assert not np.any(batch.masks[0])
    assert np.any(batch.masks[1])
    assert batch.sizes == ((900, 900), (900, 900))


def test_results_do_not_depend_on_threads(numbered, monkeypatch):
    config = image_config((40, 57), "lanczos", (33, 32))
    many = run(numbered, config, 4)
    monkeypatch.setattr(input_pipeline, "_threads", lambda: 1)
    for one, other in zip(run(numbered, config, 4), many, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        assert one.records == other.records


class TestCache:
    """A second run over the same files gets the same, without decoding them."""

    CONFIG = image_config((40, 57), "lanczos", (33, 32))

    @pytest.fixture
    def cache(self, tmp_path):
        return ImageCache(tmp_path / "cache", 10**9)

    @pytest.fixture
    def masked(self, tmp_path):
        """Four images: with a mask, with an empty one, without one anomalous and normal."""
        mask = (noise(30, 50)[..., 0] > 99).astype(np.uint8) * 255
        paths = [save(tmp_path / f"{n}.png", noise(30, 50, seed=n)) for n in range(3)]
        return [
            record(paths[0], save(tmp_path / "mask.png", mask), 1),
            record(paths[1], save(tmp_path / "empty.png", np.zeros_like(mask)), 1),
            record(paths[2], label=1),
            record(paths[2], label=0),  # the same file
        ]

    def refuse_decoding(self, monkeypatch):
        def refuse(*_):
            raise AssertionError("decoded again")

        monkeypatch.setattr(Image, "open", refuse)

    def assert_equal(self, found, expected):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.images, other.images)
            np.testing.assert_array_equal(one.valid, other.valid)
            np.testing.assert_array_equal(one.digests, other.digests)
            assert (one.records, one.sizes) == (other.records, other.sizes)
            for mask, expected_mask in zip(one.masks, other.masks, strict=True):
                assert (mask is None) == (expected_mask is None)
                np.testing.assert_array_equal(mask, expected_mask)

    def test_gives_the_same_without_decoding(self, masked, cache, monkeypatch):
        plain = run(masked, self.CONFIG, 3)
        assert [mask is None for batch in plain for mask in batch.masks] == [
            False,
            False,
            True,
            False,
        ]
        self.assert_equal(run(masked, self.CONFIG, 3, cache), plain)
        self.refuse_decoding(monkeypatch)
        self.assert_equal(run(masked, self.CONFIG, 3, cache), plain)
        source = input_pipeline.FolderSource(masked)
        one = input_pipeline.load_image(source, self.CONFIG, 1, cache)
        np.testing.assert_array_equal(one, plain[0].images[1])

    def test_knows_files_by_their_content(self, numbered, cache, monkeypatch):
        plain = run(numbered, self.CONFIG, 4, cache)
        self.refuse_decoding(monkeypatch)
        moved = [
            dataclasses.replace(r, image=r.image.rename(r.image.with_suffix(".renamed")))
            for r in numbered
        ]
        for one, other in zip(run(moved, self.CONFIG, 4, cache), plain, strict=True):
            np.testing.assert_array_equal(one.images, other.images)

    @pytest.mark.parametrize("name", ["0.png", "mask.png"])
    def test_a_changed_file_is_decoded(self, name, masked, cache, tmp_path):
        run(masked, self.CONFIG, 4, cache)
        path = tmp_path / name
        stamp = path.stat()
        with Image.open(path) as image:
            pixels = np.asarray(image)
        save(path, pixels[::-1])
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as some tools leave it
        self.assert_equal(run(masked, self.CONFIG, 4, cache), run(masked, self.CONFIG, 4))

    @pytest.mark.parametrize(
        "config",
        [
            image_config((40, 56), "lanczos", (33, 32)),
            image_config((40, 57), "bicubic", (33, 32)),
            image_config((40, 57), "lanczos", (33, 33)),
            image_config((40, 57), "lanczos"),
        ],
    )
    def test_other_settings_decode_anew(self, config, masked, cache):
        run(masked, self.CONFIG, 4, cache)
        self.assert_equal(run(masked, config, 4, cache), run(masked, config, 4))

    def test_a_damaged_entry_is_replaced(self, masked, cache, tmp_path, monkeypatch):
        plain = run(masked, self.CONFIG, 4, cache)
        for number, path in enumerate(sorted((tmp_path / "cache").iterdir())):
            content = bytearray(path.read_bytes())
            content[100] ^= 1
            path.write_bytes(content[: len(content) - number])
        self.assert_equal(run(masked, self.CONFIG, 4, cache), plain)
        self.refuse_decoding(monkeypatch)
        self.assert_equal(run(masked, self.CONFIG, 4, cache), plain)

    @pytest.mark.parametrize("fault", ["image", "mask", "size", "values", "missing"])
    def test_errors_are_the_same_each_time(self, fault, masked, cache, tmp_path):
        run(masked, self.CONFIG, 4, cache)  # that image is known; it breaks afterwards
        if fault == "missing":
            masked[0].image.unlink()
        elif fault == "size":
            save(masked[0].mask, np.zeros((50, 30), np.uint8))
        elif fault == "values":
            ramp = np.arange(1500, dtype=np.uint8).reshape(30, 50) % 100
            save(masked[0].mask, ramp)
        else:
            path = masked[0].image if fault == "image" else masked[0].mask
            path.write_bytes(path.read_bytes()[:99])
        messages = set()
        for used in (None, cache, cache):
            with pytest.raises(UserError) as caught:
                run(masked, self.CONFIG, 4, used)
            messages.add(str(caught.value))
        assert len(messages) == 1

    def test_one_that_cannot_be_written_changes_nothing(self, masked, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        cache = ImageCache(tmp_path / "file" / "cache", 10**9)
        self.assert_equal(run(masked, self.CONFIG, 3, cache), run(masked, self.CONFIG, 3))
        assert len(capsys.readouterr().err.splitlines()) == 1


class TestRange:
    """`config.image.range`: which values of a file become 0 and 255."""

    GREY = np.random.default_rng(0).integers(21000, 23041, (30, 40), np.uint16)

    def decoded(self, pixels, counts):
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG")
        return input_pipeline.decode(data.getvalue(), "a.png", counts)

    def test_all_of_16_bits_keep_the_high_byte(self):
        image = self.decoded(self.GREY, "full")
        np.testing.assert_array_equal(np.asarray(image)[..., 0], self.GREY >> 8)
        assert image.info[decoding.LEVELS] == 8

    def test_linear_between_two_counts(self):
        for low, high in ((21000, 23040), (21500, 22000), (0, 65535)):
            found = np.asarray(self.decoded(self.GREY, (low, high)))[..., 0]
            scaled = (self.GREY.astype(np.float64) - low) * 255 / (high - low)
            np.testing.assert_array_equal(found, np.clip(np.round(scaled), 0, 255))
        image = self.decoded(self.GREY, (21000, 23040))
        assert decoding.LEVELS not in image.info
        assert len(np.unique(np.asarray(image))) > 200

    def test_12_bits(self):
        dark = self.GREY % 4096
        with pytest.raises(UserError, match=r"config\.image\.range=train or \(0, 4095\)"):
            self.decoded(dark, "full")
        found = np.asarray(self.decoded(dark, (0, 4095)))
        np.testing.assert_array_equal(found[..., 1], np.round(dark * 255.0 / 4095))

    def test_8_bits(self):
        pixels = noise(30, 40)
        np.testing.assert_array_equal(self.decoded(pixels, (0, 255)), pixels)
        image = self.decoded(pixels, (100, 110))
        expected = np.clip(np.round((pixels - 100.0) * 25.5), 0, 255)
        np.testing.assert_array_equal(image, expected)
        assert image.info[decoding.LEVELS] == 11
        with pytest.raises(UserError, match=r"a\.png: 8 bits .*range=\(100, 300\)"):
            self.decoded(pixels, (100, 300))

    def test_few_levels_that_are_all_there_are_fine(self):
        for pixels in (noise(4, 4) // 128 * 255, self.GREY // 256 * 256):
            assert decoding.LEVELS not in self.decoded(pixels, "full").info

    def test_colours_of_16_bits_have_no_range(self):
        deep = np.random.default_rng(0).integers(0, 65536, (4, 4, 3), np.uint16)
        decoding.from_array(deep, "a")
        with pytest.raises(UserError, match="colours of 16 bits"):
            decoding.from_array(deep, "a", (0, 65535))

    def test_the_cache_keeps_what_was_lost(self, tmp_path):
        path = tmp_path / "a.png"
        Image.fromarray(self.GREY).save(path)
        source = FolderSource([Record("test", path, None, 0, "good", "a.png")])
        cache = ImageCache(tmp_path / "cache", 10**6)
        wide = dataclasses.replace(image_config(), range=(21000, 23040))
        for config, levels in ((image_config(), 8), (wide, None)) * 2:
            (batch,) = input_pipeline.batches(source, config, 1, cache)
            assert batch.levels == (levels,)


class TestRoom:
    """Memory for images at full size is bounded by bytes, not by their number."""

    def most(self, limit, sizes):
        room, used, most, lock = input_pipeline.Room(limit), [0], [0], threading.Lock()

        def work(size):
            with room.held(size):
                with lock:
                    used[0] += size
                    most[0] = max(most[0], used[0])
                time.sleep(0.002)
                with lock:
                    used[0] -= size

        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            list(threads.map(work, sizes))
        return most[0]

    def test_no_more_than_there_is(self):
        assert self.most(10, [3] * 20) <= 10
        # One that is larger is alone.
        assert self.most(10, [3, 25, 3, 25, 3]) == 25

    def test_decoding_waits_for_room(self, tmp_path, monkeypatch):
        Image.fromarray(noise(30, 40)).save(tmp_path / "a.png")
        source = FolderSource(
            [Record("test", tmp_path / "a.png", None, 0, "good", f"{n}.png") for n in range(12)]
        )
        held = []

        class Counting(input_pipeline.Room):
            def held(self, size):
                held.append(size)
                return super().held(size)

        monkeypatch.setattr(input_pipeline, "ROOM", Counting(1))
        assert len(list(input_pipeline.batches(source, image_config(), 4))) == 3
        assert held == [input_pipeline.DECODING * 30 * 40] * 12
