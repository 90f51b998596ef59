"""The text tokenizer: there and back, characters that are spelt in bytes, and the stream as it grows."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moshivis.errors import CheckpointError
from moshivis.speech_lm.tokenizer import END_OF_PADDING, PADDING, TextStream, TextTokenizer


@given(st.text(alphabet="thesar édñ√🦄", min_size=1, max_size=30))
def test_text_comes_back(byte_tokenizer: TextTokenizer, text: str) -> None:
    words = " ".join(text.split())
    tokens = byte_tokenizer.encode(words)
    assert byte_tokenizer.decode([PADDING, END_OF_PADDING, *tokens, PADDING]) == words
    stream = TextStream(byte_tokenizer)
    assert ("".join(map(stream.push, tokens)) + stream.end()).strip() == words


def test_half_a_surrogate_pair_is_a_question_mark(byte_tokenizer: TextTokenizer) -> None:
    assert byte_tokenizer.encode("a \ud83d b") == byte_tokenizer.encode("a ? b")


def test_a_character_that_is_not_spelt_to_its_end_is_shown_as_damage(byte_tokenizer: TextTokenizer) -> None:
    tokens = byte_tokenizer.encode("a 🦄")
    assert any(byte_tokenizer.byte(token) is not None for token in tokens)
    assert byte_tokenizer.decode(tokens[:-1]).startswith("a �")


def test_the_token_of_a_byte(byte_tokenizer: TextTokenizer, tiny_tokenizer: TextTokenizer) -> None:
    for byte in range(256):
        token = byte_tokenizer.of_byte(byte)
        assert token is not None and byte_tokenizer.byte(token) == bytes([byte])
        assert tiny_tokenizer.of_byte(byte) is None


def test_an_empty_file_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match="not a readable SentencePiece model: it is empty"):
        TextTokenizer.load(tmp_path / "tokenizer.model")
