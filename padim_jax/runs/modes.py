"""The modes of the command line: the function that each runs, and the flags that it takes.

Importing this module imports nothing heavy: a mistake in a command should not wait for JAX.
"""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from padim_jax.config.datasets import MVTEC_AD
from padim_jax.config.settings import ALL, Config, Overrides
from padim_jax.errors import UserError
from padim_jax.system import paths
from padim_jax.system.paths import Path


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of a mode.

    Attributes:
      config: the validated configuration; for modes that use a stored model None, or settings
        that replace some of the model's own (see `loading.load`).
      workdir: folder of the results.
      checkpoint: where the fitted model is or goes.
      pattern: an image file, a folder or a glob (--input).
      watch: whether to go on with the images that arrive in the folder `pattern`.
      poll_seconds: between two looks at that folder.
      settle_seconds: a file is taken when it has not changed for so long.
      on_result: a command or a URL that gets each JSON line of `watch`.
      on_result_seconds: time-out of such a delivery.
      models: the checkpoints to merge.
      weights: where the backbone's weights are now, if they were moved.
      half: whether an exported model is rounded to float16.
      format: what is exported: "model", "onnx" or "stablehlo".
      frame: size of the frames that an exported ONNX file takes, as "HxW".
      runtime: what computes an ONNX file: "onnxruntime" or "openvino".
      overwrite: whether to replace the results and the model of another data set.
      download: whether to download MVTec AD if it is missing.
    """

    config: Any
    workdir: Path
    checkpoint: Path
    pattern: str | None = None
    watch: bool = False
    poll_seconds: float = 0.25
    settle_seconds: float = 0.5
    on_result: str | None = None
    on_result_seconds: float = 10.0
    models: Sequence[str] = ()
    weights: str | None = None
    half: bool = False
    format: str = "model"
    frame: str | None = None
    runtime: Any = None
    overwrite: bool = False
    download: bool = False


@dataclasses.dataclass(frozen=True)
class Mode:
    """One mode of the command line.

    Attributes:
      run: what it does.
      takes: names of the flags that it takes, beside those of every mode.
      needs: flags that must be given, and what is expected.
      instead: for flags that it does not take, what to do; where it differs from `_PURPOSES`.
      stored: whether it uses a stored model, some of whose settings may be overridden.
    """

    run: Callable[[Request], None]
    takes: frozenset[str]
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    instead: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stored: bool = False


# What flags are for that only some modes take.
_PURPOSES = {
    "input": "it names what to predict, to find thresholds on, to add, to forget or to verify "
    "on",
    "watch": "it is a form of --mode=predict",
    "poll_seconds": "it is for --watch",
    "settle_seconds": "it is for --watch",
    "on_result": "it is for --watch",
    "on_result_seconds": "it is for --on_result",
    "models": "it names what to merge",
    "half": "it is a form of --mode=export",
    "format": "it is for --mode=export",
    "frame": "it is for --mode=export --format=onnx",
    "runtime": "it is for --mode=predict and --mode=eval of an ONNX file",
    "overwrite": "it replaces the results and the model of another data set, and does a "
    "sweep's finished runs again",
}


def _train_and_eval(request: Request) -> None:
    from padim_jax.runs import sweep, train

    if request.config.is_sweep:
        sweep.run(request.config, request.workdir, request.overwrite)
        return
    train.train_and_eval(
        request.config, request.workdir, request.checkpoint, overwrite=request.overwrite
    )


def _train(request: Request) -> None:
    from padim_jax.runs import train

    _require_own_suspects(request.workdir)
    train.train_alone(request.config, request.workdir, request.checkpoint, request.overwrite)


def _eval(request: Request) -> None:
    from padim_jax.data import dataset_splits
    from padim_jax.runs import evaluate

    with _loaded(request) as detector:
        dataset = dataset_splits.open_dataset(detector.config)
        dataset_splits.say_folders(detector.config, {"test": dataset["test"]})
        evaluate.evaluate(
            detector.config, detector, dataset["test"], request.workdir, request.overwrite
        )


def _predict(request: Request) -> None:
    from padim_jax.data import listing
    from padim_jax.data.input_pipeline import FolderSource
    from padim_jax.runs import handover, predict, watch

    assert request.pattern is not None
    if request.watch:
        send = None
        if request.on_result is not None:
            send = handover.sender(request.on_result, request.on_result_seconds)
        folder = _local_folder(request.pattern)
        timing = watch.Timing(request.poll_seconds, request.settle_seconds)
        with _loaded(request) as detector:
            watch.watch(detector, folder, request.workdir, timing, send)
        return
    source = FolderSource(listing.find(request.pattern))
    with _loaded(request) as detector:
        predict.predict(detector, source, request.workdir)


def _calibrate(request: Request) -> None:
    from padim_jax.data import listing
    from padim_jax.data.input_pipeline import FolderSource
    from padim_jax.detector import scoring_pass
    from padim_jax.runs import calibrate, evaluate

    assert request.pattern is not None
    source = FolderSource(listing.find(request.pattern))
    _require_checkpoint(request.checkpoint, "calibrate")
    with _loaded(request) as detector:
        config = scoring_pass.for_new_images(detector).config
        sources, _ = scoring_pass.readable(config, {"input": source}, cached=False)
        evaluate.take_survey(sources, config, cached=False)
        calibrate.calibrate(detector, sources["input"], "given", request.checkpoint)


def _update(request: Request) -> None:
    from padim_jax.data import dataset_splits, listing
    from padim_jax.data.input_pipeline import FolderSource
    from padim_jax.runs import grow

    _require_own_suspects(request.workdir)
    config, checkpoint = request.config, request.checkpoint
    if request.pattern is not None:
        source = FolderSource(listing.find(request.pattern))
        grow.update(checkpoint, source, config, request.weights, workdir=request.workdir)
        return
    dataset = dataset_splits.open_dataset(config)
    dataset_splits.say_folders(config, {"train": dataset["train"]})
    dataset = grow.as_fitted(config, dataset)
    grow.update(checkpoint, dataset["train"], config, request.weights, dataset, request.workdir)


def _forget(request: Request) -> None:
    from padim_jax.data import listing
    from padim_jax.data.input_pipeline import FolderSource
    from padim_jax.runs import grow

    assert request.pattern is not None
    _require_own_suspects(request.workdir)
    source = FolderSource(listing.find(request.pattern))
    config, weights = request.config, request.weights
    grow.forget(request.checkpoint, source, config, weights, workdir=request.workdir)


def _merge(request: Request) -> None:
    from padim_jax.runs import grow

    _require_own_suspects(request.workdir)
    grow.merge(request.models, request.checkpoint, request.workdir)


def _export(request: Request) -> None:
    from padim_jax.data import dataset_splits, listing
    from padim_jax.detector import scoring_pass
    from padim_jax.runs import export

    _require_checkpoint(request.checkpoint, "export")
    images = None
    if request.pattern is not None:
        images = [record.image for record in listing.find(request.pattern)]
    with _loaded(request, scores=False) as detector:
        test = None
        if request.half:
            sources = {"test": dataset_splits.open_dataset(detector.config)["test"]}
            test = scoring_pass.readable(detector.config, sources)[0]["test"]
        path = request.workdir / f"model{export.SUFFIXES[request.format]}"
        frame = None if request.frame is None else _frame(request.frame)
        export.export(detector, path, request.half, test, frame, images)


def _frame(text: str) -> tuple[int, int]:
    size = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if size is None or 0 in (found := (int(size[1]), int(size[2]))):
        raise UserError(f"--frame={text}: expected height and width, as in --frame=900x1200")
    return found


@contextlib.contextmanager
def _loaded(request: Request, scores: bool = True) -> Iterator[Any]:
    """Load the stored model of a request, and keep what is compiled for it.

    With `scores`, the origin of its weights is printed.
    """
    if scores_without_jax(request.checkpoint):
        from padim_jax.runs import scoring

        path, config = request.checkpoint, request.config
        exported = scoring.load(path, config, request.weights, request.runtime)
        print(f"weights: {exported.weights.origin}, in {exported.runtime}")
        yield exported
        return
    from padim_jax.runs import loading
    from padim_jax.system import compilation_cache

    detector = loading.load(request.checkpoint, request.config, request.weights)
    with compilation_cache.enabled(detector.config.cache.programs):
        if scores:
            print(f"weights: {detector.weights.origin}")
        yield detector


def _require_own_suspects(workdir: Path) -> None:
    """Refuse another program's suspects.csv before a fit rather than after it."""
    from padim_jax.devices import parallel
    from padim_jax.output import results

    if parallel.every().process == 0:
        results.require_own_suspects(workdir)


