"""Model files: nothing is lost or mistaken, any program can map them, nothing is computed.

Runs on virtual CPU devices, of which `conftest.py` asks for eight.
"""

import dataclasses
import json
import os
import pathlib
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import patchwise
import pytest
import safetensors.numpy

import padim_jax
from padim_jax.config import defaults
from padim_jax.config.settings import Config, validate
from padim_jax.core import gaussian, low_rank
from padim_jax.core.types import Gaussian, LowRank
from padim_jax.data import dataset_splits
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.layouts.synthetic import generate
from padim_jax.detector import detector
from padim_jax.detector import statistics as statistics_lib
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import UserError
from padim_jax.models.weights.identity import WeightsIdentity
from padim_jax.runs import evaluate, export, fitting, loading
from padim_jax.store import model_file, validation
from padim_jax.store.model_file import Model

FORMS = {"moments": Gaussian, "samples": LowRank}
both_forms = pytest.mark.parametrize("form", FORMS)
CASE = patchwise.CASES["three levels"]
REGIONS = patchwise.lay(CASE).shapes[0][0]
ONE = Devices(1)


def make_config(**settings: Any) -> Config:
    values = defaults.get_config()
    base = {"dataset.root": "/nowhere/to be found/Teile ü", "model.weights": "random"}
    values.update_from_flattened_dict(base | settings)
    return validate(values)


def make_fitted(form: str, devices: Devices = ONE) -> Gaussian | LowRank:
    shapes, images = patchwise.lay(CASE).shapes, 5
    levels, _ = patchwise.random_levels(CASE, images)
    (batch,) = patchwise.batches(levels, [images])
    statistics: Any
    if form == "moments":
        statistics = jax.jit(gaussian.update)(gaussian.init(shapes), *batch)
    else:
        statistics = jax.jit(low_rank.update)(low_rank.init(shapes, images), *batch)
    return statistics_lib.finalize(parallel.split(statistics, devices), 0.01)


def save(path: pathlib.Path, model: Model, regions: int = REGIONS) -> None:
    model_file.save(path, model, regions)


def load(path: pathlib.Path) -> Model:
    return model_file.load(path, ONE)


def make_model(fitted: Gaussian | LowRank, half: bool) -> Model:
    comparison = {"images": 7, "exact": {"aupro": 1 / 3, "image_ap": None}, "change": 1e-5}
    return Model(
        make_config(),
        np.array([7, 63, 0, 42, 3, 8, 300, 9, 10], np.int64),
        model_file.rounded(fitted) if half else fitted,
        WeightsIdentity("huggingface.co/timm/ä b", "0123456789abcdef" * 4),
        "fedcba9876543210" * 4 + (" in float16" if half else ""),
        np.arange(5 * 32, dtype=np.uint8).reshape(5, 32),
        half,
        comparison if half else None,
    )


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, bool], Model]:
    """Of both forms the exact file's and the half-size one's."""
    return {
        (form, half): make_model(fitted, half)
        for form, fitted in ((form, make_fitted(form)) for form in FORMS)
        for half in (False, True)
    }


@pytest.fixture(scope="module", params=[(f, h) for f in FORMS for h in (False, True)], ids=str)
def model(request: pytest.FixtureRequest, models: dict[tuple[str, bool], Model]) -> Model:
    return models[request.param]


