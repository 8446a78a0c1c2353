"""What thresholds from normal images promise is kept: by simulation, and by a real detector."""

import dataclasses
import json
import pathlib
from typing import Any

import hypothesis
import numpy as np
import pytest
from fuzzing import examples
from hypothesis import strategies as st
from scipy import stats

from padim_jax.config import defaults
from padim_jax.config.settings import validate
from padim_jax.core import calibration
from padim_jax.core.calibration import Calibration, calibrate, outcome
from padim_jax.data.synthetic_part import photograph
from padim_jax.detector import detector, geometry, steps
from padim_jax.detector import statistics as statistics_lib
from padim_jax.devices import parallel
from padim_jax.errors import UserError
from padim_jax.models.weights import pretrained
from padim_jax.store import calibration_file, checkpoint, validation
from padim_jax.store.calibration_file import from_dict, to_dict
from padim_jax.system import paths


def of_scores(scores: Any, image_rate: float = 0.01, pixel_rate: float = 0.001) -> Calibration:
    """Of images whose maps have one value each."""
    scores = np.asarray(scores, np.float32)
    maps = np.broadcast_to(scores[:, None, None], (len(scores), 4, 4))
    return calibrate([(maps, scores[:, None])], len(scores), "held_out", image_rate, pixel_rate)


def drawn(count: int, seed: int) -> Any:
    return np.random.default_rng([count, seed])


GAMMA = np.random.default_rng(0).gamma(3, 2, 209).astype(np.float32)


class TestImageThreshold:
    @pytest.mark.parametrize("distribution", [stats.uniform(), stats.t(2)])
    @pytest.mark.parametrize(("images", "rate"), [(20, 0.05), (20, 0.3), (60, 0.1), (99, 0.01)])
    def test_promise_is_kept(self, distribution: Any, images: int, rate: float):
        """Of any distribution: the mean over many draws of how much of it is higher."""
        repeats = 150
        thresholds = [
            of_scores(distribution.rvs(images, random_state=drawn(images, i)), rate)
            for i in range(repeats)
        ]
        rates = distribution.sf([found.image_threshold for found in thresholds])
        promised = thresholds[0].image_promised_rate
        # Of n uniform numbers the k-th has the variance k (n + 1 - k) / (n + 1)^2 / (n + 2).
        error = np.sqrt(promised * (1 - promised) / (images + 2) / repeats)
        assert rate - 1 / (images + 1) < promised <= rate
        assert abs(np.mean(rates) - promised) < 4 * error

    @pytest.mark.parametrize(("images", "rate"), [(9, 0.1), (99, 0.01), (999, 0.001)])
    def test_just_enough_images(self, images: int, rate: float):
        """The smallest number that promises a rate does so by its highest score."""
        scores = np.arange(images)
        enough, few = of_scores(scores, rate), of_scores(scores[:-1], rate)
        assert enough.image_threshold == np.nextafter(np.float32(images - 1), np.float32(9e9))
        assert enough.image_promised_rate == pytest.approx(rate)
        assert few.image_promised_rate > rate
        assert few.image_threshold > images - 1

    def test_too_few_images_are_told_of(self):
        found = of_scores(GAMMA[:20], 0.001)
        assert found.image_promised_rate == pytest.approx(1 / 21)
        assert found.image_rate == 0.001
        assert "4.8 % at best" in calibration.text(found)
        assert "at best" not in calibration.text(of_scores(GAMMA, 0.01))
        assert np.isfinite(of_scores(GAMMA[:3], 1e-300).image_threshold)
        # The threshold is where the calibrated score says so.
        assert found.image_threshold > GAMMA[:20].max()
        level = found.calibrated(np.array([found.image_threshold]))
        np.testing.assert_allclose(level, 0.999, atol=1e-7)

    @pytest.mark.parametrize(
        ("images", "rate"), [(3, 1 / 4), (46, 1 / 47), (98, 1 / 99), (99, 0.01), (209, 0.01)]
    )
    def test_automatic_rate_is_promised(self, images: int, rate: float):
        """Below 99 images by the highest score itself: nothing is extrapolated."""
        scores = GAMMA[:images]
        found = of_scores(scores, 0.0)
        assert found.image_rate == rate
        assert found.image_promised_rate <= rate
        rank = max(1, int(0.01 * (images + 1)))
        highest = np.sort(scores)[-rank]
        assert found.image_threshold == np.nextafter(highest, np.float32(np.inf))
        assert found.image_threshold == calibration.conformal(scores, rate)

    def test_table_of_rates(self):
        """Those that 46 images promise, each by a score; the text tells what others take."""
        found = of_scores(GAMMA[:46], 0.0)
        ordered = np.sort(GAMMA[:46])
        assert found.rates == (0.05, 0.1)
        above = np.nextafter(ordered[[-2, -4]], np.float32(np.inf))
        assert found.rate_thresholds == tuple(above.tolist())
        said = calibration.text(found)
        assert "not promised by 46 images: 1 % takes 99, 2 % takes 49" in said
        assert calibration.is_promised(0.01, 99)
        assert not calibration.is_promised(0.01, 98)
        assert of_scores(GAMMA, 0.0).rates == calibration.RATES
        assert of_scores(GAMMA[:5], 0.0).rates == ()
        with pytest.raises(ValueError, match="do not promise"):
            calibration.conformal(GAMMA[:46], 0.02)

    def test_scores_are_kept(self):
        """All, or of many a few hundred of the same distribution."""
        assert of_scores(GAMMA).scores == tuple(np.sort(GAMMA).tolist())
        many = np.random.default_rng(5).gamma(3, 2, 5000)
        some = of_scores(many).scores
        assert len(some) == 512
        assert stats.kstest(some, many.astype(np.float32)).statistic < 0.005

    def test_never_below_a_score_that_must_not_be_called(self):
        """A short tail puts the quantile of 1 in 1000 below the highest of 20."""
        scores = np.r_[np.linspace(1, 2, 19), 50]
        assert of_scores(scores, 0.04).image_threshold > 50

    def test_higher_means_higher(self):
        """A score that equals the k-th is not called: ties would break the promise."""
        found = of_scores([1, 2, 2, 2, 2], 0.4)
        assert not np.any(np.float32(2) >= np.float32(found.image_threshold))
        assert np.float32(2.000001) >= np.float32(found.image_threshold)


