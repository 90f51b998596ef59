"""The samples of each step of a training run, for one rank, read ahead by other processes.

Row r of the whole batch at step s has position s * rows + r in its data set, and rank k of n takes the rows k, k + n,
k + 2n, …. So all ranks together see the batch that one rank alone would see, a run resumes at any step, and how many
processes read ahead changes nothing.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from moshivis.data.sample import Dataset, Sample, skipped
from moshivis.errors import InputError, MoshivisError

Batch = tuple[list[Sample], list[Sample]]  # speech, speechless


class Loader:
    """Iterates over the batches of steps `start_step`, `start_step` + 1, … without end.

    `speech_rows` and `speechless_rows` are those of one rank. With `workers` 0 samples are read in this process, while
    it waits. `waited` is the time in seconds that was spent waiting for samples so far, `skipped` the number of
    samples that others stand for because their shard or their picture is damaged.
    Errors of the data reach the caller as they are, whichever process meets them. Raises InputError for a batch without
    rows, or rows of a kind that no data set has, ValueError for numbers of rows or a rank that cannot be.
    """

    def __init__(
        self,
        speech: Dataset | None,
        speechless: Dataset | None,
        *,
        speech_rows: int,
        speechless_rows: int,
        rank: int = 0,
        ranks: int = 1,
        start_step: int = 0,
        workers: int = 0,
    ):
        _check(speech, speech_rows, "speech")
        _check(speechless, speechless_rows, "speechless")
        if speech_rows + speechless_rows == 0:
            raise InputError("a batch must have at least one row")
        if not 0 <= rank < ranks:
            raise ValueError(f"there is no rank {rank} of {ranks}")
        self.waited = 0.0
        self.skipped = 0
        self._batches: Iterator[_Loaded | MoshivisError] = iter(
            DataLoader(
                _Steps(speech, speechless, speech_rows, speechless_rows, rank, ranks),
                batch_size=None,
                sampler=_From(start_step),
                num_workers=workers,
                # A forked copy of a process with threads, as torch and Arrow start them, may hang.
                multiprocessing_context="spawn" if workers else None,
                collate_fn=_as_it_is,
                worker_init_fn=_leave_signals,
            )
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        loaded = next(self._batches)
        self.waited += time.perf_counter() - began
        if isinstance(loaded, MoshivisError):
            raise loaded
        self.skipped += loaded.skipped
        return loaded.batch

    def close(self) -> None:
        """End the processes that read ahead."""
        self._batches = iter(())


@dataclass(frozen=True)
class _Loaded:
    batch: Batch
    skipped: int


class _Steps(TorchDataset["_Loaded | MoshivisError"]):
    """Step -> what one rank needs for it, for torch's DataLoader."""

    def __init__(
        self,
        speech: Dataset | None,
        speechless: Dataset | None,
        speech_rows: int,
        speechless_rows: int,
        rank: int,
        ranks: int,
    ):
        self.sources = ((speech, speech_rows), (speechless, speechless_rows))
        self.rank, self.ranks = rank, ranks

    def __getitem__(self, step: int) -> _Loaded | MoshivisError:
        """An error of the data is returned: raised, it would reach the other process with its traceback as message."""
        before = self._skipped()
        try:
            speech, speechless = (self._rows(dataset, rows, step) for dataset, rows in self.sources)
        except MoshivisError as error:
            return error
        return _Loaded((speech, speechless), self._skipped() - before)

    def _rows(self, dataset: Dataset | None, rows: int, step: int) -> list[Sample]:
        if dataset is None:
            return []
        total = rows * self.ranks
        return [dataset[step * total + row] for row in range(self.rank, total, self.ranks)]

    def _skipped(self) -> int:
        return sum(skipped(dataset) for dataset, _ in self.sources if dataset is not None)


class _From:
    """The numbers from `start` on, as a sampler."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def _leave_signals(worker: int) -> None:
    """Ctrl-C, or a batch system's SIGTERM, reaches all processes: the one that is read for ends the others."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _check(dataset: Dataset | None, rows: int, kind: str) -> None:
    if rows < 0:
        raise ValueError(f"there cannot be {rows} rows of {kind} samples")
    if rows and dataset is None:
        raise InputError(f"a batch has {rows} rows of {kind} samples, but there is no data set of that kind")
    if dataset is not None and dataset.kind != kind:
        raise InputError(f"{dataset.name} holds {dataset.kind} samples, where {kind} ones are needed")