def _require_checkpoint(path: Path, mode: str) -> None:
    if path.is_file():
        # It may be rounded already, and what was written once is not changed.
        raise UserError(
            f"{path}: --mode={mode} takes a checkpoint, and this is a model file; name the "
            "checkpoint's folder with --checkpoint"
        )


def _local_folder(pattern: str) -> pathlib.Path:
    folder = paths.parse(pattern)
    if not isinstance(folder, pathlib.Path):
        raise UserError(f"--input={pattern}: --watch is for folders of this machine")
    if not folder.is_dir():
        raise UserError(f"--input={pattern}: no such folder; expected the one to watch")
    return folder


_FITS = frozenset({"config", "checkpoint", "overwrite", "download"})
_USES = frozenset({"config", "checkpoint", "weights", "download"})
_WEIGHTS = {"weights": "set --config.model.weights"}
_CONFIG = {"config": "--mode={mode} needs one, as in --config=configs/mvtec.py"}

MODES = {
    "train_and_eval": Mode(_train_and_eval, _FITS, _CONFIG, _WEIGHTS),
    "train": Mode(_train, _FITS, _CONFIG, _WEIGHTS),
    "eval": Mode(_eval, _USES | {"overwrite", "runtime"}, stored=True),
    "predict": Mode(
        _predict,
        _USES
        | {"input", "watch", "poll_seconds", "settle_seconds", "runtime"}
        | {"on_result", "on_result_seconds"},
        {"input": "expected the image, folder or glob to predict"},
        stored=True,
    ),
    "calibrate": Mode(
        _calibrate,
        _USES | {"input"},
        {
            "input": "expected normal images (a folder, or a glob) that the model was not "
            "fitted to"
        },
        stored=True,
    ),
    "update": Mode(_update, _USES | {"input"}, stored=True),
    "forget": Mode(
        _forget,
        _USES | {"input"},
        {"input": "expected images that the model was fitted to and is to forget"},
        stored=True,
    ),
    "merge": Mode(
        _merge,
        frozenset({"checkpoint", "models"}),
        {"checkpoint": "expected the folder of the merged model"},
        {
            "config": "the models have theirs",
            "weights": "it takes those of the models",
            "download": "the models have their images",
        },
    ),
    "export": Mode(_export, _USES | {"half", "format", "frame", "input"}, stored=True),
}


