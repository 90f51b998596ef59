"""Normalisation layers, by the names of the released configuration (reference facts, model.md 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moshivis.config import NormName


class RMSNorm(nn.Module):
    """Scale by the root of a statistic over the last axis.

    `centred_statistic` takes the unbiased variance instead of the mean of squares. Only the statistic is centred, the
    signal is not: that is what the released depth transformer does.
    """

    def __init__(self, dim: int, *, eps: float, centred_statistic: bool, in_float32: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.centred_statistic = centred_statistic
        self.in_float32 = in_float32

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C], same dtype."""
        y = x.float() if self.in_float32 else x
        if self.centred_statistic:
            # As y.var(), which is ten times slower on a CPU.
            wide = y.to(torch.promote_types(y.dtype, torch.float32))
            centred = wide - wide.mean(dim=-1, keepdim=True)
            statistic = (centred.square().sum(dim=-1, keepdim=True) / (y.shape[-1] - 1)).to(y.dtype)
        else:
            statistic = y.square().mean(dim=-1, keepdim=True)
        return (y * (self.weight.to(y.dtype) * torch.rsqrt(self.eps + statistic))).to(x.dtype)


class LayerNormFloat32(nn.LayerNorm):
    """LayerNorm that computes in float32 whatever the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)


def make_norm(name: NormName, dim: int) -> nn.Module:
    """The norm that the released configuration calls `name`, over `dim` channels.

    Raises ValueError for an unknown name.
    """
    match name:
        case "rms_norm":
            return RMSNorm(dim, eps=1e-5, centred_statistic=True, in_float32=False)
        case "rms_norm_f32":
            return RMSNorm(dim, eps=1e-8, centred_statistic=True, in_float32=True)
        case "real_rms_norm":
            return RMSNorm(dim, eps=1e-5, centred_statistic=False, in_float32=False)
        case "real_rms_norm_f32":
            return RMSNorm(dim, eps=1e-8, centred_statistic=False, in_float32=True)
        case "layer_norm":
            return nn.LayerNorm(dim, eps=1e-5)
        case "layer_norm_f32":
            return LayerNormFloat32(dim, eps=1e-8)
    raise ValueError(f"unknown norm {name!r}")
