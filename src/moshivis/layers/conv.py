"""Causal convolutions in one dimension, over whole signals and streamed (reference facts, mimi.md 2.1, 2.2, 3).

Signals are [B, C, T]. A streaming state keeps just the samples that the next call needs; rows that are not active
run through the arithmetic but keep their state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class ConvState:
    """The last inputs of a convolution, [B, C, kernel - stride]; `fresh` [B] marks rows that have seen none yet."""

    previous: Tensor
    fresh: Tensor

    def reset(self, rows: Tensor) -> None:
        self.previous.masked_fill_(rows[:, None, None], 0)
        self.fresh |= rows


@dataclass
class ConvTransposeState:
    """What the past inputs still owe to the next outputs, [B, C, stride]."""

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
        self.conv = nn.Conv1d(
            in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, groups=groups, bias=bias
        )
        self.stride = stride
        self.padding = (kernel_size - 1) * dilation + 1 - stride
        self.pad: Literal["zeros", "replicate"] = pad

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C', T / stride]. Raises ValueError unless T is a positive multiple of the stride."""
        self._check(x)
        return self.conv(F.pad(x, (self.padding, 0), mode="replicate" if self.pad == "replicate" else "constant"))

    def new_state(self, batch: int) -> ConvState:
        weight = self.conv.weight
        previous = weight.new_zeros(batch, self.conv.in_channels, self.padding)
        return ConvState(previous, torch.ones(batch, dtype=torch.bool, device=weight.device))

    def step(self, state: ConvState, x: Tensor, active: Tensor | None = None) -> Tensor:
        """The next T inputs of every row; T a positive multiple of the stride."""
        self._check(x)
        if self.padding == 0:
            return self.conv(x)
        previous = state.previous
        if self.pad == "replicate":
            previous = torch.where(state.fresh[:, None, None], x[..., :1], previous)
        signal = torch.cat([previous, x], dim=-1)
        _keep_inactive(state.previous, signal[..., -self.padding :], active)
        state.fresh &= False if active is None else ~active
        return self.conv(signal)

    def _check(self, x: Tensor) -> None:
        if x.shape[-1] == 0 or x.shape[-1] % self.stride:
            raise ValueError(f"the length must be a positive multiple of {self.stride}, not {x.shape[-1]}")


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

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T] -> [B, C', T * stride]."""
        now, later = self._halves(x)
        return self._join(now, F.pad(later[..., :-1, :], (0, 0, 1, 0)))

    def new_state(self, batch: int) -> ConvTransposeState:
        weight = self.convtr.weight
        return ConvTransposeState(weight.new_zeros(batch, self.convtr.out_channels, self.stride))

    def step(self, state: ConvTransposeState, x: Tensor, active: Tensor | None = None) -> Tensor:
        """The next T inputs of every row."""
        now, later = self._halves(x)
        carried = torch.cat([state.partial[:, :, None], later[..., :-1, :]], dim=2)
        y = self._join(now, carried)
        _keep_inactive(state.partial, later[..., -1, :], active)
        return y

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Contributions of each input to its own and to the next `stride` outputs: two of [B, C', T, stride]."""
        weight = self.convtr.weight
        if self.depthwise:
            y = x[..., None] * weight[:, 0, None, :]
        else:
            y = (x.transpose(1, 2) @ weight.flatten(1)).unflatten(-1, weight.shape[1:]).transpose(1, 2)
        return y[..., : self.stride], y[..., self.stride :]

    def _join(self, now: Tensor, carried: Tensor) -> Tensor:
        y = (now + carried).flatten(2)
        return y if self.convtr.bias is None else y + self.convtr.bias[:, None]
