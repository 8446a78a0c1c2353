"""Many processes that compute as one: how they find each other, and how they end together.

Every process runs the same command; `jax.distributed` joins their devices. What JAX does
when something is wrong is to abort with a C++ stack trace (a process that does not come or
that dies, two with one number) or to crash (a port that is taken), so that all of this is
found before, or beside it, over a connection of our own: every process keeps one to process
0, from before JAX starts until all are done. Over it they compare their settings, give signs
of life, and hear why another one ended; a process whose computation waits for a dead one
prints that reason and ends.
"""

import asyncio
import contextlib
import functools
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, NoReturn

import jax

from padim_jax.devices import parallel
from padim_jax.devices.cluster import Place
from padim_jax.errors import NO_MEMORY, Stopped, UserError, is_out_of_memory
from padim_jax.system import interrupts, streams

_BEAT_SECONDS = 1.0
# Signs of life that may be missed in a row. Counted, not timed: a whole job that was
# suspended goes on when it is resumed. Python that holds its lock for long gives none.
_MISSED_BEATS = 30
# For another process's end to be known, of which an error here may be the echo; and for
# the others to have heard of ours.
_ECHO_SECONDS = 5.0
_LONGEST_MESSAGE = 2**24  # bytes


@contextlib.contextmanager
def session(
    place: Place | None, settings: Mapping[str, str] | None = None, timeout: float = 300.0
) -> Iterator[None]:
    """Joins the processes, before anything else touches a device; leaves them at the end.

    Within, `jax.devices()` are those of all processes, and only process 0 prints to
    standard output. An error that leaves the block ends this process here (exit code 2 for
    a UserError, otherwise 1) and makes the others end with the same code, wherever they
    are: they print which process ended why. So do all, with 1, if a process is killed, at
    once, or gives no sign of life for some 30 seconds. The end of the block waits for all.

    Args:
      place: None, for a process on its own, does nothing.
      settings: what has to be the same in all processes; values are shown when they differ.
      timeout: seconds to wait for all to come.

    Raises:
      UserError: the processes do not fit together, or the port is taken; none has started.
      SystemExit: with code 1, after a line that says which did not come.
    """
    if place is None:
        yield
        return
    group = _Group(place)
    try:
        address = group.join(dict(settings or {}), timeout)
    except _NotJoinedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    try:
        with interrupts.farewell(lambda: group.fail(KeyboardInterrupt())):
            _silence(place)
            _start_jax(place, address)
            _require_same_devices(group)
            yield
            group.leave()
    except (SystemExit, Stopped) as error:
        if isinstance(error, SystemExit) and error.code:
            group.fail(error)
        group.leave()
        raise
    except BaseException as error:
        group.fail(UserError(NO_MEMORY) if is_out_of_memory(error) else error)


def _silence(place: Place) -> None:
    """Leaves standard output to Python's prints of process 0.

    The others would repeat them, and Gloo's lines about its connections help nobody.
    """
    sys.stdout.flush()
    if place.process_id == 0:
        sys.stdout = streams.opened(os.dup(1))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def _start_jax(place: Place, address: str) -> None:
    # SIGTERM stays with Python's handlers, or ends the process: JAX's service would take it.
    jax.config.update("jax_enable_preemption_service", False)
    # The address is of this machine: whatever proxy there is has no say.
    jax.config.update("jax_check_proxy_envs", False)
    os.environ["no_grpc_proxy"] = "127.0.0.1"  # noqa: SIM112 (gRPC's spelling)
    jax.distributed.initialize(
        address,
        place.processes,
        place.process_id,
        cluster_detection_method="deactivate",
        # Of process 0.
        coordinator_bind_address=f"{_interface(place) or '[::]'}:{address.rpartition(':')[2]}",
    )


def _require_same_devices(group: "_Group") -> None:
    counts = group.exchange(parallel.every().local)
    if len(set(counts)) > 1:
        numbers = ", ".join(str(count) for count in counts)
        raise UserError(
            f"the processes have different numbers of devices: {numbers}. Give each as many "
            "with CUDA_VISIBLE_DEVICES or, on CPUs, JAX_NUM_CPU_DEVICES"
        )


class _NotJoinedError(Exception):
    """Not all processes came together; not for a mistake in the settings."""


