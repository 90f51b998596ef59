"""The model that comes with the package, as its users meet it."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moshivis.checkpoints.load import Checkpoint, load_model
from moshivis.evaluation.recogniser import word_error_rate
from moshivis.mini import voices
from moshivis.mini.__main__ import WEIGHTS
from moshivis.mini.card import EMBEDDED_CARD
from moshivis.mini.grammar import normalise
from moshivis.mini.listener import load_listener
from moshivis.mini.measure import fresh_cases, measure


@pytest.fixture(scope="module")
def embedded() -> Checkpoint:
    return load_model(WEIGHTS)


def test_weights_are_small_and_nothing_but_data(embedded: Checkpoint) -> None:
    assert sum(file.stat().st_size for file in WEIGHTS.iterdir()) < 35_000_000
    assert {file.suffix for file in WEIGHTS.iterdir()} == {".safetensors", ".json", ".model", ".md"}
    assert embedded.tokenizer is not None
    assert len(embedded.tokenizer) == embedded.model.config.speech_lm.text_card
    assert (WEIGHTS / "README.md").read_text() == EMBEDDED_CARD


@pytest.mark.skipif(
    any(shutil.which(program) is None for program in ("espeak-ng", "flite", "rsvg-convert")),
    reason="not installed: espeak-ng, flite or librsvg2-bin",
)
def test_new_scenes_are_answered_as_well_as_stated(embedded: Checkpoint) -> None:
    result = measure(embedded, load_listener(WEIGHTS), count=36, seed=99)
    # what the README states, less the scatter of so few scenes
    assert result["text"]["accuracy"] >= 0.85
    seven = [right for family, right in result["text"]["families"].items() if family not in ("knowledge", "small_talk")]
    assert len(seven) == 7 and result["text"]["visual"] == pytest.approx(sum(seven) / 7)
    assert result["text"]["describe"]["relative_cider"] >= 0.8 and result["text"]["describe"]["right"] >= 0.7
    assert result["text"]["read"] >= 0.75
    assert result["spoken"]["accuracy"] >= 0.75 and result["spoken_unheard_voice"]["accuracy"] >= 0.5
    assert result["pictures"]["svg"]["accuracy"] >= 0.8 and result["pictures"]["photo"]["accuracy"] >= 0.8
    assert result["spoken"]["greeted"] >= 0.9
    assert result["spoken"]["speech_word_error"] <= 0.18
    assert result["spoken"]["silent_or_runaway"] <= 0.1
    assert 80 <= result["spoken"]["reaction_ms_median"] <= 800


@pytest.mark.skipif(shutil.which("festival") is None, reason="speech program not installed: festival")
@pytest.mark.parametrize("silence", [0.0, 0.05, 0.3])
def test_the_listener_hears_the_assistants_original_voice(silence: float) -> None:
    """What is measured of produced speech is the speech: the listener itself misses next to nothing, ends included."""
    listener = load_listener(WEIGHTS)
    rng = random.Random(7)
    texts = [case.turn.answer for case in fresh_cases(36, seed=21)]
    heard = []
    for spoken in voices.synthesise(voices.ASSISTANT_VOICE, texts, rng):
        ends = np.zeros(int(silence * voices.SAMPLE_RATE), np.float32)
        heard.append(listener.transcribe(torch.from_numpy(np.concatenate([ends, spoken.audio, ends]))))
    assert word_error_rate([normalise(text).split() for text in texts], heard) <= 0.05


def test_cases_are_fresh_and_repeatable() -> None:
    assert fresh_cases(18, seed=1) == fresh_cases(18, seed=1)
    assert fresh_cases(18, seed=1) != fresh_cases(18, seed=2)
    assert len({case.turn.family for case in fresh_cases(18, seed=1)}) == 9


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="speech program not installed: espeak-ng")
def test_a_question_in_a_wav_file_gets_a_spoken_answer(tmp_path: Path) -> None:
    (case,) = fresh_cases(1, seed=5)
    from moshivis.audio import read_audio, write_wav
    from moshivis.mini.drawing import draw_scene

    picture, question, answer = tmp_path / "scene.png", tmp_path / "question.wav", tmp_path / "answer.wav"
    draw_scene(case.scene, random.Random(0)).save(picture)
    (spoken,) = voices.synthesise(voices.USER_VOICES[0], [case.turn.question], random.Random(0))
    write_wav(question, spoken.audio)
    command = [
        sys.executable,
        "-c",
        "import sys; from moshivis.cli import main; sys.exit(main())",
        "talk",
        str(picture),
        "--audio",
        str(question),
        "--out",
        str(answer),
    ]
    run = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    told = json.loads(run.stdout)
    assert told["text"] and told["frames"] > 20 and told["pieces"]
    assert len(read_audio(answer)) == told["frames"] * 1920
