"""Masks of every kind: the rule by which they are read, folders of them, videos' frames."""

import io
import os
import pathlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from padim_jax.data import masks
from padim_jax.data.records import Record
from padim_jax.errors import UserError

HEIGHT, WIDTH = 60, 90


def record(mask: pathlib.Path | None, frame: int | None = None) -> Record:
    return Record("test", pathlib.Path("a.png"), mask, 1, "bad", "a.png", frame)


def regions(*values: int) -> np.ndarray:
    """One rectangle for each value, 18 pixels apart; the first ones touch."""
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    for number, value in enumerate(values):
        top, left = divmod(number, 4)
        pixels[2 + 12 * top : 12 + 12 * top, 5 + 20 * left : 20 + 20 * left] = value
    return pixels


def blobs(seed: int = 0) -> Image.Image:
    """Defects of all sizes, drawn with 255; also strokes of one pixel."""
    rng = np.random.default_rng(seed)
    image = Image.new("L", (300, 200))
    draw = ImageDraw.Draw(image)
    for number in range(8):
        (left, top), (w, h) = rng.integers(5, 150, 2).tolist(), rng.integers(3, 50, 2).tolist()
        if number % 2:
            draw.ellipse((left, top, left + w, top + h), fill=255)
        else:
            draw.line((left, top, left + w, top + h), fill=255, width=number // 2)
    return image


def read(pixels: np.ndarray | Image.Image) -> np.ndarray:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    return masks.defects(image, "mask.png")


class TestRule:
    @pytest.mark.parametrize(
        "values",
        [
            (255,),  # MVTec AD
            (1,),  # ShanghaiTech Campus
            (1, 2, 3, 4, 5),  # VisA: kinds
            (253, 254, 255),  # MVTec LOCO: kinds
            (234, 255),
            (127,),
            (128,),
            (126, 127),
            (128, 129),
            # On both sides of the middle.
            (60, 120, 180, 240),
            (127, 128),
            (1, 255),
            tuple(range(12, 252, 12)),
        ],
        ids=str,
    )
    def test_values_of_regions(self, values):
        pixels = regions(*values)
        np.testing.assert_array_equal(read(pixels), pixels > 0)

    def test_a_small_region_beside_large_ones(self):
        pixels = regions(60, 120, 240)
        pixels[50, 50], pixels[40, 20:40] = 30, 200  # one pixel, a stroke
        np.testing.assert_array_equal(read(pixels), pixels > 0)

    @pytest.mark.parametrize("value", [1, 127, 128])
    def test_strokes_without_areas(self, value):
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
        pixels[20, 10:40] = pixels[30:50, 15] = value
        np.testing.assert_array_equal(read(pixels), pixels > 0)

    def test_neighbouring_regions(self):
        # No normal pixel lies between them.
        values = np.array([0, 40, 200, 90, 230, 0], np.uint8)
        pixels = values.repeat(15)[None].repeat(HEIGHT, 0)
        np.testing.assert_array_equal(read(pixels), pixels > 0)

    @pytest.mark.parametrize("value", [0, 1, 127, 128, 255])
    def test_one_value(self, value):
        found = read(np.full((HEIGHT, WIDTH), value, np.uint8))
        assert found.dtype == bool
        assert found.all() == found.any() == (value > 0)

    @pytest.mark.parametrize("quality", [10, 30, 75, 95, 100])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_noise_of_jpeg(self, quality, seed):
        data = io.BytesIO()
        blobs(seed).save(data, "JPEG", quality=quality)
        found = masks.decode(data.getvalue(), "mask.jpg")
        np.testing.assert_array_equal(found, np.asarray(Image.open(data)) > 127)
        if quality >= 75:  # what the noise is to be told from
            np.testing.assert_array_equal(found, np.asarray(blobs(seed)) > 0)

    @pytest.mark.parametrize("resample", ["BILINEAR", "BICUBIC", "LANCZOS"])
    @pytest.mark.parametrize("size", [(150, 100), (411, 333), (900, 600)])
    def test_soft_edges_of_a_resized_mask(self, resample, size):
        soft = blobs().resize(size, Image.Resampling[resample])
        pixels = np.asarray(soft)
        assert np.any((pixels > 0) & (pixels <= 127))
        np.testing.assert_array_equal(read(soft), pixels > 127)

    @pytest.mark.parametrize("sigma", [0.7, 2, 4])
    def test_soft_edges_of_a_blurred_mask(self, sigma):
        soft = blobs().filter(ImageFilter.GaussianBlur(sigma))
        np.testing.assert_array_equal(read(soft), np.asarray(soft) > 127)

    def test_edges_of_few_levels(self):
        # Drawn four times as large: five values, as few as numbered regions have.
        large = blobs().resize((1200, 800), Image.Resampling.NEAREST).rotate(20)
        soft = np.asarray(large.resize((600, 400), Image.Resampling.BOX))
        assert len(np.unique(soft)) == 5
        np.testing.assert_array_equal(read(soft), soft > 127)

    def test_neither_grey_levels_nor_regions(self):
        half = regions(60, 240)
        half[30:50, 10:80:3] = 61  # strokes of one pixel, twice as many as in the region
        many = np.arange(40, dtype=np.uint8).repeat(9).reshape(20, 18).repeat(3, 0) * 5
        dark = np.arange(100, dtype=np.uint8).reshape(10, 10)  # a shadow, or a faint defect
        for pixels, told in [
            (half, "the 3 values 60, 61, 240 "),
            (many, r"the 39 values 5, 10, .*, 40, \.\.\. \(at most 195\)"),
            (dark, r"the 99 values .* \(at most 99\) beside 0: none above 127"),
        ]:
            with pytest.raises(UserError, match=rf"^mask\.png: a mask of {told}") as caught:
                read(pixels)
            assert "255 for a defect's" in str(caught.value)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 2), (2, 9), (3, 3)])
    def test_masks_smaller_than_a_square(self, shape):
        pixels = np.zeros(shape, np.uint8)
        pixels.flat[0], pixels.flat[-1] = 70, 200
        np.testing.assert_array_equal(read(pixels), pixels > 127)

    def test_areas_at_the_border_count(self):
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
        pixels[:3, :3], pixels[-3:, -3:] = 70, 200
        np.testing.assert_array_equal(read(pixels), pixels > 0)


