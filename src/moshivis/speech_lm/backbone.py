"""The transformer over time (reference facts, model.md section 4).

A block may mix something in between its self-attention and its feed-forward: whatever `Fusion` is given to the call.
The backbone does not know what it is; the adapters are one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor, nn

from moshivis.config import BackboneConfig
from moshivis.layers.attention import AttentionState, Ring, RingView, SelfAttention, block_rotation, causal_mask
from moshivis.layers.feed_forward import GatedFeedForward
from moshivis.layers.norm import make_norm
from moshivis.layers.rope import rotation


class Fusion(Protocol):
    """What the blocks of one call mix in."""

    def __call__(self, layer: int, x: Tensor) -> Tensor | None:
        """The update [B, T, D] of block `layer`, whose residual stream is x [B, T, D] after self-attention."""
        ...


@dataclass
class BackboneState:
    """Where the rows of a batch stand, and the keys and values of every layer."""

    ring: Ring
    layers: list[AttentionState]

    def reset(self, rows: Tensor) -> None:
        """Start the rows in `rows` [B] bool anew."""
        self.ring.reset(rows)
        for layer in self.layers:
            layer.reset(rows)


class Block(nn.Module):
    """x + attention, + fusion, + feed-forward; each branch normalises its own input."""

    def __init__(self, config: BackboneConfig, index: int):
        super().__init__()
        self.index = index
        self.norm1 = make_norm(config.norm, config.dim)
        self.self_attn = SelfAttention(config.dim, config.num_heads)
        self.norm2 = make_norm(config.norm, config.dim)
        self.feed_forward = GatedFeedForward(config.dim, config.feed_forward, config.activation)

    def forward(self, x: Tensor, *, rope: Tensor | None, mask: Tensor | None, fusion: Fusion | None) -> Tensor:
        x = x + self.self_attn(self.norm1(x), rope=rope, mask=mask)
        return self._finish(x, fusion)

    def step(
        self,
        state: AttentionState,
        x: Tensor,
        view: RingView,
        *,
        rope: Tensor | None,
        fusion: Fusion | None,
        active: Tensor | None,
    ) -> Tensor:
        x = x + self.self_attn.step(state, self.norm1(x), view, rope=rope, active=active)
        return self._finish(x, fusion)

    def _finish(self, x: Tensor, fusion: Fusion | None) -> Tensor:
        update = None if fusion is None else fusion(self.index, x)
        if update is not None:
            x = x + update
        return x + self.feed_forward(self.norm2(x))


class Backbone(nn.Module):
    """[B, T, D] -> [B, T, D], the last norm included."""

    def __init__(self, config: BackboneConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.dim // config.num_heads
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.out_norm = make_norm(config.norm, config.dim)

    def forward(self, x: Tensor, fusion: Fusion | None = None, mask: Tensor | None = None) -> Tensor:
        """Whole sequences. `mask` [T, T] bool, or broadcastable to [B, H, T, T], True = attend, takes the place of
        the causal window of `context` keys."""
        steps = x.shape[1]
        if mask is None and steps > self.config.context:
            mask = causal_mask(steps, self.config.context, x.device)
        rope = None
        if self.config.positions == "rope":
            rope = block_rotation(steps, self.head_dim, self.config.max_period, x.device)
        for layer in self.layers:
            x = layer(x, rope=rope, mask=mask, fusion=fusion)
        return self.out_norm(x)

    def new_state(self, batch: int) -> BackboneState:
        context = self.config.context
        layers = [layer.self_attn.new_state(batch, context) for layer in self._blocks()]
        return BackboneState(Ring.new(batch, context, layers[0].keys.device), layers)

    def step(
        self,
        state: BackboneState,
        x: Tensor,
        fusion: Fusion | None = None,
        active: Tensor | None = None,
        *,
        causal: bool = True,
    ) -> Tensor:
        """The next T steps of every row; rows that are not `active` [B] keep their state, their output means nothing.

        With `causal=False` the steps of one call see each other, as the released code has it.
        Raises ValueError if T exceeds the attention context.
        """
        view = state.ring.view(x.shape[1], causal=causal)
        rope = None
        if self.config.positions == "rope":
            rope = rotation(view.positions, self.head_dim, self.config.max_period)
        for layer, layer_state in zip(self._blocks(), state.layers, strict=True):
            x = layer.step(layer_state, x, view, rope=rope, fusion=fusion, active=active)
        state.ring.advance(x.shape[1], active)
        return self.out_norm(x)

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))
