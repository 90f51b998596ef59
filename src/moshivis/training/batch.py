"""Samples stacked into the tensors of one forward pass.

All rows of a part are of one kind. Rows are padded at their end: the model is causal, so nothing real sees padding.
Lengths are rounded up to multiples of a bucket, so that shapes repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moshivis.config import SpeechLMConfig
from moshivis.data.sample import Kind, Sample, Speaker
from moshivis.errors import InputError
from moshivis.speech_lm.streams import ZERO_TOKEN, apply_delays, model_inputs
from moshivis.training.recipe import LossRecipe


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of one kind, B of them, T steps long."""

    kind: Kind
    inputs: Tensor  # [B, K, T] what the backbone sees
    text: Tensor  # [B, T] text targets as delayed; the id beyond the vocabulary is the initial token
    text_weight: Tensor  # [B, T] float32, 0 where there is none
    assistant: Tensor  # [B, T] bool, whose words the targets are
    audio: Tensor  # [B, n, T] the first n own codebooks as delayed; ids beyond the vocabulary are initial tokens
    audio_graded: Tensor  # [B, n, T] bool, which of them are targets
    real: Tensor  # [B, T] bool, steps that are no padding
    pictures: tuple[str | None, ...]  # key of every row's picture
    steps: int  # that are no padding, over all rows

    def to(self, device: torch.device) -> Part:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return Part(**{**vars(self), **moved})


def split(samples: Sequence[Sample], parts: int) -> list[list[Sample]]:
    """The samples in at most `parts` lists that differ by one in size, samples of similar length together."""
    count = min(parts, len(samples))
    ordered = sorted(samples, key=len)
    bounds = [len(ordered) * index // count for index in range(count + 1)] if count else []
    return [ordered[begin:end] for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]


def collate(samples: Sequence[Sample], config: SpeechLMConfig, loss: LossRecipe, *, limit: int, bucket: int) -> Part:
    """Stack samples of one kind; what exceeds `limit` steps is cut off at the end.

    Raises InputError for a sample that does not fit the model: other codebooks, ids beyond the vocabulary.
    """
    for sample in samples:
        check_sample(sample, config)
    late = max(config.delays) if samples[0].kind == "speech" else 0  # the last codes come so much later
    steps = min(max(map(len, samples)) + late, limit)
    length = min(-(-steps // bucket) * bucket, limit)

    def stack(get: Callable[[Sample], np.ndarray], padding: float) -> Tensor:
        rows = [torch.from_numpy(np.ascontiguousarray(get(sample)[..., :limit])) for sample in samples]
        return torch.stack([F.pad(row, (0, length - row.shape[-1]), value=padding) for row in rows])

    text = stack(lambda s: s.text.astype(np.int64), config.text_padding)
    audio = stack(lambda s: _audio(s, config), ZERO_TOKEN)
    codes = torch.cat([text[:, None], audio], dim=1)
    delayed = apply_delays(codes, config)
    inputs = model_inputs(codes, config)
    kind = samples[0].kind
    if kind == "speechless":
        inputs[:, 1:] = ZERO_TOKEN  # no audio at all, initial tokens included
    count = min(loss.codebooks, config.own_codebooks)
    graded = stack(_audio_graded, 0).bool()
    own = delayed[:, 1 : 1 + count]
    delayed_graded = torch.stack([_late(graded, config.delays[1 + k]) for k in range(count)], dim=1)
    return Part(
        kind=kind,
        inputs=inputs,
        text=delayed[:, 0],
        text_weight=_late(stack(lambda s: _text_weight(s, loss), 0.0), config.delays[0]),
        assistant=_late(stack(lambda s: s.speaker == Speaker.ASSISTANT, 0), config.delays[0]),
        audio=own,
        audio_graded=delayed_graded & (own >= 0) & (own < config.audio_card),
        real=stack(lambda s: np.ones(len(s), bool), 0),
        pictures=tuple(sample.image for sample in samples),
        steps=sum(min(len(sample), limit) for sample in samples),
    )


def check_sample(sample: Sample, config: SpeechLMConfig) -> None:
    """Raise InputError, naming the sample, if the model cannot read it."""
    name = sample.origin or "a sample"
    if not len(sample):
        raise InputError(f"{name} is empty")
    if sample.text.min() < 0 or sample.text.max() >= config.text_card:
        raise InputError(
            f"{name} holds text ids from {sample.text.min()} to {sample.text.max()}, the model's vocabulary has "
            f"{config.text_card}; tokenize the data with this model"
        )
    if sample.audio is None:
        return
    streams = config.own_codebooks + config.user_codebooks
    if sample.audio.shape != (streams, len(sample)):
        raise InputError(
            f"{name} has audio codes {list(sample.audio.shape)}, the model needs {[streams, len(sample)]}; "
            "tokenize the data with this model"
        )
    if sample.audio.max() >= config.audio_card:
        raise InputError(f"{name} holds audio id {sample.audio.max()}, the model's codebooks have {config.audio_card}")


def _audio(sample: Sample, config: SpeechLMConfig) -> np.ndarray:
    if sample.audio is None:
        return np.full((config.own_codebooks + config.user_codebooks, len(sample)), ZERO_TOKEN, np.int64)
    return sample.audio.astype(np.int64)


def _audio_graded(sample: Sample) -> np.ndarray:
    if sample.audio is None:
        return np.zeros(len(sample), np.uint8)
    return np.ones(len(sample), np.uint8) if sample.audio_graded is None else sample.audio_graded.astype(np.uint8)


def _text_weight(sample: Sample, loss: LossRecipe) -> np.ndarray:
    weights = np.zeros(len(Speaker), np.float32)
    weights[Speaker.NOBODY], weights[Speaker.ASSISTANT], weights[Speaker.USER] = loss.padding, 1.0, loss.user
    by_token = weights[sample.speaker] * (loss.speech if sample.kind == "speech" else 1.0)
    return (by_token if sample.text_graded is None else by_token * sample.text_graded).astype(np.float32)


def _late(x: Tensor, steps: int) -> Tensor:
    """[B, T] moved `steps` later, zeros before it."""
    return F.pad(x, (steps, 0))[:, : x.shape[1]]
