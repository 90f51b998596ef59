"""The folder that `moshivis data tokenize` packs into: what was begun in it, and what may not be left there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_support import corpus, pack
from moshivis.data.shard_format import Manifest
from moshivis.errors import InputError

__all__ = ["corpus"]  # a fixture


def begin(corpus: Path, out: Path, model: Path) -> list[str]:
    """Pack a first part of three recordings with pictures, and fail at the second one; all lines as they should be."""
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*lines[:3], "{"]) + "\n")
    with pytest.raises(InputError, match="all.jsonl:4: this line is no JSON"):
        pack(corpus, out, model)
    assert sorted(path.name for path in out.glob("*.parquet")) == ["pictures-00000.parquet", "speech-00000.parquet"]
    return lines


def test_what_another_version_began_is_not_finished(corpus: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lines = begin(corpus, out, tiny_folder)
    corpus.write_text("\n".join(lines[:4]) + "\n")
    job = json.loads((out / "job.json").read_text())
    ours = job.pop("version")
    (out / "job.json").write_text(json.dumps(job))  # as the first version wrote it
    sentence = r"out was begun by another version of this program; remove it and pack again"
    with pytest.raises(InputError, match=sentence):
        pack(corpus, out, tiny_folder)
    (out / "job.json").write_text(json.dumps(job | {"version": ours}))
    pack(corpus, out, tiny_folder)
    (out / "job.json").write_text(json.dumps(job))
    with pytest.raises(InputError, match=sentence):
        pack(corpus, out, tiny_folder)


def test_of_a_part_that_is_packed_anew_nothing_stays(corpus: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Its lines were recordings with pictures, and are dialogues without."""
    out = tmp_path / "out"
    begin(corpus, out, tiny_folder)
    turns = {"turns": [{"role": "user", "text": "what is the star"}]}
    corpus.write_text("\n".join(4 * [json.dumps(turns)]) + "\n")
    pack(corpus, out, tiny_folder)
    files = {file.name for file in Manifest.read(out).files}
    assert files == {"speechless-00000.parquet", "speechless-00001.parquet"}
    assert {path.name for path in out.iterdir()} == files | {"manifest.json", "job.json", "report.json"}


def test_a_folder_that_cannot_be_made(corpus: Path, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="all.jsonl/out cannot be written: Not a directory"):
        pack(corpus, corpus / "out", tiny_folder)