def same_arrays(a: Any, b: Any) -> bool:
    x, y = ([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        p.dtype == q.dtype and p.shape == q.shape and p.tobytes() == q.tobytes()
        for p, q in zip(x, y, strict=True)
    )


def same(a: Model, b: Model) -> bool:
    def rest(model: Model) -> tuple:
        return (model.config, model.weights, model.identity, model.half, model.comparison)

    return rest(a) == rest(b) and same_arrays((a.index, a.fitted), (b.index, b.fitted))


def on_host(fitted: Gaussian | LowRank) -> Any:
    """Of all regions."""
    leaves, structure = jax.tree.flatten(fitted)
    return structure.unflatten(map(jnp.asarray, parallel.join(leaves, REGIONS)))


def header(path: pathlib.Path) -> tuple[dict[str, Any], int]:
    """The header as the format's description has it, and where the data begin."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


class TestRoundTrip:
    def test_bit_for_bit(self, model: Model, tmp_path: pathlib.Path):
        save(tmp_path / "a.safetensors", model)
        assert same(load(tmp_path / "a.safetensors"), model)

    def test_values_that_text_or_rounding_would_change(
        self, models: dict, tmp_path: pathlib.Path
    ):
        model = models["moments", False]
        values = np.array(model.fitted.mean[0])
        values.flat[:5] = [-0.0, 1e-42, np.finfo(np.float32).max, np.pi, 1 / 3]
        mean = (jnp.asarray(values), *model.fitted.mean[1:])
        model = dataclasses.replace(model, fitted=dataclasses.replace(model.fitted, mean=mean))
        save(tmp_path / "a.safetensors", model)
        assert same(load(tmp_path / "a.safetensors"), model)

    def test_replaces(self, models: dict, tmp_path: pathlib.Path):
        path = tmp_path / "a.safetensors"
        for model in models.values():
            save(path, model)
            assert same(load(path), model)
            assert list(tmp_path.iterdir()) == [path]

    def test_what_a_link_leads_to_is_replaced(self, models: dict, tmp_path: pathlib.Path):
        (tmp_path / "elsewhere").mkdir()
        place, link = tmp_path / "elsewhere" / "b.safetensors", tmp_path / "a.safetensors"
        link.symlink_to(place)
        for form in FORMS:
            save(link, models[form, False])
            assert link.is_symlink()
            assert same(load(place), models[form, False])

    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
    def test_permissions_follow_the_umask(
        self, umask: int, mode: int, models: dict, tmp_path: pathlib.Path
    ):
        before = os.umask(umask)
        try:
            save(tmp_path / "a.safetensors", models["samples", False])
        finally:
            os.umask(before)
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("count", [2, 3, 4, 8])
@both_forms
class TestDevices:
    """Which of them wrote a file makes no difference, and none has more than its share."""

    def test_loaded_onto(
        self, count: int, form: str, models: dict[tuple[str, bool], Model], tmp_path
    ):
        for half in (False, True):
            model, devices = models[form, half], Devices(count)
            save(tmp_path / "a", model)
            loaded = model_file.load(tmp_path / "a", devices)
            expected = parallel.split(on_host(model.fitted), devices)
            assert same(loaded, dataclasses.replace(model, fitted=expected))
            for leaf, wanted in zip(
                *map(jax.tree.leaves, (loaded.fitted, expected)), strict=True
            ):
                assert leaf.sharding.device_set == wanted.sharding.device_set
                shapes = [shard.data.shape for shard in leaf.addressable_shards]
                assert shapes == [(1, *wanted.shape[1:])] * count

    def test_saved_from(self, count: int, form: str, models: dict, tmp_path: pathlib.Path):
        for half in (False, True):
            model, devices = models[form, half], Devices(count)
            spread = parallel.split(on_host(model.fitted), devices)
            spread = dataclasses.replace(model, fitted=spread)
            save(tmp_path / "a", spread)
            save(tmp_path / "b", model)
            assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


class TestHalf:
    @both_forms
    def test_what_is_rounded(self, form: str, models: dict):
        """To float16 all that is large, in float32; nothing else."""
        exact, half = models[form, False].fitted, models[form, True].fitted
        large = ["factor"] if form == "moments" else ["deviations", "root"]
        for field in dataclasses.fields(exact):
            before, after = getattr(exact, field.name), getattr(half, field.name)
            if field.name in large:
                expected = jax.tree.map(
                    lambda x: np.asarray(x).astype(np.float16).astype(np.float32), before
                )
                assert not same_arrays(before, after)
                assert same_arrays(expected, after)
            else:
                assert same_arrays(before, after)

    def test_size(self, tmp_path: pathlib.Path):
        """Half, but for means, index and header: here of 64 patches of 40 channels."""
        rng = np.random.default_rng(0)
        mean = jnp.asarray(rng.normal(size=(1, 64, 1, 40)), jnp.float32)
        factor = jnp.asarray(rng.normal(size=(1, 64, 1, 40, 40)), jnp.float32)
        sizes = []
        for half in (False, True):
            save(tmp_path / "a", make_model(Gaussian((mean,), ((factor,),)), half), 64)
            sizes.append((tmp_path / "a").stat().st_size)
        aside = mean.nbytes + 4000
        assert factor.nbytes < sizes[0] < factor.nbytes + aside
        assert factor.nbytes / 2 < sizes[1] < factor.nbytes / 2 + aside

    def test_small_numbers_are_kept(self, models: dict, tmp_path: pathlib.Path):
        """Float16 has numbers down to 6e-8; processors may take those below 6e-5 for 0."""
        model = models["samples", True]
        assert isinstance(model.fitted, LowRank)
        root = jnp.full(model.fitted.root.shape, 1e-6, jnp.float32)
        fitted: Any = model_file.rounded(dataclasses.replace(model.fitted, root=root))
        np.testing.assert_allclose(fitted.root, 1e-6, rtol=0.03)
        model = dataclasses.replace(model, fitted=fitted)
        save(tmp_path / "a", model)
        assert same(load(tmp_path / "a"), model)

    @both_forms
    def test_too_large(self, form: str, models: dict):
        fitted = models[form, False].fitted
        field = "factor" if form == "moments" else "root"
        large = jax.tree.map(lambda x: x * 1e5, getattr(fitted, field))
        with pytest.raises(ValueError, match="numbers above 65504 do not fit float16"):
            model_file.rounded(dataclasses.replace(fitted, **{field: large}))


class TestFormat:
    def test_arrays_can_be_mapped(self, model: Model, tmp_path: pathlib.Path):
        """By any program: from the 8 bytes of length, the JSON header, raw arrays."""
        path = tmp_path / "a.safetensors"
        save(path, model)
        entries, start = header(path)
        described = json.loads(entries.pop("__metadata__")["padim_jax"])
        assert described["format"] == "padim_jax model 4"
        assert described["version"] == padim_jax.__version__
        assert described["half"] is model.half
        names = {"U8": "<u1", "I64": "<i8", "F32": "<f4", "F16": "<f2"}
        types = {name: np.dtype(dtype) for name, dtype in names.items()}
        mapped = {}
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            dtype = types[entry["dtype"]]
            # Aligned, so that numbers can be used where they lie.
            assert (start + first) % dtype.itemsize == 0
            mapped[name] = np.memmap(path, dtype, "r", start + first, tuple(entry["shape"]))
            assert mapped[name].nbytes == last - first
        fitted = on_host(model.fitted)
        expected = {"index": model.index, "images": model.images}
        expected |= {f"mean_{i}": np.asarray(x) for i, x in enumerate(fitted.mean)}
        if isinstance(model.fitted, Gaussian):
            large = {
                f"factor_{i}_{j}": x
                for i, row in enumerate(fitted.factor)
                for j, x in enumerate(row)
            }
        else:
            expected["regularization"] = np.asarray(fitted.regularization)
            large = {f"deviations_{i}": x for i, x in enumerate(fitted.deviations)}
            large["root"] = fitted.root
        half = np.float16 if model.half else np.float32
        expected |= {name: np.asarray(x).astype(half) for name, x in large.items()}
        assert set(mapped) == set(expected)
        for name, array in expected.items():
            # A scalar is mapped as one number.
            assert mapped[name].dtype == array.dtype
            assert mapped[name].tobytes() == array.tobytes(), name


def flips(content: bytes) -> Iterator[tuple[int, int]]:
    """Every byte of the header's length and braces, and many others."""
    rng = np.random.default_rng(0)
    (length,) = struct.unpack("<Q", content[:8])
    places = [*range(16), *range(length, length + 16), len(content) - 1]
    places += rng.integers(8, 8 + length, 100).tolist()
    places += rng.integers(8 + length, len(content), 20).tolist()
    for place in places:
        yield place, int(rng.integers(8))


class TestBroken:
    def refuse(self, path: pathlib.Path) -> str:
        with pytest.raises(UserError) as caught:
            load(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ")
        assert "--mode=export" in message or "padim_jax model" in message
        return message

    def test_flipped_bits(self, model: Model, tmp_path: pathlib.Path):
        path = tmp_path / "a.safetensors"
        save(path, model)
        whole, named, harmless = path.read_bytes(), 0, 0
        for place, bit in flips(whole):
            broken = bytearray(whole)
            broken[place] ^= 1 << bit
            path.write_bytes(broken)
            try:
                loaded = load(path)
            except UserError as error:
                named += str(error).startswith(f"{path}: ")
            else:  # as with 1e-05 and 1E-05 in the header, \u00fc and \u00FC
                assert same(loaded, model), (place, bit)
                harmless += 1
        assert named + harmless == len(list(flips(whole)))
        assert harmless <= 1
        path.write_bytes(whole)
        assert same(load(path), model)

    def test_truncated(self, models: dict, tmp_path: pathlib.Path):
        path = tmp_path / "a.safetensors"
        save(path, models["samples", False])
        whole = path.read_bytes()
        _, start = header(path)
        for length in (0, 1, 7, 8, 9, start - 1, start, start + 5, len(whole) - 1):
            path.write_bytes(whole[:length])
            assert "no model file, or a broken one" in self.refuse(path)
        path.write_bytes(whole + b"\0")
        self.refuse(path)

    @pytest.mark.parametrize(
        "content", [b"", b"weights", b"A text, and a long one.\n" * 9, b"\0" * 64], ids=range(4)
    )
    def test_other_files(self, content: bytes, tmp_path: pathlib.Path):
        (tmp_path / "a.safetensors").write_bytes(content)
        self.refuse(tmp_path / "a.safetensors")

    @pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
    def test_a_safetensors_file_of_others(self, metadata: Any, tmp_path: pathlib.Path):
        path = tmp_path / "weights.safetensors"
        safetensors.numpy.save_file({"conv1.weight": np.zeros((2, 3))}, path, metadata)
        assert "a safetensors file, but no model of padim_jax" in self.refuse(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "padim_jax model 1", "version": "0.1"}, "'padim_jax model 1', .* 0.1;"),
            (
                {"format": "padim_jax model 99", "version": "9.8"},
                "'padim_jax model 99', .* 9.8;",
            ),
            ({"form": "Mixture"}, "no model file, or a broken one"),
            ({"weights": None}, "no model file, or a broken one"),
            ({"config": {"batch_size": 4}}, "broken one .*config"),
            ({"half": True}, "broken one .*not what was saved"),
        ],
    )
    def test_another_description(
        self, change: dict, message: str, models: dict, tmp_path: pathlib.Path
    ):
        """By a program that knows the format; the last one not the checksum."""
        path = tmp_path / "a.safetensors"
        save(path, models["samples", False])
        arrays = safetensors.numpy.load_file(path)
        described = json.loads(header(path)[0]["__metadata__"]["padim_jax"]) | change
        if "half" not in change:
            described["sha256"] = validation.digest(described, arrays)
        metadata = {"padim_jax": json.dumps(described)}
        safetensors.numpy.save_file(arrays, path, metadata)
        assert re.search(message, self.refuse(path))

    @pytest.mark.parametrize("header", ["[1]", "{}", "7", "{", '{"format": []}'])
    def test_no_description(self, header: str, tmp_path: pathlib.Path):
        path = tmp_path / "a.safetensors"
        safetensors.numpy.save_file({"index": np.zeros(2)}, path, {"padim_jax": header})
        self.refuse(path)


