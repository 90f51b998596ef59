"""A whole conversation about a picture: questions in, the assistant's answers, their timing and their gates out.

Spoken: the user's and the assistant's channels run frame by frame, as they would live. The greeting is heard out, a
question is played, silence follows until the answer has ended; then the next question. Written: see `written`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moshivis.audio import SAMPLE_RATE, float_samples
from moshivis.errors import InputError
from moshivis.inference.activity import AUDIBLE, loudness, reaction_samples, speech_span
from moshivis.inference.conversation import Assistant, Conversation, Picture, TextPiece
from moshivis.inference.sampling import Sampling

GREETING_FRAMES = 50  # 4 s at most
GREETING_PAUSE = 6  # frames of silence after which a greeting has ended
ANSWER_PAUSE = 12  # frames of silence after which an answer has ended
ANSWER_SECONDS = 20.0  # default patience


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """Something to ask: sound or text. `label` names it in results."""

    audio: NDArray[np.float32] | None = None  # [T] at 24 kHz
    text: str | None = None
    label: str = ""

    def __post_init__(self) -> None:
        if (self.audio is None) == (self.text is None):
            raise InputError("a question is either sound or text")
        if self.audio is not None and (self.audio.ndim != 1 or not len(self.audio)):
            raise InputError(f"the sound of a question must be [T] with T > 0, not {list(self.audio.shape)}")
        if self.audio is not None:
            samples = float_samples(self.audio)
            if not np.isfinite(samples).all():
                raise InputError("the sound of a question must be finite; some of it is infinite or not a number")
            object.__setattr__(self, "audio", samples)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A question, and what the assistant said from then on. The greeting is a turn without question."""

    question: str | None
    text: str
    frame: int  # the first one of the turn
    reaction_ms: float | None  # end of the question's speech to the answer's first sound, in stream time


