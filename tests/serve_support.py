"""A real server for tests: uvicorn on a free port, in a thread of its own, with the embedded model and two places."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

    from moshivis.inference.conversation import Assistant
    from moshivis.serve.hall import Hall
    from moshivis.serve.run import Server

PATIENCE = 200.0  # seconds; machines that run tests are busy
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """What an HTTP request brought. Header names are in small letters."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class RunningServer:
    """A server that answers. `url` has no slash at its end."""

    url: str
    hall: Hall
    server: Server
    loop: asyncio.AbstractEventLoop = field(repr=False)

    @property
    def ws(self) -> str:
        return self.url.replace("http", "ws", 1)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            fields = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, fields, response.read())

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("GET", path, None, headers)

    def call(self, work: Callable[[], T]) -> T:
        """Do something in the server's event loop, where halls and sessions live."""

        async def run() -> T:
            return work()

        return self.run(run())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await something in the server's event loop."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return future.result(PATIENCE)

    def wait_idle(self) -> None:
        """Until every place is free again."""
        wait_for(lambda: self.hall.active == 0 and self.hall.engine.stats().active == 0, "all places to be free")


def wait_for(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"waited {seconds:g} s for {what}"
        time.sleep(0.02)


def trickle(socket: ClientConnection, message: bytes | str, seconds: float) -> None:
    """Send one message as a slow line does: steadily, for so long."""
    pause = 0.25
    with socket.protocol_mutex:  # no pong in the midst of it
        if isinstance(message, str):
            socket.protocol.send_text(message.encode())
        else:
            socket.protocol.send_binary(message)
        data = b"".join(socket.protocol.data_to_send())
        size = -(-len(data) // round(seconds / pause))
        for begin in range(0, len(data), size):
            socket.socket.sendall(data[begin : begin + size])
            time.sleep(pause)


@contextlib.contextmanager
def first_in_line() -> Iterator[None]:
    """What keeps the clock of a conversation goes before other tests, if the system lets it: threads and processes that
    begin meanwhile."""
    try:
        usual = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, 0, min(usual, -10))
    except (AttributeError, OSError):  # not on this system; not for this user
        usual = None
    try:
        yield
    finally:
        if usual is not None:
            os.setpriority(os.PRIO_PROCESS, 0, usual)


@contextlib.contextmanager
def serving(
    assistant: Assistant, *, page: Path | None = None, names: list[str] | None = None, **limits: Any
) -> Iterator[RunningServer]:
    """A server with `limits` other than the usual ones; ready when it is yielded, gone afterwards."""
    from moshivis.inference.engine import Engine
    from moshivis.serve.address import bind
    from moshivis.serve.hall import Hall
    from moshivis.serve.limits import Limits
    from moshivis.serve.metrics import Metrics
    from moshivis.serve.run import make_server

    bounds = Limits(**{"sessions": 2, **limits})
    bounds.check()
    hall = Hall(Engine(assistant, bounds.sessions, threads=1), bounds, Metrics())
    (socket,) = bind("127.0.0.1", 0)
    ready = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    def on_ready() -> None:
        loops.append(asyncio.get_running_loop())
        ready.set()

    server = make_server(hall, page=page, names=names, on_ready=on_ready)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, name="server", daemon=True)
    url = f"http://127.0.0.1:{socket.getsockname()[1]}"
    thread.start()
    try:
        assert ready.wait(PATIENCE), f"the server is not ready: {server.failure}"
        yield RunningServer(url, hall, server, loops[0])
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not stop"


@pytest.fixture(scope="session")
def mini() -> Assistant:
    """The embedded model."""
    import moshivis
    from moshivis.inference.conversation import EMBEDDED

    if not EMBEDDED["mini"].exists():
        pytest.skip("the embedded model has not been built yet")
    return moshivis.load()


@pytest.fixture(scope="session")
def running_server(mini: Assistant) -> Iterator[RunningServer]:
    """A server with two places and the usual limits. Who uses it leaves its places free."""
    with serving(mini) as server:
        yield server
