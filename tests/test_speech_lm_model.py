"""The speech LM: step equals forward, rows do not meet, the window holds, codebooks at once equal one by one."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moshivis.config import BackboneConfig, DepthConfig, SpeechLMConfig
from moshivis.speech_lm.embedding import StreamEmbedding, TokenTables
from moshivis.speech_lm.lm import SpeechLM

CHECKED = settings(derandomize=True, deadline=None, max_examples=25)
assert_close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=2e-5)


def make(
    *,
    own: int = 3,
    user: int = 2,
    layers: int = 2,
    context: int = 64,
    depth_context: int = 8,
    per_step: bool = True,
    positions: str = "rope",
) -> SpeechLM:
    torch.manual_seed(own + 10 * user + 100 * layers)
    config = SpeechLMConfig(
        text_card=17,
        audio_card=11,
        own_codebooks=own,
        user_codebooks=user,
        delays=(0, *[0, *[1] * (own - 1)], *[0, *[1] * (user - 1)]),
        backbone=BackboneConfig(
            dim=16,
            num_heads=2,
            num_layers=layers,
            feed_forward=64,
            context=context,
            positions="rope" if positions == "rope" else "none",
        ),
        depth=DepthConfig(
            dim=8, num_heads=2, num_layers=2, feed_forward=33, context=depth_context, input_per_step=per_step
        ),
    )
    return SpeechLM(config).eval().requires_grad_(False)


def some_tokens(lm: SpeechLM, batch: int, steps: int, seed: int = 0) -> Tensor:
    """Ordinary, initial and zero tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, lm.config.audio_card + 1, (batch, lm.config.num_streams, steps), generator=generator)


@CHECKED
@given(steps=st.integers(1, 14), context=st.integers(1, 16), seed=st.integers(0, 99))
def test_step_equals_forward(steps: int, context: int, seed: int) -> None:
    lm = make(context=context)
    tokens = some_tokens(lm, 2, steps, seed)
    whole = lm(tokens)
    state = lm.new_state(2)
    parts = [lm.step(state, tokens[..., t : t + 1]) for t in range(steps)]
    assert_close(torch.cat([part.hidden for part in parts], dim=1), whole.hidden)
    assert_close(torch.cat([part.text_logits for part in parts], dim=1), whole.text_logits)


def test_step_equals_forward_without_positions() -> None:
    lm = make(positions="none")
    tokens = some_tokens(lm, 1, 6)
    state = lm.new_state(1)
    parts = [lm.step(state, tokens[..., t : t + 1]).hidden for t in range(6)]
    assert_close(torch.cat(parts, dim=1), lm(tokens).hidden)


@CHECKED
@given(
    starts=st.lists(st.integers(0, 6), min_size=2, max_size=4),
    pauses=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 15)), max_size=6),
    context=st.integers(2, 12),
)
def test_a_row_equals_a_single_row_whenever_it_starts_and_pauses(
    starts: list[int], pauses: list[tuple[int, int]], context: int
) -> None:
    lm, batch, steps = make(context=context), len(starts), 16
    tokens = some_tokens(lm, batch, steps)
    running = torch.tensor([[t >= start for t in range(steps)] for start in starts])
    for row, step in pauses:
        running[row % batch, step] = False
    state = lm.new_state(batch)
    together = [lm.step(state, tokens[..., t : t + 1], None, running[:, t]).hidden for t in range(steps)]
    for row in range(batch):
        own = lm.new_state(1)
        for t in range(steps):
            if running[row, t]:
                alone = lm.step(own, tokens[row : row + 1, :, t : t + 1]).hidden
                assert_close(together[t][row : row + 1], alone)


def test_a_reset_row_starts_anew_and_the_others_go_on() -> None:
    lm, steps = make(context=5), 8
    tokens = some_tokens(lm, 2, 2 * steps)
    state = lm.new_state(2)
    first = [lm.step(state, tokens[..., t : t + 1]).hidden for t in range(steps)]
    for layer in state.layers:  # as after an overflow in half precision
        layer.keys[0] = layer.values[0] = float("nan")
    state.reset(torch.tensor([True, False]))
    again = torch.stack([tokens[0], torch.cat([tokens[1, :, steps:], tokens[1, :, :steps]], dim=-1)])
    second = [lm.step(state, again[..., t : t + 1]).hidden for t in range(steps)]
    assert_close(torch.cat(second, dim=1)[0], torch.cat(first, dim=1)[0])
    assert_close(torch.cat(second, dim=1)[1], lm(tokens[1:]).hidden[0, steps:])


