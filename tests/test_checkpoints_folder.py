"""Saving and loading: our folder, a released folder, the Hub; and what is said of a checkpoint that is not whole."""

from __future__ import annotations

import io
import json
import shutil
import stat
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import yaml
from safetensors.torch import load_file, save_file

from moshivis.checkpoints import released_config
from moshivis.checkpoints.folder import INDEX, load_folder, save_folder
from moshivis.checkpoints.load import find_folder, load_config, load_model
from moshivis.config import (
    AdapterConfig,
    BackboneConfig,
    CodecConfig,
    CodecTransformerConfig,
    DepthConfig,
    ModelConfig,
    QuantizerConfig,
    SEANetConfig,
    SpeechLMConfig,
    VisionConfig,
)
from moshivis.errors import CheckpointError
from moshivis.model import MoshiVis

CONFIG = ModelConfig(
    name="small",
    codec=CodecConfig(
        dimension=8,
        seanet=SEANetConfig(channels=(4, 4), ratios=(2,), residual_layers=(1,)),
        transformer=CodecTransformerConfig(num_layers=1, num_heads=2, feed_forward=8, context=8),
        quantizer=QuantizerConfig(dimension=4, bins=8, num_codebooks=2),
        frame_rate=6000.0,
        num_codebooks=2,
    ),
    speech_lm=SpeechLMConfig(
        text_card=24,
        audio_card=8,
        own_codebooks=2,
        user_codebooks=2,
        delays=(0, 0, 1, 0, 1),
        backbone=BackboneConfig(dim=16, num_heads=2, num_layers=2, feed_forward=40, context=8),
        depth=DepthConfig(dim=8, num_heads=2, num_layers=1, feed_forward=12),
    ),
    adapters=AdapterConfig(sharing="kv", layers=(1,)),
    vision=VisionConfig(image_size=28, patch_size=14, hidden_size=12, num_layers=1, num_heads=2, mlp_size=16),
)
CARD = "# A small model\n"


@pytest.fixture(scope="module")
def model() -> MoshiVis:
    torch.manual_seed(0)
    model = MoshiVis(CONFIG)
    for buffer in model.codec.buffers():
        buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer() -> bytes:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red circle and a blue star", "what colour is it"] * 10),
        model_writer=file,
        vocab_size=24,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path, model: MoshiVis, tokenizer: bytes) -> Path:
    save_folder(tmp_path / "model", model, tokenizer, CARD, shard_bytes=8000)
    return tmp_path / "model"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# our folder ----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(folder: Path, model: MoshiVis) -> None:
    loaded = load_model(folder)
    assert loaded.model.config == CONFIG and loaded.tokenizer is not None
    assert len(shards(folder)) > 3
    assert all(len(load_file(file)) == 1 or file.stat().st_size < 16000 for file in shards(folder))
    state = loaded.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert not any(tensor.is_meta for tensor in [*loaded.model.parameters(), *loaded.model.buffers()])
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (folder / "README.md").read_text() == CARD
    assert len({stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}) == 1  # safetensors' own are 0600
    total = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert json.loads((folder / INDEX).read_text())["metadata"]["total_size"] == total


def test_a_loaded_model_computes_the_same(folder: Path, model: MoshiVis) -> None:
    loaded = load_model(folder).model
    for one in (model, loaded):
        one.requires_grad_(False)  # frozen weights may be laid out in another way, and add up in another order
    pixels, tokens, wave = torch.randn(1, 3, 28, 28), torch.randint(0, 8, (1, 5, 6)), torch.randn(1, 1, 64)
    with torch.no_grad():
        for which in (model, loaded):
            assert which.adapters is not None and which.vision is not None
        outputs = [m(tokens, m.adapters.encode(m.vision(pixels))).text_logits for m in (model, loaded)]  # type: ignore
        assert torch.equal(*outputs)
        assert torch.equal(loaded.codec.decode(loaded.codec.encode(wave)), model.codec.decode(model.codec.encode(wave)))


def test_half_precision_on_disk(tmp_path: Path, model: MoshiVis) -> None:
    save_folder(tmp_path / "half", model, None, CARD, dtype=torch.bfloat16)
    stored = load_file(shards(tmp_path / "half")[0])
    buffers = {name for name, _ in model.named_buffers()}
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if name in buffers else torch.bfloat16), name
    assert load_model(tmp_path / "half").tokenizer is None
    as_stored, asked = load_folder(tmp_path / "half"), load_model(tmp_path / "half", dtype=torch.float16).model
    for found, dtype in (
        (as_stored, torch.bfloat16),
        (asked, torch.float16),
        (load_model(tmp_path / "half").model, None),
    ):
        assert {p.dtype for p in found.speech_lm.parameters()} == {dtype or torch.float32}
        assert {p.dtype for p in found.codec.parameters()} == {torch.float32}


def test_a_file_of_several_dtypes_becomes_a_model_of_one(tmp_path: Path, model: MoshiVis) -> None:
    save_folder(tmp_path / "mixed", model, None, CARD, dtype=torch.bfloat16)
    (shard,) = shards(tmp_path / "mixed")
    tensors = load_file(shard)
    name = next(name for name in tensors if name.startswith("vision."))
    save_file(tensors | {name: tensors[name].float()}, shard)
    loaded = load_folder(tmp_path / "mixed").named_parameters()
    assert {p.dtype for name, p in loaded if name.startswith("vision.")} == {torch.bfloat16}


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    folder: Path, model: MoshiVis, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(FileExistsError):
        save_folder(folder, model, None, CARD)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    monkeypatch.setattr("moshivis.checkpoints.folder.to_dict", lambda config: {"impossible": {1, 2}})
    with pytest.raises(TypeError):
        save_folder(folder.parent / "other", model, None, CARD)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


