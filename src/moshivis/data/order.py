"""In which order stored rows are read: every epoch another shuffle, found from a position alone.

Rows are stored in groups that are read whole. The groups of an epoch are shuffled; then the rows are, within windows of
several consecutive groups. So a reader holds no more than a window, and rows of a group still meet others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class _Epoch:
    groups: np.ndarray  # [G] in reading order
    begins: np.ndarray  # [G + 1] rows before each of them


class EpochOrder:
    """Position 0, 1, … -> (group, row in the group). Every epoch holds every row once.

    With `seed` None rows come as they are stored.
    """

    def __init__(self, group_rows: Sequence[int], seed: int | None, window: int):
        self.group_rows = np.asarray(group_rows, np.int64)
        self.rows = int(self.group_rows.sum())
        self.seed, self.window = seed, window
        self._epoch = lru_cache(2)(self._shuffle_groups)
        self._rows = lru_cache(2)(self._shuffle_window)

    def __getitem__(self, position: int) -> tuple[int, int]:
        number, row = divmod(position, self.rows)
        epoch = self._epoch(number)
        place = _before(epoch.begins, row)
        if self.seed is not None:
            window = place // self.window
            begin = epoch.begins[window * self.window]
            row = begin + self._rows(number, window)[row - begin]
            place = _before(epoch.begins, row)
        return int(epoch.groups[place]), int(row - epoch.begins[place])

    def __getstate__(self) -> tuple[list[int], int | None, int]:
        return self.group_rows.tolist(), self.seed, self.window

    def __setstate__(self, state: tuple[list[int], int | None, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def _shuffle_groups(self, epoch: int) -> _Epoch:
        groups = np.arange(len(self.group_rows))
        if self.seed is not None:
            np.random.default_rng([self.seed, epoch]).shuffle(groups)
        return _Epoch(groups, np.concatenate([[0], np.cumsum(self.group_rows[groups])]))

    def _shuffle_window(self, epoch: int, window: int) -> np.ndarray:
        assert self.seed is not None
        begins = self._epoch(epoch).begins
        last = min((window + 1) * self.window, len(self.group_rows))
        return np.random.default_rng([self.seed, epoch, window]).permutation(
            begins[last] - begins[window * self.window]
        )


def _before(begins: np.ndarray, row: int) -> int:
    """The group, in reading order, that holds the row."""
    return int(np.searchsorted(begins, row, side="right")) - 1
