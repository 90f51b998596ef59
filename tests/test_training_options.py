"""Every option of a recipe does what it says, in runs of a few steps."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from moshivis.checkpoints.adapters import read_adapters
from moshivis.checkpoints.folder import SAMPLING, load_folder
from moshivis.checkpoints.load import load_model
from moshivis.data.shard_format import picture_key
from moshivis.data.shard_writer import write_shards
from moshivis.errors import CheckpointError, InputError, MoshivisError, ShardError
from moshivis.inference.conversation import EMBEDDED, Assistant, load
from moshivis.inference.sampling import Sampling
from moshivis.layers.attention import SelfAttention
from moshivis.layers.rope import rotation
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import PADDING, TextTokenizer
from moshivis.training.precision import half_precision
from moshivis.training.recipe_file import recipe_from_dict
from moshivis.training.run import train
from moshivis.training.speed import compiler, shorten_vectors
from moshivis.training.validation import answer
from training_support import (
    PATIENCE,
    largest_difference,
    log_of,
    losses,
    mean_difference,
    pack,
    packed,
    picture,
    recipe,
    recipe_data,
    run,
    run_ranks,
    speech_sample,
    speechless_sample,
)

__all__ = ["packed", "run"]  # fixtures
pytestmark = pytest.mark.timeout(2 * PATIENCE)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapters.safetensors")


def test_parts_and_recomputed_activations_change_nothing(run: Any) -> None:
    plain = losses(log_of(run("plain")))
    assert losses(log_of(run("parts", batch={"rows": 8, "accumulation": 3}))) == pytest.approx(plain, rel=1e-5)
    assert losses(log_of(run("again", activation_checkpointing=True))) == pytest.approx(plain, rel=1e-6)
    assert losses(log_of(run("read", data__workers=2))) == plain


def test_activations_are_recomputed_in_half_precision_as_they_were(run: Any) -> None:
    plain = losses(log_of(run("plain", precision="bf16")))
    assert losses(log_of(run("again", precision="bf16", activation_checkpointing=True))) == pytest.approx(plain)


def test_what_has_no_target_does_not_decay(run: Any, tiny_folder: Path) -> None:
    before = load_model(tiny_folder).model.state_dict()
    after = load_model(run(train="all", data__p_audio=0) / "model").model.state_dict()
    for name, tensor in after.items():
        if name.startswith(("speech_lm.depth.", "speech_lm.embedding.audio.")):
            assert tensor.equal(before[name]), name
    assert not after["speech_lm.text_head.weight"].equal(before["speech_lm.text_head.weight"])


@pytest.mark.slow
def test_compiled_blocks_change_nothing(run: Any) -> None:
    plain = losses(log_of(run("plain")))
    both = run("both", compile=True, activation_checkpointing=True)
    assert losses(log_of(run("compiled", compile=True))) == pytest.approx(plain, rel=1e-4)
    assert losses(log_of(both)) == pytest.approx(plain, rel=1e-4)


def test_compiled_attention_learns_the_same_in_bfloat16() -> None:
    """With vectors of 512 bits its gradients are no numbers on a CPU with AMX."""
    attention = load_model(EMBEDDED["mini"]).model.speech_lm.backbone.layers[5].self_attn
    assert isinstance(attention, SelfAttention)
    attention.train()
    rope = rotation(torch.arange(192)[None], attention.head_dim, 10_000.0)
    compiled = copy.deepcopy(attention)
    shorten_vectors()
    compiled.forward = torch.compile(compiled.forward)  # type: ignore[method-assign]
    gradients: list[Tensor] = []
    for module in (attention, compiled):
        torch.manual_seed(0)
        x, wanted = (torch.randn(12, 192, attention.in_proj.in_features) for _ in range(2))
        with half_precision(torch.device("cpu")):
            said = module(x.requires_grad_(), rope=rope, mask=None)
        (said.float() - wanted).square().mean().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    scale = gradients[0].abs().max()
    torch.testing.assert_close(gradients[1] / scale, gradients[0] / scale, atol=0.03, rtol=0)


def test_bfloat16_is_close(run: Any) -> None:
    plain, half = (log_of(run(precision, precision=precision)) for precision in ("fp32", "bf16"))
    assert losses(half) == pytest.approx(losses(plain), rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {"gate": "none"},
        {"gate": "shared"},
        {"gate_activation": "tanh", "gate_input": "constant"},
        {"sharing": "kv", "layers": [1]},
        {"sharing": "none"},
    ],
)
def test_ablations_train_what_they_name(changes: dict[str, Any], run: Any, tiny_folder: Path) -> None:
    out, still = run(adapters=changes), run("still", adapters=changes, steps=1, optimiser__rate=0.0)
    adapters = load(tiny_folder, adapters=out / "adapters.safetensors").model.config.adapters
    for name, value in changes.items():
        assert getattr(adapters, name) == (tuple(value) if isinstance(value, list) else value)
    assert largest_difference(weights(out), weights(still)) > 1e-3


def test_lora_learns_beside_the_adapters_and_is_merged_when_loaded(run: Any, tiny_folder: Path) -> None:
    out = run(train="lora", lora={"rank": 2, "alpha": 8.0, "targets": ["in_proj", "linear_out"]})
    file = read_adapters(out / "adapters.safetensors")
    low_rank = sorted(name for name in file.tensors if ".lora_" in name)
    assert len(low_rank) == 2 * 2 * 2 and file.lora_scale == 4.0
    assert all(file.tensors[name].any() for name in low_rank)
    name = "speech_lm.backbone.layers.0.self_attn.in_proj"
    before = load(tiny_folder).model.get_parameter(f"{name}.weight")
    after = load(tiny_folder, adapters=out / "adapters.safetensors").model.get_parameter(f"{name}.weight")
    update = 4.0 * file.tensors[f"{name}.lora_up"].float() @ file.tensors[f"{name}.lora_down"].float()
    torch.testing.assert_close(after, before + update)


def test_everything_can_be_trained(run: Any, tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("text", "semantic", "acoustic"):
        with pytest.raises(InputError, match=rf"train: all with loss\.{name}=0"):
            run(train="all", loss__codebooks=3, **{f"loss__{name}": 0.0})
    with pytest.raises(InputError, match="set loss.codebooks=3"):
        run(train="all")
    before = load_model(tiny_folder).model.state_dict()
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    (base / SAMPLING).write_text('{"text_top_k": 5}')
    out = run(train="all", loss__codebooks=3, base=str(base))
    after = load_model(out / "model")
    assert after.tokenizer is not None and after.sampling == {"text_top_k": 5}
    for name, tensor in after.model.state_dict().items():
        frozen = name.startswith(("codec.", "vision.encoder."))
        if frozen or name.endswith(("in_proj.weight", "text_head.weight")):
            assert tensor.equal(before[name]) == frozen, name
    run(train="all", loss__codebooks=3, base=str(base), steps=4)  # goes on, and replaces its result


def test_a_model_trained_whole_in_half_precision_can_be_used(run: Any) -> None:
    out = run(train="all", loss__codebooks=3, precision="bf16")
    stored = load_folder(out / "model")
    rest = {name: parameter.dtype for name, parameter in stored.named_parameters() if not name.startswith("codec.")}
    assert set(rest.values()) == {torch.bfloat16}
    assert load(out / "model", dtype=torch.bfloat16).look(Image.new("RGB", (9, 9))).keys[0].isfinite().all()


def test_features_are_kept_on_disk_for_the_next_run(run: Any, tmp_path: Path) -> None:
    kept = {"folder": str(tmp_path / "features"), "memory_mib": 0}
    first = losses(log_of(run("first", features=kept)))
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 2
    assert losses(log_of(run("second", features=kept))) == first == losses(log_of(run("memory")))


def test_random_weights_of_a_folder_and_of_none(run: Any, tiny_folder: Path) -> None:
    out = run(random_weights=True, checkpoint__every=1, checkpoint__keep=1)
    assert read_adapters(out / "adapters.safetensors").base
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000003"]
    with pytest.raises(CheckpointError, match="no model 'nowhere'"):
        run("other", base="nowhere")


def test_the_average_is_what_is_saved(run: Any) -> None:
    begun, last = (weights(run(name, steps=1, optimiser__rate=rate)) for name, rate in (("begun", 0.0), ("last", 0.01)))
    average = weights(run("average", steps=1, optimiser__rate=0.01, optimiser__ema=0.999))
    assert largest_difference(begun, last) > 1e-3
    mixed = {name: 0.1 * begun[name].float() + 0.9 * last[name].float() for name in last}  # of the first step's decay
    for name, tensor in average.items():
        torch.testing.assert_close(tensor.float(), mixed[name], rtol=0.01, atol=1e-5)


def test_one_kind_alone_and_talk_around_pictures(
    run: Any, packed: Path, tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    speech = {"path": str(packed), "kind": "speech"}
    alone = run("alone", data__p_audio=1.0, data__datasets=[speech])
    assert all(line["audio"] > 0 for line in log_of(alone))
    both = [speech, {"path": str(packed), "kind": "speechless"}]
    usual = log_of(run("usual"))
    talk = [
        dataclasses.replace(make(tiny_tokenizer, number), image=None)
        for make in (speech_sample, speechless_sample)
        for number in range(4)
    ]
    write_shards(tmp_path / "talk", talk, picture, tiny_tokenizer, tiny_model.codec)
    general = [{"path": str(tmp_path / "talk"), "kind": kind} for kind in ("speech", "speechless")]
    around = log_of(run("around", data__general=general, data__p_concat=1.0))
    assert sum(line["tokens"] for line in around) > sum(line["tokens"] for line in usual)
    mixed = run("mixed", data__datasets=[*both, {**speech, "weight": 3.0, "name": "again"}])
    assert losses(log_of(mixed)) != losses(usual)


def test_weights_of_the_losses_matter(run: Any) -> None:
    usual = log_of(run("usual", steps=1))[0]
    written: list[dict[str, float]] = [{"padding": 0.0}, {"user": 0.0}]
    for number, loss in enumerate(written):
        assert log_of(run(f"text{number}", steps=1, loss=loss))[0]["text"] != usual["text"]
    spoken: list[dict[str, float]] = [{"codebooks": 1}, {"semantic": 1.0}, {"semantic": 100.0, "acoustic": 50.0}]
    for number, loss in enumerate(spoken):
        assert log_of(run(f"audio{number}", steps=1, loss=loss))[0]["audio"] != usual["audio"]
    weighed = log_of(run("both", steps=1, loss={"text": 0.5, "audio": 2.0}))[0]
    assert weighed["loss"] == pytest.approx(0.5 * usual["text"] + 2 * usual["audio"])


def test_numbers_that_are_not_finite(run: Any) -> None:
    with pytest.raises(MoshivisError, match="step 2: the loss is (nan|inf).*on_nan=skip"):
        run("stop", optimiser={"rate": 1e30, "warmup": 0})
    skipping = log_of(run("skip", optimiser={"rate": 1e30, "warmup": 0}, on_nan="skip"))
    assert [line["skipped_steps"] for line in skipping] == [0, 1, 2]
    assert skipping[0]["loss"] > 0 and [line["loss"] for line in skipping[1:]] == [None, None]  # JSON knows no NaN


def test_a_damaged_shard_stops_or_is_skipped(
    run: Any, tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    folder = pack(tmp_path / "damaged", tiny_model, tiny_tokenizer)
    file = sorted(folder.glob("speech-*.parquet"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    both = [{"path": str(folder), "kind": kind} for kind in ("speech", "speechless")]
    with pytest.raises(ShardError):
        run("stop", data__datasets=both, steps=6)
    skipping = log_of(run("stop", data__datasets=both, data__on_corrupt="skip", steps=6))  # as the error advises
    assert skipping[-1]["skipped_samples"] > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_stops_or_is_skipped(
    workers: int, run: Any, tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    """Many samples show a picture that is cut off: others are learnt from, and held out."""
    files = {"red": picture("red"), "blue": picture("blue")[:-30]}
    folder = pack(tmp_path / "damaged", tiny_model, tiny_tokenizer, picture=files.__getitem__)
    both = [{"path": str(folder), "kind": kind} for kind in ("speech", "speechless")]
    changes = {"data__datasets": both, "data__workers": workers, "steps": 4}
    with pytest.raises(InputError, match="of the training data: this picture is damaged"):
        run("stop", **changes)
    validation = {"every": 4, "datasets": both, "rows": 4, "samples": 2}
    out = run("skip", **changes, data__on_corrupt="skip", validation=validation)
    assert log_of(out)[-1]["skipped_samples"] > 4
    shown = {json.loads(file.read_text())["picture"] for file in out.glob("samples/*/*.json")}
    assert picture_key(picture("red")) in shown and len(shown) <= 2


def test_a_full_disk_keeps_the_older_checkpoint(tiny_folder: Path, packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(recipe(tiny_folder, packed, out, {"steps": 2}), quiet=True)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, usual[1]))  # no file may be larger: writing fails
        with pytest.raises(CheckpointError, match=r"step 4 could not be written.*step-00000002 is kept.*Make room"):
            train(recipe(tiny_folder, packed, out, {"steps": 5}), quiet=True)
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000002"]
        train(recipe(tiny_folder, packed, out, {"steps": 5, "checkpoint.on_error": "skip"}), quiet=True)
        assert [line["failed_checkpoints"] for line in log_of(out)] == [0, 0, 0, 0, 1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, usual[1]))
        with pytest.raises(CheckpointError, match=r"adapters.safetensors could not be written.*goes on from the last"):
            train(recipe(tiny_folder, packed, out, {"steps": 2}), quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    train(recipe(tiny_folder, packed, out, {"steps": 5}), quiet=True)
    assert sorted(path.name for path in (out / "checkpoints").iterdir())[-1] == "step-00000005"


def test_what_is_kept_for_speed_and_for_reading_does_not_stop_a_run(
    run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A log and a cache of features that cannot be written, as on a full disk."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").symlink_to(tmp_path / "gone" / "log.jsonl")
    out = run("run", features__folder="/dev/null/features")
    assert (out / "adapters.safetensors").is_file()
    assert len([line for line in caplog.messages if "features are not kept on disk" in line]) == 1


needs_compiler = pytest.mark.skipif(compiler() is None, reason="not installed: a C++ compiler")


@pytest.mark.parametrize(
    ("train", "compiled"), [("lora", False), ("all", False), pytest.param("all", True, marks=needs_compiler)]
)
def test_validation_measures_and_generates(run: Any, packed: Path, train: str, compiled: bool) -> None:
    both = [{"path": str(packed), "kind": kind} for kind in ("speech", "speechless")]
    more = {"loss__codebooks": 3} if train == "all" else {}
    options = {"every": 2, "datasets": both, "rows": 5, "samples": 2}
    out = run(validation=options, precision="bf16", train=train, compile=compiled, **more)
    (found,) = log_of(out, "held_out_speech_text")
    assert found["step"] == 2 and found["held_out_speech_audio"] > 0 and found["held_out_speechless_text"] > 0
    assert len(found["held_out_speech_gates"]) == 2 and 0 < found["held_out_speech_gate"] < 1
    folder = out / "samples" / "step-00000002"
    assert len(list(folder.iterdir())) == 2 + 2 + 2  # transcripts of both kinds, and sound of one
    spoken = json.loads((folder / "speech-0.json").read_text())
    wave, rate = soundfile.read(folder / "speech-0.wav")
    assert spoken["wanted"] == "the star is red" and rate == 24000 and wave.shape[1] == 2
    assert len(json.loads((folder / "speechless-1.json").read_text())["pieces"]) > 0


class Silent(Sampling):
    """A model that never says a word."""

    def __call__(self, logits: Tensor, stream: int) -> Tensor:
        return torch.full(logits.shape[:1], PADDING) if stream == 0 else super().__call__(logits, stream)


def test_a_model_that_answers_nothing_is_validated_all_the_same(
    tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    answer(Assistant(tiny_model, tiny_tokenizer, Silent()), speechless_sample(tiny_tokenizer, 0), None, tmp_path / "a")
    assert json.loads((tmp_path / "a.json").read_text())["said"] == ""


def test_gates_are_averaged_over_what_saw_a_picture(run: Any, packed: Path) -> None:
    """How samples are put together does not matter: a part may have no picture at all."""
    both = [{"path": str(packed), "kind": kind} for kind in ("speech", "speechless")]
    gates = []
    for at_once in (16, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moshivis.training.validation.ROWS_AT_ONCE", at_once)
            out = run(f"{at_once}", validation={"every": 2, "datasets": both, "rows": 10}, steps=2)
        gates += [line["held_out_speech_gate"] for line in log_of(out, "held_out_speech_gate")]
    assert gates[0] == pytest.approx(gates[1], rel=1e-4)


def test_new_adapters_begin_as_loud_as_asked_for(run: Any) -> None:
    quiet, loud = (
        weights(run(f"scale-{scale}", adapters__fresh=True, adapters__out_scale=scale, optimiser__rate=0.0))
        for scale in (1.0, 8.0)
    )
    for name, weight in quiet.items():
        assert torch.equal(loud[name], weight * (8.0 if ".out." in name else 1.0)), name


def test_trackers(run: Any) -> None:
    out = run(report={"every": 1, "tensorboard": True})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(log_of(out)))
    for package in ("wandb", "trackio"):
        if importlib.util.find_spec(package) is None:
            with pytest.raises(InputError, match=f"report.{package} needs the package {package}"):
                run(package, report={package: "project"})


@pytest.mark.parametrize("p_audio", [0.25, 0], ids=["both kinds", "written alone"])
def test_fsdp_trains_everything_on_two_ranks(p_audio: float, tiny_folder: Path, packed: Path, tmp_path: Path) -> None:
    """Without speech the depth transformer is not trained, but sharded and saved all the same.

    After a validation of averaged weights it goes on with the last ones.
    """
    changes = {"steps": 3, "train": "all", "loss.codebooks": 3, "parallel": "fsdp", "optimiser.ema": 0.5}
    changes |= {"data.p_audio": p_audio, "validation.every": 1, "validation.rows": 4}
    changes["validation.datasets"] = [{"path": str(packed), "kind": "speechless"}]
    train(recipe(tiny_folder, packed, tmp_path / "one", changes), quiet=True)
    run_ranks(recipe_data(tiny_folder, packed, tmp_path / "two", changes), 2)
    one, two = (load_model(tmp_path / name / "model").model.state_dict() for name in ("one", "two"))
    assert losses(log_of(tmp_path / "two")) == pytest.approx(losses(log_of(tmp_path / "one")), rel=1e-4)
    assert mean_difference(one, two) < 1e-4
    # On another number of ranks it goes on from the same checkpoint.
    train(recipe_from_dict(recipe_data(tiny_folder, packed, tmp_path / "two", {**changes, "steps": 4})), quiet=True)


def test_samples_are_cut_to_the_limit(run: Any) -> None:
    short = log_of(run("short", data__max_frames=10, data__max_tokens=10, data__bucket=5))
    assert all(line["padded"] <= 8 * 10 for line in short)
    assert np.mean([line["tokens"] for line in short]) < np.mean([line["tokens"] for line in log_of(run("long"))])
