"""CIDEr-D: how much a description agrees with several people's (Vedantam, Zitnick, Parikh, CVPR 2015).

For n = 1 to 4, a text is a vector of its n-grams, each weighted by how rare it is among the pictures: count times
log(pictures / pictures whose references have it). A candidate's score is its cosine with a reference, where no n-gram
counts more often than in the reference, times exp(-d² / 2σ²) for texts whose lengths differ by d words (σ = 6); the
mean over n and over the references, times 10.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from moshivis.errors import InputError

ORDERS = (1, 2, 3, 4)
SIGMA = 6.0

Words = Sequence[str]


def cider(candidates: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """Mean CIDEr-D over pictures: `candidates` [N] lists of words, `references` [N] several such lists each.

    Raises InputError if there are no pictures, not as many candidates as pictures, or a picture has no reference.
    """
    if not candidates or len(candidates) != len(references):
        raise InputError(f"CIDEr needs a description a picture: {len(candidates)} for {len(references)} pictures")
    if not all(references):
        raise InputError("CIDEr needs at least one reference for every picture")
    return sum(_score(candidates, references, order) for order in ORDERS) / len(ORDERS)


def _score(candidates: Sequence[Words], references: Sequence[Sequence[Words]], order: int) -> float:
    seen = Counter(gram for texts in references for gram in {g for text in texts for g in _grams(text, order)})
    pictures = math.log(len(references))

    def vector(text: Words) -> dict[tuple[str, ...], float]:
        return {gram: count * (pictures - math.log(max(1, seen[gram]))) for gram, count in _grams(text, order).items()}

    total = 0.0
    for candidate, texts in zip(candidates, references, strict=True):
        ours = vector(candidate)
        for text in texts:
            theirs = vector(text)
            agreed = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs)
            norms = _norm(ours) * _norm(theirs)
            if norms:
                length = math.exp(-((len(candidate) - len(text)) ** 2) / (2 * SIGMA**2))
                total += 10 * length * agreed / norms / len(texts)
    return total / len(candidates)


def _grams(text: Words, order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(text[i : i + order]) for i in range(len(text) - order + 1))


def _norm(vector: dict[tuple[str, ...], float]) -> float:
    return math.sqrt(sum(weight * weight for weight in vector.values()))
