"""Trading memory and start-up time for speed: compiled pieces, recomputed activations, and what hardware can do."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from moshivis.speech_lm.backbone import Block
from moshivis.training.learner import Learner
from moshivis.training.precision import in_half
from moshivis.training.recipe import Recipe

# Dense bfloat16 operations a second, from the makers' data sheets; matched against the device's name in this order.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def compiler() -> str | None:
    """The C++ compiler that torch compiles with for a CPU; None if it is not installed."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def shorten_vectors() -> None:
    """Let what is compiled for a CPU from now on use vectors of 256 bits, unless a length was chosen already.

    With 512 bits torch 2.13 compiles the backward pass of a bfloat16 backbone to NaN on a CPU that has AMX.
    """
    from torch._inductor import config  # slow, and few compile

    if config.cpp.simdlen is None:
        config.cpp.simdlen = 256


def compile_blocks(learner: Learner) -> None:
    """Compile norms, self-attention and feed-forward of the backbone's blocks.

    All blocks share what is compiled, and adapters and sharding stay outside.
    """
    shorten_vectors()
    for block in learner.speech_lm.backbone.layers:
        assert isinstance(block, Block)
        for piece in (block.norm1, block.self_attn, block.norm2, block.feed_forward):
            piece.forward = torch.compile(piece.forward)


def checkpoint_activations(learner: Learner) -> None:
    """Keep only the inputs of the backbone's blocks, and compute the rest again in the backward pass."""
    for block in learner.speech_lm.backbone.layers:
        assert isinstance(block, Block)
        block.forward = functools.partial(  # type: ignore[method-assign]
            checkpoint, block.forward, use_reentrant=False, context_fn=_again
        )


def _again() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Around a block, and around it when it is computed again: torch restores autocast, not the kernel of attention."""
    if torch.is_autocast_enabled("cpu"):
        return contextlib.nullcontext(), sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext(), contextlib.nullcontext()


def peak_flops(device: torch.device, recipe: Recipe) -> float | None:
    """bfloat16 operations a second that a device can do; None if it is not known or another precision is used."""
    if device.type != "cuda" or not in_half(recipe):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
