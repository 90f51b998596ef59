"""Learning rates, decay, the average of weights, and LoRA's equality of sequences and steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moshivis.model import MoshiVis
from moshivis.training.lora import add_lora
from moshivis.training.optim import Ema, Optimiser, rate_at
from moshivis.training.recipe import LoraRecipe, OptimiserRecipe


def test_the_rate_warms_up_and_falls_to_its_final_share() -> None:
    recipe = OptimiserRecipe(rate=2.0, warmup=10, final=0.25)
    rates = [rate_at(step, 111, recipe) for step in range(111)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2.0) and rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2.0 * (0.25 + 0.75 / 2)) and rates[110] == pytest.approx(0.5)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert rate_at(0, 10, OptimiserRecipe(rate=1.0, warmup=0)) == 1.0


def test_matrices_decay_and_vectors_do_not() -> None:
    parameters = {"matrix": nn.Parameter(torch.ones(2, 2)), "vector": nn.Parameter(torch.ones(2))}
    optimiser = Optimiser(parameters, OptimiserRecipe(rate=0.5, weight_decay=0.5))
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step(0.5)
    assert parameters["matrix"].eq(0.75).all() and parameters["vector"].eq(1).all()
    assert optimiser.tensors()["matrix.step"] == 1


def test_muon_moves_matrices_adamw_the_rest_and_both_go_on_from_their_state() -> None:
    def drawn() -> dict[str, nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return {"matrix": nn.Parameter(torch.randn(6, 4, generator=generator)), "vector": nn.Parameter(torch.ones(4))}

    def steps(optimiser: Optimiser, numbers: range) -> None:
        for number in numbers:
            for parameter in optimiser.parameters.values():
                parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            optimiser.step(0.1)

    recipe = OptimiserRecipe(rate=0.1, matrices="muon", weight_decay=0.0)
    whole = Optimiser(drawn(), recipe)
    assert {"matrix.momentum_buffer", "vector.exp_avg"} < set(
        whole.tensors()
    ) and "matrix.exp_avg" not in whole.tensors()
    steps(whole, range(1))
    # orthogonalised: all singular values of the first step are alike, as no gradient's are
    moved = torch.linalg.svdvals((whole.parameters["matrix"] - drawn()["matrix"]).detach())
    assert float(moved.max() / moved.min()) < 2
    steps(whole, range(1, 6))
    first, second = Optimiser(drawn(), recipe), Optimiser(drawn(), recipe)
    steps(first, range(3))
    for name, parameter in second.parameters.items():
        parameter.data.copy_(first.parameters[name].data)
    for name, tensor in second.tensors().items():
        tensor.copy_(first.tensors()[name])
    steps(second, range(3, 6))
    assert all(torch.equal(p, whole.parameters[name]) for name, p in second.parameters.items())


def test_clipping_limits_the_norm_and_zero_does_not() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    for clip, left in ((2.0, 2.0), (0.0, 10.0)):
        parameter.grad = torch.tensor([10.0])
        assert Optimiser({"p": parameter}, OptimiserRecipe(clip=clip)).clip() == 10
        assert float(parameter.grad) == pytest.approx(left)


def test_the_average_takes_the_place_of_the_weights_for_a_while() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    ema = Ema({"p": parameter}, 0.75)
    parameter.data.fill_(4.0)
    ema.update(before=1000)
    with ema.applied():
        assert parameter.item() == 1.0
    assert parameter.item() == 4.0 and float(ema.average["p"]) == 1.0


def test_the_average_forgets_where_it_began() -> None:
    parameter = nn.Parameter(torch.ones(1))
    ema = Ema({"p": parameter}, 0.9999)
    parameter.data.zero_()
    for step in range(1000):
        ema.update(before=step)
    assert float(ema.average["p"]) < 1e-6


@torch.no_grad()  # with gradients torch may take another kernel, which rounds otherwise
def test_low_rank_updates_are_zero_at_first_and_the_same_in_sequences_and_steps(tiny_model: MoshiVis) -> None:
    backbone = copy.deepcopy(tiny_model.speech_lm.backbone)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    before = backbone(x)
    add_lora(backbone, LoraRecipe(rank=2, targets=("in_proj", "linear_in")), torch.Generator().manual_seed(0))
    names = {name for name, _ in backbone.named_parameters() if "lora" in name}
    assert len(names) == 2 * 2 * 2
    assert backbone(x).equal(before)
    for name in names:
        backbone.get_parameter(name).data.normal_(generator=torch.Generator().manual_seed(1))
    after = backbone(x)
    assert not torch.allclose(after, before)
    state = backbone.new_state(2)
    steps = torch.cat([backbone.step(state, x[:, t : t + 1]) for t in range(5)], dim=1)
    torch.testing.assert_close(steps, after, rtol=1e-4, atol=1e-4)
