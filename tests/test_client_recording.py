"""What a client keeps of a conversation: what was played when, turns and their delays."""

from __future__ import annotations

import numpy as np

from moshivis.client.line import Words
from moshivis.client.recording import BUFFER, FRAME, MAX_BUFFER, Asked, Recording


def test_a_recording_holds_what_was_played_when() -> None:
    recording = Recording()
    frame, sound = np.full(FRAME, 0.1, np.float32), np.full(FRAME, 0.2, np.float32)
    for number in range(20):
        recording.say(frame)
        if 5 <= number < 10:
            assert len(recording.hear(sound)) == FRAME + (BUFFER if number == 5 else 0)
    recording.hear(sound)  # after a gap
    both = recording.channels()
    first = 6 * FRAME + BUFFER
    assert both.shape == (20 * FRAME + BUFFER + FRAME, 2)
    assert not both[:first, 1].any() and (both[first : first + 5 * FRAME, 1] > 0).all()
    assert recording.missed == len(both) - FRAME - (first + 5 * FRAME) and recording.heard == 6
    assert not both[20 * FRAME :, 0].any()
    for _ in range(50):  # a burst
        recording.hear(sound)
    assert recording.buffered <= MAX_BUFFER and recording.skipped > 40 * FRAME


def test_turns_and_their_delays() -> None:
    recording = Recording()
    silence, sound = np.zeros(FRAME, np.float32), np.full(FRAME, 0.2, np.float32)
    for number in range(40):
        recording.say(sound if 10 <= number < 20 else silence)
        if number == 10:
            recording.questions.append(Asked("it", 10, 10 * FRAME, 20 * FRAME))
        recording.hear(sound if number >= 22 else silence)
        if number in (3, 23):
            recording.read(Words(" word", 5))
    (greeting, hello), (asked, answer) = recording.turns()
    assert greeting is None and len(hello) == 1 and asked is not None
    assert [said.frame for said in answer] == [24] and recording.text == "word word"
    assert recording.delays() == [(3 + BUFFER / FRAME) * 80]
    assert recording.turns(since=11) == [(None, answer)]


def test_who_does_not_record_keeps_no_sound() -> None:
    recording = Recording(keep=False)
    for _ in range(10):
        recording.say(np.ones(FRAME, np.float32))
        recording.hear(np.ones(FRAME, np.float32))
    assert recording.channels().shape == (0, 2) and recording.buffered > 0 and recording.missed == 0
