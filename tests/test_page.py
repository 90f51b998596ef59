"""The page in a real browser, with the embedded model behind it: one talks to it and gets a spoken answer."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from moshivis.inference.colour import PALETTE
from moshivis.inference.conversation import Assistant
from moshivis.serve.hall import Full
from moshivis.serve.static import PAGE
from page_support import (
    ANSWER,
    CHROMIUM,
    PATIENT,
    STRANGER,
    WRITTEN,
    WRITTEN_ANSWER,
    choose_example,
    open_browser,
    until,
    wait_for_words,
)
from serve_support import PATIENCE, RunningServer, serving

pytest.importorskip("playwright")
if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.timeout(600),
]
WAIT = 90_000  # ms; machines that run tests are busy
PHONE = {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def server(mini: Assistant) -> Iterator[RunningServer]:
    with serving(mini, page=PAGE) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@dataclass
class Visitor:
    """A page, what it complained of, and what it sent over its sockets."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    sockets: list[str] = field(default_factory=list)  # addresses
    pictures: list[bytes] = field(default_factory=list)
    sounds: list[bytes] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", lambda message: self._console(message.type, message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("websocket", self._socket)

    def _console(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def _socket(self, socket: Any) -> None:
        self.sockets.append(socket.url)
        socket.on("framesent", self._sent)

    def _sent(self, data: bytes | str) -> None:
        assert isinstance(data, bytes)
        if data[0] == 8:
            self.pictures.append(data[1:])
        elif data[0] == 1:
            self.sounds.append(data[1:])

    def open(self, url: str) -> Page:
        self.page.goto(url)
        until(self.page, "document.querySelector('#thumbs img')?.complete")
        self.page.evaluate(
            """() => {
              const { on } = moshivis.call;
              const show = on.buffer;
              on.buffer = (report) => show((window.buffer = report));
            }"""
        )
        return self.page

    def hear(self, seconds: float) -> None:
        """Until the model has said something, and so much more of it has been played."""
        until(self.page, "moshivis.transcript.turns.some(({ who }) => who === 'model')")
        played = self.page.evaluate("window.buffer?.played ?? 0")
        until(self.page, "enough => window.buffer.played > enough", played + 1000 * seconds)

    def wait_state(self, state: str) -> None:
        until(self.page, "state => moshivis.call.state === state", state)

    def wait_pictures(self, number: int) -> None:
        """Until so many have been sent."""
        limit = time.monotonic() + PATIENCE
        while len(self.pictures) < number:
            assert time.monotonic() < limit, f"{len(self.pictures)} pictures were sent"
            self.page.wait_for_timeout(100)

    def problem(self) -> str:
        self.page.wait_for_selector("#problem:not([hidden])", timeout=WAIT)
        return self.page.inner_text("#problem")


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(WAIT)
    yield context
    context.close()


@pytest.fixture
def visitor(context: BrowserContext) -> Iterator[Visitor]:
    visitor = Visitor(context.new_page())
    visitor.watch()
    yield visitor


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


# talking --------------------------------------------------------------------------------------------------------------


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


# pictures -------------------------------------------------------------------------------------------------------------


def test_a_drawing_is_sent(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.click("#tab-draw")
    page.click("#colours [aria-label=red]")
    page.click("#shapes [aria-label=square]")
    box = page.locator("#drawing").bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 4)
    until(page, "moshivis.picture.current?.name === 'Your drawing'")
    page.click("#call")
    visitor.wait_state("talking")
    page.click("#colours [aria-label=blue]")
    page.click("#shapes [aria-label=brush]")
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.75)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + box["height"] * 0.75, steps=5)
    page.mouse.up()
    visitor.wait_pictures(2)
    until(page, "document.querySelector('#picture-status').textContent === ''")
    page.click("#undo")
    visitor.wait_pictures(3)
    page.click("#call")
    first, second, third = (np.asarray(Image.open(io.BytesIO(sent)).convert("RGB")) for sent in visitor.pictures)
    assert first.shape == (512, 512, 3)
    assert tuple(first[128, 128]) == (217, 38, 38) and tuple(first[384, 360]) == (255, 255, 255)
    assert tuple(second[384, 360]) == (43, 98, 217) and np.array_equal(first, third)
    assert visitor.complaints == []


def test_large_pictures_are_made_smaller_and_others_are_refused(
    server: RunningServer, visitor: Visitor, tmp_path: Path
) -> None:
    page = visitor.open(server.url)
    Image.new("RGB", (3000, 1500), "teal").save(tmp_path / "large.jpg")
    page.set_input_files("#file", tmp_path / "large.jpg")
    until(page, "moshivis.picture.current?.name === 'large.jpg'")
    size = page.evaluate(
        "createImageBitmap(moshivis.picture.current.blob).then(({ width, height }) => [width, height])"
    )
    assert size == [1024, 512]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.set_input_files("#file", tmp_path / "broken.png")
    assert "cannot read “broken.png”" in visitor.problem()
    assert page.evaluate("moshivis.picture.current.name") == "large.jpg", "the one before stays"


