"""A client's sound on its way to the model, for protocols that let it come faster than it is heard.

The model hears 80 ms every 80 ms. A microphone sends just that, and nothing waits here. A program may send a whole
recorded question in one message: then the rest waits until the model has heard what came before, up to a bound beyond
which the oldest frames are dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from moshivis.serve.pcm import Samples

AHEAD = 4  # frames given to the engine before it has heard them, against jitter


class Feed:
    """Cuts a stream into frames, keeps `bound` of them waiting at most, and hands them on as fast as they are heard."""

    def __init__(self, frame_size: int, bound: int, on_drop: Callable[[int], None] = lambda frames: None):
        self.bound, self._on_drop = bound, on_drop
        self.dropped = 0  # frames so far
        self._frame_size = frame_size
        self._waiting: deque[Samples] = deque()
        self._rest = np.zeros(0, np.float32)
        self._ahead = 0
        self._last_said = -1

    @property
    def waiting(self) -> int:
        """Whole frames that have not been handed on."""
        return len(self._waiting)

    def add(self, samples: Samples) -> None:
        """The next samples [T] of the client."""
        joined = np.concatenate([self._rest, samples])
        whole = len(joined) // self._frame_size
        self._waiting.extend(joined[: whole * self._frame_size].reshape(whole, self._frame_size))
        self._rest = joined[whole * self._frame_size :]
        self._drop()

    def finish_frame(self) -> None:
        """The client's sound ends here for now: what is left of it is a frame that ends in silence."""
        if len(self._rest):
            self.add(np.zeros(self._frame_size - len(self._rest), np.float32))

    def clear(self) -> None:
        """Forget what waits."""
        self._waiting.clear()
        self._rest = np.zeros(0, np.float32)

    def set_bound(self, bound: int) -> None:
        self.bound = bound
        self._drop()

    def heard(self, said: int) -> None:
        """The assistant has said its frame number `said`, so it has heard as many."""
        self._ahead = max(0, self._ahead - (said - self._last_said))
        self._last_said = said

    def pump(self, hear: Callable[[Samples], None]) -> None:
        """Hand on what may be heard next."""
        while self._waiting and self._ahead < AHEAD:
            hear(self._waiting.popleft())
            self._ahead += 1

    def _drop(self) -> None:
        surplus = max(0, len(self._waiting) - self.bound)
        for _ in range(surplus):
            self._waiting.popleft()
        self.dropped += surplus
        self._on_drop(surplus)
