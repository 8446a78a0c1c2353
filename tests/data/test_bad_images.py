"""What becomes of odd and broken images, the same however they are given.

One fit, one evaluation and one prediction see all of `bad_inputs` with
`config.dataset.skip_bad`; Python's `score` sees each by itself. Outcomes go into
docs/bad_inputs.md, which

    PADIM_JAX_WRITE_DOCS=1 python -m pytest tests/data/test_bad_images.py

writes anew.
"""

import csv
import dataclasses
import errno
import itertools
import json
import os
import pathlib
import re
import shutil
import threading
import unicodedata
import warnings
from typing import Any

import bad_inputs
import numpy as np
import pytest
from bad_inputs import Input
from PIL import Image

import padim_jax
from padim_jax.config import defaults
from padim_jax.config.settings import Config, validate
from padim_jax.data import dataset_splits, decoding, files, input_pipeline, listing, skipping
from padim_jax.data.image_cache import ImageCache
from padim_jax.data.input_pipeline import FolderSource
from padim_jax.data.layouts.folder import folder
from padim_jax.detector.detector import Detector
from padim_jax.devices import parallel
from padim_jax.errors import DataWarning, UserError
from padim_jax.runs import evaluate, fitting, loading, modes, predict, train

# Of metadata that are damaged; without the name of the file it is of no use to anyone.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "bad_inputs.md"
GENERATED = "<!-- From here on written by tests/data/test_bad_images.py -->\n"
CORPUS, MASKS = bad_inputs.images(), bad_inputs.masks()


def file_name(number: int, given: Input) -> str:
    return given.name or f"{number:03}.png"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one file: its path, and what each way to it says; None where it is taken."""

    given: Input
    path: pathlib.Path
    pixels: np.ndarray | None
    train: str | None
    evaluated: str | None
    predicted: str | None


@dataclasses.dataclass(frozen=True)
class Run:
    """All that was made of the whole folder."""

    root: pathlib.Path
    workdir: pathlib.Path
    detector: Detector
    measured: dict[str, Any]
    decoded: list[str]
    printed: str
    outcomes: dict[str, list[Outcome]]
    masks: list[tuple[Input, pathlib.Path, np.ndarray | None]]


def settings(root: pathlib.Path) -> Any:
    values: Any = defaults.get_config()
    values.dataset.name, values.dataset.root, values.category = "folder", str(root), ""
    values.dataset.skip_bad = True
    values.image.resize, values.batch_size = (32, 32), 64
    values.model.weights, values.model.layers = "random", ("layer1",)
    values.model.channels, values.threshold.normal = 5, "none"
    values.outputs.maps = "npy"
    values.outputs.figures, values.outputs.report = "none", False
    values.cache.dir = str(root / "cache")
    return values


@pytest.fixture(scope="module")
def unreadable(tmp_path_factory: pytest.TempPathFactory):
    """The superuser may read all files: then the system's answer to others is given."""
    opened = os.open

    def refuse(path: Any, *given: Any, **named: Any) -> int:
        if os.fspath(path).endswith("unreadable.png"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        if os.geteuid() == 0:
            patch.setattr(os, "open", refuse)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, unreadable: None) -> Any:
    """Everything in one folder, which is fitted, evaluated and predicted."""
    root = tmp_path_factory.mktemp("factory")
    inputs = root / "inputs"
    for name in ("inputs", "train", "val/bad", "masks/bad"):
        (root / name).mkdir(parents=True)
    for split in ("train", "val"):
        (root / split / "good").symlink_to(inputs)
    made, number = {}, 0
    for chapter, found in CORPUS.items():
        made[chapter] = []
        for given in found:
            path = inputs / file_name(number, given)
            made[chapter].append((given, path, given.make(path)))
            number += 1
    masks = []
    for number, given in enumerate(MASKS):
        Image.fromarray(bad_inputs.RGB).save(root / f"val/bad/{number:02}.png")
        path = root / f"masks/bad/{number:02}.png"
        masks.append((given, path, given.make(path)))

    decoded: list[str] = []
    printed: list[str] = []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        # All good images are test images, too, and one mask is empty; see below.
        warnings.filterwarnings("ignore", category=DataWarning)
        count, lock = decoding.open_rgb, threading.Lock()

        def counting(data: bytes, name: str, counts: Any = "full") -> Image.Image:
            with lock:
                decoded.append(name)
            return count(data, name, counts)

        patch.setattr(input_pipeline, "open_rgb", counting)
        patch.setattr("builtins.print", lambda *given, **_: printed.append(" ".join(given)))
        config, workdir = validate(settings(root)), root / "results"
        measured = train.train_and_eval(config, workdir, workdir / "checkpoint")
        done = list(decoded)
        detector = loading.load(workdir / "checkpoint")
        predict.predict(detector, FolderSource(listing.find(str(inputs))), workdir)

    said = {one["path"]: one["reason"] for one in measured["skipped"]}
    with (workdir / "predictions" / "skipped.csv").open(newline="", encoding="utf-8") as file:
        predicted = {
            row["path"].removeprefix("./"): row["reason"] for row in csv.DictReader(file)
        }

    def anonymous(reason: str | None, path: pathlib.Path) -> str | None:
        if reason is None:
            return None
        assert reason.startswith(f"{files.shown(path)}: ")  # the file is named, in one line
        assert reason.isprintable()
        return reason.removeprefix(f"{files.shown(path)}: ")

    outcomes = {
        chapter: [
            Outcome(
                *(given, path, pixels),
                *(
                    anonymous(found.get(files.shown(place / path.name)), folder / path.name)
                    for found, place, folder in (
                        (said, pathlib.Path("train/good"), root / "train/good"),
                        (said, pathlib.Path("val/good"), root / "val/good"),
                        (predicted, pathlib.Path(), inputs),
                    )
                ),
            )
            for given, path, pixels in found
        ]
        for chapter, found in made.items()
    }
    return Run(*(root, workdir, detector, measured, done, "\n".join(printed), outcomes, masks))


