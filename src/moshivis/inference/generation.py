"""Generation, frame by frame: what goes into the model at each step and what comes out (model.md 5.3).

A batch row is a conversation with its own step count: rows start, pause and reset at any step, and a row's tokens do
not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moshivis.adapters.gated_cross_attention import AdapterState, GatedCrossAttention, ImageKV
from moshivis.inference.sampling import RELEASED_SAMPLING
from moshivis.speech_lm.backbone import BackboneState
from moshivis.speech_lm.depth import Choose
from moshivis.speech_lm.lm import SpeechLM
from moshivis.speech_lm.streams import initial_tokens, stream_delays

FREE = -2  # in `forced`: let the model choose


@dataclass
class GeneratorState:
    """Memory of a batch of conversations between steps. M is the largest delay."""

    steps: Tensor  # [B] int64, steps taken
    heard: Tensor  # [B, Ku, M + 1] the latest user codes, newest last
    said: Tensor  # [B, 1 + own, M + 1] the latest generated tokens, newest last
    backbone: BackboneState
    adapters: AdapterState | None

    def reset(self, rows: Tensor) -> None:
        """Start the conversations in `rows` [B] bool anew."""
        self.steps.masked_fill_(rows, 0)
        self.backbone.reset(rows)
        if self.adapters is not None:
            self.adapters.reset(rows)


@dataclass(frozen=True)
class Frame:
    """What one step returns. Text and semantic codes were generated a step or more ago, the gate is of this step."""

    tokens: Tensor  # [B, 1 + own] text and own audio of one and the same frame
    valid: Tensor  # [B] bool, False while the first frame is not complete, and in rows that were not active
    gate: Tensor  # [B] float32, the released aggregate; 0 without image and where not valid


class Generator:
    """Runs a speech LM, and its adapters if it has any, one frame at a time. Itself it remembers nothing."""

    def __init__(self, speech_lm: SpeechLM, adapters: GatedCrossAttention | None = None):
        self.speech_lm = speech_lm
        self.adapters = adapters
        device = speech_lm.text_head.weight.device
        own = 1 + speech_lm.config.own_codebooks
        initial, delays = initial_tokens(speech_lm.config, device), stream_delays(speech_lm.config, device)
        self._max_delay = speech_lm.config.max_delay
        self._own_initial, self._user_initial = initial[:own], initial[own:]
        self._own_delays, self._user_delays = delays[:own], delays[own:]

    def new_state(self, batch: int) -> GeneratorState:
        device, length = self._own_delays.device, self._max_delay + 1
        adapters = None if self.adapters is None else self.adapters.new_state(batch)
        return GeneratorState(
            steps=torch.zeros(batch, dtype=torch.int64, device=device),
            heard=torch.zeros(batch, len(self._user_delays), length, dtype=torch.int64, device=device),
            said=torch.zeros(batch, len(self._own_delays), length, dtype=torch.int64, device=device),
            backbone=self.speech_lm.new_state(batch),
            adapters=adapters,
        )

    @torch.no_grad()
    def step(
        self,
        state: GeneratorState,
        user_codes: Tensor,
        image: ImageKV | None = None,
        sampling: Choose = RELEASED_SAMPLING,
        active: Tensor | None = None,
        *,
        forced: Tensor | None = None,
    ) -> Frame:
        """One frame: user codes [B, Ku] in, text and own codes out.

        `image` comes from `adapters.encode(..., streaming=True)` and has as many rows as the state; `active` [B] bool
        names the rows that take this step (None = all); `forced` [B, 1 + own] replaces what is generated at this step
        wherever it is not FREE.
        """
        inputs = self._inputs(state, user_codes, active)
        context = None
        if image is not None and self.adapters is not None and state.adapters is not None:
            context = self.adapters.step_context(state.adapters, image, active)
        hidden, text_logits = self.speech_lm.step(state.backbone, inputs[..., None], context, active)

        def choose(logits: Tensor, stream: int) -> Tensor:
            ids = sampling(logits, stream)
            return ids if forced is None else torch.where(forced[:, stream] == FREE, ids, forced[:, stream])

        text = choose(text_logits[:, 0], 0)
        audio = self.speech_lm.sample_audio(hidden[:, 0], text, choose)
        self._push(state.said, torch.cat([text[:, None], audio], dim=1), active)

        tokens = state.said.gather(2, self._own_delays[None, :, None].expand(len(state.said), -1, -1))[..., 0]
        valid = state.steps >= self._max_delay
        if active is not None:
            valid = valid & active
        gate = torch.zeros_like(valid, dtype=torch.float32)
        if context is not None:
            gate = torch.where(valid, context.gate()[:, 0], gate)
        state.steps += 1 if active is None else active
        return Frame(tokens, valid, gate)

    def _inputs(self, state: GeneratorState, user_codes: Tensor, active: Tensor | None) -> Tensor:
        """[B, K] what the backbone sees: own tokens of the last step, user codes after their delay."""
        self._push(state.heard, user_codes, active)
        steps = state.steps[:, None]
        late = (self._max_delay - self._user_delays)[None, :, None].expand(len(steps), -1, -1)
        heard = torch.where(steps > self._user_delays, state.heard.gather(2, late)[..., 0], self._user_initial)
        said = torch.where(steps > self._own_delays, state.said[..., -1], self._own_initial)
        return torch.cat([said, heard], dim=1)

    def _push(self, line: Tensor, new: Tensor, active: Tensor | None) -> None:
        """Move a line [B, n, M + 1] on by one entry, new [B, n], in place."""
        moved = torch.cat([line[..., 1:], new[..., None]], dim=-1)
        line.copy_(moved if active is None else torch.where(active[:, None, None], moved, line))
