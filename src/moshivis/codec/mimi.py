"""Mimi: waveform <-> codes, over whole signals and streamed (reference facts, mimi.md 2.10, 3).

`encode`/`decode` take whole signals. `encode_step`/`decode_step` take the next frames of a batch of streams whose
memory is in a `CodecState`; rows start, pause (`active`) and reset independently. Both paths run the same modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.codec.istft import ISTFTDecoder
from moshivis.codec.quantizer import SplitQuantizer
from moshivis.codec.seanet import SEANetDecoder, SEANetEncoder
from moshivis.codec.transformer import CodecTransformer, TransformerState
from moshivis.config import CodecConfig
from moshivis.layers.conv import CausalConv1d, CausalConvTranspose1d


@dataclass
class CodecState:
    """Memory of a batch of streams, of the encoder or of the decoder."""

    convolutions: Any
    transformer: TransformerState
    resample: Any

    def reset(self, rows: Tensor) -> None:
        """Start the streams in `rows` [B] bool anew."""
        _reset([self.convolutions, self.transformer, self.resample], rows)


def _reset(state: Any, rows: Tensor) -> None:
    if isinstance(state, list):
        for part in state:
            _reset(part, rows)
    else:
        state.reset(rows)


@dataclass(frozen=True)
class CodecOutput:
    wave: Tensor  # [B, 1, T] reconstruction
    codes: Tensor  # [B, K, F]
    semantic: Tensor  # [B, D, F] output of the semantic codebook, for distillation
    penalty: Tensor  # commitment, a scalar


class Mimi(nn.Module):
    """The codec. Waveforms are [B, 1, samples] in -1..1, codes [B, K, F] int64, one column an 80 ms frame."""

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.config = config
        dim, stride = config.dimension, config.resample_stride
        self.encoder = SEANetEncoder(config.seanet, dim)
        self.encoder_transformer = CodecTransformer(dim, config.transformer)
        self.downsample = CausalConv1d(dim, dim, 2 * stride, stride=stride, bias=False, pad="replicate")
        self.quantizer = SplitQuantizer(dim, config.quantizer)
        self.upsample = CausalConvTranspose1d(dim, dim, stride, depthwise=True, bias=False)
        self.decoder_transformer = CodecTransformer(dim, config.transformer)
        self.decoder: SEANetDecoder | ISTFTDecoder
        if config.decoder == "istft":
            self.decoder = ISTFTDecoder(config.istft, dim, config.hop)
        else:
            self.decoder = SEANetDecoder(config.seanet, dim)

    # whole signals ----------------------------------------------------------------------------------------------

    def encode(self, wave: Tensor, num_codebooks: int | None = None) -> Tensor:
        """[B, 1, L] -> codes [B, K, ceil(L / frame_size)]; the waveform is zero-padded on the right.

        Raises ValueError if the waveform is empty or `num_codebooks` is not between 1 and the number stored.
        """
        return self.quantizer.encode(self.encode_to_latent(wave), self._check_codebooks(num_codebooks))

    def encode_to_latent(self, wave: Tensor) -> Tensor:
        """[B, 1, L] -> [B, D, ceil(L / frame_size)], before the quantizer."""
        if wave.shape[-1] == 0:
            raise ValueError("the waveform is empty")
        wave = F.pad(wave, (0, -wave.shape[-1] % self.config.frame_size))
        return self._normalise(self.downsample(self.encoder_transformer(self.encoder(wave))))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes [B, K, F], any K from 1 to the number stored, -> waveform [B, 1, F * frame_size].

        Raises ValueError for another shape, and on a CPU IndexError for a number that is no code.
        """
        return self.decode_latent(self.quantizer.decode(self._check_codes(codes)))

    def decode_latent(self, latent: Tensor) -> Tensor:
        """[B, D, F] -> [B, 1, F * frame_size]."""
        return self.decoder(self.decoder_transformer(self.upsample(latent)))

    def forward(self, wave: Tensor, num_codebooks: int | None = None, bypass: Tensor | None = None) -> CodecOutput:
        """Training pass: waveform in whole frames -> reconstruction; `bypass` [B] bool skips the quantizer in rows."""
        quantized = self.quantizer(self.encode_to_latent(wave), self._check_codebooks(num_codebooks), bypass)
        wave = self.decode_latent(quantized.latent)
        return CodecOutput(wave, quantized.codes, quantized.semantic, quantized.penalty)

    # streams ----------------------------------------------------------------------------------------------------

    def new_encoder_state(self, batch: int, *, frames: int = 1) -> CodecState:
        """Memory of `batch` new streams.

        With `frames` above 1 a call may bring so many, and gives what calls of one frame each would. Without, the first
        frames of a call that brings many see less of the past than a live conversation's do, as in the released code.
        """
        transformer = self._transformer_state(self.encoder_transformer, batch, frames)
        return CodecState(self.encoder.new_state(batch), transformer, self.downsample.new_state(batch))

    def new_decoder_state(self, batch: int, *, frames: int = 1) -> CodecState:
        """As `new_encoder_state`."""
        transformer = self._transformer_state(self.decoder_transformer, batch, frames)
        return CodecState(self.decoder.new_state(batch), transformer, self.upsample.new_state(batch))

    def _transformer_state(self, transformer: CodecTransformer, batch: int, frames: int) -> TransformerState:
        stride = self.config.resample_stride
        return transformer.new_state(batch, spare=(frames - 1) * stride, group=stride)

    def encode_step(
        self, state: CodecState, wave: Tensor, active: Tensor | None = None, num_codebooks: int | None = None
    ) -> Tensor:
        """The next frames [B, 1, n * frame_size] of every stream -> codes [B, K, n].

        Rows that are not `active` [B] keep their state; their codes mean nothing.
        Raises ValueError, and leaves the state as it was, unless the call brings whole frames that fit into the
        attention window.
        """
        number = self._check_codebooks(num_codebooks)
        return self.quantizer.encode(self.encode_step_to_latent(state, wave, active), number)

    def encode_step_to_latent(self, state: CodecState, wave: Tensor, active: Tensor | None = None) -> Tensor:
        """As `encode_step`, but the latent [B, D, n] before the quantizer."""
        if wave.shape[-1] == 0 or wave.shape[-1] % self.config.frame_size:
            raise ValueError(f"feed whole frames of {self.config.frame_size} samples, not {wave.shape[-1]}")
        self._check_frames(state, wave.shape[-1] // self.config.frame_size)
        x = self.encoder.step(state.convolutions, wave, active)
        x = self.encoder_transformer.step(state.transformer, x, active)
        return self._normalise(self.downsample.step(state.resample, x, active))

    def decode_step(self, state: CodecState, codes: Tensor, active: Tensor | None = None) -> Tensor:
        """The next codes [B, K, n] of every stream -> waveform [B, 1, n * frame_size]; errors as in `encode_step`."""
        self._check_frames(state, codes.shape[-1])
        x = self.quantizer.decode(self._check_codes(codes))
        x = self.upsample.step(state.resample, x, active)
        x = self.decoder_transformer.step(state.transformer, x, active)
        return self.decoder.step(state.convolutions, x, active)

    # ------------------------------------------------------------------------------------------------------------

    def _normalise(self, latent: Tensor) -> Tensor:
        if not self.config.latent_norm:
            return latent
        return latent * torch.rsqrt(latent.square().mean(dim=1, keepdim=True) + 1e-5)

    def _check_codebooks(self, num_codebooks: int | None) -> int:
        number = self.config.num_codebooks if num_codebooks is None else num_codebooks
        if not 1 <= number <= self.quantizer.num_codebooks:
            raise ValueError(f"the codec has 1 to {self.quantizer.num_codebooks} codebooks, not {number}")
        return number

    def _check_frames(self, state: CodecState, frames: int) -> None:
        most = state.transformer.ring.longest // self.config.resample_stride
        if frames > most:
            raise ValueError(f"one call may feed at most {most} frames (the attention window), not {frames}")

    def _check_codes(self, codes: Tensor) -> Tensor:
        if codes.ndim != 3 or codes.shape[-1] == 0:
            raise ValueError(f"codes must be [B, K, F] with at least one frame, not {list(codes.shape)}")
        self._check_codebooks(codes.shape[1])
        return codes
