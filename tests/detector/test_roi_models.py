"""Regions of interest, from images to verdicts, through all that a model can become."""

import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

import padim_jax
from padim_jax.config import defaults
from padim_jax.config.settings import validate
from padim_jax.data import roi
from padim_jax.detector import geometry, memory
from padim_jax.detector.detector import fingerprint
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices

RNG = np.random.default_rng(0)
BASE = RNG.integers(60, 190, (64, 64, 1))
IMAGES = np.clip(BASE + RNG.normal(0, 12, (11, 64, 64, 3)), 0, 255).astype(np.uint8)
GOOD, NEW = IMAGES[:8], IMAGES[8:].copy()
NEW[1, 20:28, 8:16] = 0  # inside
NEW[2, 52:60, 52:60] = 0  # outside, and far away
# Edges within patches and within regions of patches.
INSIDE = np.zeros((64, 64), bool)
INSIDE[6:38, 2:30] = True
INSIDE[14:18, 22:26] = False
BOX = (2, 6, 30, 38)
SETTINGS: dict[str, Any] = {
    "weights": "random",
    "channels": 24,
    "resize": (64, 64),
    "batch_size": 4,
    "regularization": 0.01,
}


def fit(images: np.ndarray = GOOD, **settings: Any) -> padim_jax.Detector:
    return padim_jax.fit(images, **{**SETTINGS, **settings})


def far_inside(detector: padim_jax.Detector) -> np.ndarray:
    """Return the pixels that are interpolated from patches inside alone."""
    covered = geometry.inside(detector.config.image, detector.config.model.layers)
    assert covered is not None
    outside = np.pad(~covered.patches, 1, mode="edge")
    rows, columns = covered.patches.shape
    near = [outside[i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    return ~np.any(near, axis=0).repeat(4, 0).repeat(4, 1) & covered.pixels


@pytest.mark.parametrize(
    "settings",
    [
        {"statistics": "moments"},
        {"statistics": "samples", "reduction": "semi_orthogonal", "map_upsample": "bicubic"},
    ],
    ids=["moments", "samples, one level"],
)
def test_inside_nothing_changes(settings: dict[str, Any]):
    settings |= {"score_image": "max", "sigma": 0.0, "thresholds": "none"}
    whole, part = fit(**settings), fit(roi=INSIDE, **settings)
    expected, found = whole.score(NEW), part.score(NEW)
    assert not np.any(found.maps[:, ~INSIDE])
    same = far_inside(part)
    assert np.count_nonzero(same) > 100
    # Bicubic interpolation reaches one patch further.
    if settings.get("map_upsample") == "bicubic":
        same &= np.roll(same, 4, 0) & np.roll(same, -4, 0)
        same &= np.roll(same, 4, 1) & np.roll(same, -4, 1)
    # Roundoffs: XLA sums in another order where there are fewer regions; measured 2e-6.
    np.testing.assert_allclose(found.maps[:, same], expected.maps[:, same], rtol=2e-5)
    np.testing.assert_array_equal(found.scores, found.maps.max(axis=(1, 2)))
    regions = len(part.gaussian.mean[0][0])
    assert regions <= 0.45 * len(whole.gaussian.mean[0][0])


@pytest.mark.parametrize(("score", "shift"), [("max", 0), ("combined", 1)])
def test_verdicts_are_of_what_is_inside(score: str, shift: int):
    detector = fit(roi=BOX, score_image=score, shift=shift)
    found = detector.score(NEW)
    assert found.is_anomalous is not None
    assert found.regions is not None
    assert found.is_anomalous.tolist() == [False, True, False]
    assert [len(regions) for regions in found.regions] == [0, 1, 0]
    left, top, right, bottom = found.regions[1][0].box
    assert BOX[0] <= left < right <= BOX[2]
    assert BOX[1] <= top < bottom <= BOX[3]


@pytest.mark.parametrize("score", ["top", "combined"])
def test_outside_nothing_is_seen(score: str):
    detector = fit(roi=BOX, score_image=score, layers=("layer1",), pooling=1)
    other = NEW.copy()
    other[:, 60:] = other[:, :, 60:] = 255  # beyond the receptive fields, of 43 pixels
    found, expected = detector.score(other), detector.score(NEW)
    np.testing.assert_array_equal(found.maps, expected.maps)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_thresholds_are_of_what_is_inside():
    images = GOOD.copy()
    images[:, 50:, 50:] = RNG.integers(0, 256, (8, 14, 14, 3))  # nothing but noise
    part = fit(images, roi=BOX, sigma=1.0, pixel_rate=0.01, statistics="samples")
    assert part.thresholds is not None
    # The 1 % of left-out pixels inside, by refits.
    maps = [
        fit(np.delete(images, i, 0), roi=BOX, sigma=1.0, thresholds="none").score(
            images[i : i + 1]
        )
        for i in range(8)
    ]
    pixels = np.sort(np.stack([x.maps[0] for x in maps])[:, 6:38, 2:30], axis=None)
    expected = pixels[int(np.ceil(0.99 * (len(pixels) + 1))) - 1]
    np.testing.assert_allclose(part.thresholds.pixel_threshold, expected, rtol=1e-3)


@pytest.mark.parametrize(("several", "statistics"), [(2, "moments"), (4, "samples")])
def test_device_count_changes_nothing(
    several: int, statistics: str, monkeypatch: pytest.MonkeyPatch
):
    found = []
    for devices in (1, several):  # of 6 regions, which 4 do not divide
        monkeypatch.setattr(parallel, "every", lambda devices=devices: Devices(devices))
        detector = fit(roi=INSIDE, statistics=statistics, shift=1, score_image="combined")
        scored = detector.score(NEW)
        assert detector.thresholds is not None
        found.append((scored.maps, scored.scores, np.array(detector.thresholds.scores)))
    for one, other in zip(*found, strict=True):
        # The order of sums differs: roundoffs, amplified by 1 / epsilon.
        np.testing.assert_allclose(other, one, rtol=1e-3)


@pytest.mark.parametrize("statistics", ["moments", "samples"])
def test_update_and_merge_are_one_fit(statistics: str):
    settings = {"roi": INSIDE, "statistics": statistics, "thresholds": "none"}
    expected = fit(**settings).score(NEW)
    first = fit(GOOD[:4], **settings)
    updated = first.update(GOOD[4:])
    merged = padim_jax.merge([first, fit(GOOD[4:], **settings)])
    for detector in (updated, merged):
        assert detector.config.image.roi == roi.encode(INSIDE)
        np.testing.assert_allclose(detector.score(NEW).maps, expected.maps, rtol=1e-3)


@pytest.mark.parametrize("other", [None, (2, 6, 30, 37)], ids=["none", "other"])
def test_models_of_other_regions_are_not_merged(other: Any):
    first = fit(GOOD[:4], roi=INSIDE, thresholds="none")
    second = fit(GOOD[4:], roi="" if other is None else other, thresholds="none")
    with pytest.raises(padim_jax.UserError) as error:
        padim_jax.merge([first, second])
    message = str(error.value)
    assert "config.image.roi=880 of 64x64 pixels (" in message
    assert len(message) < 400
    assert "\n" not in message


def test_model_needs_no_mask_file(tmp_path: pathlib.Path):
    Image.fromarray(INSIDE).save(tmp_path / "mask.png")
    detector = fit(roi=str(tmp_path / "mask.png"), score_image="combined")
    expected = detector.score(NEW)
    detector.save(tmp_path / "model")
    detector.export(tmp_path / "model.safetensors")
    # The mask itself may be named as long as it is there.
    mask = {"image.roi": str(tmp_path / "mask.png")}
    found = padim_jax.load(tmp_path / "model", mask).score(NEW)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
    Image.fromarray(~INSIDE).save(tmp_path / "mask.png")
    with pytest.raises(padim_jax.UserError, match=r"roi=3216 of 64x64 pixels .* was fit"):
        padim_jax.load(tmp_path / "model", mask)
    (tmp_path / "mask.png").unlink()
    for name in ("model", "model.safetensors"):
        loaded = padim_jax.load(tmp_path / name)
        found = loaded.score(NEW)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-6)
        np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-6)
        assert found.regions == expected.regions