@dataclass(frozen=True, kw_only=True, eq=False)
class TalkResult:
    model: str  # its name
    form: Literal["spoken", "written"]
    pieces: tuple[TextPiece, ...]  # the assistant's text, padding left out
    turns: tuple[Turn, ...]
    gates: tuple[float, ...]  # spoken: one a frame; written: none but those of the pieces
    frames: int  # model steps
    frame_seconds: float  # length of one
    wall_seconds: float  # time that they took
    user: NDArray[np.float32] | None  # [T] the user's channel; None if written
    assistant: NDArray[np.float32] | None  # [T], frame by frame beside the user's

    @property
    def text(self) -> str:
        """All that the assistant said."""
        return "".join(piece.text for piece in self.pieces).strip()

    @property
    def reaction_ms(self) -> float | None:
        """The mean over the questions that were answered in sound; negative where the assistant barged in."""
        known = [turn.reaction_ms for turn in self.turns if turn.reaction_ms is not None]
        return float(np.mean(known)) if known else None

    @property
    def real_time_factor(self) -> float:
        """Computing time a second of conversation; below 1 is faster than live."""
        return self.wall_seconds / max(self.frames * self.frame_seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """All but the sound, as plain data for `json.dumps`."""
        return {
            "model": self.model,
            "form": self.form,
            "text": self.text,
            "pieces": [
                {"piece": piece.text, "frame": piece.frame, "gate": round(piece.gate, 6)} for piece in self.pieces
            ],
            "turns": [
                {"question": turn.question, "text": turn.text, "frame": turn.frame, "reaction_ms": turn.reaction_ms}
                for turn in self.turns
            ],
            "reaction_ms": self.reaction_ms,
            "frames": self.frames,
            "real_time_factor": round(self.real_time_factor, 4),
        }


def talk(
    assistant: Assistant,
    image: Picture | None,
    questions: Sequence[Question],
    *,
    seconds: float | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    on_frame: Callable[[TextPiece], None] | None = None,
) -> TalkResult:
    """Ask the questions one after the other, and collect the answers.

    `seconds` is how long to wait for the end of a spoken answer, from the end of its question. `on_frame` gets every
    frame as soon as it is there; of a written answer every piece, when the answer is complete.
    Raises InputError for no questions, for spoken and written ones in one conversation, for one without text that the
    model could read, and as `Assistant.look` does.
    """
    written = [question.text for question in questions if question.text is not None]
    if not questions:
        raise InputError("there is no question to ask; give one as sound or as text")
    if written and len(written) < len(questions):
        raise InputError("spoken and written questions cannot be mixed: they are two kinds of conversation; ask twice")
    for text in written:  # before the first is answered
        if not assistant.tokenizer.decode(assistant.tokenizer.encode(text)):
            raise InputError(f"the question {text!r} has no text that the model could read")
    conversation = assistant.conversation(image, seed=seed, sampling=sampling)
    if written:
        return _write(conversation, written, on_frame)
    return _speak(conversation, questions, ANSWER_SECONDS if seconds is None else seconds, on_frame)


# spoken ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Recording:
    """What has been said so far, and since when the assistant has been silent."""

    conversation: Conversation
    on_frame: Callable[[TextPiece], None] | None
    user: list[NDArray[np.float32]] = field(default_factory=list)
    assistant: list[NDArray[np.float32]] = field(default_factory=list)
    pieces: list[TextPiece] = field(default_factory=list)
    gates: list[float] = field(default_factory=list)
    spoke: bool = False
    pause: int = 0  # frames without sound and text

    def advance(self, frame: NDArray[np.float32] | None = None) -> None:
        """Take one frame of the user's sound, or of silence."""
        if frame is None:
            frame = np.zeros(self.conversation.assistant.frame_size, np.float32)
        result = self.conversation.step(frame)
        self.user.append(frame)
        self.assistant.append(result.audio)
        self.gates.append(result.gate)
        if result.text:
            self.pieces.append(result)
        silent = not result.text and loudness(result.audio) < AUDIBLE
        self.pause = self.pause + 1 if silent else 0
        self.spoke |= not silent
        if self.on_frame is not None:
            self.on_frame(result)


def _speak(
    conversation: Conversation,
    questions: Sequence[Question],
    seconds: float,
    on_frame: Callable[[TextPiece], None] | None,
) -> TalkResult:
    size = conversation.assistant.frame_size
    line = _Recording(conversation, on_frame)
    asked: list[tuple[int, int, int]] = []  # frame where a question begins; first and last sample of its speech
    begun = time.perf_counter()
    while conversation.frame < GREETING_FRAMES and not (line.spoke and line.pause >= GREETING_PAUSE):
        line.advance()
    for question in questions:
        assert question.audio is not None
        frame = conversation.frame
        begin, end = speech_span(question.audio) or (0, len(question.audio))
        asked.append((frame, frame * size + begin, frame * size + end))
        for start in range(0, len(question.audio), size):
            samples = question.audio[start : start + size]
            line.advance(np.pad(samples, (0, size - len(samples))))
        _hear_out(line, asked[-1][2] // size, round(seconds * SAMPLE_RATE / size))
    wall = time.perf_counter() - begun
    assistant = np.concatenate(line.assistant)
    return TalkResult(
        model=conversation.assistant.config.name,
        form="spoken",
        pieces=tuple(line.pieces),
        turns=_turns(line.pieces, questions, asked, assistant),
        gates=tuple(line.gates),
        frames=conversation.frame,
        frame_seconds=size / SAMPLE_RATE,
        wall_seconds=wall,
        user=np.concatenate(line.user),
        assistant=assistant,
    )


def _hear_out(line: _Recording, since: int, patience: int) -> None:
    """Run in silence until something said after frame `since` has ended, for `patience` frames at most."""
    for _ in range(patience):
        answered = bool(line.pieces) and line.pieces[-1].frame >= since
        if answered and line.pause >= ANSWER_PAUSE:
            return
        line.advance()


def _turns(
    pieces: Sequence[TextPiece],
    questions: Sequence[Question],
    asked: Sequence[tuple[int, int, int]],
    assistant: NDArray[np.float32],
) -> tuple[Turn, ...]:
    """Cut the transcript where questions begin."""
    bounds = [0, *[frame for frame, _, _ in asked], len(assistant)]
    turns = []
    for index, (first, last) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        text = "".join(piece.text for piece in pieces if first <= piece.frame < last).strip()
        label, reaction = None, None
        if index:
            label = questions[index - 1].label
            _, begin, end = asked[index - 1]
            next_question = asked[index][1] if index < len(asked) else len(assistant)
            samples = reaction_samples(assistant[:next_question], begin, end)
            reaction = None if samples is None else samples * 1000 / SAMPLE_RATE
        turns.append(Turn(question=label, text=text, frame=first, reaction_ms=reaction))
    return tuple(turns)


# written --------------------------------------------------------------------------------------------------------------


def _write(
    conversation: Conversation, questions: Sequence[str], on_frame: Callable[[TextPiece], None] | None
) -> TalkResult:
    begun = time.perf_counter()
    pieces: list[TextPiece] = []
    turns: list[Turn] = []
    for question in (None, *questions):
        said = conversation.greet_text() if question is None else conversation.say_text(question)
        for piece in said:
            if on_frame is not None:
                on_frame(piece)
        said = [piece for piece in said if piece.text]
        text = "".join(piece.text for piece in said).strip()
        frame = said[0].frame if said else conversation.frame
        turns.append(Turn(question=question, text=text, frame=frame, reaction_ms=None))
        pieces += said
    return TalkResult(
        model=conversation.assistant.config.name,
        form="written",
        pieces=tuple(pieces),
        turns=tuple(turns),
        gates=(),
        frames=conversation.frame,
        frame_seconds=conversation.assistant.frame_size / SAMPLE_RATE,
        wall_seconds=time.perf_counter() - begun,
        user=None,
        assistant=None,
    )
