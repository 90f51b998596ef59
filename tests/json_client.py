"""A client of the JSON protocols for tests: raw events over a real socket."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

import moshivis
from moshivis.audio import read_audio
from serve_support import PATIENCE, RunningServer

ASSETS = Path(moshivis.__file__).parent / "assets"
PICTURE = (ASSETS / "example.png").read_bytes()
FRAME = 1920
UNHURRIED: dict[str, Any] = {"idle_s": 900.0, "first_message_s": 900.0}  # limits that a busy machine does not reach

Event = dict[str, Any]


class JsonClient:
    """One socket, and every event that came over it."""

    def __init__(self, socket: ClientConnection):
        self.socket = socket
        self.events: list[Event] = []
        self.code: int | None = None  # of closing
        self.reason = ""

    def send(self, kind: str, **fields: Any) -> None:
        self.socket.send(json.dumps({"type": kind, **fields}))

    def receive(self) -> Event | None:
        """The next event; None once the socket is closed."""
        try:
            data = self.socket.recv(timeout=PATIENCE)
        except ConnectionClosed:
            self.code, self.reason = self.socket.close_code, self.socket.close_reason or ""
            return None
        assert isinstance(data, str), "events are text"
        event = json.loads(data)
        self.events.append(event)
        return event

    def until(self, *kinds: str) -> Event:
        """The next event of one of these types, others being passed over."""
        while (event := self.receive()) is not None:
            if event["type"] in kinds:
                return event
        raise AssertionError(f"closed with {self.code} {self.reason!r} before any of {kinds}: {self.events[-3:]}")

    def ask(self, answer: str, kind: str, **fields: Any) -> Event:
        """Send an event, and wait for its answer or an error."""
        self.send(kind, **fields)
        event = self.until(answer, "error")
        assert event["type"] == answer, event
        return event

    def fails(self, kind: str, **fields: Any) -> Event:
        """Send an event, and return the error with which it is answered."""
        self.send(kind, event_id="mine", **fields)
        error = self.until("error")
        assert error["error"]["event_id"] == error["error"]["client_event_id"] == error["client_event_id"] == "mine"
        assert error["error"]["message"]
        return error["error"]

    def until_closed(self) -> list[Event]:
        """Everything up to the end of the connection."""
        first = len(self.events)
        while self.receive() is not None:
            pass
        return self.events[first:]

    def of_type(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["type"] == kind]


@contextlib.contextmanager
def json_client(server: RunningServer, path: str, **options: Any) -> Iterator[JsonClient]:
    with connect(server.ws + path, max_size=None, open_timeout=PATIENCE, close_timeout=1, **options) as socket:
        yield JsonClient(socket)


@contextlib.contextmanager
def limited(server: RunningServer, **limits: Any) -> Iterator[None]:
    """Other limits for the connections that are made meanwhile."""
    hall = server.hall
    before = hall.limits

    def put(values: Any) -> None:
        hall.limits = values

    server.call(lambda: put(replace(before, **limits)))
    try:
        yield
    finally:
        server.call(lambda: put(before))


def data_uri(picture: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(picture).decode()}"


def png(colour: str, size: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(buffer, "PNG")
    return buffer.getvalue()


def question() -> NDArray[np.int16]:
    """The bundled spoken question, 24 kHz, as it goes over the wire."""
    return np.rint(read_audio(ASSETS / "example.wav") * 32767).astype("<i2")


def encoded(samples: NDArray[np.generic]) -> str:
    return base64.b64encode(samples.tobytes()).decode()


def decoded(events: list[Event]) -> bytes:
    """The sound of delta events."""
    return b"".join(base64.b64decode(event["delta"]) for event in events)


def loudness(sound: bytes) -> float:
    """Root mean square of 16-bit samples, 1 = full scale."""
    samples = np.frombuffer(sound, "<i2").astype(np.float64) / 32768
    return float(np.sqrt(np.mean(samples**2))) if len(samples) else 0.0
