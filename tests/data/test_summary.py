"""What was read: the summary, its warnings, and what masks lose, in whole runs as well."""

import json
import pathlib
import warnings
from typing import Any

import numpy as np
import pytest
import small
from PIL import Image

from padim_jax.config import defaults
from padim_jax.config.settings import validate
from padim_jax.core import metrics
from padim_jax.data import dataset_splits, decoding, input_pipeline, masks, summary
from padim_jax.data.input_pipeline import View
from padim_jax.data.summary import File, Mask
from padim_jax.detector import memory
from padim_jax.errors import DataWarning, UserError
from padim_jax.output import predictions
from padim_jax.runs import evaluate as evaluation
from padim_jax.runs import loading, train


def file(name: str, content: int, kind: str = "good", mode: str = "RGB 8 bit") -> File:
    return File(name, kind, bytes([content]) * 32, (30, 40), mode)


class TestFiles:
    def test_lines(self):
        files = [file("a", 0), file("b", 1, "hole"), file("c", 1)]
        (line,) = summary.lines(summary.summarize({"test": files}))
        assert line == (
            "test: 3 images (good 2, hole 1) of 40x30, RGB 8 bit; 1 copies of others"
        )

    def test_few_grey_levels_are_named(self):
        files = [file("a", 0)._replace(levels=8), file("b", 1), file("c", 2)._replace(levels=9)]
        found = summary.summarize({"train": files})
        (line,) = summary.lines(found)
        assert line == (
            "train: 3 images of 40x30, RGB 8 bit; 2 keep fewer than 32 grey levels (a 8, c 9)"
        )
        assert summary.to_dict(found)["splits"]["train"]["few_levels"] == {"a": 8, "c": 9}

    def test_nothing_odd_is_nothing_said(self):
        found = summary.summarize(
            {"train": [file("a", 0), file("a2", 0)], "validation": [], "test": [file("b", 1)]}
        )
        assert summary.warnings(found) == []
        assert list(found.splits) == ["train", "test"]
        assert found.shared == {}

    def test_images_in_two_splits_are_named(self):
        train, test = [file("a", 0), file("b", 1)], [file("c", 1), file("d", 2)]
        found = summary.summarize({"train": train, "test": test})
        assert found.shared == {"train, test": ["c"]}
        (warning,) = summary.warnings(found)
        assert warning.startswith("1 of 2 test images are training images as well")
        assert ": c." in warning

    def test_images_that_a_model_knows_are_named(self):
        found = summary.summarize({"test": [file("c", 1)]}, {bytes([1]) * 32})
        (warning,) = summary.warnings(found)
        assert "images that the model was fitted to as well (the same bytes): c." in warning

    def test_copies_of_test_images_are_named(self):
        found = summary.summarize({"test": [file("a", 0), file("b", 0), file("c", 0)]})
        (warning,) = summary.warnings(found)
        assert warning.startswith("2 of 3 test images are copies of others")
        assert ": b, c." in warning

    def test_other_modes_than_the_training_images_are_named(self):
        test = [file("b", 1, mode="grey 8 bit")]
        found = summary.summarize({"train": [file("a", 0)], "test": test})
        (warning,) = summary.warnings(found)
        assert warning.startswith("test images of grey 8 bit, where all training images are of")

    def test_json(self):
        found = summary.summarize({"train": [file("a", 0)]})
        assert json.loads(json.dumps(summary.to_dict(found))) == {
            "splits": {
                "train": {
                    "images": 1,
                    "types": {"good": 1},
                    "sizes": {"40x30, RGB 8 bit": 1},
                    "copies": [],
                    "few_levels": {},
                }
            },
            "shared": {},
            "masks": None,
        }


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("RGB", "RGB 8 bit"),
        ("L", "grey 8 bit"),
        ("1", "grey 1 bit"),
        ("I;16", "grey 16 bit"),
        ("RGBA", "RGBA 8 bit"),
        ("P", "palette 8 bit"),
    ],
)
def test_headers_say_size_and_mode(mode: str, expected: str, tmp_path: pathlib.Path):
    Image.new(mode, (40, 30)).save(tmp_path / "a.png")
    assert decoding.describe((tmp_path / "a.png").read_bytes()) == ((30, 40), expected)


