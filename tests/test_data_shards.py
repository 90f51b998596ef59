"""Packed samples: what is written comes back, in an order that is shuffled and stays; damage is found and said."""

from __future__ import annotations

import collections
import dataclasses
import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_support import same, sample
from moshivis.data import shards
from moshivis.data.order import EpochOrder
from moshivis.data.sample import Sample
from moshivis.data.shard_format import GROUP_ROWS, Manifest, ShardFile, picture_key
from moshivis.data.shard_writer import write_shards
from moshivis.data.shards import WINDOW, open_shards
from moshivis.errors import InputError, ShardError
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import TextTokenizer

ROWS = 300
Write = Callable[..., Manifest]


def picture(key: str) -> bytes:
    """A PPM of one pixel with a comment."""
    return f"P6\n# the file of {key}\n1 1\n255\nRGB".encode()


def originals() -> list[Sample]:
    speech = [sample(i, length=5 + i % 7, image=f"p{i % 5}" if i % 2 else None) for i in range(ROWS)]
    return speech + [sample(1000 + i, kind="speechless") for i in range(7)]


@pytest.fixture
def write(tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer) -> Write:
    def write(folder: Path, samples: list[Sample], picture: Callable[[str], bytes] = picture) -> Manifest:
        return write_shards(folder, samples, picture, tiny_tokenizer, tiny_model.codec, rows_a_shard=110)

    return write


@pytest.fixture
def folder(write: Write, tmp_path: Path) -> Path:
    write(tmp_path / "set", originals())
    return tmp_path / "set"


def test_samples_come_back(folder: Path) -> None:
    stored = {made.origin: made for made in originals()}
    for kind, rows in (("speech", ROWS), ("speechless", 7)):
        dataset = open_shards(folder, kind, seed=None)  # type: ignore[arg-type]
        assert (dataset.rows, dataset.kind, dataset.name) == (rows, kind, "set")
        for position in range(0, rows, 3):
            found = dataset[position]
            made = stored[found.origin]
            if made.image is not None:
                assert found.image == picture_key(picture(made.image))
                assert dataset.picture(found.image) == picture(made.image)
                made = sample(int(made.origin), length=len(made), image=found.image)
            assert same(found, made)
            found.text[0] = 1  # a copy of the caller's own


def test_a_picture_is_stored_once(folder: Path) -> None:
    manifest = Manifest.read(folder)
    assert (manifest.rows("pictures"), manifest.rows("speech"), manifest.codebooks) == (5, ROWS, 6)
    with pytest.raises(KeyError):
        open_shards(folder, "speech").picture("0" * 64)
    with pytest.raises(KeyError):
        open_shards(folder, "speech").picture("scene 12")


def test_a_sample_costs_no_more_in_a_large_folder(write: Write, tmp_path: Path) -> None:
    """Of the large folder only the first file is there; the others are not looked at."""
    manifest = write(tmp_path / "set", originals()[-7:])
    rows = GROUP_ROWS["speechless"]
    rest: dict[str, Any] = {"group_rows": rows, "group_bytes": 9999, "size": 1, "sha256": ""}
    far = ShardFile(name="far.parquet", content="speechless", rows=100_000 * rows, **rest)
    dataclasses.replace(manifest, files=(*manifest.files, far)).write(tmp_path / "set")
    dataset = open_shards(tmp_path / "set", "speechless", seed=None, on_corrupt="skip")
    first = dataset[0]
    tracemalloc.start()
    try:
        assert same(dataset[0], first)
        assert tracemalloc.get_traced_memory()[1] < 100_000  # bytes; one for every group
    finally:
        tracemalloc.stop()


def test_everybody_can_read_the_files(folder: Path) -> None:
    table = pq.read_table(folder / "speech-00000.parquet")
    first = originals()[0]
    assert first.audio is not None
    assert table["text"][0].as_py() == first.text.tolist()
    assert table["audio"][0].as_py() == first.audio.reshape(-1).tolist()


def test_the_order(folder: Path) -> None:
    def origins(seed: int | None, begin: int) -> list[int]:
        dataset = open_shards(folder, "speech", seed=seed, window=2)
        return [int(dataset[begin + i].origin) for i in range(ROWS)]

    stored, shuffled, later = origins(None, 0), origins(1, 0), origins(1, ROWS)
    assert stored == list(range(ROWS))
    assert sorted(shuffled) == sorted(later) == stored
    assert len({tuple(order) for order in (stored, shuffled, later, origins(2, 0))}) == 4
    assert origins(1, 0) == shuffled