class Crash(BaseException):
    """What no handler for errors would catch, as the end of a process is none."""


class TestWriting:
    @pytest.mark.parametrize("error", [Crash(), OSError(28, "No space left on device")])
    def test_what_was_there_stays(
        self,
        error: BaseException,
        models: dict,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        path = tmp_path / "a.safetensors"
        first, second = models["moments", False], models["samples", False]
        save(path, first)

        def write_a_part(arrays, place, metadata):
            pathlib.Path(place).write_bytes(b"part of")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(safetensors.numpy, "save_file", write_a_part)
            with pytest.raises((Crash, UserError)) as caught:
                save(path, second)
        assert same(load(path), first)
        if isinstance(caught.value, UserError):
            assert str(caught.value).startswith(f"{path}: cannot be written (")
            assert "No space left" in str(caught.value)
            assert list(tmp_path.iterdir()) == [path]
        # And what was left is in nobody's way.
        save(path, second)
        assert same(load(path), second)
        assert list(tmp_path.iterdir()) == [path]

    def test_the_librarys_own_error(
        self, models: dict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        def fail(*args):
            raise safetensors.SafetensorError("I/O error: File too large")

        monkeypatch.setattr(safetensors.numpy, "save_file", fail)
        with pytest.raises(UserError, match=r"a: cannot be written .*File too large"):
            save(tmp_path / "a", models["samples", False])
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("place", ["folder", "no folder/a", "file/a"])
    def test_no_such_place(self, place: str, models: dict, tmp_path: pathlib.Path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "file").write_text("mine")
        with pytest.raises(UserError, match=f"{place}: cannot be written"):
            save(tmp_path / place, models["samples", False])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


# With the experiment: a detector is fitted, exported, and loaded again.


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("synthetic")
    generate(folder, n_train=8, n_test_good=3, n_test_per_defect=1, size=72)
    return folder


@dataclasses.dataclass(frozen=True)
class Fit:
    """A detector as it is loaded from its checkpoint, and its test images."""

    detector: detector.Detector
    checkpoint: pathlib.Path
    test: FolderSource

    @property
    def images(self) -> list[Any]:
        return [record.image for record in self.test.records]


@pytest.fixture(scope="module")
def fits(root: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Fit]:
    found = {}
    for form in FORMS:
        config = make_config(
            **{
                "dataset.name": "mvtec_ad",
                "dataset.root": str(root),
                "category": "part",
                "image.resize": (64, 64),
                "model.layers": ("layer1",),
                "model.channels": 8,
                "model.statistics": form,
                "batch_size": 4,
                "outputs.figures": "none",
            }
        )
        dataset: Any = dataset_splits.open_dataset(config)
        place = tmp_path_factory.mktemp(form) / "checkpoint"
        fitting.train(config, dataset["train"], place)
        found[form] = Fit(loading.load(place), place, dataset["test"])
    return found


class TestExport:
    @both_forms
    @pytest.mark.parametrize("half", [False, True])
    def test_scores_are_the_exported_detectors(
        self,
        half: bool,
        form: str,
        fits: dict[str, Fit],
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        fit, path = fits[form], tmp_path / "new" / "model.safetensors"
        export.export(fit.detector, path, half, fit.test)
        exported = fit.detector
        if half:
            rounded = model_file.rounded(exported.gaussian)
            exported = dataclasses.replace(exported, gaussian=rounded)
        expected = detector.score(exported, fit.images)

        def refuse(*args):
            raise AssertionError("nothing is to be factorised")

        for module in (gaussian, low_rank, statistics_lib):
            monkeypatch.setattr(module, "finalize", refuse)
        loaded = padim_jax.load(str(path))
        assert isinstance(loaded.gaussian, FORMS[form])
        found = padim_jax.score(loaded, fit.images)
        np.testing.assert_array_equal(found.maps, expected.maps)
        np.testing.assert_array_equal(found.scores, expected.scores)
        assert loaded.config == fit.detector.config
        # A threshold found with the exact form is of no use for the other, and only for it.
        same_thresholds = detector.fingerprint(loaded) == detector.fingerprint(fit.detector)
        assert same_thresholds is not half

    def test_every_model_has_its_own_thresholds(
        self, fits: dict[str, Fit], tmp_path: pathlib.Path
    ):
        """The exact file its checkpoint's, the half-size one none of another's."""
        found = {}
        for form, fit in fits.items():
            found[form] = {detector.fingerprint(loading.load(fit.checkpoint))}
            for half in (False, True):
                path = tmp_path / f"{form} {half}.safetensors"
                export.export(fit.detector, path, half, fit.test)
                found[form, half] = {detector.fingerprint(loading.load(path))}
            assert found[form] == found[form, False] != found[form, True]
        assert len(set.union(*found.values())) == 4

    def test_scores_on_other_devices(
        self, fits: dict[str, Fit], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        """Of one file, loaded by a program that has 4 devices."""
        for form, fit in fits.items():
            path = tmp_path / f"{form}.safetensors"
            export.export(fit.detector, path)
            expected = detector.score(fit.detector, fit.images)
            for count in (4,):
                with monkeypatch.context() as patch:
                    patch.setattr(parallel, "every", lambda count=count: Devices(count))
                    found = detector.score(loading.load(path), fit.images)
                # Images are batched otherwise: float32 sums in another order.
                np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-4)

    def test_both_kinds_as_text_or_path(self, fits: dict[str, Fit], tmp_path: pathlib.Path):
        fit, path = fits["samples"], tmp_path / "model.safetensors"
        export.export(fit.detector, path)
        expected = padim_jax.score(fit.detector, fit.images).scores
        for given in (path, str(path), fit.checkpoint, str(fit.checkpoint)):
            found = padim_jax.score(padim_jax.load(given), fit.images).scores
            np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("nowhere", "no such checkpoint; fit a model first"),
            ("model.safetensors", "no such checkpoint; fit a model first"),
            ("folder", "is no checkpoint; fit a model first"),
            ("notes.txt", "no model file, or a broken one"),
        ],
    )
    def test_neither_of_both(self, name: str, message: str, tmp_path: pathlib.Path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "notes.txt").write_text("To be done:\n" * 9)
        with pytest.raises(UserError, match=f"{name}: .*{message}"):
            padim_jax.load(str(tmp_path / name))

    @both_forms
    def test_comparison_is_of_what_is_exported(
        self,
        form: str,
        fits: dict[str, Fit],
        tmp_path: pathlib.Path,
        capsys: pytest.CaptureFixture[str],
    ):
        """Printed and stored, the metrics that evaluating both models gives."""
        fit, path = fits[form], tmp_path / "model.safetensors"
        export.export(fit.detector, path, half=True, test=fit.test)
        out = capsys.readouterr().out
        stored: Any = load(path).comparison
        assert stored["images"] == len(fit.test.records) == 7
        found = {"exact": fit.detector, "half": loading.load(path)}
        maps = {}
        for name, each in found.items():
            measured = evaluate.evaluate(each.config, each, fit.test, tmp_path / name)
            assert len(stored[name]) == 7
            for key, value in stored[name].items():
                assert value == measured[key], key
            maps[name] = detector.score(each, fit.images).maps
        for name, key in (("image AUROC", "image_auroc"), ("AUPRO 0.3", "aupro")):
            exact, half = stored["exact"][key], stored["half"][key]
            row = rf"^{name} +{exact:.4f} +{half:.4f} +{re.escape(f'{half - exact:+.4f}')}$"
            assert re.search(row, out, re.MULTILINE), out
        change = np.abs(maps["half"] - maps["exact"]).max() / maps["exact"].max()
        assert stored["largest_change_of_a_pixel"] == pytest.approx(change, rel=1e-6)
        # Float16 has 11 bits, so that products change by 2**-11 at most in one rounding;
        # sums of some may cancel. Measured: 1e-4 (moments), 2e-4 (samples).
        assert 0 < stored["largest_change_of_a_score"] < 2e-3
        assert 0 < stored["largest_change_of_a_pixel"] < 2e-3
        assert f"pixels by {change:.1e} of the largest" in out
        assert f"-> {path}" in out

    def test_exact_form_compares_nothing(
        self,
        fits: dict[str, Fit],
        tmp_path: pathlib.Path,
        capsys: pytest.CaptureFixture[str],
    ):
        path = tmp_path / "model.safetensors"
        export.export(fits["samples"].detector, path)
        assert load(path).comparison is None
        assert capsys.readouterr().out.count("\n") == 1

    @pytest.mark.parametrize("test", [None, FolderSource([])])
    def test_half_without_test_images(
        self, test: FolderSource | None, fits: dict[str, Fit], tmp_path: pathlib.Path
    ):
        with pytest.raises(UserError, match=r"--half: no test images"):
            export.export(fits["samples"].detector, tmp_path / "a", True, test)
        assert [path.name for path in tmp_path.iterdir()] == [".locks"]

    def test_half_of_numbers_too_large(self, fits: dict[str, Fit], tmp_path: pathlib.Path):
        fit = fits["samples"]
        assert isinstance(fit.detector.gaussian, LowRank)
        deviations = jax.tree.map(lambda x: 1e6 * x, fit.detector.gaussian.deviations)
        large = dataclasses.replace(
            fit.detector,
            gaussian=dataclasses.replace(fit.detector.gaussian, deviations=deviations),
        )
        with pytest.raises(UserError, match=r"--half: .*float16; export without --half"):
            export.export(large, tmp_path / "a", True, fit.test)
        assert [path.name for path in tmp_path.iterdir()] == [".locks"]
        export.export(large, tmp_path / "a")

    def test_a_place_that_cannot_be_written(self, fits: dict[str, Fit], tmp_path: pathlib.Path):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "model.safetensors").mkdir()
        reasons = {
            "file/a": "file: cannot be",
            "model.safetensors": "model.safetensors: exists and is no model file",
        }
        for place, reason in reasons.items():
            with pytest.raises(UserError, match=reason):
                export.export(fits["samples"].detector, tmp_path / place)


