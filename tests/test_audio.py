"""Recordings in every format that we promise, and the ones that must be refused."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from moshivis.audio import read_audio, write_wav
from moshivis.errors import InputError


def tone(rate: int, seconds: float = 1.0, frequency: float = 440.0) -> NDArray[np.float64]:
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def encode(audio: NDArray[np.floating], rate: int, container: str, subtype: str | None = None) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, audio, rate, format=container, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("container", "subtype", "rate", "tolerance"),
    [
        ("WAV", "PCM_16", 24000, 1e-4),
        ("WAV", "PCM_U8", 8000, 2e-2),
        ("WAV", "FLOAT", 48000, 1e-3),
        ("WAV", "PCM_24", 96000, 1e-3),
        ("FLAC", "PCM_16", 44100, 1e-3),
        ("MP3", None, 44100, 2e-2),
        ("OGG", "VORBIS", 22050, 2e-2),
        ("OGG", "OPUS", 48000, 3e-2),
    ],
)
def test_every_format_and_rate_gives_the_same_tone(
    container: str, subtype: str | None, rate: int, tolerance: float
) -> None:
    audio = read_audio(encode(tone(rate), rate, container, subtype))
    assert audio.dtype == np.float32
    assert audio.ndim == 1
    assert abs(len(audio) - 24000) < 24000 * 0.06  # MP3 pads to whole frames
    middle = slice(6000, 18000)
    spectrum = np.abs(np.fft.rfft(audio[middle] * np.hanning(12000)))
    assert np.argmax(spectrum) * 2 == 440  # 2 Hz a bin: pitch is kept, so the rate was understood
    level = np.sqrt(np.mean(audio[middle] ** 2))
    assert level == pytest.approx(0.5 / np.sqrt(2), abs=tolerance)


def test_resampling_keeps_time() -> None:
    click = np.zeros(48000)
    click[24000] = 0.9
    audio = read_audio(encode(click, 48000, "WAV", "FLOAT"))
    assert len(audio) == 24000
    assert np.argmax(np.abs(audio)) == 12000


def test_resampling_removes_what_the_new_rate_cannot_hold() -> None:
    audio = read_audio(encode(tone(48000, frequency=16000.0), 48000, "WAV", "FLOAT"))
    assert np.abs(audio[2000:-2000]).max() < 1e-3


def test_stereo_becomes_the_mean_of_both_sides() -> None:
    stereo = np.stack([np.full(2400, 0.5), np.full(2400, -0.1)], axis=1)
    np.testing.assert_allclose(read_audio(encode(stereo, 24000, "WAV", "FLOAT")), 0.2, atol=1e-6)


def test_samples_beyond_full_scale_are_clipped() -> None:
    audio = read_audio(encode(np.array([0.0, 3.0, -1e30]), 24000, "WAV", "FLOAT"))
    assert audio.tolist() == [0.0, 1.0, -1.0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        read_audio(encode(np.array([0.0, value, 0.0]), 24000, "WAV", "FLOAT"))


def test_the_length_limit_is_in_seconds_of_the_file() -> None:
    exactly = encode(np.zeros(16000), 8000, "WAV")
    assert len(read_audio(exactly, max_seconds=2)) == 48000
    with pytest.raises(InputError, match="longer than 2 seconds"):
        read_audio(encode(np.zeros(16001), 8000, "WAV"), max_seconds=2)


def test_what_is_no_audio_is_refused(tmp_path: Path) -> None:
    noise = tmp_path / "noise.raw"  # a name that audio libraries treat in a special way
    noise.write_bytes(bytes(range(256)) * 40)
    cases: list[tuple[Path | bytes, str]] = [
        (tmp_path / "missing.wav", "no such file"),
        (tmp_path, "is a folder"),
        (noise, "is not audio"),
        (b"", "is empty"),
        (b"just a sentence, no sound", "is not audio"),
        (encode(np.zeros(0), 24000, "WAV"), "no samples"),
        (encode(tone(24000), 24000, "WAV")[:20], "is not audio"),
    ]
    for source, message in cases:
        with pytest.raises(InputError, match=message):
            read_audio(source)
    with pytest.raises(InputError, match="missing.wav"):
        read_audio(tmp_path / "missing.wav")


def test_a_damaged_flac_is_refused_or_short_but_never_wrong() -> None:
    whole = encode(tone(24000), 24000, "FLAC")
    try:
        audio = read_audio(whole[: len(whole) // 2])
    except InputError:
        return
    np.testing.assert_allclose(audio, tone(24000)[: len(audio)], atol=1e-4)


def test_an_impossible_rate_is_refused() -> None:
    content = bytearray(encode(np.zeros(100), 24000, "WAV"))
    content[24:28] = (7).to_bytes(4, "little")
    with pytest.raises(InputError, match="7 samples a second"):
        read_audio(bytes(content))


@pytest.mark.parametrize("shape", [(480,), (480, 1), (480, 2)])
def test_written_wav_is_read_back_exactly(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    audio = rng.integers(-32768, 32768, shape) / 32768.0
    write_wav(tmp_path / "out.wav", audio, 24000)
    back, rate = soundfile.read(tmp_path / "out.wav", always_2d=True)
    assert rate == 24000
    assert soundfile.info(tmp_path / "out.wav").subtype == "PCM_16"
    np.testing.assert_array_equal(back, audio.reshape(480, -1))


def test_writing_clips_and_does_not_wrap(tmp_path: Path) -> None:
    write_wav(tmp_path / "loud.wav", np.array([2.0, -2.0, 1.0]), 24000)
    back, _ = soundfile.read(tmp_path / "loud.wav", dtype="int16")
    assert back.tolist() == [32767, -32768, 32767]


def test_refused_audio_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finite"):
        write_wav(tmp_path / "out.wav", np.array([0.0, np.nan]), 24000)
    with pytest.raises(ValueError, match=r"\[T, C\]"):
        write_wav(tmp_path / "out.wav", np.zeros((2, 3, 4)), 24000)
    assert os.listdir(tmp_path) == []
