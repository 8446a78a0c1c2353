"""A detector for other runtimes: one ONNX file, with what belongs to its numbers.

Whatever runs ONNX runs the file, and knows nothing of padim_jax. For people and for this
program its metadata has the configuration, the thresholds with their promise and the identity
of the weights, as JSON below `padim_jax`, and as text below `thresholds` and `licence`.

Protocol buffers end at 2 GB. The constants of a larger graph are in a second file beside it,
which is named by its contents: the ONNX file is written after it and names it, so that the two
are always of one export.

A file from a stranger is data: standard operators, and no data outside of the file's folder.
"""

import base64
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from jaxtyping import UInt8
from onnx import helper, numpy_helper

import padim_jax
from padim_jax.config import settings as config_lib
from padim_jax.config.backbones import NO_WEIGHTS
from padim_jax.config.settings import Config
from padim_jax.errors import UserError
from padim_jax.models.weights import identity as weights_identity
from padim_jax.models.weights.identity import WeightsIdentity
from padim_jax.store import validation
from padim_jax.system import paths
from padim_jax.system.paths import Path

SUFFIX = ".onnx"
_FORMAT = "padim_jax onnx 1"
_KEY = "padim_jax"
_INPUT, _THRESHOLD = "images", "image_threshold"
_OUTPUTS = ("anomaly_map", "score", "rarity", "is_anomalous")

# Bytes of constants in the file itself; the rest is far smaller than what is left to 2 GB.
_MOST_INSIDE = 1_900_000_000
_LARGEST = 2**31
_SMALL = 1024  # bytes; such constants are always inside, where shape inference sees them
_ALIGNMENT = 4096  # of constants outside, so that they can be mapped into memory

# What `padim_jax.export` writes. An operator that is not here is not run.
OPERATORS = frozenset(
    {
        *("Abs", "Add", "AveragePool", "Cast", "Clip", "Concat", "Conv", "Div", "Exp", "Floor"),
        *("Gather", "GlobalAveragePool", "Greater", "GreaterOrEqual", "Identity", "Log"),
        *("MatMul", "Max", "MaxPool", "Min", "Mul", "ReduceMax", "ReduceMean", "ReduceMin"),
        *("ReduceSum", "Relu", "Reshape", "Sigmoid", "Slice", "Sqrt", "Sub", "TopK"),
        *("Transpose", "Where"),
    }
)


@dataclasses.dataclass(frozen=True)
class Model:
    """Description of the detector in an ONNX file.

    Attributes:
      config: configuration.
      weights: identity of the backbone's weights, which the file holds.
      fingerprint: fingerprint of the detector; see `detector.fingerprint`.
      images: SHA-256 of each fitted file.
      half: whether the factors are rounded to float16.
      comparison: for the half-size form, metrics of both forms on the test set.
      calibration: thresholds from normal images; see `calibration_file.to_dict`.
      frame: height and width of the raw frames that it takes; None for images of the model's
        size.
    """

    config: Config
    weights: WeightsIdentity
    fingerprint: str
    images: UInt8[np.ndarray, "s 32"]
    half: bool = False
    comparison: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    frame: tuple[int, int] | None = None


def save(
    path: Path,
    graph: onnx.GraphProto,
    constants: Mapping[str, np.ndarray],
    model: Model,
    versions: tuple[int, int],
    promise: str,
    verify: Callable[[pathlib.Path], None],
) -> int:
    """Write a detector's graph; a crash or a refusal leaves an earlier file unchanged.

    Args:
      path: file to write.
      graph: the graph, without its constants.
      constants: their values.
      model: what the file says of the detector.
      versions: versions of the operators and of ONNX's own format.
      promise: thresholds and their promise, as text.
      verify: called with the whole file before it replaces an earlier one; raises UserError to
        refuse it.

    Returns:
      Size in bytes.

    Raises:
      UserError: it cannot be written, or was refused.
    """
    described = {
        "format": _FORMAT,
        "version": padim_jax.__version__,
        "numbers": "float32",
        **dataclasses.asdict(model),
        "config": config_lib.to_stored(model.config),
        "images": base64.b64encode(model.images.tobytes()).decode(),
    }
    inside = dict(constants)
    if sum(x.nbytes for x in constants.values()) > _MOST_INSIDE:
        inside = {name: x for name, x in constants.items() if x.nbytes <= _SMALL}
    outside = {name: x for name, x in constants.items() if name not in inside}
    proto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", versions[0])],
        ir_version=versions[1],
        producer_name=_KEY,
        producer_version=padim_jax.__version__,
    )
    texts = {"thresholds": promise, "licence": _licence(model)}
    helper.set_model_props(proto, texts)
    described["graph"] = _structure(proto)
    described["sha256"] = validation.digest(described, constants)
    proto.metadata_props.add(key=_KEY, value=json.dumps(described))
    proto.graph.initializer.extend(
        numpy_helper.from_array(x, name) for name, x in inside.items()
    )
    try:
        # Replace the target of a link, not the link.
        target = path.resolve() if isinstance(path, pathlib.Path) else path
        earlier = _data_file(target)
        data, size = None, 0
        if outside:
            if not isinstance(target, pathlib.Path):
                raise UserError(f"{path}: above 2 GB, in two files; export to a local folder")
            data, size = _write_data(target, proto, outside)
        try:
            with paths.replacing(target) as growing:
                content = proto.SerializeToString()
                growing.write_bytes(content)
                onnx.checker.check_model(str(growing), full_check=True)
                verify(growing)
        except BaseException:
            if data is not None and data != earlier:
                data.unlink(missing_ok=True)
            raise
        if earlier is not None and earlier != data:
            earlier.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    return len(content) + size


