"""`/api/chat` over real sockets, as the clients that exist speak it, and as none should."""

from __future__ import annotations

import io
import json
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

import moshivis
from moshivis.audio import read_audio
from moshivis.inference.conversation import Assistant
from moshivis.serve import chat
from moshivis.serve.opus import OpusReader, OpusWriter
from serve_support import PATIENCE, RunningServer, serving

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


# clients that exist ---------------------------------------------------------------------------------------------------


def test_the_released_moshivis_page(running_server: RunningServer) -> None:
    """Picture, the same picture again, handshake, headers and sound in messages of their own, a rating, a close."""
    with client(running_server, "/api/chat?" + STOCK_PICTURE) as page:
        page.send(8, PICTURE)
        page.send(8, PICTURE)
        first = page.receive()
        assert first is not None and first[0] == 4
        told = metadata(first)
        assert told["text_temperature"] == 0.45 and told["text_topk"] == 25 and told["pad_mult"] == 0
        assert told["lm_model_file"] and told["base_filename"].startswith("moshivis_")
        assert page.receive() == bytes(9)
        talk(page, np.zeros(48000, np.float32))
        page.send(0x0A, b"\x04")
        page.send(8, PICTURE)  # also this late it is no new one
        talk(page, np.pad(read_audio(ASSETS / "example.wav"), (0, 72000)))
    sound = heard(page)
    assert len(sound) == page.count(1) * FRAME and np.abs(sound).max() > 0.01
    coloured = [data for data in page.messages if data[0] == 7]
    assert all(data[1] <= 10 for data in coloured)
    text = "".join(data[2:].decode() for data in coloured)
    assert text.strip() and page.count(2) == 0 and page.count(5) == 0


def test_a_plain_moshi_page(running_server: RunningServer) -> None:
    """It waits for the handshake before anything, and knows no colours."""
    with client(running_server, "/api/chat?" + STOCK) as page:
        first, second = page.receive(), page.receive()
        assert first is not None and first[0] == 4 and second == bytes(9)
        talk(page, noise(5))
    assert page.count(2) > 0 and page.count(7) == 0 and len(heard(page)) == page.count(1) * FRAME


def test_the_moshi_client_of_the_terminal(running_server: RunningServer) -> None:
    """It cannot read colours or metadata, asks for nothing, and sends headers and sound in one message at once."""
    with client(running_server, "/moshi/api/chat") as terminal:
        terminal.send(1, OpusWriter().write(noise(0.16)))  # too early to be heard
        assert terminal.receive() == bytes(9)
        terminal.send(8, PICTURE)  # has no meaning here
        talk(terminal, noise(5))
    assert {data[0] for data in terminal.messages} - {6} == {0, 1, 2}


def test_sixteen_bit_samples(running_server: RunningServer) -> None:
    with client(running_server, "/api/chat?audio=pcm") as pcm:
        pcm.until_kind(0)
        talk(pcm, noise(1), "pcm")
        pcm.send(1, b"odd")  # half a sample means nothing, and harms nothing
        talk(pcm, noise(0.4), "pcm")
    assert all(len(data) == 1 + 2 * FRAME for data in pcm.messages if data[0] == 1)


def told_gates(messages: list[bytes]) -> list[float]:
    """The gate of every frame."""
    told = [metadata(data) for data in messages if data[0] == 4 and metadata(data).get("type") == "gate"]
    for one, following in zip(told[:-1], told[1:], strict=True):
        assert following["frame"] == one["frame"] + len(one["values"])
    return [value for one in told for value in one["values"]]


# our page -------------------------------------------------------------------------------------------------------------


def test_our_page_is_told_more(running_server: RunningServer) -> None:
    with client(running_server, "/api/chat?page=1&seed=3&text_temperature=0.5") as page:
        page.send(8, PICTURE)
        told = page.until_metadata("settings")
        assert told["name"] == "mini" and told["miniature"] is True and told["session_s"] == 3600
        assert told["sampling"]["seed"] == 3 and told["sampling"]["text_temperature"] == 0.5
        assert page.receive() == bytes(9)
        talk(page, noise(2))
        stats = page.until_metadata("stats")
    assert stats == {"type": "stats", "frame": 25, "dropped": 0, "lost": 0, "queue_ms": 0, "ignored": 0}
    values = told_gates(page.messages)
    assert len(values) == 25 and max(values) > 0 and all(0 <= gate <= 1 for gate in values)


