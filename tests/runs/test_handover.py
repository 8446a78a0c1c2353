"""Results that are handed over: each arrives, whatever the other side does meanwhile."""

import contextlib
import http.server
import json
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from padim_jax.errors import UserError
from padim_jax.runs import handover, modes
from padim_jax.system.journal import Journal, Row


class Receiver(http.server.BaseHTTPRequestHandler):
    """Keeps what is posted; answers as `answers` says, 200 at its end."""

    received: list[dict[str, Any]]
    answers: list[bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append({"target": self.path, **json.loads(body)})
        self.wfile.write(self.answers.pop(0) if self.answers else answer(200))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Print nothing."""


def answer(status: int, rest: bytes = b"\r\n") -> bytes:
    return b"HTTP/1.1 %d whatever\r\n" % status + rest


@pytest.fixture
def receiver() -> Iterator[tuple[str, type[Receiver]]]:
    handler = type("Handler", (Receiver,), {"received": [], "answers": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/in?line=1", handler
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def answering(act: Callable[[socket.socket], None]) -> Iterator[str]:
    """The URL of a server that reads what comes, and does then what it is told."""

    def serve() -> None:
        with contextlib.suppress(OSError), server.accept()[0] as connection:
            connection.recv(65536)
            act(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()


LINE = b'{"path": "a.png"}\n'


class TestSend:
    def test_post(self, receiver: tuple[str, type[Receiver]]):
        url, handler = receiver
        assert handover.sender(url, 5.0)(LINE) == ""
        assert handler.received == [{"target": "/in?line=1", "path": "a.png"}]

    @pytest.mark.parametrize(
        ("reply", "problem"),
        [
            (answer(204), ""),
            (answer(500), "answers with status 500"),
            (answer(302, b"Location: file:///etc/passwd\r\n\r\n"), "answers with status 302"),
            (b"\x00" * 100, "x00"),
            (b"HTTP/1.1 2", "HTTP/1.1 2"),
            (b"", "''"),
            (answer(200, b"X: " + b"x" * 10**7), ""),  # never read
        ],
    )
    def test_an_answer_is_not_trusted(self, reply: bytes, problem: str):
        with answering(lambda connection: connection.sendall(reply)) as url:
            found = handover.sender(url, 5.0)(LINE)
        assert problem in found
        assert bool(problem) == bool(found)

    def test_an_answer_that_drips(self):
        def drip(connection: socket.socket) -> None:
            for byte in answer(200):
                connection.sendall(bytes([byte]))
                time.sleep(0.1)

        with answering(drip) as url:
            assert "timed out" in handover.sender(url, 0.3)(LINE)

    def test_nobody_there(self):
        with socket.create_server(("127.0.0.1", 0)) as server:
            url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert "refused" in handover.sender(url, 5.0)(LINE)

    def test_command(self, tmp_path: pathlib.Path):
        """Without a shell: what a name holds is an argument, and the line is data."""
        code = "import sys; open(sys.argv[1], 'ab').write(sys.stdin.buffer.read())"
        out = tmp_path / "a $(touch b); c"
        send = handover.sender(f"{sys.executable} -c {quoted(code)} {quoted(str(out))}", 20.0)
        line = b'{"path": "$(touch b)`touch b`"}\n'
        assert send(line) == ""
        assert out.read_bytes() == line
        assert [x.name for x in tmp_path.iterdir()] == [out.name]

    @pytest.mark.parametrize(
        ("code", "problem"),
        [
            ("raise SystemExit(3)", "exit code 3"),
            ("import time; time.sleep(60)", "did not end within 0.2 seconds"),
        ],
    )
    def test_command_fails(self, code: str, problem: str):
        seconds = 0.2 if "sleep" in code else 20.0
        send = handover.sender(f"{sys.executable} -c {quoted(code)}", seconds)
        assert problem in send(LINE)

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            ("ftp://there/x", "expected http"),
            ("file:///etc/passwd", "expected http"),
            ("http:///x", "expected http"),
            ("http://there:port/", "no URL"),
            ("http://me:secret@there/", "without a user's name"),
            ("http://there/a b", "ASCII characters"),
            ("no_such_program_here -x", "no such program"),
            ("", "no such program"),
            ('echo "', "no command"),
        ],
    )
    def test_refused(self, target: str, message: str):
        with pytest.raises(UserError, match=message):
            handover.sender(target, 1.0)

    def test_flags(self):
        watch = {"input": "in", "watch": True, "checkpoint": "x"}
        modes.check("predict", watch | {"on_result": "echo", "on_result_seconds": 3.0}, None)
        for given, message in (
            ({"input": "in", "on_result": "echo", "checkpoint": "x"}, "for --watch, which is"),
            (watch | {"on_result_seconds": 3.0}, "for --on_result, which is missing"),
            (watch | {"on_result": "echo", "on_result_seconds": 0.0}, "expected 0.1 to 3600"),
        ):
            with pytest.raises(UserError, match=message):
                modes.check("predict", given, None)


def quoted(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


def encode(fields: Any) -> bytes:
    return json.dumps(fields).encode()


def rows(*names: str) -> list[Row]:
    return [Row(name.encode(), "scored", {"path": name}) for name in names]


@pytest.fixture
def journal(tmp_path: pathlib.Path) -> Iterator[Journal]:
    with contextlib.closing(Journal(tmp_path / "journal.sqlite", {})) as opened:
        opened.add(rows("before"))
        opened.open_queue()
        yield opened


class Sink:
    """Takes lines, but for those of some names; its delivery can be held up."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.failing: set[str] = set()
        self.free = threading.Event()
        self.free.set()

    def __call__(self, line: bytes) -> str:
        assert self.free.wait(20)
        name = json.loads(line)["path"]
        if name in self.failing or "all" in self.failing:
            return "not now"
        self.names.append(name)
        return ""


def until(step: Callable[[], None], done: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        step()
        time.sleep(0.005)


class TestDelivery:
    def test_each_line_in_order_but_for_those_before(self, journal: Journal):
        sink = Sink()
        with handover.delivering(journal, sink, encode) as step:
            for number in range(5):
                journal.add(rows(f"{number}a", f"{number}b"), queued=True)
                step()
            until(step, lambda: not journal.count_pending())
        assert sink.names == [f"{number}{x}" for number in range(5) for x in "ab"]

    def test_in_bounded_memory_and_without_waiting(self, journal: Journal):
        """The watch goes on while a delivery hangs; hundreds of results wait on the disk."""
        sink, sent = Sink(), [f"{number:03}" for number in range(300)]
        sink.free.clear()
        delivery = handover.Delivery(journal, sink, encode)
        journal.add(rows(*sent), queued=True)
        for _ in range(3):
            delivery.step()
            assert len(delivery._out) == handover._MOST
        sink.free.set()
        until(delivery.step, lambda: not journal.count_pending())
        delivery.close()
        assert sink.names == sent

    def test_an_outage(
        self,
        journal: Journal,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ):
        """Told once; then all is delivered, and a line that fails alone holds up no other."""
        monkeypatch.setattr(handover, "_FIRST_DELAY", 0.001)
        monkeypatch.setattr(handover, "_LONGEST_DELAY", 0.01)
        sink, kept = Sink(), list[str]()

        def printed() -> str:
            kept.append(capsys.readouterr().out)
            return "".join(kept)

        sink.failing = {"all"}
        with handover.delivering(journal, sink, encode) as step:
            journal.add(rows("a", "b", "c"), queued=True)
            until(step, lambda: "not now" in printed())
            time.sleep(0.05)
            sink.failing = {"b"}
            until(step, lambda: {"a", "c"} <= set(sink.names))
            journal.add(rows("d"), queued=True)
            until(step, lambda: "d" in sink.names)
            until(step, lambda: journal.count_pending() == 1)
            sink.failing = set()
            until(step, lambda: "all results" in printed())
        assert sorted(sink.names) == ["a", "b", "c", "d"]
        assert printed() == (
            "--on_result: not now; tried again until it works\n"
            "--on_result: all results are handed over\n"
        )

    def test_nothing_is_lost_on_restart(
        self, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
    ):
        """Neither what was not delivered, nor what a kill has left without its mark."""
        path, sink = tmp_path / "journal.sqlite", Sink()
        with contextlib.closing(Journal(path, {})) as journal:
            delivery = handover.Delivery(journal, sink, encode)
            journal.add(rows("a"), queued=True)
            until(delivery.step, lambda: not journal.count_pending())
            journal.add(rows("b"), queued=True)
            delivery.step()
            until(lambda: None, lambda: "b" in sink.names)
            delivery.stop.set()  # and killed before the mark
            journal.add(rows("c"), queued=True)
        with contextlib.closing(Journal(path, {})) as journal:
            journal.add(rows("not handed over"))
            sink.failing = {"c"}
            with handover.delivering(journal, sink, encode) as step:
                until(step, lambda: sink.names == ["a", "b", "b"])
        assert "1 results are handed over by the next --watch" in capsys.readouterr().out
        with contextlib.closing(Journal(path, {})) as journal:
            sink.failing = set()
            with handover.delivering(journal, sink, encode) as step:
                until(step, lambda: not journal.count_pending())
        assert sink.names == ["a", "b", "b", "c"]

    def test_ctrl_c_waits_for_nobody(self, journal: Journal):
        sink = Sink()
        sink.free.clear()

        def interrupted() -> None:
            with handover.delivering(journal, sink, encode) as step:
                journal.add(rows("a"), queued=True)
                step()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert journal.count_pending() == 1
        sink.free.set()
