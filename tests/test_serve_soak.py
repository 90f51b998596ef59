"""Conversations for half an hour: memory stays flat, nothing falls ever further behind, nobody is cut off.

The environment variables MOSHIVIS_SOAK_SECONDS and MOSHIVIS_SOAK_SESSIONS set another length and another number of
conversations than two. No assertion asks how fast the machine is: one that cannot keep up drops frames, and drops them
in the open. What is found is printed as a line of JSON (pytest -s).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect

import moshivis
from moshivis.audio import read_audio
from moshivis.inference.conversation import EMBEDDED
from moshivis.serve.limits import Limits
from moshivis.serve.opus import OpusWriter
from moshivis.serve.wire import Kind, message, split
from serve_support import PATIENCE
from server_process import get, started

SECONDS = float(os.environ.get("MOSHIVIS_SOAK_SECONDS", "1800"))
SESSIONS = int(os.environ.get("MOSHIVIS_SOAK_SESSIONS", "2"))
SAMPLE_SECONDS = 10.0 if SECONDS >= 300 else SECONDS / 30
PICTURE_SECONDS = 60.0  # between two pictures of the one who sees
GROWTH = 16 * 2**20  # bytes of resident memory that the server may gain after the first fifth
FRAME_SECONDS, FRAME = 0.08, 1920
QUEUE = 12  # frames of the user that the engine keeps
LAG = QUEUE + Limits().send_buffer_frames + 25  # frames: what the server may hold, and two seconds on the way
ASSETS = Path(moshivis.__file__).parent / "assets"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EMBEDDED["mini"].exists(), reason="the embedded model has not been built yet"),
]


@dataclass
class Talker:
    """What one client sent and got; `lags` are frames that are neither back nor reported as dropped or lost."""

    query: str
    sent: int = 0
    skipped: int = 0  # frames that the client itself could not send in time
    received: int = 0
    pictures: int = 0
    words: int = 0
    dropped: int = 0
    lags: list[tuple[float, int]] = field(default_factory=list)  # seconds since the start, frames

    async def talk(self, address: str, begun: float) -> None:
        """From the handshake until SECONDS have passed. Raises ConnectionClosed if the server ends it before."""
        async with connect(
            f"{address}/api/chat?page=1&{self.query}", compression=None, max_size=None, open_timeout=PATIENCE
        ) as socket:
            if "picture=1" in self.query:
                await self._show(socket, (ASSETS / "example.png").read_bytes())
            async for data in socket:
                if split(bytes(data))[0] is Kind.HANDSHAKE:  # type: ignore[arg-type]
                    break
            tasks = [asyncio.create_task(self._send(socket, begun)), asyncio.create_task(self._read(socket, begun))]
            if "picture=1" in self.query:
                tasks.append(asyncio.create_task(self._look_around(socket, address)))
            done, others = await asyncio.wait(
                tasks, timeout=begun + SECONDS - time.monotonic(), return_when=asyncio.FIRST_COMPLETED
            )
            for task in others:
                task.cancel()
            for task in done:
                task.result()
            assert not done, "a conversation ended before its time"

    async def _send(self, socket: ClientConnection, begun: float) -> None:
        """80 ms every 80 ms; a frame that could not be sent in time is left out."""
        writer = OpusWriter() if "pcm" not in self.query else None
        start = time.monotonic()
        for number, samples in enumerate(speech()):
            delay = start + number * FRAME_SECONDS - time.monotonic()
            if delay < -FRAME_SECONDS:
                self.skipped += 1
                continue
            await asyncio.sleep(max(0.0, delay))
            payload = writer.write(samples) if writer else (samples * 32767).astype("<i2").tobytes()
            await socket.send(message(Kind.AUDIO, payload))
            self.sent += 1

    async def _read(self, socket: ClientConnection, begun: float) -> None:
        async for data in socket:
            kind, payload = split(bytes(data))  # type: ignore[arg-type]
            if kind is Kind.AUDIO:
                self.received += 1
            elif kind is Kind.COLOURED:
                self.words += payload[1:].decode().startswith(" ")
            elif kind is Kind.METADATA and (told := json.loads(payload))["type"] == "stats":
                assert told["ignored"] == 0
                self.dropped = told["dropped"] + told["lost"]
                self.lags.append((time.monotonic() - begun, self.sent - self.received - self.dropped))
            elif kind is Kind.METADATA and told["type"] == "image":
                assert told["status"] == "shown", told
                self.pictures += 1

    async def _look_around(self, socket: ClientConnection, address: str) -> None:
        for seed in itertools.count():
            await asyncio.sleep(min(PICTURE_SECONDS, SECONDS / 5))
            scene = f"{address.replace('ws', 'http', 1)}/api/scene?seed={seed}"
            await self._show(socket, await asyncio.to_thread(get, scene))

    async def _show(self, socket: ClientConnection, picture: bytes) -> None:
        await socket.send(message(Kind.IMAGE, picture))


def speech() -> Iterator[np.ndarray]:
    """Silence, a question, silence for the answer, and again; frames [1920]."""
    question = read_audio(ASSETS / "example.wav")
    turn = np.concatenate([np.zeros(4 * 24000, np.float32), question, np.zeros(4 * 24000, np.float32)])
    yield from itertools.cycle(turn[: len(turn) // FRAME * FRAME].reshape(-1, FRAME))


def measured(metrics: str, name: str) -> float:
    """Sum of a metric over its labels."""
    return sum(map(float, re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", metrics, re.MULTILINE)))


async def soak(http: str, talkers: list[Talker]) -> list[tuple[float, float]]:
    """Let them talk; the server's resident memory in bytes, and when it was measured."""
    begun = time.monotonic()
    talking = [asyncio.create_task(talker.talk(http.replace("http", "ws", 1), begun)) for talker in talkers]
    everybody = asyncio.gather(*talking)
    memory: list[tuple[float, float]] = []
    while not everybody.done():
        await asyncio.wait([everybody], timeout=SAMPLE_SECONDS)
        if not everybody.done():
            metrics = (await asyncio.to_thread(get, f"{http}/metrics")).decode()
            memory.append((time.monotonic() - begun, measured(metrics, "process_resident_memory_bytes")))
            assert measured(metrics, "moshivis_sessions_ended_total") == 0
    await everybody
    return memory