def test_a_picture_is_replaced_and_removed_while_talking(running_server: RunningServer) -> None:
    with client(running_server, "/api/chat?page=1&picture=0&audio=pcm") as page:
        page.until_kind(0)

        def gates() -> list[float]:
            """Those of the next frames."""
            told = len(page.messages)
            talk(page, np.zeros(4 * FRAME, np.float32), "pcm")
            while len(values := told_gates(page.messages[told:])) < 4:
                page.receive()
            return values

        def show(picture: bytes) -> dict[str, Any]:
            page.send(8, picture)
            return page.until_metadata("image")

        assert max(gates()) == 0
        assert show(PICTURE)["status"] == "shown"
        assert min(gates()) > 0
        for _ in range(2):  # told again if tried again
            report = show(b"neither PNG nor JPEG")
            assert report["status"] == "error" and "not a picture" in report["message"]
        assert min(gates()) > 0  # the one before is still in view
        assert show(png("red"))["status"] == "shown"
        assert min(gates()) > 0
        assert show(b"")["status"] == "removed"
        assert max(gates()) == 0


def test_an_empty_first_picture_is_none(running_server: RunningServer) -> None:
    with client(running_server, "/api/chat?page=1") as page:
        page.send(8)
        page.until_kind(0)
        page.send(1, OpusWriter().write(noise(0.08)))
        assert max(page.until_metadata("gate")["values"]) == 0


def test_control_mutes(running_server: RunningServer) -> None:
    """Muted, the model hears silence: the same seed gives the conversation of a user who says nothing."""

    def said(loud: bool) -> bytes:
        with client(running_server, "/api/chat?seed=1&audio=pcm&max_steps=20") as one:
            one.until_kind(0)
            one.send(3, b"\x02")
            one.send(3, b"")
            one.send(3, b"\x63")
            talk(one, noise(1.6) * (30 if loud else 0), "pcm")
            assert one.until_closed()[0] == 1000
        return b"".join(data for data in one.messages if data[0] in (1, 2))

    assert said(True) == said(False)


def test_the_seed_decides(running_server: RunningServer) -> None:
    def said(seed: int) -> bytes:
        with client(
            running_server, f"/api/chat?seed={seed}&max_steps=25&text_temperature=1&audio_temperature=1"
        ) as one:
            one.until_kind(0)
            talk(one, noise(2.0))
            assert one.until_closed()[0] == 1000
        return b"".join(data for data in one.messages if data[0] in (1, 2))

    assert said(5) == said(5) != said(6)


# what no client should do ---------------------------------------------------------------------------------------------


def test_junk_costs_nothing_but_itself(running_server: RunningServer) -> None:
    """Unknown kinds, empty messages, junk for sound, a torn page: counted, and the conversation goes on."""
    rng = np.random.default_rng(0)
    with client(running_server, "/api/chat?page=1&picture=0") as page:
        page.until_kind(0)
        writer = OpusWriter()
        for number in range(15):
            payload = writer.write(noise(0.08))
            page.send(1, payload[:50] if number == 3 else payload)
            page.socket.send(b"")
            page.send(0x09, rng.bytes(30))
            page.send(0xFF)
            page.send(1, rng.bytes(200))
            page.send(0x0A, b"")
            page.send(0x0A, b"\x09")
            page.send(6)
            while page.count(1) < number - 1:  # the torn message is lost, and no more
                page.until_kind(1)
        while page.count(1) < 14:
            page.until_kind(1)
        stats = page.until_metadata("stats")
    assert stats["ignored"] == 15 * 5 and stats["frame"] == 14
    assert page.count(5) == 0


