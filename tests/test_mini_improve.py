"""Another sitting: a finished miniature is trained further, from its own weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mini_support import needs_speech, small_plan
from moshivis.checkpoints.load import load_model
from moshivis.errors import InputError
from moshivis.mini.__main__ import WEIGHTS
from moshivis.mini.build import Build
from moshivis.mini.improve import NEW_SHARE, Sitting
from moshivis.mini.language_training import EARS_RATE, Schedule, _rates
from moshivis.mini.listener import FILE as LISTENER

CPU = torch.device("cpu")
FEW_STEPS = 0.03  # no weight moves further in them; one that was drawn anew would


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
    folder = Short(WEIGHTS, tmp_path, CPU, workers=1).model()
    before, after = (load_model(path).model.state_dict() for path in (WEIGHTS, folder))
    learnt = load_file(tmp_path / "language" / "language.safetensors")
    moved = {name: float((tensor - before[name]).abs().max()) for name, tensor in after.items()}
    assert {name for name, far in moved.items() if far} >= {name for name in moved if ".query." in name}
    for name, far in moved.items():
        assert far < FEW_STEPS if name.startswith(("speech_lm.", "adapters.", "vision.projection.")) else far == 0, name
    assert any(not torch.equal(tensor, before[f"speech_lm.{name}"]) for name, tensor in learnt.items())
    for name, tensor in learnt.items():
        mean = torch.lerp(before[f"speech_lm.{name}"], tensor, NEW_SHARE)
        assert torch.allclose(after[f"speech_lm.{name}"], mean, rtol=2e-3, atol=1e-5), name
    assert (folder / LISTENER).read_bytes() == (WEIGHTS / LISTENER).read_bytes()
    assert (folder / "sampling.json").read_bytes() == (WEIGHTS / "sampling.json").read_bytes()
    assert "trained further" in (folder / "README.md").read_text()

    # Ended while it learnt, or made its base, it goes on to the same.
    for made in ("language/result.json", "base", "model"):
        path = tmp_path / made
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert Short(WEIGHTS, tmp_path, CPU, workers=1).model() == folder
    again = load_model(folder).model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.items())


def test_a_folder_goes_on_with_what_it_was_begun_with(tmp_path: Path) -> None:
    Sitting(WEIGHTS, tmp_path / "one", CPU)
    Sitting(WEIGHTS, tmp_path / "one", CPU, workers=1)
    copied = Path(shutil.copytree(WEIGHTS, tmp_path / "copied"))
    Sitting(copied, tmp_path / "one", CPU)  # the same weights, wherever they are
    with pytest.raises(InputError, match=r"was begun with something else \(seed 1 became 2\); choose another --out"):
        Sitting(WEIGHTS, tmp_path / "one", CPU, seed=2)
    with pytest.raises(InputError, match="verb 'improve' became 'build'"):
        Build(tmp_path / "one", CPU)
    Build(tmp_path / "two", CPU)
    with pytest.raises(InputError, match="verb 'build' became 'improve'"):
        Sitting(WEIGHTS, tmp_path / "two", CPU)
    (tmp_path / "three" / "clips").mkdir(parents=True)  # by a version that wrote nothing down
    with pytest.raises(InputError, match="verb 'build' became 'improve'"):
        Sitting(WEIGHTS, tmp_path / "three", CPU)
    Build(tmp_path / "three", CPU)
    assert json.loads((tmp_path / "three" / "begun.json").read_text()) == {"verb": "build", "seed": 0}


def test_at_first_only_what_reads_words_from_the_middle_learns() -> None:
    schedule = Schedule(steps=100, ears=10, warmup=1)
    assert _rates(9, schedule) == ([0.0], [0.0, EARS_RATE])
    assert _rates(10, schedule) == ([schedule.matrix_rate], [schedule.rate, schedule.rate])


def test_another_model_is_no_miniature(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no miniature as `python -m moshivis.mini build` makes it now"):
        Sitting(tiny_folder, tmp_path / "out", CPU)
    copied = Path(shutil.copytree(WEIGHTS, tmp_path / "copied"))
    (copied / "tokenizer.model").unlink()
    with pytest.raises(InputError, match="holds no miniature"):
        Sitting(copied, tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()