# checkpoints that are not whole --------------------------------------------------------------------------------------


def test_a_truncated_shard_is_named(folder: Path) -> None:
    file = shards(folder)[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
        load_model(folder)


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"PK\x03\x04 not tensors at all", b"\x80\x04\x95 a pickle"])
def test_a_file_of_another_kind_is_named(folder: Path, content: bytes) -> None:
    shards(folder)[0].write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged or is no safetensors file"):
        load_model(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    file = shards(folder)[2]
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name} is missing"):
        load_model(folder)


def test_missing_surplus_and_misshapen_tensors_are_named(folder: Path) -> None:
    file = next(path for path in shards(folder) if "speech_lm.text_head.weight" in load_file(path))
    tensors = load_file(file)
    tensors["something.else"] = torch.zeros(2)
    del tensors["speech_lm.text_head.weight"]
    name = next(iter(tensors))
    tensors[name] = torch.zeros(3, 3, 3)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as raised:
        load_model(folder)
    message = str(raised.value)
    assert "missing: speech_lm.text_head.weight [24, 16]" in message
    assert "not of this model: something.else" in message
    assert f"of the wrong shape: {name} [3, 3, 3] instead of" in message


def test_a_tensor_in_two_shards_is_named(folder: Path) -> None:
    first, second = shards(folder)[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file(load_file(second) | {name: tensors[name]}, second)
    with pytest.raises(CheckpointError, match=f"holds {name}, which another file"):
        load_model(folder)


def edit(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_a_config_that_describes_no_model_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"version": 2}, "version 2 of the format"),
        ({"model": {"size": 3}}, "ModelConfig has no field size"),
        ({"model": {"speech_lm": {"delays": [0, 1]}}}, "no model can be built"),
        ({"model": None}, "describes no model"),
        ({"model": {"codec": 5}}, "ModelConfig.codec must be a mapping, not 5"),
        ({"model": {"speech_lm": {"text_card": "32000"}}}, "SpeechLMConfig.text_card must be of type int, not '32000'"),
        ({"model": {"speech_lm": {"backbone": {"positions": "Rope"}}}}, "positions must be one of rope, none"),
        ({"model": {"speech_lm": {"backbone": {"context": None}}}}, "context must be of type int, not None"),
        ({"model": {"speech_lm": {"delays": [0, "1"]}}}, "delays must be of type int, not '1'"),
        ({"model": {"adapters": {"gate_activation": "sigmod"}}}, "gate_activation must be one of"),
        ({"model": {"adapters": {"gate_scale": [0.1]}}}, "gate_scale must have 2 values, not 1"),
        ({"model": {"adapters": {"gate_scale": [0.1, 0]}}}, "gate_scale needs a width above 0"),
    ):
        edit(folder / "config.json", config | change)
        with pytest.raises(CheckpointError, match=message):
            load_model(folder)
    (folder / "config.json").write_text('{"format": "moshi')
    with pytest.raises(CheckpointError, match=r"config\.json is not readable as JSON"):
        load_model(folder)


def test_an_index_that_leads_out_of_the_folder_is_refused(folder: Path) -> None:
    shutil.copy(shards(folder)[0], folder.parent / "outside.safetensors")
    edit(folder / INDEX, {"weight_map": {"a": "../outside.safetensors"}})
    with pytest.raises(CheckpointError, match="names a file outside"):
        load_model(folder)
    edit(folder / INDEX, {"weight_map": [1]})
    with pytest.raises(CheckpointError, match="holds no weight_map"):
        load_model(folder)


# where models are looked for -----------------------------------------------------------------------------------------


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model 'no-such-model'"):
        load_model("no-such-model")
    with pytest.raises(CheckpointError, match="write hf://kyutai/some-model"):
        load_model("kyutai/some-model")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="is a file; a model is a folder"):
        load_model(tmp_path / "weights.bin")
    with pytest.raises(CheckpointError, match="holds no model"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="named owner/name"):
        load_model("hf://../../etc")


def test_the_hub_is_asked_only_if_allowed_and_never_for_a_pickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[str]]] = []

    def fetch(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        if repository == "owner/gone":
            raise OSError("404 not found")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(CheckpointError):
        find_folder("owner/name")
    assert not asked
    assert load_model("hf://owner/name").model.config == CONFIG
    assert find_folder("owner/name", allow_download=True) == folder
    with pytest.raises(CheckpointError, match="owner/gone cannot be fetched from the Hugging Face Hub: 404"):
        load_model("hf://owner/gone")
    assert {repository for repository, _ in asked} == {"owner/name", "owner/gone"}
    patterns = {pattern for _, patterns in asked for pattern in patterns}
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".pkl", "*")) for pattern in patterns)


def test_a_config_is_fetched_without_weights(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(repository: str, allow_patterns: list[str]) -> str:
        assert not any(fnmatch("model.safetensors", pattern) for pattern in allow_patterns)
        return {"owner/ours": str(folder)}.get(repository, str(tmp_path))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.setattr("huggingface_hub.file_exists", lambda repository, name: repository == "owner/released")
    assert load_config("hf://owner/ours") == CONFIG
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({**released_config.RELEASED, "context": 99}))
    assert load_config("owner/released", allow_download=True).speech_lm.backbone.context == 99
    with pytest.raises(CheckpointError, match="holds no model"):
        load_config("hf://owner/other")


def test_a_folder_on_disk_goes_before_a_repository_of_that_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "owner").mkdir()
    folder.rename(folder.parent / "owner" / "name")
    assert find_folder("owner/name", allow_download=True) == Path("owner/name")
