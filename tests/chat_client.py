"""A client of `/api/chat` for tests: raw messages over a real socket."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

import moshivis
from moshivis.serve.opus import OpusReader, OpusWriter
from serve_support import PATIENCE, RunningServer

ASSETS = Path(moshivis.__file__).parent / "assets"
FRAME = 1920
STOCK = (
    "text_temperature=0.45&text_topk=25&audio_temperature=0.7&audio_topk=250&pad_mult=0&text_seed=1&audio_seed=2"
    "&repetition_penalty_context=64&repetition_penalty=1.15"
)
STOCK_PICTURE = STOCK + "&image_resolution=448&center_crop=false&xa_start=0&text_temperature_gating_influence=0"
PICTURE = (ASSETS / "example.png").read_bytes()


class Client:
    """A socket, and all that came over it."""

    def __init__(self, socket: ClientConnection):
        self.socket = socket
        self.messages: list[bytes] = []
        self.code: int | None = None
        self.reason = ""

    def send(self, kind: int, payload: bytes = b"") -> None:
        self.socket.send(bytes([kind]) + payload)

    def receive(self, seconds: float = PATIENCE) -> bytes | None:
        """The next message; None once the socket is closed."""
        try:
            data = self.socket.recv(timeout=seconds)
        except ConnectionClosed:
            self.code, self.reason = self.socket.close_code, self.socket.close_reason or ""
            return None
        assert isinstance(data, bytes), "the server must send no text frame"
        self.messages.append(data)
        return data

    def until(self, condition: Callable[[bytes], bool], what: str) -> bytes:
        limit = time.monotonic() + PATIENCE
        while time.monotonic() < limit:
            data = self.receive()
            assert data is not None, f"closed ({self.code} {self.reason}) while waiting for {what}"
            if condition(data):
                return data
        raise AssertionError(f"no {what}")

    def until_kind(self, kind: int) -> bytes:
        return self.until(lambda data: data[0] == kind, f"message of kind {kind}")

    def until_metadata(self, type: str) -> dict[str, Any]:
        found = self.until(lambda data: data[0] == 4 and metadata(data).get("type") == type, f"metadata {type}")
        return metadata(found)

    def until_closed(self) -> tuple[int | None, str]:
        while self.receive() is not None:
            pass
        return self.code, self.reason

    def count(self, kind: int) -> int:
        return sum(data[0] == kind for data in self.messages)

    @property
    def errors(self) -> list[str]:
        return [data[1:].decode() for data in self.messages if data[0] == 5]


@contextmanager
def client(server: RunningServer, path: str, **options: Any) -> Iterator[Client]:
    options = {"max_size": None, "compression": None, "open_timeout": PATIENCE, "ping_interval": None} | options
    with connect(server.ws + path, **options) as socket:
        yield Client(socket)
    server.wait_idle()


def metadata(message: bytes) -> dict[str, Any]:
    found = json.loads(message[1:])
    assert isinstance(found, dict)
    return found


def talk(client: Client, audio: NDArray[np.float32], kind: str = "ogg", writer: OpusWriter | None = None) -> None:
    """Send audio in messages of 80 ms, each when the assistant has answered the ones before: nothing is dropped."""
    writer = writer or OpusWriter()
    before = client.count(1)
    for number, start in enumerate(range(0, len(audio), FRAME)):
        frame = np.pad(audio[start : start + FRAME], (0, max(0, start + FRAME - len(audio))))
        client.send(1, writer.write(frame) if kind == "ogg" else pcm16(frame))
        while client.count(1) - before < number:
            client.until_kind(1)
    while client.count(1) - before < number + 1:
        client.until_kind(1)


def pcm16(samples: NDArray[np.float32]) -> bytes:
    return (samples * 32767).astype("<i2").tobytes()


def noise(seconds: float) -> NDArray[np.float32]:
    return (0.01 * np.random.default_rng(0).standard_normal(round(seconds * 24000))).astype(np.float32)


def heard(client: Client) -> NDArray[np.float32]:
    """The assistant's sound, decoded message by message as the released page does: no page in two messages."""
    reader = OpusReader()
    parts = []
    for data in client.messages:
        if data[0] == 1:
            assert data[1:5] == b"OggS"
            parts.append(reader.read(data[1:]))
    assert reader.discarded == reader.refused == 0
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def png(colour: str, size: tuple[int, int] = (64, 48)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


def told_gates(messages: list[bytes]) -> list[float]:
    """The gate of every frame."""
    told = [metadata(data) for data in messages if data[0] == 4 and metadata(data).get("type") == "gate"]
    for one, following in zip(told[:-1], told[1:], strict=True):
        assert following["frame"] == one["frame"] + len(one["values"])
    return [value for one in told for value in one["values"]]
