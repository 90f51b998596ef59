"""`moshivis bench train`: what a training step costs, beside the straightforward way to do the same.

Both contenders train fresh adapters of one base on the same packed shards of random samples. Ours has the encoder's
outputs cached, computes in bfloat16 where the device has it and, on a GPU, reads ahead in other processes; as the
preset `mini` it pads to the next bucket, and takes its rows in two parts, the shorter and the longer ones, of which one
is in memory at a time. The baseline encodes the pictures of every batch, takes all rows at once, padded to the longest,
computes in float32, and reads when it needs something. Each runs in a process of its own, as memory is told by process;
they take turns of a few steps, so that whatever else the machine does hits both alike. Pictures have been seen before
when counting begins, as from the second epoch on.

Output: a table for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from moshivis.config import ModelConfig
from moshivis.data.loader import Loader
from moshivis.data.sample import Sample, Speaker
from moshivis.data.shard_writer import write_shards
from moshivis.devices import device_type, usable_device
from moshivis.errors import InputError
from moshivis.inference.conversation import EMBEDDED, load
from moshivis.presets import PRESETS
from moshivis.training.checkpoint import Checkpoints
from moshivis.training.distributed import Ranks, joined
from moshivis.training.features import FeatureCache
from moshivis.training.flops import flops_per_token
from moshivis.training.precision import dtype_of
from moshivis.training.recipe import Recipe
from moshivis.training.recipe_file import recipe_from_dict
from moshivis.training.setup import base_config, check_base, prepare
from moshivis.training.sources import training_sets
from moshivis.training.speed import peak_flops
from moshivis.training.trainer import Trainer

TURN = 2  # steps that a contender takes before it is the other one's turn
WARM_UP = 2  # steps that do not count
PREFETCHED = 2  # batches that each process of a loader has ready, as is torch's default
SHORTEST = 0.25  # of a sample, as a share of the longest
PICTURES = 16
GRACE_S = 20.0
CONTENDERS: dict[str, dict[str, Any]] = {
    "moshivis": {"precision": "auto", "data": {"bucket": 16}, "batch": {"accumulation": 2}},
    "baseline": {"precision": "fp32", "features": {"memory_mib": 0}},
}


@dataclass(frozen=True, kw_only=True)
class End:
    """What a contender tells at last."""

    memory: int | None  # bytes at most; None where the system does not tell
    flops_per_token: float
    peak: float | None  # operations a second that the device can do


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one step took."""

    seconds: float
    waited: float  # of them for data, pictures included
    tokens: int  # padding not counted
    padded: int


def run_bench_train(arguments: argparse.Namespace) -> int:
    """Measure what `model`, `rows`, `steps`, `frames`, `tokens`, `device` and `activation_checkpointing` say.

    Prints a table, and as the last line JSON: `model, rows, steps, frames, tokens, contenders, ratio`.
    Raises InputError for arguments that make no sense.
    """
    for name in ("rows", "steps", "frames", "tokens"):
        if getattr(arguments, name) < 1:
            raise InputError(f"{name} must be 1 or more, not {getattr(arguments, name)}")
    if arguments.device != "auto":
        usable_device(arguments.device)  # now, and not when all is prepared
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        recipes = {name: _recipe(arguments, Path(folder), options) for name, options in CONTENDERS.items()}
        recipe = recipes["moshivis"]
        recipe.rows()
        config = base_config(recipe)
        check_base(recipe, config)
        write_samples(Path(recipe.data.datasets[0].path), config, recipe)
        measured = measure(recipes, arguments.steps)
    rows = {name: summary(*measured[name]) for name in recipes}
    ours, baseline = (measured[name][1] for name in ("moshivis", "baseline"))
    ratio = statistics.median(_speed(a) / _speed(b) for a, b in zip(ours, baseline, strict=True))
    result = {
        **{name: getattr(arguments, name) for name in ("model", "rows", "steps", "frames", "tokens")},
        "contenders": rows,
        "ratio": round(ratio, 3),
    }
    Console().print(_table(result))
    print(json.dumps(result))
    return 0


