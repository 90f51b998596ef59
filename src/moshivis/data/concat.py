"""`p_concat`: dialogues about a picture within other talk (paper, appendix on data).

The model must learn to look when the talk is about the picture and not to when it is not. So, with some probability, a
dialogue about a picture is put between pieces of two general dialogues; the picture is there all along. The first piece
is the opening of its dialogue: every conversation begins as conversations begin, with the assistant's greeting.
"""

from __future__ import annotations

import numpy as np

from moshivis.data.cut import join, random_cut, random_opening
from moshivis.data.sample import Dataset, Sample, skipped
from moshivis.errors import InputError

_STREAM = 2  # sets these draws apart from those of other data sets with the same seed


class Concatenated:
    """A `Dataset`: the samples of `visual`, some of them between random cuts of two samples of `general`.

    Only samples with a picture are wrapped, those that leave room for some piece: with what is put around them they
    have at most `longest` steps. Of these `probability` is the share.
    Raises InputError unless both data sets are of one kind and `probability` is between 0 and 1, and where a sample of
    `general` has a picture of its own.
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
        before, after = self._general(2 * position), self._general(2 * position + 1)
        prefix = random_opening(before, room, rng)
        suffix = random_cut(after, room - len(prefix), rng)
        if not len(prefix) + len(suffix):
            prefix = random_opening(before, room, rng, shortest=1)
        return join([prefix, sample, suffix], sample.image)

    def picture(self, key: str) -> bytes:
        return self.visual.picture(key)

    def _general(self, position: int) -> Sample:
        sample = self.general[position]
        if sample.image is not None:
            raise InputError(
                f"{self.general.name}: {sample.origin or 'a dialogue'} has a picture, but would be heard beside that "
                "of another dialogue; as data.general give dialogues that are packed without pictures"
            )
        return sample
