"""The comparison of features on drawn categories: images, choice, resumption."""

import importlib
import pathlib
from typing import Any

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "launch")
    return importlib.import_module("drawn")


@pytest.fixture
def features(drawn: Any) -> Any:
    return importlib.import_module("features")


def test_an_image_is_a_function_of_its_number(drawn: Any):
    first, again = (drawn.Category(100, "weave", "turned") for _ in range(2))
    image, mask = first.draw(7, "hole")
    np.testing.assert_array_equal(image, again.draw(7, "hole")[0])
    assert not np.array_equal(image, first.draw(8, "hole")[0])
    assert image.shape == (*mask.shape, 3)
    assert image.dtype == np.uint8


def test_a_defect_is_where_its_mask_says(drawn: Any):
    category = drawn.Category(103, "cells", "fixed")
    good, none = category.draw(3)
    assert not none.any()
    for defect in drawn.DEFECTS:
        spoilt, mask = category.draw(3, defect)
        # Its random numbers are drawn before those of light and noise, which therefore differ,
        # too, but less.
        change = np.abs(spoilt.astype(float) - good).mean(axis=2)
        assert change[mask].mean() > 1.2 * change[~mask].mean(), defect


def fake(drawn: Any, values: dict[str, dict[str, float]]) -> Any:
    """AUPROs of candidates by kind of defect, the same in all categories."""
    return {
        name: {
            category: {kind: by_kind.get(kind, by_kind[""]) for kind in drawn.DEFECTS}
            for category in drawn.categories()
        }
        for name, by_kind in values.items()
    }


def test_the_choice_does_not_know_the_family_left_out(drawn: Any, features: Any):
    measured = fake(drawn, {"a": {"": 0.5, "hole": 0.99}, "b": {"": 0.52, "hole": 0.1}})
    rows = {row[0]: row[1:] for row in features.left_out(measured).rows}
    assert rows["hole"] == ["b", "0.100", "0.990"]
    assert rows["crack"] == ["a", "0.500", "0.520"]
    assert len(rows) == len(drawn.MATERIALS) + len(drawn.LAYOUTS) + len(drawn.DEFECTS)


def test_finished_measurements_are_kept(
    drawn: Any, features: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def run(_: Any, name: str, preset: str, train: int) -> Any:
        calls.append((name, preset, train))
        one = dict.fromkeys((*features.METRICS, *drawn.DEFECTS), 0.5)
        return dict.fromkeys(drawn.categories(), one)

    monkeypatch.setattr(features.study, "in_own_process", run)
    given = ["--candidates=scattering,random", "--presets=best", f"--out={tmp_path}"]
    text = features.compare(features.parse(given))
    assert text == features.compare(features.parse(given))
    assert calls == [("scattering", "best", 48), ("random", "best", 48)]
    assert "scattering" in (tmp_path / "table.md").read_text()
