"""The Python API: fit, score, evaluate, extend and save detectors.

Nothing here prints, and nothing is written but by `Detector.save` and `Detector.export`. The
command line does the same by the same functions, with files around them.
"""

import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from padim_jax.config import backbones, defaults
from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config
from padim_jax.data import copies, image_inputs, input_pipeline, roi, sampling
from padim_jax.data.image_inputs import Images
from padim_jax.data.records import Source
from padim_jax.detector import detector as detector_lib
from padim_jax.detector import geometry, memory, steps
from padim_jax.detector import statistics as statistics_lib
from padim_jax.detector.embeddings import Embeddings
from padim_jax.devices import parallel
from padim_jax.errors import UserError
from padim_jax.runs import calibrate, export, fitting, grow, loading, results_folder, scoring
from padim_jax.runs.scoring import Scoring
from padim_jax.store import calibration_file, checkpoint, statistics_store
from padim_jax.store.checkpoint import Fitted
from padim_jax.store.statistics_store import InMemory, OnDisk, Store
from padim_jax.system import locks, paths
from padim_jax.system import progress as progress_lib

# The groups of settings that matter to a fit from Python; others are about files.
_GROUPS = ("image", "model", "map", "score", "threshold", "regions")
_TOP = ("batch_size", "decide")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Detector(Scoring, detector_lib.Detector):
    """A fitted model, and all that a program does with it.

    It is a frozen pytree, equal to itself alone: methods that change a model return another.
    See `padim_jax.fit` and `padim_jax.load`. For its attributes see `detector.Detector`.

    Attributes:
      store: where the statistics are, which `save`, `update` and `merge` take; None of a model
        file, which has none.
    """

    store: Store | None = None

    def embed(self, images: Images) -> Float32[np.ndarray, "n _h _w _d"]:
        """Return the patch embeddings of images, for which see `detector.embed`.

        Args:
          images: see `score`.
        """
        items, config = scoring.items(images), self.config
        height, width = geometry.patch_grid(config.image, config.model.layers)
        embeddings = np.empty((len(items), height, width, len(self.index)), np.float32)
        size = config.batch_size
        for start in range(0, len(items), size):
            pixels = [
                input_pipeline.load_input(item, f"images[{start + i}]", config.image)[0]
                for i, item in enumerate(items[start : start + size])
            ]
            embeddings[start : start + size] = detector_lib.embed(self, np.stack(pixels))
        return embeddings

    def update(
        self, images: Images, *, thresholds: Images | None = None, progress: bool = False
    ) -> "Detector":
        """Return the detector extended by normal images; those that it knows are left out.

        The result is that of one fit to all, up to rounding. Thresholds are found again: from
        `thresholds`, else from the model itself in the low-rank form (few images), else from
        the images given here, each left out.

        Args:
          images: see `score`.
          thresholds: normal images that are not fitted.
          progress: whether to show one, where standard error is a terminal.

        Raises:
          UserError: an image cannot be used, or the detector has no statistics.
        """
        with progress_lib.showing(lines=False, bars=progress):
            devices, config = _one_process("update"), scoring.uncached(self.config)
            source = copies.distinct(image_inputs.source(images), devices)
            known = set(map(bytes, self.images))
            new = [i for i, digest in enumerate(source.digests) if bytes(digest) not in known]
            if not new:
                return self
            fitted = _fitted(self)
            total = len(fitted.images) + len(new)
            memory.require(config, total, devices, kept=True)
            model, index = config.model, fitted.index.tolist()
            shapes = geometry.pyramid(config.image, model, index).shapes
            statistics = statistics_lib.extend(
                fitted.statistics, shapes, total, model.statistics
            )
            part, added = sampling.part(source, new), source.digests[new]
            fitting.warn_forgotten(fitted, part, added, devices)
            forgotten = fitting.without(fitted.forgotten, added)
            fitted = dataclasses.replace(fitted, statistics=statistics, forgotten=forgotten)
            fitted = fitting.add_images(fitted, part, 0, config, self.variables, devices)
            return self._changed(fitted, part, source, config, thresholds, devices)

    def forget(
        self, images: Images, *, thresholds: Images | None = None, progress: bool = False
    ) -> "Detector":
        """Return the detector without images that it was fitted to; the inverse of `update`.

        The result is that of one fit to the others, up to rounding. Thresholds are found again:
        from `thresholds`, else from the model itself in the low-rank form (few images). Of
        moments there are none without `thresholds`, since the other images are not at hand.

        Args:
          images: see `score`; told by their contents. Arrays have to be those that were fitted.
          thresholds: normal images that are not fitted.
          progress: whether to show one, where standard error is a terminal.

        Raises:
          UserError: an image was never fitted, fewer than two images are left, rounding would
            leave too little of the moments (fit again without the images then), or the detector
            has no statistics.
        """
        with progress_lib.showing(lines=False, bars=progress):
            devices, config = _one_process("forget"), scoring.uncached(self.config)
            source = copies.distinct(image_inputs.source(images), devices)
            fitted = _fitted(self)
            part = fitting.forgettable("the detector", fitted, source)
            if not part.records:
                return self
            fitted = fitting.without_images(
                "the detector", fitted, part, config, self.variables, devices
            )
            return self._changed(fitted, part, source, config, thresholds, devices)

    def _changed(
        self,
        fitted: Fitted,
        part: Source,
        source: copies.Distinct,
        config: Config,
        thresholds: Images | None,
        devices: parallel.Devices,
    ) -> "Detector":
        """Return the detector of other statistics, with its thresholds found again."""
        store = InMemory.keep(fitted, devices)
        detector = fitting.finalize(fitted, store.identity, part, config, self.variables)
        if thresholds is not None:
            normal = image_inputs.source(thresholds)
            detector = calibrate.find(detector, normal, "held_out", store)
        else:
            hashed = [(source, source.digests)]
            detector = grow.find_thresholds(detector, [{}], hashed, store)
        return _public(detector, store)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the model to a checkpoint's folder, which `padim_jax.load` and others take.

        Args:
          path: the folder.
          overwrite: replace a model that is there.

        Raises:
          UserError: there is something, the detector has no statistics, or the disk is full.
        """
        devices, place = _one_process("save"), paths.parse(os.fspath(path))
        with locks.held(place, devices.process), paths.explained():
            if not overwrite and checkpoint.fitted_config(place) is not None:
                raise UserError(
                    f"{place}: holds a model; name another folder, or replace it with "
                    "overwrite=True"
                )
            fitted = _fitted(self)
            results_folder.make_folder(place.parent)
            checkpoint.save(place, fitted, devices)
            if self.calibration is not None:
                mark = detector_lib.fingerprint(self)
                calibration_file.write(place, self.calibration, mark)

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        images: Images | None = None,
        frame: tuple[int, int] | None = None,
    ) -> None:
        """Write a file for scoring alone; its suffix says which.

        `.onnx`: one graph from images to verdicts, for ONNX Runtime, OpenVINO and others; see
        docs/deployment.md. `.stablehlo`: the same for XLA; see `jax.export`. Any other: a model
        file of padim_jax (.safetensors), loaded without factorising.

        Args:
          path: the file; an earlier one is replaced.
          images: for ONNX: images that the file is verified on before it is written, of which
            the first 8 are used; None for drawn ones.
          frame: for ONNX: height and width of raw frames, which the graph then resizes itself;
            None for images of the model's size.

        Raises:
          UserError: the file cannot be written, or its numbers are not the detector's.
        """
        with progress_lib.showing(lines=False, bars=False):
            export.export(
                self,
                paths.parse(os.fspath(path)),
                frame=frame,
                images=None if images is None else scoring.items(images),
            )


detector_lib.register(Detector)


def fit(
    images: Images,
    *,
    preset: str = "best",
    thresholds: str | Images | None = None,
    config: Config | Mapping[str, Any] | None = None,
    progress: bool = False,
    **settings: Any,
) -> Detector:
    """Fit PaDiM to normal images (Defard et al., arXiv 2011.08785).

    Args:
      images: normal images: a folder (images anywhere below it), a glob, paths, arrays
        (h, w, 3) or (h, w), a stack of them, Pillow images, bytes or open files. Copies count
        once.
      preset: "best", or a published variant: "anomalib", "seed", "paper" or "rd"; see
        `defaults.get_config`.
      thresholds: "leave_one_out" (each image as the model without it scores it; the default),
        "none", or normal images that are not fitted, given as `images` are.
      config: instead of a preset, a whole configuration, of which `threshold.normal` counts
        where `thresholds` is None.
      progress: whether to show progress bars, where standard error is a terminal.
      **settings: by their short names, as in `backbone="resnet18"`, `channels=100`,
        `resize=(256, 256)`, `backbone="scattering"`; `padim_jax.config.settings` explains
        them all. Where two groups have a setting of this name, the group goes before it:
        `model_seed`, `image_seed`, `model_upsample`, `map_upsample`; and for the image score:
        `score_image`. `roi` may also be an array (h, w), not 0 inside the region
        of interest.

    Returns:
      The fitted detector, with thresholds.

    Raises:
      UserError: a wrong setting, too few images, one that cannot be used, weights that cannot
        be had, or too little memory.
      TypeError: `images` are none.

    Example:
      >>> import numpy as np, padim_jax
      >>> good = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), np.uint8)
      >>> detector = padim_jax.fit(good, backbone="scattering", channels=20, resize=(64, 64))
      >>> detector.count
      8
      >>> detector.score(good).maps.shape
      (8, 64, 64)
    """
    values = _values(preset, config, settings)
    values["dataset"]["root"] = image_inputs.folder(images)
    normal = _origin(thresholds, values["threshold"]["normal"])
    values["threshold"]["normal"] = normal
    chosen = scoring.uncached(config_lib.validate(values))
    with progress_lib.showing(lines=False, bars=progress):
        devices = _one_process("fit")
        source = copies.distinct(image_inputs.source(images), devices)
        if (count := len(source.records)) < 2:
            raise UserError(f"{count} normal image(s) to fit; a covariance needs at least 2")
        chosen = fitting.from_images(chosen, source)
        leave_out = normal == "leave_one_out" and count >= 3
        if leave_out:
            calibrate.require_groups(chosen, source)
        kept = leave_out and memory.embeddings_to_keep(chosen, count, devices, kept=True)
        memory.require(chosen, count, devices, kept=True, embeddings=int(kept))
        embeddings = Embeddings() if kept else None
        backbone = fitting.load_backbone(chosen.model, devices)
        fitted = fitting.begin(chosen, source, backbone, devices)
        variables = parallel.replicate(
            steps.with_projection(backbone[0], fitted.projection), devices
        )
        fitted = fitting.add_images(
            fitted, source, 0, chosen, variables, devices, embeddings=embeddings
        )
        fitted = dataclasses.replace(fitted, unfinished=None)
        store = InMemory.keep(fitted, devices)
        left_out = int(leave_out and not chosen.threshold.groups)
        detector = fitting.finalize(fitted, store.identity, source, chosen, variables, left_out)
        if leave_out:
            detector = calibrate.find(detector, source, "leave_one_out", store, embeddings)
        elif normal == "held_out":
            assert thresholds is not None
            held_out: Source = image_inputs.source(thresholds)
            detector = calibrate.find(detector, held_out, "held_out", store)
        return _public(detector, store)


def load(
    path: str | os.PathLike[str],
    config: Config | config_lib.Overrides | None = None,
    weights: str | None = None,
) -> Detector:
    """Load a fitted detector.

    It serves the process that loads it: JAX does not work after a fork. Where several
    processes score, start them by "spawn" and load it in each.

    Args:
      path: a checkpoint's folder, or a model file.
      config: None takes the model's own; see `loading.load`.
      weights: where the backbone's weights are now, if not where they were.

    Raises:
      UserError: no model there, or one that is fitted with something else than asked for.
    """
    place = paths.parse(os.fspath(path))
    detector = loading.load(place, config, weights)
    return _public(detector, None if place.is_file() else OnDisk(place))


def merge(
    models: Sequence[Detector | str | os.PathLike[str]],
    destination: str | os.PathLike[str] | None = None,
) -> Detector:
    """Join detectors that were fitted to disjoint images of the same kind.

    The result is that of one fit to all images, up to rounding.

    Args:
      models: at least two: detectors, or checkpoints' folders.
      destination: for folders: where the merged model goes, with its thresholds found again
        where its images are still at hand; see `grow.merge`.

    Raises:
      UserError: a model has no statistics, models differ in settings, channels or weights, or
        share an image.
    """
    folders = [model for model in models if not isinstance(model, detector_lib.Detector)]
    if destination is not None:
        if len(folders) < len(models):
            raise UserError(
                "destination: for models on disk; merge detectors without it, and save the "
                "result"
            )
        with progress_lib.showing(lines=False, bars=False):
            grow.merge(folders, destination)
            return load(destination)
    if len(models) < 2:
        raise UserError(f"{len(models)} model(s) to merge; expected at least 2")
    with progress_lib.showing(lines=False, bars=False):
        devices = _one_process("merge")
        detectors = [model if isinstance(model, Detector) else load(model) for model in models]
        fitted, _ = fitting.join([_store(detector) for detector in detectors])
        store = InMemory.keep(fitted, devices)
        first = detectors[0]
        merged = statistics_store.ready(fitted, store.identity, first.config, first.variables)
        merged = grow.find_thresholds(merged, [], [], store)
        return _public(merged, store)


def _origin(thresholds: str | Images | None, configured: str) -> str:
    """Return the value of `config.threshold.normal` that a call asks for."""
    if thresholds is None:
        if configured == "held_out":
            raise UserError(
                "config.threshold.normal=held_out: give the images that are held out as "
                "thresholds=..."
            )
        return "leave_one_out" if configured == "auto" else configured
    if isinstance(thresholds, str) and thresholds in ("leave_one_out", "none"):
        return thresholds
    return "held_out"


def _values(
    preset: str, config: Config | Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a whole configuration with the settings of a call."""
    if config is None:
        values = defaults.get_config(preset).to_dict()
        values["dataset"]["name"], values["category"] = "folder", ""
    elif isinstance(config, Config):
        values = config_lib.to_dict(config)
    else:
        values = dict(getattr(config, "to_dict", lambda: config)())
    given = dict(settings)
    places = _places()
    # The weights' name follows the backbone's, unless it is given.
    if config is None and "backbone" in given and "weights" not in given:
        given["weights"] = f"{given['backbone']}{backbones.DEFAULT_WEIGHTS}"
    if isinstance(given.get("roi"), np.ndarray):
        given["roi"] = roi.from_array(given["roi"])
    for name, value in given.items():
        if name not in places:
            close = difflib.get_close_matches(name, places, n=1)
            raise UserError(
                f"{name}: no such setting"
                + (f"; did you mean {close[0]}?" if close else "")
                + f". Expected one of {', '.join(sorted(places))}"
            )
        if len(places[name]) > 1:
            groups = " or ".join(f"{group}_{name}" for group in places[name])
            raise UserError(f"{name}: a setting of several groups; expected {groups}")
        group, field = places[name][0], name
        if group is None:
            values[name] = value
            continue
        if field not in values[group]:
            field = name.removeprefix(f"{group}_")
        values[group][field] = value
    return values


