"""`moshivis bench step`: what one 80 ms frame of conversation costs, part by part.

A frame runs through the codec's encoder, the LM step (backbone with its adapters and a picture in view, then the depth
transformer) and the codec's decoder. At batch 1 every weight is read once for a handful of multiplications, so a
step is as fast as memory: beside the milliseconds stand the bytes that a part must read (its weights, and the keys
and values of rings and picture) and the bandwidth that this comes to.

All rings are full, as in a conversation that has lasted for longer than the model remembers: it gets no slower.
Output: a table for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moshivis.adapters.gated_cross_attention import GatedCrossAttention, ImageKV
from moshivis.checkpoints.load import dtype_named, load_config
from moshivis.devices import usable_device
from moshivis.errors import InputError
from moshivis.inference.bench_codec import bytes_read, weights_bytes
from moshivis.inference.conversation import EMBEDDED, load
from moshivis.inference.generation import Generator
from moshivis.inference.sampling import Sampling
from moshivis.layers.attention import AttentionState
from moshivis.model import MoshiVis
from moshivis.presets import PRESETS, random_model

WARM_UP = 5  # frames that are not counted
ENCODE, BACKBONE, DEPTH, DECODE = ("codec_encode", "backbone", "depth", "codec_decode")
LM_STEP, SUM = "lm_step", "sum"


@dataclass(frozen=True, kw_only=True, eq=False)
class PartCost:
    """One part, or several together."""

    name: str
    ms: NDArray[np.float64]  # [frames]
    bytes: int  # that a frame must read

    @property
    def median(self) -> float:
        return float(np.median(self.ms))

    @property
    def p99(self) -> float:
        return float(np.percentile(self.ms, 99))

    @property
    def gb_per_s(self) -> float:
        """Bandwidth of the median frame, in 10^9 bytes a second."""
        return self.bytes / max(self.median, 1e-9) / 1e6


@dataclass(frozen=True, kw_only=True, eq=False)
class StepCost:
    """A frame: codec_encode, lm_step (backbone and depth), codec_decode and their sum."""

    parts: tuple[PartCost, ...]
    frame_ms: float  # length of the frame

    def __getitem__(self, name: str) -> PartCost:
        return next(part for part in self.parts if part.name == name)

    @property
    def real_time_factor(self) -> float:
        """Computing time of the median frame a second of conversation; below 1 is faster than live."""
        return self[SUM].median / self.frame_ms

    def to_json(self) -> dict[str, Any]:
        return {
            "ms": {
                part.name: {
                    "median": round(part.median, 4),
                    "p99": round(part.p99, 4),
                    "mean": round(float(part.ms.mean()), 4),
                }
                for part in self.parts
            },
            "bytes": {part.name: part.bytes for part in self.parts},
            "gb_per_s": {part.name: round(part.gb_per_s, 3) for part in self.parts},
            "frame_ms": self.frame_ms,
            "real_time_factor": round(self.real_time_factor, 4),
        }


@torch.inference_mode()
def measure_step(model: MoshiVis, *, batch: int = 1, frames: int = 100, seed: int = 0) -> StepCost:
    """Run `batch` conversations about random pictures for `frames` frames of noise, and time every frame.

    Raises InputError for a batch or a number of frames below 1, and on devices other than a CPU or CUDA.
    """
    _check_positive(batch=batch, frames=frames)
    codec, config = model.codec, model.config
    weight = model.speech_lm.text_head.weight
    clock = _Clock(_check_device(weight.device))
    random = torch.Generator(weight.device).manual_seed(seed)
    generator = Generator(model.speech_lm, model.adapters)
    encoder, state, decoder = codec.new_encoder_state(batch), generator.new_state(batch), codec.new_decoder_state(batch)
    for ring in (encoder.transformer.ring, state.backbone.ring, decoder.transformer.ring):
        ring.advance(ring.context)
    image = None if model.adapters is None else _random_image(model, model.adapters, batch, random)
    codec_dtype = next(codec.parameters()).dtype
    noise = torch.randn(batch, 1, config.codec.frame_size, device=weight.device, dtype=codec_dtype, generator=random)
    sampling = Sampling(generators=random)
    hidden_done: list[Any] = []

    def choose(logits: Tensor, stream: int) -> Tensor:
        if stream == 0:  # the text logits are there: what follows is the depth transformer's
            hidden_done.append(clock.mark())
        return sampling(logits, stream)

    times = []
    for _ in range(WARM_UP + frames):
        begun = clock.mark()
        codes = codec.encode_step(encoder, 0.1 * noise, num_codebooks=config.speech_lm.user_codebooks)
        encoded = clock.mark()
        frame = generator.step(state, codes[..., 0], image, choose)
        generated = clock.mark()
        codec.decode_step(decoder, frame.tokens[:, 1:, None], frame.valid)
        times.append(clock.intervals([begun, encoded, hidden_done.pop(), generated, clock.mark()]))
    encode, backbone, depth, decode = np.array(times[WARM_UP:]).T
    read = _bytes_read(model, image, state.backbone, batch)
    lm = read[BACKBONE] + read[DEPTH]
    return StepCost(
        parts=(
            PartCost(name=ENCODE, ms=encode, bytes=read[ENCODE]),
            PartCost(name=LM_STEP, ms=backbone + depth, bytes=lm),
            PartCost(name=BACKBONE, ms=backbone, bytes=read[BACKBONE]),
            PartCost(name=DEPTH, ms=depth, bytes=read[DEPTH]),
            PartCost(name=DECODE, ms=decode, bytes=read[DECODE]),
            PartCost(name=SUM, ms=encode + backbone + depth + decode, bytes=read[ENCODE] + lm + read[DECODE]),
        ),
        frame_ms=1000 / config.codec.frame_rate,
    )


class _Clock:
    """Moments of a frame, on the device's own clock. Asking for the intervals waits until the device is there."""

    def __init__(self, device: torch.device):
        self._device = device

    def mark(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def intervals(self, marks: Sequence[Any]) -> list[float]:
        """Milliseconds from each mark to the next."""
        pairs = list(zip(marks[:-1], marks[1:], strict=True))
        if self._device.type == "cpu":
            return [1000 * (end - begin) for begin, end in pairs]
        torch.cuda.synchronize(self._device)
        return [begin.elapsed_time(end) for begin, end in pairs]


def _random_image(model: MoshiVis, adapters: GatedCrossAttention, batch: int, random: torch.Generator) -> ImageKV:
    """Keys and values of as many image tokens as a picture of the native size has."""
    project = adapters.key_value[0].weight
    assert isinstance(project, Tensor)
    tokens = (model.config.vision.image_size // model.config.vision.patch_size) ** 2
    shape = (batch, tokens, project.shape[1])
    return adapters.encode(
        torch.randn(shape, device=project.device, dtype=project.dtype, generator=random), streaming=True
    )


# bytes --------------------------------------------------------------------------------------------------------------


def _bytes_read(model: MoshiVis, image: ImageKV | None, backbone: Any, batch: int) -> dict[str, int]:
    """What a frame must read of each part; of embedding tables, that is nothing to speak of."""
    lm = model.speech_lm
    codec = bytes_read(model.codec, lm.config.user_codebooks, batch)
    return {
        ENCODE: codec["encode"],
        BACKBONE: weights_bytes([lm.backbone, lm.text_head])
        + _keys(backbone.layers)
        + _adapters(model.adapters, image),
        DEPTH: weights_bytes([lm.depth.input, lm.depth.layers, lm.depth.heads]),
        DECODE: codec["decode"],
    }


def _adapters(adapters: GatedCrossAttention | None, image: ImageKV | None) -> int:
    """Shared weights and shared keys count once, however many layers use them."""
    if adapters is None or image is None:
        return 0
    pictures = sum(tensor.nbytes for tensor in (*image.keys, *image.values))
    return weights_bytes([adapters.norm, adapters.query, adapters.out, adapters.gate]) + pictures


def _keys(layers: Iterable[AttentionState]) -> int:
    """Keys and values of full rings."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)


# command ------------------------------------------------------------------------------------------------------------


def run_bench_step(arguments: argparse.Namespace) -> int:
    """Measure what `preset`, `model`, `download`, `random`, `device`, `dtype`, `batch`, `frames` and `threads` say.

    Prints a table, and as the last line JSON: `model, random, device, dtype, threads, batch, frames, ms, bytes,
    gb_per_s, frame_ms, real_time_factor`. Raises InputError for arguments that make no sense, CheckpointError for a
    damaged model.
    """
    _check_positive(batch=arguments.batch, frames=arguments.frames)
    usual = torch.get_num_threads()
    if arguments.threads is not None:
        _check_positive(threads=arguments.threads)
        torch.set_num_threads(arguments.threads)
    try:
        model = _model(arguments)
        cost = measure_step(model, batch=arguments.batch, frames=arguments.frames)
        threads = torch.get_num_threads()
    finally:
        torch.set_num_threads(usual)
    weight = model.speech_lm.text_head.weight
    setting = {
        "model": model.config.name,
        "random": arguments.random,
        "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else "cpu",
        "dtype": str(weight.dtype).removeprefix("torch."),
        "threads": threads,
        "batch": arguments.batch,
        "frames": arguments.frames,
    }
    Console().print(_table(cost, setting))
    print(json.dumps({**setting, **cost.to_json()}))
    return 0


def _model(arguments: argparse.Namespace) -> MoshiVis:
    if arguments.preset and arguments.model:
        raise InputError("name the model with --preset or with --model, not with both")
    name = arguments.preset or arguments.model or "mini"
    device, dtype = _check_device(usable_device(arguments.device)), dtype_named(arguments.dtype)
    if not arguments.random:
        if name in PRESETS:
            raise InputError(f"the weights of {name} do not come with the package; add --random, or give their --model")
        return load(name, device=device, dtype=dtype, download=arguments.download).model
    if name in PRESETS:
        return random_model(PRESETS[name], device, dtype or torch.bfloat16)  # as released
    if name in EMBEDDED:
        return random_model(load_config(EMBEDDED[name]), device, dtype or torch.float32)
    raise InputError(f"--random needs a preset: one of {', '.join([*EMBEDDED, *PRESETS])}, not {name!r}")


def _check_device(device: torch.device) -> torch.device:
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"bench measures on cpu and cuda, not on {device.type}")
    return device


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name} must be 1 or more, not {number}")


def _table(cost: StepCost, setting: dict[str, Any]) -> Table:
    told = ", ".join(f"{name} {value}" for name, value in setting.items() if name not in ("random", "model"))
    title = f"{setting['model']}{', random weights' if setting['random'] else ''}: one frame of {cost.frame_ms:g} ms"
    factor = f"real-time factor {cost.real_time_factor:.3f} (below 1 is faster than live)"
    table = Table(title=title, caption=f"{told}\n{factor}", title_justify="left", caption_justify="left")
    table.add_column("part")
    for heading in ("median ms", "p99 ms", "read MB", "GB/s"):
        table.add_column(heading, justify="right")
    for part in cost.parts:
        label, style = _LABELS[part.name]
        numbers = (f"{part.median:.2f}", f"{part.p99:.2f}", f"{part.bytes / 1e6:,.1f}", f"{part.gb_per_s:.1f}")
        table.add_row(label, *numbers, style=style)
    return table


_LABELS = {
    ENCODE: ("codec encode", ""),
    LM_STEP: ("LM step", ""),
    BACKBONE: ("  backbone, adapters", "dim"),
    DEPTH: ("  depth transformer", "dim"),
    DECODE: ("codec decode", ""),
    SUM: ("sum", "bold"),
}
