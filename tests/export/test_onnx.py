"""The ONNX graph against the detector in JAX, over its forms and options."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx", reason='needs onnx (pip install "padim-jax[onnx]")')
pytest.importorskip("onnxruntime", reason='needs ONNX Runtime (pip install "padim-jax[onnx]")')

import detectors
import onnx

from padim_jax.config import backbones
from padim_jax.config.settings import ScoreConfig
from padim_jax.data import input_pipeline
from padim_jax.detector import detector as detector_lib
from padim_jax.detector.detector import Detector
from padim_jax.errors import UserError
from padim_jax.export import backbones as onnx_backbones
from padim_jax.export import onnx_graph, resizing, runtimes, verification
from padim_jax.export.graph import Graph
from padim_jax.models.weights import naming
from padim_jax.runs import export
from padim_jax.store import model_file, onnx_file

# Rounding: the order of sums differs. Measured over these cases: 2e-6 of the highest pixel.
TOLERANCE = 2e-5

B5 = {"model.backbone": "efficientnet_b5", "model.layers": ("block1", "block3")}


@pytest.fixture
def small_efficientnet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of all kinds, fewer of them: the whole network takes a minute to compile."""
    spec = backbones.EfficientNetSpec(
        stages=("block1", "block3"),
        stem=8,
        groups=((1, 1, 3, 1, 8), (2, 6, 3, 2, 8), (1, 6, 5, 2, 12)),
    )
    for table in (backbones.EFFICIENTNETS, backbones.BACKBONES):
        monkeypatch.setitem(table, "efficientnet_b5", spec)
    for name, stride in (("block1", 4), ("block3", 8)):
        monkeypatch.setitem(backbones.STRIDES, name, stride)
    naming._kernels.cache_clear()
    yield
    naming._kernels.cache_clear()


def write(detector: Detector, path: pathlib.Path) -> None:
    """Export, verified on the images that the detector has scored already."""
    export.export(detector, path, images=list(detectors.images(detector.config)))


