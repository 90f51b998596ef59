"""Token tables in which id -1 is an exact zero vector (reference facts, model.md section 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.speech_lm.streams import ZERO_TOKEN


class TokenTables(nn.Module):
    """Embeddings of several streams that have vocabularies of the same size, one table a stream.

    Id -1 embeds as zero; any other negative id embeds as id 0, as the released code has it. Ids are not checked
    against the size of the vocabulary: that would stall the hot path.
    """

    def __init__(self, num_streams: int, num_ids: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_streams, num_ids, dim))
        nn.init.normal_(self.weight, std=dim**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [..., k] of the first k streams, all or fewer -> [..., k, dim]."""
        vectors = F.embedding(self._rows(ids), self.weight.flatten(0, 1))
        return vectors.masked_fill((ids == ZERO_TOKEN)[..., None], 0)

    def step(self, ids: Tensor, stream: int) -> Tensor:
        """Ids [...] of one stream -> [..., dim]."""
        vectors = F.embedding(ids.clamp(min=0), self.weight[stream])
        return vectors.masked_fill((ids == ZERO_TOKEN)[..., None], 0)

    def _rows(self, ids: Tensor) -> Tensor:
        streams, num_ids = ids.shape[-1], self.weight.shape[1]
        return ids.clamp(min=0) + torch.arange(0, streams * num_ids, num_ids, device=ids.device)


class StreamEmbedding(nn.Module):
    """One vector a frame: the sum of the embeddings of all its tokens."""

    def __init__(self, text_card: int, audio_card: int, num_audio: int, dim: int):
        super().__init__()
        self.text = TokenTables(1, text_card + 1, dim)
        self.audio = TokenTables(num_audio, audio_card + 1, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, K, T] -> [B, T, D]."""
        ids = tokens.transpose(1, 2)
        total = self.text.step(ids[..., 0], 0)
        for vectors in self.audio(ids[..., 1:]).unbind(-2):  # one by one: how the released model rounds in bfloat16
            total = total + vectors
        return total
