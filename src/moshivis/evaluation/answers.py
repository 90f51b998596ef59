"""Ask a model many questions at once: one batch row a conversation, spoken or written.

Every conversation opens with the assistant's greeting. Spoken: the question is played once the greeting is over, then
silence, until the answer has ended. Written: the question's tokens follow the greeting's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moshivis.adapters.gated_cross_attention import ImageKV
from moshivis.inference.activity import AUDIBLE, loudness
from moshivis.inference.duplex import Duplex
from moshivis.inference.sampling import Sampling
from moshivis.inference.talk import GREETING_FRAMES, GREETING_PAUSE
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import END_OF_PADDING, PADDING, SPECIAL, TextTokenizer

WORD_PAUSE = 14  # frames without a word after which a spoken answer has ended
ANSWER_FRAMES = 150  # an answer that is not over by now runs away; four things take up to 107 frames to describe
WRITTEN_TOKENS = 48  # of a greeting or an answer, at most


@dataclass(frozen=True)
class Answer:
    text: str
    ended: bool  # False if it went on for too long
    reaction_frames: int | None = None  # from the end of the question to the first word; None if there was none
    audio: np.ndarray | None = None  # [T] the assistant's speech, from the end of the question on
    tokens: tuple[tuple[int, int], ...] = ()  # of a spoken answer: frames from the end of the question, text token
    greeted: bool = True  # the assistant spoke first


def ask_spoken(
    model: MoshiVis,
    tokenizer: TextTokenizer,
    image: ImageKV | None,
    questions: Sequence[np.ndarray],
    sampling: Sampling,
) -> list[Answer]:
    """Answers to spoken questions, each a wave [T] at the codec's rate; `image` has one row a question."""
    rows = [_Row(_frames(wave, model.config.codec.frame_size)) for wave in questions]
    duplex = Duplex(model)
    state = duplex.new_state(len(rows))
    while not all(row.over for row in rows):
        wave = torch.from_numpy(np.stack([row.next_frame() for row in rows]))[:, None]
        frame = duplex.step(state, wave, image, sampling)
        for row, token, audio in zip(rows, frame.text.tolist(), frame.audio[:, 0].numpy(), strict=True):
            row.take(token, audio)
    return [row.answer(tokenizer) for row in rows]


class _Row:
    """One spoken conversation, frame by frame."""

    def __init__(self, question: np.ndarray):
        self.question = question  # [F, samples]
        self.frame = 0
        self.asked: int | None = None  # frame at which the question started
        self.last_word = -1
        self.spoke = False
        self.pause = 0  # frames without word and sound
        self.tokens: list[tuple[int, int]] = []
        self.first: int | None = None
        self.audio: list[np.ndarray] = []
        self.over = self.ended = self.greeted = False

    @property
    def answering(self) -> int:
        """Frames since the question ended; negative before."""
        return -1 if self.asked is None else self.frame - self.asked - len(self.question)

    def next_frame(self) -> np.ndarray:
        heard_out = self.spoke and self.pause >= GREETING_PAUSE
        if self.asked is None and (heard_out or self.frame >= GREETING_FRAMES):
            self.asked, self.greeted = self.frame, self.last_word >= 0
        position = -1 if self.asked is None else self.frame - self.asked
        inside = 0 <= position < len(self.question)
        return self.question[position] if inside else np.zeros_like(self.question[0])

    def take(self, token: int, audio: np.ndarray) -> None:
        if token not in SPECIAL:
            self.last_word = self.frame
        silent = token in SPECIAL and loudness(audio) < AUDIBLE
        self.spoke |= not silent
        self.pause = self.pause + 1 if silent else 0
        if self.asked is not None and not self.over:
            if self.answering >= 0:
                self.audio.append(audio)
            if token not in SPECIAL:
                self.tokens.append((self.answering, token))
                self.first = self.answering if self.first is None else self.first
            quiet_since = max(self.last_word, self.asked + len(self.question))
            self.ended = bool(self.tokens) and self.frame - quiet_since >= WORD_PAUSE
            self.over = self.ended or self.answering >= ANSWER_FRAMES
        self.frame += 1

    def answer(self, tokenizer: TextTokenizer) -> Answer:
        audio = np.concatenate(self.audio) if self.audio else None
        text = tokenizer.decode([token for _, token in self.tokens])
        return Answer(text, self.ended, self.first, audio, tuple(self.tokens), self.greeted)


def ask_written(
    model: MoshiVis, tokenizer: TextTokenizer, image: ImageKV | None, questions: Sequence[str], sampling: Sampling
) -> list[Answer]:
    """Answers to written questions; `image` has one row a question."""
    config = model.config.speech_lm
    asked = [tokenizer.encode(question) for question in questions]
    greeted = [False] * len(asked)
    greeting = 0  # tokens so far
    position = [0] * len(asked)
    answers: list[list[int]] = [[] for _ in asked]
    over = [False] * len(asked)
    state = model.speech_lm.new_state(len(asked))
    adapters = None if model.adapters is None else model.adapters.new_state(len(asked))
    tokens = torch.full((len(asked), config.num_streams, 1), -1)
    tokens[:, 0] = config.text_card
    with torch.inference_mode():
        while not all(over):
            context = None
            if image is not None and model.adapters is not None and adapters is not None:
                context = model.adapters.step_context(adapters, image)
            logits = model.speech_lm.step(state, tokens, context).text_logits[:, 0]
            chosen = sampling(logits, 0).tolist()
            greeting += 1
            for row, token in enumerate(chosen):
                if greeted[row] and position[row] < len(asked[row]):
                    tokens[row, 0] = asked[row][position[row]]
                    position[row] += 1
                    continue
                if not greeted[row]:
                    greeted[row] = token == PADDING or greeting >= WRITTEN_TOKENS
                elif not over[row]:
                    answers[row].append(token)
                    over[row] = token == PADDING or len(answers[row]) >= WRITTEN_TOKENS
                tokens[row, 0] = token
    return [
        Answer(tokenizer.decode(answer), answer[-1] == PADDING, 0 if END_OF_PADDING in answer else None)
        for answer in answers
    ]


def _frames(wave: np.ndarray, size: int) -> np.ndarray:
    """[T] -> whole frames [F, size], the last one filled up with silence."""
    padded = np.pad(wave.astype(np.float32), (0, -len(wave) % size))
    return padded.reshape(-1, size)


def image_rows(model: MoshiVis, pixels: Tensor) -> ImageKV:
    """Keys and values of pixels [B, 3, H, W], one picture a row."""
    assert model.vision is not None and model.adapters is not None
    with torch.inference_mode():
        return model.adapters.encode(model.vision(pixels), streaming=True)
