"""Checkpoints: nothing is lost in them, by a crash while saving, or by saving over things.

Runs on virtual CPU devices, of which `conftest.py` asks for eight.
"""

import copy
import dataclasses
import gc
import hashlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import patchwise
import pytest

import padim_jax
from padim_jax.config import defaults
from padim_jax.config.settings import Config, validate
from padim_jax.core import gaussian, low_rank
from padim_jax.core.types import Moments, Samples
from padim_jax.detector import geometry
from padim_jax.detector import statistics as statistics_lib
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.models.weights import pretrained
from padim_jax.models.weights.identity import WeightsIdentity
from padim_jax.runs import loading
from padim_jax.store import checkpoint
from padim_jax.store.checkpoint import Fitted, ocp

CASE = patchwise.CASES["two levels"]  # of 6 channels
CHANNELS = 6
ONE = Devices(1)
WEIGHTS = WeightsIdentity("huggingface.co/timm/ä b", "0123456789abcdef" * 4)


def make_config(**settings: Any) -> Config:
    values = defaults.get_config()
    base = {
        "dataset.root": "/nowhere/to be found/Teile ü",
        "model.weights": "random",
        "model.layers": ("layer1",),
        "model.channels": CHANNELS,
    }
    values.update_from_flattened_dict(base | settings)
    return validate(values)


UPDATE = {"moments": jax.jit(gaussian.update), "samples": jax.jit(low_rank.update)}


def make_statistics(form: str, seed: int = 0) -> Moments | Samples:
    """Of all regions, as `parallel.split` takes them."""
    images, shapes = 3 + seed, patchwise.lay(CASE).shapes
    levels, _ = patchwise.random_levels(CASE, images, seed=seed)
    (batch,) = patchwise.batches(levels, [images])
    if form == "moments":
        return UPDATE[form](gaussian.init(shapes), *batch)
    return UPDATE[form](low_rank.init(shapes, images), *batch)


def make_moments(config: Config) -> Moments:
    """Of all regions that a configuration has."""
    index = geometry.channel_index(config.model).tolist()
    shapes = geometry.pyramid(config.image, config.model, index).shapes
    rng = np.random.default_rng(0)
    levels = tuple(rng.standard_normal((*shape, 3), np.float32) for shape in shapes)
    return UPDATE["moments"](gaussian.init(shapes), levels, np.ones(3, bool))


def make_fitted(
    seed: int = 0,
    config: Config | None = None,
    weights: WeightsIdentity = WEIGHTS,
    form: str = "moments",
    unfinished: str | None = None,
    devices: Devices = ONE,
    statistics: Moments | Samples | None = None,
) -> Fitted:
    index = geometry.channel_index(make_config().model)
    statistics = statistics or make_statistics(form, seed)
    regions = len(jax.tree.leaves(statistics)[-1])
    images = [hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(3 + seed)]
    return Fitted(
        config or make_config(),
        index,
        parallel.split(statistics, devices),
        weights,
        regions,
        np.frombuffer(b"".join(images), np.uint8).reshape(-1, 32),
        unfinished,
    )


def save(path: pathlib.Path, fitted: Fitted) -> str:
    return checkpoint.save(path, fitted, ONE)


def load(path: str | pathlib.Path) -> Fitted:
    return checkpoint.load(path, ONE)[0]


