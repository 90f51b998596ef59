"""A decoder head that predicts short-time spectra and adds them up.

The spectral counterpart of the SEANet decoder: ConvNeXt blocks at 100 Hz, then one inverse Fourier transform a hop.
For a codec that must become intelligible on a small budget it needs a tenth of the training. It is
causal; the waveform lags the encoded one by n_fft - hop samples, because a sample is complete only once the last
window that covers it is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.config import ISTFTDecoderConfig
from moshivis.layers.conv import CausalConv1d, CausalConvTranspose1d, ConvState, ConvTransposeState
from moshivis.layers.linear import Linear


class ConvNeXtBlock(nn.Module):
    """x + s * MLP(norm(depthwise(x))), on [B, C, T]."""

    def __init__(self, config: ISTFTDecoderConfig):
        super().__init__()
        width = config.channels
        self.depthwise = CausalConv1d(width, width, config.kernel_size, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = Linear(width, config.expansion * width)
        self.contract = Linear(config.expansion * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self._mix(self.depthwise(x))

    def step(self, state: ConvState, x: Tensor, active: Tensor | None = None) -> Tensor:
        return x + self._mix(self.depthwise.step(state, x, active))

    def _mix(self, x: Tensor) -> Tensor:
        y = self.contract(F.gelu(self.expand(self.norm(x.transpose(1, 2)))))
        return (self.scale * y).transpose(1, 2)


@dataclass
class ISTFTDecoderState:
    upsample: ConvTransposeState
    blocks: list[ConvState]
    tail: Tensor  # [B, n_fft - hop] samples that later windows still add to

    def reset(self, rows: Tensor) -> None:
        self.upsample.reset(rows)
        for state in self.blocks:
            state.reset(rows)
        self.tail.masked_fill_(rows[:, None], 0)


class ISTFTDecoder(nn.Module):
    """[B, dimension, T] -> waveform [B, 1, T * hop_in], `hop_in` being the samples of one input step."""

    window: Tensor

    def __init__(self, config: ISTFTDecoderConfig, dimension: int, hop_in: int):
        super().__init__()
        if config.n_fft != 4 * config.hop:
            raise ValueError(f"n_fft must be 4 * hop, not {config.n_fft} and {config.hop}")
        self.config = config
        self.upsample = CausalConvTranspose1d(dimension, config.channels, hop_in // config.hop)
        self.blocks = nn.ModuleList(ConvNeXtBlock(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.channels)
        self.head = Linear(config.channels, config.n_fft + 2)
        # Four Hann windows squared add up to 1.5 everywhere. No checkpoint holds the window, so it is computed even
        # while the rest is built on the meta device.
        self.register_buffer("window", torch.hann_window(config.n_fft, device="cpu") / 1.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.upsample(x)
        for block in self.blocks:
            x = block(x)
        frames = self._frames(x)
        return self._overlap_add(frames, torch.zeros_like(frames[:, 0, : self.config.delay]))[0]

    def _blocks(self) -> list[ConvNeXtBlock]:
        return cast(list[ConvNeXtBlock], list(self.blocks))

    def new_state(self, batch: int) -> ISTFTDecoderState:
        blocks = [block.depthwise.new_state(batch) for block in self._blocks()]
        return ISTFTDecoderState(
            self.upsample.new_state(batch), blocks, self.window.new_zeros(batch, self.config.delay)
        )

    def step(self, state: ISTFTDecoderState, x: Tensor, active: Tensor | None = None) -> Tensor:
        """The next T inputs of every row."""
        x = self.upsample.step(state.upsample, x, active)
        for block, block_state in zip(self._blocks(), state.blocks, strict=True):
            x = block.step(block_state, x, active)
        wave, tail = self._overlap_add(self._frames(x), state.tail)
        state.tail.copy_(tail if active is None else torch.where(active[:, None], tail, state.tail))
        return wave

    def _frames(self, x: Tensor) -> Tensor:
        """[B, C, T] -> windowed pieces of waveform [B, T, n_fft], in float32."""
        y = self.head(self.norm(x.transpose(1, 2))).float()
        magnitude, phase = y.chunk(2, dim=-1)
        magnitude = magnitude.clamp(max=6.0).exp()
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        return torch.fft.irfft(spectrum, n=self.config.n_fft) * self.window.float()

    def _overlap_add(self, frames: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """Sum pieces that start `hop` samples apart: waveform [B, 1, T * hop] and the unfinished tail."""
        batch, steps, n_fft = frames.shape
        hop = self.config.hop
        parts = frames.view(batch, steps, n_fft // hop, hop)
        total = frames.new_zeros(batch, steps + n_fft // hop - 1, hop)
        for i in range(n_fft // hop):
            total[:, i : i + steps] += parts[:, :, i]
        signal = total.flatten(1)
        signal = torch.cat([signal[:, : tail.shape[1]] + tail, signal[:, tail.shape[1] :]], dim=1)
        return signal[:, None, : steps * hop], signal[:, steps * hop :]