def scores_without_jax(checkpoint: Path) -> bool:
    """Return whether a model is an ONNX file, which another runtime computes."""
    return checkpoint.suffix == ".onnx"


def check(mode: str, given: Mapping[str, Any], config: Config | None) -> None:
    """Refuse a command that a mode cannot carry out.

    Args:
      mode: a key of `MODES`.
      given: values of the flags that are not at their default, by name.
      config: the validated configuration, if there is one of fits.

    Raises:
      UserError: a flag is missing, of another mode, or has a value out of its bounds.
    """
    for flag, expected in MODES[mode].needs.items():
        if not given.get(flag):
            raise UserError(f"--{flag}: missing; {expected.format(mode=mode)}")
    purposes = {**_PURPOSES, **MODES[mode].instead}
    for flag in given:
        if flag in purposes and flag not in MODES[mode].takes:
            raise UserError(f"--{flag}: not for --mode={mode}; {purposes[flag]}")
    if "on_result_seconds" in given and "on_result" not in given:
        raise UserError("--on_result_seconds: for --on_result, which is missing")
    if "on_result" in given and "watch" not in given:
        raise UserError("--on_result: for --watch, which is missing")
    seconds = {"poll_seconds": 0.01, "settle_seconds": 0.0, "on_result_seconds": 0.1}
    for flag, lowest in seconds.items():
        if flag in given and "watch" not in given:
            raise UserError(f"--{flag}: for --watch, which is missing")
        if not lowest <= given.get(flag, lowest) <= 3600:
            raise UserError(f"--{flag}={given[flag]}: expected {lowest:g} to 3600 seconds")
    if str(given.get("checkpoint", "")).endswith(".onnx"):
        if mode not in ("predict", "eval"):
            raise UserError(
                f"--checkpoint={given['checkpoint']}: an ONNX file, for --mode=predict and "
                f"--mode=eval; for --mode={mode} name the checkpoint that it was exported from"
            )
    elif "runtime" in given:
        raise UserError("--runtime: for an ONNX file alone, as in --checkpoint=part.onnx")
    if given.get("format") != "onnx":
        for flag in ("frame", "input") if mode == "export" else ():
            if flag in given:
                raise UserError(f"--{flag}: for --mode=export --format=onnx alone")
    if given.get("format") == "stablehlo" and "half" in given:
        raise UserError("--half: not for --format=stablehlo, which holds float32 numbers")
    models = given.get("models", [])
    if mode == "merge" and len(models) < 2:
        raise UserError(
            f"--models={','.join(models)}: expected two or more checkpoints to merge, as in "
            "--models=a/checkpoint,b/checkpoint"
        )
    if mode == "update" and not {"config", "input"} & set(given):
        raise UserError("--input: missing; expected the normal images to add (or a --config)")
    if not {"config", "workdir", "checkpoint"} & set(given):
        raise UserError(f"--mode={mode} needs --config, --workdir or --checkpoint")
    if config is not None and config.is_sweep:
        if mode != "train_and_eval":
            raise UserError(
                f"--mode={mode}: of one run only, and not of a sweep of several; name one "
                "config.category and leave config.repeats at 1"
            )
        if "checkpoint" in given:
            raise UserError("--checkpoint: not for several runs; each has its own in --workdir")
    if "download" in given and (config is None or config.dataset.name != "mvtec_ad"):
        raise UserError("--download: only for --config.dataset.name=mvtec_ad")


