"""Samples of conversations stacked into the tensors of a training step."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moshivis.config import SpeechLMConfig
from moshivis.mini.timeline import IGNORE, Sample
from moshivis.speech_lm.streams import ZERO_TOKEN, apply_delays, model_inputs
from moshivis.speech_lm.tokenizer import PADDING

MID_STREAM = 0.3  # share of spoken samples that start in the middle of a conversation
EXTRA_FRAMES = 64  # frames by which a conversation is longer than the sample cut from it


@dataclass(frozen=True)
class Batch:
    inputs: Tensor  # [B, K, T] what the model sees
    text: Tensor  # [B, T] text targets
    text_weight: Tensor  # [B, T]
    audio: Tensor  # [B, own, T] own audio targets, as delayed; IGNORE where there is none
    depth: Tensor  # [B, T] bool, frames that train the depth transformer
    heard: Tensor  # [B, T] auxiliary targets: words of the user just heard

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def spoken_batch(samples: list[Sample], config: SpeechLMConfig, frames: int, rng: random.Random) -> Batch:
    """Samples of frames + EXTRA_FRAMES frames, each cut to `frames`: most from the start, some from the middle."""
    starts = [rng.randint(1, EXTRA_FRAMES) if rng.random() < MID_STREAM else 0 for _ in samples]
    whole = _stack([_taught_from(start, sample) for start, sample in zip(starts, samples, strict=True)], config)
    index = torch.tensor(starts)[:, None] + torch.arange(frames)

    def cut(x: Tensor) -> Tensor:
        where = index if x.ndim == 2 else index[:, None].expand(-1, x.shape[1], -1)
        return x.gather(-1, where)

    return Batch(**{name: cut(value) for name, value in vars(whole).items()})


def _taught_from(start: int, sample: Sample) -> Sample:
    """Without text targets about a scene of which some is told before `start`: there would be nothing but to guess."""
    later = [frame for frame in sample.tellings if frame >= start]
    if len(later) == len(sample.tellings):
        return sample
    weight = sample.weight.copy()
    weight[: later[0] if later else None] = 0.0
    return replace(sample, weight=weight)


def written_batch(samples: list[Sample], config: SpeechLMConfig) -> Batch:
    return _stack(samples, config)


def _stack(samples: list[Sample], config: SpeechLMConfig) -> Batch:
    def stack(get: Callable[[Sample], np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack([get(sample) for sample in samples]))

    text, own, user = stack(lambda s: s.text), stack(lambda s: s.own), stack(lambda s: s.user)
    codes = torch.cat([text[:, None], own, user], dim=1)
    inputs = model_inputs(codes, config)
    if (own < 0).all():  # written: the audio streams stay empty, initial tokens included
        inputs[:, 1:] = ZERO_TOKEN
    audio = apply_delays(codes, config)[:, 1 : 1 + config.own_codebooks]
    audio = torch.where((audio >= 0) & (audio < config.audio_card), audio, IGNORE)
    heard = stack(lambda s: s.heard)
    return Batch(inputs, text, stack(lambda s: s.weight), audio, stack(lambda s: s.audible), heard)


def heard_weight(heard: Tensor) -> Tensor:
    """Padding is most of the auxiliary stream and weighs little."""
    return torch.where(heard == PADDING, 0.15, 1.0) * (heard != IGNORE)
