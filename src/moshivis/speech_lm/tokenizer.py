"""Text tokenizer: a SentencePiece model with the released special ids (0 end of padding, 3 padding).

The special ids belong to no text: they never come out of `encode` for text that the vocabulary covers, and they are
skipped when tokens are shown (reference facts, model.md section 2).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from moshivis.errors import CheckpointError

END_OF_PADDING, PADDING = 0, 3
SPECIAL = frozenset(range(4))


class TextTokenizer:
    """Text <-> ids of the text stream."""

    def __init__(self, model: bytes):
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """Raises CheckpointError if the file is missing or no SentencePiece model."""
        try:
            model = path.read_bytes()
            if not model:  # SentencePiece takes nothing for a model of no pieces
                raise RuntimeError("it is empty")
            return cls(model)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{path} is not a readable SentencePiece model: {error}") from error

    def __len__(self) -> int:
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special ids. Half a surrogate pair, which is no text, is read as a question mark."""
        text = text.encode("utf-8", "replace").decode()
        return [i for i in self._processor.encode(text) if i not in SPECIAL]

    def spells(self, text: str) -> bool:
        """Whether the vocabulary has every sign of `text`; what it lacks is left out by `encode`."""
        return not any(i in SPECIAL for i in self._processor.encode(text.encode("utf-8", "replace").decode()))

    def piece(self, token: int) -> str:
        """What one id stands for: '' for special ids, a leading space where a word begins, '<0x41>' for a byte."""
        return "" if token in SPECIAL else self._processor.id_to_piece(token).replace("\u2581", " ")

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of a sequence of ids, special ids skipped."""
        stream = TextStream(self)
        return ("".join(map(stream.push, tokens)) + stream.end()).strip()

    def byte(self, token: int) -> bytes | None:
        """The byte that a byte-fallback id stands for; None for all other ids."""
        return bytes([int(self._processor.id_to_piece(token)[1:-1], 16)]) if self._processor.is_byte(token) else None

    def of_byte(self, byte: int) -> int | None:
        """The byte-fallback id of a byte, the reverse of `byte`; None in a vocabulary without it."""
        token = self._processor.piece_to_id(f"<0x{byte:02X}>")
        return token if self._processor.is_byte(token) else None


class TextStream:
    """The text of a stream of ids as it grows. A character that is spelt in several bytes appears with its last one."""

    def __init__(self, tokenizer: TextTokenizer):
        self._tokenizer = tokenizer
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """What `token` adds to the text: '' for special ids, a leading space where a word begins."""
        if token in SPECIAL:
            return ""
        byte = self._tokenizer.byte(token)
        if byte is not None:
            return self._bytes.decode(byte)
        return self.end() + self._tokenizer.piece(token)

    def end(self) -> str:
        """What is left: a sign of damage if a character was not spelt to its end."""
        return self._bytes.decode(b"", final=True)
