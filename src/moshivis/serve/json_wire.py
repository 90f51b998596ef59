"""A WebSocket that carries JSON events, and how a session on it can end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Coroutine
from typing import Any, NoReturn

from starlette.websockets import WebSocket, WebSocketDisconnect

from moshivis.serve.events import EventError, Json, client_event_id, new_id, parse_event
from moshivis.serve.limits import Limits
from moshivis.serve.tasks import first_of

SEND_S = 10.0  # that a client has to take an event; one that reads nothing for so long is given up
LAST_WORDS_S = 5.0  # that it has to take the last ones

NORMAL, GOING_AWAY, POLICY, INTERNAL, TRY_LATER = 1000, 1001, 1008, 1011, 1013  # codes of closing


class Gone(Exception):
    """The client has left."""


class Finish(Exception):
    """The session ends: `reason` is a word of the protocols, `error` goes to the client, `code` closes the socket."""

    def __init__(self, code: int, reason: str, message: str, error_code: str, kind: str = "server_error"):
        super().__init__(message)
        self.code, self.reason = code, reason
        self.error = EventError(message, code=error_code, kind=kind)


def busy(message: str) -> Finish:
    return Finish(TRY_LATER, "server_busy", f"{message}; try again later", "server_busy")


def server_stopping() -> Finish:
    return Finish(GOING_AWAY, "server_stopping", "the server is about to stop; try again later", "server_stopping")


def expired(message: str) -> Finish:
    return Finish(NORMAL, "expired", message, "session_expired", "invalid_request_error")


def idle(message: str) -> Finish:
    return Finish(POLICY, "idle_timeout", message, "idle_timeout", "invalid_request_error")


def failed() -> Finish:
    message = "something went wrong inside the server; its log says more"
    return Finish(INTERNAL, "server_error", message, "server_error")


def session_ended(reason: str, limits: Limits) -> Finish:
    """For the end of a call that neither the client nor we asked for: `Session.end_reason`."""
    if reason == "time limit":
        return expired(f"a session lasts {limits.session_s:g} seconds at most")
    if reason == "length":
        return expired("the session has reached its max_frames")
    if reason in ("server is stopping", "engine stopped"):
        return server_stopping()
    return failed()


class Wire:
    """Events in and out of one accepted WebSocket."""

    def __init__(self, socket: WebSocket, limits: Limits):
        self._socket, self._limits = socket, limits

    async def receive(self, timeout: float | None) -> Json:
        """The client's next event. Raises EventError if it is none, Gone, or TimeoutError after so many seconds."""
        async with asyncio.timeout(timeout):
            message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise Gone
        text = message.get("text")
        if text is None:
            raise EventError("events are JSON in text messages, not binary ones", code="invalid_message")
        if len(text) > self._limits.message_bytes:
            most = f"{self._limits.message_bytes} bytes"
            raise EventError(f"the message is longer than {most}", code="too_large")
        return parse_event(text)

    async def send(self, kind: str, /, **fields: Any) -> None:
        """Send an event. Raises Gone."""
        event = {"type": kind, "event_id": new_id("event"), **fields}
        try:
            async with asyncio.timeout(SEND_S):
                await self._socket.send_text(json.dumps(event))
        except (TimeoutError, WebSocketDisconnect, RuntimeError):  # the last: closed, which starlette calls a mistake
            raise Gone from None

    async def fail(self, error: EventError, cause: Json | None = None) -> None:
        """Tell the client that something, perhaps its event `cause`, cannot be honoured."""
        name = None if cause is None else client_event_id(cause)
        await self.send("error", error=error.body(name), client_event_id=name)

    async def close(self, code: int, reason: str) -> None:
        with contextlib.suppress(TimeoutError, WebSocketDisconnect, RuntimeError):
            async with asyncio.timeout(LAST_WORDS_S):
                await self._socket.close(code, reason)


async def race(*parts: Coroutine[Any, Any, None]) -> NoReturn:
    """Run endless tasks beside each other until one raises; the others are cancelled, and what it raised is raised."""
    await first_of(*parts)
    raise Gone  # what a task waited for was given up: the server stops
