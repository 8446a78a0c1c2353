"""A folder that is watched: images are scored as they arrive, for as long as it goes on.

The folder is listed again and again, which works on network shares and in containers as well.
A file is taken when neither its size nor its date has changed for a while and it can be
decoded, so that it does not matter how it came: written slowly, copied, or moved in.

What is finished is in a journal, from which the tables are written (see `journal`): whatever
ends the process, or the machine, no file is scored twice or left out.

Only what is wrong with a file itself finishes it without a score. Where the machine is at fault
(too little memory, too many open files, no permission, a disk that does not answer) nothing is
known of the file, and it is tried again, later and later, by the next process as well.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import signal
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from padim_jax import errors
from padim_jax.core.calibration import Calibration
from padim_jax.data import input_pipeline
from padim_jax.data.files import read_file, shown, walk
from padim_jax.detector import scores as scores_lib
from padim_jax.detector import scoring_pass
from padim_jax.detector.scores import Scorer
from padim_jax.devices import parallel
from padim_jax.errors import DataWarning, MachineError, UserError
from padim_jax.output import figures, predictions, tables
from padim_jax.output.predictions import Pictures, Thresholds
from padim_jax.runs import handover, predict
from padim_jax.runs.monitor import Monitor
from padim_jax.system import journal, locks, paths
from padim_jax.system.journal import Journal, Row, Table
from padim_jax.system.paths import Path

TABLE, LINES = predictions.TABLE, "scores.jsonl"
COLUMNS = (*predictions.COLUMNS, "error")
_EARLIER_COLUMNS = (*predictions.EARLIER_COLUMNS, "error")

# So many are read, drawn and written together, unless their files have more bytes than that:
# it is these that are kept meanwhile, not the decoded pixels.
_TOGETHER, _TOGETHER_BYTES = 8, 2**28
# More threads than cores would decode and draw no faster, and each takes an image's memory.
_THREADS = min(_TOGETHER, os.cpu_count() or 1)
# Until a file is tried again that the machine was at fault for: at first, and at most.
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 60.0  # seconds
# A file that cannot be decoded may still be on its way, if its writer was held up.
_PATIENCE_SECONDS = 5.0
# Listing takes at most this part of the time: with very many files it is done less often.
_LISTING_SHARE = 0.2


@dataclasses.dataclass(frozen=True)
class Timing:
    """Intervals of watching a folder, in seconds.

    Attributes:
      poll: between two looks at it.
      settle: that a file must not have changed for.
    """

    poll: float = 0.25
    settle: float = 0.5


class Stamp(NamedTuple):
    """Size in bytes and date in nanoseconds; together they tell versions of a file apart."""

    size: int
    modified: int


_NO_STAMP = Stamp(-1, -1)  # of what is no file


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A file that has not changed for a while.

    Attributes:
      path: where it is.
      name: POSIX path below the watched folder.
      stamp: as it was found.
      since: when it was first found so, in seconds of a clock that only goes forwards.
    """

    path: pathlib.Path
    name: str
    stamp: Stamp
    since: float

    @property
    def key(self) -> bytes:
        """Return a key that identifies this arrival."""
        return _key(self.name, self.stamp)


def _key(name: str, stamp: Stamp) -> bytes:
    # Of 128 bits: to be remembered for good, as little as possible of each file.
    data = f"{name}\0{stamp.size}\0{stamp.modified}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(data, digest_size=16).digest()


class Folder:
    """The files that have arrived in a folder and below it; see `files.walk`.

    Args:
      root: the folder.
      settle: see `Timing`.
      seen: keys of arrivals that are done with; looked at, not changed.
      output: where results go, which are not looked at even if a link leads there.
    """

    def __init__(
        self,
        root: pathlib.Path,
        settle: float,
        seen: set[bytes],
        output: pathlib.Path | None = None,
    ):
        self._root, self._settle, self._seen, self._output = root, settle, seen, output
        self._waiting: dict[str, Arrival] = {}
        self._refused: set[pathlib.Path] = set()

    def poll(self, now: float) -> list[Arrival]:
        """The image files that are not seen and have been as they are for `settle`, sorted.

        Args:
          now: seconds of a clock that only goes forwards. The clock of the files' dates, which
            may be another machine's, need not agree with it.

        Raises:
          OSError: the folder cannot be listed, as when a network share is gone.
        """
        waiting = {}
        for name, stamp in self._files():
            if _key(name, stamp) in self._seen:
                continue
            found = self._waiting.get(name)
            if found is None or found.stamp != stamp:
                found = Arrival(self._root / name, name, stamp, now)
            waiting[name] = found
        self._waiting = waiting
        ready = [x for x in waiting.values() if now - x.since >= self._settle]
        return sorted(ready, key=lambda arrival: arrival.name)

    def _files(self) -> Iterator[tuple[str, Stamp]]:
        refused: set[pathlib.Path] = set()

        def refuse(folder: pathlib.Path, error: OSError) -> None:
            if folder == self._root:
                raise error
            if not isinstance(error, FileNotFoundError):
                refused.add(folder)
                if folder not in self._refused:
                    print(f"{shown(folder)}: cannot be listed: {error.strerror}", flush=True)

        images = walk(self._root, refuse, self._output).images
        self._refused = refused
        for name, entry in images:
            yield name, _stamp(entry)


