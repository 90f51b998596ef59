"""`moshivis chat`: talk with a server from the terminal, by microphone or with questions from files."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.style import Style
from rich.text import Text

from moshivis.audio import SAMPLE_RATE, write_wav
from moshivis.client.address import Address, read_address
from moshivis.client.printable import printable
from moshivis.errors import InputError
from moshivis.extras import need
from moshivis.files import keep_inputs, read_limited, shown
from moshivis.inference.colour import PALETTE

if TYPE_CHECKING:
    from moshivis.client.chat import Conversation
    from moshivis.client.recording import Recording, Said

INTERRUPTED = 130  # exit status
PICTURE_BYTES = 15 * 2**20  # what servers accept
LINES, RECENT = 12, 1500  # of the transcript while talking, and from how many frames
METER, FLOOR = 12, -48.0  # characters; decibels at which it is empty
PARAGRAPH_FRAMES = 25  # of silence after which the assistant's text begins a new line


def run_chat(arguments: argparse.Namespace) -> int:
    """Talk as the command line says. Raises MoshivisError for anything that the user can mend."""
    need(("websockets",), extra="serve", what="chat")
    from moshivis.client.chat import converse
    from moshivis.client.source import read_questions

    address = read_address(arguments.url)
    out = _output(arguments.out, arguments.audio, arguments.image)
    picture = None
    if arguments.image is not None:
        picture = read_limited(arguments.image, max_bytes=PICTURE_BYTES, noun="picture")
    questions = read_questions(arguments.audio)
    console = Console(stderr=arguments.json, highlight=False, soft_wrap=True, markup=False)
    with _Screen(console, address).shown() as screen:
        conversation = asyncio.run(
            converse(
                address,
                _query(arguments),
                picture=picture,
                questions=questions,
                token=arguments.token or address.token or os.environ.get("MOSHIVIS_TOKEN") or None,
                insecure=arguments.insecure,
                seconds=arguments.seconds,
                record=out is not None,
                on_change=screen.update,
            )
        )
    unwritten = None if out is None else _write(conversation, out)
    if unwritten is not None:
        out = None
    for line in _transcript(conversation.recording):
        console.print(line)
    console.print(_summary(conversation, out), style="dim")
    if arguments.json:
        print(json.dumps(_to_json(conversation, out), ensure_ascii=False))
    failure = conversation.failure or unwritten  # said last, lest what was said be lost
    if failure is not None:
        raise failure
    return INTERRUPTED if conversation.interrupted and questions else 0


def _query(arguments: argparse.Namespace) -> dict[str, object]:
    return {
        "text_temperature": arguments.text_temperature,
        "audio_temperature": arguments.temperature,
        "text_topk": arguments.top_k,
        "audio_topk": arguments.top_k,
        "seed": arguments.seed,
    }


# while talking --------------------------------------------------------------------------------------------------------


class _Screen:
    """The last lines of the transcript and the meters, on a terminal; nothing elsewhere."""

    def __init__(self, console: Console, address: Address):
        self._console, self._address = console, address
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn = 0.0

    @contextmanager
    def shown(self) -> Iterator[_Screen]:
        if not self._console.is_terminal:
            yield self
            return
        with self._live:
            self._live.update(Text(f"calling {self._address.place} …", "dim"), refresh=True)
            yield self

    def update(self, conversation: Conversation) -> None:
        now = time.monotonic()
        if self._console.is_terminal and now - self._drawn > 0.1:
            self._drawn = now
            self._live.update(self._draw(conversation), refresh=True)

    def _draw(self, conversation: Conversation) -> RenderableType:
        lines: list[RenderableType] = [*_transcript(conversation.recording, conversation.recording.said - RECENT)]
        return Group(*lines[-LINES:], _meters(conversation))


def _meters(conversation: Conversation) -> Text:
    recording = conversation.recording
    numbers = f"{recording.clock / SAMPLE_RATE:6.1f} s   buffer {recording.buffered * 1000 // SAMPLE_RATE:3d} ms"
    if recording.missed:
        numbers += f"   missed {recording.missed / SAMPLE_RATE:.1f} s"
    return Text.assemble(
        "you ", _meter(recording.user_level), f"  {_name(conversation)} ", _meter(recording.level), numbers, style="dim"
    )


def _meter(level: float) -> tuple[str, str]:

    decibels = 20 * math.log10(max(level, 1e-9))
    filled = round(METER * min(max(1 - decibels / FLOOR, 0.0), 1.0))
    return "█" * filled + "░" * (METER - filled), "green" if filled < METER - 1 else "red"


def _name(conversation: Conversation) -> str:
    return printable(str(conversation.about.get("name") or conversation.about.get("lm_model_file") or "assistant"))


# afterwards -----------------------------------------------------------------------------------------------------------


def _transcript(recording: Recording, since: int | None = None) -> Iterator[Text]:
    """A line a question, and one or more an answer. All of it, with times; or what came after the frame `since`."""
    delays = iter(recording.delays() if since is None else ())
    for asked, said in recording.turns(max(since or 0, 0)):
        remark = ""
        if asked is not None:
            yield Text.assemble(("You        ", "bold"), asked.label)
            remark = _remark(next(delays, None))
        paragraphs = list(_paragraphs(said))
        if asked is not None and not paragraphs and since is None:
            yield Text.assemble(("Assistant  ", "bold"), ("(says nothing)", "dim"))
        for paragraph in paragraphs:
            yield Text.assemble(("Assistant  ", "bold"), _coloured(paragraph), (remark, "dim"))
            remark = ""


def _remark(delay: float | None) -> str:
    if delay is None:
        return ""
    return f"  after {delay:.0f} ms" if delay >= 0 else f"  barged in {-delay:.0f} ms before the end of the question"


def _paragraphs(said: list[Said]) -> Iterator[list[Said]]:
    begin = 0
    for index in range(1, len(said) + 1):
        if index == len(said) or said[index].frame - said[index - 1].frame > PARAGRAPH_FRAMES:
            yield said[begin:index]
            begin = index


def _coloured(said: list[Said]) -> Text:
    text = Text()
    for piece in said:
        level = piece.words.level
        style = Style() if level is None else Style(color="black", bgcolor=PALETTE[level])
        text.append(printable(piece.words.text if text else piece.words.text.lstrip()), style)
    return text


def _summary(conversation: Conversation, out: Path | None) -> str:
    recording = conversation.recording
    parts = [f"{recording.clock / SAMPLE_RATE:.1f} s with {_name(conversation)}"]
    if conversation.about.get("miniature"):
        parts[0] += " (a miniature model)"
    if recording.missed or recording.skipped:
        late = (recording.missed + recording.skipped) / SAMPLE_RATE
        parts.append(f"{late:.1f} s of the answer came too late")
    if conversation.stats.get("dropped"):
        parts.append(f"the server dropped {printable(str(conversation.stats['dropped']))} frames")
    if out is not None:
        parts.append(f"wrote {shown(out)} (left: you, right: {_name(conversation)})")
    return ", ".join(parts)


def _to_json(conversation: Conversation, out: Path | None) -> dict[str, Any]:
    recording = conversation.recording
    return {
        "model": _name(conversation),
        "text": recording.text,
        "pieces": [
            {"piece": said.words.text, "frame": said.frame, "level": said.words.level} for said in recording.pieces
        ],
        "turns": [
            {
                "question": None if asked is None else asked.label,
                "text": "".join(piece.words.text for piece in said).strip(),
                "reaction_ms": delay,
            }
            for (asked, said), delay in zip(recording.turns(), [None, *recording.delays()], strict=True)
        ],
        "frames_sent": recording.said,
        "frames_received": recording.heard,
        "dropped": conversation.stats.get("dropped"),
        "missed_ms": round(recording.missed * 1000 / SAMPLE_RATE),
        "audio": None if out is None else shown(out),
        "interrupted": conversation.interrupted,
        "error": None if conversation.failure is None else str(conversation.failure),
    }


def _output(name: str | None, audio: Sequence[str], image: str | None) -> Path | None:
    """Checked before anybody is called, lest the conversation be lost."""
    if name is None:
        return None
    out = Path(name)
    if out.suffix.lower() != ".wav":
        raise InputError(f"--out {shown(out)} must end in .wav, the only kind of audio file that is written")
    if out.is_dir():
        raise InputError(f"{shown(out)} is a folder; name a file to be written")
    keep_inputs([out], [*audio, *([] if image is None else [image])])
    return out


def _write(conversation: Conversation, out: Path) -> InputError | None:
    """Write the recording; returns why that was not possible."""
    try:
        write_wav(out, conversation.recording.channels())
    except OSError as error:
        return InputError(f"{shown(out)} cannot be written: {error.strerror or error}")
    return None
