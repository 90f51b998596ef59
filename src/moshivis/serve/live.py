"""`/v1/live/sessions`: the OpenAI Live API, full duplex and without turns, which is how this model works.

Reference facts, serving.md section 3.3. The first event is `session.start`: `session.audio.format` (`audio/pcm` at 24
or 16 kHz, `audio/pcmu`, `audio/pcma`; both ways), and of ours `session.image.image_url`, a data URI of the picture to
talk about, and `session.moshivis`, settings of the call as in `/v1/realtime`. All of it is fixed from then on, but the
picture: `session.image.set {image_url}` shows another one, or none for null; `session.image.updated` answers, or an
error: `picture_replaced` if a newer one came before it was looked at.

Both sides speak for as long as they like. `session.output_audio.delta` comes every 80 ms, silence included, and
`session.output_transcript.delta` with the words and the extra field `gate`. A client should send sound, or silence, all
the time; where it sends nothing, the model hears silence. Sound that comes faster than time passes waits for
`input_buffer_ms`, a second if nothing else is said; beyond that the oldest is dropped, of which an `info` event tells.

`session.closed` says why it is over: `close_requested`, `expired`, and, each after an `error` event, `idle_timeout`,
`server_stopping`, `server_error`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from moshivis.inference.call import Said
from moshivis.serve.events import (
    VOICE,
    EventError,
    Fields,
    Json,
    Known,
    client_event_id,
    encode_sound,
    new_id,
    read_format,
    read_picture,
    read_sound,
    shown,
)
from moshivis.serve.hall import Hall
from moshivis.serve.json_call import JsonCall
from moshivis.serve.json_wire import NORMAL, Finish
from moshivis.serve.pcm import PCM, PCM_16K, PCMA, PCMU, PcmReader, PcmWriter

FORMATS = (PCM, PCM_16K, PCMU, PCMA)
BUFFER_MS = 960  # of sound that waits to be heard, unless the client says otherwise
USAGE_FRAMES = 125  # between two reports of usage, 10 s

# What a field can be; () = null only, None = read by us or of no consequence. See `Fields.only`.
_EVENT: Known = {"type": None, "event_id": None}
_SESSION: Known = {
    **dict.fromkeys(("model", "audio", "image", "moshivis", "safety_identifier")),
    "client": (),
    "delegation": (),
    "input": ([],),
    "instructions": ("",),
    "store": (False,),
    "triggers": ([],),
}


def live_routes(hall: Hall) -> list[WebSocketRoute]:
    async def live(socket: WebSocket) -> None:
        await LiveCall(hall, socket).run()

    return [WebSocketRoute("/v1/live/sessions", live)]


class LiveCall(JsonCall):
    """One client of the Live API."""

    kind = "live"
    first_event = "session.start"

    def __init__(self, hall: Hall, socket: WebSocket):
        super().__init__(hall, socket, BUFFER_MS)
        self.id = new_id("live")
        self.input, self.output = PcmReader(PCM), PcmWriter(PCM)
        self.sees = False  # a picture
        self.muted = False
        self._frames = 0
        self._close_event: Json | None = None
        self._handlers: dict[str, Callable[[Fields], Awaitable[None]]] = {
            "session.input_audio.append": self._append,
            "session.input_audio.mute": self._mute,
            "session.input_audio.unmute": self._unmute,
            "session.image.set": self._set_image,
        }

    async def handle(self, event: Json) -> None:
        kind = event["type"]
        if kind == "session.start":
            await self._start(Fields(event))
        elif kind == "session.close":
            self._close_event = event
            raise Finish(NORMAL, "close_requested", "closed by the client", "close_requested")
        elif kind not in self._handlers:
            raise EventError(f"this server knows no event {shown(kind)}", code="unknown_event", param="type")
        elif self.session is None:
            raise EventError("the session has not started; send session.start first", code="session_not_started")
        else:
            await self._handlers[kind](Fields(event))

    async def say(self, said: Said) -> None:
        start, end = said.frame * self.frame_ms, (said.frame + 1) * self.frame_ms
        sound = self.output.write(said.audio)
        if sound:
            await self.wire.send("session.output_audio.delta", delta=encode_sound(sound), start_ms=start, end_ms=end)
        if said.text:
            gate = round(said.gate, 6)
            await self.wire.send(
                "session.output_transcript.delta", delta=said.text, start_ms=start, end_ms=end, gate=gate
            )
        if (said.frame + 1) // USAGE_FRAMES > self._frames // USAGE_FRAMES:
            context = self.hall.engine.assistant.config.speech_lm.backbone.context
            ratio = min(1.0, (said.frame + 1) / context)
            await self.wire.send(
                "session.usage.updated", usage=self._usage(said.frame + 1), context_window={"usage_ratio": ratio}
            )
        self._frames = said.frame + 1

    async def report_loss(self, heard: int, said: int) -> None:
        message = f"{heard} frames of 80 ms were not heard so far, and {said} not sent"
        await self.wire.send("info", code="audio_lost", message=message, input_frames=heard, output_frames=said)

    async def finish(self, finish: Finish) -> None:
        asked = self._close_event is not None
        started = self.session is not None
        if not asked and not (started and finish.reason == "expired"):
            await self.wire.fail(finish.error)
        if asked or started:
            cause = None if self._close_event is None else client_event_id(self._close_event)
            await self.wire.send(
                "session.closed",
                reason=finish.reason,
                session=self._session(),
                usage=self._usage(self._frames),
                client_event_id=cause,
            )

    def _usage(self, frames: int) -> Json:
        return {"seconds": round(frames * self.frame_ms / 1000, 3)}

    def _session(self) -> Json:
        """The session as it is."""
        return {
            "id": self.id,
            "status": "active",
            "expires_at": self.expires_at,
            "model": self.hall.engine.assistant.config.name,
            "audio": {"format": self.input.format.to_json(), "output": {"voice": VOICE}},
            "image": {"shown": self.sees},
            "store": False,
            "moshivis": self.own_settings(),
        }

    # the client's events -----------------------------------------------------------------------------------------

    async def _start(self, event: Fields) -> None:
        if self.session is not None:
            raise EventError("the session has started already", code="session_already_started")
        event.only({**_EVENT, "session": None})
        session = event.required_object("session")
        session.only(_SESSION)
        session.string("model")
        session.string("safety_identifier", limit=1024)
        format = PCM
        audio = session.object("audio")
        if audio is not None:
            audio.only({"format": None, "output": None})
            given = audio.object("format")
            format = PCM if given is None else read_format(given, FORMATS)
            voice = audio.object("output")
            if voice is not None:
                voice.only({"voice": (VOICE,)})
        own = self.read_own_settings(session)
        image = session.object("image")
        picture = None
        if image is not None:
            image.only({"image_url": None})
            picture = read_picture(image, "image_url", self.limits.picture_bytes)

        before = self.settings, self.feed.bound
        self.apply_own_settings(*own)
        try:
            await self.open(picture, "session.image.image_url")
        except EventError:
            self.apply_own_settings(*before)
            raise
        self.input, self.output = PcmReader(format), PcmWriter(format)
        self.sees = picture is not None
        self.begun = True
        await self.wire.send("session.started", session=self._session(), client_event_id=client_event_id(event.values))
        self.start()

    async def _append(self, event: Fields) -> None:
        event.only({**_EVENT, "audio": None})
        sound = read_sound(event, "audio", self.input.format)
        self.hear(self.input.read(sound, muted=self.muted))  # what waits already was said before

    async def _mute(self, event: Fields) -> None:
        await self._set_mute(event, True, "session.input_audio.muted")

    async def _unmute(self, event: Fields) -> None:
        await self._set_mute(event, False, "session.input_audio.unmuted")

    async def _set_mute(self, event: Fields, muted: bool, answer: str) -> None:
        event.only(_EVENT)
        self.muted = muted
        await self.wire.send(answer, client_event_id=client_event_id(event.values))

    async def _set_image(self, event: Fields) -> None:
        event.only({**_EVENT, "image_url": None})
        if "image_url" not in event.values:
            raise event.wrong("image_url", "is missing; null removes the picture", "missing_parameter")
        picture = read_picture(event, "image_url", self.limits.picture_bytes)

        async def show() -> None:
            await self.show(picture, "image_url")
            self.sees = picture is not None
            cause = client_event_id(event.values)
            await self.wire.send("session.image.updated", image={"shown": self.sees}, client_event_id=cause)

        await self.show_later(event.values, show)