class TestModes:
    PIXELS = regions(60, 120, 180, 240)

    def test_one_bit(self):
        image = Image.fromarray(self.PIXELS > 0)
        assert image.mode == "1"
        np.testing.assert_array_equal(read(image), self.PIXELS > 0)

    def test_grey_as_colour(self):
        soft = blobs().resize((150, 100))
        for mode in ("RGB", "RGBA", "LA", "P"):
            np.testing.assert_array_equal(read(soft.convert(mode)), np.asarray(soft) > 127)

    def test_colours(self):
        # Grey levels of pure blue would be dark: 255 gives 29.
        for colour in ((255, 0, 0), (0, 0, 255), (0, 90, 0), (200, 200, 0)):
            image = Image.new("RGB", (WIDTH, HEIGHT))
            image.paste(colour, (10, 10, 30, 30))
            image.paste((60, 0, 100), (30, 10, 40, 40))
            expected = np.asarray(image).any(axis=2)
            np.testing.assert_array_equal(read(image), expected)

    def test_soft_edges_of_a_colour(self):
        soft = blobs().resize((150, 100))
        black = Image.new("L", soft.size)
        for channels in ((soft, black, black), (black, black, soft), (soft, black, soft)):
            found = read(Image.merge("RGB", channels))
            np.testing.assert_array_equal(found, np.asarray(soft) > 127)

    def test_palettes_are_read_by_their_colours(self):
        labels = regions(1, 2, 3, 4).clip(0, 4)
        image = Image.fromarray(labels)
        # As Pascal VOC numbers colours: their grey levels would be 38, 75, 113 and 15.
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128])
        np.testing.assert_array_equal(read(image), labels > 0)
        # As Pillow saves black and white with few colours: white may be first.
        image = Image.fromarray((labels == 0).astype(np.uint8))
        image.putpalette([255, 255, 255, 0, 0, 0])
        np.testing.assert_array_equal(read(image), labels > 0)

    @pytest.mark.parametrize("mode", ["RGBA", "LA"])
    def test_transparent_pixels_are_refused(self, mode):
        # Which of the two is the mask, the colour or what can be seen of it?
        image = Image.fromarray(self.PIXELS).convert(mode)
        read(image)
        image.putalpha(Image.fromarray(self.PIXELS))
        with pytest.raises(UserError, match=rf"mask\.png: .*transparent pixels .*{mode}"):
            read(image)


def save(path: pathlib.Path, pixels: np.ndarray) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def content(mask: pathlib.Path, frame: int | None = None) -> np.ndarray:
    data = masks.read(record(mask, frame))
    assert data is not None
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def test_without_a_mask():
    assert masks.read(record(None)) is None


def test_a_file_is_given_as_it_is(tmp_path):
    path = save(tmp_path / "mask.PNG", regions(1, 2))
    assert masks.read(record(path)) == path.read_bytes()


class TestFolder:
    def test_union_of_all_files(self, tmp_path):
        # Each by the rule: in one of them 7 is a kind of defect, in another a soft edge.
        soft = np.asarray(blobs().resize((WIDTH, HEIGHT)))
        folder = tmp_path / "000"
        save(folder / "000.png", regions(0, 7))
        save(folder / "001.png", soft)
        save(folder / "002.png", regions(0, 0, 0, 253))
        expected = (regions(0, 7) > 0) | (soft > 127) | (regions(0, 0, 0, 253) > 0)
        found = content(folder)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, np.where(expected, 255, 0))
        assert masks.read(record(folder)) == masks.read(record(folder))  # names cache entries

    def test_of_one_file(self, tmp_path):
        save(tmp_path / "a" / "000.png", regions(254))
        np.testing.assert_array_equal(content(tmp_path / "a"), regions(255))

    def test_of_different_sizes(self, tmp_path):
        save(tmp_path / "a" / "000.png", regions(255))
        other = save(tmp_path / "a" / "001.png", regions(255).T.copy())
        with pytest.raises(UserError, match=r"60x90 pixels beside 000.png of 90x60") as caught:
            masks.read(record(tmp_path / "a"))
        assert str(caught.value).startswith(f"{other}: ")

    def test_what_is_wrong_is_named(self, tmp_path):
        with pytest.raises(UserError, match="no such folder"):
            masks.read(record(tmp_path / "missing"))
        (tmp_path / "a").mkdir()
        with pytest.raises(UserError, match="holds no image"):
            masks.read(record(tmp_path / "a"))
        save(tmp_path / "a" / "000.png", regions(255))
        (tmp_path / "a" / "001.png").write_bytes(b"text")
        with pytest.raises(UserError, match=r"001\.png: not an image"):
            masks.read(record(tmp_path / "a"))