def _structure(proto: onnx.ModelProto) -> str:
    """Return the SHA-256 hex digest of all but the constants and the description."""
    graph = proto.graph
    skeleton = onnx.ModelProto(
        ir_version=proto.ir_version,
        opset_import=proto.opset_import,
        metadata_props=[x for x in proto.metadata_props if x.key != _KEY],
        graph=onnx.GraphProto(node=graph.node, input=graph.input, output=graph.output),
    )
    return hashlib.sha256(skeleton.SerializeToString(deterministic=True)).hexdigest()


def _licence(model: Model) -> str:
    sha256 = model.weights.sha256
    if model.config.model.weights == NO_WEIGHTS:
        terms = "They are part of padim_jax, under its licence, Apache-2.0."
    else:
        terms = (
            "Their terms, and possibly those of the images that they were trained on, apply to "
            "this file: see third_party/pretrained_weights.md of padim_jax."
        )
    return f"Contains the weights {model.weights.origin}, SHA-256 {sha256}. {terms}"


def _write_data(
    target: pathlib.Path, proto: onnx.ModelProto, outside: Mapping[str, np.ndarray]
) -> tuple[pathlib.Path, int]:
    """Write constants beside the ONNX file, and make the graph refer to them."""
    digest = hashlib.sha256()
    for name, x in outside.items():
        digest.update(name.encode())
        digest.update(x.data)
    data = target.with_name(f"{target.stem}-{digest.hexdigest()[:16]}.data")
    with paths.replacing(data) as growing, growing.open("wb") as file:
        for name, x in outside.items():
            file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
            tensor = proto.graph.initializer.add()
            tensor.name, tensor.data_location = name, onnx.TensorProto.EXTERNAL
            tensor.data_type = helper.np_dtype_to_tensor_dtype(x.dtype)
            tensor.dims.extend(x.shape)
            about = {"location": data.name, "offset": file.tell(), "length": x.nbytes}
            for key, value in about.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(x.data)
        size = file.tell()
    return data, size


def _data_file(path: Path) -> pathlib.Path | None:
    """Return the file beside an earlier export of ours that its constants are in."""
    if not isinstance(path, pathlib.Path) or not path.is_file():
        return None
    proto = _parse(path)
    names = {x.value for t in proto.graph.initializer for x in t.external_data[:1]}
    return path.with_name(names.pop()) if names else None


def require_own(path: Path) -> None:
    """Check that an export would replace nothing but an earlier export.

    Raises:
      UserError: there is something else of that name.
    """
    if not path.exists():
        return
    try:
        _description(_parse(path))
    except (OSError, ValueError, UserError) as error:
        raise UserError(
            f"{path}: exists and is no ONNX file of padim_jax; move it away or name another "
            "file or --workdir"
        ) from error


def load(path: Path) -> tuple[Model, onnx.ModelProto]:
    """Read an ONNX file of a detector, as data.

    Args:
      path: file to read.

    Returns:
      What it says of the detector, and the graph; constants beside the file are not read in.

    Raises:
      UserError: the file is not of padim_jax, is damaged, or has what is not data.
    """
    try:
        proto = _parse(path)
        described = _description(proto)
        if described.get("format") != _FORMAT:
            raise UserError(
                f"{path}: {str(described.get('format'))[:100]!r}, written by padim_jax "
                f"{str(described.get('version'))[:60]}; this is padim_jax "
                f"{padim_jax.__version__}, which reads {_FORMAT!r}"
            )
        validation.require_digest(described, _constants(path, proto))
        if described["graph"] != _structure(proto):
            raise ValueError("its graph is not what was saved")
        try:
            config = config_lib.restore(described["config"], described.get("version"))
        except config_lib.UnknownSettingError as error:
            raise UserError(f"{path}: {error}") from error
        except UserError as error:
            raise ValueError(str(error)) from error
        model = _model(described, config)
        _require_interface(proto, model)
        return model, proto
    except UserError:
        raise
    # Parsers raise arbitrary exceptions on damaged files.
    except Exception as error:
        raise UserError(
            f"{path}: no ONNX file of padim_jax, or a broken one ({validation.reason(error)}); "
            "export it again (--mode=export --format=onnx) or restore it from a copy"
        ) from error


