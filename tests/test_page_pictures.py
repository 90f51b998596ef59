"""What one can show the model on the page, in a real browser: drawings, files, the camera."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from page_support import (
    CHROMIUM,
    PICTURE,
    until,
)
from page_visitor import Visitor
from serve_support import RunningServer

pytest.importorskip("playwright")
if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.timeout(600),
]


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


def test_nothing_drawn_is_nothing_to_take_back(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.click("#tab-draw")
    page.evaluate("window.before = moshivis.picture.current")
    for button in ("#undo", "#clear"):
        page.click(button)
        page.wait_for_timeout(1000)  # a drawing is used when it has been left alone for a moment
        assert page.evaluate("moshivis.picture.current === window.before")
    assert visitor.complaints == []


def test_a_second_finger_draws_nothing(server: RunningServer, browser: Browser) -> None:
    with browser.new_context(has_touch=True, viewport={"width": 1280, "height": 800}) as context:
        visitor = Visitor(context.new_page())
        visitor.watch()
        page = visitor.open(server.url)
        page.click("#tab-draw")
        page.click("#shapes [aria-label=brush]")
        box = page.locator("#drawing").bounding_box()
        assert box is not None
        hand = context.new_cdp_session(page)

        def touch(kind: str, *points: tuple[float, float]) -> None:
            places = [
                {"id": number, "x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
                for number, (x, y) in enumerate(points)
            ]
            hand.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})

        touch("touchStart", (0.2, 0.2))
        touch("touchStart", (0.2, 0.2), (0.8, 0.8))
        touch("touchMove", (0.2, 0.2), (0.8, 0.6))
        touch("touchMove", (0.4, 0.2))  # the other one has been lifted
        touch("touchEnd")
        until(page, "moshivis.picture.current?.name === 'Your drawing'")
        (points,) = page.evaluate("moshivis.picture.drawing.marks.map(({ points }) => points)")
        assert all(y < 150 for _, y in points) and points[-1][0] > 150
        assert visitor.complaints == []


def test_no_stroke_of_a_long_drawing_is_lost(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.click("#tab-draw")
    found = page.evaluate(
        """() => {
          const { drawing } = moshivis.picture;
          const colour = (i) => [...drawing.pen.getImageData(2 + 2 * i, 100, 1, 1).data].slice(0, 3).join();
          Object.assign(drawing.size, { value: 1 });
          drawing.tool = 'brush';
          drawing.colour = '#000000';
          for (let i = 0; i < 205; i++) {
            drawing.add([2 + 2 * i, 90]);
            drawing.mark.points.push([2 + 2 * i, 110]);
            drawing.paint();
            drawing.mark = null;
          }
          const drawn = [0, 4, 204].map(colour);
          for (let i = 0; i < 300; i++) drawing.undo();
          const kept = [0, 4, 5, 204].map(colour);
          const before = drawing.empty;
          drawing.clear();
          return { drawn, kept, before, after: drawing.empty, cleared: colour(0) };
        }"""
    )
    white = "255,255,255"
    assert white not in found["drawn"]
    assert white not in found["kept"][:2] and found["kept"][2:] == [white, white]  # too old to be taken back
    assert (found["before"], found["after"], found["cleared"]) == (False, True, white)


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


def dispatch(page: Page, event: str, at: str, file: tuple[str, str, bytes] | None = None) -> bool:
    """Let a paste or a drag happen to an element, with a file (name, type, content) or else with words.

    Returns whether the page has taken it; what it leaves alone the browser does itself, and leaves the page for a file.
    """
    taken = page.evaluate(
        """([event, at, file]) => {
          const carried = new DataTransfer();
          if (file) carried.items.add(new File([new Uint8Array(file[2])], file[0], { type: file[1] }));
          else carried.setData('text/plain', 'words');
          const options = { bubbles: true, cancelable: true };
          const made = event === 'paste'
            ? new ClipboardEvent(event, { ...options, clipboardData: carried })
            : new DragEvent(event, { ...options, dataTransfer: carried });
          return !document.querySelector(at).dispatchEvent(made);
        }""",
        [event, at, file and [*file[:2], list(file[2])]],
    )
    assert isinstance(taken, bool)
    return taken


def test_a_picture_is_pasted(server: RunningServer, visitor: Visitor) -> None:
    """In a call, while one writes; the words that one pastes are left alone."""
    page = visitor.open(server.url)
    page.click("#call")
    visitor.wait_state("talking")
    page.focus("#question")
    shown = page.evaluate("moshivis.picture.current.name")
    assert not dispatch(page, "paste", "#question")
    assert not dispatch(page, "paste", "#question", ("notes.txt", "text/plain", b"words"))
    assert page.evaluate("moshivis.picture.current.name") == shown
    assert dispatch(page, "paste", "#question", ("image.png", "image/png", PICTURE.read_bytes()))
    visitor.wait_pictures(2)
    assert visitor.pictures[-1] == PICTURE.read_bytes()
    assert page.get_attribute("#shown", "alt") == "image.png" and page.is_visible("#upload")
    until(page, "document.querySelector('#picture-status').textContent === ''")
    page.click("#call")
    assert visitor.complaints == []


def test_a_picture_is_dropped(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.click("#tab-draw")
    file = ("star.png", "image/png", PICTURE.read_bytes())

    def dropping() -> bool:
        return bool(page.evaluate("document.body.classList.contains('dropping')"))

    assert not dispatch(page, "dragenter", "#question") and not dropping(), "words may be dragged into the field"
    assert dispatch(page, "dragenter", "body", file) and dropping() and page.is_visible(".drop")
    assert dispatch(page, "dragenter", "#stage", file) and dispatch(page, "dragleave", "body", file) and dropping()
    assert dispatch(page, "dragleave", "#stage", file) and not dropping()
    for _ in range(2):  # a drop counts for as many leavings as there were enterings
        assert dispatch(page, "dragenter", "body", file) and dispatch(page, "dragenter", "#transcript", file)
        assert dispatch(page, "dragover", "#transcript", file) and dropping()
        assert dispatch(page, "drop", "#transcript", file) and not dropping()
        until(page, "moshivis.picture.current?.name === 'star.png'")
    assert page.is_visible("#shown") and page.is_visible("#upload") and not page.is_visible("#drawing")
    assert page.evaluate("moshivis.picture.current.blob.arrayBuffer().then(b => b.byteLength)") == len(file[2])
    assert dispatch(page, "drop", "body", ("notes.txt", "text/plain", b"words"))
    assert "“notes.txt” is not a picture" in visitor.problem()
    assert page.evaluate("moshivis.picture.current.name") == "star.png", "the one before stays"
    assert visitor.complaints == []


def test_the_last_choice_counts(server: RunningServer, visitor: Visitor, tmp_path: Path) -> None:
    """Whatever takes longer to be drawn, read or made smaller."""
    page = visitor.open(server.url)
    pasted = ("image.png", "image/png", PICTURE.read_bytes())
    page.click("#tab-draw")
    page.click("#shapes [aria-label=star]")
    page.locator("#drawing").click()
    assert dispatch(page, "paste", "body", pasted)  # before the drawing is used
    page.wait_for_timeout(1000)
    assert page.evaluate("moshivis.picture.current.name") == "image.png"
    slow = tmp_path / "slow.png"
    Image.effect_noise((2400, 2400), 90).save(slow)
    page.set_input_files("#file", slow)
    assert dispatch(page, "drop", "body", ("quick.png", *pasted[1:]))
    until(page, "moshivis.picture.current?.name === 'quick.png'")
    page.wait_for_timeout(3000)  # longer than the slow one takes by itself
    assert page.evaluate("moshivis.picture.current.name") == "quick.png"
    page.set_input_files("#file", slow)
    until(page, "moshivis.picture.current?.name === 'slow.png'")
    assert visitor.complaints == []


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
