"""`/v1/live/sessions` over real sockets: both sides at once, bit for bit what the engine says, and every way to end."""

from __future__ import annotations

import contextlib
import json
import queue
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

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
    question,
)
from moshivis.inference.call import Ended, Said
from moshivis.inference.conversation import Assistant
from moshivis.model import MoshiVis
from moshivis.serve.pcm import PCM, PCM_16K, PCMA, PCMU, AudioFormat, PcmReader, PcmWriter
from moshivis.speech_lm.tokenizer import TextTokenizer
from serve_support import PATIENCE, RunningServer, serving

PATH = "/v1/live/sessions"
SOUND, WORDS = "session.output_audio.delta", "session.output_transcript.delta"
# The model waits for our sound, so what it says does not depend on how busy the machine is.
LOCKSTEP = {"on_gap": "park", "seed": 3, "input_buffer_ms": 30_000}


@contextlib.contextmanager
def live(server: RunningServer, limits: dict[str, Any] | None = None, **session: Any) -> Iterator[JsonClient]:
    """A client whose session has started."""
    with limited(server, **{**UNHURRIED, **(limits or {})}), json_client(server, PATH) as client:
        client.ask("session.started", "session.start", session={"model": "mini", **session})
        yield client
    server.wait_idle()


def append(client: JsonClient, samples: NDArray[np.generic]) -> None:
    client.send("session.input_audio.append", audio=encoded(samples))


def hear(client: JsonClient, frames: int) -> list[Event]:
    """Every event until so many frames of the assistant have come."""
    first, heard = len(client.events), 0
    while heard < frames:
        heard += client.until(SOUND, "error", "session.closed")["type"] == SOUND
    return client.events[first:]


def spoken(samples: NDArray[np.int16], frames: int) -> NDArray[np.int16]:
    """The samples, and silence, in so many whole frames."""
    return np.concatenate([samples, np.zeros(frames * FRAME - len(samples), np.int16)])


def directly(server: RunningServer, samples: NDArray[np.int16], picture: bytes | None) -> tuple[bytes, str]:
    """What the engine itself says to the same frames."""
    engine = server.hall.engine
    settings = {"on_gap": "park", "seed": 3}
    said: queue.Queue[Said | Ended] = queue.Queue()
    usual = engine.usual_settings()
    image = None if picture is None else engine.look(picture)
    call = engine.open(said.put, type(usual)(**{**vars(usual), **settings}), image)
    sound, text = [], []
    for frame in samples.reshape(-1, FRAME):
        call.push(PcmReader(PCM).read(frame.tobytes()))
        answer = said.get(timeout=PATIENCE)
        assert isinstance(answer, Said)
        sound.append(PcmWriter(PCM).write(answer.audio))
        text.append(answer.text)
    call.close()
    return b"".join(sound), "".join(text)


# a conversation -------------------------------------------------------------------------------------------------------


def test_a_conversation_is_what_the_engine_says(running_server: RunningServer) -> None:
    """In one burst, which the buffer holds: every sample and every word, in place."""
    samples = spoken(question(), 60)
    with live(running_server, image={"image_url": data_uri(PICTURE)}, moshivis=LOCKSTEP) as client:
        started = client.events[0]["session"]
        assert (started["status"], started["model"]) == ("active", running_server.hall.engine.assistant.config.name)
        assert started["image"] == {"shown": True} and started["moshivis"]["seed"] == 3
        assert abs(started["expires_at"] - time.time() - running_server.hall.limits.session_s) < 120
        append(client, samples)
        events = hear(client, 60)
        client.send("session.close", event_id="bye")
        events += client.until_closed()
    sound = [event for event in events if event["type"] == SOUND]
    words = [event for event in events if event["type"] == WORDS]
    assert [(event["start_ms"], event["end_ms"]) for event in sound] == [(80 * i, 80 * i + 80) for i in range(60)]
    expected, text = directly(running_server, samples, PICTURE)
    assert decoded(sound) == expected and loudness(expected) > 0.005
    assert "".join(event["delta"] for event in words) == text and text
    assert all(event["end_ms"] - event["start_ms"] == 80 and 0 <= event["gate"] < 1 for event in words)
    closed = events[-1]
    assert (closed["type"], closed["reason"], closed["client_event_id"]) == ("session.closed", "close_requested", "bye")
    assert (client.code, closed["usage"]["seconds"], closed["session"]["id"]) == (1000, 4.8, started["id"])


