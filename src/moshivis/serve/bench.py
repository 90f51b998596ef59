"""`moshivis bench serve`: how many conversations a server carries, measured by real clients over WebSockets.

For every N a server of N places is started as a process of its own. N clients connect, show a picture, start at one
moment, and each sends 80 ms of Opus every 80 ms: a question, silence for the answer, and again. A client that falls
behind skips frames and counts them; it never catches up in a burst. Clients that are turned away, and what a
conversation lacks that the server ended early, stay in the sums: all those frames count as late.

A frame is late if it comes when a player that began 160 ms after the first frame had nothing left to play. Where
clients skipped a hundredth of the frames or more, it was they who failed, and nothing is said to be sustained.
Output: a table for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from moshivis.audio import read_audio
from moshivis.errors import InputError, MoshivisError
from moshivis.serve.opus import OpusWriter
from moshivis.serve.wire import Kind, message, split

ASSETS = Path(__file__).parents[1] / "assets"
FRAME, SAMPLES = 0.08, 1920  # seconds, samples
JITTER_BUFFER = 0.16  # seconds that a player holds back before it begins
LEAD, PAUSE = 5.0, 5.0  # seconds of silence for the greeting, and for an answer
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine
SUSTAINED = 0.01  # share of ticks and of frames that may be late


@dataclass
class ClientReport:
    """What one client saw."""

    accepted: bool = False
    skipped: int = 0  # frames that the client itself could not send in time
    arrivals: list[float] = field(default_factory=list)  # of the assistant's frames
    reactions: list[float] = field(default_factory=list)  # seconds from the end of a question to the first word

    def late(self, frames: int) -> int:
        """Of the conversation's frames those that came when the player had run dry, or that never came."""
        expected = frames - self.skipped
        if not self.accepted or not self.arrivals:
            return expected
        playing = self.arrivals[0] + JITTER_BUFFER
        behind = sum(at > playing + FRAME * k for k, at in enumerate(self.arrivals))
        return behind + max(0, expected - len(self.arrivals) - 2)  # two may still be on their way


@dataclass(frozen=True)
class LoadReport:
    """One N."""

    sessions: int
    accepted: int
    ticks: int
    missed: int
    tick_p50_ms: float | None  # of the last ticks, some minutes; None if there were none
    tick_p99_ms: float | None
    frames: int  # that the clients sent, or would have
    late: int
    dropped: int
    skipped: int
    reaction_ms: float | None  # median
    memory_mb: float | None

    @property
    def sustained(self) -> bool:
        return (
            self.accepted == self.sessions
            and self.missed < SUSTAINED * max(1, self.ticks)
            and self.late < SUSTAINED * self.frames
            and self.skipped < SUSTAINED * self.frames
        )

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "sustained": self.sustained}