def test_memory_is_bounded_and_reading_local(folder: Path) -> None:
    dataset = open_shards(folder, "speech", window=2)
    reads: collections.Counter[tuple[str, int]] = collections.Counter()
    for position in range(ROWS):
        held = set(dataset._reader._tables)
        assert len(held) <= 2
        dataset[position]
        reads.update(set(dataset._reader._tables) - held)
    assert set(reads.values()) == {1}  # every group once an epoch
    assert len(reads) == sum(-(-rows // GROUP_ROWS["speech"]) for rows in (110, 110, 80))


def test_of_long_recordings_fewer_are_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [pq.ParquetFile(file).read_row_group(0) for file in sorted(folder.glob("speech-*.parquet"))]
    largest = max(file.group_bytes for file in Manifest.read(folder).files if file.content == "speech")
    assert largest == pytest.approx(max(group.nbytes for group in groups), rel=0.02)
    order: dict[int, list[str]] = {}
    for limit, held in ((2.5, 2), (0.5, 1), (100, WINDOW)):
        monkeypatch.setattr(shards, "WINDOW_BYTES", int(limit * largest))
        dataset = open_shards(folder, "speech", seed=1)
        order[held], most = [], 0
        for position in range(ROWS):
            order[held].append(dataset[position].origin)
            most = max(most, sum(table.nbytes for table in dataset._reader._tables.values()))
        assert most <= 1.02 * max(limit, 1) * largest
        by_rows = open_shards(folder, "speech", seed=1, window=held)
        assert [by_rows[position].origin for position in range(ROWS)] == order[held]
    assert len(set(map(tuple, order.values()))) == 3


def test_a_dataset_can_be_sent_to_another_process(folder: Path) -> None:
    dataset = open_shards(folder, "speech", seed=3)
    before = dataset[5]
    copy = pickle.loads(pickle.dumps(dataset))
    assert same(copy[5], before)
    assert len(pickle.dumps(dataset)) < 20_000


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 5), st.integers(1, 5), st.integers(0, 4))
def test_every_epoch_has_every_row_once(groups: list[int], seed: int, window: int, epoch: int) -> None:
    order = EpochOrder(groups, seed, window)
    positions = range(epoch * order.rows, (epoch + 1) * order.rows)
    found = [order[position] for position in positions]
    assert sorted(found) == [(group, row) for group, rows in enumerate(groups) for row in range(rows)]
    again = pickle.loads(pickle.dumps(order))
    assert [again[position] for position in reversed(positions)] == found[::-1]


# damage ---------------------------------------------------------------------------------------------------------------


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * len(content))] ^= 0xFF
    path.write_bytes(content)


def test_a_changed_byte_stops(folder: Path) -> None:
    flip(folder / "speech-00001.parquet", 0.3)
    dataset = open_shards(folder, "speech", seed=None)
    assert dataset[0].origin == "0"
    for _ in range(2):
        with pytest.raises(ShardError, match=r"speech-00001.parquet is damaged: its checksum is wrong. Copy it again"):
            dataset[150]


def test_a_damaged_file_is_skipped_and_counted(folder: Path) -> None:
    flip(folder / "speech-00001.parquet", 0.3)
    (folder / "speech-00002.parquet").write_bytes(b"short")
    with pytest.raises(ShardError, match=r"speech-00002.parquet is damaged: it has 5 bytes"):
        open_shards(folder, "speech")
    dataset = open_shards(folder, "speech", on_corrupt="skip")
    found = [int(dataset[position].origin) for position in range(ROWS)]
    assert set(found) == set(range(110))
    assert dataset.skipped == ROWS - 110
    other = open_shards(folder, "speech", on_corrupt="skip")
    assert [int(other[position].origin) for position in reversed(range(ROWS))] == found[::-1]
    (folder / "speech-00000.parquet").unlink()
    with pytest.raises(ShardError, match="none of the speech samples of .* can be read"):
        open_shards(folder, "speech", on_corrupt="skip")[0]


def test_others_share_the_places_of_a_damaged_file(folder: Path) -> None:
    flip(folder / "speech-00001.parquet", 0.3)
    dataset = open_shards(folder, "speech", on_corrupt="skip", seed=0)
    counts = np.bincount([int(dataset[position].origin) for position in range(8 * ROWS)], minlength=ROWS)
    assert counts[110:220].sum() == 0
    sound = np.delete(counts, slice(110, 220))
    assert sound.min() >= 8 and sound.max() <= 30  # 12.6 on average


def test_missing_pictures(folder: Path) -> None:
    (folder / "pictures-00000.parquet").unlink()
    with pytest.raises(ShardError, match=r"pictures-00000.parquet is damaged: it is missing"):
        open_shards(folder, "speech")
    dataset = open_shards(folder, "speech", on_corrupt="skip")
    assert all(dataset[position].image is None for position in range(ROWS))
    assert dataset.skipped == ROWS / 2


def test_a_changed_picture(folder: Path, tmp_path: Path) -> None:
    dataset = open_shards(folder, "speech")
    content = (folder / "pictures-00000.parquet").read_bytes()
    at = content.index(b"the file of p1")
    (folder / "pictures-00000.parquet").write_bytes(content[:at] + b"T" + content[at + 1 :])
    with pytest.raises(ShardError, match="damaged: "):
        dataset.picture(picture_key(picture("p1")))
    skipping = open_shards(folder, "speech", on_corrupt="skip")
    assert picture_key(picture("p1")) not in {skipping[position].image for position in range(ROWS)}
    with pytest.raises(KeyError):  # another data set may have it
        skipping.picture(picture_key(picture("p1")))


