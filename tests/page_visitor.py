"""Fixtures of the page's tests: a server with the embedded model, a browser, and a visitor who notices everything."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from moshivis.inference.conversation import Assistant
from moshivis.serve.static import PAGE
from page_support import open_browser, until
from serve_support import PATIENCE, RunningServer, first_in_line, serving

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

WAIT = 90_000  # ms; machines that run tests are busy


@pytest.fixture(scope="module")
def server(mini: Assistant) -> Iterator[RunningServer]:
    with first_in_line(), serving(mini, page=PAGE) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with first_in_line(), open_browser(tmp_path_factory.mktemp("browser")) as opened:
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
