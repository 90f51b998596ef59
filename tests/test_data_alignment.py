"""Words with times to the text stream and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moshivis.data.alignment import FRAME_RATE, Word, align, frame_of, words_of
from moshivis.data.layout import Turn
from moshivis.data.sample import Speaker
from moshivis.data.written import speechless_sample
from moshivis.errors import InputError
from moshivis.speech_lm.tokenizer import END_OF_PADDING, PADDING, TextTokenizer

VOCABULARY = ("what", "colour", "is", "the", "star", "blue", "and", "heart", "red", "hello", "there")


def spoken_at(*seconds: float, text: str = "hello") -> list[Word]:
    return [Word(text, start, start + 0.1) for start in seconds]


def test_pieces_stand_where_the_word_is_spoken(tiny_tokenizer: TextTokenizer) -> None:
    pieces = tiny_tokenizer.encode("hello")
    stream = align(spoken_at(0.8), tiny_tokenizer, 30).text.tolist()
    assert stream == [PADDING] * 9 + [END_OF_PADDING] + pieces + [PADDING] * (20 - len(pieces))


def test_a_word_in_the_first_frame_has_nothing_before_it(tiny_tokenizer: TextTokenizer) -> None:
    stream = align(spoken_at(-0.3), tiny_tokenizer, 30).text.tolist()
    assert stream[0] == tiny_tokenizer.encode("hello")[0]
    assert END_OF_PADDING not in stream


def test_a_word_waits_for_the_one_before(tiny_tokenizer: TextTokenizer) -> None:
    pieces = tiny_tokenizer.encode("hello")
    assert len(pieces) > 1
    aligned = align(spoken_at(0.8, 0.88), tiny_tokenizer, 40)
    assert aligned.text[10 : 10 + 2 * len(pieces)].tolist() == pieces * 2
    assert (aligned.late, aligned.lost) == (1, 0)


def test_what_lies_behind_the_end_is_counted(tiny_tokenizer: TextTokenizer) -> None:
    pieces = tiny_tokenizer.encode("hello")
    aligned = align([*spoken_at(0.72, 9.0), Word("日本", 0.0, 0.1)], tiny_tokenizer, 10)
    assert aligned.text[9] == pieces[0]
    assert (aligned.lost, aligned.unspelt) == (2 * len(pieces) - 1, 1)


def test_a_word_that_loses_a_sign_is_counted(tiny_tokenizer: TextTokenizer) -> None:
    aligned = align([Word("hell日o", 0.0, 0.1)], tiny_tokenizer, 20)
    assert tiny_tokenizer.decode(aligned.text.tolist()) == "hello"
    assert aligned.unspelt == 1


def test_the_begin_of_a_frame_lies_in_it() -> None:
    for frame in range(3000):
        assert frame_of(frame / FRAME_RATE) == frame_of(round(frame * 0.08, 2)) == frame
        assert frame_of(frame / FRAME_RATE + 0.079) == frame


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(VOCABULARY), st.floats(0, 3)), max_size=12))
def test_words_come_back_in_order(tiny_tokenizer: TextTokenizer, spoken: list[tuple[str, float]]) -> None:
    words = [Word(text, start, start + 0.1) for text, start in spoken]
    aligned = align(words, tiny_tokenizer, 200)
    found = words_of(aligned.text, tiny_tokenizer)
    expected = sorted(words, key=lambda word: word.start)
    assert [word.text for word in found] == [word.text for word in expected]
    free = late = 0
    for word, back in zip(expected, found, strict=True):
        begin = max(free, frame_of(word.start))
        free = begin + len(tiny_tokenizer.encode(word.text))
        late += begin > frame_of(word.start)
        assert (back.start, back.end) == (begin / FRAME_RATE, free / FRAME_RATE)
    assert (aligned.late, aligned.lost, aligned.unspelt) == (late, 0, 0)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(VOCABULARY), st.floats(0, 3)), max_size=12), st.integers(1, 50))
def test_end_of_padding_stands_before_words_and_nowhere_else(
    tiny_tokenizer: TextTokenizer, spoken: list[tuple[str, float]], frames: int
) -> None:
    stream = align([Word(text, start, start) for text, start in spoken], tiny_tokenizer, frames).text
    assert len(stream) == frames
    is_word = ~np.isin(stream, (PADDING, END_OF_PADDING))
    begins = np.flatnonzero(is_word[1:] & ~is_word[:-1])
    assert np.flatnonzero(stream == END_OF_PADDING).tolist() == begins.tolist()


def test_letters_of_several_bytes_come_back(byte_tokenizer: TextTokenizer) -> None:
    words = [Word("日本", 0.48, 0.6), Word("naïve", 0.52, 0.7), Word("Straße", 4.0, 4.2)]
    aligned = align(words, byte_tokenizer, 150)
    found = words_of(aligned.text, byte_tokenizer)
    assert [word.text for word in found] == ["日本", "naïve", "Straße"]
    assert [word.start for word in found[::2]] == [0.48, 4.0]
    assert aligned.unspelt == 0


# in writing -----------------------------------------------------------------------------------------------------------


def test_plain_is_text_and_nothing_else(tiny_tokenizer: TextTokenizer) -> None:
    turns = [Turn("user", "what is the star"), Turn("assistant", "blue")]
    sample = speechless_sample(turns, tiny_tokenizer, form="plain")
    asked, said = (tiny_tokenizer.encode(turn.text) for turn in turns)
    assert sample.text.tolist() == asked + said  # this vocabulary spells no bytes, so it has no newline
    assert sample.speaker.tolist() == [Speaker.USER] * len(asked) + [Speaker.ASSISTANT] * len(said)
    assert (sample.audio, sample.kind) == (None, "speechless")


def test_without_a_newline_turns_are_marked_unless_told_otherwise(tiny_tokenizer: TextTokenizer) -> None:
    turns = [Turn("user", "what is the star"), Turn("assistant", "blue")]
    usual, marked = (speechless_sample(turns, tiny_tokenizer, form=form) for form in (None, "marked"))
    assert usual.text.tolist() == marked.text.tolist() and usual.text[-1] == PADDING


def test_a_newline_ends_every_turn_if_there_is_one(byte_tokenizer: TextTokenizer) -> None:
    sample = speechless_sample([Turn("user", "hello\nthere"), Turn("assistant", "hello")], byte_tokenizer)
    newlines = [index for index, token in enumerate(sample.text) if byte_tokenizer.byte(int(token)) == b"\n"]
    assert newlines == [len(byte_tokenizer.encode("hello there")), len(sample) - 1]
    assert sample.speaker[newlines].tolist() == [Speaker.USER, Speaker.ASSISTANT]


class Counting(TextTokenizer):
    """Counts the tokens that it is asked about."""

    asked = 0

    def byte(self, token: int) -> bytes | None:
        self.asked += 1
        return super().byte(token)


def test_the_newline_is_found_without_a_walk_through_the_vocabulary(byte_tokenizer: TextTokenizer) -> None:
    tokenizer = Counting(byte_tokenizer.model)
    sample = speechless_sample([Turn("user", "hello")], tokenizer)
    assert tokenizer.byte(int(sample.text[-1])) == b"\n"
    assert tokenizer.asked <= len(sample) < len(tokenizer)


def test_marks_belong_to_the_assistant(tiny_tokenizer: TextTokenizer) -> None:
    sample = speechless_sample([Turn("user", "what"), Turn("assistant", "blue")], tiny_tokenizer, form="marked")
    asked, said = tiny_tokenizer.encode("what"), tiny_tokenizer.encode("blue")
    assert sample.text.tolist() == [*asked, END_OF_PADDING, *said, PADDING]
    assert sample.speaker.tolist() == [Speaker.USER] * len(asked) + [Speaker.ASSISTANT] * (len(said) + 2)


def test_a_turn_that_cannot_be_spelt(tiny_tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match="a.jsonl:3: the tokenizer has no piece for any of '日本'"):
        speechless_sample([Turn("user", "日本")], tiny_tokenizer, origin="a.jsonl:3")