def _stamp(file: "pathlib.Path | os.DirEntry[str]") -> Stamp:
    try:
        found = file.stat()
    except OSError:  # gone, or a link that leads nowhere: reading it will tell
        return _NO_STAMP
    if stat.S_ISDIR(found.st_mode):  # its date is that of any change in it
        return _NO_STAMP
    return Stamp(found.st_size, found.st_mtime_ns)


@dataclasses.dataclass(frozen=True)
class Result:
    """The verdict on an arrival.

    Attributes:
      arrival: of which file.
      sha256: hex digest of its content; "" where it could not be read.
      row: what `predictions.rows` says; None of one that is bad.
      error: what is wrong with it; "" of a good one.
    """

    arrival: Arrival
    sha256: str
    row: dict[str, Any] | None
    error: str = ""

    def fields(self, when: str) -> dict[str, Any]:
        """Return what the journal keeps of it; "" for what is not known."""
        unknown = dict.fromkeys(predictions.COLUMNS, "") | {"path": self.arrival.name}
        return (self.row or unknown) | {
            "error": self.error,
            "sha256": self.sha256,
            "bytes": max(0, self.arrival.stamp.size),
            "modified_ns": max(0, self.arrival.stamp.modified),
            "time": when,
        }


def _json_line(fields: Mapping[str, Any]) -> bytes:
    values = {name: None if value == "" else value for name, value in fields.items()}
    values |= {x: float(fields[x]) for x in ("score", "calibrated") if fields[x] != ""}
    return json.dumps(values, allow_nan=False).encode() + b"\n"


@dataclasses.dataclass
class _Delay:
    """Delay before a file is tried again that the machine was at fault for.

    Attributes:
      until: when to try it again.
      seconds: how long it waits for that.
      reasons: what was printed of it.
    """

    until: float
    seconds: float
    reasons: set[str]


class Delays:
    """When to try the files again that the machine was at fault for."""

    def __init__(self):
        self._delays: dict[bytes, _Delay] = {}

    def __len__(self) -> int:
        """Return the number of waiting files."""
        return len(self._delays)

    def __contains__(self, arrival: Arrival) -> bool:
        """Return whether a file failed before and was neither scored nor refused since."""
        return arrival.key in self._delays

    def due(self, arrivals: Sequence[Arrival], now: float) -> list[Arrival]:
        """Return what need not wait; forget all that has not arrived any more.

        Args:
          arrivals: all that are not seen.
          now: seconds of a clock that only goes forwards.
        """
        keys = {arrival.key for arrival in arrivals}
        self._delays = {key: x for key, x in self._delays.items() if key in keys}
        delays = [self._delays.get(arrival.key) for arrival in arrivals]
        pairs = zip(arrivals, delays, strict=True)
        return [arrival for arrival, delay in pairs if delay is None or delay.until <= now]

    def postpone(self, arrival: Arrival, reason: str, now: float) -> None:
        """Try a file later, twice as late as the last time; print each reason once."""
        delay = self._delays.setdefault(arrival.key, _Delay(now, 0.0, set()))
        delay.seconds = min(max(_FIRST_DELAY, 2 * delay.seconds), _LONGEST_DELAY)
        delay.until = now + delay.seconds
        if reason not in delay.reasons:
            delay.reasons.add(reason)
            print(f"tried again later: {reason}", flush=True)

    def forget(self, arrivals: Iterable[Arrival]) -> None:
        """They are done with."""
        for arrival in arrivals:
            self._delays.pop(arrival.key, None)


