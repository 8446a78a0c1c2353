"""Scattering against its definition, in float64 and at full resolution."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal

from padim_jax.config import backbones
from padim_jax.config.backbones import SCATTERING
from padim_jax.models import scattering

SPEC = SCATTERING["scattering"]
ALL = SPEC.stages
COUNT = SPEC.orientations
VARIABLES: Any = {"params": {"gabor": {"kernel": scattering.filters(COUNT)}}}


def features(
    images: np.ndarray, precision: backbones.Precision = "float32"
) -> list[np.ndarray]:
    model = scattering.Scattering(SPEC, ALL, precision)
    maps: Any = jax.jit(model.apply)(VARIABLES, jnp.float32(images))
    return [np.asarray(x) for x in maps]


def halved(x: np.ndarray) -> np.ndarray:
    odd = np.array(x.shape) % 2
    padded = np.pad(x, [(2, 3 + odd[0]), (2, 3 + odd[1])], mode="edge")
    kernel = np.outer(scattering.BINOMIAL, scattering.BINOMIAL)
    return signal.correlate2d(padded, kernel, "valid")[::2, ::2]


def energy(x: np.ndarray, orientation: int) -> np.ndarray:
    kernel: Any = np.float64(scattering.filters(COUNT)[:, :, 0])
    odd = np.array(x.shape) % 2
    padded = np.pad(x, [(3, 3 + odd[0]), (3, 3 + odd[1])], mode="edge")
    real, imaginary = (
        signal.correlate2d(padded, kernel[..., i], "valid")
        for i in (orientation, COUNT + orientation)
    )
    modulus = np.hypot(real, imaginary)
    height, width = modulus.shape
    return modulus.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))


def times(x: np.ndarray, count: int) -> np.ndarray:
    for _ in range(count):
        x = halved(x)
    return x


def by_definition(image: np.ndarray) -> list[np.ndarray]:
    colours = [image @ scattering.OPPONENT[:, c] for c in range(3)]
    pyramid = [[times(x, j) for x in colours] for j in range(5)]
    stages = []
    for scale, own, pairs in scattering.STAGES.values():
        first = [
            times(energy(x, t), scale - j - 1)
            for j in own
            for x in pyramid[j]
            for t in range(COUNT)
        ]
        second = [
            times(energy(times(energy(pyramid[i][0], t), j - i - 1), s), scale - j - 1)
            for i, j in pairs
            for t in range(COUNT)
            for s in range(COUNT)
        ]
        energies = np.log1p(np.stack(first + second, axis=-1) / scattering.SMALL)
        stages.append(np.concatenate([np.stack(pyramid[scale], axis=-1), energies], axis=-1))
    return stages


@pytest.mark.parametrize("size", [(48, 32), (37, 41)])
def test_features_are_those_of_the_definition(size: tuple[int, int]):
    image = np.random.default_rng(0).normal(size=(*size, 3))
    for stage, x, expected in zip(
        ALL, features(image[None]), by_definition(image), strict=True
    ):
        assert x.shape[-1] == SPEC.channels(stage)
        # float32 sums of at most 64 terms, twice; measured 2e-6.
        np.testing.assert_allclose(x[0], expected, rtol=0, atol=2e-5)


def test_stages_do_not_depend_on_each_other():
    images = jnp.float32(np.random.default_rng(1).normal(size=(1, 40, 40, 3)))
    everything = features(np.asarray(images))
    for stage, expected in zip(ALL, everything, strict=True):
        model = scattering.Scattering(SPEC, (stage,), "float32")
        found: Any = jax.jit(model.apply)(VARIABLES, images)
        np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-6)


def test_features_move_with_the_image():
    image = np.random.default_rng(2).normal(size=(1, 176, 176, 3))
    whole, moved = features(image), features(np.roll(image, 16, axis=2))
    for stage, (x, y) in enumerate(zip(whole, moved, strict=True)):
        cells, border = 4 >> stage, 64 >> (stage + 2)
        inside = np.s_[:, border:-border, border + cells : -border]
        before = np.s_[:, border:-border, border : -border - cells]
        np.testing.assert_allclose(y[inside], x[before], rtol=0, atol=2e-5)


def test_a_plain_image_has_no_energy():
    for x in features(np.full((1, 64, 64, 3), 1.5)):
        # The filters' sums are 0 up to the 6 digits that they have.
        assert np.abs(x[..., 3:]).max() < 1e-3


def test_filters_have_norm_one_and_no_mean():
    kernel = scattering.filters(6)
    waves = kernel[..., :6] + 1j * kernel[..., 6:]
    np.testing.assert_allclose(np.linalg.norm(waves, axis=(0, 1)), 1, atol=1e-5)
    np.testing.assert_allclose(waves.sum(axis=(0, 1)), 0, atol=5e-5)


def test_bfloat16_is_near():
    image = np.random.default_rng(3).normal(size=(1, 64, 64, 3))
    for full, half in zip(features(image), features(image, "bfloat16"), strict=True):
        assert half.dtype == np.float32
        # Eight bits of mantissa, on energies below 4; the averages are not rounded.
        np.testing.assert_allclose(half, full, rtol=0, atol=0.1)
