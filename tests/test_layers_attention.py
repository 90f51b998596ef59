"""Windowed attention: streaming equals the whole sequence, in any chunks, whatever the neighbouring rows do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from moshivis.layers.attention import Ring, SelfAttention, block_rotation, causal_mask
from moshivis.layers.rope import rotation

CHECKED = settings(derandomize=True, deadline=None, max_examples=40)
GOLDEN = Path(os.environ.get("MOSHIVIS_GOLDEN", Path(__file__).parent / "golden")) / "micro"
DIM, HEADS, PERIOD = 16, 2, 100.0


def attention() -> SelfAttention:
    torch.manual_seed(0)
    return SelfAttention(DIM, HEADS).requires_grad_(False)


def whole(layer: SelfAttention, x: Tensor, context: int) -> Tensor:
    steps = x.shape[1]
    rope = block_rotation(steps, DIM // HEADS, PERIOD)
    return layer(x, rope=rope, mask=None if steps <= context else causal_mask(steps, context))


class Stream:
    def __init__(self, layer: SelfAttention, batch: int, context: int):
        self.layer, self.ring = layer, Ring.new(batch, context)
        self.state = layer.new_state(batch, context)

    def step(self, x: Tensor, active: Tensor | None = None) -> Tensor:
        view = self.ring.view(x.shape[1])
        rope = rotation(view.positions, DIM // HEADS, PERIOD)
        y = self.layer.step(self.state, x, view, rope=rope, active=active)
        self.ring.advance(x.shape[1], active)
        return y


@CHECKED
@given(steps=st.integers(1, 20), context=st.integers(1, 24), seed=st.integers(0, 99))
def test_step_by_step_is_the_windowed_whole(steps: int, context: int, seed: int) -> None:
    layer, x = attention(), torch.randn(2, steps, DIM, generator=torch.Generator().manual_seed(seed))
    stream = Stream(layer, 2, context)
    y = torch.cat([stream.step(x[:, t : t + 1]) for t in range(steps)], dim=1)
    torch.testing.assert_close(y, whole(layer, x, context), rtol=1e-4, atol=1e-5)


@CHECKED
@given(chunks=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_chunks_inside_the_window_are_the_whole(chunks: list[int], seed: int) -> None:
    total = sum(chunks)
    layer, x = attention(), torch.randn(1, total, DIM, generator=torch.Generator().manual_seed(seed))
    stream = Stream(layer, 1, total)
    y = torch.cat([stream.step(part) for part in x.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(y, whole(layer, x, total), rtol=1e-4, atol=1e-5)


@CHECKED
@given(pattern=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=16))
def test_rows_pause_and_reset_alone(pattern: list[tuple[bool, bool]]) -> None:
    """Row 0 runs when the pattern says so, row 1 always; row 0 is reset at times. Each equals its own stream."""
    layer, context = attention(), 5
    generator = torch.Generator().manual_seed(len(pattern))
    both, single, neighbour = Stream(layer, 2, context), Stream(layer, 1, context), Stream(layer, 1, context)
    for runs, resets in pattern:
        x = torch.randn(2, 1, DIM, generator=generator)
        if resets:
            both.ring.reset(torch.tensor([True, False]))
            single = Stream(layer, 1, context)
        y = both.step(x, torch.tensor([runs, True]))
        torch.testing.assert_close(y[1:], neighbour.step(x[1:]), rtol=1e-4, atol=1e-5)
        if runs:
            torch.testing.assert_close(y[:1], single.step(x[:1]), rtol=1e-4, atol=1e-5)


def test_visible_positions_are_those_of_the_release() -> None:
    spec = json.loads((GOLDEN / "meta.json").read_text())["spec"]
    expected = load_file(GOLDEN / "outputs.safetensors")["cache.returned_positions"]
    ring = Ring.new(1, spec["cache_context"])
    held = torch.full((spec["cache_context"],), -1.0)
    for step in range(spec["cache_steps"]):
        view = ring.view(1)
        held[view.slots[0, 0]] = step
        seen = held[: view.visible.shape[-1]][view.visible[0, 0, 0]].sort().values
        assert seen.tolist() == [position for position in expected[step].tolist() if position >= 0]
        ring.advance(1)


def test_more_steps_than_the_window_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 4 steps"):
        Ring.new(1, 4).view(5)


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="not divisible"):
        SelfAttention(10, 3)
