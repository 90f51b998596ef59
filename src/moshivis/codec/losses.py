"""Reconstruction losses in the time-frequency plane, for training the codec.

Log-mel and log-magnitude distances plus spectral convergence over windows of several lengths. A training step takes
a few random resolutions rather than all: the same gradient on average, at a fraction of the work.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from moshivis.layers.spectrogram import magnitude, mel_filterbank

RESOLUTIONS = (128, 256, 512, 1024, 2048)  # window lengths in samples; hop = a quarter
_BANDS = {128: 10, 256: 20, 512: 40, 1024: 64, 2048: 80}


def spectral_loss(estimate: Tensor, target: Tensor, sample_rate: int, windows: Sequence[int]) -> Tensor:
    """Mean over `windows` of log-mel L1 + 0.3 log-magnitude L1 + 0.5 spectral convergence; waves are [B, T]."""
    losses = []
    for window in windows:
        with torch.no_grad():
            reference = magnitude(target, window, window // 4)
        produced = magnitude(estimate, window, window // 4)
        mel = mel_filterbank(_BANDS[window], window, sample_rate).to(target.device)
        log_mel = ((mel @ produced + 1e-3).log() - (mel @ reference + 1e-3).log()).abs().mean()
        log_magnitude = ((produced + 1e-2).log() - (reference + 1e-2).log()).abs().mean()
        convergence = (produced - reference).norm() / reference.norm().clamp(min=1e-3)
        losses.append(log_mel + 0.3 * log_magnitude + 0.5 * convergence)
    return torch.stack(losses).mean()


def random_resolutions(rng: random.Random, count: int = 2) -> list[int]:
    return rng.sample(RESOLUTIONS, count)
