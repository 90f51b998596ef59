"""Rotary positions on interleaved channel pairs (reference facts, model.md 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(positions: Tensor, head_dim: int, max_period: float) -> Tensor:
    """Cosines and sines of every pair's angle at `positions` [B, T]: float32 [2, B, 1, T, head_dim / 2]."""
    index = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / max_period ** (index / head_dim)
    angles = positions.float()[:, None, :, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs (2i, 2i+1) of x [B, H, T, head_dim] by `rotation`, in float32, and cast back."""
    cos, sin = rotation[0], rotation[1]
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