@pytest.mark.parametrize("damage", [b"no checksum", b"\xff\xfe", b"-1"])
def test_damaged_keys_of_pictures(folder: Path, damage: bytes) -> None:
    """In a column that is not compressed, so that the file still reads as Parquet."""
    path = folder / "pictures-00000.parquet"
    pq.write_table(pq.read_table(path), path, compression="none", use_dictionary=False, write_statistics=False)
    key = picture_key(picture("p1")).encode()
    path.write_bytes(path.read_bytes().replace(key, damage.ljust(64, b"0")))
    manifest = Manifest.read(folder)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    files = tuple(dataclasses.replace(file, size=sizes[file.name]) for file in manifest.files)
    dataclasses.replace(manifest, files=files).write(folder)
    stopping = open_shards(folder, "speech", seed=None)
    for _ in range(2):
        with pytest.raises(ShardError, match=r"pictures-00000.parquet is damaged: its keys are no checksums"):
            stopping[1]
    dataset = open_shards(folder, "speech", on_corrupt="skip")
    assert all(dataset[position].image is None for position in range(0, ROWS, 9))


def test_keys_that_cannot_be_read(folder: Path) -> None:
    path = folder / "pictures-00000.parquet"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ShardError, match=r"pictures-00000.parquet is damaged: it cannot be read as Parquet"):
        open_shards(folder, "speech", seed=None)[1]


def test_a_picture_that_cannot_be_decoded_is_skipped(
    write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its samples are replaced by neighbours, the same ones in any order of reading, and it is named once."""
    broken = b"P6\n40 40\n255\ncut off"
    samples = [sample(i, image="broken" if i % 4 == 1 else "whole") for i in range(100)]
    write(tmp_path / "set", samples, lambda key: broken if key == "broken" else picture(key))
    stopping = open_shards(tmp_path / "set", "speech", seed=None)
    assert [int(stopping[position].origin) for position in range(100)] == list(range(100))
    found = []
    for positions in (range(100), reversed(range(100))):
        caplog.clear()
        dataset = open_shards(tmp_path / "set", "speech", seed=None, on_corrupt="skip")
        found.append({position: int(dataset[position].origin) for position in positions})
        (record,) = caplog.records
        assert f"picture {picture_key(broken)} of {tmp_path / 'set'} cannot be used" in record.getMessage()
        assert dataset.skipped == 25
    assert found[0] == found[1] == {i: i + 1 if i % 4 == 1 else i for i in range(100)}


def test_without_verification_parquet_itself_complains(folder: Path) -> None:
    path = folder / "speech-00000.parquet"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ShardError, match="cannot be read as Parquet"):
        open_shards(folder, "speech", seed=None, verify=False)[0]


def test_without_verification_a_damaged_group_leaves_the_others_whatever_was_read_before(folder: Path) -> None:
    path = folder / "speech-00000.parquet"
    column = pq.read_metadata(path).row_group(0).column(0)
    content = bytearray(path.read_bytes())
    first = column.dictionary_page_offset or column.data_page_offset
    content[first : first + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(content)
    found = []
    for positions in (range(110), reversed(range(110))):
        dataset = open_shards(folder, "speech", seed=None, verify=False, on_corrupt="skip")
        found.append({position: dataset[position].origin for position in positions})
        assert dataset.skipped == GROUP_ROWS["speech"]
    assert found[0] == found[1]


def test_folders_that_are_none(folder: Path, tmp_path: Path, write: Write) -> None:
    with pytest.raises(ShardError, match=r"holds no manifest.json"):
        open_shards(tmp_path, "speech")
    write(tmp_path / "written", [sample(1, kind="speechless")])
    with pytest.raises(InputError, match="holds no speech samples, only 1 speechless ones"):
        open_shards(tmp_path / "written", "speech")
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, message in (
        ({"version": 1}, "of version 1; this program reads version 2: pack the conversations again"),
        ({"format": "other"}, "no manifest of packed samples"),
        ({"files": [manifest["files"][0] | {"name": "../secret"}]}, "damaged"),
        ({"files": 3}, "damaged"),
    ):
        (folder / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ShardError, match=message):
            open_shards(folder, "speech")


def test_writing_is_all_or_nothing(write: Write, tmp_path: Path, tiny_tokenizer: TextTokenizer) -> None:
    with pytest.raises(InputError, match=r"the codes are \[4, 20\], but must be \[6, 20\]"):
        write(tmp_path / "set", [sample(1), sample(2, codebooks=4)])
    with pytest.raises(InputError, match="need the codec"):
        write_shards(tmp_path / "set", [sample(1)], picture, tiny_tokenizer, None)
    assert list(tmp_path.iterdir()) == []


def test_graded_masks_come_back(write: Write, tmp_path: Path) -> None:
    mask = np.arange(20) % 2 == 0
    made = sample(1)
    graded = Sample(text=made.text, speaker=made.speaker, audio=made.audio, audio_graded=mask, text_graded=~mask)
    write(tmp_path / "set", [graded, made])
    dataset = open_shards(tmp_path / "set", "speech", seed=None)
    assert same(dataset[0], graded)
    assert same(dataset[1], made)
