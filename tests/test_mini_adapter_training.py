"""The miniature learns to see by the trainer that is for everybody's models."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mini_support import FAMILIES, needs_speech
from moshivis.checkpoints.adapters import load_adapters
from moshivis.checkpoints.load import load_model
from moshivis.inference.conversation import EMBEDDED
from moshivis.mini import adapter_training
from moshivis.mini.adapter_training import AboutPictures, General, as_training, train_adapters
from moshivis.mini.batches import spoken_batch, written_batch
from moshivis.mini.codes import ClipCodes
from moshivis.mini.dialogues import Spoken
from moshivis.mini.grammar import GREETINGS
from moshivis.mini.language_training import PADDING_WEIGHT, USER_WEIGHT, Sources
from moshivis.mini.pictures import _draw_chunk, open_pictures
from moshivis.mini.recipe import CODEBOOKS, FRAMES, TOKENS, mini
from moshivis.mini.scenes import Scene
from moshivis.mini.stage import Stage
from moshivis.mini.written_dialogues import Written
from moshivis.speech_lm.tokenizer import END_OF_PADDING, TextTokenizer
from moshivis.training.batch import collate
from moshivis.training.recipe_file import read_recipe


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moshivis.mini.pictures.CHUNK", 12)
        _draw_chunk(folder, 0, 128, 8)
    return folder


@needs_speech
def test_spoken_samples_say_the_same_to_the_trainer(spoken_codes: ClipCodes, world_tokenizer: TextTokenizer) -> None:
    config, loss = mini(len(world_tokenizer)).speech_lm, read_recipe("mini").loss
    spoken = Spoken(spoken_codes, world_tokenizer, FRAMES, CODEBOOKS, PADDING_WEIGHT)
    made = [spoken.with_picture(Scene(()), random.Random(seed), FAMILIES) for seed in range(4)]
    ours = collate([as_training("speech", one, None) for one in made], config, loss, limit=FRAMES, bucket=FRAMES)
    rng = random.Random(0)
    rng.random = lambda: 1.0  # type: ignore[method-assign]  # every sample from its start
    theirs = spoken_batch(made, config, FRAMES, rng)
    assert torch.equal(ours.inputs, theirs.inputs) and torch.equal(ours.text, theirs.text)
    weight = theirs.text_weight.clamp(max=1)  # the trainer takes no weights of single words
    assert loss.speech > 1 and torch.allclose(ours.text_weight, loss.speech * weight)
    late = ours.audio_graded.any(1) & theirs.depth
    assert late.sum() > 0.9 * theirs.depth.sum() > 0
    assert torch.equal(ours.audio[ours.audio_graded], theirs.audio[ours.audio_graded])


def test_written_samples_say_the_same_to_the_trainer(world_tokenizer: TextTokenizer, pictures: Path) -> None:
    config, loss = mini(len(world_tokenizer)).speech_lm, read_recipe("mini").loss
    written = Written(world_tokenizer, TOKENS, CODEBOOKS, USER_WEIGHT)
    made = [
        written.with_picture(scene, random.Random(0), adapter_training.ASKED)
        for scene in open_pictures(pictures).scenes
    ]
    ours = collate([as_training("speechless", one, None) for one in made], config, loss, limit=TOKENS, bucket=TOKENS)
    theirs = written_batch(made, config)
    real = theirs.text_weight > 0
    assert torch.allclose(ours.text_weight, theirs.text_weight.clamp(max=1))
    assert torch.equal(ours.inputs[:, :1][real[:, None]], theirs.inputs[:, :1][real[:, None]])
    assert torch.equal(ours.inputs[:, 1:], theirs.inputs[:, 1:]) and torch.equal(ours.text[real], theirs.text[real])


def test_talk_about_pictures_is_the_same_every_time_and_about_its_own_rows(
    world_tokenizer: TextTokenizer, pictures: Path
) -> None:
    written, drawn = Written(world_tokenizer, TOKENS, CODEBOOKS, USER_WEIGHT), open_pictures(pictures)
    visual = AboutPictures("speechless", written, drawn, range(3, 6))
    again = AboutPictures("speechless", written, drawn, range(3, 6))
    samples = [visual[position] for position in range(30)]
    assert {sample.image for sample in samples} == {"3", "4", "5"}
    assert all(np.array_equal(a.text, again[position].text) for position, a in enumerate(samples))
    wrapped = adapter_training._wrapped("speechless", written, drawn, range(3, 6), TOKENS)
    texts = [wrapped[position] for position in range(60)]
    assert all(len(sample) <= TOKENS and sample.image is not None for sample in texts)
    assert all(sample.text[0] == END_OF_PADDING for sample in texts)  # whatever comes first, it begins with a greeting
    said = [world_tokenizer.decode(sample.text) for sample in texts]
    twice = [text for text in said if sum(text.count(greeting) for greeting in GREETINGS) > 1]
    assert 0 < len(twice) < 30  # other talk came first
    general = General("speechless", written)
    assert general[0].image is None
    with pytest.raises(KeyError):
        general.picture("3")


def test_pictures_of_many_things_are_talked_about_more_often(world_tokenizer: TextTokenizer, pictures: Path) -> None:
    written, drawn = Written(world_tokenizer, TOKENS, CODEBOOKS, USER_WEIGHT), open_pictures(pictures)
    things = [len(scene.objects) for scene in drawn.scenes]
    visual = AboutPictures("speechless", written, drawn, range(len(things)))
    shown = [things[int(sample.image)] for sample in map(visual.__getitem__, range(200)) if sample.image]
    assert len(shown) == 200
    assert np.mean(shown) > np.mean(things) + 0.2


@needs_speech
def test_adapters_trained_by_two_processes_stand_on_the_base(
    tmp_path: Path, spoken_codes: ClipCodes, pictures: Path
) -> None:
    base = EMBEDDED["mini"]
    clips = spoken_codes.clips.folder
    sources = Sources(clips, clips / "codes", next(base.glob("*.model")))
    stage = Stage(tmp_path / "adapters")
    path = train_adapters(stage, base, sources, pictures, workers=2, steps=2)
    assert stage.done
    lines = [json.loads(line) for line in (tmp_path / "adapters" / "log.jsonl").read_text().splitlines()]
    assert any(line.get("step") == 2 and line.get("loss", 0) > 0 for line in lines)
    model = load_model(base).model
    load_adapters(path, model)
    trained = load_file(path)
    assert any(name.startswith("adapters.") for name in trained)
    assert any(name.startswith("vision.projection.") for name in trained)
    assert train_adapters(Stage(tmp_path / "adapters"), base, sources, pictures, workers=2, steps=2) == path
