"""Turns cut from the assistant's stream, without a model: frames in, events out."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from moshivis.inference.call import Said
from moshivis.serve.events import EventError
from moshivis.serve.pcm import PCMU
from moshivis.serve.responses import LONG_PAUSE, PATIENCE, PAUSE, Event, Responses

FRAME = 1920
OPENING = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
]
CLOSING = [
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "response.output_item.done",
    "conversation.item.done",
    "response.done",
]
SOUND, WORDS = "response.output_audio.delta", "response.output_audio_transcript.delta"


class Talker:
    """Says frames to responses."""

    def __init__(self, responses: Responses | None = None):
        self.responses = responses or Responses()
        self.frame = 0

    def say(self, text: str = "", loud: float = 0.0, frames: int = 1) -> list[Event]:
        events: list[Event] = []
        for _ in range(frames):
            audio = np.full(FRAME, loud, np.float32)
            said = Said(frame=self.frame, audio=audio, text=text, token=None, gate=0.0123456789)
            self.frame += 1
            events += self.responses.say(said)
        return events


def kinds(events: list[Event]) -> list[str]:
    return [kind for kind, _ in events]


def field(events: list[Event], kind: str) -> dict:
    return next(fields for name, fields in events if name == kind)


def test_a_response_opens_with_words_and_closes_after_a_pause() -> None:
    talker = Talker()
    assert talker.say(frames=30) == []
    assert talker.say(loud=0.3) == []  # a noise is no answer
    opened = talker.say(" Hello")
    assert kinds(opened) == [*OPENING, SOUND, WORDS]
    assert kinds(talker.say(loud=0.3, frames=5)) == [SOUND] * 5
    assert kinds(talker.say(" there")) == [SOUND, WORDS]
    assert kinds(talker.say(frames=PAUSE - 1)) == [SOUND] * (PAUSE - 1)
    assert kinds(talker.say(" you.", loud=0.3)) == [SOUND, WORDS]  # not long enough a pause
    closed = talker.say(frames=PAUSE)
    assert kinds(closed) == [SOUND] * PAUSE + CLOSING
    assert talker.say(frames=100) == []

    response = field(opened, "response.created")["response"]
    done = field(closed, "response.done")["response"]
    assert (response["status"], response["output"]) == ("in_progress", [])
    assert (done["id"], done["status"], done["status_details"]) == (response["id"], "completed", None)
    (item,) = done["output"]
    assert item["content"] == [{"type": "output_audio", "transcript": "Hello there you."}]
    assert (item["role"], item["status"]) == ("assistant", "completed")
    assert item["id"] == field(opened, "response.output_item.added")["item"]["id"]
    words = field(opened, WORDS)
    assert (words["delta"], words["gate"], words["item_id"]) == ("Hello", 0.012346, item["id"])
    assert field(closed, "response.output_audio_transcript.done")["transcript"] == "Hello there you."


def test_all_deltas_name_their_place() -> None:
    talker = Talker()
    events = talker.say("Hello") + talker.say(frames=PAUSE)
    response = field(events, "response.created")["response"]["id"]
    item = field(events, "response.output_item.added")["item"]["id"]
    for kind, fields in events:
        if kind.startswith(("response.output_audio", "response.content_part")):
            place = (fields["response_id"], fields["item_id"], fields["output_index"], fields["content_index"])
            assert place == (response, item, 0, 0)


def test_items_form_a_chain() -> None:
    talker = Talker()
    responses = talker.responses
    assert [fields["previous_item_id"] for _, fields in responses.place({"id": "picture"})] == [None, None]
    events = talker.say("Hello") + talker.say(frames=PAUSE)
    item = responses.last_item
    for kind in ("conversation.item.added", "conversation.item.done"):
        assert field(events, kind)["previous_item_id"] == "picture" and field(events, kind)["item"]["id"] == item
    events = talker.say("Hello") + talker.say(frames=PAUSE)
    assert field(events, "conversation.item.added")["previous_item_id"] == item
    assert responses.last_item != item


def test_a_noisy_voice_is_closed_after_a_long_run_without_words() -> None:
    talker = Talker()
    talker.say("Hello", loud=0.3)
    assert kinds(talker.say(loud=0.3, frames=LONG_PAUSE - 1)) == [SOUND] * (LONG_PAUSE - 1)
    assert kinds(talker.say(loud=0.3)) == [SOUND, *CLOSING]


def test_a_requested_response_waits_for_words() -> None:
    talker = Talker()
    events = talker.responses.request()
    assert kinds(events) == OPENING[:1]
    assert talker.responses.request() == []
    assert talker.say(frames=100) == []
    more = talker.say("Yes.") + talker.say(frames=PAUSE)
    assert kinds(more)[:3] == OPENING[1:]
    assert field(more, "response.done")["response"]["id"] == field(events, "response.created")["response"]["id"]


def test_a_requested_response_without_words_ends_incomplete() -> None:
    talker = Talker()
    talker.responses.request()
    talker.say(frames=PATIENCE - 1)
    events = talker.say()
    assert kinds(events) == ["response.done"]
    response = field(events, "response.done")["response"]
    assert (response["status"], response["output"]) == ("incomplete", [])
    assert response["status_details"] == {"type": "incomplete", "reason": "no_speech"}
    assert kinds(talker.say("Hello"))[:4] == OPENING


def test_a_cancelled_response_is_silent_until_the_assistant_pauses() -> None:
    talker = Talker()
    response = field(talker.say("One"), "response.created")["response"]["id"]
    with pytest.raises(EventError, match="no such response"):
        talker.responses.cancel("resp_other")
    events = talker.responses.cancel(response)
    assert kinds(events) == CLOSING
    done = field(events, "response.done")["response"]
    assert (done["status"], done["output"][0]["status"]) == ("cancelled", "incomplete")
    assert done["status_details"] == {"type": "cancelled", "reason": "client_cancelled"}
    assert talker.say(" two", loud=0.3) == []
    assert talker.say(frames=PAUSE) == []
    assert kinds(talker.say("Three")) == [*OPENING, SOUND, WORDS]


def test_only_an_open_response_can_be_cancelled() -> None:
    talker = Talker()
    for _ in range(2):
        with pytest.raises(EventError) as caught:
            talker.responses.cancel(None)
        assert caught.value.code == "response_cancel_not_active"
        talker.say("One")
        talker.say(frames=PAUSE)
    talker.responses.request()
    assert kinds(talker.responses.cancel(None)) == ["response.done"]
    assert kinds(talker.say("Two"))[:4] == OPENING  # nothing had been said that could go on


def test_a_request_after_a_cancel_is_answered_at_once() -> None:
    talker = Talker()
    talker.say("One")
    talker.responses.cancel(None)
    assert kinds(talker.responses.request()) == OPENING[:1]
    assert kinds(talker.say(" two"))[:3] == OPENING[1:]


def test_telephone_sound_is_complete_at_the_end_of_a_response() -> None:
    talker = Talker(Responses(PCMU))
    for _ in range(2):
        events = talker.say("One", loud=0.3) + talker.say(frames=PAUSE)
        sound = b"".join(base64.b64decode(fields["delta"]) for kind, fields in events if kind == SOUND)
        assert len(sound) == (1 + PAUSE) * 640
        assert field(events, "response.done")["response"]["audio"]["output"]["format"]["type"] == "audio/pcmu"


def test_the_end_of_a_session_closes_what_is_open() -> None:
    talker = Talker()
    assert talker.responses.close("incomplete", "expired") == []
    talker.say("One")
    events = talker.responses.close("incomplete", "expired")
    assert field(events, "response.done")["response"]["status_details"]["reason"] == "expired"