def run(
    mode: str,
    config: Config | Overrides | None,
    workdir: Path,
    checkpoint: Path,
    pattern: str | None = None,
    **arguments: Any,
) -> None:
    """Run a mode.

    Args:
      mode: a key of `MODES`.
      config: see `Request`.
      workdir: folder of the results.
      checkpoint: where the fitted model is or goes.
      pattern: an image file, a folder or a glob.
      **arguments: further fields of `Request`.

    Raises:
      UserError: something to mend in the settings or the files, or too little memory.
      Stopped: by SIGTERM, during a fit.
    """
    from padim_jax.detector import memory
    from padim_jax.devices import parallel

    request = Request(config, workdir, checkpoint, pattern, **arguments)
    parallel.every()  # missing devices are reported before anything else
    if request.download:
        _download(request.config)
    memory.limit_images()
    try:
        MODES[mode].run(request)
    except RuntimeError as error:  # JAX's are of this class
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"not enough memory ({' '.join(str(error).split())}). Statistics grow with patches "
            "and channels: lower config.model.channels or config.image.resize, or start "
            "config.model.layers at a deeper one; config.batch_size bounds only the rest"
        ) from error


def _download(config: Config) -> None:
    from padim_jax.data import download
    from padim_jax.devices import parallel

    categories: Sequence[str] = config.category.split(",")
    if config.category == ALL:
        categories = MVTEC_AD
    with parallel.first_process_first():
        for category in categories:
            download.mvtec_ad(config.dataset.root, category)
