"""`moshivis.files`: all or nothing."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from moshivis.errors import InputError
from moshivis.files import atomic_directory, atomic_write, clear_interrupted, keep_inputs, read_limited, shown

KILLED = """
import os, sys
from moshivis.files import atomic_directory, atomic_write
with atomic_write(sys.argv[1] + "/weights.bin") as file, atomic_directory(sys.argv[1] + "/model") as folder:
    file.write_text("half")
    (folder / "weights.bin").write_text("half")
    os.kill(os.getpid(), 9)
"""


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "weights.bin"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target) as temporary:
        temporary.write_text("half of the new")
        raise RuntimeError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["weights.bin"]


def test_a_write_appears_whole_with_ordinary_permissions(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "table.json"
    with atomic_write(target) as temporary:
        assert temporary.suffix == ".json"
        temporary.write_text("{}")
        assert not target.exists()
    assert target.read_text() == "{}"
    plain = tmp_path / "plain"
    plain.write_text("")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert os.listdir(target.parent) == ["table.json"]


def test_a_folder_is_never_overwritten_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path):
        pass


def test_a_failed_directory_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_directory(tmp_path / "model") as temporary:
        (temporary / "config.json").write_text("{}")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_a_directory_appears_whole_and_may_replace_an_empty_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with atomic_directory(target) as temporary:
        (temporary / "shards").mkdir()
        (temporary / "shards" / "a").write_text("a")
        assert os.listdir(target) == []
    assert (target / "shards" / "a").read_text() == "a"
    assert os.listdir(tmp_path) == ["model"]


def test_a_directory_with_content_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"), atomic_directory(tmp_path):
        pytest.fail("the block must not run")
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_directory_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(RuntimeError), atomic_directory(target, replace=True):
        raise RuntimeError
    assert os.listdir(target) == ["old"]
    with atomic_directory(target, replace=True) as temporary:
        (temporary / "new").touch()
        assert os.listdir(target) == ["old"]
    assert (os.listdir(tmp_path), os.listdir(target)) == (["model"], ["new"])
    (tmp_path / "link").symlink_to(target)
    for other in (tmp_path / "link", target / "new"):
        with pytest.raises(FileExistsError), atomic_directory(other, replace=True):
            pytest.fail("the block must not run")


def test_what_a_killed_process_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    others = {".model-card", ".weights-of-others.bin", "model-abcdefgh", "weights.bin"}
    for name in others:
        (tmp_path / name).write_text("mine")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)])
    assert ended.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == len(others) + 2
    for name in ("weights.bin", "model"):
        clear_interrupted(tmp_path / name)
    assert set(os.listdir(tmp_path)) == others
    assert (tmp_path / "weights.bin").read_text() == "mine"


@pytest.mark.parametrize("already_there", [False, True])
def test_a_directory_that_was_being_replaced_is_back(already_there: bool, tmp_path: Path) -> None:
    """Killed between or after the two renames."""
    (tmp_path / ".model-old").mkdir()
    (tmp_path / ".model-old" / "old").touch()
    if already_there:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "new").touch()
    clear_interrupted(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    assert os.listdir(tmp_path / "model") == ["new" if already_there else "old"]


def test_reading_stops_at_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_limited(file, max_bytes=5, noun="picture") == b"12345"
    with pytest.raises(InputError, match="limit for a picture"):
        read_limited(file, max_bytes=4, noun="picture")
    with pytest.raises(InputError, match="limit for a picture"):
        read_limited("/dev/zero", max_bytes=1000, noun="picture")


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere.png", "no such file"), (".", "is a folder"), (b"", "is empty"), ("a\0b", "cannot be read")],
)
def test_unreadable_sources_are_named(source: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_limited(source, max_bytes=10, noun="picture")


def test_no_output_takes_the_place_of_an_input(tmp_path: Path) -> None:
    recording, link = tmp_path / "q.wav", tmp_path / "link.wav"
    recording.write_bytes(b"sound")
    link.symlink_to(recording)
    keep_inputs([tmp_path / "new.wav"], [recording, tmp_path / "missing.wav"])
    for out in (recording, link, tmp_path / "." / "q.wav"):
        with pytest.raises(InputError, match="would replace what is read from it"):
            keep_inputs([tmp_path / "new.wav", out], [recording])


def test_a_path_of_any_bytes_can_be_shown() -> None:
    assert shown(Path("frage.wav")) == "frage.wav"
    assert shown(os.fsdecode(b"frage_\xfc.wav")) == "frage_\ufffd.wav"
