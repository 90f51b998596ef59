"""What a caller said and heard, as two channels of one clock, and the transcript."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from moshivis.audio import SAMPLE_RATE
from moshivis.client.line import Words
from moshivis.inference.activity import AUDIBLE, loudness, reaction_samples

FRAME = 1920  # samples, 80 ms
BUFFER = 2 * FRAME  # samples that are held back before playing begins, against jitter
MAX_BUFFER = 6 * FRAME  # what waits beyond it after a burst is skipped: better a gap than an answer that stays late

Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Said:
    """A piece of the assistant's text, and when it came, in frames of the user's clock."""

    frame: int
    words: Words


@dataclass(frozen=True)
class Asked:
    """A question from a file."""

    label: str
    frame: int  # where it begins
    begin: int  # samples of its speech in the user's channel
    end: int


@dataclass
class Recording:
    """The clock is the user's channel: a frame of it is 80 ms."""

    keep: bool = True  # the sound too, not only the transcript
    said: int = 0  # frames of the user
    pieces: list[Said] = field(default_factory=list)
    questions: list[Asked] = field(default_factory=list)
    heard: int = 0  # frames of the assistant, received
    missed: int = 0  # samples for which there was nothing to play, though playing had begun
    skipped: int = 0  # samples that came too late to be played
    user_level: float = 0.0  # loudness of the latest frame
    level: float = 0.0  # the same of the assistant
    pause: int = 0  # frames since the assistant was last heard or read
    spoke: bool = False
    _user: list[Samples] = field(default_factory=list)
    _assistant: list[Samples] = field(default_factory=list)
    _end: int = 0  # samples of the assistant's channel

    @property
    def clock(self) -> int:
        """Samples that the user has said."""
        return self.said * FRAME

    @property
    def buffered(self) -> int:
        """Samples that wait to be played."""
        return max(0, self._end - self.clock)

    def say(self, frame: Samples) -> None:
        """The user's next frame."""
        self.said += 1
        self.pause += 1
        self.user_level = loudness(frame)
        if self.keep:
            self._user.append(frame)

    def hear(self, samples: Samples) -> Samples:
        """Sound of the assistant has arrived. Returns what is to be played now: a moment of silence first, if there
        was nothing left to play, and nothing at all if too much waits already.
        """
        first = self.heard == 0
        self.heard += max(1, round(len(samples) / FRAME))
        self.level = loudness(samples)
        if self.level > AUDIBLE:
            self.pause, self.spoke = 0, True
        if self._end + len(samples) > self.clock + MAX_BUFFER:
            self.skipped += len(samples)
            return samples[:0]
        gap = 0
        if self._end <= self.clock:  # the first sound, or there was nothing left to play
            gap = self.clock + BUFFER - self._end
            self.missed += 0 if first else gap
        if self.keep:
            self._assistant += [np.zeros(gap, np.float32), samples]
        self._end += gap + len(samples)
        return np.concatenate([np.zeros(min(gap, BUFFER), np.float32), samples])

    def read(self, words: Words) -> None:
        """Text of the assistant has arrived."""
        self.pieces.append(Said(self.said, words))
        self.pause, self.spoke = 0, True

    # afterwards -------------------------------------------------------------------------------------------------

    def channels(self) -> Samples:
        """[T, 2]: the user left, the assistant right as it was played."""
        user = np.concatenate([*self._user, np.zeros(0, np.float32)])
        assistant = np.concatenate([*self._assistant, np.zeros(0, np.float32)])
        length = max(len(user), len(assistant))
        return np.stack([np.pad(part, (0, length - len(part))) for part in (user, assistant)], axis=1)

    @property
    def text(self) -> str:
        return "".join(said.words.text for said in self.pieces).strip()

    def turns(self, since: int = 0) -> list[tuple[Asked | None, list[Said]]]:
        """Questions from frame `since` on, with what was said after them. What came before is a turn of its own."""
        questions = [asked for asked in self.questions if asked.frame >= since]
        bounds = [since, *[asked.frame for asked in questions], self.said + 1]
        spans = zip(bounds[:-1], bounds[1:], strict=True)
        said = [[piece for piece in self.pieces if first <= piece.frame < last] for first, last in spans]
        return list(zip([None, *questions], said, strict=True))

    def delays(self) -> list[float | None]:
        """For every question, milliseconds from the end of its speech to the first sound that answers it."""
        assistant = self.channels()[:, 1]
        ends = [*[asked.frame * FRAME for asked in self.questions], len(assistant)][1:]
        found = [
            reaction_samples(assistant[:last], asked.begin, asked.end)
            for asked, last in zip(self.questions, ends, strict=True)
        ]
        return [None if samples is None else samples * 1000 / SAMPLE_RATE for samples in found]
