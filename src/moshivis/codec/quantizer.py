"""Split residual vector quantizer with moving-average codebooks (reference facts, mimi.md 2.8, 6).

A semantic codebook and a stack of acoustic ones quantize the same latent in parallel; their outputs are added. In
training the codebooks follow the data by moving averages, the encoder gets straight-through gradients, and a
commitment penalty pulls it towards the codebooks.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.config import QuantizerConfig
from moshivis.layers.conv import Conv1d
from moshivis.layers.linear import Laid, blocked, product

USAGE_FLOOR = 1e-5  # keeps unused entries finite
DECAY = 0.99
DEAD_CODE_SHARE = 0.1  # an entry used less than this share of the mean is replaced
DEAD_CODE_INTERVAL = 5  # training steps between replacements
KMEANS_ITERATIONS = 50


class Codebook(nn.Module):
    """`bins` vectors, kept as sums and counts: embedding = embedding_sum / usage."""

    initialized: Tensor
    cluster_usage: Tensor
    embedding_sum: Tensor

    def __init__(self, dimension: int, bins: int):
        super().__init__()
        self.register_buffer("initialized", torch.zeros(1))
        self.register_buffer("cluster_usage", torch.ones(bins))
        self.register_buffer("embedding_sum", torch.zeros(bins, dimension))
        self.steps_since_check = 0
        self._laid = Laid()

    @property
    def embedding(self) -> Tensor:
        """[bins, dimension] float32."""
        return self.embedding_sum.float() / self.cluster_usage.float().clamp(min=USAGE_FLOOR)[:, None]

    def encode(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Nearest entry of each vector, or of `embedding`: [N, D] -> [N] int64, the first one on a tie."""
        if embedding is None:
            if (laid := self._laid.get(x, (self.embedding_sum, self.cluster_usage), self._lay)) is not None:
                return product(x, *laid).argmax(dim=-1)
            embedding = self.embedding
        return torch.cdist(x.float()[None], embedding[None])[0].argmin(dim=-1)

    def _lay(self) -> tuple[Tensor, Tensor]:
        """Of |x - e|^2 / 2, the entries e and |e|^2 / 2, both negative; |x|^2 / 2 is the same for all entries."""
        embedding = self.embedding
        return blocked(embedding), -embedding.square().sum(dim=-1) / 2

    def look_up(self, codes: Tensor) -> Tensor:
        """Entries by number: [...] int64 -> [..., D] float32. Raises IndexError (on a CPU) if there is none."""
        usage = F.embedding(codes, self.cluster_usage[:, None]).float().clamp(min=USAGE_FLOOR)
        return F.embedding(codes, self.embedding_sum).float() / usage

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """k-means on x [N, D]."""
        bins = self.cluster_usage.shape[0]
        if len(x) >= bins:
            choice = torch.randperm(len(x), device=x.device)[:bins]
        else:
            choice = torch.randint(len(x), (bins,), device=x.device)
        means = x[choice]
        for _ in range(KMEANS_ITERATIONS):
            counts, sums = self._count(x, self.encode(x, means))
            fresh = x[torch.randint(len(x), (bins,), device=x.device)]
            means = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], fresh)
        counts, _ = self._count(x, self.encode(x, means))
        counts = counts.clamp(min=1)
        self.cluster_usage.copy_(counts)
        self.embedding_sum.copy_(means * counts[:, None])
        self.initialized.fill_(1)

    @torch.no_grad()
    def learn(self, x: Tensor, codes: Tensor) -> None:
        """Replace dead entries by vectors of this batch now and then, then move the averages."""
        self.steps_since_check += 1
        if self.steps_since_check >= DEAD_CODE_INTERVAL:
            self.steps_since_check = 0
            mean = self.cluster_usage.sum() / len(self.cluster_usage)
            dead = self.cluster_usage < DEAD_CODE_SHARE * mean
            fresh = x[torch.randint(len(x), (len(dead),), device=x.device)]
            self.embedding_sum.copy_(torch.where(dead[:, None], mean * fresh, self.embedding_sum))
            self.cluster_usage.copy_(torch.where(dead, mean, self.cluster_usage))
        counts, sums = self._count(x, codes)
        self.cluster_usage.lerp_(counts, 1 - DECAY)
        self.embedding_sum.lerp_(sums, 1 - DECAY)

    def _count(self, x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        counts = torch.zeros_like(self.cluster_usage).index_add_(0, codes, x.new_ones(len(x)))
        return counts, torch.zeros_like(self.embedding_sum).index_add_(0, codes, x)


@dataclass(frozen=True)
class Quantized:
    latent: Tensor  # [B, D, F], with straight-through gradients in training
    codes: Tensor  # [B, K, F] int64
    penalty: Tensor  # commitment, a scalar; 0 in evaluation
    semantic: Tensor | None = None  # [B, D, F] what the semantic level contributes to `latent`


class ResidualQuantizer(nn.Module):
    """Codebooks that each quantize what the previous ones left over, between two 1x1 projections."""

    def __init__(self, latent_dim: int, dimension: int, bins: int, levels: int):
        super().__init__()
        self.input_proj = Conv1d(latent_dim, dimension, 1, bias=False)
        self.output_proj = Conv1d(dimension, latent_dim, 1, bias=False)
        self.levels = nn.ModuleList(Codebook(dimension, bins) for _ in range(levels))

    def _books(self, levels: int) -> list[Codebook]:
        return cast(list[Codebook], list(self.levels[:levels]))

    def encode(self, latent: Tensor, levels: int) -> Tensor:
        """[B, D, F] -> [B, levels, F] int64."""
        residual = self.input_proj(latent).transpose(1, 2)  # [B, F, d]
        frames = residual.shape[:2]
        residual = residual.flatten(0, 1).float()
        codes = []
        for codebook in self._books(levels):
            code = codebook.encode(residual)
            residual = residual - codebook.look_up(code)
            codes.append(code.view(frames))
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """[B, K, F] -> [B, D, F]."""
        books = self._books(codes.shape[1])
        total = torch.stack([book.look_up(codes[:, level]) for level, book in enumerate(books)]).sum(0)
        return self.output_proj(total.transpose(1, 2).to(self.output_proj.weight.dtype))

    def forward(self, latent: Tensor, levels: int, bypass: Tensor | None = None) -> Quantized:
        """Training pass: codebooks learn, gradients go straight through. `bypass` [B] bool leaves rows unquantized."""
        x = self.input_proj(latent).transpose(1, 2)  # [B, F, d]
        frames = x.shape[:2]
        residual = x.flatten(0, 1).float()
        total = torch.zeros_like(residual)
        codes, penalties = [], []
        may_initialise = True
        for codebook in self._books(levels):
            was_initialised = bool(codebook.initialized)
            if self.training and may_initialise and not was_initialised:
                codebook.initialise(residual.detach())
            may_initialise = was_initialised
            embedding = codebook.embedding
            code = codebook.encode(residual.detach(), embedding)
            quantized = embedding[code]
            penalties.append((residual - quantized).square().mean())
            if self.training and codebook.initialized:
                codebook.learn(residual.detach(), code)
            residual = residual - quantized
            total = total + quantized
            codes.append(code.view(frames))
        total = total.view(x.shape).to(x.dtype)
        out = x + (total - x).detach() if self.training else total
        if bypass is not None:
            out = torch.where(bypass[:, None, None], x, out)
        penalty = torch.stack(penalties).mean() if self.training else latent.new_zeros(())
        return Quantized(self.output_proj(out.transpose(1, 2)), torch.stack(codes, dim=1), penalty)


class SplitQuantizer(nn.Module):
    """One semantic level beside a stack of acoustic levels."""

    def __init__(self, latent_dim: int, config: QuantizerConfig):
        super().__init__()
        self.semantic = ResidualQuantizer(latent_dim, config.dimension, config.bins, 1)
        self.acoustic = ResidualQuantizer(latent_dim, config.dimension, config.bins, config.num_codebooks - 1)

    @property
    def num_codebooks(self) -> int:
        return 1 + len(self.acoustic.levels)

    def count_from(self, steps: int) -> None:
        """Say how many steps were learnt before: a resumed training replaces dead entries when another would."""
        for level in (*self.semantic.levels, *self.acoustic.levels):
            level.steps_since_check = steps % DEAD_CODE_INTERVAL

    def encode(self, latent: Tensor, num_codebooks: int) -> Tensor:
        """[B, D, F] -> [B, num_codebooks, F]."""
        codes = self.semantic.encode(latent, 1)
        if num_codebooks == 1:
            return codes
        return torch.cat([codes, self.acoustic.encode(latent, num_codebooks - 1)], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """[B, K, F] -> [B, D, F], K from 1 to num_codebooks."""
        latent = self.semantic.decode(codes[:, :1])
        return latent if codes.shape[1] == 1 else latent + self.acoustic.decode(codes[:, 1:])

    def forward(self, latent: Tensor, num_codebooks: int, bypass: Tensor | None = None) -> Quantized:
        """Training pass over the first `num_codebooks` levels."""
        semantic = self.semantic(latent, 1, bypass)
        if num_codebooks == 1:
            return dataclasses.replace(semantic, semantic=semantic.latent)
        acoustic = self.acoustic(latent, num_codebooks - 1, bypass)
        share = 1 / num_codebooks
        return Quantized(
            semantic.latent + acoustic.latent,
            torch.cat([semantic.codes, acoustic.codes], dim=1),
            share * semantic.penalty + (1 - share) * acoustic.penalty,
            semantic.latent,
        )
