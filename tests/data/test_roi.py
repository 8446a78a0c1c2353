"""Regions of interest: what is given -> pixels, text, and the model's pixels."""

import dataclasses
import pathlib
import re
from typing import Any

import numpy as np
import pytest
import small
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from PIL import Image

from padim_jax.config import settings as config_lib
from padim_jax.config.settings import ImageConfig
from padim_jax.data import input_pipeline, roi
from padim_jax.errors import UserError

SIZE = (20, 30)
IMAGE = dataclasses.replace(
    small.config(pathlib.Path("/parts")).image, resize=(64, 96), crop=(56, 80)
)


def save(path: pathlib.Path, mask: np.ndarray) -> str:
    Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(path)
    return str(path)


def is_inside(x: float, y: float, points: list[tuple[float, float]]) -> bool:
    """Return whether a ray to the right crosses the outline an odd number of times."""
    crossings = 0
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        if min(y0, y1) <= y < max(y0, y1) and x < x0 + (x1 - x0) * (y - y0) / (y1 - y0):
            crossings += 1
    return crossings % 2 == 1


@given(st_numpy.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_text_and_pixels_are_the_same(mask: np.ndarray):
    text = roi.encode(mask)
    np.testing.assert_array_equal(roi.decode(text), mask)
    assert roi.original_size(text) == mask.shape
    small.config(pathlib.Path("/parts"), **{"image.roi": text})  # accepts it


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), min_size=3, max_size=8))
def test_polygon_is_the_pixels_whose_centres_are_inside(points: list[tuple[float, float]]):
    expected = [[is_inside(x + 0.5, y + 0.5, points) for x in range(30)] for y in range(20)]
    np.testing.assert_array_equal(roi._polygon(points, SIZE), expected)


def test_box_is_the_pixels_within_its_edges():
    expected = np.zeros(SIZE, bool)
    expected[2:10, 5:12] = True
    np.testing.assert_array_equal(roi._polygon((5, 2, 12, 10), SIZE), expected)
    corners = ((5, 2), (5, 10), (12, 10), (12, 2))
    np.testing.assert_array_equal(roi._polygon(corners, SIZE), expected)


def test_model_sees_it_as_it_sees_masks():
    mask = np.random.default_rng(0).random((200, 300)) < 0.5
    expected, _ = input_pipeline._preprocess_mask(mask, IMAGE, input_pipeline._centre(IMAGE))
    np.testing.assert_array_equal(roi.at_input_size(roi.encode(mask), IMAGE), expected)


def test_file_box_and_text_of_one_region_are_equal(tmp_path: pathlib.Path):
    mask = np.zeros((200, 300), bool)
    mask[40:120, 30:200] = True
    path = save(tmp_path / "mask.png", mask)
    texts = {
        roi.resolve(value, (200, 300), IMAGE)
        for value in (path, (30, 40, 200, 120), roi.encode(mask))
    }
    assert texts == {roi.encode(mask)}


@pytest.mark.parametrize("value", [(0, 0, 300, 200), (20, 10, 280, 190)], ids=["all", "crop"])
def test_what_covers_all_that_the_model_sees_is_none(value: tuple[int, ...]):
    assert roi.resolve(value, (200, 300), IMAGE) == ""


def test_mask_of_other_size_and_same_aspect(tmp_path: pathlib.Path):
    mask = np.zeros((20, 30), bool)
    mask[4:12, 3:20] = True
    text = roi.resolve(save(tmp_path / "mask.png", mask), (200, 300), IMAGE)
    larger = mask.repeat(10, 0).repeat(10, 1)
    np.testing.assert_array_equal(roi.at_size(text, (200, 300)), larger)
    np.testing.assert_array_equal(
        roi.at_input_size(text, IMAGE), roi.at_input_size(roi.encode(larger), IMAGE)
    )


def refusal(value: Any, config: ImageConfig = IMAGE) -> str:
    with pytest.raises(UserError) as error:
        roi.resolve(value, (200, 300), config)
    message = str(error.value)
    assert message.startswith("config.image.roi=")
    assert "\n" not in message
    assert "expected" in message
    return message


def test_refusals_say_what_to_do(tmp_path: pathlib.Path):
    mask = np.zeros((100, 100), bool)
    assert "nothing is inside" in refusal(save(tmp_path / "none.png", np.zeros((20, 30), bool)))
    mask[:50] = True
    message = refusal(save(tmp_path / "square.png", mask))
    assert "a mask of 100x100 pixels for images of 300x200" in message
    assert "outside of the image of 300x200" in refusal((0, 0, 301, 200))
    assert "less than 2x2 pixels" in refusal((60, 60, 61, 61))
    assert "less than 2x2 pixels" in refusal((0, 0, 20, 10))  # cropped away
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "absent.png"))):
        roi.resolve(str(tmp_path / "absent.png"), (200, 300), IMAGE)


def test_images_of_another_aspect_are_refused():
    text = roi.encode(np.ones((200, 300), bool))
    roi.require_aspect(text, (100, 150), "a.png")
    roi.require_aspect(text, (67, 100), "a.png")  # rounded
    with pytest.raises(UserError, match=r"a\.png: 200x200 pixels, and config\.image\.roi is f"):
        roi.require_aspect(text, (200, 200), "a.png")


@pytest.mark.parametrize(
    "value",
    [
        *(3, (1, 2), (1, 2, 3), (10, 0, 5, 20), ((0, 0), (1, 1)), ((0, 0), (1, 1), (2, "a"))),
        *("rle:", "rle:2x2:1,2", "rle:2x2:1,0,3", "rle:99999x99999:1,1", "rle:2x2:5", "a\0b"),
        *([[0, 0]] * 1001, (True, False, True, True), {"a": 1}),
    ],
    ids=str,
)
def test_wrong_settings(value: Any):
    with pytest.raises(UserError, match=r"^config\.image\.roi=.*: expected"):
        small.config(pathlib.Path("/parts"), **{"image.roi": value})


@pytest.mark.parametrize("value", ["/etc/hostname", [0, 0, 9, 9]], ids=str)
def test_stored_models_name_no_files(value: Any):
    stored = config_lib.to_stored(small.config(pathlib.Path("/parts")))
    stored["image"]["roi"] = value
    with pytest.raises(UserError, match=r"^config\.image\.roi=.*: expected run lengths"):
        config_lib.restore(stored, "1.0")


@pytest.mark.parametrize(
    "setting",
    [
        {"image.rotation": 5.0},
        {"image.crop": (48, 48), "image.crop_at": "random"},
        {"model.reduction": "pca"},
    ],
    ids=str,
)
def test_settings_that_exclude_it(setting: dict[str, Any]):
    with pytest.raises(UserError, match=r"^config\.image\.roi: .* use "):
        small.config(pathlib.Path("/parts"), **{"image.roi": (0, 0, 9, 9), **setting})
