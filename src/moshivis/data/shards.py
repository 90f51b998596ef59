"""Reading packed samples: a folder that `moshivis data tokenize` or `write_shards` wrote, as a `Dataset`.

Nothing but a window of row groups is in memory, whatever the folder holds. The checksum of a file is checked when it is
read for the first time, that of a picture whenever it is read; sizes of files when the folder is opened. Where samples
are to be skipped, sizes are checked with the checksums, and a picture is also decoded before the first sample that
shows it is given away.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moshivis.data.order import EpochOrder
from moshivis.data.sample import Kind, Sample
from moshivis.data.shard_format import Manifest, ShardFile, file_sha256
from moshivis.errors import InputError, ShardError
from moshivis.vision.image import read_image

OnCorrupt = Literal["stop", "skip"]
WINDOW = 16  # row groups that are shuffled together and held in memory: 1024 recordings or 4096 written dialogues
WINDOW_BYTES = 256 * 2**20  # fewer groups where these would take up more

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

    They are shuffled within windows of at most `window` row groups: as many as fit into WINDOW_BYTES, but at least one.
    `verify` False trusts the content of files. Of a damaged file, "stop" raises ShardError; "skip" reads other samples
    in the place of its samples and of those whose picture cannot be decoded, and counts them in `skipped`.
    Raises ShardError if the folder has no valid manifest or, with "stop", a file of another size than it says;
    InputError if it has no sample of that kind.
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
        self._shares = np.array(rows) / sum(rows)
        window = max(1, min(window, WINDOW_BYTES // max(file.group_bytes for file in files)))
        self._order = EpochOrder(rows, seed, window)
        self._reader = _Reader(folder, verify, held=window)
        pictures = [file for file in manifest.files if file.content == "pictures"]
        self._pictures = _Pictures(folder, pictures, skip=on_corrupt == "skip")
        if on_corrupt == "stop":
            for file in manifest.files:
                check_size(folder, file)

    @property
    def rows(self) -> int:
        """Samples an epoch."""
        return self._order.rows

    @property
    def pictured(self) -> bool:
        """Whether a sample names a picture, by what the files say of their columns.

        Raises ShardError for a damaged file; with "skip" the other files tell.
        """
        return any(self._pictured(file) for file in dict.fromkeys(file for file, _ in self._groups))

    def __getitem__(self, position: int) -> Sample:
        """Raises ShardError for a damaged file, with "skip" only if no sample can be read."""
        first, row = self._order[position]
        for group in self._from(first, position):
            file, number = self._groups[group]
            try:
                table = self._reader.read(file, number)
            except ShardError:
                if self.on_corrupt == "stop":
                    raise
                continue
            for shift in range(table.num_rows):
                try:
                    sample = self._sample(table, (row + shift) % table.num_rows, file)
                except ShardError:
                    if self.on_corrupt == "stop":
                        raise
                    continue
                self.skipped += group != first or shift > 0
                return sample
        raise ShardError(f"none of the {self.kind} samples of {self.folder} can be read; write them again")

    def picture(self, key: str) -> bytes:
        """Raises KeyError if the folder has no such picture, ShardError if it is damaged.

        With "skip" a damaged one is none: another data set may have the same picture, whole.
        """
        try:
            return self._pictures[key]
        except ShardError as error:
            if self.on_corrupt == "stop":
                raise
            raise KeyError(str(error)) from error

    def _from(self, first: int, position: int) -> Iterator[int]:
        """Group `first`, then the others in an order of the position's own: else one would stand for all of a file."""
        yield first
        rng, count = np.random.default_rng([position, first]), len(self._groups)
        others = rng.choice(count, count, replace=False, p=self._shares)
        yield from (int(group) for group in others if group != first)

    def _sample(self, table: pa.Table, row: int, file: ShardFile) -> Sample:
        text, image = _array(table, "text", row), table["image"][row].as_py()
        audio = None
        if self.kind == "speech":
            codes = _array(table, "audio", row)
            if len(codes) != self.manifest.codebooks * len(text):
                raise _damaged(self.folder, file, f"row {row} of a group has {len(codes)} codes for {len(text)} frames")
            audio = codes.reshape(self.manifest.codebooks, len(text))
        if image is not None and (fault := self._pictures.fault(image)) is not None:
            raise _damaged(self.folder, file, f"{fault} that a sample names")
        return Sample(
            text=text,
            speaker=_array(table, "speaker", row),
            audio=audio,
            image=image,
            text_graded=_mask(table, "text_graded", row),
            audio_graded=_mask(table, "audio_graded", row) if self.kind == "speech" else None,
            origin=table["origin"][row].as_py(),
        )

    def _pictured(self, file: ShardFile) -> bool:
        try:
            return _names_pictures(self.folder, file)
        except ShardError:
            if self.on_corrupt == "stop":
                raise
            return False


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
        self._damaged: dict[tuple[str, int | None], str] = {}  # a file, or a group of one -> what is wrong with it
        self._tables: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tables": OrderedDict()}

    def read(self, file: ShardFile, group: int) -> pa.Table:
        """Raises ShardError, the same one every time, if anything is wrong with the file or the group."""
        key = file.name, group
        if key in self._tables:
            self._tables.move_to_end(key)
            return self._tables[key]
        for part in ((file.name, None), key):
            if part in self._damaged:
                raise ShardError(self._damaged[part])
        # A damaged group leaves the others: which samples are given must not depend on what was read before.
        damaged: int | None = None
        try:
            self._check(file)
            damaged = group
            table = _read_group(self.folder, file, group)
        except ShardError as error:
            self._damaged[file.name, damaged] = str(error)
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
        try:
            sound = not self.verify or file_sha256(self.folder / file.name) == file.sha256
        except OSError as error:
            raise _damaged(self.folder, file, f"it cannot be read ({error.strerror or error})") from error
        if not sound:
            raise _damaged(self.folder, file, "its checksum is wrong")
        self._sound.add(file.name)