def test_the_camera_gives_pictures(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.click("#tab-camera")
    until(page, "document.querySelector('#video').videoWidth > 0")
    page.click("#shoot")
    until(page, "moshivis.picture.current?.name === 'Picture of the camera'")
    page.check("#live")
    page.evaluate("window.before = moshivis.picture.current")
    until(page, "moshivis.picture.current.live && moshivis.picture.current !== window.before")
    page.click("#tab-gallery")
    assert page.evaluate("document.querySelector('#video').srcObject === null"), "the camera is let go"
    page.click("#thumbs button >> nth=1")
    assert page.get_attribute("#shown", "alt") == page.get_attribute("#thumbs button >> nth=1", "title")
    shown = page.evaluate("[...document.querySelectorAll('#thumbs button')].map(button => button.value)")
    page.click("#shuffle")
    until(page, "shown => document.querySelector('#thumbs button').value !== shown", shown[0])
    page.click("#remove")
    assert page.evaluate("moshivis.picture.current === null") and page.is_visible("#no-picture")
    assert visitor.complaints == []


# what can go wrong ----------------------------------------------------------------------------------------------------


def test_a_busy_server_shows_the_position_and_lets_in(mini: Assistant, visitor: Visitor) -> None:
    with serving(mini, page=PAGE, sessions=1) as server:
        taken = server.run(server.hall.session(kind="test"))
        page = visitor.open(server.url)
        page.click("#call")
        visitor.wait_state("queued")
        assert "You are next" in visitor.problem() and page.inner_text("#state") == "Number 1 in the queue"
        server.call(lambda: taken.end("closed"))
        visitor.wait_state("talking")
        assert not page.is_visible("#problem")
        with pytest.raises(Full):
            server.run(server.hall.session(kind="test"))
        page.click("#call")


def test_a_server_that_stops_is_explained(mini: Assistant, visitor: Visitor) -> None:
    with serving(mini, page=PAGE) as server:
        page = visitor.open(server.url)
        page.click("#call")
        visitor.wait_state("talking")
        server.server.should_exit = True
        visitor.wait_state("idle")
        assert "The server is stopping" in visitor.problem()
        assert "has ended" in page.inner_text("#transcript")


def test_a_lost_connection_comes_back(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.click("#call")
    visitor.wait_state("talking")
    page.evaluate("moshivis.call.wire.socket.close(4000)")  # as if the network had broken it
    visitor.wait_state("lost")
    assert "The connection is lost" in visitor.problem()
    visitor.wait_state("talking")
    assert "Connected again" in page.inner_text("#transcript") and not page.is_visible("#problem")
    until(page, "moshivis.transcript.turns.length > 0")
    page.click("#call")
    assert len(visitor.sockets) == 2 and visitor.complaints == []


@pytest.mark.parametrize(
    ("error", "title"), [("NotAllowedError", "is not allowed"), ("NotFoundError", "There is no microphone")]
)
def test_a_missing_microphone_is_explained(server: RunningServer, visitor: Visitor, error: str, title: str) -> None:
    visitor.page.add_init_script(
        f"navigator.mediaDevices.getUserMedia = async () => {{ throw new DOMException('no', '{error}'); }}"
    )
    page = visitor.open(server.url)
    page.click("#call")
    assert title in visitor.problem()
    assert page.inner_text("#call").strip() == "Start talking"
    assert page.is_visible("#problem-action")


def test_plain_http_from_elsewhere_is_explained(server: RunningServer, visitor: Visitor) -> None:
    """There a browser gives no microphone; the page says so before one tries, and writing works still."""
    page = visitor.open(server.url.replace("127.0.0.1", STRANGER))
    assert "not secure" in visitor.problem() and "--tls-self-signed" in visitor.problem()
    page.fill("#question", "What do you see?")
    page.keyboard.press("Enter")
    until(page, "moshivis.transcript.turns[1]?.pieces.length > 0")


def test_a_token_is_asked_for_and_kept_out_of_the_address(mini: Assistant, visitor: Visitor) -> None:
    with serving(mini, page=PAGE, token="open-sesame") as server:
        page = visitor.page
        page.goto(server.url)
        page.wait_for_selector("#token[open]")
        page.fill("#token-value", "open-sesame")
        page.keyboard.press("Enter")
        page.wait_for_selector("#thumbs img")
        page.click("#call")
        visitor.wait_state("talking")
        page.click("#call")
        fresh = page.context.browser.new_context().new_page()  # type: ignore[union-attr]
        fresh.goto(f"{server.url}/?token=open-sesame")
        fresh.wait_for_selector("#thumbs img")
        assert fresh.url == f"{server.url}/"
        fresh.context.close()


# the page itself ------------------------------------------------------------------------------------------------------


def test_settings_are_kept_and_sent(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.click("#open-settings")
    usual = page.input_value("[name=text_temperature]")
    page.fill("[name=text_temperature]", "0.9")
    page.fill("[name=seed]", "7")
    page.keyboard.press("Escape")
    page.reload()
    page.wait_for_selector("#thumbs img")
    assert page.input_value("[name=text_temperature]") == "0.9" and page.input_value("[name=seed]") == "7"
    page.click("#call")
    visitor.wait_state("talking")
    page.click("#call")
    assert "text_temperature=0.9" in visitor.sockets[0] and "seed=7" in visitor.sockets[0]
    assert "audio_topk" not in visitor.sockets[0], "what was not changed is left to the model"
    page.click("#open-settings")
    page.click("#reset")
    assert page.input_value("[name=text_temperature]") == usual and page.input_value("[name=seed]") == ""


def test_it_fits_a_phone(server: RunningServer, browser: Browser) -> None:
    context = browser.new_context(viewport={"width": PHONE["width"], "height": PHONE["height"]}, has_touch=True)
    visitor = Visitor(context.new_page())
    page = visitor.open(server.url)

    def check(what: str) -> None:
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= PHONE["width"], f"{what} is {width} pixels wide"
        button = page.locator("#call").bounding_box()
        assert button is not None and button["y"] + button["height"] <= PHONE["height"], f"{what} hides the button"

    for tab in ("gallery", "draw", "camera", "upload"):
        page.click(f"#tab-{tab}")
        check(tab)
    for button, dialog in (("open-settings", "settings"), ("open-help", "help")):
        page.click(f"#{button}")
        inner = page.evaluate("id => document.getElementById(id).scrollWidth", dialog)
        assert inner <= PHONE["width"] - 32
        check(dialog)
        page.keyboard.press("Escape")
    page.click("#tab-gallery")
    page.click("#call")
    visitor.wait_state("talking")
    check("a call")
    page.click("#call")
    context.close()


def test_everything_has_a_name_and_can_be_reached(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll(`button, input, select, textarea, summary, canvas, video, img, dialog,
                                                [role]:not([role=status]):not([role=alert])`)]
          .filter((element) => !element.closest('[aria-hidden=true]'))
          .filter((element) => !['shown', 'problem-action'].includes(element.id) && !element.matches('.brand img'))
          .filter((element) => {
            const by = document.getElementById(element.getAttribute('aria-labelledby'));
            const label = element.labels?.[0]?.textContent;
            const inside = element.matches('button, summary') &&
              element.textContent.trim() + (element.querySelector('img')?.alt ?? '');
            return !(element.getAttribute('aria-label') || by?.textContent || label || element.alt || inside);
          })
          .map((element) => element.outerHTML.slice(0, 120))"""
    )
    assert nameless == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(({ id }) => id)")
    assert len(ids) == len(set(ids)), "an id occurs twice"

    reached: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.evaluate("document.activeElement.id")
        reached.append(focused)
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        if focused not in ("question", "file"):  # their surroundings show it
            assert outline != "none", focused
        if focused == "call":
            break
    assert reached[-1] == "call" and {"theme", "open-settings", "tab-gallery", "shuffle", "question"} <= set(reached)
    page.keyboard.press("Enter")
    visitor.wait_state("talking")
    page.keyboard.press("Enter")
    visitor.wait_state("idle")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_readable(server: RunningServer, browser: Browser, scheme: Any) -> None:
    context = browser.new_context(color_scheme=scheme)
    page = Visitor(context.new_page()).open(server.url)
    colours, [ground] = rgb(page, "#scale i", "color"), rgb(page, ".talk", "backgroundColor")
    assert (np.mean(ground) > 128) == (scheme == "light")
    if scheme == "dark":
        assert [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in colours] == list(PALETTE)
    assert min(contrast(colour, ground) for colour in colours) >= 4.5
    other = "dark" if scheme == "light" else "light"
    for _ in range(2):  # from the system's to light to dark
        page.click("#theme")
        if page.evaluate("document.documentElement.dataset.theme") == other:
            break
    [switched] = rgb(page, ".talk", "backgroundColor")
    assert (np.mean(switched) > 128) != (scheme == "light")
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == other, "the choice is kept"
    context.close()


def rgb(page: Page, selector: str, style: str) -> list[list[int]]:
    """A colour of all elements that match, as they are shown."""
    colours: list[list[int]] = page.evaluate(
        """([selector, style]) => [...document.querySelectorAll(selector)].map(
             (element) => getComputedStyle(element)[style].match(/[0-9]+/g).slice(0, 3).map(Number))""",
        [selector, style],
    )
    return colours


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG's contrast ratio of two colours."""

    def luminance(colour: list[int]) -> float:
        share = np.array(colour[:3]) / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_the_page_says_what_runs(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    assert page.inner_text("#model") == "miniature"
    assert "a miniature" in page.inner_text("#about") and "two hundred words" in page.inner_text("#about")
    questions = page.locator("#examples button").all_inner_texts()
    assert questions == server.get("/api/info").json()["questions"]


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
