"""What the page does when something goes away: the sound, the microphone, a device, the server, a usable picture."""

from __future__ import annotations

import zlib
from pathlib import Path
from struct import pack
from typing import TYPE_CHECKING

import pytest

from page_support import CHROMIUM, PICTURE, choose_example, until
from page_visitor import Visitor
from serve_support import RunningServer

pytest.importorskip("playwright")
if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Route

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.timeout(600),
]
TAKE_MICROPHONE = """() => {
  const { mediaDevices } = navigator;
  window.ask = mediaDevices.getUserMedia.bind(mediaDevices);
  mediaDevices.getUserMedia = async () => { throw new DOMException('none', 'NotReadableError'); };
  const [track] = moshivis.call.sound.stream.getAudioTracks();
  track.stop();
  track.dispatchEvent(new Event('ended'));
}"""
GIVE_MICROPHONE = "() => { navigator.mediaDevices.getUserMedia = window.ask; }"


def talking(server: RunningServer, visitor: Visitor) -> Page:
    page = visitor.open(server.url)
    page.click("#call")
    visitor.wait_state("talking")
    return page


def reconnect(visitor: Visitor) -> None:
    visitor.page.evaluate("moshivis.call.wire.socket.close(4000)")  # as if the network had broken it
    visitor.wait_state("lost")
    visitor.wait_state("talking")


def test_what_still_hinders_is_told_when_the_line_is_back(server: RunningServer, visitor: Visitor) -> None:
    page = talking(server, visitor)
    page.evaluate(TAKE_MICROPHONE)
    assert "The microphone is in use" in visitor.problem()
    page.evaluate("moshivis.call.sound.wake = () => {}")  # as where only a tap lets sound flow again
    page.evaluate("moshivis.call.sound.context.suspend()")
    until(page, "moshivis.call.paused")
    reconnect(visitor)
    assert "The sound was interrupted" in visitor.problem()
    page.evaluate("delete moshivis.call.sound.wake")
    page.click("#problem-action")
    until(page, "moshivis.call.sound.context.state === 'running'")
    assert "The microphone is in use" in visitor.problem()
    reconnect(visitor)
    assert "The microphone is in use" in visitor.problem()
    page.evaluate(GIVE_MICROPHONE)
    page.click("#problem-action")
    until(page, "moshivis.call.sound.hears && document.querySelector('#problem').hidden")
    page.click("#call")
    assert visitor.complaints == []


def test_who_comes_back_to_the_page_finds_the_microphone_tried_again(server: RunningServer, visitor: Visitor) -> None:
    page = talking(server, visitor)
    page.evaluate(TAKE_MICROPHONE)
    assert "The microphone is in use" in visitor.problem()
    page.evaluate(GIVE_MICROPHONE)
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    until(page, "moshivis.call.sound.hears && document.querySelector('#problem').hidden")
    page.click("#call")


def test_a_loudspeaker_that_is_unplugged_is_replaced(server: RunningServer, visitor: Visitor) -> None:
    page = talking(server, visitor)
    page.click("#open-sound")
    until(page, "document.querySelectorAll('#speaker option').length > 1")
    device = page.eval_on_selector_all("#speaker option", "options => options.map(option => option.value)")[1]
    page.select_option("#speaker", device)
    until(page, "id => moshivis.call.sound.context.sinkId === id", device)
    page.evaluate("moshivis.call.sound.context.dispatchEvent(new Event('error'))")  # what a browser says then
    until(page, "moshivis.call.sound.context.sinkId === '' && moshivis.call.sound.context.state === 'running'")
    page.evaluate("navigator.mediaDevices.dispatchEvent(new Event('devicechange'))")  # it is plugged in again
    until(page, "id => moshivis.call.sound.context.sinkId === id", device)
    page.click("#settings footer .strong")
    page.click("#call")


