"""Devices as users name them."""

from __future__ import annotations

import torch

from moshivis.errors import InputError


def device_type(name: str) -> str:
    """Kind of the device of that name, as cuda of cuda:1; of "auto" that of a GPU by CUDA if there is one, else cpu."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name.partition(":")[0]


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name: cpu, cuda, cuda:1, mps. Raises InputError if there is none here."""
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the device {str(name)!r} cannot be used here: {reason}; try cpu") from error
