"""Telling how a run goes: a line on the terminal, `log.jsonl`, and, if asked for, TensorBoard, W&B or trackio."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from moshivis.errors import InputError
from moshivis.files import atomic_write
from moshivis.training.checkpoint import Progress
from moshivis.training.recipe import Recipe
from moshivis.training.recipe_file import recipe_to_dict

LOG = "log.jsonl"
RUN_ID = "run-id"
SUMMED = ("tokens", "padded", "seconds", "waiting")  # over the steps of a line; of others the mean is reported


class Report:
    """What the process that leads tells; the others have one too, which drops everything.

    `flops_per_token` is what a token costs, `peak` what the devices of all ranks can do a second; with both the share
    that is used, MFU, is reported. Raises InputError for a tracker whose package is not installed.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        begin: int,
        leads: bool,
        flops_per_token: float,
        peak: float | None,
        console: Console,
    ):
        self.recipe, self.leads, self.flops, self.peak = recipe, leads, flops_per_token, peak
        self.console = console
        self.sums: dict[str, float] = {}
        self.steps = 0
        self.trackers: list[Tracker] = []
        if not leads:
            return
        self.out = Path(recipe.out)
        self.out.mkdir(parents=True, exist_ok=True)
        _forget_after(self.out / LOG, begin)
        self.trackers = _trackers(recipe, begin)
        columns = (
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self.bar = Bar(*columns, console=console, transient=True, disable=not console.is_interactive)
        self.bar.add_task("waiting for the first batch", total=recipe.steps, completed=begin)
        self.bar.start()

    def step(self, progress: Progress, values: Mapping[str, float]) -> None:
        if not self.leads:
            return
        finite = all(map(math.isfinite, values.values()))
        for name, value in values.items():
            if finite or name in SUMMED:
                self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += finite
        self.bar.update(self.bar.task_ids[0], completed=progress.step, description=f"loss {values['loss']:.4f}")
        if progress.step % self.recipe.report.every == 0 or progress.step == self.recipe.steps:
            line = self._line(values)
            self.log(progress, line)
            self.console.print(_sentence(progress, self.recipe.steps, line))
            self.sums, self.steps = {}, 0

    def log(self, progress: Progress, values: Mapping[str, Any]) -> None:
        """Append a line to log.jsonl, and hand its numbers to the trackers."""
        if not self.leads:
            return
        values = {name: _finite(value) for name, value in values.items()}
        counts = {"skipped_steps": progress.skipped, "failed_checkpoints": progress.failed}
        line = {"step": progress.step, **values, **counts, "skipped_samples": progress.lost}
        try:
            with open(self.out / LOG, "ab", buffering=0) as file:
                begun, written = file.tell(), (json.dumps(line, allow_nan=False) + "\n").encode()
                if file.write(written) < len(written):
                    file.truncate(begun)  # half a line would spoil the next one, too
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:  # a full disk; what cannot be written is lost, the training is not
            self.warn(f"{self.out / LOG} cannot be written: {error.strerror or error}")
        numbers = {name: float(value) for name, value in line.items() if isinstance(value, int | float)}
        self._ask_trackers(lambda tracker: tracker.log(numbers, progress.step))

    def warn(self, message: str) -> None:
        if self.leads:
            self.console.print(f"moshivis: {message}", style="yellow")

    def say(self, message: str) -> None:
        if self.leads:
            self.console.print(message)

    def close(self) -> None:
        if self.leads:
            self.bar.stop()
        self._ask_trackers(lambda tracker: tracker.close())

    def _ask_trackers(self, ask: Callable[[Tracker], None]) -> None:
        """Each in turn; one that fails, on a full disk or for want of a network, is asked no more."""
        for tracker in list(self.trackers):
            try:
                ask(tracker)
            except Exception as error:  # packages of others have errors of their own, and none is worth the training
                self.trackers.remove(tracker)
                self.warn(f"{tracker.name} gets no more numbers: {getattr(error, 'strerror', None) or error}")

    def _line(self, last: Mapping[str, float]) -> dict[str, Any]:
        """Means over the steps whose numbers are finite, null if none is; what is summed is summed over all."""
        means = {name: self.sums[name] / self.steps if self.steps else None for name in last if name not in SUMMED}
        line: dict[str, Any] = {**means, **{name: self.sums[name] for name in SUMMED}, "rate": last["rate"]}
        line["tokens_per_second"] = line["tokens"] / max(line["seconds"], 1e-9)
        if self.peak is not None:
            line["mfu"] = self.flops * line["tokens"] / max(line["seconds"], 1e-9) / self.peak
        return line


def _sentence(progress: Progress, steps: int, line: Mapping[str, Any]) -> str:
    parts = [f"step {progress.step}/{steps}"]
    if line["loss"] is None:
        parts.append("nothing learnt: no step was finite")
    else:
        parts += [f"{name} {line[name]:.4f}" for name in ("loss", "text", "audio")] + [f"norm {line['norm']:.3g}"]
    parts.append(f"{line['tokens_per_second']:.0f} tokens/s")
    if "mfu" in line:
        parts.append(f"MFU {line['mfu']:.0%}")
    if line["waiting"] > 0.05 * line["seconds"]:
        parts.append(f"{line['waiting'] / line['seconds']:.0%} of the time waiting for data and pictures")
    return "  ".join(parts)


def _forget_after(log: Path, step: int) -> None:
    """Drop the lines of steps that a killed run did after its last checkpoint: they are done again."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # cut off when the run was killed
    with atomic_write(log) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


# trackers -------------------------------------------------------------------------------------------------------------


class Tracker(Protocol):
    name: str

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def _trackers(recipe: Recipe, begin: int) -> list[Tracker]:
    found: list[Tracker] = []
    if recipe.report.tensorboard:
        found.append(_TensorBoard(Path(recipe.out) / "tensorboard", begin))
    for package in ("wandb", "trackio"):
        project = getattr(recipe.report, package)
        if project:
            found.append(_Hosted(package, project, recipe))
    return found


def _import(module: str, option: str) -> Any:
    try:
        return importlib.import_module(module)  # only when asked for: they are slow to import
    except ImportError as error:
        package = module.split(".")[0]
        name = "tensorboard" if package == "torch" else package
        raise InputError(f"{option} needs the package {name}: pip install {name}") from error


class _TensorBoard:
    name = "TensorBoard"

    def __init__(self, folder: Path, begin: int):
        writer = _import("torch.utils.tensorboard", "report.tensorboard")
        self.writer = writer.SummaryWriter(str(folder), purge_step=begin + 1)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            if name != "step" and math.isfinite(value):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Hosted:
    """W&B, or trackio, which has the same functions. A run that goes on goes on there, too."""

    def __init__(self, package: str, project: str, recipe: Recipe):
        self.name = package
        self.module = _import(package, f"report.{package}")
        out = Path(recipe.out)
        options = {"project": project, "name": out.name, "config": recipe_to_dict(recipe), "resume": "allow"}
        identity = _run_id(out / RUN_ID)
        if package == "wandb":
            options["id"] = identity
        else:  # trackio knows a run by its name, and folders of one name are not one run
            options["name"] = f"{out.name}-{identity[:6]}"
        try:
            self.module.init(**options)
        except Exception as error:
            raise InputError(f"report.{package}: {package} cannot begin: {error}") from error

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.module.log({name: value for name, value in numbers.items() if name != "step"}, step=step)

    def close(self) -> None:
        self.module.finish()


def _run_id(path: Path) -> str:
    """By which a tracker knows the run of this folder, made up when it begins."""
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
    return path.read_text(encoding="utf-8")


def _finite(value: Any) -> Any:
    """A value, or the values of a list, as JSON has words for them: None for what is no number."""
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
