"""A training run as a whole: it learns, it leaves what it says, and it goes on after any end."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import moshivis
from moshivis.checkpoints.folder import save_folder
from moshivis.data.sample import Kind, Sample
from moshivis.data.shard_writer import write_shards
from moshivis.errors import CheckpointError, InputError, MoshivisError
from moshivis.files import only_process
from moshivis.inference.conversation import load
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import TextTokenizer
from moshivis.training.run import train
from training_support import (
    PATIENCE,
    finish,
    largest_difference,
    log_of,
    losses,
    mean_difference,
    pack,
    packed,
    picture,
    recipe,
    recipe_data,
    run_ranks,
    speech_sample,
    speechless_sample,
    start,
    torchrun_variables,
    write_recipe,
)

__all__ = ["packed"]  # a fixture
pytestmark = pytest.mark.timeout(3 * PATIENCE)


def test_adapters_learn_and_are_talked_with(tiny_folder: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train(recipe(tiny_folder, packed, out, {"steps": 30, "adapters.fresh": True}))
    curve = losses(log_of(out))
    assert len(curve) == 30
    assert sum(curve[-5:]) < 0.97 * sum(curve[:5])
    assert result == out / "adapters.safetensors"
    trained = load(tiny_folder, adapters=result)
    untrained = load(tiny_folder)
    names = {name for name, _ in trained.model.trainable_parameters()}
    for (name, after), (_, before) in zip(
        trained.model.named_parameters(), untrained.model.named_parameters(), strict=True
    ):
        assert after.equal(before) == (name not in names), name
    pieces = trained.conversation(picture("red")).say_text("what colour is the star")
    assert all(0 <= piece.gate <= 1 for piece in pieces)


def test_a_run_that_is_killed_ends_with_the_same_weights(tiny_folder: Path, packed: Path, tmp_path: Path) -> None:
    changes = {"steps": 12, "optimiser.ema": 0.9, "checkpoint.every": 3}
    train(recipe(tiny_folder, packed, tmp_path / "whole", changes), quiet=True)
    data = recipe_data(tiny_folder, packed, tmp_path / "killed", changes)
    log = tmp_path / "killed" / "log.jsonl"
    for enough in (4, 8):  # steps after which it is killed: once after a checkpoint, once later
        process = start(data)
        _wait_for_steps(log, enough)
        process.kill()
        process.join(PATIENCE)
        assert process.exitcode == -9
    finish(start(data))
    results = [load_file(tmp_path / name / "adapters.safetensors") for name in ("whole", "killed")]
    assert largest_difference(*results) == 0
    assert losses(log_of(tmp_path / "killed")) == losses(log_of(tmp_path / "whole"))
    assert [line["step"] for line in log_of(tmp_path / "killed")] == list(range(1, 13))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_of_which_one_is_killed_end_with_the_same_weights(
    parallel: str, tiny_folder: Path, packed: Path, tmp_path: Path
) -> None:
    changes = {"steps": 10, "checkpoint.every": 3, "parallel": parallel}
    run_ranks(recipe_data(tiny_folder, packed, tmp_path / "whole", changes), 2)
    data = recipe_data(tiny_folder, packed, tmp_path / "killed", changes)
    for enough, rank in ((4, 1), (7, 0)):
        ranks = [start(data, variables) for variables in torchrun_variables(2)]
        _wait_for_steps(tmp_path / "killed" / "log.jsonl", enough)
        ranks[rank].kill()
        for process in ranks:  # the other one misses it
            process.join(PATIENCE)
        assert ranks[rank].exitcode == -9 and ranks[1 - rank].exitcode == 1
    run_ranks(data, 2)
    results = [load_file(tmp_path / name / "adapters.safetensors") for name in ("whole", "killed")]
    assert largest_difference(*results) == 0
    assert losses(log_of(tmp_path / "killed")) == losses(log_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    "parallel, precision, more",
    [
        ("ddp", "fp32", {}),
        ("ddp", "bf16", {"batch": {"rows": 8, "accumulation": 2}}),
        ("fsdp", "fp32", {}),
        ("fsdp", "fp32", {"train": "lora"}),
        ("fsdp", "bf16", {"activation_checkpointing": True, "batch": {"rows": 8, "accumulation": 2}}),
        pytest.param("fsdp", "bf16", {"activation_checkpointing": True, "compile": True}, marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value,
)
def test_two_processes_learn_what_one_does(
    parallel: str, precision: str, more: dict[str, Any], tiny_folder: Path, packed: Path, tmp_path: Path
) -> None:
    both = [{"path": str(packed), "kind": kind} for kind in ("speech", "speechless")]
    changes = {"steps": 5, "parallel": parallel, "precision": precision, **more}
    changes |= {"validation": {"every": 5, "datasets": both, "rows": 3}}  # one more on one of two ranks
    train(recipe(tiny_folder, packed, tmp_path / "one", changes), quiet=True)
    run_ranks(recipe_data(tiny_folder, packed, tmp_path / "two", changes), 2)
    one, two = (losses(log_of(tmp_path / name)) for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5 if precision == "fp32" else 2e-3)
    alone, shared = (held_out(tmp_path / name) for name in ("one", "two"))
    assert shared == pytest.approx(alone, rel=1e-3 if precision == "fp32" else 2e-2) and len(alone) > 4
    results = [load_file(tmp_path / name / "adapters.safetensors") for name in ("one", "two")]
    # One process goes on from what two have left: the base that it loads is the same.
    train(recipe(tiny_folder, packed, tmp_path / "two", {**changes, "parallel": "ddp", "steps": 6}), quiet=True)
    assert len(log_of(tmp_path / "two")) == 6
    if precision == "bf16":
        return
    # A gradient of nearly nothing has a sign by chance, and AdamW steps as far for it as for any other: so the mean.
    assert mean_difference(*results) < 1e-4


def held_out(out: Path) -> dict[str, float]:
    (line,) = log_of(out, "held_out_speech_text")
    return {name: x for name, x in line.items() if name.startswith("held_out") and isinstance(x, float)}


def _wait_for_steps(log: Path, count: int) -> None:
    limit = time.monotonic() + PATIENCE
    while not log.exists() or log.read_text().count('"loss"') < count:
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_run_begun_before_an_option_came_goes_on(tiny_folder: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(recipe(tiny_folder, packed, out, {"steps": 2}), quiet=True)
    (state,) = (out / "checkpoints").glob("*/state.json")
    stored = json.loads(state.read_text())
    del stored["recipe"]["adapters"]["out_scale"], stored["recipe"]["on_nan"]
    state.write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"\(adapters.fresh: "):
        other = not stored["recipe"]["adapters"]["fresh"]
        train(recipe(tiny_folder, packed, out, {"steps": 3, "adapters.fresh": other}), quiet=True)
    train(recipe(tiny_folder, packed, out, {"steps": 3}), quiet=True)
    assert len(log_of(out)) == 3


def test_another_recipe_does_not_go_on_with_a_run(tiny_folder: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(recipe(tiny_folder, packed, out, {"steps": 2}), quiet=True)
    with pytest.raises(InputError, match=r"begun by another recipe \(optimiser.rate: 0.01 became 0.02\)"):
        train(recipe(tiny_folder, packed, out, {"steps": 2, "optimiser.rate": 0.02}), quiet=True)
    shape = {"batch.accumulation": 2, "data.bucket": 4, "activation_checkpointing": True}  # nothing that is learnt
    free = {"steps": 4, **shape}
    train(recipe(tiny_folder, packed, out, free), quiet=True)
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 4]
    with pytest.raises(InputError, match="has done 4 steps, more than steps=3"):
        train(recipe(tiny_folder, packed, out, {"steps": 3}), quiet=True)


@pytest.mark.parametrize("changes", [{}, {"train": "all", "loss.codebooks": 3}])
def test_other_data_or_another_base_does_not_go_on_with_a_run(
    changes: dict[str, Any], tiny_folder: Path, tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    data = pack(tmp_path / "data", tiny_model, tiny_tokenizer)
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    train(recipe(base, data, tmp_path / "run", {"steps": 1, **changes}), quiet=True)
    train(recipe(base, data, tmp_path / "run", {"steps": 2, **changes}), quiet=True)
    shutil.rmtree(data)
    pack(data, tiny_model, tiny_tokenizer, count=8)
    with pytest.raises(InputError, match=rf"begun with something else \({data} changed since\)"):
        train(recipe(base, data, tmp_path / "run", {"steps": 3, **changes}), quiet=True)
    other = copy.deepcopy(tiny_model)
    other.speech_lm.text_head.weight.data.mul_(2)
    shutil.rmtree(base)
    save_folder(base, other, tiny_tokenizer.model, "another")
    with pytest.raises(InputError, match=rf"begun with something else \(base, {data} changed since\)"):
        train(recipe(base, data, tmp_path / "run", {"steps": 3, **changes}), quiet=True)


def test_two_runs_do_not_share_a_folder(tiny_folder: Path, packed: Path, tmp_path: Path) -> None:
    with only_process(tmp_path, "held"), pytest.raises(InputError, match="another process is training into"):
        train(recipe(tiny_folder, packed, tmp_path), quiet=True)
    assert not list(tmp_path.iterdir())


def test_every_rank_says_that_another_run_holds_the_folder(tiny_folder: Path, packed: Path, tmp_path: Path) -> None:
    recipe_file = write_recipe(tmp_path / "recipe.yaml", recipe_data(tiny_folder, packed, tmp_path / "run"))
    (tmp_path / "run").mkdir()
    with only_process(tmp_path / "run", "held"):
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "moshivis", "train", str(recipe_file)],
                env={**os.environ, **variables},
                stderr=subprocess.PIPE,
                text=True,
            )
            for variables in torchrun_variables(2)
        ]
        said = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert all("another process is training into" in words for words in said)


def test_adapters_need_pictures(
    tiny_folder: Path, tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    samples = [make(tiny_tokenizer, n) for n in range(8) for make in (speech_sample, speechless_sample)]
    blind = [dataclasses.replace(sample, image=None) for sample in samples]
    write_shards(tmp_path / "blind", blind, picture, tiny_tokenizer, tiny_model.codec)
    with pytest.raises(InputError, match="no data set that is used holds a picture"):
        train(recipe(tiny_folder, tmp_path / "blind", tmp_path / "run"), quiet=True)
    one = {"data.p_audio": 1, "data.datasets": [{"path": str(tmp_path / "half"), "kind": "speech"}]}
    half = [*blind, speechless_sample(tiny_tokenizer, 0)]
    write_shards(tmp_path / "half", half, picture, tiny_tokenizer, tiny_model.codec)
    with pytest.raises(InputError, match="no data set that is used holds a picture"):
        train(recipe(tiny_folder, tmp_path / "half", tmp_path / "run", one), quiet=True)
    seeing = pack(tmp_path / "seeing", tiny_model, tiny_tokenizer)
    mixed = [{"path": str(seeing), "kind": "speech"}, {"path": str(tmp_path / "blind"), "kind": "speechless"}]
    changes = {"data.datasets": mixed, "data.p_audio": 0}  # what has pictures is not used
    with pytest.raises(InputError, match="no data set that is used holds a picture"):
        train(recipe(tiny_folder, seeing, tmp_path / "run", changes), quiet=True)


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
def test_without_pictures_adapters_stay_as_they_are(
    matrices: str, tiny_folder: Path, tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    samples = [make(tiny_tokenizer, n) for n in range(8) for make in (speech_sample, speechless_sample)]
    blind = [dataclasses.replace(sample, image=None) for sample in samples]
    write_shards(tmp_path / "blind", blind, picture, tiny_tokenizer, tiny_model.codec)
    changes = {"train": "lora", "steps": 3, "optimiser.weight_decay": 1.0, "optimiser.matrices": matrices}
    file = train(recipe(tiny_folder, tmp_path / "blind", tmp_path / "run", changes), quiet=True)
    before = {name: parameter.bfloat16() for name, parameter in tiny_model.trainable_parameters()}
    after = load_file(file)
    assert before and all(after[name].equal(tensor) for name, tensor in before.items())
    assert any(".lora_up" in name and tensor.any() for name, tensor in after.items())


class Dying:
    """A data set whose reading process is killed from outside, as by a system that runs out of memory."""

    name = "dying"
    kind: Kind = "speechless"

    def __getitem__(self, position: int) -> Sample:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def picture(self, key: str) -> bytes:
        raise KeyError(key)


def test_a_reading_process_that_is_killed_is_named(tiny_folder: Path, packed: Path, tmp_path: Path) -> None:
    changes = {"data.workers": 1, "data.p_audio": 0}
    with pytest.raises(MoshivisError, match="process that read data was ended from outside.*fewer data.workers"):
        train(recipe(tiny_folder, packed, tmp_path, changes), (None, Dying()), quiet=True)


def test_answers_that_cannot_be_written_are_not_the_end(
    tiny_folder: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [{"path": str(packed), "kind": kind} for kind in ("speech", "speechless")]
    validation = {"every": 2, "datasets": both, "rows": 2, "samples": 1}
    (tmp_path / "samples").write_text("in the way")
    train(recipe(tiny_folder, packed, tmp_path, {"steps": 2, "validation": validation}))
    assert "answers could not be written to" in capsys.readouterr().err
    assert len(losses(log_of(tmp_path))) == 2


def test_data_that_no_batch_asks_for_is_named(
    tiny_folder: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(tiny_folder, packed, tmp_path / "both", {"steps": 1}))
    assert "not used" not in capsys.readouterr().err
    train(recipe(tiny_folder, packed, tmp_path / "written", {"steps": 1, "data.p_audio": 0}))
    assert f"data.p_audio=0 asks for no speech samples: {packed} not used" in capsys.readouterr().err


def test_a_damaged_checkpoint_says_what_to_do(tiny_folder: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(recipe(tiny_folder, packed, out, {"steps": 4, "checkpoint.keep": 2}), quiet=True)
    folders = sorted((out / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-00000002", "step-00000004"]
    (tensors,) = folders[-1].glob("*.distcp")
    tensors.write_bytes(tensors.read_bytes()[:100])
    unreadable = "step-00000004 cannot be read: .*remove it to use an older one"
    with pytest.raises(CheckpointError, match=unreadable):
        train(recipe(tiny_folder, packed, out, {"steps": 4}), quiet=True)
    (folders[-1] / "state.json").write_text('{"progress": ')
    with pytest.raises(CheckpointError, match=unreadable):
        train(recipe(tiny_folder, packed, out, {"steps": 4}), quiet=True)


@pytest.mark.slow
def test_torchrun_starts_the_command(tiny_folder: Path, packed: Path, tmp_path: Path) -> None:
    recipe_file = write_recipe(tmp_path / "recipe.yaml", recipe_data(tiny_folder, packed, tmp_path / "run"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, "-m", "moshivis", "train", str(recipe_file), "steps=2"]
    variables = {**os.environ, "PYTHONPATH": str(Path(moshivis.__file__).parents[1]), "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stderr
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2]