class Log(Journal):
    """The finished files of a watched folder: the journal and the tables that it writes.

    Args:
      folder: where they are; local.
      settings: all that scores depend on, and the watched folder, by names for a person.
      queued: whether results are to be handed over; see `handover`.
      calibration: calibration of the detector, for drift.

    Attributes:
      monitor: follows the scores.
      seen: keys of the arrivals that are finished.
      scale: colours of the heat maps; None as long as there are none.

    Raises:
      UserError: what is there is of something else.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        settings: Mapping[str, Any],
        queued: bool = False,
        calibration: Calibration | None = None,
    ):
        self._queued = queued
        path, refusal = folder / journal.NAME, ""
        names = {x.name for x in folder.iterdir()} if folder.is_dir() else set()
        if journal.EARLIER in names:
            refusal = "of an earlier version"
        elif not journal.is_ours(path) and not all(map(paths.is_system_file, names)):
            refusal = "not of a watched folder"
        else:
            paths.make_folder(folder)
            # A table of an earlier version keeps its columns until it is moved away.
            begun = paths.first_line(folder / TABLE).strip().decode(errors="replace")
            columns = _EARLIER_COLUMNS if begun == ",".join(_EARLIER_COLUMNS) else COLUMNS
            csv = Table(tables.as_csv([columns]), predictions.encode_row(columns))
            lines = Table(b"", _json_line)
            super().__init__(path, settings, {folder / TABLE: csv, folder / LINES: lines})
            if self.other_settings:
                self.close()
                refusal = f"of another {', another '.join(self.other_settings)}"
        if refusal:
            raise UserError(
                f"{folder}: holds results, {refusal}; move it away or name another --workdir. "
                "Of one model and folder results are added to"
            )
        statuses: dict[bytes, str] = {}

        def scores() -> Iterator[float]:
            for row in self.rows():
                statuses[row.identity] = row.status
                if row.status == "scored":
                    yield float(row.fields["score"])

        self.monitor = Monitor(calibration, scores())
        self.seen = set(statuses)
        self._refused = sum(status == "refused" for status in statuses.values())
        scale = self.fact("scale")
        self.scale = scale and figures.ColorScale(*scale)

    def summary(self) -> str:
        """Return how many images are scored, and how many are not."""
        scored = f"{len(self.seen) - self._refused} images are scored"
        return f"{scored}, {self._refused} refused" if self._refused else scored

    def write(self, results: Sequence[Result], scale: figures.ColorScale | None) -> None:
        """Write what is said of some arrivals, which are seen from now on.

        Raises:
          UserError: it cannot be written.
        """
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        statuses = ["refused" if x.error else "scored" for x in results]
        scored = [x.row["score"] for x in results if x.row is not None]
        before = self.monitor.drift
        courses = iter(self.monitor.add([float(score) for score in scored]))
        unknown = {"mean_p": "", "drift": ""}
        rows = [
            Row(x.arrival.key, status, x.fields(when) | (next(courses) if x.row else unknown))
            for x, status in zip(results, statuses, strict=True)
        ]
        self.scale = self.scale or scale
        self.add(rows, self._queued, scale=self.scale and dataclasses.astuple(self.scale))
        self.seen.update(row.identity for row in rows)
        self._refused += statuses.count("refused")
        if bool(before) != bool(self.monitor.drift):
            print(self.monitor.drift or "drift: as in the calibration again", flush=True)


@dataclasses.dataclass(frozen=True)
class _Image:
    arrival: Arrival
    sha256: str
    data: bytes  # the file's; decoded again for its pictures
    seen: UInt8[np.ndarray, "h w 3"]  # by the detector


class _GoneError(Exception):
    """The file is not there any more, or not as it was found."""


def watch(
    detector: Scorer,
    folder: pathlib.Path,
    workdir: Path,
    timing: Timing,
    send: handover.Send | None = None,
) -> None:
    """Score images as they arrive in a folder, until SIGTERM; see `run`.

    Thresholds and colours are those of `predict`.

    Args:
      detector: fitted.
      folder: the images come there, and to folders in it.
      workdir: results go to `watch` below it, where those before stay.
      timing: how often to look, and how long to wait.
      send: gets each JSON line; see `handover.sender`.

    Raises:
      UserError: see `run`.
    """
    scores_lib.require_scorable(detector)
    known = predict.known_thresholds(detector, workdir)
    detector = scoring_pass.for_new_images(detector)
    suffix, said = predict.map_suffix(detector.config), predict.dependencies(detector, known)
    run(detector, known, folder, workdir / "watch", suffix, said, timing, send=send)


def run(
    detector: Scorer,
    known: Thresholds,
    folder: pathlib.Path,
    output: Path,
    map_suffix: str,
    said: Mapping[str, Any],
    timing: Timing,
    stop: threading.Event | None = None,
    send: handover.Send | None = None,
) -> None:
    """Score the images of a folder, and those that arrive there, until told to stop.

    scores.csv gets a row an image, scores.jsonl a line: what is in the table, the file's
    SHA-256, size and date, the time in UTC, and whether images drift (see `core.drift`), which
    report.html shows. maps/ and overlays/ are as in `predictions`.
    An image that cannot be decoded gets a row and a line with the error, which is printed,
    and is tried again only when it changes, as every file is that is written to. One that the
    machine cannot read or has no memory for is tried again until it can, and gets its row then.
    While the folder cannot be listed (an unmounted share) it is waited for.

    SIGTERM ends this behind the batch in hand; any other end is as good for what is written.

    Args:
      detector: fitted, for new images.
      known: thresholds and colours; where there are no colours the first batch sets them.
      folder: what to watch, with the folders in it.
      output: where results go; images that are in results there are not scored again.
      map_suffix: npy or tiff.
      said: all that predictions depend on beside images, by names for a person.
      timing: see there.
      stop: ends this when it is set.
      send: gets each JSON line; see `handover`.

    Raises:
      UserError: no such folder, it holds the results, these are of another model or folder,
        another process writes them, or they cannot be written.
    """
    if parallel.every().processes > 1:
        raise UserError("--watch: one process watches a folder; start only one")
    if not isinstance(output, pathlib.Path):
        raise UserError(f"{output}: --watch appends to files of this machine; name a --workdir")
    if not folder.is_dir():
        raise UserError(f"--input={folder}: no such folder; expected the one to watch")
    place = folder.resolve()
    if output.resolve().is_relative_to(place):
        raise UserError(
            f"--workdir: {output} lies in the folder to watch, {folder}, and its pictures "
            "would be scored as well; name a --workdir outside of it"
        )
    settings = {**said, "folder": os.fspath(place), "format of maps": map_suffix}
    with (
        locks.held(output),
        _stopping(stop or threading.Event()) as asked,
        contextlib.closing(
            Log(output, settings, send is not None, detector.calibration)
        ) as log,
        handover.delivering(log, send, _json_line) as deliver,
    ):
        scale = known.scale or log.scale
        known = dataclasses.replace(known, scale=scale)
        pictures = Pictures(output, detector.config, map_suffix, known)
        watched = Folder(folder, timing.settle, log.seen, output)
        # Compiles it. On a CPU an image takes as long in a batch as alone; alone it waits for
        # no other, and its score does not depend on what else has come.
        blank = np.zeros((1, *detector.config.image.size, 3), np.uint8)
        scores_lib.score_pixels(detector, blank)
        print(f"watching {folder}, {log.summary()}\nresults: {output}")
        if log.monitor.drift:
            print(log.monitor.drift)

        def between() -> None:
            deliver()
            log.monitor.write_report(output, shown(folder), log.summary())

        delays = Delays()
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
            scorer = _Scorer(detector, known, pictures, log, delays, threads, timing)
            _loop(watched, scorer, delays, timing, asked, between)
        log.monitor.write_report(output, shown(folder), log.summary(), now=True)
        waiting = f", {len(delays)} are tried again by the next --watch" if delays else ""
        print(f"stopped, {log.summary()}{waiting}")


def _loop(
    watched: Folder,
    scorer: "_Scorer",
    delays: Delays,
    timing: Timing,
    asked: threading.Event,
    between: Callable[[], None],
) -> None:
    gone = False
    while not asked.is_set():
        began = time.monotonic()
        try:
            arrived = delays.due(watched.poll(began), began)
        except OSError as error:
            if not gone:
                print(f"{error.filename}: {error.strerror}; waiting for it", flush=True)
            gone, arrived = True, []
        else:
            if gone:
                print("the folder is there again", flush=True)
            gone = False
        listed = time.monotonic() - began
        for group in _groups(arrived, delays):
            if asked.is_set():
                break
            scorer.score(group)
            between()
        between()
        rest = timing.poll - (time.monotonic() - began)
        asked.wait(max(rest, listed * (1 / _LISTING_SHARE - 1)))


def _groups(arrivals: Sequence[Arrival], delays: Delays) -> list[list[Arrival]]:
    """Return groups of files to score together; those that failed come last, each alone.

    Together they may have been what took the memory.
    """
    groups: list[list[Arrival]] = []
    size = 0
    for arrival in (x for x in arrivals if x not in delays):
        size += arrival.stamp.size
        if not groups or len(groups[-1]) == _TOGETHER or size > _TOGETHER_BYTES:
            groups.append([])
            size = arrival.stamp.size
        groups[-1].append(arrival)
    return groups + [[arrival] for arrival in arrivals if arrival in delays]


class _Scorer:
    """Arrivals -> what is on disk of them."""

    def __init__(
        self,
        detector: Scorer,
        known: Thresholds,
        pictures: Pictures,
        log: Log,
        delays: Delays,
        threads: concurrent.futures.Executor,
        timing: Timing,
    ):
        self._detector, self._known, self._pictures, self._log = detector, known, pictures, log
        self._delays, self._threads, self._timing = delays, threads, timing
        self._told = False  # that grey levels are lost

    def score(self, arrivals: Sequence[Arrival]) -> None:
        """Score a few files, and write the verdicts."""
        loaded = list(self._threads.map(self._load, arrivals))
        results = [x for x in loaded if isinstance(x, Result)]
        if images := [x for x in loaded if isinstance(x, _Image)]:
            try:
                results += self._score(images)
            except Exception as error:
                if not errors.is_out_of_memory(error):
                    raise
                for image in images:
                    self._postpone(image.arrival, _no_memory(image.arrival))
        for result in results:
            if result.error:
                print(f"passed over: {result.error}", flush=True)
        if results:
            self._log.write(results, self._pictures.scale)
            self._delays.forget(result.arrival for result in results)

    def _score(self, images: Sequence[_Image]) -> list[Result]:
        results, scored = [], []
        for image in images:
            pixels = image.seen[None]
            try:
                found = scores_lib.score_pixels(self._detector, pixels)
            except UserError as error:  # it is not finite
                reason = f"{shown(image.arrival.path)}: {error}"
                results.append(Result(image.arrival, image.sha256, None, reason))
            else:
                scored.append((image, found.maps, found.scores))
        if not scored:
            return results
        good, maps, scores = zip(*scored, strict=True)
        maps, scores = np.concatenate(maps), np.concatenate(scores)
        names = [image.arrival.name for image in good]
        self._pictures.set_scale(maps)
        # Before their rows: where there is a row, its pictures are whole.
        files, contents = [x.arrival.path for x in good], [x.data for x in good]
        drawn = list(self._threads.map(self._pictures.draw, names, files, contents, maps))
        detector, threshold = self._detector, self._known.image
        decide, calibration = detector.config.decide, detector.calibration
        rows = predictions.rows(names, scores, drawn, threshold, calibration, decide)
        pairs = zip(good, rows, strict=True)
        return results + [Result(image.arrival, image.sha256, row) for image, row in pairs]

    def _postpone(self, arrival: Arrival, reason: str) -> None:
        self._delays.postpone(arrival, reason, time.monotonic())

    def _load(self, arrival: Arrival) -> _Image | Result | None:
        """A file as it is seen, or what is wrong with it; None of one to look at again."""
        digest = ""
        try:
            data = _read(arrival)
            digest = hashlib.sha256(data).hexdigest()
            config, name = self._detector.config.image, shown(arrival.path)
            seen, levels, _ = input_pipeline.load_input(data, name, config)
            if levels is not None and not self._told:
                self._told = True  # of the first alone
                text = input_pipeline.few_levels({name: levels}, 1)
                warnings.warn(DataWarning(text), stacklevel=1)
            return _Image(arrival, digest, data, seen)
        except _GoneError:
            return None
        except MachineError as error:
            return self._postpone(arrival, str(error))
        except MemoryError:
            return self._postpone(arrival, _no_memory(arrival))
        except UserError as error:
            reason = str(error)
        except Exception as error:  # no single file may end this
            reason = f"{shown(arrival.path)}: cannot be read: {type(error).__name__}: {error}"
        # It may be on its way still, held up for longer than it took to settle.
        unchanged = time.monotonic() - arrival.since
        if unchanged < self._timing.settle + _PATIENCE_SECONDS:
            return None
        return Result(arrival, digest, None, reason)


def _no_memory(arrival: Arrival) -> str:
    return f"{shown(arrival.path)}: not enough memory at this time"


def _read(arrival: Arrival) -> bytes:
    """The file's content, all of one time.

    Raises:
      _GoneError: it is not as it was found.
      MachineError: it cannot be read at this time.
      UserError: it is no file to be read.
    """
    path = arrival.path
    try:
        data = read_file(path)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError) and not path.is_symlink():
            raise _GoneError from None
        raise
    if _stamp(path) != arrival.stamp:
        raise _GoneError
    return data


@contextlib.contextmanager
def _stopping(asked: threading.Event) -> Iterator[threading.Event]:
    """SIGTERM sets it in the block, where signals can be handled at all."""
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
