"""PaDiM: fits one Gaussian per image patch to normal images and finds what deviates.

Modes:
  train_and_eval  fit, save, evaluate (the default)
  train           fit and save
  eval            evaluate a saved model
  predict         score images without labels: --input=IMAGE, FOLDER or 'GLOB'; with --watch
                  go on with those that arrive in the FOLDER
  calibrate       find thresholds on normal images that were not fitted: --input
  update          extend a saved model by normal images: --input, or the configuration's
  merge           join models of disjoint images: --models=A,B --checkpoint=JOINED
  export          write model.safetensors, for scoring alone; half the size with --half
  pretrain        train a backbone of your own on drawn images: --config=configs/pretrain.py

Examples:
  python -m padim_jax.main --config=configs/demo.py
  python -m padim_jax.main --config=configs/mvtec.py --config.category=bottle
  python -m padim_jax.main --config=configs/mvtec.py --config.category=all
  python -m padim_jax.main --config=configs/mvtec.py:seed --config.model.channels=448
  python -m padim_jax.main --config=configs/folder.py --config.dataset.root=/path/to/parts
  python -m padim_jax.main --mode=eval --workdir=results/mvtec_ad_bottle
  python -m padim_jax.main --mode=predict --workdir=results/mvtec_ad_bottle --input=parts/
  python -m padim_jax.main --config=configs/pretrain.py --mode=pretrain

`padim-jax` is the same as `python -m padim_jax.main`. Every setting of --config can be
overridden, as in --config.batch_size=16; without --config, those of a saved model.
padim_jax/config/defaults.py explains them all, and padim_jax/pretrain/defaults.py those of
--mode=pretrain.
Results go to --workdir. Exit codes: 0 done, 1 a bug or a failing machine, 2 something
to mend in the command, the settings, the files or the limits of memory, 130 interrupted
(Ctrl-C).
"""

import sys

if sys.platform == "win32":
    # Before imports of modules that only POSIX systems have.
    print("error: padim_jax runs on Linux and macOS, not on Windows; use WSL2", file=sys.stderr)
    sys.exit(2)

from padim_jax.system import interrupts, streams

if __name__ == "__main__":
    streams.install()
    interrupts.install()  # first, since the imports take their time

import atexit
import contextlib
import gc
import importlib.metadata
import os
import pathlib
import re
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TextIO

# XLA runs small factorisations in parallel already; the threads of OpenBLAS, which it
# calls for each, would fight for the same cores (measured with three cores busy: 10 to
# 25 times slower). To be set before NumPy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

import padim_jax
from padim_jax.config import defaults
from padim_jax.config import settings as config_lib
from padim_jax.config.datasets import MVTEC_AD
from padim_jax.errors import NO_MEMORY, DataWarning, Stopped, UserError, is_out_of_memory
from padim_jax.pretrain import config as pretrain_config
from padim_jax.system import paths

_MOST_JOIN_SECONDS = 1e6  # eleven days

MODES = (
    *("train_and_eval", "train", "eval", "predict"),
    *("calibrate", "update", "merge", "export", "pretrain"),
)

