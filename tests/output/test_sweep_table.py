"""The table of a sweep: right averages, marks where they belong, every form readable."""

import csv
import io
import itertools
import json
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

import pytest

from padim_jax.config import defaults
from padim_jax.config.datasets import MVTEC_AD
from padim_jax.config.settings import Config, validate
from padim_jax.output import published, sweep_table
from padim_jax.output.published import METRICS, TOLERANCE

AUROC = "image_auroc"


def make_config(preset: str = "anomalib", **settings: Any) -> Config:
    values = defaults.get_config(preset)
    values.update_from_flattened_dict({"category": "all", **settings})
    return validate(values)


def measured(value: float | None = 0.9, **others: Any) -> dict[str, Any]:
    """What metrics.json may hold."""
    return dict.fromkeys(METRICS, value) | others


def images_of(category: str) -> dict[str, int]:
    """As many images as the published figures are of."""
    counts = published.IMAGES.get(category, (20, 10))
    return dict(zip(("train_images", "test_images"), counts, strict=True))


def as_published() -> dict[tuple[str, int], dict[str, Any]]:
    """Runs of all categories that measure what anomalib's table says."""
    table = published.applicable(make_config())[0].values
    return {
        (category, 0): measured() | {key: table[key][category] for key in table}
        for category in MVTEC_AD
    }


