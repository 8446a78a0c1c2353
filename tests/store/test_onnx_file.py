"""ONNX files of strangers are data: whatever else is in them is not run, and said."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("onnx", reason="needs onnx: padim-jax[onnx]")

import detectors
import onnx
from onnx import helper, numpy_helper

from padim_jax.detector import detector as detector_lib
from padim_jax.errors import UserError
from padim_jax.export import onnx_graph
from padim_jax.store import onnx_file, validation


@pytest.fixture(scope="module")
def proto(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """A file as it is written, but without verification, which takes JAX."""
    detector = detectors.make(
        calibrated=False, **{"model.layers": ("layer1",), "model.channels": 4}
    )
    graph, constants = onnx_graph.build(detector)
    mark = detector_lib.fingerprint(detector)
    model = onnx_file.Model(detector.config, detector.weights, mark, detector.images)
    path = tmp_path_factory.mktemp("made") / "part.onnx"
    onnx_file.save(path, graph, constants, model, (17, 8), "", lambda written: None)
    onnx_file.load(path)
    return onnx.ModelProto.FromString(path.read_bytes())


def write(
    path: pathlib.Path, proto: onnx.ModelProto, sign: bool = True, **changes: Any
) -> None:
    """Write a file, with the checksum of what it says now."""
    (entry,) = [x for x in proto.metadata_props if x.key == "padim_jax"]
    described = json.loads(entry.value) | changes
    if sign:
        described["graph"] = onnx_file._structure(proto)
        arrays = {
            x.name: numpy_helper.to_array(x)
            for x in proto.graph.initializer
            if not x.external_data
        }
        described["sha256"] = validation.digest(described, arrays)
    entry.value = json.dumps(described)
    path.write_bytes(proto.SerializeToString())


def refusal(path: pathlib.Path) -> str:
    with pytest.raises(UserError) as caught:
        onnx_file.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def custom_domain(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].domain = "evil"
    proto.opset_import.append(helper.make_opsetid("evil", 1))


def custom_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].op_type = "PyOp"


def function(proto: onnx.ModelProto) -> None:
    opset = [helper.make_opsetid("", 17)]
    node = helper.make_node("Relu", ["x"], ["y"])
    proto.functions.append(helper.make_function("", "Relu", ["x"], ["y"], [node], opset))


def graph_inside(proto: onnx.ModelProto) -> None:
    inside = helper.make_graph([helper.make_node("Loop", [], [])], "inside", [], [])
    proto.graph.node[0].attribute.append(helper.make_attribute("body", inside))


def other_output(proto: onnx.ModelProto) -> None:
    proto.graph.output[1].name = "anomaly"


def other_size(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 2**30


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (custom_domain, "operators that are not ONNX's own"),
        (custom_operator, "an operator .PyOp"),
        (function, "functions"),
        (graph_inside, "a graph inside of an operator"),
        (other_output, "inputs or outputs"),
        (other_size, "inputs or outputs"),
    ],
)
def test_programs(
    change: Callable[[onnx.ModelProto], None],
    said: str,
    proto: onnx.ModelProto,
    tmp_path: pathlib.Path,
):
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    change(made)
    write(tmp_path / "a.onnx", made)
    assert said in refusal(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    "location",
    [
        "/etc/passwd",
        "../secret-0123456789abcdef.data",
        "inner/secret-0123456789abcdef.data",
        "..",
        "",
        "secret.txt",
        "link-0123456789abcdef.data",
    ],
)
def test_data_elsewhere(location: str, proto: onnx.ModelProto, tmp_path: pathlib.Path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    name = "secret-0123456789abcdef.data"
    for place in (tmp_path / name, folder / "inner" / name, folder / "secret.txt"):
        place.write_bytes(bytes(1_000_000))
    (folder / "link-0123456789abcdef.data").symlink_to(tmp_path / name)
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    tensor = next(x for x in made.graph.initializer if len(x.raw_data) > 10_000)
    about = {"location": location, "offset": "0", "length": str(len(tensor.raw_data))}
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in about.items():
        tensor.external_data.add(key=key, value=value)
    write(folder / "a.onnx", made)
    assert "data at " in refusal(folder / "a.onnx")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "padim_jax onnx 2"}, "which reads 'padim_jax onnx 1'"),
        ({"format": None}, "which reads"),
        ({"config": []}, "a broken one"),
        ({"weights": {"origin": "a"}}, "does not say which weights"),
        ({"half": "yes"}, "of other types"),
        ({"images": "AAAA"}, "a broken one"),
        ({"images": 7}, "a broken one"),
        ({"frame": [1, "x"]}, "its frame is no size"),
        ({"calibration": 3}, "of other types"),
    ],
)
def test_descriptions(
    changes: dict[str, Any], said: str, proto: onnx.ModelProto, tmp_path: pathlib.Path
):
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    write(tmp_path / "a.onnx", made, **changes)
    assert said in refusal(tmp_path / "a.onnx")


def test_changes_and_damage_are_noticed(proto: onnx.ModelProto, tmp_path: pathlib.Path):
    path, content = tmp_path / "a.onnx", proto.SerializeToString()
    for at in range(500, len(content), len(content) // 40):
        changed = bytearray(content)
        changed[at] ^= 1
        path.write_bytes(changed)
        refusal(path)
    for end in (0, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        refusal(path)
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    write(path, made, sign=False, images="")
    assert "its contents are not what was saved" in refusal(path)


def test_any_other_onnx_file(tmp_path: pathlib.Path):
    node = helper.make_node("Relu", ["x"], ["y"])
    values = [helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    graph = helper.make_graph([node], "other", values[:1], values[1:])
    path = tmp_path / "other.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    assert "no ONNX file of padim_jax" in refusal(path)
    with pytest.raises(UserError, match="exists and is no ONNX file of padim_jax"):
        onnx_file.require_own(path)
