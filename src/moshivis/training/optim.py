"""AdamW and Muon, their learning rate over time, and the running average of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moshivis.training.recipe import OptimiserRecipe


def rate_at(step: int, steps: int, recipe: OptimiserRecipe) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then half a cosine that ends at `final` of the peak."""
    if step < recipe.warmup:
        return recipe.rate * (step + 1) / recipe.warmup
    progress = min(1.0, (step - recipe.warmup) / max(1, steps - 1 - recipe.warmup))
    return recipe.rate * (recipe.final + (1 - recipe.final) * 0.5 * (1 + math.cos(math.pi * progress)))


class Optimiser:
    """AdamW, or Muon for matrices, over named parameters; matrices decay, vectors and what is `idle` do not.

    `idle` names, by prefixes, what gets no gradient. Its state exists from the start.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], recipe: OptimiserRecipe, idle: tuple[str, ...] = ()):
        self.parameters, self.recipe = parameters, recipe
        decay: list[nn.Parameter] = []
        still: list[nn.Parameter] = []
        for name, parameter in parameters.items():
            (still if parameter.ndim <= 1 or name.startswith(idle) else decay).append(parameter)
        groups = [(decay, recipe.weight_decay), (still, 0.0)]
        by_muon = [([p for p in group if _is_muons(p, recipe)], weight) for group, weight in groups]
        rest = [([p for p in group if not _is_muons(p, recipe)], weight) for group, weight in groups]
        self.parts: list[torch.optim.Optimizer] = []
        if any(group for group, _ in by_muon):
            self.parts.append(_muon(by_muon, recipe))
        if any(group for group, _ in rest):
            self.parts.append(_adamw(rest, recipe))

    def clip(self) -> float:
        """Limit the gradient's norm to `clip`, over all parameters and shards; returns what it was."""
        limit = self.recipe.clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def step(self, rate: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    def forget_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Its state, live: what is written into these tensors is its state."""
        return {
            f"{name}.{key}": tensor
            for name, parameter in self.parameters.items()
            for part in self.parts
            for key, tensor in part.state.get(parameter, {}).items()
        }


_Groups = list[tuple[list[nn.Parameter], float]]  # and how much each decays


def _is_muons(parameter: nn.Parameter, recipe: OptimiserRecipe) -> bool:
    return recipe.matrices == "muon" and parameter.ndim == 2


def _as_torch(groups: _Groups) -> list[dict[str, Any]]:
    return [{"params": group, "weight_decay": weight} for group, weight in groups if group]


def _muon(groups: _Groups, recipe: OptimiserRecipe) -> torch.optim.Optimizer:
    muon = torch.optim.Muon(_as_torch(groups), lr=recipe.rate, adjust_lr_fn="match_rms_adamw")
    for matrices, _ in groups:
        for matrix in matrices:
            muon.state[matrix] = {"momentum_buffer": torch.zeros_like(matrix, requires_grad=False)}
    return muon


def _adamw(groups: _Groups, recipe: OptimiserRecipe) -> torch.optim.Optimizer:
    parameters = [parameter for group, _ in groups for parameter in group]
    fused = any(parameter.is_cuda for parameter in parameters)
    beta1, beta2 = recipe.betas
    adamw = torch.optim.AdamW(_as_torch(groups), lr=recipe.rate, betas=(beta1, beta2), fused=fused)
    for parameter in parameters:
        adamw.state[parameter] = {
            "step": torch.zeros((), device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return adamw


class Ema:
    """Exponential moving average of trained weights.

    After t updates the next one has the decay (1 + t) / (10 + t) or `decay`, whichever is less, so that the average
    soon forgets what it began with.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.average = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, before: int) -> None:
        """After another step of the optimiser, with so many `before` it."""
        decay = min(self.decay, (1 + before) / (10 + before))
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averages in place of the weights, for as long as the block lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)
