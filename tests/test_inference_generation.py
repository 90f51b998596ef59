"""Generation: which tokens go in and come out at each step, and that a row of a batch is a conversation of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moshivis.adapters.gated_cross_attention import GatedCrossAttention, ImageKV
from moshivis.config import AdapterConfig, BackboneConfig, DepthConfig, SpeechLMConfig
from moshivis.inference.generation import FREE, Frame, Generator
from moshivis.inference.sampling import GREEDY, Sampling, sample
from moshivis.speech_lm.lm import SpeechLM
from moshivis.speech_lm.streams import initial_tokens, model_inputs

CHECKED = settings(derandomize=True, deadline=None, max_examples=15)
OWN, USER, DIM = 3, 2, 16


def make(delays: tuple[int, ...] = (0, 0, 1, 1, 0, 1), context: int = 6, **adapters: Any) -> Generator:
    torch.manual_seed(3)
    config = SpeechLMConfig(
        text_card=17,
        audio_card=11,
        own_codebooks=OWN,
        user_codebooks=USER,
        delays=delays,
        backbone=BackboneConfig(dim=DIM, num_heads=2, num_layers=2, feed_forward=64, context=context),
        depth=DepthConfig(dim=8, num_heads=2, num_layers=1, feed_forward=33),
    )
    lm, adapter = SpeechLM(config), GatedCrossAttention(AdapterConfig(**adapters), DIM, 2, 2)
    for gate in adapter.gate.parameters():
        torch.nn.init.normal_(gate, std=0.5)
    return Generator(lm.eval().requires_grad_(False), adapter.eval().requires_grad_(False))


def image(generator: Generator, batch: int, seed: int = 0) -> ImageKV:
    assert generator.adapters is not None
    tokens = torch.randn(batch, 5, DIM, generator=torch.Generator().manual_seed(seed))
    return generator.adapters.encode(tokens, streaming=True)


def heard(batch: int, steps: int, seed: int = 0) -> Tensor:
    """[T, B, Ku]"""
    return torch.randint(0, 11, (steps, batch, USER), generator=torch.Generator().manual_seed(seed))


DELAYS = st.lists(st.integers(0, 2), min_size=6, max_size=6).map(tuple)


@CHECKED
@given(delays=DELAYS, steps=st.integers(1, 8))
def test_what_goes_in_and_what_comes_out(delays: tuple[int, ...], steps: int) -> None:
    """The inputs are those that training arranges from the returned tokens; frames come `max_delay` steps late."""
    generator = make(delays)
    config = generator.speech_lm.config
    seen: list[Tensor] = []
    hook = generator.speech_lm.embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0][..., 0]))
    state, user = generator.new_state(1), heard(1, steps)
    frames = [generator.step(state, codes, sampling=GREEDY) for codes in user]
    hook.remove()
    assert [bool(frame.valid[0]) for frame in frames] == [t >= config.max_delay for t in range(steps)]
    said = [frame.tokens for frame in frames[config.max_delay :]]
    codes = initial_tokens(config)[None, :, None].repeat(1, 1, steps)
    codes[:, 1 + OWN :] = user.permute(1, 2, 0)
    if said:
        codes[:, : 1 + OWN, : len(said)] = torch.stack(said, dim=2)
    expected, inputs = model_inputs(codes, config), torch.stack(seen, dim=2)
    for k, delay in enumerate(delays):
        known = len(said) + delay + 1 if k <= OWN else steps
        assert torch.equal(inputs[:, k, :known], expected[:, k, :known])


@CHECKED
@given(
    starts=st.lists(st.integers(0, 5), min_size=2, max_size=3),
    pauses=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 11)), max_size=5),
    scope=st.sampled_from(((None, None), (2, None), (None, 3), (1, 4))),
)
def test_a_row_equals_a_conversation_of_its_own(
    starts: list[int], pauses: list[tuple[int, int]], scope: tuple[int | None, int | None]
) -> None:
    generator, batch, steps = make(start=scope[0], end=scope[1]), len(starts), 12
    user, pictures = heard(batch, steps), image(generator, batch)
    running = torch.tensor([[t >= start for t in range(steps)] for start in starts])
    for row, step in pauses:
        running[row % batch, step] = False
    state = generator.new_state(batch)
    together = [generator.step(state, user[t], pictures, GREEDY, running[:, t]) for t in range(steps)]
    for row in range(batch):
        own, picture = generator.new_state(1), _row(pictures, row)
        for t in range(steps):
            if running[row, t]:
                alone = generator.step(own, user[t, row : row + 1], picture, GREEDY)
                _assert_same(together[t], alone, row)
            else:
                assert not together[t].valid[row] and together[t].gate[row] == 0


def _row(pictures: ImageKV, row: int) -> ImageKV:
    keys, values = (tuple(tensor[row : row + 1] for tensor in kind) for kind in (pictures.keys, pictures.values))
    return ImageKV(keys, values)


def _assert_same(batch: Frame, alone: Frame, row: int) -> None:
    assert bool(batch.valid[row]) == bool(alone.valid[0])
    if alone.valid[0]:
        assert torch.equal(batch.tokens[row], alone.tokens[0])
    torch.testing.assert_close(batch.gate[row], alone.gate[0], rtol=1e-4, atol=1e-6)


def test_a_reset_row_says_the_same_again() -> None:
    generator = make(start=2)
    user, pictures, state = heard(2, 8), image(generator, 2), generator.new_state(2)
    first = [generator.step(state, codes, pictures, GREEDY) for codes in user]
    state.reset(torch.tensor([False, True]))
    second = [generator.step(state, codes, pictures, GREEDY) for codes in user]
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before.tokens[1], after.tokens[1]) or not before.valid[1]
        torch.testing.assert_close(before.gate[1], after.gate[1])
    assert all(bool(frame.valid[0]) for frame in second)


def test_an_image_changes_what_is_said_and_a_row_without_one_hears_nothing_of_it() -> None:
    generator = make()
    assert generator.adapters is not None
    user, tokens = heard(2, 8), 3 * torch.randn(2, 5, DIM)
    present = torch.tensor([True, False])
    pictures = generator.adapters.encode(tokens, present=present, streaming=True)
    one, blind = generator.new_state(2), generator.new_state(2)
    logits: list[list[Tensor]] = [[], []]

    def recorder(found: list[Tensor]) -> Any:
        def choose(values: Tensor, stream: int) -> Tensor:
            found.append(values)
            return GREEDY(values, stream)

        return choose

    for codes in user:
        seeing = generator.step(one, codes, pictures, recorder(logits[0]))
        generator.step(blind, codes, None, recorder(logits[1]))
    assert seeing.gate[0] > 0 and seeing.gate[1] == 0
    for a, b in zip(*logits, strict=True):
        torch.testing.assert_close(a[1], b[1], rtol=0, atol=0)
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(*logits, strict=True))


def test_forced_tokens_replace_what_is_generated() -> None:
    generator, steps = make((0, 0, 0, 0, 0, 0)), 5
    state, forced = generator.new_state(2), torch.full((2, 1 + OWN), FREE)
    forced[0] = torch.tensor([7, -1, FREE, 4])
    for codes in heard(2, steps):
        frame = generator.step(state, codes, sampling=GREEDY, forced=forced)
        assert frame.tokens[0, [0, 1, 3]].tolist() == [7, -1, 4]
        assert (frame.tokens[1] >= 0).all() and frame.tokens[0, 2] >= 0


# sampling ------------------------------------------------------------------------------------------------------------


def test_the_same_seed_says_the_same_and_another_something_else() -> None:
    generator, user = make(), heard(1, 20)

    def say(seed: int) -> list[list[int]]:
        sampling = Sampling(generators=torch.Generator().manual_seed(seed))
        state = generator.new_state(1)
        return [generator.step(state, codes, sampling=sampling).tokens[0].tolist() for codes in user]

    assert say(1) == say(1) != say(2)


def test_a_generator_a_row_keeps_rows_apart() -> None:
    logits = torch.randn(3, 20)
    seeds = [torch.Generator().manual_seed(seed) for seed in (4, 5, 6)]
    together = [sample(logits, 1.0, 5, seeds) for _ in range(10)]
    for row, seed in enumerate((4, 5, 6)):
        own = torch.Generator().manual_seed(seed)
        assert [int(ids[row]) for ids in together] == [
            int(sample(logits[row : row + 1], 1.0, 5, own)) for _ in range(10)
        ]
    with pytest.raises(ValueError):
        sample(logits, 1.0, 5, seeds[:2])


def test_sampling_keeps_to_the_candidates_and_their_odds() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(4000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = sample(logits, 1.0, 2, generator)
    assert set(drawn.tolist()) == {1, 2}
    share = float((drawn == 2).float().mean())
    assert abs(share - 0.7311) < 0.03
    assert set(sample(logits, 1.0, 9, generator).tolist()) == {0, 1, 2, 3}  # more candidates than there are
    assert (sample(logits, 0.0, 0) == 2).all() and (sample(logits, 1.0, 1) == 2).all()
    assert all((sample(logits, 1e-38, top_k) == 2).all() for top_k in (0, 2))
