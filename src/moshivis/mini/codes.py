"""Stage `codes`: every clip through the codec's encoder; training then reads codes only.

The assistant's clips are encoded once, as they are. A user's clip is encoded in several takes: at another speed, at
another place in the codec's frames, now and then from another throat, and as another microphone in another room gives
it. A model that met one take only would learn its codes by heart, not to hear. Every take is encoded after a little
silence and with a tail of it, as it will stand in a conversation.
"""

from __future__ import annotations

import random
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soxr
import torch
from rich.progress import track

from moshivis.codec import Mimi
from moshivis.devices import has_bfloat16
from moshivis.files import atomic_write
from moshivis.mini import parallel
from moshivis.mini.augment import another_throat, augment
from moshivis.mini.clips import ClipStore
from moshivis.mini.voices import SAMPLE_RATE

FRAME = 1920  # samples
# Silence before (dropped) and after (kept) each clip. The codec looks back 16 frames and a little, and silence comes
# before a question in a conversation: after three frames of it one in six of its first semantic codes is another one.
LEAD_FRAMES, TAIL_FRAMES = 18, 10
TAKES, SPEEDS = 2, (0.86, 1.16)  # of a user's clip
# Share of takes from another throat, more of the voices that are most like the one that training never hears
THROATS, MORE_THROATS = 0.25, {"flite-awb": 0.6, "festival-slt-lowered": 0.6}
SILENCE_FRAMES, NUM_BACKGROUNDS = 256, 24
BATCH = 16


@dataclass(frozen=True)
class Take:
    """A clip as it was heard once."""

    codes: np.ndarray  # [K, frames] uint8, the tail included
    start: float  # seconds into the codes at which the clip begins
    speed: float  # by which it was spoken faster than the clip

    def when(self, seconds: float) -> float:
        """Where in the codes, in seconds, a time of the clip lies."""
        return self.start + seconds / self.speed


class ClipCodes:
    """The takes of every clip of a store, and the codes of silence as each side hears it."""

    def __init__(self, folder: Path, clips: ClipStore):
        self.clips = clips
        self._takes: list[list[Take]] = [[] for _ in clips.clips]
        for shard in sorted({clip.shard for clip in clips.clips}):
            saved = np.load(_path(folder, shard))
            ends = np.cumsum(saved["frames"])
            codes = np.split(saved["codes"], ends[:-1], axis=1)
            first = next(i for i, clip in enumerate(clips.clips) if clip.shard == shard)
            rows = zip(saved["clip"], codes, saved["start"], saved["speed"], strict=True)
            for clip, part, start, speed in rows:
                self._takes[first + int(clip)].append(Take(part, float(start), float(speed)))
        self.silence = np.load(folder / "silence.npy")  # [K, frames], digital silence
        self.backgrounds = np.load(folder / "backgrounds.npy")  # [N, K, frames], what an idle microphone gives

    def __getitem__(self, index: int) -> np.ndarray:
        """Codes [K, frames] of the first take of clip `index`; the assistant's have no other."""
        return self._takes[index][0].codes

    def take(self, index: int, rng: random.Random) -> Take:
        """One of the takes of clip `index`."""
        return rng.choice(self._takes[index])