def agree(detector: Detector, path: pathlib.Path, runtime: Any = "onnxruntime") -> None:
    """Check all outputs, for several numbers of images at once."""
    pixels = detectors.images(detector.config)
    expected = detector_lib.score_pixels(detector, pixels)
    run = runtimes.open_file(path, runtime)
    parts = [run(pixels[:1]), run(pixels[1:])]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    maps, scores = found["anomaly_map"], found["score"]
    assert maps.dtype == scores.dtype == np.float32
    np.testing.assert_allclose(
        maps, expected.maps, atol=TOLERANCE * expected.maps.max(), rtol=0
    )
    np.testing.assert_allclose(scores, expected.scores, rtol=TOLERANCE, atol=TOLERANCE)
    if detector.calibration is None:
        assert set(found) == {"anomaly_map", "score"}
        return
    rarity = detector.calibration.calibrated(scores)
    np.testing.assert_allclose(
        found["rarity"], rarity, atol=1e-12 if runtime == "onnxruntime" else 1e-6
    )
    called = scores >= np.float32(detector.calibration.image_threshold)
    assert 0 < np.count_nonzero(called) < len(called)
    np.testing.assert_array_equal(found["is_anomalous"], called)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "region, max": ("moments", {"image.roi": detectors.ROI}),
    "region, combined": ("samples", {"image.roi": detectors.ROI, "score.image": "combined"}),
    "region, shift": (
        "moments",
        {"image.roi": detectors.ROI, "model.shift": 1, "score.image": "variation"},
    ),
    "no nested grids, combined": (
        "moments",
        {
            **{"image.resize": (97, 131), "model.layers": ("layer1", "layer2")},
            **{"score.image": "combined", "map.upsample": "bicubic"},
        },
    ),
    "low rank": (
        "samples",
        {"image.resize": (200, 250), "map.sigma": 0.0, "score.image": "top"},
    ),
    "shift": ("moments", {"model.shift": 1, "score.image": "band"}),
    "shift, low rank": (
        "samples",
        {"model.shift": 1, "score.image": "variation", "model.layers": ("layer1", "layer2")},
    ),
    "projection": (
        "samples",
        {
            "model.pooling": 3,
            "model.reduction": "semi_orthogonal",
            "model.backbone": "scattering",
            "model.weights": "none",
        },
    ),
    "bilinear, bottleneck": (
        "moments",
        {
            "image.resize": (192, 320),
            **{"model.upsample": "bilinear", "model.pooling": 3, "model.backbone": "resnet50"},
            "model.layers": ("layer1", "layer2"),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_detector(case: str, tmp_path: pathlib.Path):
    form, settings = CASES[case]
    detector, path = detectors.make(form, **settings), tmp_path / "part.onnx"
    write(detector, path)
    agree(detector, path)
    if case in ("no nested grids, combined", "shift, low rank"):
        detectors.require("openvino")
        agree(detector, path, "openvino")


@pytest.fixture(scope="module")
def simple() -> Detector:
    return detectors.make(**{"model.layers": ("layer1",), "model.channels": 4})


@pytest.fixture(scope="module")
def written(simple: Detector, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("written") / "part.onnx"
    write(simple, path)
    return path


def test_threshold_is_an_input(simple: Detector, written: pathlib.Path):
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
    pixels = detectors.images(simple.config)
    scores, called = session.run(["score", "is_anomalous"], {"images": pixels})
    assert called.any()
    for threshold, expected in ((scores.max(), 1), (np.float32(np.inf), 0), (np.float32(0), 7)):
        given = {"images": pixels, "image_threshold": np.array(threshold)}
        (called,) = session.run(["is_anomalous"], given)
        assert np.count_nonzero(called) == expected


@pytest.mark.parametrize("runtime", runtimes.NAMES)
def test_number_of_images_does_not_matter(
    runtime: Any, simple: Detector, written: pathlib.Path
):
    detectors.require(runtime)
    pixels = np.tile(detectors.images(simple.config), (5, 1, 1, 1))[:32]
    run = runtimes.open_file(written, runtime)
    every = run(pixels)
    np.testing.assert_allclose(
        every["score"][:7], detector_lib.score_pixels(simple, pixels[:7]).scores, rtol=TOLERANCE
    )
    for count in (1, 7):
        part = run(pixels[:count])
        for name in ("anomaly_map", "score"):
            scale = every[name].max()
            np.testing.assert_allclose(
                part[name], every[name][:count], rtol=0, atol=TOLERANCE * scale
            )


def test_description(simple: Detector, written: pathlib.Path):
    model, proto = onnx_file.load(written)
    assert model.config == dataclasses.replace(simple.config, dataset=model.config.dataset)
    assert model.weights == simple.weights
    assert model.fingerprint == detector_lib.fingerprint(simple)
    texts = {entry.key: entry.value for entry in proto.metadata_props}
    assert "false alarms" in texts["thresholds"]
    assert simple.weights.sha256 in texts["licence"]
    assert json.loads(texts["padim_jax"])["numbers"] == "float32"
    assert proto.ir_version == 8
    assert [(x.domain, x.version) for x in proto.opset_import] == [("", 17)]


def test_without_thresholds_there_are_no_verdicts(simple: Detector, tmp_path: pathlib.Path):
    detector = dataclasses.replace(simple, calibration=None)
    write(detector, tmp_path / "part.onnx")
    agree(detector, tmp_path / "part.onnx")
    combined = dataclasses.replace(
        detector,
        config=dataclasses.replace(detector.config, score=ScoreConfig("combined")),
    )
    with pytest.raises(UserError, match="the model has no thresholds"):
        export.export(combined, tmp_path / "combined.onnx")
    assert not (tmp_path / "combined.onnx").exists()


def test_wrong_graph_is_not_written(
    simple: Detector, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """One layer without its ReLU: all shapes are as before."""
    earlier = onnx_backbones._residual

    def wrong(network: Any, x: str, name: str, block: str, stride: int) -> str:
        if name != "layer1_1":
            return earlier(network, x, name, block, stride)
        y = network.conv(network.conv(x, f"{name}.conv1"), f"{name}.conv2")
        return network.relu(network.graph.add("Add", x, y))

    path = tmp_path / "part.onnx"
    monkeypatch.setattr(onnx_backbones, "_residual", wrong)
    with pytest.raises(UserError, match="not the detector, and was not written"):
        write(simple, path)
    # A layer that is skipped leaves its parameters unused.
    monkeypatch.setattr(onnx_backbones, "_residual", lambda network, x, *rest: x)
    with pytest.raises(ValueError, match=r"layer1_0.conv1.*without a place"):
        write(simple, path)
    assert [x.name for x in tmp_path.iterdir() if x.name != ".locks"] == []


def test_half(simple: Detector, written: pathlib.Path, tmp_path: pathlib.Path):
    rounded = dataclasses.replace(simple, gaussian=model_file.rounded(simple.gaussian))
    graph, constants = onnx_graph.build(rounded, half=True)
    assert {x.dtype for name, x in constants.items() if "factor" in name} == {np.dtype("f2")}
    model, _ = onnx_file.load(written)
    path = tmp_path / "half.onnx"
    onnx_file.save(path, graph, constants, model, (17, 8), "", lambda written: None)
    agree(rounded, path)


class TestAbove2GB:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(onnx_file, "_MOST_INSIDE", 10_000)

    def test_data_is_beside(self, simple: Detector, tmp_path: pathlib.Path):
        path = tmp_path / "part.onnx"
        write(simple, path)
        agree(simple, path)
        (data,) = tmp_path.glob("*.data")
        assert path.stat().st_size < 100_000 < data.stat().st_size
        onnx_file.load(path)
        agree(simple, path, "openvino")
        # A renewed export takes the place of both files.
        other = dataclasses.replace(simple, variables=changed(simple.variables))
        write(other, path)
        (renewed,) = tmp_path.glob("*.data")
        assert renewed != data
        agree(other, path)

    def test_refused_or_failed_leaves_the_earlier_export(
        self, simple: Detector, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        path = tmp_path / "part.onnx"
        write(simple, path)
        earlier = {x: x.read_bytes() for x in tmp_path.iterdir() if x.is_file()}
        other = dataclasses.replace(simple, variables=changed(simple.variables))

        def refuse(*arguments: Any) -> str:
            assert len(list(tmp_path.glob("*.data"))) == 2
            raise UserError("refused")

        monkeypatch.setattr(verification, "verify", refuse)
        with pytest.raises(UserError, match="refused"):
            write(other, path)
        assert {x: x.read_bytes() for x in tmp_path.iterdir() if x.is_file()} == earlier


def changed(variables: Any) -> Any:
    return jax.tree.map(lambda x: x * np.float32(1.01), variables)


class TestFrames:
    @pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "lanczos"])
    @pytest.mark.parametrize("frame", [(90, 131), (31, 40)])
    def test_resizing_is_pillows_to_one_grey_level(self, frame: tuple[int, int], method: str):
        config = detectors.make_config(
            **{"image.resize": (44, 48), "image.crop": (40, 36), "image.method": method}
        )
        graph = Graph()
        x = graph.add("Cast", graph.transpose("images", 0, 3, 1, 2), to=onnx.TensorProto.FLOAT)
        graph.name(resizing.resized(graph, x, frame, config.image), "pixels")
        made = onnx.helper.make_graph(
            graph.nodes,
            "resizing",
            [onnx.helper.make_tensor_value_info("images", 2, ["b", *frame, 3])],
            [onnx.helper.make_tensor_value_info("pixels", 1, ["b", 3, 40, 36])],
            [onnx.numpy_helper.from_array(x, name) for name, x in graph.constants.items()],
        )
        opset = onnx.helper.make_opsetid("", 17)
        proto = onnx.helper.make_model(made, opset_imports=[opset], ir_version=8)
        import onnxruntime

        session: Any = onnxruntime.InferenceSession(proto.SerializeToString())
        frames = verification.drawn_images(*frame)
        (found,) = session.run(None, {"images": frames})
        expected = np.stack(
            [
                input_pipeline.preprocess(Image.fromarray(frame), config.image)
                for frame in frames
            ]
        )
        difference = np.abs(found.transpose(0, 2, 3, 1) - expected)
        assert difference.max() <= 1
        # Most of 31 to 44 pixels with bilinear, whose sums are often a half: 1.9 %.
        assert np.mean(difference) < 0.03

    def test_export(self, simple: Detector, tmp_path: pathlib.Path):
        path = tmp_path / "frames.onnx"
        export.export(simple, path, frame=(90, 131))
        model, _ = onnx_file.load(path)
        assert model.frame == (90, 131)
        image = np.zeros((80, 131, 3), np.uint8)
        with pytest.raises(UserError, match=r"--frame=90x131: .* another size, 80x131"):
            export.export(simple, path, frame=(90, 131), images=[image])
        with pytest.raises(UserError, match=r"--frame: for --format=onnx"):
            export.export(simple, tmp_path / "part.safetensors", frame=(90, 131))


def test_foreign_file_is_not_replaced(simple: Detector, tmp_path: pathlib.Path):
    path = tmp_path / "part.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match="is no ONNX file of padim_jax; move it away"):
        write(simple, path)
    assert path.read_bytes() == b"mine"


def test_efficientnet(small_efficientnet: None, tmp_path: pathlib.Path):
    detector = detectors.make(**B5)
    write(detector, tmp_path / "part.onnx")
    agree(detector, tmp_path / "part.onnx")
