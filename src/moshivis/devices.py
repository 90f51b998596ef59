"""Devices as users name them."""

from __future__ import annotations

import torch

from moshivis.errors import InputError


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name: cpu, cuda, cuda:1, mps. Raises InputError if there is none here."""
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the device {str(name)!r} cannot be used here: {reason}; try cpu") from error
