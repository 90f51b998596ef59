"""Stage `codes`: every clip through the codec's encoder, once; training then reads codes only.

User clips are augmented (noise, gain, room) before they are encoded, the assistant's are not. Every clip is encoded
after a little silence and with a tail of it, as it will stand in a conversation.
"""

from __future__ import annotations

import random
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from moshivis.codec import Mimi
from moshivis.files import atomic_write
from moshivis.mini.augment import augment
from moshivis.mini.clips import ClipStore

LEAD_FRAMES, TAIL_FRAMES = 3, 3  # silence before (dropped) and after (kept) each clip
SILENCE_FRAMES, NUM_BACKGROUNDS = 256, 24
BATCH = 16


class ClipCodes:
    """Codes [K, frames] uint8 of every clip of a store, and of silence as each side hears it."""

    def __init__(self, folder: Path, clips: ClipStore):
        self.clips = clips
        shards = {clip.shard for clip in clips.clips}
        arrays = {shard: np.load(_path(folder, shard)) for shard in sorted(shards)}
        position = dict.fromkeys(shards, 0)
        self._codes: list[np.ndarray] = []
        for clip in clips.clips:
            start, count = position[clip.shard], num_frames(clip.samples)
            self._codes.append(arrays[clip.shard][:, start : start + count])
            position[clip.shard] = start + count
        self.silence = np.load(folder / "silence.npy")  # [K, frames], digital silence
        self.backgrounds = np.load(folder / "backgrounds.npy")  # [N, K, frames], what an idle microphone gives

    def __getitem__(self, index: int) -> np.ndarray:
        return self._codes[index]


def num_frames(samples: int) -> int:
    """Frames that a clip's codes have, its tail included."""
    return -(-samples // 1920) + TAIL_FRAMES


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
    _codec, _clips = codec, ClipStore(folder)


@torch.no_grad()
def _encode_shard(shard: int, folder: Path) -> None:
    indices = [i for i, clip in enumerate(_clips.clips) if clip.shard == shard]
    waves = {i: _padded(i) for i in indices}
    codes: dict[int, np.ndarray] = {}
    ordered = sorted(indices, key=lambda i: len(waves[i]))
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        longest = max(len(waves[i]) for i in batch)
        stack = np.stack([np.pad(waves[i], (0, longest - len(waves[i]))) for i in batch])
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast; one semantic code in a hundred differs
            encoded = _codec.encode(torch.from_numpy(stack)[:, None]).to(torch.uint8).numpy()
        for row, i in enumerate(batch):
            codes[i] = encoded[row, :, LEAD_FRAMES : LEAD_FRAMES + num_frames(_clips.clips[i].samples)]
    _save(_path(folder, shard), np.concatenate([codes[i] for i in indices], axis=1))


def _padded(index: int) -> np.ndarray:
    clip = _clips.clips[index]
    frame = _codec.config.frame_size
    wave = np.zeros((LEAD_FRAMES + num_frames(clip.samples)) * frame, np.float32)
    wave[LEAD_FRAMES * frame :][: clip.samples] = _clips.audio(index)
    return augment(wave, np.random.default_rng(index)) if clip.role == "user" else wave


@torch.no_grad()
def _encode_silence(codec: Mimi, folder: Path) -> None:
    frames = LEAD_FRAMES + SILENCE_FRAMES
    zeros = np.zeros(frames * codec.config.frame_size, np.float32)
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
    return folder / f"codes-{shard:05d}.npy"


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array)
