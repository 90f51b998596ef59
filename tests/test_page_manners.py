"""The page explains what goes wrong, and can be used by everybody: in a real browser."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

from moshivis.inference.colour import PALETTE
from moshivis.inference.conversation import Assistant
from moshivis.serve.hall import Full
from moshivis.serve.static import PAGE
from page_support import CHROMIUM, STRANGER, proxy, until
from page_visitor import Visitor
from serve_support import RunningServer, serving, wait_for

pytest.importorskip("playwright")
if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
    pytest.mark.timeout(600),
]
PHONES = [(360, 740), (915, 412)]  # upright, and on its side


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
    began = time.monotonic()
    page.wait_for_timeout(3000)
    page.evaluate("moshivis.call.wire.socket.close(4000)")  # as if the network had broken it
    visitor.wait_state("lost")
    assert "The connection is lost" in visitor.problem()
    visitor.wait_state("talking")
    assert "Connected again" in page.inner_text("#transcript") and not page.is_visible("#problem")
    until(page, "moshivis.transcript.turns.length > 0")
    lasted = time.monotonic() - began
    page.click("#call")
    ended = re.search(r"The call has ended after (\d+):(\d+)", page.inner_text("#transcript"))
    assert ended is not None and 60 * int(ended[1]) + int(ended[2]) > lasted - 2, "both parts of it"
    assert len(visitor.sockets) == 2 and visitor.complaints == []


def test_a_dead_connection_is_noticed(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.click("#call")
    visitor.wait_state("talking")
    page.evaluate("moshivis.call.wire.socket.onmessage = () => {}")  # as if nothing came any more
    visitor.wait_state("lost")
    visitor.wait_state("talking")
    assert len(visitor.sockets) == 2 and "Connected again" in page.inner_text("#transcript")
    page.click("#call")


def test_a_proxy_that_takes_another_name_is_explained(server: RunningServer, visitor: Visitor) -> None:
    own = f"Host: 127.0.0.1:{server.port}".encode()
    with proxy(server, lambda data: re.sub(rb"Host: 127.0.0.1:\d+", own, data)) as url:
        page = visitor.open(url)
        page.click("#call")
        visitor.wait_state("idle")
        problem = visitor.problem()
        assert "The server refused the call" in problem and f"--origin {url}" in problem
    assert len(visitor.sockets) == 1


def test_a_proxy_that_passes_no_websockets_is_explained(server: RunningServer, visitor: Visitor) -> None:
    with proxy(server, lambda data: data.replace(b"Upgrade: websocket", b"X-Upgrade: nothing")) as url:
        page = visitor.open(url)
        page.click("#call")
        visitor.wait_state("idle")
        assert "Sound cannot get through to the server" in visitor.problem()
    assert len(visitor.sockets) == 5


def test_sound_that_the_system_stops_comes_back(server: RunningServer, visitor: Visitor) -> None:
    page = visitor.open(server.url)
    page.click("#call")
    visitor.wait_state("talking")
    page.evaluate("moshivis.call.sound.wake = () => {}")  # as where only a tap lets sound flow again
    page.evaluate("moshivis.call.sound.context.suspend()")
    assert "The sound was interrupted" in visitor.problem()
    page.evaluate("delete moshivis.call.sound.wake")
    page.click("#problem-action")
    until(page, "moshivis.call.sound.context.state === 'running'")
    assert not page.is_visible("#problem") and page.evaluate("moshivis.call.state") == "talking"
    page.evaluate("moshivis.call.sound.context.suspend()")  # now it helps itself
    until(page, "moshivis.call.sound.context.state === 'running'")
    page.click("#call")


def test_who_gives_up_waiting_gives_the_place_back(mini: Assistant, visitor: Visitor) -> None:
    with serving(mini, page=PAGE, sessions=1) as server:
        taken = server.run(server.hall.session(kind="test"))
        page = visitor.open(server.url)
        page.click("#call")
        visitor.wait_state("queued")
        assert server.hall.queued == 1
        page.click("#call")
        wait_for(lambda: server.hall.queued == 0, "the place to be given back", 20)
        server.call(lambda: taken.end("closed"))


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
        assert "A token is needed" in page.inner_text("#token-note")
        page.fill("#token-value", "close-sesame")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#token-note').textContent.startsWith('The token is wrong')")
        assert page.is_visible("#token") and page.get_attribute("#token-value", "aria-describedby") == "token-note"
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


def test_settings_that_the_server_would_refuse_are_not_kept(server: RunningServer, visitor: Visitor) -> None:
    visitor.page.add_init_script(
        """localStorage['moshivis.settings'] ??= JSON.stringify(
             { seed: 7.6, text_topk: 'many', audio_topk: 9999, xa_start: null, colour: 3 })"""
    )
    page = visitor.open(server.url)
    assert page.input_value("[name=seed]") == "8" and page.input_value("[name=audio_topk]") == "500"
    page.click("#open-settings")
    page.fill("[name=seed]", "1.5")
    page.keyboard.press("Tab")
    assert page.input_value("[name=seed]") == "2"
    page.keyboard.press("Escape")
    page.click("#call")
    visitor.wait_state("talking")
    page.click("#call")
    query = parse_qs(urlsplit(visitor.sockets[0]).query)
    assert query["seed"] == ["2"] and query["audio_topk"] == ["500"]
    assert not {"text_topk", "xa_start", "colour"} & set(query)


@pytest.mark.parametrize(("most_wide", "most_high"), PHONES)
def test_it_fits_a_phone(server: RunningServer, browser: Browser, most_wide: int, most_high: int) -> None:
    context = browser.new_context(viewport={"width": most_wide, "height": most_high}, has_touch=True)
    visitor = Visitor(context.new_page())
    page = visitor.open(server.url)

    def check(what: str) -> None:
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= most_wide, f"{what} is {width} pixels wide"
        button = page.locator("#call").bounding_box()
        assert button is not None and button["y"] + button["height"] <= most_high, f"{what} hides the button"

    def reach(element: str) -> None:
        """Nothing lies over it when one has scrolled down."""
        on_top = page.evaluate(
            """(id) => {
              scrollTo(0, document.body.scrollHeight);
              const box = document.getElementById(id).getBoundingClientRect();
              return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2)?.id;
            }""",
            element,
        )
        assert on_top == element

    reach("question")
    for tab in ("gallery", "draw", "camera", "upload"):
        page.click(f"#tab-{tab}")
        check(tab)
    for button, dialog in (("open-settings", "settings"), ("open-help", "help")):
        page.click(f"#{button}")
        inner = page.evaluate("id => document.getElementById(id).scrollWidth", dialog)
        assert inner <= most_wide - 32
        check(dialog)
        page.keyboard.press("Escape")
    page.click("#tab-gallery")
    page.click("#call")
    visitor.wait_state("talking")
    check("a call")
    reach("question")
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
    assert "a miniature" in page.inner_text("#about") and "three hundred words" in page.inner_text("#about")
    questions = page.locator("#examples button").all_inner_texts()
    assert questions == server.get("/api/info").json()["questions"]
