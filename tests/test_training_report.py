"""What a run tells: trackers, MFU, and numbers that are none."""

from __future__ import annotations

import io
import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from moshivis.errors import InputError
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import TextTokenizer
from moshivis.training.checkpoint import Progress
from moshivis.training.recipe import Recipe
from moshivis.training.report import LOG, Report
from training_support import PATIENCE, log_of, losses, pack, packed, picture, recipe_data, run, run_ranks

__all__ = ["packed", "run"]  # fixtures
pytestmark = pytest.mark.timeout(2 * PATIENCE)


class FakeTracker(ModuleType):
    """A package like wandb: what it was told, and a failure if it is to fail."""

    def __init__(self, name: str, failing: str = ""):
        super().__init__(name)
        self.failing = failing
        self.told: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, function: str) -> Callable[..., None]:
        if function not in ("init", "log", "finish"):
            raise AttributeError(function)

        def call(*numbers: object, **options: object) -> None:
            if function == self.failing:
                raise RuntimeError(f"no network for {function}")
            self.told.append((function, numbers, options))

        return call


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_hosted_tracker_is_told_the_numbers_of_one_run(
    package: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither package is installed for tests, and both want a service."""
    tracker = FakeTracker(package)
    monkeypatch.setitem(sys.modules, package, tracker)
    out = run(report={"every": 1, package: "project"}, steps=2)
    run(report={"every": 1, package: "project"}, steps=3)
    begun = [options for function, _, options in tracker.told if function == "init"]
    assert [options["project"] for options in begun] == ["project"] * 2 and begun[1]["resume"] == "allow"
    assert begun[0].get("id") == begun[1].get("id") and ("id" in begun[0]) == (package == "wandb")
    run("other/run", report={"every": 1, package: "project"}, steps=1)  # a folder of the same name is another run
    known_by = "id" if package == "wandb" else "name"
    others = [options[known_by] for function, _, options in tracker.told if function == "init"]
    assert others[0] == others[1] != others[2]
    logged = [(numbers[0], options["step"]) for function, numbers, options in tracker.told if function == "log"]
    assert [step for _, step in logged] == [1, 2, 3, 1]
    assert [numbers["loss"] for numbers, _ in logged[:3]] == losses(log_of(out))
    assert tracker.told[-1][0] == "finish"


def test_a_hosted_tracker_that_fails_costs_no_training(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeTracker("wandb", failing="init"))
    with pytest.raises(InputError, match=r"report\.wandb: wandb cannot begin: no network for init"):
        run("init", report={"wandb": "project"})
    for failing in ("log", "finish"):
        tracker = FakeTracker("wandb", failing=failing)
        monkeypatch.setitem(sys.modules, "wandb", tracker)
        out = run(failing, report={"every": 1, "wandb": "project"}, steps=2)
        assert len(log_of(out)) == 2 and (out / "adapters.safetensors").exists()


def test_mfu_is_what_is_done_of_what_can_be(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    report = Report(Recipe(out=str(tmp_path)), begin=0, leads=True, flops_per_token=3e9, peak=1e12, console=console)
    values = {"loss": 1.0, "text": 1.0, "audio": 1.0, "norm": 1.0, "rate": 0.1}
    values |= {"tokens": 100, "padded": 150, "seconds": 0.5, "waiting": 0.0}
    for step in range(1, 11):
        report.step(Progress(step=step), values)
    report.close()
    (line,) = log_of(tmp_path)
    assert line["mfu"] == pytest.approx(0.6) and line["tokens_per_second"] == pytest.approx(200)
    assert "MFU 60%" in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_is_no_number_is_null_in_the_log(tmp_path: Path) -> None:
    report = Report(
        Recipe(out=str(tmp_path)), begin=0, leads=True, flops_per_token=1.0, peak=None, console=Console(quiet=True)
    )
    values = {
        "held_out_speech_text": math.nan,
        "held_out_speech_gate": math.inf,
        "held_out_speech_gates": [0.5, math.nan],
    }
    report.log(Progress(step=1), {**values, "rows": 3})
    report.close()
    (line,) = log_of(tmp_path, "rows")
    assert {name: line[name] for name in values} == dict(zip(values, (None, None, [0.5, None]), strict=True))
    assert line["rows"] == 3


def test_a_line_that_is_cut_off_by_a_full_disk_spoils_no_other(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    report = Report(Recipe(out=str(tmp_path)), begin=0, leads=True, flops_per_token=1.0, peak=None, console=console)
    report.log(Progress(step=1), {"rows": 1})
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / LOG).stat().st_size + 10, usual[1]))
        report.log(Progress(step=2), {"rows": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    report.log(Progress(step=3), {"rows": 3})
    report.close()
    assert "cannot be written" in console.file.getvalue()  # type: ignore[attr-defined]
    assert [line["rows"] for line in log_of(tmp_path, "rows")] == [1, 3]


def test_samples_that_a_validation_skips_are_counted_for_it_alone(
    run: Any, tiny_folder: Path, tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    files = {"red": picture("red")[:-30], "blue": picture("blue")}  # the first sample is one that is skipped
    folder = pack(tmp_path / "damaged", tiny_model, tiny_tokenizer, picture=files.__getitem__)
    held_out = {"every": 1, "datasets": [{"path": str(folder), "kind": "speech"}], "rows": 3}
    changes = {"data.on_corrupt": "skip", "validation": held_out, "steps": 3}
    run("one", **{name.replace(".", "__"): value for name, value in changes.items()})
    run_ranks(recipe_data(tiny_folder, folder, tmp_path / "two", changes), 2)  # which have one row to fill
    one, two = (
        [line["held_out_speech_skipped"] for line in log_of(tmp_path / name, "held_out_speech_text")]
        for name in ("one", "two")
    )
    assert len(one) == 3 and one[0] > 0 and len(set(one)) == 1 and two == one


def test_held_out_samples_count_once_however_many_rows_are_asked_for(run: Any, packed: Path) -> None:
    both = [{"path": str(packed), "kind": kind} for kind in ("speech", "speechless")]
    enough, many = (
        log_of(run(f"{rows}", validation={"every": 2, "datasets": both, "rows": rows}, steps=2), "held_out_speech_text")
        for rows in (12, 64)
    )
    assert {name: value for name, value in many[0].items() if name.startswith("held_out")} == {
        name: value for name, value in enough[0].items() if name.startswith("held_out")
    }
