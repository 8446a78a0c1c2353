"""Models that grow: extended and merged ones are those of one fit to all images."""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from padim_jax.config import settings as config_lib
from padim_jax.config.settings import Config, validate
from padim_jax.core import embedding
from padim_jax.core.types import Moments, Samples
from padim_jax.data import dataset_splits, input_pipeline
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.layouts.synthetic import generate
from padim_jax.detector import detector, geometry, steps
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import DataWarning, UserError
from padim_jax.runs import export, fitting, loading
from padim_jax.store import checkpoint
from padim_jax.store.checkpoint import Fitted

ONE = Devices(1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("synthetic")
    generate(folder, n_train=12, n_test_good=2, n_test_per_defect=1, size=96)
    return folder


def make_config(root: pathlib.Path, **model: Any) -> Config:
    values = small.values(root, **{"model.statistics": "auto", "outputs.figures": "none"})
    values.model.update(model)
    return validate(values)


def images(config: Config, start: int, stop: int) -> FolderSource:
    """Some of the twelve normal images."""
    return FolderSource(dataset_splits.open_dataset(config)["train"].records[start:stop])


MODELS: dict[Any, pathlib.Path] = {}


def fit(config: Config, start: int, stop: int, path: pathlib.Path) -> pathlib.Path:
    """A model of some of the images; a copy, where one was fitted before."""
    key = config, start, stop, parallel.every()
    if key not in MODELS:
        MODELS[key] = path.with_name(f"{path.name} as fitted")
        fitting.train(config, images(config, start, stop), MODELS[key])
    return pathlib.Path(shutil.copytree(MODELS[key], path))


def read(path: pathlib.Path) -> Fitted:
    return checkpoint.load(path, ONE)[0]


def require_same_model(path: pathlib.Path, expected: pathlib.Path) -> None:
    """To 1e-5 in the moments and 1e-4 in the scores, as if it were one fit."""
    found, one = read(path), read(expected)
    assert {x.tobytes() for x in found.images} == {x.tobytes() for x in one.images}
    assert len(found.images) == len(one.images) == int(found.statistics.count[0])
    if isinstance(found.statistics, Moments) and isinstance(one.statistics, Moments):
        for x, y in zip(*map(jax.tree.leaves, (found.statistics, one.statistics)), strict=True):
            # Sums of float32 in another order; measured 1.2e-6, and 1.9e-6 of the scores.
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * float(np.abs(y).max()))
    source = dataset_splits.open_dataset(one.config)["test"]
    pixels = next(input_pipeline.batches(source, one.config.image, 4)).images
    maps = [
        loading.detector_lib.score_pixels(loading.load(model), pixels).maps
        for model in (path, expected)
    ]
    np.testing.assert_allclose(maps[0], maps[1], rtol=1e-4)


# The form of the model and of the one that is extended: samples stay, moments stay, and
# samples become moments where these are smaller.
GROWTH = {
    "moments": ({"statistics": "moments"}, Moments, Moments),
    "samples": ({"statistics": "samples"}, Samples, Samples),
    "samples that become moments": ({}, Samples, Moments),
}


@pytest.mark.parametrize("name", GROWTH)
def test_extended_is_fitted_at_once(name: str, root: pathlib.Path, tmp_path: pathlib.Path):
    model, before, after = GROWTH[name]
    config = make_config(root, **model)
    path, whole = tmp_path / "grown", tmp_path / "whole"
    fit(config, 0, 4, path)
    assert isinstance(read(path).statistics, before)
    fitting.update(path, images(config, 4, 12))
    assert isinstance(read(path).statistics, after)
    require_same_model(path, fit(config, 0, 12, whole))


@pytest.mark.parametrize("name", GROWTH)
def test_merged_is_fitted_at_once(name: str, root: pathlib.Path, tmp_path: pathlib.Path):
    model, *forms = GROWTH[name]
    config = make_config(root, **model)
    parts = [(0, 4), (4, 8), (8, 12)]
    models = [fit(config, a, b, tmp_path / str(a)) for a, b in parts]
    merged = tmp_path / "merged"
    fitting.merge(models, merged)
    assert [type(read(path).statistics) for path in (models[0], merged)] == forms
    require_same_model(merged, fit(config, 0, 12, tmp_path / "whole"))


