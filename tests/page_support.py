"""A headless browser whose microphone hears a spoken question: what the tests of the page and its screenshots share."""

from __future__ import annotations

import contextlib
import shutil
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import soxr

import moshivis
from moshivis.audio import read_audio
from serve_support import PATIENCE, RunningServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ASSETS = Path(moshivis.__file__).parent / "assets"
PICTURE = ASSETS / "example.png"
QUESTION = ASSETS / "example.wav"  # "How many stars are there?"
ANSWER = {"one", "stars"}  # words of the right answer
WRITTEN, WRITTEN_ANSWER = "How many stars are there?", {"one", "stars"}

RATE = 48000  # of the browser's microphone
GREETING = 7.0  # seconds of silence in which the model says hello
LISTENING = 13.0  # seconds of silence after it; then the browser repeats it all
PATIENT = 3 * (GREETING + LISTENING)  # seconds: the embedded model does not get every question right
STRANGER = "moshivis.example"  # a name that leads to this machine but is none of its own

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    f"--host-resolver-rules=MAP {STRANGER} 127.0.0.1",
]


def write_microphone(path: Path) -> None:
    """What the browser's microphone will hear."""
    spoken = soxr.resample(read_audio(QUESTION), 24000, RATE)
    before, after = (np.zeros(int(seconds * RATE), np.float32) for seconds in (GREETING, LISTENING))
    soundfile.write(path, np.concatenate([before, spoken, after]), RATE, subtype="PCM_16")


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Chromium; `folder` takes the sound of its microphone."""
    from playwright.sync_api import sync_playwright

    microphone = folder / "microphone.wav"
    write_microphone(microphone)
    with sync_playwright() as playwright:
        flags = [*FLAGS, f"--use-file-for-fake-audio-capture={microphone}"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@contextmanager
def proxy(server: RunningServer, change: Callable[[bytes], bytes]) -> Iterator[str]:
    """An address that leads to the server; what clients send is changed on its way, or swallowed."""

    class Passing(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", server.port)) as inner:
                threading.Thread(target=self.pass_on, args=(inner, self.request, bytes), daemon=True).start()
                self.pass_on(self.request, inner, change)

        def pass_on(self, source: socket.socket, target: socket.socket, changed: Callable[[bytes], bytes]) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(2**16):
                    target.sendall(changed(data))
                target.shutdown(socket.SHUT_WR)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Passing) as passing:
        passing.daemon_threads = True
        threading.Thread(target=passing.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{passing.server_address[1]}"
        passing.shutdown()


def until(page: Page, expression: str, arg: Any = None, *, seconds: float = PATIENCE) -> None:
    """Wait until JavaScript is true. (Playwright's own way evaluates strings, which the page's policy forbids.)"""
    limit = time.monotonic() + seconds
    while not page.evaluate(expression, arg):
        assert time.monotonic() < limit, f"waited {seconds:g} s for {expression}"
        page.wait_for_timeout(100)


def choose_example(page: Page) -> None:
    """The bundled picture, through the upload."""
    page.set_input_files("#file", PICTURE)
    until(page, "moshivis.picture.current?.name === 'example.png'")


def wait_for_words(page: Page, words: set[str], seconds: float) -> None:
    """Until one of the model's turns holds all the words."""
    until(
        page,
        """words => moshivis.transcript.toJSON().some(({ who, text }) => who === 'model' &&
             words.every(word => text.toLowerCase().split(/[^a-z]+/).includes(word)))""",
        sorted(words),
        seconds=seconds,
    )
