"""`/v1/realtime` over real sockets: turns, pictures, settings, and everything that must not work."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from json_client import (
    FRAME,
    PICTURE,
    UNHURRIED,
    Event,
    JsonClient,
    data_uri,
    decoded,
    encoded,
    json_client,
    limited,
    loudness,
    png,
)
from json_client import question as spoken_question
from moshivis.serve.pcm import PCM, PCMU, PcmReader, PcmWriter
from serve_support import RunningServer

PATH = "/v1/realtime?model=mini"
SOUND, WORDS = "response.output_audio.delta", "response.output_audio_transcript.delta"
SILENCE = encoded(np.zeros(FRAME, "<i2"))


@pytest.fixture
def client(running_server: RunningServer) -> Iterator[JsonClient]:
    """A client that has been welcomed."""
    with limited(running_server, **UNHURRIED), json_client(running_server, PATH) as client:
        client.until("session.created")
        yield client
    running_server.wait_idle()


def show(client: JsonClient, picture: str, **fields: Any) -> None:
    content = [{"type": "input_image", "image_url": picture}]
    client.send("conversation.item.create", item={"type": "message", "role": "user", "content": content}, **fields)


def content(*parts: Any) -> Event:
    return {"type": "message", "role": "user", "content": list(parts)}


def check_alive(client: JsonClient) -> None:
    client.ask("input_audio_buffer.cleared", "input_audio_buffer.clear")


# a conversation -------------------------------------------------------------------------------------------------------


def test_a_conversation_in_turns(client: JsonClient) -> None:
    """Picture, greeting, a question in one piece, an answer; no sound is sent while the client waits."""
    assert client.events[0]["type"] == "session.created"
    show(client, data_uri(PICTURE))
    greeting = client.until("response.done", "error")
    client.send("input_audio_buffer.append", audio=encoded(spoken_question()))
    committed = client.ask("input_audio_buffer.committed", "input_audio_buffer.commit")
    client.send("response.create")
    answer = client.until("response.done", "error")
    for done in (greeting, answer):
        check_response(client, done["response"])
    picture = client.of_type("conversation.item.done")[0]["item"]
    assert (picture["role"], picture["content"][0]["type"]) == ("user", "input_image")
    chain = [(event["previous_item_id"], event["item"]["id"]) for event in client.of_type("conversation.item.added")]
    assert (committed["previous_item_id"], committed["item_id"]) == chain[2]
    assert [before for before, _ in chain] == [None, *(item for _, item in chain)][:-1]
    said = client.of_type("conversation.item.done")[2]["item"]
    assert (said["id"], said["role"], said["content"][0]["type"]) == (committed["item_id"], "user", "input_audio")
    assert len({event["event_id"] for event in client.events}) == len(client.events)


def check_response(client: JsonClient, response: Event) -> None:
    """A whole response: its words, its sound, and the order of its events."""
    assert response["status"] == "completed"
    name = response["id"]
    mine = [event for event in client.events if name in (event.get("response_id"), event.get("response", {}).get("id"))]
    words = [event for event in mine if event["type"] == WORDS]
    assert "".join(event["delta"] for event in words) == response["output"][0]["content"][0]["transcript"]
    assert len(words) > 2 and all(0 <= event["gate"] < 1 for event in words) and any(event["gate"] for event in words)
    sound = decoded([event for event in mine if event["type"] == SOUND])
    assert len(sound) % (2 * FRAME) == 0 and loudness(sound) > 0.01
    kinds = list(dict.fromkeys(event["type"].removeprefix("response.") for event in mine))
    assert kinds == [
        *("created", "output_item.added", "content_part.added", "output_audio.delta", "output_audio_transcript.delta"),
        *("output_audio.done", "output_audio_transcript.done", "content_part.done", "output_item.done", "done"),
    ]


def test_a_cancelled_response_ends_and_the_next_one_comes(client: JsonClient) -> None:
    assert client.fails("response.cancel")["code"] == "response_cancel_not_active"
    client.send("response.create")
    created = client.until("response.created")["response"]
    assert client.fails("response.cancel", response_id="resp_0")["code"] == "response_cancel_not_active"
    client.until(SOUND)
    client.send("response.cancel", response_id=created["id"])
    done = client.until("response.done")["response"]
    assert (done["id"], done["status"]) == (created["id"], "cancelled")
    client.send("response.create")
    again = client.until("response.created", SOUND)
    assert again["type"] == "response.created" and again["response"]["id"] != created["id"]


def test_telephone_sound_in_and_out(client: JsonClient) -> None:
    formats = {"input": {"format": {"type": "audio/pcma"}}, "output": {"format": {"type": "audio/pcmu"}}}
    session = client.ask("session.updated", "session.update", session={"type": "realtime", "audio": formats})["session"]
    assert session["audio"]["input"]["format"] == {"type": "audio/pcma", "rate": 8000}
    client.send("input_audio_buffer.append", audio=encoded(np.full(640, 0xD5, np.uint8)))
    client.until("response.done")
    sound = decoded(client.of_type(SOUND))
    assert len(sound) % 640 == 0 and set(sound) != {0xFF}
    heard = PcmReader(PCMU).read(sound)
    assert loudness(PcmWriter(PCM).write(heard)) > 0.01


def test_the_picture_can_be_replaced_while_they_talk(client: JsonClient) -> None:
    client.send("input_audio_buffer.append", audio=SILENCE)
    client.until(SOUND)
    for colour in ("red", "blue"):
        show(client, data_uri(png(colour)))
        client.until("conversation.item.done")
    client.until(SOUND, "response.done")


# settings -------------------------------------------------------------------------------------------------------------


def test_a_seed_is_drawn_for_whoever_names_none(running_server: RunningServer) -> None:
    seeds = set()
    for _ in range(3):
        with json_client(running_server, PATH) as client:
            seeds.add(client.until("session.created")["session"]["moshivis"]["seed"])
    assert len(seeds) == 3


def test_settings_are_echoed_and_fixed_once_the_call_has_begun(client: JsonClient) -> None:
    own = {"seed": 7, "text_temperature": 0.5, "audio_top_k": 30, "gate_delay": 2, "input_buffer_ms": 800}
    session = client.ask("session.updated", "session.update", session={"moshivis": own})["session"]
    assert {name: session["moshivis"][name] for name in own} == own
    assert session["moshivis"]["on_gap"] == "silence"
    client.ask("session.updated", "session.update", session={**session})  # what we say can be said to us
    client.send("input_audio_buffer.append", audio=SILENCE)
    client.until(SOUND)
    error = client.fails("session.update", session={"moshivis": {"seed": 8}})
    assert (error["code"], error["param"]) == ("session_started", "session.moshivis")
    assert "response.create" in error["message"]  # which begins the call too
    later = client.ask("session.updated", "session.update", session={"moshivis": {"seed": 7, "input_buffer_ms": 1000}})
    assert later["session"]["moshivis"]["input_buffer_ms"] == 960  # whole frames


@pytest.mark.parametrize(
    ("session", "param", "code"),
    [
        (None, "session", "missing_parameter"),
        ([], "session", "invalid_type"),
        ({"type": "transcription"}, "session.type", "unsupported_value"),
        ({"instructions": "Speak like a pirate."}, "session.instructions", "unsupported_value"),
        ({"tools": [{"type": "function"}]}, "session.tools", "unsupported_value"),
        ({"output_modalities": ["text"]}, "session.output_modalities", "unsupported_value"),
        ({"audio": {"output": {"voice": "marin"}}}, "session.audio.output.voice", "unsupported_value"),
        ({"audio": {"output": {"speed": 1.5}}}, "session.audio.output.speed", "unsupported_value"),
        (
            {"audio": {"input": {"turn_detection": {"type": "server_vad"}}}},
            *("session.audio.input.turn_detection", "unsupported_value"),
        ),
        (
            {"audio": {"input": {"transcription": {"model": "whisper-1"}}}},
            *("session.audio.input.transcription", "unsupported_value"),
        ),
        (
            {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16000}}}},
            *("session.audio.input.format", "unsupported_format"),
        ),
        ({"audio": {"input": {"format": "pcm16"}}}, "session.audio.input.format", "invalid_type"),
        ({"audio": {"sideways": {}}}, "session.audio.sideways", "unknown_parameter"),
        ({"temperature": 0.8}, "session.temperature", "unknown_parameter"),
        ({"moshivis": {"temperature": 0.8}}, "session.moshivis.temperature", "unknown_parameter"),
        ({"moshivis": {"text_temperature": 1e300}}, "session.moshivis.text_temperature", "invalid_value"),
        ({"moshivis": {"seed": "lucky"}}, "session.moshivis.seed", "invalid_value"),
        ({"moshivis": {"input_buffer_ms": 1}}, "session.moshivis.input_buffer_ms", "invalid_value"),
    ],
)
def test_an_update_that_cannot_be_honoured_changes_nothing(
    client: JsonClient, session: Any, param: str, code: str
) -> None:
    good = {"audio": {"input": {"format": {"type": "audio/pcmu"}}}}
    before = client.ask("session.updated", "session.update", session={})["session"]
    merged = {**good, **session} if isinstance(session, dict) and "audio" not in session else session
    error = client.fails("session.update", session=merged)
    assert (error["param"], error["code"]) == (param, code)
    assert client.ask("session.updated", "session.update", session={})["session"] == before


# events that are wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "code"),
    [
        ("input_audio_buffer.append", {}, "missing_parameter"),
        ("input_audio_buffer.append", {"audio": 7}, "invalid_type"),
        ("input_audio_buffer.append", {"audio": "not base64!"}, "invalid_base64"),
        ("input_audio_buffer.append", {"audio": "AAAA"}, "invalid_audio"),
        ("input_audio_buffer.append", {"audio": "AAAA" * 480_001}, "too_large"),
        ("input_audio_buffer.commit", {"now": True}, "unknown_parameter"),
        ("conversation.item.create", {}, "missing_parameter"),
        ("conversation.item.create", {"item": {"type": "message", "role": "user"}}, "invalid_value"),
        ("conversation.item.create", {"item": {"type": "function_call"}}, "unsupported_value"),
        ("conversation.item.create", {"item": {**content(), "role": "system"}}, "unsupported_value"),
        ("conversation.item.create", {"item": content({"type": "input_text", "text": "Hi"})}, "unsupported_content"),
        ("conversation.item.create", {"item": content({"type": "input_audio", "audio": ""})}, "unsupported_content"),
        ("conversation.item.create", {"item": content({"type": "input_image"})}, "missing_parameter"),
        ("conversation.item.create", {"item": content(*[{"type": "input_image"}] * 2)}, "invalid_value"),
        ("conversation.item.create", {"item": content([])}, "invalid_value"),
        ("conversation.item.create", {"item": content(), "previous_item_id": "item_9"}, "unsupported_value"),
        ("conversation.item.truncate", {"item_id": "item_1", "content_index": 0}, "missing_parameter"),
        (
            "conversation.item.truncate",
            {"item_id": "item_1", "content_index": 0, "audio_end_ms": 1e9},
            "invalid_type",
        ),
        ("conversation.item.delete", {"item_id": "item_1"}, "unknown_event"),
        ("response.create", {"response": {"instructions": "Say hi."}}, "unsupported_value"),
        ("response.create", {"response": {"conversation": "none"}}, "unsupported_value"),
        ("response.create", {"response": 1}, "invalid_type"),
        ("response.cancel", {"response_id": {}}, "invalid_type"),
        ("session.start", {}, "unknown_event"),
        ("x" * 100_000, {}, "unknown_event"),
    ],
)
def test_a_wrong_event_is_answered_and_the_session_goes_on(
    client: JsonClient, kind: str, fields: dict[str, Any], code: str
) -> None:
    error = client.fails(kind, **fields)
    assert (error["type"], error["code"]) == ("invalid_request_error", code)
    check_alive(client)


def test_messages_that_are_no_events(client: JsonClient) -> None:
    junk: list[str | bytes] = [b"\x00\x01", b"", "", "[]", "{", '"x"', '{"type": NaN}', '{"type": "a", "b": 1e999}']
    junk += [
        '{"type": ' + "[" * 100_000,
        '{"type": "a", "event_id": [1]}',
        "\ud83d".encode("utf-8", "replace").decode(),
    ]
    for message in junk:
        client.socket.send(message)
        assert client.until("error")["error"]["type"] == "invalid_request_error"
    check_alive(client)


def test_random_events_never_break_a_session(client: JsonClient) -> None:
    """Every one is answered by something, and the session still works."""
    dice = random.Random(5)
    kinds = ["session.update", "conversation.item.create", "conversation.item.truncate", "response.cancel", "?"]
    names = [
        "session",
        "item",
        "type",
        "audio",
        "content",
        "role",
        "item_id",
        "moshivis",
        "input",
        "format",
        "event_id",
    ]

    def value(depth: int) -> Any:
        pick = dice.randrange(9 if depth < 4 else 6)
        if pick < 6:
            return [None, True, -1, 1e308, "message", "data:image/png;base64,AAAA"][pick]
        if pick < 7:
            return [value(depth + 1) for _ in range(dice.randrange(3))]
        return {dice.choice(names): value(depth + 1) for _ in range(dice.randrange(4))}

    for _ in range(400):
        event = {dice.choice(names): value(0) for _ in range(4)} | {"type": dice.choice(kinds)}
        client.socket.send(json.dumps(event))
    client.send("input_audio_buffer.clear")
    client.until("input_audio_buffer.cleared")
    assert len(client.events) >= 400
    assert {event["type"] for event in client.events[1:-1]} <= {"error", "session.updated"}


def test_what_came_while_a_bad_picture_was_read_is_answered(client: JsonClient) -> None:
    """Picture, question and request for an answer back to back, as a script sends them."""
    show(client, data_uri(PICTURE[:300]))
    client.send("input_audio_buffer.append", audio=SILENCE)
    client.send("response.create")
    assert client.until("error")["error"]["code"] == "invalid_image"
    client.until(WORDS)


def test_a_bad_picture_leaves_the_session_and_the_old_picture(
    client: JsonClient, running_server: RunningServer
) -> None:
    bad = [
        "https://example.org/cat.png",
        data_uri(b"not a picture"),
        data_uri(PICTURE[:300]),
        data_uri(b"%PDF-1.7"),
        data_uri(png("red", 500)),  # too many pixels
    ]
    with limited(running_server, **UNHURRIED, picture_pixels=200_000):
        for when in ("before", "during"):
            for picture in bad:
                show(client, picture, event_id="bad")
                error = client.until("error", "conversation.item.added")
                assert error["error"]["code"] == "invalid_image" and error["client_event_id"] == "bad", when
                assert error["error"]["param"] == "item.content[0].image_url"
            show(client, data_uri(PICTURE))
            client.until("conversation.item.done")
    assert running_server.hall.active == 1
    client.until(WORDS)


def test_acknowledgements(client: JsonClient) -> None:
    truncated = client.ask(
        "conversation.item.truncated", "conversation.item.truncate", item_id="item_1", content_index=0, audio_end_ms=80
    )
    assert (truncated["item_id"], truncated["audio_end_ms"]) == ("item_1", 80)
    first = client.ask("input_audio_buffer.committed", "input_audio_buffer.commit")
    second = client.ask("input_audio_buffer.committed", "input_audio_buffer.commit")
    assert second["previous_item_id"] == first["item_id"]