def test_a_chosen_device_that_is_not_there_can_be_given_up(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.evaluate("""localStorage.setItem('moshivis.devices', '{"microphone": "gone", "speaker": ""}')""")
    page.reload()
    page.click("#open-sound")
    until(page, "document.querySelector('#microphone').value === 'gone'")
    assert "not listed now" in page.inner_text("#microphone option:checked")
    page.select_option("#microphone", "")
    assert page.evaluate("JSON.parse(localStorage.getItem('moshivis.devices')).microphone") == ""


def test_a_server_that_did_not_tell_is_asked_again(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.page
    failed: list[str] = []

    def fail_once(route: Route) -> None:
        if failed:
            route.continue_()
        else:
            failed.append(route.request.url)
            route.abort()

    page.route("**/api/info*", fail_once)
    page.goto(server.url)
    assert "The server does not answer as it should" in visitor.problem()
    page.click("#tab-upload")
    page.set_input_files("#file", PICTURE)
    until(page, "document.querySelector('#problem-text').textContent.includes('not told yet')")
    failed.clear()
    page.reload()
    assert "The server does not answer as it should" in visitor.problem()
    page.click("#problem-action")
    until(page, "document.querySelector('#thumbs img')?.complete")
    choose_example(page)
    assert not page.is_visible("#problem")


def test_a_picture_that_the_server_cannot_use_does_not_end_the_call(
    server: RunningServer, visitor: Visitor, tmp_path: Path
) -> None:
    """Pillow refuses a small file with much compressed text; a browser does not look at it."""
    text = b"Comment\0\0" + zlib.compress(bytes(4_000_000))
    chunk = pack(">I", len(text)) + b"zTXt" + text + pack(">I", zlib.crc32(b"zTXt" + text))
    png = PICTURE.read_bytes()
    (tmp_path / "talkative.png").write_bytes(png[:33] + chunk + png[33:])  # behind its header
    page = talking(server, visitor)
    usable = visitor.pictures[-1]
    page.set_input_files("#file", tmp_path / "talkative.png")
    assert "The server cannot use this picture" in visitor.problem()
    assert page.inner_text("#picture-status") == "The model still sees the picture before"
    page.click("#problem-close")
    reconnect(visitor)
    assert visitor.pictures[-1] == usable and len(visitor.pictures) == 3
    assert page.inner_text("#picture-status") == "The model still sees the picture before"
    page.click("#tab-gallery")
    page.click("#thumbs button >> nth=1")
    visitor.wait_pictures(4)
    until(page, "document.querySelector('#picture-status').textContent === ''")
    page.click("#call")


def test_a_camera_that_is_gone_is_told(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.click("#tab-camera")
    until(page, "document.querySelector('#video').videoWidth > 0")
    page.evaluate("document.querySelector('#video').srcObject.getTracks()[0].dispatchEvent(new Event('ended'))")
    assert "The camera is gone" in visitor.problem()
    assert page.evaluate("document.querySelector('#video').srcObject") is None
    page.click("#tab-camera")
    until(page, "document.querySelector('#video').srcObject?.active")


def test_words_that_carry_a_picture_are_words(server: RunningServer, visitor: Visitor) -> None:
    """As office programs copy them."""
    page = visitor.open(server.url)
    taken = page.evaluate(
        """(where) => where.map((at) => {
          const carried = new DataTransfer();
          carried.setData('text/plain', 'words');
          carried.items.add(new File(['…'], 'image.png', { type: 'image/png' }));
          const paste = new ClipboardEvent('paste', { bubbles: true, cancelable: true, clipboardData: carried });
          return !document.querySelector(at).dispatchEvent(paste);
        })""",
        ["#question", "#thumbs"],
    )
    assert taken == [False, True]


def test_a_low_window_hides_nothing(server: RunningServer, browser: Browser) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 590})
    page = Visitor(context.new_page()).open(server.url)
    page.evaluate("moshivis.picture.onProblem('Two lines. '.repeat(30))")
    page.hover(".talk-head")
    page.mouse.wheel(0, 2000)  # what is cut off, and not scrolled, a program could still scroll
    page.wait_for_timeout(300)
    for element in ("question", "call"):
        on_top = page.evaluate(
            """(id) => {
              const box = document.getElementById(id).getBoundingClientRect();
              return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2)?.closest('#' + id)?.id;
            }""",
            element,
        )
        assert on_top == element
    context.close()
