"""What a folder of packed samples holds (the manifest and the columns of its Parquet files).

| file | holds |
| manifest.json | what was packed how, and size and checksum of every other file |
| speech-00000.parquet, speechless-00000.parquet | samples of one kind |
| pictures-00000.parquet | the picture files that samples name by the SHA-256 of their bytes |

Parquet, because a row group is read alone, every tool for data opens it, and the Hub shows it to people.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from moshivis.codec.mimi import Mimi
from moshivis.errors import ShardError
from moshivis.files import atomic_write
from moshivis.speech_lm.tokenizer import TextTokenizer

FORMAT, VERSION, MANIFEST = "moshivis-shards", 2, "manifest.json"
Content = Literal["speech", "speechless", "pictures"]
CONTENTS: tuple[Content, ...] = ("speech", "speechless", "pictures")
GROUP_ROWS: dict[Content, int] = {"speech": 64, "speechless": 256, "pictures": 8}  # rows that are read together

_TEXT = [
    pa.field("text", pa.list_(pa.int32()), nullable=False),
    pa.field("speaker", pa.list_(pa.uint8()), nullable=False),
    pa.field("text_graded", pa.list_(pa.bool_())),
    pa.field("image", pa.string()),
    pa.field("origin", pa.string(), nullable=False),
]
SCHEMAS: dict[Content, pa.Schema] = {
    "speech": pa.schema(
        [
            *_TEXT,
            pa.field("audio", pa.list_(pa.int16()), nullable=False),  # codebook after codebook, each T codes
            pa.field("audio_graded", pa.list_(pa.bool_())),
        ]
    ),
    "speechless": pa.schema(_TEXT),
    "pictures": pa.schema(
        [pa.field("key", pa.string(), nullable=False), pa.field("file", pa.binary(), nullable=False)]
    ),
}


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """A Parquet file of the folder. All its row groups have `group_rows` rows but the last, which may have fewer."""

    name: str
    content: Content
    rows: int
    group_rows: int
    group_bytes: int  # what the largest row group takes up in memory, about
    size: int  # bytes
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder holds. Fingerprints tell whether a model has the tokenizer and the codec of the samples."""

    codebooks: int  # of both sides together; 0 if there is no speech
    tokenizer: str  # fingerprint
    codec: str | None  # fingerprint; None without speech
    files: tuple[ShardFile, ...]
    skipped: int = 0  # conversations of the source that could not be packed

    def rows(self, content: Content) -> int:
        return sum(file.rows for file in self.files if file.content == content)

    def write(self, folder: Path) -> None:
        """Write manifest.json; a folder without it is unfinished."""
        head = {"format": FORMAT, "version": VERSION, "rows": {content: self.rows(content) for content in CONTENTS}}
        with atomic_write(folder / MANIFEST) as temporary:
            temporary.write_text(json.dumps(head | dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises ShardError if the folder has no manifest of ours, or one of another version."""
        path = folder / MANIFEST
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ShardError(
                f"{folder} holds no {MANIFEST}: it is no folder of packed samples, or its packing was interrupted; "
                "the same `moshivis data tokenize` command finishes it"
            ) from None
        except (OSError, ValueError) as error:
            raise ShardError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise ShardError(f"{path} is no manifest of packed samples")
        if fields.get("version") != VERSION:
            raise ShardError(
                f"{path} is of version {fields.get('version')!r}; this program reads version {VERSION}: pack the "
                "conversations again"
            )
        try:
            return cls(
                codebooks=int(fields["codebooks"]),
                tokenizer=fields["tokenizer"],
                codec=fields["codec"],
                files=tuple(shard_file(file) for file in fields["files"]),
                skipped=int(fields["skipped"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ShardError(f"{path} is damaged: {error!r}") from error


def shard_file(fields: dict[str, Any]) -> ShardFile:
    """From its JSON form. Raises TypeError or ValueError if it is none."""
    file = ShardFile(**fields)
    sizes = file.group_rows, file.group_bytes
    if file.content not in CONTENTS or Path(file.name).name != file.name or min(sizes) < 1:
        raise ValueError(f"{file.name!r} is no file of packed samples")
    return file


def shard_name(content: Content, number: int) -> str:
    """Of the file of a part."""
    return f"{content}-{number:05d}.parquet"


# fingerprints ---------------------------------------------------------------------------------------------------------


def picture_key(file: bytes) -> str:
    """The key of a picture: equal files have equal keys, in every data set."""
    return hashlib.sha256(file).hexdigest()


def tokenizer_fingerprint(tokenizer: TextTokenizer) -> str:
    return hashlib.sha256(tokenizer.model).hexdigest()


def codec_fingerprint(codec: Mimi) -> str:
    """Of encoder and quantizer, which codes depend on; another decoder alone makes no other codec."""
    digest = hashlib.sha256()
    for name, tensor in sorted(codec.state_dict().items()):
        if name.startswith(("encoder", "downsample", "quantizer")):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
