"""Words with times <-> the text stream (paper of Moshi, section 3.4.4; the layout of released fine-tuning programs).

The pieces of a word stand one a frame, from the frame on in which the word begins. Between words there is padding, and
the last padding before a word is end-of-padding. Where a word has more pieces than there are frames before the next
one, the next one begins later, without end-of-padding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moshivis.speech_lm.tokenizer import END_OF_PADDING, PADDING, SPECIAL, TextStream, TextTokenizer

FRAME_RATE = 12.5  # frames a second
_ROUNDING = 1e-6  # frames; 0.24 s are 3 frames, whatever floating-point numbers say


@dataclass(frozen=True)
class Word:
    """A spoken word."""

    text: str
    start: float  # seconds
    end: float


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """A text stream, and what did not find its place in it."""

    text: np.ndarray  # [T] int32
    late: int  # words that begin after their frame, because the one before was not finished
    lost: int  # pieces that would stand behind the last frame
    unspelt: int  # words with signs that the vocabulary lacks: these signs are left out


def frame_of(seconds: float) -> int:
    """The frame in which a moment lies."""
    return math.floor(seconds * FRAME_RATE + _ROUNDING)


def align(words: Iterable[Word], tokenizer: TextTokenizer, frames: int) -> Alignment:
    """The text stream of a conversation of `frames` frames; words may come in any order.

    A word that begins before the first frame is placed at it, one that begins behind the last frame is lost.
    """
    text = np.full(frames, PADDING, np.int32)
    late = lost = unspelt = 0
    free = 0  # the first frame behind all pieces so far
    for word in sorted(words, key=lambda word: word.start):
        pieces = tokenizer.encode(word.text.strip())
        unspelt += not tokenizer.spells(word.text.strip())
        if not tokenizer.decode(pieces):
            continue
        spoken = max(0, frame_of(word.start))
        begin = max(spoken, free)
        late += begin > spoken
        fitting = pieces[: max(0, frames - begin)]
        lost += len(pieces) - len(fitting)
        if fitting and begin > free:
            text[begin - 1] = END_OF_PADDING
        text[begin : begin + len(fitting)] = fitting
        free = begin + len(pieces)
    return Alignment(text=text, late=late, lost=lost, unspelt=unspelt)


def words_of(text: Sequence[int] | np.ndarray, tokenizer: TextTokenizer) -> list[Word]:
    """The inverse of `align`: the words of a text stream [T], with the times that their pieces take up in it.

    A word ends before a piece that begins with a space, and at any special id.
    """
    words: list[Word] = []
    stream = TextStream(tokenizer)
    spelling, begin = "", None
    for frame, token in enumerate([*map(int, text), PADDING]):
        piece = stream.push(token)
        if begin is not None and spelling.strip() and (token in SPECIAL or piece.startswith(" ")):
            words.append(Word(spelling.strip(), begin / FRAME_RATE, frame / FRAME_RATE))
            spelling, begin = "", None
        if token in SPECIAL:
            spelling, begin = "", None
            continue
        begin = frame if begin is None else begin
        spelling += piece
    return words
