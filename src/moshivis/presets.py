"""Models by name, and models with random weights for measuring speed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moshivis.config import ModelConfig
from moshivis.model import MoshiVis

PRESETS: dict[str, ModelConfig] = {
    "moshika-vis": ModelConfig(),  # the released model
}


def random_model(
    config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> MoshiVis:
    """A model that knows nothing but computes as much as a trained one. The codec is float32 whatever `dtype`.

    It is built on the meta device and filled tensor by tensor: memory never holds more than the model.
    """
    with torch.device("meta"):
        model = MoshiVis(config)
    generator = torch.Generator(device).manual_seed(seed)
    for prefix, module in model.named_modules():
        target = torch.float32 if prefix.split(".")[0] == "codec" else dtype
        for name, parameter in module.named_parameters(recurse=False):
            filled = _fill(parameter, device, target, generator)
            setattr(module, name, nn.Parameter(filled, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _fill(buffer, device, torch.float32, generator) if buffer.is_meta else buffer)
    return model.to(device).eval()


def _fill(like: Tensor, device: torch.device | str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Matrices that keep the size of their input, vectors of ones."""
    filled = torch.ones(like.shape, device=device, dtype=dtype)
    return filled.normal_(std=like.shape[-1] ** -0.5, generator=generator) if like.ndim > 1 else filled
