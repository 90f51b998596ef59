"""The losses of the one-stage recipe (paper section 3.2, appendix E.2), with weights from `LossRecipe`.

    text  = sum_i w_i CE(text_i) / sum_i w_i
            w_i: 1 for the assistant's words and the end-of-padding before them, `padding` for padding that is no part
            of them, `user` for the user's words (speechless samples), each times `speech` in speech samples
    audio = sum_k v_k sum_t CE(own_kt) / sum_k v_k N_k
            over the first `codebooks` own codebooks k, N_k graded tokens each; v_0 = semantic, v_k = acoustic
    loss  = text_weight * text + audio_weight * audio

Every sum runs over the whole batch of a step: both kinds of samples, all parts, all ranks. The denominators do not
depend on the model, so they are known before the first forward pass (`Denominators`), and the parts' gradients just
add up: a step gives the same gradient however its rows are spread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moshivis.training.batch import Part
from moshivis.training.recipe import LossRecipe


@dataclass(frozen=True)
class Denominators:
    """Sums of weights over a batch; float64 [2]: text, audio."""

    sums: Tensor

    @classmethod
    def of(cls, parts: Iterable[Part], loss: LossRecipe) -> Denominators:
        """Of this rank's parts; add those of the other ranks before use."""
        total = torch.zeros(2, dtype=torch.float64)
        for part in parts:
            total[0] += part.text_weight.sum(dtype=torch.float64).cpu()
            weights = codebook_weights(loss, part.audio.shape[1]).double()
            total[1] += (part.audio_graded.sum(dim=(0, 2)).cpu() * weights).sum()
        return cls(total)

    @property
    def text(self) -> float:
        return float(self.sums[0]) or 1.0

    @property
    def audio(self) -> float:
        return float(self.sums[1]) or 1.0


def codebook_weights(loss: LossRecipe, count: int) -> Tensor:
    """[count] v_k."""
    weights = torch.full((count,), loss.acoustic)
    weights[0] = loss.semantic
    return weights


def text_sum(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Numerator of the text loss: logits [N, card], target [N], weight [N]."""
    return (F.cross_entropy(logits.float(), target, reduction="none") * weight).sum()


def audio_sum(logits: Tensor, target: Tensor, graded: Tensor, weights: Tensor) -> Tensor:
    """Numerator of the audio loss: logits [N, n, card], target and graded [N, n], weights [n]."""
    known = torch.where(graded, target, 0)
    loss = F.cross_entropy(logits.float().flatten(0, 1), known.flatten(), reduction="none").view(target.shape)
    return (loss * (graded * weights)).sum()


def total(text: Tensor, audio: Tensor, denominators: Denominators, loss: LossRecipe) -> Tensor:
    """A part's share of the loss, from its numerators."""
    return text * (loss.text / denominators.text) + audio * (loss.audio / denominators.audio)
