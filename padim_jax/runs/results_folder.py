"""The folder of a run's results: whose they are, and how they are replaced whole."""

import contextlib
import json
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from padim_jax.config.settings import Config
from padim_jax.data import copies, inputs
from padim_jax.data.files import shown
from padim_jax.data.records import Source
from padim_jax.devices import parallel
from padim_jax.errors import RemovedError, UserError
from padim_jax.output import results
from padim_jax.system import locks, paths
from padim_jax.system.paths import Path

METRICS = "metrics.json"  # the last to be written, and the first to go
CONFIG = "config.json"  # the first
REPORT = "report.html"
_INCOMPLETE = "results.incomplete"  # holds them until they are whole
_SIGN = ".padim_jax"  # in that folder: whose it is
THUMBNAILS = "report_thumbnails.json"  # of the worst images, for the page of a sweep
# All that an evaluation may leave beside these.
_RESULTS = (
    *("scores.csv", "maps", "figures", "roc_curve.png", "score_histogram.png", "overview.jpg"),
    *(REPORT, THUMBNAILS, results.SKIPPED),
)


def make_folder(path: Path) -> None:
    """Make a folder for results.

    Raises:
      UserError: it cannot be made.
    """
    try:
        paths.make_folder(path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be made a folder ({error.strerror}); name another place with "
            "--workdir or --checkpoint"
        ) from error


def remove(folder: Path, sign: Path) -> None:
    """Remove a folder, last the file in it that identifies it."""
    if isinstance(folder, pathlib.Path) and folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                paths.remove_folder(path)
            elif path != sign and not paths.is_system_file(path.name):
                path.unlink()
    paths.remove_folder(folder)


@contextlib.contextmanager
def writing_results(workdir: Path) -> Iterator[None]:
    """Hold a results folder for the block, and make sure that what is in it is ours."""
    process = parallel.every().process
    with locks.held(workdir / "results", process):
        if process == 0:
            make_folder(workdir)
            require_own_results(workdir)
            results.require_own_suspects(workdir)
        yield


@contextlib.contextmanager
def replacing_results(workdir: Path) -> Iterator[Path]:
    """Yield a folder for results, which replaces earlier ones at the end of the block.

    An error, as of a full disk, keeps those. An object store, where nothing can be renamed, is
    written to at once.
    """
    if not isinstance(workdir, pathlib.Path):
        for name in (METRICS, REPORT, THUMBNAILS):
            (workdir / name).unlink(missing_ok=True)
        yield workdir
        return
    place = workdir / _INCOMPLETE
    require_own(place, (place / _SIGN).exists())
    remove(place, place / _SIGN)  # a killed process's
    place.mkdir()
    try:
        paths.write(place / _SIGN, b"padim_jax: results on their way; may be deleted\n")
        yield place
        if not (place / _SIGN).exists():
            raise RemovedError(
                f"{place}: was removed while results were written; leave the folder alone "
                "until they are done. The same command begins anew"
            )
    except BaseException:
        remove(place, place / _SIGN)
        raise
    # From here to the end there is no sign of a whole evaluation.
    (workdir / METRICS).unlink(missing_ok=True)
    names = {*_RESULTS, *(path.name for path in place.iterdir())} - {_SIGN}
    for name in (CONFIG, *sorted(names - {CONFIG, METRICS}), METRICS):
        old, new = workdir / name, place / name
        if old.is_dir() and not old.is_symlink():
            paths.remove_folder(old)
        elif not new.exists() or new.is_dir():
            old.unlink(missing_ok=True)
        if new.exists():
            new.replace(old)
    remove(place, place / _SIGN)


def stored_inputs(workdir: Path) -> dict[str, Any] | None:
    """Return what `inputs.read` said of an evaluation's images; None if there is none.

    Of one by a version that did not keep it only the folder is known.

    Raises:
      ValueError: these are no results.
    """
    if not (workdir / METRICS).exists():
        return None
    measured = json.loads((workdir / METRICS).read_text(encoding="utf-8"))
    if not isinstance(measured, dict):
        raise ValueError("no results")
    stored = measured.get(inputs.KEY)
    if stored is None:
        config = json.loads((workdir / CONFIG).read_text(encoding="utf-8"))
        root = paths.absolute(paths.parse(config["dataset"]["root"]))
        stored = {"folder": os.fspath(root / config["category"]), "images": {}}
    if not isinstance(stored, dict) or not isinstance(stored.get("images"), dict):
        raise ValueError("no results")
    return stored if isinstance(stored.get("folder"), str) else stored | {"folder": ""}