class TestPixels:
    MAPS = np.random.default_rng(1).gumbel(4, 1, (23, 7, 9)).astype(np.float32)

    def in_parts(self, maps: np.ndarray, ends: list[int], rate: float) -> Calibration:
        parts = [(part, part.max(axis=(1, 2))[:, None]) for part in np.split(maps, ends)]
        return calibrate(parts, len(maps), "given", 0.05, rate)

    @pytest.mark.parametrize("rate", [0.0001, 0.001, 0.01, 0.3, 0.95])
    def test_as_many_pixels_are_called_as_the_rate_allows(self, rate: float):
        found = self.in_parts(self.MAPS, [7, 14, 21], rate)
        called = np.float32(found.pixel_threshold) <= self.MAPS
        # Of N + 1 pixels this many may be above; at least none.
        assert called.sum() == max(0, int(np.floor(rate * (self.MAPS.size + 1) + 1e-9)) - 1)

    @examples(200)
    @hypothesis.given(
        images=st.integers(calibration.MIN_IMAGES, 12),
        size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
        ties=st.sampled_from([None, 1, 4]),
        first=st.sampled_from([None, -99.0, 99.0]),
        split=st.integers(1, 12) | st.sets(st.integers(1, 11)),
        kept=st.integers(1, 6) | st.floats(1e-6, 1 - 1e-6),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_streaming_is_sorting(
        self,
        images: int,
        size: tuple[int, int],
        ties: int | None,
        first: float | None,
        split: int | set[int],
        kept: int | float,
        seed: int,
    ):
        """Any values, split in any way, at any rate.

        Some pixels are equal, the first may be extreme, and what is kept of them may be just
        as many as some images have.
        """
        maps = np.random.default_rng(seed).gumbel(size=(images, *size)).astype(np.float32)
        if ties is not None:
            maps = np.round(maps * ties)
        if first is not None:
            maps[0, 0, 0] = first
        rate = kept
        if isinstance(kept, int):
            rate = min(kept, images - 1) * size[0] * size[1] / (maps.size + 1)
        ends = list(range(split, images, split)) if isinstance(split, int) else sorted(split)
        found = self.in_parts(maps, [end for end in ends if end < images], rate)
        # The k-th smallest of n, k = ceil((n + 1) (1 - rate)); see the module's text.
        rank = min(maps.size, int(np.ceil(np.round((maps.size + 1) * (1 - rate), 6))))
        threshold = np.sort(maps, axis=None)[rank - 1]
        assert found.pixel_threshold == np.nextafter(threshold, np.float32(np.inf))
        middles = [np.median(image[::4, ::4]) for image in maps]
        assert found.typical_pixel == np.median(np.array(middles, np.float32))
        assert found == self.in_parts(maps, [], rate)  # what is of scores, too

    def test_a_high_pixel_comes_first(self):
        """As many pixels as a batch has are kept, and the first of them is the highest."""
        maps = np.random.default_rng(3).gumbel(4, 1, (100, 4, 4)).astype(np.float32)
        maps[0, 0, 0] = 99
        found = self.in_parts(maps, list(range(1, 100)), 0.01)
        assert found == self.in_parts(maps, [3], 0.01)
        assert np.mean(maps >= np.float32(found.pixel_threshold)) <= 0.01

    def test_equal_pixels(self):
        maps = np.full((5, 8, 8), 3, np.float32)
        maps[0, 0, 0] = 9
        found = self.in_parts(maps, [2], 0.01)
        assert 3 < found.pixel_threshold < 3.00001

    @pytest.mark.parametrize("images", [5, 46, 120])
    def test_by_images_an_outline_is_a_verdict(self, images: int):
        """As many normal images have an outlined pixel as are called anomalous, any split."""
        maps = np.random.default_rng(images).gumbel(4, 1, (images, 6, 5)).astype(np.float32)
        parts = [
            (part, part.max(axis=(1, 2))[:, None]) for part in np.split(maps, [2, images // 2])
        ]
        found = calibrate(parts, images, "given", 0.0, 0.0)
        assert found.pixel_rate == 0
        assert found.pixel_threshold == found.image_threshold
        outlined = np.any(maps >= np.float32(found.pixel_threshold), axis=(1, 2))
        assert outlined.mean() <= found.image_rate
        # Explicit rates keep the two apart.
        apart = calibrate(parts, images, "given", 0.0, 0.1)
        assert apart.pixel_threshold < found.pixel_threshold
        extrapolated = calibrate(parts, images, "given", 1e-4, 0.0)
        assert extrapolated.pixel_threshold == extrapolated.image_threshold > maps.max()

    def test_by_images_of_groups(self):
        """A group has an outline where any of its images has."""
        maps = np.random.default_rng(0).gumbel(4, 1, (12, 3, 3)).astype(np.float32)
        groups = np.arange(12) // 4
        found = calibrate(
            [(maps, maps.max(axis=(1, 2))[:, None])], 12, "given", 0.5, 0.0, groups
        )
        peaks = np.sort(maps.reshape(3, -1).max(axis=1))
        assert found.pixel_threshold == np.nextafter(peaks[1], np.float32(np.inf))

    def test_typical_pixel(self):
        """The images' median of the medians of every fourth row and column."""
        maps = np.repeat(np.arange(5, dtype=np.float32), 64).reshape(5, 8, 8)
        maps[:, 1:4] = maps[:, :, 1:4] = 99
        assert self.in_parts(maps, [3], 0.1).typical_pixel == 2


class TestCalibrated:
    @pytest.mark.parametrize("images", [3, 5, 20, 60, 209, 5000])
    def test_never_falls_and_stays_below_one(self, images: int):
        scores = np.random.default_rng(images).gamma(3, 2, images)
        found = of_scores(scores)
        grid = np.r_[-1e30, np.linspace(-1, 200, 20001), 1e4, 1e30]
        levels = found.calibrated(grid)
        assert np.all(np.diff(levels) >= 0)
        assert levels[0] == 0
        assert levels[-1] < 1
        # Strictly rising wherever there were normal scores, and well beyond them.
        among = levels[(grid > scores.min()) & (grid < 2 * scores.max())]
        assert np.all(np.diff(among) > 0)
        if images > 5:  # No step where the ranks end and the tail begins.
            start = found.quantiles[-1]
            around = found.calibrated(np.array([start - 1e-6, start, start + 1e-6]))
            assert np.ptp(around) < 1e-5

    def test_ranks_in_the_body(self):
        found = of_scores(GAMMA)
        body = np.sort(GAMMA)[:188]  # all but the highest tenth
        np.testing.assert_allclose(found.calibrated(body), np.arange(1, 189) / 210)

    @pytest.mark.parametrize("images", [20, 60, 209])
    def test_false_alarms_of_a_level(self, images: int):
        """So many of an exponential distribution are higher, on average over draws."""
        repeats, grid = 200, np.linspace(0, 60, 20001)
        levels = np.array([0.5, 0.8, 0.95, 0.99, 0.999])
        starts = np.array(
            [
                np.searchsorted(found.calibrated(grid), levels)
                for i in range(repeats)
                for found in [of_scores(drawn(images, i).exponential(size=images))]
            ]
        )
        rates = np.exp(-grid[starts])
        # Exact but for the line between ranks, which costs up to 2 % of the rate. Were the
        # mean excess of 20 images taken for the true one, 0.999 would have 2.4 in 1000.
        error = np.std(rates, axis=0) / np.sqrt(repeats)
        difference = np.abs(np.mean(rates, axis=0) - (1 - levels))
        assert np.all(difference < 4 * error + 0.02 * (1 - levels))

    def test_many_images_take_few_numbers(self):
        scores = np.sort(np.random.default_rng(2).gamma(3, 2, 5000).astype(np.float32))
        found = of_scores(scores)
        assert len(found.quantiles) == len(found.levels) <= 256
        # Between quantiles one may be off by their distance at the most.
        ranks = np.arange(1, 5001) / 5001
        assert np.max(np.abs(found.calibrated(scores) - ranks)[:4500]) < 1 / 256

    def test_ties_claim_no_more_than_their_share(self):
        scores = np.repeat([1.0, 2.0, 5.0, 6.0], [40, 40, 10, 10])
        found = of_scores(scores)
        lower = [np.mean(scores < value) for value in (1, 2, 5)]
        levels = found.calibrated(np.array([1.0, 2.0, 5.0]))
        assert np.all(levels <= np.array(lower) + 1 / 101)
        assert np.all(levels >= np.array(lower) - 0.01)

    def test_constant_scores(self):
        found = of_scores(np.full(30, 7.0), 0.1)
        levels = found.calibrated(np.array([6.9, 7.0, 7.1, 700.0]))
        np.testing.assert_allclose(levels, [0, 1 / 31, 30 / 31, 30 / 31])
        assert not np.float32(7) >= np.float32(found.image_threshold)

    @pytest.mark.parametrize("rate", [0.11, 0.2, 0.5])
    def test_what_is_called_anomalous_has_that_level(self, rate: float):
        found = of_scores(GAMMA, rate)
        grid = np.linspace(0, 60, 6001, dtype=np.float32)
        called = np.float32(found.image_threshold) <= grid
        levels = found.calibrated(grid)
        assert np.all(levels[called] >= 1 - rate)
        assert np.all(levels[~called] < 1 - rate + 1 / 210)  # up to the next rank

    @pytest.mark.parametrize("beyond", [0.7, 0.013, 1e-3, 1.4e-4, 9.96e-6, 3e-12, 1.2e-16])
    def test_shown_with_all_its_nines(self, beyond: float):
        text = calibration.shown(1 - beyond)
        assert float(text) < 1
        assert 1 - float(text) == pytest.approx(1 - (1 - beyond), rel=0.05)
        assert len(text) <= 20


class TestInput:
    def test_too_few_images(self):
        with pytest.raises(ValueError, match="2 normal images; thresholds need at least 3"):
            of_scores([1, 2])
        of_scores([1, 2, 3])

    def test_another_number_than_was_said(self):
        maps, scores = np.ones((4, 2, 2), np.float32), np.ones((4, 1), np.float32)
        with pytest.raises(ValueError, match="4 normal images; 5 were to come"):
            calibrate([(maps, scores)], 5, "given", 0.1, 0.1)
        with pytest.raises(ValueError, match="0 normal images; 5 were to come"):
            calibrate([], 5, "given", 0.1, 0.1)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, value: float):
        with pytest.raises(ValueError, match="not finite"):
            of_scores([1, 2, value, 3])


class TestStored:
    @pytest.mark.parametrize(
        "scores", [GAMMA, GAMMA[:3], np.full(9, 2.0), np.arange(4000) / 7], ids=len
    )
    def test_round_trip(self, scores: np.ndarray, tmp_path: pathlib.Path):
        found = of_scores(scores)
        assert from_dict(json.loads(json.dumps(to_dict(found, "abc"))), "abc") == found
        calibration_file.write(tmp_path, found, "abc")
        assert calibration_file.read(tmp_path, "abc") == found
        assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]

    def test_none(self, tmp_path: pathlib.Path):
        assert calibration_file.read(tmp_path / "nowhere", "abc") is None

    def test_of_another_detector(self, tmp_path: pathlib.Path, capsys: Any):
        calibration_file.write(tmp_path, of_scores(GAMMA), "abc")
        assert calibration_file.read(tmp_path, "abd") is None
        said = capsys.readouterr().out
        assert said.startswith(f"{tmp_path / 'calibration.json'}: thresholds of another state")
        assert "--mode=calibrate" in said

    @pytest.mark.parametrize(
        "change",
        [
            {"format": "padim_jax calibration 0"},
            {"detector": None},
            {"origin": "test labels"},
            {"origin": ["held_out"]},
            {"images": 2},
            {"images": 20.0},
            {"images": True},
            {"image_rate": 0.0},
            {"image_rate": 1.0},
            {"image_promised_rate": "0.1"},
            {"image_threshold": None},
            {"image_threshold": float("nan")},
            {"pixel_rate": 2.0},
            {"pixel_threshold": float("inf")},
            {"typical_pixel": []},
            {"quantiles": []},
            {"quantiles": [1.0, 3.0, 2.0]},
            {"quantiles": 3.0},
            {"quantiles": [[1.0], 2.0, 3.0]},
            {"levels": [0.1, 0.1, 0.2]},
            {"levels": [0.1, 0.2, 1.0]},
            {"levels": [0.1, 0.2]},
            {"tail_images": 0},
            {"tail_excess": -1.0},
            {"rates": [0.1]},
            {"rates": [0.2, 0.1, 0.3, 0.4]},
            {"rate_thresholds": [1.0, 2.0, 3.0, 4.0]},
            {"scores": [2.0, 1.0]},
            {"scores": "all"},
            {"groups": 2},
            {"groups": 210},
            {"groups": "all"},
            {"warning": None},
            {"decide": "all"},
            {"min_area": -1.0},
            {"warning": "two\nlines"},
            {"more": 1},
        ],
        ids=str,
    )
    def test_broken(self, change: dict[str, Any], tmp_path: pathlib.Path):
        found = dataclasses.replace(
            of_scores(GAMMA), quantiles=(1.0, 2.0, 3.0), levels=(0.1, 0.2, 0.3)
        )
        stored = to_dict(found, "abc")
        assert from_dict(stored, "abc") == found
        (tmp_path / "calibration.json").write_text(json.dumps(stored | change))
        with pytest.raises(UserError, match="thresholds that cannot be read") as caught:
            calibration_file.read(tmp_path, "abc")
        assert str(caught.value).startswith(f"{tmp_path / 'calibration.json'}: ")

    @pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Calibration)])
    def test_missing(self, name: str):
        found = dataclasses.replace(
            of_scores(GAMMA),
            groups=209,
            warning="near copies",
            summary_means=(1.0, 2.0, 3.0, 4.0),
            summary_deviations=(0.5, 0.25, 0.0, 1.0),
            decide="either",
            min_area=20.0,
            close=4.0,
        )
        stored = to_dict(found, "abc")
        del stored[name]
        # What older files lack is missed by the digest.
        summaries = ("summary_means", "summary_deviations")
        later = ("groups", "warning", "rates", "rate_thresholds", "scores", *summaries)
        later += ("decide", "min_area", "close")
        reason = name
        if name in later:
            reason = "as many thresholds|4 means and dev|not what was saved"
        with pytest.raises(ValueError, match=reason):
            from_dict(stored, "abc")

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", 9999 * b"["])
    def test_no_json(self, content: bytes, tmp_path: pathlib.Path):
        (tmp_path / "calibration.json").write_bytes(content)
        with pytest.raises(UserError, match="thresholds that cannot be read"):
            calibration_file.read(tmp_path, "abc")

    def test_a_checkpoint_may_replace_it_and_nothing_else(self, tmp_path: pathlib.Path):
        calibration_file.write(tmp_path, of_scores(GAMMA), "abc")
        paths.growing_file(tmp_path / "calibration.json").write_text("{")  # of a killed process
        checkpoint.check_destination(tmp_path)
        calibration_file.write(tmp_path, of_scores(GAMMA), "abc")
        assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]
        (tmp_path / "calibration.json.txt").touch()
        with pytest.raises(UserError, match=r"it holds calibration\.json\.txt"):
            checkpoint.check_destination(tmp_path)

    def test_a_folder_that_cannot_be_written(self, tmp_path: pathlib.Path):
        with pytest.raises(UserError, match="cannot be written"):
            calibration_file.write(tmp_path / "nowhere", of_scores(GAMMA), "abc")


