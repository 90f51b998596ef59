"""The text tokenizer: there and back, characters that are spelt in bytes, and the stream as it grows."""

import io

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from moshivis.speech_lm.tokenizer import END_OF_PADDING, PADDING, TextStream, TextTokenizer


@pytest.fixture(scope="module")
def spelling() -> TextTokenizer:
    """A tokenizer that spells what it does not know in bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the star is red", "the heart is not", "hello there"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=2,
    )
    return TextTokenizer(model.getvalue())


@given(st.text(alphabet="thesar édñ√🦄", min_size=1, max_size=30))
def test_text_comes_back(spelling: TextTokenizer, text: str) -> None:
    words = " ".join(text.split())
    tokens = spelling.encode(words)
    assert spelling.decode([PADDING, END_OF_PADDING, *tokens, PADDING]) == words
    stream = TextStream(spelling)
    assert ("".join(map(stream.push, tokens)) + stream.end()).strip() == words


def test_a_character_that_is_not_spelt_to_its_end_is_shown_as_damage(spelling: TextTokenizer) -> None:
    tokens = spelling.encode("a 🦄")
    assert any(spelling.byte(token) is not None for token in tokens)
    assert spelling.decode(tokens[:-1]).startswith("a �")
