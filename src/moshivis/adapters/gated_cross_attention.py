"""Gated cross-attention from speech to image tokens (paper section 3.1; reference facts, model.md 4.1 to 4.5).

One module holds the adapters of all blocks; what layers share is there once. An image becomes keys and values once
(`encode`), and every call gets an `ImageContext` that the blocks ask for their updates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.config import AdapterConfig
from moshivis.layers.norm import make_norm

REPORTED_LAYERS = 10  # the gate number is an average over the last ten blocks


@dataclass(frozen=True)
class ImageKV:
    """Keys and values of a batch of images. One pair if all layers share it, else one a layer."""

    keys: tuple[Tensor, ...]  # each [B, H, S, head_dim]
    values: tuple[Tensor, ...]
    mask: Tensor | None = None  # [B, S] bool, True = a real image token; None = all are
    present: Tensor | None = None  # [B] bool, False = this row has no image; None = all have one

    def to(self, dtype: torch.dtype) -> ImageKV:
        keys, values = (tuple(x.to(dtype) for x in side) for side in (self.keys, self.values))
        return ImageKV(keys, values, self.mask, self.present)


@dataclass
class AdapterState:
    """Steps that every row has taken with an image in view, [B]; start and end of the adapters count them."""

    seen: Tensor
    start: Tensor | None = None  # [B] first step at which the adapters act in each row; None = the config's

    def reset(self, rows: Tensor) -> None:
        self.seen.masked_fill_(rows, 0)


class Gate(nn.Module):
    """How much of an update passes: a function of the update itself, or one learnt number."""

    def __init__(self, config: AdapterConfig, dim: int):
        super().__init__()
        self.config = config
        if config.gate_input == "conditional":
            self.linear_in = nn.Linear(dim, dim // 8, bias=False)
            self.linear_out = nn.Linear(dim // 8, dim, bias=False)
            nn.init.zeros_(self.linear_out.weight)
        else:
            self.alpha = nn.Parameter(torch.zeros(1))

    def forward(self, update: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D], or [1, 1, 1] if constant."""
        if self.config.gate_input == "conditional":
            z = self.linear_out(F.relu(self.linear_in(update)))
        else:
            z = self.alpha[None, None]
        return torch.sigmoid(z - 4) if self.config.gate_activation == "sigmoid" else torch.tanh(z)