class TestOutcome:
    FOUND = dataclasses.replace(of_scores(GAMMA), image_threshold=5.0, pixel_threshold=3.0)

    def test_by_hand(self):
        maps = np.array(
            [
                [[1, 1], [1, 3]],  # good: 1 of 4 pixels called, score below
                [[4, 6], [1, 2]],  # good: 2 of 4
                [[9, 2], [3, 1]],  # defect in the upper row: 1 of 2, beside it 1 of 2
                [[2, 2], [2, 2]],  # defect everywhere, missed
                [[8, 8], [8, 8]],  # defect, mask unknown
            ],
            np.float32,
        )
        masks = [np.zeros((2, 2), bool), np.zeros((2, 2), bool)]
        masks += [np.array([[True, True], [False, False]]), np.ones((2, 2), bool), None]
        labels = np.array([False, False, True, True, True])
        found = outcome(self.FOUND, labels, maps.max(axis=(1, 2)), maps, masks)
        assert json.loads(json.dumps(found, allow_nan=False)) == found
        assert found["image_false_alarm_rate"] == 1 / 2
        assert found["image_recall"] == 2 / 3
        assert found["pixel_recall"] == 1 / 6
        assert found["pixel_false_alarm_rate"] == 4 / 10
        assert found["pixel_false_alarm_rate_good"] == 3 / 8
        assert (found["image_threshold"], found["pixel_threshold"]) == (5.0, 3.0)

    @pytest.mark.parametrize(
        ("label", "undefined"),
        [
            (False, {"image_recall", "pixel_recall"}),
            (True, {"image_false_alarm_rate", "pixel_false_alarm_rate_good"}),
        ],
    )
    def test_one_kind_only(self, label: bool, undefined: set[str]):
        maps = np.ones((3, 2, 2), np.float32)
        masks = [np.array([[label, False], [False, False]])] * 3
        found = outcome(self.FOUND, np.full(3, label), maps[:, 0, 0], maps, masks)
        nothing = {name for name, value in found.items() if value is None}
        assert nothing == undefined | {"groups"}


