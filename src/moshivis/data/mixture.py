"""Several data sets as one, by weight.

Of every 1,000 positions each part has an exact number, its share rounded by largest remainder; they are shuffled within
the thousand. Each part is read in its own order, without gaps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from moshivis.data.sample import Dataset, Kind, Sample, skipped
from moshivis.errors import InputError

BLOCK = 1000  # positions


class Mixture:
    """A `Dataset` of data sets of one kind. Weights are relative.

    Raises InputError for no part, a part of another kind, or a weight so small that a block has no place for it.
    """

    def __init__(self, parts: Sequence[tuple[Dataset, float]], kind: Kind, seed: int = 0, name: str = "mixture"):
        self.name, self.kind, self.seed = name, kind, seed
        self.parts = [dataset for dataset, _ in parts]
        for part in self.parts:
            if part.kind != kind:
                raise InputError(f"{part.name} holds {part.kind} samples; it cannot be mixed with {kind} ones")
        self.counts = shares([weight for _, weight in parts], BLOCK)
        for part, count in zip(self.parts, self.counts, strict=True):
            if count == 0:
                raise InputError(
                    f"the weight of {part.name} is less than one sample in {BLOCK}: raise it or leave it out"
                )
        self._block = lru_cache(2)(self._draw_block)

    @property
    def skipped(self) -> int:
        return sum(map(skipped, self.parts))

    @property
    def rows(self) -> int | None:
        """How many positions there are before a sample comes again; None if a part does not know how many it has."""
        firsts = []
        for number, (part, count) in enumerate(zip(self.parts, self.counts, strict=True)):
            rows = getattr(part, "rows", None)
            if rows is None:
                return None
            block, rank = divmod(rows, count)
            parts, ranks = self._block(block)
            firsts.append(block * BLOCK + int(np.flatnonzero((parts == number) & (ranks == rank))[0]))
        return min(firsts)

    def find(self, position: int) -> tuple[int, int]:
        """Number of the part, and the position in it."""
        block, offset = divmod(position, BLOCK)
        parts, ranks = self._block(block)
        part = int(parts[offset])
        return part, block * self.counts[part] + int(ranks[offset])

    def __getitem__(self, position: int) -> Sample:
        part, inner = self.find(position)
        return self.parts[part][inner]

    def picture(self, key: str) -> bytes:
        """From the first part that has it. Raises KeyError if none has."""
        for part in self.parts:
            try:
                return part.picture(key)
            except KeyError:
                continue
        raise KeyError(f"no data set of {self.name} holds the picture {key}")

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_block"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._block = lru_cache(2)(self._draw_block)

    def _draw_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """[BLOCK] which part stands where, and how many of the same part stand before it."""
        parts = np.repeat(np.arange(len(self.parts)), self.counts)
        np.random.default_rng([self.seed, block]).shuffle(parts)
        ranks = np.empty(BLOCK, np.int64)
        for part, count in enumerate(self.counts):
            ranks[parts == part] = np.arange(count)
        return parts, ranks


def shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` divided by weight in whole numbers: rounded down, the rest to the largest remainders, earlier ones first.

    Raises InputError unless there are weights and all are finite numbers above 0.
    """
    if not weights:
        raise InputError("a mixture needs at least one data set")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise InputError(f"weights must be finite numbers above 0, not {', '.join(map(str, weights))}")
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts
