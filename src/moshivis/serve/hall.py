"""Who may talk: admission to the engine's slots, the queue of those who wait, and the end of everything.

Callers who wait hold a ticket and ask for their position now and then; a ticket that nobody asks for expires. Slots
that fall free belong to the head of the queue, and only what is left to those who come without a ticket.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from moshivis.adapters.gated_cross_attention import ImageKV
from moshivis.errors import InputError, MoshivisError
from moshivis.inference.engine import Busy, CallSettings, Engine
from moshivis.serve.limits import Limits
from moshivis.serve.metrics import Metrics
from moshivis.serve.session import Session
from moshivis.vision.image import read_image

_log = logging.getLogger("moshivis.serve")

TICKET_SECONDS = 90.0  # a ticket that was not asked for so long is gone; a hidden tab may ask once a minute only
FIRST_SECONDS = 5.0  # the same, if nobody has asked for it yet: tickets cost nothing, and hold places
LOOKERS = 1  # pictures that are read and encoded at once: more would take the processor from the ticks
T = TypeVar("T")


class Full(Busy):
    """No slot is free. `position` is the place in the queue that a caller would get, from 1."""

    def __init__(self, message: str, position: int):
        super().__init__(message)
        self.position = position


class Closing(MoshivisError):
    """The server is about to stop."""


@dataclass
class Ticket:
    """A place in the queue."""

    token: str
    asked: float  # when its holder last asked, or took it
    patience: float = FIRST_SECONDS


class Hall:
    """All conversations of a server. Used from the event loop's thread."""

    def __init__(self, engine: Engine, limits: Limits, metrics: Metrics):
        self.engine, self.limits, self.metrics = engine, limits, metrics
        self.accepting = True
        self.warm = False  # the engine has been ready once
        self._sessions: dict[str, Session] = {}
        self._opening = 0  # callers who have a slot but whose picture is still being read
        self._tickets: dict[str, Ticket] = {}
        # As many threads of the processor as a tick has: the number that another pool sets would hold here, too.
        threads = engine.threads or torch.get_num_threads()
        self._lookers = ThreadPoolExecutor(LOOKERS, "moshivis-look", torch.set_num_threads, (threads,))
        engine.on_tick = metrics.tick
        metrics.slots(self.slots)

    @property
    def slots(self) -> int:
        return min(self.limits.sessions, self.engine.slots)

    @property
    def active(self) -> int:
        """Conversations under way, and those that are about to be."""
        return len(self._sessions) + self._opening

    @property
    def queued(self) -> int:
        """Callers who wait."""
        self._expire()
        return len(self._tickets)

    # admission --------------------------------------------------------------------------------------------------

    async def session(
        self,
        settings: CallSettings | None = None,
        image: bytes | None = None,
        *,
        kind: str,
        ticket: str | None = None,
    ) -> Session:
        """Begin a conversation about a picture, or about none, over the protocol `kind`.

        Raises what `check` does, and InputError for a bad picture or setting; then a ticket goes back to the head of
        the queue, for another try.
        """
        self.check(ticket)
        place = self._tickets.pop(ticket or "", None)
        self.metrics.queue_length(len(self._tickets))
        self._opening += 1
        try:
            seen = None if image is None else await self.look(image)
            if not self.accepting:  # closed meanwhile
                raise Closing("the server is about to stop")
            session = Session(kind, self.look, self.metrics, self.limits.send_buffer_frames)
            call = self.engine.open(session.deliver, settings, seen)
            session.attach(call, self._ended)
        except (InputError, Busy) as error:
            if isinstance(error, InputError):
                self.metrics.rejected("picture")
            if place is not None:
                place.asked = time.monotonic()
                self._tickets = {place.token: place, **self._tickets}
                self.metrics.queue_length(len(self._tickets))
            raise
        finally:
            self._opening -= 1
        self._sessions[session.id] = session
        self.metrics.started(kind)
        _log.info("%s begins: %s, %d of %d places", session.id[:6], kind, len(self._sessions), self.slots)
        timer = asyncio.get_running_loop().call_later(self.limits.session_s, session.end, "time limit")
        asyncio.ensure_future(session.wait_ended()).add_done_callback(lambda _: timer.cancel())
        return session

    def check(self, token: str | None) -> None:
        """Raises Full, or what `check_ready` does, if the holder of a ticket, or of none, may not begin now.

        A ticket whose holder may begin is kept for as long as a picture may take to arrive.
        """
        self.check_ready()
        self._expire()
        free = self.slots - self.active
        place = list(self._tickets).index(token) if token in self._tickets else len(self._tickets)
        if place >= free:
            self.metrics.rejected("full")
            raise Full(f"all {self.slots} places are taken, and {place} callers wait before you", place + 1)
        if token in self._tickets:
            ticket = self._tickets[token]
            ticket.asked, ticket.patience = time.monotonic(), max(TICKET_SECONDS, self.limits.idle_s)

    def check_ready(self) -> None:
        """Raises Closing if the server is stopping, Busy if its engine does not run."""
        if not self.accepting:
            self.metrics.rejected("stopping")
            raise Closing("the server is about to stop")
        if not self.engine.ready:
            self.metrics.rejected("not ready")
            raise Busy("the engine has stopped" if self.warm else "the server is still warming up")

    def check_size(self, picture: bytes) -> None:
        """Raises InputError if an encoded picture is too large."""
        if len(picture) > self.limits.picture_bytes:
            most = self.limits.picture_bytes / 2**20
            raise InputError(f"the picture has {len(picture) / 2**20:.1f} MiB; at most {most:g} MiB are accepted")

    async def look(self, picture: bytes) -> ImageKV:
        """Read and encode a picture in a thread of its own.

        Raises InputError if it is too large, not a picture, or if the model cannot see, Closing if the server stops
        before it was looked at.
        """
        self.check_size(picture)

        def read() -> ImageKV:
            return self.engine.look(read_image(picture, max_pixels=self.limits.picture_pixels))

        return await self.unless_closing(asyncio.get_running_loop().run_in_executor(self._lookers, read))

    async def unless_closing(self, work: Awaitable[T]) -> T:
        """What a thread is asked to do. Raises Closing if it was not begun when the server stopped."""
        try:
            return await work
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.accepting or (task is not None and task.cancelling()):
                raise  # the caller has gone
            raise Closing("the server is about to stop") from None

    def _ended(self, session: Session) -> None:
        if self._sessions.pop(session.id, None) is None:
            return
        self.metrics.ended(session.kind, session.end_reason, session.seconds)
        _log.info(
            "%s ends: %s after %.0f s, %d frames, %s",
            *(session.id[:6], session.kind, session.seconds, session.frames, session.end_reason),
        )

    # the queue --------------------------------------------------------------------------------------------------

    def ticket(self) -> Ticket:
        """A place at the end of the queue.

        Raises Full if the queue has no place left, Closing if the server is stopping.
        """
        if not self.accepting:
            raise Closing("the server is about to stop")
        if self.queued >= self.limits.queue:
            self.metrics.rejected("queue full")
            raise Full(f"{len(self._tickets)} callers wait already, the queue is full", len(self._tickets) + 1)
        ticket = Ticket(secrets.token_urlsafe(12), time.monotonic())
        self._tickets[ticket.token] = ticket
        self.metrics.queue_length(len(self._tickets))
        return ticket

    def position(self, token: str) -> int | None:
        """How many callers stand before the ticket's holder gets a slot; 0 = enter now. None for no such ticket."""
        self._expire()
        if token not in self._tickets:
            return None
        ticket = self._tickets[token]
        ticket.asked, ticket.patience = time.monotonic(), TICKET_SECONDS
        return max(0, list(self._tickets).index(token) + 1 - (self.slots - self.active))

    def leave(self, token: str) -> None:
        """Give a ticket back."""
        self._tickets.pop(token, None)
        self.metrics.queue_length(len(self._tickets))

    def _expire(self) -> None:
        now = time.monotonic()
        for token in [token for token, ticket in self._tickets.items() if now - ticket.asked > ticket.patience]:
            self.leave(token)

    # the end ----------------------------------------------------------------------------------------------------

    async def close(self, grace: float) -> None:
        """Take no more callers, end the conversations under way, and wait up to `grace` seconds until they are over."""
        self.accepting = False
        self._tickets.clear()
        sessions = list(self._sessions.values())
        for session in sessions:
            session.end("server is stopping")
        if sessions:
            await asyncio.wait([asyncio.ensure_future(session.wait_ended()) for session in sessions], timeout=grace)
        self._lookers.shutdown(wait=False, cancel_futures=True)
