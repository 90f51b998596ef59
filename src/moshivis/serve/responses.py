"""Turns for clients that think in turns: cuts the assistant's endless stream into responses of the Realtime API.

The model speaks whenever it likes and never says that it has finished. Here a response

* opens with the first words: `response.created`, `response.output_item.added`, `conversation.item.added`,
  `response.content_part.added`;
* goes on frame by frame: `response.output_audio.delta` (80 ms), and `response.output_audio_transcript.delta` with the
  extra field `gate` where the frame has text;
* closes after PAUSE frames without text and sound (or LONG_PAUSE without text: a noisy voice never gets silent):
  `response.output_audio.done`, `response.output_audio_transcript.done`, `response.content_part.done`,
  `response.output_item.done`, `conversation.item.done`, `response.done` with status `completed`.

The silence between two responses is not sent. `response.create` opens a response ahead of the words: its item follows
with them, and if none come within PATIENCE frames it ends as `incomplete`. `response.cancel` closes the open one as
`cancelled`, and nothing is sent until the assistant has paused; the model itself is not interrupted.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moshivis.inference.activity import AUDIBLE, loudness
from moshivis.inference.call import Said
from moshivis.serve.events import VOICE, EventError, Json, encode_sound, new_id
from moshivis.serve.pcm import PCM, AudioFormat, PcmWriter

PAUSE = 12  # frames, 0.96 s
LONG_PAUSE = 50  # 4 s
PATIENCE = 250  # 20 s

Event = tuple[str, Json]  # type, and fields without event_id


class Responses:
    """The conversation's items and the response under way. Every method returns the events that it causes."""

    def __init__(self, format: AudioFormat = PCM):
        self.last_item: str | None = None  # of the conversation, whoever made it
        self._format = format
        self._writer = PcmWriter(format)
        self._response: str | None = None
        self._item: str | None = None  # None until the first words
        self._before: str | None = None  # the item before it
        self._text: list[str] = []
        self._quiet = self._wordless = self._waited = 0  # frames
        self._ignoring = False  # after a cancel, until the assistant pauses

    def set_format(self, format: AudioFormat) -> None:
        """How sound is written from now on."""
        if format != self._format:
            self._format, self._writer = format, PcmWriter(format)

    def place(self, item: Json) -> list[Event]:
        """Put an item of the client, complete, at the end of the conversation."""
        before, self.last_item = self.last_item, item["id"]
        fields = {"previous_item_id": before, "item": item}
        return [("conversation.item.added", fields), ("conversation.item.done", fields)]

    def request(self) -> list[Event]:
        """The client wants a response: open one, if there is none."""
        if self._response is not None:
            return []
        self._ignoring = False
        return [self._open()]

    def say(self, said: Said) -> list[Event]:
        """The assistant's next frame."""
        sounds = loudness(said.audio) >= AUDIBLE
        self._quiet = 0 if said.text or sounds else self._quiet + 1
        self._wordless = 0 if said.text else self._wordless + 1
        paused = self._quiet >= PAUSE or self._wordless >= LONG_PAUSE
        if self._ignoring:
            self._ignoring = not paused
            return []
        events: list[Event] = []
        if said.text and self._item is None:
            events += self._begin()
        if self._item is not None:
            events += self._frame(said)
            return events + (self.close("completed") if paused else [])
        self._waited += 1
        if self._response is not None and self._waited >= PATIENCE:
            events += self.close("incomplete", "no_speech")
        return events

    def cancel(self, response: str | None) -> list[Event]:
        """Raises EventError if no response is open, or not the one that is meant."""
        if self._response is None or response not in (None, self._response):
            raise EventError("there is no such response under way", code="response_cancel_not_active")
        self._ignoring = self._item is not None
        return self.close("cancelled", "client_cancelled")

    def close(self, status: str, reason: str | None = None) -> list[Event]:
        """End the response, if one is open. `status` is `completed`, `cancelled` or `incomplete`."""
        if self._response is None:
            return []
        events: list[Event] = []
        output: list[Json] = []
        if self._item is not None:
            item = self._message("completed" if status == "completed" else "incomplete")
            output.append(item)
            transcript = "".join(self._text)
            rest = self._writer.write(np.zeros(0, np.float32), last=True)
            if rest and status == "completed":
                events.append(self._delta("response.output_audio.delta", delta=encode_sound(rest)))
            events += [
                self._delta("response.output_audio.done"),
                self._delta("response.output_audio_transcript.done", transcript=transcript),
                self._delta("response.content_part.done", part={"type": "audio", "transcript": transcript}),
                ("response.output_item.done", {"response_id": self._response, "output_index": 0, "item": item}),
                ("conversation.item.done", {"previous_item_id": self._before, "item": item}),
            ]
        details = {"type": status, "reason": reason} if reason else None
        events.append(("response.done", {"response": self._resource(status, output, details)}))
        self._response = self._item = None
        return events

    def _open(self) -> Event:
        self._response = new_id("resp")
        self._waited = 0
        return ("response.created", {"response": self._resource("in_progress", [])})

    def _begin(self) -> list[Event]:
        """The first words: open a response, if the client has not, and give it its item."""
        events = [self._open()] if self._response is None else []
        self._item, self._before = new_id("item"), self.last_item
        self.last_item = self._item
        self._text, self._writer = [], PcmWriter(self._format)
        item = self._message("in_progress")
        return events + [
            ("response.output_item.added", {"response_id": self._response, "output_index": 0, "item": item}),
            ("conversation.item.added", {"previous_item_id": self._before, "item": item}),
            self._delta("response.content_part.added", part={"type": "audio", "transcript": ""}),
        ]

    def _frame(self, said: Said) -> list[Event]:
        events: list[Event] = []
        sound = self._writer.write(said.audio)
        if sound:
            events.append(self._delta("response.output_audio.delta", delta=encode_sound(sound)))
        if said.text:
            text = said.text if self._text else said.text.lstrip()
            self._text.append(text)
            gate = round(said.gate, 6)
            events.append(self._delta("response.output_audio_transcript.delta", delta=text, gate=gate))
        return events

    def _delta(self, kind: str, **fields: Any) -> Event:
        place = {"response_id": self._response, "item_id": self._item, "output_index": 0, "content_index": 0}
        return (kind, {**place, **fields})

    def _message(self, status: str) -> Json:
        """The assistant's item."""
        content: list[Json] = []
        if status != "in_progress":
            content.append({"type": "output_audio", "transcript": "".join(self._text)})
        message = {"type": "message", "role": "assistant", "status": status, "content": content}
        return {"id": self._item, "object": "realtime.item", **message}

    def _resource(self, status: str, output: list[Json], details: Json | None = None) -> Json:
        return {
            "object": "realtime.response",
            "id": self._response,
            "status": status,
            "status_details": details,
            "output": output,
            "output_modalities": ["audio"],
            "audio": {"output": {"format": self._format.to_json(), "voice": VOICE}},
            "usage": None,
            "metadata": None,
        }
