"""ONNX files in the same program: what JAX says of images, said without JAX."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx", reason='needs onnx (pip install "padim-jax[onnx]")')
pytest.importorskip("onnxruntime", reason='needs ONNX Runtime (pip install "padim-jax[onnx]")')

import detectors

import padim_jax
from padim_jax import errors
from padim_jax.detector import detector as detector_lib
from padim_jax.detector.detector import Detector
from padim_jax.errors import UserError
from padim_jax.runs import export, grow, loading

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUNTIMES: list[Any] = ["onnxruntime", "openvino"]
SETTINGS = {"model.layers": ("layer1",), "model.channels": 4, "score.image": "combined"}


@pytest.fixture(scope="module")
def detector() -> Detector:
    made = detectors.make(**SETTINGS)
    assert made.calibration is not None
    # Found on these images, thresholds equal some of their scores, up to rounding.
    thresholds = dataclasses.replace(
        made.calibration,
        image_threshold=0.99 * made.calibration.image_threshold,
        pixel_threshold=0.99 * made.calibration.pixel_threshold,
    )
    return dataclasses.replace(made, calibration=thresholds)


@pytest.fixture(scope="module")
def pixels(detector: Detector) -> np.ndarray:
    return detectors.images(detector.config)


@pytest.fixture(scope="module")
def path(
    detector: Detector, pixels: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    found = tmp_path_factory.mktemp("scoring") / "part.onnx"
    export.export(detector, found, images=list(pixels))
    return found


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_scores_as_the_detector(
    runtime: Any, detector: Detector, pixels: np.ndarray, path: pathlib.Path
):
    detectors.require(runtime)
    expected = detector_lib.score(detector, pixels)
    loaded = padim_jax.load(path, runtime=runtime)
    assert loaded.thresholds == detector.calibration
    assert repr(loaded) == repr(detector)
    assert loaded.count == detector.count
    for batch_size in (1, 7, 32):
        parts = list(loaded.stream(pixels, batch_size))
        assert len(parts) == -(-len(pixels) // batch_size)
        scores = np.concatenate([part.scores for part in parts])
        # At most 1.6e-6 of the summaries; see `export.verification`.
        np.testing.assert_allclose(scores, expected.scores, rtol=2e-5, atol=2e-5)
    found = loaded.score(pixels)
    np.testing.assert_allclose(found.maps, expected.maps, atol=2e-5 * expected.maps.max())
    np.testing.assert_array_equal(found.is_anomalous, expected.is_anomalous)
    assert found.rarity is not None
    assert found.regions is not None
    assert expected.rarity is not None
    assert expected.regions is not None
    np.testing.assert_allclose(found.rarity, expected.rarity, atol=1e-5)
    boxes = [[region.box for region in regions] for regions in expected.regions]
    assert [[region.box for region in regions] for regions in found.regions] == boxes
    assert any(boxes)


def test_evaluates_as_the_detector(
    detector: Detector, pixels: np.ndarray, path: pathlib.Path, tmp_path: pathlib.Path
):
    export.export(detector, tmp_path / "part.safetensors")
    labels = [True, False, True, False, False, False, False]
    ours = padim_jax.load(tmp_path / "part.safetensors").evaluate(pixels, labels)
    for runtime in RUNTIMES:
        detectors.require(runtime)
        theirs = padim_jax.load(path, runtime=runtime).evaluate(pixels, labels)
        assert theirs["image_auroc"] == ours["image_auroc"]
        assert theirs["image_f1_threshold"] == pytest.approx(
            ours["image_f1_threshold"], rel=2e-5
        )


@pytest.mark.parametrize("decide", ["regions", "either"])
def test_verdicts_by_regions(
    decide: str, detector: Detector, pixels: np.ndarray, tmp_path: pathlib.Path
):
    """The graph finds none: it has no verdict, and the loaded detector finds them in maps."""
    assert detector.calibration is not None
    config = dataclasses.replace(detector.config, decide=decide)
    thresholds = dataclasses.replace(detector.calibration, decide=decide)
    detector = dataclasses.replace(detector, config=config, calibration=thresholds)
    export.export(detector, tmp_path / "part.onnx", images=list(pixels))
    loaded: Any = padim_jax.load(tmp_path / "part.onnx")
    assert set(loaded.run(pixels)) == {"anomaly_map", "score", "rarity"}
    expected = detector_lib.score(detector, pixels)
    np.testing.assert_array_equal(loaded.score(pixels).is_anomalous, expected.is_anomalous)
    with pytest.raises(UserError, match=rf"config\.decide={decide}: \.stablehlo files find no"):
        export.export(detector, tmp_path / "part.stablehlo")


WITHOUT_JAX = """if True:
    import json, os, pathlib, signal, sys, threading, time
    import padim_jax

    def run(main):
        try:
            main.run()
        except SystemExit as end:
            assert not end.code, end.code

    path, images, runtime = sys.argv[1:]
    detector = padim_jax.load(path, runtime=runtime)
    scores = detector.score(images).scores.tolist()
    labels = [True, False, True, False, False, False, False]
    auroc = detector.evaluate(images, labels)["image_auroc"]
    from padim_jax import main
    workdir = pathlib.Path(path).parent / runtime
    given = [f"--checkpoint={path}", f"--input={images}", f"--runtime={runtime}"]
    sys.argv = ["padim-jax", "--mode=predict", f"--workdir={workdir}", *given]
    run(main)
    from absl import flags
    flags.FLAGS.unparse_flags()

    def stop():
        table = workdir / "watch" / "scores.csv"
        while not table.exists() or len(table.read_bytes().splitlines()) < 8:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    sys.argv += ["--watch", "--settle_seconds=0"]
    run(main)
    heavy = ["jax", "jaxlib", "flax", "orbax"]
    print(json.dumps([scores, auroc, [x for x in heavy if x in sys.modules]]))
