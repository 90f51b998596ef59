"""The depth transformer: the codebooks of one frame, one after the other (reference facts, model.md 5.1).

Every codebook has its own weights, stacked as [K, out, in]; only the norms are common. For training all codebooks of
all frames run at once, as [K, N, d] with N frames; for sampling one codebook runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.config import DepthConfig, SpeechLMConfig
from moshivis.layers.attention import causal_mask
from moshivis.layers.feed_forward import activate, gated_width
from moshivis.layers.norm import make_norm
from moshivis.speech_lm.embedding import TokenTables

Choose = Callable[[Tensor, int], Tensor]  # (logits [B, card], stream) -> ids [B]; stream 0 is text


class StepLinear(nn.Module):
    """One linear map a codebook, without bias."""

    def __init__(self, num_steps: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_steps, out_features, in_features))
        nn.init.uniform_(self.weight, -(in_features**-0.5), in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[k, N, in] -> [k, N, out], the first k codebooks."""
        return torch.bmm(x, self.weight[: len(x)].transpose(1, 2))

    def step(self, x: Tensor, k: int) -> Tensor:
        """[N, in] of codebook k -> [N, out]."""
        return F.linear(x, self.weight[k])


class DepthBlock(nn.Module):
    """x + attention over the codebooks, + gated feed-forward."""

    def __init__(self, config: DepthConfig, num_steps: int):
        super().__init__()
        width = gated_width(config.dim, config.feed_forward)
        self.config = config
        self.norm1 = make_norm(config.norm, config.dim)
        self.in_proj = StepLinear(num_steps, config.dim, 3 * config.dim)
        self.out_proj = StepLinear(num_steps, config.dim, config.dim)
        self.norm2 = make_norm(config.norm, config.dim)
        self.linear_in = StepLinear(num_steps, config.dim, 2 * width)
        self.linear_out = StepLinear(num_steps, width, config.dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[k, N, d] -> [k, N, d]. `mask` [k, k], True = attend."""
        qkv = self.in_proj(self.norm1(x)).unflatten(-1, (3, self.config.num_heads, -1))
        q, k, v = qkv.permute(2, 1, 3, 0, 4)  # each [N, H, K, head_dim]
        y = _trained_attention(q, k, v, mask) if q.requires_grad else F.scaled_dot_product_attention(q, k, v, mask)
        x = x + self.out_proj(y.permute(2, 0, 1, 3).flatten(2))
        a, b = self.linear_in(self.norm2(x)).chunk(2, dim=-1)
        return x + self.linear_out(activate(self.config.activation, a) * b)

    def step(self, x: Tensor, past: list[tuple[Tensor, Tensor]], index: int) -> Tensor:
        """Codebook `index` of a frame, [N, d]; appends its keys and values [N, H, head_dim] to `past`."""
        qkv = self.in_proj.step(self.norm1(x), index).unflatten(-1, (3, self.config.num_heads, -1))
        q, k, v = qkv.unbind(1)
        past.append((k, v))
        seen = past[-self.config.context :]
        keys, values = (torch.stack(parts, dim=2) for parts in zip(*seen, strict=True))
        y = F.scaled_dot_product_attention(q[:, :, None], keys, values)
        x = x + self.out_proj.step(y.flatten(1), index)
        a, b = self.linear_in.step(self.norm2(x), index).chunk(2, dim=-1)
        return x + self.linear_out.step(activate(self.config.activation, a) * b, index)


def _trained_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """As `scaled_dot_product_attention`, whose backward is four times slower on a CPU for a handful of keys."""
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype) @ v


class DepthTransformer(nn.Module):
    """Logits of a frame's own codebooks from the backbone's output and the frame's text token."""

    def __init__(self, config: SpeechLMConfig):
        super().__init__()
        depth, steps = config.depth, config.own_codebooks
        self.num_steps = steps
        self.context = depth.context
        self.input = StepLinear(steps if depth.input_per_step else 1, config.backbone.dim, depth.dim)
        self.text = TokenTables(1, config.text_card + 1, depth.dim)
        self.audio = TokenTables(steps - 1, config.audio_card + 1, depth.dim)
        self.layers = nn.ModuleList(DepthBlock(depth, steps) for _ in range(depth.num_layers))
        self.heads = StepLinear(steps, depth.dim, config.audio_card)

    def forward(self, hidden: Tensor, text: Tensor, audio: Tensor) -> Tensor:
        """Teacher-forced: hidden [N, D], text [N], audio [N, k] of the first k codebooks, all or fewer -> logits
        [N, k, card] of the same audio tokens."""
        steps = audio.shape[1]
        before = torch.cat([self.text(text[:, None]), self.audio(audio[:, :-1])], dim=1)  # [N, k, d]
        x = (self._project(hidden, steps) + before).transpose(0, 1).contiguous()
        mask = causal_mask(steps, self.context, x.device)
        for layer in self.layers:
            x = layer(x, mask)
        return self.heads(x).transpose(0, 1)

    def sample(self, hidden: Tensor, text: Tensor, choose: Choose) -> Tensor:
        """One frame: hidden [B, D], text [B] -> audio tokens [B, K]; `choose` draws each from its logits."""
        inputs = self._project(hidden)
        pasts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]
        chosen: list[Tensor] = []
        for k in range(self.num_steps):
            token = self.text.step(text, 0) if k == 0 else self.audio.step(chosen[-1], k - 1)
            x = inputs[:, k if inputs.shape[1] > 1 else 0] + token
            for layer, past in zip(self.layers, pasts, strict=True):
                x = cast(DepthBlock, layer).step(x, past, k)
            chosen.append(choose(self.heads.step(x, k), k + 1))
        return torch.stack(chosen, dim=1)

    def _project(self, hidden: Tensor, steps: int | None = None) -> Tensor:
        """[N, D] -> [N, k or 1, d]: the first k codebooks' input projections (None: all) in one product."""
        weight = self.input.weight[:steps]
        return F.linear(hidden, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
