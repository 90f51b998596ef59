"""How long a connection may keep the server waiting: uvicorn's two protocols, with an end to it.

uvicorn waits for ever for a first request, and for what it has written to be taken. Here a request whose head is not
whole in time ends its connection, and so does a client that takes nothing of an answer, or of a closed WebSocket. A
large picture on a slow line is one message that takes long: whoever is sending it is not silent, though even the answer
to a ping waits behind it. But what has come of it stands in memory, so only so many of those who have no place may be
sending one at once.
"""

from __future__ import annotations

import asyncio
import time
from asyncio.transports import BaseTransport
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.websockets import WebSocket
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.http11 import Request

from moshivis.serve.limits import Limits

ARRIVED = "arrived"  # in the state of a WebSocket: tells when its last bytes came, by time.monotonic()
ARRIVING = "arriving"  # the same: tells whether a part of a message is there
SLOWNESS = 4  # times `idle_s` that a message of a running conversation may take to arrive
MAX_PIECES = 2**16  # of a message; they may be empty, so no limit of bytes holds them
LARGE = 2**20  # bytes of a message that may have come already and make it a large one, which is to say a picture
MOST_LARGE = 24  # large messages that may be arriving at once, not counting those of conversations
SEATED = "seated"  # in the state of a WebSocket: it has a conversation
TRY_LATER = 1013  # code of closing
T = TypeVar("T")


class Overdue(Exception):
    """A first message did not come within `seconds`."""

    def __init__(self, seconds: float):
        super().__init__(f"nothing came within {seconds:g} s")
        self.seconds = seconds


async def in_time(message: Awaitable[T], socket: WebSocket, limits: Limits, since: float) -> T:
    """The first message of a socket that was opened at `since`, by time.monotonic().

    Raises Overdue if no byte came for `first_message_s`, or if after `idle_s` it is still on its way.
    """
    arrived: Callable[[], float] = getattr(socket.state, ARRIVED, lambda: since)
    most = max(limits.first_message_s, limits.idle_s)
    task = asyncio.ensure_future(message)
    try:
        while True:
            silent, whole = max(arrived(), since) + limits.first_message_s, since + most
            left = min(silent, whole) - time.monotonic()
            if left <= 0:
                raise Overdue(limits.first_message_s if silent <= whole else most)
            if (await asyncio.wait({task}, timeout=left))[0]:
                return task.result()
    finally:
        task.cancel()


def is_arriving(socket: WebSocket) -> bool:
    """Whether the next message of a socket has begun to arrive."""
    arriving: Callable[[], bool] = getattr(socket.state, ARRIVING, lambda: False)
    return arriving()


def take_seat(socket: WebSocket) -> None:
    """The socket has a conversation, which others who send large messages must not end."""
    setattr(socket.state, SEATED, True)


def http_protocol(seconds: float) -> type[asyncio.Protocol]:
    """HTTP for clients that send the head of a request, and take what waits of an answer, within `seconds`."""

    class Impatient(H11Protocol):
        waiting: asyncio.TimerHandle | None = None
        stuck: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.waiting is not None:
                self.waiting.cancel()
            self._unstick()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.stuck = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._unstick()

        def _unstick(self) -> None:
            if self.stuck is not None:
                self.stuck.cancel()

        def _wait(self) -> None:
            if self.waiting is None and self._idle():
                self.waiting = self.loop.call_later(seconds, self._end, self.cycle)

        def _end(self, before: RequestResponseCycle | None) -> None:
            self.waiting = None
            if self.cycle is not before:
                self._wait()  # of a later request half may have come
            elif self._idle():
                self.transport.abort()

        def _idle(self) -> bool:
            """Whether no request is being answered, nor has the connection become a WebSocket."""
            answering = self.cycle is not None and not self.cycle.response_complete
            return not answering and self.transport.get_protocol() is self

    return Impatient


def websocket_protocol(seconds: float) -> type[asyncio.Protocol]:
    """WebSockets that are given up when they have been closing for one to two times `seconds`."""
    large: set[asyncio.Protocol] = set()

    class Impatient(WebSocketsSansIOProtocol):
        look: asyncio.TimerHandle | None = None
        arrived = 0.0
        weight = 0  # bytes of a message that has not come whole; up to what is read at once too many

        def connection_made(self, transport: BaseTransport) -> None:
            super().connection_made(transport)
            self._look(False)

        def handle_connect(self, event: Request) -> None:
            super().handle_connect(event)
            if self.response.status_code == 101:
                self.scope["state"][ARRIVED] = lambda: self.arrived
                self.scope["state"][ARRIVING] = self._is_arriving

        def data_received(self, data: bytes) -> None:
            self.arrived = time.monotonic()
            super().data_received(data)
            self.weight = self.weight + len(data) if self._is_arriving() else 0
            self._weigh()

        def send_receive_event_to_app(self) -> None:
            self.weight = 0
            super().send_receive_event_to_app()

        def _is_arriving(self) -> bool:
            return bool(self.frames or self.conn.reader.buffer)

        def _weigh(self) -> None:
            if self.weight <= LARGE or self.transport.is_closing() or self._talks():
                large.discard(self)
            elif self in large or len(large) < MOST_LARGE:
                large.add(self)
            elif self.handshake_complete:
                self.conn.fail(TRY_LATER, "too many large messages are on their way; try again later")
                self.handle_parser_exception()
            else:
                self.transport.abort()

        def _talks(self) -> bool:
            return SEATED in self.scope["state"] and not self.close_sent

        def handle_ping(self) -> None:
            if self.writable.is_set():
                super().handle_ping()
            else:
                self.conn.data_to_send()  # its client does not read: what would answer it is not kept

        def handle_cont(self, event: Frame) -> None:
            if len(self.frames) < MAX_PIECES:
                super().handle_cont(event)
            else:
                self.transport.abort()

        def keepalive_timeout(self) -> None:
            assert self.ping_timeout is not None
            quiet = time.monotonic() - self.arrived
            if quiet < self.ping_timeout:
                self.pong_timer = self.loop.call_later(self.ping_timeout - quiet, self.keepalive_timeout)
            else:
                super().keepalive_timeout()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            large.discard(self)
            if self.look is not None:
                self.look.cancel()

        def _look(self, was_closing: bool) -> None:
            closing = self.transport.is_closing()
            if closing and was_closing:
                self.transport.abort()  # what it has not read by now it will not read
            else:
                self.look = self.loop.call_later(seconds, self._look, closing)

    return Impatient