def _recipe(arguments: argparse.Namespace, folder: Path, options: dict[str, Any]) -> Recipe:
    both = [{"path": str(folder / "data"), "kind": kind} for kind in ("speech", "speechless")]
    lengths = {"max_frames": arguments.frames, "max_tokens": arguments.tokens}
    # On a CPU a loader's processes would prepare one contender's batches in the other one's turn.
    on_cpu = device_type(arguments.device) == "cpu"
    data = {
        "workers": 0 if on_cpu or options["precision"] == "fp32" else 2,
        "datasets": both,
        "bucket": 1,
        **lengths,
        **options.get("data", {}),
    }
    return recipe_from_dict(
        {
            "out": str(folder / "out"),
            "base": arguments.model,
            "random_weights": arguments.model in PRESETS and arguments.model not in EMBEDDED,
            "adapters": {"fresh": True},
            "device": arguments.device,
            "precision": options["precision"],
            "batch": {"rows": arguments.rows, **options.get("batch", {})},
            "features": options.get("features", {}),
            "activation_checkpointing": arguments.activation_checkpointing,
            "data": data,
        }
    )


def write_samples(folder: Path, config: ModelConfig, recipe: Recipe) -> None:
    """Shards of random samples for `config`: enough for a few batches, some with the same picture."""
    rng = random.Random(0)
    numbers = np.random.default_rng(0)
    lm = config.speech_lm
    embedded = load("mini")
    assert embedded.tokenizer is not None

    def sample(number: int, longest: int, speech: bool) -> Sample:
        length = rng.randint(max(1, int(SHORTEST * longest)), longest)
        text = numbers.integers(4, lm.text_card, length).astype(np.int32)
        audio = numbers.integers(0, lm.audio_card, (lm.own_codebooks + lm.user_codebooks, length)).astype(np.int16)
        speaker = np.full(length, Speaker.ASSISTANT, np.uint8)
        image = str(number % PICTURES)
        return Sample(
            text=text, speaker=speaker, audio=audio if speech else None, image=image, origin=f"bench {number}"
        )

    count = 4 * recipe.batch.rows
    samples = [sample(number, recipe.data.max_frames, True) for number in range(count)]
    samples += [sample(number, recipe.data.max_tokens, False) for number in range(count)]
    write_shards(folder, samples, _picture, embedded.tokenizer, embedded.model.codec)


