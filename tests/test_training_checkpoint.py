"""What an end by kill -9 or a full disk leaves in a run's folder, and what the next start makes of it."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moshivis.errors import CheckpointError
from moshivis.training.checkpoint import Checkpoints, Progress
from moshivis.training.distributed import Ranks
from training_support import log_of, packed, run

__all__ = ["packed", "run"]  # fixtures
ALONE = Ranks(0, 1, torch.device("cpu"))
KILLED = """
import os, sys
from moshivis.files import atomic_directory, atomic_write
out = sys.argv[1]
with (
    atomic_directory(f"{out}/model") as folder,
    atomic_write(f"{out}/adapters.safetensors"),
    atomic_write(f"{out}/recipe.yaml"),
    atomic_write(f"{out}/log.jsonl"),
):
    (folder / "model-00001-of-00001.safetensors").write_bytes(bytes(1000))
    os.kill(os.getpid(), 9)
"""


def test_a_run_clears_what_a_killed_one_was_writing(run: Any) -> None:
    out = run()
    theirs = out / "samples" / "step-00000002" / ".ipynb_checkpoints"  # somebody looked at the answers
    theirs.mkdir(parents=True)
    answers = theirs.parent
    for left in (".speech-0-abcdefgh.wav", ".speechless-3-abcdefgh.json", ".notes.json"):
        (answers / left).write_text("")
    whole = {path.name for path in out.iterdir()}
    subprocess.run([sys.executable, "-c", KILLED, str(out)])
    assert len(list(out.iterdir())) == len(whole) + 4
    run(steps=4)
    assert {path.name for path in out.iterdir()} == whole
    assert {path.name for path in answers.iterdir()} == {theirs.name, ".notes.json"}
    assert len(log_of(out)) == 4


def test_a_model_that_cannot_be_written_leaves_the_older_one(run: Any) -> None:
    changes: dict[str, Any] = {"train": "all", "loss__codebooks": 3}
    out = run(**changes)
    before = {path.name: path.read_bytes() for path in (out / "model").iterdir()}
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, usual[1]))  # no file may be larger, as on a full disk
        with pytest.raises(CheckpointError, match="model could not be written"):
            run(**changes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert {path.name: path.read_bytes() for path in (out / "model").iterdir()} == before
    assert not list(out.glob(".model*"))
    run(**changes, steps=4)
    (weights,) = (out / "model").glob("*.safetensors")
    assert weights.read_bytes() != before[weights.name] and load_file(weights)


def test_remains_of_a_checkpoint_are_cleared(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    for step in (2, 4):
        save(checkpoints, step)
    (tmp_path / "step-00000002" / "state.json").unlink()  # killed while it was being removed
    (tmp_path / "step-00000006.tmp").mkdir()
    (tmp_path / "notes").mkdir()
    newest = Checkpoints(tmp_path, 2, ALONE).newest()
    assert newest == tmp_path / "step-00000004"
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000004", "notes"}


def test_a_copy_of_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    save(checkpoints, 2)
    for copy in ("step-00000002-good", "step-best"):
        shutil.copytree(tmp_path / "step-00000002", tmp_path / copy)
    (tmp_path / "step-notes").mkdir()
    for step in (4, 6, 8):
        save(checkpoints, step)
    again = Checkpoints(tmp_path, 2, ALONE)
    assert again.newest() == tmp_path / "step-00000008"
    kept = {"step-00000002-good", "step-best", "step-notes", "step-00000006", "step-00000008"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_checkpoint_takes_the_place_of_one_without_state(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, ALONE)
    save(checkpoints, 2)
    (tmp_path / "step-00000002" / "state.json").unlink()
    save(checkpoints, 2, value=7.0)
    newest, tensors = checkpoints.newest(), {"a": torch.zeros(3)}
    assert newest is not None
    assert checkpoints.load(newest, tensors).step == 2 and tensors["a"].tolist() == [7.0] * 3


def test_a_checkpoint_that_is_being_removed_does_not_look_like_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, 1, ALONE)
    save(checkpoints, 2)
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if the process ended here
        save(checkpoints, 4)
    assert [path.name for path in checkpoints._complete()] == ["step-00000004"]
    Checkpoints(tmp_path, 1, ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def save(checkpoints: Checkpoints, step: int, value: float = 1.0) -> None:
    checkpoints.save({"a": torch.full((3,), value)}, Progress(step=step), {}, {})