_OF_STORED_MODELS = ("eval", "predict", "calibrate", "update", "export")

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration file, with a preset behind a colon. For eval and predict it may be left "
    "out: the checkpoint knows its own.",
    lock_config=True,
)
_CONFIG_MODULE = "config_config"  # as ml_collections calls the file's module
_OVERRIDE = re.compile(r"--?(?P<name>config\.[\w.]+)(?P<equals>=|$)")
_MODE = flags.DEFINE_enum("mode", MODES[0], MODES, "What to do.")
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the results; default: results/<dataset>_<category>, for pretrain "
    "results/pretrain.",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "The fitted model, a folder or file; default: <workdir>/checkpoint."
)
_INPUT = flags.DEFINE_string(
    "input",
    None,
    "For predict: an image, a folder or a 'glob'. For calibrate and update: normal images, "
    "likewise; for update without it those of --config.",
)
_WATCH = flags.DEFINE_bool(
    "watch",
    False,
    "For predict: score the images of the folder --input, and then those that arrive there, "
    "until SIGTERM or Ctrl-C.",
)
_POLL_SECONDS = flags.DEFINE_float(
    "poll_seconds", 0.25, "For --watch: between two looks at the folder."
)
_SETTLE_SECONDS = flags.DEFINE_float(
    "settle_seconds",
    0.5,
    "For --watch: a file is taken when it has not changed for so long; 0 where files are only "
    "ever moved in.",
)
_MODELS = flags.DEFINE_list("models", [], "For merge: the checkpoints to join.")
_WEIGHTS = flags.DEFINE_string(
    "weights",
    None,
    "For all but training: where the backbone's weights are now, if not where they were when "
    "the model was fitted.",
)
_HALF = flags.DEFINE_bool(
    "half", False, "For export: float16, half the size; the change is measured and stored."
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite",
    False,
    "Replace the results and the model of another data set; for several categories or repeats: "
    "do again those that are finished.",
)
_DOWNLOAD = flags.DEFINE_bool(
    "download", False, "Download MVTec AD to config.dataset.root first, if it is not there."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "For many processes: HOST:PORT, where all reach process 0."
)
_PROCESSES = flags.DEFINE_integer(
    "processes",
    None,
    "How many processes run this command (launch/README.md); 1 for this one on its own, "
    "whatever started it.",
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this one is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Join the processes that SLURM, Open MPI or Kubernetes started, instead of those three.",
)
_JOIN_SECONDS = flags.DEFINE_float(
    "join_seconds", 300.0, "How long the processes wait for each other at the start."
)
_STOPPED_CODE = flags.DEFINE_integer(
    "stopped_code",
    0,
    "Exit code after SIGTERM, when the unfinished fit is saved; not 0 for a scheduler that is "
    "to start it again.",
    lower_bound=0,
    upper_bound=255,
)
_STRICT = flags.DEFINE_bool(
    "strict", False, "End with an error where there would be a warning about the data."
)

# What says nothing to --mode=pretrain, and what to do instead.
_NOT_FOR_PRETRAIN = (
    (_CHECKPOINT, "it saves in --workdir"),
    (_INPUT, "images of your own are --config.images.photos"),
    (_WATCH, "it is a form of --mode=predict"),
    (_POLL_SECONDS, "it is for --watch"),
    (_SETTLE_SECONDS, "it is for --watch"),
    (_MODELS, "it names what to merge"),
    (_WEIGHTS, "weights to go on from are --config.start"),
    (_HALF, "it is a form of --mode=export"),
    (
        _OVERWRITE,
        "an unfinished training goes on, a finished one stays; another --workdir begins anew",
    ),
    (_DOWNLOAD, "it is for --config.dataset.name=mvtec_ad"),
)


def main(argv: Sequence[str]) -> None:
    """Checks the command, then hands over to what does it.

    Args:
      argv: the program's name, then overrides of a stored model's settings.
    """
    mode, overrides = _MODE.value, list(argv[1:])
    if overrides and mode not in _OF_STORED_MODELS:
        name = overrides[0].partition("=")[0]
        raise UserError(f"{name}: overrides a setting of --config, which is missing")
    if mode == "pretrain":
        _run_pretraining()
    else:
        _run_experiment(mode, _typed(overrides))


def _run_pretraining() -> None:
    values = _settings()
    if values is None:
        raise UserError(
            "--config: missing; --mode=pretrain needs one, as in --config=configs/pretrain.py"
        )
    if "dataset" in values and "optimizer" not in values:
        raise UserError(
            f"--mode=pretrain: {_config_file()} is no recipe of a pretraining; expected one, "
            "as in --config=configs/pretrain.py"
        )
    recipe = pretrain_config.validate(values)
    for flag, instead in _NOT_FOR_PRETRAIN:
        if flag.value != flag.default:
            raise UserError(f"--{flag.name}: not for --mode=pretrain; {instead}")
    given = _WORKDIR.value
    workdir = paths.parse("results/pretrain" if given is None else given, needed=False)
    if not isinstance(workdir, pathlib.Path):
        raise UserError(
            f"--workdir={workdir}: --mode=pretrain writes on file systems only; name a "
            "folder there"
        )

    settings = _shared_settings(pretrain_config.to_dict(recipe))

    # Only now what takes long to import: a mistake should not have to wait for it.
    _import_jax()
    from padim_jax.pretrain import run

    with _joined(settings), paths.explained():
        run.pretrain(recipe, workdir)