@CHECKED
@given(context=st.integers(1, 6), layers=st.integers(1, 3))
def test_what_lies_beyond_the_window_has_no_influence(context: int, layers: int) -> None:
    """A key that is `context` steps old is gone; through L layers the past reaches L * (context - 1) steps."""
    lm, steps = make(context=context, layers=layers), 22
    tokens = some_tokens(lm, 1, steps)
    changed = tokens.clone()
    changed[..., 0] = (tokens[..., 0] + 2).clamp(max=lm.config.audio_card)
    reach = layers * (context - 1)
    difference = (lm(tokens).hidden - lm(changed).hidden).abs().amax(dim=(0, 2))
    assert difference[: reach + 1].amin() > 0
    assert difference[reach + 1 :].sum() == 0


def test_the_future_has_no_influence() -> None:
    lm = make()
    tokens = some_tokens(lm, 1, 8)
    assert_close(lm(tokens[..., :5]).hidden, lm(tokens).hidden[:, :5])


def test_an_empty_fusion_changes_nothing() -> None:
    lm = make()
    tokens = some_tokens(lm, 1, 5)
    assert torch.equal(lm(tokens, lambda layer, x: None).hidden, lm(tokens).hidden)
    assert not torch.equal(lm(tokens, lambda layer, x: x if layer == 1 else None).hidden, lm(tokens).hidden)


# depth ---------------------------------------------------------------------------------------------------------------


@CHECKED
@given(own=st.integers(1, 6), context=st.integers(1, 8), per_step=st.booleans(), seed=st.integers(0, 99))
def test_depth_by_codebook_equals_depth_at_once(own: int, context: int, per_step: bool, seed: int) -> None:
    lm, frames = make(own=own, depth_context=context, per_step=per_step), 5
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(frames, lm.config.backbone.dim, generator=generator)
    text = torch.randint(-1, lm.config.text_card + 1, (frames,), generator=generator)
    audio = torch.randint(-1, lm.config.audio_card, (frames, own), generator=generator)
    seen: list[Tensor] = []

    def choose(logits: Tensor, stream: int) -> Tensor:
        seen.append(logits)
        assert stream == len(seen)
        return audio[:, stream - 1]

    assert torch.equal(lm.sample_audio(hidden, text, choose), audio)
    at_once = lm.depth_logits(hidden, text, audio)
    assert at_once.shape == (frames, own, lm.config.audio_card)
    assert_close(torch.stack(seen, dim=1), at_once)
    with torch.enable_grad():  # training takes another way through the attention
        trained = lm.depth_logits(hidden.requires_grad_(), text, audio)
    assert_close(trained.detach(), at_once)


def test_a_frame_of_the_depth_transformer_knows_no_other_frame() -> None:
    lm = make()
    hidden, text = torch.randn(4, 16), torch.randint(0, 17, (4,))
    audio = torch.randint(0, 11, (4, 3))
    some = torch.tensor([2, 0])
    logits = lm.depth_logits(hidden, text, audio)
    assert_close(lm.depth_logits(hidden[some], text[some], audio[some]), logits[some])


# embedding -----------------------------------------------------------------------------------------------------------


def test_the_embedding_is_the_sum_over_the_streams() -> None:
    embedding = StreamEmbedding(17, 11, 4, 8).requires_grad_(False)
    tokens = torch.randint(0, 11, (2, 5, 3))
    expected = embedding.text.weight[0][tokens[:, 0]]
    for k in range(4):
        expected = expected + embedding.audio.weight[k][tokens[:, k + 1]]
    torch.testing.assert_close(embedding(tokens), expected)
    assert (embedding(torch.full((1, 5, 2), -1)) == 0).all()


@pytest.mark.parametrize("streams", [1, 3])
def test_tables_agree_on_one_stream_and_on_all(streams: int) -> None:
    tables = TokenTables(streams, 6, 4).requires_grad_(False)
    ids = torch.randint(-2, 6, (5, streams))
    together = tables(ids)
    for k in range(streams):
        assert torch.equal(tables.step(ids[:, k], k), together[:, k])


# training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
def test_every_parameter_learns(autocast: bool) -> None:
    lm = make(context=6).requires_grad_(True)
    tokens = some_tokens(lm, 2, 9)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden, text_logits = lm(tokens)
        audio = tokens[:, 1:4].clamp(min=0).transpose(1, 2).flatten(0, 1)
        audio_logits = lm.depth_logits(hidden.flatten(0, 1), tokens[:, 0].flatten(), audio)
    (text_logits.float().logsumexp(-1).sum() + audio_logits.float().logsumexp(-1).sum()).backward()
    for name, parameter in lm.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
