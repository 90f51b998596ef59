"""Speech samples from recordings: the codes of both channels, and the assistant's words in the text stream.

A recording is decoded, resampled and encoded block by block, so its length costs no memory. The codec gives the codes
that it gives in a live conversation, which it hears frame by frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moshivis.codec.mimi import Mimi
from moshivis.data.alignment import FRAME_RATE, align
from moshivis.data.layout import Recording, SpokenWords
from moshivis.data.sample import Sample, Speaker
from moshivis.errors import InputError
from moshivis.speech_lm.tokenizer import PADDING, TextTokenizer

BLOCK_FRAMES = 25  # encoded by one call
# What the model says in a step sounds in the next one, and recordings have beside it what the user says then. So the
# user's codes are put this many frames later, beside what the model says when it hears them.
HEARD_LATE = 1
DURATION_SLACK = 0.5  # seconds by which a recording may differ from what its line says


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """What turns conversations into tokens: parts of a model."""

    codec: Mimi
    tokenizer: TextTokenizer
    own_codebooks: int
    user_codebooks: int

    @property
    def codebooks(self) -> int:
        return self.own_codebooks + self.user_codebooks


@dataclass(frozen=True, kw_only=True)
class SpeechSample:
    """A sample, and how well its words went into the text stream (see `alignment.Alignment`)."""

    sample: Sample
    words: int
    late: int
    lost: int
    unspelt: int


def speech_sample(
    recording: Recording, words: SpokenWords, encoder: Encoder, *, image: str | None = None
) -> SpeechSample:
    """Encode a recording.

    Raises InputError if it is no stereo recording of the length that its line says, or if words begin after its end.
    """
    own, user = encoder.own_codebooks, encoder.user_codebooks
    codes = encode_recording(recording.audio, encoder.codec, max(own, user))  # [2, K, T]
    frames = codes.shape[-1]
    seconds = frames / FRAME_RATE
    if recording.duration is not None and abs(seconds - recording.duration) > DURATION_SLACK:
        raise InputError(
            f"{recording.where}: {recording.audio} lasts {seconds:.1f} s, but the line says {recording.duration:g} s; "
            "if the recording is whole, correct the line"
        )
    for word in (*words.assistant[-1:], *words.user[-1:]):
        if word.start > seconds + DURATION_SLACK:
            raise InputError(
                f"{recording.where}: {word.text!r} begins at {word.start:g}, but {recording.audio} lasts "
                f"{seconds:.1f} s; times are in seconds from its begin"
            )
    aligned = align(words.assistant, encoder.tokenizer, frames)
    speaker = np.where(aligned.text == PADDING, Speaker.NOBODY, Speaker.ASSISTANT).astype(np.uint8)
    audio = np.concatenate([codes[0, :own], _late(codes[1, :user], HEARD_LATE)])
    sample = Sample(text=aligned.text, speaker=speaker, audio=audio, image=image, origin=recording.where)
    return SpeechSample(
        sample=sample, words=len(words.assistant), late=aligned.late, lost=aligned.lost, unspelt=aligned.unspelt
    )


def _late(codes: np.ndarray, frames: int) -> np.ndarray:
    """[K, T] so many frames later; the first column stands in for what was before."""
    return np.concatenate([codes[:, :1].repeat(min(frames, codes.shape[1]), axis=1), codes[:, :-frames]], axis=1)


@torch.inference_mode()
def encode_recording(path: Path, codec: Mimi, num_codebooks: int) -> np.ndarray:
    """Codes [2, K, T] int16 of both channels; the last frame is filled with silence.

    Raises InputError, as `stereo_blocks` does.
    """
    config = codec.config
    device = next(codec.parameters()).device
    state = codec.new_encoder_state(2, frames=BLOCK_FRAMES)
    codes = []
    for block in stereo_blocks(path, config.sample_rate, config.frame_size, BLOCK_FRAMES):
        wave = torch.from_numpy(block)[:, None].to(device)
        codes.append(codec.encode_step(state, wave, num_codebooks=num_codebooks).cpu())
    return torch.cat(codes, dim=-1).numpy().astype(np.int16)


def stereo_blocks(path: Path, sample_rate: int, frame_size: int, frames: int) -> Iterator[np.ndarray]:
    """A recording as float32 blocks [2, n * frame_size], n at most `frames`; the last one is filled with zeros.

    Raises InputError if it is missing, damaged, empty, or has another number of channels than two.
    """
    pending = np.zeros((0, 2), np.float32)
    size, any_sound = frames * frame_size, False
    for chunk in _resampled(path, sample_rate, size):
        pending = np.concatenate([pending, chunk])
        while len(pending) >= size:
            block, pending = pending[:size], pending[size:]
            any_sound = True
            yield np.ascontiguousarray(block.T)
    if len(pending):
        filled = np.pad(pending, ((0, -len(pending) % frame_size), (0, 0)))
        yield np.ascontiguousarray(filled.T)
    elif not any_sound:
        raise InputError(f"{path} is empty: it has no samples")


def _resampled(path: Path, sample_rate: int, size: int) -> Iterator[np.ndarray]:
    """Chunks [n, 2] float32 at `sample_rate`, in -1..1."""
    import soundfile
    import soxr

    try:
        with soundfile.SoundFile(path) as file:
            if file.channels != 2:
                raise InputError(
                    f"{path} must have two channels, the assistant left and the user right, not {file.channels}"
                )
            resampler = None
            if file.samplerate != sample_rate:
                resampler = soxr.ResampleStream(file.samplerate, sample_rate, 2, dtype="float32", quality="HQ")
            while len(chunk := file.read(size, dtype="float32", always_2d=True)):
                if not np.isfinite(chunk).all():
                    raise InputError(f"{path} contains samples that are not finite numbers")
                yield np.clip(chunk if resampler is None else resampler.resample_chunk(chunk), -1, 1)
            if resampler is not None:
                yield np.clip(resampler.resample_chunk(np.zeros((0, 2), np.float32), last=True), -1, 1)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:  # the last for a name that ends in .raw
        if not path.exists():
            raise InputError(f"there is no {path}") from None
        raise InputError(f"{path} is not audio that can be read (WAV, FLAC, OGG): {error}") from error
