"""Results handed to other programs: a command, or a URL, gets each JSON line of `--watch`.

The journal is the queue: a row is pending from the transaction that adds it until it has been
delivered. So nothing is lost, whatever ends this process. A line can come twice, if a process
ends between its delivery and the mark of it.

Lines are delivered by a thread of their own, one at a time and in order. One that fails goes
behind the others, so that it holds up none of them for long, and delays grow with each failure
in a row.
"""

import contextlib
import http.client
import queue
import re
import shlex
import shutil
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from padim_jax.errors import UserError
from padim_jax.system.journal import Journal

Send = Callable[[bytes], str]
"""Delivers a line; returns what is wrong, "" if nothing is."""

_MOST = 64  # lines in memory
_FIRST_DELAY, _LONGEST_DELAY = 1.0, 60.0  # seconds until the next try
_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})")
_STATUS_BYTES = 12  # as many as are read of an answer


def sender(target: str, seconds: float) -> Send:
    """Return the function that delivers a line.

    Args:
      target: an http or https URL, which gets each line by POST; or a command with its
        arguments, run without a shell, which gets the line on its standard input.
      seconds: time-out of a delivery.

    Raises:
      UserError: it is neither.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", target)
    if scheme is None:
        return _command(target, seconds)
    wrong = f"--on_result={target}: "
    try:
        url = urllib.parse.urlsplit(target)
        place = url.hostname or "", url.port
    except ValueError as error:
        raise UserError(f"{wrong}no URL ({error})") from error
    if scheme[1].lower() not in ("http", "https") or not place[0]:
        raise UserError(f"{wrong}expected http://..., https://... or a command")
    if url.username is not None or re.search(r"[\x00-\x20\x7f-\uffff]", target):
        raise UserError(
            f"{wrong}expected a URL of ASCII characters without a user's name; a command, such "
            "as curl, can log in"
        )
    connection = http.client.HTTPSConnection
    if scheme[1].lower() == "http":
        connection = http.client.HTTPConnection
    path = urllib.parse.urlunsplit(("", "", url.path or "/", url.query, ""))

    def send(line: bytes) -> str:
        with contextlib.closing(connection(*place, timeout=seconds)) as opened:
            try:
                status = _post(opened, path, line, seconds)
            except (OSError, http.client.HTTPException) as error:
                return f"{target}: {error or type(error).__name__}"
        # Not followed: what an answer says decides nothing but whether the line has arrived.
        return "" if 200 <= status < 300 else f"{target}: answers with status {status}"

    return send


def _post(
    connection: http.client.HTTPConnection, path: str, line: bytes, seconds: float
) -> int:
    """Return the status of the answer, of which nothing else is read."""
    end = time.monotonic() + seconds
    headers = {"Content-Type": "application/json", "Connection": "close"}
    connection.request("POST", path, line, headers)
    answer = b""
    while len(answer) < _STATUS_BYTES:
        if (left := end - time.monotonic()) <= 0:
            raise TimeoutError("timed out")
        connection.sock.settimeout(left)
        if not (part := connection.sock.recv(_STATUS_BYTES - len(answer))):
            break
        answer += part
    if (status := _STATUS.fullmatch(answer)) is None:
        raise http.client.BadStatusLine(repr(answer))
    return int(status[1])


def _command(target: str, seconds: float) -> Send:
    try:
        command = shlex.split(target)
    except ValueError as error:
        raise UserError(f"--on_result={target}: no command ({error})") from error
    if not command or shutil.which(command[0]) is None:
        raise UserError(
            f"--on_result={target}: no such program; expected a command, or http://..., "
            "https://..."
        )

    def send(line: bytes) -> str:
        try:
            done = subprocess.run(  # noqa: S603 - the user's own command, without a shell
                command,
                input=line,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"{command[0]}: did not end within {seconds:g} seconds"
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
        return f"{command[0]}: exit code {done.returncode}" if done.returncode else ""

    return send


class Delivery:
    """Delivery of a journal's pending rows, in a thread of its own.

    Args:
      journal: whose rows are delivered; only `step` uses it.
      send: delivers a line.
      encode: makes a line of a row's fields.

    Attributes:
      stop: ends the thread after the delivery in hand, once it is set.
    """

    def __init__(
        self, journal: Journal, send: Send, encode: Callable[[Mapping[str, Any]], bytes]
    ):
        self._journal, self._send, self._encode = journal, send, encode
        self._lines: queue.SimpleQueue[tuple[int, bytes] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._out: set[int] = set()  # rows that the thread has
        self._last, self._failing = 0, False
        self.stop = threading.Event()
        journal.open_queue()
        self._thread = threading.Thread(target=self._deliver, daemon=True)
        self._thread.start()

    def step(self) -> None:
        """Mark what has been delivered, and give the thread what is pending.

        Raises:
          UserError: the journal cannot be written.
        """
        self._mark()
        if not (room := _MOST - len(self._out)):
            return
        rows = self._journal.pending(self._last, room)
        if not rows and not self._out:  # all have been tried: those that failed, again
            rows = self._journal.pending(0, room)
            if not rows and self._failing:
                self._failing = False
                print("--on_result: all results are handed over", flush=True)
        for number, fields in rows:
            self._out.add(number)
            self._last = number
            self._lines.put((number, self._encode(fields)))

    def close(self) -> None:
        """End the thread, which may be in the middle of a delivery, and mark what it did."""
        self.stop.set()
        self._lines.put(None)
        self._thread.join()
        self._mark()
        if waiting := self._journal.count_pending():
            print(f"--on_result: {waiting} results are handed over by the next --watch")

    def _mark(self) -> None:
        done = []
        for number, problem in _drained(self._outcomes):
            self._out.discard(number)
            if not problem:
                done.append(number)
            elif not self._failing:  # once, until all is delivered
                self._failing = True
                print(f"--on_result: {problem}; tried again until it works", flush=True)
        if done:
            self._journal.delivered(done)

    def _deliver(self) -> None:
        delay = 0.0
        while (item := self._lines.get()) is not None and not self.stop.is_set():
            number, line = item
            try:
                problem = self._send(line)
            except Exception as error:  # no single line may end this
                problem = f"{type(error).__name__}: {error}"
            self._outcomes.put((number, problem))
            delay = min(max(_FIRST_DELAY, 2 * delay), _LONGEST_DELAY) if problem else 0.0
            self.stop.wait(delay)


def _drained(outcomes: "queue.SimpleQueue[tuple[int, str]]") -> Iterator[tuple[int, str]]:
    with contextlib.suppress(queue.Empty):
        while True:
            yield outcomes.get_nowait()


@contextlib.contextmanager
def delivering(
    journal: Journal, send: Send | None, encode: Callable[[Mapping[str, Any]], bytes]
) -> Iterator[Callable[[], None]]:
    """Deliver a journal's pending rows while the block runs, which calls what this yields.

    An error, or Ctrl-C, ends the block without waiting for a delivery in hand.

    Args:
      journal: see `Delivery`.
      send: see `Delivery`; None for nothing to deliver to.
      encode: see `Delivery`.

    Yields:
      `Delivery.step`.
    """
    if send is None:
        yield lambda: None
        return
    delivery = Delivery(journal, send, encode)
    try:
        yield delivery.step
    except BaseException:
        delivery.stop.set()
        raise
    delivery.close()