def other_data(workdir: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the sentence that refuses to replace another data set's results."""
    return (
        f"{workdir}: holds the results of another data set, {shown(stored['folder'])}, and not "
        f"of {shown(now['folder'])}; name another --workdir, or replace them with --overwrite"
    )


def require_same_data(workdir: Path, now: Mapping[str, Any]) -> None:
    """Refuse to replace results of other images, such as a folder of the same name."""
    refusal = ""
    if parallel.every().process == 0:  # the only one that reads and writes results
        # What cannot be read is shown to nobody, and replaced as it was before.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            stored = stored_inputs(workdir)
            if stored is not None and not inputs.are_same_data(stored, now):
                refusal = other_data(workdir, stored, now)
    if refusal := parallel.gather_bytes(refusal.encode())[0].decode():
        raise UserError(refusal)


def require_model_of_same_data(path: Path, config: Config, source: Source) -> None:
    """Refuse to replace a model of other images; see `inputs.are_same_data`."""
    # Not above: it imports JAX, which predictions in other runtimes do without.
    from padim_jax.store import checkpoint

    fitted = checkpoint.fitted_config(path)
    if fitted is None or inputs.folder(fitted) == inputs.folder(config):
        return
    present = {digest.tobytes() for digest in copies.digests(source, parallel.every())}
    # Some of these images may be held out, or may have come since.
    if not present.issuperset(x.tobytes() for x in checkpoint.fitted_images(path)):
        raise UserError(
            f"{path}: holds a model of another data set, {shown(inputs.folder(fitted))}, and "
            f"not of {shown(inputs.folder(config))}; name another --workdir (or --checkpoint), "
            "or replace it with --overwrite"
        )


def require_own_results(workdir: Path) -> None:
    """Raise UserError if an evaluation would replace what is not an earlier one's."""
    ours = is_own_config(workdir / CONFIG)  # written before all else
    for name, suffixes in (("maps", (".npy", ".tiff")), ("figures", (".jpg",))):
        require_own(workdir / name, ours)
        require_no_other_files(workdir / name, suffixes)
    for name in (CONFIG, METRICS, *_RESULTS):
        if name != results.SKIPPED:  # which knows its own, and comes of a training as well
            require_own(workdir / name, ours, link=True)
    require_own(workdir / _INCOMPLETE, (workdir / _INCOMPLETE / _SIGN).exists())


def require_no_other_files(folder: Path, suffixes: Collection[str]) -> None:
    """Raise UserError for a file in a folder, to be removed whole, that no run writes there."""
    if not isinstance(folder, pathlib.Path):
        return  # where each listing is a request
    for path in paths.files_below(folder):
        parts = path.relative_to(folder).parts
        if path.suffix not in suffixes and not any(map(paths.is_system_file, parts)):
            if paths.is_growing(path):
                continue
            raise UserError(
                f"{path}: is not from an earlier run, and would be removed with {folder}; "
                "move it away or name another --workdir"
            )


def is_own_config(path: Path) -> bool:
    """Return whether a file is the config.json of a run: other programs have one, too."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    groups = ("dataset", "image", "model", "map")
    return isinstance(found, dict) and all(isinstance(found.get(x), dict) for x in groups)


def require_own(place: Path, ours: bool, link: bool = False) -> None:
    """Results of an earlier run are replaced, anything else in their place is not.

    Raises:
      UserError: there is something else, or a link where there is to be none.
    """
    if not link:
        paths.require_no_link(place)
    if ours or not place.exists():
        return
    is_folder = isinstance(place, pathlib.Path) and place.is_dir()
    if is_folder and all(
        paths.is_growing(path) or paths.is_system_file(path.name) for path in place.iterdir()
    ):
        return  # a run that was killed has just made it
    raise UserError(
        f"{place}: exists and is not from an earlier run; move it away or name another "
        "--workdir"
    )