def _parse(path: Path) -> onnx.ModelProto:
    """Read a graph that consists of data.

    Raises:
      ValueError: it is none, or has something else.
    """
    with path.open("rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError("more than 2 GB")
    try:
        proto = onnx.ModelProto.FromString(content)
    except Exception as error:  # of protobuf's implementations, each has its own
        raise ValueError(f"no protocol buffer of ONNX: {error}") from error
    graph = proto.graph
    if {x.domain for x in proto.opset_import} != {""}:
        raise ValueError("operators that are not ONNX's own")
    if proto.functions or proto.training_info or graph.sparse_initializer:
        raise ValueError("functions, training or sparse constants")
    for node in graph.node:
        if node.domain or node.op_type not in OPERATORS:
            raise ValueError(f"an operator {node.domain}.{node.op_type}"[:200])
        if any(
            a.g.ByteSize() or a.graphs or a.tensors or a.ref_attr_name for a in node.attribute
        ):
            raise ValueError(f"a graph inside of an operator {node.op_type}")
    for tensor in graph.initializer:
        _require_beside(path, tensor)
    return proto


def _require_beside(path: Path, tensor: onnx.TensorProto) -> None:
    """Reject constants that are elsewhere than in the file or in one file of ours beside it."""
    if not tensor.external_data and tensor.data_location == onnx.TensorProto.DEFAULT:
        return
    about = {x.key: x.value for x in tensor.external_data}
    name = about.get("location", "")
    named = re.fullmatch(r"[^/\\:\0]{1,200}-[0-9a-f]{16}\.data", name) is not None
    if set(about) != {"location", "offset", "length"} or not named:
        raise ValueError(f"data at {name[:200]!r}, which is no file of an export")
    if not isinstance(path, pathlib.Path) or path.with_name(name).is_symlink():
        raise ValueError(f"data at {name!r}, which is not a file beside it")


def _description(proto: onnx.ModelProto) -> dict[str, Any]:
    (text,) = [x.value for x in proto.metadata_props if x.key == _KEY]
    described = json.loads(text)
    if not isinstance(described, dict):
        raise ValueError("its description is no mapping")
    return described


def _constants(path: Path, proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    found = {}
    for tensor in proto.graph.initializer:
        if not tensor.external_data:
            found[tensor.name] = numpy_helper.to_array(tensor)
            continue
        about = {x.key: x.value for x in tensor.external_data}
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        # Not copied into memory; its shape has to agree with the file's length.
        found[tensor.name] = np.memmap(
            path.parent / about["location"],
            dtype,
            "r",
            int(about["offset"]),
            tuple(tensor.dims),
        )
    return found


def _model(described: Mapping[str, Any], config: Config) -> Model:
    fields = {field.name: described[field.name] for field in dataclasses.fields(Model)}
    digests = np.frombuffer(base64.b64decode(fields["images"], validate=True), np.uint8)
    fields |= {"config": config, "weights": weights_identity.identity(fields["weights"])}
    fields["images"] = digests.reshape(-1, 32)
    frame = fields["frame"]
    if frame is not None:
        fields["frame"] = frame = tuple(frame)
        if len(frame) != 2 or {type(x) for x in frame} != {int}:
            raise ValueError("its frame is no size")
    if (
        not isinstance(fields["fingerprint"], str)
        or type(fields["half"]) is not bool
        or not isinstance(fields["comparison"], dict | None)
        or not isinstance(fields["calibration"], dict | None)
    ):
        raise ValueError("its description is of other types")
    return Model(**fields)


def _require_interface(proto: onnx.ModelProto, model: Model) -> None:
    """Check names, types and shapes of inputs and outputs against the description."""
    kinds, size = onnx.TensorProto, list(model.config.image.size)
    inputs = [(_INPUT, kinds.UINT8, ["b", *(model.frame or size), 3])]
    outputs: list[Any] = [
        (_OUTPUTS[0], kinds.FLOAT, ["b", *size]),
        (_OUTPUTS[1], kinds.FLOAT, ["b"]),
    ]
    if model.calibration is not None:
        outputs.append((_OUTPUTS[2], kinds.DOUBLE, ["b"]))
        if model.config.decide == "score":
            inputs.append((_THRESHOLD, kinds.FLOAT, []))
            outputs.append((_OUTPUTS[3], kinds.BOOL, ["b"]))
    for values, expected in ((proto.graph.input, inputs), (proto.graph.output, outputs)):
        found = [
            (
                x.name,
                x.type.tensor_type.elem_type,
                [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim],
            )
            for x in values
        ]
        if found != expected:
            raise ValueError("its inputs or outputs are not those of its description")
