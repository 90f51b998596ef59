"""The official `openai` Python SDK, unmodified, holds conversations about a picture."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from json_client import FRAME, PICTURE, UNHURRIED, data_uri, encoded, loudness, question
from serve_support import PATIENCE, RunningServer, serving

if TYPE_CHECKING:
    from moshivis.inference.conversation import Assistant

openai = pytest.importorskip("openai")

TOKEN = "open-sesame"
HISTORY: list[Any] = [
    {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": data_uri(PICTURE)}]}
]


@pytest.fixture(scope="module")
def locked_server(mini: Assistant) -> Iterator[RunningServer]:
    """A server that wants a token, which the SDK sends as its key."""
    with serving(mini, token=TOKEN, **UNHURRIED) as server:
        yield server


def client_of(server: RunningServer, key: str = TOKEN) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def test_realtime_in_turns(locked_server: RunningServer) -> None:
    """As an application with turns does it: show, listen, ask with a recording, listen."""
    with client_of(locked_server).realtime.connect(model="mini") as connection:
        created = connection.recv()
        assert created.type == "session.created" and created.session.audio.input.format.rate == 24000
        connection.session.update(session={"type": "realtime", "moshivis": {"seed": 1, "text_temperature": 0.7}})
        assert connection.recv().session.moshivis["seed"] == 1
        connection.conversation.item.create(item=HISTORY[0])
        greeting = response(connection)
        connection.input_audio_buffer.append(audio=encoded(question()))
        connection.input_audio_buffer.commit()
        connection.response.create()
        answer = response(connection)
    for transcript, sound in (greeting, answer):
        assert len(transcript.split()) > 1 and loudness(sound) > 0.01
    locked_server.wait_idle()


def response(connection: Any) -> tuple[str, bytes]:
    """Transcript and sound of the next response."""
    text, sound = "", b""
    for event in connection:
        if event.type == "error":
            raise AssertionError(event.error.message)
        if event.type == "response.output_audio.delta":
            sound += base64.b64decode(event.delta)
        if event.type == "response.output_audio_transcript.delta":
            text += event.delta
            assert 0 <= event.gate < 1
        if event.type == "response.done":
            assert event.response.status == "completed"
            assert event.response.output[0].content[0].transcript == text
            return text, sound
    raise AssertionError("the connection ended before the response")


def test_errors_reach_handlers_and_the_session_goes_on(locked_server: RunningServer) -> None:
    errors: list[Any] = []
    with client_of(locked_server).realtime.connect(model="mini") as connection:
        connection.on("error", errors.append)
        connection.session.update(session={"type": "realtime", "instructions": "Be brief."}, event_id="mine")
        connection.conversation.item.create(
            item={"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello?"}]}
        )
        connection.input_audio_buffer.clear()
        connection.on("input_audio_buffer.cleared", lambda event: connection.close())
        connection.dispatch_events()
    assert [error.error.code for error in errors] == ["unsupported_value", "unsupported_content"]
    assert errors[0].error.event_id == "mine" and errors[0].error.param == "session.instructions"


def test_the_key_is_the_token(locked_server: RunningServer) -> None:
    for connect in (
        client_of(locked_server, "wrong").realtime.connect(model="mini"),
        client_of(locked_server, "wrong").live.connect(),
    ):
        with pytest.raises(Exception, match="401"), connect:
            pass


def test_live_in_full_duplex(locked_server: RunningServer) -> None:
    """A microphone that never stops: what we hear decides how long we speak, not a turn."""
    client = openai.AsyncOpenAI(base_url=f"{locked_server.url}/v1", api_key=TOKEN)
    text, sound, closed = asyncio.run(asyncio.wait_for(full_duplex(client), 4 * PATIENCE))
    assert len(text.split()) > 3 and loudness(sound) > 0.005
    assert (closed.reason, closed.session.status) == ("close_requested", "active")
    assert closed.usage.seconds >= 6.4
    locked_server.wait_idle()


async def full_duplex(client: Any) -> tuple[str, bytes, Any]:
    text, sound = "", b""
    async with client.live.connect() as connection:
        session = {"model": "mini", "image": {"image_url": data_uri(PICTURE)}, "moshivis": {"seed": 1}}
        await connection.session.start(session={**session, "audio": {"format": {"type": "audio/pcm", "rate": 24000}}})
        started = await connection.recv()
        assert started.type == "session.started" and started.session.id and started.session.image["shown"]
        speaking = asyncio.create_task(speak(connection))
        async for event in connection:
            assert event.type != "error", event
            if event.type == "session.output_audio.delta":
                sound += base64.b64decode(event.delta)
                if len(sound) == 80 * FRAME * 2:
                    speaking.cancel()
                    await connection.session.close()
            if event.type == "session.output_transcript.delta":
                text += event.delta
                assert event.end_ms == event.start_ms + 80 and 0 <= event.gate < 1
            if event.type == "session.closed":
                return text, sound, event
    raise AssertionError("the session was not closed in words")


async def speak(connection: Any) -> None:
    """Silence while the assistant greets, the question, silence: 80 ms every 80 ms."""
    samples = np.concatenate([np.zeros(30 * FRAME, np.int16), question(), np.zeros(3000 * FRAME, np.int16)])
    for start in range(0, len(samples), FRAME):
        await connection.session.input_audio.append(audio=encoded(samples[start : start + FRAME]))
        await asyncio.sleep(0.08)
