"""Gated cross-attention: what is shared, when it acts, what a zero gate means, and that rows do not meet."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moshivis.adapters.gated_cross_attention import GatedCrossAttention, ImageKV
from moshivis.config import AdapterConfig, BackboneConfig, DepthConfig, SpeechLMConfig, from_dict
from moshivis.speech_lm.lm import SpeechLM

CHECKED = settings(derandomize=True, deadline=None, max_examples=25)
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=2e-5)
DIM, HEADS, LAYERS, TOKENS = 16, 2, 3, 5
VARIANTS = [
    from_dict(AdapterConfig, dict(zip(("sharing", "gate", "gate_input", "gate_activation"), values, strict=True)))
    for values in itertools.product(
        ("qkv", "kv", "none"), ("layer", "shared", "none"), ("conditional", "constant"), ("sigmoid", "tanh")
    )
]


def make(config: AdapterConfig | None = None, seed: int = 0, **options: Any) -> GatedCrossAttention:
    torch.manual_seed(seed)
    adapters = GatedCrossAttention(config or AdapterConfig(**options), DIM, HEADS, LAYERS)
    for parameter in adapters.gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if adapters.scale is not None:
        torch.nn.init.normal_(adapters.scale)
    return adapters.eval().requires_grad_(False)


def language() -> SpeechLM:
    torch.manual_seed(1)
    config = SpeechLMConfig(
        text_card=9,
        audio_card=7,
        own_codebooks=2,
        user_codebooks=1,
        delays=(0, 0, 0, 0),
        backbone=BackboneConfig(dim=DIM, num_heads=HEADS, num_layers=LAYERS, feed_forward=40, context=32),
        depth=DepthConfig(dim=8, num_heads=2, num_layers=1, feed_forward=12),
    )
    return SpeechLM(config).eval().requires_grad_(False)


def pictures(batch: int, seed: int = 0, tokens: int = TOKENS, width: int = DIM) -> Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def speech(batch: int, steps: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 7, (batch, 4, steps), generator=torch.Generator().manual_seed(seed))


def hidden(lm: SpeechLM, tokens: Tensor, adapters: GatedCrossAttention, image: ImageKV) -> Tensor:
    return lm(tokens, adapters.context(image, tokens.shape[-1])).hidden


# parameters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["qkv", "kv", "none"])
@pytest.mark.parametrize("gate", ["layer", "shared", "none"])
def test_what_is_shared_is_there_once(
    sharing: Literal["qkv", "kv", "none"], gate: Literal["layer", "shared", "none"]
) -> None:
    adapters = make(sharing=sharing, gate=gate, source_dim=10)
    projections = {"qkv": 1, "kv": LAYERS, "none": LAYERS}[sharing] * 2 * DIM * DIM
    keys_values = {"qkv": 1, "kv": 1, "none": LAYERS}[sharing] * 2 * DIM * 10
    gates = {"layer": LAYERS, "shared": 1, "none": 0}[gate] * 2 * DIM * (DIM // 8)
    scales = LAYERS if sharing == "qkv" and gate == "shared" else 0
    norms = LAYERS * DIM
    count = sum(parameter.numel() for parameter in adapters.parameters())
    assert count == projections + keys_values + gates + scales + norms
    assert len(adapters.encode(pictures(1, width=10)).keys) == {"qkv": 1, "kv": 1, "none": LAYERS}[sharing]


def test_two_models_share_nothing() -> None:
    first, second = make(seed=0), make(seed=1)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert not torch.equal(first.state_dict()["query.0.weight"], second.state_dict()["query.0.weight"])


@pytest.mark.parametrize("layers", [(), (0, 3), (-1,), (1, 1)])
def test_blocks_that_do_not_exist_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="distinct blocks out of 0 to 2"):
        make(layers=layers)


# gates ---------------------------------------------------------------------------------------------------------------


def test_a_zero_gate_is_the_backbone_exactly() -> None:
    lm, tokens = language(), speech(2, 6)
    adapters = make(gate_activation="tanh", gate_input="constant")
    image = adapters.encode(pictures(2))
    assert not torch.equal(hidden(lm, tokens, adapters, image), lm(tokens).hidden)
    for gate in adapters.gate.parameters():
        gate.zero_()
    assert torch.equal(hidden(lm, tokens, adapters, image), lm(tokens).hidden)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_untrained_gates_are_almost_or_exactly_closed(activation: Literal["sigmoid", "tanh"]) -> None:
    adapters = GatedCrossAttention(AdapterConfig(gate_activation=activation), DIM, HEADS, LAYERS)
    context = adapters.context(adapters.encode(pictures(2)), 4)
    language()(speech(2, 4), context)
    expected = {"sigmoid": 0.017986, "tanh": 0.0}[activation]
    torch.testing.assert_close(context.gate(), torch.full((2, 4), expected), rtol=0, atol=1e-5)


def test_the_gate_number_is_the_sum_over_ten_layers_by_ten_or_by_their_number() -> None:
    adapters = make(layers=(0, 2))
    context = adapters.context(adapters.encode(pictures(2)), 4)
    language()(speech(2, 4), context)
    layers = context.layer_gates()
    assert layers.shape == (LAYERS, 2, 4) and (layers[1] == 0).all() and (layers[[0, 2]] > 0).all()
    torch.testing.assert_close(layers[2], context.gates[2].mean(-1))
    torch.testing.assert_close(context.gate(), layers.sum(0) / LAYERS)
    deep = GatedCrossAttention(AdapterConfig(gate_input="constant"), DIM, HEADS, 12)
    context = deep.context(deep.encode(pictures(1)), 1)
    for layer in range(12):
        deep.get_parameter(f"gate.{layer}.alpha").data.fill_(layer)
        context(layer, torch.zeros(1, 1, DIM))
    expected = torch.sigmoid(torch.arange(2.0, 12.0) - 4).sum() / 10
    torch.testing.assert_close(context.gate()[0, 0], expected)


def test_without_gates_nothing_is_reported() -> None:
    adapters = make(gate="none")
    context = adapters.context(adapters.encode(pictures(2)), 4)
    language()(speech(2, 4), context)
    assert not context.gates and (context.gate() == 0).all()


# rows and masks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.sharing}-{c.gate}-{c.gate_input}-{c.gate_activation}")
def test_rows_do_not_meet_and_one_without_image_is_the_backbone(config: AdapterConfig) -> None:
    lm, adapters = language(), make(config)
    tokens, images = speech(3, 6), pictures(3)
    present = torch.tensor([True, False, True])
    mask = torch.ones(3, TOKENS, dtype=torch.bool)
    mask[1], mask[2, 2:] = False, False
    together = hidden(lm, tokens, adapters, adapters.encode(images, mask, present))
    assert torch.equal(together[1], lm(tokens).hidden[1])
    for row, real in ((0, TOKENS), (2, 2)):
        alone = adapters.encode(images[row : row + 1, :real])
        assert_close(together[row : row + 1], hidden(lm, tokens[row : row + 1], adapters, alone))


def test_a_row_without_image_or_tokens_gives_finite_gradients() -> None:
    lm, adapters = language(), make().requires_grad_(True)
    mask, present = torch.zeros(2, TOKENS, dtype=torch.bool), torch.tensor([False, True])
    mask[1, 0] = True
    with torch.enable_grad():
        hidden(lm, speech(2, 5), adapters, adapters.encode(pictures(2), mask, present)).sum().backward()
    gradients = [parameter.grad for parameter in adapters.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_a_row_without_image_reports_no_gate() -> None:
    adapters = make()
    context = adapters.context(adapters.encode(pictures(2), present=torch.tensor([False, True])), 4)
    language()(speech(2, 4), context)
    assert (context.gate()[0] == 0).all() and (context.gate()[1] > 0).all()


# steps and scope -----------------------------------------------------------------------------------------------------


@CHECKED
@given(
    config=st.sampled_from(VARIANTS),
    start=st.none() | st.integers(0, 5),
    end=st.none() | st.integers(0, 5),
    layers=st.none() | st.sampled_from(((0,), (1, 2))),
    steps=st.integers(1, 8),
)
def test_step_equals_forward(
    config: AdapterConfig, start: int | None, end: int | None, layers: tuple[int, ...] | None, steps: int
) -> None:
    lm, tokens = language(), speech(2, steps)
    adapters = make(dataclasses.replace(config, start=start, end=end, layers=layers))
    image = adapters.encode(pictures(2))
    state, seen = lm.new_state(2), adapters.new_state(2)
    parts = [lm.step(state, tokens[..., t : t + 1], adapters.step_context(seen, image)).hidden for t in range(steps)]
    assert_close(torch.cat(parts, dim=1), hidden(lm, tokens, adapters, image))


@CHECKED
@given(start=st.integers(0, 4), length=st.integers(0, 4))
def test_adapters_act_from_start_for_so_many_steps(start: int, length: int) -> None:
    adapters = make(start=start, end=length)
    context = adapters.context(adapters.encode(pictures(1)), 9)
    update = context(0, torch.randn(1, 9, DIM))
    assert update is not None
    acting = update.abs().sum(-1)[0] > 0
    assert acting.tolist() == [start <= t < start + length for t in range(9)]


def test_start_counts_the_steps_that_a_row_has_seen_an_image() -> None:
    adapters = make(start=2)
    images, state = pictures(3), adapters.new_state(3)
    acting: list[list[bool]] = []
    for present, active in (
        ([True, True, False], [True, True, True]),
        ([True, True, False], [True, False, True]),
        ([True, True, True], [True, True, True]),
        ([True, True, True], [True, True, True]),
    ):
        image = adapters.encode(images, present=torch.tensor(present))
        context = adapters.step_context(state, image, torch.tensor(active))
        update = context(0, torch.randn(3, 1, DIM))
        assert update is not None
        acting.append((update.abs().sum((1, 2)) > 0).tolist())
        assert (context.gate()[:, 0] > 0).tolist() == acting[-1]
    assert state.seen.tolist() == [4, 3, 2]
    assert acting == [[False] * 3, [False] * 3, [True, False, False], [True, True, False]]
    state.reset(torch.tensor([True, False, False]))
    assert state.seen.tolist() == [0, 3, 2]


def test_in_generation_layers_may_all_use_the_first_keys() -> None:
    own = make(sharing="none")
    first = make(sharing="none", stream_keys="first")
    assert len(own.encode(pictures(1), streaming=True).keys) == LAYERS
    assert len(first.encode(pictures(1)).keys) == LAYERS
    assert len(first.encode(pictures(1), streaming=True).keys) == 1
