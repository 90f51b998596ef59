"""The speechless form of a conversation: plain text of both sides in the text stream, no sound (paper section 3.3).

The stream starts with the initial text token. The assistant's sentences open with end-of-padding and close with
padding, the user's stand between them. All audio streams hold the token that embeds as zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moshivis.adapters.gated_cross_attention import ImageKV
from moshivis.inference.sampling import RELEASED_SAMPLING
from moshivis.model import MoshiVis
from moshivis.speech_lm.depth import Choose
from moshivis.speech_lm.streams import ZERO_TOKEN

MAX_SENTENCE = 160  # tokens after which the assistant's sentence is closed for it


class WrittenStream:
    """One written conversation, with an image in view from its first step on. `tokens` counts what it holds so far."""

    def __init__(self, model: MoshiVis, image: ImageKV | None):
        self.config = model.config.speech_lm
        self.tokens = 0
        self._lm, self._adapters = model.speech_lm, model.adapters
        self._state = model.speech_lm.new_state(1)
        self._adapter_state = None if model.adapters is None else model.adapters.new_state(1)
        self._logits = self._feed(self.config.text_card, image)[0]

    def push(self, tokens: Sequence[int], image: ImageKV | None) -> list[float]:
        """Append tokens, and return the gate of each."""
        gates = []
        for token in tokens:
            self._logits, gate = self._feed(token, image)
            self.tokens += 1
            gates.append(gate)
        return gates

    def reply(self, image: ImageKV | None, sampling: Choose = RELEASED_SAMPLING) -> list[tuple[int, float]]:
        """Let the assistant say one sentence: its tokens and their gates, without those that open and close it."""
        self.push([self.config.text_end_of_padding], image)
        said: list[tuple[int, float]] = []
        while len(said) < MAX_SENTENCE:
            token = int(sampling(self._logits, 0))
            if token == self.config.text_padding:
                break
            said.append((token, self.push([token], image)[0]))
        self.push([self.config.text_padding], image)
        return said

    @torch.inference_mode()
    def _feed(self, token: int, image: ImageKV | None) -> tuple[Tensor, float]:
        """Text logits [1, card] after `token`, and its gate."""
        column = torch.full((1, self.config.num_streams, 1), ZERO_TOKEN, device=self._lm.text_head.weight.device)
        column[:, 0] = token
        context = None
        if image is not None and self._adapters is not None and self._adapter_state is not None:
            context = self._adapters.step_context(self._adapter_state, image)
        logits = self._lm.step(self._state, column, context).text_logits[:, 0]
        return logits, 0.0 if context is None else float(context.gate())
