"""A server among strangers who mean no good: nothing crashes or leaks, and the conversation beside notices nothing."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from abuse_support import DOORS, FRAMES, check_well, converse, hostile_pictures, malformed
from moshivis.inference.conversation import Assistant
from serve_support import PATIENCE, RunningServer, serving

MESSAGES = 10_000


@pytest.fixture(scope="module")
def server(mini: Assistant) -> Iterator[RunningServer]:
    with serving(mini, sessions=4, first_message_s=300.0, idle_s=300.0, heartbeat_s=60.0) as running:
        yield running


@contextmanager
def a_quiet_conversation(server: RunningServer) -> Iterator[None]:
    """Beside whatever happens, one that must have the same bits as if it were alone."""
    alone = converse(server)
    busy, seated, found = threading.Event(), threading.Event(), list[list[bytes]]()
    thread = threading.Thread(target=lambda: found.append(converse(server, lambda: not busy.is_set(), seated.set)))
    thread.start()
    assert seated.wait(PATIENCE)  # or the strangers take its place
    try:
        yield
    finally:
        busy.set()
        thread.join(PATIENCE)
    assert found and found[0][:FRAMES] == alone


async def pester(server: RunningServer, rng: random.Random, messages: int) -> int:
    """Send malformed messages through all doors, over and over; the number that went out."""
    sent = 0
    while sent < messages:
        with suppress(OSError, WebSocketException, TimeoutError):
            address = server.ws + rng.choice(DOORS)
            async with connect_async(address, compression=None, open_timeout=PATIENCE, close_timeout=5) as client:
                for _ in range(rng.randint(1, 60)):
                    message = malformed(rng)
                    await client.send(
                        message.encode("utf-8", "replace").decode() if isinstance(message, str) else message
                    )
                    sent += 1
    return sent


def test_ten_thousand_malformed_messages(server: RunningServer) -> None:
    async def three() -> list[int]:
        return list(await asyncio.gather(*(pester(server, random.Random(i), MESSAGES // 3 + 1) for i in range(3))))

    with a_quiet_conversation(server):
        assert sum(asyncio.run(three())) >= MESSAGES
    check_well(server)


@pytest.mark.parametrize("name", list(hostile_pictures()))
def test_hostile_pictures(server: RunningServer, name: str) -> None:
    """Refused with a sentence, or shown (an animation is its first frame); in the middle of a call it goes on."""
    picture = hostile_pictures()[name]
    with connect(f"{server.ws}/api/chat?audio=pcm&page=1&picture=0", compression=None, open_timeout=PATIENCE) as client:
        while client.recv(timeout=PATIENCE)[0] != 0:
            pass
        client.send(b"\x08" + picture)
        while True:
            client.send(b"\x01" + bytes(3840))
            message = client.recv(timeout=PATIENCE)
            if message[0] == 4 and (told := json.loads(message[1:])).get("type") == "image":
                break
        assert told["status"] == ("shown" if name == "animated" else "error")
        assert told["message"] or name == "animated"
        client.send(b"\x01" + bytes(3840))
        while client.recv(timeout=PATIENCE)[0] != 1:
            pass
    server.wait_idle()


def test_half_open_sockets_and_clients_that_never_read(server: RunningServer) -> None:
    silent = [socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) for _ in range(20)]
    for one in silent[:10]:
        one.sendall(b"GET /api/chat HTTP/1.1\r\nHost: localhost\r\nUpgrade: webso")
    address = f"{server.ws}/api/chat?audio=pcm"
    with a_quiet_conversation(server), connect(address, compression=None, open_timeout=PATIENCE, max_queue=1) as deaf:
        for _ in range(30):
            deaf.send(b"\x01" + bytes(3840 * 8))
            time.sleep(0.05)
        deaf.socket.shutdown(socket.SHUT_RDWR)
    for one in silent:
        one.close()
    check_well(server)


def test_clients_that_are_killed(server: RunningServer) -> None:
    code = "import sys, time; from websockets.sync.client import connect\n" + (
        f"c = connect('{server.ws}/api/chat?audio=pcm', compression=None, open_timeout={PATIENCE})\n"
        "print('in', flush=True)\nwhile True: c.send(b'\\x01' + bytes(3840)); time.sleep(.08)"
    )
    with a_quiet_conversation(server):
        clients = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
        for client in clients:
            assert client.stdout is not None and client.stdout.readline() == b"in\n"
            client.send_signal(signal.SIGKILL)
            client.wait()
            client.stdout.close()
    check_well(server)


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_fifty_connections_a_second(server: RunningServer, seconds: int) -> None:
    async def come_and_go() -> None:
        with suppress(OSError, WebSocketException, TimeoutError):
            async with connect_async(server.ws + "/api/chat?audio=pcm", compression=None, open_timeout=PATIENCE) as one:
                await one.send(b"\x01" + bytes(3840))

    async def storm() -> None:
        tasks = []
        for _ in range(50 * seconds):
            tasks.append(asyncio.create_task(come_and_go()))
            await asyncio.sleep(0.02)
        await asyncio.gather(*tasks)

    with a_quiet_conversation(server):
        asyncio.run(storm())
    check_well(server)
