"""One full-duplex frame for a batch of conversations: user's sound in, assistant's sound and text token out.

80 ms of sound -> codec.encode_step -> generation step -> codec.decode_step -> 80 ms of sound. A batch row is a
conversation; rows start, pause and reset at any frame. After `DuplexState.read_whole_rings` all shapes are static.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moshivis.adapters.gated_cross_attention import ImageKV
from moshivis.codec.mimi import CodecState
from moshivis.inference.generation import Frame, Generator, GeneratorState
from moshivis.inference.sampling import RELEASED_SAMPLING
from moshivis.model import MoshiVis
from moshivis.speech_lm.depth import Choose


@dataclass
class DuplexState:
    """Memory of a batch of conversations between frames."""

    encoder: CodecState
    generator: GeneratorState
    decoder: CodecState

    def reset(self, rows: Tensor) -> None:
        """Start the conversations in `rows` [B] bool anew."""
        self.encoder.reset(rows)
        self.generator.reset(rows)
        self.decoder.reset(rows)

    def read_whole_rings(self) -> None:
        """From now on every step reads all slots of all rings, used or not: the same shapes, and bits, at any age."""
        for ring in (self.encoder.transformer.ring, self.generator.backbone.ring, self.decoder.transformer.ring):
            ring.filled = ring.size


@dataclass(frozen=True)
class DuplexFrame:
    """What one frame returns. Its text was generated a step or more ago, the gate is of this step."""

    audio: Tensor  # [B, 1, frame_size] float32; silence where not valid
    text: Tensor  # [B] text token
    valid: Tensor  # [B] bool, False while the first frame is not complete, and in rows that were not active
    gate: Tensor  # [B] float32


class Duplex:
    """Runs a whole model frame by frame. Itself it remembers nothing."""

    def __init__(self, model: MoshiVis):
        self.codec = model.codec
        self.generator = Generator(model.speech_lm, model.adapters)
        self._heard = model.config.speech_lm.user_codebooks
        self._dtype = next(model.codec.parameters()).dtype

    def new_state(self, batch: int) -> DuplexState:
        return DuplexState(
            self.codec.new_encoder_state(batch), self.generator.new_state(batch), self.codec.new_decoder_state(batch)
        )

    @torch.inference_mode()
    def step(
        self,
        state: DuplexState,
        audio: Tensor,
        image: ImageKV | None = None,
        sampling: Choose = RELEASED_SAMPLING,
        active: Tensor | None = None,
    ) -> DuplexFrame:
        """The user's next frame [B, 1, frame_size] -> the assistant's; other arguments as in `Generator.step`."""
        frame = self.generator.step(state.generator, self.hear(state, audio, active), image, sampling, active)
        return DuplexFrame(self.speak(state, frame), frame.tokens[:, 0], frame.valid, frame.gate)

    @torch.inference_mode()
    def hear(self, state: DuplexState, audio: Tensor, active: Tensor | None = None) -> Tensor:
        """The first part of a step: the user's next frame [B, 1, frame_size] -> its codes [B, K]."""
        return self.codec.encode_step(state.encoder, audio.to(self._dtype), active, num_codebooks=self._heard)[..., 0]

    @torch.inference_mode()
    def speak(self, state: DuplexState, frame: Frame) -> Tensor:
        """The last part of a step: what the generator returned -> sound [B, 1, frame_size], silence if not valid."""
        wave = self.codec.decode_step(state.decoder, frame.tokens[:, 1:, None], frame.valid)
        return torch.where(frame.valid[:, None, None], wave.float(), 0)
