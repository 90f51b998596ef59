"""`p_concat`: dialogues about a picture within other talk (paper, appendix on data).

The model must learn to look when the talk is about the picture and not to when it is not. So, with some probability, a
dialogue about a picture is put between pieces of two general dialogues; the picture is there all along. The first piece
is the opening of its dialogue: every conversation begins as conversations begin, with the assistant's greeting.
"""

from __future__ import annotations

import numpy as np

from moshivis.data.cut import join, random_cut
from moshivis.data.sample import Dataset, Sample, skipped
from moshivis.errors import InputError

_STREAM = 2  # sets these draws apart from those of other data sets with the same seed


class Concatenated:
    """A `Dataset`: the samples of `visual`, some of them between random cuts of two samples of `general`.

    Only samples with a picture, and shorter than `longest` steps, are wrapped; with what is put around them they have
    at most `longest`. Raises InputError unless both data sets are of one kind and `probability` is between 0 and 1.
    """

    def __init__(self, visual: Dataset, general: Dataset, *, probability: float, longest: int, seed: int = 0):
        if general.kind != visual.kind:
            raise InputError(
                f"{visual.name} holds {visual.kind} samples, {general.name} {general.kind} ones: they cannot be joined"
            )
        if not 0 <= probability <= 1:
            raise InputError(f"p_concat must be between 0 and 1, not {probability}")
        self.visual, self.general = visual, general
        self.name, self.kind = visual.name, visual.kind
        self.probability, self.longest, self.seed = probability, longest, seed

    @property
    def skipped(self) -> int:
        return skipped(self.visual) + skipped(self.general)

    def __getitem__(self, position: int) -> Sample:
        sample = self.visual[position]
        rng = np.random.default_rng([self.seed, position, _STREAM])
        room = self.longest - len(sample)
        if rng.random() >= self.probability or sample.image is None or room < 1:
            return sample
        before = int(rng.integers(room + 1))
        prefix = random_cut(self.general[2 * position], before, rng, opening=True)
        suffix = random_cut(self.general[2 * position + 1], room - len(prefix), rng)
        return join([prefix, sample, suffix], sample.image)

    def picture(self, key: str) -> bytes:
        return self.visual.picture(key)
