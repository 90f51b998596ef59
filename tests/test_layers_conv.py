"""Causal convolutions: what they compute, and that streaming them changes nothing."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moshivis.layers.conv import CausalConv1d, CausalConvTranspose1d, ConvState, ConvTransposeState

Layer = CausalConv1d | CausalConvTranspose1d

CHECKED = settings(derandomize=True, deadline=None, max_examples=60)
SEEDS = st.integers(0, 2**31)


@st.composite
def convolutions(draw: st.DrawFn) -> CausalConv1d:
    stride = draw(st.integers(1, 4))
    dilation = draw(st.integers(1, 3)) if stride == 1 else 1
    kernel = draw(st.integers(stride, 2 * stride + 3))
    groups = draw(st.sampled_from((1, 2)))
    pad: Literal["zeros", "replicate"] = draw(st.sampled_from(("zeros", "replicate")))
    return CausalConv1d(
        4, 6, kernel, stride=stride, dilation=dilation, groups=groups, bias=draw(st.booleans()), pad=pad
    )


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> CausalConvTranspose1d:
    depthwise = draw(st.booleans())
    return CausalConvTranspose1d(
        4, 4 if depthwise else 3, draw(st.integers(1, 5)), depthwise=depthwise, bias=draw(st.booleans())
    )


layers = st.one_of(convolutions(), transposed_convolutions())
chunkings = st.lists(st.integers(1, 5), min_size=1, max_size=6)


def signal(seed: int, batch: int, layer: Layer, units: int) -> Tensor:
    """Noise [batch, 4, units * in-stride]: `units` shortest possible calls."""
    steps = units * (layer.stride if isinstance(layer, CausalConv1d) else 1)
    return torch.randn(batch, 4, steps, generator=torch.Generator().manual_seed(seed))


def split(x: Tensor, layer: Layer, chunks: list[int]) -> tuple[Tensor, ...]:
    return x.split([c * (layer.stride if isinstance(layer, CausalConv1d) else 1) for c in chunks], dim=-1)


def stream(layer: Layer, state: ConvState | ConvTransposeState, pieces: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([layer.step(state, piece) for piece in pieces], dim=-1)  # type: ignore[arg-type]


@given(layer=layers, chunks=chunkings, batch=st.integers(1, 3), seed=SEEDS)
@CHECKED
def test_streaming_in_any_chunks_changes_nothing(layer: Layer, chunks: list[int], batch: int, seed: int) -> None:
    x = signal(seed, batch, layer, sum(chunks))
    with torch.no_grad():
        streamed = stream(layer, layer.new_state(batch), split(x, layer, chunks))
        torch.testing.assert_close(streamed, layer(x), atol=1e-5, rtol=1e-5)


@given(
    layer=layers,
    calls=st.lists(
        st.tuples(st.integers(1, 3), st.lists(st.booleans(), min_size=3, max_size=3), st.integers(0, 7)),
        min_size=1,
        max_size=6,
    ),
    seed=SEEDS,
)
@CHECKED
def test_rows_pause_and_reset_on_their_own(layer: Layer, calls: list[tuple[int, list[bool], int]], seed: int) -> None:
    """Each row of a batch gives what it would give alone; the bits of a call's number name the rows reset before it."""
    x = signal(seed, 3, layer, sum(chunk for chunk, _, _ in calls))
    pieces = split(x, layer, [chunk for chunk, _, _ in calls])
    state = layer.new_state(3)
    alone = [layer.new_state(1) for _ in range(3)]
    with torch.no_grad():
        for piece, (_, active, resets) in zip(pieces, calls, strict=True):
            state.reset(torch.tensor([bool(resets >> row & 1) for row in range(3)]))
            y = layer.step(state, piece, torch.tensor(active))  # type: ignore[arg-type]
            for row in range(3):
                if resets >> row & 1:
                    alone[row] = layer.new_state(1)
                if active[row]:
                    expected = layer.step(alone[row], piece[row : row + 1])  # type: ignore[arg-type]
                    torch.testing.assert_close(y[row : row + 1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad", ["zeros", "replicate"])
def test_convolution_pads_the_past_only(pad: Literal["zeros", "replicate"]) -> None:
    layer = CausalConv1d(2, 3, 6, stride=2, pad=pad)
    x = torch.randn(1, 2, 8)
    before = torch.zeros(1, 2, 4) if pad == "zeros" else x[..., :1].expand(-1, -1, 4)
    expected = F.conv1d(torch.cat([before, x], dim=-1), layer.conv.weight, layer.conv.bias, stride=2)
    assert expected.shape[-1] == 4
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_transposed_convolution_is_pytorchs_without_its_end(depthwise: bool, bias: bool) -> None:
    layer = CausalConvTranspose1d(4, 4, 3, depthwise=depthwise, bias=bias)
    x = torch.randn(2, 4, 5)
    expected = layer.convtr(x)[..., :-3]
    assert expected.shape[-1] == 15
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-5)


def test_replicate_padding_is_that_of_each_rows_own_first_step() -> None:
    """A row that starts later, or anew, replicates the step that it starts with."""
    layer = CausalConv1d(1, 1, 4, stride=2, pad="replicate")
    state = layer.new_state(2)
    first, second = torch.randn(2, 1, 2), torch.randn(2, 1, 2)
    late = torch.tensor([True, False])
    with torch.no_grad():
        layer.step(state, first, late)
        both = layer.step(state, second)
        torch.testing.assert_close(both[1:], layer(second[1:]))
        torch.testing.assert_close(both[:1], layer(torch.cat([first, second], -1)[:1])[..., 1:])
        state.reset(torch.tensor([True, False]))
        torch.testing.assert_close(layer.step(state, first)[:1], layer(first[:1]))


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_lengths_that_are_not_whole_strides_are_refused(steps: int) -> None:
    layer = CausalConv1d(1, 1, 4, stride=2)
    x = torch.zeros(1, 1, steps)
    with pytest.raises(ValueError, match="positive multiple of 2"):
        layer(x)
    with pytest.raises(ValueError, match="positive multiple of 2"):
        layer.step(layer.new_state(1), x)
