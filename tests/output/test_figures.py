"""What the pictures show, pixel by pixel; what they must not depend on or disturb."""

import subprocess
import sys
import textwrap

import matplotlib
import numpy as np
import pytest
from PIL import Image

from padim_jax.output import figures
from padim_jax.output.figures import ColorScale

SCALE = ColorScale(2.0, 10.0)
WHITE, BLACK, RED, GREEN = (255, 255, 255), (0, 0, 0), (255, 32, 32), (40, 230, 90)


def sample(height: int, width: int, seed: int = 0):
    """A noisy image, so that it is found at one place only, a mask and a map."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 4 : width // 2] = True
    rows, columns = np.mgrid[:height, :width]
    distance = np.hypot(rows - height / 2, columns - width / 2) / min(height, width)
    return image, mask, (10 - 12 * distance).astype(np.float32)


def find_panels(picture: Image.Image, image: np.ndarray) -> tuple[int, list[np.ndarray]]:
    """The factor by which `image` is enlarged in `picture`, and all panels beside it."""
    pixels = np.asarray(picture)
    for factor in range(1, 7):
        first = image.repeat(factor, axis=0).repeat(factor, axis=1)
        height, width = first.shape[:2]
        for top, left in np.argwhere((pixels == first[0, 0]).all(axis=-1)):
            if np.array_equal(pixels[top : top + height, left : left + width], first):
                starts = panel_starts(pixels[top - 1], width)
                assert starts[0] == left
                return factor, [pixels[top : top + height, x : x + width] for x in starts]
    raise AssertionError("the image is not in the picture")


def panel_starts(frame_line: np.ndarray, width: int) -> np.ndarray:
    """Where panels start, from the row of pixels with the upper lines of their frames."""
    drawn = np.pad((frame_line != 255).any(axis=-1).astype(int), 1)
    starts, ends = np.flatnonzero(np.diff(drawn) == 1), np.flatnonzero(np.diff(drawn) == -1)
    np.testing.assert_array_equal(ends - starts, width + 2)
    return starts + 1


def color(mask: np.ndarray) -> np.ndarray:
    """A mask as it is drawn: white on black."""
    return np.where(mask[..., None], np.uint8(255), np.uint8(0)).repeat(3, axis=2)


class TestColorScale:
    def test_typical_normal_is_cold_and_typical_defect_is_hot(self):
        maps = np.full((7, 8, 8), 3.0)
        labels = np.array([1, 0, 1, 0, 0, 1, 0])
        for i, peak in zip(np.flatnonzero(labels), (20.0, 30.0, 25.0), strict=True):
            maps[i, 5, 3] = peak
        maps[labels == 0, 2, 2] = 5.0
        assert figures.color_scale(maps, labels) == ColorScale(3.0, 25.0)

    def test_one_extreme_image_changes_nothing(self):
        maps = np.random.default_rng(0).uniform(1, 2, (9, 8, 8))
        labels = np.arange(9) % 2
        maps[labels == 1] *= np.array([4, 5, 6, 7])[:, None, None]
        before = figures.color_scale(maps[:8], labels[:8])
        maps[7] *= 1000
        assert figures.color_scale(maps[:8], labels[:8]) == before

    def test_share_of_anomalous_images_does_not_matter(self):
        rng = np.random.default_rng(1)
        normal, anomalous = rng.uniform(1, 2, (40, 8, 8)), rng.uniform(1, 9, (3, 8, 8))
        few, many = (
            figures.color_scale(
                np.concatenate([normal, *[anomalous] * repeats]),
                np.repeat([0, 1], (40, 3 * repeats)),
            )
            for repeats in (1, 31)
        )
        assert few == many

    @pytest.mark.parametrize("label", [0, 1])
    def test_one_kind_of_images(self, label):
        maps = np.full((3, 4, 4), 1.0)
        maps[:, 1, 1] = 5, 6, 7
        assert figures.color_scale(maps, np.full(3, label)) == ColorScale(1.0, 6.0)

    @pytest.mark.parametrize("value", [0.0, 3.0, -1e30])
    def test_constant_maps_are_cold(self, value):
        maps = np.full((2, 4, 4), value)
        scale = figures.color_scale(maps, np.array([0, 1]))
        coldest = figures.heat_map(np.full((1, 1), -np.inf), scale)
        assert (figures.heat_map(maps[0], scale) == coldest).all()

    def test_real_maps(self, shared):
        maps = np.load(shared / "golden" / "bottle_resnet18_bilinear256.npz")["maps"]
        scale = figures.color_scale(maps, np.array([0, 1, 1, 1]))
        # Sampling every fourth row and column moves the median of the blurred map little.
        assert scale.low == pytest.approx(np.median(maps[0]), rel=0.01)
        assert scale.high == pytest.approx(np.median(maps[1:].max(axis=(1, 2))), rel=1e-6)

    @pytest.mark.parametrize(
        ("low", "high"), [(1.0, 1.0), (2.0, 1.0), (np.nan, 1.0), (0.0, np.inf), (-np.inf, 0.0)]
    )
    def test_no_scale(self, low, high):
        with pytest.raises(ValueError, match="finite low < high"):
            ColorScale(low, high)


class TestHeatMap:
    ramp = figures.heat_map(np.linspace(2, 10, 256)[None], SCALE)[0]

    def test_each_level_has_its_own_colour(self):
        assert len(np.unique(self.ramp, axis=0)) == 256

    def test_colours_are_turbo_without_its_dark_end(self):
        turbo = matplotlib.colormaps["turbo"](np.linspace(0, 225 / 255, 256))[:, :3] * 255
        # Straight lines between 16 of turbo's colours leave it by 7 levels at most.
        np.testing.assert_allclose(self.ramp, turbo, atol=8)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_linear_in_score_and_the_same_in_every_map(self, dtype):
        scores = np.random.default_rng(0).uniform(2, 10, (20, 30)).astype(dtype)
        levels = np.floor((scores - 2) / 8 * 255 + 0.5).astype(int)
        np.testing.assert_array_equal(figures.heat_map(scores, SCALE), self.ramp[levels])
        np.testing.assert_array_equal(
            figures.heat_map(scores[:1, :1], SCALE), self.ramp[levels[:1, :1]]
        )

    def test_clipped_at_both_ends(self):
        scores = np.array([[-np.inf, -1e6, 1.99, 2.0], [10.0, 10.01, 1e6, np.inf]])
        colors = figures.heat_map(scores, SCALE)
        assert (colors[0] == self.ramp[0]).all()
        assert (colors[1] == self.ramp[255]).all()

    def test_nan_is_cold(self):
        assert (figures.heat_map(np.full((1, 1), np.nan), SCALE) == self.ramp[0]).all()


class TestOutline:
    def test_rectangle(self):
        mask = np.zeros((9, 11), bool)
        mask[2:7, 3:9] = True
        expected = mask.copy()
        expected[3:6, 4:8] = False
        np.testing.assert_array_equal(figures.outline(mask), expected)
        expected[3:6, 4:8] = True
        expected[4, 5:7] = False
        np.testing.assert_array_equal(figures.outline(mask, 2), expected)

    @pytest.mark.parametrize("width", [1, 3])
    def test_empty(self, width):
        assert not figures.outline(np.zeros((5, 7), bool), width).any()

    def test_closed_at_the_images_edge(self):
        expected = np.ones((4, 5), bool)
        expected[1:3, 1:4] = False
        np.testing.assert_array_equal(figures.outline(np.ones((4, 5), bool)), expected)

    @pytest.mark.parametrize("width", [1, 2, 4])
    def test_distance_to_the_outside(self, width):
        mask = np.random.default_rng(3).random((14, 17)) < 0.93
        rows, columns = np.indices((16, 19))
        outside = np.pad(~mask, 1, constant_values=True)
        steps = np.array(
            [
                [(abs(rows - y) + abs(columns - x))[outside].min() for x in range(1, 18)]
                for y in range(1, 15)
            ]
        )
        np.testing.assert_array_equal(figures.outline(mask, width), mask & (steps <= width))


SIZES = [(256, 256), (224, 224), (64, 64), (192, 320), (320, 192), (33, 50), (300, 40)]


class TestDrawnSize:
    @pytest.mark.parametrize(
        ("shape", "aspect", "side", "expected"),
        [
            ((256, 256), 1.0, None, (256, 256)),
            ((256, 256), 2.0, None, (128, 256)),
            ((256, 256), 0.5, None, (256, 128)),
            ((64, 256), 1.0, None, (256, 256)),
            ((179, 256), 1000 / 700, None, (179, 256)),
            ((500, 1000), None, 384, (192, 384)),
            ((500, 1000), 1.0, 384, (384, 384)),
            ((96, 96), 500.0, None, (1, 96)),
        ],
    )
    def test_longer_side_stays(self, shape, aspect, side, expected):
        assert figures.drawn_size(shape, aspect, side) == expected

    @pytest.mark.parametrize("size", [(7, 50), (64, 30), (80, 25), (64, 64), (100, 100)])
    def test_no_part_of_a_region_is_lost(self, size):
        """Every pixel of it is in the drawn region, at its place."""
        rng = np.random.default_rng(0)
        for row, column in rng.integers(0, 64, (40, 2)).tolist():
            region = np.zeros((64, 64), bool)
            region[row, column] = True
            drawn = figures.resize_region(region, size)
            assert drawn.shape == size
            y, x = (int((i + 0.5) * n / 64) for i, n in zip((row, column), size, strict=True))
            assert drawn[y, x]
            assert drawn.sum() <= (1 + np.ceil(size[0] / 64)) * (1 + np.ceil(size[1] / 64))

    def test_panels_of_another_size(self):
        image, mask, scores = sample(192, 192)
        threshold = float(scores.max())  # one pixel
        plain = figures.panels(image, mask, scores, threshold, SCALE, "one.png")
        flat = figures.panels(image, mask, scores, threshold, SCALE, "one.png", (96, 192))
        assert (flat.width, flat.height) == (plain.width, plain.height - 96)
        assert (np.asarray(flat) == RED).all(axis=-1).sum() >= 1


class TestPanels:
    @pytest.mark.parametrize(("height", "width"), SIZES)
    def test_every_panel_shows_what_it_says(self, height, width):
        image, mask, scores = sample(height, width)
        threshold = float(scores[height // 2, width // 8])  # some pixels score exactly this
        picture = figures.panels(image, mask, scores, threshold, SCALE, "one.png")
        assert picture.mode == "RGB"
        factor, panels = find_panels(picture, image)
        assert len(panels) == 5
        assert 192 <= factor * max(height, width) < 384 or factor == 1

        def enlarged(pixels):
            return pixels.repeat(factor, axis=0).repeat(factor, axis=1)

        region = scores >= threshold
        assert 0 < region.sum() < region.size
        np.testing.assert_array_equal(panels[1], enlarged(color(mask)))
        np.testing.assert_array_equal(panels[3], enlarged(color(region)))

        grey = np.asarray(Image.fromarray(image).convert("L"), float)[..., None]
        blend = 0.4 * grey + 0.6 * figures.heat_map(scores, SCALE)
        np.testing.assert_allclose(panels[2], enlarged(blend), atol=1)  # rounding

        line_width = max(1, round(factor * width / 170))
        expected = enlarged(image).copy()
        expected[figures.outline(enlarged(mask), line_width)] = GREEN
        expected[figures.outline(enlarged(region), line_width)] = RED
        np.testing.assert_array_equal(panels[4], expected)

    @pytest.mark.parametrize(("height", "width"), SIZES)
    def test_nothing_is_cut_off(self, height, width):
        image, mask, scores = sample(height, width)
        for caption in ("", "a.png", "folder/" * 60 + "a.png   score 41.2", "two\nlines"):
            scale = ColorScale(-1.23e-5, 1.23e25)  # long numbers
            picture = figures.panels(image, mask, scores, 1.23e24, scale, caption)
            pixels = np.asarray(picture)
            for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
                assert (edge == 255).all()
            assert len(find_panels(picture, image)[1]) == 5

    def test_legends_of_narrow_panels_are_complete(self):
        def width_of_last_legend(width):
            image, mask, scores = sample(300, width)
            pixels = np.asarray(figures.panels(image, mask, scores, 5.0, SCALE, ""))
            legend = pixels[-24:, -pixels.shape[1] // 5 :]
            return np.ptp(np.flatnonzero((legend != 255).any(axis=(0, 2))))

        # The text is of the same size, but only the second panel is as wide as it.
        assert width_of_last_legend(40) == width_of_last_legend(230)

    def test_unknown_mask(self):
        image, _, scores = sample(64, 64)
        picture = figures.panels(image, None, scores, 5.0, SCALE, "")
        _, panels = find_panels(picture, image)
        # A note in grey: neither a mask with defects nor one without.
        assert not (panels[1] == BLACK).all(axis=-1).any()
        assert len(np.unique(panels[1])) > 2
        assert not (np.asarray(picture) == GREEN).all(axis=-1).any()
        assert (panels[4] == RED).all(axis=-1).any()

    def test_no_threshold(self):
        image, mask, scores = sample(64, 64)
        picture = figures.panels(image, mask, scores, None, SCALE, "")
        _, panels = find_panels(picture, image)
        assert not (panels[3] == BLACK).all(axis=-1).any()
        assert len(np.unique(panels[3])) > 2
        assert not (np.asarray(picture) == RED).all(axis=-1).any()
        assert (panels[4] == GREEN).all(axis=-1).any()

    def test_neither_mask_nor_threshold(self):
        image, _, scores = sample(64, 64)
        picture = figures.panels(image, None, scores, None, SCALE, "")
        _, panels = find_panels(picture, image)
        np.testing.assert_array_equal(panels[4], panels[0])

    def test_normal_image_has_an_empty_mask(self):
        image, mask, scores = sample(64, 64)
        picture = figures.panels(image, mask & False, scores, 1e9, SCALE, "")
        _, panels = find_panels(picture, image)
        assert (panels[1] == 0).all()
        assert (panels[3] == 0).all()
        np.testing.assert_array_equal(panels[4], panels[0])

    def test_threshold_is_marked_on_the_colour_bar(self):
        image, mask, scores = sample(64, 64)

        def legend(threshold, scale):
            picture = np.asarray(figures.panels(image, mask, scores, threshold, scale, ""))
            third = slice(picture.shape[1] * 2 // 5, picture.shape[1] * 3 // 5)
            return picture[-2 * 12 :, third].astype(int)

        def mark(threshold):
            changed = (legend(threshold, SCALE) != legend(None, SCALE)).any(axis=(0, 2))
            return np.flatnonzero(changed)

        positions = [mark(threshold).mean() for threshold in (2.0, 4.0, 6.0, 8.0, 10.0)]
        steps = np.diff(positions)
        assert steps.min() > 0
        np.testing.assert_allclose(steps, steps.mean(), atol=1.01)  # rounded to pixels
        assert len(mark(1.9)) == 0
        assert len(mark(10.1)) == 0

    def test_pictures_do_not_leak_into_each_other(self):
        first, second = sample(64, 64, seed=0), sample(64, 64, seed=1)
        once = figures.panels(*first, 5.0, SCALE, "first.png")
        figures.panels(*second, 5.0, SCALE, "second image.png")
        again = figures.panels(*first, 5.0, SCALE, "first.png")
        np.testing.assert_array_equal(np.asarray(once), np.asarray(again))

    @pytest.mark.parametrize("size", [256, 64])
    def test_arguments_stay_as_they_are(self, size):
        arrays = sample(size, size)
        copies = [array.copy() for array in arrays]
        for array in arrays:
            array.setflags(write=False)
        figures.panels(*arrays, 5.0, SCALE, "")
        figures.overlay(arrays[0], arrays[2], SCALE, arrays[2] >= 5.0)
        for array, copy in zip(arrays, copies, strict=True):
            np.testing.assert_array_equal(array, copy)


class TestOverlay:
    def test_unscored_pixels_keep_their_colours_dimmed(self):
        image, _, scores = sample(50, 90)
        scores[:10] = np.nan
        scores[:, 70:] = np.nan
        for predicted in (None, scores >= 5.0, scores >= -1e9):
            picture = np.asarray(figures.overlay(image, scores, SCALE, predicted))
            unscored = np.isnan(scores)
            dimmed = image[unscored].astype(int)
            shown = picture[unscored].astype(int)
            assert (shown <= dimmed).all()
            np.testing.assert_allclose(shown, 0.75 * dimmed, atol=3)  # whole numbers

    def test_heat_map_at_the_images_size(self):
        image, _, scores = sample(70, 130)
        picture = figures.overlay(image, scores, SCALE, None)
        assert picture.size == (130, 70)
        grey = np.asarray(Image.fromarray(image).convert("L"), float)[..., None]
        blend = 0.4 * grey + 0.6 * figures.heat_map(scores, SCALE)
        np.testing.assert_allclose(np.asarray(picture), blend, atol=1)  # rounding

    @pytest.mark.parametrize("size", [60, 500])
    def test_outline_of_the_predicted_region(self, size):
        image, _, scores = sample(size, size)
        scores[: size // 3] = np.nan
        plain = np.asarray(figures.overlay(image, scores, SCALE, None))
        outlined = np.asarray(figures.overlay(image, scores, SCALE, scores >= 7.0))
        region = scores >= 7.0
        assert (outlined[figures.outline(region)] == WHITE).all()
        changed = (outlined != plain).any(axis=-1)
        assert not (changed & ~figures.outline(region, 2 + size // 100)).any()

    def test_no_region_no_outline(self):
        image, _, scores = sample(60, 60)
        plain = figures.overlay(image, scores, SCALE, None)
        none_above = figures.overlay(image, scores, SCALE, scores >= 1e9)
        np.testing.assert_array_equal(np.asarray(plain), np.asarray(none_above))


class TestContactSheet:
    def test_row_by_row(self):
        colors = [(10, 20, 30), (40, 50, 60), (70, 80, 90)]
        images = [Image.new("RGB", (20, 10), color) for color in colors]
        sheet = figures.contact_sheet(images, columns=2)
        pixels = np.asarray(sheet)
        found = [np.argwhere((pixels == color).all(axis=-1)) for color in colors]
        assert [len(places) for places in found] == [200, 200, 200]
        (top0, left0), (top1, left1), (top2, left2) = (places.min(axis=0) for places in found)
        assert (top0, left0) == (0, 0)
        assert top1 == 0
        assert left1 > 20
        assert top2 > 10
        assert left2 == 0
        assert sheet.size == (left1 + 20, top2 + 10)

    def test_different_sizes_do_not_overlap(self):
        images = [
            Image.new("RGB", size, (i, 0, 0)) for i, size in enumerate([(9, 5), (3, 8), (7, 7)])
        ]
        pixels = np.asarray(figures.contact_sheet(images, columns=1))
        for i, image in enumerate(images):
            assert (pixels == (i, 0, 0)).all(axis=-1).sum() == image.width * image.height

    def test_more_columns_than_images(self):
        image = Image.new("RGB", (20, 10))
        assert figures.contact_sheet([image], columns=5).size == (20, 10)

    @pytest.mark.parametrize(("count", "columns"), [(0, 2), (2, 0)])
    def test_impossible(self, count, columns):
        with pytest.raises(ValueError, match=f"found {count} and {columns}"):
            figures.contact_sheet([Image.new("RGB", (2, 2))] * count, columns)


class TestSave:
    def test_png_is_exact(self, tmp_path):
        image, _, _ = sample(40, 60)
        figures.save(Image.fromarray(image), tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as read:
            assert read.format == "PNG"
            np.testing.assert_array_equal(np.asarray(read), image)

    def test_jpeg_keeps_thin_coloured_lines(self, tmp_path):
        pixels = np.full((64, 64, 3), 30, np.uint8)
        pixels[:, 13] = RED
        pixels[:, 42] = GREEN
        figures.save(Image.fromarray(pixels), tmp_path / "a.jpg")
        with Image.open(tmp_path / "a.jpg") as read:
            assert read.format == "JPEG"
            # With halved colour resolution, as JPEG has by default, the lines are far off.
            np.testing.assert_allclose(np.asarray(read, int), pixels, atol=40)

    def test_unknown_format(self, tmp_path):
        with pytest.raises(ValueError, match="unknown file extension"):
            figures.save(Image.new("RGB", (2, 2)), tmp_path / "a.picture")


def read_png(path) -> np.ndarray:
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"), int)


def count(pixels: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((abs(pixels - color) <= 2).all(axis=-1).sum())


BLUE, VERMILION = (0, 114, 178), (213, 94, 0)


class TestRocFigure:
    def test_every_curve_is_drawn(self, tmp_path):
        curves = [
            ("image", np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.8, 1.0])),
            ("pixel", np.array([0.0, 0.3, 0.6, 1.0]), np.array([0.0, 0.5, 0.9, 1.0])),
        ]
        figures.roc_figure(tmp_path / "roc.png", curves, "50$ a $")
        pixels = read_png(tmp_path / "roc.png")
        # Either is longer than the diagram is wide, and at least one pixel thick.
        assert count(pixels, BLUE) > 500
        assert count(pixels, VERMILION) > 500

    def test_many_points_make_the_same_picture(self, tmp_path):
        corners = np.array([[0, 0], [0.02, 0.7], [0.3, 0.75], [0.3, 0.9], [1, 1]])
        counts = (200_000, 1000, 3, 100_000)  # as uneven as curves over pixels are
        fpr, tpr = (
            np.concatenate(
                [
                    np.linspace(start, stop, count, endpoint=False)
                    for start, stop, count in zip(axis, axis[1:], counts, strict=False)
                ]
                + [[1.0]]
            )
            for axis in corners.T
        )
        figures.roc_figure(tmp_path / "few.png", [("a", *corners.T)], "")
        figures.roc_figure(tmp_path / "many.png", [("a", fpr, tpr)], "")
        few, many = read_png(tmp_path / "few.png"), read_png(tmp_path / "many.png")
        # A point left out lies within 1/1000 of the diagram, less than a pixel, of one
        # that is drawn: only the smoothing at the line's edge may differ.
        assert count(few, BLUE) > 500
        assert ((few == BLUE).all(axis=-1) & (abs(many - few).max(axis=-1) > 128)).sum() == 0


class TestScoreHistogram:
    scores = np.array([1.0, 1.5, 2.0, 2.2, 7.0, 8.0, 8.5], np.float32)
    labels = np.array([0, 0, 0, 1, 1, 1, 1])

    def draw(self, path, scores, labels, threshold):
        figures.score_histogram(path, scores, labels, threshold)
        return read_png(path)

    def test_both_kinds_are_drawn(self, tmp_path):
        pixels = self.draw(tmp_path / "a.png", self.scores, self.labels, None)
        assert count(pixels, BLUE) > 100
        assert count(pixels, VERMILION) > 100

    def test_labels_are_not_swapped(self, tmp_path):
        pixels = self.draw(tmp_path / "a.png", self.scores, self.labels, None)
        pixels = pixels[pixels.shape[0] // 2 :]  # below the legend
        columns = np.arange(pixels.shape[1])
        centres = [
            np.average(columns, weights=(abs(pixels - color) <= 2).all(axis=-1).sum(axis=0))
            for color in (BLUE, VERMILION)
        ]
        assert centres[0] < centres[1]

    def test_threshold_is_a_line_across(self, tmp_path):
        without = self.draw(tmp_path / "a.png", self.scores, self.labels, None)
        pixels = self.draw(tmp_path / "b.png", self.scores, self.labels, 5.0)
        added = (pixels < 30).all(axis=-1) & ~(without < 30).all(axis=-1)
        assert added.sum(axis=0).max() > pixels.shape[0] / 3

    @pytest.mark.parametrize(
        ("scores", "labels"),
        [
            (np.array([1.0, 2.0, 3.0]), np.array([0, 0, 0])),
            (np.array([1.0, 2.0, 3.0]), np.array([1, 1, 1])),
            (np.array([2.0, 2.0]), np.array([0, 1])),
            (np.array([2.0]), np.array([1])),
            (np.array([2, np.nextafter(np.float32(2), 3)], np.float32), np.array([0, 1])),
        ],
    )
    def test_degenerate_sets(self, tmp_path, scores, labels):
        pixels = self.draw(tmp_path / "a.png", scores, labels, 2.5)
        assert count(pixels, BLUE if labels[0] == 0 else VERMILION) > 100


def test_matplotlib_is_imported_late_and_left_alone():
    program = """
        import os, pathlib, sys
        import numpy as np
        from padim_jax.output import figures

        image, zeros = np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32))
        scale = figures.ColorScale(0.0, 1.0)
        figures.panels(image, zeros > 0, zeros, 0.5, scale, "a.png")
        figures.overlay(image, zeros, scale, zeros >= 0.5)
        assert "matplotlib" not in sys.modules

        import matplotlib
        names = set(matplotlib.rcParams) - {"backend"}  # reading that one imports pyplot
        before = {name: matplotlib.rcParams[name] for name in names}
        rates = np.array([0.0, 1.0])
        nowhere = pathlib.Path(os.devnull)
        figures.roc_figure(nowhere, [("a", rates, rates)], "title")
        figures.score_histogram(nowhere, rates, np.array([0, 1]), 0.5)
        assert "matplotlib.pyplot" not in sys.modules
        assert {name: matplotlib.rcParams[name] for name in names} == before
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(program)], check=True)