def every(run: Run) -> list[Outcome]:
    return [outcome for found in run.outcomes.values() for outcome in found]


def test_what_is_implausible_about_them_is_told(run: Run):
    found = "\n".join(run.measured["data"]["warnings"])
    assert re.search(r"\d+ test images are training images as well \(the same bytes\)", found)
    assert re.search(
        r"1 of \d+ masks of anomalous images have no defect pixel: val/bad/", found
    )


def test_there_are_many_distinct_inputs(run: Run):
    contents = set()
    for outcome in every(run):
        whole = outcome.path.is_file() and outcome.path.stat().st_size < 2**20
        whole = whole and not outcome.given.name and outcome.path.name != "unreadable.png"
        contents.add(outcome.path.read_bytes() if whole else outcome.path.name)
    assert len(contents) >= 150
    names = [outcome.given.what for outcome in every(run)]
    assert len(set(names)) == len(names)


def test_every_way_comes_to_the_same(run: Run):
    for outcome in every(run):
        if outcome.pixels is None:
            with pytest.raises(UserError) as caught:
                padim_jax.score(run.detector, [outcome.path])
            told = str(caught.value).removeprefix(f"{files.shown(outcome.path)}: ")
            ways = {outcome.train, outcome.evaluated, outcome.predicted, told}
            assert len(ways) == 1, (outcome.given.what, ways)
            assert re.search(r"; |\. [A-Z]", told), told  # says what to do
        else:
            ways = {outcome.train, outcome.evaluated, outcome.predicted}
            assert ways == {None}, (outcome.given.what, ways)