def test_moments_and_samples_merge(root: pathlib.Path, tmp_path: pathlib.Path):
    a = fit(make_config(root, statistics="moments"), 0, 8, tmp_path / "a")
    b = fit(make_config(root, statistics="samples"), 8, 12, tmp_path / "b")
    whole = fit(make_config(root, statistics="moments"), 0, 12, tmp_path / "whole")
    for order in ([a, b], [b, a]):
        fitting.merge(order, tmp_path / "merged")
        require_same_model(tmp_path / "merged", whole)


def test_a_merged_model_grows_on(root: pathlib.Path, tmp_path: pathlib.Path):
    config = make_config(root)
    parts = [fit(config, a, b, tmp_path / str(a)) for a, b in ((0, 4), (4, 8))]
    fitting.merge(parts, parts[0])  # in the place of one of them
    fitting.update(parts[0], images(config, 8, 12))
    require_same_model(parts[0], fit(config, 0, 12, tmp_path / "whole"))


def test_devices_may_change_meanwhile(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """Moments; samples, bit for bit: test_checkpoint."""
    config = make_config(root, statistics="moments")
    models = []
    for count, part in ((2, (0, 4)), (1, (4, 8))):
        monkeypatch.setattr(parallel, "every", lambda count=count: Devices(count))
        models.append(fit(config, *part, tmp_path / str(count)))
    monkeypatch.setattr(parallel, "every", lambda: Devices(2))
    fitting.merge(models, tmp_path / "merged")
    monkeypatch.setattr(parallel, "every", lambda: Devices(3))  # which divide nothing here
    fitting.update(tmp_path / "merged", images(config, 8, 12))
    monkeypatch.setattr(parallel, "every", lambda: ONE)
    require_same_model(tmp_path / "merged", fit(config, 0, 12, tmp_path / "whole"))


def test_images_that_are_known_are_left_out(
    root: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    config = make_config(root)
    path = fit(config, 0, 8, tmp_path / "grown")
    renamed = tmp_path / "renamed.png"  # content counts
    source = images(config, 0, 12)
    renamed.write_bytes(source.read(3)[0])
    records = [dataclasses.replace(source.records[0], image=renamed), *source.records]
    capsys.readouterr()
    with pytest.warns(DataWarning, match="^1 of 13 images is a copy of others"):
        fitting.update(path, FolderSource(records))
    assert f"8 of 12 images are in {path} already" in capsys.readouterr().out
    require_same_model(path, fit(config, 0, 12, tmp_path / "whole"))


def test_nothing_new_changes_nothing(
    root: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    config = make_config(root)
    path = fit(config, 0, 8, tmp_path / "model")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    fitting.update(path, images(config, 2, 5))
    assert "nothing to add" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_models_that_do_not_go_together(root: pathlib.Path, tmp_path: pathlib.Path):
    config = make_config(root)
    model = fit(config, 0, 4, tmp_path / "model")
    for name, changed, message in (
        (
            "seed",
            {"seed": 7},
            r"config\.model\.seed=7: .* was fitted with|config\.model\.seed=42",
        ),
        ("epsilon", {"regularization": 0.1}, r"config\.model\.regularization"),
    ):
        other = fit(make_config(root, **changed), 4, 8, tmp_path / name)
        for order in ([model, other], [other, model]):
            with pytest.raises(UserError, match=message):
                fitting.merge(order, tmp_path / "merged")
        with pytest.raises(UserError, match=message):
            fitting.update(model, images(config, 4, 8), make_config(root, **changed))
    assert not (tmp_path / "merged").exists()


def altered(fitted: Fitted, path: pathlib.Path, **changes: Any) -> pathlib.Path:
    checkpoint.save(path, dataclasses.replace(fitted, **changes), ONE)
    return path


def test_channels_and_weights_are_compared(root: pathlib.Path, tmp_path: pathlib.Path):
    config = make_config(root)
    model = fit(config, 0, 4, tmp_path / "model")
    other = read(fit(config, 4, 8, tmp_path / "other"))
    index = altered(other, tmp_path / "index", index=other.index[::-1].copy())
    with pytest.raises(UserError, match=r"index: the model is broken .*channels"):
        fitting.merge([model, index], tmp_path / "merged")
    weights = dataclasses.replace(other.weights, sha256="0" * 64, origin="elsewhere")
    changed = altered(other, tmp_path / "weights", weights=weights)
    with pytest.raises(UserError, match=r"weights: fitted with the weights elsewhere"):
        fitting.merge([model, changed], tmp_path / "merged")
    with pytest.raises(UserError, match=r"other weights .* than the model"):
        fitting.update(changed, images(config, 8, 12))


def test_images_count_once(root: pathlib.Path, tmp_path: pathlib.Path):
    config = make_config(root)
    a = fit(config, 0, 5, tmp_path / "a")
    b = fit(config, 3, 8, tmp_path / "b")
    with pytest.raises(UserError, match=r"b: 2 of its 5 images are in .*a as well"):
        fitting.merge([a, b], tmp_path / "merged")
    with pytest.raises(UserError, match=r"5 of its 5 images"):
        fitting.merge([a, a], tmp_path / "merged")


def test_only_statistics_can_be_merged_or_extended(root: pathlib.Path, tmp_path: pathlib.Path):
    config = make_config(root)
    model = fit(config, 0, 4, tmp_path / "model")
    exported = tmp_path / "model.safetensors"
    export.export(loading.load(model), exported)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        fitting.merge([model, exported], tmp_path / "merged")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        fitting.update(exported, images(config, 4, 8))
    with pytest.raises(UserError, match="at least 2"):
        fitting.merge([model], tmp_path / "merged")
    with pytest.raises(UserError, match="no such checkpoint"):
        fitting.merge([model, tmp_path / "nowhere"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_processes_that_see_different_images(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    config = make_config(root)
    # As if another process had listed other files.
    gather = parallel.gather
    monkeypatch.setattr(parallel, "gather", lambda x: np.concatenate([gather(x), 1 + x]))
    with pytest.raises(UserError, match="sees 4 images, and another process other ones"):
        fitting.train(config, images(config, 0, 4), tmp_path / "model")


PCA = {"reduction": "pca", "channels": 8, "pooling": 3}


def principal_components(config: Config, source: FolderSource) -> np.ndarray:
    """Of all patches' embeddings of all channels, in float64; all of them, the last first."""
    total = geometry.total_channels(config.model)
    model = dataclasses.replace(config.model, reduction="none", channels=total)
    index = tuple(range(total))
    variables, _ = fitting.load_backbone(model, ONE)
    pixels = next(input_pipeline.batches(source, config.image, len(source.records))).images
    levels = steps.extract(
        variables, jnp.asarray(pixels), image=config.image, model=model, index=index
    )
    pyramid = geometry.pyramid(config.image, model, index)
    x = np.asarray(embedding.concatenate(levels, pyramid), np.float64)
    return np.linalg.eigh(np.cov(x.reshape(-1, total).T))[1]


@pytest.fixture(scope="module")
def reduced(root: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return fit(make_config(root, **PCA), 0, 8, tmp_path_factory.mktemp("pca") / "model")


def projection(path: pathlib.Path) -> np.ndarray:
    found = read(path).projection
    assert found is not None
    return found


class TestPrincipalComponents:
    def test_are_those_of_all_patches(self, root: pathlib.Path, reduced: pathlib.Path):
        config = make_config(root, **PCA)
        expected = principal_components(config, images(config, 0, 8))[:, :-9:-1]
        found = projection(reduced)
        # Turned by roundoffs of the largest eigenvalue over the gaps between them.
        cosines = np.abs(np.sum(found * expected, axis=0))
        np.testing.assert_allclose(cosines, 1, atol=1e-5)

    def test_on_devices(
        self,
        root: pathlib.Path,
        reduced: pathlib.Path,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        monkeypatch.setattr(parallel, "every", lambda: Devices(2))
        path = fit(make_config(root, **PCA), 0, 8, tmp_path / "model")
        # As above; measured on one device and four.
        np.testing.assert_allclose(projection(path), projection(reduced), atol=1e-4)

    def test_an_extended_model_keeps_them(
        self, root: pathlib.Path, reduced: pathlib.Path, tmp_path: pathlib.Path
    ):
        path = tmp_path / "model"
        shutil.copytree(reduced, path)
        fitting.update(path, images(make_config(root), 8, 12))
        np.testing.assert_array_equal(projection(path), projection(reduced))
        assert len(read(path).images) == 12

    def test_a_model_file_has_them(self, reduced: pathlib.Path, tmp_path: pathlib.Path):
        loaded = loading.load(reduced)
        export.export(loaded, tmp_path / "model.safetensors")
        again = loading.load(tmp_path / "model.safetensors")
        pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.uint8)
        maps = [detector.score_pixels(x, pixels).maps for x in (loaded, again)]
        np.testing.assert_array_equal(maps[0], maps[1])

    def test_others_cannot_be_merged(
        self, root: pathlib.Path, reduced: pathlib.Path, tmp_path: pathlib.Path
    ):
        other = fit(make_config(root, **PCA), 8, 12, tmp_path / "other")
        with pytest.raises(UserError, match=r"other: other principal .*--mode=update"):
            fitting.merge([reduced, other], tmp_path / "merged")

    def test_an_interrupted_fit_has_them_already(
        self,
        root: pathlib.Path,
        reduced: pathlib.Path,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        config = make_config(root, **PCA)
        config = dataclasses.replace(config, train=config_lib.TrainConfig(0.0))
        with monkeypatch.context() as patch:
            # Between the second batch's save and its end.
            batches = iter([steps.fit_batch])
            patch.setattr(steps, "fit_batch", lambda *given: next(batches)(*given))
            with pytest.raises(StopIteration):
                fitting.train(config, images(config, 0, 8), tmp_path / "model")
        monkeypatch.setattr(fitting, "_scatter", None)
        fitting.train(config, images(config, 0, 8), tmp_path / "model")
        np.testing.assert_array_equal(projection(tmp_path / "model"), projection(reduced))
        require_same_model(tmp_path / "model", reduced)


def test_models_of_one_projection_merge(root: pathlib.Path, tmp_path: pathlib.Path):
    config = make_config(root, statistics="moments", reduction="semi_orthogonal")
    parts = [fit(config, a, b, tmp_path / str(a)) for a, b in ((0, 4), (4, 12))]
    fitting.merge(parts, tmp_path / "merged")
    require_same_model(tmp_path / "merged", fit(config, 0, 12, tmp_path / "whole"))


@pytest.mark.parametrize(
    ("image", "model", "problem"),
    [
        ({"rotation": 5.0}, {}, r"config.image.rotation=5.0: .* with 0.0"),
        ({"crop": (32, 32), "crop_at": "random"}, {}, r"config.image.crop"),
        ({}, {"reduction": "semi_orthogonal"}, "config.model.reduction=semi_orthogonal"),
        ({}, {"pooling": 3}, "config.model.pooling=3"),
        ({}, {"channels": 7}, "config.model.channels=7"),
        ({}, {"upsample": "bilinear"}, "config.model.upsample=bilinear"),
        ({}, {"seed": 1}, "config.model.seed=1"),
        # What nothing is drawn with changes nothing.
        ({"seed": 1}, {}, None),
    ],
    ids=str,
)
def test_what_must_be_the_same(
    image: dict, model: dict, problem: str | None, root: pathlib.Path
):
    fitted = make_config(root)
    wanted = dataclasses.replace(
        fitted,
        image=dataclasses.replace(fitted.image, **image),
        model=dataclasses.replace(fitted.model, **model),
    )
    if problem is None:
        fitting.require_same(root, fitted, wanted)
        return
    with pytest.raises(UserError, match=problem):
        fitting.require_same(root, fitted, wanted)
