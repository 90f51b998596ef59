"""Speechless samples: the text of both sides in the text stream, one token a step, and no sound (paper section 3.2).

How turns are told apart is decided here and nowhere else:

| form | a turn of the user | a turn of the assistant |
| plain | its text, newline | its text, newline |
| marked | its text | end-of-padding, its text, padding |

`plain` is the paper's: text and no padding tokens. The newline, one token in vocabularies that spell unknown characters
in bytes, tells where a turn ends; a vocabulary without it has nothing between turns, so `marked` is the usual form
there. That is what the embedded model is trained with and what `moshivis talk --text` writes: the assistant can be
stopped by a token that the spoken form has too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np

from moshivis.data.layout import Turn
from moshivis.data.sample import Sample, Speaker
from moshivis.errors import InputError
from moshivis.speech_lm.tokenizer import END_OF_PADDING, PADDING, TextTokenizer

Form = Literal["plain", "marked"]


def usual_form(tokenizer: TextTokenizer) -> Form:
    """The form for dialogues in a vocabulary unless another one is asked for."""
    return "marked" if tokenizer.of_byte(ord("\n")) is None else "plain"


def speechless_sample(
    turns: Iterable[Turn],
    tokenizer: TextTokenizer,
    *,
    form: Form | None = None,
    image: str | None = None,
    origin: str = "",
) -> Sample:
    """The sample of a dialogue. The marks of the assistant's turns are the assistant's tokens: it must learn them.

    Raises InputError if the vocabulary cannot spell a single word of a turn.
    """
    form = form or usual_form(tokenizer)
    newline = tokenizer.of_byte(ord("\n"))  # which `encode` never gives: it reads a newline as a space
    tokens: list[int] = []
    speakers: list[int] = []
    for turn in turns:
        said = tokenizer.encode(" ".join(turn.text.split()))
        if not tokenizer.decode(said):
            raise InputError(f"{origin or 'a dialogue'}: the tokenizer has no piece for any of {turn.text!r}")
        speaker = Speaker.ASSISTANT if turn.role == "assistant" else Speaker.USER
        if form == "plain":
            said += [] if newline is None else [newline]
        elif speaker == Speaker.ASSISTANT:
            said = [END_OF_PADDING, *said, PADDING]
        tokens += said
        speakers += [speaker] * len(said)
    return Sample(text=np.array(tokens, np.int32), speaker=np.array(speakers, np.uint8), image=image, origin=origin)
