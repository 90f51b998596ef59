"""Reading events: whatever a stranger sends, it is an event or an EventError."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moshivis.inference.call import CallSettings
from moshivis.serve.events import (
    MAX_APPEND_S,
    EventError,
    Fields,
    Json,
    Known,
    client_event_id,
    decode_base64,
    parse_event,
    read_format,
    read_picture,
    read_settings,
    read_sound,
)
from moshivis.serve.feed import AHEAD, Feed
from moshivis.serve.pcm import PCM, PCM_16K, PCMU, Samples

SETTINGS = CallSettings(text_temperature=0.7, text_top_k=25, audio_temperature=0.8, audio_top_k=250)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def refused(work: Any, *arguments: Any) -> EventError:
    with pytest.raises(EventError) as caught:
        work(*arguments)
    json.dumps(caught.value.body("x"))
    return caught.value


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "invalid_json"),
        ("{", "invalid_json"),
        ("[]", "invalid_json"),
        ("null", "invalid_json"),
        ('"session.update"', "invalid_json"),
        ('{"type": "a", "x": NaN}', "invalid_json"),
        ('{"type": "a", "x": -Infinity}', "invalid_json"),
        ('{"type": "a", "x": ' + "9" * 5000 + "}", "invalid_json"),
        ('{"type": "a", "x": ' + "[" * 17 + "]" * 17 + "}", "invalid_json"),
        ('{"type": "a", "x": ' + "[" * 19000 + "]" * 19000 + "}", "invalid_json"),
        ("[" * 10_000_000, "invalid_json"),
        ('{"type": "a", "x": [' + "[]," * 5_000_000 + "[]]}", "invalid_json"),
        ("{}", "missing_parameter"),
        ('{"type": 1}', "missing_parameter"),
        ('{"type": "a", "event_id": 1}', "invalid_type"),
    ],
    ids=range(15),
)
def test_what_is_no_event(text: str, code: str) -> None:
    assert refused(parse_event, text).code == code


def test_an_event_keeps_what_it_holds() -> None:
    event = {"type": "a", "event_id": "e", "x": {"y": [1, 2.5, None, True, "ä"]}}
    assert parse_event(json.dumps(event)) == event
    assert client_event_id(event) == "e"
    assert client_event_id({"event_id": "e" * 1000}) is None


@settings(deadline=None)
@given(st.text() | JSON.map(json.dumps))
def test_any_text_is_an_event_or_an_event_error(text: str) -> None:
    try:
        assert isinstance(parse_event(text)["type"], str)
    except EventError as error:
        assert len(str(error)) < 400


@settings(deadline=None)
@given(JSON)
def test_settings_are_read_or_refused(value: Any) -> None:
    fields = Fields({"a": value} if not isinstance(value, dict) else value, "session.moshivis")
    names = ["seed", "text_temperature", "gate_delay", "on_gap"]
    for candidate in (fields, *(Fields({name: value}, "session.moshivis") for name in names)):
        try:
            call = read_settings(candidate, SETTINGS)
        except EventError as error:
            assert error.param is not None and error.param.startswith("session.moshivis")
        else:
            call.check()


def test_settings_change_what_they_name() -> None:
    changed = read_settings(
        Fields({"seed": 7, "text_temperature": 1, "on_gap": "silence", "max_frames": None}), SETTINGS
    )
    assert (changed.seed, changed.text_temperature, changed.on_gap, changed.max_frames) == (7, 1, "silence", None)
    assert changed.audio_top_k == SETTINGS.audio_top_k
    error = refused(read_settings, Fields({"audio_top_k": -1}, "session.moshivis"), SETTINGS)
    assert (error.code, error.param) == ("invalid_value", "session.moshivis.audio_top_k")
    assert refused(read_settings, Fields({"seed": 10**400}), SETTINGS).code == "invalid_value"
    assert refused(read_settings, Fields({"gate_delay": True}), SETTINGS).code == "invalid_value"
    assert refused(read_settings, Fields({"sead": 1}), SETTINGS).code == "unknown_parameter"
    for wrong in ("x" * 3_000_000, "🦄" * 3_000_000, "\0" * 128, "'\"" * 64):
        for name in ("seed", "on_gap"):
            error = refused(read_settings, Fields({name: wrong}, "session.moshivis"), SETTINGS)
            assert len(str(error)) < 400 and error.param == f"session.moshivis.{name}"


def test_fields_name_what_is_wrong() -> None:
    fields = Fields({"a": {"b": 1, "n": -1}, "c": "text", "f": 1.5, "t": True}, "session")
    inner = fields.required_object("a")
    error = refused(inner.required_string, "b")
    assert (error.code, error.param) == ("invalid_type", "session.a.b")
    assert "must be a string, not a number" in str(error)
    assert refused(fields.required_object, "nothing").code == "missing_parameter"
    assert refused(fields.object, "c").code == "invalid_type"
    assert refused(inner.whole_number, "n").code == "invalid_value"
    for name in ("c", "f", "t", "nothing"):
        refused(fields.whole_number, name)
    assert fields.object("nothing") is None and fields.string("nothing") is None


def test_only_neutral_values_of_unsupported_fields_are_taken() -> None:
    known: Known = {"speed": (1,), "tools": ([],), "prompt": (), "model": None, "store": (False,)}
    Fields({"speed": 1.0, "tools": [], "prompt": None, "model": {"any": "thing"}, "store": False}).only(known)
    wrong: list[Json] = [{"speed": 2}, {"speed": True}, {"tools": [1]}, {"prompt": {}}, {"store": 0}]
    for values in wrong:
        assert refused(Fields(values).only, known).code == "unsupported_value"
    error = refused(Fields({"x" * 1000: 1}).only, known)
    assert error.code == "unknown_parameter" and len(str(error)) < 200


def test_formats_are_chosen_by_type_and_rate() -> None:
    formats = (PCM, PCM_16K, PCMU)
    assert read_format(Fields({"type": "audio/pcm"}), formats) == PCM
    assert read_format(Fields({"type": "audio/pcm", "rate": 16000}), formats) == PCM_16K
    assert read_format(Fields({"type": "audio/pcmu"}), formats) == PCMU
    for wrong in ({"type": "audio/pcm", "rate": 44100}, {"type": "audio/pcmu", "rate": 16000}, {"type": "audio/opus"}):
        assert refused(read_format, Fields(wrong, "format"), formats).code == "unsupported_format"


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_base64_is_decoded_strictly(data: bytes) -> None:
    text = base64.b64encode(data).decode()
    assert decode_base64(text, "audio", 64, "") == data
    if data:
        assert refused(decode_base64, text, "audio", len(data) - 1, "").code == "too_large"
        assert refused(decode_base64, text[:-1], "audio", 64, "").code == "invalid_base64"
    for junk in ("\n", " ", "é", "-"):
        assert refused(decode_base64, text + junk, "audio", 64, "").code == "invalid_base64"


def test_sound_has_whole_samples_and_a_limit() -> None:
    def sound(count: int) -> Fields:
        return Fields({"audio": base64.b64encode(bytes(count)).decode()})

    limit = int(MAX_APPEND_S * 24000) * 2
    assert len(read_sound(sound(limit), "audio", PCM)) == limit
    assert refused(read_sound, sound(limit + 2), "audio", PCM).code == "too_large"
    assert refused(read_sound, sound(3), "audio", PCM).code == "invalid_audio"
    assert len(read_sound(sound(3), "audio", PCMU)) == 3


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("https://example.org/cat.png", "invalid_image"),
        ("file:///etc/passwd", "invalid_image"),
        ("", "invalid_image"),
        ("data:image/png;base64", "invalid_image"),
        ("data:text/html;base64,AAAA", "invalid_image"),
        ("data:image/png,AAAA", "invalid_image"),
        ("data:image/png;base64,A", "invalid_base64"),
        ("data:image/png;base64," + "A" * 400, "too_large"),
        (7, "invalid_type"),
    ],
)
def test_pictures_come_as_data_uris_only(uri: Any, code: str) -> None:
    assert refused(read_picture, Fields({"image_url": uri}), "image_url", 100).code == code


def test_a_data_uri_holds_a_picture() -> None:
    for head in ("data:image/png;base64,", "data:image/JPEG;charset=x;base64,", "DATA:image/png;base64,"):
        assert read_picture(Fields({"image_url": head + "AAEC"}), "image_url", 3) == b"\0\1\2"
    assert read_picture(Fields({"image_url": None}), "image_url", 3) is None


# the feed -------------------------------------------------------------------------------------------------------------


class Listener:
    """Hears frames, and says one for each when asked to."""

    def __init__(self, feed: Feed):
        self.feed, self.frames, self.said = feed, list[Samples](), 0

    def pump(self) -> None:
        self.feed.pump(self.frames.append)

    def say(self, frames: int = 1) -> None:
        self.said += frames
        self.feed.heard(self.said - 1)
        self.pump()


def ramp(frames: float) -> Samples:
    return np.arange(round(frames * 10), dtype=np.float32)


def test_a_recording_is_heard_whole_and_in_order() -> None:
    feed = Feed(10, bound=100)
    listener = Listener(feed)
    for part in np.split(ramp(50.5), [3, 200, 201]):
        feed.add(part)
        listener.pump()
    assert len(listener.frames) == AHEAD
    for _ in range(60):
        listener.say()
    assert np.array_equal(np.concatenate(listener.frames), ramp(50))
    feed.finish_frame()
    listener.say()
    assert np.array_equal(listener.frames[-1], np.concatenate([ramp(50.5)[-5:], np.zeros(5)]))
    assert feed.dropped == 0 and feed.waiting == 0


def test_a_microphone_is_heard_at_once() -> None:
    feed = Feed(10, bound=100)
    listener = Listener(feed)
    listener.say(30)  # silence, before the client spoke
    for frame in range(20):
        feed.add(ramp(1))
        listener.pump()
        assert len(listener.frames) == frame + 1 and feed.waiting == 0
        listener.say(2 if frame % 5 == 0 else 1)  # frames that a slow reader lost count too


def test_what_waits_too_long_is_dropped_from_its_oldest_end() -> None:
    counted: list[int] = []
    feed = Feed(10, bound=8, on_drop=counted.append)
    feed.add(ramp(30))
    assert (feed.waiting, feed.dropped) == (8, 22)
    listener = Listener(feed)
    listener.pump()
    assert np.array_equal(listener.frames[0], ramp(30)[220:230])
    feed.set_bound(2)
    assert (feed.waiting, feed.dropped) == (2, 24)
    feed.clear()
    listener.say(10)
    assert len(listener.frames) == AHEAD and feed.dropped == sum(counted) == 24