class _Link:
    """A connection that carries one JSON object per line, beats among them."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer
        self.missed = 0

    def send(self, **message: Any) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")

    def beat(self) -> bool:
        """Gives a sign of life; whether the other side still does."""
        self.send()
        self.missed += 1
        return self.missed <= _MISSED_BEATS

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None when the connection or its use of our language ends."""
        try:
            while line := await self._reader.readline():
                self.missed = 0
                message = json.loads(line)
                if not isinstance(message, dict):
                    return None
                if message:
                    return message
        except (OSError, ValueError):
            pass
        return None

    def close(self) -> None:
        self._writer.close()


class _Coordinator:
    """What process 0 does for all: lets them in, passes messages on, notices who is gone."""

    def __init__(self, place: Place, settings: dict[str, str]):
        self._place, self._settings = place, settings
        self._members: dict[int, _Link] = {}
        self._hosts: dict[int, str] = {}
        self._values: dict[int, Any] = {}
        self._gone = {0}  # who is not waited for at the end
        self._complete = asyncio.Event()
        self._left = False
        self._over: dict[str, Any] | None = None  # why all end
        self._reserved = _reserve_port()  # for JAX
        # After the reason of an end is sent: the others have read it, or had the time to.
        self.closed = asyncio.Event()

    async def listen(self) -> None:
        """Opens the port.

        Raises:
          OSError: it cannot be had.
        """
        port = self._place.address[1]
        self._server = await asyncio.start_server(
            _each(self._serve), _interface(self._place), port, limit=_LONGEST_MESSAGE
        )

    def release(self) -> None:
        """Gives the port for JAX back."""
        self._reserved.close()

    async def run(self, timeout: float) -> None:
        """Waits for all to come, then for signs of life, until cancelled."""
        try:
            await asyncio.wait_for(self._complete.wait(), timeout)
        except TimeoutError:
            absent = sorted(set(range(self._place.processes)) - set(self._members))
            self._end(
                ended=f"process {', '.join(map(str, absent))} of {self._place.processes} "
                f"did not come within {timeout:g} s to {self._place.coordinator}. Was it "
                "started, with the same --coordinator and --processes?",
                code=1,
            )
        while True:
            for process, link in list(self._members.items()):
                if not link.beat():
                    self._end_of(process, f"no sign of life for {_MISSED_BEATS} s")
            await asyncio.sleep(_BEAT_SECONDS)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = _Link(reader, writer)
        link.send(padim_jax="distributed")
        try:
            hello = await asyncio.wait_for(link.receive(), _ECHO_SECONDS)
        except TimeoutError:
            hello = None
        if hello is None or not hello.keys() >= {"process", "processes", "host", "settings"}:
            link.close()  # a stranger
            return
        process = hello["process"]
        reason = self._over or self._refusal(hello)
        if reason is not None:
            link.send(**reason)
            if not self._complete.is_set():
                self._end(**reason)
            await link.receive()
            link.close()
            return
        self._members[process], self._hosts[process] = link, hello["host"]
        if len(self._members) == self._place.processes:
            self._complete.set()
            self._broadcast(port=self._reserved.getsockname()[1])
        while (message := await link.receive()) is not None:
            if "failed" in message:
                self._end_of(process, message["failed"], message["code"])
            else:
                self._collect(process, message)
        if not self._left:
            self._end_of(process, "killed (out of memory?), or its machine was lost")
        del self._members[process]
        link.close()

    def _refusal(self, hello: dict[str, Any]) -> dict[str, Any] | None:
        """Why a process cannot take part."""
        process, processes = hello["process"], hello["processes"]
        who = f"process {process} (on {hello['host']})"
        others = {name: str(value) for name, value in hello["settings"].items()}
        if processes != self._place.processes:
            differs = ("--processes", processes, self._place.processes)
        else:
            names = sorted(self._settings.keys() | others.keys())
            each = ((name, others.get(name), self._settings.get(name)) for name in names)
            differs = next((each for each in each if each[1] != each[2]), None)
        if differs:
            reason = "{} is {} for {}, but {} for process 0; expected the same".format(
                *differs[:2], who, differs[2]
            )
        elif self._complete.is_set() or process in self._members:
            reason = (
                f"--process_id={process} came twice to {self._place.coordinator}, from "
                f"{self._hosts[process]} and from {hello['host']}; expected each number once, "
                "and one run on a port"
            )
        else:
            return None
        # Once the others compute, this one is no mistake of theirs.
        return {"refused": reason, "code": 1 if self._complete.is_set() else 2}

    def _collect(self, process: int, message: dict[str, Any]) -> None:
        self._values[process] = message.get("value")
        if len(self._values) == self._place.processes:
            self._left = "last" in message
            values = [self._values[process] for process in range(self._place.processes)]
            self._values = {}
            self._broadcast(values=values, last=self._left)

    def _end_of(self, process: int, reason: str, code: int = 1) -> None:
        place = f"process {process} of {self._place.processes} (on {self._hosts[process]})"
        self._gone.add(process)
        self._end(ended=f"{place} ended: {reason}", code=code)

    def _end(self, **message: Any) -> None:
        if self._over is None:
            self._over = message
            self._broadcast(**message)
            self._closing = asyncio.create_task(self._close())

    async def _close(self) -> None:
        for _ in range(int(_ECHO_SECONDS / 0.05)):
            if not self._members.keys() - self._gone:
                break
            await asyncio.sleep(0.05)
        self.closed.set()

    def _broadcast(self, **message: Any) -> None:
        for link in self._members.values():
            link.send(**message)


