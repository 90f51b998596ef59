"""`/api/chat` over real sockets, as the clients that exist speak it."""

from __future__ import annotations

from typing import Any

import numpy as np

from chat_client import (
    ASSETS,
    FRAME,
    PICTURE,
    STOCK,
    STOCK_PICTURE,
    client,
    heard,
    metadata,
    noise,
    png,
    talk,
    told_gates,
)
from moshivis.audio import read_audio
from moshivis.serve.opus import OpusWriter
from serve_support import RunningServer

# clients that exist ---------------------------------------------------------------------------------------------------


def test_the_released_moshivis_page(running_server: RunningServer) -> None:
    """Picture, the same picture again, handshake, headers and sound in messages of their own, a rating, a close."""
    with client(running_server, "/api/chat?" + STOCK_PICTURE) as page:
        page.send(8, PICTURE)
        page.send(8, PICTURE)
        first = page.receive()
        assert first is not None and first[0] == 4
        told = metadata(first)
        assert told["text_temperature"] == 0.45 and told["text_topk"] == 25 and told["pad_mult"] == 0
        assert told["lm_model_file"] and told["base_filename"].startswith("moshivis_")
        assert page.receive() == bytes(9)
        talk(page, np.zeros(48000, np.float32))
        page.send(0x0A, b"\x04")
        page.send(8, PICTURE)  # also this late it is no new one
        talk(page, np.pad(read_audio(ASSETS / "example.wav"), (0, 72000)))
    sound = heard(page)
    assert len(sound) == page.count(1) * FRAME and np.abs(sound).max() > 0.01
    coloured = [data for data in page.messages if data[0] == 7]
    assert all(data[1] <= 10 for data in coloured)
    text = "".join(data[2:].decode() for data in coloured)
    assert text.strip() and page.count(2) == 0 and page.count(5) == 0


def test_a_plain_moshi_page(running_server: RunningServer) -> None:
    """It waits for the handshake before anything, and knows no colours."""
    with client(running_server, "/api/chat?" + STOCK) as page:
        first, second = page.receive(), page.receive()
        assert first is not None and first[0] == 4 and second == bytes(9)
        talk(page, noise(5))
    assert page.count(2) > 0 and page.count(7) == 0 and len(heard(page)) == page.count(1) * FRAME


def test_the_moshi_client_of_the_terminal(running_server: RunningServer) -> None:
    """It cannot read colours or metadata, asks for nothing, and sends headers and sound in one message at once."""
    with client(running_server, "/moshi/api/chat") as terminal:
        terminal.send(1, OpusWriter().write(noise(0.16)))  # too early to be heard
        assert terminal.receive() == bytes(9)
        terminal.send(8, PICTURE)  # has no meaning here
        talk(terminal, noise(5))
    assert {data[0] for data in terminal.messages} - {6} == {0, 1, 2}


def test_sixteen_bit_samples(running_server: RunningServer) -> None:
    with client(running_server, "/api/chat?audio=pcm") as pcm:
        pcm.until_kind(0)
        talk(pcm, noise(1), "pcm")
        pcm.send(1, b"odd")  # half a sample means nothing, and harms nothing
        talk(pcm, noise(0.4), "pcm")
    assert all(len(data) == 1 + 2 * FRAME for data in pcm.messages if data[0] == 1)


# our page -------------------------------------------------------------------------------------------------------------


def test_our_page_is_told_more(running_server: RunningServer) -> None:
    with client(running_server, "/api/chat?page=1&seed=3&text_temperature=0.5") as page:
        page.send(8, PICTURE)
        told = page.until_metadata("settings")
        assert told["name"] == "mini" and told["miniature"] is True and told["session_s"] == 3600
        assert told["sampling"]["seed"] == 3 and told["sampling"]["text_temperature"] == 0.5
        assert page.receive() == bytes(9)
        talk(page, noise(2))
        stats = page.until_metadata("stats")
    assert stats == {"type": "stats", "frame": 25, "dropped": 0, "lost": 0, "queue_ms": 0, "ignored": 0}
    values = told_gates(page.messages)
    assert len(values) == 25 and max(values) > 0 and all(0 <= gate <= 1 for gate in values)


def test_a_picture_is_replaced_and_removed_while_talking(running_server: RunningServer) -> None:
    with client(running_server, "/api/chat?page=1&picture=0&audio=pcm") as page:
        page.until_kind(0)

        def gates() -> list[float]:
            """Those of the next frames."""
            told = len(page.messages)
            talk(page, np.zeros(4 * FRAME, np.float32), "pcm")
            while len(values := told_gates(page.messages[told:])) < 4:
                page.receive()
            return values

        def show(picture: bytes) -> dict[str, Any]:
            page.send(8, picture)
            return page.until_metadata("image")

        assert max(gates()) == 0
        assert show(PICTURE)["status"] == "shown"
        assert min(gates()) > 0
        assert show(PICTURE)["status"] == "shown"  # told, though it is no other
        assert min(gates()) > 0
        for _ in range(2):  # told again if tried again
            report = show(b"neither PNG nor JPEG")
            assert report["status"] == "error" and "not a picture" in report["message"]
        assert min(gates()) > 0  # the one before is still in view
        assert show(png("red"))["status"] == "shown"
        assert min(gates()) > 0
        assert show(b"")["status"] == "removed"
        assert max(gates()) == 0


def test_an_empty_first_picture_is_none(running_server: RunningServer) -> None:
    with client(running_server, "/api/chat?page=1") as page:
        page.send(8)
        page.until_kind(0)
        page.send(1, OpusWriter().write(noise(0.08)))
        assert max(page.until_metadata("gate")["values"]) == 0


def test_control_mutes(running_server: RunningServer) -> None:
    """Muted, the model hears silence: the same seed gives the conversation of a user who says nothing."""

    def said(loud: bool) -> bytes:
        with client(running_server, "/api/chat?seed=1&audio=pcm&max_steps=20") as one:
            one.until_kind(0)
            one.send(3, b"\x02")
            one.send(3, b"")
            one.send(3, b"\x63")
            talk(one, noise(1.6) * (30 if loud else 0), "pcm")
            assert one.until_closed()[0] == 1000
        return b"".join(data for data in one.messages if data[0] in (1, 2))

    assert said(True) == said(False)


def test_the_seed_decides(running_server: RunningServer) -> None:
    def said(seed: int) -> bytes:
        with client(
            running_server, f"/api/chat?seed={seed}&max_steps=25&text_temperature=1&audio_temperature=1"
        ) as one:
            one.until_kind(0)
            talk(one, noise(2.0))
            assert one.until_closed()[0] == 1000
        return b"".join(data for data in one.messages if data[0] in (1, 2))

    assert said(5) == said(5) != said(6)
