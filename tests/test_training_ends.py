"""How a run ends before its time: by a signal, or because its weights are spoiled; and what can be used of it then."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from moshivis.checkpoints.adapters import read_adapters
from moshivis.errors import MoshivisError
from moshivis.training import trainer
from moshivis.training.checkpoint import Progress
from moshivis.training.optim import rate_at
from moshivis.training.recipe import Recipe
from moshivis.training.report import Report
from training_support import PATIENCE, finish, log_of, packed, recipe_data, run, start

__all__ = ["packed", "run"]  # fixtures
pytestmark = pytest.mark.timeout(2 * PATIENCE)


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.mark.parametrize("train", ["adapters", "lora"])
def test_adapters_can_be_had_of_every_checkpoint(train: str, run: Any) -> None:
    out = run(steps=3, train=train, checkpoint={"every": 2, "keep": 3}, optimiser__ema=0.5)
    kept = [read_adapters(out / "checkpoints" / name / "adapters.safetensors") for name in checkpoints(out)]
    result = read_adapters(out / "adapters.safetensors")
    early, last = ({name: tensor.float() for name, tensor in one.tensors.items()} for one in kept)
    assert (kept[1].lora_scale, kept[1].base) == (result.lora_scale, result.base)
    assert all(torch.equal(last[name], tensor.float()) for name, tensor in result.tensors.items())
    assert any(not torch.equal(early[name], tensor) for name, tensor in last.items())


def test_spoiled_weights_end_the_run_and_older_ones_stay(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = rate_at
    changes = {"steps": 60, "on_nan": "skip", "checkpoint__every": 1}
    with monkeypatch.context() as spoilt:
        spoilt.setattr(trainer, "rate_at", lambda step, *rest: 1e30 if step == 3 else usual(step, *rest))
        with pytest.raises(MoshivisError, match="step 24: .* the weights themselves are spoiled, so the run stops"):
            run(**changes)
    out = run("other", steps=1).parent / "run"
    assert checkpoints(out) == ["step-00000003", "step-00000004"]
    with pytest.raises(MoshivisError, match="step 24: .* remove it to go on from the one before"):
        run(**changes)
    for file in (out / "checkpoints" / "step-00000004").iterdir():
        file.unlink()
    run(**changes)
    assert len(log_of(out)) == 60 and log_of(out)[-1]["skipped_steps"] == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 1)])
def test_a_signal_ends_a_run_with_a_checkpoint(
    number: signal.Signals, status: int, tiny_folder: Path, packed: Path, tmp_path: Path
) -> None:
    """All its processes get it, as from a terminal or a batch system."""
    out, changes = tmp_path / "run", {"steps": 400, "checkpoint.every": 400, "data.workers": 1}
    process = start(recipe_data(tiny_folder, packed, out, changes))
    limit = time.monotonic() + PATIENCE
    while not (out / "log.jsonl").exists() or len(log_of(out)) < 3:
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert process.pid is not None
    for pid in (*children(process.pid), process.pid):
        os.kill(pid, number)
    process.join(PATIENCE)
    assert process.exitcode == status  # multiprocessing tells 1 for a KeyboardInterrupt
    (name,) = checkpoints(out)
    assert name == f"step-{len(log_of(out)):08d}" and not (out / "adapters.safetensors").exists()
    steps = len(log_of(out)) + 2
    finish(start(recipe_data(tiny_folder, packed, out, {**changes, "steps": steps})))
    assert [line["step"] for line in log_of(out)] == list(range(1, steps + 1))


def children(pid: int) -> list[int]:
    """The processes that it has begun, and they."""
    direct = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*direct, *(below for one in direct for below in children(one))]


def test_a_terminal_shows_how_far_it_is(tmp_path: Path) -> None:
    console = Console(force_terminal=True, width=100, record=True)
    recipe = Recipe(out=str(tmp_path), steps=8)
    report = Report(recipe, begin=2, leads=True, flops_per_token=1.0, peak=None, console=console)
    values = {"loss": 1.25, "text": 1.0, "audio": 1.0, "norm": 1.0, "rate": 1.0, "tokens": 4.0}
    report.step(Progress(step=3), {**values, "padded": 8.0, "seconds": 1.0, "waiting": 0.0})
    report.bar.refresh()
    report.close()
    assert "3/8" in console.export_text() and "loss 1.2500" in report.bar.tasks[0].description