def test_whole_image_is_no_region_of_interest():
    whole, covered = fit(), fit(roi=np.ones((64, 64), bool))
    assert covered.config == whole.config
    assert covered.identity == whole.identity
    assert covered.thresholds == whole.thresholds
    np.testing.assert_array_equal(covered.score(NEW).maps, whole.score(NEW).maps)


def test_identity_has_the_pixels():
    prints = {
        fingerprint(fit(roi=value, thresholds="none"))
        for value in (BOX, (2, 6, 30, 37), INSIDE, "")
    }
    assert len(prints) == 4


def test_images_of_another_aspect_are_refused_by_fits():
    with pytest.raises(padim_jax.UserError, match=r"images\[1\]: 64x32 pixels, and config"):
        fit([GOOD[0], GOOD[1][:32]], roi=BOX)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "settings",
    [
        {"image.resize": (100, 84)},
        {"image.resize": (97, 131), "model.layers": ("layer1", "layer2")},
        {"model.upsample": "bilinear"},
    ],
    ids=str,
)
def test_memory_is_predicted_of_the_same_shapes(settings: dict[str, Any]):
    inside = np.zeros((100, 120), bool)
    inside[13:48, 30:77] = True
    values = defaults.get_config()
    values.update_from_flattened_dict(
        settings | {"image.roi": roi.encode(inside), "model.weights": "random"}
    )
    config = validate(values)
    index = geometry.channel_index(config.model).tolist()
    expected = geometry.pyramid(config.image, config.model, index).shapes
    assert tuple(memory._shapes(config)) == expected