def _places() -> dict[str, list[Any]]:
    """Map each short name to the groups that have a setting of this name."""
    schemas = {field.name: field.type for field in dataclasses.fields(Config)}
    places: dict[str, list[Any]] = {name: [None] for name in _TOP}
    names: dict[str, list[str]] = {}
    for group in _GROUPS:
        for field in dataclasses.fields(schemas[group]):  # pyright: ignore[reportArgumentType]
            if (group, field.name) != ("threshold", "normal"):
                names.setdefault(field.name, []).append(group)
    for name, groups in names.items():
        if len(groups) > 1 or name not in schemas:  # `image` alone is a group's name
            places[name] = groups
        if len(groups) > 1 or name in schemas:
            places |= {f"{group}_{name}": [group] for group in groups}
    return places


def _store(detector: Detector) -> Store:
    if detector.store is None:
        raise UserError(
            "the detector comes from a model file, which has no statistics; load its "
            "checkpoint instead"
        )
    return detector.store


def _fitted(detector: Detector) -> Fitted:
    """Return the detector's statistics, on the devices."""
    store = _store(detector)
    fitted, identity = store.statistics()
    if identity != detector.identity:
        raise UserError(f"{store}: holds another model by now; load it again")
    return fitted


def _one_process(what: str) -> parallel.Devices:
    devices = parallel.every()
    if devices.processes > 1:
        raise UserError(
            f"{what}: {devices.processes} processes; from Python there is one. Use the command "
            "line for several hosts"
        )
    return devices


def _public(detector: detector_lib.Detector, store: Store | None) -> Detector:
    fields = {
        field.name: getattr(detector, field.name)
        for field in dataclasses.fields(detector_lib.Detector)
    }
    return Detector(**fields, store=store)