class Unpickled:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class TestFrames:
    VIDEO = np.stack([regions(*[1] * number) for number in range(5)])

    @pytest.mark.parametrize("kind", ["u1", "?", "<i8", ">i2", "f8"])
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_every_frame_is_its_own(self, kind, order, tmp_path):
        path = tmp_path / "01_0014.npy"
        np.save(path, np.asarray(self.VIDEO.astype(kind), order=order))
        for number, expected in enumerate(self.VIDEO):
            np.testing.assert_array_equal(content(path, number), 255 * expected)

    def test_only_that_frame_is_read(self, tmp_path):
        path = tmp_path / "a.npy"
        np.save(path, self.VIDEO)
        whole = path.read_bytes()
        size = self.VIDEO[0].size
        # All others become what is refused.
        start = len(whole) - self.VIDEO.size + 2 * size
        broken = bytes(whole[: start - 2 * size]) + 2 * b"\x64\xc8" * (size // 2)
        path.write_bytes((broken + bytes(2 * size))[:start] + whole[start : start + size])
        np.testing.assert_array_equal(content(path, 2), 255 * self.VIDEO[2])
        with pytest.raises(UserError, match=r"not a whole \.npy file"):
            masks.read(record(path, 3))

    @pytest.mark.parametrize("header", [b"(((", b"{[]: 1}", b"  a\n b\n", b"-" * 9000 + b"1"])
    def test_a_header_that_is_no_python(self, header, tmp_path):
        path = tmp_path / "a.npy"
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        with pytest.raises(UserError, match=r"not a whole \.npy file .*: its header"):
            masks.read(record(path, 0))

    @pytest.mark.parametrize("number", [-1, 5])
    def test_frames_that_are_not_there(self, number, tmp_path):
        np.save(tmp_path / "a.npy", self.VIDEO)
        told = rf"a\.npy: no frame {number} in masks of 5 frames \(shape \(5, 60, 90\)\)"
        with pytest.raises(UserError, match=told):
            masks.read(record(tmp_path / "a.npy", number))

    @pytest.mark.parametrize("shape", [(5, 60), (5, 60, 90, 1), (), (5, 0, 90), (0, 60, 90)])
    def test_other_shapes(self, shape, tmp_path):
        np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
        with pytest.raises(UserError, match=r"a\.npy: an array of shape .*expected \(frames"):
            masks.read(record(tmp_path / "a.npy", 0))

    @pytest.mark.parametrize(
        ("value", "kind"), [(-1, "i2"), (256, "i4"), (0.5, "f4"), (np.nan, "f4")]
    )
    def test_values_that_are_no_mask(self, value, kind, tmp_path):
        video = self.VIDEO.astype(kind)
        video[3, 0, 0] = value
        np.save(tmp_path / "a.npy", video)
        masks.read(record(tmp_path / "a.npy", 2))
        with pytest.raises(UserError, match=r"a\.npy, frame 3: values of .* to .* \("):
            masks.read(record(tmp_path / "a.npy", 3))

    def test_unclear_values_name_file_and_frame(self, tmp_path):
        video = np.arange(100, dtype=np.uint8).reshape(1, 10, 10)
        np.save(tmp_path / "a.npy", video)
        with pytest.raises(UserError, match=r"a\.npy, frame 0: a mask of the 99 values"):
            masks.read(record(tmp_path / "a.npy", 0))

    def test_objects_are_not_unpickled(self, tmp_path):
        objects = np.empty((1, 2, 2), object)
        objects[:] = Unpickled(tmp_path / "made")
        np.save(tmp_path / "a.npy", objects, allow_pickle=True)
        with pytest.raises(UserError, match="an array of object; expected numbers"):
            masks.read(record(tmp_path / "a.npy", 0))
        assert not (tmp_path / "made").exists()

    def test_other_files(self, tmp_path):
        path = tmp_path / "a.npy"
        with pytest.raises(UserError, match="cannot be read: No such file"):
            masks.read(record(path, 0))
        np.save(path, self.VIDEO)
        header = path.read_bytes()[:128]
        for data in (b"", b"text", header[:50], header[:6] + b"\x09\x00" + header[8:]):
            path.write_bytes(data)
            with pytest.raises(UserError, match=r"a\.npy: not a whole \.npy file"):
                masks.read(record(path, 0))
