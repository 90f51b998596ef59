"""Clients of `/v1/realtime` that are too slow, too large, too many or gone: told so, and their place given back."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed

from json_client import FRAME, PICTURE, UNHURRIED, Event, JsonClient, data_uri, encoded, json_client, limited
from serve_support import RunningServer, trickle

PATH = "/v1/realtime?model=mini"
SILENCE = encoded(np.zeros(FRAME, "<i2"))
WORDS = "response.output_audio_transcript.delta"


def show_picture(client: JsonClient, picture: str) -> None:
    content: list[dict[str, Any]] = [{"type": "input_image", "image_url": picture}]
    client.send("conversation.item.create", item={"type": "message", "role": "user", "content": content})


def ends_with(client: JsonClient, code: int, error: str) -> list[Event]:
    events = client.until_closed()
    assert events[-1]["type"] == "error" and events[-1]["error"]["code"] == error, events[-1:]
    assert client.code == code
    return events


def test_who_says_nothing_is_let_go(running_server: RunningServer) -> None:
    begun = time.monotonic()
    with limited(running_server, first_message_s=0.5), json_client(running_server, PATH) as client:
        assert len(ends_with(client, 1008, "idle_timeout")) == 2
        assert time.monotonic() - begun >= 0.5
    with limited(running_server, idle_s=1.0), json_client(running_server, PATH) as client:
        client.until("session.created")
        client.ask("input_audio_buffer.cleared", "input_audio_buffer.clear")
        ends_with(client, 1008, "idle_timeout")


def test_a_session_has_a_length(running_server: RunningServer) -> None:
    with limited(running_server, session_s=2.0), json_client(running_server, PATH) as client:
        created = client.until("session.created")["session"]
        assert abs(created["expires_at"] - time.time() - 2) < 60
        client.send("response.create")
        events = ends_with(client, 1000, "session_expired")
        assert [event["response"]["status"] for event in events if event["type"] == "response.done"][-1:] == [
            "incomplete"
        ]
    with limited(running_server, session_s=1.0), json_client(running_server, PATH) as client:
        ends_with(client, 1000, "session_expired")  # also without a call
    with json_client(running_server, PATH) as client:
        client.ask("session.updated", "session.update", session={"moshivis": {"max_frames": 3}})
        client.send("response.create")
        ends_with(client, 1000, "session_expired")
    running_server.wait_idle()


def test_a_full_server_says_so(running_server: RunningServer) -> None:
    with limited(running_server, sessions=1), json_client(running_server, PATH) as first:
        with json_client(running_server, PATH) as late:
            late.until("session.created")  # nobody has a place yet
            show_picture(first, data_uri(PICTURE))
            first.until("conversation.item.done")
            with json_client(running_server, PATH) as second:
                assert len(ends_with(second, 1013, "server_busy")) == 1
            late.send("input_audio_buffer.append", audio=SILENCE)
            ends_with(late, 1013, "server_busy")
        first.until(WORDS)  # nothing has happened to it
    running_server.wait_idle()
    with json_client(running_server, PATH) as client:
        client.until("session.created")


def test_large_messages(running_server: RunningServer) -> None:
    with limited(running_server, message_bytes=10_000, picture_bytes=200), json_client(running_server, PATH) as client:
        client.send("input_audio_buffer.append", audio="A" * 20_000)
        assert client.until("error")["error"]["code"] == "too_large"
        show_picture(client, data_uri(PICTURE[:201]))
        assert client.until("error")["error"]["code"] == "too_large"
        client.ask("input_audio_buffer.cleared", "input_audio_buffer.clear")
    with json_client(running_server, PATH) as client:
        with contextlib.suppress(ConnectionClosed):  # it is refused before all of it has been sent
            client.socket.send("x" * (2 * running_server.hall.limits.message_bytes))
        client.until_closed()
        assert client.code in (1009, 1006)
    with json_client(running_server, PATH) as client:
        client.until("session.created")


def test_a_picture_may_be_as_large_as_is_promised(running_server: RunningServer) -> None:
    most = running_server.hall.limits.picture_bytes
    with limited(running_server, **UNHURRIED), json_client(running_server, PATH) as client:
        show_picture(client, data_uri(PICTURE + bytes(most - len(PICTURE))))
        assert client.until("conversation.item.done", "error")["type"] == "conversation.item.done"
        for size in (most + 1, most * 4 // 3):  # more than a picture, and than a message, may have
            show_picture(client, data_uri(bytes(size)))
            assert client.until("error")["error"]["code"] == "too_large"
        client.ask("input_audio_buffer.cleared", "input_audio_buffer.clear")
    running_server.wait_idle()


def test_a_slow_picture_during_a_call_is_waited_for(running_server: RunningServer) -> None:
    content = [{"type": "input_image", "image_url": data_uri(PICTURE)}]
    item = {"type": "message", "role": "user", "content": content}
    message = json.dumps({"type": "conversation.item.create", "item": item})
    with limited(running_server, idle_s=3.0), json_client(running_server, PATH) as client:
        client.ask("input_audio_buffer.cleared", "input_audio_buffer.clear")
        trickle(client.socket, message, 6.0)
        client.until("conversation.item.done")
    with limited(running_server, idle_s=1.0), json_client(running_server, PATH) as client:
        client.ask("input_audio_buffer.cleared", "input_audio_buffer.clear")
        with contextlib.suppress(OSError):
            trickle(client.socket, message, 30.0)
        client.until_closed()
        assert (client.code, client.reason) == (1008, "idle_timeout")
    running_server.wait_idle()


def test_sound_beyond_the_buffer_is_reported(running_server: RunningServer) -> None:
    with json_client(running_server, PATH) as client:
        client.ask("session.updated", "session.update", session={"moshivis": {"input_buffer_ms": 160}})
        client.send("input_audio_buffer.append", audio=encoded(np.zeros(100 * FRAME, "<i2")))
        lost = client.until("moshivis.audio_lost")
        assert 90 <= lost["input_frames"] <= 100 and lost["output_frames"] == 0
    running_server.wait_idle()


def test_a_client_that_vanishes_gives_its_place_back(running_server: RunningServer) -> None:
    with json_client(running_server, PATH) as client:
        show_picture(client, data_uri(PICTURE))
        client.until("conversation.item.done")
        assert running_server.hall.active == 1
        client.socket.socket.close()
        running_server.wait_idle()


def test_browsers_get_their_subprotocol(running_server: RunningServer) -> None:
    offered = ["realtime", "openai-insecure-api-key.x"]
    with json_client(running_server, PATH, subprotocols=offered) as client:
        assert client.socket.subprotocol == "realtime"
        client.until("session.created")