def test_muted_sound_is_silence_to_the_model(running_server: RunningServer) -> None:
    heard = []
    for samples in (np.zeros(20 * FRAME, np.int16), spoken(question(), 20)):
        with live(running_server, moshivis=LOCKSTEP) as client:
            muted = client.ask("session.input_audio.muted", "session.input_audio.mute", event_id="m")
            assert muted["client_event_id"] == "m"
            append(client, samples)
            heard.append(decoded([event for event in hear(client, 20) if event["type"] == SOUND]))
            client.ask("session.input_audio.unmuted", "session.input_audio.unmute")
            append(client, np.zeros(FRAME, np.int16))
            hear(client, 1)
    assert heard[0] == heard[1]


def test_muting_acts_on_the_sound_that_comes_meanwhile(running_server: RunningServer) -> None:
    """However much of what came before, or meanwhile, still waits to be heard."""
    part = spoken(question(), 20)
    with live(running_server, moshivis=LOCKSTEP) as client:
        append(client, part)
        client.ask("session.input_audio.muted", "session.input_audio.mute")
        hear(client, 5)
        append(client, part)
        client.ask("session.input_audio.unmuted", "session.input_audio.unmute")
        append(client, part)
        hear(client, 60 - len(client.of_type(SOUND)))
        heard = decoded(client.of_type(SOUND))
    expected, _ = directly(running_server, np.concatenate([part, np.zeros_like(part), part]), None)
    assert heard == expected


