"""Many runs in one command: every category, every repeat; then one table of them all.

Processes and hosts that are given the same command and workdir share the runs out: each
takes the next one that nobody has finished or is at. A run is taken by a lock on a file,
which the system gives back when its process ends, in whatever way; object stores have none,
and there a sweep is for one command alone. In the end each looks again at what others had
begun, and does what was left behind.

A run is finished if its results are of these settings, weights, images, labels and masks.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import padim_jax
from padim_jax.config import settings as config_lib
from padim_jax.config.settings import ALL, Config
from padim_jax.data import dataset_splits, image_cache, input_pipeline, inputs
from padim_jax.data.layouts import LAYOUTS
from padim_jax.devices import parallel
from padim_jax.devices.parallel import Devices
from padim_jax.errors import NO_MEMORY, Stopped, UserError, is_out_of_memory
from padim_jax.output import html, sweep_table
from padim_jax.runs import fitting, results_folder, train
from padim_jax.runs.fitting import Backbone
from padim_jax.system import compilation_cache, locks, paths, progress
from padim_jax.system.paths import Path

_LOG, _CONFIG, _METRICS = "log.txt", "config.json", results_folder.METRICS
_ERROR = "error.txt"  # of a run that failed, until it is tried again
# What a run's metrics do not depend on.
_ASIDE = ("batch_size", "cache", "outputs", "train")
_BY_CONTENT = ("config.dataset.root", "config.dataset.tfds_dir", "config.model.weights")
_LOG_SIGN = "padim_jax"  # begins a run's log, and says whose it is
_SHOWN = (("image AUROC", "image_auroc"), ("pixel AUROC", "pixel_auroc"), ("AUPRO", "aupro"))
# What there is to say of a run; the first is done.
_FREE, _TAKEN = "free", "another process is at it"
_STATES = (
    _FREE,
    "finished already (--overwrite does it again)",
    _TAKEN,
    "failed in another process",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One fit and evaluation of a sweep.

    Attributes:
      name: its folder below the sweep's.
      category: which.
      repeat: from 0; its seeds are so much higher than the sweep's.
      config: its own.
      workdir: of its results.
    """

    name: str
    category: str
    repeat: int
    config: Config
    workdir: Path


def plan(config: Config, workdir: Path) -> list[Run]:
    """The runs of a sweep, in the order of the published tables.

    Args:
      config: of the sweep.
      workdir: of its results; a run's are in a folder of the category's name below it, of
        several repeats in one for each.

    Raises:
      UserError: there is no category, or repeats would all be the same.
    """
    if config.category == ALL:
        categories = LAYOUTS[config.dataset.name].categories(config.dataset.root)
    else:
        categories = config.category.split(",")
    _require_plain_names(config, categories)
    if config.repeats > 1 and not _is_drawn(config):
        raise UserError(
            f"config.repeats={config.repeats}: nothing is drawn with "
            f"config.model.reduction={config.model.reduction} and without random crops or "
            "rotations, so that all repeats would be the same; leave it at 1"
        )
    runs = []
    for category in categories:
        for repeat in range(config.repeats):
            model = dataclasses.replace(config.model, seed=config.model.seed + repeat)
            image = dataclasses.replace(config.image, seed=config.image.seed + repeat)
            own = dataclasses.replace(
                config, category=category, repeats=1, model=model, image=image
            )
            name = category or paths.absolute(config.dataset.root).name
            if config.repeats > 1:
                name = f"{name}/seed_{model.seed}"
            runs.append(Run(name, category, repeat, own, workdir / name))
    return runs


def _require_plain_names(config: Config, categories: Sequence[str]) -> None:
    """Refuse a folder whose name means several categories when it is written as a setting."""
    root = config.dataset.root
    for name in (config.category, *categories):
        several = name == ALL or "," in name
        if several and (name in categories or paths.is_folder(root / name / "train")):
            raise UserError(
                f"config.category={config.category!r}: {root / name} is a folder's name that "
                f"cannot be told from several categories ({ALL}, or names with commas "
                "between); rename the folder"
            )


