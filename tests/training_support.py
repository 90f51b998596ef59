"""Packed samples for the tiny model of conftest, and recipes that train it: what the tests of training share."""

from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context, set_forkserver_preload
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from moshivis.data.sample import Sample, Speaker
from moshivis.data.shard_writer import write_shards
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import PADDING, TextTokenizer
from moshivis.training.recipe import Recipe
from moshivis.training.recipe_file import recipe_from_dict
from moshivis.training.run import train

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
PATIENCE = 900.0  # seconds; machines that run tests are busy


def picture(key: str) -> bytes:
    """A square of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), COLOURS[key]).save(file, "PNG")
    return file.getvalue()


def speech_sample(tokenizer: TextTokenizer, number: int) -> Sample:
    """The assistant names the colour of the picture; both voices are noise of the sample's own."""
    rng = np.random.default_rng(number)
    frames = int(rng.integers(12, 28))
    colour = ("red", "blue")[number % 2]
    words = tokenizer.encode(f"the star is {colour}")
    text, speaker = np.full(frames, PADDING, np.int32), np.zeros(frames, np.uint8)
    text[3], speaker[3] = 0, Speaker.ASSISTANT
    words = words[: frames - 4]
    text[4 : 4 + len(words)], speaker[4 : 4 + len(words)] = words, Speaker.ASSISTANT
    audio = rng.integers(0, 32, (6, frames)).astype(np.int16)
    image = None if number % 5 == 4 else colour
    return Sample(text=text, speaker=speaker, audio=audio, image=image, origin=f"speech {number}")


def speechless_sample(tokenizer: TextTokenizer, number: int) -> Sample:
    colour = ("red", "blue")[number % 2]
    turns = [
        (Speaker.USER, tokenizer.encode("what colour is the star")),
        (Speaker.ASSISTANT, tokenizer.encode(f"the star is {colour}" + " hello there" * (number % 3))),
    ]
    text = np.concatenate([np.asarray(words, np.int32) for _, words in turns])
    speaker = np.concatenate([np.full(len(words), who, np.uint8) for who, words in turns])
    return Sample(text=text, speaker=speaker, image=colour, origin=f"speechless {number}")


def pack(
    folder: Path,
    model: MoshiVis,
    tokenizer: TextTokenizer,
    count: int = 12,
    picture: Callable[[str], bytes] = picture,
) -> Path:
    """A folder of shards with `count` samples of each kind."""
    samples = [make(tokenizer, number) for number in range(count) for make in (speech_sample, speechless_sample)]
    write_shards(folder, samples, picture, tokenizer, model.codec, rows_a_shard=8)
    return folder


@pytest.fixture(scope="session")
def packed(tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("data") / "packed", tiny_model, tiny_tokenizer)


def recipe_data(base: Path, packed: Path, out: Path, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A recipe of seconds as plain data; `changes` by dotted key."""
    both = [{"path": str(packed), "kind": kind} for kind in ("speech", "speechless")]
    data: dict[str, Any] = {
        "out": str(out),
        "base": str(base),
        "steps": 6,
        "device": "cpu",
        "precision": "fp32",
        "batch": {"rows": 8},
        "data": {"datasets": both, "workers": 0, "bucket": 8, "max_frames": 32, "max_tokens": 32, "p_audio": 0.5},
        "optimiser": {"rate": 1e-2, "warmup": 2},
        "checkpoint": {"every": 2},
        "report": {"every": 1},
    }
    for key, value in (changes or {}).items():
        *parents, last = key.split(".")
        place = data
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    return data


def recipe(base: Path, packed: Path, out: Path, changes: Mapping[str, Any] | None = None) -> Recipe:
    return recipe_from_dict(recipe_data(base, packed, out, changes))


@pytest.fixture
def run(tiny_folder: Path, packed: Path, tmp_path: Path) -> Any:
    """Train with some changes to the usual recipe: the folder of the run."""

    def run(name: str = "run", **changes: Any) -> Path:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        train(recipe(tiny_folder, packed, tmp_path / name, {"steps": 3, **dotted}), quiet=True)
        return tmp_path / name

    return run


def write_recipe(path: Path, data: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(data)), encoding="utf-8")
    return path


def start(data: Mapping[str, Any], variables: Mapping[str, str] | None = None) -> BaseProcess:
    """Begin a training run in a process of its own, with these environment variables."""
    set_forkserver_preload(["training_support"])  # so that not each of them imports torch
    process = get_context("forkserver").Process(target=_train, args=(dict(data), dict(variables or {})))
    process.start()
    return process


def torchrun_variables(ranks: int) -> list[dict[str, str]]:
    """The environment variables that torchrun would give to each of `ranks` processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    each = [{**shared, "RANK": rank, "LOCAL_RANK": rank, "GLOO_SOCKET_IFNAME": "lo"} for rank in range(ranks)]
    return [{name: str(value) for name, value in variables.items()} for variables in each]


def _train(data: dict[str, Any], variables: dict[str, str]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    train(recipe_from_dict(data), quiet=False)


def finish(*processes: BaseProcess) -> None:
    """Wait for runs to end well."""
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def run_ranks(data: Mapping[str, Any], ranks: int) -> None:
    """A run of several processes, from its beginning to its end."""
    finish(*[start(data, variables) for variables in torchrun_variables(ranks)])


def log_of(out: Path, of: str = "loss") -> list[dict[str, Any]]:
    """The lines of a run's log that tell of a step, or `of` something else."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if of in line]


def largest_difference(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((float((a[name].double() - b[name].double()).abs().max()) for name in a), default=0.0)


def mean_difference(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return float(torch.cat([(a[name].double() - b[name].double()).abs().flatten() for name in a]).mean())


def losses(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(line["loss"]) for line in lines]
