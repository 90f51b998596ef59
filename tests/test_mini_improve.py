"""Another sitting: a finished miniature is trained further, from its own weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mini_support import needs_speech, small_plan
from moshivis.checkpoints.load import load_model
from moshivis.errors import InputError
from moshivis.mini.__main__ import WEIGHTS
from moshivis.mini.improve import NEW_SHARE, Sitting
from moshivis.mini.language_training import EARS_RATE, Schedule, _rates
from moshivis.mini.listener import FILE as LISTENER


class Short(Sitting):
    num_pictures, adapter_steps = 12, 2
    schedule = Schedule(steps=3, warmup=1, ears=1, spoken_rows=2, written_rows=2)


@needs_speech
def test_a_sitting_leaves_the_mean_of_what_was_and_what_was_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moshivis.mini.build.plan", lambda seed: small_plan())
    monkeypatch.setattr("moshivis.mini.pictures.CHUNK", 12)
    for name, share in (("RECITAL_SHARE", 0.0), ("SCENELESS_SHARE", 1.0)):  # no scene is told in so few clips
        monkeypatch.setattr(f"moshivis.mini.dialogues.{name}", share)
    folder = Short(WEIGHTS, tmp_path, torch.device("cpu"), workers=1).model()
    before, after = (load_model(path).model.state_dict() for path in (WEIGHTS, folder))
    learnt = load_file(tmp_path / "language" / "language.safetensors")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith(("speech_lm.", "adapters.", "vision.projection.")) for name in changed)
    assert any(name.startswith("adapters.query") for name in changed)
    for name, tensor in learnt.items():
        mean = torch.lerp(before[f"speech_lm.{name}"], tensor, NEW_SHARE)
        assert torch.allclose(after[f"speech_lm.{name}"], mean, rtol=2e-3, atol=1e-5), name
    assert (folder / LISTENER).read_bytes() == (WEIGHTS / LISTENER).read_bytes()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert Short(WEIGHTS, tmp_path, torch.device("cpu"), workers=1).model() == folder
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


def test_at_first_only_what_reads_words_from_the_middle_learns() -> None:
    schedule = Schedule(steps=100, ears=10, warmup=1)
    assert _rates(9, schedule) == ([0.0], [0.0, EARS_RATE])
    assert _rates(10, schedule) == ([schedule.matrix_rate], [schedule.rate, schedule.rate])


def test_another_model_is_no_miniature(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no miniature as `python -m moshivis.mini build` makes it now"):
        Sitting(tiny_folder, tmp_path / "out", torch.device("cpu"))
    assert not (tmp_path / "out").exists()
