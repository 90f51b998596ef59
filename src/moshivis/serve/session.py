"""One conversation as asyncio sees it: what every protocol shares.

The engine speaks from its own thread; here its frames wait, up to a bound, until the socket takes them. A reader that
is too slow loses the oldest sound, but no word of the transcript.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from types import TracebackType

import numpy as np

from moshivis.adapters.gated_cross_attention import ImageKV
from moshivis.inference.call import Audio, Call, Ended, Said
from moshivis.serve.metrics import Metrics

LOUD = 0.01  # root mean square above which the user is taken to speak, for the reaction time only
QUIET_SECONDS = 0.16  # after the last loud frame, for the same
END_SECONDS = 5.0  # that a call has to leave its slot

Look = Callable[[bytes], Awaitable[ImageKV]]


class Session:
    """A conversation under way. Made by `Hall.session`; use it as an async context manager.

    Iterating yields what the assistant says, frame by frame, until the conversation is over; `end_reason` then tells
    why. All methods belong to the event loop's thread.
    """

    def __init__(self, kind: str, look: Look, metrics: Metrics, buffer_frames: int):
        self.id = secrets.token_hex(8)
        self.kind = kind
        self.started = time.monotonic()
        self.lost = 0  # frames that a slow reader did not get
        self.end_reason = ""
        self._look, self._metrics, self._bound = look, metrics, buffer_frames
        self._loop = asyncio.get_running_loop()
        self._said: deque[Said] = deque()
        self._news = asyncio.Event()
        self._ended = asyncio.Event()
        self._showing = asyncio.Lock()
        self._muted = False
        self._spoke: float | None = None  # when the user was last loud, until the assistant has answered
        self._call: Call | None = None
        self._on_end: Callable[[Session], None] = lambda session: None

    def attach(self, call: Call, on_end: Callable[[Session], None]) -> None:
        """Give the session its call; `on_end` is told when the call has left its slot."""
        self._call, self._on_end = call, on_end

    @property
    def call(self) -> Call:
        assert self._call is not None
        return self._call

    @property
    def frames(self) -> int:
        """Frames of the assistant so far."""
        return self.call.frames

    @property
    def dropped(self) -> int:
        """Frames of the user that were dropped because they came faster than time passes."""
        return self.call.dropped

    @property
    def over(self) -> bool:
        return self._ended.is_set()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def hear(self, samples: Audio) -> None:
        """The user's next samples [n], float32, mono at 24 kHz."""
        if self._muted:
            samples = np.zeros_like(samples)
        if len(samples) and float(np.sqrt(np.mean(np.square(samples)))) > LOUD:
            self._spoke = time.monotonic()
        self._metrics.dropped(self.call.push(samples))

    def mute(self, muted: bool) -> None:
        """Let the model hear silence in place of the user."""
        self._muted = muted

    async def show(self, picture: bytes | None) -> None:
        """Show another picture from now on, or none. It is read and encoded beside the conversation, which goes on.

        Raises InputError if it is not a picture or is too large; then the one before stays.
        """
        async with self._showing:
            image = None if picture is None else await self._look(picture)
            self.call.set_image(image)

    def end(self, reason: str) -> None:
        """End the conversation. The first reason counts."""
        self.call.end(reason)

    async def wait_ended(self) -> str:
        """Wait for the end, and return its reason."""
        await self._ended.wait()
        return self.end_reason

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end("closed")
        async with asyncio.timeout(END_SECONDS):
            await self._ended.wait()

    async def __aiter__(self) -> AsyncIterator[Said]:
        while True:
            while self._said:
                yield self._said.popleft()
            if self.over:
                return
            self._news.clear()
            await self._news.wait()

    # from the engine --------------------------------------------------------------------------------------------

    def deliver(self, event: Said | Ended) -> None:
        """Called in the engine's thread."""
        self._loop.call_soon_threadsafe(self._receive, event)

    def _receive(self, event: Said | Ended) -> None:
        if isinstance(event, Ended):
            self.end_reason = event.reason
            self._ended.set()
            self._on_end(self)
        else:
            if event.text and self._spoke is not None:
                quiet = time.monotonic() - self._spoke
                if quiet >= QUIET_SECONDS:  # else the user is still speaking, and this is no answer
                    self._metrics.reaction(quiet)
                    self._spoke = None
            self._said.append(event)
            while len(self._said) > self._bound:
                oldest = self._said.popleft()
                self._said[0] = replace(self._said[0], text=oldest.text + self._said[0].text)
                self.lost += 1
                self._metrics.lost(1)
        self._news.set()
