"""Released folders: what is loaded, and what is refused, in what words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moshivis.checkpoints import mimi, released_config
from moshivis.checkpoints.load import load_model, load_released
from moshivis.checkpoints.released import to_released
from moshivis.errors import CheckpointError
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import TextTokenizer
from test_checkpoints_folder import CONFIG

MIMI = "tokenizer-e351c8d8-checkpoint125.safetensors"

FLAT = {
    **released_config.RELEASED,
    "dim": 16,
    "num_heads": 2,
    "num_layers": 2,
    "hidden_scale": 2.5,
    "context": 8,
    "text_card": 24,
    "audio_card": 8,
    "n_q": 4,
    "dep_q": 2,
    "delays": [0, 0, 1, 0, 1],
    "depformer_dim": 8,
    "depformer_num_heads": 2,
    "depformer_num_layers": 1,
    "depformer_dim_feedforward": 12,
    "encoder_name": "tiny",
}


@pytest.fixture
def released(tmp_path: Path, tiny_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, MoshiVis]:
    monkeypatch.setitem(released_config.ENCODERS, "tiny", CONFIG.vision)
    config = dataclasses.replace(released_config.config_from_released(FLAT), codec=CONFIG.codec)
    torch.manual_seed(1)
    model = MoshiVis(config).eval()
    state = model.state_dict()
    language = {name: tensor for name, tensor in state.items() if not name.startswith("codec.")}
    file = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in to_released(language, config).items()}
    save_file(file, tmp_path / "model.safetensors")
    save_file(mimi.to_released(model.codec.state_dict()), tmp_path / MIMI)
    (tmp_path / "tokenizer_spm_32k_3.model").write_bytes(tiny_tokenizer.model)
    (tmp_path / "moshika-vis.yaml").write_text(yaml.safe_dump(FLAT))
    return tmp_path, model


def test_a_released_folder_is_loaded(released: tuple[Path, MoshiVis]) -> None:
    folder, model = released
    loaded = load_released(folder, dtype=torch.float32, codec=CONFIG.codec)
    assert loaded.tokenizer is not None and loaded.model.config == model.config
    for name, tensor in model.state_dict().items():
        expected = tensor if name.startswith("codec.") else tensor.to(torch.bfloat16).float()
        assert torch.equal(loaded.model.state_dict()[name], expected), name
    as_stored = load_released(folder, codec=CONFIG.codec).model
    assert {p.dtype for p in as_stored.speech_lm.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in as_stored.codec.parameters()} == {torch.float32}


def test_a_nested_released_configuration_counts(released: tuple[Path, MoshiVis]) -> None:
    folder, model = released
    (folder / "moshika-vis.yaml").write_text(yaml.safe_dump({"model": FLAT | {"xa_gating": "tanh"}}))
    adapters = load_released(folder, codec=CONFIG.codec).model.config.adapters
    assert adapters is not None and model.config.adapters is not None
    assert (adapters.gate_activation, model.config.adapters.gate_activation) == ("tanh", "sigmoid")


def test_a_released_folder_with_another_codec_is_refused(released: tuple[Path, MoshiVis]) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer-e351c8d8-checkpoint125\.safetensors do not fit"):
        load_model(released[0])  # without being told of the small codec, the released one is expected


@pytest.mark.parametrize(
    ("suffix", "message"), [(".model", "must hold one SentencePiece model"), ("125.safetensors", "must hold one Mimi")]
)
def test_a_released_folder_that_lacks_a_file_is_refused(
    released: tuple[Path, MoshiVis], suffix: str, message: str
) -> None:
    folder = released[0]
    next(folder.glob(f"*{suffix}")).unlink()
    with pytest.raises(CheckpointError, match=message):
        load_released(folder, codec=CONFIG.codec)


def test_a_released_folder_of_another_size_is_refused(released: tuple[Path, MoshiVis]) -> None:
    folder = released[0]
    (folder / "moshika-vis.yaml").write_text(yaml.safe_dump({**FLAT, "num_layers": 3}))
    with pytest.raises(CheckpointError, match=r"missing: llm\.transformer\.layers\.2\."):
        load_released(folder, codec=CONFIG.codec)
    (folder / "moshika-vis.yaml").write_text("a: [1, 2")
    with pytest.raises(CheckpointError, match="not readable as YAML"):
        load_released(folder, codec=CONFIG.codec)


def test_a_mimi_file_with_the_older_names_is_loaded(released: tuple[Path, MoshiVis]) -> None:
    folder, model = released
    older = {
        name.replace("._initialized", ".inited").replace("embedding_sum", "embed_avg"): tensor
        for name, tensor in load_file(folder / MIMI).items()
    }
    assert not older.keys() <= mimi.to_released(model.codec.state_dict()).keys()
    save_file(older, folder / MIMI)
    loaded = load_released(folder, codec=CONFIG.codec).model.codec.state_dict()
    assert all(tensor.equal(loaded[name]) for name, tensor in model.codec.state_dict().items())
    name = next(name for name in older if name.endswith("embed_avg"))
    save_file({**older, name.replace("embed_avg", "embedding_sum"): older[name].clone()}, folder / MIMI)
    with pytest.raises(CheckpointError, match="is there by two names"):
        load_released(folder, codec=CONFIG.codec)


def test_quantised_weights_are_not_taken_for_what_they_stand_for(released: tuple[Path, MoshiVis]) -> None:
    folder, _ = released
    tensors = load_file(folder / "model.safetensors")
    name = "llm.transformer.layers.0.gating.linear_in.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name} as I8; quantised weights are not read"):
        load_released(folder, codec=CONFIG.codec)


@pytest.mark.parametrize(("name", "program"), [("audio_embs.0.weight", "MLX"), ("emb.0.weight", "candle")])
def test_the_releases_for_other_programs_are_named(name: str, program: str, released: tuple[Path, MoshiVis]) -> None:
    folder, _ = released
    save_file({name: torch.zeros(9, 16, dtype=torch.bfloat16)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"is the release for {program}.*; fetch the one for PyTorch"):
        load_model(folder)


def test_of_several_configurations_one_describes_the_model(released: tuple[Path, MoshiVis]) -> None:
    folder, model = released
    (folder / "shown.yaml").write_text("- a list\n")
    (folder / "same.yml").write_text(yaml.safe_dump(FLAT))
    assert load_released(folder, codec=CONFIG.codec).model.config == model.config
    (folder / "other.yml").write_text(yaml.safe_dump(FLAT | {"xa_gating": "tanh"}))
    with pytest.raises(CheckpointError, match="moshika-vis.yaml and other.yml in .* describe two models"):
        load_released(folder, codec=CONFIG.codec)
    (folder / "other.yml").unlink()
    for file in ("moshika-vis.yaml", "same.yml"):
        (folder / file).write_text(yaml.safe_dump(FLAT | {"hidden_scale": float("inf")}))
    with pytest.raises(CheckpointError, match="describes no model: cannot convert float infinity"):
        load_released(folder, codec=CONFIG.codec)