FITTED, OTHERS, RATE = 60, 150, 0.05


@pytest.fixture(scope="module")
def scored() -> tuple[detector.Anomalies, detector.Anomalies, detector.Anomalies]:
    """Images fitted, each left out; the same as the model knows them; and others."""
    values: Any = defaults.get_config()
    values.dataset.root, values.image.resize = "/nowhere", (64, 64)
    values.model.weights, values.model.layers = "random", ("layer1",)
    values.model.channels = 30
    config = validate(values)
    images = np.stack(
        [photograph("good", np.random.default_rng(i), 64)[0] for i in range(FITTED + OTHERS)]
    )
    fitted, others = np.split(images, [FITTED])
    model, one = config.model, parallel.Devices(1)
    index = geometry.channel_index(model)
    variables, weights = pretrained.load(model.weights, model.backbone, model.layers)
    variables = parallel.replicate(variables, one)
    shapes = geometry.pyramid(config.image, model, index.tolist()).shapes

    def fit(left_out: int = 0) -> detector.Detector:
        statistics = steps.fit_batch(
            statistics_lib.init(shapes, FITTED, "auto", one),
            steps.embed(variables, fitted[None], config, tuple(index.tolist()), one),
            np.ones((1, FITTED), bool),
        )
        return detector.Detector(
            config,
            index,
            variables,
            weights,
            statistics_lib.finalize(statistics, model.regularization, left_out),
            "",
            np.zeros((FITTED, 32), np.uint8),
            left_out=left_out,
        )

    whole, left_out = fit(), fit(left_out=1)
    return (
        detector.score_pixels(left_out, fitted),
        detector.score_pixels(whole, fitted),
        detector.score_pixels(whole, others),
    )