def test_pixels(run: Run):
    for outcome in every(run):
        if outcome.pixels is not None:
            found = np.asarray(input_pipeline.read_image(outcome.path))
            assert found.dtype == np.uint8
            assert found.shape == outcome.pixels.shape, outcome.given.what
            np.testing.assert_array_equal(found, outcome.pixels, outcome.given.what)


def test_scores_are_the_same_each_way(run: Run):
    taken = [outcome.path for outcome in every(run) if outcome.pixels is not None]
    found = padim_jax.score(run.detector, taken).scores
    tables = []
    for name in ("scores.csv", "predictions/scores.csv"):
        with (run.workdir / name).open(newline="", encoding="utf-8") as file:
            # A name that would be a spreadsheet's formula has ./ before it.
            rows = {row["path"].removeprefix("./"): row for row in csv.DictReader(file)}
        tables.append({name: float(row["score"]) for name, row in rows.items()})
    evaluated, predicted = tables
    assert predicted.keys() == {path.name for path in taken}
    good = {name for name in evaluated if name.startswith("val/good/")}
    assert good == {f"val/good/{path.name}" for path in taken}
    for path, score in zip(taken, found, strict=True):
        # Of batches of other sizes; measured 2e-7.
        assert predicted[path.name] == pytest.approx(score, rel=1e-5)
        assert evaluated[f"val/good/{path.name}"] == pytest.approx(score, rel=1e-5)
    # As the pixels alone would be.
    pixels = [o.pixels for o in every(run) if o.pixels is not None]
    np.testing.assert_allclose(padim_jax.score(run.detector, pixels).scores, found, rtol=1e-6)


