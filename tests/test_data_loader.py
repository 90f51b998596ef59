"""The batches of a run: the same for any number of ranks, processes and interruptions."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_support import Numbered, sample
from moshivis.data.loader import Loader
from moshivis.data.sample import Sample
from moshivis.data.shard_writer import write_shards
from moshivis.data.shards import open_shards
from moshivis.errors import InputError, ShardError
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import TextTokenizer

SPEECH, SPEECHLESS = Numbered(), Numbered(kind="speechless")


class Slow(Numbered):
    def __getitem__(self, position: int) -> Sample:
        time.sleep(0.02)
        return super().__getitem__(position)


def origins(loader: Loader, steps: int) -> list[tuple[list[str], list[str]]]:
    batches = itertools.islice(loader, steps)
    return [([s.origin for s in speech], [s.origin for s in speechless]) for speech, speechless in batches]


def load(rank: int = 0, ranks: int = 1, start: int = 0, workers: int = 0, rows: tuple[int, int] = (2, 3)) -> Loader:
    return Loader(
        SPEECH,
        SPEECHLESS,
        speech_rows=rows[0],
        speechless_rows=rows[1],
        rank=rank,
        ranks=ranks,
        start_step=start,
        workers=workers,
    )


def test_rows_are_positions() -> None:
    assert origins(load(), 2) == [(["0", "1"], ["0", "1", "2"]), (["2", "3"], ["3", "4", "5"])]
    assert origins(load(rank=1, ranks=2, start=1), 1) == [(["5", "7"], ["7", "9", "11"])]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3), st.integers(0, 1000))
def test_ranks_together_see_the_batch_of_one(ranks: int, speech: int, speechless: int, start: int) -> None:
    rows = speech + 1, speechless
    whole = origins(load(start=start, rows=(rows[0] * ranks, rows[1] * ranks)), 2)
    shared = [origins(load(rank, ranks, start, rows=rows), 2) for rank in range(ranks)]
    for step in range(2):
        for kind in range(2):
            interleaved = zip(*(shared[rank][step][kind] for rank in range(ranks)), strict=True)
            assert list(itertools.chain.from_iterable(interleaved)) == whole[step][kind]


def test_processes_change_nothing(tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """Real shards, one of them damaged: what is read and what is counted is the same."""
    samples = [sample(i) for i in range(40)]
    write_shards(tmp_path / "set", samples, str.encode, tiny_tokenizer, tiny_model.codec, rows_a_shard=10)
    (tmp_path / "set" / "speech-00002.parquet").write_bytes(b"damaged")
    found = []
    for workers in (0, 2):
        dataset = open_shards(tmp_path / "set", "speech", on_corrupt="skip")
        loader = Loader(dataset, None, speech_rows=4, speechless_rows=0, start_step=10, workers=workers)
        found.append((origins(loader, 10), loader.skipped))
        loader.close()
    assert found[0] == found[1]
    assert found[0][1] == 10

    stopping = open_shards(tmp_path / "set", "speech", on_corrupt="skip")
    stopping.on_corrupt = "stop"  # as if the file had been damaged after the folder was opened
    loader = Loader(stopping, None, speech_rows=40, speechless_rows=0, workers=1)
    with pytest.raises(ShardError, match=r"^\S*speech-00002.parquet is damaged"):
        next(loader)


def test_waiting_is_measured() -> None:
    loader = Loader(Slow(), None, speech_rows=3, speechless_rows=0)
    origins(loader, 2)
    assert 0.12 <= loader.waited < 10


def test_batches_that_cannot_be() -> None:
    with pytest.raises(InputError, match="2 rows of speechless samples, but there is no data set"):
        Loader(SPEECH, None, speech_rows=2, speechless_rows=2)
    with pytest.raises(InputError, match="at least one row"):
        Loader(SPEECH, None, speech_rows=0, speechless_rows=0)
    with pytest.raises(InputError, match="holds speechless samples, where speech ones are needed"):
        Loader(SPEECHLESS, None, speech_rows=1, speechless_rows=0)
    with pytest.raises(ValueError, match="no rank 2 of 2"):
        load(rank=2, ranks=2)
