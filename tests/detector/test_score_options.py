"""Image scores and shift tolerance, from images to verdicts."""

import pathlib
from typing import Any

import numpy as np
import pytest

import padim_jax
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices

RNG = np.random.default_rng(0)
# Blobs at about the same place in noise of few grey levels, and one with a bright square.
_Y, _X = np.indices((64, 64))
IMAGES = np.stack(
    [
        np.clip(
            90
            + 80 * np.exp(-((_X - x) ** 2 + (_Y - y) ** 2) / 300)
            + RNG.normal(0, 3, (64, 64)),
            0,
            255,
        ).astype(np.uint8)
        for x, y in RNG.normal(32, 1.5, (11, 2))
    ]
)
GOOD, NEW = IMAGES[:8], IMAGES[8:].copy()
NEW[2, 20:32, 12:24] = 250
SETTINGS: dict[str, Any] = {
    "backbone": "scattering",
    "channels": 24,
    "resize": (64, 64),
    "batch_size": 4,
    "regularization": 0.01,
}


def fit(images: np.ndarray = GOOD, **settings: Any) -> padim_jax.Detector:
    return padim_jax.fit(images, **{**SETTINGS, **settings})


@pytest.mark.parametrize("score", ["max", "top", "band", "variation", "combined"])
def test_each_score_finds_the_defect(score: str):
    detector = fit(score_image=score)
    found = detector.score(NEW)
    assert found.is_anomalous is not None
    assert found.is_anomalous.tolist()[2]
    assert np.argmax(found.scores) == 2


@pytest.mark.parametrize("statistics", ["moments", "samples"])
@pytest.mark.parametrize(
    "options", [{"shift": 1}, {"score_image": "combined"}], ids=["shift", "combined"]
)
def test_device_count_changes_nothing(
    options: dict[str, Any], statistics: str, monkeypatch: pytest.MonkeyPatch
):
    found = {}
    for devices in (1, 3):
        monkeypatch.setattr(parallel, "every", lambda devices=devices: Devices(devices))
        detector = fit(statistics=statistics, **options)
        scored = detector.score(NEW)
        assert detector.thresholds is not None
        found[devices] = (scored.maps, scored.scores, np.array(detector.thresholds.scores))
    for one, three in zip(found[1], found[3], strict=True):
        # The order of sums differs: roundoffs, amplified by 1 / epsilon.
        np.testing.assert_allclose(three, one, rtol=1e-3)


@pytest.mark.parametrize("statistics", ["moments", "samples"])
def test_left_out_scores_with_shift_are_those_of_refits(statistics: str):
    detector = fit(shift=1, score_image="band", statistics=statistics)
    assert detector.thresholds is not None
    expected = [
        fit(
            np.delete(GOOD, i, 0),
            shift=1,
            score_image="band",
            statistics=statistics,
            thresholds="none",
        )
        .score(GOOD[i : i + 1])
        .scores[0]
        for i in range(3)
    ]
    for score in expected:
        assert np.min(np.abs(np.array(detector.thresholds.scores) / score - 1)) < 1e-3


def test_shift_never_raises_a_distance():
    with_shift, without = (fit(shift=s, sigma=0.0).score(NEW).maps for s in (1, 0))
    assert np.all(with_shift <= without * (1 + 1e-5))
    assert np.mean(with_shift) < 0.95 * np.mean(without)


def test_combined_is_kept_with_the_model(tmp_path: pathlib.Path):
    detector = fit(score_image="combined")
    expected = detector.score(NEW)
    detector.save(tmp_path / "model")
    found = padim_jax.load(tmp_path / "model").score(NEW)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
    detector.export(tmp_path / "model.safetensors")
    exported = padim_jax.load(tmp_path / "model.safetensors").score(NEW)
    np.testing.assert_allclose(exported.scores, expected.scores, rtol=1e-6)


def test_combined_of_merged_moments_without_images_says_what_to_do():
    parts = [
        fit(images, score_image="combined", statistics="moments", channels=8)
        for images in (GOOD[:4], GOOD[4:])
    ]
    with pytest.warns(padim_jax.DataWarning, match="no thresholds"):
        merged = padim_jax.merge(parts)
    with pytest.raises(padim_jax.UserError, match=r"image=combined: the model has no thr"):
        merged.score(NEW)


def test_shift_needs_a_channel_of_the_first_layer():
    with pytest.raises(padim_jax.UserError, match=r"shift=1: no channel of the first layer"):
        fit(shift=1, channels=1, model_seed=0)


def test_a_stored_model_scores_with_another_shift(tmp_path: pathlib.Path):
    detector = fit(statistics="moments")
    detector.save(tmp_path / "model")
    found = padim_jax.load(tmp_path / "model", {"model.shift": 1})
    assert found.thresholds is None  # those of the model are of another score
    expected = fit(shift=1, statistics="moments").score(NEW)
    np.testing.assert_allclose(found.score(NEW).maps, expected.maps, rtol=1e-5)