def test_what_is_skipped_is_counted_and_listed(run: Run):
    bad = [outcome for outcome in every(run) if outcome.pixels is None]
    masks = [path for _, path, pixels in run.masks if pixels is None]
    count = 2 * len(bad) + len(masks)
    assert len(run.measured["skipped"]) == count
    assert f"{count} images skipped, see skipped.csv: " in run.printed
    good = len(every(run)) - len(bad)
    assert f"{len(bad)} of {len(every(run))} train images skipped:" in run.printed
    assert f"scored {good} images, {len(bad)} skipped (see skipped.csv)" in run.printed
    assert run.measured["test_images"] == good + len(run.masks) - len(masks)
    contents = {o.path.read_bytes() for o in every(run) if o.pixels is not None}
    assert run.detector.count == len(contents) < good  # copies count once
    stored = json.loads((run.workdir / "metrics.json").read_text(encoding="utf-8"))
    assert stored["skipped"] == run.measured["skipped"]
    with (run.workdir / "skipped.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == stored["skipped"]


def test_nothing_is_decoded_twice_nor_failures_remembered(run: Run):
    # By the first pass; fit, thresholds, scores and pictures find the rest in the cache.
    good = [o.path for o in every(run) if o.pixels is not None]
    contents = [path.read_bytes() for path in good]
    alone = [
        path for path, data in zip(good, contents, strict=True) if contents.count(data) == 1
    ]
    assert len(alone) > 60
    for path in alone:
        name = files.shown(run.root / "train/good" / path.name)
        assert run.decoded.count(name) == 1
        assert name.replace("/train/", "/val/") not in run.decoded  # known by its content
    # What failed is looked at anew each time that it is asked for.
    broken = run.root / "train/good/text.png"
    assert run.decoded.count(str(broken)) == 1
    assert run.decoded.count(str(broken).replace("/train/", "/val/")) == 1


def test_results_are_called_after_their_images(run: Run):
    for outcome in every(run):
        if outcome.pixels is not None:
            name = outcome.path.name
            assert (run.workdir / "maps/val/good" / f"{name}.npy").is_file()
            assert (run.workdir / "predictions/maps" / f"{name}.npy").is_file()
            overlay = run.workdir / "predictions/overlays" / f"{name}.jpg"
            with Image.open(overlay) as image:
                assert image.size == outcome.pixels.shape[1::-1]


class TestStops:
    """Without `skip_bad` the first bad image ends the run, and is named."""

    @pytest.fixture
    def one(self, run: Run, tmp_path: pathlib.Path) -> tuple[Config, pathlib.Path]:
        """Good images, of which one is bad."""
        for place, name in enumerate(("train/good", "val/good", "val/bad")):
            (tmp_path / name).mkdir(parents=True)
            for number in range(3):
                image = Image.fromarray(bad_inputs.noise(seed=3 * place + number))
                image.save(tmp_path / name / f"{number}.png")
        values = settings(tmp_path)
        values.dataset.skip_bad, values.batch_size = False, 1
        return validate(values), tmp_path

    def test_a_run(self, one: Any):
        config, root = one
        for bad in ("train/good", "val/good"):
            (root / bad / "1.png").write_bytes(f"text of {bad}".encode())
        with pytest.raises(UserError, match=r"train/good/1\.png: not an image"):
            train.train_and_eval(config, root / "results", root / "checkpoint")
        assert not (root / "results/metrics.json").exists()
        # The same settings but for that go on.
        values = settings(root)
        values.batch_size = 1
        config = validate(values)
        measured = train.train_and_eval(config, root / "results", root / "checkpoint")
        skipped = [one["path"] for one in measured["skipped"]]
        assert skipped == ["train/good/1.png", "val/good/1.png"]
        assert measured["test_images"] == 5

    def test_an_evaluation(self, run: Run, one: Any):
        config, root = one
        (root / "val/good/1.png").write_bytes(b"text")
        detector = dataclasses.replace(run.detector, config=config)
        source = dataset_splits.open_dataset(config)["test"]
        with pytest.raises(UserError, match=r"val/good/1\.png: not an image"):
            evaluate.evaluate(config, detector, source, root / "results")
        assert not (root / "results/metrics.json").exists()

    def test_a_prediction(self, run: Run, one: Any):
        config, root = one
        (root / "val/good/1.png").write_bytes(b"text")
        detector = dataclasses.replace(run.detector, config=config)
        source = FolderSource(listing.find(str(root / "val")))
        with pytest.raises(UserError, match=r"val/good/1\.png: not an image"):
            predict.predict(detector, source, root / "results")
        assert not (root / "results/predictions").exists()

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_nothing_but_bad_images(self, split: str, one: Any):
        _, root = one
        for path in (root / ("train" if split == "train" else "val")).rglob("*.png"):
            path.write_bytes(b"")
        with pytest.raises(UserError, match=rf"all \d {split} images .* an empty file"):
            train.train_and_eval(
                validate(settings(root)), root / "results", root / "checkpoint"
            )

    def test_only_training(self, one: Any):
        _, root = one
        (root / "train/good/1.png").write_bytes(b"text")
        (root / "val/good/1.png").write_bytes(b"text")  # not looked at
        values = settings(root)
        values.batch_size = 1
        config = validate(values)
        modes.run("train", config, root / "results", root / "checkpoint")
        listed = (root / "results/skipped.csv").read_text(encoding="utf-8")
        assert listed.count("not an image") == 1
        assert "train/good/1.png" in listed
        # Images of an update are looked at as well.
        shutil.copy(root / "val/good/2.png", root / "more.png")
        Image.fromarray(bad_inputs.noise(seed=9)).save(root / "val/good/0.png")
        source = FolderSource(listing.find(str(root / "val")))
        fitting.update(root / "checkpoint", source)
        assert loading.load(root / "checkpoint").count == 2 + 5


def test_processes_agree(run: Run, monkeypatch: pytest.MonkeyPatch):
    """Each looks at its own part, and all leave out the same."""
    records = [r for r in folder(run.root) if r.split == "test"]
    source, config = FolderSource(records), run.detector.config
    said: list[bytes] = [b""] * 3
    meet = threading.Barrier(3)
    looked: list[list[int]] = [[], [], []]
    own = threading.local()

    def gather_bytes(data: bytes) -> list[bytes]:
        said[own.process] = data
        meet.wait(60)
        return list(said)

    faults = input_pipeline.faults

    def looking(source: Any, config: Any, numbers: Any, cache: Any) -> Any:
        looked[own.process] += numbers
        return faults(source, config, numbers, cache)

    monkeypatch.setattr(parallel, "gather_bytes", gather_bytes)
    monkeypatch.setattr(input_pipeline, "faults", looking)
    cache = ImageCache(run.root / "cache" / "images", 10**9)
    found: list[Any] = [None] * 3

    def work(process: int) -> None:
        own.process = process
        devices = parallel.Devices(1, 3, process)
        found[process] = skipping.readable({"test": source}, config, devices, cache)

    threads = [threading.Thread(target=work, args=(process,)) for process in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(itertools.chain(*looked)) == list(range(len(records)))
    paths = [[r.relative_path for r in sources["test"].records] for sources, _ in found]
    assert paths[0] == paths[1] == paths[2]
    alone = [x for x in run.measured["skipped"] if x["path"].startswith("val/")]
    for _, skipped in found:
        assert [dataclasses.asdict(one) for one in skipped] == alone


class TestMasks:
    def outcome(self, run: Run, number: int) -> str | None:
        said = {one["path"]: one["reason"] for one in run.measured["skipped"]}
        return said.get(f"val/bad/{number:02}.png")

    def test_read_or_named(self, run: Run):
        scored = (run.workdir / "scores.csv").read_text(encoding="utf-8")
        for number, (given, path, defect) in enumerate(run.masks):
            reason = self.outcome(run, number)
            # An image is as bad as its mask.
            assert (f"val/bad/{number:02}.png" in scored) == (defect is not None), given.what
            if defect is None:
                assert reason is not None
                assert reason.startswith(f"{path}: "), given.what
                continue
            assert reason is None, given.what
            record = next(r for r in folder(run.root) if r.mask == path)
            image = dataclasses.replace(
                run.detector.config.image, resize=defect.shape, method="nearest"
            )
            (batch,) = input_pipeline.batches(FolderSource([record]), image, 1)
            assert batch.masks[0] is not None
            np.testing.assert_array_equal(batch.masks[0], defect > 0, given.what)

    def test_of_good_images_are_not_looked_at(self, run: Run, tmp_path: pathlib.Path):
        for name in ("train/good", "val/good", "val/bad", "masks/good"):
            (tmp_path / name).mkdir(parents=True)
            Image.fromarray(bad_inputs.RGB).save(tmp_path / name / "a.png")
        (tmp_path / "masks/good/a.png").write_bytes(b"text")
        assert [record.mask for record in folder(tmp_path)] == [None, None, None]

    def test_missing_is_an_error_even_if_bad_images_are_skipped(
        self, run: Run, tmp_path: pathlib.Path
    ):
        for name in ("train/good", "val/bad", "masks/bad"):
            (tmp_path / name).mkdir(parents=True)
            for one in ("a.png", "b.png"):
                Image.fromarray(bad_inputs.RGB).save(tmp_path / name / one)
        (tmp_path / "masks/bad/b.png").unlink()
        with pytest.raises(UserError, match=r"masks/bad: .* no mask for b\.png"):
            dataset_splits.open_dataset(validate(settings(tmp_path)))


class TestListing:
    def test_folders_that_cannot_be_listed(self, tmp_path: pathlib.Path, monkeypatch: Any):
        (tmp_path / "a/b").mkdir(parents=True)
        (tmp_path / "a/b/c.png").write_bytes(b"")
        scan = os.scandir

        def refuse(path: Any) -> Any:
            if os.fspath(path) == str(tmp_path / "a/b"):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return scan(path)

        assert files.images_below(tmp_path) == ([tmp_path / "a/b/c.png"], [])
        monkeypatch.setattr(os, "scandir", refuse)
        # They may hold images that nobody would miss.
        with pytest.raises(UserError, match=r"a/b: cannot be listed: Permission denied"):
            files.images_below(tmp_path)

    def test_what_has_an_images_name_is_not_passed_over(self, tmp_path: pathlib.Path):
        for name in ("empty.png", "full.png/sub", ".hidden.png"):
            (tmp_path / name).mkdir(parents=True)
        (tmp_path / "full.png/sub/a.jpg").write_bytes(b"")
        (tmp_path / "above.png").symlink_to(tmp_path)
        (tmp_path / "nothing.png").symlink_to("nowhere")
        os.mkfifo(tmp_path / "pipe.png")
        names = [str(p.relative_to(tmp_path)) for p in files.images_below(tmp_path)[0]]
        assert names == [
            *("above.png", "empty.png", "full.png/sub/a.jpg", "nothing.png", "pipe.png")
        ]
        found = listing.find(f"{tmp_path}/*.png")
        assert [record.relative_path for record in found] == [
            *("above.png", "empty.png", "nothing.png", "pipe.png")
        ]


def test_large_images_bring_no_warning():
    # From half of the limit on Pillow would warn, and warnings are errors here.
    assert 13_000 * 13_700 <= decoding.MAX_PIXELS < 13_000 * 13_800
    for claims in ((9500, 9500), (13_000, 13_700), (13_000, 13_800), (15_000, 20_000)):
        data = bad_inputs.tiff(bad_inputs.GREY, 1, claims=claims)
        with pytest.raises(UserError, match=r"truncated|at most"):
            decoding.open_rgb(data, "x")


def outcome_text(given: Input, reason: str | None) -> str:
    if reason is None:
        return f"taken: {given.how}"
    # Pillow's words differ from version to version.
    ours = r"the image cannot be decoded: (?!it is )[^;]*;"
    return "refused: " + re.sub(ours, "the image cannot be decoded: ...;", reason)


def tables(run: Run) -> str:
    total = len(every(run)) + len(run.masks)
    bad = sum(outcome.pixels is None for outcome in every(run))
    lines = [GENERATED]
    lines.append(
        f"{total} inputs: {len(every(run))} images, of which {bad} are refused, and "
        f"{len(run.masks)} masks.\n"
    )

    def cell(text: str) -> str:
        text = unicodedata.normalize("NFC", text).replace("|", r"\|").replace("<", "&lt;")
        return text.replace("*", r"\*").replace("`", r"\`")

    for chapter, found in run.outcomes.items():
        lines += [f"## {chapter}\n", "| input | outcome |", "|---|---|"]
        lines += [
            f"| {cell(o.given.what)} | {cell(outcome_text(o.given, o.train))} |" for o in found
        ]
        lines.append("")
    lines += ["## Masks\n", "| input | outcome |", "|---|---|"]
    said = {one["path"]: one["reason"] for one in run.measured["skipped"]}
    for number, (given, path, _) in enumerate(run.masks):
        reason = said.get(f"val/bad/{number:02}.png")
        if reason is not None:
            reason = reason.removeprefix(f"{path}: ").replace(f"{run.root}/", "")
        lines.append(f"| {cell(given.what)} | {cell(outcome_text(given, reason))} |")
    return "\n".join(lines) + "\n"


def test_documentation(run: Run):
    text = DOCS.read_text(encoding="utf-8")
    written = text.partition(GENERATED)[0] + tables(run)
    if os.environ.get("PADIM_JAX_WRITE_DOCS"):
        DOCS.write_text(written, encoding="utf-8")
    elif written != text:
        pytest.fail(
            f"{DOCS.name} tells other outcomes than these tests found; look at the difference "
            "after PADIM_JAX_WRITE_DOCS=1 python -m pytest tests/data/test_bad_images.py"
        )