def _run_experiment(mode: str, overrides: config_lib.Overrides) -> None:
    config = _config(mode)
    _check_flags(mode, config)
    workdir = _workdir(config)
    given = _CHECKPOINT.value
    checkpoint = paths.parse(given) if given else workdir / "checkpoint"

    nested = config_lib.to_dict(config) if config is not None else dict(overrides)
    # Each machine's own affair.
    nested = {name: x for name, x in nested.items() if name.partition(".")[0] != "cache"}
    settings = _shared_settings(nested)

    # Only now what takes long to import: a mistake should not have to wait for it.
    _import_jax()
    from padim_jax.devices import parallel
    from padim_jax.runs import experiment, sweep, watch

    with _joined(settings), paths.explained():
        parallel.every()  # devices that are not there are said first
        if _DOWNLOAD.value:
            from padim_jax.data import download

            assert config is not None
            categories: Sequence[str] = config.category.split(",")
            if config.category == config_lib.ALL:
                categories = MVTEC_AD
            with parallel.first_process_first():
                for category in categories:
                    download.mvtec_ad(config.dataset.root, category)
        if config is not None and config.is_sweep:
            sweep.run(config, workdir, _OVERWRITE.value)
            return
        experiment.run(
            mode,
            config or overrides or None,
            workdir,
            checkpoint,
            _INPUT.value,
            _WEIGHTS.value,
            _HALF.value,
            _MODELS.value,
            watch.Timing(_POLL_SECONDS.value, _SETTLE_SECONDS.value) if _WATCH.value else None,
            _OVERWRITE.value,
        )


def _import_jax() -> None:
    """Import JAX, which reads its settings from the environment.

    Raises:
      UserError: one of them is wrong.
    """
    try:
        import jax  # noqa: F401
    except ValueError as error:
        setting = re.search(r"jax_\w+", str(error), re.IGNORECASE)
        if setting is None:
            raise
        name = setting[0].upper()
        raise UserError(
            f"{name}={os.environ.get(name, '')}: not a value that JAX takes "
            f"({_one_line(error)}); correct or unset this variable of the environment"
        ) from error


def _joined(settings: Mapping[str, str]) -> contextlib.AbstractContextManager[None]:
    """Join the processes that run this command, if there are several."""
    from padim_jax.devices import distributed

    if not 0 < _JOIN_SECONDS.value <= _MOST_JOIN_SECONDS:
        raise UserError(
            f"--join_seconds={_JOIN_SECONDS.value}: expected a number of seconds above 0 and "
            f"at most {_MOST_JOIN_SECONDS:g}"
        )
    launch = distributed.arguments(
        _COORDINATOR.value,
        _PROCESSES.value,
        _PROCESS_ID.value,
        _DISTRIBUTED.value,
        os.environ,
    )
    return distributed.session(launch, settings, _JOIN_SECONDS.value)


def _settings() -> Mapping[str, Any] | ml_collections.ConfigDict | None:
    """What --config gives, unchecked."""
    if not _CONFIG.present:
        return None
    values = _CONFIG.value
    try:
        # ml_collections reports a file that it could not open on first use.
        settings = hasattr(values, "keys")
    except OSError as error:
        raise UserError(f"--config: {_one_line(error.__cause__ or error)}") from error
    if not settings:
        kind = type(values).__name__
        raise UserError(f"--config: get_config() returns {kind}; expected a ConfigDict")
    return values


def _config_file() -> str:
    """As it was given."""
    return config_flags.get_config_filename(flags.FLAGS[_CONFIG.name])


def _config(mode: str) -> config_lib.Config | None:
    values = _settings()
    if values is None:
        return None
    if "optimizer" in values and "dataset" not in values:
        raise UserError(f"--mode={mode}: {_config_file()} is a recipe for --mode=pretrain")
    return config_lib.validate(values)


