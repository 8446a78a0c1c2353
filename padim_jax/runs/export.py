"""A fitted detector -> a model file, for scoring alone."""

import dataclasses

from padim_jax.config import settings as config_lib
from padim_jax.data import dataset_splits
from padim_jax.data.records import Source
from padim_jax.detector import detector as detector_lib
from padim_jax.detector import geometry, memory
from padim_jax.detector.detector import Detector
from padim_jax.devices import parallel
from padim_jax.errors import UserError
from padim_jax.output import results
from padim_jax.runs import evaluate, fitting
from padim_jax.store import calibration_file, model_file
from padim_jax.system import locks
from padim_jax.system.paths import Path


def export(
    detector: Detector, path: Path, half: bool = False, test: Source | None = None
) -> None:
    """Write a model file, for scoring alone; it loads without factorising.

    Args:
      detector: fitted.
      path: the file; an earlier one is replaced.
      half: keep the factorisation in float16. What this changes is measured on the test
        set, printed, and stored in the file.
      test: normal and anomalous images, needed for `half`.

    Raises:
      UserError: the file cannot be written, another process writes it, or `half` without
        test images.
    """
    if parallel.every().processes > 1:
        raise UserError("--mode=export: one process writes the file; start only one")
    with locks.held(path):
        _export(detector, path, half, test)


def _export(detector: Detector, path: Path, half: bool, test: Source | None) -> None:
    model_file.require_own(path)  # now, rather than after measuring
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
    fitting.make_folder(path.parent)
    config = config_lib.with_absolute_paths(detector.config)
    size = model_file.save(
        path,
        model_file.Model(
            config,
            detector.index,
            detector.gaussian,
            detector.weights,
            identity,
            detector.images,
            half,
            comparison,
            thresholds,
            projection=detector.projection,
        ),
        _regions(detector),
    )
    print(f"model file, {size / 1e6:.0f} MB -> {path}")


def _regions(detector: Detector) -> int:
    config = detector.config
    index = detector.index.tolist()
    return geometry.pyramid(config.image, config.model, index).shapes[0][0]