_UNKNOWN, _SOUND, _BAD = range(3)


class _Index(NamedTuple):
    prefixes: np.ndarray  # [pictures] first 64 bits of each key, sorted
    files: np.ndarray  # [pictures] number of its file
    rows: np.ndarray  # [pictures] its row there
    states: np.ndarray  # [pictures] whether it was decoded, and how that went


class _Pictures:
    """Where each picture is. The index, 17 bytes a picture, is read when the first picture is asked for.

    With `skip`, what is in a file that cannot be read, and a picture that cannot be decoded, counts as not there.
    Without it such a file raises ShardError.
    """

    def __init__(self, folder: Path, files: Sequence[ShardFile], *, skip: bool):
        self.folder, self.files, self.skip = folder, files, skip
        self._index: _Index | None = None

    def __getitem__(self, key: str) -> bytes:
        at = self._find(key)
        if at is None:
            raise KeyError(f"{self.folder} holds no picture {key}")
        return self._read(key, at)

    def fault(self, key: str) -> str | None:
        """Why no sample can show a picture: "no file holds …"; None for one that can be shown."""
        at = self._find(key)
        if at is None:
            return f"no file holds the picture {key}"
        if not self.skip:
            return None
        states = self._loaded().states
        if states[at] == _UNKNOWN:
            states[at] = self._try(key, at)
        return None if states[at] == _SOUND else f"no file holds a sound copy of the picture {key}"

    def _try(self, key: str, at: int) -> int:
        try:
            read_image(self._read(key, at))
        except (InputError, ShardError) as error:
            _log.warning("picture %s of %s cannot be used, samples with it are skipped: %s", key, self.folder, error)
            return _BAD
        return _SOUND

    def _read(self, key: str, at: int) -> bytes:
        index = self._loaded()
        file = self.files[index.files[at]]
        group, row = divmod(int(index.rows[at]), file.group_rows)
        content: bytes = _read_group(self.folder, file, group)["file"][row].as_py()
        if hashlib.sha256(content).hexdigest() != key:
            raise _damaged(self.folder, file, f"the checksum of picture {key} is wrong")
        return content

    def _find(self, key: str) -> int | None:
        """Where the index has it."""
        prefixes = self._loaded().prefixes
        try:
            wanted = np.uint64(int(key[:16], 16))
        except ValueError:  # the key of a picture of another data set
            return None
        at = int(np.searchsorted(prefixes, wanted))
        return at if at < len(prefixes) and prefixes[at] == wanted else None

    def _loaded(self) -> _Index:
        if self._index is None:
            self._index = self._read_index()
        return self._index

    def _read_index(self) -> _Index:
        prefixes, files, rows = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for number, file in enumerate(self.files):
            try:
                found = self._read_keys(file)
            except ShardError as error:
                if not self.skip:
                    raise
                _log.warning("%s", error)
                continue
            prefixes.append(found)
            files.append(np.full(len(found), number, np.int32))
            rows.append(np.arange(len(found), dtype=np.int32))
        joined = np.concatenate(prefixes)
        order = np.argsort(joined, kind="stable")
        states = np.full(len(joined), _UNKNOWN, np.uint8)
        return _Index(joined[order], np.concatenate(files)[order], np.concatenate(rows)[order], states)

    def _read_keys(self, file: ShardFile) -> np.ndarray:
        """[pictures] their prefixes."""
        check_size(self.folder, file)
        keys = _read(self.folder, file, columns=["key"])["key"]
        try:
            return np.array([int(key[:16], 16) for key in keys.to_pylist()], np.uint64)
        except (ValueError, OverflowError) as error:  # no UTF-8, no hexadecimal number, a negative one
            raise _damaged(self.folder, file, f"its keys are no checksums ({error})") from error


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


def _names_pictures(folder: Path, file: ShardFile) -> bool:
    try:
        metadata = pq.read_metadata(folder / file.name)
        column = metadata.schema.names.index("image")
        groups = [metadata.row_group(number).column(column) for number in range(metadata.num_row_groups)]
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damaged(folder, file, f"it cannot be read as Parquet: {error}") from error
    return any(group.is_stats_set and group.statistics.null_count < group.num_values for group in groups)


def _damaged(folder: Path, file: ShardFile, what: str) -> ShardError:
    return ShardError(
        f"{folder / file.name} is damaged: {what}. Copy it again or pack its samples again; to train without the "
        'samples of damaged files, set on_corrupt to "skip"'
    )
