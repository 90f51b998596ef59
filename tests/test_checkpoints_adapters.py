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

from moshivis.checkpoints.adapters import load_adapters, read_adapters, replace_adapters, save_adapters
from moshivis.checkpoints.fingerprint import base_fingerprint
from moshivis.checkpoints.folder import SAMPLING, empty_model
from moshivis.checkpoints.load import load_model, load_released
from moshivis.checkpoints.released_config import ENCODERS, config_from_released
from moshivis.checkpoints.save_released import config_to_released, save_released
from moshivis.cli import main
from moshivis.config import AdapterConfig, CodecConfig, CodecTransformerConfig, ModelConfig
from moshivis.errors import CheckpointError
from moshivis.inference.conversation import load
from moshivis.inference.sampling import Sampling
from moshivis.model import MoshiVis
from moshivis.presets import PRESETS
from moshivis.speech_lm.tokenizer import TextTokenizer
from training_support import picture

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
    changed.speech_lm.text_head.weight.data[0, 0] += 1
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
    save_file(tensors, broken, metadata={**metadata, "adapters": '{"colour": 1}'})
    with pytest.raises(CheckpointError, match="does not describe its adapters"):
        read_adapters(broken)
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
    assert main(["adapters", "merge", str(file), str(out), "--model", str(base)]) == 2


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
    if adapters is None:
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, projection_norm=None))
    assert config_from_released(config_to_released(config)) == config


def test_what_the_release_cannot_say_is_refused(tiny_model: MoshiVis, tmp_path: Path) -> None:
    kv = dataclasses.replace(ModelConfig(), adapters=CONFIG)
    with pytest.raises(CheckpointError, match="cannot describe this model's adapters"):
        config_to_released(kv)
    with pytest.raises(CheckpointError, match="knows no image encoder but siglip_gemma2_224"):
        save_released(tmp_path / "released", tiny_model, None)


@pytest.mark.parametrize(
    "change", [{"latent_norm": True}, {"transformer": CodecTransformerConfig(context=125)}], ids=lambda c: next(iter(c))
)
def test_a_codec_that_would_come_back_as_another_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    codec = dataclasses.replace(CodecConfig(), **change)
    model = empty_model(dataclasses.replace(PRESETS["moshika-vis"], codec=codec))
    with pytest.raises(CheckpointError, match="no place for a codec whose"):
        save_released(tmp_path / "released", model, None)


def test_merged_to_the_released_layout(
    other: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = AdapterConfig(gate="shared")
    encoder = dataclasses.replace(other.config.vision, hidden_size=16)
    lm = dataclasses.replace(
        other.config.speech_lm,
        depth=dataclasses.replace(other.config.speech_lm.depth, norm="real_rms_norm_f32"),
    )
    transformer = dataclasses.replace(other.config.codec.transformer, context=250, num_heads=8)
    codec = dataclasses.replace(other.config.codec, decoder="seanet", transformer=transformer, latent_norm=False)
    config = dataclasses.replace(other.config, adapters=adapters, speech_lm=lm, codec=codec, vision=encoder)
    monkeypatch.setitem(ENCODERS, "tiny", encoder)
    model = MoshiVis(config)
    save_released(tmp_path / "released", model, tiny_tokenizer.model, {"text_top_k": 5})
    checkpoint = load_released(tmp_path / "released", codec=codec)
    loaded = checkpoint.model
    assert checkpoint.sampling == {"text_top_k": 5}
    assert dataclasses.replace(loaded.config, codec=codec) == config
    theirs = model.state_dict()
    assert all(tensor.equal(theirs[name]) for name, tensor in loaded.state_dict().items())
