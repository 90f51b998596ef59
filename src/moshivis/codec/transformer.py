"""The causal transformers of Mimi, at the SEANet rate (reference facts, mimi.md 2.6, 3.1)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from moshivis.config import CodecTransformerConfig
from moshivis.layers.attention import AttentionState, Ring, RingView, SelfAttention, block_rotation, causal_mask
from moshivis.layers.feed_forward import FeedForward
from moshivis.layers.rope import rotation


@dataclass
class TransformerState:
    ring: Ring
    layers: list[AttentionState]

    def reset(self, rows: Tensor) -> None:
        self.ring.reset(rows)
        for layer in self.layers:
            layer.reset(rows)


class CodecTransformerLayer(nn.Module):
    """Pre-norm attention and feed-forward, each scaled by a learnt vector before it is added."""

    def __init__(self, dim: int, config: CodecTransformerConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.self_attn = SelfAttention(dim, config.num_heads)
        self.layer_scale_1 = nn.Parameter(torch.full((dim,), config.layer_scale))
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.feed_forward = FeedForward(dim, config.feed_forward)
        self.layer_scale_2 = nn.Parameter(torch.full((dim,), config.layer_scale))

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        return self._feed(x, self.self_attn(self.norm1(x), rope=rope, mask=mask))

    def step(self, state: AttentionState, x: Tensor, view: RingView, rope: Tensor, active: Tensor | None) -> Tensor:
        return self._feed(x, self.self_attn.step(state, self.norm1(x), view, rope=rope, active=active))

    def _feed(self, x: Tensor, attended: Tensor) -> Tensor:
        x = torch.addcmul(x, self.layer_scale_1, attended)
        return torch.addcmul(x, self.layer_scale_2, self.feed_forward(self.norm2(x)))


class CodecTransformer(nn.Module):
    """[B, D, T] -> [B, D, T]. No norm after the last layer."""

    def __init__(self, dim: int, config: CodecTransformerConfig):
        super().__init__()
        self.config = config
        self.head_dim = dim // config.num_heads
        self.layers = nn.ModuleList(CodecTransformerLayer(dim, config) for _ in range(config.num_layers))

    def forward(self, x: Tensor) -> Tensor:
        steps = x.shape[-1]
        mask = causal_mask(steps, self.config.context, x.device) if steps > self.config.context else None
        rope = block_rotation(steps, self.head_dim, self.config.max_period, x.device)
        x = x.transpose(1, 2)
        for layer in self.layers:
            x = layer(x, rope, mask)
        return x.transpose(1, 2)

    def _blocks(self) -> list[CodecTransformerLayer]:
        return cast(list[CodecTransformerLayer], list(self.layers))

    def new_state(self, batch: int, *, spare: int = 0, group: int = 1) -> TransformerState:
        """`spare` and `group` as in `Ring`."""
        context = self.config.context
        layers = [layer.self_attn.new_state(batch, context + spare) for layer in self._blocks()]
        return TransformerState(Ring.new(batch, context, layers[0].keys.device, spare=spare, group=group), layers)

    def step(self, state: TransformerState, x: Tensor, active: Tensor | None = None) -> Tensor:
        """The next T steps of every row. Raises ValueError if T is more than the ring of `state` allows."""
        view = state.ring.view(x.shape[-1])
        rope = rotation(view.positions, self.head_dim, self.config.max_period)
        y = x.transpose(1, 2)
        # Attention adds masks to its scores: made once here, not in every layer.
        bias = torch.zeros(view.visible.shape, dtype=x.dtype, device=x.device)
        view = dataclasses.replace(view, visible=bias.masked_fill_(~view.visible, -torch.inf))
        for layer, layer_state in zip(self._blocks(), state.layers, strict=True):
            y = layer.step(layer_state, y, view, rope, active)
        state.ring.advance(x.shape[-1], active)
        return y.transpose(1, 2)
