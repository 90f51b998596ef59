"""Pieces of conversations that are longer than what a step of training holds."""

from __future__ import annotations

import numpy as np

from moshivis.data.cut import cut, cut_points
from moshivis.data.sample import Dataset, Sample, skipped

_STREAM = 3  # sets these draws apart from those of other data sets with the same seed


class Excerpts:
    """A `Dataset`: the samples of `whole`, of one longer than `longest` steps a piece of at most that many.

    A piece begins where the sample may be cut, if there is such a place near; every position gives another one, always
    the same. Now and then it is the last one, so epoch by epoch all of a long recording is learnt from.
    """

    def __init__(self, whole: Dataset, *, longest: int, seed: int = 0):
        self.whole, self.longest, self.seed = whole, longest, seed
        self.name, self.kind = whole.name, whole.kind

    @property
    def num_samples(self) -> int | None:
        """How many there are before the first comes again; None if that is not known."""
        return getattr(self.whole, "rows", None)

    @property
    def skipped(self) -> int:
        return skipped(self.whole)

    def __getitem__(self, position: int) -> Sample:
        sample = self.whole[position]
        if len(sample) <= self.longest:
            return sample
        rng = np.random.default_rng([self.seed, position, _STREAM])
        last, points = len(sample) - self.longest, cut_points(sample)[:-1]
        if rng.integers(-(-len(sample) // self.longest)):
            wanted = int(rng.integers(last + 1))
            begin = int(points[points <= wanted].max())
            if wanted - begin > self.longest // 2:  # else nothing between points that are far apart is learnt from
                begin = wanted
        else:
            begin = int(min(points[points >= last], default=last))
            if begin - last > self.longest // 2:  # a scrap, and what lies before it would never be learnt from
                begin = last
        return cut(sample, begin, begin + self.longest)

    def picture(self, key: str) -> bytes:
        return self.whole.picture(key)
