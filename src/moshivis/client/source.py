"""Where the user's sound comes from, a frame of 80 ms every 80 ms: questions in files, or a microphone."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moshivis.audio import SAMPLE_RATE, read_audio
from moshivis.client.recording import FRAME, MAX_BUFFER, Asked, Recording
from moshivis.errors import InputError
from moshivis.files import shown
from moshivis.inference.activity import speech_span

FRAME_SECONDS = FRAME / SAMPLE_RATE
GREETING_FRAMES, GREETING_PAUSE = 75, 8  # the longest wait for a greeting; the silence after which it has ended
ANSWER_FRAMES, ANSWER_PAUSE = 250, 14
CATCH_UP = 0.16  # seconds that a late frame may make up for

Samples = NDArray[np.float32]


class Source(Protocol):
    async def next(self) -> Samples | None:
        """The next frame, when its time has come; None if there is nothing more to say."""


@dataclass(frozen=True)
class Question:
    audio: Samples  # [T] at 24 kHz
    label: str


def read_questions(paths: Sequence[str]) -> list[Question]:
    """Raises InputError as `read_audio` does."""
    return [Question(read_audio(path), shown(Path(path).name)) for path in paths]


class Files:
    """Asks questions one after the other: hears the greeting out, asks, hears the answer out."""

    def __init__(self, questions: Sequence[Question], recording: Recording):
        self._questions = deque(questions)
        self._recording = recording
        self._frames: deque[Samples] = deque()  # of the question that is being asked
        self._asked = 0  # frame at which the last question ended, or everything began
        self._due = 0.0

    async def next(self) -> Samples | None:
        now = time.monotonic()
        self._due = max(self._due + FRAME_SECONDS, now - CATCH_UP) if self._due else now
        await asyncio.sleep(self._due - now)
        if not self._frames and self._heard_out():
            if not self._questions:
                return None
            self._ask(self._questions.popleft())
        return self._frames.popleft() if self._frames else np.zeros(FRAME, np.float32)

    def _ask(self, question: Question) -> None:
        recording = self._recording
        begin, end = speech_span(question.audio) or (0, len(question.audio))
        frame = recording.said
        recording.questions.append(Asked(question.label, frame, frame * FRAME + begin, frame * FRAME + end))
        padded = np.pad(question.audio, (0, -len(question.audio) % FRAME))
        self._frames.extend(padded.reshape(-1, FRAME))
        self._asked = frame + -(-end // FRAME)
        recording.spoke = False

    def _heard_out(self) -> bool:
        recording = self._recording
        waited = recording.said - self._asked
        patience, pause = (ANSWER_FRAMES, ANSWER_PAUSE) if recording.questions else (GREETING_FRAMES, GREETING_PAUSE)
        return waited >= patience or (recording.spoke and min(recording.pause, waited) >= pause)


class Devices:
    """Microphone and loudspeaker of this machine; an async context manager."""

    def __init__(self) -> None:
        self._sound = _sounddevice()
        self._frames: asyncio.Queue[Samples] = asyncio.Queue(maxsize=25)
        self._playing: deque[Samples] = deque()
        self._streams: list[Any] = []

    async def __aenter__(self) -> Devices:
        loop = asyncio.get_running_loop()

        def heard(data: Samples, frames: int, clock: object, status: object) -> None:
            loop.call_soon_threadsafe(self._put, data[:, 0].copy())

        def wanted(data: Samples, frames: int, clock: object, status: object) -> None:
            data[:, 0] = self._take(frames)

        options = {"samplerate": SAMPLE_RATE, "channels": 1, "dtype": "float32", "blocksize": FRAME}
        devices = (("microphone", self._sound.InputStream, heard), ("loudspeaker", self._sound.OutputStream, wanted))
        for which, kind, callback in devices:
            try:
                stream = kind(callback=callback, **options)
                self._streams.append(stream)
                stream.start()
            except self._sound.PortAudioError as error:
                self._close()
                raise InputError(f"the {which} cannot be used: {error}; speak from a file with --audio") from error
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    async def next(self) -> Samples | None:
        return await self._frames.get()

    def play(self, samples: Samples) -> None:
        """A loudspeaker that begins late, or is slower than the microphone, loses the oldest sound."""
        self._playing.append(samples)
        with suppress(IndexError):  # the sound card has taken the rest meanwhile
            while sum(map(len, tuple(self._playing))) > MAX_BUFFER + FRAME:
                self._playing.popleft()

    def _put(self, frame: Samples) -> None:
        if self._frames.full():
            self._frames.get_nowait()
        self._frames.put_nowait(frame)

    def _take(self, count: int) -> Samples:
        """In the thread of the sound card."""
        taken = np.zeros(count, np.float32)
        filled = 0
        while filled < count and self._playing:
            part = self._playing.popleft()
            fits = part[: count - filled]
            taken[filled : filled + len(fits)] = fits
            filled += len(fits)
            if len(fits) < len(part):
                self._playing.appendleft(part[len(fits) :])
        return taken

    def _close(self) -> None:
        for stream in self._streams:
            stream.close()


def _sounddevice() -> Any:
    try:
        return importlib.import_module("sounddevice")
    except ImportError:
        raise InputError(
            "to speak into a microphone, install sounddevice (pip install sounddevice); "
            "or speak from a file, with --audio question.wav"
        ) from None
    except OSError as error:  # the package is there, the library that it drives is not
        raise InputError(
            f"sounddevice cannot be used: {error}; install PortAudio (Debian: libportaudio2), or speak from a file, "
            "with --audio question.wav"
        ) from None
