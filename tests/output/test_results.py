"""What an evaluation writes and prints, also where a metric is undefined."""

import csv
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from padim_jax.config import defaults
from padim_jax.config.settings import Config, validate
from padim_jax.core import verdicts
from padim_jax.core.calibration import Calibration
from padim_jax.data.records import Record, Skipped
from padim_jax.errors import UserError
from padim_jax.output import published, results
from padim_jax.output.results import Scored

SIZE = (32, 48)
PIXEL = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "pixel_f1_threshold", "aupro")
IMAGE = ("image_auroc", "image_ap", "image_f1_max", "image_f1_threshold")


def make_config(**settings: Any) -> Config:
    values = defaults.get_config()
    values.update_from_flattened_dict(settings)
    return validate(values)


def make_scored(
    kinds: Sequence[str], scores: Iterable[float], masked: Sequence[str] = ("hole", "crack")
) -> Scored:
    """A test set with images of some kinds and with the scores given.

    Each defect is a bright square in its map, as bright as its score; `masked` names the
    kinds whose masks are known.
    """
    rng = np.random.default_rng(0)
    records, masks, maps = [], [], []
    for number, (kind, score) in enumerate(zip(kinds, scores, strict=True)):
        label = int(kind != "good")
        name = f"part/test/{kind}/{number:03}.png"
        records.append(Record("test", pathlib.Path(name), None, label, kind, name))
        square = np.zeros(SIZE, bool)
        square[4:12, number : number + 8] = True
        known = label == 0 or kind in masked
        masks.append(square & (label == 1) if known else None)
        background = rng.uniform(0, 0.5, SIZE) * score
        maps.append(np.where(square, score, background).astype(np.float32))
    return Scored(records, masks, np.stack(maps), np.array(list(scores), np.float32))


BOTH = make_scored(["good", "good", "hole", "hole", "crack"], [1, 2, 5, 4, 3])

# Its image threshold lies above that of the best F1 on `BOTH`, 3.
CALIBRATION = Calibration(
    origin="leave_one_out",
    images=9,
    image_rate=0.01,
    image_promised_rate=0.1,
    image_threshold=3.5,
    pixel_rate=0.001,
    pixel_threshold=3.25,
    typical_pixel=0.5,
    quantiles=(1.0, 2.0),
    levels=(0.1, 0.2),
    tail_images=7,
    tail_excess=0.5,
)


