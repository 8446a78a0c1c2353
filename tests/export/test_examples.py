"""The examples run as they are, on a file written here, and give the detector's scores."""

import pathlib
import shutil
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime", reason="needs ONNX Runtime: padim-jax[onnx]")

import detectors

from padim_jax.data import input_pipeline
from padim_jax.detector import detector as detector_lib
from padim_jax.detector.detector import Detector
from padim_jax.runs import export

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def detector() -> Detector:
    return detectors.make(
        **{"image.crop": (32, 36), "model.layers": ("layer1",), "model.channels": 4}
    )


@pytest.fixture(scope="module")
def path(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    found = tmp_path_factory.mktemp("examples") / "part.onnx"
    export.export(detector, found)
    return found


def test_python(detector: Detector, path: pathlib.Path, tmp_path: pathlib.Path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    done = subprocess.run(
        [sys.executable, EXAMPLES / "score_onnx.py", path, tmp_path / "a.png"],
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    name, score, rarity, called = done.stdout.split()
    image = input_pipeline.preprocess(Image.fromarray(pixels), detector.config.image)
    (expected,) = detector_lib.score_pixels(detector, image[None]).scores
    thresholds = detector.calibration
    assert thresholds is not None
    assert name == str(tmp_path / "a.png")
    assert float(score) == pytest.approx(float(expected), rel=1e-5)
    assert float(rarity) == pytest.approx(
        thresholds.calibrated(np.array([expected]))[0], abs=1e-4
    )
    assert called == str(bool(expected >= thresholds.image_threshold))


def test_c(detector: Detector, path: pathlib.Path, tmp_path: pathlib.Path):
    home = detectors.require("openvino")
    compiler = shutil.which("cc")
    libraries = sorted((home / "libs").glob("libopenvino*.so*"))
    own = [x for x in libraries if x.name.startswith(("libopenvino.so", "libopenvino_c.so"))]
    if compiler is None or len(own) != 2 or sysconfig.get_platform() != "linux-x86_64":
        pytest.skip("needs a C compiler and OpenVINO's libraries for Linux on x86-64")
    program = tmp_path / "score"
    subprocess.run(
        [
            *(compiler, "-Wall", "-Werror", EXAMPLES / "score_openvino.c", "-o", program),
            *(f"-I{home / 'include'}", *own, f"-Wl,-rpath,{home / 'libs'}"),
        ],
        check=True,
    )
    (image,) = detectors.images(detector.config, 1)
    height, width, _ = image.shape
    done = subprocess.run(
        [program, path, str(height), str(width)], input=image.tobytes(), capture_output=True
    )
    assert done.returncode == 0, done.stderr
    (expected,) = detector_lib.score_pixels(detector, image[None]).scores
    assert float(done.stdout) == pytest.approx(float(expected), rel=1e-5)


def test_openvino_reports_to_nobody(path: pathlib.Path):
    detectors.require("openvino")
    code = """if True:
        import pathlib, sys
        from padim_jax.export import runtimes
        runtimes.open_file(pathlib.Path(sys.argv[1]), "openvino")
        print([x for x in sys.modules if "openvino_telemetry" in x and sys.modules[x]])
        print("jax" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, path],
        cwd=EXAMPLES.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["[]", "False"]
