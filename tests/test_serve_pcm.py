"""Sound on the wire: every G.711 code, and streams that must not depend on how they are cut."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from moshivis.errors import InputError
from moshivis.serve.pcm import PCM, PCM_16K, PCMA, PCMU, AudioFormat, PcmReader, PcmWriter, _codes, _levels

CODES = np.arange(256, dtype=np.uint8)
LEVELS = np.arange(-32768, 32768).astype(np.int16)
TELEPHONE = [(PCMU, "ULAW"), (PCMA, "ALAW")]


def tone(seconds: float, hertz: float = 440.0) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(24000 * seconds)) / 24000)).astype(np.float32)


@pytest.mark.parametrize(("format", "subtype"), TELEPHONE)
def test_all_codes_are_those_of_libsndfile(format: AudioFormat, subtype: str) -> None:
    raw = io.BytesIO(CODES.tobytes())
    theirs, _ = soundfile.read(raw, dtype="int16", samplerate=8000, channels=1, format="RAW", subtype=subtype)
    assert np.array_equal(_levels(format)[CODES], theirs)


@pytest.mark.parametrize(("format", "subtype"), TELEPHONE)
def test_all_codes_survive_a_round_trip(format: AudioFormat, subtype: str) -> None:
    back = _codes(format)[_levels(format)[CODES].view(np.uint16)]
    other = CODES[back != CODES]
    # mu-law has a positive and a negative zero, which are the same level
    assert other.tolist() == ([0x7F] if format == PCMU else [])


@pytest.mark.parametrize(("format", "subtype"), TELEPHONE)
def test_all_levels_get_the_code_of_libsndfile(format: AudioFormat, subtype: str) -> None:
    file = io.BytesIO()
    soundfile.write(file, LEVELS, 8000, format="RAW", subtype=subtype)
    theirs = np.frombuffer(file.getvalue(), np.uint8)
    ours = _codes(format)[LEVELS.view(np.uint16)]
    other = LEVELS[ours != theirs]
    # A-law: a negative level right between two codes can take either; with one's complement it takes the quieter
    assert len(other) <= (127 if format == PCMA else 0)
    assert np.all((other < 0) & (other % 16 == 0))


@pytest.mark.parametrize("format", [PCM, PCM_16K, PCMU, PCMA])
def test_a_stream_does_not_depend_on_how_it_is_cut(format: AudioFormat) -> None:
    samples = tone(0.5)
    whole = PcmWriter(format)
    expected = whole.write(samples) + whole.write(samples[:0], last=True)
    pieces = PcmWriter(format)
    cut = b"".join(pieces.write(part) for part in np.split(samples, [1, 7, 1920, 5000]))
    assert cut + pieces.write(samples[:0], last=True) == expected

    size = format.sample_bytes
    data = [expected[:size], expected[size : 160 * size], expected[160 * size :]]
    reader = PcmReader(format)
    heard = np.concatenate([*(reader.read(part) for part in data), reader.finish()])
    once = PcmReader(format)
    assert np.array_equal(heard, np.concatenate([once.read(expected), once.finish()]))


@pytest.mark.parametrize(("format", "error"), [(PCM, 2e-5), (PCM_16K, 1e-3), (PCMU, 0.02), (PCMA, 0.02)])
def test_what_is_written_can_be_read(format: AudioFormat, error: float) -> None:
    samples = tone(0.5)
    writer, reader = PcmWriter(format), PcmReader(format)
    data = writer.write(samples) + writer.write(samples[:0], last=True)
    assert len(data) == format.rate * format.sample_bytes // 2
    heard = np.concatenate([reader.read(data), reader.finish()])
    assert len(heard) == len(samples)
    middle = slice(1200, -1200)  # a tone that begins at once is not a tone for a resampler
    assert np.abs(heard - samples)[middle].max() < error


@pytest.mark.parametrize(("format", "silence"), [(PCM, 0), (PCM_16K, 0), (PCMU, 0xFF)])
def test_muted_sound_is_silence_and_no_other_is(format: AudioFormat, silence: int) -> None:
    """Not even what a resampler still holds back."""
    before, meanwhile, after = (np.random.default_rng(seed).bytes(4000) for seed in range(3))
    reader, silent = PcmReader(format), PcmReader(format)
    heard = [reader.read(before), reader.read(meanwhile, muted=True), reader.read(after), reader.finish()]
    expected = silent.read(before + bytes([silence] * 4000) + after), silent.finish()
    assert np.array_equal(np.concatenate(heard), np.concatenate(expected))


def test_a_reader_goes_on_after_its_stream_has_ended() -> None:
    reader = PcmReader(PCM_16K)
    data = PcmWriter(PCM_16K).write(tone(0.5))
    first = np.concatenate([reader.read(data), reader.finish()])
    assert np.array_equal(np.concatenate([reader.read(data), reader.finish()]), first)


def test_resampling_keeps_the_sound_waiting_less_than_80_ms() -> None:
    for format in (PCM_16K, PCMU, PCMA):
        writer, given = PcmWriter(format), 0
        for frame in range(1, 50):
            given += len(writer.write(tone(0.08))) // format.sample_bytes
            assert frame * 0.08 - given / format.rate < 0.08


def test_loud_sound_is_clipped_and_half_samples_are_refused() -> None:
    data = PcmWriter(PCM).write(np.array([2.0, -2.0, 0.5], np.float32))
    assert np.frombuffer(data, "<i2").tolist() == [32767, -32768, 16384]
    with pytest.raises(InputError, match="whole samples"):
        PcmReader(PCM).read(b"\0\0\0")
    assert len(PcmReader(PCM).read(b"")) == 0
