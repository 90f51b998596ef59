"""Which numbers a training computes with, and holds what is frozen in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from moshivis.devices import device_type, has_bfloat16
from moshivis.training.recipe import Recipe


def in_half(recipe: Recipe) -> bool:
    """Whether a run computes, and holds frozen weights, in bfloat16."""
    return recipe.precision == "bf16" or (recipe.precision == "auto" and has_bfloat16(device_type(recipe.device)))


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Of what is frozen, the codec aside."""
    return torch.bfloat16 if in_half(recipe) else torch.float32


def quick_precision(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """bf16 arithmetic where the device has instructions for it, float32 elsewhere."""
    return half_precision(device) if has_bfloat16(device.type) else contextlib.nullcontext()


@contextlib.contextmanager
def half_precision(device: torch.device) -> Iterator[None]:
    """bf16 arithmetic; on a CPU with attention written out, which trains twice as fast as the fused kernel."""
    if device.type != "cpu":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # for every device, in spite of its name
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield
