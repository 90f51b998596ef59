"""Writing packed samples, in the form that `shard_format` describes.

`write_shards` packs samples that a program makes. `open_part` writes the files of one number, all or none of them;
`moshivis data tokenize` writes many parts side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moshivis.codec.mimi import Mimi
from moshivis.data.sample import Sample
from moshivis.data.shard_format import (
    GROUP_ROWS,
    SCHEMAS,
    Content,
    Manifest,
    ShardFile,
    codec_fingerprint,
    file_sha256,
    picture_key,
    shard_name,
    tokenizer_fingerprint,
)
from moshivis.errors import InputError
from moshivis.files import atomic_directory, atomic_write
from moshivis.speech_lm.tokenizer import TextTokenizer

ROWS_A_SHARD = 4096


def write_shards(
    folder: str | Path,
    samples: Iterable[Sample],
    picture: Callable[[str], bytes],
    tokenizer: TextTokenizer,
    codec: Mimi | None,
    *,
    rows_a_shard: int = ROWS_A_SHARD,
) -> Manifest:
    """Pack samples of one kind or both into a new folder; the whole folder appears when the last one is written.

    `picture` gives the file of a picture by the key that samples name it by; packed, it is named by its checksum.
    Raises InputError if samples differ in their number of codebooks or speak without a codec, FileExistsError if the
    folder holds something.
    """
    files: list[ShardFile] = []
    keys: dict[str, str] = {}  # theirs -> ours
    stored: set[str] = set()  # ours
    codebooks: int | None = None
    remaining = iter(samples)
    with atomic_directory(folder) as temporary:
        for number in itertools.count():
            part = list(itertools.islice(remaining, rows_a_shard))
            if not part:
                break
            with open_part(temporary, number, codebooks) as writer:
                for sample in part:
                    if sample.image is not None and sample.image not in keys:
                        _store_picture(sample.image, picture(sample.image), keys, stored, writer)
                    writer.add(sample, None if sample.image is None else keys[sample.image])
            files += writer.files
            codebooks = writer.codebooks
        if codebooks is not None and codec is None:
            raise InputError("samples with speech need the codec that made their codes, for its fingerprint")
        manifest = Manifest(
            codebooks=codebooks or 0,
            tokenizer=tokenizer_fingerprint(tokenizer),
            codec=codec_fingerprint(codec) if codebooks is not None and codec is not None else None,
            files=tuple(files),
        )
        manifest.write(temporary)
    return manifest


def _store_picture(theirs: str, file: bytes, keys: dict[str, str], stored: set[str], writer: PartWriter) -> None:
    keys[theirs] = picture_key(file)
    if keys[theirs] not in stored:
        stored.add(writer.add_picture(file))


@contextmanager
def open_part(folder: Path, number: int, codebooks: int | None = None) -> Iterator[PartWriter]:
    """Write the files speech-N, speechless-N and pictures-N, as far as there is something for them.

    They appear on leaving the block, unless it raises. `codebooks` is as in `PartWriter`.
    """
    with ExitStack() as stack:
        writer = PartWriter(folder, number, codebooks, stack)
        try:
            yield writer
        finally:
            writer.close()
        writer.describe()


class PartWriter:
    """What `open_part` yields. `files` describes the files once they are complete.

    `codebooks` is the number that all samples with speech must have; None takes the first one's.
    """

    def __init__(self, folder: Path, number: int, codebooks: int | None, stack: ExitStack):
        self.folder, self.number, self.codebooks = folder, number, codebooks
        self.files: list[ShardFile] = []
        self._tables: dict[Content, _Table] = {}
        self._stack = stack

    def add(self, sample: Sample, image: str | None) -> None:
        """A sample whose picture has the key `image`. Raises InputError for another number of codebooks."""
        row: dict[str, Any] = {
            "text": sample.text.astype(np.int32),
            "speaker": sample.speaker.astype(np.uint8),
            "text_graded": sample.text_graded,
            "image": image,
            "origin": sample.origin,
        }
        if sample.audio is not None:
            if self.codebooks is None:
                self.codebooks = len(sample.audio)
            if sample.audio.shape != (self.codebooks, len(sample)):
                raise InputError(
                    f"{sample.origin or 'a sample'}: the codes are {list(sample.audio.shape)}, "
                    f"but must be [{self.codebooks}, {len(sample)}] as text and other samples tell"
                )
            row["audio"] = sample.audio.astype(np.int16).reshape(-1)
            row["audio_graded"] = sample.audio_graded
        self._table(sample.kind).add(row)

    def add_picture(self, file: bytes) -> str:
        """Returns its key. Adding it to one part of a folder is enough."""
        key = picture_key(file)
        self._table("pictures").add({"key": key, "file": file})
        return key

    def close(self) -> None:
        for table in self._tables.values():
            table.close()

    def describe(self) -> None:
        self.files = [table.describe() for table in self._tables.values()]

    def _table(self, content: Content) -> _Table:
        if content not in self._tables:
            path = self.folder / shard_name(content, self.number)
            temporary = self._stack.enter_context(atomic_write(path))
            self._tables[content] = _Table(path.name, temporary, content)
        return self._tables[content]


class _Table:
    """A Parquet file being written, a row group at a time."""

    def __init__(self, name: str, path: Path, content: Content):
        self.name, self.path, self.content = name, path, content
        self.rows = self.group_bytes = 0
        self._pending: list[dict[str, Any]] = []
        self._writer = pq.ParquetWriter(path, SCHEMAS[content], compression="zstd")

    def add(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self._pending.append(row)
        if len(self._pending) == GROUP_ROWS[self.content]:
            self._flush()

    def close(self) -> None:
        if self._pending:
            self._flush()
        self._writer.close()

    def describe(self) -> ShardFile:
        return ShardFile(
            name=self.name,
            content=self.content,
            rows=self.rows,
            group_rows=GROUP_ROWS[self.content],
            group_bytes=self.group_bytes,
            size=self.path.stat().st_size,
            sha256=file_sha256(self.path),
        )

    def _flush(self) -> None:
        group = pa.Table.from_pylist(self._pending, SCHEMAS[self.content])
        self.group_bytes = max(self.group_bytes, group.nbytes)
        self._writer.write_table(group)
        self._pending.clear()
