"""What belongs to one row of a running batch and can change at any step: its picture, and how it is sampled.

All tensors are made once and written in place, so that a step always runs the same shapes on the same memory.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moshivis.adapters.gated_cross_attention import ImageKV
from moshivis.errors import InputError
from moshivis.inference.sampling import Sampling

MAX_TOP_K = 500  # candidates that a row can draw from; the released page offers 10 to 500
MAX_TEMPERATURE = 2.0
MAX_PADDING_BIAS = 10.0


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How one conversation is sampled. The same seed and the same input give the same conversation."""

    text_temperature: float
    text_top_k: int
    audio_temperature: float
    audio_top_k: int
    seed: int = 0
    padding_bias: float = 0.0  # b multiplies the probability of the text padding by e^b: more is more silent

    @classmethod
    def usual(cls, sampling: Sampling) -> RowSettings:
        return cls(
            text_temperature=sampling.text_temperature,
            text_top_k=sampling.text_top_k,
            audio_temperature=sampling.audio_temperature,
            audio_top_k=sampling.audio_top_k,
        )

    def check(self) -> None:
        """Raises InputError naming the first value that is out of its range."""
        for name in ("text_temperature", "audio_temperature"):
            _check(name, getattr(self, name), 0.0, MAX_TEMPERATURE)
        for name in ("text_top_k", "audio_top_k"):
            _check(name, getattr(self, name), 0, MAX_TOP_K)
        _check("padding_bias", self.padding_bias, -MAX_PADDING_BIAS, MAX_PADDING_BIAS)
        _check("seed", self.seed, 0, 2**63 - 1)


def _check(name: str, value: Any, least: float, most: float) -> None:
    whole = isinstance(least, int)
    is_number = not isinstance(value, bool) and isinstance(value, numbers.Integral if whole else numbers.Real)
    if not is_number or not least <= value <= most:  # NaN is not
        what = f"a whole number from {least} to {most}" if whole else f"a number from {least:g} to {most:g}"
        raise InputError(f"{name} must be {what}, not {value!r}")


class RowSampling:
    """Draws tokens for a batch whose rows have settings of their own; called like `Sampling`.

    The randomness of a row is a function of its seed, its step, the stream and the candidate: no state but the step,
    nothing shared between rows. Top-k 0 draws from the MAX_TOP_K likeliest.
    """

    def __init__(self, rows: int, padding: int, device: torch.device | str = "cpu"):
        self._padding = padding
        self.seed = torch.zeros(rows, dtype=torch.int64, device=device)
        self.steps = torch.zeros(rows, dtype=torch.int64, device=device)
        self.padding_bias = torch.zeros(rows, device=device)
        self.temperature = torch.ones(2, rows, device=device)  # of text, of audio
        self.top_k = torch.full((2, rows), MAX_TOP_K, device=device)

    def put(self, row: int, settings: RowSettings) -> None:
        """Begin a conversation in `row`."""
        self.steps[row] = 0
        self.seed[row] = settings.seed
        self.padding_bias[row] = settings.padding_bias
        for kind, (temperature, top_k) in enumerate(
            (
                (settings.text_temperature, settings.text_top_k),
                (settings.audio_temperature, settings.audio_top_k),
            )
        ):
            self.temperature[kind, row] = temperature
            self.top_k[kind, row] = top_k or MAX_TOP_K

    def advance(self, active: Tensor) -> None:
        """Count a step of the rows `active` [B] bool."""
        self.steps += active

    def __call__(self, logits: Tensor, stream: int) -> Tensor:
        """Logits [B, card] of a stream -> ids [B]."""
        kind = min(stream, 1)
        temperature, top_k = self.temperature[kind][:, None], self.top_k[kind][:, None]
        logits = logits.float()
        if stream == 0:
            logits = logits.clone()
            tempered = torch.where(self.temperature[0] > 0, self.temperature[0], 1.0)
            logits[:, self._padding] += self.padding_bias * tempered
        values, ids = logits.topk(min(MAX_TOP_K, logits.shape[-1]), dim=-1)
        rank = torch.arange(values.shape[-1], device=values.device)
        greedy = temperature <= 0
        scores = values / torch.where(greedy, 1.0, temperature) + self._gumbel(stream, rank)
        scores = torch.where(rank < torch.where(greedy, 1, top_k), scores, -math.inf)
        return ids.gather(-1, scores.argmax(-1, keepdim=True))[:, 0]

    def _gumbel(self, stream: int, rank: Tensor) -> Tensor:
        """[B, n] Gumbel noise: the largest of scores + noise is a draw from their softmax."""
        key = _mix(_mix(self.seed) + self.steps * 1024 + stream)
        bits = _mix(key[:, None] + rank)
        uniform = _uniform(bits, torch.float32 if bits.device.type == "mps" else torch.float64)  # mps has no double
        return -(-uniform.log()).log().float()


def _uniform(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Random 64-bit integers as numbers between 0 and 1, neither of which is reached."""
    digits = 23 if dtype == torch.float32 else 52
    return ((bits >> (64 - digits)).to(dtype) + 0.5) * 2.0**-digits + 0.5  # an arithmetic shift: the sign stays


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers that scatters neighbours (the finaliser of splitmix64)."""
    x = x + -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of signed integers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class ImageRows:
    """Keys and values of every row's picture, in buffers that pictures are copied into."""

    def __init__(self, rows: int, like: ImageKV, most_tokens: int | None = None):
        """Shaped like the picture `like`; `most_tokens` if pictures differ in their number of tokens."""
        shape = [list(part.shape[1:]) for part in like.keys]
        if most_tokens is not None:
            shape = [[heads, max(most_tokens, tokens), dim] for heads, tokens, dim in shape]
        device = like.keys[0].device
        tokens = shape[0][1]
        self.kv = ImageKV(
            keys=tuple(like.keys[0].new_zeros((rows, *part)) for part in shape),
            values=tuple(like.keys[0].new_zeros((rows, *part)) for part in shape),
            mask=None if most_tokens is None else torch.ones(rows, tokens, dtype=torch.bool, device=device),
            present=torch.zeros(rows, dtype=torch.bool, device=device),
        )

    def put(self, row: int, image: ImageKV | None) -> None:
        """Show `image`, one picture, in `row`; None removes what is there.

        Raises InputError for the keys and values of another model.
        """
        assert self.kv.present is not None
        if image is not None and not self._holds(image):
            raise InputError("these keys and values of a picture are of another model")
        self.kv.present[row] = image is not None
        if image is None:
            return
        tokens = image.keys[0].shape[2]
        for buffers, parts in ((self.kv.keys, image.keys), (self.kv.values, image.values)):
            for buffer, part in zip(buffers, parts, strict=True):
                buffer[row] = 0  # whatever stood there counts even where it is masked, if it is not a number
                buffer[row, :, :tokens] = part[0]
        if self.kv.mask is not None:
            self.kv.mask[row] = torch.arange(self.kv.mask.shape[1], device=self.kv.mask.device) < tokens
            if image.mask is not None:
                self.kv.mask[row, :tokens] &= image.mask[0]

    def _holds(self, image: ImageKV) -> bool:
        ours, theirs = (*self.kv.keys, *self.kv.values), (*image.keys, *image.values)
        if len(ours) != len(theirs):
            return False
        for buffer, part in zip(ours, theirs, strict=True):
            _, heads, room, dim = buffer.shape
            tokens = part.shape[2] if part.ndim == 4 else -1
            exact = self.kv.mask is None  # every picture has as many tokens
            if tuple(part.shape) != (1, heads, tokens, dim) or tokens > room or (exact and tokens != room):
                return False
        return True