def run_bench_serve(arguments: argparse.Namespace) -> int:
    """Measure every number of sessions in turn, and print table and JSON."""
    try:
        numbers = sorted({int(text) for text in arguments.sessions.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < 1:
        raise InputError(f"--sessions takes numbers from 1 on, like 1,2,4,8, not {arguments.sessions!r}")
    if arguments.seconds < LEAD + PAUSE:
        raise InputError(f"--seconds must be {LEAD + PAUSE:g} at least: a greeting, a question and an answer")
    console = Console(stderr=True)
    reports = []
    for number in numbers:
        with console.status(f"{number} sessions, {arguments.seconds:g} s"), _server(arguments, number) as url:
            reports.append(asyncio.run(measure(url, number, arguments.seconds)))
    Console().print(_table(reports))
    carried = [report.sessions for report in reports if report.sustained]
    ticked = np.array([[report.sessions, report.tick_p50_ms] for report in reports if report.tick_p50_ms is not None])
    added = float(np.polyfit(ticked[:, 0], ticked[:, 1], 1)[0]) if len(ticked) > 1 else None
    summary = {
        "model": arguments.model,
        "seconds": arguments.seconds,
        "sustained": max(carried, default=0),
        "ms_per_added_session": None if added is None else round(added, 3),
        "runs": [report.to_json() for report in reports],
    }
    print(json.dumps(summary))
    return 0


async def measure(url: str, sessions: int, seconds: float) -> LoadReport:
    """Put `sessions` clients on the server at `url` (http://host:port) for `seconds`."""
    question = read_audio(ASSETS / "example.wav")
    messages, ends = _script(question, seconds)
    sees = (await asyncio.to_thread(_get_json, f"{url}/api/info"))["sees"]
    picture = (ASSETS / "example.png").read_bytes() if sees else None
    reports = [ClientReport() for _ in range(sessions)]
    start: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    connected = [asyncio.Event() for _ in range(sessions)]
    clients = [
        asyncio.create_task(_converse(url, picture, messages, ends, start, event, report))
        for event, report in zip(connected, reports, strict=True)
    ]
    await asyncio.gather(*(event.wait() for event in connected))
    before = await asyncio.to_thread(_get_json, f"{url}/api/info")
    start.set_result(time.monotonic() + 0.2)
    await asyncio.sleep(0.2 + seconds)
    after = await asyncio.to_thread(_get_json, f"{url}/api/info")
    memory = await asyncio.to_thread(_memory, url)
    await asyncio.gather(*clients)
    reactions = [reaction for report in reports for reaction in report.reactions]
    ticks = after["ticks"]
    return LoadReport(
        sessions=sessions,
        accepted=sum(report.accepted for report in reports),
        ticks=ticks["count"] - before["ticks"]["count"],
        missed=ticks["missed"] - before["ticks"]["missed"],
        tick_p50_ms=ticks["p50_ms"],
        tick_p99_ms=ticks["p99_ms"],
        frames=sessions * len(messages),
        late=sum(report.late(len(messages)) for report in reports),
        dropped=ticks["dropped"] - before["ticks"]["dropped"],
        skipped=sum(report.skipped for report in reports),
        reaction_ms=float(np.median(reactions)) * 1e3 if reactions else None,
        memory_mb=memory,
    )


def _script(question: np.ndarray, seconds: float) -> tuple[list[bytes], list[int]]:
    """A message for every frame of `seconds`, and the frames after which a question is over."""
    turn = np.concatenate([question, np.zeros(int(PAUSE * 24000), np.float32)])
    frames = int(seconds / FRAME)
    sound = np.concatenate([np.zeros(int(LEAD * 24000), np.float32), *[turn] * (1 + frames * SAMPLES // len(turn))])
    ends = [(int(LEAD * 24000) + k * len(turn) + len(question)) // SAMPLES for k in range(frames)]
    writer = OpusWriter()
    pages = [writer.write(sound[k * SAMPLES : (k + 1) * SAMPLES]) for k in range(frames)]
    return [message(Kind.AUDIO, page) for page in pages], [end for end in ends if end < frames]


async def _converse(
    url: str,
    picture: bytes | None,
    messages: list[bytes],
    ends: list[int],
    start: asyncio.Future[float],
    connected: asyncio.Event,
    report: ClientReport,
) -> None:
    address = url.replace("http", "ws", 1) + "/api/chat" + ("" if picture is None else "?picture=1")
    try:
        async with connect(address, compression=None, max_size=None, proxy=None) as socket:
            if picture is not None:
                await socket.send(message(Kind.IMAGE, picture))
            async for data in socket:
                if split(bytes(data))[0] is Kind.HANDSHAKE:  # type: ignore[arg-type]
                    report.accepted = True
                    break
            connected.set()
            begun = await start
            reader = asyncio.create_task(_read(socket, begun, ends, report))
            await _send(socket, messages, begun, report)
            await asyncio.sleep(2 * FRAME)
            reader.cancel()
    except (OSError, WebSocketException):
        pass  # what did not arrive counts
    finally:
        connected.set()


async def _send(socket: ClientConnection, messages: list[bytes], begun: float, report: ClientReport) -> None:
    for k, data in enumerate(messages):
        delay = begun + k * FRAME - time.monotonic()
        if delay < -FRAME:
            report.skipped += 1
            continue
        await asyncio.sleep(max(0.0, delay))
        await socket.send(data)


async def _read(socket: ClientConnection, begun: float, ends: list[int], report: ClientReport) -> None:
    waiting = list(ends)
    async for data in socket:
        kind, _ = split(bytes(data))  # type: ignore[arg-type]
        now = time.monotonic()
        if kind is Kind.AUDIO:
            report.arrivals.append(now)
        elif kind in (Kind.TEXT, Kind.COLOURED) and waiting:
            passed = [end for end in waiting if begun + end * FRAME <= now]
            if passed:
                report.reactions.append(now - begun - passed[-1] * FRAME)
                waiting = [end for end in waiting if end > passed[-1]]


@contextlib.contextmanager
def _server(arguments: argparse.Namespace, sessions: int) -> Iterator[str]:
    """A server of so many places in a process of its own; its address."""
    command = [sys.executable, "-m", "moshivis", "serve", "--port", "0", "--no-page", "--sessions", str(sessions)]
    command += ["--model", arguments.model, "--device", arguments.device]
    if arguments.threads is not None:
        command += ["--threads", str(arguments.threads)]
    if arguments.download:
        command.append("--download")
    own = {name: value for name, value in os.environ.items() if name != "MOSHIVIS_TOKEN"}  # our clients have none
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=own) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise MoshivisError(f"the server did not start: {process.stderr.read().strip()[-500:]}")
            yield found.group().rstrip("/")
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=15)
            process.kill()


def _get_json(url: str) -> dict[str, Any]:
    with _DIRECT.open(url, timeout=10) as reply:
        return json.load(reply)


def _memory(url: str) -> float | None:
    """Resident memory of the server in 10^6 bytes; None where the server does not know it."""
    with _DIRECT.open(f"{url}/metrics", timeout=10) as reply:
        found = re.search(r"^process_resident_memory_bytes (\S+)$", reply.read().decode(), re.MULTILINE)
    return round(float(found.group(1)) / 1e6, 1) if found else None


def _table(reports: list[LoadReport]) -> Table:
    table = Table(title="conversations at once")
    headings = ("n", "accepted", "tick ms", "p99", "missed", "late", "skipped", "dropped", "reaction ms", "MB", "")
    for heading in headings:
        table.add_column(heading, justify="right")
    for report in reports:
        table.add_row(
            str(report.sessions),
            str(report.accepted),
            "-" if report.tick_p50_ms is None else f"{report.tick_p50_ms:.1f}",
            "-" if report.tick_p99_ms is None else f"{report.tick_p99_ms:.1f}",
            f"{report.missed / max(1, report.ticks):.1%}",
            f"{report.late / report.frames:.1%}",
            f"{report.skipped / report.frames:.1%}",
            str(report.dropped),
            "-" if report.reaction_ms is None else f"{report.reaction_ms:.0f}",
            "-" if report.memory_mb is None else f"{report.memory_mb:.0f}",
            "sustained" if report.sustained else "too many",
        )
    return table