def test_pictures_come_and_go(running_server: RunningServer) -> None:
    def gates(client: JsonClient, samples: NDArray[np.int16]) -> list[float]:
        """Of the words that the assistant says to so many frames."""
        append(client, samples)
        return [event["gate"] for event in hear(client, len(samples) // FRAME) if event["type"] == WORDS]

    with live(running_server, moshivis=LOCKSTEP) as client:
        assert client.events[0]["session"]["image"] == {"shown": False}
        for uri in ("http://example.org/a.png", data_uri(b"junk")):
            assert client.fails("session.image.set", image_url=uri)["code"] == "invalid_image"
        answer = client.ask("session.image.updated", "session.image.set", image_url=data_uri(PICTURE), event_id="p")
        assert answer["image"] == {"shown": True} and answer["client_event_id"] == "p"
        seen = gates(client, np.zeros(40 * FRAME, np.int16))
        assert seen and all(seen)
        assert client.fails("session.image.set", image_url=data_uri(b"junk"))["param"] == "image_url"
        assert all(gates(client, spoken(question(), 30)))  # the picture before is still seen
        answer = client.ask("session.image.updated", "session.image.set", image_url=None)
        assert answer["image"] == {"shown": False}
        unseen = gates(client, spoken(question(), 60))
        assert unseen and not any(unseen)


@pytest.mark.parametrize("format", [PCM_16K, PCMU, PCMA])
def test_other_formats_carry_the_same_conversation(running_server: RunningServer, format: AudioFormat) -> None:
    """Telephone sound is not the same to the model, but it comes and goes at the same pace, and can be heard."""
    writer, reader = PcmWriter(format), PcmReader(format)
    samples = PcmReader(PCM).read(spoken(question(), 30).tobytes())
    data = writer.write(samples) + writer.write(samples[:0], last=True)
    with live(running_server, audio={"format": format.to_json()}, moshivis={**LOCKSTEP, "on_gap": "silence"}) as client:
        assert client.events[0]["session"]["audio"]["format"] == format.to_json()
        append(client, np.frombuffer(data, np.uint8))
        events = hear(client, 40)
    sound = decoded([event for event in events if event["type"] == SOUND])
    seconds = len(reader.read(sound)) / 24000
    assert 40 * 0.08 - 0.2 < seconds < 45 * 0.08
    assert loudness(PcmWriter(PCM).write(PcmReader(format).read(sound))) > 0.002


def test_usage_is_told_once_in_a_while(running_server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moshivis.serve.live.USAGE_FRAMES", 5)
    with live(running_server, moshivis=LOCKSTEP) as client:
        append(client, np.zeros(12 * FRAME, np.int16))
        hear(client, 12)
        told = client.of_type("session.usage.updated")
    assert [event["usage"]["seconds"] for event in told] == [0.4, 0.8]
    context = running_server.hall.engine.assistant.config.speech_lm.backbone.context
    assert [event["context_window"]["usage_ratio"] for event in told] == [5 / context, 10 / context]


def test_sound_that_comes_too_fast_is_dropped_and_told(running_server: RunningServer) -> None:
    with live(running_server) as client:
        append(client, np.zeros(100 * FRAME, np.int16))
        told = client.until("info")
        assert told["code"] == "audio_lost" and 80 <= told["input_frames"] <= 100 and told["output_frames"] == 0


# what is wrong --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("session", "param", "code"),
    [
        (None, "session", "missing_parameter"),
        ("mini", "session", "invalid_type"),
        ({"model": 1}, "session.model", "invalid_type"),
        ({"instructions": "Be brief."}, "session.instructions", "unsupported_value"),
        ({"store": True}, "session.store", "unsupported_value"),
        ({"delegation": {"type": "client"}}, "session.delegation", "unsupported_value"),
        ({"audio": {"format": {"type": "audio/pcm", "rate": 48000}}}, "session.audio.format", "unsupported_format"),
        ({"audio": {"output": {"voice": "marin"}}}, "session.audio.output.voice", "unsupported_value"),
        ({"image": {"image_url": "cat.png"}}, "session.image.image_url", "invalid_image"),
        ({"image": {"image_url": data_uri(b"junk")}}, "session.image.image_url", "invalid_image"),
        ({"image": {"url": ""}}, "session.image.url", "unknown_parameter"),
        ({"moshivis": {"seed": -1}}, "session.moshivis.seed", "invalid_value"),
        ({"moshivis": {"on_gap": "wait"}}, "session.moshivis.on_gap", "invalid_value"),
        ({"voice": "x"}, "session.voice", "unknown_parameter"),
    ],
)
def test_a_wrong_start_is_refused_and_can_be_mended(
    running_server: RunningServer, session: Any, param: str, code: str
) -> None:
    with limited(running_server, **UNHURRIED), json_client(running_server, PATH) as client:
        error = client.fails("session.start", session=session)
        assert (error["param"], error["code"]) == (param, code)
        assert running_server.hall.active == 0
        client.ask("session.started", "session.start", session={"model": "mini"})
    running_server.wait_idle()


def test_a_refused_start_leaves_nothing_behind(running_server: RunningServer) -> None:
    own = {"text_temperature": 0.123, "input_buffer_ms": 800}
    with limited(running_server, **UNHURRIED), json_client(running_server, PATH) as client:
        wrong = {"image": {"image_url": data_uri(b"junk")}, "moshivis": own}
        assert client.fails("session.start", session=wrong)["code"] == "invalid_image"
        started = client.ask("session.started", "session.start", session={})["session"]["moshivis"]
        assert started["text_temperature"] != 0.123 and started["input_buffer_ms"] == 960
    running_server.wait_idle()


def test_events_have_their_time(running_server: RunningServer) -> None:
    with limited(running_server, **UNHURRIED), json_client(running_server, PATH) as client:
        silence = encoded(np.zeros(FRAME, np.int16))
        assert client.fails("session.input_audio.append", audio=silence)["code"] == "session_not_started"
        assert client.fails("session.input_audio.mute")["code"] == "session_not_started"
        client.ask("session.started", "session.start", session={})
        assert client.fails("session.start", session={})["code"] == "session_already_started"
        assert client.fails("session.update", session={})["code"] == "unknown_event"
        assert client.fails("session.instructions.append", content="Hi")["code"] == "unknown_event"
        assert client.fails("session.input_audio.append", audio="A")["code"] == "invalid_base64"
        assert client.fails("session.input_audio.append", audio="AAAA")["code"] == "invalid_audio"
        assert client.fails("session.input_audio.mute", now=1)["code"] == "unknown_parameter"
        assert client.fails("session.image.set")["code"] == "missing_parameter"
        assert client.fails("session.image.set", image_url=[])["code"] == "invalid_type"
        for junk in (b"\0", "no json", "[" * 5000, json.dumps({"type": "a", "x": [[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]})):
            client.socket.send(junk)
            assert client.until("error")["error"]["type"] == "invalid_request_error"
        client.until(SOUND)
        client.send("session.close")
        assert client.until_closed()[-1]["reason"] == "close_requested"
    running_server.wait_idle()


def test_a_session_can_be_closed_before_it_starts(running_server: RunningServer) -> None:
    with json_client(running_server, PATH) as client:
        client.send("session.close")
        (closed,) = client.until_closed()
        assert (closed["reason"], closed["usage"], client.code) == ("close_requested", {"seconds": 0.0}, 1000)


# limits ---------------------------------------------------------------------------------------------------------------


def last_words(client: JsonClient) -> list[tuple[str, str]]:
    """Type, and code or reason, of the errors and the closing event up to the end."""
    events = [event for event in client.until_closed() if event["type"] in ("error", "session.closed")]
    return [(event["type"], event.get("reason") or event["error"]["code"]) for event in events]


def test_a_session_must_start_in_time(running_server: RunningServer) -> None:
    with limited(running_server, first_message_s=1.0), json_client(running_server, PATH) as client:
        client.fails("session.input_audio.mute")  # an event, but not the one
        assert last_words(client) == [("error", "idle_timeout")]
        assert client.code == 1008 and "session.start" in client.events[-1]["error"]["message"]


def test_sessions_end_when_idle_or_too_long(running_server: RunningServer) -> None:
    with live(running_server, {"idle_s": 1.0}) as client:
        assert last_words(client) == [("error", "idle_timeout"), ("session.closed", "idle_timeout")]
        assert client.code == 1008
    with live(running_server, {"session_s": 3.0}) as client:
        assert last_words(client) == [("session.closed", "expired")]
        assert client.code == 1000
    with live(running_server, moshivis={"max_frames": 5}) as client:
        assert last_words(client) == [("session.closed", "expired")]
        assert client.events[-1]["usage"] == {"seconds": 0.4}


def test_a_picture_may_be_as_large_as_is_promised(running_server: RunningServer) -> None:
    most = running_server.hall.limits.picture_bytes
    with live(running_server) as client:
        large = data_uri(PICTURE + bytes(most - len(PICTURE)))
        assert client.ask("session.image.updated", "session.image.set", image_url=large)["image"] == {"shown": True}
        assert client.fails("session.image.set", image_url=data_uri(bytes(most + 1)))["code"] == "too_large"
        client.until(SOUND)


def test_a_full_server_says_so(running_server: RunningServer) -> None:
    with limited(running_server, sessions=1), json_client(running_server, PATH) as late:
        with live(running_server) as client:
            with json_client(running_server, PATH) as second:
                assert last_words(second) == [("error", "server_busy")]
                assert second.code == 1013
            late.send("session.start", session={})
            assert last_words(late) == [("error", "server_busy")]
            assert late.code == 1013
            client.until(SOUND)


def test_a_server_that_stops_tells_everybody(tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer) -> None:
    with (
        serving(Assistant(tiny_model, tiny_tokenizer)) as server,
        json_client(server, PATH) as talking,
        json_client(server, "/v1/realtime") as turns,
        json_client(server, PATH) as waiting,
        json_client(server, "/v1/realtime") as silent,
    ):
        talking.ask("session.started", "session.start", session={})
        turns.send("response.create")
        talking.until(SOUND)
        turns.until("response.created")
        server.server.should_exit = True
        assert last_words(talking) == [("error", "server_stopping"), ("session.closed", "server_stopping")]
        assert last_words(turns) == [("error", "server_stopping")]
        assert turns.events[-2]["type"] == "response.done"
        for client in (waiting, silent):
            client.until_closed()
        assert [client.code for client in (talking, turns)] == [1001, 1001]
        assert {waiting.code, silent.code} <= {1001, 1012}


def test_one_session_does_not_hear_the_other(running_server: RunningServer) -> None:
    """What a neighbour does, wrong or right, changes no bit."""
    samples = spoken(question(), 40)
    with live(running_server, image={"image_url": data_uri(PICTURE)}, moshivis=LOCKSTEP) as client:
        append(client, samples)
        with live_neighbour(running_server) as other:
            other.fails("session.image.set", image_url=data_uri(b"junk"))
            other.ask("session.image.updated", "session.image.set", image_url=data_uri(png("red")))
            append(other, question())
            events = hear(client, 40)
    expected, _ = directly(running_server, samples, PICTURE)
    assert decoded([event for event in events if event["type"] == SOUND]) == expected


@contextlib.contextmanager
def live_neighbour(server: RunningServer) -> Iterator[JsonClient]:
    with limited(server, **UNHURRIED), json_client(server, PATH) as client:
        client.ask("session.started", "session.start", session={"moshivis": {"seed": 9}})
        yield client
