"""The exported StableHLO program against the detector, for several numbers of images."""

import pathlib
from typing import Any

import detectors
import jax.export
import numpy as np
import pytest

from padim_jax.detector import detector as detector_lib
from padim_jax.runs import export


@pytest.mark.parametrize(
    "settings",
    [
        {"score.image": "combined"},
        {"model.shift": 1},
        {"image.roi": detectors.ROI, "score.image": "combined"},
    ],
    ids=["combined", "shift", "region"],
)
def test_agrees_with_the_detector(settings: dict[str, Any], tmp_path: pathlib.Path):
    detector = detectors.make(**{"model.layers": ("layer1",), "model.channels": 4, **settings})
    export.export(detector, tmp_path / "part.stablehlo")
    content = bytearray((tmp_path / "part.stablehlo").read_bytes())
    program: Any = jax.export.deserialize(content).call
    pixels = detectors.images(detector.config)
    expected = detector_lib.score_pixels(detector, pixels)
    for images, part in ((pixels[:1], slice(0, 1)), (pixels, slice(0, 7))):
        found = {name: np.asarray(x) for name, x in program(images).items()}
        highest = expected.maps.max()
        np.testing.assert_allclose(
            found["anomaly_map"], expected.maps[part], rtol=0, atol=2e-5 * highest
        )
        scores = expected.scores[part]
        np.testing.assert_allclose(found["score"], scores, rtol=2e-5, atol=2e-5)
        assert detector.calibration is not None
        threshold = np.float32(detector.calibration.image_threshold)
        np.testing.assert_array_equal(found["is_anomalous"], found["score"] >= threshold)
