"""Detectors for programs that score alone: what all have, and those in ONNX files.

Nothing here imports JAX.
"""

import dataclasses
import operator
import os
import pathlib
from collections.abc import Generator, Iterable, Sequence
from typing import Any, ClassVar, NoReturn, cast

import numpy as np
from jaxtyping import Float, UInt8

from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config
from padim_jax.core import drift as drift_lib
from padim_jax.core.calibration import Calibration
from padim_jax.data import image_inputs, input_pipeline, inputs
from padim_jax.data.files import shown
from padim_jax.data.image_inputs import Images
from padim_jax.detector import memory
from padim_jax.detector import scores as scores_lib
from padim_jax.detector.scores import Anomalies, Measures, Scorer
from padim_jax.errors import UserError
from padim_jax.export import runtimes
from padim_jax.export.runtimes import Run, Runtime
from padim_jax.models.weights.identity import WeightsIdentity
from padim_jax.output import results
from padim_jax.runs import evaluate as evaluation
from padim_jax.store import calibration_file
from padim_jax.system import paths
from padim_jax.system import progress as progress_lib
from padim_jax.system.paths import Path

SUFFIX = ".onnx"


class Scoring(Scorer):
    """A fitted model that scores images, from memory or from a file of any kind."""

    @property
    def thresholds(self) -> Calibration | None:
        """The thresholds from normal images, if there are any."""
        return self.calibration

    def score(self, images: Images) -> Anomalies:
        """Score images of any size.

        Args:
          images: a folder, paths, arrays (h, w, 3) or (h, w), a stack of them, Pillow images,
            bytes or open files; see `padim_jax.score`.

        Returns:
          Anomaly maps (n, h, w) at the size of the detector's input, scores (n,), and with
          thresholds what is anomalous and how rare it is.

        Raises:
          UserError: an image cannot be used.
          TypeError: something else than images was given.
        """
        return scores_lib.score(self, items(images))

    def stream(
        self, images: Images, batch_size: int | None = None
    ) -> Generator[Anomalies, None, None]:
        """Score images batch by batch, in bounded memory; the next batch is decoded meanwhile.

        Args:
          images: see `score`; of an iterable no more than two batches are taken ahead.
          batch_size: images a batch; None takes `config.batch_size`.

        Yields:
          What `score` returns of the next images.

        Raises:
          UserError: see `score`.
          TypeError: see `score`.
        """
        each = items(images) if isinstance(images, str | os.PathLike) else images
        return scores_lib.stream(self, each, batch_size)

    def drift(self, scores: Float[np.ndarray, " n"]) -> drift_lib.Course | None:
        """Return whether images still look like those of the calibration, after each of them.

        At most 1 % of runs of 10,000 normal images have any alarm; see `core.drift`.

        Args:
          scores: image scores, in the order of the images; those from the image threshold on
            need not be left out.

        Returns:
          The course of the test; None where the thresholds are missing, of an earlier version,
          of groups of images, or of too few for an alarm.
        """
        against = drift_lib.reference(self.calibration)
        if against is None:
            return None
        return drift_lib.follow(against, drift_lib.State(), scores)[1]

    def evaluate(
        self,
        images: Images,
        labels: Iterable[bool],
        masks: Iterable[input_pipeline.Input | None] | None = None,
    ) -> dict[str, Any]:
        """Measure how well the detector tells anomalous images, and their defects' pixels.

        Args:
          images: see `score`.
          labels: (n,), True for an anomalous image.
          masks: for each image a mask of its own size, not 0 where the defect is, as an array
            (h, w), a path or a Pillow image; None of a normal image, or where it is unknown.

        Returns:
          The exact metrics of `metrics.evaluate` (`image_auroc`, `pixel_auroc`, `aupro`, ...)
          and, with thresholds, what these do: see `results.measure`.

        Raises:
          UserError: numbers of images, labels and masks differ, one cannot be used, or there is
            too little memory.
        """
        with progress_lib.showing(lines=False, bars=False):
            source = image_inputs.labelled(images, labels, masks)
            detector = dataclasses.replace(cast(Any, self), config=uncached(self.config))
            memory.require_for_maps(self.config, len(source.records))
            scored, _ = evaluation.score(detector, source)
            assert scored is not None
            return results.measure(scored, self.calibration)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class OnnxDetector(Scoring):
    """An exported detector, which ONNX Runtime or OpenVINO computes.

    Attributes:
      config: configuration in use; what scores depend on is that of the file.
      weights: origin and digest of the backbone's weights, which the file holds.
      images: SHA-256 of each fitted file.
      calibration: thresholds from normal images, or None.
      fingerprint: digest that identifies the model and, in bfloat16, its numbers.
      runtime: name, version and precision of what computes.
      run: function from images to the graph's outputs.
      left_out: 0; see `Scorer`.
      process: id of the process that loaded the file.
    """

    config: Config
    weights: WeightsIdentity
    images: UInt8[np.ndarray, "s 32"]
    calibration: Calibration | None
    fingerprint: str
    runtime: str
    run: Run
    left_out: int = 0
    process: int = dataclasses.field(default_factory=os.getpid)
    store: ClassVar[None] = None  # statistics are in the checkpoint alone

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """Return the digest that identifies the model."""
        return (self.fingerprint,)

    @property
    def versions(self) -> dict[str, str]:
        """Return the runtime with its version and precision."""
        return {"runtime": self.runtime}

    def measure(
        self, images: UInt8[np.ndarray, "b h w 3"], names: Sequence[str] = ()
    ) -> Measures:
        """Compute maps and scores; see `Scorer.measure`. There are no samples of embeddings."""
        scores_lib.require_own_process(self)
        outputs = self.run(images)
        scores = outputs["score"]
        if not (finite := np.isfinite(scores)).all():
            i = int(np.argmin(finite))
            name = names[i] if i < len(names) else f"image {i}"
            raise UserError(
                f"{name}: a score of {scores[i]}: its features are not finite, or too large "
                f"for {self.runtime}"
            )
        samples = np.empty((len(images), 0), np.float32)
        return Measures(outputs["anomaly_map"], scores[:, None], samples)

    def require_memory(self, tests: int = 0) -> None:
        """Stop an evaluation whose maps do not fit; what the runtime takes is not known."""
        if tests:
            memory.require_for_maps(self.config, tests)

    def embed(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: see `update`."""
        raise _refusal("embed")

    def update(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: the file has no statistics, and its graph is not a program of JAX.

        Raises:
          UserError: always.
        """
        raise _refusal("update")

    def save(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: see `update`."""
        raise _refusal("save")

    def export(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: see `update`."""
        raise _refusal("export")


def _refusal(what: str) -> UserError:
    return UserError(
        f"{what}: the detector comes from an ONNX file, which is for scoring alone; load the "
        "checkpoint that it was exported from"
    )


def is_onnx(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is named as an ONNX file is."""
    return os.fspath(path).endswith(SUFFIX)


def load(
    path: str | os.PathLike[str],
    config: Config | config_lib.Overrides | None = None,
    weights: str | None = None,
    runtime: Runtime | None = None,
) -> OnnxDetector:
    """Load a detector from an ONNX file of this program.

    Args:
      path: the file.
      config: None takes the model's own. Dataset, batch size and outputs may be others; with
        `model.precision` bfloat16 OpenVINO computes in it, otherwise all compute in float32.
      weights: None; the file holds its weights.
      runtime: None takes the one that is installed, ONNX Runtime first.

    Raises:
      UserError: no such file, or one that is damaged or of another program; settings that are
        not those of the file; or the runtime is not installed.
    """
    place = paths.parse(os.fspath(path))
    if weights is not None:
        raise UserError(f"--weights={weights}: {path} holds its weights; leave it out")
    if not isinstance(place, pathlib.Path):
        raise UserError(f"{path}: runtimes read local files; copy it to this machine")
    chosen: Runtime = runtime or runtimes.installed(place)
    try:
        from padim_jax.store import onnx_file
    except ImportError as error:
        raise UserError(
            f'{path}: needs onnx ({error}); install it: pip install "padim-jax[onnx]"'
        ) from error
    model, _ = onnx_file.load(place)
    if model.frame is not None:
        height, width = model.frame
        raise UserError(
            f"{path}: takes raw frames (--frame={height}x{width}), and this program resizes "
            "images itself; export it without --frame"
        )
    used = _resolve(place, config, model.config)
    bfloat16 = used.model.precision == "bfloat16"
    if bfloat16 and chosen != "openvino":
        raise UserError(
            "config.model.precision=bfloat16: ONNX Runtime computes in float32; use OpenVINO "
            "(--runtime=openvino), or leave the setting out"
        )
    thresholds = None
    if model.calibration is not None:
        thresholds = calibration_file.restore(place, model.calibration, model.fingerprint)
    precision = "bfloat16" if bfloat16 else "float32"
    return OnnxDetector(
        used,
        model.weights,
        model.images,
        thresholds,
        f"{model.fingerprint} in bfloat16" if bfloat16 else model.fingerprint,
        f"{runtimes.NAMES[chosen]} {runtimes.version(chosen)}, {precision}",
        runtimes.open_file(place, chosen, bfloat16),
    )


def _resolve(
    path: Path, config: Config | config_lib.Overrides | None, fitted: Config
) -> Config:
    """Return the configuration in use; all that scores depend on is in the file."""
    exact = dataclasses.replace(fitted.model, precision="float32")
    stored = dataclasses.replace(fitted, model=exact)
    used = config_lib.resolve(config, stored)
    if used.image.range == "train":
        image = dataclasses.replace(used.image, range=stored.image.range)
        used = dataclasses.replace(used, image=image)
    inside, wanted = config_lib.score_settings(stored), config_lib.score_settings(used)
    for name in sorted((inside.keys() | wanted.keys()) - {"model.precision"}):
        if inside.get(name) != wanted.get(name):
            setting = operator.attrgetter(name)
            raise UserError(
                f"config.{name}={setting(used)}: {path} was exported with {setting(stored)}, "
                "which is a part of the file; leave the setting out, or export the checkpoint "
                "with it"
            )
    tell_use(path, stored, used)
    return used


def tell_use(path: str | Path, fitted: Config, used: Config) -> None:
    """Print it if a model is used for other images than it was fitted to."""
    if used.title != fitted.title:
        print(f"{path} was fitted to {fitted.title}; now used for {used.title}")
    elif inputs.folder(used) != inputs.folder(fitted):
        print(
            f"{path} was fitted to images of {shown(inputs.folder(fitted))}; now used "
            f"for {shown(inputs.folder(used))}"
        )


def items(images: Images) -> list[input_pipeline.Input]:
    """Return the images one by one.

    Raises:
      TypeError: a single image was given.
    """
    if isinstance(images, str | os.PathLike):
        return [record.image for record in image_inputs.source(images).records]
    input_pipeline.require_several(images)
    return list(images)


def uncached(config: Config) -> Config:
    """Return the same configuration, which keeps no files of images or programs."""
    cache = dataclasses.replace(config.cache, images_gb=0.0, compilation=False)
    return dataclasses.replace(config, cache=cache)
