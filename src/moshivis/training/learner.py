"""What is trained, as one module whose forward pass gives the numerators of the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moshivis.adapters.gated_cross_attention import ImageContext
from moshivis.model import MoshiVis
from moshivis.training.batch import Part
from moshivis.training.losses import audio_sum, codebook_weights, text_sum
from moshivis.training.recipe import LossRecipe


@dataclass(frozen=True)
class Features:
    """Encoder outputs of a part's pictures, padded to the longest."""

    values: Tensor  # [B, S, D_enc]
    mask: Tensor  # [B, S] bool, real patches
    present: Tensor  # [B] bool, rows that have a picture


class Outcome(NamedTuple):
    """A tuple, so that sharding finds the tensors in it."""

    text: Tensor  # numerator of the text loss
    audio: Tensor  # of the audio loss
    right: Tensor  # assistant's words predicted exactly; int64
    words: Tensor  # assistant's words asked for
    gates: Tensor | None  # [L] sum of every block's gate over real steps of rows with a picture; None without adapters
    seen: Tensor | None  # how many such steps there are


class Learner(nn.Module):
    """Speech LM, adapters and projection of a model. Codec and image encoder stay outside: they are frozen."""

    def __init__(self, model: MoshiVis, loss: LossRecipe):
        super().__init__()
        self.loss = loss
        self.config = model.config.speech_lm
        self.speech_lm = model.speech_lm
        self.adapters = model.adapters
        self.projection = None if model.vision is None else model.vision.projection

    def forward(self, part: Part, features: Features | None, *, gates: bool = False) -> Outcome:
        """Only what is graded passes through the text head and the depth transformer. `gates` measures them."""
        context = self._look(features, part.inputs.shape[-1])
        if context is not None:
            context.remembers = gates
        hidden = self.speech_lm.backbone(self.speech_lm.embedding(part.inputs), context)
        asked = part.text_weight > 0
        asked[0, 0] |= ~asked.any()  # every part takes the same way, lest sharded ranks wait for each other for ever
        logits = self.speech_lm.text_head(hidden[asked])
        target = part.text[asked].clamp(max=self.config.text_card - 1)
        text = text_sum(logits, target, part.text_weight[asked])
        silent = torch.isin(target, target.new_tensor(self._silent))
        said = part.assistant[asked] & (part.text_weight[asked] > 0) & ~silent
        right = (logits.argmax(-1) == target) & said
        audio = self._audio(hidden, part) if part.kind == "speech" else hidden.new_zeros((), dtype=torch.float32)
        summed, seen = _sum_gates(context, part) if gates and context is not None else (None, None)
        return Outcome(text, audio, right.sum(), said.sum(), summed, seen)

    @property
    def _silent(self) -> list[int]:
        return [self.config.text_padding, self.config.text_end_of_padding]

    def _look(self, features: Features | None, steps: int) -> ImageContext | None:
        if self.adapters is None or self.projection is None:
            return None
        assert features is not None
        image = self.adapters.encode(self.projection(features.values), features.mask, features.present)
        return self.adapters.context(image, steps)

    def _audio(self, hidden: Tensor, part: Part) -> Tensor:
        frames = part.audio_graded.any(dim=1)
        frames[0, 0] |= ~frames.any()
        audio, graded = (x.transpose(1, 2)[frames] for x in (part.audio, part.audio_graded))  # [N, n]
        logits = self.speech_lm.depth(hidden[frames], part.text[frames], audio)
        return audio_sum(logits, audio, graded, codebook_weights(self.loss, audio.shape[1]).to(audio.device))


def _sum_gates(context: ImageContext, part: Part) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if not context.gates:
        return None, None
    gates = context.layer_gates().detach()  # [L, B, T], 0 in rows without a picture
    present = context.image.present
    assert present is not None
    seen = present[:, None] & part.real
    return (gates * seen).sum(dim=(1, 2)), seen.sum()
