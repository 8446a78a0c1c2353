"""Decoding, resizing, cropping and batching against plain Pillow and NumPy."""

import dataclasses
import hashlib
import io
import os
import pathlib
import struct
import subprocess
import sys
import textwrap
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from padim_jax import input_pipeline
from padim_jax.config import ImageConfig
from padim_jax.datasets.mvtec_ad import mvtec_ad
from padim_jax.datasets.records import Record
from padim_jax.errors import UserError
from padim_jax.image_cache import ImageCache

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def image_config(resize=(40, 56), method="bilinear", crop=None):
    return ImageConfig(resize, method, crop, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


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
@pytest.mark.parametrize(
    ("processes", "batch_size"), [(1, 4), (2, 4), (2, 2), (3, 3), (3, 6), (2, 24), (11, 11)]
)
class TestShares:
    """Processes that take a part of every batch each: side by side they are the batches."""

    def parts(self, numbered, images, processes, batch_size, start):
        sources = [Counting(numbered[:images]) for _ in range(processes)]
        return sources, [
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

    def test_together_they_are_the_batches(
        self, numbered, images, processes, batch_size, start
    ):
        _, parts = self.parts(numbered, images, processes, batch_size, start)
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

    def test_each_reads_its_own_images_only(
        self, numbered, images, processes, batch_size, start
    ):
        sources, parts = self.parts(numbered, images, processes, batch_size, start)
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
            Image.fromarray(grey), repeated, "PNG", {"transparency": 3},
        ),
        "palette": (palette_image(grey), indexed, "PNG", {}),
        "palette with alpha": (
            palette_image(grey), indexed, "PNG", {"transparency": bytes(range(256))},
        ),
        # Alpha is dropped: pixels that would be invisible keep their colour.
        "RGBA": (Image.fromarray(np.dstack([rgb, alpha])), rgb, "PNG", {}),
        "LA": (Image.fromarray(np.dstack([grey, alpha])), repeated, "PNG", {}),
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
def test_deep_images_are_refused_as_image_and_as_mask(tmp_path, kind):
    # 12 bits of a camera, as they usually come: in clipped or high bytes all is white or
    # all is black.
    grey = noise(40, 56)[..., 0].astype(np.uint16) * 16
    path = tmp_path / ("deep.png" if kind in ("png16", "rgb16") else "deep.tif")
    if kind == "rgb16":
        path.write_bytes(png_of_16_bits(np.dstack([grey] * 3)))
    else:
        dtype = {"int32": np.int32, "float32": np.float32}.get(kind, np.uint16)
        Image.fromarray(grey.astype(dtype)).save(path)
    plain = save(tmp_path / "plain.png", noise(40, 56))
    for known in (record(path), record(plain, mask=path, label=1)):
        with pytest.raises(UserError, match="more than 8 bits a channel") as caught:
            run([known], image_config(), 1)
        assert str(path) in str(caught.value)


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
def test_what_cannot_be_read_is_named_out_of_grains_threads(tmp_path, name, batch_size):
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


def test_enormous_images_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # of which Pillow bears twice
    with pytest.raises(UserError, match=r"x\.png: the image cannot be decoded: .* pixels"):
        input_pipeline.decode(FILES["png"], "x.png")


def test_a_failure_ends_the_program(tmp_path):
    # Neither the error nor leaving early may wait for Grain's threads.
    good = save(tmp_path / "good.png", noise(30, 30))
    (tmp_path / "bad.png").write_bytes(b"")
    code = """
        import pathlib, sys
        from padim_jax import input_pipeline
        from padim_jax.config import ImageConfig
        from padim_jax.datasets.records import Record
        from padim_jax.errors import UserError

        def batches(*names):
            records = [Record("test", pathlib.Path(n), None, 0, "good", n) for n in names]
            source = input_pipeline.FolderSource(records)
            config = ImageConfig((32, 32), "nearest", None, (0., 0., 0.), (1., 1., 1.))
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
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
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


def test_a_mask_of_zeros_and_ones_is_refused(tmp_path):
    # Cut above 127 it would be empty, and every defect pixel counted as normal.
    image = save(tmp_path / "a.png", noise(30, 50))
    mask = save(tmp_path / "m.png", np.eye(30, 50, dtype=np.uint8))
    with pytest.raises(UserError, match="values up to 1; expected defect pixels above 127"):
        load_one(image, image_config(), mask=mask, label=1)
    empty = save(tmp_path / "m.png", np.zeros((30, 50), np.uint8))
    batch = load_one(image, image_config(), mask=empty, label=1)
    np.testing.assert_array_equal(batch.masks[0], np.zeros((40, 56), bool))


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
            save(masked[0].mask, np.ones((30, 50), np.uint8))
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
