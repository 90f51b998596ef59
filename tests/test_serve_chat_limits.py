"""`/api/chat` over real sockets, as no client should speak it, and how long it waits for one."""

from __future__ import annotations

import struct
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from chat_client import (
    FRAME,
    PICTURE,
    STOCK_PICTURE,
    Client,
    client,
    noise,
    png,
    talk,
)
from moshivis.inference.conversation import Assistant
from moshivis.serve import chat
from moshivis.serve.ogg import checksum
from moshivis.serve.opus import OpusWriter
from serve_support import RunningServer, serving, trickle

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


def test_packets_without_sound_end_the_conversation(running_server: RunningServer) -> None:
    """Pages that are whole, but hold 255 empty packets each: a message of them takes long to read."""
    page = struct.pack("<4sBBqIIIB", b"OggS", 0, 0, 0, 1, 0, 0, 255) + bytes(255)
    page = page[:22] + struct.pack("<I", checksum(page)) + page[26:]
    with client(running_server, "/api/chat?page=1&picture=0") as one:
        one.until_kind(0)
        for _ in range(60):
            with suppress(ConnectionClosed):
                one.send(1, page * 100)
        assert one.until_closed()[0] == 1008
    running_server.wait_idle()


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
            assert one.until_closed() == (1008, "no message came for 0.5 s, so the conversation is over")
        with client(server, "/api/chat") as one:
            one.until_kind(0)
            one.send(6)
            begun = time.monotonic()
            assert one.until_closed() == (1000, "no message came for 1.5 s, so the conversation is over")
            assert time.monotonic() - begun > 1.2
        with client(server, "/api/chat") as one:
            one.until_kind(0)
            for _ in range(5):
                one.send(6)
                time.sleep(0.4)
            one.send(1, OpusWriter().write(noise(0.16)))
            one.until_kind(1)  # still there


def test_a_slow_picture_is_waited_for(mini: Assistant) -> None:
    """Longer than a silent client, and than one that does not answer a ping: the answer waits behind the picture."""
    with serving(mini, first_message_s=3.0, idle_s=60.0, heartbeat_s=2.5) as server:
        with client(server, "/api/chat?picture=1") as one:
            trickle(one.socket, b"\x08" + PICTURE, 9.0)
            one.until_kind(0)


def test_a_picture_that_never_arrives_is_not_waited_for(mini: Assistant) -> None:
    with serving(mini, first_message_s=2.0, idle_s=4.0) as server:
        with client(server, "/api/chat?picture=1") as one:
            with suppress(OSError):
                trickle(one.socket, b"\x08" + PICTURE, 30.0)
            assert one.until_closed() == (1008, "no picture came within 4 s")
        with client(server, "/api/chat?picture=1") as one:
            one.socket.socket.sendall(b"\x82\xfe\xff\xff")  # a message has begun, and nothing follows
            assert one.until_closed() == (1008, "no picture came within 2 s")


def test_a_slow_picture_during_a_call_is_waited_for(mini: Assistant) -> None:
    """Some time longer than a client may be silent, but not for ever."""
    with serving(mini, idle_s=3.0) as server, client(server, "/api/chat?page=1&picture=0") as one:
        one.until_kind(0)
        trickle(one.socket, b"\x08" + PICTURE, 6.0)
        assert one.until_metadata("image")["status"] == "shown"
    with serving(mini, idle_s=1.0) as server, client(server, "/api/chat") as one:
        one.until_kind(0)
        one.send(6)
        with suppress(OSError):
            trickle(one.socket, b"\x08" + PICTURE, 30.0)
        assert one.until_closed() == (1000, "no message came for 4 s, so the conversation is over")


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
