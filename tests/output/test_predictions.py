"""Unlabelled images: which are found, and where on them the anomaly map comes to lie."""

import contextlib
import csv
import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import small
from PIL import Image

from padim_jax.config.settings import ImageConfig
from padim_jax.core.calibration import Calibration, calibrate
from padim_jax.core.regions import Region
from padim_jax.data import input_pipeline, listing
from padim_jax.data.listing import find
from padim_jax.data.records import Record
from padim_jax.errors import UserError
from padim_jax.output import figures, predictions
from padim_jax.output.predictions import (
    Thresholds,
    Writer,
    read_evaluation,
    restore_map,
    thresholds,
)

NO_MEAN = (0.0, 0.0, 0.0)
NO_STD = (1.0, 1.0, 1.0)

# Resized to, cropped to, original size: enlarged, shrunk, rectangular, odd remainders.
GEOMETRIES = [
    ((32, 32), None, (48, 48)),
    ((32, 32), None, (20, 20)),
    ((32, 24), None, (19, 51)),
    ((32, 32), (24, 24), (48, 48)),
    ((32, 32), (17, 24), (45, 75)),
    ((25, 32), (17, 32), (16, 32)),
    ((32, 32), (32, 16), (32, 32)),
]


def preprocessing(resize: tuple[int, int], crop: tuple[int, int] | None) -> ImageConfig:
    return ImageConfig(resize, "bilinear", crop, NO_MEAN, NO_STD, 0.0, "centre", 0)


def noise(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).uniform(1, 9, size).astype(np.float32)


def original_pixel(position: int, original: int, resized: int, crop: int) -> Fraction | None:
    """Where a pixel's centre lies in the map, in pixels; None outside of the crop."""
    edge = Fraction(2 * position + 1, 2) * Fraction(resized, original)
    edge -= round((resized - crop) / 2)
    return edge - Fraction(1, 2) if 0 <= edge <= crop else None


def restore_slowly(anomaly_map: np.ndarray, size: tuple[int, int], config: ImageConfig):
    """The same in exact fractions, pixel by pixel."""
    full = np.full(size, np.nan)
    for row, column in np.ndindex(size):
        y = original_pixel(row, size[0], config.resize[0], config.size[0])
        x = original_pixel(column, size[1], config.resize[1], config.size[1])
        if y is None or x is None:
            continue
        last = config.size[0] - 1, config.size[1] - 1
        y, x = min(max(y, Fraction(0)), last[0]), min(max(x, Fraction(0)), last[1])
        value = Fraction(0)
        for i in {int(y), min(int(y) + 1, last[0])}:
            for j in {int(x), min(int(x) + 1, last[1])}:
                weight = (1 - abs(y - i)) * (1 - abs(x - j))
                value += weight * Fraction(float(anomaly_map[i, j]))
        full[row, column] = float(value)
    return full


