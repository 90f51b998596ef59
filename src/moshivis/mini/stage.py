"""A resumable training stage: a folder with a log, a checkpoint that is replaced atomically, and a result.

The build of the miniature is a chain of stages. Each one can be killed at any moment and goes on from its last
checkpoint; a finished stage is skipped.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moshivis.errors import CheckpointError
from moshivis.training.optim import rate_at
from moshivis.training.recipe import OptimiserRecipe

CHECKPOINT_SECONDS = 60.0
LOG_SECONDS = 10.0


class Stage:
    """One folder of a build. `step` is the number of training steps done so far.

    Of several processes that train together only the `leader` writes.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu", leader: bool = True):
        self.folder, self.device, self.leader = folder, torch.device(device), leader
        self.folder.mkdir(parents=True, exist_ok=True)
        self.console = Console()
        self.step = 0

    @property
    def done(self) -> bool:
        return (self.folder / "result.json").exists()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Record what the stage measured; from now on it is skipped."""
        self.log(**result)
        _replace(self.folder / "result.json", lambda path: path.write_text(json.dumps(dict(result), indent=1) + "\n"))

    def log(self, **values: Any) -> None:
        if not self.leader:
            return
        line = {"stage": self.folder.name, "step": self.step, **values}
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
        self.console.print(shown, highlight=False)

    def restore(self, parts: Mapping[str, Any]) -> None:
        """Load the last checkpoint, if there is one, into `parts` (anything with load_state_dict).

        Raises CheckpointError if a finished stage has none.
        """
        path = self.folder / "checkpoint.pt"
        if self.done and not path.exists():
            raise CheckpointError(
                f"{self.folder} is finished, but has no {path.name}; remove it and what is made of it to train it again"
            )
        if path.exists():
            saved = torch.load(path, map_location="cpu", weights_only=True)
            self.step = saved.pop("step")
            for name, part in parts.items():
                part.load_state_dict(saved[name])

    def save(self, parts: Mapping[str, Any]) -> None:
        if not self.leader:
            return
        state = {name: part.state_dict() for name, part in parts.items()}
        _replace(self.folder / "checkpoint.pt", lambda path: torch.save({"step": self.step, **state}, path))

    def train(
        self,
        total: int,
        parts: Mapping[str, Any],
        one_step: Callable[[int], Mapping[str, float]],
        evaluate: Callable[[], Mapping[str, Any]] | None = None,
        evaluate_every: int = 0,
    ) -> None:
        """Run `one_step(step)` until `total` steps are done; it returns values to log, averaged between lines.

        Raises FloatingPointError when a value is not finite.
        """
        self.restore(parts)
        sums: dict[str, float] = {}
        count, logged, saved, begun = 0, time.monotonic(), time.monotonic(), time.monotonic()
        while self.step < total:
            for name, value in one_step(self.step).items():
                sums[name] = sums.get(name, 0.0) + value
            self.step += 1
            count += 1
            now = time.monotonic()
            if not all(map(math.isfinite, sums.values())):  # before anything of it is saved
                raise FloatingPointError(f"{self.folder.name}: a loss is not finite at step {self.step}: {sums}")
            if now - logged > LOG_SECONDS or self.step == total:
                means = {name: value / count for name, value in sums.items()}
                self.log(**means, total=total, ms_per_step=round((now - logged) / count * 1e3), seconds=now - begun)
                sums, count, logged = {}, 0, now
            if now - saved > CHECKPOINT_SECONDS or self.step == total:
                self.save(parts)
                saved = now
            if self.leader and evaluate is not None and evaluate_every and self.step % evaluate_every == 0:
                self.log(**evaluate())


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def cosine(step: int, total: int, peak: float, warmup: int) -> float:
    """Learning rate: linear warm-up to `peak`, then half a cosine down to a fiftieth of it."""
    return rate_at(step, total, OptimiserRecipe(rate=peak, warmup=warmup, final=0.02))


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
