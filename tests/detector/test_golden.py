"""The whole program against what PyTorch computes, on real data with real weights."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import patchwise
import pytest

from padim_jax.config import defaults
from padim_jax.config.settings import Config, validate
from padim_jax.core import embedding
from padim_jax.core.types import Gaussian, LowRank
from padim_jax.data import dataset_splits, input_pipeline
from padim_jax.detector import geometry, steps
from padim_jax.devices import parallel
from padim_jax.runs import loading, modes

# The golden presets by ours; metrics and their tolerances as agreed with the goldens'
# authors: float32 rounding may swap two nearly equal scores.
PRESETS = {
    "seed": (
        "nearest256_crop224",
        {
            "image_auroc": (0.9952, 5e-4),
            "image_f1_max": (0.9844, 5e-4),
            "pixel_auroc": (0.97871, 2e-4),
            "aupro": (0.93689, 5e-4),
        },
    ),
    "anomalib": (
        "bilinear256",
        {
            "image_auroc": (0.9944, 5e-4),
            "image_f1_max": (0.9767, 5e-4),
            "pixel_auroc": (0.98423, 2e-4),
            "aupro": (0.95422, 5e-4),
        },
    ),
}


# The form that suits 209 images of 100 channels, and the other one, which is exact too.
RUNS = {"seed": "auto", "anomalib": "samples"}


class Run:
    """One preset, fitted and evaluated once for all tests of this file."""

    def __init__(self, preset: str, form: str, shared: pathlib.Path, workdir: pathlib.Path):
        name, self.metrics = PRESETS[preset]
        self.golden = np.load(shared / "golden" / f"bottle_resnet18_{name}.npz")
        values: Any = defaults.get_config(preset)
        values.dataset.root = str(shared / "data" / "mvtec_ad")
        values.model.weights = str(shared / "weights" / "resnet18.tv_in1k.folded.npz")
        values.model.statistics = form
        values.outputs.maps, values.outputs.report = "npy", False
        values.threshold.normal = "none"
        self.config: Config = validate(values)
        self.workdir = workdir
        self.checkpoint = workdir / "checkpoint"
        modes.run("train_and_eval", self.config, workdir, self.checkpoint)
        self.detector = loading.load(self.checkpoint)
        assert isinstance(self.detector.gaussian, LowRank if form == "samples" else Gaussian)
        index = self.detector.index.tolist()
        self.pyramid = geometry.pyramid(self.config.image, self.config.model, index)
        leaves, structure = jax.tree.flatten(self.detector.gaussian)
        joined = parallel.join(leaves, self.pyramid.shapes[0][0])
        self.fitted = structure.unflatten(map(jnp.asarray, joined))  # of all devices


@pytest.fixture(scope="module", params=RUNS)
def run(
    request: pytest.FixtureRequest,
    shared: pathlib.Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Run]:
    # As users compile it: much is computed, and compared with others' numbers.
    jax.config.update("jax_disable_most_optimizations", False)
    yield Run(
        request.param, RUNS[request.param], shared, tmp_path_factory.mktemp(request.param)
    )
    jax.config.update("jax_disable_most_optimizations", True)


def test_channel_index_is_the_published_one(run: Run):
    np.testing.assert_array_equal(run.detector.index, run.golden["channel_index"])


def test_mean(run: Run):
    # Two float32 implementations of 17 convolutions; values are of order 1.
    levels = tuple(mean[..., None] for mean in run.fitted.mean)
    (mean,) = embedding.concatenate(levels, run.pyramid)
    np.testing.assert_allclose(mean, run.golden["mean"], atol=1e-4, rtol=0)


def test_embedding(run: Run):
    source = dataset_splits.open_dataset(run.config)["test"]
    names = [record.relative_path for record in source.records]
    pixels = input_pipeline.load_image(
        source, run.config.image, names.index("bottle/test/good/000.png")
    )
    levels = steps.extract(
        run.detector.variables,
        jnp.asarray(pixels[None]),
        image=run.config.image,
        model=run.config.model,
        index=tuple(run.detector.index.tolist()),
    )
    (found,) = embedding.concatenate(levels, run.pyramid)
    np.testing.assert_allclose(found, run.golden["embedding_000"], atol=1e-4, rtol=0)


def inverse_covariances(fitted: Gaussian | LowRank, pyramid: embedding.Pyramid) -> np.ndarray:
    """(p, d, d) in float64, of the patches that are left in `pyramid`."""
    if isinstance(fitted, Gaussian):
        whitening = np.linalg.inv(patchwise.factors(fitted.factor, pyramid))
        return whitening.swapaxes(1, 2) @ whitening
    images = range(fitted.root.shape[-1])
    deviations = [np.asarray(x) for x in fitted.deviations]
    x = [patchwise.vectors([y[:, :, i] for y in deviations], pyramid) for i in images]
    root = np.asarray(fitted.root).reshape(-1, len(images), len(images))[pyramid.patches]
    explained = root.astype(np.float64) @ np.stack(x, axis=1)
    identity = np.eye(explained.shape[-1])
    return (identity - explained.swapaxes(1, 2) @ explained) / fitted.regularization


def test_inverse_covariance(run: Run):
    chosen = run.pyramid.patches[run.golden["patches"]]
    pyramid = run.pyramid
    pyramid = dataclasses.replace(pyramid, patches=chosen, inside=pyramid.inside[: len(chosen)])
    inverse = inverse_covariances(run.fitted, pyramid)
    golden = run.golden["inverse_covariance"]
    # Conditioned by up to 1e3 (variances of order 10 against the 0.01 that is added):
    # float32's 1e-7 becomes 1e-4, times the channels' square root.
    for ours, theirs in zip(inverse, golden, strict=True):
        assert np.max(np.abs(ours - theirs)) < 1e-3 * np.max(np.abs(theirs))


def test_anomaly_maps(run: Run):
    for name, golden in zip(run.golden["map_names"], run.golden["maps"], strict=True):
        ours = np.load(run.workdir / "maps" / "bottle" / f"{name}.npy")
        np.testing.assert_allclose(ours, golden, rtol=1e-3)


def test_image_scores(run: Run):
    rows = (run.workdir / "scores.csv").read_text().splitlines()[1:]
    scores = {row.split(",")[0]: float(row.split(",")[3]) for row in rows}
    assert len(scores) == len(run.golden["image_names"]) == 83
    ours = [scores[f"bottle/{name}"] for name in run.golden["image_names"]]
    np.testing.assert_allclose(ours, run.golden["image_scores"], rtol=1e-3)


def test_metrics(run: Run):
    measured = json.loads((run.workdir / "metrics.json").read_text())
    for key, (value, tolerance) in run.metrics.items():
        assert measured[key] == pytest.approx(value, abs=tolerance), key
