"""The flags of the command line, and how they become a request.

Flags of one mode, and what else it needs, are in `modes.MODES`.
"""

import dataclasses
import importlib.metadata
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

import padim_jax
from padim_jax.config import defaults
from padim_jax.config import settings as config_lib
from padim_jax.errors import UserError
from padim_jax.runs import modes
from padim_jax.system import ending, paths

_MOST_JOIN_SECONDS = 1e6  # eleven days

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration file, with a preset behind a colon. For eval and predict it may be left "
    "out: the checkpoint knows its own.",
    lock_config=True,
)
_CONFIG_MODULE = "config_config"  # as ml_collections calls the file's module
_OVERRIDE = re.compile(r"--?(?P<name>config\.[\w.]+)(?P<equals>=|$)")
_MODE = flags.DEFINE_enum("mode", "train_and_eval", list(modes.MODES), "What to do.")
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the results; default: results/<dataset>_<category>.",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "The fitted model, a folder or file; default: <workdir>/checkpoint."
)
_INPUT = flags.DEFINE_string(
    "input",
    None,
    "For predict: an image, a folder or a 'glob'. For calibrate and update: normal images, "
    "likewise; for update without it those of --config. For forget: images that the model was "
    "fitted to. For export with --format=onnx: images "
    "that the file is verified on; drawn ones without it.",
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
_ON_RESULT = flags.DEFINE_string(
    "on_result",
    None,
    "For --watch: a command, run without a shell, that gets each result's JSON line on its "
    "standard input; or an http or https URL that gets it by POST (docs/operations.md).",
)
_ON_RESULT_SECONDS = flags.DEFINE_float(
    "on_result_seconds", 10.0, "For --on_result: time-out of a delivery, which is tried again."
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
_FORMAT = flags.DEFINE_enum(
    "format",
    "model",
    ["model", "onnx", "stablehlo"],
    "For export: a model file of this program, or one for other runtimes (docs/deployment.md).",
)
_FRAME = flags.DEFINE_string(
    "frame",
    None,
    "For export with --format=onnx: HEIGHTxWIDTH of raw frames, which the file then resizes.",
)
_RUNTIME = flags.DEFINE_enum(
    "runtime",
    None,
    ["onnxruntime", "openvino"],
    "For predict and eval of an ONNX file, --checkpoint=part.onnx: what computes it; default: "
    "what is installed, ONNX Runtime first.",
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
STOPPED_CODE = flags.DEFINE_integer(
    "stopped_code",
    0,
    "Exit code after SIGTERM, when the unfinished fit is saved; not 0 for a scheduler that is "
    "to start it again.",
    lower_bound=0,
    upper_bound=255,
)
STRICT = flags.DEFINE_bool(
    "strict", False, "End with an error where there would be a warning about the data."
)

# All that a mode may be asked for beside its configuration; the same in all processes.
_REQUEST = (
    *(_WORKDIR, _CHECKPOINT, _INPUT, _WATCH, _POLL_SECONDS, _SETTLE_SECONDS),
    *(_ON_RESULT, _ON_RESULT_SECONDS),
    *(_MODELS, _WEIGHTS, _HALF, _FORMAT, _FRAME, _RUNTIME, _OVERWRITE, _DOWNLOAD),
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A checked command line.

    Attributes:
      mode: a key of `modes.MODES`.
      arguments: of `modes.run`, behind the mode.
      settings: what has to be the same in all processes, by name.
      join_seconds: how long the processes wait for each other at the start.
      place: which of how many processes this is: arguments of `distributed.arguments`.
    """

    mode: str
    arguments: Mapping[str, Any]
    settings: Mapping[str, str]
    join_seconds: float
    place: tuple[str | None, int | None, int | None, bool]


def command(overrides: Sequence[str]) -> Command:
    """Check the flags.

    Args:
      overrides: settings of a stored model's configuration, as `--config.x=y`.

    Raises:
      UserError: something to mend in the command or the configuration.
    """
    mode = _MODE.value
    if overrides and not modes.MODES[mode].stored:
        name = overrides[0].partition("=")[0]
        raise UserError(f"{name}: overrides a setting of --config, which is missing")
    replaced = _typed(overrides)
    values = _settings()
    given: dict[str, Any] = {
        flag.name: flag.value for flag in _REQUEST if flag.value != flag.default
    }
    if values is not None:
        given["config"] = values
    config = None if values is None else config_lib.validate(values)
    modes.check(mode, given, config)
    nested = config_lib.to_dict(config) if config is not None else dict(replaced)
    # Each machine's own affair.
    nested = {name: x for name, x in nested.items() if name.partition(".")[0] != "cache"}
    if not 0 < _JOIN_SECONDS.value <= _MOST_JOIN_SECONDS:
        raise UserError(
            f"--join_seconds={_JOIN_SECONDS.value}: expected a number of seconds above 0 and "
            f"at most {_MOST_JOIN_SECONDS:g}"
        )
    workdir = _workdir(config)
    checkpoint = paths.parse(given["checkpoint"]) if "checkpoint" in given else None
    places = ("config", "workdir", "checkpoint", "input")
    arguments = {name: value for name, value in given.items() if name not in places}
    arguments |= {
        "pattern": given.get("input"),
        "config": config if config is not None else replaced or None,
        "workdir": workdir,
        "checkpoint": workdir / "checkpoint" if checkpoint is None else checkpoint,
    }
    return Command(
        mode,
        arguments,
        _shared_settings(nested),
        _JOIN_SECONDS.value,
        (_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value),
    )


def _settings() -> Mapping[str, Any] | ml_collections.ConfigDict | None:
    """Return what --config gives, unchecked."""
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


def _shared_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that must be the same in all processes."""
    settings = {f"--{flag.name}": str(flag.value) for flag in (_MODE, *_REQUEST, STRICT)}
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


def parse(argv: list[str], about: str | None) -> list[str]:
    """Parse the command line; a mistake ends with one line and exit code 2.

    Args:
      argv: the program's name and its arguments.
      about: what --help says above the flags.

    Returns:
      The program's name, and overrides of a stored model's settings.
    """
    if {"--help", "-help", "-h", "--helpshort"} & set(argv[1:]):
        print(f"{about}\nFlags:\n{flags.FLAGS.module_help(__name__)}")
        sys.exit(0)
    try:
        rest, overrides = _split_overrides(_last_overrides(argv))
        remaining = flags.FLAGS(rest)
    except UserError as error:
        ending.fail(str(error))
    except Exception as error:  # a configuration file runs code: it can raise anything
        ending.fail(_explanation(error))
    if flags.FLAGS["verbosity"].using_default_value:
        # The libraries' INFO lines would bury our own; --verbosity=0 brings them back.
        logging.set_verbosity(logging.WARNING)
    if len(remaining) > 1:
        ending.fail(f"unexpected argument {remaining[1]!r}; every setting starts with --")
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
    """Explain an error of absl or ml_collections in one line."""
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
    return f"--config: no such setting {name!r}; padim_jax/config/settings.py lists them"


def require_one_process(place: tuple[str | None, int | None, int | None, bool]) -> None:
    """Reject flags of many processes: see `Command.place`.

    Raises:
      UserError: one of them is given.
    """
    if place not in ((None, None, None, False), (None, 1, None, False)):
        raise UserError(
            "--coordinator, --processes, --process_id, --distributed: an ONNX file is computed "
            "by one process; leave them out"
        )


def import_jax() -> None:
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