class TestRestoreMap:
    @pytest.mark.parametrize(("resize", "crop", "size"), GEOMETRIES)
    def test_against_exact_fractions(self, resize, crop, size):
        config = preprocessing(resize, crop)
        anomaly_map = noise(config.size)
        found = restore_map(anomaly_map, size, config)
        assert found.dtype == np.float32
        # Two interpolations of positive float32 numbers: a few roundings of 6e-8.
        np.testing.assert_allclose(found, restore_slowly(anomaly_map, size, config), rtol=1e-6)

    @pytest.mark.parametrize("size", [(96, 96), (100, 131), (64, 200)])
    def test_without_crop_as_pillow_enlarges(self, size):
        anomaly_map = noise((64, 64))
        found = restore_map(anomaly_map, size, preprocessing((64, 64), None))
        filtered = Image.fromarray(anomaly_map).resize(size[::-1], Image.Resampling.BILINEAR)
        np.testing.assert_allclose(found, np.asarray(filtered), rtol=1e-6)

    @pytest.mark.parametrize(("resize", "crop", "size"), GEOMETRIES)
    def test_constant_map_stays_constant_and_nan_is_exactly_outside(self, resize, crop, size):
        config = preprocessing(resize, crop)
        found = restore_map(np.full(config.size, np.pi, np.float32), size, config)
        inside = np.zeros(size, bool)
        rows, columns = (
            [
                i
                for i in range(size[axis])
                if original_pixel(i, size[axis], resize[axis], config.size[axis]) is not None
            ]
            for axis in (0, 1)
        )
        inside[np.ix_(rows, columns)] = True
        np.testing.assert_array_equal(np.isnan(found), ~inside)
        assert inside.all() == (crop is None)
        np.testing.assert_allclose(found[inside], np.float32(np.pi), rtol=2e-7)

    @pytest.mark.parametrize(("resize", "crop"), [((64, 64), None), ((64, 80), (48, 56))])
    @pytest.mark.parametrize("size", [(200, 150), (90, 333)])
    def test_undoes_preprocessing(self, resize, crop, size):
        """What is seen at a place in the map lies at that place of the original."""
        height, width = size
        rows, columns = slice(height // 2, height // 2 + 20), slice(width // 3, width // 3 + 30)
        image = np.zeros((*size, 3), np.uint8)
        image[rows, columns] = 255
        config = preprocessing(resize, crop)
        seen = input_pipeline.preprocess(Image.fromarray(image), config)
        found = np.nan_to_num(restore_map(seen[..., 0].astype(np.float32), size, config))
        for axis, wanted in enumerate((rows, columns)):
            profile = found.sum(axis=1 - axis)
            centre = np.average(np.arange(size[axis]), weights=profile)
            # Half a pixel of the map, the usual mistake, is one to two and a half here.
            assert abs(centre - (wanted.start + wanted.stop - 1) / 2) < 0.2

    def test_peak_lands_on_its_pixel(self):
        # Three original pixels to one of the map, whose rows 8..55 are the crop.
        config = preprocessing((64, 64), (48, 48))
        anomaly_map = np.zeros((48, 48), np.float32)
        anomaly_map[5, 30] = 1
        found = restore_map(anomaly_map, (192, 192), config)
        row, column = np.unravel_index(np.nanargmax(found), found.shape)
        assert (row, column) == (3 * (8 + 5) + 1, 3 * (8 + 30) + 1)
        assert found[row, column] == 1


@pytest.fixture
def parts(tmp_path: pathlib.Path) -> pathlib.Path:
    """Images at several depths among other things."""
    folder = tmp_path / "parts ü"
    for name in (
        "b.png",
        "a.JPG",
        "notes.txt",
        ".hidden.png",
        "scores.csv",
        "sub/c.tiff",
        "sub/deep/[1].png",
        "looks like one.png/d.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def names(records: list[Record]) -> list[str]:
    return [record.relative_path for record in records]


class TestFind:
    def test_file(self, parts: pathlib.Path):
        (record,) = find(str(parts / "b.png"))
        assert (record.image, record.relative_path) == (parts / "b.png", "b.png")
        # Nothing is known of it.
        assert (record.split, record.mask, record.defect_type) == ("test", None, "unknown")

    def test_file_with_the_characters_of_a_glob(self, parts: pathlib.Path):
        assert names(find(str(parts / "sub" / "deep" / "[1].png"))) == ["[1].png"]

    def test_folder_recursively_sorted_images_only(self, parts: pathlib.Path):
        found = find(str(parts))
        assert names(found) == [
            "a.JPG",
            "b.png",
            "looks like one.png/d.png",
            "sub/c.tiff",
            "sub/deep/[1].png",
        ]
        assert [record.image for record in found] == [parts / name for name in names(found)]

    def test_glob(self, parts: pathlib.Path):
        assert names(find(f"{parts}/*.png")) == ["b.png"]
        assert names(find(f"{parts}/**/*.png")) == [
            "b.png",
            "looks like one.png/d.png",
            "sub/deep/[1].png",
        ]
        # Paths start at the folder that the images share.
        assert names(find(f"{parts}/sub/**/*.*")) == ["c.tiff", "deep/[1].png"]
        assert names(find(f"{parts}/*/deep/*.png")) == ["[1].png"]

    def test_relative(self, parts: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(parts / "sub")
        assert names(find(".")) == ["c.tiff", "deep/[1].png"]
        assert names(find("*.tiff")) == ["c.tiff"]
        assert names(find("*/*.png")) == ["[1].png"]
        assert names(find("../*.png")) == ["b.png"]

    HIDDEN = (
        *(".thumbnails/b.png", ".Trash-1000/files/000.png", "sub/@eaDir/c.tiff"),
        *("__MACOSX/b.png", "lost+found/#1.png"),
    )

    @pytest.fixture
    def strewn(self, parts: pathlib.Path) -> pathlib.Path:
        """With what desktops and network storage put beside images."""
        for name in (*self.HIDDEN, ".git/HEAD"):
            (parts / name).parent.mkdir(parents=True)
            (parts / name).write_bytes(b"")
        return parts

    def test_hidden_and_system_folders_are_passed_over(self, strewn, capsys):
        images = ["a.JPG", "b.png", "looks like one.png/d.png", "sub/c.tiff"]
        images.append("sub/deep/[1].png")
        assert names(find(str(strewn))) == images
        # In one line; .git holds no image.
        assert capsys.readouterr().out == (
            "passed over: 5 hidden or system folders with images (.Trash-1000, .thumbnails, "
            "__MACOSX, lost+found, @eaDir)\n"
        )
        assert names(find(f"{strewn}/**/*.[jptJ]*[gfG]")) == images
        assert "passed over: 5 hidden or system folders" in capsys.readouterr().out
        assert names(find(f"{strewn}/sub")) == ["c.tiff", "deep/[1].png"]
        assert "passed over: 1 hidden or system folder " in capsys.readouterr().out

    def test_what_is_named_is_not_passed_over(self, strewn, capsys):
        for name in self.HIDDEN:
            folder, _, file = name.rpartition("/")
            assert names(find(f"{strewn}/{folder}")) == [file]
            assert names(find(f"{strewn}/{folder}/*.*")) == [file]
        assert capsys.readouterr().out == ""

    def test_linked_folders_are_followed_once(self, tmp_path: pathlib.Path):
        for name in ("in/z/a.png", "apart/b.png", "apart/sub/c.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        for link, target in {
            "in/0": "z",
            "in/one": "../apart",
            "in/two": "../apart",
            "in/z/up": "..",
            "apart/back": "../in",
            "in/nowhere": "nothing",
        }.items():
            (tmp_path / link).symlink_to(target)
        once = ["one/b.png", "one/sub/c.png", "z/a.png"]
        assert names(find(str(tmp_path / "in"))) == once
        assert names(find(f"{tmp_path}/in/**/*.png")) == once

    def test_links_to_images_are_images(self, parts: pathlib.Path):
        (parts / "sub" / "b.png").symlink_to("../b.png")
        (parts / "sub" / "gone.png").symlink_to("nothing.png")
        assert {"b.png", "sub/b.png", "sub/gone.png"} <= set(names(find(str(parts))))

    @pytest.mark.parametrize("pattern", ["empty", "*.gif", "nowhere/", "b.jpg"])
    def test_nothing(self, pattern: str, parts: pathlib.Path):
        (parts / "empty").mkdir()
        given = f"{parts}/{pattern}"
        with pytest.raises(UserError) as caught:
            find(given)
        assert f"--input={given}: no image there" in str(caught.value)


GOOD = {
    "image_f1_threshold": 4.5,
    "pixel_f1_threshold": 3.5,
    "color_scale": [1.0, 6.0],
    "detector": "0123abcd",
}


class TestThresholdsOfAnEvaluation:
    def read(self, folder: pathlib.Path, content: Any) -> Thresholds:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "metrics.json").write_text(text)
        return read_evaluation(folder / "metrics.json", "0123abcd")

    def test_best_f1(self, tmp_path: pathlib.Path):
        found = self.read(tmp_path, GOOD | {"aupro": 0.9})
        assert (found.image, found.pixel) == (4.5, 3.5)
        assert found.scale == figures.ColorScale(1.0, 6.0)
        assert "threshold 4.5: the best F1 on the test set's labels" in found.text

    def test_undefined_thresholds(self, tmp_path: pathlib.Path):
        unknown = {"image_f1_threshold": None, "pixel_f1_threshold": None}
        found = self.read(tmp_path, GOOD | unknown)
        assert (found.image, found.pixel) == (None, None)
        assert found.scale == figures.ColorScale(1.0, 6.0)
        assert found.text.startswith("no thresholds")

    def test_no_evaluation(self, tmp_path: pathlib.Path):
        found = read_evaluation(tmp_path / "metrics.json", "0123abcd")
        assert dataclasses.replace(found, text="") == Thresholds()
        # What to do about it.
        assert str(tmp_path / "metrics.json") in found.text
        assert "--mode=calibrate" in found.text

    def test_evaluation_of_another_detector(self, tmp_path: pathlib.Path):
        found = self.read(tmp_path, GOOD | {"detector": "89ef"})
        assert dataclasses.replace(found, text="") == Thresholds()
        assert found.text.startswith("no thresholds")

    @pytest.mark.parametrize(
        "content",
        [
            "",
            '{"image_f1_threshold": 4.5, ',
            "[]",
            "\x00",
            *({k: v for k, v in GOOD.items() if k != missing} for missing in GOOD),
            GOOD | {"color_scale": [6.0, 1.0]},
            GOOD | {"color_scale": [1.0]},
            GOOD | {"color_scale": None},
            GOOD | {"color_scale": ["1", "6"]},
            GOOD | {"image_f1_threshold": "high"},
            GOOD | {"image_f1_threshold": float("nan")},
            GOOD | {"pixel_f1_threshold": [3.5]},
            "[" * 100_000,
        ],
    )
    def test_broken(self, content: Any, tmp_path: pathlib.Path):
        with pytest.raises(UserError, match="not an evaluation's results") as caught:
            self.read(tmp_path, content)
        assert str(caught.value).startswith(f"{tmp_path / 'metrics.json'}: ")


def calibration(image_rate: float = 0.1) -> Calibration:
    """Of normal images with the median 1 and scores of 2 to 3."""
    scores = np.linspace(2, 3, 40, dtype=np.float32)
    maps = np.ones((40, 8, 8), np.float32)
    maps[:, 3, 3] = scores
    return calibrate([(maps, scores[:, None])], 40, "held_out", image_rate, 0.01)


class TestThresholdsOfNormalImages:
    def test_threshold_in_the_middle_of_the_colours(self):
        found, known = thresholds(calibration()), calibration()
        assert (found.image, found.pixel) == (known.image_threshold, known.pixel_threshold)
        assert found.scale is not None
        assert found.scale.low == 1
        assert (found.scale.low + found.scale.high) / 2 == pytest.approx(known.image_threshold)
        assert "40 normal images" in found.text
        assert "10 %" in found.text

    def test_colours_of_scores_that_are_no_distances(self):
        known = dataclasses.replace(calibration(), image_threshold=0.1)
        found = thresholds(known, "variation")
        assert (found.image, found.pixel) == (0.1, known.pixel_threshold)
        assert found.scale is not None
        assert (found.scale.low + found.scale.high) / 2 == pytest.approx(known.pixel_threshold)

    def test_a_warning_about_the_normal_images(self):
        warned = dataclasses.replace(calibration(), warning="near copies")
        assert "warning: near copies" in thresholds(warned).text

    def test_a_threshold_below_what_is_normal(self):
        """Whoever asks for it gets it, and colours all the same."""
        low = dataclasses.replace(calibration(), image_threshold=0.5)
        found = thresholds(low)
        assert found.image == 0.5
        assert found.scale == figures.ColorScale(1.0, 2.0)


class TestWriter:
    CONFIG = preprocessing((64, 64), (48, 48))

    def batch(self, folder: pathlib.Path, sizes: dict[str, tuple[int, int]]):
        """Images on disk and what a detector may have said of them."""
        for name, size in sizes.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path)
        records = [Record("test", folder / n, None, 0, listing.UNKNOWN, n) for n in sizes]
        maps = np.stack([noise((48, 48)) + number for number in range(len(sizes))])
        digests = [hashlib.sha256((folder / name).read_bytes()).digest() for name in sizes]
        stacked = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        return records, maps, maps.max(axis=(1, 2)), stacked

    @contextlib.contextmanager
    def writer(
        self,
        folder: pathlib.Path,
        suffix: str,
        known: Thresholds,
        calibration: Calibration | None,
        config: ImageConfig = CONFIG,
    ) -> Iterator[Writer]:
        folder.mkdir(exist_ok=True)
        with (
            contextlib.closing(predictions.open_journal(folder, {})) as journal,
            Writer(
                folder, small.preprocessed(config), suffix, known, calibration, journal
            ) as writer,
        ):
            journal.keep(0)
            yield writer

    def rows(self, folder: pathlib.Path) -> list[list[str]]:
        with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))

    @pytest.mark.parametrize("suffix", ["npy", "tiff"])
    def test_files_have_the_size_of_their_image(self, suffix: str, tmp_path: pathlib.Path):
        sizes = {"a.png": (70, 90), "Ordner ü/a.png": (20, 300), "Ordner ü/a.bmp": (64, 64)}
        records, maps, scores, digests = self.batch(tmp_path / "in", sizes)
        with self.writer(tmp_path / "out", suffix, Thresholds(), None) as writer:
            writer.add(records, maps, scores, digests)
        for (name, size), anomaly_map in zip(sizes.items(), maps, strict=True):
            path = tmp_path / "out" / "maps" / f"{name}.{suffix}"
            found = np.load(path) if suffix == "npy" else np.asarray(Image.open(path))
            # Bit for bit, NaN outside of the crop included.
            np.testing.assert_array_equal(found, restore_map(anomaly_map, size, self.CONFIG))
            assert np.isnan(found).any()
            with Image.open(tmp_path / "out" / "overlays" / f"{name}.jpg") as overlay:
                assert overlay.size == size[::-1]

    def test_rows_are_there_after_each_batch(self, tmp_path: pathlib.Path):
        """An interrupted run keeps what it has scored."""
        first = self.batch(tmp_path / "in", {"1.png": (40, 40), "Teil, ü 2.png": (40, 40)})
        second = self.batch(tmp_path / "in", {"3.png": (40, 40)})
        with self.writer(tmp_path, "npy", Thresholds(), None) as writer:
            writer.add(*first)
            assert [row[0] for row in self.rows(tmp_path)] == ["path", "1.png", "Teil, ü 2.png"]
            writer.add(*second)
            rows = self.rows(tmp_path)
        assert rows[0] == list(predictions.COLUMNS)
        assert [row[0] for row in rows[1:]] == ["1.png", "Teil, ü 2.png", "3.png"]
        scores = np.array([row[1] for row in rows[1:]], np.float32)
        np.testing.assert_array_equal(scores, np.concatenate([first[2], second[2]]))
        assert [row[2:] for row in rows[1:]] == 3 * [4 * [""]]  # nothing to compare with

    def test_a_folder_that_is_removed_meanwhile(self, tmp_path: pathlib.Path):
        batch = self.batch(tmp_path / "in", {"1.png": (40, 40)})
        folder = tmp_path / "out"
        with self.writer(folder, "npy", Thresholds(), None) as writer:
            shutil.rmtree(folder)
            with pytest.raises(UserError, match=r"journal\.sqlite: was removed while"):
                writer.add(*batch)

    def test_predicted_from_the_threshold_on(self, tmp_path: pathlib.Path):
        sizes = {f"{number}.png": (40, 40) for number in range(3)}
        records, maps, scores, digests = self.batch(tmp_path, sizes)
        known = Thresholds(float(scores[1]), None, figures.ColorScale(0.0, 9.0))
        with self.writer(tmp_path, "npy", known, None) as writer:
            writer.add(records, maps, scores, digests)
        assert [row[2] for row in self.rows(tmp_path)[1:]] == ["0", "1", "1"]

    def test_calibrated(self, tmp_path: pathlib.Path):
        records, maps, _, digests = self.batch(
            tmp_path, {f"{n}.png": (40, 40) for n in range(3)}
        )
        scores, known = np.array([1.9, 2.5, 30], np.float32), calibration()
        with self.writer(tmp_path, "npy", thresholds(known), known) as writer:
            writer.add(records, maps, scores, digests)
        rows = self.rows(tmp_path)[1:]
        assert [row[2] for row in rows] == ["0", "0", "1"]
        # None of 40 lower, half of them, and as far beyond as it may be.
        levels = [float(row[3]) for row in rows]
        assert levels[0] == 0
        assert levels[1] == pytest.approx(0.5, abs=0.02)
        assert 0.9999 < levels[2] < 1

    @pytest.mark.parametrize("scale", [None, figures.ColorScale(0.0, 50.0)])
    def test_one_colour_scale_for_all_batches(self, scale, tmp_path: pathlib.Path):
        """Colours can be compared between images, whatever batch they fall into."""
        batches = [self.batch(tmp_path, {name: (48, 48)}) for name in ("1.png", "2.png")]
        config = preprocessing((48, 48), None)
        known = Thresholds(None, None, scale)
        with self.writer(tmp_path / "one", "npy", known, None, config=config) as writer:
            for batch in batches:
                writer.add(*batch)
        overlays = [tmp_path / "one" / "overlays" / f"{n}.png.jpg" for n in (1, 2)]
        assert overlays[0].read_bytes() == overlays[1].read_bytes()
        # Another map in the second batch shows: with a scale of its own it would not.
        records, maps, scores, digests = batches[1]
        with self.writer(tmp_path / "two", "npy", known, None, config=config) as writer:
            writer.add(*batches[0])
            writer.add(records, 3 * maps, 3 * scores, digests)
        overlays = [tmp_path / "two" / "overlays" / f"{n}.png.jpg" for n in (1, 2)]
        assert overlays[0].read_bytes() != overlays[1].read_bytes()

    def test_results_do_not_depend_on_threads(self, tmp_path: pathlib.Path, monkeypatch):
        sizes = {f"{number}.png": (40 + number, 90 - number) for number in range(20)}
        batch = self.batch(tmp_path / "in", sizes)
        for threads in (1, 7):
            monkeypatch.setattr(predictions, "_THREADS", threads)
            with self.writer(tmp_path / str(threads), "npy", Thresholds(), None) as writer:
                writer.add(*batch)
        one, many = (
            {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*")}
            for folder in (tmp_path / "1", tmp_path / "7")
        )
        assert len(one) == 2 * 20 + 2
        assert many == one
        assert [row[0] for row in self.rows(tmp_path / "7")[1:]] == list(sizes)

    def test_an_image_that_is_gone_meanwhile_is_named(self, tmp_path: pathlib.Path):
        batch = self.batch(tmp_path / "in", {f"{number}.png": (40, 40) for number in range(20)})
        batch[0][9].image.unlink()
        with (
            pytest.raises(UserError, match=r"9\.png: cannot be read"),
            self.writer(tmp_path / "out", "npy", Thresholds(), None) as writer,
        ):
            writer.add(*batch)
        # None of the batch is told.
        assert len(self.rows(tmp_path / "out")) == 1

    def test_regions_as_files(self, tmp_path: pathlib.Path):
        """In the places of the original image, by a schema, as COCO has them, and as masks."""
        sizes = {"a.png": (96, 128), "b.png": (64, 64)}
        records, maps, scores, digests = self.batch(tmp_path / "in", sizes)
        maps = np.ones_like(maps)
        maps[0, 10:20, 4:12] = 9  # 32x16 pixels above and left of it are cropped away
        maps[0, 40, 40] = 8  # too small
        known = Thresholds(5.0, 7.0, figures.ColorScale(0.0, 10.0))
        config = small.preprocessed(
            self.CONFIG, **{"outputs.coco": True, "regions.min_area": 100.0}
        )
        folder = tmp_path / "out"
        folder.mkdir()
        with (
            contextlib.closing(predictions.open_journal(folder, {})) as journal,
            Writer(folder, config, "npy", known, None, journal) as writer,
        ):
            journal.keep(0)
            writer.add(records, maps, scores, digests)
            writer.finish()
        assert [row[4:] for row in self.rows(folder)[1:]] == [["1", "240.0"], ["0", "0.0"]]
        found = json.loads((folder / "regions.json").read_text())
        schema = pathlib.Path(__file__).parents[2] / "docs" / "regions.schema.json"
        jsonschema = pytest.importorskip("jsonschema")
        jsonschema.validate(found, json.loads(schema.read_text()))
        assert (found["threshold"], found["min_area"], found["close"]) == (7.0, 100.0, 0.0)
        first, second = found["images"]
        assert (first["path"], first["width"], first["height"]) == ("a.png", 128, 96)
        assert second["regions"] == []
        (region,) = first["regions"]
        # Resized by 2 across and 1.5 down, and 8 pixels cropped from each side.
        assert region["box"] == [24.0, 27.0, 40.0, 42.0]
        assert region["centroid"] == [32.0, 34.5]
        assert (region["area"], region["peak"], region["mean"]) == (240.0, 9.0, 9.0)
        coco = json.loads((folder / "regions.coco.json").read_text())
        (annotation,) = coco["annotations"]
        assert annotation["bbox"] == [24.0, 27.0, 16.0, 15.0]
        assert annotation["image_id"] == coco["images"][0]["id"] == 1
        assert len(annotation["segmentation"][0]) == 2 * (len(region["contour"][0]) - 1)
        mask = np.asarray(Image.open(folder / "masks" / "a.png.png"))
        assert mask.shape == (96, 128)
        rows, columns = np.nonzero(mask)
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (27, 41, 24, 39)
        assert not np.asarray(Image.open(folder / "masks" / "b.png.png")).any()
        drawn = np.asarray(Image.open(folder / "overlays" / "a.png.jpg")).astype(int)
        box = figures.box_outline((24.0, 27.0, 40.0, 42.0), (96, 128), 1, 4)
        assert drawn[box].mean() > 220
        assert drawn[~box].mean() < 120

    def test_verdicts_by_regions(self):
        """Verdicts by regions need no score."""
        drawn = [predictions.Drawn((4, 4), ()), predictions.Drawn((4, 4), (REGION,))]
        scores = np.array([9.0, 1.0], np.float32)
        for decide, expected in (("score", [1, 0]), ("regions", [0, 1]), ("either", [1, 1])):
            rows = predictions.rows(["a", "b"], scores, drawn, 5.0, None, decide)
            assert [row["predicted"] for row in rows] == expected


REGION = Region((0.0, 0.0, 2.0, 2.0), (1.0, 1.0), 4.0, 9.0, 9.0, ())
