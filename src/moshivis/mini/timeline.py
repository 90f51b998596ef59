"""A spoken conversation being put together: two channels that clips are laid into, and what is to be learnt of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moshivis.mini import grammar
from moshivis.mini.codes import TAIL_FRAMES
from moshivis.mini.pace import FRAME_SECONDS, word_starts
from moshivis.mini.recipe import CODEC
from moshivis.speech_lm.tokenizer import END_OF_PADDING, PADDING

if TYPE_CHECKING:
    from moshivis.mini.dialogues import Spoken

IGNORE = -100  # targets that carry no loss
HEARD_DELAY = 2  # frames after a user's word ends at which it should have been heard
MISHEARD_SHARE = 0.2  # at most, of the user's codes
TEXT_LEAD = 3  # frames by which the assistant's words precede their sound
OPENING_WORDS = 2  # of a recited fact, which are no targets
# The word after "so" is the only one of an answer that needs a comparison. It is rare among the others and learnt last.
VERDICT_WEIGHT = 4.0
BREATH = 2  # frames between a repeated claim and the answer
SILENCE_SHARE = 0.12  # of the frames in which nobody means the assistant to speak: they train its audio too
TELLING = ("there", "and", "there_text", "and_text")  # kinds of clips that tell scenes


@dataclass(frozen=True)
class Sample:
    """A conversation of T frames (or, written, T tokens)."""

    text: np.ndarray  # [T] the text stream
    own: np.ndarray  # [K, T] the assistant's codes, -1 where there is no audio
    user: np.ndarray  # [K, T]
    heard: np.ndarray  # [T] user words where they have been heard, for the auxiliary loss
    weight: np.ndarray  # [T] weight of the text target
    audible: np.ndarray  # [T] bool, frames whose own audio is a target
    tellings: tuple[int, ...] = ()  # frames at which the user begins to tell a scene: what follows is about that one


@dataclass(frozen=True)
class Reply:
    text: str
    clips: list[int]  # whose words, one after the other, are those of the text


def word_weight(before: str) -> float:
    """Weight of a word that the assistant says after the word `before`."""
    return VERDICT_WEIGHT if before == "so" else 1.0


class Timeline:
    """Two channels being filled with clips, from left to right."""

    def __init__(self, spoken: Spoken, rng: random.Random, speaking: float):
        self.spoken, self.rng = spoken, rng
        self.speaking_turns = speaking
        self.frames, levels = spoken.frames, spoken.levels
        silence, rooms = spoken.codes.silence[:levels], spoken.codes.backgrounds[:, :levels]
        room = rooms[0] if rng.random() < 0.4 else rooms[rng.randrange(len(rooms))]
        self.silence = _tile(silence, self.frames, 8)
        self.own = self.silence.copy()
        self.users = _tile(room, self.frames, rng.randrange(64))
        self.text = np.full(self.frames, PADDING)
        self.heard = np.full(self.frames, PADDING)
        self.weight = np.ones(self.frames, np.float32)  # of the words in the text
        self.graded = np.ones(self.frames, bool)  # the text is a target
        self.audible = np.array([rng.random() < SILENCE_SHARE for _ in range(self.frames)])
        self.mishearing = rng.uniform(0.0, MISHEARD_SHARE)
        self.begin = 0  # first frame of the assistant's last turn
        self.end = 0  # first frame after everything said so far
        self.user_end = 0
        self.cursor = 0  # first frame of the text stream that is still free
        self.last_word = ""
        self.tellings: list[int] = []

    def assistant(self, reply: Reply, at: int) -> None:
        self.begin, words = at, iter(reply.text.split())
        teaches_to_speak = self.rng.random() < self.speaking_turns
        for index in reply.clips:
            frames = self.spoken.codes[index].shape[1]
            heard = index if teaches_to_speak else self.spoken.other(index, self.rng)
            self._put(self.own, self.spoken.codes[heard][: self.spoken.levels, :frames], at + TEXT_LEAD)
            self.audible[at + TEXT_LEAD : at + TEXT_LEAD + frames] = teaches_to_speak
            for start in word_starts(self.spoken.codes.clips.clips[index].words, self.spoken.pace):
                self._write(next(words), at + start)
            at += frames - TAIL_FRAMES
            if self.spoken.codes.clips.clips[index].kind == "repeated_claim":
                at += BREATH
        self.end = max(at, self.cursor) + TEXT_LEAD
        if teaches_to_speak:
            self.graded[max(0, self.begin - 1) : max(at, self.cursor)] = False

    def recite(self, facts: list[str], at: int) -> None:
        """Facts in the text stream only; in the assistant's own channel something else is said meanwhile."""
        own, pauses = at + TEXT_LEAD, self.rng.choice(((0,), (0, 1), (0, 1, 1, 2), (0, 1, 2, 2, 3, 4)))
        opening = at - 1
        for fact in facts:
            words = f"{grammar.capitalise(fact)}.".split()
            claimed = max((number for number, word in enumerate(words, start=1) if word.endswith("?")), default=0)
            for number, word in enumerate(words, start=1):
                self._write(word, at)
                at = self.cursor + self.rng.choice(pauses)
                if number == claimed + OPENING_WORDS:
                    self.graded[opening:at] = False
            opening = self.cursor
            at += self.rng.randint(0, 3)
        self.end = at + TEXT_LEAD
        self.audible[own : self.end] = False
        while own < self.end:
            codes = self.spoken.codes[self.rng.choice(self.spoken.said)][: self.spoken.levels]
            self._put(self.own, codes[:, : self.end - own], own)
            own += codes.shape[1]

    def interrupt(self) -> int | None:
        """Cut the assistant's last turn short; returns the frame where the user falls in, None if it is too short."""
        end = min(self.end, self.frames)
        if end - self.begin < 24:
            return None
        falls_in = self.rng.randint(self.begin + 8, end - 10)
        stop = falls_in + self.rng.randint(3, 6)
        if self.text[stop - 1] == END_OF_PADDING:
            self.text[stop - 1] = PADDING
        self.text[stop:] = PADDING
        self.graded[stop:] = True
        self.own[:, stop + TEXT_LEAD :] = self.silence[:, stop + TEXT_LEAD :]
        self.cursor = stop
        return falls_in

    def user(self, clips: list[int], at: int) -> None:
        if self.spoken.codes.clips.clips[clips[0]].kind in (*TELLING, "whole"):
            self.tellings.append(at)
        for index in clips:
            clip = self.spoken.codes.clips.clips[index]
            take = self.spoken.codes.take(index, self.rng)
            codes = self._misheard(take.codes[: self.spoken.levels])
            self._put(self.users, codes, at)
            for word in clip.words:
                pieces = self.spoken.tokenizer.encode(grammar.normalise(word.text))
                frame = at + int(take.when(word.end) / FRAME_SECONDS) + HEARD_DELAY
                if pieces and frame < self.frames:
                    self.heard[frame] = pieces[0]
            at += codes.shape[1] - TAIL_FRAMES + self.rng.choice((0, 0, 1, 1, 2, 4))
        self.user_end = self.end = at

    def _misheard(self, codes: np.ndarray) -> np.ndarray:
        """Some codes replaced by any others, so that hearing rests on all levels and frames and not on single codes."""
        noise = np.random.default_rng(self.rng.getrandbits(32))
        wrong = noise.random(codes.shape) < self.mishearing
        return np.where(wrong, noise.integers(0, CODEC.quantizer.bins, codes.shape), codes)

    def _write(self, word: str, frame: int) -> None:
        """The pieces of a word, one a frame, from the frame where it is spoken on."""
        frame = max(frame, self.cursor)
        if frame >= self.frames:
            return
        if frame > self.cursor or frame == 0:
            self.text[max(0, frame - 1)] = END_OF_PADDING
        for piece in self.spoken.tokenizer.encode(word):
            if frame < self.frames:
                self.text[frame] = piece
                self.weight[frame] = word_weight(self.last_word)
            frame += 1
        self.cursor, self.last_word = frame, word

    def _put(self, channel: np.ndarray, codes: np.ndarray, at: int) -> None:
        count = max(0, min(codes.shape[1], self.frames - at))
        channel[:, at : at + count] = codes[:, :count]

    def sample(self) -> Sample:
        weight = np.where(self.text == PADDING, self.spoken.padding_weight, self.weight) * self.graded
        return Sample(
            self.text, self.own, self.users, self.heard, weight.astype(np.float32), self.audible, tuple(self.tellings)
        )


def _tile(codes: np.ndarray, frames: int, start: int) -> np.ndarray:
    """[K, F] repeated along time to [K, frames], from frame `start` on."""
    return codes[:, (start + np.arange(frames)) % codes.shape[1]].astype(np.int64)
