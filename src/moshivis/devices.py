"""Devices as users name them."""

from __future__ import annotations

import functools

import torch

from moshivis.errors import InputError


def device_type(name: str) -> str:
    """Kind of the device of that name, as cuda of cuda:1; of "auto" that of a GPU by CUDA if there is one, else cpu."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name.partition(":")[0]


@functools.cache
def has_bfloat16(kind: str) -> bool:
    """Whether devices of that kind compute in bfloat16 about as fast as in float32, or faster.

    Of GPUs by CUDA those that do not emulate it. Of CPUs those that oneDNN has kernels for, on x86 by AVX-512 or AMX:
    without them a product of two matrices took 36 times as long as in float32 (AMD EPYC of the third generation, AVX2).
    """
    if kind == "cuda" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind != "cpu" or (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name: cpu, cuda, cuda:1, mps. Raises InputError if there is none here."""
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the device {str(name)!r} cannot be used here: {reason}; try cpu") from error
