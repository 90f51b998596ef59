"""Sound on the wire of the JSON protocols: 16-bit PCM, and telephone sound (ITU-T G.711), to and from 24 kHz float.

The model hears and speaks at 24 kHz. Other rates pass a resampler that remembers where it was, so that the pieces of a
stream fit together however it was cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moshivis.audio import SAMPLE_RATE
from moshivis.errors import InputError

Samples = NDArray[np.float32]

# Flat up to 0.9 of the smaller band, which holds the telephone's 3.4 kHz, and 40 ms quicker than the next better one.
_QUALITY = "MQ"


@dataclass(frozen=True, kw_only=True)
class AudioFormat:
    """How a stream of samples is written: its MIME type, as the OpenAI events name it, and its rate in hertz."""

    type: str
    rate: int

    @property
    def sample_bytes(self) -> int:
        return 2 if self.type == "audio/pcm" else 1

    def to_json(self) -> dict[str, Any]:
        return {"type": self.type, "rate": self.rate}


PCM = AudioFormat(type="audio/pcm", rate=SAMPLE_RATE)  # signed 16 bits, little-endian, mono
PCM_16K = AudioFormat(type="audio/pcm", rate=16000)
PCMU = AudioFormat(type="audio/pcmu", rate=8000)
PCMA = AudioFormat(type="audio/pcma", rate=8000)


class PcmReader:
    """Bytes of a stream to samples at 24 kHz."""

    def __init__(self, format: AudioFormat):
        self.format = format
        self._resampler = None if format.rate == SAMPLE_RATE else _resampler(format.rate, SAMPLE_RATE)

    def read(self, data: bytes, *, muted: bool = False) -> Samples:
        """The stream's next bytes, whole samples, -> float32 [T] in -1..1; silence in place of what is `muted`.

        T lags a few milliseconds behind. Raises InputError for half a sample.
        """
        size = self.format.sample_bytes
        if len(data) % size:
            raise InputError(f"the sound has {len(data)} bytes, but a sample has {size}: send whole samples")
        if self.format.type == "audio/pcm":
            levels = np.frombuffer(data, "<i2")
        else:
            levels = _levels(self.format)[np.frombuffer(data, np.uint8)]
        if muted:
            levels = np.zeros_like(levels)
        samples: Samples = levels.astype(np.float32) / np.float32(32768)
        return samples if self._resampler is None else self._resampler.resample_chunk(samples)

    def finish(self) -> Samples:
        """What the resampler holds back. The stream may go on: its next bytes begin another one."""
        if self._resampler is None:
            return np.zeros(0, np.float32)
        rest = self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        self._resampler.clear()
        return rest


class PcmWriter:
    """Samples at 24 kHz to bytes of a stream."""

    def __init__(self, format: AudioFormat):
        self.format = format
        self._resampler = None if format.rate == SAMPLE_RATE else _resampler(SAMPLE_RATE, format.rate)

    def write(self, samples: Samples, *, last: bool = False) -> bytes:
        """The next samples, float32 [T]; what the resampler holds back comes with a later call, or with the `last`."""
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(samples, last=last)
        levels = np.clip(np.rint(samples * 32768), -32768, 32767).astype("<i2")
        if self.format.type == "audio/pcm":
            return levels.tobytes()
        return _codes(self.format)[levels.view(np.uint16)].tobytes()


def _resampler(source: int, target: int) -> Any:
    import soxr

    return soxr.ResampleStream(source, target, 1, dtype="float32", quality=_QUALITY)


# G.711: eight segments a sign, each with 16 steps, twice as high as those of the segment before -----------------------

_MU_BIAS = 0x84  # added before the logarithm of mu-law, so that its first segment starts at zero
_MU_CLIP = 32635


@cache
def _levels(format: AudioFormat) -> NDArray[np.int16]:
    """[256] codes -> 16-bit levels."""
    if format.type == "audio/pcmu":
        code = ~np.arange(256) & 0xFF
        level = ((((code & 0x0F) << 3) + _MU_BIAS) << (code >> 4 & 7)) - _MU_BIAS
        return np.where(code & 0x80, -level, level).astype(np.int16)
    code = np.arange(256) ^ 0x55
    segment = code >> 4 & 7
    level = ((code & 0x0F) << 4) + 8 + np.where(segment > 0, 0x100, 0)
    level = level << np.maximum(segment - 1, 0)
    return np.where(code & 0x80, level, -level).astype(np.int16)


@cache
def _codes(format: AudioFormat) -> NDArray[np.uint8]:
    """[65536], indexed by the bits of a 16-bit level -> codes."""
    level = np.arange(65536).astype(np.uint16).view(np.int16).astype(np.int64)
    if format.type == "audio/pcmu":
        magnitude = np.minimum(np.abs(level), _MU_CLIP) + _MU_BIAS
        segment = np.log2(magnitude).astype(np.int64) - 7
        code = (segment << 4) | (magnitude >> (segment + 3) & 0x0F)
        return (~(code | np.where(level < 0, 0x80, 0)) & 0xFF).astype(np.uint8)
    magnitude = np.where(level < 0, ~level, level)
    segment = np.maximum(np.log2(np.maximum(magnitude, 1)).astype(np.int64) - 7, 0)
    code = (segment << 4) | (magnitude >> np.maximum(segment + 3, 4) & 0x0F)
    return ((code | np.where(level < 0, 0, 0x80)) ^ 0x55).astype(np.uint8)
