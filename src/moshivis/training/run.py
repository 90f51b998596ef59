"""A whole training run: from a recipe to the files that it leaves.

OUT/recipe.yaml         what was run
OUT/log.jsonl           losses and speed
OUT/checkpoints/        to go on from, each with its adapters
OUT/samples/            answers generated at validation
OUT/adapters.safetensors   the result, for `moshivis talk --adapters`; with train: all OUT/model, a whole model
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from moshivis.checkpoints.folder import empty_model, fill_model, save_folder
from moshivis.data.loader import Loader
from moshivis.data.sample import Dataset
from moshivis.data.shard_format import MANIFEST, file_sha256
from moshivis.devices import has_bfloat16
from moshivis.errors import CheckpointError, InputError, MoshivisError
from moshivis.files import atomic_write, clear_interrupted, only_process
from moshivis.training.checkpoint import ADAPTERS, Checkpoints, recipe_and_sources
from moshivis.training.distributed import Ranks, gathered, joined
from moshivis.training.features import FeatureCache
from moshivis.training.flops import flops_per_token
from moshivis.training.precision import dtype_of
from moshivis.training.recipe import Recipe
from moshivis.training.recipe_file import recipe_to_dict
from moshivis.training.report import LOG, RUN_ID, Report
from moshivis.training.setup import Ready, prepare
from moshivis.training.sources import check_made_for, check_pictures, held_out_sets, require_data, training_sets
from moshivis.training.speed import peak_flops
from moshivis.training.stopping import Stopping
from moshivis.training.trainer import Trainer
from moshivis.training.validation import Validation, clear_answers

MODEL, RECIPE = "model", "recipe.yaml"
# What may change when a run goes on. Most of it does not change what is learnt; `steps` stretches the cosine, `on_nan`
# and `data.on_corrupt` decide what is left out.
FREE = (
    *("out", "steps", "download", "checkpoint", "validation", "report", "features", "device", "parallel", "on_nan"),
    *("compile", "activation_checkpointing", "data.workers", "data.verify", "data.on_corrupt", "data.bucket"),
    "batch.accumulation",
)

Sets = tuple[Dataset | None, Dataset | None]  # speech, speechless


def train(recipe: Recipe, sets: Sets | None = None, held_out: Sets | None = None, *, quiet: bool = False) -> Path:
    """Run a recipe, or go on with it; returns the file or folder with what was trained.

    `sets` and, for validation, `held_out` take the place of those that the recipe names; `quiet` prints nothing. Under
    `torchrun` all processes call this.
    Raises InputError, CheckpointError and MoshivisError for all that the user can mend.
    """
    recipe.check()
    if sets is None:
        require_data(recipe.data)
    out = Path(recipe.out)
    with joined(recipe.device) as ranks:
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out, ranks):
            return _train(recipe, ranks, sets, held_out, quiet=quiet)


@contextmanager
def _alone(out: Path, ranks: Ranks) -> Iterator[None]:
    """Hold the folder `out` for these ranks. Raises InputError, on all of them, if another run holds it."""
    busy = f"another process is training into {out}; wait for it, or choose another out"
    with ExitStack() as held:
        taken = False
        if ranks.leads:
            try:
                held.enter_context(only_process(out, busy))
            except InputError:
                taken = True
        if ranks.any(taken):
            raise InputError(busy)
        yield


def _train(recipe: Recipe, ranks: Ranks, sets: Sets | None, held_out: Sets | None, *, quiet: bool) -> Path:
    recipe.rows(ranks.count)
    out = Path(recipe.out)
    if ranks.leads:
        for name in (ADAPTERS, MODEL, RECIPE, LOG, RUN_ID):
            clear_interrupted(out / name)
        for folder in out.glob("samples/step-*"):
            clear_answers(folder)
    checkpoints = Checkpoints(out / "checkpoints", recipe.checkpoint.keep, ranks)
    newest = checkpoints.newest()
    before, begun_with = (None, {}) if newest is None else recipe_and_sources(newest)
    if before is not None:
        check_same_run(before, recipe)
    chosen = sets or training_sets(recipe.data, recipe.seed)
    unseen = held_out or held_out_sets(recipe.validation.datasets, recipe.data)
    ready = prepare(recipe, ranks)
    sources, pictured = {"base": ready.base}, True
    if sets is None:
        kinds = recipe.kinds()
        learnt = [dataset for dataset in (*recipe.data.datasets, *recipe.data.general) if dataset.kind in kinds]
        check_made_for(ready.model, ready.tokenizer, (*learnt, *recipe.validation.datasets))
        pictured = check_pictures(recipe)
        sources |= {dataset.path: file_sha256(Path(dataset.path) / MANIFEST) for dataset in learnt}
    _check_sources(begun_with, sources, recipe, ranks)
    features = _features(recipe, ready, (*chosen, *unseen))
    trainer = Trainer(recipe, ready, features, ranks, checkpoints, sources, pictured=pictured)
    trainer.resume()
    if trainer.progress.step > recipe.steps:
        raise InputError(
            f"the run in {recipe.out} has done {trainer.progress.step} steps, more than steps={recipe.steps}"
        )
    if ranks.leads:
        _write_recipe(out / RECIPE, recipe)
    peak = peak_flops(ranks.device, recipe)
    report = Report(
        recipe,
        begin=trainer.progress.step,
        leads=ranks.leads,
        flops_per_token=flops_per_token(ready.model.config, recipe),
        peak=None if peak is None else peak * ranks.count,
        console=Console(stderr=True, highlight=False, soft_wrap=True, markup=False, quiet=quiet),
    )
    try:
        if sets is None:
            _say_unused(recipe, report)
        if recipe.precision == "bf16" and not has_bfloat16(ranks.device.type):
            gain = "is dozens of times as fast" if ranks.device.type == "cpu" else "may be faster"
            report.warn(f"this device has no instructions for bfloat16; precision=fp32 {gain}")
        if trainer.progress.step:
            report.say(f"going on after step {trainer.progress.step}")
        validation = None
        if recipe.validation.every:
            validation = Validation(recipe, trainer, unseen, ranks, report)
        _run(recipe, trainer, chosen, ranks, report, validation)
    finally:
        report.close()
    return _export(recipe, trainer, out)


def _say_unused(recipe: Recipe, report: Report) -> None:
    for kind in {"speech", "speechless"} - recipe.kinds():
        unused = [dataset.path for dataset in (*recipe.data.datasets, *recipe.data.general) if dataset.kind == kind]
        if unused:
            share = f"data.p_audio={recipe.data.p_audio:g}"
            report.warn(f"{share} asks for no {kind} samples: {', '.join(unused)} not used")


def _run(
    recipe: Recipe,
    trainer: Trainer,
    sets: Sets,
    ranks: Ranks,
    report: Report,
    validation: Validation | None,
) -> None:
    speech_rows, speechless_rows = recipe.rows(ranks.count)
    loader = Loader(
        sets[0] if speech_rows else None,
        sets[1] if speechless_rows else None,
        speech_rows=speech_rows,
        speechless_rows=speechless_rows,
        rank=ranks.rank,
        ranks=ranks.count,
        start_step=trainer.progress.step,
        workers=recipe.data.workers,
    )
    stopped, stopping = False, Stopping()
    try:
        with stopping:
            stopped = trainer.run(loader, report, validation, lambda: stopping.asked is not None)
    except RuntimeError as error:  # torch's, which has no class of its own for it
        if "DataLoader worker" not in str(error):
            raise
        raise MoshivisError(
            "a process that read data was ended from outside, perhaps for want of memory; run the same command again, "
            "with fewer data.workers: it goes on from the newest checkpoint"
        ) from error
    finally:
        loader.close()
    if stopped:
        report.say(f"stopped after step {trainer.progress.step}; the same command goes on from the newest checkpoint")
        stopping.leave()


def check_same_run(before: dict[str, Any], recipe: Recipe) -> None:
    """Raise InputError if what is in the output folder was begun by a recipe that would learn something else."""
    now = recipe_to_dict(recipe)
    before = _filled(before, recipe_to_dict(Recipe(out=recipe.out)))
    differing = [
        f"{key}: {old!r} became {new!r}"
        for key, old, new in _leaves(before, now)
        if key not in FREE and key.split(".")[0] not in FREE
    ]
    if differing:
        raise InputError(
            f"the run in {recipe.out} was begun by another recipe ({'; '.join(differing[:5])}); choose another out, or "
            "remove that folder"
        )


def _filled(before: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """What an older version wrote lacks the options that came later: they had no effect, as by default now."""
    filled = {**defaults, **before}
    for name, value in filled.items():
        if isinstance(value, dict) and isinstance(defaults.get(name), dict):
            filled[name] = _filled(value, defaults[name])
    return filled


def _check_sources(before: Mapping[str, str], now: Mapping[str, str], recipe: Recipe, ranks: Ranks) -> None:
    """Raise InputError, on all ranks, if base or data are not those that the run was begun with."""
    # Of a sharded base the rank that leads alone has the fingerprint; older versions had none for train: all.
    differing = [
        name for name, fingerprint in now.items() if fingerprint and (before.get(name) or fingerprint) != fingerprint
    ]
    if ranks.any(bool(differing)):
        raise InputError(
            f"the run in {recipe.out} was begun with something else ({', '.join(differing) or 'base'} changed since); "
            "choose another out, or remove that folder"
        )


def _leaves(before: Any, now: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        names = [*before, *(name for name in now if name not in before)]
        dot = f"{key}." if key else ""
        return [leaf for name in names for leaf in _leaves(before.get(name), now.get(name), f"{dot}{name}")]
    return [] if before == now else [(key, before, now)]


def _features(recipe: Recipe, ready: Ready, sets: Sequence[Dataset | None]) -> FeatureCache | None:
    if ready.model.vision is None:
        return None

    def picture(key: str) -> bytes:
        for dataset in sets:
            if dataset is not None:
                try:
                    return dataset.picture(key)
                except KeyError:
                    continue
        raise InputError(f"no data set holds the picture {key}")

    folder = recipe.features.folder
    return FeatureCache(
        ready.model.vision.encoder,
        picture,
        dtype=dtype_of(recipe),
        memory_mib=recipe.features.memory_mib,
        folder=None if folder is None else Path(folder),
        batch=recipe.features.batch,
    )


def _write_recipe(path: Path, recipe: Recipe) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False), encoding="utf-8")


def _export(recipe: Recipe, trainer: Trainer, out: Path) -> Path:
    """Write what was trained, its average if the recipe has one; all ranks together."""
    ready, ranks = trainer.ready, trainer.ranks
    target = out / (MODEL if recipe.train == "all" else ADAPTERS)
    try:
        if recipe.train == "all":
            with trainer.averaged():
                trained = gathered(trainer.trained, ranks)
            others = ready.model.state_dict().items()
            frozen = gathered({name: tensor for name, tensor in others if name not in trainer.trained}, ranks)
            if ranks.leads:
                _export_model(ready, trained | frozen, target, dtype_of(recipe))
        else:
            trainer.write_adapters(target)
    except OSError as error:
        raise CheckpointError(
            f"{target} could not be written: {error}. Make room, then run the same command again: it goes on from the "
            "last checkpoint"
        ) from error
    ranks.wait()
    return target


def _export_model(ready: Ready, tensors: Mapping[str, torch.Tensor], folder: Path, dtype: torch.dtype) -> None:
    """The whole model, in place of an older one."""
    model = empty_model(ready.model.config)
    fill_model(model, {name: tensors[name] for name in model.state_dict()}, dtype)
    tokenizer = None if ready.tokenizer is None else ready.tokenizer.model
    card = f"# {ready.model.config.name}\n\nTrained by `moshivis train`.\n"
    save_folder(folder, model.cpu(), tokenizer, card, sampling=ready.sampling, replace=True)
