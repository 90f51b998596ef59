"""Strangers who mean no good, and the conversation beside them that must notice nothing."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from websockets.sync.client import connect

import moshivis
from serve_support import PATIENCE, RunningServer

PICTURE = (Path(moshivis.__file__).parent / "assets" / "example.png").read_bytes()
FRAMES = 40
SOUND = (np.random.default_rng(0).standard_normal((FRAMES, 1920)) * 3000).astype("<i2")
DOORS = ("/api/chat", "/api/chat?audio=pcm", "/moshi/api/chat", "/v1/realtime", "/v1/live/sessions")


def converse(
    server: RunningServer, while_: Callable[[], bool] = lambda: False, seated: Callable[[], None] = lambda: None
) -> list[bytes]:
    """Sound of a conversation that gives each frame when it has got the one before, so that none is ever dropped.

    It takes FRAMES frames, and goes on with silence for as long as `while_` says; `seated` is called when it has its
    place.
    """
    said: list[bytes] = []
    address = f"{server.ws}/api/chat?audio=pcm&picture=1&seed=5&text_temperature=0.7&audio_temperature=0.9"
    with connect(address, compression=None, open_timeout=PATIENCE, max_size=None) as client:
        client.send(b"\x08" + PICTURE)
        while client.recv(timeout=PATIENCE)[0] != 0:
            pass
        seated()
        frame = 0
        while frame < FRAMES or while_():
            client.send(b"\x01" + (SOUND[frame].tobytes() if frame < FRAMES else bytes(3840)))
            while (message := client.recv(timeout=PATIENCE, decode=False))[0] != 1:
                pass
            said.append(message[1:])
            frame += 1
    return said


def check_well(server: RunningServer) -> None:
    """Every place is free, and somebody new gets one."""
    server.wait_idle()
    assert server.get("/health").status == 200 and server.get("/ready").status == 200
    assert len(converse(server)) == FRAMES
    server.wait_idle()


def malformed(rng: random.Random) -> bytes | str:
    """A message that no client sends: noise, known kinds with wrong contents, broken JSON, JSON that means nothing."""
    noise = rng.randbytes(rng.choice((0, 1, 2, 30, 300, 5000)))
    events = (
        "session.start session.update session.close session.image.set session.input_audio.append response.create "
        "input_audio_buffer.append conversation.item.create conversation.item.truncate response.cancel nothing"
    ).split()
    values: list[object] = [
        None,
        True,
        -1,
        10**400,
        "",
        "data:image/png;base64,AAAA",
        "%%%",
        [],
        {},
        [[[]]],
        float("nan"),
        "\ud800",
    ]
    match rng.randrange(6):
        case 0:
            return noise
        case 1:
            return bytes([rng.randrange(12)]) + noise
        case 2:
            return b"\x01OggS" + noise
        case 3:
            return noise.decode("latin-1")
        case 4:
            return "[" * rng.choice((1, 50, 4000)) + json.dumps(rng.choice(values))
    names = ("audio", "session", "item", "image_url", "event_id", "delta", "type", "moshivis", "content")
    fields = {rng.choice(names): rng.choice(values) for _ in range(rng.randrange(4))}
    return json.dumps({"type": rng.choice(events), **fields})


def hostile_pictures() -> dict[str, bytes]:
    def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    bomb = saved(Image.new("1", (20_000, 15_000)), "PNG")  # 300 megapixels in a few kilobytes
    frames = [Image.new("P", (64, 64), n) for n in range(20)]
    animated = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    header = PICTURE[:16] + (2**31 - 1).to_bytes(4, "big") * 2 + PICTURE[24:]
    return {
        "bomb": bomb,
        "header of 2^31 pixels a side": header,
        "cut": PICTURE[: len(PICTURE) // 2],
        "animated": animated,
        "not a picture": b"%PDF-1.7" + bytes(1000),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "empty file name": b"\x00",
    }