def _check_flags(mode: str, config: config_lib.Config | None) -> None:
    if config is None and mode in ("train_and_eval", "train"):
        raise UserError(
            f"--config: missing; --mode={mode} needs one, as in --config=configs/mvtec.py"
        )
    if _WATCH.value and mode != "predict":
        raise UserError(f"--watch: not for --mode={mode}; it is a form of --mode=predict")
    for flag, lowest in ((_POLL_SECONDS, 0.01), (_SETTLE_SECONDS, 0.0)):
        if not _WATCH.value and flag.value != flag.default:
            raise UserError(f"--{flag.name}: for --watch, which is missing")
        if not lowest <= flag.value <= 3600:
            raise UserError(f"--{flag.name}={flag.value}: expected {lowest:g} to 3600 seconds")
    if mode == "merge" and _CHECKPOINT.value is None:
        raise UserError("--checkpoint: missing; expected the folder of the merged model")
    if mode == "merge" and len(_MODELS.value) < 2:
        raise UserError(
            f"--models={','.join(_MODELS.value)}: expected two or more checkpoints to merge, "
            "as in --models=a/checkpoint,b/checkpoint"
        )
    if mode == "merge" and config is not None:
        raise UserError("--config: not for --mode=merge; the models have theirs")
    if mode != "merge" and _MODELS.value:
        raise UserError(f"--models: not for --mode={mode}; it names what to merge")
    if mode == "update" and config is None and not _INPUT.value:
        raise UserError("--input: missing; expected the normal images to add (or a --config)")
    if config is None and _WORKDIR.value is None and _CHECKPOINT.value is None:
        raise UserError(f"--mode={mode} needs --config, --workdir or --checkpoint")
    if mode == "predict" and not _INPUT.value:
        raise UserError("--input: missing; expected the image, folder or glob to predict")
    if mode == "calibrate" and not _INPUT.value:
        raise UserError(
            "--input: missing; expected normal images (a folder, or a glob) that the model was "
            "not fitted to"
        )
    if mode not in ("predict", "calibrate", "update") and _INPUT.value is not None:
        raise UserError(
            f"--input: not for --mode={mode}; it names what to predict, to find thresholds on "
            "or to add"
        )
    sweep = config is not None and config.is_sweep
    if sweep and mode != "train_and_eval":
        raise UserError(
            f"--mode={mode}: of one run only, and not of a sweep of several; name one "
            "config.category and leave config.repeats at 1"
        )
    if sweep and _CHECKPOINT.value is not None:
        raise UserError("--checkpoint: not for several runs; each has its own in --workdir")
    if _OVERWRITE.value and mode not in ("train_and_eval", "train", "eval"):
        raise UserError(
            f"--overwrite: not for --mode={mode}; it replaces the results and the model of "
            "another data set, and does a sweep's finished runs again"
        )
    if _HALF.value and mode != "export":
        raise UserError(f"--half: not for --mode={mode}; it is a form of --mode=export")
    if _WEIGHTS.value is not None and mode in ("train", "train_and_eval"):
        raise UserError(f"--weights: not for --mode={mode}; set --config.model.weights")
    if _WEIGHTS.value is not None and mode == "merge":
        raise UserError("--weights: not for --mode=merge, which takes those of the models")
    if _DOWNLOAD.value and (config is None or config.dataset.name != "mvtec_ad"):
        raise UserError("--download: only for --config.dataset.name=mvtec_ad")


def _shared_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """What has to be the same in all processes, for comparison."""
    given = (
        *(_MODE, _WORKDIR, _CHECKPOINT, _INPUT, _MODELS, _WEIGHTS),
        *(_HALF, _STRICT, _DOWNLOAD, _OVERWRITE, _WATCH, _POLL_SECONDS, _SETTLE_SECONDS),
    )
    settings = {f"--{flag.name}": str(flag.value) for flag in given}
    settings["version of padim_jax"] = padim_jax.__version__
    settings["version of jax"] = importlib.metadata.version("jax")
    for name, value in config.items():
        for key, setting in value.items() if isinstance(value, dict) else [("", value)]:
            settings[f"config.{name}.{key}".rstrip(".")] = str(setting)
    return settings


def _workdir(config: config_lib.Config | None) -> paths.Path:
    if _WORKDIR.value is not None:
        return paths.parse(_WORKDIR.value)
    if config is not None:
        return pathlib.Path("results") / config.title
    return paths.absolute(paths.parse(_CHECKPOINT.value or "")).parent


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses the command line; a mistake ends with one line and exit code 2."""
    if {"--help", "-help", "-h", "--helpshort"} & set(argv[1:]):
        print(f"{__doc__}\nFlags:\n{flags.FLAGS.module_help(__name__)}")
        sys.exit(0)
    try:
        rest, overrides = _split_overrides(_last_overrides(argv))
        remaining = flags.FLAGS(rest)
    except UserError as error:
        _fail(str(error))
    except Exception as error:  # a configuration file runs code: it can raise anything
        _fail(_explanation(error))
    if flags.FLAGS["verbosity"].using_default_value:
        # The libraries' INFO lines would bury our own; --verbosity=0 brings them back.
        logging.set_verbosity(logging.WARNING)
    if len(remaining) > 1:
        _fail(f"unexpected argument {remaining[1]!r}; every setting starts with --")
    return [*remaining, *overrides]


def _last_overrides(argv: Sequence[str]) -> list[str]:
    """Drop overrides that a later one replaces: ml_collections would join those of a tuple."""
    kept: list[str] = []
    overridden: set[str] = set()
    for argument in reversed(argv):
        override = _OVERRIDE.match(argument)
        if override and override["name"] in overridden:
            if not override["equals"] and kept and not kept[-1].startswith("-"):
                kept.pop()  # its value, as in `--config.image.resize (96, 96)`
            continue
        if override:
            overridden.add(override["name"])
        kept.append(argument)
    return kept[::-1]


def _split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take overrides out of a command without --config, where they are of a stored model."""
    if any(re.match(r"--?(config|flagfile)(=|$)", argument) for argument in argv):
        return list(argv), []
    rest: list[str] = []
    overrides: list[str] = []
    is_value = False  # of the argument before, as in `--config.image.resize (96, 96)`
    for argument, after in zip(argv, [*argv[1:], "-"], strict=True):
        override = _OVERRIDE.match(argument)
        (overrides if override or is_value else rest).append(argument)
        is_value = bool(override and not override["equals"]) and not after.startswith("-")
    return rest, overrides


