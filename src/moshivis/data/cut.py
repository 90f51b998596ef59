"""Pieces of conversations: where they may be cut, and how pieces are put together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moshivis.data.sample import Sample, Speaker
from moshivis.errors import InputError
from moshivis.speech_lm.tokenizer import PADDING

WORD_FRAMES = 12  # a word that began a second before is over


def cut_points(sample: Sample) -> np.ndarray:
    """Steps before which a sample may be cut, its begin and end among them, ascending.

    After what the assistant says and before what the user says, so that no question loses its answer: a written one
    where the user begins; a spoken one (when words end, and when the user speaks, is not stored) a second after the
    assistant began its last word, if no other follows so soon.
    """
    if sample.kind == "speech":
        steps = np.arange(len(sample))
        newest = np.maximum.accumulate(np.where(sample.text == PADDING, -1, steps))  # step of the last piece of a word
        inner = ((newest >= 0) & (steps - newest == WORD_FRAMES))[1:]
    else:
        users = sample.speaker == Speaker.USER
        inner = users[1:] & ~users[:-1]
    return np.concatenate([[0], np.flatnonzero(inner) + 1, [len(sample)]])


def cut(sample: Sample, begin: int, end: int) -> Sample:
    """Steps `begin` to `end` of a sample, picture included."""
    piece = slice(begin, end)
    return Sample(
        text=sample.text[piece],
        speaker=sample.speaker[piece],
        audio=None if sample.audio is None else sample.audio[:, piece],
        image=sample.image,
        text_graded=None if sample.text_graded is None else sample.text_graded[piece],
        audio_graded=None if sample.audio_graded is None else sample.audio_graded[piece],
        origin=sample.origin,
    )


def random_opening(sample: Sample, longest: int, rng: np.random.Generator, *, shortest: int = 0) -> Sample:
    """`shortest` to `longest` steps from the begin to a cut point; none if no cut point is there."""
    points = cut_points(sample)
    ends = points[(points >= shortest) & (points <= longest)]
    return cut(sample, 0, int(rng.choice(ends)) if len(ends) else 0)


def random_cut(sample: Sample, longest: int, rng: np.random.Generator) -> Sample:
    """A piece of at most `longest` steps between two cut points; an empty one only if no two are so near."""
    points = cut_points(sample)
    gaps = np.diff(points)
    begins = points[:-1][(gaps > 0) & (gaps <= longest)]
    if not len(begins):
        return cut(sample, 0, 0)
    begin = int(rng.choice(begins))
    return cut(sample, begin, int(rng.choice(points[(points > begin) & (points <= begin + longest)])))


def join(samples: Sequence[Sample], image: str | None) -> Sample:
    """One sample out of several of the same kind, one after the other, with one picture for the whole.

    Raises InputError if some have audio and some not, or another number of codebooks.
    """
    shapes = {None if sample.audio is None else len(sample.audio) for sample in samples}
    if len(shapes) != 1:
        origins = ", ".join(sample.origin or "a sample" for sample in samples)
        raise InputError(f"{origins} cannot be joined: their numbers of codebooks are {sorted(map(str, shapes))}")
    audio = [sample.audio for sample in samples if sample.audio is not None]
    return Sample(
        text=np.concatenate([sample.text for sample in samples]),
        speaker=np.concatenate([sample.speaker for sample in samples]),
        audio=np.concatenate(audio, axis=1) if audio else None,
        image=image,
        text_graded=_join_masks([sample.text_graded for sample in samples], samples),
        audio_graded=_join_masks([sample.audio_graded for sample in samples], samples) if audio else None,
        origin=" + ".join(sample.origin for sample in samples if len(sample) and sample.origin),
    )


def _join_masks(masks: Sequence[np.ndarray | None], samples: Sequence[Sample]) -> np.ndarray | None:
    if all(mask is None for mask in masks):
        return None
    whole = [np.ones(len(sample), bool) if mask is None else mask for mask, sample in zip(masks, samples, strict=True)]
    return np.concatenate(whole)
