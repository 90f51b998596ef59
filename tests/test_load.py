"""Which models `load` finds, and what it says about those that it does not."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import moshivis
from moshivis.checkpoints.folder import SAMPLING, save_folder
from moshivis.errors import CheckpointError, InputError
from moshivis.inference.conversation import Assistant, load
from moshivis.inference.sampling import Sampling
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import TextTokenizer


def test_the_package_door_loads(tiny_folder: Path) -> None:
    assert moshivis.load(str(tiny_folder)).config.name == "tiny"


def test_an_unknown_name_lists_what_exists() -> None:
    with pytest.raises(InputError, match=r"no model 'maxi'.*\(mini\).*only when asked"):
        load("maxi")
    with pytest.raises(InputError, match="no model 'someone/something'"):
        load("someone/something")


def test_a_device_that_is_not_there() -> None:
    for device in ("gpu", "cuda:77"):
        with pytest.raises(InputError, match=f"the device '{device}' cannot be used here"):
            load("maxi", device=device)


def test_damaged_folders(tiny_folder: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(tiny_folder, tmp_path / name))

    broken = copy("broken")
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged"):
        load(broken)
    dumb = copy("dumb")
    (dumb / "tokenizer.model").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load(dumb)
    more = copy("more")
    shutil.copy(next(more.glob("*.safetensors")), more / "adapters.safetensors")  # not of the model's files
    load(more)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match="holds no model"):
        load(empty)


def test_a_tokenizer_of_another_model(tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer) -> None:
    lm = dataclasses.replace(tiny_model.config.speech_lm, text_card=99)
    with pytest.raises(CheckpointError, match="48 pieces, but the model predicts 99"):
        Assistant(MoshiVis(dataclasses.replace(tiny_model.config, speech_lm=lm)), tiny_tokenizer)
    codec = dataclasses.replace(tiny_model.config.codec, sample_rate=16000)
    with pytest.raises(CheckpointError, match="runs at 16000 Hz; one can only talk at 24000 Hz"):
        Assistant(MoshiVis(dataclasses.replace(tiny_model.config, codec=codec)), tiny_tokenizer)


def test_a_folder_can_say_how_to_sample(tiny_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "sampled"))
    (folder / SAMPLING).write_text('{"text_temperature": 0, "audio_top_k": 5}')
    assert load(folder).sampling == Sampling(text_temperature=0, audio_top_k=5)
    for wrong in ('{"speed": 1}', '{"text_top_k": "many"}'):
        (folder / SAMPLING).write_text(wrong)
        with pytest.raises(CheckpointError, match="must give numbers for some of audio_temperature"):
            load(folder)
    for wrong in ('{"text_top_k": 25.0}', '{"audio_top_k": 600}', '{"text_temperature": -1}'):
        (folder / SAMPLING).write_text(wrong)
        with pytest.raises(CheckpointError, match=r"sampling\.json: \w+ must be a (whole )?number from 0"):
            load(folder)


def test_where_bfloat16_is_emulated_pictures_are_looked_at_in_float32(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, models = Image.new("RGB", (50, 40), "red"), []
    for able in (True, False):
        monkeypatch.setattr("moshivis.inference.conversation.has_bfloat16", lambda kind, able=able: able)
        models.append(load(tiny_folder, dtype=torch.bfloat16))
        assert models[-1].emulated is not able and not load(tiny_folder).emulated
    plain, emulating = models
    vision = emulating.model.vision
    assert vision is not None and {parameter.dtype for parameter in vision.parameters()} == {torch.float32}
    seen, same = emulating.look(picture), plain.look(picture)
    assert seen.keys[0].dtype == seen.values[0].dtype == torch.bfloat16
    torch.testing.assert_close(seen.keys[0], same.keys[0], rtol=0.1, atol=0.1)
    assert not seen.keys[0].equal(same.keys[0])
    emulating.conversation(picture).step(np.zeros(1920))


def test_a_model_without_adapters_does_not_look(
    tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    blind = MoshiVis(dataclasses.replace(tiny_model.config, name="blind", adapters=None))
    save_folder(tmp_path / "blind", blind, tiny_tokenizer.model, "")
    assistant = load(tmp_path / "blind")
    with pytest.raises(InputError, match="cannot look at a picture"):
        assistant.conversation(Image.new("RGB", (50, 40)))
    conversation = assistant.conversation()
    assert [conversation.step(np.zeros(1920)).gate for _ in range(3)] == [0, 0, 0]
