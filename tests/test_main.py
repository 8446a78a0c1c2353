"""The command line as a person uses it: what it prints, writes and says about mistakes."""

import contextlib
import csv
import dataclasses
import importlib
import io
import json
import logging
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

import padim_jax
from padim_jax import main
from padim_jax.data import dataset_splits, input_pipeline
from padim_jax.data.layouts.synthetic import generate
from padim_jax.detector import memory
from padim_jax.errors import UserError
from padim_jax.models import scattering
from padim_jax.models.weights import pretrained
from padim_jax.runs import evaluate, loading, modes

# Of ml_collections, which loads configuration files so.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module.. method:DeprecationWarning")

ROOT = pathlib.Path(__file__).resolve().parents[1]
MVTEC = f"--config={ROOT}/configs/mvtec.py"
DEFECTS = ("misplaced_part", "missing_piece", "scratch", "stain")

# Small, and random weights: seconds for a whole run.
SMALL = (
    "--config.category=part",
    "--config.model.weights=random",
    "--config.model.layers=('layer1',)",
    "--config.model.channels=8",
    "--config.image.resize=(64, 64)",
    "--config.batch_size=4",
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int | None
    out: str
    err: str


def padim(*arguments: str | pathlib.Path, cwd: pathlib.Path) -> Outcome:
    """Runs `padim-jax` in this process, which saves the seconds that importing JAX takes."""
    out, err = io.StringIO(), io.StringIO()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with (
        pytest.MonkeyPatch.context() as patch,
        flagsaver.flagsaver(),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["padim-jax", *map(str, arguments)])
        # Python would run the next configuration file in the module of the last.
        patch.delitem(sys.modules, "config_config", raising=False)
        flags.FLAGS.unparse_flags()
        try:
            main.run()
            code = None
        except SystemExit as end:
            code = end.code or 0
        finally:
            flags.FLAGS.unparse_flags()
            root.handlers[:] = handlers
            root.setLevel(level)
    assert isinstance(code, int)
    return Outcome(code, out.getvalue(), err.getvalue())


def succeed(*arguments: str | pathlib.Path, cwd: pathlib.Path) -> str:
    outcome = padim(*arguments, cwd=cwd)
    assert outcome.code == 0, outcome.err
    return outcome.out


def fail(*arguments: str | pathlib.Path, cwd: pathlib.Path) -> str:
    """The message of a command that the user can mend: one line and exit code 2."""
    outcome = padim(*arguments, cwd=cwd)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    lines = outcome.err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    assert lines == errors, "nothing but the error"
    return errors[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("data") / "site"
    folder.mkdir()
    generate(folder, n_train=6, n_test_good=6, n_test_per_defect=2, size=96)
    return folder


@dataclasses.dataclass(frozen=True)
class Run:
    """A first run, whose folder no test may change."""

    arguments: tuple[str, ...]
    workdir: pathlib.Path
    out: str


@pytest.fixture(scope="module")
def run(root: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    cwd = tmp_path_factory.mktemp("run")
    arguments = (MVTEC, *SMALL, f"--config.dataset.root={root}", "--config.outputs.maps=npy")
    out = succeed(*arguments, cwd=cwd)
    # The default of --workdir.
    return Run(arguments, cwd / "results" / "site_part", out)


@pytest.fixture
def copy(run: Run, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the first run's folder, to work in."""
    return pathlib.Path(shutil.copytree(run.workdir, tmp_path / "copy"))


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_json(path: pathlib.Path) -> Any:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def metrics_of(workdir: pathlib.Path) -> dict[str, Any]:
    """What was measured; an evaluation alone reads no training images."""
    found = read_json(workdir / "metrics.json")
    return {name: value for name, value in found.items() if name not in ("data", "inputs")}


def below(folder: pathlib.Path) -> list[str]:
    """All files but the locks, which stay."""
    found = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return [path.as_posix() for path in found if ".locks" not in path.parts]


class TestHelp:
    # Whatever ends the program: which heavy libraries has it imported?
    PROBE = """if True:
        import runpy, sys
        try:
            runpy.run_module("padim_jax.main", run_name="__main__", alter_sys=True)
        finally:
            heavy = {"jax", "flax", "orbax", "tensorflow_datasets", "matplotlib"}
            heavy |= {"huggingface_hub", "scipy.ndimage"}
            print("imported:", *sorted(heavy & set(sys.modules)), file=sys.stderr)
    """

    def probe(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", self.PROBE, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    def test_help_without_heavy_imports(self):
        done = self.probe("--help")
        assert done.returncode == 0
        assert done.stderr.splitlines() == ["imported:"]
        for mode in modes.MODES:
            assert re.search(rf"^  {mode}  ", done.stdout, re.MULTILINE), mode
        for flag in (
            "config",
            "mode",
            "workdir",
            "checkpoint",
            "input",
            "[no]half",
            "[no]download",
        ):
            assert re.search(rf"^ +--{re.escape(flag)}:\s", done.stdout, re.MULTILINE), flag
        assert done.stdout.count("\n  python -m padim_jax.main --") >= 4

    def test_help_beside_other_flags(self, tmp_path: pathlib.Path):
        assert "Examples:" in succeed("--mode=eval", "-h", cwd=tmp_path)

    def test_mistakes_in_settings_before_heavy_imports(self):
        done = self.probe("--config=configs/mvtec.py", "--config.model.channels=449")
        assert done.returncode == 2
        error, imported = done.stderr.splitlines()
        assert error.startswith("error: config.model.channels=449: ")
        assert imported == "imported:"

    def test_imported_where_used_only(self, run: Run, tmp_path: pathlib.Path):
        given = (f"--checkpoint={run.workdir}/checkpoint", f"--workdir={tmp_path}")
        done = self.probe("--mode=predict", *given, f"--input={ROOT}/docs/demo.jpg")
        assert done.returncode == 0, done.stderr
        imported = done.stderr.splitlines()[-1].split()
        assert "jax" in imported
        assert not {"huggingface_hub", "matplotlib", "tensorflow_datasets"} & {*imported}

    def test_examples_of_the_help_can_be_parsed(self, tmp_path: pathlib.Path):
        """All their files, settings and flags exist."""
        (tmp_path / "configs").symlink_to(ROOT / "configs")
        assert main.__doc__
        examples = re.findall(
            r"^  python -m padim_jax.main (--.*)$", main.__doc__, re.MULTILINE
        )
        for example in examples:
            # This one would run, without anything to be missed.
            if "demo.py" not in example:
                message = fail(*example.split(), cwd=tmp_path)
                assert re.search("no (such )?(category |)(folder|checkpoint|image)", message), (
                    message
                )

    def test_console_script(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        module, _, name = project["scripts"]["padim-jax"].partition(":")
        assert getattr(importlib.import_module(module), name) is main.run


PREDICT = ("--mode=predict", "--workdir=x")


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            # Of the command.
            ([], "--config: missing"),
            (["--mode=train"], "--config: missing"),
            (["--mode=eval"], "--mode=eval needs --config, --workdir or --checkpoint"),
            ([MVTEC, "--weights=a.npz"], "--weights: not for --mode=train_and_eval"),
            ([MVTEC, "--mode=trian"], "--mode=trian: .*train_and_eval.train.eval.predict"),
            ([MVTEC, "--wrokdir=x"], "'wrokdir'. Did you mean: workdir"),
            ([MVTEC, "bottle"], "unexpected argument 'bottle'"),
            ([MVTEC, "--mode=predict"], "--input: missing"),
            ([MVTEC, "--mode=predict", "--input="], "--input: missing"),
            ([MVTEC, "--mode=eval", "--input=x"], "--input: not for --mode=eval"),
            ([MVTEC, "--input=x"], "--input: not for --mode=train_and_eval"),
            (["--mode=eval", "--workdir=x", "--watch"], "--watch: not for --mode=eval"),
            ([*PREDICT, "--input=nowhere", "--watch"], "--input=nowhere: no such folder"),
            ([*PREDICT, "--input=gs://x/y", "--watch"], "folders of this machine|gcsfs"),
            ([*PREDICT, "--input=x", "--poll_seconds=1"], "--poll_seconds: for --watch"),
            (
                [*PREDICT, "--input=x", "--watch", "--settle_seconds=-1"],
                "--settle_seconds=-1.0: expected 0 to 3600 seconds",
            ),
            (["--mode=export"], "--mode=export needs --config, --workdir or --checkpoint"),
            (["--mode=export", "--workdir=x"], "x/checkpoint: no such checkpoint"),
            ([MVTEC, "--half"], "--half: not for --mode=train_and_eval"),
            (["--mode=eval", "--workdir=x", "--half"], "--half: not for --mode=eval"),
            ([f"--config={ROOT}/configs/demo.py", "--download"], "--download: only for"),
            (["--mode=eval", "--workdir=x", "--download"], "--download: only for"),
            (["--mode=eval", "--workdir=x"], "x/checkpoint: no such checkpoint"),
            ([MVTEC, "--processes=2", "--process_id=2"], "the processes cannot be joined"),
            ([MVTEC, "--distributed"], "the processes cannot be joined"),
            ([MVTEC, "--join_seconds=0"], "--join_seconds=0.0: expected .* above 0"),
            ([MVTEC, "--join_seconds=nan"], "--join_seconds=nan: expected .* above 0"),
            ([MVTEC, "--stopped_code=256"], "--stopped_code=256: .* range .0, 255"),
            (["--config.batch_size=4", MVTEC], "before a value for --config"),
            (["--mode=eval", "--workdir=x", "--config.batch_size=4"], "no such checkpoint"),
            # Of the settings.
            ([MVTEC, "--config.bach_size=4"], "no such setting 'bach_size'; .* 'batch_size'"),
            ([MVTEC, "--config.model.chanels=4"], "no such setting 'chanels'; .* 'channels'"),
            ([MVTEC, "--config.xyz=4"], "no such setting 'xyz'"),
            ([MVTEC, "--config.category.name=x"], "--config: "),
            ([MVTEC, "--config.batch_size=four"], "--config.batch_size=four"),
            ([MVTEC, "--config.batch_size=1.5"], "--config.batch_size=1.5"),
            ([MVTEC, "--config.batch_size"], "--config.batch_size"),
            ([MVTEC, "--config.batch_size=0"], "config.batch_size=0: .* at least 1"),
            ([MVTEC, "--config.model=resnet18"], "--config.model=resnet18"),
            ([MVTEC, "--config.image.resize=256"], r"config.image.resize=\(256,\)"),
            ([MVTEC, "--config.model.backbone=resnet81"], "resnet81.* 'resnet18'"),
            ([MVTEC, "--config.model.channels=449"], "channels=449: resnet18 has 448"),
            ([MVTEC, "--config.image.crop=(224, 300)"], r"crop=\(224, 300\): larger than"),
            ([f"{MVTEC}:anomalip"], "anomalip: expected one of anomalib, seed, paper"),
            (
                [MVTEC, "--config.image.mean=(123.675, 116.28, 103.53)"],
                r"config.image.mean=\(123.675, .*from 0 to 1.* divide .* by 255",
            ),
            # The last one counts: a tuple's are not joined.
            (
                [MVTEC, "--config.image.resize=(96, 96)", "--config.image.resize=(8, 8)"],
                r"config.image.resize=\(8, 8\): ",
            ),
            (
                [MVTEC, "--config.image.resize", "(8, 8)", "-config.image.resize", "(9, 9)"],
                r"config.image.resize=\(9, 9\): ",
            ),
            (
                [
                    *(MVTEC, "--config.image.crop=(8, 8)", "--config.image.crop=(64, 64)"),
                    *("--config.image.mean=(0, 0, 2)", "--config.image.mean=(0, 0, 0)"),
                    *("--config.image.std=(0, 0, 0)", "--config.image.std=(1, 1, 1)"),
                    *("--config.model.layers=layer9", "--config.model.layers=layer2"),
                    *("--config.batch_size=0", "--config.batch_size=-1"),
                ],
                "config.batch_size=-1: ",
            ),
            # Of the files.
            (["--config=nowhere.py"], "--config: .*nowhere.py"),
            (["--config=/"], "--config: .*'/'"),
            ([MVTEC, "--config.dataset.root=no/where"], "root=no/where: no such folder"),
        ],
    )
    def test_message(self, arguments: list[str], message: str, tmp_path: pathlib.Path):
        assert re.search(message, fail(*arguments, cwd=tmp_path))
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("def get_config(:\n", "SyntaxError: .*bad.py, line 1"),
            (
                "import no_such_module\n",
                "bad.py, line 1: ModuleNotFoundError: .*no_such_module",
            ),
            ("def get_config():\n  return 1 / 0\n", "bad.py, line 2: ZeroDivisionError"),
            # absl and ml_collections wrap these, each in its way.
            (
                "def get_config():\n  raise ValueError('a\\nb')\n",
                "bad.py, line 2: ValueError: a b",
            ),
            ("def get_config():\n  return {}['x']\n", "bad.py, line 2: KeyError: 'x'"),
            ("def get_config():\n  return open('x')\n", "--config: .* 'x'"),
            (
                "from padim_jax.config import defaults\n\n"
                "def get_config():\n  config = defaults.get_config()\n"
                "  config.modle.channels = 3\n  return config\n",
                "bad.py, line 5: AttributeError: .*modle",
            ),
            ("", r"no function get_config\(\)"),
            ("def get_config():\n  return 7\n", r"get_config\(\) returns int; expected"),
            ("def get_config():\n  return {'category': 'x'}\n", "config.*: missing"),
        ],
    )
    def test_in_a_configuration_file(self, source: str, message: str, tmp_path: pathlib.Path):
        (tmp_path / "bad.py").write_text(source)
        assert re.search(message, fail("--config=bad.py", cwd=tmp_path))

    def test_configuration_file_that_returns_nothing(self, tmp_path: pathlib.Path):
        (tmp_path / "bad.py").write_text("def get_config():\n  pass\n")
        outcome = padim("--config=bad.py", cwd=tmp_path)
        assert outcome.code == 2
        # ml_collections has its say before.
        last = outcome.err.splitlines()[-1]
        assert last == "error: --config: get_config() returns NoneType; expected a ConfigDict"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--config.category=prat"], "category='prat': .* did you mean 'part'"),
            (["--config.model.weights=no/where.npz"], "weights='no/where.npz': no such file"),
            (["--workdir=taken"], "taken: cannot be made a folder"),
            (["--checkpoint=taken"], "taken: exists and is no checkpoint"),
            (["--checkpoint=project"], "project: exists and is no checkpoint"),
        ],
    )
    def test_before_fitting(
        self, arguments: list[str], message: str, root: pathlib.Path, tmp_path: pathlib.Path
    ):
        (tmp_path / "taken").write_text("mine")
        (tmp_path / "project" / "data").mkdir(parents=True)
        (tmp_path / "project" / "data" / "thesis").write_text("mine")
        given = [MVTEC, *SMALL, f"--config.dataset.root={root}", "--workdir=out", *arguments]
        outcome = padim(*given, cwd=tmp_path)
        assert outcome.code == 2
        assert re.search(f"^error: .*{message}", outcome.err)
        # What was read is said first, then the memory, before weights are loaded.
        assert re.fullmatch(
            r"((train|test): .* of 96x96, RGB 8 bit\n){0,2}(about .* GB of memory .*\n)?",
            outcome.out,
        )
        assert below(tmp_path) == ["project/data/thesis", "taken"]

    def test_too_little_memory(
        self, root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(memory, "available", lambda: 10**8)
        given = (MVTEC, *SMALL, f"--config.dataset.root={root}", "--workdir=out")
        message = fail(*given, cwd=tmp_path)
        assert message.startswith("not enough memory: about 0.6 GB")
        assert "0.1 GB are free" in message
        assert below(tmp_path) == []

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError("Unable to allocate 9.00 GiB"),
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9 bytes"),
        ],
        ids=["python", "xla"],
    )
    def test_memory_that_runs_out_on_the_way(
        self,
        error: Exception,
        root: pathlib.Path,
        tmp_path: pathlib.Path,
        monkeypatch: pytest.MonkeyPatch,
    ):
        def exhausted(*_: Any) -> None:
            raise error

        monkeypatch.setattr(input_pipeline, "open_rgb", exhausted)
        given = (MVTEC, *SMALL, f"--config.dataset.root={root}", "--workdir=out")
        # Another test may have cached these images.
        outcome = padim(*given, "--config.cache.images_gb=0", cwd=tmp_path)
        assert outcome.code == 2
        assert outcome.err.startswith("error: not enough memory")
        assert outcome.err.count("\n") == 1


