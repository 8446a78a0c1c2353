"""ONNX files in the runtimes that run them: ONNX Runtime and OpenVINO, on CPUs."""

import importlib.metadata
import importlib.util
import pathlib
import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from padim_jax.errors import UserError

Runtime = Literal["onnxruntime", "openvino"]  # the packages' names
NAMES: dict[Runtime, str] = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_EXTRAS: dict[Runtime, str] = {"onnxruntime": "onnx", "openvino": "openvino"}
Run = Callable[[UInt8[np.ndarray, "b h w 3"]], dict[str, np.ndarray]]

_INPUT = "images"
_OUTPUTS = frozenset({"anomaly_map", "score", "rarity", "is_anomalous"})


def open_file(
    path: pathlib.Path, runtime: Runtime = "onnxruntime", bfloat16: bool = False
) -> Run:
    """Return the function of a file's images.

    Args:
      path: an ONNX file that `store.onnx_file.load` has accepted.
      runtime: a key of `NAMES`.
      bfloat16: whether OpenVINO computes in bfloat16 where the processor can; it would do so
        without being asked.

    Returns:
      Function from images (b, h, w, 3) to the graph's outputs by name.

    Raises:
      UserError: the runtime is not installed, or rejects the file.
    """
    try:
        if runtime == "onnxruntime":
            return _onnx_runtime(path)
        return _openvino(path, bfloat16)
    except ImportError as error:
        raise UserError(
            f"{path}: needs {NAMES[runtime]} ({error}); "
            f'install it: pip install "padim-jax[{_EXTRAS[runtime]}]"'
        ) from error
    except (RuntimeError, ValueError) as error:  # base classes of both runtimes' errors
        reason = " ".join(str(error).split())[:500]
        raise UserError(f"{path}: {NAMES[runtime]} rejects the file ({reason})") from error


def installed(path: pathlib.Path) -> Runtime:
    """Return the runtime that is installed, ONNX Runtime first.

    Args:
      path: the file that needs one, for the message.

    Raises:
      UserError: there is none.
    """
    for runtime in NAMES:
        if importlib.util.find_spec(runtime) is not None:
            return runtime
    raise UserError(
        f"{path}: needs ONNX Runtime or OpenVINO; install one: "
        'pip install "padim-jax[onnx]" or "padim-jax[openvino]"'
    )


def version(runtime: Runtime) -> str:
    """Return the version of a runtime that is installed."""
    return importlib.metadata.version(runtime)


def _onnx_runtime(path: pathlib.Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # It warns that a threshold which may be changed is no constant.
    options.log_severity_level = 3
    try:
        session: Any = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except (
        Exception
    ) as error:  # has several base classes, of which RuntimeError is not always one
        raise RuntimeError(str(error)) from error
    names = [output.name for output in session.get_outputs()]

    def run(images: UInt8[np.ndarray, "b h w 3"]) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, {_INPUT: images}), strict=True))

    return run


def _openvino(path: pathlib.Path, bfloat16: bool) -> Run:
    # Made to report its use to OpenVINO's makers; OpenVINO runs without it.
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled: Any = openvino.Core().compile_model(str(path), "CPU", settings)
    # A value may have several names.
    names = [(output.names & _OUTPUTS).pop() for output in compiled.outputs]

    def run(images: UInt8[np.ndarray, "b h w 3"]) -> dict[str, np.ndarray]:
        found = compiled(images)
        return {name: np.array(found[name]) for name in names}

    return run