def encode_clips(codec: Mimi, clips: ClipStore, folder: Path, workers: int = 2) -> ClipCodes:
    """Encode the shards that are still missing, `workers` at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in sorted({clip.shard for clip in clips.clips}) if not _path(folder, shard).exists()]
    with ProcessPoolExecutor(workers, initializer=_open, initargs=(codec, clips.folder)) as pool:
        jobs = [pool.submit(_encode_shard, shard, folder) for shard in missing]
        for job in track(as_completed(jobs), "encoding clips", total=len(jobs)):
            job.result()
    if not (folder / "backgrounds.npy").exists():
        _encode_silence(codec, folder)
    return ClipCodes(folder, clips)


_codec: Mimi
_clips: ClipStore


def _open(codec: Mimi, folder: Path) -> None:
    global _codec, _clips  # one of each per worker process
    torch.set_num_threads(1)
    parallel.keep_memory()
    _codec, _clips = codec, ClipStore(folder)


@torch.no_grad()
def _encode_shard(shard: int, folder: Path) -> None:
    indices = [i for i, clip in enumerate(_clips.clips) if clip.shard == shard]
    user = _clips.clips[indices[0]].role == "user"
    heard = [_hear(i, take) for i in indices for take in range(TAKES if user else 1)]
    codes: dict[int, np.ndarray] = {}
    ordered = sorted(range(len(heard)), key=lambda n: len(heard[n].wave))
    for first in range(0, len(ordered), BATCH):
        batch = ordered[first : first + BATCH]
        longest = max(len(heard[n].wave) for n in batch)
        stack = np.stack([np.pad(heard[n].wave, (0, longest - len(heard[n].wave))) for n in batch])
        # Twice as fast; one semantic code in a hundred differs, of the last level every fifth: not for what is spoken.
        with torch.autocast("cpu", torch.bfloat16, enabled=user and has_bfloat16("cpu")):
            encoded = _codec.encode(torch.from_numpy(stack)[:, None]).to(torch.uint8).numpy()
        for row, n in enumerate(batch):
            codes[n] = encoded[row, :, LEAD_FRAMES : len(heard[n].wave) // FRAME]
    with atomic_write(_path(folder, shard)) as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            codes=np.concatenate([codes[n] for n in range(len(heard))], axis=1),
            frames=[codes[n].shape[1] for n in range(len(heard))],
            clip=[one.index - indices[0] for one in heard],
            start=[one.start for one in heard],
            speed=[one.speed for one in heard],
        )


@dataclass(frozen=True)
class _Heard:
    index: int
    wave: np.ndarray  # whole frames, lead and tail included
    start: float
    speed: float


def _hear(index: int, take: int) -> _Heard:
    """Take `take` of a clip, ready to be encoded."""
    clip, audio = _clips.clips[index], _clips.audio(index)
    said = f"{clip.voice} {clip.text} {clip.samples}".encode()  # another sitting's clip is heard otherwise
    rng = np.random.default_rng((zlib.crc32(said), take))
    offset, speed = 0, 1.0
    if clip.role == "user":
        offset, speed = int(rng.integers(FRAME)), float(rng.uniform(*SPEEDS))
        audio = soxr.resample(audio, SAMPLE_RATE * speed, SAMPLE_RATE)
        if rng.random() < MORE_THROATS.get(clip.voice, THROATS):
            audio = another_throat(audio, rng)
    frames = LEAD_FRAMES - (-(offset + len(audio)) // FRAME) + TAIL_FRAMES
    wave = np.zeros(frames * FRAME, np.float32)
    wave[LEAD_FRAMES * FRAME + offset :][: len(audio)] = audio
    return _Heard(index, augment(wave, rng) if clip.role == "user" else wave, offset / SAMPLE_RATE, speed)


@torch.no_grad()
def _encode_silence(codec: Mimi, folder: Path) -> None:
    frames = LEAD_FRAMES + SILENCE_FRAMES
    zeros = np.zeros(frames * FRAME, np.float32)
    rng = random.Random(0)
    rooms = [zeros] + [_background(zeros, rng) for _ in range(NUM_BACKGROUNDS)]
    codes = codec.encode(torch.from_numpy(np.stack(rooms))[:, None]).to(torch.uint8).numpy()[..., LEAD_FRAMES:]
    _save(folder / "silence.npy", codes[0])
    _save(folder / "backgrounds.npy", codes)


def _background(zeros: np.ndarray, rng: random.Random) -> np.ndarray:
    noise = np.random.default_rng(rng.getrandbits(32))
    white = noise.standard_normal(len(zeros)).astype(np.float32)
    smooth = np.convolve(white, np.ones(rng.choice((1, 8, 32))), mode="same")
    return (10 ** rng.uniform(-4.0, -2.2) * smooth / smooth.std()).astype(np.float32)


def _path(folder: Path, shard: int) -> Path:
    return folder / f"codes-{shard:05d}.npz"


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)