def build(
    config: Config,
    finished: Mapping[tuple[str, int], Mapping[str, Any]],
    failed: Mapping[str, str] | None = None,
    categories: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Read back from JSON, as everybody else has it."""
    counted = {
        (category, repeat): {**images_of(category), **run}
        for (category, repeat), run in finished.items()
    }
    table = sweep_table.build(config, counted, failed or {}, categories)
    text = json.dumps(table, allow_nan=False)
    assert json.loads(text) == json.loads(json.dumps(table))
    return json.loads(text)


def sources(table: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {source["source"]: source for source in table["published"]}


BOTH = "Lornatang, anomalib"


class TestBuild:
    def test_what_was_published_does_not_differ(self):
        table = build(make_config(), as_published(), categories=MVTEC_AD)
        assert table["categories"] == list(MVTEC_AD)  # textures first
        assert table["metrics"] == list(METRICS)
        assert list(sources(table)) == [BOTH, "xiahaifeng1995", "paper"]
        same = sources(table)[BOTH]
        assert same["same_settings"]
        assert same["values"][AUROC]["Avg"] == 0.891  # as printed
        for key in (AUROC, "pixel_auroc", "image_f1_max"):
            differences = same["differences"][key]
            assert {differences[category] for category in MVTEC_AD} == {0.0}
            assert abs(differences["Avg"]) <= 0.001  # that of the printed average
            assert same["out_of_tolerance"][key] == []
        assert same["values"]["pixel_ap"] == {}  # nobody published it
        assert table["failed"] == {}
        assert table["missing"] == []

    def test_other_settings_are_said(self):
        found = sources(build(make_config(), as_published()))["paper"]
        assert not found["same_settings"]
        assert found["settings"] == (
            "paper had other settings: image.method bicubic, image.crop (224, 224), "
            "map.upsample bicubic"
        )
        assert found["differing_settings"]["image.crop"] == [None, [224, 224]]

    def test_average_is_over_the_categories_that_are_there(self):
        finished = {
            ("bottle", 0): measured(0.9),
            ("carpet", 0): measured(0.8, image_f1_max=None, undefined={"image_f1_max": "why"}),
        }
        table = build(make_config(), finished, categories=("bottle", "carpet", "grid"))
        assert table["categories"] == ["carpet", "bottle"]
        assert table["missing"] == ["grid"]
        assert table["this_run"][AUROC]["Avg"]["mean"] == pytest.approx(0.85)
        assert table["this_run"]["image_f1_max"]["Avg"]["mean"] == 0.9
        assert table["this_run"]["image_f1_max"]["carpet"]["mean"] is None
        same = sources(table)[BOTH]
        # 0.945 and 0.994; of F1, bottle's alone.
        assert same["values"][AUROC]["Avg"] == pytest.approx((0.945 + 0.994) / 2)
        assert same["differences"][AUROC]["Avg"] == pytest.approx(0.85 - 0.9695)
        assert same["values"]["image_f1_max"] == {"Avg": 0.976, "bottle": 0.976}
        assert "carpet: image F1-max undefined, why" in table["legend"]

    def test_an_average_alone_is_compared_with_all_fifteen_only(self):
        """The paper has image AUROC of Wide ResNet-50-2 as an average, 0.953."""
        config = make_config(**{"model.backbone": "wide_resnet50_2", "model.channels": 550})
        finished = as_published()
        paper = sources(build(config, finished))["paper"]
        assert paper["values"][AUROC] == {"Avg": 0.953}
        del finished["zipper", 0]
        paper = sources(build(config, finished))["paper"]
        assert paper["values"][AUROC] == {}
        assert len(paper["values"]["aupro"]) == 15  # fourteen and their average

    def test_a_category_of_other_numbers_of_images_is_not_compared(self):
        config = make_config(**{"model.backbone": "wide_resnet50_2", "model.channels": 550})
        finished = as_published()
        finished["toothbrush", 0] |= {"train_images": 48}
        table = build(config, finished)
        for source in table["published"]:
            for values in source["values"].values():
                assert not {"toothbrush", "Avg"} & set(values)
        (reason,) = (text for text in table["legend"] if text.startswith("toothbrush: "))
        assert reason.endswith("60 training and 42 test images, and this run is of 48 and 42")
        assert (
            "no published Avg: it would be of other categories than this run's"
            in (table["legend"])
        )
        assert len(sources(table)["paper"]["values"]["aupro"]) == 14
        assert set(sources(table)["paper"]["differences"]["aupro"]) == (
            set(MVTEC_AD) - {"toothbrush"}
        )

    def test_one_repeat_of_other_numbers_is_enough(self):
        finished = {("bottle", i): measured() for i in range(2)}
        finished["bottle", 1]["train_images"] = None
        table = build(make_config(repeats=2), finished)
        assert table["published"] == []
        assert any("an unknown number of" in sentence for sentence in table["legend"])

    def test_a_category_nobody_published(self):
        finished = {("bottle", 0): measured(), ("my_part", 0): measured()}
        table = build(make_config(), finished)
        assert table["categories"] == ["bottle", "my_part"]
        assert set(sources(table)[BOTH]["values"][AUROC]) == {"bottle"}  # no average

    @pytest.mark.parametrize(
        "settings", [{"model.weights": "random"}, {"dataset.name": "folder"}]
    )
    def test_nothing_to_compare_with(self, settings: dict):
        table = build(make_config(**settings), {("bottle", 0): measured()})
        assert table["published"] == []
        assert "published" not in sweep_table.markdown(table)

    def test_repeats(self):
        """Draws are shared by categories: the average's spread is not that of them."""
        bottle, carpet = [0.9, 0.92, 0.94, 0.96, 0.98], [0.8, 0.78, 0.76, 0.74, 0.75]
        finished = {("bottle", i): measured(value) for i, value in enumerate(bottle)}
        finished |= {("carpet", i): measured(value) for i, value in enumerate(carpet)}
        table = build(make_config(repeats=5), finished)
        found = table["this_run"][AUROC]
        assert found["bottle"] == {
            "mean": pytest.approx(0.94),
            "std": pytest.approx(statistics.stdev(bottle)),
            "values": bottle,
        }
        averages = [(a + b) / 2 for a, b in zip(bottle, carpet, strict=True)]
        assert found["Avg"]["values"] == pytest.approx(averages)
        assert found["Avg"]["std"] == pytest.approx(statistics.stdev(averages))
        assert found["Avg"]["mean"] == pytest.approx(statistics.fmean(averages))
        assert (
            "mean ± standard deviation of 5 runs, with model.seed 42 to 46" in table["legend"]
        )
        # anomalib's seed is one of the five; xiahaifeng1995's is not.
        assert sources(table)[BOTH]["same_settings"]
        assert "model.seed" in sources(table)["xiahaifeng1995"]["differing_settings"]
        assert "0.940 ± 0.032" in sweep_table.markdown(table)

    def test_repeats_that_are_not_all_there(self):
        finished = {
            ("bottle", 0): measured(0.9),
            ("bottle", 2): measured(0.94),
            ("carpet", 2): measured(0.8),
        }
        table = build(make_config(repeats=3), finished)
        found = table["this_run"][AUROC]
        assert found["bottle"]["values"] == [0.9, 0.94]
        assert found["carpet"] == {"mean": 0.8, "std": None, "values": [0.8]}
        # Of the one repeat that has both; the mean is that of the row.
        assert found["Avg"]["values"] == pytest.approx([0.87])
        assert found["Avg"]["std"] is None
        assert found["Avg"]["mean"] == pytest.approx((0.92 + 0.8) / 2)
        assert {"bottle: 2 of 3 runs", "carpet: 1 of 3 runs"} <= set(table["legend"])

    def test_one_run_has_no_spread(self):
        table = build(make_config(), {("bottle", 0): measured(0.9)})
        assert table["this_run"][AUROC]["bottle"] == {"mean": 0.9, "std": None, "values": [0.9]}
        assert "±" not in sweep_table.markdown(table)

    def test_failed_and_missing(self):
        failed = {"grid": "disk\nfull", "wood/seed_42": "dark"}
        names = ("bottle", "grid", "tile", "wood", "cable")
        table = build(make_config(), {("bottle", 0): measured()}, failed, names)
        assert table["failed"] == failed
        assert table["missing"] == ["tile", "cable"]
        assert table["legend"][-3:] == [
            "failed: grid: disk full",
            "failed: wood/seed_42: dark",
            "not evaluated: tile, cable",
        ]

    def test_nothing_finished(self):
        table = build(make_config(), {}, {"bottle": "no"}, ("bottle", "cable"))
        assert table["categories"] == []
        assert table["this_run"][AUROC]["Avg"]["mean"] is None
        for render in (sweep_table.markdown, sweep_table.csv_table, sweep_table.text):
            assert render(table)

    def test_leaks_are_counted_once(self):
        leaks = ["a.png", "b.png"]
        finished = {("bottle", i): measured(leaks=leaks) for i in range(2)}
        table = build(make_config(repeats=2), finished)
        assert "bottle: 2 of 83 test images were trained on too" in table["legend"]

    def test_skipped_images_are_counted_once(self):
        skipped = [{"path": f"{number}.png", "reason": "broken"} for number in range(3)]
        finished = {("bottle", i): measured(skipped=skipped) for i in range(2)}
        table = build(make_config(repeats=2), finished)
        assert "bottle: 3 images skipped, see skipped.csv" in table["legend"]

    def test_a_dataset_without_categories_has_its_folders_name(self):
        config = make_config(**{"dataset.name": "folder", "dataset.root": "/data/screws"})
        table = build(config, {("", 0): measured()}, categories=("",))
        assert table["categories"] == ["screws"]
        assert table["missing"] == []


class TestMarks:
    @pytest.mark.parametrize("key", [AUROC, "pixel_auroc", "image_f1_max"])
    def test_exactly_beyond_the_tolerance(self, key: str):
        """Also where 0.983 - 0.973 is not 0.01 in floating point."""
        limit, finished = TOLERANCE[key], as_published()
        steps = [-limit - 1e-5, -limit, -limit + 1e-5, 0.0, limit - 1e-5, limit, limit + 1e-5]
        expected = []
        for category, step in zip(MVTEC_AD, itertools.cycle(steps)):
            finished[category, 0][key] += step
            if abs(step) > limit:
                expected.append(category)
        table = build(make_config(), finished)
        assert sources(table)[BOTH]["out_of_tolerance"][key] == expected
        # In each form as many as in the data.
        rows = list(csv.reader(io.StringIO(sweep_table.csv_table(table).decode(), newline="")))
        marks = next(row for row in rows if row[:3] == [key, BOTH, "mark"])
        named = [name for name, mark in zip(rows[0], marks, strict=True) if mark == "!"]
        assert named == expected
        row = markdown_rows(table, METRICS[key])[f"difference to {BOTH}"]
        assert sum(cell.endswith("!") for cell in row) == len(expected)
        assert sweep_table.text(table).split("diff: to")[0].count("!") == len(expected)

    def test_the_average_as_well(self):
        finished = as_published()
        for category in MVTEC_AD:
            finished[category, 0]["pixel_auroc"] -= 0.012
        marked = sources(build(make_config(), finished))[BOTH]["out_of_tolerance"]
        assert marked["pixel_auroc"] == ["Avg", *MVTEC_AD]
        assert marked[AUROC] == []


def markdown_rows(table: Mapping[str, Any], heading: str) -> dict[str, list[str]]:
    section = sweep_table.markdown(table).split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {cells[0]: cells[1:] for cells in split}


class TestForms:
    def test_markdown_is_laid_out_as_the_published_tables(self):
        table = build(make_config(), as_published())
        text = sweep_table.markdown(table)
        rows = markdown_rows(table, "image AUROC")
        assert rows[""] == [
            "Avg", "Carpet", "Grid", "Leather", "Tile", "Wood", "Bottle", "Cable", "Capsule",
            "Hazelnut", "Metal Nut", "Pill", "Screw", "Toothbrush", "Transistor", "Zipper",
        ]  # fmt: skip
        assert rows["this run"] == rows[BOTH]
        assert rows["difference to xiahaifeng1995"][1] == "-0.039 !"
        # Every line of a table has as many cells.
        pipes = {line.count("|") for line in text.splitlines() if line.startswith("|")}
        assert pipes == {18}
        for sentence in table["legend"]:
            assert f"- {sentence}" in text

    def test_markdown_takes_any_name(self):
        config = make_config(**{"dataset.name": "folder"})
        finished = {("a|b\n<img src=x>", 0): measured()}
        text = sweep_table.markdown(build(config, finished, {"c": "<b>|"}))
        assert "a\\|b &lt;img src=x>" in text
        assert "<" not in text
        # No link and no picture from somewhere, which others' servers would see.
        finished = {("![x](https://a.example/x.png) `&lt;`", 0): measured()}
        text = sweep_table.markdown(build(config, finished))
        assert "!\\[x\\](https://a.example/x.png) \\`&amp;lt;\\`" in text

    def test_csv_has_no_formulas(self):
        config = make_config(**{"dataset.name": "folder"})
        finished = {(name, 0): measured() for name in ("=1+1", "@a", "b=1")}
        rows = list(
            csv.reader(io.StringIO(sweep_table.csv_table(build(config, finished)).decode()))
        )
        assert rows[0][4:] == ["./=1+1", "./@a", "b=1"]

    def test_csv_parses_back(self):
        finished = as_published() | {('so, "so"', 0): measured(aupro=None)}
        table = build(make_config(), finished)
        rows = list(csv.reader(io.StringIO(sweep_table.csv_table(table).decode(), newline="")))
        heading = ["metric", "source", "quantity", "Avg", *MVTEC_AD, 'so, "so"']
        assert rows[0] == heading
        assert {len(row) for row in rows} == {len(heading)}
        found = {tuple(row[:3]): dict(zip(heading[3:], row[3:], strict=True)) for row in rows}
        assert len(found) == len(rows)
        for key in METRICS:
            ours = found[key, "this run", "mean"]
            for category, entry in table["this_run"][key].items():
                mean = entry["mean"]
                if mean is None:
                    assert ours[category] == ""
                else:
                    assert float(ours[category]) == pytest.approx(mean, abs=1e-6)
        assert found["aupro", "this run", "mean"]['so, "so"'] == ""
        assert found[AUROC, "this run", "runs"]["bottle"] == "1"
        assert (AUROC, "paper", "value") not in found
        assert float(found["pixel_auroc", "paper", "value"]["bottle"]) == 0.981

    @pytest.mark.parametrize("repeats", [1, 5])
    def test_terminal(self, repeats: int):
        config = make_config(repeats=repeats)
        finished = {
            (category, repeat): run
            for (category, _), run in as_published().items()
            for repeat in range(repeats)
        }
        table = build(config, finished)
        text = sweep_table.text(table)
        rows = text.split("\n\n")[1].splitlines()
        assert [row.split()[0] for row in rows[1:]] == [*MVTEC_AD, "Avg"]
        assert max(map(len, rows)) <= (100 if repeats == 1 else 132)
        # Numbers stand below each other.
        assert len({row.index("+0.000") for row in rows[1:]}) == 1
        assert all(sentence in text for sentence in table["legend"])

    def test_terminal_beside_the_source_with_the_same_settings(self):
        table = build(make_config("paper"), as_published())
        assert "diff: to paper" in sweep_table.text(table)

    def test_files(self, tmp_path: pathlib.Path):
        table = build(make_config(), as_published())
        sweep_table.write(tmp_path, table)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(sweep_table.NAMES)
        assert json.loads((tmp_path / "table.json").read_text(encoding="utf-8")) == table
        text = (tmp_path / "table.md").read_text(encoding="utf-8")
        assert text == sweep_table.markdown(table)
        assert (tmp_path / "table.csv").read_bytes() == sweep_table.csv_table(table)
