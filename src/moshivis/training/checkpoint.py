"""Checkpoints of a run: `OUT/checkpoints/step-00000500`, written by `torch.distributed.checkpoint`.

A checkpoint is written under a temporary name and renamed when it is complete, so that a run killed at any moment
finds the newest complete one. All ranks write their share; any number of ranks can read it again. These files serve
to go on with one's own run (their index is a pickle); beside them stand the adapters as safetensors, to be used or
handed on.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moshivis.errors import CheckpointError
from moshivis.files import atomic_write
from moshivis.training.distributed import Ranks

ADAPTERS, STATE = "adapters.safetensors", "state.json"  # beside the tensors; the latter is written last
_NAME = re.compile(r"step-\d{8,}")


@dataclass(kw_only=True)
class Progress:
    """Where a run stands, beside its tensors."""

    step: int = 0  # steps done
    skipped: int = 0  # of these, steps whose numbers were not finite
    failed: int = 0  # checkpoints that could not be written
    lost: int = 0  # samples left out because they are damaged, over all ranks


class Checkpoints:
    """The checkpoints of one run. All ranks call every method together.

    Only what is named as one is one: a copy by another name, kept for later, is left alone.
    """

    def __init__(self, folder: Path, keep: int, ranks: Ranks):
        self.folder, self.keep, self.ranks = folder, keep, ranks
        if ranks.leads:
            folder.mkdir(parents=True, exist_ok=True)
            complete = self._complete()
            for left in folder.iterdir():
                if _NAME.fullmatch(left.name.removesuffix(".tmp")) and left not in complete:
                    shutil.rmtree(left, ignore_errors=True)
        ranks.wait()

    def newest(self) -> Path | None:
        return max(self._complete(), default=None)

    def save(
        self,
        tensors: Mapping[str, Tensor],
        progress: Progress,
        recipe: Mapping[str, Any],
        sources: Mapping[str, str],
        adapters: Callable[[Path], None] | None = None,
    ) -> None:
        """Write one, then forget all but the newest `keep`.

        `sources` are fingerprints of what the run learns from; `adapters`, called on all ranks, writes what is trained
        as one file.
        Raises CheckpointError if it cannot be written; older ones are as they were.
        """
        target = self.folder / f"step-{progress.step:08d}"
        if (target / STATE).is_file():
            return  # resumed right here, nothing has been learnt since
        temporary = target.with_suffix(".tmp")
        state = {"progress": asdict(progress), "recipe": recipe, "sources": sources}
        error = self._write(temporary, tensors, state, adapters)
        if self.ranks.any(error is not None):
            if self.ranks.leads:
                shutil.rmtree(temporary, ignore_errors=True)
            kept = self.newest()
            raise CheckpointError(
                f"the checkpoint of step {progress.step} could not be written: {error or 'another process failed'}; "
                + (f"that of {kept.name} is kept. " if kept else "there is no older one. ")
                + "Make room, then run the same command again"
            )
        if self.ranks.leads:
            shutil.rmtree(target, ignore_errors=True)  # what is left of one that lost its state
            temporary.rename(target)
            for old in sorted(self._complete())[: -self.keep]:
                # Renamed first: killed halfway, nothing is left that looks like a checkpoint.
                shutil.rmtree(old.rename(old.with_suffix(".tmp")), ignore_errors=True)
        self.ranks.wait()

    def load(self, folder: Path, tensors: Mapping[str, Tensor]) -> Progress:
        """Fill `tensors` in place. Raises CheckpointError if the checkpoint is damaged or of another run."""
        try:
            with _quiet():
                load(dict(tensors), checkpoint_id=folder, no_dist=self.ranks.count == 1)
            return Progress(**json.loads((folder / STATE).read_text())["progress"])
        except (Exception, CheckpointException) as error:  # the latter is no Exception; readers fail in many ways
            raise _unreadable(folder, error) from error

    def _write(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        adapters: Callable[[Path], None] | None,
    ) -> str | None:
        """What went wrong, if anything."""
        try:
            with _quiet():
                save(dict(tensors), checkpoint_id=folder, no_dist=self.ranks.count == 1)
            if adapters is not None:
                adapters(folder / ADAPTERS)
            if self.ranks.leads:
                with atomic_write(folder / STATE) as file:
                    file.write_text(json.dumps(state, indent=1) + "\n")
        except (Exception, CheckpointException) as error:  # the latter is no Exception; disks fail in many ways
            return _reason(error)
        return None

    def _complete(self) -> list[Path]:
        found = self.folder.glob("step-*")
        return [path for path in found if _NAME.fullmatch(path.name) and (path / STATE).is_file()]


def recipe_and_sources(checkpoint: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a checkpoint was made by, as plain data. Raises CheckpointError if it is damaged."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        return dict(state["recipe"]), dict(state.get("sources", {}))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{checkpoint} cannot be read: {_reason(error)}; remove it to use an older one")


def _reason(error: BaseException) -> str:
    """One line; of errors that several ranks had, the first."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


def _quiet() -> warnings.catch_warnings:
    return warnings.catch_warnings(action="ignore")  # that one process alone is no process group is meant so
