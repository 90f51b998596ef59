"""The page in a real browser, with the embedded model behind it: one talks to it and gets a spoken answer."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile

from moshivis.serve.static import PAGE
from page_support import (
    ANSWER,
    CHROMIUM,
    PATIENT,
    WRITTEN,
    WRITTEN_ANSWER,
    choose_example,
    until,
    wait_for_words,
)
from page_visitor import Visitor
from serve_support import RunningServer

pytest.importorskip("playwright")
if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.timeout(600),
]


def recording(page: Page) -> tuple[np.ndarray, int]:
    """What the page would save as two channels, [T, 2], and its rate."""
    encoded = page.evaluate(
        """async () => {
          const reader = new FileReader();
          reader.readAsDataURL(moshivis.recording.wav(true));
          await new Promise((resolve) => (reader.onload = resolve));
          return reader.result.split(',')[1];
        }"""
    )
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(encoded)))
    return samples, rate


def test_a_spoken_question_gets_a_spoken_answer(server: RunningServer, visitor: Visitor) -> None:
    """Upload the bundled picture, press the button; the microphone hears the bundled question."""
    page = visitor.open(server.url)
    choose_example(page)
    before = server.hall.engine.stats()
    page.click("#call")
    visitor.wait_state("talking")
    wait_for_words(page, ANSWER, PATIENT)
    visitor.hear(2.5)
    report = page.evaluate("window.buffer")
    after = server.hall.engine.stats()

    assert page.evaluate("moshivis.call.format") == "ogg"
    assert page.is_visible("#transcript .turn.you canvas"), "the spoken question is shown"
    assert page.locator("#transcript .turn.model span[class^=g]").count() >= 4, "words have the colour of their gate"
    assert page.inner_text("#fact-reaction") != "–"
    assert page.inner_text("#clock").count(":") == 1
    assert report["played"] > 3000
    ticks, missed = after.ticks - before.ticks, after.missed - before.missed
    if missed < 0.02 * ticks:  # this machine is fast enough at the moment
        assert report["missed"] < 500, report

    sound, rate = recording(page)
    assert rate == 24000 and sound.shape[1] == 2
    user, model = np.abs(sound).max(axis=0)
    assert user > 0.1 and model > 0.1
    assert "ends" not in page.inner_text("#state")
    page.click("#call")
    visitor.wait_state("idle")
    server.wait_idle()
    assert visitor.complaints == []
    assert visitor.pictures == [(Path(PAGE).parents[1] / "assets" / "example.png").read_bytes()]


def test_a_recording_takes_both_sides_in_any_order(server: RunningServer, visitor: Visitor) -> None:
    """The model's first sound may be handed over after the user's, though it was played before."""
    page = visitor.open(server.url)
    lengths = page.evaluate(
        """async () => {
          const { Recording } = await import('./recording.js');
          const recording = new Recording();
          recording.begin();
          const seconds = [];
          for (const [who, at] of [['you', 4800], ['model', 0], ['you', 28800], ['model', 2400]]) {
            recording.add(who, new Float32Array(2400).fill(0.5), at);
            seconds.push(recording.seconds);
          }
          return [...seconds, recording.blocks.you.length, recording.blocks.model.length];
        }"""
    )
    assert lengths == [0.1, 0.3, 1.3, 1.3, 2, 2]
    assert visitor.complaints == []


@pytest.mark.parametrize(("audio", "message", "most"), [("pcm", 999, 34), ("ogg", 99, 35)])
def test_a_slow_line_makes_nothing_late(
    server: RunningServer, visitor: Visitor, audio: str, message: int, most: int
) -> None:
    """Pictures wait for the line, the latest one only; sound that it cannot take, 0.7 s of it, is left out."""
    page = visitor.open(server.url)
    sent = page.evaluate(
        """async ({ audio, message }) => {
          const { Wire } = await import('./wire.js');
          const wire = new Wire({ audio }, {});
          const sent = [];
          const line = { readyState: WebSocket.OPEN, bufferedAmount: 0, taking: false };
          line.send = (message) => {
            sent.push(message.length);
            if (!line.taking) line.bufferedAmount += message.length;
          };
          Object.assign(wire, { socket: line, handshaken: true, sent: 0, pictureEnd: 0, pictureSize: 0 });
          wire.image(new Uint8Array(99999));
          wire.image(new Uint8Array(88888)); // never sent: a newer one comes before the line is free
          wire.image(new Uint8Array(77777));
          for (let i = 0; i < 100; i++) wire.audio(new Uint8Array(message));
          line.taking = true;
          line.bufferedAmount = 0;
          while (sent.at(-1) !== 77778) await new Promise((done) => setTimeout(done, 20));
          wire.audio(new Uint8Array(message));
          return sent;
        }""",
        {"audio": audio, "message": message},
    )
    assert sent == [100_000, *[message + 1] * most, 77_778, message + 1]
    assert visitor.complaints == []


def test_the_recording_can_be_saved(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.click("#call")
    visitor.wait_state("talking")
    visitor.hear(2)
    page.click("#call")
    saved: dict[str, bytes] = {}
    for button in ("save-mix", "save-two", "save-text", "save-json"):
        page.click("#save summary")
        with page.expect_download() as download:
            page.click(f"#{button}")
        saved[button] = Path(download.value.path()).read_bytes()
        assert re.fullmatch(r"moshivis-[\d-]+(-two-channels)?\.(wav|txt|json)", download.value.suggested_filename)
    mix, _ = soundfile.read(io.BytesIO(saved["save-mix"]))
    two, _ = soundfile.read(io.BytesIO(saved["save-two"]))
    assert len(mix) == len(two) and np.allclose(mix, two.sum(axis=1), atol=1e-4)
    turns = json.loads(saved["save-json"])["turns"]
    spoken = next(turn["text"] for turn in turns if turn["who"] == "model")
    assert spoken and f"Model: {spoken}\n" in saved["save-text"].decode()
    assert visitor.complaints == []


def test_a_browser_without_opus_sends_samples(server: RunningServer, visitor: Visitor) -> None:
    visitor.page.add_init_script("delete window.AudioEncoder")
    page = visitor.open(server.url)
    page.click("#call")
    visitor.wait_state("talking")
    visitor.hear(2)
    page.click("#call")
    assert "audio=pcm" in visitor.sockets[0] and {len(sound) for sound in visitor.sounds} == {960}
    assert np.abs(recording(page)[0][:, 1]).max() > 0.05
    assert visitor.complaints == []


def test_a_written_question_is_answered_in_writing(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    choose_example(page)
    with page.expect_request("**/api/ask") as request:
        page.fill("#question", WRITTEN)
        page.keyboard.press("Enter")
    sent = request.value.post_data_json
    assert sent is not None and sent["text"] == WRITTEN and sent["image"].startswith("data:image/png;base64,")
    wait_for_words(page, WRITTEN_ANSWER, 60)
    page.click("#examples button >> nth=0")  # questions to try are asked in the same way
    until(page, "moshivis.transcript.turns.length === 4 && moshivis.transcript.turns[3].pieces.length > 0")
    turns = page.evaluate("moshivis.transcript.toJSON()")
    assert [turn["form"] for turn in turns] == ["written"] * 4
    assert page.inner_text("#spoken") == turns[-1]["text"], "the live region tells it to screen readers"
    assert visitor.complaints == []


# sound ----------------------------------------------------------------------------------------------------------------


def test_the_pages_ogg_is_what_others_write_and_read(server: RunningServer, visitor: Visitor) -> None:
    sphn = pytest.importorskip("sphn")
    at = np.arange(48000) / 24000
    tone = (0.4 * np.sin(2 * np.pi * 440 * at) * np.sin(np.pi * at / 2)).astype(np.float32)
    writer = sphn.OpusStreamWriter(24000)
    messages = [bytes(writer.append_pcm(tone[begin : begin + 1920]) or b"") for begin in range(0, len(tone), 1920)]
    page = visitor.open(server.url)
    result = page.evaluate(
        """async ({ messages, tone }) => {
          const { makeReceiver, makeSender, readPages } = await import('/opus.js');
          const bytes = messages.map((text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)));
          const heard = [];
          const receiver = makeReceiver('ogg', (samples) => heard.push(...samples));
          bytes.forEach((message) => receiver.push(message));
          await receiver.decoder.flush();
          const damaged = bytes.map((message) => message.slice());
          damaged[5][40] ^= 1;
          const count = (all) => all.flatMap((message) => readPages(message)).length;
          const pages = [];
          const sender = makeSender('ogg', (page) => pages.push(Array.from(page)));
          for (let at = 0; at < tone.length; at += 480) sender.push(Float32Array.from(tone.slice(at, at + 480)));
          await sender.encoder.flush();
          return { heard, pages, packets: count(bytes), left: count(damaged) };
        }""",
        {"messages": [base64.b64encode(message).decode() for message in messages], "tone": tone.tolist()},
    )
    assert result["left"] == result["packets"] - 1, "only the damaged page is lost"
    loudness = float(np.sqrt(np.mean(np.square(tone))))
    heard = np.array(result["heard"])
    assert len(heard) == 2 * len(tone) and np.sqrt(np.mean(heard**2)) == pytest.approx(loudness, rel=0.03)
    reader = sphn.OpusStreamReader(24000)
    said = np.concatenate([reader.append_bytes(bytes(page)) for page in result["pages"]])
    assert len(said) == len(tone) and np.sqrt(np.mean(said**2)) == pytest.approx(loudness, rel=0.03)


def test_playback_adapts_to_the_delivery(server: RunningServer, visitor: Visitor) -> None:
    """The worklet's own code, driven as fast as it goes: frames of 80 ms that come late once, then far too late."""
    page = visitor.open(server.url)
    log = page.evaluate(
        """async () => {
          const RATE = 48000;
          const heard = [];
          let Playback;
          Object.assign(globalThis, {
            sampleRate: RATE,
            currentTime: 0,
            AudioWorkletProcessor: class { port = { postMessage: (report) => heard.push(report) }; },
            registerProcessor: (name, made) => (Playback = made),
          });
          await import('/playback-worklet.js');
          const playback = new Playback();
          const tone = (at) => new Float32Array(1920).map((_, i) => 0.3 * Math.sin((at + i) * 0.05));
          const out = [[new Float32Array(128)]];
          let made = 0;
          let largest = 0;
          let last = 0;
          /** Runs for some seconds; the frames that are due arrive at once when the delay is over. */
          const run = (seconds, delay = 0) => {
            const end = currentTime + seconds;
            const from = currentTime + delay;
            while (currentTime < end) {
              while (made * 0.08 <= currentTime && currentTime >= from) {
                playback.port.onmessage({ data: { samples: tone(made * 1920), rate: 24000 } });
                made += 1;
              }
              out[0][0].fill(0);
              playback.process([], out);
              for (const value of out[0][0]) {
                largest = Math.max(largest, Math.abs(value - last));
                last = value;
              }
              globalThis.currentTime += 128 / RATE;
            }
            return { ...heard.at(-1) };
          };
          const steps = { steady: run(5), late: run(5, 0.4), recovered: run(40), tooLate: run(3, 1.8) };
          return { ...steps, largest };
        }"""
    )
    steady, late, recovered, too_late = (log[name] for name in ("steady", "late", "recovered", "tooLate"))
    assert steady["underruns"] == 0 and steady["missed"] == 0 and steady["start"] == 160
    assert late["underruns"] == 1 and late["start"] == 200
    assert 150 < late["missed"] < 450
    assert recovered["underruns"] == 1 and recovered["missed"] == late["missed"]
    assert recovered["start"] < 200 and recovered["level"] < late["level"], "it shrinks slowly"
    assert too_late["missed"] - recovered["missed"] > 1000 and too_late["level"] < 900, "the oldest is dropped"
    assert log["largest"] < 0.05, "nothing clicks"