def test_fixed_filters(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    given = (MVTEC, *SMALL, f"--config.dataset.root={root}", "--workdir=out")
    given = tuple(x for x in given if "model.weights" not in x)
    chosen = ("--config.model.backbone=scattering", "--config.model.channels=10")
    said = f"weights: {pretrained.FIXED_ORIGIN}\n"
    assert said in succeed(*given, *chosen, "--mode=train", cwd=tmp_path)
    use = ("--mode=predict", "--checkpoint=out/checkpoint", "--workdir=out")
    use += (f"--input={root}/part/test/good/000.png",)
    assert said in succeed(*use, cwd=tmp_path)

    # The next version of padim_jax has others.
    filters = scattering.filters
    monkeypatch.setattr(scattering, "filters", lambda count: filters(count) / 2)
    message = fail(*use, cwd=tmp_path)
    assert "Those are the filters of another version of padim_jax" in message


class TestTrainAndEval:
    def test_files(self, run: Run):
        assert {path.name for path in run.workdir.iterdir()} == {
            ".locks",
            "checkpoint",
            "config.json",
            "figures",
            "maps",
            "metrics.json",
            "overview.jpg",
            "report.html",
            "report_thumbnails.json",
            "roc_curve.png",
            "score_histogram.png",
            "scores.csv",
            "suspects.csv",
        }
        for name in ("overview.jpg", "roc_curve.png", "score_histogram.png"):
            with Image.open(run.workdir / name) as picture:
                picture.load()

    def test_metrics(self, run: Run):
        found = read_json(run.workdir / "metrics.json")
        names = [f"{unit}_{name}" for unit in ("image", "pixel") for name in ("auroc", "ap")]
        names += ["image_f1_max", "image_f1_threshold", "pixel_f1_max", "pixel_f1_threshold"]
        for values in (found, *found["per_defect"].values()):
            assert set(values) >= {*names, "aupro"}
            assert all(isinstance(values[name], float) for name in names)
        assert tuple(found["per_defect"]) == DEFECTS

    def test_scores_agree_with_metrics_and_maps(self, run: Run, root: pathlib.Path):
        rows = read_rows(run.workdir / "scores.csv")
        columns = ["path", "label", "defect_type", "score"]
        columns += ["predicted", "predicted_f1", "calibrated", "in_place"]
        columns += ["regions", "largest_area"]
        assert list(rows[0]) == columns
        images = [path for path in below(root) if "/test/" in path]
        assert [row["path"] for row in rows] == images
        measured = read_json(run.workdir / "metrics.json")
        threshold = measured["image_f1_threshold"]
        normal = read_json(run.workdir / "checkpoint" / "calibration.json")["image_threshold"]
        assert measured["normal_threshold"]["image_threshold"] == normal
        for row in rows:
            kind = pathlib.PurePosixPath(row["path"]).parent.name
            assert (row["defect_type"], row["label"]) == (kind, str(int(kind != "good")))
            score = np.float32(row["score"])
            assert row["predicted_f1"] == str(int(score >= threshold))
            assert row["predicted"] == str(int(score >= normal))
            assert 0 <= float(row["calibrated"]) < 1
            assert (row["in_place"] == "") == (kind == "good")
            anomaly_map = np.load(run.workdir / "maps" / f"{row['path']}.npy")
            assert anomaly_map.shape == (64, 64)
            assert anomaly_map.max() == score
        assert any(float(row["score"]) == pytest.approx(threshold, rel=1e-6) for row in rows)
        for key, place in (("found_in_place", "1"), ("found_elsewhere", "0")):
            count = sum((row["predicted"], row["in_place"]) == ("1", place) for row in rows)
            assert measured["in_place"][key]["count"] == count

    def test_table_is_printed(self, run: Run):
        found = read_json(run.workdir / "metrics.json")
        for name, key in (("image AUROC", "image_auroc"), ("AUPRO 0.3", "aupro")):
            # Random weights: nothing published to compare with.
            assert re.search(rf"^{name} +{found[key]:.4f}$", run.out, re.MULTILINE)
        assert found["train_images"] == 6
        for defect in DEFECTS:
            value = found["per_defect"][defect]["pixel_auroc"]
            assert re.search(rf"^{defect} .* {value:.4f} ", run.out, re.MULTILINE)
        assert "weights: random (not ImageNet" in run.out
        assert run.out.endswith(f"results: {pathlib.Path('results', 'site_part')}\n")

    def test_memory_is_said_first(self, run: Run):
        line = next(x for x in run.out.splitlines() if not re.match("(train|test): ", x))
        rest = run.out.partition(line)[2]
        assert re.fullmatch(
            r"about 0\.6 GB of memory to fit 6 images: 0\.00 GB of statistics \(moments\), "
            r"0\.0\d GB for a batch, 0\.00 GB of embeddings for thresholds; "
            r"about 0\.\d GB to evaluate \d+ test images; "
            r"\d+\.\d GB are free",
            line,
        )
        assert "GB of memory" not in rest

    def test_config_is_that_of_the_run(self, run: Run, root: pathlib.Path):
        found = read_json(run.workdir / "config.json")
        assert found["dataset"]["root"] == str(root)
        assert (found["image"]["resize"], found["model"]["channels"]) == ([64, 64], 8)

    def test_some_figures(self, run: Run):
        kinds = [name.split("_", 1)[1] for name in below(run.workdir / "figures")]
        # Two of each defect, first; four of six good ones.
        assert len(kinds) == 12
        assert [kind.rpartition("_")[0] for kind in kinds] == [
            *(defect for defect in DEFECTS for _ in range(2)),
            *["good"] * 4,
        ]

    def test_again_into_the_same_folder(self, run: Run, copy: pathlib.Path):
        succeed(*run.arguments, f"--workdir={copy}", cwd=copy.parent)
        for name in ("metrics.json", "scores.csv", "config.json"):
            assert (copy / name).read_bytes() == (run.workdir / name).read_bytes()
        assert [name for name in below(copy) if "checkpoint" not in name] == [
            name for name in below(run.workdir) if "checkpoint" not in name
        ]

    def test_as_its_own_process(self, run: Run, tmp_path: pathlib.Path):
        """With a folder name that shells and encodings stumble over."""
        workdir = tmp_path / "Ergebnisse zu Gehäuse 3"
        done = subprocess.run(
            [sys.executable, "-m", "padim_jax.main", *run.arguments, f"--workdir={workdir}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
        found = read_json(workdir / "metrics.json")
        # Equal up to the algorithms that another process may choose for convolutions.
        scores = [
            np.array([row["score"] for row in read_rows(folder / "scores.csv")], np.float32)
            for folder in (workdir, run.workdir)
        ]
        np.testing.assert_allclose(*scores, rtol=1e-2)
        assert re.search(
            rf"^image AUROC +{found['image_auroc']:.4f}$", done.stdout, re.MULTILINE
        )
        assert done.stdout.endswith(f"results: {workdir}\n")


class TestEnvironment:
    """Variables of the environment are settings: a wrong one is one line and code 2."""

    def end(self, *arguments: str, code: str = "", **variables: str) -> str:
        command = ["-c", code] if code else ["-m", "padim_jax.main", *arguments]
        ended = subprocess.run(
            [sys.executable, *command],
            env=os.environ | variables | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 2, ended.stderr
        (line,) = ended.stderr.splitlines()
        return line

    @pytest.mark.parametrize(
        ("name", "value"),
        [("JAX_PLATFORMS", "cuda"), ("JAX_ENABLE_X64", "maybe")],
    )
    def test_of_jax(self, name: str, value: str):
        line = self.end("--mode=eval", "--workdir=nowhere", **{name: value})
        assert line.startswith(f"error: {name}={value}: ")
        assert "unset" in line

    def test_windows(self):
        code = "import sys; sys.platform = 'win32'; import padim_jax.main"
        assert self.end(code=code).startswith("error: padim_jax runs on Linux and macOS")


class TestStreams:
    """Closed or full ones lose what is printed: no result, and not the exit code."""

    def shell(self, command: str, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
        program = f"{sys.executable} -m padim_jax.main"
        return subprocess.run(
            ["bash", "-c", command.replace("PADIM", program)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            cwd=cwd,
            check=False,
            capture_output=True,
            text=True,
        )

    @pytest.mark.parametrize("streams", ["2>&-", ">&- 2>&-", "2>/dev/full", "<&-"])
    def test_code_of_a_mistake(self, streams: str, tmp_path: pathlib.Path):
        assert self.shell(f"PADIM --mode=eval {streams}", tmp_path).returncode == 2

    @pytest.mark.parametrize("streams", ["2>&- | true", ">/dev/full"])
    def test_a_fit_is_saved(self, streams: str, root: pathlib.Path, tmp_path: pathlib.Path):
        arguments = shlex.join([MVTEC, *SMALL, f"--config.dataset.root={root}", "--mode=train"])
        command = f"set -o pipefail; PADIM {arguments} --workdir=fit {streams}"
        ended = self.shell(command, tmp_path)
        assert ended.returncode == 0, ended.stderr
        assert list((tmp_path / "fit" / "checkpoint").iterdir())
        lost = "warning: standard output cannot be written (No space left on device)"
        assert (lost in ended.stderr) == ("full" in streams)


class TestWarnings:
    """Data that is implausible: all images are the same."""

    @pytest.fixture
    def arguments(self, tmp_path: pathlib.Path) -> list[str]:
        # No name writes lines of its own. Copies, byte for byte, would count once.
        for name in ("a\nb.png", "c.bmp"):
            path = tmp_path / "parts" / "train" / "good" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (9, 9, 9)).save(path)
        return [
            *(f"--config={ROOT}/configs/folder.py", *SMALL, "--config.category="),
            *("--config.dataset.root=parts", "--mode=train"),
        ]

    def test_is_one_line(self, arguments: list[str], tmp_path: pathlib.Path):
        outcome = padim(*arguments, cwd=tmp_path)
        assert outcome.code == 0
        lines = outcome.err.splitlines()
        assert all(line.startswith("warning: ") for line in lines)
        (line,) = (line for line in lines if "all 2 images are the same" in line)
        assert r"good/a\nb.png" in line

    def test_strict(self, arguments: list[str], tmp_path: pathlib.Path):
        message = fail(*arguments, "--strict", cwd=tmp_path)
        assert message.startswith("all 2 images are the same")


class TestEval:
    def test_reproduces_the_first_evaluation(self, run: Run, copy: pathlib.Path):
        scores = (copy / "scores.csv").read_bytes()
        for name in ("metrics.json", "scores.csv"):
            (copy / name).unlink()
        shutil.rmtree(copy / "maps")
        shutil.rmtree(copy / "figures")
        out = succeed("--mode=eval", f"--workdir={copy}", cwd=copy.parent)
        assert (copy / "scores.csv").read_bytes() == scores
        assert metrics_of(copy) == metrics_of(run.workdir)
        # Which training images are odd only a fit can tell.
        assert set(below(copy)) <= set(below(run.workdir))
        table = run.out.partition("site_part: ")[2].partition("results: ")[0]
        assert table in out

    def test_workdir_of_a_checkpoint_alone_is_beside_it(self, copy: pathlib.Path):
        (copy / "metrics.json").unlink()
        shutil.rmtree(copy / "maps")
        shutil.rmtree(copy / "figures")
        succeed("--mode=eval", "--checkpoint=checkpoint", cwd=copy)
        assert (copy / "metrics.json").exists()

    @pytest.mark.parametrize(
        ("override", "field"),
        [
            ("--config.image.method=nearest", "config.image.method=nearest"),
            ("--config.model.seed=1", "config.model.seed=1"),
            ("--config.model.layers=('layer1', 'layer2')", "config.model.layers"),
        ],
    )
    def test_another_model_is_refused(
        self, override: str, field: str, run: Run, tmp_path: pathlib.Path
    ):
        given = ("--mode=eval", f"--workdir={run.workdir}", *run.arguments, override)
        assert fail(*given, cwd=tmp_path).startswith(field)

    def test_use_for_another_category_is_said(self, run: Run, tmp_path: pathlib.Path):
        given = (f"--workdir={run.workdir}", *run.arguments, "--config.category=other")
        outcome = padim("--mode=eval", *given, cwd=tmp_path)
        assert outcome.code == 2  # there is no such category
        assert "was fitted to site_part; now used for site_other" in outcome.out

    @pytest.mark.parametrize(
        ("figures", "maps", "suffix", "counts"), [("all", "tiff", "tiff", (14, 14))]
    )
    def test_other_outputs(
        self,
        figures: str,
        maps: str,
        suffix: str,
        counts: tuple[int, int],
        run: Run,
        copy: pathlib.Path,
    ):
        """Those of the evaluation before are gone."""
        outputs = (f"--config.outputs.figures={figures}", f"--config.outputs.maps={maps}")
        succeed("--mode=eval", f"--workdir={copy}", *run.arguments, *outputs, cwd=copy.parent)
        found = [list(copy.glob("figures/*.jpg")), list((copy / "maps").rglob(f"*.{suffix}"))]
        assert tuple(map(len, found)) == counts
        assert (copy / "overview.jpg").exists() is False
        assert (copy / "roc_curve.png").exists()
        assert metrics_of(copy) == metrics_of(run.workdir)

    @pytest.mark.parametrize("name", ["maps", "figures"])
    def test_folders_of_others_are_kept(self, name: str, run: Run, tmp_path: pathlib.Path):
        """As with --workdir=. in a folder that holds a paper's figures."""
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("precious")
        given = ("--mode=eval", f"--checkpoint={run.workdir}/checkpoint", "--workdir=.")
        assert fail(*given, cwd=tmp_path).startswith(f"{name}: exists and is not from an")
        assert below(tmp_path) == [f"{name}/mine.txt"]


class TestOverridesOfAStoredModel:
    """Settings on top of the model's own, without --config."""

    def test_what_is_overridden_and_nothing_else(self, copy: pathlib.Path):
        before = read_json(copy / "config.json")
        overrides = ["--config.outputs.figures=all", "--config.outputs.figures=none"]
        overrides += ["--config.threshold.image_rate", "0.2"]
        succeed("--mode=eval", f"--workdir={copy}", *overrides, cwd=copy.parent)
        after = read_json(copy / "config.json")
        before["outputs"]["figures"] = "none"
        before["threshold"]["image_rate"] = 0.2
        assert after == before
        assert not (copy / "figures").exists()

    def test_predict(self, copy: pathlib.Path, root: pathlib.Path):
        one = f"--input={root}/part/test/good/000.png"
        given = ("--mode=predict", f"--workdir={copy}", one)
        succeed(*given, "--config.outputs.maps=npy", cwd=copy.parent)
        assert any(name.endswith(".npy") for name in below(copy / "predictions"))

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("outputs.figurs=none", "no such setting 'figurs'; did you mean 'figures'?"),
            ("outputs.figures=most", "config.outputs.figures='most': expected"),
            ("batch_size=many", "--config.batch_size=many"),
            ("model.seed=1", "config.model.seed=1: the model "),
            ("category=all", "config.category, config.repeats: several runs"),
        ],
    )
    @pytest.mark.parametrize("mode", ["eval", "update"])
    def test_mistakes(self, mode, override, message, run: Run, root: pathlib.Path):
        given = [f"--mode={mode}", f"--checkpoint={run.workdir}/checkpoint"]
        if mode == "update":
            given.append(f"--input={root}/part/test/good")
        assert message in fail(*given, f"--config.{override}", cwd=run.workdir)

    @pytest.mark.parametrize("mode", ["train", "train_and_eval", "merge"])
    def test_without_a_stored_model(self, mode: str, tmp_path: pathlib.Path):
        message = fail(f"--mode={mode}", "--config.batch_size=4", cwd=tmp_path)
        assert (
            message == "--config.batch_size: overrides a setting of --config, which is missing"
        )


class TestPredict:
    def predict(self, folder: pathlib.Path, given: str | pathlib.Path) -> str:
        return succeed(
            "--mode=predict", f"--workdir={folder}", f"--input={given}", cwd=folder.parent
        )

    def test_folder_agrees_with_the_evaluation(self, copy: pathlib.Path, root: pathlib.Path):
        out = self.predict(copy, root / "part" / "test")
        folder = copy / "predictions"
        calibration = read_json(copy / "checkpoint" / "calibration.json")
        assert f"image score {calibration['image_threshold']:.4g} for " in out
        assert out.endswith(f"scored 14 images\nresults: {folder}\n")
        rows = read_rows(folder / "scores.csv")
        columns = ("path", "score", "predicted", "calibrated", "regions", "largest_area")
        assert tuple(rows[0]) == columns
        evaluated = read_rows(copy / "scores.csv")
        # The same images in the same batches: the same to the last bit.
        assert [
            (f"part/test/{row['path']}", *(row[name] for name in columns[1:])) for row in rows
        ] == [tuple(row[name] for name in columns) for row in evaluated]
        for row in rows:
            restored = np.load(folder / "maps" / f"{row['path']}.npy")
            assert restored.shape == (96, 96)  # the images' own size
            with Image.open(folder / "overlays" / f"{row['path']}.jpg") as overlay:
                assert overlay.size == (96, 96)

    def test_file_and_glob(self, copy: pathlib.Path, root: pathlib.Path):
        """Each run replaces the predictions before."""
        scores = {
            row["path"].removeprefix("part/test/"): np.float32(row["score"])
            for row in read_rows(copy / "scores.csv")
        }
        for given, names in (
            ("good/003.png", ["003.png"]),
            (
                "s*/*.png",
                [f"{kind}/{n:03}.png" for kind in ("scratch", "stain") for n in (0, 1)],
            ),
        ):
            self.predict(copy, root / "part" / "test" / given)
            rows = read_rows(copy / "predictions" / "scores.csv")
            assert [row["path"] for row in rows] == names
            assert below(copy / "predictions" / "overlays") == [f"{name}.jpg" for name in names]
            for row in rows:
                name = row["path"] if "/" in row["path"] else f"good/{row['path']}"
                # At another place in its batch: float32 sums in another order at most.
                np.testing.assert_allclose(np.float32(row["score"]), scores[name], rtol=1e-4)

    def test_thresholds_go_with_the_model(
        self, run: Run, root: pathlib.Path, tmp_path: pathlib.Path
    ):
        given = (f"--checkpoint={run.workdir}/checkpoint", f"--input={root}/part/test/good")
        out = succeed("--mode=predict", "--workdir=new", *given, cwd=tmp_path)
        calibration = read_json(run.workdir / "checkpoint" / "calibration.json")
        assert f"image score {calibration['image_threshold']:.4g} for " in out
        rows = read_rows(tmp_path / "new" / "predictions" / "scores.csv")
        assert {row["predicted"] for row in rows} <= {"0", "1"}

    def test_without_thresholds(self, copy: pathlib.Path, root: pathlib.Path):
        """Those of an evaluation's labels are used, and said to be; without one, none."""
        (copy / "checkpoint" / "calibration.json").unlink()
        out = self.predict(copy, root / "part" / "test" / "good")
        threshold = read_json(copy / "metrics.json")["image_f1_threshold"]
        assert f"threshold {threshold:.4g}: the best F1 on the test set's labels" in out
        (copy / "metrics.json").unlink()
        out = self.predict(copy, root / "part" / "test" / "good")
        assert "no predicted class. For thresholds: --mode=calibrate" in out
        rows = read_rows(copy / "predictions" / "scores.csv")
        assert [(row["predicted"], row["calibrated"]) for row in rows] == [("", "")] * 6

    def test_thresholds_of_an_older_model_are_not_used(
        self, run: Run, copy: pathlib.Path, root: pathlib.Path
    ):
        given = (f"--workdir={copy}", *run.arguments, "--config.model.seed=1")
        older = (copy / "checkpoint" / "calibration.json").read_bytes()
        succeed("--mode=train", *given, "--config.threshold.normal=none", cwd=copy.parent)
        path = copy / "checkpoint" / "calibration.json"
        assert not path.exists() or path.read_bytes() == older
        path.write_bytes(older)
        out = self.predict(copy, root / "part" / "test" / "good")
        assert "no predicted class" in out
        rows = read_rows(copy / "predictions" / "scores.csv")
        assert [row["predicted"] for row in rows] == [""] * 6

    def test_earlier_predictions_stay_until_the_new_ones_are_whole(
        self, root: pathlib.Path, copy: pathlib.Path, tmp_path: pathlib.Path
    ):
        self.predict(copy, root / "part" / "test" / "good")
        before = below(copy / "predictions")
        (tmp_path / "broken.png").write_bytes(b"")
        fail("--mode=predict", f"--workdir={copy}", f"--input={tmp_path}", cwd=tmp_path)
        assert below(copy / "predictions") == before
        self.predict(copy, root / "part" / "test" / "good")
        assert not (copy / "predictions.incomplete").exists()

    def test_nothing_to_predict(self, copy: pathlib.Path):
        given = ("--mode=predict", f"--workdir={copy}", "--input=nowhere/*.png")
        assert fail(*given, cwd=copy.parent).startswith("--input=nowhere/*.png: no image there")
        assert not (copy / "predictions").exists()

    def test_broken_image_is_named(self, copy: pathlib.Path, root: pathlib.Path):
        shutil.copy(root / "part/test/good/000.png", copy.parent / "a.png")
        (copy.parent / "b.png").write_bytes(b"no image")
        given = ("--mode=predict", f"--workdir={copy}", f"--input={copy.parent}/*.png")
        assert fail(*given, cwd=copy.parent).startswith(
            f"{copy.parent / 'b.png'}: not an image"
        )

    def test_folder_of_others_is_kept(self, copy: pathlib.Path, root: pathlib.Path):
        (copy / "predictions").mkdir()
        (copy / "predictions" / "mine.txt").write_text("precious")
        given = ("--mode=predict", f"--workdir={copy}", f"--input={root}/part/test/good")
        assert "exists and is not from an earlier run" in fail(*given, cwd=copy.parent)
        assert below(copy / "predictions") == ["mine.txt"]


class TestExport:
    def test_evaluates_and_predicts_the_same(
        self, run: Run, copy: pathlib.Path, root: pathlib.Path
    ):
        """Without a checkpoint, and to the last bit."""
        out = succeed("--mode=export", f"--workdir={copy}", cwd=copy.parent)
        path = copy / "model.safetensors"
        assert out == f"model file, {path.stat().st_size / 1e6:.0f} MB -> {path}\n"
        assert len(below(copy)) == len(below(run.workdir)) + 1
        shutil.rmtree(copy / "checkpoint")
        given = ("--mode=eval", f"--checkpoint={path}", f"--workdir={copy.parent}/new")
        succeed(*given, cwd=copy.parent)
        new = copy.parent / "new"
        assert (new / "scores.csv").read_bytes() == (copy / "scores.csv").read_bytes()
        assert metrics_of(new) == metrics_of(copy)
        # Results go beside the model, whose evaluation has the threshold.
        given = ("--mode=predict", f"--checkpoint={path}", f"--input={root}/part/test")
        assert "threshold" in succeed(*given, cwd=copy.parent)
        predicted = read_rows(copy / "predictions" / "scores.csv")
        evaluated = read_rows(copy / "scores.csv")
        assert [row["score"] for row in predicted] == [row["score"] for row in evaluated]

    def test_half(self, run: Run, tmp_path: pathlib.Path):
        given = (f"--checkpoint={run.workdir}/checkpoint", "--workdir=new")
        succeed("--mode=export", *given, cwd=tmp_path)
        path = tmp_path / "new" / "model.safetensors"
        exact = path.stat().st_size
        out = succeed("--mode=export", "--half", *given, cwd=tmp_path)
        # Means, index and header, some kilobytes, are not halved.
        assert path.stat().st_size < 0.55 * exact + 10_000
        auroc = read_json(run.workdir / "metrics.json")["image_auroc"]
        assert re.search(rf"^image AUROC +{auroc:.4f} +\d\.\d+ +[+-]0\.\d+$", out, re.MULTILINE)
        assert "on 14 test images; image scores change by at most" in out
        succeed("--mode=eval", f"--checkpoint={path}", cwd=tmp_path)
        assert (tmp_path / "new" / "metrics.json").exists()

    def test_not_of_a_model_file(self, copy: pathlib.Path):
        """It may be rounded: its changes would be measured against itself."""
        succeed("--mode=export", "--half", f"--workdir={copy}", cwd=copy.parent)
        path = copy / "model.safetensors"
        before = path.read_bytes()
        for half in ("--half", "--nohalf"):
            message = fail("--mode=export", half, f"--checkpoint={path}", cwd=copy.parent)
            assert message.startswith(
                f"{path}: --mode=export takes a checkpoint, and this is a model file"
            )
        assert path.read_bytes() == before

    def test_onnx(self, run: Run, root: pathlib.Path, tmp_path: pathlib.Path):
        """Evaluates and predicts as JAX does, to the digits that are printed."""
        pytest.importorskip("onnxruntime", reason="needs padim-jax[onnx]")
        given = (f"--checkpoint={run.workdir}/checkpoint", "--workdir=new", "--format=onnx")
        out = succeed("--mode=export", *given, f"--input={root}/part/test/good", cwd=tmp_path)
        assert "verified on 6 images in ONNX Runtime" in out
        path = tmp_path / "new" / "model.onnx"
        exported = f"--checkpoint={path}"
        out = succeed("--mode=eval", exported, "--workdir=eval", cwd=tmp_path)
        assert "in ONNX Runtime" in out
        table = run.out[run.out.index("image AUROC") :].splitlines()[:3]
        assert all(line in out for line in table)
        auroc = read_json(run.workdir / "metrics.json")["pixel_auroc"]
        found = read_json(tmp_path / "eval" / "metrics.json")
        assert found["pixel_auroc"] == pytest.approx(auroc, abs=5e-5)
        assert found["train_images"] == 6
        given = ("--mode=predict", exported, f"--input={root}/part/test", "--workdir=predicted")
        succeed(*given, cwd=tmp_path)
        rows = read_rows(tmp_path / "predicted" / "predictions" / "scores.csv")
        evaluated = read_rows(run.workdir / "scores.csv")
        assert [float(row["score"]) for row in rows] == pytest.approx(
            [float(row["score"]) for row in evaluated], rel=2e-5
        )
        for arguments, message in {
            ("--mode=update", "--input=x"): "for --mode=update name the checkpoint",
            ("--mode=calibrate", "--input=x"): "for --mode=calibrate name the checkpoint",
            ("--mode=export",): "for --mode=export name the checkpoint",
            ("--mode=merge", "--models=a,b"): "for --mode=merge name the checkpoint",
            ("--mode=eval", "--weights=x"): "holds its weights",
            ("--mode=eval", "--config.map.sigma=2.0"): "config.map.sigma=2.0: ",
            ("--mode=eval", "--processes=2", "--process_id=0"): "computed by one process",
            ("--mode=eval", "--config.model.precision=bfloat16"): "computes in float32",
        }.items():
            runtime = ("--runtime=onnxruntime",) if "--mode=eval" in arguments else ()
            assert message in fail(*arguments, exported, *runtime, cwd=tmp_path), arguments
        given = ("--mode=eval", f"--workdir={run.workdir}", "--runtime=openvino")
        assert fail(*given, cwd=tmp_path).startswith("--runtime: for an ONNX file alone")

    def test_onnx_of_half_size_and_of_frames(self, run: Run, tmp_path: pathlib.Path):
        pytest.importorskip("onnxruntime", reason="needs padim-jax[onnx]")
        given = (f"--checkpoint={run.workdir}/checkpoint", "--workdir=new", "--format=onnx")
        out = succeed("--mode=export", "--half", *given, cwd=tmp_path)
        path = tmp_path / "new" / "model.onnx"
        assert re.search(r"^image AUROC +\d\.\d+ +\d\.\d+ +[+-]0\.\d+$", out, re.MULTILINE)
        succeed("--mode=eval", f"--checkpoint={path}", cwd=tmp_path)
        succeed("--mode=export", "--frame=96x96", *given, cwd=tmp_path)
        message = fail("--mode=eval", f"--checkpoint={path}", cwd=tmp_path)
        assert "takes raw frames (--frame=96x96)" in message
        message = fail("--mode=export", "--frame=96", *given, cwd=tmp_path)
        assert message.startswith("--frame=96: expected height and width")

    def test_settings_of_another_model(self, run: Run, copy: pathlib.Path):
        succeed("--mode=export", f"--workdir={copy}", cwd=copy.parent)
        given = ("--mode=eval", f"--checkpoint={copy}/model.safetensors", *run.arguments)
        message = fail(*given, "--config.model.seed=1", cwd=copy.parent)
        assert "config.model.seed=1: the model " in message
        assert "model.safetensors was fitted with 42" in message


class TestOwnFolder:
    """Images of one's own, for which nothing but normal ones may be at hand."""

    @pytest.fixture
    def given(self, root: pathlib.Path, tmp_path: pathlib.Path) -> tuple[str, ...]:
        shutil.copytree(root / "part" / "train", tmp_path / "parts" / "train")
        return (
            f"--config={ROOT}/configs/folder.py",
            *SMALL,
            "--config.category=",
            "--config.dataset.root=parts",
        )

    def test_train_then_predict(self, given: tuple[str, ...], tmp_path: pathlib.Path):
        out = succeed("--mode=train", *given, cwd=tmp_path)
        workdir = tmp_path / "results" / "folder_parts"
        assert "folders of good images: train/good; of defects: none\n" in out
        assert "fitted 6 images, 16x16 patches of 8 channels" in out
        names = {path.name for path in workdir.iterdir()}
        assert names == {".locks", "checkpoint", "suspects.csv"}
        rows = read_rows(workdir / "suspects.csv")
        assert [row["rank"] for row in rows] == list("123456")
        assert {row["path"] for row in rows} == set(below(tmp_path / "parts"))
        scores = [float(row["score"]) for row in rows]
        assert scores == sorted(scores, reverse=True)
        succeed("--mode=predict", *given, "--input=parts/train/good/000.png", cwd=tmp_path)
        assert len(read_rows(workdir / "predictions" / "scores.csv")) == 1

    def test_half_without_test_images(self, given: tuple[str, ...], tmp_path: pathlib.Path):
        succeed("--mode=train", *given, cwd=tmp_path)
        before = below(tmp_path)
        assert fail("--mode=export", "--half", *given, cwd=tmp_path).startswith(
            "--half: no test images"
        )
        assert below(tmp_path) == before
        succeed("--mode=export", *given, cwd=tmp_path)
        assert "results/folder_parts/model.safetensors" in below(tmp_path)

    @pytest.mark.parametrize("mode", ["train_and_eval", "eval"])
    def test_no_test_images(self, mode: str, given: tuple[str, ...], tmp_path: pathlib.Path):
        if mode == "eval":
            succeed("--mode=train", *given, cwd=tmp_path)
        before = below(tmp_path)
        message = fail(f"--mode={mode}", *given, cwd=tmp_path)
        assert message.startswith("config.dataset.root=parts: no test images")
        assert "--mode=train" in message
        assert below(tmp_path) == before  # nothing was fitted

    def test_a_single_image(self, given: tuple[str, ...], tmp_path: pathlib.Path):
        for path in sorted((tmp_path / "parts" / "train" / "good").iterdir())[1:]:
            path.unlink()
        message = fail("--mode=train", *given, cwd=tmp_path)
        assert message.startswith("config.dataset.root=parts: 1 normal image(s)")
        assert "at least 2" in message


@pytest.mark.usefixtures("no_compilation_cache")
class TestCompilationCache:
    """`tests/system/test_compilation_cache.py` tests what is loaded from it."""

    def predict(self, run: Run, cwd: pathlib.Path, *arguments: str) -> Outcome:
        jax.clear_caches()  # as if this process were new
        given = f"--checkpoint={run.workdir}/checkpoint", f"--input={ROOT}/docs/demo.jpg"
        outcome = padim("--mode=predict", "--workdir=x", *given, *arguments, cwd=cwd)
        assert outcome.code == 0, outcome.err
        return outcome

    def test_filled_once(self, run: Run, tmp_path: pathlib.Path):
        found = []
        for _ in range(2):
            self.predict(run, tmp_path, "--config.cache.dir=cache")
            folder = tmp_path / "cache" / "compilation"
            found.append({path.name: path.read_bytes() for path in folder.glob("*-cache")})
        # What is mapped over devices, by the name that JAX gives it.
        assert any("_fun" in name for name in found[0])
        assert found[1] == found[0]

    def test_switched_off(self, run: Run, tmp_path: pathlib.Path):
        off = ("--config.cache.compilation=False", "--config.cache.images_gb=0")
        self.predict(run, tmp_path, "--config.cache.dir=cache", *off)
        assert not (tmp_path / "cache").exists()

    def test_unusable_folder(self, run: Run, tmp_path: pathlib.Path):
        (tmp_path / "cache").write_text("mine")
        outcome = self.predict(run, tmp_path, "--config.cache.dir=cache")
        lines = [line for line in outcome.err.splitlines() if "compiled programs" in line]
        assert len(lines) == 1
        assert lines[0].startswith("warning: cache/compilation: ")

    def test_not_used_from_python(
        self, run: Run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        jax.clear_caches()
        detector = padim_jax.load(run.workdir / "checkpoint")
        padim_jax.score(detector, [np.zeros((9, 9, 3), np.uint8)])
        assert list(tmp_path.iterdir()) == []


class TestPythonApi:
    def test_scores_are_those_of_the_evaluation(self, run: Run, root: pathlib.Path):
        detector = padim_jax.load(run.workdir / "checkpoint")
        rows = read_rows(run.workdir / "scores.csv")
        assert len(rows) > detector.config.batch_size
        # As paths and as arrays, in turns.
        paths = [root / row["path"] for row in rows]
        images = [
            str(path) if number % 2 else np.asarray(Image.open(path).convert("RGB"))
            for number, path in enumerate(paths)
        ]
        found = padim_jax.score(detector, images)
        scores = np.array([row["score"] for row in rows], np.float32)
        maps = np.stack([np.load(run.workdir / "maps" / f"{row['path']}.npy") for row in rows])
        # The same batches: the same to the last bit.
        np.testing.assert_array_equal(found.scores, scores)
        np.testing.assert_array_equal(found.maps, maps)

    def test_images_of_mixed_sizes(self, run: Run, root: pathlib.Path):
        detector = padim_jax.load(run.workdir / "checkpoint")
        image = np.asarray(Image.open(root / "part/test/good/000.png").convert("RGB"))
        wide = np.asarray(Image.fromarray(image).resize((200, 64)))
        images = [image, wide, image[:50], image, wide]
        found = padim_jax.score(detector, images)
        for number, alone in enumerate(images):
            # At another place in its batch: float32 sums in another order at most.
            expected = padim_jax.score(detector, [alone])
            np.testing.assert_allclose(found.maps[number], expected.maps[0], rtol=1e-4)
            assert found.scores[number] == found.maps[number].max()

    def test_prints_nothing(self, run: Run, capsys: pytest.CaptureFixture[str]):
        padim_jax.score(
            padim_jax.load(run.workdir / "checkpoint"), [np.zeros((9, 9, 3), np.uint8)]
        )
        assert capsys.readouterr() == ("", "")

    def test_after_a_fork(self, run: Run, monkeypatch: pytest.MonkeyPatch):
        detector = padim_jax.load(run.workdir / "checkpoint")
        monkeypatch.setattr(os, "getpid", lambda: detector.process + 1)
        with pytest.raises(UserError, match=r"forked, and neither JAX .*spawn"):
            padim_jax.score(detector, [np.zeros((64, 64, 3), np.uint8)])

    def test_no_images(self, run: Run):
        found = padim_jax.score(padim_jax.load(run.workdir / "checkpoint"), [])
        assert found.maps.shape == (0, 64, 64)
        assert found.scores.shape == (0,)

    @pytest.mark.parametrize(
        "image",
        [
            np.zeros((3, 64, 64), np.uint8),
            np.zeros((64, 64, 2, 3), np.uint8),
            np.zeros((64, 64, 3), np.float32),
        ],
    )
    def test_other_arrays_are_refused(self, image: np.ndarray, run: Run):
        detector = padim_jax.load(run.workdir / "checkpoint")
        right = np.zeros((64, 64, 3), np.uint8)
        with pytest.raises(TypeError, match=r"images\[1\]: .*expected"):
            padim_jax.score(detector, [right, image])

    def test_a_single_path_is_refused(self, run: Run):
        with pytest.raises(TypeError, match=r"a single image; .*as in \[image\]"):
            padim_jax.score(padim_jax.load(run.workdir / "checkpoint"), "a.png")

    def test_unreadable_image_is_named(self, run: Run, tmp_path: pathlib.Path):
        (tmp_path / "broken.png").write_bytes(b"")
        detector = padim_jax.load(run.workdir / "checkpoint")
        with pytest.raises(padim_jax.UserError, match=r"broken\.png"):
            padim_jax.score(detector, [tmp_path / "broken.png"])

    def test_experiment_is_what_the_command_runs(self, run: Run):
        """From a notebook, without a command line: the same numbers."""
        detector = loading.load(run.workdir / "checkpoint")
        dataset = dataset_splits.open_dataset(detector.config)
        again = run.workdir.parent / "again"
        measured = evaluate.evaluate(detector.config, detector, dataset["test"], again)
        assert measured == read_json(again / "metrics.json")
        assert metrics_of(again) == metrics_of(run.workdir)
