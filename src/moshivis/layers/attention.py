"""Causal, windowed self-attention: over whole sequences, and step by step over a ring of keys.

A `Ring` holds where each batch row stands; the keys themselves live in one `AttentionState` a layer. Every row has
its own position, so rows start, stop and reset at any step. No position is stored beside a key: which step a slot
holds follows from the row's position, and a reset is just position = 0.
(Reference facts: model.md 3.4, 3.5; mimi.md 3.1, 3.2.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.layers.linear import Linear
from moshivis.layers.rope import rotate, rotation


@dataclass
class Ring:
    """Where every row of a batch stands in a ring of slots: `context` of them, and `spare` ones for longer calls."""

    position: Tensor  # [B] int64, steps taken since the row was reset
    context: int
    filled: int = 0  # slots that any row may have written: known without asking the device, the others are not read
    spare: int = 0
    group: int = 1  # steps that calls without spare slots would bring

    @classmethod
    def new(
        cls, batch: int, context: int, device: torch.device | str | None = None, *, spare: int = 0, group: int = 1
    ) -> Ring:
        return cls(torch.zeros(batch, dtype=torch.int64, device=device), context, spare=spare, group=group)

    @property
    def size(self) -> int:
        """Slots in all."""
        return self.context + self.spare

    @property
    def longest(self) -> int:
        """Steps that one call may feed."""
        return self.spare + self.group if self.spare else self.context

    def view(self, steps: int, *, causal: bool = True) -> RingView:
        """What the next `steps` steps of each row write and see.

        A step sees at most the `context` newest keys once all of this call's keys are written: with several steps a
        call, the first ones have lost the keys that the last ones overwrote, as in the released code. With spare
        slots they see what they would if every `group` steps came by a call of their own. `causal=False` lets the
        steps of one call see each other.

        Raises ValueError if the call is longer than the ring allows.
        """
        if steps > self.longest:
            raise ValueError(f"one call may feed at most {self.longest} steps (the attention context), not {steps}")
        device = self.position.device
        positions = self.position[:, None] + torch.arange(steps, device=device)  # [B, T]
        last = positions[:, -1:]  # [B, 1]
        slots = torch.arange(min(self.filled + steps, self.size), device=device)
        held = last - (last - slots) % self.size  # [B, F] step a slot holds
        visible = (held >= 0)[:, None, :].expand(-1, steps, -1)
        if causal:
            visible = visible & (held[:, None, :] <= positions[:, :, None])
        if self.spare:
            newest = torch.minimum(positions + self.group - 1 - torch.arange(steps, device=device) % self.group, last)
            visible = visible & (held[:, None, :] > newest[:, :, None] - self.context)
        return RingView(positions, positions % self.size, visible[:, None])

    def advance(self, steps: int, active: Tensor | None = None) -> None:
        """Move on by `steps`, in the rows of `active` [B] bool only (all if None)."""
        self.position += steps if active is None else steps * active
        self.filled = min(self.filled + steps, self.size)

    def reset(self, rows: Tensor) -> None:
        """Forget everything in `rows` [B] bool."""
        self.position.masked_fill_(rows, 0)


@dataclass(frozen=True)
class RingView:
    positions: Tensor  # [B, T] absolute steps
    slots: Tensor  # [B, T] where their keys go
    visible: Tensor  # [B, 1, T, F] bool, True = attend to one of the first F slots; or what the scores get added


@dataclass
class AttentionState:
    """Rotated keys and values of one layer, [B, H, C, head_dim] each."""

    keys: Tensor
    values: Tensor

    def write(self, view: RingView, keys: Tensor, values: Tensor, active: Tensor | None) -> None:
        """Store keys and values [B, H, T, head_dim]; rows that are not `active` keep what they have."""
        slots = view.slots[:, None, :, None].expand_as(keys)
        for ring, new in ((self.keys, keys), (self.values, values)):
            if active is not None:
                new = torch.where(active[:, None, None, None], new, ring.gather(2, slots))
            ring.scatter_(2, slots, new)

    def reset(self, rows: Tensor) -> None:
        """Empty `rows` [B] bool: what a mask hides counts all the same if it is not a number."""
        self.keys[rows] = self.values[rows] = 0


def causal_mask(steps: int, context: int, device: torch.device | str | None = None) -> Tensor:
    """[T, T] bool, True where query i may see key j: j <= i and i - j < context."""
    index = torch.arange(steps, device=device)
    distance = index[:, None] - index[None, :]
    return (distance >= 0) & (distance < context)


class SelfAttention(nn.Module):
    """Multi-head self-attention without bias; q, k and v are the thirds of one projection."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.in_proj = Linear(dim, 3 * dim, bias=False)
        self.out_proj = Linear(dim, dim, bias=False)

    def new_state(self, batch: int, slots: int) -> AttentionState:
        weight = self.in_proj.weight
        shape = (batch, self.num_heads, slots, self.head_dim)
        return AttentionState(weight.new_zeros(shape), weight.new_zeros(shape))

    def forward(self, x: Tensor, *, rope: Tensor | None, mask: Tensor | None) -> Tensor:
        """Whole sequence x [B, T, D]. `mask` [T, T] or broadcastable to [B, H, T, T], True = attend; None = plain
        causal attention. `rope` is `rope.rotation(...)` of the positions, or None for no positions."""
        q, k, v = self._project(x, rope)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def step(
        self, state: AttentionState, x: Tensor, view: RingView, *, rope: Tensor | None, active: Tensor | None = None
    ) -> Tensor:
        """The next T steps x [B, T, D] of every row; `state` is updated in place for the `active` rows."""
        q, k, v = self._project(x, rope)
        state.write(view, k, v, active)
        filled = view.visible.shape[-1]
        keys, values = state.keys[:, :, :filled], state.values[:, :, :filled]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=view.visible)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.in_proj(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv
        if rope is not None:
            q, k = rotate(qkv[:2], rope)
        return q, k, v


def block_rotation(steps: int, head_dim: int, max_period: float, device: torch.device | str | None = None) -> Tensor:
    """`rotation` for a whole sequence that starts at step 0."""
    return rotation(torch.arange(steps, device=device)[None], head_dim, max_period)
