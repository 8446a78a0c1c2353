"""Drift as a run tells it: in lines, in one message, on a page; restarts change nothing."""

import contextlib
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
import small
from PIL import Image

import padim_jax
from padim_jax.core.calibration import Calibration, calibrate
from padim_jax.core.drift import WINDOW
from padim_jax.data.layouts.synthetic import generate
from padim_jax.runs import modes
from padim_jax.runs.monitor import Monitor, summary
from padim_jax.runs.watch import Arrival, Log, Result, Stamp
from padim_jax.system.journal import Row

FITTED, BEFORE, AFTER = 60, 110, 200


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    folder, count = tmp_path_factory.mktemp("images"), FITTED + BEFORE + AFTER
    generate(folder, n_train=count, n_test_good=1, n_test_per_defect=1, size=64)
    files = sorted((folder / "part" / "train" / "good").iterdir())
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


@pytest.fixture(scope="module")
def detector(images: np.ndarray) -> padim_jax.Detector:
    names = ("channels", "layers", "statistics", "weights")
    settings = {name: small.SETTINGS[f"model.{name}"] for name in names}
    return padim_jax.fit(images[:FITTED], resize=(64, 64), batch_size=4, **settings)


def lit(images: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(factor * images, 0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("factor", [0.9, 1.0, 1.1])
def test_light_changes(factor: float, images: np.ndarray, detector: padim_jax.Detector):
    """By 10 %: found within 200 images, through a whole detector."""
    before, after = np.split(images[FITTED:], [BEFORE])
    scores = detector.score(np.concatenate([before, lit(after, factor)])).scores
    course = detector.drift(scores)
    assert course is not None
    assert not course.drifted[:BEFORE].any()
    assert course.drifted[BEFORE:].any() == (factor != 1.0)


def test_no_test_without_thresholds(images: np.ndarray):
    few = padim_jax.fit(images[:4], resize=(64, 64), weights="random", thresholds="none")
    assert few.drift(np.ones(3)) is None


def test_predict_tells(
    images: np.ndarray, detector: padim_jax.Detector, tmp_path: pathlib.Path, capsys
):
    detector.save(tmp_path / "checkpoint")
    for factor in (1.0, 0.9):
        folder = tmp_path / f"{factor}"
        folder.mkdir()
        for number, pixels in enumerate(lit(images[FITTED : FITTED + 130], factor)):
            Image.fromarray(pixels).save(folder / f"{number:03}.png")
        modes.run("predict", None, tmp_path, tmp_path / "checkpoint", str(folder))
        said = re.findall(
            r"^drift: .*\(at (\d+)\.png, image (\d+)\)$", capsys.readouterr().out, re.M
        )
        assert len(said) == (factor != 1.0)
        assert all(int(number) == int(name) + 1 for name, number in said)


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    scores = np.random.default_rng(0).gamma(9, 1, 100).astype(np.float32)
    return calibrate([(scores[:, None, None], scores[:, None])], 100, "given", 0.01, 0.0)


def results(start: int, scores: np.ndarray) -> list[Result]:
    found = []
    for number, score in enumerate(scores, start):
        name = f"{number}.png"
        arrival = Arrival(pathlib.Path(name), name, Stamp(1, number), 0.0)
        row = {"path": name, "score": str(score), "predicted": 0, "calibrated": ""}
        row |= {"regions": "", "largest_area": ""}
        found.append(Result(arrival, "", row))
        if number % 10 == 0:
            bad = Arrival(pathlib.Path("bad"), f"bad {name}", Stamp(1, number), 0.0)
            found.append(Result(bad, "", None, "no image"))
    return found


def watched(
    folder: pathlib.Path, calibration: Calibration | None, scores: np.ndarray, *ends: int
) -> list[dict[str, Any]]:
    """The lines of results that come in groups, with restarts at `ends`."""
    start = 0
    for part in np.split(scores, ends):
        with contextlib.closing(Log(folder, {}, calibration=calibration)) as log:
            for group in np.array_split(part, max(1, len(part) // 7)):
                log.write(results(start, group), None)
                log.monitor.write_report(folder, "in", log.summary())
                start += len(group)
    return [json.loads(x) for x in (folder / "scores.jsonl").read_text().splitlines()]


@pytest.fixture
def changing() -> np.ndarray:
    """200 scores as in the calibration, 200 higher ones, and 300 as before."""
    rng = np.random.default_rng(1)
    factors = np.repeat([1.0, 1.6, 1.0], [200, 200, 300])
    return (rng.gamma(9, 1, 700) * factors).astype(np.float32)


class TestWatch:
    def test_lines_message_and_report(
        self, calibration: Calibration, changing: np.ndarray, tmp_path: pathlib.Path, capsys
    ):
        lines = watched(tmp_path, calibration, changing)
        said = [line["drift"] for line in lines if line["error"] is None]
        assert said[: WINDOW - 1] == [None] * (WINDOW - 1)
        assert set(said[WINDOW - 1 : 200]) == {0}
        assert 1 in said[200:400]
        assert said[-1] == 0
        assert all(line["drift"] is None for line in lines if line["error"])
        first, last = capsys.readouterr().out.splitlines()
        assert first.startswith("drift: the last 100 images called normal score higher")
        assert last == "drift: as in the calibration again"
        report = (tmp_path / "report.html").read_text()
        assert "share scoring high" in report
        assert report.count("<polyline") == 2 + 3  # courses, and bounds

    def test_restarts_change_nothing(
        self, calibration: Calibration, changing: np.ndarray, tmp_path: pathlib.Path
    ):
        lines = watched(tmp_path / "once", calibration, changing)
        again = watched(tmp_path / "again", calibration, changing, 1, 150, 260, 261, 390)
        for line in (*lines, *again):
            del line["time"]
        assert lines == again

    def test_nothing_to_compare_with(self, changing: np.ndarray, tmp_path: pathlib.Path):
        lines = watched(tmp_path, None, changing[:150])
        assert {line["drift"] for line in lines} == {line["mean_p"] for line in lines} == {None}
        assert "No test of drift" in (tmp_path / "report.html").read_text()

    def test_the_message_does_not_flicker(self, calibration: Calibration):
        """It ends with a whole window without drift."""
        monitor = Monitor(calibration)
        monitor.add([1e9] * 60 + [9.0] * 40)
        assert monitor.drift
        monitor.add([9.0] * (9 + WINDOW - 1))  # more than half are high for 9 more
        assert monitor.drift
        monitor.add([9.0])
        assert not monitor.drift


def test_summary_names_the_first(calibration: Calibration):
    rows = [Row(b"", "scored", {"path": f"{i}\n", "score": "99"}) for i in range(5000)]
    assert summary(calibration, rows).endswith("(at 99\\n, image 100)")
    assert not summary(calibration, rows[: WINDOW - 1])