class _Group:
    """This process's side: a thread that hears of the others whatever this one waits for."""

    def __init__(self, place: Place):
        self._place = place
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._coordinator: _Coordinator | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._values: Future[list[Any]] = Future()
        self._left = False
        self._heard = threading.Event()
        self._end = threading.Lock()  # held by the one thread that ends this process

    def join(self, settings: dict[str, str], timeout: float) -> str:
        """Waits until all are there; returns where JAX is to look for its coordinator."""
        return self._run(self._join(settings, timeout))

    def exchange(self, value: Any, **options: Any) -> list[Any]:
        """Everybody's values, JSON, by process; waits for all."""
        self._values = Future()
        self._loop.call_soon_threadsafe(lambda: self._link.send(value=value, **options))
        return self._values.result()

    def leave(self) -> None:
        """Waits for all, without a limit: process 0 may have much to write."""
        self.exchange(None, last=True)
        jax.distributed.shutdown()
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process, and tells the others why."""
        if isinstance(error, Exception) and not isinstance(error, UserError):
            # What is heard now is the cause, and ends this process (see `_die`).
            time.sleep(_ECHO_SECONDS)
        self._end.acquire()
        code, reason = 1, f"{type(error).__name__}: {' '.join(str(error).split())}"
        if isinstance(error, UserError):
            code, reason = 2, str(error)
        elif isinstance(error, KeyboardInterrupt):
            code, reason = 130, "interrupted"
        elif isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else 1
            reason = f"exit code {code}" if isinstance(error.code, int) else str(error.code)
        else:
            traceback.print_exception(error)
        if not isinstance(error, Exception) or isinstance(error, UserError):
            print(f"error: {reason}", file=sys.stderr)
        failed = {"failed": reason, "code": 2 if isinstance(error, UserError) else 1}
        self._loop.call_soon_threadsafe(lambda: self._link.send(**failed))
        self._heard.wait(_ECHO_SECONDS)
        self._run(self._others_told())
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        # Not sys.exit: JAX would wait for the others, for minutes.
        os._exit(code)

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _join(self, settings: dict[str, str], timeout: float) -> str:
        if self._place.process_id == 0:
            await self._coordinate(settings, timeout)
        self._link = await self._connect(timeout)
        self._link.send(
            process=self._place.process_id,
            processes=self._place.processes,
            host=socket.gethostname(),
            settings=settings,
        )
        answer = None
        with contextlib.suppress(TimeoutError):
            answer = await asyncio.wait_for(self._link.receive(), timeout + _MISSED_BEATS)
        if answer is None:
            raise _NotJoinedError(f"{self._process_0()} ended before all had come")
        if "port" not in answer:
            await self._others_told()
            reason = answer.get("refused") or answer["ended"]
            raise UserError(reason) if answer["code"] == 2 else _NotJoinedError(reason)
        self._tasks.append(asyncio.create_task(self._listen()))
        self._tasks.append(asyncio.create_task(self._live()))
        if self._coordinator is not None:
            return f"127.0.0.1:{answer['port']}"
        accept = _each(functools.partial(self._relay, answer["port"]))
        relay = await asyncio.start_server(accept, "127.0.0.1", 0)
        return f"127.0.0.1:{relay.sockets[0].getsockname()[1]}"

    async def _coordinate(self, settings: dict[str, str], timeout: float) -> None:
        self._coordinator = _Coordinator(self._place, settings)
        try:
            await self._coordinator.listen()
        except OSError as error:
            raise UserError(
                f"--coordinator={self._place.coordinator}: process 0 cannot listen on that "
                f"port of {socket.gethostname()} ({os.strerror(error.errno or 0)}); choose "
                "another"
            ) from error
        self._tasks.append(asyncio.create_task(self._coordinator.run(timeout)))

    async def _connect(self, timeout: float) -> _Link:
        """Reaches process 0, which may start later than this one."""
        host, port = self._place.address
        if self._coordinator is not None:
            host = "127.0.0.1"
        end = time.monotonic() + timeout
        while True:
            try:
                reader, writer = await asyncio.wait_for(
                    asyncio.open_connection(host, port, limit=_LONGEST_MESSAGE), _ECHO_SECONDS
                )
                # A port that nobody listens on may be handed out to the very connection
                # that asks for it, which then talks to itself.
                if writer.get_extra_info("sockname") != writer.get_extra_info("peername"):
                    break
                writer.close()
                reason = "nobody listens"
            except OSError as error:  # a TimeoutError too
                reason = str(error) or "no answer"
            if time.monotonic() > end:
                raise _NotJoinedError(
                    f"--coordinator={self._place.coordinator}: process 0 is not reached from "
                    f"{socket.gethostname()}, tried for {timeout:g} s ({reason}). Is it "
                    "running there, and does a firewall let it through?"
                )
            await asyncio.sleep(0.2)
        link = _Link(reader, writer)
        try:
            greeting = await asyncio.wait_for(link.receive(), 2 * _ECHO_SECONDS)
        except TimeoutError:
            greeting = None
        if greeting is None or "padim_jax" not in greeting:
            raise UserError(
                f"--coordinator={self._place.coordinator}: what answers there is not process "
                "0 of a run; choose another port"
            )
        return link

    async def _relay(
        self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Carries JAX's connection to process 0.

        JAX aborts at the moment when that breaks; this end of it stays, until `_listen` has
        said what happened.
        """
        host = self._place.address[0]
        while True:
            try:
                from_jax, to_jax = await asyncio.open_connection(host, port)
                break
            except OSError:  # process 0 may not have started JAX yet
                await asyncio.sleep(0.05)
        with contextlib.suppress(OSError):
            await asyncio.gather(_pump(reader, to_jax), _pump(from_jax, writer))
        to_jax.close()
        await reader.read()
        writer.close()

    async def _live(self) -> None:
        while self._link.beat():
            await asyncio.sleep(_BEAT_SECONDS)
        await self._die(f"{self._process_0()} ended: no sign of life for {_MISSED_BEATS} s")

    async def _listen(self) -> None:
        while (message := await self._link.receive()) is not None:
            if "ended" in message:
                self._heard.set()
                await self._die(message["ended"], message["code"])
            else:
                self._left = message["last"]
                self._values.set_result(message["values"])
        if not self._left:
            await self._die(
                f"{self._process_0()} ended: killed (out of memory?), or its machine was lost"
            )

    def _process_0(self) -> str:
        return f"process 0 of {self._place.processes} (at {self._place.coordinator})"

    async def _die(self, reason: str, code: int = 1) -> None:
        """Ends this process, wherever its main thread is."""
        if not self._end.acquire(blocking=False):
            return  # the main thread ends it already, with an error of its own
        os.write(2, f"error: {reason}\n".encode())
        await self._others_told()
        os._exit(code)

    async def _others_told(self) -> None:
        """Process 0 stays until the others have heard why all ends."""
        if self._coordinator is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._coordinator.closed.wait(), 2 * _ECHO_SECONDS)

    async def _stop(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._coordinator is not None:
            self._coordinator.release()
        self._link.close()


def _interface(place: Place) -> str | None:
    """Where process 0 listens; None for everywhere.

    Nobody is asked for a password there: where all processes are on this machine, other
    machines do not reach it.
    """
    return "127.0.0.1" if place.address[0] in ("127.0.0.1", "localhost") else None


def _each(handle: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """For a server: handles each connection in a task, which may be cancelled quietly."""
    tasks = set()

    def accept(*streams: Any) -> None:
        tasks.add(asyncio.create_task(handle(*streams)))

    return accept


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(2**16):
        sink.write(data)
        await sink.drain()


def _reserve_port() -> socket.socket:
    """A port for JAX, which until the end no other process of this machine is given.

    It is bound and nobody listens: who shares it, as JAX's gRPC does, may bind it again.
    """
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    found.bind(("", 0))
    return found
