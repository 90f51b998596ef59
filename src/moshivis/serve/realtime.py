"""`/v1/realtime`: the OpenAI Realtime API (GA), as far as a model that listens and speaks at once can honour it.

Reference facts, serving.md sections 3.1 and 3.2. What a client can send:

* `session.update`: formats of `audio.input` and `audio.output` (`audio/pcm` at 24 kHz, `audio/pcmu`, `audio/pcma`), and
  `session.moshivis`: temperatures, top-k, seed and the other settings of a call (until its first sound, picture or
  `response.create`), and `input_buffer_ms` (at any time). Fields that would ask for something that the model cannot do
  (instructions, tools, turn detection, transcription, another voice) are refused; an update is honoured as a whole or
  not at all.
* `input_audio_buffer.append`: sound. It may come faster than time passes, a whole recording in one event too: the rest
  waits to be heard. A live microphone that rather loses sound than falls behind asks for a small `input_buffer_ms`.
  `clear` forgets what waits; `commit` is acknowledged: there is nothing to commit, the model listens all the time.
* `conversation.item.create` with one `input_image`, a data URI: the model sees the picture from now on. At any time;
  but of pictures that come faster than they are looked at the newest counts (`picture_replaced` answers the others).
* `response.create`, `response.cancel`, `conversation.item.truncate` (acknowledged).

The model decides when it speaks; `responses` tells how that becomes responses, and what is sent. Beside the API's own
events there is `moshivis.audio_lost {input_frames, output_frames}`, the frames lost so far because the client was ahead
of the clock, or read too slowly. Anything else is answered with an `error` event, which bears the client's `event_id`
if it is an event at all, an object with a type; the session goes on.
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
    new_id,
    read_format,
    read_picture,
    read_sound,
    shown,
)
from moshivis.serve.hall import Hall
from moshivis.serve.json_call import JsonCall
from moshivis.serve.json_wire import Finish
from moshivis.serve.pcm import PCM, PCMA, PCMU, PcmReader
from moshivis.serve.responses import Event, Responses

FORMATS = (PCM, PCMU, PCMA)
BUFFER_MS = 30_000  # of sound that waits to be heard, unless the client says otherwise

# What a field can be; () = null only, None = read by us or of no consequence. See `Fields.only`.
_EVENT: Known = {"type": None, "event_id": None}
_UNHEARD: Known = {
    "instructions": ("",),
    "tools": ([],),
    "tool_choice": ("auto", "none"),
    "max_output_tokens": ("inf",),
}
_SESSION: Known = {
    **dict.fromkeys(("id", "object", "expires_at", "model", "audio", "moshivis")),
    **_UNHEARD,
    "type": ("realtime",),
    "output_modalities": (["audio"],),
    "include": ([],),
    "parallel_tool_calls": (True, False),
    "prompt": (),
    "reasoning": (),
    "tracing": (),
    "truncation": ("auto", "disabled"),
}
_INPUT: Known = {"format": None, "noise_reduction": (), "transcription": (), "turn_detection": None}
_OUTPUT: Known = {"format": None, "voice": (VOICE,), "speed": (1,)}
_RESPONSE: Known = {
    **_UNHEARD,
    "output_modalities": (["audio"],),
    "conversation": ("auto",),
    "audio": ({},),
    "input": (),
    "metadata": ({},),
    "prompt": (),
}
_ITEM: Known = {
    **dict.fromkeys(("id", "role", "content")),
    "type": ("message",),
    "object": ("realtime.item",),
    "status": ("completed",),
}


def realtime_routes(hall: Hall) -> list[WebSocketRoute]:
    async def realtime(socket: WebSocket) -> None:
        await RealtimeCall(hall, socket).run()

    return [WebSocketRoute("/v1/realtime", realtime)]


class RealtimeCall(JsonCall):
    """One client of the Realtime API."""

    kind = "realtime"

    def __init__(self, hall: Hall, socket: WebSocket):
        super().__init__(hall, socket, BUFFER_MS)
        self.id = new_id("sess")
        self.input = PcmReader(PCM)
        self.output = PCM
        self.responses = Responses()
        self._handlers: dict[str, Callable[[Fields], Awaitable[None]]] = {
            "session.update": self._update,
            "input_audio_buffer.append": self._append,
            "input_audio_buffer.commit": self._commit,
            "input_audio_buffer.clear": self._clear,
            "conversation.item.create": self._create_item,
            "conversation.item.truncate": self._truncate,
            "response.create": self._create_response,
            "response.cancel": self._cancel_response,
        }

    async def begin(self) -> None:
        await self.wire.send("session.created", session=self._session())

    async def handle(self, event: Json) -> None:
        self.begun = True
        handler = self._handlers.get(event["type"])
        if handler is None:
            raise EventError(f"this server knows no event {shown(event['type'])}", code="unknown_event", param="type")
        await handler(Fields(event))

    async def say(self, said: Said) -> None:
        await self._send(self.responses.say(said))

    async def report_loss(self, heard: int, said: int) -> None:
        await self.wire.send("moshivis.audio_lost", input_frames=heard, output_frames=said)

    async def finish(self, finish: Finish) -> None:
        await self._send(self.responses.close("incomplete", finish.reason))
        await self.wire.fail(finish.error)

    async def _send(self, events: list[Event]) -> None:
        for kind, fields in events:
            await self.wire.send(kind, **fields)

    def _session(self) -> Json:
        """The session as it is."""
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": self.id,
            "model": self.hall.engine.assistant.config.name,
            "expires_at": self.expires_at,
            "output_modalities": ["audio"],
            "instructions": "",
            "tools": [],
            "tool_choice": "auto",
            "max_output_tokens": "inf",
            "audio": {
                "input": {
                    "format": self.input.format.to_json(),
                    "noise_reduction": None,
                    "transcription": None,
                    "turn_detection": None,
                },
                "output": {"format": self.output.to_json(), "voice": VOICE, "speed": 1.0},
            },
            "moshivis": self.own_settings(),
        }

    # the client's events -----------------------------------------------------------------------------------------

    async def _update(self, event: Fields) -> None:
        event.only({**_EVENT, "session": None})
        session = event.required_object("session")
        session.only(_SESSION)
        session.string("model")
        heard, spoken = self.input.format, self.output
        audio = session.object("audio")
        if audio is not None:
            audio.only({"input": None, "output": None})
            sound = audio.object("input")
            if sound is not None:
                sound.only(_INPUT)
                if sound.values.get("turn_detection") is not None:
                    message = "must be null: the model listens all the time, and decides by itself when it speaks"
                    raise sound.wrong("turn_detection", message, "unsupported_value")
                format = sound.object("format")
                heard = heard if format is None else read_format(format, FORMATS)
            sound = audio.object("output")
            if sound is not None:
                sound.only(_OUTPUT)
                format = sound.object("format")
                spoken = spoken if format is None else read_format(format, FORMATS)
        own = self.read_own_settings(session)

        self.apply_own_settings(*own)
        if heard != self.input.format:
            self.input = PcmReader(heard)
        self.output = spoken
        self.responses.set_format(spoken)
        await self.wire.send("session.updated", session=self._session())

    async def _append(self, event: Fields) -> None:
        event.only({**_EVENT, "audio": None})
        self.hear(self.input.read(read_sound(event, "audio", self.input.format)))
        self.open_later(event.values)

    async def _commit(self, event: Fields) -> None:
        event.only(_EVENT)
        self.feed.add(self.input.finish())
        self.feed.finish_frame()
        self.pump()
        before, item = self.responses.last_item, new_id("item")
        await self.wire.send("input_audio_buffer.committed", item_id=item, previous_item_id=before)
        content = [{"type": "input_audio", "transcript": None}]  # the model hears, and writes down its own words only
        message = {"type": "message", "role": "user", "status": "completed", "content": content}
        await self._send(self.responses.place({"id": item, "object": "realtime.item", **message}))

    async def _clear(self, event: Fields) -> None:
        event.only(_EVENT)
        self.feed.clear()
        await self.wire.send("input_audio_buffer.cleared")

    async def _create_item(self, event: Fields) -> None:
        event.only({**_EVENT, "item": None, "previous_item_id": None})
        if event.string("previous_item_id") not in (None, self.responses.last_item):
            raise event.wrong("previous_item_id", "must be the last item, or null", "unsupported_value")
        item = event.required_object("item")
        item.only(_ITEM)
        if item.required_string("role") != "user":
            raise item.wrong("role", "can only be user: nothing can be put into the model's mouth", "unsupported_value")
        name = item.string("id") or new_id("item")
        picture, param = self._picture(item)

        async def show() -> None:
            await self.show(picture, param)
            content = [{"type": "input_image", "image_url": None}]  # the client knows it, and it is large
            message = {"type": "message", "role": "user", "status": "completed", "content": content}
            await self._send(self.responses.place({"id": name, "object": "realtime.item", **message}))

        await self.show_later(event.values, show)

    def _picture(self, item: Fields) -> tuple[bytes, str]:
        """The one picture in an item's content, and the path at which it stands."""
        content = item.values.get("content")
        if not isinstance(content, list) or len(content) != 1 or not isinstance(content[0], dict):
            raise item.wrong("content", "must be a list of one object, the picture")
        part = Fields(content[0], f"{item.where('content')}[0]")
        kind = part.required_string("type")
        if kind == "input_text":
            message = "cannot be text: this model is spoken to. (It can read too, without sound: POST /api/ask)"
            raise part.wrong("type", message, "unsupported_content")
        if kind != "input_image":
            raise part.wrong(
                "type", "must be input_image; send sound with input_audio_buffer.append", "unsupported_content"
            )
        part.only({"type": None, "image_url": None, "detail": ("auto", "low", "high")})
        picture = read_picture(part, "image_url", self.limits.picture_bytes)
        if picture is None:
            raise part.wrong("image_url", "is missing", "missing_parameter")
        return picture, part.where("image_url")

    async def _truncate(self, event: Fields) -> None:
        event.only({**_EVENT, "item_id": None, "content_index": None, "audio_end_ms": None})
        item = event.required_string("item_id")
        index, end = event.whole_number("content_index"), event.whole_number("audio_end_ms")
        await self.wire.send("conversation.item.truncated", item_id=item, content_index=index, audio_end_ms=end)

    async def _create_response(self, event: Fields) -> None:
        event.only({**_EVENT, "response": None})
        response = event.object("response")
        if response is not None:
            response.only(_RESPONSE)
        await self._send(self.responses.request())
        self.open_later(event.values)

    async def _cancel_response(self, event: Fields) -> None:
        event.only({**_EVENT, "response_id": None})
        await self._send(self.responses.cancel(event.string("response_id")))
