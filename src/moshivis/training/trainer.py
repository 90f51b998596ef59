"""The training loop: batches in, steps of the optimiser, what is to be reported, validated and saved out."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moshivis.checkpoints.adapters import save_adapters
from moshivis.data.loader import Batch
from moshivis.data.sample import Sample
from moshivis.errors import MoshivisError
from moshivis.model import TRAINED
from moshivis.training.batch import Part, collate, split
from moshivis.training.checkpoint import Checkpoints, Progress
from moshivis.training.distributed import Ranks, gathered, sum_gradients
from moshivis.training.features import FeatureCache
from moshivis.training.learner import Learner, Outcome
from moshivis.training.lora import lora_scale
from moshivis.training.losses import Denominators, total
from moshivis.training.optim import Ema, Optimiser, rate_at
from moshivis.training.precision import half_precision, in_half
from moshivis.training.recipe import Recipe
from moshivis.training.recipe_file import recipe_to_dict
from moshivis.training.setup import Ready

UNLEARNT = 20  # steps in a row without finite numbers: no accident, the weights themselves are spoiled
_ANEW = "or begin in another out with a lower optimiser.rate"


class Loads(Protocol):
    """What the trainer asks of a loader."""

    waited: float  # seconds
    skipped: int  # samples

    def __next__(self) -> Batch: ...


class Follows(Protocol):
    """Who is told how the run goes."""

    def step(self, progress: Progress, values: Mapping[str, float]) -> None: ...

    def warn(self, message: str) -> None: ...


@dataclass(frozen=True)
class StepResult:
    """One step, over all ranks."""

    text: float  # loss
    audio: float
    loss: float
    norm: float  # of the gradient
    tokens: int  # steps of samples that are no padding
    padded: int  # the same, padding included

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Trainer:
    """Takes a prepared model from where its newest checkpoint stands to the recipe's last step."""

    def __init__(
        self,
        recipe: Recipe,
        ready: Ready,
        features: FeatureCache | None,
        ranks: Ranks,
        out: Checkpoints,
        sources: Mapping[str, str] = MappingProxyType({}),
        *,
        pictured: bool = True,
    ):
        self.sources = sources
        self.recipe, self.ready, self.features, self.ranks, self.checkpoints = recipe, ready, features, ranks, out
        self.learner: Learner = ready.learner
        self.trained = ready.trained()
        # Without pictures adapters have no gradient: they must stay as they are, not decay.
        self.optimiser = Optimiser(self.trained, recipe.optimiser, idle=() if pictured else TRAINED)
        self.ema = Ema(self.trained, recipe.optimiser.ema) if recipe.optimiser.ema else None
        self.progress = Progress()
        self.sharded = recipe.parallel == "fsdp" and ranks.count > 1
        self.looked = 0.0  # seconds in which pictures were read and encoded
        self.unlearnt = 0  # steps since one had finite numbers

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one."""
        newest = self.checkpoints.newest()
        if newest is not None:
            self.progress = self.checkpoints.load(newest, self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """All that changes while training, live."""
        state = {f"model.{name}": parameter.detach() for name, parameter in self.trained.items()}
        state |= {f"optimiser.{name}": tensor for name, tensor in self.optimiser.tensors().items()}
        if self.ema is not None:
            state |= {f"ema.{name}": tensor for name, tensor in self.ema.average.items()}
        return state

    def run(
        self,
        loader: Loads,
        report: Follows,
        validate: Callable[[int], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train to the last step, or until `stop` says so on any rank; returns whether it did, before the last step.

        `validate(step)` is called as often as the recipe says.
        Raises InputError for data that cannot be used, MoshivisError for numbers that are not finite, CheckpointError
        if a checkpoint cannot be written; the last two unless the recipe says to go on.
        """
        recipe = self.recipe
        while self.progress.step < recipe.steps:
            begun, waited, skipped = time.perf_counter(), loader.waited + self.looked, loader.skipped
            rate = rate_at(self.progress.step, recipe.steps, recipe.optimiser)
            result = self.step(next(loader), rate)
            lost, stopped = self.ranks.sum(
                torch.tensor([loader.skipped - skipped, stop()], dtype=torch.float64)
            ).tolist()
            self.progress.lost += int(lost)
            self._count(result, report)
            seconds = time.perf_counter() - begun
            report.step(self.progress, self._values(result, rate, seconds, loader.waited + self.looked - waited))
            done = self.progress.step
            if validate is not None and done % recipe.validation.every == 0:
                with self.averaged():
                    validate(done)
            # After a step without finite numbers it is not known what the weights are worth, and those of before stay.
            due = done % recipe.checkpoint.every == 0 or stopped
            if done == recipe.steps or (due and not self.unlearnt):
                self._save(report)
            if stopped and done < recipe.steps:
                return True
        return False

    def step(self, batch: Batch, rate: float) -> StepResult:
        """Learn from this rank's share of one batch. Nothing is learnt if the numbers are not finite."""
        parts = self.parts(batch)
        denominators = Denominators.of(parts, self.recipe.loss)
        self.ranks.sum(denominators.sums)
        sums = torch.zeros(4, dtype=torch.float64)
        for part in parts:
            outcome = self._learn(part, denominators)
            sums += torch.tensor([float(outcome[0]), float(outcome[1]), part.steps, part.text.numel()])
        self.ranks.sum(sums)
        if not self.sharded:
            sum_gradients(self.trained.values(), self.ranks)
        norm = self.optimiser.clip()
        loss = self.recipe.loss
        text, audio = float(sums[0]) / denominators.text, float(sums[1]) / denominators.audio
        together = loss.text * text + loss.audio * audio
        result = StepResult(text, audio, together, norm, int(sums[2]), int(sums[3]))
        if result.finite:
            self.optimiser.step(rate)
            if self.ema is not None:
                self.ema.update(self.progress.step - self.progress.skipped)
        self.optimiser.forget_gradients()
        return result

    def parts(self, batch: Batch) -> list[Part]:
        """A batch as the parts that pass through the model one after the other."""
        return [self.collate(samples) for kind in batch for samples in split(kind, self.recipe.batch.accumulation)]

    def collate(self, samples: Sequence[Sample]) -> Part:
        data = self.recipe.data
        limit = data.max_frames if samples[0].kind == "speech" else data.max_tokens
        return collate(samples, self.learner.config, self.recipe.loss, limit=limit, bucket=data.bucket)

    def forward(self, part: Part, *, gates: bool = False) -> Outcome:
        """The learner's outcome for one part, in the recipe's precision.

        Raises InputError for a picture that cannot be read, MoshivisError for one that the base could not see.
        """
        begun = time.perf_counter()
        features = None if self.features is None else self.features.features(part.pictures)
        self.looked += time.perf_counter() - begun
        if self.features is None and any(part.pictures):
            raise MoshivisError("the data has pictures, but the base has no image encoder to look at them")
        with self._arithmetic():
            outcome: Outcome = self.learner(part.to(self.ranks.device), features, gates=gates)
        return outcome

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in place of the last ones, if the recipe has them averaged."""
        with self.ema.applied() if self.ema is not None else contextlib.nullcontext():
            yield
        if isinstance(self.learner, FSDPModule):
            self.learner.reshard()  # else the next step would learn with what was gathered from the averages

    def write_adapters(self, path: Path) -> None:
        """What is trained, its average if the recipe has one, for `--adapters`; all ranks together."""
        with self.averaged():
            trained = gathered(self.trained, self.ranks)
        if self.ranks.leads:
            scale = lora_scale(self.recipe.lora) if self.recipe.train == "lora" else 0.0
            save_adapters(path, self.ready.model.config, trained, base=self.ready.base, lora_scale=scale)

    def _learn(self, part: Part, denominators: Denominators) -> tuple[Tensor, Tensor]:
        outcome = self.forward(part)
        loss = total(outcome.text, outcome.audio, denominators, self.recipe.loss)
        (loss * self.ranks.count if self.sharded else loss).backward()  # FSDP takes the mean over ranks, not the sum
        return outcome.text.detach(), outcome.audio.detach()

    def _arithmetic(self) -> contextlib.AbstractContextManager[object]:
        return half_precision(self.ranks.device) if in_half(self.recipe) else contextlib.nullcontext()

    def _count(self, result: StepResult, report: Follows) -> None:
        self.progress.step += 1
        self.unlearnt = 0 if result.finite else self.unlearnt + 1
        if result.finite:
            return
        step = self.progress.step
        what = f"step {step}: the loss is {result.loss}, the norm of its gradient {result.norm}"
        if self.recipe.on_nan == "stop":
            raise MoshivisError(
                f"{what}; the run stops, its newest checkpoint is as it was. Look at the data, leave such steps out "
                f"with on_nan=skip, {_ANEW}"
            )
        self.progress.skipped += 1
        if self.unlearnt == UNLEARNT:
            raise MoshivisError(
                f"{what}, as in the {UNLEARNT - 1} steps before: the weights themselves are spoiled, so the run stops. "
                "Its newest checkpoint is older; if it is the same from there, remove it to go on from the one before, "
                f"{_ANEW}"
            )
        report.warn(f"{what}; nothing is learnt from it ({self.progress.skipped} such steps so far)")

    def _save(self, report: Follows) -> None:
        try:
            adapters = None if self.recipe.train == "all" else self.write_adapters
            self.checkpoints.save(self.tensors(), self.progress, recipe_to_dict(self.recipe), self.sources, adapters)
        except MoshivisError as error:
            if self.recipe.checkpoint.on_error == "stop":
                raise
            self.progress.failed += 1
            report.warn(f"{error} (checkpoint.on_error: skip; {self.progress.failed} so far)")

    def _values(self, result: StepResult, rate: float, seconds: float, waited: float) -> dict[str, float]:
        return {
            "loss": result.loss,
            "text": result.text,
            "audio": result.audio,
            "norm": result.norm,
            "rate": rate,
            "tokens": result.tokens,
            "padded": result.padded,
            "seconds": seconds,
            "waiting": waited,
        }