def test_sound_before_the_handshake_is_not_heard(running_server: RunningServer) -> None:
    with client(running_server, "/api/chat?page=1&audio=pcm") as page:
        for _ in range(20):
            page.send(1, bytes(2 * FRAME))
        page.send(8, PICTURE)
        page.until_kind(0)
        stats = page.until_metadata("stats")
        assert stats["frame"] == 0 and stats["ignored"] == 20 and page.count(1) == 0


@pytest.mark.parametrize(
    "query, messages, code, sentence",
    [
        ("text_temperature=hot", [], 1008, "text_temperature must be a number, not 'hot'"),
        ("audio=mp3", [], 1008, "audio must be ogg or pcm"),
        (STOCK_PICTURE, [b"\x08not a picture at all"], 1008, "is not a picture"),
        (STOCK_PICTURE, [b"\x08" + png("red", (20000, 9000))], 1008, "too many pixels"),
        ("", ["words"], 1008, "all messages of this protocol are binary"),
        ("", [b"\x01" + bytes(70_000)], 1009, "a message of sound has 70000 bytes"),
        ("", [b"\x01" + bytes(60_000)] * 6, 1008, "not Ogg/Opus"),
    ],
    ids=["number", "format", "no picture", "bomb", "text frame", "long sound", "raw samples"],
)
def test_errors_are_told(
    running_server: RunningServer, query: str, messages: list[bytes | str], code: int, sentence: str
) -> None:
    with client(running_server, "/api/chat?" + query) as one:
        if not query:
            one.until_kind(0)
        for data in messages:
            one.socket.send(data)
        assert one.until_closed()[0] == code
        assert sentence in one.errors[-1]
        assert one.reason and one.errors[-1].startswith(one.reason.rstrip("…"))


def test_pictures_and_messages_that_are_too_large(mini: Assistant) -> None:
    with serving(mini, picture_bytes=50_000, message_bytes=100_000) as server:
        with client(server, "/api/chat?picture=1") as one:
            one.send(8, bytes(60_000))
            assert one.until_closed()[0] == 1009
            assert "at most 0.0476837 MiB" in one.errors[0]
        with client(server, "/api/chat?picture=0") as one:
            one.until_kind(0)
            one.send(8, bytes(60_000))
            one.until_kind(5)
            talk(one, noise(0.4))  # it goes on
            one.send(8, bytes(200_000))
            assert one.until_closed()[0] == 1009


def test_a_busy_server_says_so_and_how_long_the_queue_is(running_server: RunningServer) -> None:
    with client(running_server, "/api/chat") as one, connect(running_server.ws + "/moshi/api/chat") as other:
        one.until_kind(0)
        Client(other).until_kind(0)
        for path in ("/api/chat", "/moshi/api/chat", "/api/chat?" + STOCK_PICTURE):
            with connect(running_server.ws + path) as socket:
                third = Client(socket)
                with suppress(ConnectionClosed):  # it may know already
                    third.send(8, PICTURE)
                assert third.until_closed()[0] == 1013
                assert "all 2 places are taken" in third.errors[0] and "number 1 in the queue" in third.errors[0]
        user = running_server.get("/api/add_user?queue_id=x").json()
        with connect(running_server.ws + "/api/chat") as socket:
            third = Client(socket)
            third.until_closed()
            assert "number 2 in the queue" in third.errors[0]
    asked = running_server.get(f"/api/check_user?session_id=1&session_auth_id={user['session_auth_id']}").json()
    assert asked["status"] == "ready"
    with client(running_server, f"/api/chat?worker_auth_id={asked['worker_auth_id']}") as one:
        one.until_kind(0)
    assert running_server.call(lambda: running_server.hall.queued) == 0


def test_a_place_is_free_again_whatever_became_of_its_client(running_server: RunningServer) -> None:
    for close in (
        lambda one: one.socket.close(),
        lambda one: one.socket.socket.close(),  # without a word
        lambda one: one.socket.socket.setsockopt(1, 13, struct.pack("ii", 1, 0)) or one.socket.socket.close(),  # reset
    ):
        for query in ("", STOCK_PICTURE):
            with connect(running_server.ws + "/api/chat?" + query, close_timeout=1) as socket:
                one = Client(socket)
                if query:
                    one.send(8, PICTURE)
                else:
                    one.until_kind(0)
                close(one)
            running_server.wait_idle()


