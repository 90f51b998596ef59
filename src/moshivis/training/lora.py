"""Low-rank updates of a backbone's matrices (LoRA): y = W x + alpha / rank * up(down(x)), W frozen.

The two matrices are parameters of the layer itself, `lora_down` [rank, in] and `lora_up` [out, rank], added by a
forward hook: the names of the frozen weights stay what they are, and sequences and single steps both see the update.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.speech_lm.backbone import Backbone
from moshivis.training.recipe import LoraRecipe


class _Update:
    """The forward hook of one layer."""

    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        down, up = layer.get_parameter("lora_down"), layer.get_parameter("lora_up")
        (x,) = inputs
        update = F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
        return output + self.scale * update


def lora_scale(recipe: LoraRecipe) -> float:
    return recipe.alpha / recipe.rank


def add_lora(backbone: Backbone, recipe: LoraRecipe, generator: torch.Generator | None = None) -> None:
    """Give every targeted matrix its update, zero at first. On the meta device they are left empty."""
    for name, layer in backbone.named_modules():
        if not isinstance(layer, nn.Linear) or name.rpartition(".")[2] not in recipe.targets:
            continue
        weight = layer.weight
        down = torch.empty(recipe.rank, layer.in_features, device=weight.device)
        if not down.is_meta:
            cpu = torch.empty(down.shape).normal_(std=layer.in_features**-0.5, generator=generator)
            down.copy_(cpu)  # drawn on the CPU: the same on every device
        up = torch.zeros(layer.out_features, recipe.rank, device=weight.device)
        layer.register_parameter("lora_down", nn.Parameter(down))
        layer.register_parameter("lora_up", nn.Parameter(up))
        layer.register_forward_hook(_Update(lora_scale(recipe)))
