"""A dry run: exact counts, plausible memory, the same words as a real run for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moshivis.cli import main
from moshivis.training.plan import Plan, plan
from moshivis.training.recipe_file import read_recipe, recipe_from_dict
from training_support import packed, recipe, recipe_data, write_recipe

__all__ = ["packed"]  # a fixture
FULL = ("base=moshika-vis", "random_weights=true")


def full(*words: str, ranks: int = 8) -> Plan:
    return plan(read_recipe("paper", [*FULL, *words]), ranks)


def test_the_papers_run() -> None:
    paper = full()
    assert paper.trained == 206_184_448  # the manifests' count
    assert paper.adapter_file == 2 * paper.trained  # 412 MB
    assert paper.rows == (2, 6) and paper.tokens == 64 * 1024
    assert 15 * 2**30 < paper.weights < 18 * 2**30
    assert paper.optimiser == 12 * paper.trained
    assert 8 * paper.trained <= full("optimiser.matrices=muon").optimiser < 8.1 * paper.trained
    # 4 operations a frozen weight and token, and the backbone has 7.0 billion
    assert 4 * 7.0e9 * paper.tokens < paper.flops < 1.4 * 4 * 7.0e9 * paper.tokens
    kept = full("activation_checkpointing=false")
    assert kept.activations > 5 * paper.activations
    on_cpu, on_gpu = (full("activation_checkpointing=false", f"device={name}") for name in ("cpu", "cuda"))
    assert (
        on_cpu.activations - on_gpu.activations > 32 * 4 * 2 * 32 * 1024**2
    )  # the scores of attention, 2 rows or more
    sharded = full("parallel=fsdp")
    assert paper.weights / 4 < sharded.weights < paper.weights / 3  # an eighth, and what is gathered of it
    assert sharded.optimiser == paper.optimiser // 8


def test_lora_and_everything_train_more() -> None:
    adapters, lora = full(), full("train=lora", "lora.rank=8")
    assert lora.trained - adapters.trained == 32 * 8 * (4 * 4096 + 2 * 4096 + (4096 + 22528) + (4096 + 11264))
    everything = full("train=all", "loss.codebooks=8")
    assert everything.trained > 7.7e9
    assert 15e9 < everything.adapter_file < 18e9  # the model in bfloat16


def test_the_command_ends_with_a_line_of_json(
    tiny_folder: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", recipe_data(tiny_folder, packed, tmp_path / "run"))
    assert main(["train", str(path), "steps=9", "--dry-run", "--ranks", "2"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    made = plan(recipe(tiny_folder, packed, tmp_path / "run"), 2)
    assert last["trained"] == made.trained and last["memory"] == made.memory and last["rows"] == [2, 2]
    assert not (tmp_path / "run").exists() and last["data"] is None
    nowhere = "data.datasets=[{path: nowhere, kind: speech}, {path: nowhere, kind: speechless}]"
    assert main(["train", str(path), nowhere, "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "With the data as it is a run would stop: nowhere holds no manifest.json" in " ".join(out[:-1])
    assert json.loads(out[-1])["data"].startswith("nowhere holds no manifest.json")
    assert main(["train", str(path), "batch.rows=6", "--dry-run", "--ranks", "2"]) == 2
    assert "choose rows" in capsys.readouterr().err
    assert main(["train", str(path), "steps=9", "--dry-run", "batch.rows=4", "--ranks", "2", "steps=8"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == [1, 1]
    with pytest.raises(SystemExit):
        main(["train", str(path), "--dry-runs", "steps=9"])
    assert "unrecognized arguments: --dry-runs" in capsys.readouterr().err
    assert main(["train", str(path), "out=/dev/null/run"]) == 2
    assert capsys.readouterr().err == "moshivis: /dev/null/run: Not a directory\n"
    assert main(["train", str(path), "steps=1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "run" / "adapters.safetensors")
    assert recipe_from_dict(yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())).steps == 1