# times ----------------------------------------------------------------------------------------------------------------


def test_who_waits_too_long_is_sent_away(mini: Assistant) -> None:
    with serving(mini, first_message_s=0.5, idle_s=1.5) as server:
        with client(server, "/api/chat?" + STOCK_PICTURE) as one:
            assert one.until_closed() == (1008, "no picture came within 0.5 s")
        with client(server, "/api/chat") as one:
            one.until_kind(0)
            assert one.until_closed() == (1008, "nothing came for 0.5 s, so the conversation is over")
        with client(server, "/api/chat") as one:
            one.until_kind(0)
            one.send(6)
            begun = time.monotonic()
            assert one.until_closed() == (1008, "nothing came for 1.5 s, so the conversation is over")
            assert time.monotonic() - begun > 1.2
        with client(server, "/api/chat") as one:
            one.until_kind(0)
            for _ in range(5):
                one.send(6)
                time.sleep(0.4)
            one.send(1, OpusWriter().write(noise(0.16)))
            one.until_kind(1)  # still there


def test_a_conversation_has_an_end(mini: Assistant, running_server: RunningServer) -> None:
    with serving(mini, session_s=1.0) as server, client(server, "/api/chat") as one:
        one.until_kind(0)
        assert one.until_closed() == (1000, "the conversation has reached its limit")
        assert not one.errors
    with client(running_server, "/api/chat?max_steps=3") as one:
        one.until_kind(0)
        talk(one, noise(0.24))
        assert one.until_closed() == (1000, "the conversation has reached its limit")


def test_a_silent_conversation_is_kept_alive(running_server: RunningServer) -> None:
    """Parked, the model says nothing; a page that hears nothing for 10 s would leave."""
    with client(running_server, "/api/chat") as one:
        one.until_kind(0)
        begun = time.monotonic()
        one.until_kind(6)
        one.send(6)
        assert time.monotonic() - begun < 9
        one.until_kind(6)


def test_a_stopping_server_says_goodbye(mini: Assistant) -> None:
    with serving(mini) as server:
        with connect(server.ws + "/api/chat") as socket, connect(server.ws + "/api/chat?picture=1") as waiting:
            one, late = Client(socket), Client(waiting)
            one.until_kind(0)
            server.server.should_exit = True
            assert one.until_closed() == (1001, "the server is stopping")
            assert one.errors == ["the server is stopping"]
            assert late.until_closed()[0] in (1001, 1012)


def test_who_does_not_read_loses_sound_and_then_the_conversation(
    mini: Assistant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other conversation notices nothing."""
    monkeypatch.setattr(chat, "SEND_SECONDS", 1.5)
    with serving(mini, send_buffer_frames=5, idle_s=600) as server:
        deaf = server.ws + "/api/chat?audio=pcm&page=1&picture=0"
        with client(server, "/api/chat?audio=pcm") as good, connect(deaf, max_queue=1, close_timeout=1) as socket:
            bad = Client(socket)
            good.until_kind(0)
            bad.until_kind(0)
            bad.socket.socket.setsockopt(1, 8, 4096)  # SO_RCVBUF
            stop = threading.Event()

            def flood(one: Client) -> None:
                with suppress(ConnectionClosed):
                    while not stop.is_set():
                        one.send(1, bytes(2 * FRAME))
                        time.sleep(0.04)

            thread = threading.Thread(target=flood, args=(bad,))
            thread.start()
            try:
                limit = time.monotonic() + 280
                while server.hall.active == 2:
                    assert time.monotonic() < limit, "the one that does not read is still there"
                    talk(good, noise(0.08), "pcm")
                talk(good, noise(0.4), "pcm")
            finally:
                stop.set()
                thread.join()
                bad.socket.socket.close()