def same_arrays(a: Any, b: Any) -> bool:
    x, y = ([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        p.dtype == q.dtype and p.shape == q.shape and p.tobytes() == q.tobytes()
        for p, q in zip(x, y, strict=True)
    )


def on_host(fitted: Fitted) -> list[np.ndarray]:
    """The statistics of all devices together."""
    return parallel.join(jax.tree.leaves(fitted.statistics), fitted.regions)


def same(a: Fitted, b: Fitted) -> bool:
    """To the last bit; on whatever number of devices each of them is."""
    return (
        (a.config, a.weights, a.regions, a.unfinished)
        == (b.config, b.weights, b.regions, b.unfinished)
        and type(a.statistics) is type(b.statistics)
        and same_arrays((a.index, a.images, on_host(a)), (b.index, b.images, on_host(b)))
    )


FORMS = ["moments", "samples"]
both_forms = pytest.mark.parametrize("form", FORMS)


def content(folder: pathlib.Path) -> dict[str, str]:
    """Every file and folder below `folder`, to see whether anything was touched."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in folder.rglob("*")
    }


def save_altered(path: pathlib.Path, alter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves a checkpoint with other metadata than this version writes."""
    write = ocp.save

    def altered(*args, custom_metadata, **kwargs):
        custom_metadata = copy.deepcopy(custom_metadata)
        alter(custom_metadata)
        write(*args, custom_metadata=custom_metadata, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp, "save", altered)
        save(path, make_fitted())


class TestRoundTrip:
    @both_forms
    def test_bit_for_bit(self, form: str, tmp_path: pathlib.Path):
        # Values that text or a wider type in between would change.
        odd = np.array([-0.0, 1e-42, np.finfo(np.float32).max, np.pi, 1 / 3])

        def changed(x: jax.Array) -> jax.Array:
            array = np.asarray(x) if x.ndim == 0 else np.resize(odd, x.shape).astype(x.dtype)
            if x.ndim == 4 and x.shape[2] == x.shape[3]:  # what M2 has of a level with itself
                lower = np.tri(x.shape[2], dtype=bool)
                array = np.where(lower, array, array.swapaxes(2, 3))
            return jnp.asarray(array)

        fitted = make_fitted(statistics=jax.tree.map(changed, make_statistics(form)))
        save(tmp_path / "checkpoint", fitted)
        assert same(load(tmp_path / "checkpoint"), fitted)

    @both_forms
    def test_gives_the_same_gaussians(self, form: str, tmp_path: pathlib.Path):
        fitted = make_fitted(form=form)
        save(tmp_path / "checkpoint", fitted)
        loaded = load(tmp_path / "checkpoint")
        assert same_arrays(
            statistics_lib.finalize(loaded.statistics, 0.01),
            statistics_lib.finalize(fitted.statistics, 0.01),
        )

    @pytest.mark.parametrize("name", ["one channel", "a level of one channel"])
    def test_any_number_of_levels(self, name: str, tmp_path: pathlib.Path):
        shapes = patchwise.lay(patchwise.CASES[name]).shapes
        for statistics in (gaussian.init(shapes), low_rank.init(shapes, 3)):
            # Every number is another, and blocks of a level with itself are symmetric.
            leaves, structure = jax.tree.flatten(statistics)
            filled = []
            for i, leaf in enumerate(leaves):
                x = 1000 * i + np.arange(leaf.size).reshape(leaf.shape)
                if leaf.ndim == 4 and isinstance(statistics, Moments):
                    own = any(leaf is row[0] for row in statistics.m2)
                    x = np.minimum(x, x.swapaxes(2, 3)) if own else x
                filled.append(jnp.asarray(x, leaf.dtype))
            fitted = make_fitted(statistics=jax.tree.unflatten(structure, filled))
            save(tmp_path / "checkpoint", fitted)
            assert same(load(tmp_path / "checkpoint"), fitted)

    @both_forms
    def test_size_on_disk(self, form: str, tmp_path: pathlib.Path):
        """Each number once: of a symmetric matrix the lower triangle, of M2 no block twice."""
        shapes, images = [(32, 4, 20), (32, 1, 50)], 40
        if form == "moments":
            numbers = 32 * (4 * (20 + 20 * 21 // 2 + 20 * 50) + 50 + 50 * 51 // 2)
        else:
            numbers = 32 * (4 * images * 20 + images * 50)
        rng = np.random.default_rng(0)
        statistics = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
            gaussian.init(shapes) if form == "moments" else low_rank.init(shapes, images),
        )
        save(tmp_path / "checkpoint", make_fitted(statistics=statistics))
        files = (tmp_path / "checkpoint").rglob("*")
        size = sum(file.stat().st_size for file in files if file.is_file())
        # Beside them descriptions, the configuration and digests.
        assert size < 4 * numbers + 20_000

    def test_images_and_their_order(self, tmp_path: pathlib.Path):
        for images in (1, 300):
            digests = np.random.default_rng(0).integers(256, size=(images, 32), dtype=np.uint8)
            fitted = dataclasses.replace(make_fitted(), images=digests)
            save(tmp_path / "checkpoint", fitted)
            assert same(load(tmp_path / "checkpoint"), fitted)

    def test_identity_is_of_the_statistics(self, tmp_path: pathlib.Path):
        """The same for the same, on any number of devices; another for any difference."""
        fitted = make_fitted()
        others = [
            make_fitted(1),
            make_fitted(form="samples"),
            make_fitted(weights=WeightsIdentity("other", "0" * 64)),
            dataclasses.replace(fitted, images=fitted.images[::-1].copy()),
            dataclasses.replace(fitted, index=fitted.index[::-1].copy()),
        ]
        # One number's last bit, in every array.
        leaves, structure = jax.tree.flatten(make_statistics("moments"))
        for i, leaf in enumerate(leaves):
            bits = np.array(leaf)
            bits.reshape(-1).view(np.int32)[-1] ^= 1
            changed = structure.unflatten([*leaves[:i], jnp.asarray(bits), *leaves[i + 1 :]])
            others.append(make_fitted(statistics=changed))
        identity = save(tmp_path / "a", fitted)
        assert save(tmp_path / "a", make_fitted()) == identity
        assert checkpoint.load(tmp_path / "a", ONE)[1] == identity
        # Wherever the images and the weights lay.
        moved = make_fitted(
            config=make_config(**{"dataset.root": "/elsewhere", "batch_size": 3}),
            weights=dataclasses.replace(WEIGHTS, origin="elsewhere"),
        )
        assert save(tmp_path / "moved", moved) == identity
        found = {save(tmp_path / f"b{i}", each) for i, each in enumerate(others)}
        assert len(found | {identity}) == 1 + len(others)
        devices = Devices(4)  # which do not divide the regions
        spread = make_fitted(devices=devices)
        assert checkpoint.save(tmp_path / "c", spread, devices) == identity

    @pytest.mark.parametrize(
        "settings",
        [
            {"image.crop": (224, 200), "image.method": "nearest"},
            {"model.layers": ("layer2", "layer4"), "model.backbone": "wide_resnet50_2"},
            {"dataset.source": "tfds", "dataset.tfds_dir": "/some where", "category": "zwölf"},
            {"dataset.name": "folder", "category": "", "model.regularization": 0.1},
            {"model.regularization": 1 / 3, "map.sigma": 0.1, "image.mean": (0.1, 0.2, 0.3)},
        ],
    )
    def test_configuration(self, settings: dict, tmp_path: pathlib.Path):
        fitted = make_fitted(config=make_config(**settings))
        save(tmp_path / "checkpoint", fitted)
        assert load(tmp_path / "checkpoint").config == fitted.config

    def test_from_another_folder(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        save(pathlib.Path("checkpoint"), make_fitted())
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        assert same(load("../checkpoint"), make_fitted())


class Crash(BaseException):
    """What no handler for errors would catch, as the end of a process is none."""


def crash(step: str, patch: pytest.MonkeyPatch) -> None:
    """Lets the next save end at one of its steps."""
    write, remove = ocp.save, shutil.rmtree

    def fail(*args, **kwargs):
        raise Crash

    def write_and_fail(*args, **kwargs):
        write(*args, **kwargs)
        raise Crash

    def remove_one_file_and_fail(path, *args, **kwargs):
        file = next(entry for entry in pathlib.Path(path).rglob("*") if entry.is_file())
        file.unlink()
        raise Crash

    if step == "before writing":
        patch.setattr(ocp, "save", fail)
    elif step == "after writing":
        patch.setattr(ocp, "save", write_and_fail)
    elif step == "while removing":
        patch.setattr(shutil, "rmtree", remove_one_file_and_fail)
    elif step == "after removing":
        patch.setattr(shutil, "rmtree", lambda path, **given: (remove(path, **given), fail()))


def steps(path: pathlib.Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


class TestReplace:
    def test_replaces_and_leaves_nothing_behind(self, tmp_path: pathlib.Path):
        for form, seed in zip(["moments", "samples", "moments"], range(3), strict=True):
            fitted = make_fitted(seed, form=form)
            save(tmp_path / "checkpoint", fitted)
            assert same(load(tmp_path / "checkpoint"), fitted)
            assert steps(tmp_path) == ["checkpoint"]
            assert steps(tmp_path / "checkpoint") == [str(seed)]

    @pytest.mark.parametrize(
        ("step", "survivor"),
        [
            ("before writing", 0),
            ("after writing", 1),
            ("while removing", 1),
            ("after removing", 1),
        ],
    )
    def test_crash_while_replacing(
        self,
        step: str,
        survivor: int,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        path = tmp_path / "checkpoint"
        fitted = [make_fitted(seed) for seed in range(3)]
        save(path, fitted[0])
        with monkeypatch.context() as patch:
            crash(step, patch)
            with pytest.raises(Crash):
                save(path, fitted[1])
        assert same(load(path), fitted[survivor])
        assert checkpoint.load_unfinished(path, ONE) is None
        save(path, fitted[2])
        assert same(load(path), fitted[2])
        assert len(steps(path)) == 1

    def test_link_to_another_disk(self, tmp_path: pathlib.Path):
        target = tmp_path / "disk" / "model"
        target.parent.mkdir()
        save(target, make_fitted(0))
        link = tmp_path / "checkpoint"
        link.symlink_to(target)
        for seed in (1, 2):
            save(link, make_fitted(seed))
            assert link.is_symlink()
            assert same(load(target), make_fitted(seed))


def start(source: str, *arguments: str, devices: int = 1) -> subprocess.Popen[str]:
    """Another Python that can import the tests."""
    here = pathlib.Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, [here.parents[1], here.parent, here])),
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    return subprocess.Popen(
        [sys.executable, "-c", f"from pathlib import *; {source}", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class TestUnfinished:
    def test_is_no_model(self, tmp_path: pathlib.Path):
        path, fit = tmp_path / "checkpoint", make_fitted(unfinished="train")
        save(path, fit)
        with pytest.raises(UserError) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}: holds a fit that was interrupted")
        with pytest.raises(UserError, match="interrupted"):
            padim_jax.load(path)
        found = checkpoint.load_unfinished(path, ONE)
        assert found is not None
        assert same(found, fit)

    def test_beside_a_model(self, tmp_path: pathlib.Path):
        """Only the newest unfinished fit is kept, and the model until there is a newer."""
        path = tmp_path / "checkpoint"
        model, later = make_fitted(0), make_fitted(3)
        save(path, model)
        assert checkpoint.load_unfinished(path, ONE) is None
        for seed in (1, 2):
            fit = make_fitted(seed, unfinished="update")
            save(path, fit)
            assert same(load(path), model)
            found = checkpoint.load_unfinished(path, ONE)
            assert found is not None
            assert same(found, fit)
            assert len(steps(path)) == 2
        save(path, later)
        assert same(load(path), later)
        assert checkpoint.load_unfinished(path, ONE) is None
        assert len(steps(path)) == 1

    def test_older_than_the_model(self, tmp_path: pathlib.Path):
        """As left by an end between a save and the removal of what it replaces."""
        path = tmp_path / "checkpoint"
        save(tmp_path / "other", make_fitted(0, unfinished="train"))
        save(path, make_fitted(1))
        (path / "0").rename(path / "1")
        (tmp_path / "other" / "0").rename(path / "0")
        assert same(load(path), make_fitted(1))
        assert checkpoint.load_unfinished(path, ONE) is None

    def test_of_nothing(self, tmp_path: pathlib.Path):
        assert checkpoint.load_unfinished(tmp_path / "nowhere", ONE) is None
        (tmp_path / "empty").mkdir()
        assert checkpoint.load_unfinished(tmp_path / "empty", ONE) is None

    def test_steps_are_counted_in_numbers(self, tmp_path: pathlib.Path):
        """Ten comes after nine."""
        path = tmp_path / "checkpoint"
        save(path, make_fitted(unfinished="train"))
        (path / "0").rename(path / "9")
        for seed in (1, 2):
            fit = make_fitted(seed, unfinished=f"train {seed}")
            save(path, fit)
            found = checkpoint.load_unfinished(path, ONE)
            assert found is not None
            assert same(found, fit)
        assert steps(path) == ["11"]


class TestSaving:
    """What `saving`'s block does while the checkpoint is written, but the only one not yet."""

    @pytest.mark.parametrize("error", [ValueError, UserError, KeyboardInterrupt, Crash])
    def test_error_leaves_the_old_checkpoint(
        self, error: type[BaseException], tmp_path: pathlib.Path
    ):
        save(tmp_path / "checkpoint", make_fitted(0))
        before = content(tmp_path)
        with (
            pytest.raises(error),
            checkpoint.saving(tmp_path / "checkpoint", make_fitted(1), ONE),
        ):
            raise error
        assert content(tmp_path) == before

    def test_error_leaves_nothing(self, tmp_path: pathlib.Path):
        with (
            pytest.raises(Crash),
            checkpoint.saving(tmp_path / "checkpoint", make_fitted(), ONE),
        ):
            raise Crash
        assert content(tmp_path) == {"checkpoint": "folder"}
        save(tmp_path / "checkpoint", make_fitted())

    def test_error_leaves_the_unfinished_fit(self, tmp_path: pathlib.Path):
        path, fit = tmp_path / "checkpoint", make_fitted(1, unfinished="update")
        save(path, make_fitted(0))
        save(path, fit)
        with pytest.raises(Crash), checkpoint.saving(path, make_fitted(2), ONE):
            raise Crash
        assert same(load(path), make_fitted(0))
        found = checkpoint.load_unfinished(path, ONE)
        assert found is not None
        assert same(found, fit)

    def test_replaces_at_the_end(self, tmp_path: pathlib.Path):
        path, backup = tmp_path / "checkpoint", tmp_path / "copy"
        identity = save(path, make_fitted(0))
        with checkpoint.saving(path, make_fitted(1), ONE) as given:
            # All of it is there: an end of the process now would lose nothing.
            assert same(load(path), make_fitted(1))
            shutil.copytree(path, backup)
            shutil.rmtree(backup / "1")
            assert checkpoint.load(backup, ONE)[1] == identity
        assert checkpoint.load(path, ONE)[1] == given
        assert same(load(path), make_fitted(1))
        assert steps(path) == ["1"]

    @pytest.mark.parametrize(("form", "count"), [("moments", 4), ("samples", 1)])
    def test_block_may_use_the_statistics_up(
        self, count: int, form: str, tmp_path: pathlib.Path
    ):
        devices = Devices(count)
        fitted = make_fitted(form=form, devices=devices)
        # In memory of JAX, and not NumPy's, which nobody can use up.
        statistics: Any = jax.tree.map(lambda x: x + 0, fitted.statistics)
        fitted = dataclasses.replace(fitted, statistics=statistics)

        def places(tree: Any) -> list[int]:
            shards = [s.data for x in jax.tree.leaves(tree) for s in x.addressable_shards]
            return [x.unsafe_buffer_pointer() for x in shards]

        before = places(statistics.m2 if form == "moments" else statistics.values)
        with checkpoint.saving(tmp_path / "checkpoint", fitted, devices):
            ready: Any = statistics_lib.finalize(statistics, 0.01)
        # The result is where the statistics were: neither was copied to keep a view of it.
        assert places(ready.factor if form == "moments" else ready.deviations) == before
        assert same(load(tmp_path / "checkpoint"), make_fitted(form=form))

    def test_save_leaves_the_statistics(self, tmp_path: pathlib.Path):
        """A fit goes on with them."""
        fitted = make_fitted(devices=Devices(2))
        checkpoint.save(tmp_path / "checkpoint", fitted, Devices(2))
        assert same(fitted, make_fitted())


def empty(path: pathlib.Path) -> None:
    path.mkdir()


def file(path: pathlib.Path) -> None:
    path.write_text("precious")


def folder_of_files(path: pathlib.Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("precious")


def folder_of_folders(path: pathlib.Path) -> None:
    # As a dataset, or results/: to Orbax a checkpoint of its older form.
    (path / "train" / "good").mkdir(parents=True)
    (path / "train" / "good" / "000.png").write_bytes(b"precious")


def foreign(path: pathlib.Path) -> None:
    ocp.save(str(path), {"weights": np.arange(3)}, custom_metadata={"step": 3})


OTHERS = [empty, file, folder_of_files, folder_of_folders, foreign]


def in_a_folder(make):
    """Something else that is called as a step would be."""

    def made(path: pathlib.Path) -> None:
        path.mkdir()
        make(path / "0")

    made.__name__ = f"0 is {make.__name__}"
    return made


def folders_by_class(path: pathlib.Path) -> None:
    for number in range(10):  # as of a dataset of digits
        (path / str(number)).mkdir(parents=True)
        (path / str(number) / "000.png").write_bytes(b"precious")


def beside_a_step(path: pathlib.Path) -> None:
    save(path, make_fitted())
    (path / "notes.txt").write_text("precious")


def other_numbers(path: pathlib.Path) -> None:
    for name in ("007", "1²", "٣", "-1"):
        save(path / name, make_fitted())


FOREIGN = [
    *(make for make in OTHERS if make is not empty),
    *(in_a_folder(make) for make in OTHERS),
    *(folders_by_class, beside_a_step, other_numbers),
]


class TestNothingElseIsOverwritten:
    @pytest.mark.parametrize("make", FOREIGN, ids=lambda make: make.__name__)
    def test_refused_and_untouched(self, make, tmp_path: pathlib.Path):
        path = tmp_path / "checkpoint"
        make(path)
        before = content(tmp_path)
        for function in (lambda path: save(path, make_fitted(1)), checkpoint.check_destination):
            with pytest.raises(UserError, match="move it away") as caught:
                function(path)
            assert str(caught.value).startswith(f"{path}: ")
            assert content(tmp_path) == before

    def test_an_empty_folder_is_taken(self, tmp_path: pathlib.Path):
        """Nothing is lost with it; a save that was killed may have left it."""
        (tmp_path / "checkpoint").mkdir()
        checkpoint.check_destination(tmp_path / "checkpoint")
        save(tmp_path / "checkpoint", make_fitted())
        assert same(load(tmp_path / "checkpoint"), make_fitted())

    def test_what_is_beside_is_kept(self, tmp_path: pathlib.Path):
        # Where else would one put a backup?
        names = ["checkpoint.old", "checkpoint.new", "checkpoint.orbax-checkpoint-tmp"]
        for name in names:
            save(tmp_path / name, make_fitted(0))
        for seed in (1, 2):
            save(tmp_path / "checkpoint", make_fitted(seed))
        assert steps(tmp_path) == sorted(["checkpoint", *names])
        for name in names:
            assert same(load(tmp_path / name), make_fitted(0))

    def test_a_checkpoint_without_steps(self, tmp_path: pathlib.Path):
        """Formats 1 and 2: replaced by nobody, and loaded by nobody."""
        path = tmp_path / "checkpoint"
        save(tmp_path / "new", make_fitted())
        (tmp_path / "new" / "0").rename(path)
        file = path / "_CHECKPOINT_METADATA"
        file.write_text(file.read_text().replace('"format": 5', '"format": 2'))
        before = content(path)
        with pytest.raises(UserError, match="exists and is no checkpoint of padim_jax"):
            save(path, make_fitted(1))
        with pytest.raises(UserError, match=r"format 2 .* reads format 5"):
            load(path)
        with pytest.raises(UserError, match=r"format 2 .* reads format 5"):
            checkpoint.load_unfinished(path, ONE)
        assert content(path) == before


def merged(a: Any, b: Any) -> Any:
    """JSON, with what `b` says wherever that key is."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a | {key: merged(a.get(key), value) for key, value in b.items()}
    return b


@pytest.fixture
def collected() -> Iterator[None]:
    """Leaves no garbage to the next test."""
    yield
    gc.collect()


# Where Orbax fails, it leaves coroutines and exceptions of its tasks to nobody.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.usefixtures("collected")
def test_a_projection_is_kept_and_part_of_the_identity(tmp_path: pathlib.Path):
    fitted = make_fitted()
    matrices = [np.eye(9, 6, -i, dtype=np.float32) for i in (0, 1)]
    identities = {save(tmp_path / "none", fitted)}
    for i, matrix in enumerate(matrices):
        given = dataclasses.replace(fitted, projection=matrix)
        identities.add(save(tmp_path / str(i), given))
        np.testing.assert_array_equal(load(tmp_path / str(i)).projection, matrix)
    assert load(tmp_path / "none").projection is None
    assert len(identities) == 3


class TestLoadingFails:
    def test_absent(self, tmp_path: pathlib.Path):
        with pytest.raises(UserError, match="no such checkpoint; fit a model first") as caught:
            load(tmp_path / "checkpoint")
        assert str(tmp_path / "checkpoint") in str(caught.value)

    @pytest.mark.parametrize("make", OTHERS)
    def test_something_else(self, make, tmp_path: pathlib.Path):
        make(tmp_path / "checkpoint")
        with pytest.raises(UserError, match="is no checkpoint") as caught:
            load(tmp_path / "checkpoint")
        assert str(tmp_path / "checkpoint") in str(caught.value)

    @pytest.mark.parametrize(("number", "version"), [(1, "0.1.0"), (2, "0.2"), (99, "9.9")])
    def test_another_format(
        self,
        number: int,
        version: str,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        path = tmp_path / "checkpoint"
        other = {"format": number, "version": version}
        # What another version writes may lack all that this one looks for.
        save_altered(path, lambda found: (found.clear(), found.update(other)), monkeypatch)
        with pytest.raises(UserError) as caught:
            load(path)
        said = (str(path / "0"), f"format {number}", f"padim_jax {version}", "reads format 5")
        for part in said:
            assert part in str(caught.value)
        with pytest.raises(UserError, match=f"format {number} "):
            checkpoint.load_unfinished(path, ONE)

    @pytest.mark.parametrize(
        "keys",
        [
            ("format",),
            ("regions",),
            ("unfinished",),
            ("sha256",),
            ("config",),
            ("config", "model"),
            ("config", "image", "crop"),
            ("weights",),
            ("weights", "sha256"),
        ],
    )
    def test_missing_metadata(
        self, keys: tuple[str, ...], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        def remove(metadata):
            for key in keys[:-1]:
                metadata = metadata[key]
            del metadata[keys[-1]]

        path = tmp_path / "checkpoint"
        save_altered(path, remove, monkeypatch)
        with pytest.raises(UserError) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path / '0'}: ")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *(("regions", value) for value in (0, -1, 5, 7, 6.0, 10**12, "6", None, [6])),
            *(("unfinished", value) for value in ("train", 1)),
            *(("weights", value) for value in ({"sha256": 7}, [], None)),
            ("version", "0.0.1"),
            ("config", {"batch_size": 4}),
            ("sha256", "0" * 64),
        ],
    )
    def test_edited_metadata(self, key: str, value: Any, tmp_path: pathlib.Path):
        path = tmp_path / "checkpoint"
        save(path, make_fitted())
        for file in (path / "0").iterdir():
            if file.is_file() and '"sha256"' in file.read_text():
                said = json.loads(file.read_text())
                edited = {"custom_metadata": {key: value}}
                file.write_text(json.dumps(merged(said, edited)))
        # As what it is now called.
        function = checkpoint.load_unfinished if key == "unfinished" else checkpoint.load
        with pytest.raises(UserError) as caught:
            function(path, ONE)
        assert str(caught.value).startswith(f"{path / '0'}: the checkpoint is broken")

    def test_without_metadata(self, tmp_path: pathlib.Path):
        """One step of Orbax's own beside ours, which would be the newest."""
        path = tmp_path / "checkpoint"
        save(path, make_fitted())
        ocp.save(str(path / "1"), {"values_0": np.zeros((6, 3))})
        before = content(path)
        for function in (
            load,
            lambda path: checkpoint.load_unfinished(path, ONE),
            lambda path: save(path, make_fitted(1)),
        ):
            with pytest.raises(UserError) as caught:
                function(path)
            assert str(path) in str(caught.value)
            assert content(path) == before

    def test_missing_file(self, tmp_path: pathlib.Path):
        """Whichever: an error that says so, or no harm done."""
        path, fitted = tmp_path / "checkpoint", make_fitted(form="samples", unfinished="train")
        save(path, fitted)
        refused = []
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            file.rename(tmp_path / "aside")
            try:
                found = checkpoint.load_unfinished(path, ONE)
                assert found is not None, file
                assert same(found, fitted), file
            except UserError as error:
                refused.append(str(error))
            (tmp_path / "aside").rename(file)
        assert len(refused) >= 3
        assert all(message.startswith(f"{path / '0'}: ") for message in refused)

    def test_truncated(self, tmp_path: pathlib.Path):
        """Whichever file is cut short: an error that says so, or no harm done."""
        path, fitted = tmp_path / "checkpoint", make_fitted()
        save(path, fitted)
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        refused = {}
        for file in files:
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2])
            try:
                assert same(load(path), fitted), file
            except UserError as error:
                refused[file] = str(error)
            file.write_bytes(whole)
        assert all(message.startswith(f"{path / '0'}: ") for message in refused.values())
        # Numbers among them; of some descriptions Orbax has copies, and reads only one.
        assert any(file.parent.name == "d" for file in refused)
        assert path / "0" / "_CHECKPOINT_METADATA" in refused
        assert same(load(path), fitted)

    def test_torn_by_a_power_cut(
        self, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
    ):
        """The save before it is there until the disk has the new one: it goes on from there."""
        path = tmp_path / "checkpoint"
        earlier, torn = (make_fitted(seed, unfinished="train") for seed in (1, 2))
        save(path, earlier)
        save(tmp_path / "other", torn)
        (tmp_path / "other" / "0").rename(path / "1")
        for file in (path / "1" / "state").rglob("*"):
            if file.is_file():
                file.write_bytes(bytes(file.stat().st_size))
        found = checkpoint.load_unfinished(path, ONE)
        assert found is not None
        assert same(found, earlier)
        assert "Going back to what was saved before it" in capsys.readouterr().out
        # Without one before it there is nothing to go back to.
        shutil.rmtree(path / "0")
        with pytest.raises(UserError, match="the checkpoint is broken"):
            checkpoint.load_unfinished(path, ONE)

    def test_flipped_bits(self, tmp_path: pathlib.Path):
        """Wherever a bit flips: an error that names the checkpoint, or no harm done.

        Of both forms, and in more places: `test_checkpoints` in tests/reliability.
        """
        path, fitted = tmp_path / "checkpoint", make_fitted()
        save(path, fitted)
        rng, refused = np.random.default_rng(0), []
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            whole = file.read_bytes()
            for place in rng.integers(len(whole), size=min(len(whole), 2)):
                broken = bytearray(whole)
                broken[place] ^= 1
                file.write_bytes(broken)
                try:
                    assert same(load(path), fitted), (file, place)
                except UserError as error:
                    refused.append(str(error))
            file.write_bytes(whole)
        assert refused
        assert all(message.startswith(f"{path / '0'}: ") for message in refused)
        assert same(load(path), fitted)


class TestDevices:
    """Saved on some devices, loaded on others: "two levels" has 6 regions."""

    @pytest.mark.parametrize(
        ("writers", "readers", "form"),
        [(8, 1, "moments"), (8, 3, "samples"), (1, 8, "samples"), (4, 5, "moments")],
    )
    def test_bit_for_bit_and_no_more_than_its_share(
        self, writers: int, readers: int, form: str, tmp_path: pathlib.Path
    ):
        here, there = Devices(writers), Devices(readers)
        fitted = make_fitted(form=form, devices=here)
        identity = checkpoint.save(tmp_path / "checkpoint", fitted, here)
        loaded, found = checkpoint.load(tmp_path / "checkpoint", there)
        assert found == identity
        assert same(loaded, fitted)
        expected: Any = make_fitted(form=form, devices=there)
        leaves = zip(
            *map(jax.tree.leaves, (loaded.statistics, expected.statistics)), strict=True
        )
        for leaf, wanted in leaves:
            # The regions on top as well, to which a fit goes on to add.
            np.testing.assert_array_equal(leaf, wanted)
            assert leaf.sharding.device_set == wanted.sharding.device_set
            shards = [shard.data.shape for shard in leaf.addressable_shards]
            assert shards == [(1, *wanted.shape[1:])] * readers

    def test_works_as_before(self, tmp_path: pathlib.Path):
        """What was loaded serves the functions that are mapped over its devices."""
        fitted = make_fitted(devices=Devices(8))
        checkpoint.save(tmp_path / "checkpoint", fitted, Devices(8))
        loaded, _ = checkpoint.load(tmp_path / "checkpoint", Devices(4))
        found, expected = (
            parallel.join(jax.tree.leaves(statistics_lib.finalize(x.statistics, 0.01)), 6)
            for x in (loaded, fitted)
        )
        # XLA factorises batches of other sizes in another order of sums.
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    def test_no_host_array_of_more_than_a_share(
        self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Neither saving nor loading makes one: the largest that JAX takes or gives."""
        sizes: list[int] = []
        put, asarray = jax.device_put, np.asarray

        def watched(function):
            def call(x, *args, **kwargs):
                result = function(x, *args, **kwargs)
                for each in (x, result):
                    sizes.extend([each.nbytes] if isinstance(each, np.ndarray) else [])
                return result

            return call

        devices = Devices(8)
        shapes = [(64, 4, 8), (64, 1, 16)]
        fitted = make_fitted(statistics=gaussian.init(shapes), devices=devices)
        largest = max(x.nbytes for x in jax.tree.leaves(fitted.statistics))
        with monkeypatch.context() as patch:
            patch.setattr(jax, "device_put", watched(put))
            patch.setattr(np, "asarray", watched(asarray))
            patch.setattr(np, "array", watched(np.array))
            checkpoint.save(tmp_path / "checkpoint", fitted, devices)
            written = max(sizes)
            sizes.clear()
            checkpoint.load(tmp_path / "checkpoint", devices)
        assert largest / 8 <= written <= largest / 4
        assert sizes
        assert max(sizes) <= largest / 4

    def test_processes(self, tmp_path: pathlib.Path):
        """Written and read by two processes of two devices, and read by this one."""
        port = free_port()
        call = f"import {__name__} as here; here.save_and_load({str(tmp_path)!r}"
        children = [start(f"{call}, {i}, {port})", devices=2) for i in range(2)]
        for each in children:
            _, errors = each.communicate(timeout=100)
            assert each.returncode == 0, errors
        for form in FORMS:
            assert same(load(tmp_path / form), make_fitted(1, form=form))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def save_and_load(folder: str, process: int, port: int) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
    devices = parallel.every()
    for form in FORMS:
        for seed in (0, 1):
            wanted = make_fitted(seed, form=form, devices=devices)
            checkpoint.save(pathlib.Path(folder) / form, wanted, devices)
        found = checkpoint.load(pathlib.Path(folder) / form, devices)[0]
        np.testing.assert_array_equal(found.images, wanted.images)
        for a, b in zip(*(jax.tree.leaves(x.statistics) for x in (found, wanted)), strict=True):
            assert a.shape == b.shape
            np.testing.assert_array_equal(a, b)


# Every setting that the statistics depend on, with another value than the default.
DEPENDS = {
    "image.resize": (256, 224),
    "image.method": "nearest",
    "image.crop": (224, 224),
    "image.mean": (0.5, 0.5, 0.5),
    "image.std": (0.5, 0.5, 0.5),
    "model.backbone": "resnet34",
    "model.layers": ("layer1", "layer2"),
    "model.channels": 5,
    "model.seed": 43,
    "model.precision": "float32",
    "model.regularization": 0.02,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint whose backbone weights can be had."""
    _, weights = pretrained.load("random", "resnet18", make_config().model.layers)
    path = tmp_path_factory.mktemp("whole") / "checkpoint"
    save(path, make_fitted(weights=weights, statistics=make_moments(make_config())))
    return path


class TestWholeDetector:
    def test_needs_no_dataset(self, whole: pathlib.Path):
        loaded = padim_jax.load(whole)
        assert not loaded.config.dataset.root.exists()
        np.testing.assert_array_equal(loaded.index, make_fitted().index)
        expected = make_moments(make_config())
        assert same_arrays(
            parallel.join(loaded.gaussian.mean, len(expected.mean[0])), expected.mean
        )

    @pytest.mark.parametrize("name", DEPENDS)
    def test_another_setting_is_refused(self, name: str, whole: pathlib.Path):
        wanted = make_config(**{name: DEPENDS[name]})
        group, field = name.split(".")
        theirs, ours = (getattr(getattr(c, group), field) for c in (make_config(), wanted))
        with pytest.raises(UserError) as caught:
            loading.load(whole, wanted)
        for part in (f"config.{name}={ours}", str(whole), str(theirs)):
            assert part in str(caught.value)

    def test_settings_that_matter_only_now_are_taken(self, whole: pathlib.Path):
        wanted = make_config(
            **{
                "category": "screw",
                "batch_size": 7,
                "map.sigma": 2.0,
                "map.upsample": "bicubic",
                "outputs.maps": "npy",
            }
        )
        assert loading.load(whole, wanted).config == wanted

    def test_weights_that_moved(self, tmp_path: pathlib.Path):
        """The file is named by its contents, and --weights tells where it is now."""
        variables, _ = pretrained.load("random", "resnet18", make_config().model.layers)
        tensors = {}
        for module, inner in variables["params"].items():
            convolutions = {"": inner} if "kernel" in inner else inner
            for name, conv in convolutions.items():
                stem = module.replace("_", ".") + (f".{name}" if name else "")
                stem = stem.replace("downsample", "downsample.0")
                tensors[f"{stem}.weight"] = conv["kernel"].transpose(3, 2, 0, 1)
                tensors[f"{stem}.bias"] = conv["bias"]
        np.savez(tmp_path / "was.npz", **tensors)
        config = make_config(**{"model.weights": str(tmp_path / "was.npz")})
        _, identity = pretrained.load(config.model.weights, "resnet18", config.model.layers)
        path = tmp_path / "checkpoint"
        fitted = make_fitted(config=config, weights=identity, statistics=make_moments(config))
        save(path, fitted)
        (tmp_path / "was.npz").rename(tmp_path / "is.npz")
        with pytest.raises(UserError) as caught:
            loading.load(path)
        for said in ("was.npz", identity.sha256[:12], "--weights"):
            assert said in str(caught.value)
        assert loading.load(path, weights=str(tmp_path / "is.npz")).weights == identity
        with pytest.raises(UserError, match="other weights"):
            loading.load(path, weights="random")

    def test_other_weights_are_refused(self, tmp_path: pathlib.Path):
        fitted = make_fitted(weights=WEIGHTS, statistics=make_moments(make_config()))
        save(tmp_path / "checkpoint", fitted)
        with pytest.raises(UserError) as caught:
            padim_jax.load(tmp_path / "checkpoint")
        _, found = pretrained.load("random", "resnet18", make_config().model.layers)
        for weights in (found, WEIGHTS):
            assert weights.origin in str(caught.value)
            assert weights.sha256[:12] in str(caught.value)
