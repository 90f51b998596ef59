"""What can be written in a picture of the miniature world: a word, a number in digits, a digit by hand."""

import random
from dataclasses import dataclass

WORDS = tuple(
    (
        "cat dog sun moon star tree fish bird book door ball cup hat shoe milk bread apple lemon grape water fire "
        "snow rain wind hill lake river road house train bus car boat plane stop go yes no open shut exit left right "
        "up down hot cold big small red green blue one two three four five six seven eight nine ten zero king queen "
        "music dance"
    ).split()
)
NUMERALS = tuple(str(number) for number in range(100))
TEXTS = (*WORDS, *NUMERALS)
ROWS = ("top", "middle", "bottom")  # a writing fills a row of places
_WORD_SHARE, _HAND_SHARE = 0.6, 0.25  # of writings; of the numbers of one digit


@dataclass(frozen=True)
class Writing:
    """A text of TEXTS; `row` None means that nobody has said where it stands. By hand: one digit."""

    text: str
    row: str | None = None
    hand: bool = False

    @property
    def kind(self) -> str:
        """word or number."""
        return "number" if self.text.isdecimal() else "word"


def sample_writing(rng: random.Random) -> Writing:
    """A random word or number in a random row."""
    row = rng.choice(ROWS)
    if rng.random() < _WORD_SHARE:
        return Writing(rng.choice(WORDS), row)
    digits = rng.choice(NUMERALS[:10]) if rng.random() < 0.4 else rng.choice(NUMERALS)
    return Writing(digits, row, hand=len(digits) == 1 and rng.random() < _HAND_SHARE)