class TestGroups:
    """Images of a group count once, by the highest of their scores."""

    GROUPS = np.repeat(np.arange(30), 2)

    def calibration(self, scores: np.ndarray, ends: list[int], rate: float) -> Calibration:
        maps = scores[:, None, None] * np.ones((1, 2, 2), np.float32)
        parts = list(zip(np.split(maps, ends), np.split(scores[:, None], ends), strict=True))
        return calibrate(parts, len(scores), "given", rate, 0.01, self.GROUPS)

    def test_are_what_one_image_of_the_highest_score_each_would_be(self):
        scores = GAMMA[:60]
        found = self.calibration(scores, [7, 40], 0.1)
        alone = of_scores(scores.reshape(30, 2).max(axis=1), 0.1)
        assert (found.images, found.groups, found.independent) == (60, 30, 30)
        for field in ("image_threshold", "image_promised_rate", "quantiles", "levels"):
            assert getattr(found, field) == getattr(alone, field)
        assert "60 normal images in 30 groups" in calibration.text(found)

    def test_what_can_be_promised_counts_groups(self):
        found = self.calibration(GAMMA[:60], [], 0.02)
        assert found.image_promised_rate == pytest.approx(1 / 31)
        assert "so few groups promise 3.2 % at best" in calibration.text(found)

    def test_too_few(self):
        part = (np.zeros((4, 2, 2), np.float32), np.zeros((4, 1), np.float32))
        with pytest.raises(ValueError, match="4 normal images in 2 groups that are indep"):
            calibrate([part], 4, "given", 0.1, 0.1, np.array([0, 0, 1, 1]))

    def test_stored(self):
        found = self.calibration(GAMMA[:60], [], 0.1)
        found = dataclasses.replace(found, warning="near copies")
        stored = json.loads(json.dumps(to_dict(found, "one")))
        assert from_dict(stored, "one") == found
        assert "warning: near copies" in calibration.text(found)

    def test_files_that_know_nothing_of_groups(self):
        """As they were written before there were groups and warnings."""
        known = of_scores(GAMMA[:60])
        stored = to_dict(known, "one")
        older = {k: v for k, v in stored.items() if k not in ("groups", "warning", "sha256")}
        older["sha256"] = validation.digest(older)
        assert from_dict(older, "one") == known


