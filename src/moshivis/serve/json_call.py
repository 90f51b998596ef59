"""A conversation held in JSON events: what the Realtime and the Live protocol have in common.

The call takes a place in the hall only when it is opened: over Realtime with the first sound, picture or wish for a
response, over Live with `session.start`. Its settings are fixed from then on. Four tasks run beside each other: one
reads events, one opens the call and reads pictures (which takes a while, and the sound must not wait for it), one sends
what the assistant says, one watches the clock.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from typing import NoReturn

from starlette.websockets import WebSocket, WebSocketDisconnect

from moshivis.errors import InputError
from moshivis.inference.call import CallSettings, Said
from moshivis.inference.engine import Busy
from moshivis.serve.events import MAX_APPEND_S, EventError, Fields, Json, read_settings
from moshivis.serve.feed import Feed
from moshivis.serve.hall import Closing, Hall
from moshivis.serve.json_wire import (
    GOING_AWAY,
    LAST_WORDS_S,
    Finish,
    Gone,
    Wire,
    busy,
    expired,
    failed,
    idle,
    race,
    server_stopping,
    session_ended,
)
from moshivis.serve.patience import SLOWNESS, Overdue, in_time, is_arriving, take_seat
from moshivis.serve.pcm import Samples
from moshivis.serve.session import Session
from moshivis.serve.wire import MAX_SEED

_log = logging.getLogger("moshivis.serve")

WATCH_S = 0.25  # between two looks at the clock
REPORT_S = 1.0  # between two reports of lost sound
BUFFER = "input_buffer_ms"  # beside the settings of the call
OPENING, PICTURE = "opening", "picture"  # what the working task is asked to do

Chore = Callable[[], Awaitable[None]]


class JsonCall:
    """One client. Subclasses say which events there are."""

    kind: str  # for logs and metrics
    first_event = "the first event"  # what must come within `Limits.first_message_s`

    def __init__(self, hall: Hall, socket: WebSocket, buffer_ms: int):
        self.hall, self.limits = hall, hall.limits
        self.wire = Wire(socket, hall.limits)
        # A client that stops sending waits for an answer, and time must go on for it.
        self.settings: CallSettings = replace(
            hall.engine.usual_settings(), on_gap="silence", seed=secrets.randbelow(MAX_SEED)
        )
        self.frame_ms = round(1000 * hall.engine.frame_size / hall.engine.sample_rate)
        self.feed = Feed(hall.engine.frame_size, buffer_ms // self.frame_ms, hall.metrics.dropped)
        self.session: Session | None = None
        self.begun = False  # the first event has come; for subclasses to set
        self.connected = time.monotonic()
        self.expires_at = int(time.time() + hall.limits.session_s)
        self._socket = socket
        self._opening = False  # a place was asked for, or taken
        self._wanted = False  # something came that a call is opened for, besides a picture
        self._opened = asyncio.Event()
        self._chores: dict[str, tuple[Json, Chore]] = {}  # that wait, in order; of each kind one
        self._chore_came = asyncio.Event()
        self._reported, self._reported_at = (0, 0), 0.0

    # for subclasses to say ---------------------------------------------------------------------------------------

    async def begin(self) -> None:
        """The connection has been made."""

    async def handle(self, event: Json) -> None:
        """The client sent an event. Raises EventError if it cannot be honoured."""
        raise NotImplementedError

    async def say(self, said: Said) -> None:
        """The assistant's next frame."""
        raise NotImplementedError

    async def report_loss(self, heard: int, said: int) -> None:
        """So many frames of the client were not heard so far, and so many of the assistant were not sent."""
        raise NotImplementedError

    async def finish(self, finish: Finish) -> None:
        """The last events."""
        raise NotImplementedError

    # the life of a connection ------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the client until one of both has enough."""
        try:
            await self._socket.accept()
            await self._converse()
        except (Gone, WebSocketDisconnect):
            await self.wire.close(GOING_AWAY, "")
        except Finish as finish:
            await self._take_leave(finish)
        except Exception:
            _log.exception("a %s call failed", self.kind)
            await self._take_leave(failed())
        finally:
            if self.session is not None:
                async with self.session:  # gives its place back
                    pass

    async def _converse(self) -> NoReturn:
        if not self.hall.accepting:
            raise server_stopping()
        if self.hall.active + self.hall.queued >= self.hall.slots:
            self.hall.metrics.rejected("full")
            raise busy(f"all {self.hall.slots} places are taken")
        await self.begin()
        await race(self._listen(), self._work(), self._speak(), self._watch())

    async def _take_leave(self, finish: Finish) -> None:
        if self.session is not None:
            self.session.end("closed")  # before the client has been heard out, who may be slow
        try:
            async with asyncio.timeout(LAST_WORDS_S):
                await self.finish(finish)
        except (Gone, TimeoutError):
            pass
        await self.wire.close(finish.code, finish.reason)

    async def _listen(self) -> NoReturn:
        while True:
            event: Json | None = None
            try:
                event = await self._receive()
                await self.handle(event)
            except EventError as error:
                await self.wire.fail(error, event)
            await asyncio.sleep(0)  # events that wait already must not keep others from their turn

    async def _receive(self) -> Json:
        """The next event. Raises EventError, Gone or Finish."""
        if not self.begun:
            try:
                return await in_time(self.wire.receive(None), self._socket, self.limits, self.connected)
            except Overdue as error:
                raise idle(f"{self.first_event} did not come within {error.seconds:g} seconds") from None
        times = 0
        while True:
            times += 1
            try:
                return await self.wire.receive(self.limits.idle_s)
            except TimeoutError:
                arriving = is_arriving(self._socket) and times < SLOWNESS
                if not arriving and not self.feed.waiting:  # what the client has said already is still being heard
                    raise idle(f"no event came for {times * self.limits.idle_s:g} seconds") from None

    async def _work(self) -> NoReturn:
        while True:
            while not self._chores:
                self._chore_came.clear()
                await self._chore_came.wait()
            event, chore = self._chores.pop(next(iter(self._chores)))
            try:
                await chore()
            except EventError as error:
                await self.wire.fail(error, event)
                if self._wanted and not self._opening:  # wanted while a picture was read that turned out to be bad
                    await self._open_and_start()

    async def _speak(self) -> NoReturn:
        await self._opened.wait()
        assert self.session is not None
        async for said in self.session:
            self.feed.heard(said.frame)
            self.pump()
            await self.say(said)
            await self._report()
        raise session_ended(self.session.end_reason, self.limits)

    async def _watch(self) -> NoReturn:
        """The length of the session, and the end of the server for those that have no call to end."""
        while True:
            await asyncio.sleep(WATCH_S)
            if self.session is None and not self.hall.accepting:
                raise server_stopping()
            if time.monotonic() - self.connected > self.limits.session_s:
                raise expired(f"a session lasts {self.limits.session_s:g} seconds at most")

    async def _report(self) -> None:
        assert self.session is not None
        lost = (self.feed.dropped + self.session.dropped, self.session.lost)
        now = time.monotonic()
        if lost != self._reported and now - self._reported_at >= REPORT_S:
            self._reported, self._reported_at = lost, now
            await self.report_loss(*lost)

    # what events do ----------------------------------------------------------------------------------------------

    async def show_later(self, event: Json, chore: Chore) -> None:
        """Look at an event's picture, after what was asked for before. Events must not wait for that: one picture may,
        and gives way to a newer one; its own event is answered with an error then."""
        before = self._chores.get(PICTURE)
        self._ask(PICTURE, event, chore)
        if before is not None:
            message = "a newer picture came before this one was looked at"
            await self.wire.fail(EventError(message, code="picture_replaced"), before[0])

    def _ask(self, kind: str, event: Json, chore: Chore) -> None:
        """Ask the working task for something, in place of what was asked of the same kind and waits still."""
        self._chores[kind] = (event, chore)
        self._chore_came.set()

    async def open(self, picture: bytes | None = None, param: str | None = None) -> None:
        """Take a place in the hall. Raises EventError for a bad picture, which stood in `param`."""
        self._opening = True
        try:
            self.session = await self.hall.session(self.settings, picture, kind=self.kind)
            take_seat(self._socket)
        except InputError as error:
            self._opening = False
            raise EventError(str(error), code="invalid_image", param=param) from None
        except Busy as error:
            raise busy(str(error)) from None
        except Closing:
            raise server_stopping() from None

    def start(self) -> None:
        """Let the open call begin: what it says is sent from now on."""
        assert self.session is not None
        self._opened.set()
        self.pump()

    def open_later(self, event: Json) -> None:
        """Open and start the call, unless that has been done."""
        self._wanted = True
        if not self._opening:
            self._opening = True
            self._ask(OPENING, event, self._open_and_start)

    async def _open_and_start(self) -> None:
        if self.session is None:
            await self.open()
            self.start()

    async def show(self, picture: bytes | None, param: str) -> None:
        """Show a picture, or none. Raises EventError for a bad one; then what was seen before stays."""
        if self.session is None:
            await self.open(picture, param)
            return self.start()
        try:
            await self.session.show(picture)
        except InputError as error:
            raise EventError(str(error), code="invalid_image", param=param) from None

    def hear(self, samples: Samples) -> None:
        """The client's next samples [T] at 24 kHz. They wait if the call is not open yet."""
        self.feed.add(samples)
        self.pump()

    def pump(self) -> None:
        """Hand the model what it may hear next."""
        if self.session is not None:
            self.feed.pump(self.session.hear)

    def read_own_settings(self, session: Fields) -> tuple[CallSettings, int]:
        """What `session.moshivis` asks for: settings of the call, and frames that may wait to be heard.

        Raises EventError, also for settings of a call that is open already.
        """
        fields = session.object("moshivis")
        if fields is None:
            return self.settings, self.feed.bound
        settings = read_settings(fields, self.settings, extra=(BUFFER,))
        if settings != self.settings and self._opening:
            message = "can no longer be changed: the call has begun. Send it before sound, picture and response.create"
            raise session.wrong("moshivis", message, "session_started")
        bound = self.feed.bound
        if fields.values.get(BUFFER) is not None:
            milliseconds = fields.whole_number(BUFFER)
            if not self.frame_ms <= milliseconds <= MAX_APPEND_S * 1000:
                raise fields.wrong(BUFFER, f"must be a number from {self.frame_ms} to {MAX_APPEND_S * 1000:g}")
            bound = milliseconds // self.frame_ms
        return settings, bound

    def apply_own_settings(self, settings: CallSettings, bound: int) -> None:
        self.settings = settings
        self.feed.set_bound(bound)

    def own_settings(self) -> Json:
        """What is in force, as `session.moshivis`."""
        return {**asdict(self.settings), BUFFER: self.feed.bound * self.frame_ms}
