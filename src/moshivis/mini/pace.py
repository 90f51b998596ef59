"""The assistant's even pace: in the text stream a word takes the same number of frames wherever it is said.

A text-to-speech program says a word faster or slower by what follows, so that in its recordings the moment at which a
word begins tells what comes after it: "is" comes sooner before "nothing" than before "a red star". A model that has to
choose the moment first would choose the answer by it.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from statistics import median

from moshivis.mini.voices import Word

FRAME_SECONDS = 0.08


def usual_frames(sentences: Iterable[Sequence[Word]]) -> dict[str, int]:
    """Frames from the beginning of each word to that of the next one: its median over all sentences, at least 1."""
    taken: dict[str, list[float]] = defaultdict(list)
    for words in sentences:
        for word, following in pairwise(words):
            taken[word.text].append(following.start - word.start)
    return {word: max(1, round(median(seconds) / FRAME_SECONDS)) for word, seconds in taken.items()}


def word_starts(words: Sequence[Word], frames: dict[str, int]) -> list[int]:
    """Frame in which each word begins, if each takes its usual time; the first one begins as recorded."""
    return list(accumulate((frames[word.text] for word in words[:-1]), initial=int(words[0].start / FRAME_SECONDS)))
