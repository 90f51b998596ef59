"""Augmentation of user speech: another room, another microphone, some noise.

Text-to-speech is cleaner than any microphone. A third of the clips stay as they are; the others get a few of gain,
noise, a small room and a coloured frequency response. Before that, some are given to another speaker. Length and
alignment never change, so word times stay true.
"""

import numpy as np

from moshivis.mini.voices import SAMPLE_RATE

CLEAN_SHARE = 0.35
_WINDOW, _HOP = 1024, 256  # samples
_LIFTER = 44  # samples of the cepstrum that make the envelope


def augment(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Audio `[samples]` (float32, 24 kHz) as another microphone may have heard it; the same length."""
    if rng.random() < CLEAN_SHARE or not len(audio):
        return audio.astype(np.float32)
    if rng.random() < 0.4:
        audio = reverberate(audio, rng)
    if rng.random() < 0.5:
        audio = colour(audio, rng)
    if rng.random() < 0.6:
        audio = add_noise(audio, rng)
    if rng.random() < 0.7:
        audio = audio * 10 ** (rng.uniform(-14.0, 6.0) / 20)
    peak = np.abs(audio).max(initial=0.0)
    return (audio * min(1.0, 0.99 / max(peak, 1e-9))).astype(np.float32)


def another_throat(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same words at the same pitch from another vocal tract: each region of formants moves by up to a fifth.

    Audio [samples] (float32, 24 kHz) of the same length.

    Per frame the spectral envelope (the cepstrum's first 1.8 ms) is stretched along the frequency axis by a random,
    monotone map, and the spectrum filtered to have it. Often it is smoothed over up to seven frames (75 ms), as voices
    are that were learnt from recordings.
    """
    if len(audio) < _WINDOW:
        return audio
    padded = np.pad(audio, _WINDOW)
    window = np.hanning(_WINDOW + 1)[:-1]
    spectrum = np.fft.rfft(np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP] * window)  # [F, bins]
    cepstrum = np.fft.irfft(np.log(np.abs(spectrum) + 1e-5))
    cepstrum[:, _LIFTER : _WINDOW - _LIFTER + 1] = 0.0
    envelope = np.fft.rfft(cepstrum).real  # log
    frequencies = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE)
    knots = np.array([300.0, 900.0, 1800.0, 2700.0, 4000.0, 7000.0])
    moved = knots * rng.uniform(0.9, 1.1) * rng.uniform(0.88, 1.12, len(knots))
    top = SAMPLE_RATE / 2
    places = np.interp(frequencies, [0.0, *moved, top], [0.0, *knots, top]) / frequencies[1]
    below = np.minimum(places.astype(int), len(frequencies) - 2)
    share = places - below
    warped = _smoothed(envelope[:, below] * (1 - share) + envelope[:, below + 1] * share, 2 * int(rng.integers(4)) + 1)
    frames = np.fft.irfft(spectrum * np.exp(np.clip(warped - envelope, -2.5, 2.5))) * window
    out, weight = np.zeros(len(padded)), np.full(len(padded), 1e-6)
    for number, frame in enumerate(frames):
        out[number * _HOP : number * _HOP + _WINDOW] += frame
        weight[number * _HOP : number * _HOP + _WINDOW] += window**2
    return (out / weight)[_WINDOW : _WINDOW + len(audio)].astype(np.float32)


def _smoothed(envelope: np.ndarray, width: int) -> np.ndarray:
    """[F, bins], each frame the mean of `width` around it, the near ones weighted more; width is odd."""
    kernel = np.hanning(width + 2)[1:-1]
    padded = np.pad(envelope, ((width // 2, width // 2), (0, 0)), mode="edge")
    return sum(weight * padded[n : n + len(envelope)] for n, weight in enumerate(kernel / kernel.sum()))


def add_noise(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White, pink or humming noise, 15 to 40 dB below the sound, the silence around the speech included."""
    count = len(audio)
    kind = rng.integers(3)
    if kind == 2:
        time = np.arange(count) / SAMPLE_RATE
        mains = rng.choice((50.0, 60.0))
        harmonics = ((n, rng.random() / n, rng.uniform(0, 2 * np.pi)) for n in (1, 2, 3, 5))
        noise = sum(level * np.sin(2 * np.pi * mains * n * time + phase) for n, level, phase in harmonics)
    else:
        noise = rng.standard_normal(count)
        if kind == 1:
            spectrum = np.fft.rfft(noise)
            noise = np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)) + 1.0), count)
    ratio = 10 ** (-rng.uniform(15.0, 40.0) / 20)
    return audio + noise * (_level(audio) * ratio / max(_level(np.asarray(noise)), 1e-9))


def reverberate(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A small room: an exponentially decaying noise tail (0.1 to 0.4 s to -60 dB) behind the direct sound."""
    decay = rng.uniform(0.1, 0.4)
    count = int(decay * SAMPLE_RATE)
    tail = rng.standard_normal(count) * np.exp(-6.9 * np.arange(count) / count)
    tail[: int(rng.uniform(0.002, 0.01) * SAMPLE_RATE)] = 0.0  # the first reflection comes later
    tail *= 10 ** (-rng.uniform(4.0, 14.0) / 20) / max(np.sqrt(np.sum(tail**2)), 1e-9)
    tail[0] = 1.0
    return _convolve(audio, tail)


def colour(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A light equaliser: a smooth random response within ±8 dB, and now and then the low-pass of a poor line."""
    size = len(audio) + SAMPLE_RATE // 10  # padded: what the filter smears must not come round to the beginning
    frequencies = np.fft.rfftfreq(size, 1 / SAMPLE_RATE)
    bands = np.array([0.0, 150.0, 400.0, 1000.0, 2500.0, 6000.0, 12000.0])
    response = 10 ** (np.interp(frequencies, bands, rng.uniform(-8.0, 8.0, len(bands))) / 20)
    if rng.random() < 0.4:
        response /= np.sqrt(1.0 + (frequencies / rng.uniform(3000.0, 8000.0)) ** 8)
    return np.fft.irfft(np.fft.rfft(audio, size) * response, size)[: len(audio)]


def _level(audio: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(audio))))


def _convolve(audio: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    size = len(audio) + len(kernel) - 1
    fast = 1 << (size - 1).bit_length()
    return np.fft.irfft(np.fft.rfft(audio, fast) * np.fft.rfft(kernel, fast), fast)[: len(audio)]
