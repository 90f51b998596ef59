"""Adapters alone: to a file, onto their base and no other, and merged."""

from __future__ import annotations

import copy
import dataclasses
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moshivis.adapters.gated_cross_attention import GatedCrossAttention
from moshivis.checkpoints.adapters import load_adapters, read_adapters, replace_adapters, save_adapters
from moshivis.checkpoints.fingerprint import base_fingerprint
from moshivis.checkpoints.folder import SAMPLING, empty_model, save_folder
from moshivis.checkpoints.load import load_model, load_released
from moshivis.checkpoints.released_config import ENCODERS, RELEASED, config_from_released
from moshivis.checkpoints.save_released import config_to_released, save_released
from moshivis.cli import main
from moshivis.config import AdapterConfig, CodecConfig, CodecTransformerConfig, ModelConfig
from moshivis.errors import CheckpointError
from moshivis.inference.conversation import Assistant, load
from moshivis.inference.sampling import Sampling
from moshivis.model import MoshiVis
from moshivis.presets import PRESETS
from moshivis.speech_lm.tokenizer import TextTokenizer
from moshivis.training.run import train
from training_support import pack, picture, recipe

CONFIG = AdapterConfig(sharing="kv", gate="shared")


@pytest.fixture
def other(tiny_model: MoshiVis) -> MoshiVis:
    """The tiny model with other adapters than it came with."""
    model = copy.deepcopy(tiny_model)
    torch.manual_seed(1)
    replace_adapters(model, CONFIG, "rms_norm", "cpu")
    return model.requires_grad_(False)


@pytest.fixture
def file(other: MoshiVis, tmp_path: Path) -> Path:
    path = tmp_path / "adapters.safetensors"
    tensors = dict(other.trainable_parameters())
    save_adapters(path, other.config, tensors, base=base_fingerprint(other), dtype=torch.float32)
    return path


def test_they_come_back_on_their_base(file: Path, other: MoshiVis, tiny_folder: Path) -> None:
    model = load_model(tiny_folder).model
    load_adapters(file, model)
    assert model.config.adapters == CONFIG
    theirs = dict(other.named_parameters())
    assert all(parameter.equal(theirs[name]) for name, parameter in model.named_parameters())
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())


def test_the_fingerprint_is_of_the_base_alone(other: MoshiVis, tiny_model: MoshiVis) -> None:
    assert base_fingerprint(other) == base_fingerprint(tiny_model)
    half = copy.deepcopy(tiny_model).bfloat16()
    assert base_fingerprint(half.float()) == base_fingerprint(half)
    changed = copy.deepcopy(tiny_model)
    changed.speech_lm.text_head.weight.data[:, 1:] += 1  # a tenth of its numbers is looked at
    assert base_fingerprint(changed) != base_fingerprint(tiny_model)
    changed = copy.deepcopy(tiny_model)
    changed.speech_lm.text_head.weight.data[-1, -1] += 1
    assert base_fingerprint(changed) != base_fingerprint(tiny_model)


def test_another_base_is_refused_and_stays_as_it_was(file: Path, tiny_model: MoshiVis) -> None:
    model = copy.deepcopy(tiny_model)
    model.speech_lm.text_head.weight.data[0, 0] += 1
    with pytest.raises(CheckpointError, match="was trained on another base than tiny"):
        load_adapters(file, model)
    assert model.config == tiny_model.config


def test_damaged_files(file: Path, tiny_model: MoshiVis, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        read_adapters(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no adapters .*is it a whole model"):
        read_adapters(next(tiny_folder.glob("*.safetensors")))
    tensors, found = load_file(file), read_adapters(file)
    metadata = {
        "format": "moshivis-adapters",
        "version": "1",
        "adapters": json.dumps(dataclasses.asdict(CONFIG)),
        "projection_norm": '"rms_norm"',
        "base": found.base,
        "lora_scale": "1.0",
    }
    broken = tmp_path / "broken.safetensors"
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, broken, metadata=metadata)
    with pytest.raises(CheckpointError, match=f"missing: {name}"):
        load_adapters(broken, copy.deepcopy(tiny_model))
    lonely = {"speech_lm.backbone.layers.0.self_attn.in_proj.lora_down": torch.zeros(2, 32)}
    save_file({**tensors, **lonely}, broken, metadata=metadata)
    with pytest.raises(CheckpointError, match="missing: .*in_proj.lora_up"):
        load_adapters(broken, copy.deepcopy(tiny_model))
    lonely = {"speech_lm.backbone.layers.0.self_attn.out_proj.lora_up": torch.zeros(32, 32)}
    save_file({**tensors, **lonely}, broken, metadata=metadata)
    with pytest.raises(CheckpointError, match="missing: .*out_proj.lora_down"):
        load_adapters(broken, copy.deepcopy(tiny_model))
    flat = {"speech_lm.backbone.layers.0.self_attn.out_proj.lora_down": torch.zeros(())}
    save_file({**tensors, **flat}, broken, metadata=metadata)
    with pytest.raises(CheckpointError, match="not of this model: .*out_proj.lora_down"):
        load_adapters(broken, copy.deepcopy(tiny_model))
    for key, value in (
        ("adapters", '{"colour": 1}'),
        ("adapters", "[]"),
        ("projection_norm", '"foo"'),
        ("lora_scale", "NaN"),
    ):
        save_file(tensors, broken, metadata={**metadata, key: value})
        with pytest.raises(CheckpointError, match="does not describe its adapters"):
            read_adapters(broken)
    save_file(tensors, broken, metadata={**metadata, "adapters": json.dumps({"layers": [99]})})
    with pytest.raises(CheckpointError, match="no model can be built"):
        load_adapters(broken, copy.deepcopy(tiny_model))
    broken.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="is damaged"):
        read_adapters(broken)


