"""Feed-forward blocks (reference facts, model.md 3.3; mimi.md 2.6)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.config import Activation
from moshivis.layers.linear import Linear

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "elu": F.elu,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "softsign": F.softsign,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def activate(name: Activation, x: Tensor) -> Tensor:
    """The activation function `name` of x, elementwise."""
    return _ACTIVATIONS[name](x)


def gated_width(dim: int, feed_forward: int) -> int:
    """Inner width of a gated block whose plain twin would have `feed_forward` units."""
    return (21 * dim) // 8 if feed_forward == 4 * dim else (2 * feed_forward) // 3


class GatedFeedForward(nn.Module):
    """linear_out(act(a) * b), where a and b are the two halves of linear_in(x)."""

    def __init__(self, dim: int, feed_forward: int, activation: Activation):
        super().__init__()
        width = gated_width(dim, feed_forward)
        self.linear_in = nn.Linear(dim, 2 * width, bias=False)
        self.linear_out = nn.Linear(width, dim, bias=False)
        self.activation: Activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        a, b = self.linear_in(x).chunk(2, dim=-1)
        return self.linear_out(activate(self.activation, a) * b)


class FeedForward(nn.Module):
    """linear2(gelu(linear1(x))), without bias."""

    def __init__(self, dim: int, feed_forward: int):
        super().__init__()
        self.linear1 = Linear(dim, feed_forward, bias=False)
        self.linear2 = Linear(feed_forward, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        return self.linear2(F.gelu(self.linear1(x)))