def table_rows(text: str) -> dict[str, list[str]]:
    """The cells by the row's name; the columns are two or more spaces apart."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in lines}


class TestMeasure:
    def test_all_masks_known(self):
        scored = make_scored(["good", "good", "hole", "crack"], [1, 4, 5, 3])
        measured = results.measure(scored)
        assert measured["image_auroc"] == 0.75
        # By all pairs; the brightest normal pixels are those of a normal image.
        defect = np.stack([mask for mask in scored.masks if mask is not None])
        anomalous, normal = scored.maps[defect][:, None], scored.maps[~defect][None]
        wins = np.mean(anomalous > normal) + np.mean(anomalous == normal) / 2
        assert 0.9 < wins < 1
        assert measured["pixel_auroc"] == pytest.approx(wins, rel=1e-12)
        assert "undefined" not in measured
        assert set(measured["per_defect"]) == {"hole", "crack"}

    def test_without_any_mask(self):
        scored = dataclasses.replace(BOTH, masks=[*BOTH.masks[:2], None, None, None])
        measured = results.measure(scored)
        assert {key: measured[key] for key in PIXEL} == dict.fromkeys(PIXEL)
        assert set(measured["undefined"]) == set(PIXEL)
        assert set(measured["undefined"].values()) == {"no ground-truth masks"}
        whole = results.measure(BOTH)
        assert {key: measured[key] for key in IMAGE} == {key: whole[key] for key in IMAGE}
        assert measured["per_defect"]["hole"]["pixel_auroc"] is None

    def test_with_some_masks_unknown(self):
        """An unknown mask is not an empty one: its pixels are of neither class."""
        scored = make_scored([r.defect_type for r in BOTH.records], BOTH.scores, ["hole"])
        measured, whole = results.measure(scored), results.measure(BOTH)
        assert {key: measured[key] for key in PIXEL} == dict.fromkeys(PIXEL)
        reason = "1 of 3 anomalous images without ground-truth mask"
        assert measured["undefined"] == dict.fromkeys(PIXEL, reason)
        assert measured["per_defect"]["hole"] == whole["per_defect"]["hole"]
        assert measured["per_defect"]["crack"]["aupro"] is None

    @pytest.mark.parametrize("kind", ["good", "hole"])
    def test_one_class_only(self, kind: str):
        measured = results.measure(make_scored([kind] * 2, [1, 2]))
        missing = "anomalous" if kind == "good" else "normal"
        assert {key: measured[key] for key in IMAGE} == dict.fromkeys(IMAGE)
        assert measured["undefined"]["image_auroc"] == f"no {missing} image"


ELSEWHERE = dataclasses.replace(BOTH, maps=BOTH.maps.copy())
ELSEWHERE.maps[2] = ELSEWHERE.maps[2][::-1]  # the first hole's; the defect is in the upper half


class TestInPlace:
    """`CALIBRATION` finds both holes of `BOTH`, and not the crack."""

    def test_counts_by_type(self):
        measured = results.measure(ELSEWHERE, CALIBRATION)
        scored = results.locate(ELSEWHERE, measured, (2.0, 2.0))
        assert scored.in_place == [None, None, False, True, True]
        located = results.with_in_place(scored, measured)
        found = located["in_place"]
        assert found["threshold"] == 3.5
        assert found["found_in_place"] == verdicts.share(np.array([False, True, False]))
        assert found["found_elsewhere"] == verdicts.share(np.array([True, False, False]))
        counts = {
            name: [values["in_place"][key]["count"] for key in found if key != "threshold"]
            for name, values in located["per_defect"].items()
        }
        assert counts == {"crack": [0, 0], "hole": [1, 1]}
        json.dumps(located, allow_nan=False)

    def test_the_region_is_what_outlines_show(self):
        """A second region on the defect counts only if outlines join it with the strongest."""
        first = make_scored(["good", "hole"], [1, 5])
        first.maps[1, 20:22, 20:22] = 9  # the strongest, off the defect
        first.maps[1, 10:21, 5:21] = 4  # between both
        for threshold, in_place in ((3.25, True), (4.5, False)):
            calibration = dataclasses.replace(CALIBRATION, pixel_threshold=threshold)
            measured = results.measure(first, calibration)
            scored = results.locate(first, measured, (2.0, 2.0))
            assert scored.in_place == [None, in_place]

    def test_without_any_threshold_the_peak_alone_counts(self):
        scored = make_scored(["hole", "hole"], [5, 4])
        scored.maps[1] = scored.maps[1][::-1]
        measured = results.measure(scored)
        located = results.locate(scored, measured, (2.0, 2.0))
        assert located.in_place == [True, False]
        assert results.with_in_place(located, measured) == measured  # nothing was called

    def test_types_without_masks_have_none(self):
        scored = make_scored(["good", "hole", "crack"], [1, 5, 4], masked=["hole"])
        measured = results.measure(scored, CALIBRATION)
        located = results.locate(scored, measured, (2.0, 2.0))
        measured = results.with_in_place(located, measured)
        assert measured["in_place"]["found_in_place"]["total"] == 1
        assert set(measured["per_defect"]["crack"]) == set(measured["per_defect"]["hole"]) - {
            "in_place"
        } | {"undefined"}
        rows = table_rows(results.table(make_config(), measured))
        assert rows["hole"][-1] == "1 of 1 (3 to 100 %)"
        assert rows["crack"][-1] == "-"

    @pytest.mark.parametrize("kinds", [["good", "hole"], ["good", "good"]])
    def test_nothing_changes_without_masks(self, kinds: list[str], tmp_path: pathlib.Path):
        scored = make_scored(kinds, [1, 5], masked=[])
        measured = results.measure(scored, CALIBRATION)
        located = results.locate(scored, measured, (2.0, 2.0))
        assert located.in_place is None
        assert results.with_in_place(located, measured) == measured
        assert "place" not in results.table(make_config(), measured)
        write(tmp_path, located, figures="none")
        assert "in_place" not in read_rows(tmp_path / "scores.csv")[0]

    def test_table_and_scores(self, tmp_path: pathlib.Path):
        measured = results.measure(ELSEWHERE, CALIBRATION)
        scored = results.locate(ELSEWHERE, measured, (2.0, 2.0))
        text = results.table(make_config(), results.with_in_place(scored, measured))
        assert (
            "found in the right place, from 3.5: 1 of 3 (1 to 91 %) defects with masks; "
            "1 of 3 (1 to 91 %) called anomalous elsewhere"
        ) in text
        assert table_rows(text)["hole"][-1] == "1 of 2 (1 to 99 %)"
        write(tmp_path, scored, figures="none")
        rows = read_rows(tmp_path / "scores.csv")
        assert [row["in_place"] for row in rows] == ["", "", "0", "1", "1"]


def whole(category: str = "bottle") -> dict[str, Any]:
    """What is measured of as many images as the published figures are of."""
    counts = dict(zip(("train_images", "test_images"), published.IMAGES[category], strict=True))
    return results.measure(BOTH) | counts


class TestTable:
    def test_beside_the_published_numbers(self):
        # MVTec AD's bottle with ResNet-18: anomalib, xiahaifeng1995 and the paper.
        measured = whole() | {
            "image_auroc": 0.98765,
            "image_f1_max": 0.97649,
            "pixel_auroc": 0.98422,
        }
        text = results.table(make_config(), measured)
        rows = table_rows(text)
        headings = ["Lornatang, anomalib", "difference", "xiahaifeng1995", "paper"]
        assert text.splitlines()[2].split("  ")[-4:] == headings
        assert rows["image AUROC"] == ["0.9877", "0.994", "-0.006", "0.996", "-"]
        assert rows["image F1-max"] == ["0.9765", "0.976", "+0.000", "-", "-"]
        assert rows["pixel AUROC"] == ["0.9842", "0.983", "+0.001", "0.981", "0.981"]
        for name in ("image AP", "pixel AP", "pixel F1-max", "AUPRO 0.3"):
            assert rows[name][1:] == ["-"] * 4  # none was published

    def test_the_source_with_the_same_settings_comes_first(self):
        settings = {
            "image.method": "lanczos",
            "image.crop": (224, 224),
            "model.seed": 1024,
        }
        text = results.table(make_config(**settings), whole())
        assert table_rows(text)["image AUROC"] == ["1.0000", "0.996", "+0.004", "0.994", "-"]
        assert "xiahaifeng1995 had other" not in text
        assert (
            "Lornatang, anomalib had other settings: image.method bilinear, image.crop None, "
            "model.seed 42"
        ) in text

    def test_other_settings_than_the_published_runs_are_said(self):
        measured = whole()
        assert "anomalib had other settings" not in results.table(make_config(), measured)
        unlike = {
            "model.backbone": "wide_resnet50_2",
            "model.weights": "wide_resnet50_2.tv2_in1k",
            "image.method": "nearest",
            "image.crop": (224, 224),
        }
        assert (
            "anomalib had other settings: image.method bilinear, image.crop None, "
            "model.weights tv_in1k, model.channels 550"
        ) in results.table(make_config(**unlike), measured)

    @pytest.mark.parametrize(
        "settings",
        [
            {"model.weights": "random"},
            {"model.weights": "none", "model.backbone": "scattering"},
            {"dataset.name": "folder"},
            {"dataset.name": "synthetic"},
            {"model.backbone": "resnet50"},
            {"category": "screws"},
            {"image.rotation": 10.0},
        ],
    )
    def test_nothing_else_is_compared(self, settings: dict):
        config, measured = make_config(**settings), whole()
        text = results.table(config, measured)
        assert table_rows(text)["image AUROC"] == ["1.0000"]  # no empty columns
        assert "published" not in text
        assert "difference" not in text
        assert not any(theirs for _, _, theirs in results.comparison_rows(config, measured))

    @pytest.mark.parametrize(
        ("counts", "found"),
        [
            ({"train_images": 48}, "48 and 83"),
            ({"test_images": 82}, "209 and 82"),
            ({"train_images": None}, "an unknown number of and 83"),
        ],
    )
    def test_nor_are_other_numbers_of_images(self, counts: dict, found: str):
        config, measured = make_config(), whole() | counts
        text = results.table(config, measured)
        assert table_rows(text)["image AUROC"] == ["1.0000"]
        assert (
            "no published numbers beside these: they are of 209 training and 83 test images, "
            f"and this run is of {found}"
        ) in text
        assert not any(theirs for _, _, theirs in results.comparison_rows(config, measured))

    def test_wide_resnet_has_its_own(self):
        config = make_config(**{"model.backbone": "wide_resnet50_2", "category": "screw"})
        rows = table_rows(results.table(config, whole("screw")))
        assert rows["image AUROC"] == ["1.0000", "0.845", "+0.155", "0.844", "-"]
        assert rows["AUPRO 0.3"][1:] == ["-", "-", "-", "0.944"]  # the paper's alone

    def test_the_same_as_data(self):
        measured = whole() | {"pixel_auroc": None}
        rows = results.comparison_rows(make_config(), measured)
        ours = {name: value for name, value, _ in rows}
        theirs = {name: dict(values) for name, _, values in rows}
        assert ours["image AUROC"] == 1
        assert ours["pixel AUROC"] is None
        assert theirs["image AUROC"] == {"Lornatang, anomalib": 0.994, "xiahaifeng1995": 0.996}
        assert list(theirs["pixel AUROC"].values()) == [0.983, 0.981, 0.981]
        assert theirs["pixel AP"] == {}

    def test_thresholds_say_where_they_come_from(self):
        measured = results.measure(BOTH, CALIBRATION)
        text = results.table(make_config(), measured)
        assert (
            "threshold of 9 normal images (leave one out), 1 % false alarms asked for "
            "(10 % promised): 3.5; here 0 of 2 (0 to 84 %) good images, 2 of 3 (9 to 99 %) "
            "anomalous ones"
        ) in text
        assert "threshold of the best F1 on these very labels: 3" in text
        assert "normal images" not in results.table(make_config(), results.measure(BOTH))

    def test_images_that_were_trained_on_are_named(self):
        measured = results.measure(BOTH)
        assert "trained on" not in results.table(make_config(), measured | {"leaks": []})
        leaks = [f"part/test/good/{number:03}.png" for number in range(4)]
        text = results.table(make_config(), measured | {"leaks": leaks})
        assert f"4 of 5 test images were trained on too: {', '.join(leaks[:3])}, ..." in text

    def test_skipped_images_are_counted(self):
        measured = results.measure(BOTH)
        assert "skipped" not in results.table(make_config(), measured | {"skipped": []})
        skipped = [{"path": f"{number}.png", "reason": "broken"} for number in range(4)]
        text = results.table(make_config(), measured | {"skipped": skipped})
        assert "4 images skipped, see skipped.csv: 0.png, 1.png, 2.png, ..." in text

    def test_undefined_with_its_reason_once(self):
        scored = dataclasses.replace(BOTH, masks=[*BOTH.masks[:2], None, None, None])
        text = results.table(make_config(), results.measure(scored))
        assert table_rows(text)["pixel AUROC"] == ["undefined"]
        assert text.count("undefined: no ground-truth masks") == 1

    def test_only_normal_images(self):
        measured = whole() | results.measure(make_scored(["good"] * 2, [1, 2]))
        text = results.table(make_config(), measured | {"test_images": 83})
        assert table_rows(text)["image AUROC"][:3] == ["undefined", "0.994", "-"]
        assert "undefined: no anomalous image" in text

    def test_columns_line_up(self):
        kinds = ["good", "a_defect_with_quite_a_long_name", "x"]
        text = results.table(make_config(), results.measure(make_scored(kinds, [1, 2, 3], [])))
        blocks = text.split("\n\n")
        # Below the heading: the metrics (then sentences), thresholds, and the defect types.
        for block, rows in ((blocks[1], 8), (blocks[3], 3)):
            assert len({len(line) for line in block.splitlines()[:rows]}) == 1

    def test_names_what_was_measured(self):
        heading = results.table(make_config(), results.measure(BOTH)).splitlines()[0]
        for part in ("mvtec_ad_bottle", "resnet18", "layer1+layer2+layer3", "100 channels"):
            assert part in heading


def write(workdir: pathlib.Path, scored: Scored, **outputs: str) -> list[int]:
    """Writes the results; returns the numbers of the images read again for pictures."""
    read = []

    def load_image(index: int) -> np.ndarray:
        read.append(index)
        return np.full((*SIZE, 3), index, np.uint8)

    config = make_config(**{f"outputs.{key}": value for key, value in outputs.items()})
    scored = results.with_pixels(scored)
    measured = results.measure(scored) | {"color_scale": [1.0, 4.0]}
    results.write(workdir, config, scored, measured, load_image)
    return read


def strict_json(path: pathlib.Path) -> Any:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def below(folder: pathlib.Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# Of seven holes the two highest and the two lowest scored are "some".
MANY = make_scored(
    ["good", "hole", "hole", "hole", "hole", "hole", "hole", "hole", "crack"],
    [1, 13, 17, 11, 16, 12, 15, 14, 20],
)


class TestWrite:
    def test_metrics_are_strict_json(self, tmp_path: pathlib.Path):
        kinds = ["good", "Kratzer, größer", "good"]
        write(tmp_path, make_scored(kinds, [1, 2, 3], masked=[]))
        found = strict_json(tmp_path / "metrics.json")
        assert found["pixel_auroc"] is None  # null, not NaN
        assert found["image_auroc"] == 0.5
        assert list(found["per_defect"]) == ["Kratzer, größer"]

    def test_metrics_come_last(self, tmp_path: pathlib.Path):
        """Where they are, an evaluation is whole: not that of one that was interrupted."""
        write(tmp_path, MANY)

        def load_image(index: int) -> np.ndarray:
            assert not (tmp_path / "metrics.json").exists()
            raise KeyboardInterrupt

        scored = results.with_pixels(MANY)
        measured = results.measure(scored) | {"color_scale": [1.0, 4.0]}
        with pytest.raises(KeyboardInterrupt):
            results.write(tmp_path, make_config(), scored, measured, load_image)
        assert (tmp_path / "scores.csv").exists()
        assert not (tmp_path / "metrics.json").exists()

    def test_scores(self, tmp_path: pathlib.Path):
        scored = make_scored(["good", "Loch, groß", "good"], [1, 1 / 3, 3])
        write(tmp_path, scored)
        rows = read_rows(tmp_path / "scores.csv")
        columns = "path,label,defect_type,score,predicted,predicted_f1,calibrated"
        assert list(rows[0]) == columns.split(",")
        assert [row["path"] for row in rows] == [r.relative_path for r in scored.records]
        assert [row["label"] for row in rows] == ["0", "1", "0"]
        assert rows[1]["defect_type"] == "Loch, groß"
        # Every digit: the scores read back are the scores.
        read_back = np.array([row["score"] for row in rows], np.float32)
        np.testing.assert_array_equal(read_back, scored.scores)

    def test_prediction_includes_the_threshold(self, tmp_path: pathlib.Path):
        write(tmp_path, make_scored(["good", "hole", "hole"], [0.1, 0.3, 0.7]))
        rows = read_rows(tmp_path / "scores.csv")
        assert [row["predicted_f1"] for row in rows] == list("011")
        # Of normal images there is no threshold.
        assert {row["predicted"] for row in rows} == {row["calibrated"] for row in rows} == {""}

    def test_a_warning_about_normal_images(self):
        scored = make_scored(["good", "hole"], [1, 5])
        warned = dataclasses.replace(CALIBRATION, warning="near copies <b>")
        measured = results.measure(scored, warned)
        assert measured["normal_threshold"]["warning"] == "near copies <b>"
        assert "warning: near copies <b>" in results.table(make_config(), measured)
        plain = results.table(make_config(), results.measure(scored, CALIBRATION))
        assert "warning" not in plain

    def test_predictions_of_normal_images_thresholds(self, tmp_path: pathlib.Path):
        scored = make_scored(["good", "good", "hole", "hole", "crack"], [1, 2, 5, 3.5, 3])
        scored = results.with_pixels(scored)
        measured = results.measure(scored, CALIBRATION) | {"color_scale": [1.0, 4.0]}
        config = make_config(**{"outputs.figures": "none"})
        blank = np.zeros((*SIZE, 3), np.uint8)
        results.write(tmp_path, config, scored, measured, lambda _: blank, CALIBRATION)
        rows = read_rows(tmp_path / "scores.csv")
        assert [row["predicted"] for row in rows] == list("00110")
        assert [row["predicted_f1"] for row in rows] == list("00111")
        rarities = [float(row["calibrated"]) for row in rows]
        np.testing.assert_allclose(rarities, CALIBRATION.calibrated(scored.scores), atol=1e-4)
        assert rarities[:2] == [0.1, 0.2]
        found = strict_json(tmp_path / "metrics.json")
        assert found["normal_threshold"]["image_threshold"] == 3.5
        assert found["normal_threshold"]["image_recall"] == pytest.approx(2 / 3)
        assert found["image_f1_threshold"] == 3  # of the labels, as ever

    def test_no_prediction_without_threshold(self, tmp_path: pathlib.Path):
        write(tmp_path, make_scored(["good", "good"], [1, 2]), figures="all")
        rows = read_rows(tmp_path / "scores.csv")
        assert [row["predicted_f1"] for row in rows] == ["", ""]
        # No curve can be drawn, the rest can.
        assert not (tmp_path / "roc_curve.png").exists()
        assert (tmp_path / "score_histogram.png").exists()
        assert len(below(tmp_path / "figures")) == 2

    def test_figures_are_the_extremes_of_each_kind_defects_first(self, tmp_path: pathlib.Path):
        read = write(tmp_path, MANY, figures="some")
        expected = [
            "0000_crack_008.jpg",
            "0001_hole_002.jpg",
            "0002_hole_004.jpg",
            "0003_hole_005.jpg",
            "0004_hole_003.jpg",
            "0005_good_000.jpg",
        ]
        assert below(tmp_path / "figures") == expected
        # In the order in which threads come to it; nothing is read in vain.
        assert sorted(read) == [0, 2, 3, 4, 5, 8]
        for name in ("overview.jpg", "roc_curve.png", "score_histogram.png"):
            with Image.open(tmp_path / name) as picture:
                picture.load()

    def test_figures_have_the_proportions_of_the_files(self, tmp_path: pathlib.Path):
        heights = []
        for aspects in (None, [SIZE[1] / SIZE[0]] * 5, [3.0] * 5):
            write(tmp_path, dataclasses.replace(BOTH, aspects=aspects), figures="all")
            with Image.open(tmp_path / "figures/0000_crack_004.jpg") as picture:
                heights.append(picture.height)
        # Panels of 48 x 32 pixels and of 48 x 16, four times as large.
        assert heights[0] == heights[1] == heights[2] + 4 * 16

    def test_overview_is_in_the_figures_order(self, tmp_path: pathlib.Path):
        """Whatever the order in which threads finish them."""
        write(tmp_path, MANY, figures="some")
        names = below(tmp_path / "figures")
        drawn = [np.asarray(Image.open(tmp_path / "figures" / name), int) for name in names]
        overview = np.asarray(Image.open(tmp_path / "overview.jpg"), int)
        pitch = (len(overview) - len(drawn[0])) // (len(drawn) - 1)
        for place in range(len(drawn)):
            row = overview[place * pitch :][: len(drawn[0])]
            unlike = [np.abs(row - picture).mean() for picture in drawn]
            assert np.argmin(unlike) == place

    def test_an_unreadable_image_is_an_error(self, tmp_path: pathlib.Path):
        def load_image(index: int) -> np.ndarray:
            raise UserError(f"image {index} is gone")

        scored = results.with_pixels(MANY)
        measured = results.measure(scored) | {"color_scale": [1.0, 4.0]}
        with pytest.raises(UserError, match="is gone"):
            results.write(tmp_path, make_config(), scored, measured, load_image)

    def test_all_figures(self, tmp_path: pathlib.Path):
        read = write(tmp_path, MANY, figures="all")
        assert sorted(read) == list(range(9))
        assert len(below(tmp_path / "figures")) == 9
        assert not (tmp_path / "overview.jpg").exists()

    def test_figures_of_odd_names(self, tmp_path: pathlib.Path):
        names = ("n" * 236, "\u3042" * 78, "line\nbreak", "<b>\x1b[31m", "-rf", "caf\u00e9")
        records = [
            Record(
                "test", pathlib.Path("a"), None, 1, "hole" * 15, f"part/test/hole/{name}.png"
            )
            for name in names
        ]
        few = [0] * len(names)
        masks = [BOTH.masks[i] for i in few]
        scored = Scored(records, masks, BOTH.maps[few], np.arange(len(names), dtype=np.float32))
        write(tmp_path, scored, figures="all", maps="npy")
        assert len(below(tmp_path / "figures")) == len(below(tmp_path / "maps")) == len(names)

    def test_skipped_images_are_listed(self, tmp_path: pathlib.Path):
        skipped = [Skipped("a,b.png", "x: broken"), Skipped("line\\nbreak.png", 'a "b"')]
        formula = Skipped("=1+1.png", "y: broken")
        results.write_skipped(tmp_path, [*skipped, formula])
        with (tmp_path / "skipped.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert rows[:-1] == [dataclasses.asdict(one) for one in skipped]
        assert rows[-1]["path"] == "./=1+1.png"  # the same path, nothing to compute
        results.write_skipped(tmp_path, [])  # of a later evaluation
        assert below(tmp_path) == []

    def test_no_figures(self, tmp_path: pathlib.Path):
        assert write(tmp_path, MANY, figures="none") == []
        diagrams = ["roc_curve.png", "score_histogram.png"]
        assert below(tmp_path) == sorted(["metrics.json", "scores.csv", *diagrams])

    @pytest.mark.parametrize("masked", [[], ["hole"]])
    def test_figures_without_all_masks(self, masked: list[str], tmp_path: pathlib.Path):
        write(
            tmp_path, make_scored(["good", "hole", "crack"], [1, 2, 3], masked), figures="all"
        )
        assert len(below(tmp_path / "figures")) == 3
        assert (tmp_path / "roc_curve.png").exists()  # of the images

    @pytest.mark.parametrize("suffix", ["npy", "tiff"])
    def test_maps_keep_every_bit(self, suffix: str, tmp_path: pathlib.Path):
        write(tmp_path, BOTH, figures="none", maps=suffix)
        names = [record.relative_path for record in BOTH.records]
        assert below(tmp_path / "maps") == sorted(f"{name}.{suffix}" for name in names)
        for name, anomaly_map in zip(names, BOTH.maps, strict=True):
            path = tmp_path / "maps" / f"{name}.{suffix}"
            found = np.load(path) if suffix == "npy" else np.asarray(Image.open(path))
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, anomaly_map)

    def test_images_that_differ_in_the_suffix_only(self, tmp_path: pathlib.Path):
        records = [
            dataclasses.replace(record, relative_path=f"part/test/hole/a.{suffix}")
            for record, suffix in zip(BOTH.records[2:4], ("png", "jpg"), strict=True)
        ]
        scored = Scored(records, BOTH.masks[2:4], BOTH.maps[2:4], BOTH.scores[2:4])
        write(tmp_path, scored, figures="all", maps="npy")
        assert len(below(tmp_path / "figures")) == 2
        for record, anomaly_map in zip(records, scored.maps, strict=True):
            found = np.load(tmp_path / "maps" / f"{record.relative_path}.npy")
            np.testing.assert_array_equal(found, anomaly_map)

    @pytest.mark.parametrize("figures", ["none", "some", "all"])
    def test_replaces_all_of_an_earlier_evaluation(self, figures: str, tmp_path: pathlib.Path):
        """Nothing of another test set may lie beside the new numbers."""
        kept = tmp_path / "notes.txt"
        kept.write_text("mine")
        write(tmp_path, MANY, figures="some", maps="tiff")
        write(tmp_path, MANY, figures="all", maps="npy")
        normal = make_scored(["good"], [1])
        write(tmp_path, normal, figures=figures)
        expected = ["metrics.json", "notes.txt", "score_histogram.png", "scores.csv"]
        expected += ["figures/0000_good_000.jpg"] * (figures != "none")
        expected += ["overview.jpg"] * (figures == "some")
        assert below(tmp_path) == sorted(expected)