def test_the_command_merges_and_the_merged_model_is_the_same(file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "merged"
    shutil.copytree(tiny_folder, base)
    (base / SAMPLING).write_text('{"text_temperature": 0}')
    assert main(["adapters", "merge", str(file), str(out), "--model", str(base)]) == 0
    merged, stacked = load(out), load(base, adapters=file)
    assert merged.sampling == stacked.sampling == Sampling(text_temperature=0)
    said = [it.conversation(picture("red")).say_text("what colour is the star") for it in (merged, stacked)]
    assert said[0] == said[1]
    assert f"Merged from {base} and {file.name}." in (out / "README.md").read_text()
    assert main(["adapters", "merge", str(file), str(out), "--model", str(base)]) == 2


def test_a_merged_model_is_stored_as_its_base_is(
    tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    base, file = tmp_path / "base", tmp_path / "adapters.safetensors"
    save_folder(base, tiny_model, tiny_tokenizer.model, "", dtype=torch.float16)
    model = load_model(base).model
    doubled = {name: 2 * parameter for name, parameter in model.trainable_parameters()}
    save_adapters(file, model.config, doubled, base=base_fingerprint(model))
    assert main(["adapters", "merge", str(file), str(tmp_path / "merged"), "--model", str(base)]) == 0
    (before,), (after,) = ([*folder.glob("*.safetensors")] for folder in (base, tmp_path / "merged"))
    stored, merged = load_file(before), load_file(after)
    assert {name: tensor.dtype for name, tensor in merged.items()} == {n: t.dtype for n, t in stored.items()}
    assert {torch.float16, torch.float32} == {tensor.dtype for tensor in merged.values()}  # the latter are buffers
    assert all(tensor.equal(merged[name]) == (name not in doubled) for name, tensor in stored.items())


def test_a_merge_that_cannot_be_written(
    file: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, usual[1]))  # no file may be larger, as on a full disk
        assert main(["adapters", "merge", str(file), str(tmp_path / "full"), "--model", str(tiny_folder)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert "cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "full").exists()


def test_talk_takes_them(file: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "red.png"
    image.write_bytes(picture("red"))
    words = ["talk", str(image), "--text", "what colour is the star", "--model", str(tiny_folder), "--json"]
    assert main([*words, "--adapters", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["form"] == "written"
    assert main([*words, "--adapters", str(tmp_path / "none.safetensors")]) == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "adapters",
    [
        AdapterConfig(),
        AdapterConfig(sharing="none", stream_keys="first"),
        AdapterConfig(gate="shared", layers=(1, 3)),
        AdapterConfig(gate_activation="tanh", gate_input="constant", start=2, end=9),
        AdapterConfig(gate="none"),
        None,
    ],
)
def test_the_released_keys_say_what_the_config_says(adapters: AdapterConfig | None) -> None:
    config = dataclasses.replace(ModelConfig(), adapters=adapters)
    flat = config_to_released(config)
    read = config_from_released(flat)
    if adapters is None:  # then nothing sees, and how does not matter
        read = dataclasses.replace(read, vision=config.vision)
    assert read == config
    # Where the release's own default is another, it must be written.
    assert flat["num_extra_tokens"] == RELEASED["num_extra_tokens"]


@pytest.mark.parametrize(
    "fields",
    [
        {"gate": "none", "gate_activation": "tanh", "gate_input": "constant"},
        {"gate_scale": (0.1, 0.2)},
        {"stream_keys": "first"},
        {"sharing": "none", "layers": (0,)},
        {"start": 0, "end": 2},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_changes_nothing_keeps_no_adapters_from_the_released_layout(fields: dict[str, Any]) -> None:
    config = dataclasses.replace(ModelConfig(), adapters=AdapterConfig(**fields))
    read = config_from_released(config_to_released(config))
    assert config.adapters is not None and read.adapters is not None and read.adapters != config.adapters
    torch.manual_seed(0)
    one, other = (GatedCrossAttention(adapters, 16, 2, 2) for adapters in (config.adapters, read.adapters))
    other.load_state_dict(one.state_dict())
    x, image = torch.randn(1, 4, 16), torch.randn(1, 3, 16)
    updates = []
    for it in (one, other):
        context = it.step_context(it.new_state(1), it.encode(image, streaming=True), steps=4)
        updates.append(context(0, x))
    assert updates[0] is not None and updates[1] is not None and updates[0].any() and updates[0].equal(updates[1])


def test_what_the_release_cannot_say_is_refused(tiny_model: MoshiVis, tmp_path: Path) -> None:
    own = dataclasses.replace(ModelConfig(), adapters=AdapterConfig(sharing="none"))
    with pytest.raises(CheckpointError, match="share nothing .* all blocks use the first one's; use --layout moshivis"):
        config_to_released(own)
    kv = dataclasses.replace(ModelConfig(), adapters=CONFIG)
    with pytest.raises(CheckpointError, match="cannot describe this model's adapters"):
        config_to_released(kv)
    with pytest.raises(CheckpointError, match="knows no image encoder but siglip_gemma2_224"):
        save_released(tmp_path / "released", tiny_model, b"")
    with pytest.raises(CheckpointError, match="needs a tokenizer"):
        save_released(tmp_path / "released", tiny_model, None)


@pytest.mark.parametrize(
    "change",
    [{"latent_norm": True}, {"transformer": CodecTransformerConfig(context=125)}, {"sample_rate": 12000}],
    ids=lambda c: next(iter(c)),
)
def test_a_codec_that_would_come_back_as_another_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    codec = dataclasses.replace(CodecConfig(), **change)
    model = empty_model(dataclasses.replace(PRESETS["moshika-vis"], codec=codec))
    with pytest.raises(CheckpointError, match="no place for a codec whose"):
        save_released(tmp_path / "released", model, b"")


@pytest.fixture
def describable(
    tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A base in our layout that the released one can describe, and data for it."""
    was = tiny_model.config
    depth = dataclasses.replace(was.speech_lm.depth, norm="real_rms_norm_f32")
    transformer = dataclasses.replace(was.codec.transformer, context=250, num_heads=8)
    config = dataclasses.replace(
        was,
        codec=dataclasses.replace(was.codec, decoder="seanet", transformer=transformer, latent_norm=False),
        speech_lm=dataclasses.replace(was.speech_lm, depth=depth),
        adapters=AdapterConfig(sharing="none", stream_keys="first"),
        vision=dataclasses.replace(was.vision, hidden_size=16),
    )
    monkeypatch.setitem(ENCODERS, "tiny", config.vision)
    monkeypatch.setattr("moshivis.checkpoints.save_released.RELEASED_CODEC", config.codec)
    torch.manual_seed(2)
    model = MoshiVis(config)
    base = tmp_path / "base"
    save_folder(base, model, tiny_tokenizer.model, "", sampling={"text_top_k": 5}, dtype=torch.bfloat16)
    return base, pack(tmp_path / "data", load_model(base).model, tiny_tokenizer)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": "lora", "adapters": {"sharing": "qkv", "gate": "shared"}},
        {"adapters": {"sharing": "qkv", "gate": "none", "gate_activation": "tanh"}},
    ],
    ids=["the base's", "LoRA", "gate: none"],
)
def test_what_was_trained_is_merged_to_the_released_layout(
    changes: dict[str, Any], describable: tuple[Path, Path], tmp_path: Path
) -> None:
    base, data = describable
    out = tmp_path / "released"
    file = train(recipe(base, data, tmp_path / "run", {"steps": 2, **changes}), quiet=True)
    assert main(["adapters", "merge", str(file), str(out), "--model", str(base), "--layout", "released"]) == 0
    stacked = load_model(base, dtype=torch.bfloat16).model
    frozen = stacked.speech_lm.backbone.layers[0].state_dict()["self_attn.in_proj.weight"].clone()
    load_adapters(file, stacked)
    merged = load_released(out, codec=stacked.config.codec)
    theirs = stacked.state_dict()
    assert all(tensor.equal(theirs[name]) for name, tensor in merged.model.state_dict().items())
    same = merged.model.speech_lm.backbone.layers[0].state_dict()["self_attn.in_proj.weight"].equal(frozen)
    assert same == ("train" not in changes)
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in load_file(out / "mimi.safetensors").values()} == {torch.float32}
    assert merged.sampling == {"text_top_k": 5} and merged.tokenizer is not None
    said = []
    for model in (stacked, merged.model):
        assistant = Assistant(model.float(), merged.tokenizer, Sampling(text_temperature=0))
        said.append(assistant.conversation(picture("red")).say_text("what colour is the star"))
    assert said[0] == said[1]


def test_unshared_adapters_that_were_trained_anew_are_not_merged_to_the_released_layout(
    describable: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, data = describable
    file = train(recipe(base, data, tmp_path / "run", {"steps": 1, "adapters.fresh": True}), quiet=True)
    assert len(load(base, adapters=file).look(picture("red")).keys) == 2  # as while it was trained
    words = ["adapters", "merge", str(file), str(tmp_path / "released"), "--model", str(base)]
    assert main([*words, "--layout", "released"]) == 2
    assert "share nothing" in capsys.readouterr().err and not (tmp_path / "released").exists()
