"""Thresholds from the embeddings that a fit keeps, beside those of a second pass over files."""

import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

import padim_jax
from padim_jax.detector import memory, steps
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices

SETTINGS: dict[str, Any] = {
    "preset": "anomalib",
    "weights": "random",
    "layers": ("layer1", "layer2"),
    "channels": 12,
    "resize": (32, 48),
    "batch_size": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Nine images of four parts: of one part one, of another four."""
    place, rng = tmp_path_factory.mktemp("parts"), np.random.default_rng(0)
    for name in ("a0", "a1", "b0", "b1", "b2", "b3", "c0", "d0", "d1"):
        pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{name}.png")
    return place


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize("statistics", ["moments", "samples"])
@pytest.mark.parametrize("groups", ["", r"(\w)\d\.png"])
def test_thresholds_are_those_of_a_second_pass(
    groups: str,
    statistics: str,
    devices: int,
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(parallel, "every", lambda: Devices(devices))
    embed, embedded = steps.embed, []
    monkeypatch.setattr(steps, "embed", lambda *x: embedded.append(x[1].shape) or embed(*x))
    settings: dict[str, Any] = {**SETTINGS, "statistics": statistics, "groups": groups}
    kept = padim_jax.fit(folder, **settings).thresholds
    of_fit = len(embedded)
    assert of_fit == -(-9 // Devices(devices).padded(4))
    monkeypatch.setattr(memory, "embeddings_to_keep", lambda *_, **__: 0)
    again = padim_jax.fit(folder, **settings).thresholds
    assert len(embedded) > 3 * of_fit - 1
    assert kept is not None
    assert again is not None
    if not groups:
        assert kept == again
    # Groups of one size are batches of their own, whose convolutions round otherwise.
    np.testing.assert_allclose(kept.scores, again.scores, rtol=1e-5)


def test_embeddings_are_kept_where_half_of_the_memory_suffices(
    monkeypatch: pytest.MonkeyPatch,
):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), np.uint8)
    config = padim_jax.fit(images, thresholds="none", **SETTINGS).config
    one = Devices(1)
    floats = sum(r * n * d for r, n, d in memory._shapes(config))
    total = memory.estimate(config, 100, one).total + 400 * floats
    for free, expected in ((2 * total, 400 * floats), (2 * total - 2, 0)):
        monkeypatch.setattr(memory, "available_to_host", lambda free=free: free)
        assert memory.embeddings_to_keep(config, 100, one) == expected
