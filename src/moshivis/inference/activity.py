"""When somebody speaks, by the energy of the sound: what reaction times are measured with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WINDOW = 240  # samples, 10 ms at 24 kHz
AUDIBLE = 0.01  # root mean square from which on a window is heard, -40 dB of full scale
_BELOW_LOUDEST = 0.05  # a noisy line: what is 26 dB below its loudest speech is background
_PAUSE = 25  # windows; shorter silences are part of the speech around them


def loudness(audio: NDArray[np.floating]) -> float:
    """Root mean square of samples [T]."""
    return float(np.sqrt(np.mean(np.square(audio, dtype=np.float64)))) if len(audio) else 0.0


def audible(audio: NDArray[np.floating]) -> NDArray[np.bool_]:
    """[T] -> [T // WINDOW], True where something is heard."""
    windows = audio[: len(audio) // WINDOW * WINDOW].astype(np.float64).reshape(-1, WINDOW)
    level = np.sqrt(np.square(windows).mean(axis=1))
    return level > max(AUDIBLE, _BELOW_LOUDEST * level.max(initial=0.0))


def speech_span(audio: NDArray[np.floating]) -> tuple[int, int] | None:
    """First and last sample (exclusive) of the speech in [T]; None if it holds none."""
    heard = np.flatnonzero(audible(audio))
    return (int(heard[0]) * WINDOW, int(heard[-1] + 1) * WINDOW) if len(heard) else None


def reaction_samples(speaker: NDArray[np.floating], begin: int, end: int) -> int | None:
    """Samples from `end` of a question that began at `begin` to the first sound of `speaker` [T] that answers it.

    Negative if the speaker barged in and was still speaking at the end. None if no sound begins. What sounds when the
    question begins belongs to what was said before.
    """
    heard = _without_pauses(audible(speaker))
    onsets = np.flatnonzero(heard & ~np.concatenate([[False], heard[:-1]])) * WINDOW
    offsets = np.flatnonzero(heard & ~np.concatenate([heard[1:], [False]])) * WINDOW + WINDOW
    for onset, offset in zip(onsets.tolist(), offsets.tolist(), strict=True):
        if onset >= begin and offset > end:
            return onset - end
    return None


def _without_pauses(heard: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Fill short silences between sounds."""
    filled = heard.copy()
    places = np.flatnonzero(heard)
    for before, after in zip(places[:-1], places[1:], strict=True):
        if after - before <= _PAUSE:
            filled[before:after] = True
    return filled
