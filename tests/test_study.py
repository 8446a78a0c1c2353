"""The study over a folder of categories, on tiny drawn ones."""

import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import pytest

import padim_jax
from padim_jax.config import defaults
from padim_jax.config import settings as config_lib
from padim_jax.data import dataset_splits
from padim_jax.data.layouts import synthetic
from padim_jax.data.layouts.mvtec_ad import mvtec_ad

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "launch")
    return importlib.import_module("study")


@pytest.fixture
def arguments(tmp_path: pathlib.Path) -> list[str]:
    root = tmp_path / "data"
    counts = {"n_train": 5, "n_test_good": 2, "n_test_per_defect": 1}
    for name, seed in (("one", 1), ("two", 2)):
        part = synthetic.generate(root, seed=seed, size=64, **counts)
        part.rename(root / name)
    return [
        f"--root={root}",
        f"--out={tmp_path / 'out'}",
        *("--variants=published,pool3", "--weights=random", "--image_size=64", "--seeds=2"),
    ]


class Fits:
    """Stands in for the processes of fits: counts them, and is interrupted at one."""

    def __init__(self, study: Any, monkeypatch: pytest.MonkeyPatch):
        self.count, self.interrupt_at, self.columns = 0, -1, study.COLUMNS
        monkeypatch.setattr(study, "in_own_process", self)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
        if self.count == self.interrupt_at:
            raise KeyboardInterrupt
        self.count += 1
        return dict.fromkeys(self.columns, 0.5 * self.count)


@pytest.fixture
def fits(study: Any, monkeypatch: pytest.MonkeyPatch) -> Fits:
    return Fits(study, monkeypatch)


def test_one_table_of_all_categories_variants_and_seeds(
    study: Any, fits: Fits, arguments: list[str], tmp_path: pathlib.Path
):
    lines = study.study(study.parse(arguments)).splitlines()
    assert fits.count == 6  # of 2 categories x (2 seeds + 1 variant without random channels)
    assert [line.split("  ")[0].strip() for line in lines[1:]] == [
        *("one, published", "one, pool3", "two, published", "two, pool3"),
        *("mean, published", "mean, pool3"),
    ]
    assert [line.count("±") for line in lines[1:3]] == [len(study.COLUMNS), 0]
    markdown = (tmp_path / "out" / "table.md").read_text().splitlines()
    csv = (tmp_path / "out" / "table.csv").read_bytes().splitlines()
    assert len(markdown) - 1 == len(csv) == len(lines)


def test_an_interrupted_study_goes_on_and_a_finished_one_computes_nothing(
    study: Any, fits: Fits, arguments: list[str], tmp_path: pathlib.Path
):
    fits.interrupt_at = 2
    with pytest.raises(KeyboardInterrupt):
        study.study(study.parse(arguments))
    assert not (tmp_path / "out" / "table.md").exists()
    fits.interrupt_at = -1
    text = study.study(study.parse(arguments))
    assert fits.count == 6
    assert study.study(study.parse(arguments)) == text
    assert fits.count == 6


def test_what_changed_is_computed_again(
    study: Any, fits: Fits, arguments: list[str], tmp_path: pathlib.Path
):
    study.study(study.parse(arguments))
    with (tmp_path / "data" / "one" / "test" / "good" / "000.png").open("ab") as file:
        file.write(b"changed")
    study.study(study.parse(arguments))
    assert fits.count == 6 + 3  # those of its category
    study.study(study.parse([*arguments, "--weights=resnet18.tv_in1k"]))
    assert fits.count == 9 + 6


def test_measures_are_those_of_the_detector(
    study: Any, arguments: list[str], tmp_path: pathlib.Path
):
    root = tmp_path / "data"
    settings: dict[str, Any] = {"resize": (64, 64), "weights": "random", "pooling": 3}
    settings |= {"layers": ("layer1",), "reduction": "none"}
    measured = study.measure(root, "one", settings)
    assert list(measured) == list(study.COLUMNS)
    splits = dataset_splits.by_split(mvtec_ad(root, "one"))
    train = [record.image for record in splits["train"].records]
    settings |= {"preset": "anomalib", "score_image": "combined"}
    detector = padim_jax.fit(train, **settings)
    test = splits["test"].records
    expected = detector.evaluate(
        [record.image for record in test],
        [bool(record.label) for record in test],
        [record.mask for record in test],
    )
    assert measured["image_auroc_combined"] == expected["image_auroc"]
    for name in ("pixel_auroc", "aupro", "pixel_ap"):
        assert measured[name] == expected[name]


def test_a_variant_is_the_preset_best(study: Any):
    best = config_lib.validate(defaults.get_config("best"))
    variant = {f"model.{k}": v for k, v in study.VARIANTS["pool3-.003"].items()}
    published = config_lib.validate(defaults.get_config(study.PRESET))
    assert config_lib.resolve(variant | {"score.image": "variation"}, published) == best
    assert f"image_auroc_{best.score.image}" in study.RANKED


def test_ranks_are_means_over_categories_and_metrics(study: Any):
    def result(variation: float, aupro: float) -> dict[str, float]:
        ranked = {"image_auroc_variation": variation, "aupro": aupro, "pixel_ap": 0.5}
        return dict.fromkeys(study.COLUMNS, 1.0) | ranked

    measured = {
        ("a", "x"): [result(0.7, 0.1), result(0.9, 0.3)],
        ("a", "y"): [result(0.9, 0.1)],
    }
    table = study.table(measured)
    column = table.columns.index("variation")
    assert [row[column] for row in table.rows] == [
        *("0.800 ± 0.141", "0.900"),
        *("0.800", "0.900"),
    ]
    # x: second by image AUROC, first by AUPRO, equal by pixel AP.
    assert [row[-1] for row in table.rows] == ["", "", "1.5", "1.5"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--root={0}/nowhere", "nowhere: no such folder"),
        ("--root={0}", "no category; expected folders with train/good"),
        ("--categories=three", "three"),
        ("--variants=pool5", "no pool5; expected some of published"),
        ("--seeds=0", "expected 1 or more"),
    ],
)
def test_mistakes_end_with_code_2(
    study: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
    argument: str,
    message: str,
):
    command = ["study.py", f"--root={tmp_path}", argument.format(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        study.main()
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_killed_fit_is_an_error(study: Any):
    with pytest.raises(study.UserError, match="killed, most likely for lack of memory"):
        study.in_own_process(study.os._exit, 9)


def test_a_foreign_result_is_not_replaced(
    study: Any, arguments: list[str], tmp_path: pathlib.Path
):
    file = tmp_path / "out" / "one" / "published_0.json"
    file.parent.mkdir(parents=True)
    file.write_text("[]")
    with pytest.raises(study.UserError, match=r"published_0\.json: no result of this study"):
        study.study(study.parse(arguments))
