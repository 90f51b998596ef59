"""Recordings in and out of files: any common format at any rate in, 16-bit WAV out."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moshivis.errors import InputError
from moshivis.files import atomic_write, read_limited

SAMPLE_RATE = 24000  # samples a second, what the codec hears and speaks
MAX_SECONDS = 600.0
MAX_BYTES = 256 * 2**20  # ten minutes of 48 kHz stereo in 32-bit samples have 220 MiB
MIN_RATE, MAX_RATE = 1000, 384_000  # a header outside this range is a damaged one

_BLOCK = 1 << 16  # samples decoded at a time


def float_samples(samples: ArrayLike) -> NDArray[np.float32]:
    """As float32. Raises InputError for integers, which are not in -1..1."""
    found = np.asarray(samples)
    if found.dtype.kind in "iu":
        raise InputError(f"samples are floats in -1..1, not {found.dtype}; divide 16-bit ones by 32768")
    return found.astype(np.float32, copy=False)


def read_audio(
    source: str | os.PathLike[str] | bytes,
    sample_rate: int = SAMPLE_RATE,
    *,
    max_seconds: float = MAX_SECONDS,
    max_bytes: int = MAX_BYTES,
) -> NDArray[np.float32]:
    """Decode a WAV, FLAC, MP3 or OGG file, or its bytes.

    Returns float32 [T] at `sample_rate`: the mean of all channels, clipped to -1..1.
    Raises InputError if there is no such file, if it is a folder, not audio, damaged, empty, longer than `max_seconds`,
    has more than `max_bytes`, or contains samples that are not numbers.
    """
    import soundfile
    import soxr

    name = "this recording" if isinstance(source, bytes | bytearray | memoryview) else os.fspath(source)
    content = read_limited(source, max_bytes=max_bytes, noun="recording")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate = file.samplerate
            if not MIN_RATE <= rate <= MAX_RATE:
                raise InputError(
                    f"{name} says that it has {rate} samples a second; {MIN_RATE} to {MAX_RATE} are possible"
                )
            mono = _decode_mono(file, name, limit=int(max_seconds * rate), max_seconds=max_seconds)
    except soundfile.LibsndfileError as error:
        raise InputError(
            f"{name} is not audio that can be decoded (WAV, FLAC, MP3, OGG): {error.error_string}"
        ) from error
    if rate != sample_rate:
        mono = soxr.resample(mono, rate, sample_rate, quality="HQ")
    if mono.size == 0:
        raise InputError(f"{name} is empty: it has no samples")
    return np.clip(mono, -1.0, 1.0, dtype=np.float32)


def _decode_mono(file: Any, name: str, *, limit: int, max_seconds: float) -> NDArray[np.float32]:
    """Block by block, so that neither many channels nor a wrong length in the header cost memory. [T] float32."""
    blocks: list[NDArray[np.float32]] = []
    length = 0
    while True:
        block = file.read(_BLOCK, dtype="float32", always_2d=True)  # [T, C]
        if len(block) == 0:
            break
        if not np.isfinite(block).all():
            raise InputError(f"{name} contains samples that are not finite numbers; export it again as 16-bit WAV")
        length += len(block)
        if length > limit:
            raise InputError(f"{name} is longer than {max_seconds:g} seconds, the limit; cut it")
        blocks.append(block.mean(axis=1, dtype=np.float32))
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32)


def write_wav(path: str | os.PathLike[str], audio: NDArray[np.floating], sample_rate: int = SAMPLE_RATE) -> None:
    """Write samples in -1..1, [T] or [T, C], as a 16-bit PCM WAV file; louder ones are clipped. Atomic.

    Raises ValueError for another shape or samples that are not finite, OSError if the file cannot be written.
    """
    import soundfile

    samples = np.asarray(audio)
    if samples.ndim not in (1, 2):
        raise ValueError(f"audio must be [T] or [T, C], not {list(samples.shape)}")
    if not np.isfinite(samples).all():
        raise ValueError("audio contains samples that are not finite numbers")
    pcm = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)
    with atomic_write(path) as temporary:
        try:
            soundfile.write(temporary, pcm, sample_rate, format="WAV", subtype="PCM_16")
        except soundfile.LibsndfileError as error:  # a disk that is full
            raise OSError(f"{path} cannot be written: {error}") from error
