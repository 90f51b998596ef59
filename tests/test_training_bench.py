"""`moshivis bench train`: both contenders really train, and its sums are right."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moshivis.checkpoints.folder import save_folder
from moshivis.cli import main
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import TextTokenizer
from moshivis.training.bench import End, StepCost, summary


def test_two_ways_to_train_are_compared(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rows", "4", "--steps", "3", "--frames", "24", "--tokens", "16"]
    assert main(["bench", "train", "--model", str(tiny_folder), *words]) == 0
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    assert "moshivis" in output and "baseline" in output
    ours, baseline = result["contenders"]["moshivis"], result["contenders"]["baseline"]
    assert result["ratio"] > 0 and result["steps"] == 3
    for row in (ours, baseline):
        assert row["tokens_per_s"] > 0 and row["memory_mib"] > 50 and 0 <= row["waiting"] < 1 and 0 < row["padding"] < 1
        assert row["mfu"] is None or 0 < row["mfu"] < 1


def test_sums_of_steps() -> None:
    costs = [StepCost(seconds=s, waited=0.1 * s, tokens=60, padded=80) for s in (1.0, 2.0, 1.0)]
    row = summary(End(memory=3 * 2**20, flops_per_token=2e9, peak=1e12), costs)
    assert row["ms_per_step"] == 1000 and row["tokens_per_s"] == 60 and row["memory_mib"] == 3
    assert row["padding"] == 0.25 and row["waiting"] == 0.1
    assert row["gflop_per_s"] == 90 and row["mfu"] == 0.09  # 180 tokens of 2 GFLOP in 4 s


@pytest.mark.parametrize("option", ["--rows", "--steps", "--frames", "--tokens"])
def test_what_cannot_be_measured_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", option, "0"]) == 2
    assert f"{option[2:]} must be 1 or more" in capsys.readouterr().err


def test_a_device_or_a_base_that_does_not_do_is_refused_at_once(
    tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "train", "--device", "nowhere"]) == 2
    assert "device 'nowhere' cannot be used" in capsys.readouterr().err
    blind = MoshiVis(dataclasses.replace(tiny_model.config, name="blind", adapters=None))
    save_folder(tmp_path / "blind", blind, tiny_tokenizer.model, "")
    assert main(["bench", "train", "--model", str(tmp_path / "blind")]) == 2
    assert "no image encoder and no adapters" in capsys.readouterr().err


def test_rows_that_p_audio_cannot_share_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", "--rows", "3"]) == 2
    assert "whole numbers" in capsys.readouterr().err
