"""Odd training images are named, and normal ones are not more often than stated."""

import ast
import csv
import pathlib
import shlex

import numpy as np
import pytest

from padim_jax.core import calibration, suspects
from padim_jax.core.suspects import count_odd
from padim_jax.output import results

NORMAL = (20 - 5 * np.log1p(-(np.arange(60) + 0.5) / 60)).astype(np.float32)  # quantiles


def read(folder: pathlib.Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "suspects.csv").read_text().splitlines()))


class TestRule:
    @pytest.mark.parametrize("images", [12, 60, 209])
    def test_level_is_kept(self, images: int):
        """Of an exponential tail at most one data set in a hundred has suspects."""
        rng = np.random.default_rng(images)
        draws = rng.exponential(size=(1000, images)).astype(np.float32)
        found = np.mean([count_odd(scores) > 0 for scores in draws])
        assert found < 0.01 + 3 * np.sqrt(0.01 * 0.99 / 1000)

    @pytest.mark.parametrize("odd", [[136.0], [90.0, 95.0, 136.0], 6 * [136.0]])
    def test_odd_images_are_counted(self, odd: list[float]):
        scores = np.r_[NORMAL, odd].astype(np.float32)
        # The highest normal image may look as odd as they do.
        found = count_odd(scores)
        assert len(odd) <= found <= len(odd) + 1
        assert count_odd(np.random.default_rng(1).permutation(scores)) == found

    @pytest.mark.parametrize("scores", [[1, 9, 99], 30 * [7.0], [*range(40)], [0]], ids=len)
    def test_nothing_to_tell(self, scores: list[float]):
        assert count_odd(np.array(scores, np.float32)) == 0

    def test_expected(self):
        """The expected order statistics of exponential scores, whatever the odd ones are."""
        rng, n = np.random.default_rng(2), 200
        draws = np.sort(rng.exponential(3, (400, n - 1)), axis=1)[:, ::-1]
        draws = np.c_[np.full(400, 1e3), draws].astype(np.float32)
        found = np.mean([suspects.expected(scores, 1)[:5] for scores in draws], axis=0)
        harmonic = np.cumsum(1 / np.arange(n - 1, 0, -1.0))[::-1]  # of n - 1 images
        np.testing.assert_allclose(found, 3 * harmonic[:5], rtol=0.03)
        assert np.isnan(suspects.expected(draws[0], 1)[20:]).all()


class TestRank:
    def test_threshold_without(self):
        scores = np.r_[NORMAL, 136].astype(np.float32)
        paths = [f"{i}.png" for i in range(61)]
        found = suspects.rank(paths, scores, np.arange(61), 0.0, 137.0)
        assert (found.paths[0], found.count) == ("60.png", 1)
        assert found.without == calibration.conformal(NORMAL, 1 / 61)
        said = suspects.text(found)
        assert "1 of 61 training images score far beyond" in said
        assert f"threshold 137, without them {found.without:.4g}" in said
        option = said.partition("--config.dataset.exclude=")[2]
        assert ast.literal_eval(shlex.split(option)[0]) == ("60.png",)

    def test_groups_count_once(self):
        """All images of a group as high as the odd groups are named."""
        scores = np.r_[NORMAL, 130, 136].astype(np.float32)
        groups = np.r_[np.arange(60), 60, 60]
        found = suspects.rank([str(i) for i in range(62)], scores, groups, 0.1, 99.0)
        assert list(found.paths[: found.count]) == ["61"]
        assert np.all(np.diff(found.scores) <= 0)

    def test_none(self, tmp_path: pathlib.Path):
        found = suspects.rank([str(i) for i in range(60)], NORMAL, np.arange(60), 0.0, 50.0)
        assert found.count == 0
        assert "none of 60" in suspects.text(found)
        results.write_suspects(tmp_path, found)
        rows = read(tmp_path)
        assert [row["rank"] for row in rows] == [str(i + 1) for i in range(60)]
        assert {row["suspect"] for row in rows} == {"0"}
        results.write_suspects(tmp_path, None)
        assert not list(tmp_path.iterdir())
