"""A fitted detector -> a file for scoring alone: our model file, ONNX or StableHLO."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from padim_jax.config import settings as config_lib
from padim_jax.core import calibration as calibration_lib
from padim_jax.data import dataset_splits, input_pipeline
from padim_jax.data.input_pipeline import Input
from padim_jax.data.records import Source
from padim_jax.detector import detector as detector_lib
from padim_jax.detector import geometry, memory
from padim_jax.detector.detector import Detector
from padim_jax.devices import parallel
from padim_jax.errors import UserError
from padim_jax.output import results
from padim_jax.runs import evaluate, results_folder
from padim_jax.store import calibration_file, model_file
from padim_jax.system import locks, paths
from padim_jax.system.paths import Path

# By `--format`; the suffix says which is meant from Python.
SUFFIXES = {"model": model_file.SUFFIX, "onnx": ".onnx", "stablehlo": ".stablehlo"}
_MOST_VERIFIED = 8  # images that a written file is verified on


@dataclasses.dataclass(frozen=True)
class _Export:
    """Contents of a file to write.

    Attributes:
      detector: the detector, its factors rounded with `half`.
      half: whether factors are in float16.
      comparison: for `half`, metrics of both forms on the test set.
      identity: identity of the statistics, and of their rounding.
      calibration: thresholds; see `calibration_file.to_dict`.
      frame: see `export`.
      images: see `export`.
    """

    detector: Detector
    half: bool
    comparison: dict[str, Any] | None
    identity: str
    calibration: dict[str, Any] | None
    frame: tuple[int, int] | None
    images: Sequence[Input]


def export(
    detector: Detector,
    path: Path,
    half: bool = False,
    test: Source | None = None,
    frame: tuple[int, int] | None = None,
    images: Sequence[Input] | None = None,
) -> None:
    """Write a file for scoring alone; its suffix says which.

    Args:
      detector: fitted.
      path: the file; an earlier one is replaced. `.onnx`: see `export.onnx_graph`.
        `.stablehlo`: see `export.stablehlo`. Otherwise a model file, which loads without
        factorising.
      half: keep the factorisation in float16. What this changes is measured on the test
        set, printed, and stored in the file.
      test: normal and anomalous images, needed for `half`.
      frame: for ONNX: height and width of raw frames, which the graph then resizes; None for
        images of the model's size.
      images: for ONNX: images that the file is verified on; None for drawn ones.

    Raises:
      UserError: the file cannot be written, another process writes it, `half` without test
        images, or verdicts by regions in a StableHLO file.
    """
    if parallel.every().processes > 1:
        raise UserError("--mode=export: one process writes the file; start only one")
    if path.suffix != SUFFIXES["onnx"] and frame is not None:
        raise UserError("--frame: for --format=onnx, whose files alone resize frames")
    if frame is not None and detector.config.image.counts != "full":
        raise UserError(
            f"--frame: the model is of config.image.range={detector.config.image.range}, which "
            "the file's reader applies; export without --frame"
        )
    if path.suffix == SUFFIXES["stablehlo"] and half:
        raise UserError("--half: not for --format=stablehlo, which holds float32 numbers")
    decide = detector.config.decide
    if path.suffix == SUFFIXES["stablehlo"] and decide != "score":
        raise UserError(
            f"config.decide={decide}: {path.suffix} files find no regions, and their verdicts "
            "would be by the score; export with --config.decide=score, or another file (.onnx, "
            ".safetensors)"
        )
    require_own, write = {
        SUFFIXES["onnx"]: (_require_own_onnx, _write_onnx),
        SUFFIXES["stablehlo"]: (_accept, _write_stablehlo),
    }.get(path.suffix, (model_file.require_own, _write_model))
    with locks.held(path):
        require_own(path)  # now, rather than after measuring
        prepared = _prepare(detector, half, test, frame, images or [])
        results_folder.make_folder(path.parent)
        write(path, prepared)


def _prepare(
    detector: Detector,
    half: bool,
    test: Source | None,
    frame: tuple[int, int] | None,
    images: Sequence[Input],
) -> _Export:
    comparison, identity = None, detector.identity
    if half:
        if test is None or not test.records:
            raise UserError(
                f"--half: {dataset_splits.no_test_images(detector.config)}; what the rounding "
                "changes is measured on them"
            )
        memory.require_for_maps(detector.config, 2 * len(test.records))
        exact, _ = evaluate.score(detector, test)
        assert exact is not None
        identity = f"{identity} in float16"  # a threshold of the one is not the other's
        try:
            detector = dataclasses.replace(
                detector, gaussian=model_file.rounded(detector.gaussian)
            )
        except ValueError as error:
            raise UserError(f"--half: {error}; export without --half") from error
        rounded, _ = evaluate.score(detector, test)
        assert rounded is not None
        comparison = results.compare(exact, rounded)
        print(f"\n{results.comparison_table(comparison)}\n")
    thresholds = None
    if detector.calibration is not None:
        # --half moves scores by far less than the thresholds' own error.
        exported = dataclasses.replace(detector, identity=identity)
        thresholds = calibration_file.to_dict(
            detector.calibration, detector_lib.fingerprint(exported)
        )
    return _Export(detector, half, comparison, identity, thresholds, frame, images)


def _write_model(path: Path, export: _Export) -> None:
    detector = export.detector
    size = model_file.save(
        path,
        model_file.Model(
            config_lib.with_absolute_paths(detector.config),
            detector.index,
            detector.gaussian,
            detector.weights,
            export.identity,
            detector.images,
            export.half,
            export.comparison,
            export.calibration,
            projection=detector.projection,
        ),
        _regions(detector),
    )
    print(f"model file, {size / 1e6:.0f} MB -> {path}")


def _require_own_onnx(path: Path) -> None:
    onnx_file = _onnx("onnx_file")
    onnx_file.require_own(path)


def _write_onnx(path: Path, export: _Export) -> None:
    onnx_file, onnx_graph = _onnx("onnx_file"), _onnx("onnx_graph")
    from padim_jax.export import runtimes, verification

    detector, frame = export.detector, export.frame
    config, calibration = detector.config, detector.calibration
    graph, constants = onnx_graph.build(detector, export.half, frame)
    images, frames = _verified_on(export)
    about = ""

    def verify(written: Any) -> None:
        nonlocal about
        run = runtimes.open_file(written)
        about = verification.verify(detector, run, images, frames)

    exported = dataclasses.replace(detector, identity=export.identity)
    model = onnx_file.Model(
        config_lib.with_absolute_paths(config),
        detector.weights,
        detector_lib.fingerprint(exported),
        detector.images,
        export.half,
        export.comparison,
        export.calibration,
        frame,
    )
    promise = "none" if calibration is None else calibration_lib.text(calibration)
    versions = (onnx_graph.OPSET, onnx_graph.IR_VERSION)
    size = onnx_file.save(path, graph, constants, model, versions, promise, verify)
    print(f"verified on {about}\nONNX file, {size / 1e6:.0f} MB -> {path}")


def _verified_on(export: _Export) -> tuple[np.ndarray, np.ndarray | None]:
    """Return images of the model's size, and the frames that they are resized from."""
    from padim_jax.export import verification

    image, frame = export.detector.config.image, export.frame
    given = export.images[:_MOST_VERIFIED]
    if not given:
        drawn = verification.drawn_images(*(frame or image.size))
        if frame is None:
            return drawn, None
        given = list(drawn)
    given = (
        given if len(given) > 1 else [*given, *given]
    )  # the number of images must not matter
    loaded = [
        input_pipeline.open_input(x, f"images[{i}]", image.counts) for i, x in enumerate(given)
    ]
    pixels = np.stack([input_pipeline.preprocess(x, image) for x in loaded])
    if frame is None:
        return pixels, None
    sizes = {(x.height, x.width) for x in loaded}
    if sizes != {frame}:
        raise UserError(
            f"--frame={frame[0]}x{frame[1]}: an image to verify the file on has another size, "
            f"{' or '.join(f'{h}x{w}' for h, w in sorted(sizes - {frame}))}; give frames"
        )
    return pixels, np.stack([np.asarray(x) for x in loaded])


def _onnx(name: str) -> Any:
    """Import a module that needs onnx."""
    try:
        if name == "onnx_file":
            from padim_jax.store import onnx_file as module
        else:
            from padim_jax.export import onnx_graph as module
    except ImportError as error:
        raise UserError(
            f'--format=onnx: needs onnx ({error}); install it: pip install "padim-jax[onnx]"'
        ) from error
    return module


def _accept(path: Path) -> None:
    """StableHLO has no mark of ours: a file of that name is taken for one."""


def _write_stablehlo(path: Path, export: _Export) -> None:
    from padim_jax.export import stablehlo

    content = stablehlo.serialize(export.detector)
    try:
        paths.write(path, content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    print(f"StableHLO, {len(content) / 1e6:.0f} MB -> {path}")


def _regions(detector: Detector) -> int:
    config = detector.config
    index = detector.index.tolist()
    return geometry.pyramid(config.image, config.model, index).shapes[0][0]
