"""Which weights these are, in a few bytes: tells a base model or an image encoder from any that was trained otherwise.

A sample of every tensor is read, from its first number to its last, over rows and columns, rounded to bfloat16: the
same weights have the same fingerprint in float32 and in bfloat16, and 16 GB of them take a moment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moshivis.config import to_dict
from moshivis.model import MoshiVis

SAMPLED = 64  # numbers of each tensor


def fingerprint(config: Any, tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal sha256 of a config dataclass, and of names, shapes and a sample of some tensors."""
    digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode())
    for name in sorted(tensors):
        flat = tensors[name].detach().flatten()
        count = min(SAMPLED, flat.numel())
        # Both ends included: steps of numel // SAMPLED would stay in the first column of most matrices.
        places = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(1, count - 1)
        sample = flat[places].to("cpu", torch.bfloat16)
        digest.update(f"{name} {list(tensors[name].shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def base_fingerprint(model: MoshiVis) -> str:
    """Of what adapters stand on: speech LM and image encoder, low-rank updates beside them left out."""
    tensors = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(("speech_lm.", "vision.encoder.")) and ".lora_" not in name
    }
    encoder = dataclasses.replace(model.config.vision, projection_norm=None)  # the projection is trained
    parts = fingerprint(model.config.speech_lm, tensors), fingerprint(encoder, {})
    return hashlib.sha256("".join(parts).encode()).hexdigest()
