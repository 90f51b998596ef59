"""A small word recogniser: log-mel frames, dilated convolutions, word-level CTC.

It knows a closed vocabulary and is trained on original speech. Two uses: its features teach the semantic codebook of
a small codec (the role that WavLM has for the released one, Moshi paper section 3.3.2), and it measures whether the
words of produced speech are those of the text stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.extras import need
from moshivis.layers.spectrogram import magnitude, mel_filterbank

N_FFT, HOP, BANDS = 1024, 240, 80  # 100 frames a second at 24 kHz
BLANK = 0
MARGIN = 20  # frames of silence that are left at both ends of what is transcribed
WIDTH = 192


@dataclass(frozen=True, kw_only=True)
class RecogniserConfig:
    words: tuple[str, ...]  # vocabulary; class i + 1 is words[i]
    width: int = WIDTH
    num_blocks: int = 6
    sample_rate: int = 24000


class _Block(nn.Module):
    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation)
        self.norm = nn.GroupNorm(1, width)
        self.mix = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(F.gelu(self.norm(self.conv(x))))


class Recogniser(nn.Module):
    """Waveform [B, T] -> word log-probabilities [B, T / 960, 1 + words] at 25 Hz."""

    def __init__(self, config: RecogniserConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.stem = nn.Sequential(
            nn.Conv1d(BANDS, width, 5, stride=2, padding=2), nn.GELU(), nn.Conv1d(width, width, 5, stride=2, padding=2)
        )
        self.blocks = nn.ModuleList(_Block(width, 2 ** (i % 3)) for i in range(config.num_blocks))
        self.norm = nn.GroupNorm(1, width)
        self.head = nn.Conv1d(width, 1 + len(config.words), 1)

    def features(self, wave: Tensor) -> Tensor:
        """[B, T], T a multiple of 960 -> [B, width, T / 960]."""
        with torch.autocast(wave.device.type, enabled=False):
            mel = mel_filterbank(BANDS, N_FFT, self.config.sample_rate).to(wave.device)
            x = (mel @ magnitude(wave, N_FFT, HOP)[..., :-1] + 1e-3).log()
            if self.training:
                x = _perturb(x)
            x = x - x.mean(dim=(1, 2), keepdim=True)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, wave: Tensor) -> Tensor:
        return self.head(self.features(wave)).float().log_softmax(dim=1).transpose(1, 2)

    @torch.no_grad()
    def transcribe(self, wave: Tensor) -> list[str]:
        """Most likely words of wave [T]: greedy CTC, on what lies between the silences at its ends."""
        wave = _trim(wave)
        wave = F.pad(wave, (0, -wave.shape[-1] % (4 * HOP)))
        best = self(wave[None])[0].argmax(dim=-1)
        collapsed = torch.unique_consecutive(best).tolist()
        return [self.config.words[i - 1] for i in collapsed if i != BLANK]


def _trim(wave: Tensor) -> Tensor:
    """Without the 10 ms frames at both ends that are 34 dB below the loudest, but for MARGIN of them: words begin and
    end softly, and a word at the very edge is not heard."""
    levels = F.pad(wave, (0, -len(wave) % HOP)).unflatten(0, (-1, HOP)).square().mean(-1).sqrt()
    loud = (levels > 0.02 * levels.max()).nonzero()[:, 0]
    return wave if not len(loud) else wave[max(0, int(loud[0]) - MARGIN) * HOP : (int(loud[-1]) + 1 + MARGIN) * HOP]


def _perturb(x: Tensor) -> Tensor:
    """Log-mel frames [B, bands, T] with a noise floor, a tilt, ripples and bands and stretches missing, at random."""
    batch, bands, steps = x.shape
    floor = x.new_empty(batch, 1, 1).uniform_(-7, -2)
    x = torch.logaddexp(x, floor + 0.5 * torch.randn_like(x))
    tilt = torch.linspace(-1, 1, bands, device=x.device)[:, None] * x.new_empty(batch, 1, 1).normal_(0, 0.7)
    x = x + tilt + 0.2 * torch.randn_like(x)
    band, step = torch.arange(bands, device=x.device)[:, None], torch.arange(steps, device=x.device)
    low, at = torch.randint(bands, (batch, 1, 1), device=x.device), torch.randint(steps, (batch, 1, 1), device=x.device)
    hidden = ((band >= low) & (band < low + 8)) | ((step >= at) & (step < at + 6))
    return torch.where(hidden, x.mean(dim=(1, 2), keepdim=True), x)


def word_error_rate(references: Sequence[Sequence[str]], hypotheses: Sequence[Sequence[str]]) -> float:
    """Substitutions, insertions and deletions over the number of reference words, none of which may be empty.

    Raises MoshivisError if the extra `eval` is not installed.
    """
    need(("jiwer",), extra="eval", what="measuring words")
    import jiwer

    return jiwer.wer([" ".join(words) for words in references], [" ".join(words) for words in hypotheses])
