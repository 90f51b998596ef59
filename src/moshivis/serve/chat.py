"""`/api/chat`: the protocol of MoshiVis and of Moshi, for the clients that exist and for our own page.

MoshiVis clients send a picture and wait for the handshake, Moshi clients wait for the handshake and send no picture:
the query tells them apart. A picture may come at any later time too. `/moshi/api/chat` has no picture and no colours.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import time
from contextlib import suppress
from typing import Any

from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from moshivis.errors import InputError
from moshivis.inference.colour import GateScale
from moshivis.inference.engine import Busy
from moshivis.serve import wire
from moshivis.serve.about import describe
from moshivis.serve.hall import Closing, Full, Hall
from moshivis.serve.opus import OpusReader, OpusWriter
from moshivis.serve.patience import SLOWNESS, Overdue, in_time, is_arriving, take_seat
from moshivis.serve.pcm import PCM, PcmReader, PcmWriter
from moshivis.serve.session import Session
from moshivis.serve.tasks import first_of
from moshivis.serve.wire import ChatQuery, Close, Control, Kind

_log = logging.getLogger("moshivis.serve")

AUDIO_BYTES = 2**16  # of one message of sound: more than a second of samples, sixteen of Ogg/Opus
MAX_JUNK = 2**18  # bytes that are no Ogg/Opus; whoever sends more means something else
AHEAD_SECONDS, DRIFT = 30.0, 1.05  # sound that is further ahead of the clock is not even decoded
SEND_SECONDS = 10.0  # a message that the client does not take for so long ends the conversation
CLOSE_SECONDS = 2.0
QUIET_SECONDS = 4.0  # without a message after which we ping; the released page gives up after 10
TICK_SECONDS = 0.2  # for gates on the page, and how exact the other times are
STATS_TICKS = 5


def chat_routes(hall: Hall) -> list[WebSocketRoute]:
    async def chat(socket: WebSocket) -> None:
        await _Chat(hall, socket, plain=False).run()

    async def moshi(socket: WebSocket) -> None:
        await _Chat(hall, socket, plain=True).run()

    return [WebSocketRoute("/api/chat", chat), WebSocketRoute("/moshi/api/chat", moshi)]


class _Hangup(Exception):
    """The conversation ends: the client reads the sentence, if it is there to read it."""

    def __init__(self, code: Close, sentence: str, *, is_error: bool = True):
        super().__init__(sentence)
        self.code, self.sentence, self.is_error = code, sentence, is_error


class _Chat:
    """One socket, from its opening to its end."""

    def __init__(self, hall: Hall, socket: WebSocket, *, plain: bool):
        self.hall, self.socket, self.plain = hall, socket, plain
        self.query: ChatQuery
        self.session: Session | None = None  # from the handshake on
        self.pictures = _Pictures()
        self.gates: list[tuple[int, float]] = []  # frames and their gates since the page was last told
        self.ignored = 0  # messages that meant nothing to us
        self._reader: OpusReader | PcmReader
        self._heard_seconds = 0.0
        self._received = 0  # messages
        self._last_received = self._last_sent = time.monotonic()

    async def run(self) -> None:
        await self.socket.accept()
        try:
            self._read_query()
            await first_of(self._listen(), self._converse())
        except _Hangup as end:
            await self._hang_up(end)
        except WebSocketDisconnect:
            pass
        except Exception:
            _log.exception("a conversation failed")
            await self._hang_up(_Hangup(Close.INTERNAL, "something went wrong inside the server; its log says more"))

    def _read_query(self) -> None:
        usual = self.hall.engine.usual_settings()
        try:
            query = wire.read_query(self.socket.query_params, usual)
        except InputError as error:
            raise _Hangup(Close.BAD_REQUEST, str(error)) from None
        self.query = dataclasses.replace(query, page=False, picture_first=False) if self.plain else query
        self._reader = OpusReader() if self.query.audio == "ogg" else PcmReader(PCM)

    async def _hang_up(self, end: _Hangup) -> None:
        """Say why, and close; a client that does not read is left alone."""
        with suppress(WebSocketDisconnect, RuntimeError, TimeoutError):  # RuntimeError: closed already
            async with asyncio.timeout(CLOSE_SECONDS):
                if end.is_error:
                    await self.socket.send_bytes(wire.error(end.sentence))
                await self.socket.close(end.code, wire.shorten(end.sentence))

    # what comes in ----------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        """Take messages until the client closes the socket."""
        while True:
            event = await self.socket.receive()
            if event["type"] == "websocket.disconnect":
                return
            data = event.get("bytes")
            if data is None:
                raise _Hangup(Close.BAD_REQUEST, "a text message came; all messages of this protocol are binary")
            if len(data) > self.hall.limits.message_bytes:
                raise _Hangup(Close.TOO_LARGE, f"a message has {len(data)} bytes; that is too many")
            self._received += 1
            self._last_received = time.monotonic()
            if not self._take(*wire.split(data)):
                self.ignored += 1
            await asyncio.sleep(0)  # messages that wait already must not keep others from their turn

    def _take(self, kind: Kind | None, payload: bytes) -> bool:
        """Whether the message means something to us."""
        match kind:
            case Kind.AUDIO:
                return self._take_sound(payload)
            case Kind.IMAGE if not self.plain:
                self._check_first_picture(payload)
                self.pictures.put(payload)
                return True
            case Kind.CONTROL:
                return self._take_control(payload)
            case Kind.RATING:
                return len(payload) == 1 and 1 <= payload[0] <= 5
            case Kind.PING:
                return True
        return False

    def _take_sound(self, payload: bytes) -> bool:
        if len(payload) > AUDIO_BYTES:
            sentence = f"a message of sound has {len(payload)} bytes; at most {AUDIO_BYTES} are accepted at once"
            raise _Hangup(Close.TOO_LARGE, sentence)
        if self.session is None or self._heard_seconds > self.session.seconds * DRIFT + AHEAD_SECONDS:
            return False
        try:
            samples = self._reader.read(payload)
        except InputError:  # half a sample
            return False
        if isinstance(self._reader, OpusReader) and self._reader.junk > MAX_JUNK:
            sentence = "what you send as sound is not Ogg/Opus; for 16-bit samples add audio=pcm to the address"
            raise _Hangup(Close.BAD_REQUEST, sentence)
        self._heard_seconds += len(samples) / self.hall.engine.sample_rate
        if len(samples):
            self.session.hear(samples)
        return True

    def _take_control(self, payload: bytes) -> bool:
        if len(payload) != 1 or payload[0] not in set(Control):
            return False
        if self.session is not None and payload[0] in (Control.START, Control.PAUSE):
            self.session.mute(payload[0] == Control.PAUSE)
        return True

    def _check_first_picture(self, payload: bytes) -> None:
        if self.session is not None:
            return
        try:
            self.hall.check_size(payload)
        except InputError as error:
            raise _Hangup(Close.TOO_LARGE, str(error)) from None

    # what goes out ----------------------------------------------------------------------------------------------

    async def _converse(self) -> None:
        kind = "moshi" if self.plain else "chat"
        try:
            self.hall.check(self.query.ticket)  # before a picture is sent for nothing
            picture = await self._first_picture() if self.query.picture_first else None
            opened = await self.hall.session(self.query.settings, picture, kind=kind, ticket=self.query.ticket)
        except Full as error:
            sentence = f"the server is busy: {error}. You would be number {error.position} in the queue"
            raise _Hangup(Close.BUSY, sentence) from None
        except Busy as error:
            raise _Hangup(Close.BUSY, str(error)) from None
        except Closing as error:
            raise _Hangup(Close.GOING_AWAY, str(error)) from None
        except InputError as error:
            raise _Hangup(Close.BAD_REQUEST, str(error)) from None
        take_seat(self.socket)
        async with opened as session:
            if not self.plain:
                await self._send(wire.metadata(self._describe(session)))
            await self._send(wire.HANDSHAKE)
            self.session = session
            self._received = 0
            self._last_received = time.monotonic()
            await first_of(self._speak(session), self._keep_time(session), self._show(session))
        raise _farewell(session.end_reason)

    async def _first_picture(self) -> bytes | None:
        try:
            picture = await in_time(self.pictures.get(), self.socket, self.hall.limits, self._last_received)
        except Overdue as error:
            raise _Hangup(Close.BAD_REQUEST, f"no picture came within {error.seconds:g} s") from None
        self.pictures.is_new(picture)  # remembered, lest it be looked at twice
        return picture or None

    async def _speak(self, session: Session) -> None:
        """Until the conversation is over."""
        writer = OpusWriter() if self.query.audio == "ogg" else PcmWriter(PCM)
        colours = self.query.page or self.query.picture_first
        scale = GateScale.of(self.hall.engine.assistant.config.adapters)
        async for said in session:
            payload = writer.write(said.audio)
            if payload:
                await self._send(wire.message(Kind.AUDIO, payload))
            if said.text:
                await self._send(wire.coloured(said.text, scale.index(said.gate)) if colours else wire.text(said.text))
            if self.query.page:
                self.gates.append((said.frame, round(said.gate, 5)))

    async def _show(self, session: Session) -> None:
        """Pictures that come during the conversation."""
        while True:
            picture = await self.pictures.get()
            report = {"status": "shown" if picture else "removed", "message": ""}
            if self.pictures.is_new(picture):
                try:
                    await session.show(picture or None)
                except InputError as error:
                    self.pictures.forget()
                    report = {"status": "error", "message": str(error)}
            if self.query.page:
                await self._send(wire.metadata({"type": "image", **report}))
            elif report["status"] == "error":
                await self._send(wire.error(report["message"]))

    async def _keep_time(self, session: Session) -> None:
        """End a conversation whose client says nothing, ping when we say nothing, tell the page how it goes."""
        tick = 0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            tick += 1
            now = time.monotonic()
            patience = self._patience()
            if now - self._last_received > patience:
                code = Close.NORMAL if self._received else Close.BAD_REQUEST
                raise _Hangup(code, f"no message came for {patience:g} s, so the conversation is over")
            if self.query.page:
                await self._report(session, with_stats=tick % STATS_TICKS == 0)
            if now - self._last_sent > QUIET_SECONDS:
                await self._send(wire.PING)

    def _patience(self) -> float:
        """Who has sent a picture is there, though the microphone may still have to be allowed."""
        limits = self.hall.limits
        if is_arriving(self.socket):
            return SLOWNESS * limits.idle_s
        there = self._received or self.query.picture_first
        return limits.idle_s if there else min(limits.first_message_s, limits.idle_s)

    async def _report(self, session: Session, *, with_stats: bool) -> None:
        if self.gates:
            (frame, _), values = self.gates[0], [gate for _, gate in self.gates]
            self.gates = []
            await self._send(wire.metadata({"type": "gate", "frame": frame, "values": values}))
        if with_stats:
            stats = {
                "type": "stats",
                "frame": session.frames,
                "dropped": session.dropped,
                "lost": session.lost,
                "queue_ms": round(session.call.queued * self.hall.engine.period * 1000),
                "ignored": self.ignored,
            }
            await self._send(wire.metadata(stats))

    async def _send(self, data: bytes) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self.socket.send_bytes(data)
        except TimeoutError:
            raise _Hangup(Close.INTERNAL, f"the client took no message for {SEND_SECONDS:g} s") from None
        except RuntimeError as error:  # closed by us or by the client, in another task
            raise WebSocketDisconnect(1006) from error
        self._last_sent = time.monotonic()

    def _describe(self, session: Session) -> dict[str, Any]:
        """The first metadata: what the released page wants, and for ours everything that it shows."""
        config = self.hall.engine.assistant.config
        values = wire.stock_metadata(
            self.query.settings,
            model=config.name,
            image_size=config.vision.image_size if config.vision is not None else 0,
            name=f"moshivis_{session.id[:6]}",
        )
        if self.query.page:
            values |= {"type": "settings", **describe(self.hall)}
            values |= {"sampling": dataclasses.asdict(self.query.settings), "session_s": self.hall.limits.session_s}
        return values


class _Pictures:
    """The latest picture that has not been looked at yet."""

    def __init__(self) -> None:
        self._waiting: bytes | None = None
        self._there = asyncio.Event()
        self._digest = b""

    def put(self, picture: bytes) -> None:
        """An empty one stands for none."""
        self._waiting = picture
        self._there.set()

    async def get(self) -> bytes:
        await self._there.wait()
        self._there.clear()
        picture, self._waiting = self._waiting, None
        assert picture is not None
        return picture

    def is_new(self, picture: bytes) -> bool:
        """Whether it is not, byte for byte, the one that was last asked about."""
        before, self._digest = self._digest, hashlib.blake2b(picture, digest_size=16).digest()
        return self._digest != before

    def forget(self) -> None:
        """The latest picture was no good: it may be tried again."""
        self._digest = b""


def _farewell(reason: str) -> _Hangup:
    """What to tell a client when its conversation is over by itself."""
    match reason.partition(":")[0]:
        case "length" | "time limit":
            return _Hangup(Close.NORMAL, "the conversation has reached its limit", is_error=False)
        case "server is stopping" | "engine stopped":
            return _Hangup(Close.GOING_AWAY, "the server is stopping")
        case "closed":
            return _Hangup(Close.NORMAL, "the conversation is over", is_error=False)
    return _Hangup(Close.INTERNAL, "the model failed; the server's log says more")
