"""A fitted detector as one ONNX graph, from uint8 images to verdicts.

Written by hand for operators of opset 17, so that every runtime of the last years runs it. Its
numbers are the detector's, float32, up to rounding: sums are taken in another order. Of the
image size everything is fixed; the number of images is not.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper

from padim_jax.config import backbones
from padim_jax.core.types import Gaussian, LowRank
from padim_jax.detector import geometry
from padim_jax.detector.detector import Detector
from padim_jax.detector.scores import require_scorable
from padim_jax.devices import parallel
from padim_jax.export import decision, distances, embedding, resizing
from padim_jax.export.backbones import features
from padim_jax.export.graph import Graph

OPSET = 17
IR_VERSION = 8  # the oldest for this opset
INPUT, THRESHOLD = "images", "image_threshold"
MAP, SCORE, RARITY, VERDICT = "anomaly_map", "score", "rarity", "is_anomalous"


def build(
    detector: Detector, half: bool = False, frame: tuple[int, int] | None = None
) -> tuple[onnx.GraphProto, dict[str, np.ndarray]]:
    """Return the graph of a detector, and its constants.

    The graph has the input `images`, uint8 (b, h, w, 3), and the outputs `anomaly_map` (b, h,
    w) and `score` (b,), float32. With thresholds it also has the output `rarity` (b,), float64,
    and where `config.decide` is "score" `is_anomalous` (b,), bool, and the optional input
    `image_threshold`, a float32 number whose default is the detector's.

    Args:
      detector: fitted detector of a single process.
      half: whether the factors are kept in float16. They must be rounded to it already.
      frame: height and width of raw frames that the graph resizes; None for images of the
        model's size.

    Returns:
      The graph without initializers, and their values by name.

    Raises:
      UserError: the score needs thresholds, and there are none.
      ValueError: a parameter of the backbone has no place in the graph.
    """
    require_scorable(detector)
    graph, config, calibration = Graph(), detector.config, detector.calibration
    model, image = config.model, config.image
    x = graph.transpose(INPUT, 0, 3, 1, 2)
    x = graph.add("Cast", x, to=TensorProto.FLOAT)
    if frame is not None:
        x = resizing.resized(graph, x, frame, image)
    mean, std = (
        graph.constant((np.array(value, np.float32) * np.float32(255))[:, None, None])
        for value in (image.mean, image.std)
    )
    x = graph.add("Div", graph.add("Sub", x, mean), std)
    params = detector.variables["params"]
    maps = features(graph, x, image.size, model.backbone, model.layers, params)
    laid = geometry.pyramid(image, model, detector.index.tolist())
    spec = backbones.BACKBONES[model.backbone]
    levels = embedding.levels(
        graph,
        maps,
        [geometry.patch_grid(image, (layer,)) for layer in model.layers],
        [spec.channels(layer) for layer in model.layers],
        config,
        detector.index,
        detector.projection,
        laid,
    )
    grid = geometry.patch_grid(image, model.layers)
    by_cell = _distances(graph, detector, levels, graph.half if half else graph.constant)
    patches = graph.take(by_cell, laid.patches, 0, laid.shapes[0][0] * laid.shapes[0][1])
    on_grid = graph.reshape(graph.transpose(patches, 1, 0), -1, *grid)
    map_ = decision.anomaly_maps(
        graph, on_grid, grid, image.size, config.map.upsample, config.map.sigma
    )
    kind, inside = config.score.image, geometry.inside(image, model.layers)
    map_ = decision.only_inside(graph, map_, inside)
    score = decision.score(graph, map_, on_grid, grid, image.size, kind, calibration, inside)
    graph.name(map_, MAP)
    graph.name(score, SCORE)
    height, width = frame or image.size
    inputs = [_value(INPUT, TensorProto.UINT8, height, width, 3)]
    outputs = [
        _value(MAP, TensorProto.FLOAT, *image.size),
        _value(SCORE, TensorProto.FLOAT),
    ]
    if calibration is not None:
        graph.name(decision.rarity(graph, score, calibration), RARITY)
        outputs.append(_value(RARITY, TensorProto.DOUBLE))
        if config.decide == "score":  # regions are found by whoever reads the maps
            threshold = np.array(calibration.image_threshold, np.float32)
            graph.constant(threshold, THRESHOLD)
            inputs.append(helper.make_tensor_value_info(THRESHOLD, TensorProto.FLOAT, []))
            graph.name(graph.add("GreaterOrEqual", score, THRESHOLD), VERDICT)
            outputs.append(_value(VERDICT, TensorProto.BOOL))
    made = helper.make_graph(graph.nodes, "padim_jax", inputs, outputs)
    return made, graph.constants


def _distances(
    graph: Graph, detector: Detector, levels: list[str], store: distances.Store
) -> str:
    image, model, index = detector.config.image, detector.config.model, detector.index
    shifts = geometry.shifts(image, model, tuple(index.tolist())) if model.shift else None
    fitted = detector.gaussian
    regions = geometry.pyramid(image, model, index.tolist()).shapes[0][0]
    mean = parallel.join(fitted.mean, regions)
    if isinstance(fitted, Gaussian):
        factor = parallel.join(fitted.factor, regions)
        return distances.full_rank(graph, mean, factor, levels, shifts, store)
    assert isinstance(fitted, LowRank)
    deviations, root, regularization = parallel.join(
        (fitted.deviations, fitted.root, fitted.regularization), regions
    )
    return distances.low_rank(
        graph, mean, deviations, root, float(regularization), levels, shifts, store
    )


def _value(name: str, kind: int, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, ["b", *shape])
