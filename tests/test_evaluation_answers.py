"""Asking many questions at once: a row's answer does not depend on its neighbours."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moshivis.evaluation.answers import (
    WRITTEN_TOKENS,
    _Row,
    ask_spoken,
    ask_written,
    image_rows,
)
from moshivis.evaluation.recogniser import word_error_rate
from moshivis.inference.sampling import Sampling
from moshivis.inference.talk import GREETING_FRAMES, GREETING_PAUSE
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import PADDING, TextTokenizer


def _generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_written_rows_are_independent(tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer) -> None:
    questions = ["what colour is the star", "hello", "the heart is red and the star is blue"]
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    together = ask_written(
        tiny_model,
        tiny_tokenizer,
        image_rows(tiny_model, pixels),
        questions,
        Sampling(generators=_generators([1, 2, 3])),
    )
    for row, question in enumerate(questions):
        image = image_rows(tiny_model, pixels[row : row + 1])
        (alone,) = ask_written(
            tiny_model, tiny_tokenizer, image, [question], Sampling(generators=_generators([row + 1]))
        )
        assert alone == together[row]


class Endless(Sampling):
    """Never a pause."""

    def __call__(self, logits: Tensor, stream: int) -> Tensor:
        return torch.full(logits.shape[:1], 10)


def test_a_greeting_without_end_is_cut_short(tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer) -> None:
    (answer,) = ask_written(tiny_model, tiny_tokenizer, None, ["hello"], Endless())
    assert not answer.ended and answer.text.count(tiny_tokenizer.piece(10).strip()) >= WRITTEN_TOKENS


def test_spoken_rows_are_independent(tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer) -> None:
    random = np.random.default_rng(0)
    waves = [(0.1 * random.standard_normal(length)).astype(np.float32) for length in (1920 * 3, 1920 * 7 + 11)]
    together = ask_spoken(tiny_model, tiny_tokenizer, None, waves, Sampling(generators=_generators([1, 2])))
    for row, wave in enumerate(waves):
        (alone,) = ask_spoken(tiny_model, tiny_tokenizer, None, [wave], Sampling(generators=_generators([row + 1])))
        assert (alone.text, alone.ended, alone.reaction_frames) == (
            together[row].text,
            together[row].ended,
            together[row].reaction_frames,
        )
        one, other = alone.audio, together[row].audio
        assert one is not None and other is not None
        shared = min(len(one), len(other))
        assert shared and np.allclose(one[:shared], other[:shared], atol=1e-5)


def test_what_is_said_before_the_question_ends_does_not_end_the_answer() -> None:
    word, frame = 7, np.zeros(4, np.float32)
    row = _Row(np.zeros((20, 4), np.float32))
    row.asked = 0
    for position in range(20):  # the assistant is interrupted after its second frame
        row.take(word if position < 2 else PADDING, frame)
    for _ in range(6):  # and takes a moment to answer
        row.take(PADDING, frame)
    waiting = row.over
    row.take(word, frame)
    for _ in range(20):
        row.take(PADDING, frame)
    assert (waiting, row.over, row.ended) == (False, True, True)
    assert [position for position, _ in row.tokens] == [-20, -19, 6]


@pytest.mark.parametrize("greets", [True, False])
def test_the_question_waits_for_the_greeting(greets: bool) -> None:
    """Its sound, too, which goes on for a while after its words."""
    row = _Row(np.ones((2, 4), np.float32))
    for frame in range(GREETING_FRAMES + 2):
        asking = row.next_frame().any()
        sound = np.full(4, 0.1 if greets and 3 < frame < 10 else 0.0, np.float32)
        row.take(7 if greets and frame == 3 else PADDING, sound)
        assert asking == (row.asked is not None and frame < row.asked + 2)
    assert row.greeted == greets
    assert row.asked == (10 + GREETING_PAUSE if greets else GREETING_FRAMES)


@given(st.lists(st.sampled_from("abc"), min_size=1), st.lists(st.sampled_from("abc")))
def test_word_error_is_an_edit_distance(reference: list[str], heard: list[str]) -> None:
    assert word_error_rate([reference], [reference]) == 0
    error = word_error_rate([reference], [heard]) * len(reference)
    assert abs(len(reference) - len(heard)) <= round(error) <= max(len(reference), len(heard))
    assert round(error) == round(word_error_rate([heard], [reference]) * len(heard)) if heard else True
