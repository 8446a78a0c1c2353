"""Checkpoints: nothing is lost in them, by a crash while saving, or by saving over things."""

import dataclasses
import hashlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import patchwise
import pytest

import padim_jax
from padim_jax import checkpoint, defaults, detector, experiment, gaussian, low_rank
from padim_jax.checkpoint import Fitted, ocp
from padim_jax.config import Config, validate
from padim_jax.errors import UserError
from padim_jax.models import pretrained
from padim_jax.models.pretrained import WeightsIdentity
from padim_jax.types import Moments, Samples

CASE = patchwise.CASES["two levels"]  # of 6 channels
CHANNELS = 6
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
    images = 3 + seed
    statistics = detector.init(patchwise.lay(CASE).shapes, images, form)
    levels, _ = patchwise.random_levels(CASE, images, seed=seed)
    for batch in patchwise.batches(levels, [images]):
        statistics = UPDATE[form](statistics, *batch)
    return statistics


def make_fitted(
    seed: int = 0,
    config: Config | None = None,
    weights: WeightsIdentity = WEIGHTS,
    form: str = "moments",
) -> Fitted:
    index = np.array([7, 63, 0, 42, 3, 8], np.int64)
    return Fitted(config or make_config(), index, make_statistics(form, seed), weights)


def same_arrays(a: Any, b: Any) -> bool:
    x, y = ([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        p.dtype == q.dtype and p.shape == q.shape and p.tobytes() == q.tobytes()
        for p, q in zip(x, y, strict=True)
    )


def same(a: Fitted, b: Fitted) -> bool:
    return (a.config, a.weights) == (b.config, b.weights) and same_arrays(
        (a.index, a.statistics), (b.index, b.statistics)
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
    save = ocp.save

    def altered(*args, custom_metadata, **kwargs):
        alter(custom_metadata)
        save(*args, custom_metadata=custom_metadata, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp, "save", altered)
        checkpoint.save(path, make_fitted())


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

        fitted = make_fitted(form=form)
        fitted = dataclasses.replace(
            fitted, statistics=jax.tree.map(changed, fitted.statistics)
        )
        checkpoint.save(tmp_path / "checkpoint", fitted)
        assert same(checkpoint.load(tmp_path / "checkpoint"), fitted)

    @both_forms
    def test_gives_the_same_gaussians(self, form: str, tmp_path: pathlib.Path):
        fitted = make_fitted(form=form)
        checkpoint.save(tmp_path / "checkpoint", fitted)
        loaded = checkpoint.load(tmp_path / "checkpoint")
        assert same_arrays(
            detector.finalize(loaded.statistics, 0.01),
            detector.finalize(fitted.statistics, 0.01),
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
            fitted = dataclasses.replace(
                make_fitted(), statistics=jax.tree.unflatten(structure, filled)
            )
            checkpoint.save(tmp_path / "checkpoint", fitted)
            assert same(checkpoint.load(tmp_path / "checkpoint"), fitted)

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
            detector.init(shapes, images, form),
        )
        fitted = dataclasses.replace(make_fitted(), statistics=statistics)
        checkpoint.save(tmp_path / "checkpoint", fitted)
        files = (tmp_path / "checkpoint").rglob("*")
        size = sum(file.stat().st_size for file in files if file.is_file())
        # Beside them descriptions and the configuration; measured 5,200.
        assert size < 4 * numbers + 20_000

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
        checkpoint.save(tmp_path / "checkpoint", fitted)
        assert checkpoint.load(tmp_path / "checkpoint").config == fitted.config

    def test_from_another_folder(self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        checkpoint.save(pathlib.Path("checkpoint"), make_fitted())
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir("elsewhere")
        assert same(checkpoint.load("../checkpoint"), make_fitted())


class Crash(BaseException):
    """What no handler for errors would catch, as the end of a process is none."""


def crash(step: str, folder: pathlib.Path, patch: pytest.MonkeyPatch) -> None:
    """Lets the next `checkpoint.save` below `folder` end at one of its steps."""
    save, rename, rmtree = ocp.save, pathlib.Path.rename, checkpoint.shutil.rmtree
    renames = []

    def fail(*args, **kwargs):
        raise Crash

    def save_and_fail(*args, **kwargs):
        save(*args, **kwargs)
        raise Crash

    def rename_or_fail(path, target):
        if path.parent == folder:
            renames.append(path)
            if step == f"rename {len(renames)}":
                raise Crash
        return rename(path, target)

    def remove_or_fail(path, *args, **kwargs):
        if pathlib.Path(path).parent == folder:
            raise Crash
        return rmtree(path, *args, **kwargs)

    if step == "before writing":
        patch.setattr(ocp, "save", fail)
    elif step == "after writing":
        patch.setattr(ocp, "save", save_and_fail)
    elif step == "clean-up":
        patch.setattr(checkpoint.shutil, "rmtree", remove_or_fail)
    else:
        patch.setattr(pathlib.Path, "rename", rename_or_fail)


class TestReplace:
    def test_replaces_and_leaves_nothing_behind(self, tmp_path: pathlib.Path):
        for form, seed in zip(["moments", "samples", "moments"], range(3), strict=True):
            fitted = make_fitted(seed, form=form)
            checkpoint.save(tmp_path / "checkpoint", fitted)
            assert same(checkpoint.load(tmp_path / "checkpoint"), fitted)
            assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]

    @pytest.mark.parametrize(
        ("step", "survivor"),
        [
            ("before writing", "old"),
            ("after writing", "old"),
            ("rename 1", "old"),
            ("rename 2", "old, renamed"),
            ("clean-up", "new"),
        ],
    )
    @both_forms
    def test_crash_while_replacing(
        self,
        form: str,
        step: str,
        survivor: str,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        path, old = tmp_path / "checkpoint", tmp_path / "checkpoint.old"
        first, second, third = (make_fitted(seed, form=form) for seed in (0, 1, 2))
        checkpoint.save(path, first)
        with monkeypatch.context() as patch:
            crash(step, tmp_path, patch)
            with pytest.raises(Crash):
                checkpoint.save(path, second)

        if survivor == "old, renamed":
            with pytest.raises(UserError) as caught:
                checkpoint.load(path)
            assert f"Rename {old} to checkpoint" in str(caught.value)
            assert same(checkpoint.load(old), first)
        else:
            assert same(checkpoint.load(path), first if survivor == "old" else second)

        # Saving goes on where it can without deleting a complete checkpoint unasked.
        if survivor == "new":
            with pytest.raises(UserError, match=r"checkpoint\.old: in the way"):
                checkpoint.save(path, third)
            assert same(checkpoint.load(path), second)
        else:
            checkpoint.save(path, third)
            assert same(checkpoint.load(path), third)
        if survivor != "old":
            assert same(checkpoint.load(old), first)

    def test_link_to_another_disk(self, tmp_path: pathlib.Path):
        target = tmp_path / "disk" / "model"
        target.parent.mkdir()
        checkpoint.save(target, make_fitted(0))
        link = tmp_path / "checkpoint"
        link.symlink_to(target)
        for seed in (1, 2):
            checkpoint.save(link, make_fitted(seed))
            assert link.is_symlink()
            assert same(checkpoint.load(target), make_fitted(seed))


class TestSaving:
    """What `saving`'s block does while the checkpoint is written, but not yet in place."""

    @pytest.mark.parametrize("error", [ValueError, UserError, KeyboardInterrupt, Crash])
    def test_error_leaves_the_old_checkpoint(
        self, error: type[BaseException], tmp_path: pathlib.Path
    ):
        checkpoint.save(tmp_path / "checkpoint", make_fitted(0))
        before = content(tmp_path)
        with pytest.raises(error), checkpoint.saving(tmp_path / "checkpoint", make_fitted(1)):
            raise error
        assert content(tmp_path) == before

    def test_error_leaves_nothing(self, tmp_path: pathlib.Path):
        with pytest.raises(Crash), checkpoint.saving(tmp_path / "checkpoint", make_fitted()):
            raise Crash
        assert list(tmp_path.iterdir()) == []

    def test_replaces_at_the_end(self, tmp_path: pathlib.Path):
        checkpoint.save(tmp_path / "checkpoint", make_fitted(0))
        with checkpoint.saving(tmp_path / "checkpoint", make_fitted(1)):
            assert same(checkpoint.load(tmp_path / "checkpoint"), make_fitted(0))
            # All of it is there: an end of the process now would lose nothing.
            assert same(checkpoint.load(tmp_path / "checkpoint.new"), make_fitted(1))
        assert same(checkpoint.load(tmp_path / "checkpoint"), make_fitted(1))
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]

    @both_forms
    def test_block_may_use_the_statistics_up(self, form: str, tmp_path: pathlib.Path):
        fitted = make_fitted(form=form)
        statistics: Any = fitted.statistics
        places = [
            x.unsafe_buffer_pointer()
            for x in jax.tree.leaves(statistics.m2 if form == "moments" else statistics.values)
        ]
        with checkpoint.saving(tmp_path / "checkpoint", fitted):
            ready: Any = detector.finalize(statistics, 0.01)
        # The result is where the statistics were: neither was copied to keep a view of it.
        kept = jax.tree.leaves(ready.factor if form == "moments" else ready.deviations)
        assert [x.unsafe_buffer_pointer() for x in kept] == places
        assert same(checkpoint.load(tmp_path / "checkpoint"), make_fitted(form=form))


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


class TestNothingElseIsOverwritten:
    @pytest.mark.parametrize(
        ("make", "place"),
        [(make, "checkpoint") for make in OTHERS]
        + [(folder_of_files, "checkpoint.new"), (folder_of_files, "checkpoint.old")],
    )
    def test_refused_and_untouched(self, make, place: str, tmp_path: pathlib.Path):
        if place != "checkpoint":
            checkpoint.save(tmp_path / "checkpoint", make_fitted(0))
        make(tmp_path / place)
        before = content(tmp_path)
        for function in (
            lambda path: checkpoint.save(path, make_fitted(1)),
            checkpoint.check_destination,
        ):
            with pytest.raises(UserError) as caught:
                function(tmp_path / "checkpoint")
            assert str(caught.value).startswith(f"{tmp_path / place}: ")
            assert content(tmp_path) == before

    def test_a_backup_is_kept(self, tmp_path: pathlib.Path):
        # Where else would one put it?
        checkpoint.save(tmp_path / "checkpoint.old", make_fitted(0))
        checkpoint.save(tmp_path / "checkpoint", make_fitted(1))
        assert same(checkpoint.load(tmp_path / "checkpoint.old"), make_fitted(0))
        with pytest.raises(UserError, match=r"checkpoint\.old: in the way"):
            checkpoint.save(tmp_path / "checkpoint", make_fitted(2))
        assert same(checkpoint.load(tmp_path / "checkpoint.old"), make_fitted(0))
        assert same(checkpoint.load(tmp_path / "checkpoint"), make_fitted(1))


class TestLoadingFails:
    def test_absent(self, tmp_path: pathlib.Path):
        with pytest.raises(UserError, match="no such checkpoint; fit a model first") as caught:
            checkpoint.load(tmp_path / "checkpoint")
        assert str(tmp_path / "checkpoint") in str(caught.value)

    @pytest.mark.parametrize("make", OTHERS)
    def test_something_else(self, make, tmp_path: pathlib.Path):
        make(tmp_path / "checkpoint")
        with pytest.raises(UserError, match="is no checkpoint") as caught:
            checkpoint.load(tmp_path / "checkpoint")
        assert str(tmp_path / "checkpoint") in str(caught.value)

    @pytest.mark.parametrize(("number", "version"), [(1, "0.1.0"), (3, "9.9")])
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
            checkpoint.load(path)
        for part in (str(path), f"format {number}", f"padim_jax {version}", "reads format 2"):
            assert part in str(caught.value)

    @pytest.mark.parametrize(
        "keys",
        [
            ("format",),
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
            checkpoint.load(path)
        assert str(path) in str(caught.value)

    # Orbax leaves exceptions of its background tasks unretrieved.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @both_forms
    def test_truncated(self, form: str, tmp_path: pathlib.Path):
        """Whichever file is cut short: an error that says so, or no harm done."""
        path, fitted = tmp_path / "checkpoint", make_fitted(form=form)
        checkpoint.save(path, fitted)
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        refused = {}
        for file in files:
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2])
            try:
                assert same(checkpoint.load(path), fitted), file
            except UserError as error:
                refused[file] = str(error)
            file.write_bytes(whole)
        assert all(str(path) in message for message in refused.values())
        assert max(files, key=lambda file: file.stat().st_size) in refused
        assert path / "_CHECKPOINT_METADATA" in refused
        assert same(checkpoint.load(path), fitted)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @both_forms
    def test_flipped_bits(self, form: str, tmp_path: pathlib.Path):
        """Wherever a bit flips: an error that names the checkpoint, or no harm done."""
        path, fitted = tmp_path / "checkpoint", make_fitted(form=form)
        checkpoint.save(path, fitted)
        rng, refused = np.random.default_rng(0), []
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            whole = file.read_bytes()
            for place in rng.integers(len(whole), size=min(len(whole), 8)):
                broken = bytearray(whole)
                broken[place] ^= 1
                file.write_bytes(broken)
                try:
                    assert same(checkpoint.load(path), fitted), (file, place)
                except UserError as error:
                    refused.append(str(error))
            file.write_bytes(whole)
        assert refused
        assert all(str(path) in message for message in refused)
        assert same(checkpoint.load(path), fitted)


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
    checkpoint.save(path, make_fitted(weights=weights))
    return path


class TestWholeDetector:
    def test_needs_no_dataset(self, whole: pathlib.Path):
        loaded = padim_jax.load(whole)
        assert not loaded.config.dataset.root.exists()
        np.testing.assert_array_equal(loaded.index, make_fitted().index)
        expected: Any = make_fitted().statistics
        assert same_arrays(loaded.gaussian.mean, expected.mean)

    @pytest.mark.parametrize("name", DEPENDS)
    def test_another_setting_is_refused(self, name: str, whole: pathlib.Path):
        wanted = make_config(**{name: DEPENDS[name]})
        group, field = name.split(".")
        theirs, ours = (getattr(getattr(c, group), field) for c in (make_config(), wanted))
        with pytest.raises(UserError) as caught:
            experiment.load(whole, wanted)
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
        assert experiment.load(whole, wanted).config == wanted

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
        checkpoint.save(path, make_fitted(config=config, weights=identity))
        (tmp_path / "was.npz").rename(tmp_path / "is.npz")
        with pytest.raises(UserError) as caught:
            experiment.load(path)
        for said in ("was.npz", identity.sha256[:12], "--weights"):
            assert said in str(caught.value)
        assert experiment.load(path, weights=str(tmp_path / "is.npz")).weights == identity
        with pytest.raises(UserError, match="other weights"):
            experiment.load(path, weights="random")

    def test_other_weights_are_refused(self, tmp_path: pathlib.Path):
        checkpoint.save(tmp_path / "checkpoint", make_fitted(weights=WEIGHTS))
        with pytest.raises(UserError) as caught:
            padim_jax.load(tmp_path / "checkpoint")
        _, found = pretrained.load("random", "resnet18", make_config().model.layers)
        for weights in (found, WEIGHTS):
            assert weights.origin in str(caught.value)
            assert weights.sha256[:12] in str(caught.value)
