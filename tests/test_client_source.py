"""Where the user's sound comes from, and where the assistant's goes."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moshivis.client.recording import FRAME, MAX_BUFFER
from moshivis.client.source import Devices
from moshivis.errors import InputError


class NoSound(Exception):
    """As PortAudioError."""


class Stream:
    """A sound card's, for machines that have none."""

    broken = ""

    def __init__(self, **options: Any):
        if self.broken == "made":
            raise NoSound("no device")

    def start(self) -> None:
        if self.broken == "started":
            raise NoSound("no device")

    def close(self) -> None:
        pass


@pytest.mark.parametrize("when", ["made", "started"])
@pytest.mark.parametrize("which", ["microphone", "loudspeaker"])
def test_the_device_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, which: str, when: str) -> None:
    broken = type("Broken", (Stream,), {"broken": when})
    streams: dict[str, type] = {"InputStream": Stream, "OutputStream": Stream}
    streams["InputStream" if which == "microphone" else "OutputStream"] = broken
    monkeypatch.setitem(sys.modules, "sounddevice", SimpleNamespace(**streams, PortAudioError=NoSound))

    async def use() -> None:
        async with Devices():
            raise AssertionError("there is none")

    with pytest.raises(InputError, match=f"the {which} cannot be used: no device"):
        asyncio.run(use())


def test_a_loudspeaker_that_begins_late_plays_the_newest_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", SimpleNamespace())
    devices = Devices()
    for number in range(100):
        devices.play(np.full(FRAME, float(number), np.float32))
    heard = [devices._take(FRAME)[0] for _ in range(MAX_BUFFER // FRAME + 1)]
    assert heard == list(range(100 - len(heard), 100))
    assert not devices._take(FRAME).any()
