"""How long a connection may keep the server waiting: uvicorn's two protocols, with an end to it.

uvicorn waits for ever for a first request, and for what it has written to be taken. Here a request that is not whole in
time ends its connection, and so does a closed WebSocket whose client takes nothing.
"""

from __future__ import annotations

import asyncio
from asyncio.transports import BaseTransport

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol


def http_protocol(seconds: float) -> type[asyncio.Protocol]:
    """HTTP for clients that send the head of a request within `seconds`."""

    class Impatient(H11Protocol):
        waiting: asyncio.TimerHandle | None = None

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

        def _wait(self) -> None:
            if self.waiting is None and self._idle():
                self.waiting = self.loop.call_later(seconds, self._end, self.cycle)

        def _end(self, before: RequestResponseCycle | None) -> None:
            self.waiting = None
            if self.cycle is before and self._idle():
                self.transport.abort()

        def _idle(self) -> bool:
            """Whether no request is being answered, nor has the connection become a WebSocket."""
            answering = self.cycle is not None and not self.cycle.response_complete
            return not answering and self.transport.get_protocol() is self

    return Impatient


def websocket_protocol(seconds: float) -> type[asyncio.Protocol]:
    """WebSockets that are given up when they have been closing for one to two times `seconds`."""

    class Impatient(WebSocketsSansIOProtocol):
        look: asyncio.TimerHandle | None = None

        def connection_made(self, transport: BaseTransport) -> None:
            super().connection_made(transport)
            self._look(False)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.look is not None:
                self.look.cancel()

        def _look(self, was_closing: bool) -> None:
            closing = self.transport.is_closing()
            if closing and was_closing:
                self.transport.abort()  # what it has not read by now it will not read
            else:
                self.look = self.loop.call_later(seconds, self._look, closing)

    return Impatient