def fifths(samples: list[tuple[float, float]] | list[tuple[float, int]]) -> list[list[float]]:
    """The values of each fifth of the time."""
    return [
        [value for at, value in samples if SECONDS * k / 5 <= at < SECONDS * (k + 1) / 5 or (k == 4 and at >= SECONDS)]
        for k in range(5)
    ]


@pytest.mark.timeout(SECONDS + 600)
def test_conversations_leave_the_server_as_it_was() -> None:
    kinds = ("picture=1", "picture=0&audio=pcm")
    talkers = [Talker(f"{kinds[number % 2]}&seed={number + 1}") for number in range(SESSIONS)]
    limits = ("--sessions", str(SESSIONS), "--session-seconds", str(SECONDS + 900))
    with started("--no-page", "--threads", "1" if SESSIONS <= 2 else "2", *limits) as server:
        http = server.address().rstrip("/")
        memory = asyncio.run(soak(http, talkers))
        metrics = get(f"{http}/metrics").decode()
        status, _ = server.stop()
    lags = [[median(part) for part in fifths(talker.lags)] for talker in talkers]
    first, *later = fifths(memory)
    growth = max(itertools.chain(*later)) - max(first)
    report = {
        "seconds": SECONDS,
        "memory_mb": [round(median(part) / 1e6, 1) for part in (first, *later)],
        "growth_mb": round(growth / 1e6, 2),
        "lag_frames": lags,
        "worst_lag": [max(lag for _, lag in talker.lags) for talker in talkers],
        "ticks": measured(metrics, "moshivis_ticks_total"),
        "missed": measured(metrics, "moshivis_ticks_missed_total"),
        "talkers": [
            {name: value for name, value in vars(talker).items() if isinstance(value, int)} for talker in talkers
        ],
    }
    print(json.dumps(report))
    assert growth < GROWTH
    for talker, lag in zip(talkers, lags, strict=True):
        assert max(lag) <= LAG and lag[-1] - lag[1] <= QUEUE
        assert talker.received > 0 and talker.words > 0
    assert all(talker.pictures >= 3 for talker in talkers[::2])
    assert measured(metrics, "moshivis_sessions_started_total") == SESSIONS
    assert status == 0 and not any("Traceback" in line for line in server.log)
    ends = [line for line in server.log if "ends: chat" in line]
    assert len(ends) == SESSIONS and all(line.endswith("frames, closed") for line in ends)
