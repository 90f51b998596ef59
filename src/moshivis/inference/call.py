"""One conversation of the engine, seen from outside: frames and pictures go in, what the assistant says comes out."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moshivis.adapters.gated_cross_attention import ImageKV
from moshivis.errors import InputError
from moshivis.inference.rows import RowSettings
from moshivis.speech_lm.tokenizer import TextStream

Audio = NDArray[np.float32]
_UNCHANGED: Any = object()
MAX_CREDIT = 3.0  # frames that a call may run ahead of the clock, to make up for a network that held them back
GAP_PERIODS = 2.5  # without a frame for so long, a user is taken to be silent
DRIFT = 1.01  # clocks of sound cards differ: a call may be so much faster than ours


@dataclass(frozen=True, kw_only=True)
class CallSettings(RowSettings):
    """All that a conversation can choose for itself."""

    gate_delay: int = 0  # steps with a picture in view before the adapters act
    max_frames: int | None = None  # the call ends after so many; None = never
    on_gap: Literal["park", "silence"] = "park"  # without frames from the user: wait for them, or hear silence

    def check(self) -> None:
        """Raises InputError naming the first value that is out of its range."""
        super().check()
        for name, least, needed in (("gate_delay", 0, True), ("max_frames", 1, False)):
            value = getattr(self, name)
            if (needed or value is not None) and (not isinstance(value, int) or not least <= value < 2**31):
                raise InputError(f"{name} must be a whole number from {least} on, not {value!r}")
        if self.on_gap not in ("park", "silence"):
            raise InputError(f"on_gap must be park or silence, not {self.on_gap!r}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Said:
    """What the assistant says in one 80 ms frame."""

    frame: int  # its number in the call, from 0
    audio: Audio  # [frame_size]
    text: str  # what the frame adds to the transcript, mostly nothing
    token: int | None  # None in the first frames, which are not complete yet
    gate: float  # how much the adapters let through, averaged as the release does


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Nothing follows."""

    reason: str  # "closed", "length", "engine stopped", "error: ...", or what `Call.end` was given


Deliver = Callable[[Said | Ended], None]


class Call:
    """A running conversation. Every method may be called from any thread; none waits for the model."""

    def __init__(
        self, number: int, settings: CallSettings, deliver: Deliver, text: TextStream, frame_size: int, bound: int
    ):
        self.id = number
        self.settings = settings
        self.frames = 0  # of the assistant, so far
        self.dropped = 0
        self._text, self._deliver = text, deliver
        self._frame_size, self._bound = frame_size, bound
        self._lock = threading.Lock()
        self._queue: deque[Audio] = deque()
        self._rest = np.zeros(0, np.float32)
        self._image: ImageKV | None = _UNCHANGED
        self._credit, self._credited = MAX_CREDIT, 0.0
        self._wake: Callable[[], None] = lambda: None
        self._in_gap = False  # silence stands for the user at present
        self.closing: str | None = None  # why the engine is to end the call
        self.over = False
        self.last_step = 0.0

    @property
    def queued(self) -> int:
        """Frames of the user that wait for the model."""
        return len(self._queue)

    def push(self, samples: Audio) -> int:
        """The user's next samples [n], mono at the engine's rate. Returns the frames dropped to make room for them.

        A queue that is full loses its oldest whole frames. What is not a number is heard as silence.
        """
        fresh = np.clip(np.nan_to_num(np.asarray(samples, np.float32).ravel(), posinf=0.0, neginf=0.0), -1.0, 1.0)
        dropped = 0
        with self._lock:
            if self.over:
                return 0
            joined = np.concatenate([self._rest, fresh]) if len(self._rest) else fresh
            whole = len(joined) // self._frame_size
            skip = max(0, whole - self._bound)  # of one push, only what fits is cut into frames
            for i in range(skip, whole):
                self._queue.append(joined[i * self._frame_size : (i + 1) * self._frame_size])
            self._rest = joined[whole * self._frame_size :].copy()
            dropped = skip + max(0, len(self._queue) - self._bound)
            while len(self._queue) > self._bound:
                self._queue.popleft()
            self.dropped += dropped
        if whole:
            self._wake()
        return dropped

    def set_image(self, image: ImageKV | None) -> None:
        """Show a picture (from `Engine.look`) from the next step on, or none."""
        with self._lock:
            self._image = image

    def close(self) -> None:
        """End the call; `Ended` is delivered when the engine has let it go."""
        self.end("closed")

    def end(self, reason: str) -> None:
        """As `close`, for another reason. The first one counts."""
        self.closing = self.closing or reason
        self._wake()

    # the engine's side ------------------------------------------------------------------------------------------

    def attach(self, wake: Callable[[], None], now: float) -> None:
        self._wake = wake
        self._credited = self.last_step = now

    def due(self, now: float, period: float) -> int:
        """Frames that the call could take now: those that wait (or silence in their place), as far as time allows."""
        with self._lock:
            self._credit = min(MAX_CREDIT, self._credit + (now - self._credited) / period * DRIFT)
            self._credited = now
            waiting = len(self._queue)
            patience = (1.0 if self._in_gap else GAP_PERIODS) * period
            if not waiting and self.settings.on_gap == "silence" and now - self.last_step >= patience:
                waiting = 1
            return min(waiting, int(self._credit))

    def take(self, now: float) -> Audio | None:
        """The next frame [frame_size]; None stands for silence."""
        with self._lock:
            self._credit -= 1.0
            self.last_step = now
            self._in_gap = not self._queue
            return self._queue.popleft() if self._queue else None

    def take_image(self) -> tuple[bool, ImageKV | None]:
        """Whether the picture changed since the last call, and the new one."""
        with self._lock:
            image, self._image = self._image, _UNCHANGED
        return (False, None) if image is _UNCHANGED else (True, image)

    def say(self, audio: Audio, token: int | None, gate: float) -> None:
        text = "" if token is None else self._text.push(token)
        frame = self.frames
        self.frames += 1
        self._deliver(Said(frame=frame, audio=audio, text=text, token=token, gate=gate))
        if self.frames == self.settings.max_frames:
            self.end("length")

    def finish(self) -> None:
        with self._lock:
            self.over = True
            self._queue.clear()
            self._image = None
        self._deliver(Ended(reason=self.closing or "closed"))
