"""Running a server: uvicorn with our limits, the readable log, and an end that everybody is told of."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from moshivis.errors import MoshivisError
from moshivis.serve.app import create_app
from moshivis.serve.hall import Hall
from moshivis.serve.patience import http_protocol, websocket_protocol
from moshivis.serve.static import PAGE
from moshivis.serve.tls import Certificate

_log = logging.getLogger("moshivis.serve")

GRACE = 10.0  # seconds from the signal to the end of the process
INTERRUPTED = 130  # exit status after a second Ctrl-C


def run_server(
    hall: Hall,
    sockets: Sequence[socket.socket],
    *,
    certificate: Certificate | None = None,
    page: Path | None = PAGE,
    names: Iterable[str] | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve on bound sockets until SIGTERM or Ctrl-C; `on_ready` is called when the engine has warmed up.

    The signal refuses new calls at once and tells the running ones; the process has ended GRACE seconds later at the
    latest. A second Ctrl-C ends it at once. Raises MoshivisError if the engine could not start.
    """
    server = make_server(hall, certificate=certificate, page=page, names=names, on_ready=on_ready)
    try:
        server.run(sockets=list(sockets))
    except OSError as error:  # somebody else began to listen after we had bound
        raise MoshivisError(f"the server cannot listen: {error.strerror or error}") from error
    if server.failure is not None:
        raise MoshivisError(f"the engine could not start: {server.failure}") from server.failure


def make_server(
    hall: Hall,
    *,
    certificate: Certificate | None = None,
    page: Path | None = PAGE,
    names: Iterable[str] | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> Server:
    """A server that runs with `run(sockets=…)`, in any thread, and stops when `should_exit` is set."""
    server: Server

    def on_start(failure: BaseException | None) -> None:
        if failure is not None:
            server.failure, server.should_exit = failure, True
        elif not server.should_exit:
            on_ready()

    limits = hall.limits
    config = uvicorn.Config(
        create_app(hall, page=page, names=names, on_start=on_start),
        http=http_protocol(limits.first_message_s),
        ws=websocket_protocol(limits.heartbeat_s),
        ws_max_size=limits.message_bytes * 3 // 2,  # what is not far beyond the limit is refused in words
        ws_per_message_deflate=False,  # Opus and pictures do not get smaller
        ws_ping_interval=limits.heartbeat_s,
        ws_ping_timeout=limits.heartbeat_s,
        timeout_graceful_shutdown=max(1, int(GRACE * 0.2)),
        log_config=None,
        access_log=False,  # addresses hold tokens
        proxy_headers=False,
        server_header=False,
        ssl_certfile=None if certificate is None else certificate.cert,
        ssl_keyfile=None if certificate is None else certificate.key,
    )
    server = Server(config, hall)
    return server


class Server(uvicorn.Server):
    """uvicorn's server, which ends its conversations before its connections."""

    def __init__(self, config: uvicorn.Config, hall: Hall):
        super().__init__(config)
        self.hall = hall
        self.failure: BaseException | None = None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """New callers are refused, running conversations told; those that do not end in time are cut off."""
        _log.info("stopping; conversations under way: %d", self.hall.active)
        await self.hall.close(GRACE * 0.5)
        if tasks := list(self.server_state.tasks):  # uvicorn would close the sockets before they have said why
            await asyncio.wait(tasks, timeout=GRACE * 0.1)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's own: a signal is a wish to stop, and having stopped is a success."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal stops, the second Ctrl-C ends at once."""
        if not self.should_exit:
            self.should_exit = True
            self.hall.accepting = False
            last = threading.Thread(target=_end_in, args=(GRACE,), name="moshivis-deadline", daemon=True)
            last.start()
        elif sig == signal.SIGINT:
            leave(INTERRUPTED)


def _end_in(seconds: float) -> None:
    """The promise of an end, whatever hangs."""
    time.sleep(seconds)
    _log.warning("did not come to an end within %g s; leaving", seconds)
    leave(0)


def leave(status: int) -> None:
    """End the process without taking it down piece by piece, which takes seconds with a model in it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def set_up_log() -> None:
    """One line an event on stderr: when, and what. Of uvicorn only errors: it reports every broken request."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("moshivis")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    ours.propagate = False
    foreign = logging.getLogger("uvicorn")
    foreign.setLevel(logging.ERROR)
    foreign.addHandler(handler)
    foreign.propagate = False