@pytest.mark.parametrize("data", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_headers_that_say_nothing(data: bytes):
    assert decoding.describe(data) is None


def mask(name: str = "a", **given: int) -> Mask:
    fields = {"pixels": 100, "defect": 9, "pixels_left": 25, "defect_left": 2, "regions": 2}
    fields |= {"resized_away": 0, "cropped_away": 0} | given
    return Mask(name, **fields)


class TestMasks:
    def test_nothing_odd_is_nothing_said(self):
        found = summary.summarize_masks([mask(), mask()])
        assert found is not None
        assert summary.mask_warnings(found, (5, 5), "model") == []
        assert summary.mask_line(found, (5, 5)) == (
            "masks: 2 with 4 regions of defects, 9 % of their pixels; at the model's 5x5 4 of "
            "these regions, 8 %"
        )
        assert summary.summarize_masks([]) is None

    def test_lost_regions(self):
        found = summary.summarize_masks([mask("a", resized_away=1), mask("b", cropped_away=2)])
        assert found is not None
        (warning,) = summary.mask_warnings(found, (5, 5), "model")
        assert warning.startswith("3 of 4 regions of defects have no pixel at the model's 5x5")
        assert "as in a, b" in warning
        (warning,) = summary.mask_warnings(found, (5, 5), "full")
        assert warning.startswith("2 of 4 regions")

    def test_empty_and_full(self):
        found = summary.summarize_masks([mask("a", defect=0), mask("b", defect=51)])
        assert found is not None
        empty, full = summary.mask_warnings(found, (5, 5), "model")
        assert "1 of 2 masks of anomalous images have no defect pixel: a." in empty
        assert "1 of 2 masks call more than half of the image a defect: b." in full


class TestFullCheck:
    def test_a_tenth_is_taken(self):
        check = masks.FullCheck(10)
        check.add("a", 51, 100)
        check.add("b", 50, 100)
        with pytest.raises(UserError, match=r"^c: 100% of this mask") as caught:
            check.add("c", 100, 100)
        assert "2 of 10 masks" in str(caught.value)
        assert "1 of them have no pixel of the value 0" in str(caught.value)
        assert "config.dataset.inverted_masks=yes" in str(caught.value)


@pytest.mark.parametrize("view", [View(0.0, 3, 20), View(25.0, 8, 16), View(-140.0, 5, 10)])
def test_a_map_of_any_view_comes_back_to_its_place(view: View):
    values: Any = defaults.get_config()
    values.image.resize, values.image.crop = (80, 96), (64, 64)
    config = validate(values).image
    rows, columns = np.mgrid[:160, :240].astype(np.float32)
    for ramp in (rows, columns):
        seen = Image.fromarray(ramp).resize((96, 80), Image.Resampling.BILINEAR)
        seen = seen.rotate(view.angle, Image.Resampling.BILINEAR)
        box = (view.left, view.top, view.left + 64, view.top + 64)
        full = predictions.restore_map(np.array(seen.crop(box)), (160, 240), config, view)
        off = np.abs(full - ramp)
        # Two pixels of the original for one of the map's: a map's border is half of that off.
        assert np.nanquantile(off, 0.9) < 0.1
        assert 0.45 < np.mean(~np.isnan(off)) < 0.55  # 64x64 of 80x96


# Whole runs: 256x192 images, seen at 64x48, with defects of 3x3 pixels in two of three masks.

SIZE = (192, 256)


def settings(root: pathlib.Path, **given: Any) -> Any:
    ours = {"image.resize": (48, 64), "outputs.figures": "none", "threshold.normal": "none"}
    return small.values(root, **(ours | given))


def small_defects() -> list[np.ndarray]:
    """Six regions, of which three lie between the pixels that nearest resizing takes."""
    found = [np.zeros(SIZE, bool) for _ in range(3)]
    # At 48x64 row and column 4 k + 2 are taken.
    for image, top, left in [(0, 40, 40), (0, 80, 100), (1, 60, 60), (1, 99, 140)]:
        found[image][top : top + 3, left : left + 3] = True
    for top, left in [(43, 43), (120, 59)]:
        found[2][top : top + 3, left : left + 3] = True
    return found


def write_part(root: pathlib.Path, defects: list[np.ndarray], inverted: bool = False) -> None:
    rng = np.random.default_rng(0)

    def save(name: str, pixels: np.ndarray) -> None:
        path = root / "part" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    def image() -> np.ndarray:
        return rng.integers(100, 130, (*SIZE, 3), np.uint8)

    for number in range(6):
        save(f"train/good/{number:03}.png", image())
    for number in range(2):
        save(f"test/good/{number:03}.png", image())
    for number, defect in enumerate(defects):
        pixels = image()
        pixels[defect] = 255
        save(f"test/hole/{number:03}.png", pixels)
        stored = defect != inverted
        save(f"ground_truth/hole/{number:03}_mask.png", stored.astype(np.uint8) * 255)


def evaluate(root: pathlib.Path, workdir: pathlib.Path, **given: Any) -> dict[str, Any]:
    config = validate(settings(root, **given))
    return train.train_and_eval(config, workdir, workdir / "checkpoint")


class TestRuns:
    def test_regions_that_vanish_are_told_and_count_at_full_resolution(
        self, tmp_path: pathlib.Path
    ):
        defects = small_defects()
        write_part(tmp_path, defects)
        with pytest.warns(DataWarning, match="of 6 regions of defects have no pixel") as said:
            measured = evaluate(tmp_path, tmp_path / "model")
        (warning,) = [str(one.message) for one in said]
        found = measured["data"]["masks"]
        assert (found["masks"], found["regions"], found["resized_away"]) == (3, 6, 3)
        assert warning.startswith("3 of 6 regions")
        assert measured["data"]["warnings"] == [warning]
        assert measured["resolution"] == "model"

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            full = evaluate(tmp_path, tmp_path / "full", **{"metrics.resolution": "full"})
        assert full["resolution"] == "full"
        assert full["image_auroc"] == measured["image_auroc"]
        assert full["pixel_auroc"] != measured["pixel_auroc"]
        # Against all pixels in memory.
        config = validate(settings(tmp_path))
        detector = loading.load(tmp_path / "full" / "checkpoint")
        source = dataset_splits.open_dataset(config)["test"]
        scored, _ = evaluation.score(detector, source)
        assert scored is not None
        maps = np.stack([predictions.restore_map(x, SIZE, config.image) for x in scored.maps])
        truth = np.stack([*[np.zeros(SIZE, bool)] * 2, *defects])
        kinds = [record.defect_type for record in source.records]
        expected = metrics.evaluate(scored.labels, scored.scores, kinds, truth, maps)
        for key in ("pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_f1_threshold", "aupro"):
            assert full[key] == pytest.approx(expected[key], abs=1e-12), key
            assert full["per_defect"]["hole"][key] == full[key]
        page = (tmp_path / "full" / "report.html").read_text(encoding="utf-8")
        assert ">Data</h2>" in page
        assert "masks: 3 with 6 regions of defects" in page

    def test_grey_levels_kept(self, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
        """Per split: in metrics.json, printed before the fit, and in the report."""
        defect = np.zeros(SIZE, bool)
        defect[60:100, 80:130] = True
        write_part(tmp_path, [defect])
        rng = np.random.default_rng(0)
        for path in tmp_path.glob("part/*/*/*.png"):
            if path.parent.name != "hole" or "test" in path.parts:
                pixels = rng.integers(21000, 23040, SIZE, np.uint16)
                pixels[0] = rng.integers(0, 65536, SIZE[1])  # many levels, but in one image
                if path.name != "001.png":
                    pixels[0] = pixels[1]
                Image.fromarray(pixels).save(path)
        with pytest.warns(DataWarning, match="grey levels"):
            measured = evaluate(tmp_path, tmp_path / "full")
        few = {x: y["few_levels"] for x, y in measured["data"]["splits"].items()}
        names = [f"part/train/good/00{i}.png" for i in (0, 2, 3, 4, 5)]
        assert few["train"] == dict.fromkeys(names, 8)
        assert few["test"] == {"part/test/good/000.png": 8, "part/test/hole/000.png": 8}
        said = capsys.readouterr().out.partition("fitted")[0]
        assert "5 keep fewer than 32 grey levels (part/train/good/000.png 8, " in said
        assert "2 keep fewer than 32 grey levels (part/test/good/000.png 8, " in said
        warned = [x for x in measured["data"]["warnings"] if "grey levels" in x]
        assert [x[:13] for x in warned] == ["5 of 6 images", "2 of 3 images"]
        page = (tmp_path / "full" / "report.html").read_text(encoding="utf-8")
        assert "few grey levels" in page
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            measured = evaluate(tmp_path, tmp_path / "range", **{"image.range": "train"})
        assert all(not x["few_levels"] for x in measured["data"]["splits"].values())

    def test_what_the_crop_leaves_out_is_told(self, tmp_path: pathlib.Path):
        defect = np.zeros(SIZE, bool)
        defect[:8, :8] = defect[90:110, 90:110] = True
        write_part(tmp_path, [defect])
        with pytest.warns(DataWarning, match=r"^1 of 2 regions .*1 outside of the crop"):
            measured = evaluate(
                tmp_path,
                tmp_path / "results",
                **{"image.crop": (36, 48), "metrics.resolution": "full"},
            )
        assert measured["data"]["masks"]["cropped_away"] == 1
        assert measured["pixel_auroc"] is not None

    def test_inverted_masks(self, tmp_path: pathlib.Path):
        defect = np.zeros(SIZE, bool)
        defect[60:100, 80:130] = True
        write_part(tmp_path / "right", [defect] * 2)
        write_part(tmp_path / "inverted", [defect] * 2, inverted=True)
        right = evaluate(tmp_path / "right", tmp_path / "a")
        with pytest.raises(UserError, match=r"000_mask\.png: 96% .*inverted_masks=yes"):
            evaluate(tmp_path / "inverted", tmp_path / "b")
        assert not (tmp_path / "b" / "metrics.json").exists()
        mended = evaluate(
            tmp_path / "inverted", tmp_path / "c", **{"dataset.inverted_masks": "yes"}
        )
        with pytest.warns(DataWarning, match="2 of 2 masks call more than half"):
            taken = evaluate(
                tmp_path / "inverted", tmp_path / "d", **{"dataset.inverted_masks": "no"}
            )
        assert mended["pixel_auroc"] == right["pixel_auroc"]
        assert mended["aupro"] == right["aupro"]
        assert taken["data"]["masks"]["area"] > 0.9
        assert taken["pixel_auroc"] != right["pixel_auroc"]

    def test_masks_without_a_defect_are_named(self, tmp_path: pathlib.Path):
        defect = np.zeros(SIZE, bool)
        defect[60:100, 80:130] = True
        write_part(tmp_path, [defect, np.zeros(SIZE, bool)])
        with pytest.warns(
            DataWarning, match=r"1 of 2 masks .* no defect pixel: part/test/hole"
        ):
            evaluate(tmp_path, tmp_path / "results")

    def test_strict_stops_before_the_fit(self, tmp_path: pathlib.Path):
        defect = np.zeros(SIZE, bool)
        defect[60:100, 80:130] = True
        write_part(tmp_path, [defect])
        test = tmp_path / "part/test/good/000.png"
        test.write_bytes((tmp_path / "part/train/good/003.png").read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("error", DataWarning)
            with pytest.raises(UserError, match=r"1 of 3 test images are training images"):
                evaluate(tmp_path, tmp_path / "results")
        assert not (tmp_path / "results" / "checkpoint").exists()
        # Without it, what is known is told again where the model is evaluated.
        with pytest.warns(DataWarning, match="1 of 3 test images are training images"):
            measured = evaluate(tmp_path, tmp_path / "results")
        assert measured["leaks"] == ["part/test/good/000.png"]
        assert measured["data"]["shared"] == {"train, test": ["part/test/good/000.png"]}
        detector = loading.load(tmp_path / "results" / "checkpoint")
        source = dataset_splits.open_dataset(detector.config)["test"]
        with pytest.warns(DataWarning, match="that the model was fitted to as well"):
            evaluation.evaluate(detector.config, detector, source, tmp_path / "results")


@pytest.mark.parametrize(
    ("view", "lost"), [(View(0.0, 0, 0), (1, 0)), (View(0.0, 12, 0), (1, 1))]
)
def test_regions_are_counted_by_where_they_are_lost(view: View, lost: tuple[int, int]):
    values: Any = defaults.get_config()
    values.image.resize, values.image.crop = (48, 64), (36, 48)
    defect = np.zeros(SIZE, bool)
    defect[8:20, 8:20] = defect[100:120, 100:120] = True
    defect[83:85, 83:85] = True  # between the rows and columns 4 k + 2
    small, facts = input_pipeline._preprocess_mask(defect, validate(values).image, view)
    assert small.shape == (36, 48)
    assert facts == (int(defect.sum()), 3, *lost)


def test_too_little_memory_for_full_resolution(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "available_to_host", lambda: 3 * 10**9)
    memory.require_for_full(54_000_000, 100_000)
    with pytest.raises(UserError, match=r"up to 54\.0 million pixels.*resolution=model"):
        memory.require_for_full(54_000_000, 10_000_000)
