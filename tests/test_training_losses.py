"""The losses against their formulas written out, and batches however they are split."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from conftest import tiny_config
from moshivis.config import SpeechLMConfig
from moshivis.data.sample import Sample, Speaker
from moshivis.errors import InputError
from moshivis.speech_lm.streams import ZERO_TOKEN
from moshivis.training.batch import collate, split
from moshivis.training.losses import Denominators, audio_sum, codebook_weights, text_sum, total
from moshivis.training.recipe import LossRecipe

LM: SpeechLMConfig = tiny_config(48).speech_lm
LOSS = LossRecipe(padding=0.5, user=0.25, codebooks=2, semantic=100.0, acoustic=1.0, text=2.0, audio=3.0)


def sample(rng: np.random.Generator, steps: int, *, speech: bool = True, **more: np.ndarray | str) -> Sample:
    speaker = rng.integers(0, 2 if speech else 3, steps).astype(np.uint8)
    text = np.where(speaker == Speaker.NOBODY, 3, rng.integers(4, 48, steps)).astype(np.int32)
    audio = rng.integers(0, 32, (6, steps)).astype(np.int16) if speech else None
    return Sample(text=text, speaker=speaker, audio=audio, **more)  # type: ignore[arg-type]


def test_the_formulas_written_out() -> None:
    rng = np.random.default_rng(0)
    graded = rng.random(9) < 0.5
    speech = sample(rng, 9, text_graded=graded, audio_graded=~graded)
    silent = sample(rng, 5, speech=False)
    parts = [collate([s], LM, LOSS, limit=100, bucket=4) for s in (speech, silent)]
    torch.manual_seed(0)
    text_logits = [torch.randn(1, part.text.shape[1], 48) for part in parts]
    audio_logits = torch.randn(1, parts[0].text.shape[1], 2, 32)

    above = below = 0.0
    for made, logits in zip((speech, silent), text_logits, strict=True):
        for t in range(len(made)):
            weight = {0: 0.5, 1: 1.0, 2: 0.25}[int(made.speaker[t])]
            if made.text_graded is not None and not made.text_graded[t]:
                weight = 0.0
            above += weight * -math.log(float(logits[0, t].softmax(-1)[made.text[t]]))
            below += weight
    text = above / below
    above = below = 0.0
    assert speech.audio is not None
    for k, weight in enumerate((100.0, 1.0)):
        for frame in np.flatnonzero(~graded).tolist():
            t = frame + LM.delays[1 + k]
            if t < len(audio_logits[0]):  # padding to the bucket leaves room for delayed tokens
                above += weight * -math.log(float(audio_logits[0, t, k].softmax(-1)[speech.audio[k, frame]]))
                below += weight
    audio = above / below

    denominators = Denominators.of(parts, LOSS)
    whole = torch.zeros(())
    for part, logits in zip(parts, text_logits, strict=True):
        numerator = text_sum(logits[0], part.text[0].clamp(max=47), part.text_weight[0])
        spoken = torch.zeros(())
        if part.kind == "speech":
            target, mask = part.audio[0].T, part.audio_graded[0].T
            spoken = audio_sum(audio_logits[0], target, mask, codebook_weights(LOSS, 2))
        whole = whole + total(numerator, spoken, denominators, LOSS)
    assert float(whole) == pytest.approx(2 * text + 3 * audio, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(1, 5), st.integers(0, 1000))
def test_the_split_changes_no_sum(lengths: list[int], parts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [sample(rng, steps) for steps in lengths]
    pieces = split(samples, parts)
    assert sorted(map(id, sum(pieces, []))) == sorted(map(id, samples))
    assert len(pieces) == min(parts, len(samples)) and max(map(len, pieces)) - min(map(len, pieces)) <= 1
    apart = [collate(piece, LM, LOSS, limit=24, bucket=8) for piece in pieces]
    together = [collate(samples, LM, LOSS, limit=24, bucket=24)]
    assert sum(part.steps for part in apart) == sum(lengths)
    difference = Denominators.of(apart, LOSS).sums - Denominators.of(together, LOSS).sums
    assert difference.abs().max() < 1e-9


def test_shapes_are_multiples_of_the_bucket_and_cut_at_the_limit() -> None:
    rng = np.random.default_rng(0)
    part = collate([sample(rng, 5), sample(rng, 9)], LM, LOSS, limit=30, bucket=8)
    assert part.inputs.shape == (2, 7, 16) and part.audio.shape == (2, 2, 16)
    assert not part.text_weight[0, 5:].any() and not part.audio_graded[0, :, 6:].any()
    assert part.steps == 14
    cut = collate([sample(rng, 50)], LM, LOSS, limit=30, bucket=8)
    assert cut.text.shape[1] == 30 and cut.steps == 30


def test_speechless_rows_have_no_audio_at_all() -> None:
    part = collate([sample(np.random.default_rng(0), 6, speech=False)], LM, LOSS, limit=30, bucket=4)
    assert (part.inputs[:, 1:] == ZERO_TOKEN).all()
    assert part.inputs[0, 0, 0] == LM.text_card
    assert not part.audio_graded.any()


def test_unknown_codes_are_no_targets() -> None:
    made = sample(np.random.default_rng(0), 6)
    assert made.audio is not None
    made.audio[0, 2] = -1
    part = collate([made], LM, LOSS, limit=30, bucket=4)
    assert part.audio_graded[0, 0].tolist() == [True, True, False, True, True, True, False, False]
    assert part.audio_graded[0, 1].tolist() == [False, True, True, True, True, True, True, False]


def test_the_first_codebooks_of_the_depth_transformer_do_not_need_the_others(tiny_model: torch.nn.Module) -> None:
    lm = tiny_model.get_submodule("speech_lm")
    torch.manual_seed(0)
    hidden, text, audio = torch.randn(4, 32), torch.randint(0, 48, (4,)), torch.randint(0, 32, (4, 3))
    whole = lm.depth_logits(hidden, text, audio)  # type: ignore[operator]
    for count in (1, 2):
        few = lm.depth_logits(hidden, text, audio[:, :count])  # type: ignore[operator]
        torch.testing.assert_close(few, whole[:, :count])
    assert F.cross_entropy(whole.flatten(0, 1), audio.flatten()).isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": np.full(6, 48, np.int32)}, "noise holds text ids from 48 to 48, the model's vocabulary has 48"),
        ({"audio": np.zeros((8, 6), np.int16)}, r"noise has audio codes \[8, 6\], the model needs \[6, 6\]"),
        ({"audio": np.full((6, 6), 32, np.int16)}, "noise holds audio id 32, the model's codebooks have 32"),
    ],
)
def test_a_sample_of_another_model_is_named(change: dict[str, np.ndarray], message: str) -> None:
    made = sample(np.random.default_rng(0), 6, origin="noise")
    with pytest.raises(InputError, match=message):
        collate([Sample(**{**vars(made), **change})], LM, LOSS, limit=30, bucket=4)
