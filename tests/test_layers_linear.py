"""Products with frozen weights take a shorter way: it computes the same, and follows every change of a weight."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from moshivis.codec.quantizer import Codebook
from moshivis.layers import conv
from moshivis.layers.conv import CausalConv1d, CausalConvTranspose1d, Conv1d
from moshivis.layers.linear import Linear, _has_onednn

CHECKED = settings(derandomize=True, deadline=None, max_examples=40)
SEEDS = st.integers(0, 2**31)
shorter = pytest.mark.skipif(not _has_onednn(), reason="there is no shorter way without oneDNN")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


def took_the_shorter_way(layer: Linear | Conv1d | CausalConvTranspose1d | Codebook) -> bool:
    return layer._laid._held is not None


# the same numbers ----------------------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    bias=st.booleans(),
    seed=SEEDS,
)
@CHECKED
def test_a_frozen_linear_layer_is_pytorchs(shape: list[int], sizes: tuple[int, int], bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = Linear(*sizes, bias=bias).requires_grad_(False)
    x = torch.randn(*shape, sizes[0])
    close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert took_the_shorter_way(layer) == _has_onednn()


@st.composite
def convolutions(draw: st.DrawFn) -> Conv1d:
    groups = draw(st.sampled_from((1, 1, 2)))
    return Conv1d(
        groups * draw(st.integers(1, 5)),
        groups * draw(st.integers(1, 5)),
        draw(st.integers(1, 9)),
        stride=draw(st.integers(1, 5)),
        dilation=draw(st.integers(1, 3)),
        groups=groups,
        bias=draw(st.booleans()),
    )


def signal(layout: Literal["channels", "steps"], batch: int, channels: int, steps: int) -> Tensor:
    """Noise [B, C, T] whose memory is [B, C, T] or [B, T, C]."""
    if layout == "channels":
        return torch.randn(batch, channels, steps)
    return torch.randn(batch, steps, channels).transpose(1, 2)


@given(
    layer=convolutions(),
    layout=st.sampled_from(("channels", "steps")),
    batch=st.integers(1, 3),
    more=st.integers(0, 9),
    few=st.sampled_from((0, 512)),  # every result is too many, or none
    seed=SEEDS,
)
@CHECKED
def test_every_way_of_a_convolution_is_pytorchs(
    layer: Conv1d, layout: Literal["channels", "steps"], batch: int, more: int, few: int, seed: int
) -> None:
    torch.manual_seed(seed)
    span = (layer.kernel_size[0] - 1) * layer.dilation[0] + 1
    x = signal(layout, batch, layer.in_channels, span + more)
    expected = F.conv1d(x, layer.weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)
    learning = layer(x)
    close(learning, expected)
    weights = list(layer.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(learning.square().sum(), weights),
        torch.autograd.grad(expected.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)
    assert not took_the_shorter_way(layer)
    usual, conv.FEW = conv.FEW, few
    try:
        close(layer.requires_grad_(False)(x), expected.detach())
    finally:
        conv.FEW = usual
    shortest = layer.groups == 1 and (few > 0 or layer.kernel_size == (1,))
    assert took_the_shorter_way(layer) == (shortest and _has_onednn())


@given(
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5)),
    layout=st.sampled_from(("channels", "steps")),
    batch=st.integers(1, 3),
    steps=st.integers(1, 9),
    seed=SEEDS,
)
@CHECKED
def test_every_way_of_a_transposed_convolution_is_pytorchs(
    sizes: tuple[int, int, int], layout: Literal["channels", "steps"], batch: int, steps: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = CausalConvTranspose1d(*sizes)
    x = signal(layout, batch, sizes[0], steps)
    expected = layer.convtr(x)[..., : -layer.stride]
    learning = layer(x)
    close(learning, expected)
    weights = list(layer.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(learning.square().sum(), weights),
        torch.autograd.grad(expected.square().sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)
    assert not took_the_shorter_way(layer)
    close(layer.requires_grad_(False)(x), expected.detach())
    assert took_the_shorter_way(layer) == _has_onednn()


def test_an_input_that_wants_gradients_gets_them_from_frozen_weights() -> None:
    layers = [Linear(4, 3), CausalConv1d(4, 3, 5), CausalConvTranspose1d(4, 3, 2)]
    for layer, shape in zip(layers, [(2, 6, 4), (2, 4, 6), (2, 4, 6)], strict=True):
        x = torch.randn(shape, requires_grad=True)
        layer.requires_grad_(False)(x).square().sum().backward()
        assert x.grad is not None and x.grad.abs().min() > 0


@given(seed=SEEDS, entries=st.integers(1, 40))
@CHECKED
def test_the_shorter_way_to_the_nearest_entry_finds_the_nearest(seed: int, entries: int) -> None:
    torch.manual_seed(seed)
    book = Codebook(5, entries)
    book.embedding_sum.normal_()
    book.cluster_usage.uniform_(0, 2)
    book.cluster_usage[0] = 0  # an unused entry is far away, not infinitely far
    x = torch.randn(7, 5)
    codes = book.encode(x)
    distances = (x[:, None] - book.embedding).square().sum(-1)
    close(distances.gather(1, codes[:, None])[:, 0], distances.min(dim=1).values)
    assert torch.equal(book.look_up(codes), book.embedding[codes])
    assert torch.equal(codes, book.encode(x, book.embedding))


# what is not frozen, or not float32 -----------------------------------------------------------------------------------


def test_other_numbers_than_float32_go_the_usual_way() -> None:
    layer = Linear(4, 3).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4)).dtype == torch.bfloat16
    assert not took_the_shorter_way(layer)
    double = layer.double()
    assert double(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
    assert not took_the_shorter_way(double)


def test_what_has_left_the_cpu_is_not_held_there() -> None:
    layer = Linear(8, 8).requires_grad_(False)
    layer(torch.randn(2, 8))
    assert took_the_shorter_way(layer) == _has_onednn()
    layer.to("meta")(torch.randn(2, 8, device="meta"))
    assert not took_the_shorter_way(layer)


def test_what_is_float32_no_more_is_not_held_as_such() -> None:
    layer = Linear(8, 8).requires_grad_(False)
    layer(torch.randn(2, 8))
    layer.to(torch.bfloat16)(torch.randn(2, 8, dtype=torch.bfloat16))
    assert not took_the_shorter_way(layer)


def test_large_matrices_are_not_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moshivis.layers.linear.LARGEST", 4 * 4 * 3 - 1)
    layer = Linear(4, 3, bias=False).requires_grad_(False)
    x = torch.randn(2, 4)
    close(layer(x), x @ layer.weight.t())
    assert not took_the_shorter_way(layer)


def test_weights_made_in_inference_mode_keep_no_version_and_are_read_as_they_are() -> None:
    with torch.inference_mode():
        layer = Linear(4, 3).requires_grad_(False)
        x = torch.randn(2, 4)
        first = layer(x)
        layer.weight.mul_(2)
        layer.bias.mul_(2)
        close(layer(x), 2 * first)
    assert not took_the_shorter_way(layer)


# changes --------------------------------------------------------------------------------------------------------------


def in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(1)


def in_place_while_inferring(layer: nn.Module) -> None:
    with torch.inference_mode():
        for weight in layer.parameters():
            weight.mul_(-2)


def from_a_checkpoint(layer: nn.Module) -> None:
    layer.load_state_dict({name: torch.randn_like(weight) for name, weight in layer.state_dict().items()})


def by_assignment(layer: nn.Module) -> None:
    state = {name: torch.randn_like(weight) for name, weight in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def by_other_memory(layer: nn.Module) -> None:
    for weight in layer.parameters():
        weight.data = torch.randn_like(weight)


def by_other_types(layer: nn.Module) -> None:
    """There and back: the memory may be where it was, and no version is counted."""
    layer.to(torch.bfloat16)
    for weight in layer.parameters():
        weight.data.neg_()
    layer.to(torch.float32)


def by_memory_that_comes_and_goes(layer: nn.Module) -> None:
    """Other memory again and again, each given back before the next is taken."""
    for _ in range(5):
        by_other_memory(layer)


def by_training(layer: nn.Module, **options: bool) -> None:
    layer.requires_grad_(True)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, **options)  # type: ignore[arg-type]
    for _ in range(2):
        layer(torch.randn(1, 4, 4)).square().sum().backward()
        optimiser.step()
    layer.requires_grad_(False)


def by_fused_training(layer: nn.Module) -> None:
    """Fused optimisers write without counting a version."""
    by_training(layer, fused=True)


CHANGES = [
    in_place,
    in_place_while_inferring,
    from_a_checkpoint,
    by_assignment,
    by_other_memory,
    by_memory_that_comes_and_goes,
    by_other_types,
    by_training,
    by_fused_training,
]


@shorter
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [Linear, lambda c, d: Conv1d(c, d, 3), lambda c, d: CausalConvTranspose1d(c, d, 2)])
def test_a_change_of_the_weights_is_followed(
    make: Callable[[int, int], Linear], change: Callable[[nn.Module], None]
) -> None:
    layer = make(4, 5).requires_grad_(False)
    x = torch.randn(1, 4, 4)
    before = layer(x)
    assert took_the_shorter_way(layer)
    for _ in range(3):
        change(layer)
        twin = make(4, 5)
        twin.load_state_dict(layer.state_dict())
        after = layer(x)
        close(after, twin(x).detach())  # the twin learns: it reads its weights as they are
        assert not torch.allclose(after, before)
        before = after


@shorter
def test_a_codebook_that_learns_is_followed() -> None:
    book = Codebook(5, 8)
    book.embedding_sum.normal_()
    book.initialized.fill_(1)
    x = torch.randn(40, 5)
    for _ in range(12):
        codes = book.encode(x)
        assert took_the_shorter_way(book)
        assert torch.equal(codes, book.encode(x, book.embedding))
        book.learn(x + 0.3, codes)


@shorter
def test_copies_share_nothing_and_no_state_is_saved() -> None:
    layer = Linear(4, 3).requires_grad_(False)
    x = torch.randn(2, 4)
    expected = layer(x)
    assert list(layer.state_dict()) == ["weight", "bias"]
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not took_the_shorter_way(copied)
        in_place(copied)
        assert not torch.allclose(copied(x), expected)
    close(layer(x), expected)
