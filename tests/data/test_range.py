"""`config.image.range=train` and the images that Python gives, through fit and score."""

import dataclasses
import io
import pathlib
import tracemalloc
from typing import Any

import numpy as np
import pytest
from PIL import Image

import padim_jax
from padim_jax.config import defaults
from padim_jax.config.settings import validate
from padim_jax.data import dataset_splits, decoding
from padim_jax.detector.detector import Detector
from padim_jax.errors import DataWarning, UserError
from padim_jax.runs import fitting, loading, train

RANDOM = np.random.default_rng(0)


def settings(root: pathlib.Path, counts: Any) -> Any:
    values: Any = defaults.get_config()
    values.dataset.name, values.dataset.root, values.category = "folder", str(root), ""
    values.image.resize, values.image.range = (32, 32), counts
    values.model.weights, values.model.layers = "random", ("layer1",)
    values.model.channels, values.threshold.normal = 5, "none"
    values.cache.dir = str(root / "cache")
    return validate(values)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Detector]:
    root = tmp_path_factory.mktemp("thermal")
    (root / "train/good").mkdir(parents=True)
    for number in range(4):
        pixels = RANDOM.integers(21000, 23041, (40, 40), np.uint16)
        pixels[0, 0] = 65535  # a hot pixel
        Image.fromarray(pixels).save(root / f"train/good/{number}.png")
    config = settings(root, "train")
    detector = train.train(config, dataset_splits.open_dataset(config), root / "model")
    return root, detector


def test_numbers_of_the_training_images_are_kept(fitted):
    root, detector = fitted
    every = [np.asarray(Image.open(path)) for path in sorted(root.glob("train/good/*"))]
    low, high = np.percentile(every, (0.1, 99.9), method="inverted_cdf")
    assert detector.config.image.range == (low, high)
    assert 21000 <= low < 21010
    assert 23030 < high <= 23040
    # The model's own, and those of a configuration that asks for the same again.
    for config in (None, settings(root, "train"), settings(root, (int(low), int(high)))):
        loaded = loading.load(root / "model", config)
        assert loaded.config.image.range == (low, high)
    for other in ("full", (0, 65535)):
        with pytest.raises(UserError, match=r"config\.image\.range"):
            loading.load(root / "model", settings(root, other))


def test_counting_values_takes_one_table_at_a_time():
    """Not one for every row: 0.5 MB each."""
    pixels = np.arange(4000, dtype=np.uint16).repeat(2).reshape(4000, 2)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    tracemalloc.start()
    try:
        counts = decoding.grey_counts(content.getvalue(), "a.png")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert counts.tolist() == [2] * 4000 + [0] * (65536 - 4000)
    assert peak < 5e6


def test_models_of_other_ranges_are_not_merged(fitted, tmp_path):
    root, _ = fitted
    config = settings(root, (0, 65535))
    other = tmp_path / "other"
    with pytest.warns(DataWarning, match="grey levels"):
        train.train(config, dataset_splits.open_dataset(config), other)
    with pytest.raises(UserError, match="the same pixels mean other values"):
        fitting.merge([root / "model", other], tmp_path / "merged")


def test_lost_levels_are_told_once(fitted, tmp_path):
    root, _ = fitted
    config = settings(root, "full")
    with pytest.warns(DataWarning, match=r"4 of 4 images keep fewer than 32") as caught:
        train.train(config, dataset_splits.open_dataset(config), tmp_path / "model")
    assert len(caught) == 1


@pytest.fixture(scope="module")
def detector(fitted) -> Detector:
    _, detector = fitted
    image = dataclasses.replace(detector.config.image, range="full")
    return dataclasses.replace(
        detector, config=dataclasses.replace(detector.config, image=image)
    )


def test_python_takes_what_files_are(detector, tmp_path):
    rgba = RANDOM.integers(0, 256, (30, 40, 4), np.uint8)
    deep = RANDOM.integers(0, 65536, (30, 40), np.uint16)
    for pixels in (rgba, rgba[..., :3], rgba[..., 0], deep):
        image, path = Image.fromarray(pixels), tmp_path / "a.png"
        image.save(path)
        data = path.read_bytes()
        ways = [path, str(path), data, io.BytesIO(data), image, pixels]
        if pixels.ndim == 2:
            ways.append(pixels[..., None])
        scores = padim_jax.score(detector, ways).scores
        np.testing.assert_array_equal(scores, scores[0])


def test_python_refuses_what_is_no_image(detector):
    for shape in ((0, 100, 3), (100, 0, 3), (0, 0), (1, 65501, 3)):
        with pytest.raises(UserError, match=r"images\[0\]: \d+x\d+ pixels"):
            padim_jax.score(detector, [np.zeros(shape, np.uint8)])
    for wrong in (
        np.full((4, 4, 3), np.nan),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros(4, np.uint8),
    ):
        with pytest.raises(TypeError, match=r"images\[0\]: an array"):
            padim_jax.score(detector, [wrong])
    for single in (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.uint8), "a.png"):
        with pytest.raises(TypeError, match="a single image"):
            padim_jax.score(detector, single)
