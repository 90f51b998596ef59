"""Crowds and laggards: connections that are too many, ask nothing, answer nothing, or send too much."""

from __future__ import annotations

import base64
import os
import socket
import time

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from moshivis.inference.conversation import Assistant
from moshivis.serve.static import PAGE
from serve_support import serving, wait_for


def test_so_many_at_once_and_no_more(mini: Assistant) -> None:
    with serving(mini, connections=3) as server:
        held = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(3)]
        for each in held:
            each.sendall(b"POST /api/ask HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")  # and the rest never comes
        wait_for(lambda: server.get("/ready").status == 503, "a crowd")
        assert server.get("/health").status == 200, "a restart would not help"
        assert "too many connections" in server.get("/api/info").json()["error"]
        with pytest.raises(InvalidStatus, match="503"):
            connect(server.ws + "/api/chat", open_timeout=60)
        for each in held:
            each.close()
        wait_for(lambda: server.get("/ready").status == 200, "room")


def test_connections_that_ask_nothing_are_ended(mini: Assistant) -> None:
    head = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    requests = {
        "silent": b"",
        "half a head": head[:-2],
        "half of the second": head[:-2],
        "both at once": head + head[:-2],
    }
    with serving(mini, first_message_s=1.0) as server:
        begun = time.monotonic()
        open_ones = {name: socket.create_connection(("127.0.0.1", server.port), timeout=60) for name in requests}
        second = open_ones["half of the second"]
        second.sendall(head)
        answer = b""
        while not answer.endswith(b"}"):
            answer += second.recv(65536)
        for name, connection in open_ones.items():
            connection.sendall(requests[name])
        for name, connection in open_ones.items():
            received = read_all(connection)
            assert received.count(b"200 OK") == (name == "both at once"), name
        assert time.monotonic() - begun < 30
        assert server.get("/health").status == 200


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side ends the connection, properly or not."""
    received = b""
    with connection:
        try:
            while piece := connection.recv(65536):
                received += piece
        except ConnectionResetError:
            pass
    return received


def test_answers_that_nobody_reads_are_given_up(mini: Assistant) -> None:
    asked = 2000
    with serving(mini, page=PAGE, connections=1, first_message_s=2.0) as server:
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.settimeout(60)
            deaf.connect(("127.0.0.1", server.port))
            deaf.sendall(b"GET /style.css HTTP/1.1\r\nHost: a\r\n\r\n" * asked)
            wait_for(lambda: server.get("/ready").status == 503, "the answers to fill the line")
            wait_for(lambda: not server.server.server_state.connections, "the end of the connection")
            assert read_all(deaf).count(b"200 OK") < asked
        assert server.get("/ready").status == 200


def test_a_client_that_neither_reads_nor_answers_pings_is_given_up(mini: Assistant) -> None:
    key = base64.b64encode(os.urandom(16)).decode()
    head = (
        "GET /api/chat?audio=pcm HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    )
    with serving(mini, heartbeat_s=1.0) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as dead:
            dead.sendall(head.encode())
            assert b"101" in dead.recv(1024)
            wait_for(lambda: server.hall.active == 1, "the conversation")
            server.wait_idle()
            wait_for(lambda: not server.server.server_state.connections, "the end of the connection")


def test_large_messages_of_many_are_not_all_taken(mini: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do they end a conversation, to which a picture is sent meanwhile."""
    monkeypatch.setattr("moshivis.serve.patience.MOST_LARGE", 2)
    monkeypatch.setattr("moshivis.serve.patience.LARGE", 1000)

    def begin(size: int) -> ClientConnection:
        """A socket on which a part of a message has come."""
        caller = connect(server.ws + "/v1/realtime", open_timeout=60)
        send_part(caller, bytes(size))
        return caller

    with serving(mini) as server, connect(server.ws + "/api/chat?page=1&picture=0", open_timeout=60) as talking:
        while talking.recv(60, decode=False)[:1] != b"\0":
            pass
        with begin(2000) as one, begin(2000) as other, begin(500) as small:
            for caller in (one, other, small):
                assert caller.ping().wait(60)
            with begin(2000) as late, pytest.raises(ConnectionClosed, match="1013.*try again later"):
                while True:
                    late.recv(60)
            send_part(talking, b"\x08" + bytes(2000))
            for caller in (one, other, small, talking):
                assert caller.ping().wait(60)
            for _ in range(3):  # many small ones are no large one
                send_part(small, bytes(500), ends_last=True)
                assert small.ping().wait(60)
            one.socket.shutdown(socket.SHUT_RDWR)
            wait_for(lambda: len(server.server.server_state.connections) == 3, "the end of one")
            with begin(2000) as late:
                assert late.ping().wait(60)
            send_part(talking, b"", ends_last=True)
            while b"not a picture" not in talking.recv(60, decode=False):
                pass


def send_part(caller: ClientConnection, message: bytes, *, ends_last: bool = False) -> None:
    """The beginning of a message, after the end of the one before."""
    with caller.protocol_mutex:
        if ends_last:
            caller.protocol.send_continuation(b"", fin=True)
        caller.protocol.send_binary(message, fin=False)
        caller.socket.sendall(b"".join(caller.protocol.data_to_send()))


def test_a_message_beyond_the_limit_ends_its_connection_only(mini: Assistant) -> None:
    with serving(mini, message_bytes=200_000, picture_bytes=100_000) as server:
        with connect(server.ws + "/api/chat", open_timeout=60) as other:
            with connect(server.ws + "/api/chat", open_timeout=60) as large:
                large.send(bytes(200_001))
                with pytest.raises(ConnectionClosed) as closed:
                    while True:
                        large.recv(60)
                assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
            other.ping().wait(60)
        server.wait_idle()
