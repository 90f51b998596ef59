"""Reading packed samples: a folder that `moshivis data tokenize` or `write_shards` wrote, as a `Dataset`.

Nothing but a window of row groups is in memory, whatever the folder holds. Sizes of files are checked when the folder
is opened, the checksum of a file when it is read for the first time, that of a picture whenever it is read.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moshivis.data.order import EpochOrder
from moshivis.data.sample import Kind, Sample
from moshivis.data.shard_format import Manifest, ShardFile, file_sha256
from moshivis.errors import InputError, ShardError

OnCorrupt = Literal["stop", "skip"]
WINDOW = 16  # row groups that are shuffled together and held in memory: 1024 conversations

_log = logging.getLogger("moshivis.data")


def open_shards(
    folder: str | Path,
    kind: Kind,
    *,
    seed: int | None = 0,
    name: str | None = None,
    verify: bool = True,
    on_corrupt: OnCorrupt = "stop",
    window: int = WINDOW,
) -> ShardDataset:
    """The samples of one kind in a folder, in an order shuffled by `seed`; None keeps the order they are stored in.

    `verify` False trusts the content of files. Of a damaged file, "stop" raises ShardError; "skip" reads other samples
    in the place of its samples, and counts them in `skipped`.
    Raises ShardError if the folder has no valid manifest, InputError if it has no sample of that kind.
    """
    folder = Path(folder)
    manifest = Manifest.read(folder)
    if not manifest.rows(kind):
        other: Kind = "speechless" if kind == "speech" else "speech"
        raise InputError(f"{folder} holds no {kind} samples, only {manifest.rows(other)} {other} ones")
    return ShardDataset(
        folder, kind, manifest, seed=seed, name=name, verify=verify, on_corrupt=on_corrupt, window=window
    )


class ShardDataset:
    """A `Dataset`; see `open_shards`. Can be pickled, for the processes of a loader."""

    def __init__(
        self,
        folder: Path,
        kind: Kind,
        manifest: Manifest,
        *,
        seed: int | None,
        name: str | None,
        verify: bool,
        on_corrupt: OnCorrupt,
        window: int,
    ):
        self.folder, self.kind, self.manifest = folder, kind, manifest
        self.name = name or folder.name
        self.on_corrupt = on_corrupt
        self.skipped = 0  # positions at which another sample stands for one that cannot be read, so far
        files = [file for file in manifest.files if file.content == kind]
        # A part may end within a group, so groups are counted file by file.
        self._groups = [(file, group) for file in files for group in range(-(-file.rows // file.group_rows))]
        rows = [min(file.group_rows, file.rows - group * file.group_rows) for file, group in self._groups]
        self._order = EpochOrder(rows, seed, window)
        self._reader = _Reader(folder, verify, held=window)
        self._pictures = _Pictures(folder, [file for file in manifest.files if file.content == "pictures"])
        if on_corrupt == "stop":
            for file in manifest.files:
                check_size(folder, file)

    @property
    def rows(self) -> int:
        """Samples an epoch."""
        return self._order.rows

    def __getitem__(self, position: int) -> Sample:
        """Raises ShardError for a damaged file, with "skip" only if all files are."""
        first, row = self._order[position]
        for group in (*range(first, len(self._groups)), *range(first)):
            file, number = self._groups[group]
            try:
                table = self._reader.read(file, number)
                sample = self._sample(table, row % table.num_rows, file)
            except ShardError:
                if self.on_corrupt == "stop":
                    raise
                continue
            self.skipped += group != first
            return sample
        raise ShardError(f"all files of {self.folder} with {self.kind} samples are damaged; write them again")

    def picture(self, key: str) -> bytes:
        """Raises KeyError if the folder has no such picture, ShardError if it is damaged."""
        return self._pictures[key]

    def _sample(self, table: pa.Table, row: int, file: ShardFile) -> Sample:
        text, image = _array(table, "text", row), table["image"][row].as_py()
        audio = None
        if self.kind == "speech":
            codes = _array(table, "audio", row)
            if len(codes) != self.manifest.codebooks * len(text):
                raise _damaged(self.folder, file, f"row {row} of a group has {len(codes)} codes for {len(text)} frames")
            audio = codes.reshape(self.manifest.codebooks, len(text))
        if image is not None and image not in self._pictures:
            raise _damaged(self.folder, file, f"no file holds the picture {image} that a sample names")
        return Sample(
            text=text,
            speaker=_array(table, "speaker", row),
            audio=audio,
            image=image,
            text_graded=_mask(table, "text_graded", row),
            audio_graded=_mask(table, "audio_graded", row) if self.kind == "speech" else None,
            origin=table["origin"][row].as_py(),
        )


def _array(table: pa.Table, column: str, row: int) -> np.ndarray:
    """A copy that may be written to."""
    return np.array(table[column][row].values.to_numpy(zero_copy_only=False))


def _mask(table: pa.Table, column: str, row: int) -> np.ndarray | None:
    return _array(table, column, row) if table[column][row].is_valid else None


# files ----------------------------------------------------------------------------------------------------------------


class _Reader:
    """Row groups of files whose checksum is right, the last ones read kept in memory."""

    def __init__(self, folder: Path, verify: bool, held: int):
        self.folder, self.verify, self.held = folder, verify, held
        self._sound: set[str] = set()
        self._damaged: dict[str, str] = {}  # file -> what is wrong with it
        self._tables: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": OrderedDict()}

    def read(self, file: ShardFile, group: int) -> pa.Table:
        """Raises ShardError, the same one every time, if anything is wrong with the file."""
        key = file.name, group
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        if file.name in self._damaged:
            raise ShardError(self._damaged[file.name])
        try:
            self._check(file)
            table = _read_group(self.folder, file, group)
        except ShardError as error:
            self._damaged[file.name] = str(error)
            _log.warning("%s", error)
            raise
        self._tables[key] = table
        if len(self._tables) > self.held:
            self._tables.popitem(last=False)
        return table

    def _check(self, file: ShardFile) -> None:
        if file.name in self._sound:
            return
        check_size(self.folder, file)
        if self.verify and file_sha256(self.folder / file.name) != file.sha256:
            raise _damaged(self.folder, file, "its checksum is wrong")
        self._sound.add(file.name)


class _Pictures:
    """Where each picture is. The index, 16 bytes a picture, is read when the first picture is asked for."""

    def __init__(self, folder: Path, files: Sequence[ShardFile]):
        self.folder, self.files = folder, files
        self._index: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def __getitem__(self, key: str) -> bytes:
        found = self._find(key)
        if found is None:
            raise KeyError(f"{self.folder} holds no picture {key}")
        file, row = self.files[found[0]], found[1]
        group, row = divmod(row, file.group_rows)
        content: bytes = _read_group(self.folder, file, group)["file"][row].as_py()
        if hashlib.sha256(content).hexdigest() != key:
            raise _damaged(self.folder, file, f"the checksum of picture {key} is wrong")
        return content

    def _find(self, key: str) -> tuple[int, int] | None:
        """File and row."""
        if self._index is None:
            self._index = self._read_index()
        try:
            wanted = np.uint64(int(key[:16], 16))
        except ValueError:  # the key of a picture of another data set
            return None
        prefixes, files, rows = self._index
        at = int(np.searchsorted(prefixes, wanted))
        return (int(files[at]), int(rows[at])) if at < len(prefixes) and prefixes[at] == wanted else None

    def _read_index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First 64 bits of each key, sorted; its file; its row. Files that cannot be read hold no picture."""
        prefixes, files, rows = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for number, file in enumerate(self.files):
            try:
                check_size(self.folder, file)
                keys = _read(self.folder, file, columns=["key"])["key"].to_pylist()
            except ShardError as error:
                _log.warning("%s", error)
                continue
            prefixes.append(np.array([int(key[:16], 16) for key in keys], np.uint64))
            files.append(np.full(len(keys), number, np.int32))
            rows.append(np.arange(len(keys), dtype=np.int32))
        joined = np.concatenate(prefixes)
        order = np.argsort(joined, kind="stable")
        return joined[order], np.concatenate(files)[order], np.concatenate(rows)[order]


def check_size(folder: Path, file: ShardFile) -> None:
    """Raise ShardError unless the file is there and as long as it was."""
    try:
        size = (folder / file.name).stat().st_size
    except OSError:
        raise _damaged(folder, file, "it is missing") from None
    if size != file.size:
        raise _damaged(folder, file, f"it has {size} bytes instead of {file.size}")


def _read_group(folder: Path, file: ShardFile, group: int) -> pa.Table:
    return _read(folder, file, group=group).combine_chunks()


def _read(folder: Path, file: ShardFile, *, group: int | None = None, columns: list[str] | None = None) -> pa.Table:
    try:
        with pq.ParquetFile(folder / file.name) as opened:
            if group is None:
                return opened.read(columns=columns, use_threads=False)
            return opened.read_row_group(group, columns=columns, use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(folder, file, f"it cannot be read as Parquet: {error}") from error


def _damaged(folder: Path, file: ShardFile, what: str) -> ShardError:
    return ShardError(
        f"{folder / file.name} is damaged: {what}. Copy it again or pack its samples again; to train without the "
        'samples of damaged files, set on_corrupt to "skip"'
    )
