"""Conversations of the miniature world as training samples, written as plain text ("speechless").

A sample is the text of both sides in one stream, end-of-padding where the assistant begins and padding where it ends:
both are tokens that the spoken form has too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from moshivis.mini import grammar
from moshivis.mini.dialogues import (
    RETOLD_SHARE,
    SCENE_FAMILIES,
    SCENELESS_SHARE,
    TOLD_SHARE,
    WRITING_SHARE,
    ask,
    choose_family,
)
from moshivis.mini.questions import SCENELESS_FAMILIES, Turn
from moshivis.mini.scenes import Scene, said_scene, sample_picture, sample_scene, sample_written_scene
from moshivis.mini.timeline import IGNORE, Sample, word_weight
from moshivis.speech_lm.tokenizer import END_OF_PADDING, PADDING, TextTokenizer

# In writing, much of pretraining is a scene followed by facts about it, as answers tell them, but without questions:
# every few tokens a fact of the right one of several things is due.
RECITAL_SHARE, RECITED = 0.45, 8


class Written:
    """Composes written samples of `length` tokens."""

    def __init__(self, tokenizer: TextTokenizer, length: int, num_codebooks: int, user_weight: float):
        self.tokenizer, self.length, self.levels, self.user_weight = tokenizer, length, num_codebooks, user_weight

    def without_picture(self, rng: random.Random) -> Sample:
        if rng.random() < RECITAL_SHARE:
            return self._recital(rng)
        return self._conversation(rng, self._turns_without_picture(rng))

    def with_picture(self, scene: Scene, rng: random.Random, families: tuple[str, ...]) -> Sample:
        return self._conversation(rng, self._turns_with_picture(scene, rng, families))

    def _turns_without_picture(self, rng: random.Random) -> Iterator[tuple[str, Turn]]:
        told = rng.random() < TOLD_SHARE
        scene = None if told else sample_picture(rng)
        while True:
            if rng.random() < SCENELESS_SHARE:
                turn = ask(Scene(()), rng.choice(SCENELESS_FAMILIES), rng)
                if turn is not None:
                    yield "", turn
                continue
            telling, about = "", scene
            if told and (scene is None or rng.random() < RETOLD_SHARE):
                about = said_scene(_scene_to_tell(rng, (1, 2, 2, 2, 3)), rng)
                telling = ", ".join(grammar.scene_phrases(about, rng)) + ". "
            assert about is not None
            turn = ask(about, choose_family(about, rng, SCENE_FAMILIES), rng)
            if turn is not None:
                scene = about
                yield telling, turn

    def _turns_with_picture(
        self, scene: Scene, rng: random.Random, families: tuple[str, ...]
    ) -> Iterator[tuple[str, Turn]]:
        while True:
            turn = grammar.ask(scene, choose_family(scene, rng, families), rng)
            if turn is not None:
                yield "", turn

    def _recital(self, rng: random.Random) -> Sample:
        """Scenes that the user tells, each followed by some of its facts in any order; cut at the end."""
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < self.length:
            scene = said_scene(_scene_to_tell(rng, (2, 2, 3, 4)), rng)
            facts = grammar.scene_facts(scene, rng, RECITED)
            told = self.tokenizer.encode(", ".join(grammar.scene_phrases(scene, rng)) + ".")
            said, graded = self._said(grammar.capitalise(", ".join(facts)) + ".")
            tokens += told + said
            weights += [self.user_weight] * len(told) + graded
        return self._sample(np.array(tokens[: self.length]), np.array(weights[: self.length]))

    def _conversation(self, rng: random.Random, turns: Iterator[tuple[str, Turn]]) -> Sample:
        tokens, weights = self._said(rng.choice(grammar.GREETINGS))
        for told, turn in turns:
            question = told + turn.question
            if rng.random() < 0.4:
                question = grammar.normalise(question)  # as people type: no capitals, no punctuation
            asked = self.tokenizer.encode(question)
            answered, graded = self._said(turn.answer)
            if len(tokens) + len(asked) + len(answered) > self.length:
                break
            tokens += asked + answered
            weights += [self.user_weight] * len(asked) + graded
        missing = self.length - len(tokens)
        return self._sample(np.array(tokens + [PADDING] * missing), np.array(weights + [0.0] * missing))

    def _said(self, text: str) -> tuple[list[int], list[float]]:
        """Tokens of a turn of the assistant, and their weights."""
        words = text.split()
        pieces = [self.tokenizer.encode(word) for word in words]
        weights = [word_weight(before) for before, after in zip(["", *words], pieces, strict=False) for _ in after]
        return [END_OF_PADDING, *(piece for word in pieces for piece in word), PADDING], [1.0, *weights, 1.0]

    def _sample(self, text: np.ndarray, weight: np.ndarray) -> Sample:
        none = np.full((self.levels, self.length), -1)
        heard, audible = np.full(self.length, IGNORE), np.zeros(self.length, bool)
        return Sample(text, none, none, heard, weight.astype(np.float32), audible)


def _scene_to_tell(rng: random.Random, counts: tuple[int, ...]) -> Scene:
    return sample_written_scene(rng) if rng.random() < WRITING_SHARE else sample_scene(rng, rng.choice(counts))
