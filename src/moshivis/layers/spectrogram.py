"""Magnitude spectrograms and the mel scale."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def magnitude(wave: Tensor, n_fft: int, hop: int) -> Tensor:
    """Hann-windowed magnitudes of wave [B, T]: [B, n_fft / 2 + 1, T / hop + 1], float32."""
    window = torch.hann_window(n_fft, device=wave.device)
    return torch.stft(wave.float(), n_fft, hop, window=window, return_complex=True).abs()


@functools.cache
def mel_filterbank(bands: int, n_fft: int, sample_rate: int) -> Tensor:
    """Triangular filters [bands, n_fft / 2 + 1], evenly spaced on the mel scale from 0 to half the sample rate."""

    def to_mel(hertz: Tensor) -> Tensor:
        return 2595 * torch.log10(1 + hertz / 700)

    top = to_mel(torch.tensor(sample_rate / 2))
    edges = 700 * (10 ** (torch.linspace(0, float(top), bands + 2) / 2595) - 1)
    frequencies = torch.linspace(0, sample_rate / 2, n_fft // 2 + 1)
    rising = (frequencies - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequencies) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp(min=0)
