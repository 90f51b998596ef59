"""Causal convolutions in one dimension, over whole signals and streamed (reference facts, mimi.md 2.1, 2.2, 3).

Signals are [B, C, T], but the memory of every result is [B, T, C]: neighbouring steps lie together, so that the window
of a convolution is a piece of memory, and need not be gathered. A streaming state keeps just the samples that the next
call needs; rows that are not active run through the arithmetic but keep their state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.layers.linear import Laid, blocked, product, weights_of

FEW = 512  # results of a convolution, rows times steps, up to which reading its weights takes most of the time


class Conv1d(nn.Conv1d):
    """`nn.Conv1d` without padding, the same numbers up to rounding; on a CPU several times faster for short signals."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, groups=groups, bias=bias
        )
        self._laid = Laid()

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, T] -> [B, C', T']."""
        kernel, stride, dilation = self.kernel_size[0], self.stride[0], self.dilation[0]
        span = (kernel - 1) * dilation + 1
        steps = (input.shape[-1] - span) // stride + 1
        few = kernel == 1 or input.shape[0] * steps <= FEW
        laid = self._laid.get(input, weights_of(self), self._lay, wanted=few and self.groups == 1)
        if laid is not None:
            windows = input.transpose(1, 2).unfold(1, span, stride)[..., ::dilation]  # [B, T', C, kernel]
            return product(windows.transpose(2, 3).flatten(2), *laid).transpose(1, 2)
        if not input.is_cpu:
            return super().forward(input)
        # oneDNN convolves pictures in this layout as they are; signals it would turn round, and the results again.
        weight = self.weight.unsqueeze(2)
        y = F.conv2d(input.unsqueeze(2), weight, self.bias, (1, stride), 0, (1, dilation), self.groups)
        return y.squeeze(2)

    def _lay(self) -> tuple[Tensor, ...]:
        """The matrix [C', kernel * C], and the bias."""
        weight, *bias = weights_of(self)
        return blocked(weight.transpose(1, 2).flatten(1)), *bias


@dataclass
class ConvState:
    """The last inputs of a convolution, [B, kernel - stride, C]; `fresh` [B] marks rows that have seen none yet."""

    previous: Tensor
    fresh: Tensor

    def reset(self, rows: Tensor) -> None:
        self.previous.masked_fill_(rows[:, None, None], 0)
        self.fresh |= rows


@dataclass
class ConvTransposeState:
    """What the past inputs still owe to the next outputs, [B, stride, C]."""

    partial: Tensor

    def reset(self, rows: Tensor) -> None:
        self.partial.masked_fill_(rows[:, None, None], 0)


def _keep_inactive(old: Tensor, new: Tensor, active: Tensor | None) -> None:
    old.copy_(new if active is None else torch.where(active[:, None, None], new, old))


class CausalConv1d(nn.Module):
    """Convolution that sees the present and the past only: kernel - stride steps of left padding."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        pad: Literal["zeros", "replicate"] = "zeros",
    ):
        super().__init__()
        self.conv = Conv1d(
            in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, groups=groups, bias=bias
        )
        self.stride = stride
        self.padding = (kernel_size - 1) * dilation + 1 - stride
        self.pad: Literal["zeros", "replicate"] = pad

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C', T / stride]. Raises ValueError unless T is a positive multiple of the stride."""
        self._check(x)
        if self.padding == 0:
            return self.conv(x)
        first = x.transpose(1, 2)[:, :1].expand(-1, self.padding, -1)
        return self.conv(_join(first if self.pad == "replicate" else torch.zeros_like(first), x))

    def new_state(self, batch: int) -> ConvState:
        weight = self.conv.weight
        previous = weight.new_zeros(batch, self.padding, self.conv.in_channels)
        return ConvState(previous, torch.ones(batch, dtype=torch.bool, device=weight.device))

    def step(self, state: ConvState, x: Tensor, active: Tensor | None = None) -> Tensor:
        """The next T inputs of every row; T a positive multiple of the stride."""
        self._check(x)
        if self.padding == 0:
            return self.conv(x)
        previous = state.previous
        if self.pad == "replicate":
            previous = torch.where(state.fresh[:, None, None], x.transpose(1, 2)[:, :1], previous)
        signal = _join(previous, x)
        _keep_inactive(state.previous, signal.transpose(1, 2)[:, -self.padding :], active)
        state.fresh &= False if active is None else ~active
        return self.conv(signal)

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] == 0 or x.shape[-1] % self.stride:
            raise ValueError(f"the length must be a positive multiple of {self.stride}, not {x.shape[-1]}")


def _join(before: Tensor, x: Tensor) -> Tensor:
    """[B, P, C] and [B, C, T] -> [B, C, P + T]."""
    if not x.is_cpu:  # cuDNN has its signals as they are named
        return torch.cat([before.transpose(1, 2), x], dim=-1)
    return torch.cat([before, x.transpose(1, 2)], dim=1).transpose(1, 2)


class CausalConvTranspose1d(nn.Module):
    """Transposed convolution with kernel = 2 * stride whose last `stride` outputs wait for the next input.

    Computed as one matrix product and an overlap-add of the two kernel halves: the same numbers as
    `conv_transpose1d`, several times faster on a CPU for the wide, short signals of a codec. `depthwise` gives every
    channel its own kernel. Weights are stored as PyTorch stores them, [in, out / groups, kernel].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, *, depthwise: bool = False, bias: bool = True):
        super().__init__()
        self.convtr = nn.ConvTranspose1d(
            in_channels,
            out_channels,
            2 * stride,
            stride=stride,
            groups=in_channels if depthwise else 1,
            bias=bias,
        )
        self.stride = stride
        self.depthwise = depthwise
        self._laid = Laid()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C', T * stride]."""
        now, later = self._halves(x)
        return self._add(now, F.pad(later[:, :-1], (0, 0, 0, 0, 1, 0)))

    def new_state(self, batch: int) -> ConvTransposeState:
        weight = self.convtr.weight
        return ConvTransposeState(weight.new_zeros(batch, self.stride, self.convtr.out_channels))

    def step(self, state: ConvTransposeState, x: Tensor, active: Tensor | None = None) -> Tensor:
        """The next T inputs of every row."""
        now, later = self._halves(x)
        y = self._add(now, torch.cat([state.partial[:, None], later[:, :-1]], dim=1))
        _keep_inactive(state.partial, later[:, -1], active)
        return y

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Contributions of each input to its own and to the next `stride` outputs: two of [B, T, stride, C']."""
        weight, x = self.convtr.weight, x.transpose(1, 2)
        if self.depthwise:
            y = x[:, :, None] * weight[:, 0].t()
        elif (laid := self._laid.get(x, (weight,), self._lay)) is not None:
            y = product(x, *laid).unflatten(-1, (2 * self.stride, -1))
        else:
            y = (x @ weight.flatten(1)).unflatten(-1, weight.shape[1:]).transpose(2, 3)
        return y[:, :, : self.stride], y[:, :, self.stride :]

    def _lay(self) -> tuple[Tensor, ...]:
        """The matrix [kernel * C', C]."""
        return (blocked(self.convtr.weight.permute(2, 1, 0).flatten(0, 1)),)

    def _add(self, now: Tensor, carried: Tensor) -> Tensor:
        y = now + carried
        if self.convtr.bias is not None:
            y = y + self.convtr.bias
        return y.flatten(1, 2).transpose(1, 2)
