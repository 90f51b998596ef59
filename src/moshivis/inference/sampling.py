"""Drawing tokens from logits (reference facts, model.md 5.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]  # one for the batch, or one a row


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to draw tokens; called with logits [B, card] and the number of their stream it gives ids [B].

    Temperature 0 is greedy, top-k 0 draws from the whole vocabulary. Defaults are the released ones.
    """

    text_temperature: float = 0.7
    text_top_k: int = 25
    audio_temperature: float = 0.8
    audio_top_k: int = 250
    generators: Generators | None = None  # None = torch's global one

    def __call__(self, logits: Tensor, stream: int) -> Tensor:
        if stream == 0:
            return sample(logits, self.text_temperature, self.text_top_k, self.generators)
        return sample(logits, self.audio_temperature, self.audio_top_k, self.generators)


LEAST_TEMPERATURE = 1e-6  # below it logits could overflow; as good as 0
RELEASED_SAMPLING = Sampling()
GREEDY = Sampling(text_temperature=0.0, audio_temperature=0.0)


def sample(logits: Tensor, temperature: float, top_k: int, generators: Generators | None = None) -> Tensor:
    """Ids [B] drawn from logits [B, card].

    The same torch generator gives the draws of the released code. One generator a row makes a row's draws
    independent of its neighbours.
    """
    logits = logits.float()
    if temperature <= 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / max(temperature, LEAST_TEMPERATURE), dim=-1)
    if top_k <= 0:
        return _draw(probabilities, generators)
    candidates, ids = probabilities.topk(min(top_k, logits.shape[-1]), dim=-1)
    return ids.gather(-1, _draw(candidates, generators)[:, None])[:, 0]


def _draw(weights: Tensor, generators: Generators | None) -> Tensor:
    """Index [B] with a probability proportional to weights [B, n], without waiting for the device."""
    noise = torch.empty_like(weights)
    if generators is None or isinstance(generators, torch.Generator):
        noise.exponential_(1, generator=generators)
    else:
        for row, generator in zip(noise, generators, strict=True):
            row.exponential_(1, generator=generator)
    return (weights / noise).argmax(-1)