def run(config: Config, workdir: Path, overwrite: bool = False) -> None:
    """Fit and evaluate all runs that are not finished yet, and write the table of all.

    A run that fails is reported, and the others go on; only joined processes, which may
    differ in what they can read, end with it. What a run prints is in its folder's log.txt.

    Args:
      config: of the sweep.
      workdir: of its results.
      overwrite: do again what was finished before this process began, of whatever images.

    Raises:
      UserError: runs failed; or a finished one, not to be overwritten, had other settings or
        weights, or another data set.
      Stopped: by SIGTERM.
    """
    runs, devices = plan(config, workdir), parallel.every()
    # Not by the clock, which may be set, or differ from that of where the files are.
    before = {one.name: _versions(one) for one in runs}
    _require_own(runs, workdir)
    if not overwrite:
        for one in runs:
            _require_same(one)
    if devices.process == 0:
        results_folder.make_folder(workdir)
    failures = _Failures()
    with (
        compilation_cache.enabled(config.cache.programs),
        progress.bar(len(runs), "sweep", devices.process == 0, unit="run") as bar,
    ):
        backbone = fitting.load_backbone(config.model, devices)
        progress.say(f"weights: {backbone[1].origin}")
        reasons = {}
        if not overwrite:
            reasons = _changed(runs, backbone[1].sha256, failures, devices)

        def attempt(one: Run, following: Sequence[Run]) -> str:
            """Do a run unless it is finished or taken; return its state before."""
            lock = workdir / one.name.replace("/", "_")
            with locks.attempt(lock, devices.process) as taken:
                again = overwrite or one.name in reasons
                state = _state(one, before[one.name], again, taken)
                # One process decides for those that are joined.
                state = _STATES[parallel.agreed(_STATES.index(state))]
                if state != _FREE:
                    return state
                if one.name in reasons:
                    progress.say(f"{one.name}: done again: {reasons[one.name]}")
                with _decoding(following, devices):
                    try:
                        progress.say(_run(one, backbone, overwrite, devices))
                    except Stopped:
                        raise
                    except Exception as error:
                        if devices.processes > 1:
                            raise
                        if is_out_of_memory(error):
                            error = UserError(NO_MEMORY)
                        failures.add(one, error)
            return state

        waiting = []
        for i, one in enumerate(runs):
            state = attempt(one, runs[i + 1 : i + 2])
            if state == _TAKEN:
                waiting.append(one)
            if state != _FREE:
                progress.say(f"{one.name}: {state}")
            bar.update()
        # Again, until nothing is left but what living processes hold: the others may have been
        # killed meanwhile.
        done = True
        while done and waiting:
            states = {one.name: attempt(one, ()) for one in waiting}
            done = _FREE in states.values()
            waiting = [one for one in waiting if states[one.name] == _TAKEN]
        for one in waiting:
            progress.say(f"{one.name}: not finished yet; {_TAKEN}")
    del backbone
    if devices.process == 0:
        try:
            with paths.explained():
                _write(config, runs, workdir, failures.messages, devices)
        except UserError as error:
            if not failures.messages:
                raise
            progress.say(f"no table: {error}")
    if failures.bugs:
        raise failures.bugs[0]
    if failed := _failed(runs, failures.messages):
        listed = "".join(f"\n  {name}: {message}" for name, message in failed.items())
        raise UserError(f"{len(failed)} of {len(runs)} runs failed:{listed}")


class _Failures:
    """Runs of this process that failed: in memory, since the disk may be what fails."""

    def __init__(self) -> None:
        self.messages: dict[str, str] = {}
        self.bugs: list[Exception] = []

    def add(self, one: Run, error: Exception) -> None:
        """Report an error, and keep it beside the run for the other processes."""
        known = isinstance(error, UserError)
        message = str(error) if known else f"{type(error).__name__}: {error}"
        self.messages[one.name] = message
        with contextlib.suppress(OSError):
            paths.write(one.workdir / _ERROR, f"{message}\n".encode())
        progress.say(f"{one.name}: failed: {error}")
        if not known:
            traceback.print_exception(error)
            self.bugs.append(error)


def _failed(runs: Sequence[Run], own: Mapping[str, str]) -> dict[str, str]:
    """Why runs failed, by name: those of this process, and those that others noted."""
    messages = {one.name: own.get(one.name) or _error(one) for one in runs}
    return {name: message for name, message in messages.items() if message}


def _versions(one: Run) -> tuple[Any, Any]:
    """Return versions of a run's metrics and error, which change when it is done again."""
    return _version(one.workdir / _METRICS), _version(one.workdir / _ERROR)