def _typed(overrides: Sequence[str]) -> config_lib.Overrides:
    """Return the values of `--config.x=y` by name, of the types in `defaults`."""
    if not overrides:
        return {}
    parsed, argv = flags.FlagValues(), ["", *overrides]
    try:
        config_flags.DEFINE_config_dict(
            "config", defaults.get_config(), flag_values=parsed, lock_config=True, sys_argv=argv
        )
        parsed(argv)
    except Exception as error:
        raise UserError(_explanation(error)) from error
    return config_flags.get_override_values(parsed["config"])


def _explanation(error: Exception) -> str:
    """What is wrong with the command line, from what absl or ml_collections raised."""
    cause: BaseException | None = error
    while cause is not None:  # both wrap what the configuration file raises
        for frame, line in traceback.walk_tb(cause.__traceback__):
            if frame.f_globals.get("__name__") == _CONFIG_MODULE:
                place = f"{frame.f_code.co_filename}, line {line}"
                return f"--config: {place}: {type(cause).__name__}: {_one_line(cause)}"
        if isinstance(cause, TypeError) and "get_config() takes 0 " in str(cause):
            return "--config: the file has no presets; leave out what is behind the colon"
        cause = cause.__context__
    if isinstance(error, AttributeError) and error.name == "get_config":
        return "--config: the file has no function get_config()"
    if isinstance(error, KeyError | AttributeError):
        return _unknown_setting(str(error))
    if isinstance(error, flags.UnrecognizedFlagError) and error.flagname.startswith("config."):
        return f"--{error.flagname}: overrides a setting of --config, which is missing"
    if isinstance(error, flags.Error):
        return str(error)
    return f"--config: {type(error).__name__}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _unknown_setting(message: str) -> str:
    """A typo below --config, from the error of a locked ConfigDict's look-up."""
    close = re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message)
    if close:
        return f"--config: no such setting {close[2]!r}; did you mean {close[1]!r}?"
    name = "".join(re.findall(r"\w", message))
    return (
        f"--config: no such setting {name!r}; padim_jax/config/defaults.py lists them, and "
        "padim_jax/pretrain/defaults.py those of --mode=pretrain"
    )


def _fail(message: str) -> NoReturn:
    print(f"error: {_printable(message)}", file=sys.stderr)
    # A save that failed may leave threads of Orbax's that wait five minutes for its folder.
    if any(type(thread).__name__ == "_SignalingThread" for thread in threading.enumerate()):
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(2)
    sys.exit(2)


def _printable(message: str) -> str:
    # Names of files may hold what a terminal would act on, or cannot print.
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in message)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a `DataWarning` as one line, above the progress bars; others as Python does."""
    if not issubclass(category, DataWarning):
        text = warnings.formatwarning(message, category, filename, lineno, line)
        (file or sys.stderr).write(text)
        return
    import tqdm

    tqdm.tqdm.write(f"warning: {_printable(str(message))}", file=sys.stderr)


def _main(argv: Sequence[str]) -> None:
    warnings.simplefilter("error" if _STRICT.value else "always", DataWarning)
    warnings.showwarning = _show_warning
    try:
        main(argv)
    except UserError as error:
        _fail(str(error))
    except Stopped as stop:
        print(stop)
        sys.exit(_STOPPED_CODE.value)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _fail(NO_MEMORY)


def run() -> None:
    """The console script `padim-jax`."""
    streams.install()
    interrupts.install()
    # A last search for garbage, in all that was imported, takes up to half a second.
    atexit.register(gc.freeze)
    app.run(_main, flags_parser=_parse_flags)


if __name__ == "__main__":
    run()
