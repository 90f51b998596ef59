"""How the miniature's users are heard: takes of their clips, and an assistant that can be interrupted."""

from __future__ import annotations

import random

import numpy as np
import pytest

from mini_support import FAMILIES, needs_speech
from moshivis.mini.codes import FRAME, SPEEDS, TAIL_FRAMES, TAKES, ClipCodes
from moshivis.mini.dialogues import Spoken
from moshivis.mini.pace import FRAME_SECONDS
from moshivis.mini.recipe import CODEBOOKS
from moshivis.mini.scenes import Scene
from moshivis.mini.timeline import TEXT_LEAD, Reply, Timeline
from moshivis.speech_lm.tokenizer import PADDING, TextTokenizer

pytestmark = needs_speech


def test_a_users_clip_is_heard_in_several_takes_the_assistants_in_one(spoken_codes: ClipCodes) -> None:
    rng = random.Random(0)
    for index, clip in enumerate(spoken_codes.clips.clips):
        takes = {id(take): take for take in (spoken_codes.take(index, rng) for _ in range(60))}.values()
        assert len(takes) == (TAKES if clip.role == "user" else 1)
        for take in takes:
            assert take.codes.dtype == np.uint8 and take.codes.shape[0] == spoken_codes.silence.shape[0]
            end = take.when(clip.samples / 24_000)
            assert take.codes.shape[1] == int(np.ceil(round(end / FRAME_SECONDS, 3))) + TAIL_FRAMES
            assert 0 <= take.start < FRAME / 24_000
            if clip.role == "user":
                assert SPEEDS[0] <= take.speed <= SPEEDS[1]
            else:
                assert (take.start, take.speed) == (0, 1) and np.array_equal(take.codes, spoken_codes[index])


def test_words_are_heard_when_the_take_says_them(spoken_codes: ClipCodes, world_tokenizer: TextTokenizer) -> None:
    """Every user word that is said in time has its target, none before its sound."""
    spoken = Spoken(spoken_codes, world_tokenizer, 300, CODEBOOKS, padding_weight=0.3)
    index = next(i for i, clip in enumerate(spoken_codes.clips.clips) if clip.kind == "question")
    line = Timeline(spoken, random.Random(0), 0.0)
    line.user([index], 10)
    words = spoken_codes.clips.clips[index].words
    frames = np.flatnonzero(line.heard != PADDING)
    assert len(frames) == len(words) and frames[0] >= 10 + words[0].end / SPEEDS[1] / FRAME_SECONDS
    assert frames[-1] <= line.user_end + TAIL_FRAMES


def test_an_interrupted_assistant_falls_silent(spoken_codes: ClipCodes, world_tokenizer: TextTokenizer) -> None:
    spoken = Spoken(spoken_codes, world_tokenizer, 300, CODEBOOKS, padding_weight=0.3)
    index = max(spoken.said, key=lambda i: spoken_codes[i].shape[1])
    reply = Reply(spoken_codes.clips.clips[index].text, [index])
    words_cut = 0
    for seed in range(20):
        line = Timeline(spoken, random.Random(seed), 0.5)
        line.assistant(reply, 5)
        text, own, end = line.text.copy(), line.own.copy(), line.end
        falls_in = line.interrupt()
        assert falls_in is not None and 13 <= falls_in <= end - 10
        stop = falls_in + 6
        assert np.array_equal(line.text[: falls_in + 2], text[: falls_in + 2])
        assert (line.text[stop:] == PADDING).all() and line.graded[stop:].all()  # what comes next is learnt from
        words_cut += int((text[stop:] != PADDING).sum())
        assert np.array_equal(line.own[:, : falls_in + 3], own[:, : falls_in + 3])
        assert np.array_equal(line.own[:, stop + TEXT_LEAD :], line.silence[:, stop + TEXT_LEAD :])
    assert words_cut > 20


def test_a_conversation_goes_on_after_an_interruption(
    spoken_codes: ClipCodes, world_tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moshivis.mini.dialogues.INTERRUPTED_SHARE", 1.0)
    spoken = Spoken(spoken_codes, world_tokenizer, 300, CODEBOOKS, padding_weight=0.3)
    for seed in range(5):
        sample = spoken.with_picture(Scene(()), random.Random(seed), FAMILIES)
        assert sample.own.shape == sample.user.shape == (CODEBOOKS, 300)
        assert (sample.text[150:] != PADDING).any() and sample.user.max() < 256