def _version(path: Path) -> Any:
    if not path.exists():
        return None
    if not isinstance(path, pathlib.Path):
        return paths.modified(path)
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _state(one: Run, before: tuple[Any, Any], again: bool, taken: bool) -> str:
    """Return the state of a run, given its `_versions` at the beginning; see `_STATES`."""
    metrics, error = _versions(one)
    if metrics is not None and not (again and metrics == before[0]):
        return _STATES[1]
    if not taken:
        return _STATES[2]
    if error is not None and error != before[1]:
        return _STATES[3]
    return _STATES[0]


def _run(one: Run, backbone: Backbone, overwrite: bool, devices: Devices) -> str:
    """One fit and evaluation; what is to be said of it."""
    with paths.explained():
        return _train_and_eval(one, backbone, overwrite, devices)


def _train_and_eval(one: Run, backbone: Backbone, overwrite: bool, devices: Devices) -> str:
    started = time.monotonic()
    if devices.process == 0:
        results_folder.make_folder(one.workdir)
        # If it is interrupted, it is neither failed nor finished.
        for name in (_ERROR, _METRICS):
            (one.workdir / name).unlink(missing_ok=True)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            measured = train.train_and_eval(
                one.config, one.workdir, one.workdir / "checkpoint", backbone, overwrite
            )
    finally:
        if devices.process == 0:
            log = f"{_LOG_SIGN} {padim_jax.__version__}: {one.name}\n{said.getvalue()}"
            with contextlib.suppress(OSError):  # it is not what matters
                paths.write(one.workdir / _LOG, log.encode("utf-8", "backslashreplace"))
    found = (f"{name} {measured[key]:.4f}" for name, key in _SHOWN if measured.get(key))
    return f"{one.name}: {', '.join(found)} ({time.monotonic() - started:.1f} s)"


def _is_drawn(config: Config) -> bool:
    image = config.image
    return (
        config.model.reduction in ("random", "semi_orthogonal")
        or image.rotation > 0
        or image.crop_at == "random"
    )


def _require_own(runs: Sequence[Run], workdir: Path) -> None:
    """Make sure that nothing is replaced that no sweep has written."""
    first = ",".join(sweep_table.CSV_KEYS).encode()  # written before the other tables
    if not paths.first_line(workdir / sweep_table.NAMES[0]).startswith(first):
        for name in (*sweep_table.NAMES, results_folder.REPORT):
            _refuse_other(workdir / name)
    for one in runs:
        log = paths.first_line(one.workdir / _LOG).startswith(_LOG_SIGN.encode())
        if not log and not results_folder.is_own_config(one.workdir / _CONFIG):
            for name in (_LOG, _ERROR):
                _refuse_other(one.workdir / name)


def _refuse_other(path: Path) -> None:
    if path.exists():
        raise UserError(
            f"{path}: exists and is not from an earlier sweep; move it away or name another "
            "--workdir"
        )


def _changed(
    runs: Sequence[Run], weights: str, failures: _Failures, devices: Devices
) -> dict[str, str]:
    """Why finished runs are done again, by name: their images are others by now.

    A collective.

    Raises:
      UserError: one is of another data set or of other weights, or cannot be read.
    """
    reasons = {}
    for one in runs:
        if not parallel.agreed(int((one.workdir / _METRICS).exists())):
            continue
        try:
            now = inputs.read(one.config, dataset_splits.open_dataset(one.config), devices)
        except UserError as error:
            if devices.processes > 1:
                raise
            failures.messages[one.name] = str(error)  # its results stay, and are not shown
            continue
        reason = ""
        if devices.process == 0:
            reason = _difference(one, weights, now)
        if reason := parallel.gather_bytes(reason.encode())[0].decode():
            reasons[one.name] = reason
    return reasons


def _difference(one: Run, weights: str, now: Mapping[str, Any]) -> str:
    """Return how data or settings differ from those of a finished run; empty if they agree."""
    _measured(one)
    try:
        stored = results_folder.stored_inputs(one.workdir)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _not_ours(one.workdir / _METRICS, str(error)) from error
    if stored is None:  # another process has just begun to do it again
        return ""
    if not inputs.are_same_data(stored, now):
        raise UserError(results_folder.other_data(one.workdir, stored, now))
    if not stored["images"]:
        return "done by an earlier version, which did not keep what it read"
    if (theirs := str(stored.get("weights"))) != weights:
        raise UserError(
            f"{one.workdir}: finished with other weights, sha256 {theirs[:12]}..., and this "
            f"sweep has {weights[:12]}...; name another --workdir, or do it again with "
            "--overwrite"
        )
    other = [x for x, digest in now["images"].items() if stored["images"].get(x) != digest]
    return f"other images, labels or masks ({', '.join(other)}) than then" if other else ""