def _picture(key: str) -> bytes:
    colours = np.random.default_rng(int(key)).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((384, 384), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


# contenders -----------------------------------------------------------------------------------------------------------


def measure(recipes: dict[str, Recipe], steps: int) -> dict[str, tuple[End, list[StepCost]]]:
    """Let the contenders take turns until each has taken `steps` steps.

    Raises InputError if one of them fails.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        lines: dict[str, Connection] = {}
        for name, recipe in recipes.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_contend, args=(recipe, torch.get_num_threads(), theirs))
            process.start()
            theirs.close()
            stack.callback(_end, process, ours)
            lines[name] = ours
        costs: dict[str, list[StepCost]] = {name: [] for name in recipes}
        for name in recipes:
            _ask(name, lines[name], WARM_UP)
        for done in range(0, steps, TURN):
            for name, recipe in recipes.items():
                if ahead := PREFETCHED * recipe.data.workers:  # batches that were made in the other one's turn
                    _ask(name, lines[name], ahead)
                costs[name] += _ask(name, lines[name], min(TURN, steps - done))
        return {name: (_ask(name, lines[name], 0), costs[name]) for name in recipes}


def _end(process: BaseProcess, line: Connection) -> None:
    line.close()  # one that waits for its turn hears that there is none
    process.join(GRACE_S)
    process.terminate()
    process.join()


def _ask(name: str, line: Connection, steps: int) -> Any:
    try:
        line.send(steps)
        return line.recv()
    except (EOFError, BrokenPipeError) as error:
        raise InputError(f"the contender {name} failed; what it said stands above") from error


def _contend(recipe: Recipe, threads: int, line: Connection) -> None:
    """Take as many steps as asked for; asked for none, tell memory and speed, and end."""
    torch.set_num_threads(threads)
    with joined(recipe.device) as ranks, _training(recipe, ranks) as (trainer, loader):
        if ranks.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # as one would train in float32 there
        while steps := _next_turn(line):
            line.send([_step(trainer, loader, ranks.device) for _ in range(steps)])
        flops = flops_per_token(trainer.ready.model.config, recipe)
        peak = peak_flops(ranks.device, recipe)
        line.send(End(memory=_peak_memory(ranks.device), flops_per_token=flops, peak=peak))


def _next_turn(line: Connection) -> int:
    try:
        return line.recv()
    except EOFError:
        sys.exit(1)  # the other contender failed


@contextmanager
def _training(recipe: Recipe, ranks: Ranks) -> Iterator[tuple[Trainer, Loader]]:
    speech, speechless = training_sets(recipe.data, recipe.seed)
    ready = prepare(recipe, ranks)
    assert ready.model.vision is not None and speech is not None and speechless is not None
    features = FeatureCache(
        ready.model.vision.encoder,
        speech.picture,
        dtype=dtype_of(recipe),
        memory_mib=recipe.features.memory_mib,
        batch=recipe.features.batch,
    )
    if recipe.features.memory_mib:
        for position in range(4 * recipe.batch.rows):
            features.get([speech[position].image or ""])
    speech_rows, speechless_rows = recipe.rows()
    loader = Loader(
        speech if speech_rows else None,
        speechless if speechless_rows else None,
        speech_rows=speech_rows,
        speechless_rows=speechless_rows,
        workers=recipe.data.workers,
    )
    try:
        yield Trainer(recipe, ready, features, ranks, Checkpoints(Path(recipe.out), 1, ranks)), loader
    finally:
        loader.close()


def _step(trainer: Trainer, loader: Loader, device: torch.device) -> StepCost:
    begun, waited = time.perf_counter(), loader.waited + trainer.looked
    result = trainer.step(next(loader), 1e-4)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begun
    waited = loader.waited + trainer.looked - waited
    return StepCost(seconds=seconds, waited=waited, tokens=result.tokens, padded=result.padded)


def _peak_memory(device: torch.device) -> int | None:
    """Bytes: of the accelerator, else of the training process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# report ---------------------------------------------------------------------------------------------------------------


def summary(end: End, costs: list[StepCost]) -> dict[str, float | None]:
    """Medians over the steps, and what they come to by the second."""
    seconds = sum(cost.seconds for cost in costs)
    operations = end.flops_per_token * sum(cost.tokens for cost in costs) / seconds
    return {
        "ms_per_step": round(1000 * statistics.median(cost.seconds for cost in costs), 2),
        "tokens_per_s": round(statistics.median(map(_speed, costs)), 1),
        "padding": round(1 - sum(cost.tokens for cost in costs) / sum(cost.padded for cost in costs), 4),
        "waiting": round(sum(cost.waited for cost in costs) / seconds, 4),
        "memory_mib": None if end.memory is None else round(end.memory / 2**20),
        "gflop_per_s": round(operations / 1e9, 2),
        "mfu": None if end.peak is None else round(operations / end.peak, 4),
    }


def _speed(cost: StepCost) -> float:
    return cost.tokens / cost.seconds


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"one step of {result['rows']} samples, base {result['model']}")
    table.add_column("")
    for name in result["contenders"]:
        table.add_column(name, justify="right")
    labels = {
        "ms_per_step": "ms a step, median",
        "tokens_per_s": "tokens/s, median, padding not counted",
        "padding": "share of padding",
        "waiting": "share of the time spent on data and pictures",
        "memory_mib": "peak memory, MiB",
        "gflop_per_s": "GFLOP/s in products with weights",
        "mfu": "of what the device can do",
    }
    for key, label in labels.items():
        values = [row[key] for row in result["contenders"].values()]
        table.add_row(label, *("unknown" if value is None else f"{value:,}" for value in values))
    table.caption = f"tokens/s: {result['ratio']:.2f} times the baseline's"
    return table
