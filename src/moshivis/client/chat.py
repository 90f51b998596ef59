"""A whole conversation with a server: the user's sound and the server's messages, until one of them has had enough."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from moshivis.client.address import Address
from moshivis.client.line import Line, News, Sound, Words, dial
from moshivis.client.recording import Recording
from moshivis.client.source import Devices, Files, Question, Source

CLOSE_SECONDS = 3.0


@dataclass
class Conversation:
    """How it goes, while it goes and afterwards."""

    recording: Recording
    about: dict[str, Any] = field(default_factory=dict)  # what the server tells of itself
    stats: dict[str, Any] = field(default_factory=dict)  # the latest that it tells of the conversation
    interrupted: bool = False
    failure: Exception | None = None  # what ended it before its time


async def converse(
    address: Address,
    query: dict[str, object],
    *,
    picture: bytes | None,
    questions: Sequence[Question],
    token: str | None = None,
    insecure: bool = False,
    seconds: float | None = None,
    record: bool = True,
    on_change: Callable[[Conversation], None] = lambda conversation: None,
) -> Conversation:
    """Talk until the questions are answered, `seconds` are over, the server ends it, or the task is cancelled.

    Without questions the user speaks into the microphone; then sound is kept only if it is to `record`. Being cancelled
    is a way to end: it is noted, not raised.
    Raises ServerError if there is no conversation at all, InputError without microphone; what happens later is
    `failure`, lest what was said so far be lost.
    """
    recording = Recording(keep=record or bool(questions))
    conversation = Conversation(recording)
    devices = None if questions else Devices()
    async with AsyncExitStack() as stack:
        line = await dial(address, query, picture=picture, token=token, insecure=insecure)
        stack.push_async_callback(_hang_up, line)
        if devices is not None:
            await stack.enter_async_context(devices)
        conversation.about = line.about
        on_change(conversation)
        source: Source = Files(questions, recording) if devices is None else devices
        tasks = [
            asyncio.ensure_future(_say(line, source, recording)),
            asyncio.ensure_future(_listen(line, conversation, devices, on_change)),
        ]
        try:
            await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            conversation.interrupted = True
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        if not conversation.interrupted:
            errors = [error for error in ended if isinstance(error, Exception)]
            conversation.failure = errors[0] if errors else None
    return conversation


async def _say(line: Line, source: Source, recording: Recording) -> None:
    while (frame := await source.next()) is not None:
        await line.say(frame)
        recording.say(frame)


async def _listen(
    line: Line,
    conversation: Conversation,
    devices: Devices | None,
    on_change: Callable[[Conversation], None],
) -> None:
    recording = conversation.recording
    async for event in line:
        match event:
            case Sound():
                played = recording.hear(event.samples)
                if devices is not None:
                    devices.play(played)
            case Words():
                recording.read(event)
            case News():
                if event.values.get("type") == "stats":
                    conversation.stats = event.values
        on_change(conversation)
    line.check_end()


async def _hang_up(line: Line) -> None:
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await line.hang_up()
    except TimeoutError:
        pass  # the server does not answer any more; the socket goes with the process
