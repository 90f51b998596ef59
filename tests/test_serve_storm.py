"""A minute of strangers of every kind at once, while two conversations go on that must have the same bits.

The strangers live in a process of their own, so that what this one holds is the server's. A first, shorter storm brings
memory to the size that it needs; the second one must leave it there.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import multiprocessing
import os
import random
import resource
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from abuse_support import DOORS, FRAMES, PICTURE, SOUND, check_well, converse, hostile_pictures, malformed
from moshivis.inference.conversation import Assistant
from serve_support import PATIENCE, RunningServer, serving, wait_for

WARM_UP, SECONDS = 20.0, 60.0
STRANGERS = 24  # at once
GROWTH = 32 * 2**20  # bytes of resident memory that the second storm may add
Stranger = Callable[[int, random.Random], Awaitable[None]]


@pytest.fixture(scope="module")
def server(mini: Assistant) -> Iterator[RunningServer]:
    with serving(mini, sessions=4, queue=5, first_message_s=300.0, idle_s=300.0, heartbeat_s=60.0) as running:
        yield running


# strangers: each comes once, and may be cut off at any moment ---------------------------------------------------------


def calling(port: int, path: str) -> connect:
    return connect(
        f"ws://127.0.0.1:{port}{path}", compression=None, open_timeout=PATIENCE, close_timeout=5, max_size=None
    )


async def garbage(port: int, rng: random.Random) -> None:
    async with calling(port, rng.choice(DOORS)) as client:
        for _ in range(rng.randint(1, 40)):
            data = malformed(rng)
            await client.send(data.encode("utf-8", "replace").decode() if isinstance(data, str) else data)


async def good_and_then_gone(port: int, rng: random.Random) -> None:
    """Talks as it should for a while; then its socket is reset, in the middle of a message perhaps."""
    async with calling(port, "/api/chat?audio=pcm&page=1&picture=1") as client:
        await client.send(b"\x08" + PICTURE)
        for frame in range(rng.randint(1, 30)):
            await client.send(b"\x01" + SOUND[frame % FRAMES].tobytes())
            await asyncio.sleep(0.02)
        reset(client)


def reset(client: ClientConnection) -> None:
    raw = client.transport.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.transport.abort()


async def huge(port: int, rng: random.Random) -> None:
    """More than a message may hold, and more than a message of sound may."""
    path = rng.choice(DOORS)
    async with calling(port, path) as client:
        size = rng.choice((2**16 + 2, 2**20, 17 * 2**20))
        await client.send("x" * size if path.startswith("/v1") else b"\x01" + bytes(size))
        await client.recv()


async def bad_picture(port: int, rng: random.Random) -> None:
    picture = rng.choice(list(hostile_pictures().values()))
    if rng.random() < 0.5:
        async with calling(port, "/api/chat?picture=1") as client:
            await client.send(b"\x08" + picture)
            await client.recv()
    else:
        async with calling(port, "/v1/live/sessions") as client:
            address = "data:image/png;base64," + base64.b64encode(picture).decode()
            await client.send(json.dumps({"type": "session.start", "session": {"image": {"image_url": address}}}))
            await client.recv()


async def deaf(port: int, rng: random.Random) -> None:
    """Speaks fast and never reads: its receive buffer is small and stays full."""
    raw = socket.create_connection(("127.0.0.1", port))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    raw.setblocking(False)
    async with connect(
        f"ws://127.0.0.1:{port}/api/chat?audio=pcm", sock=raw, compression=None, open_timeout=PATIENCE, max_queue=1
    ) as client:
        for _ in range(rng.randint(20, 100)):
            await client.send(b"\x01" + bytes(3840 * 4))
            await asyncio.sleep(0.05)
        reset(client)


async def http_junk(port: int, rng: random.Random) -> None:
    junk = [
        rng.randbytes(rng.choice((1, 100, 70_000))),
        b"GET /api/chat HTTP/1.1\r\nHost: localhost\r\nUpgrade: webso",
        b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
        b"POST /api/ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n{",
        b"POST /api/ask HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n[[[[",
        b"POST /api/ask HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"BREW /api/add_user HTTP/9.9\r\n\r\n",
        b"GET /api/add_user HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20,
        b"GET /api/scene?seed=-1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /v1/realtime HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n" + rng.randbytes(300),
    ]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(rng.choice(junk))
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(reader.read(1000), 1.0)
    writer.close()


KINDS: tuple[Stranger, ...] = (garbage, good_and_then_gone, huge, bad_picture, deaf, http_junk)


def storm(port: int, seconds: float, seed: int, path: str) -> None:
    """In a process of its own: how often each kind came goes to `path`, as JSON."""
    came: Counter[str] = Counter()

    async def come_again(number: int, end: float) -> None:
        rng = random.Random(seed * 1000 + number)
        while time.monotonic() < end:
            kind = KINDS[(number + rng.randrange(2)) % len(KINDS)]
            with contextlib.suppress(OSError, EOFError, WebSocketException, TimeoutError):
                came[kind.__name__] += 1
                await asyncio.wait_for(kind(port, rng), 30.0)

    async def everybody() -> None:
        await asyncio.gather(*(come_again(number, time.monotonic() + seconds) for number in range(STRANGERS)))

    asyncio.run(everybody())
    Path(path).write_text(json.dumps(came))


# the test -------------------------------------------------------------------------------------------------------------


def blow(server: RunningServer, seconds: float, seed: int, path: Path) -> Counter[str]:
    """A storm until it is over, and every place free but those of the two conversations."""
    context = multiprocessing.get_context("spawn")
    strangers = context.Process(target=storm, args=(server.port, seconds, seed, str(path)))
    strangers.start()
    strangers.join(seconds + 2 * PATIENCE)
    assert strangers.exitcode == 0
    return Counter(json.loads(path.read_text()))


def held(server: RunningServer) -> tuple[int, int]:
    """Tasks of the event loop, and connections."""
    return server.call(lambda: len(asyncio.all_tasks())), len(server.server.server_state.connections)


def calm(server: RunningServer, usual: tuple[int, int]) -> tuple[int, int]:
    """Wait until nothing is left of strangers; resident memory in bytes, and files that this process holds open."""
    wait_for(lambda: server.hall.active == 2, "the places of the strangers to be free")
    wait_for(lambda: all(now <= then for now, then in zip(held(server), usual, strict=True)), "all to be let go")
    gc.collect()
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    return memory, len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_storm_leaves_conversations_and_server_as_they_were(server: RunningServer, tmp_path: Path) -> None:
    alone = converse(server)
    server.wait_idle()
    over = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        talking = [pool.submit(converse, server, lambda: not over.is_set()) for _ in range(2)]
        try:
            frames = server.hall.engine.stats().frames
            wait_for(lambda: server.hall.engine.stats().frames > frames + 20, "two conversations")
            usual = held(server)
            blow(server, WARM_UP, 1, tmp_path / "warm-up")
            memory, files = calm(server, usual)
            came = blow(server, SECONDS, 2, tmp_path / "storm")
            assert not any(one.done() for one in talking), "a conversation was cut"
            memory_after, files_after = calm(server, usual)
        finally:
            over.set()
        first, second = (one.result(PATIENCE) for one in talking)
    growth = memory_after - memory
    report = {"came": came, "growth_mb": round(growth / 1e6, 1), "frames": [len(first), len(second)], "held": usual}
    print(json.dumps(report))
    both = min(len(first), len(second))
    assert both > FRAMES and first[:both] == second[:both] and first[:FRAMES] == alone
    assert np.frombuffer(b"".join(first), "<i2").std() > 0
    assert all(came[kind.__name__] >= 2 for kind in KINDS)
    assert growth < GROWTH and files_after <= files
    wait_for(lambda: server.call(lambda: server.hall.queued) == 0, "tickets that nobody asks for to expire")
    check_well(server)