"""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_without_jax(
    runtime: Any,
    detector: Detector,
    pixels: np.ndarray,
    path: pathlib.Path,
    tmp_path: pathlib.Path,
):
    """Load, score, evaluate, predict and watch in a process of their own."""
    detectors.require(runtime)
    (tmp_path / "parts").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "parts" / f"{i}.png")
    (tmp_path / "part.onnx").write_bytes(path.read_bytes())
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WITHOUT_JAX,
            tmp_path / "part.onnx",
            tmp_path / "parts",
            runtime,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    scores, _, heavy = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    expected = detector_lib.score(detector, pixels)
    np.testing.assert_allclose(scores, expected.scores, rtol=2e-5, atol=2e-5)
    for folder in ("predictions", "watch"):
        lines = (tmp_path / runtime / folder / "scores.csv").read_text().splitlines()
        rows = sorted(line.split(",") for line in lines[1:])
        np.testing.assert_allclose(
            [float(row[1]) for row in rows], scores, rtol=2e-5, atol=2e-5
        )
        assert expected.is_anomalous is not None
        assert [row[2] for row in rows] == [str(int(x)) for x in expected.is_anomalous]
        assert (tmp_path / runtime / folder / "overlays" / "0.png.jpg").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"config": {"map.sigma": 2.0}}, r"config\.map\.sigma=2\.0: .* exported with 4\.0"),
        ({"config": {"score.image": "max"}}, r"config\.score\.image=max: .* export the check"),
        ({"config": {"model.precision": "bfloat16"}}, "ONNX Runtime computes in float32"),
        ({"weights": "x.npz"}, "--weights=x.npz: .* holds its weights"),
    ],
)
def test_settings_of_the_file_are_fixed(
    arguments: dict[str, Any], said: str, path: pathlib.Path
):
    with pytest.raises(UserError, match=said):
        padim_jax.load(path, runtime="onnxruntime", **arguments)


def test_other_settings_are_free(path: pathlib.Path):
    loaded = padim_jax.load(path, {"batch_size": 3, "outputs.maps": "npy"})
    assert (loaded.config.batch_size, loaded.config.outputs.maps) == (3, "npy")


def test_bfloat16_is_another_model(detector: Detector, pixels: np.ndarray, path: pathlib.Path):
    """Its own results are not mixed with those of float32; thresholds stay."""
    detectors.require("openvino")
    loaded: Any = padim_jax.load(path, {"model.precision": "bfloat16"}, runtime="openvino")
    assert loaded.fingerprint == f"{detector_lib.fingerprint(detector)} in bfloat16"
    assert loaded.versions["runtime"].endswith(", bfloat16")
    assert loaded.thresholds == detector.calibration
    expected = detector_lib.score(detector, pixels).maps
    # bfloat16 has 8 bits; processors without it compute in float32.
    found = loaded.score(pixels).maps
    np.testing.assert_allclose(found, expected, atol=0.1 * expected.max())


def test_refuses_what_needs_statistics(path: pathlib.Path, tmp_path: pathlib.Path):
    loaded = padim_jax.load(path)
    images = np.zeros((2, 36, 40, 3), np.uint8)
    for name, call in {
        "update": lambda: loaded.update(images),
        "embed": lambda: loaded.embed(images),
        "save": lambda: loaded.save(tmp_path / "part"),
        "export": lambda: loaded.export(tmp_path / "part.onnx"),
    }.items():
        with pytest.raises(UserError, match=f"^{name}: the detector comes from an ONNX file"):
            call()
    with pytest.raises(UserError, match="an ONNX file, for scoring alone"):
        loading.load(path)
    with pytest.raises(UserError, match="an ONNX file, for scoring alone"):
        padim_jax.merge([path, path])
    with pytest.raises(UserError, match="part"):
        grow.merge([path, path], tmp_path / "both")
    with pytest.raises(errors.UserError, match=r"runtime=openvino: for ONNX files"):
        padim_jax.load(tmp_path / "part", runtime="openvino")


def test_raw_frames_are_for_others(detector: Detector, tmp_path: pathlib.Path):
    export.export(detector, tmp_path / "frames.onnx", frame=(72, 80))
    with pytest.raises(UserError, match=r"raw frames \(--frame=72x80\).* without --frame"):
        padim_jax.load(tmp_path / "frames.onnx")


def test_scores_that_are_not_finite_name_the_image(path: pathlib.Path):
    loaded: Any = padim_jax.load(path)

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        found = padim_jax.load(path)
        outputs: Any = found.run(images)  # pyright: ignore[reportAttributeAccessIssue]
        return outputs | {"score": np.full(len(images), np.nan, np.float32)}

    broken = dataclasses.replace(loaded, run=run)
    with pytest.raises(UserError, match=r"images\[0\]: a score of nan"):
        broken.score(np.zeros((1, 36, 40, 3), np.uint8))


def test_metrics_of_bottle(shared: pathlib.Path, tmp_path: pathlib.Path):
    """Equal in all runtimes to the digits that are printed."""
    bottle = shared / "data/mvtec_ad/bottle"
    good = sorted(bottle.glob("train/good/*.png"))[:12]
    images = sorted(bottle.glob("test/*/*.png"))
    labels = [image.parent.name != "good" for image in images]
    masks = [
        bottle / "ground_truth" / image.parent.name / f"{image.stem}_mask.png"
        if label
        else None
        for image, label in zip(images, labels, strict=True)
    ]
    settings: Any = {"weights": "random", "layers": ("layer1",), "channels": 20}
    fitted = padim_jax.fit(good, preset="anomalib", resize=(96, 96), crop=None, **settings)
    fitted.export(tmp_path / "bottle.onnx", images=good)
    ours = fitted.evaluate(images, labels, masks)
    for runtime in RUNTIMES:
        detectors.require(runtime)
        loaded = padim_jax.load(tmp_path / "bottle.onnx", runtime=runtime)
        theirs = loaded.evaluate(images, labels, masks)
        for name in ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro"):
            assert f"{theirs[name]:.4f}" == f"{ours[name]:.4f}", name