@pytest.fixture(scope="module")
def path(fits: dict[str, Fit], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model file whose backbone's weights can be had."""
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    export.export(fits["samples"].detector, path)
    return path


class TestWholeDetector:
    @pytest.fixture
    def altered(
        self, path: pathlib.Path, tmp_path: pathlib.Path
    ) -> Callable[..., pathlib.Path]:
        def alter(**changes: Any) -> pathlib.Path:
            model = dataclasses.replace(load(path), **changes)
            save(tmp_path / "a.safetensors", model, model.fitted.mean[0].shape[1])
            return tmp_path / "a.safetensors"

        return alter

    @pytest.mark.parametrize(
        ("setting", "value"),
        [("model.seed", 1), ("model.regularization", 0.1), ("image.method", "nearest")],
    )
    def test_other_settings(self, setting: str, value: Any, path: pathlib.Path):
        group, _, field = setting.partition(".")
        config: Any = loading.load(path).config
        other = dataclasses.replace(getattr(config, group), **{field: value})
        with pytest.raises(UserError) as caught:
            loading.load(path, dataclasses.replace(config, **{group: other}))
        message = str(caught.value)
        assert message.startswith(f"config.{setting}={value}: the model {path} was fitted with")
        assert "checkpoint" not in message

    def test_settings_that_may_differ(self, path: pathlib.Path, fits: dict[str, Fit]):
        config = loading.load(path).config
        other = dataclasses.replace(
            config, batch_size=2, model=dataclasses.replace(config.model, statistics="moments")
        )
        found = detector.score(loading.load(path, other), fits["samples"].images)
        expected = detector.score(fits["samples"].detector, fits["samples"].images)
        # Batches of another size: float32 sums in another order.
        np.testing.assert_allclose(found.maps, expected.maps, rtol=1e-4)

    def test_other_weights(self, altered):
        path = altered(weights=WeightsIdentity("resnet18.npz", "ab" * 32))
        with pytest.raises(UserError) as caught:
            loading.load(path)
        message = str(caught.value)
        assert message.startswith("weights random: other weights")
        assert f"the model {path} was fitted with (resnet18.npz, sha256 abab" in message
        assert "--weights" in message
        assert "checkpoint" not in message

    def test_weights_that_are_gone(self, path: pathlib.Path, altered):
        config = loading.load(path).config
        model = dataclasses.replace(config.model, weights="/gone/resnet18.npz")
        gone = altered(config=dataclasses.replace(config, model=model))
        with pytest.raises(UserError) as caught:
            loading.load(gone)
        message = str(caught.value)
        assert "/gone/resnet18.npz" in message
        assert f"(The model {gone} was fitted with random" in message
        assert "checkpoint" not in message
        # Named anew, it is the same again.
        assert loading.load(gone, weights="random").weights.origin.startswith("random")

    def test_from_another_folder(self, path: pathlib.Path, monkeypatch, fits: dict[str, Fit]):
        monkeypatch.chdir(path.parent)
        found = padim_jax.load("model.safetensors")
        assert found.config.dataset.root.is_absolute()
        assert same_arrays(found.gaussian, fits["samples"].detector.gaussian)