class GatedCrossAttention(nn.Module):
    """The adapters of a backbone of `num_layers` blocks of width `dim`.

    Raises ValueError if the config names a block that does not exist.
    """

    def __init__(self, config: AdapterConfig, dim: int, num_heads: int, num_layers: int):
        super().__init__()
        layers = tuple(range(num_layers)) if config.layers is None else config.layers
        if not layers or len(set(layers)) != len(layers) or not set(layers) <= set(range(num_layers)):
            raise ValueError(f"adapters need distinct blocks out of 0 to {num_layers - 1}, not {list(layers)}")
        self.config = config
        self.layers = layers
        self.num_layers = num_layers
        self.num_heads = num_heads
        self._index = {layer: index for index, layer in enumerate(layers)}
        count = len(layers)
        source_dim = dim if config.source_dim is None else config.source_dim
        own_q = 1 if config.sharing == "qkv" else count
        own_kv = 1 if config.sharing != "none" else count
        gates = {"layer": count, "shared": 1, "none": 0}[config.gate]
        self.norm = nn.ModuleList(make_norm(config.norm, dim) for _ in range(count))
        self.query = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(own_q))
        self.key_value = nn.ModuleList(nn.Linear(source_dim, 2 * dim, bias=False) for _ in range(own_kv))
        self.out = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(own_q))
        self.gate = nn.ModuleList(Gate(config, dim) for _ in range(gates))
        # With everything shared, one number a layer still lets layers differ.
        scaled = config.sharing == "qkv" and config.gate == "shared"
        self.scale = nn.Parameter(torch.ones(count)) if scaled else None

    def encode(
        self, image: Tensor, mask: Tensor | None = None, present: Tensor | None = None, *, streaming: bool = False
    ) -> ImageKV:
        """Image tokens [B, S, Dx] -> keys and values. `mask` [B, S] marks real tokens, `present` [B] the rows that
        have an image; None = all.

        `streaming` chooses the form for generation: with `stream_keys="first"` every layer then uses the keys and
        values of the first one, as the released generation loop does.
        """
        if mask is not None and present is not None:
            mask = mask | ~present[:, None]  # attention over nothing at all would be NaN
        first_only = streaming and self.config.stream_keys == "first"
        pairs = [self._split(project(image)) for project in self.key_value[: 1 if first_only else None]]
        keys, values = zip(*pairs, strict=True)
        return ImageKV(keys, values, mask, present)

    def context(self, image: ImageKV, steps: int) -> ImageContext:
        """For a whole sequence of `steps` steps."""
        positions = torch.arange(steps, device=image.keys[0].device)
        scope = self._scope(positions)
        on = None if scope is None else scope[None]
        if image.present is not None:
            on = image.present[:, None] if on is None else on & image.present[:, None]
        reported = None if image.present is None else image.present[:, None]
        return ImageContext(self, image, on, reported)

    def new_state(self, batch: int) -> AdapterState:
        device = next(self.parameters()).device
        return AdapterState(torch.zeros(batch, dtype=torch.int64, device=device))

    def step_context(
        self, state: AdapterState, image: ImageKV, active: Tensor | None = None, steps: int = 1
    ) -> ImageContext:
        """For the next `steps` steps of a stream; counts them in the `active` rows that have an image."""
        positions = state.seen[:, None] + torch.arange(steps, device=state.seen.device)
        on = self._scope(positions, None if state.start is None else state.start[:, None])
        if image.present is not None:
            on = image.present[:, None] if on is None else on & image.present[:, None]
        counted = torch.ones_like(state.seen, dtype=torch.bool) if image.present is None else image.present
        state.seen += steps * (counted if active is None else counted & active)
        return ImageContext(self, image, on, on)

    def update(self, layer: int, x: Tensor, image: ImageKV) -> tuple[Tensor, Tensor | None] | None:
        """Block `layer`'s update [B, T, D] from its residual stream x, and its gate; None if it has no adapter."""
        index = self._index.get(layer)
        if index is None:
            return None
        q = self._heads(_pick(self.query, index)(self.norm[index](x)))
        keys, values = _pick(image.keys, index), _pick(image.values, index)
        mask = None if image.mask is None else image.mask[:, None, None]
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        update = _pick(self.out, index)(y.transpose(1, 2).flatten(2))
        gate = None
        if len(self.gate):
            gate = _pick(self.gate, index)(update)
            update = update * gate
        if self.scale is not None:
            update = update * self.scale[index]
        return update, gate

    def _scope(self, positions: Tensor, start: Tensor | None = None) -> Tensor | None:
        """Where the adapters act, bool shaped like `positions`; None = everywhere. `start` None = the config's."""
        end = self.config.end
        if start is None:
            if not self.config.start and end is None:
                return None
            start = positions.new_tensor(self.config.start or 0)
        scope = positions >= start
        return scope if end is None else scope & (positions < start + end)

    def _split(self, key_value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = key_value.chunk(2, dim=-1)
        return self._heads(keys), self._heads(values)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ImageContext:
    """One call's view of its images: gives every block its update and, unless told otherwise, remembers the gates.

    `on` [B or 1, T] says where the update is not exactly zero, `reported` [B or 1, T] where its gate counts.
    """

    def __init__(self, adapters: GatedCrossAttention, image: ImageKV, on: Tensor | None, reported: Tensor | None):
        self.adapters = adapters
        self.image = image
        self.on = on
        self.reported = reported
        self.remembers = True  # what is remembered lives, with all that it was computed from, as long as this does
        self.gates: dict[int, Tensor] = {}  # block -> gate [B, T, D], or [1, 1, 1] if constant

    def __call__(self, layer: int, x: Tensor) -> Tensor | None:
        found = self.adapters.update(layer, x, self.image)
        if found is None:
            return None
        update, gate = found
        if gate is not None and self.remembers:
            self.gates[layer] = gate
        return update if self.on is None else torch.where(self.on[..., None], update, 0)

    def layer_gates(self) -> Tensor:
        """[L, B or 1, T or 1] float32: the gate of every block, averaged over channels; 0 where there is none."""
        first = self.image.keys[0]
        none = first.new_zeros((1, 1))
        means = [self.gates[i].mean(-1) if i in self.gates else none for i in range(self.adapters.num_layers)]
        gates = torch.stack(torch.broadcast_tensors(*means)).float()
        return gates if self.reported is None else torch.where(self.reported, gates, 0)

    def gate(self) -> Tensor:
        """[B or 1, T or 1]: the one number that the release reports, here for every row and step."""
        return self.layer_gates()[-REPORTED_LAYERS:].sum(0) / min(REPORTED_LAYERS, self.adapters.num_layers)


def _pick(items: Any, index: int) -> Any:
    """What layer `index` uses: its own, or the one that all share."""
    return items[index if len(items) > 1 else 0]
