"""bfloat16 where the device has it, float32 where it would be emulated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moshivis.devices import has_bfloat16
from moshivis.training.precision import dtype_of, in_half, quick_precision
from moshivis.training.recipe import Recipe
from moshivis.training.recipe_file import read_recipe
from moshivis.training.run import train
from training_support import log_of, losses, packed, recipe, run

__all__ = ["packed", "run"]  # fixtures
CPU = torch.device("cpu")


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Say whether this CPU has instructions for bfloat16."""

    def say(able: bool) -> None:
        for module in ("precision", "run"):
            monkeypatch.setattr(f"moshivis.training.{module}.has_bfloat16", lambda kind: able or kind != "cpu")

    return say


def test_the_usual_precision_is_the_devices(cpu: Callable[[bool], None]) -> None:
    for able in (True, False):
        cpu(able)
        usual = Recipe(out="out", device="cpu")
        assert in_half(usual) == able and dtype_of(usual) == (torch.bfloat16 if able else torch.float32)
        assert in_half(Recipe(out="out", device="cuda:1"))
        assert in_half(Recipe(out="out", device="cpu", precision="bf16"))
        assert not in_half(Recipe(out="out", device="cuda", precision="fp32"))
        with quick_precision(CPU):
            assert torch.is_autocast_enabled("cpu") == able
    assert read_recipe("mini").precision == "auto" and read_recipe("paper").precision == "bf16"


def test_what_this_cpu_has() -> None:
    assert has_bfloat16("cuda")
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        assert has_bfloat16("cpu")
    elif torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert not has_bfloat16("cpu")


def test_gpus_that_emulate_it_are_not_taken_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, able=able: able)
        has_bfloat16.cache_clear()
        assert has_bfloat16("cuda") == able
    monkeypatch.undo()
    has_bfloat16.cache_clear()


def test_a_cpu_without_it_trains_in_float32(run: Any, cpu: Callable[[bool], None]) -> None:
    cpu(False)
    usual, exact = (losses(log_of(run(name, precision=name))) for name in ("auto", "fp32"))
    cpu(True)
    half = losses(log_of(run("half", precision="auto")))
    assert usual == exact and half != exact and half == pytest.approx(exact, rel=0.05)


def test_bfloat16_on_a_cpu_without_it_is_warned_of(
    cpu: Callable[[bool], None], tiny_folder: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for able in (True, False):
        cpu(able)
        train(recipe(tiny_folder, packed, tmp_path / f"{able}", {"steps": 1, "precision": "bf16"}))
        assert ("precision=fp32 is dozens of times as fast" in capsys.readouterr().err) != able
