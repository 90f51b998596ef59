"""Where the user's sound comes from, and where the assistant's goes."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from moshivis.client.recording import FRAME, MAX_BUFFER
from moshivis.client.source import Devices


def test_a_loudspeaker_that_begins_late_plays_the_newest_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", SimpleNamespace())
    devices = Devices()
    for number in range(100):
        devices.play(np.full(FRAME, float(number), np.float32))
    heard = [devices._take(FRAME)[0] for _ in range(MAX_BUFFER // FRAME + 1)]
    assert heard == list(range(100 - len(heard), 100))
    assert not devices._take(FRAME).any()