def _require_same(one: Run) -> None:
    """A finished run is taken for this sweep's only if it has its settings."""
    if not (one.workdir / _METRICS).exists():
        return
    wanted = _settings(config_lib.to_dict(one.config))
    path = one.workdir / _CONFIG
    if not isinstance(stored := _read(path), dict):
        raise _not_ours(path, "no configuration")
    try:
        found = _settings(config_lib.to_dict(config_lib.restore(stored, "another version")))
    except UserError as error:
        raise _not_ours(path, str(error)) from error
    for name, value in wanted.items():
        if (theirs := found.get(name)) != value:
            raise UserError(
                f"{one.workdir}: finished with {name}={theirs}, and this sweep has "
                f"{value}; name another --workdir, or do it again with --overwrite"
            )


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return settings by full name, without those that results do not depend on."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name not in _ASIDE:
            group = value if isinstance(value, dict) else {"": value}
            found |= {f"config.{name}.{key}".rstrip("."): x for key, x in group.items()}
    # Images and weights are told by their content: they may have been moved.
    return {name: x for name, x in found.items() if name not in _BY_CONTENT}


def _read(path: Path) -> Any:
    """Return the JSON that a run wrote, a group or a list."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _not_ours(path, str(error)) from error
    if not isinstance(found, dict | list):
        raise _not_ours(path, "no results")
    return found


def _measured(one: Run) -> dict[str, Any]:
    """A finished run's metrics."""
    found, path = _read(one.workdir / _METRICS), one.workdir / _METRICS
    for name in sweep_table.METRICS:
        value: Any = found.get(name, "missing") if isinstance(found, dict) else "missing"
        if value is not None and (type(value) not in (int, float) or not 0 <= value <= 1):
            raise _not_ours(path, f"{name}: {str(value)[:60]}")
    return found


def _not_ours(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: cannot be read ({reason}); do the run again with --overwrite")


def _error(one: Run) -> str:
    """Why a run failed; empty if it did not."""
    file = one.workdir / _ERROR
    return file.read_text(encoding="utf-8").strip() if file.exists() else ""


@contextlib.contextmanager
def _decoding(following: Sequence[Run], devices: Devices) -> Iterator[None]:
    """Decode images of the next runs into the cache while the block computes."""
    stop = threading.Event()
    if devices.processes > 1:  # finding the images is a matter of all of them
        following = ()

    def decode() -> None:
        for one in following:
            cache = image_cache.open_cache(one.config.cache)
            if cache is None or (one.workdir / _METRICS).exists():
                continue
            # Whatever is wrong with it is reported when its turn comes.
            with contextlib.suppress(UserError, OSError):
                for source in dataset_splits.open_dataset(one.config).values():
                    input_pipeline.warm(source, one.config.image, cache, stop)

    thread = threading.Thread(target=decode, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _write(
    config: Config,
    runs: Sequence[Run],
    workdir: Path,
    failures: Mapping[str, str],
    devices: Devices,
) -> None:
    """Write the table and the page of all results so far, of all processes."""
    # One process at a time: so the last one's table is the most complete.
    with locks.attempt(workdir / "table.json", devices.process, wait=True):
        failed = _failed(runs, failures)
        finished = {
            (one.category, one.repeat): _measured(one)
            for one in runs
            if one.name not in failed and (one.workdir / _METRICS).exists()
        }
        categories = list(dict.fromkeys(one.category for one in runs))
        found = sweep_table.build(config, finished, failed, categories)
        sweep_table.write(workdir, found)
        # One run of a category stands for all of its repeats.
        first = [one for one in runs if not one.repeat and (one.category, 0) in finished]
        pages, pictures = {}, {}
        for one in first:
            category = one.name.partition("/")[0]  # as the tables call it
            if (one.workdir / results_folder.REPORT).exists():
                pages[category] = f"{one.name}/{results_folder.REPORT}"
            if (one.workdir / results_folder.THUMBNAILS).exists():
                pictures[category] = _read(one.workdir / results_folder.THUMBNAILS)
        page = html.sweep_page(found, pages, pictures)
        paths.write(workdir / results_folder.REPORT, page.encode())
    print(f"\n{sweep_table.text(found)}\n\nresults: {workdir}")