class TestRealDetector:
    """Normal images of the made-up category, a small ResNet-18 with random weights."""

    def calibration(self, found: detector.Anomalies) -> Calibration:
        part = (found.maps, found.scores[:, None])
        return calibrate([part], FITTED, "leave_one_out", RATE, 0.01)

    def most(self) -> int:
        """As many false alarms or more come once in 200 draws, if the promise holds.

        The rate of a conformal threshold is Beta(n + 1 - k, k)-distributed over draws of
        its n images: here (3, 58), of 150 others then beta-binomial.
        """
        above = int(RATE * (FITTED + 1))
        return int(stats.betabinom(OTHERS, above, FITTED + 1 - above).ppf(0.995))

    def test_false_alarms_of_normal_images_that_were_not_fitted(self, scored: Any):
        left_out, _, others = scored
        found = self.calibration(left_out)
        called = np.sum(others.scores >= np.float32(found.image_threshold))
        assert called <= self.most()
        assert np.sum(found.calibrated(others.scores) > 1 - RATE) <= self.most()
        # About that many pixels, too, which depend on each other.
        assert np.mean(others.maps >= np.float32(found.pixel_threshold)) < 0.02

    def test_images_as_the_model_knows_them_would_not_do(self, scored: Any):
        """The interval above is narrow enough to tell."""
        _, known, others = scored
        threshold = self.calibration(known).image_threshold
        assert np.sum(others.scores >= np.float32(threshold)) > 2 * self.most()

    def test_levels_are_spread_evenly(self, scored: Any):
        """Of scores that are distributed as the calibration's own, they are uniform."""
        left_out, _, others = scored
        levels = self.calibration(left_out).calibrated(others.scores)
        # Kolmogorov and Smirnov's distance of 60 and 150 numbers is above this once in 200.
        farthest = np.sqrt(-np.log(0.005 / 2) / 2 * (1 / FITTED + 1 / OTHERS))
        ranks = np.arange(1, OTHERS + 1) / OTHERS
        assert np.max(np.abs(np.sort(levels) - ranks)) < farthest
