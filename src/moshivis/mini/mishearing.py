"""How a user is misheard in training: codes taken for others, frames heard twice or not at all.

What is heard must rest on all levels and frames, and not on single codes of the voices of training, at their tempo.
"""

from __future__ import annotations

import random

import numpy as np

from moshivis.mini.codes import TAIL_FRAMES
from moshivis.mini.recipe import CODEC

ANY_SHARE = 0.2  # at most, of the codes: heard as any other
ALIKE_SHARE = 0.25  # at most, of the codes: heard as one of those most like them
STUTTER_SHARE = 0.08  # at most, of the frames: heard twice, and as many not at all


class Mishearing:
    """How badly the user of one conversation is heard; `alike` [levels, bins, N] are the codes most like each one."""

    def __init__(self, alike: np.ndarray, rng: random.Random):
        self.alike, self.rng = alike, rng
        self.any, self.confused = rng.uniform(0.0, ANY_SHARE), rng.uniform(0.0, ALIKE_SHARE)
        self.stutter = max(0.0, rng.uniform(-STUTTER_SHARE, STUTTER_SHARE))

    def hear(self, codes: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """What is heard of a clip's codes [K, frames], its tail included, and where each of its frames is in that."""
        noise = np.random.default_rng(self.rng.getrandbits(32))
        levels, choice = np.arange(len(codes))[:, None], noise.integers(0, self.alike.shape[2], codes.shape)
        codes = np.where(noise.random(codes.shape) < self.confused, self.alike[levels, codes, choice], codes)
        others = noise.integers(0, CODEC.quantizer.bins, codes.shape)
        codes = np.where(noise.random(codes.shape) < self.any, others, codes)
        lots = noise.random(codes.shape[1])
        times = np.where(lots < self.stutter, 2, np.where(lots > 1 - self.stutter, 0, 1))
        times[-TAIL_FRAMES:] = 1
        return np.repeat(codes, times, axis=1), (np.cumsum(times) - times).tolist()
