"""The camera on the page, in a real browser, and that the page says when the model sees something else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from page_support import CHROMIUM, PICTURE, until
from page_visitor import Visitor
from serve_support import RunningServer

pytest.importorskip("playwright")
if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.timeout(600),
]
SLOW_PICTURES = """(() => {
  const encode = HTMLCanvasElement.prototype.toBlob;
  HTMLCanvasElement.prototype.toBlob = function (take, ...how) {
    encode.call(this, (blob) => setTimeout(() => take(blob), 1500), ...how);
  };
})()"""
STILL, NONE = "The model still sees the picture before", "The model sees no picture yet"


def film(server: RunningServer, visitor: Visitor) -> Page:
    """The page with its camera running."""
    page = visitor.open(server.url)
    page.click("#tab-camera")
    until(page, "document.querySelector('#video').videoWidth > 0")
    return page


def test_the_picture_that_was_taken_is_shown(server: RunningServer, visitor: Visitor) -> None:
    page = film(server, visitor)
    assert page.is_visible("#video") and page.inner_text("#picture-status") == STILL
    page.click("#shoot")
    page.wait_for_selector("#shown", state="visible")
    assert not page.is_visible("#video") and page.inner_text("#picture-status") == ""
    assert page.inner_text("#shoot") == "Take another"
    page.click("#shoot")
    assert page.is_visible("#video") and not page.is_visible("#shown")
    assert page.inner_text("#shoot") == "Take a picture" and page.inner_text("#picture-status") == STILL
    page.click("#shoot")
    page.click("#remove")
    assert page.is_visible("#video") and page.inner_text("#picture-status") == NONE
    page.check("#live")
    until(page, "moshivis.picture.current?.live")
    assert page.is_visible("#video") and page.inner_text("#picture-status") == ""
    page.uncheck("#live")
    assert page.inner_text("#picture-status") == STILL
    assert visitor.complaints == []


def test_an_empty_drawing_is_not_what_the_model_sees(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.click("#tab-draw")
    assert page.inner_text("#picture-status") == STILL
    page.click("#tab-gallery")
    assert page.inner_text("#picture-status") == ""
    page.click("#remove")
    page.click("#tab-draw")
    assert page.inner_text("#picture-status") == NONE
    page.locator("#drawing").click()
    until(page, "moshivis.picture.current?.name === 'Your drawing'")
    assert page.inner_text("#picture-status") == ""
    page.click("#clear")
    page.wait_for_timeout(500)
    assert page.inner_text("#picture-status") == "", "it sees the white paper"


@pytest.mark.parametrize("live", [False, True])
def test_a_picture_that_is_ready_late_changes_nothing(server: RunningServer, visitor: Visitor, live: bool) -> None:
    visitor.page.add_init_script(SLOW_PICTURES)
    page = film(server, visitor)
    if live:
        page.check("#live")
    else:
        page.click("#shoot")
    page.click("#tab-gallery")
    page.click("#thumbs button >> nth=2")
    page.wait_for_timeout(2500)
    assert page.evaluate("moshivis.picture.current.source") == "gallery"


def test_who_takes_a_picture_has_chosen_it(server: RunningServer, visitor: Visitor) -> None:
    """It counts from the click on, also if another tab is looked at meanwhile."""
    visitor.page.add_init_script(SLOW_PICTURES)
    page = film(server, visitor)
    page.click("#shoot")
    page.click("#tab-gallery")
    until(page, "moshivis.picture.current.source === 'camera'")
    assert page.is_visible("#shown")


def test_the_camera_that_was_asked_for_last_is_used(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.evaluate(
        """() => {
          const { mediaDevices } = navigator;
          const ask = mediaDevices.getUserMedia.bind(mediaDevices);
          window.cameras = {};
          mediaDevices.getUserMedia = async (wish) => {
            const stream = await ask(wish);
            const slow = { environment: 1000, user: 2500 }[wish.video.facingMode];
            await new Promise((done) => setTimeout(done, slow));
            return (window.cameras[wish.video.facingMode] = stream);
          };
        }"""
    )
    page.click("#tab-camera")
    page.click("#flip")
    until(page, "Object.keys(window.cameras).length === 2")
    page.wait_for_timeout(300)
    assert page.evaluate("document.querySelector('#video').srcObject === window.cameras.user")
    assert page.evaluate("window.cameras.environment.getTracks()[0].readyState") == "ended"
    assert visitor.complaints == []


def test_a_model_that_cannot_see_gets_no_picture(server: RunningServer, visitor: Visitor) -> None:
    def blind(route: Route) -> None:
        info = json.loads(server.get("/api/info").body)
        route.fulfill(json={**info, "sees": False})

    page = visitor.page
    page.route("**/api/info", blind)
    page.goto(server.url)
    until(page, "document.querySelector('.look').hidden")
    page.evaluate(
        """(content) => {
          const carried = new DataTransfer();
          carried.items.add(new File([new Uint8Array(content)], 'image.png', { type: 'image/png' }));
          const options = { bubbles: true, cancelable: true };
          document.body.dispatchEvent(new ClipboardEvent('paste', { ...options, clipboardData: carried }));
          document.body.dispatchEvent(new DragEvent('dragenter', { ...options, dataTransfer: carried }));
          window.marked = document.body.classList.contains('dropping');
          document.body.dispatchEvent(new DragEvent('drop', { ...options, dataTransfer: carried }));
        }""",
        list(PICTURE.read_bytes()),
    )
    page.wait_for_timeout(1000)
    assert page.evaluate("moshivis.picture.current") is None and page.evaluate("window.marked") is False
