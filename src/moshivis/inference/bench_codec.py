"""`moshivis bench codec`: what streaming the codec costs, frame by frame, beside other programs that do the same.

Every contender runs in a process of its own, with the same number of threads, the same random weights and the same
sound. They take turns of a few frames, so that whatever else the machine does hits all alike; what a frame takes is
told by its median. All memories are full before anything counts: unless `--warm-up` says otherwise, as much sound goes
first as the codec remembers, ten seconds at full size. As all compute the same function, their codes are compared, too.

Output: a table for people, then one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import nn

from moshivis.checkpoints.mimi import to_released
from moshivis.codec import Mimi
from moshivis.codec.quantizer import Codebook
from moshivis.config import CodecConfig, to_dict
from moshivis.errors import InputError
from moshivis.inference import codec_contender
from moshivis.inference.conversation import EMBEDDED, load
from moshivis.presets import PRESETS

OURS = "moshivis"
PEERS = ("moshi", "rustymimi")
TURN = 5  # frames that a contender streams before it is the next one's turn


@dataclass(frozen=True, kw_only=True, eq=False)
class CodecCost:
    """What one contender needed."""

    name: str
    version: str
    encode: NDArray[np.float64]  # [frames] milliseconds
    decode: NDArray[np.float64]
    processor: NDArray[np.float64]  # milliseconds that all threads computed, whatever else the machine did meanwhile
    codes: NDArray[np.int64]  # [frames, B, K]
    samples: NDArray[np.float32]  # [frames, 16] of the first row's waveform

    @property
    def sum(self) -> NDArray[np.float64]:
        return self.encode + self.decode

    def median(self, part: str = "sum") -> float:
        return float(np.median(getattr(self, part)))

    def to_json(self) -> dict[str, Any]:
        parts = {part: getattr(self, part) for part in ("encode", "decode", "sum", "processor")}
        quantiles = {"median": 50, "p95": 95, "min": 0}
        ms = {
            part: {name: round(float(np.percentile(ms, q)), 4) for name, q in quantiles.items()}
            for part, ms in parts.items()
        }
        return {"version": self.version, "ms": ms}


def random_codec(config: CodecConfig, seed: int = 0) -> Mimi:
    """A codec whose random weights keep the size of a signal, and whose codes make use of the codebooks."""
    generator = torch.Generator().manual_seed(seed)
    codec = Mimi(config).eval().requires_grad_(False)
    for name, tensor in codec.named_parameters():
        if "layer_scale" in name:
            tensor.fill_(0.3)
        elif name.endswith("bias"):
            tensor.normal_(std=0.02, generator=generator)
        elif tensor.ndim > 1:
            reads = tensor.shape[0] * 2 if "convtr" in name and tensor.shape[1] > 1 else tensor[0].numel()
            tensor.normal_(std=1.3 * reads**-0.5, generator=generator)
    for module in codec.modules():
        if isinstance(module, Codebook):
            module.embedding_sum.normal_(generator=generator)
            module.initialized.fill_(1)
    return codec


def bytes_read(codec: Mimi, codebooks: int, batch: int) -> dict[str, int]:
    """What a frame must read: weights, codebooks, and the keys and values of full rings."""
    semantic, acoustic = codec.quantizer.semantic, codec.quantizer.acoustic
    books = [semantic.levels[:1], acoustic.levels[: codebooks - 1]]
    encode = [codec.encoder, codec.encoder_transformer, codec.downsample, semantic.input_proj, acoustic.input_proj]
    decode = [codec.upsample, codec.decoder_transformer, codec.decoder, semantic.output_proj, acoustic.output_proj]
    transformer = codec.config.transformer
    keys = 2 * batch * transformer.num_layers * transformer.context * codec.config.dimension * 4
    parts = {"encode": keys + weights_bytes([*encode, *books]), "decode": keys + weights_bytes(decode)}
    return parts | {"sum": sum(parts.values())}


def weights_bytes(modules: Iterable[nn.Module]) -> int:
    return sum(tensor.nbytes for module in modules for tensor in (*module.parameters(), *module.buffers()))


# contenders ---------------------------------------------------------------------------------------------------------


class Contender:
    """A running process of `codec_contender`."""

    def __init__(self, name: str, python: str, folder: Path, codebooks: int, batch: int, threads: int):
        self.name = name
        variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
        command = [python, codec_contender.__file__, name, str(folder), str(codebooks), str(batch), str(threads)]
        environment = os.environ | dict.fromkeys(variables, str(threads))
        # Our folder comes first on the path of a program run by its name; it must not hide other packages.
        environment |= {"PYTHONSAFEPATH": "1"}
        if name == OURS:
            environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )
        self.version: str = self._answer()["version"]
        self._turns: list[dict[str, Any]] = []

    def stream(self, first: int, frames: int, *, counts: bool) -> None:
        """Stream frames with these numbers, and keep what they cost if it `counts`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{first} {frames}\n")
        self._process.stdin.flush()
        turn = self._answer()
        if counts:
            self._turns.append(turn)

    def cost(self) -> CodecCost:
        joined: dict[str, Any] = {
            key: np.concatenate([turn[key] for turn in self._turns])
            for key in ("encode", "decode", "processor", "codes", "samples")
        }
        return CodecCost(name=self.name, version=self.version, **joined)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self) -> Any:
        """Raises InputError if the process has died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        reason = (self._errors.read().strip().splitlines() or ["no reason given"])[-1]
        raise InputError(f"{self.name} cannot take part: {reason}")


def measure(
    config: CodecConfig, peers: dict[str, str], *, batch: int, frames: int, warm_up: int | None, threads: int
) -> list[CodecCost]:
    """Stream the codec with random weights, and the same in every peer (name -> interpreter); ours comes first.

    `warm_up` frames are not counted: None fills the memory of the transformers.
    Raises InputError if a peer cannot take part.
    """
    if warm_up is None:
        warm_up = config.transformer.context // config.resample_stride
    codebooks = config.num_codebooks
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        state = random_codec(config).state_dict()
        save_file(to_released(state) if config.decoder == "seanet" else state, folder / "weights.safetensors")
        (folder / "config.json").write_text(json.dumps(to_dict(config)))
        (folder / "frame.json").write_text(json.dumps({"samples": config.frame_size}))
        contenders = []
        for contender_name, python in ({OURS: sys.executable} | peers).items():
            contenders.append(Contender(contender_name, python, folder, codebooks, batch, threads))
            stack.callback(contenders[-1].close)
        for contender in contenders:
            contender.stream(0, warm_up, counts=False)
        for first in range(warm_up, warm_up + frames, TURN):
            for contender in contenders:
                contender.stream(first, min(TURN, warm_up + frames - first), counts=True)
            contenders.append(contenders.pop(0))
        costs = {contender.name: contender.cost() for contender in contenders}
    return [costs[name] for name in (OURS, *peers)]


def agreement(ours: CodecCost, peer: CodecCost) -> dict[str, float]:
    """Share of equal codes; largest difference of waveforms as long as all codes are equal, relative to their size.

    From the first code that differs on, a streamed decoder remembers another past.
    """
    equal = ours.codes == peer.codes
    alike = np.logical_and.accumulate(equal[:, 0].all(axis=-1))
    difference = np.abs(ours.samples - peer.samples)[alike].max(initial=0.0)
    return {
        "codes": round(float(equal.mean()), 5),
        "wave": float(f"{difference / max(float(ours.samples.std()), 1e-9):.2g}"),
    }


# command ------------------------------------------------------------------------------------------------------------


def run_bench_codec(arguments: argparse.Namespace) -> int:
    """Measure what `preset`, `batch`, `frames`, `warm_up`, `threads`, `peers` and `peer_python` say.

    Prints a table, and as the last line JSON: `preset, batch, frames, threads, contenders, bytes, gb_per_s,
    agreement, ratio, processor_ratio`. Raises InputError for arguments that make no sense, and for peers that cannot
    take part.
    """
    for name in ("batch", "frames", "threads"):
        number = getattr(arguments, name)
        if number is not None and number < 1:
            raise InputError(f"{name} must be 1 or more, not {number}")
    config = _config(arguments.preset)
    threads = arguments.threads or torch.get_num_threads()
    peers = {}
    if arguments.peers or arguments.peer_python:
        peers = _peers(config, arguments.batch, arguments.peer_python or sys.executable)
    options = {name: getattr(arguments, name) for name in ("batch", "frames", "warm_up")}
    costs = measure(config, peers, threads=threads, **options)
    ours, *others = costs
    with torch.device("meta"):
        read = bytes_read(Mimi(config), config.num_codebooks, arguments.batch)
    result = {
        "preset": arguments.preset,
        "batch": arguments.batch,
        "frames": arguments.frames,
        "threads": threads,
        "contenders": {cost.name: cost.to_json() for cost in costs},
        "bytes": read,
        "gb_per_s": {cost.name: round(read["sum"] / cost.median() / 1e6, 2) for cost in costs},
        "agreement": {cost.name: agreement(ours, cost) for cost in others},
        "ratio": _ratio(costs, "sum"),
        "processor_ratio": _ratio(costs, "processor"),
    }
    Console().print(_table(costs, result))
    print(json.dumps(result))
    return 0


def _ratio(costs: list[CodecCost], part: str) -> float | None:
    """Ours, the first, to the peer that needs least."""
    ours, *others = [cost.median(part) for cost in costs]
    return round(ours / min(others), 4) if others else None


def _config(preset: str) -> CodecConfig:
    if preset in PRESETS:
        return PRESETS[preset].codec
    if preset in EMBEDDED:
        return load(preset).config.codec
    raise InputError(f"the codecs are those of {', '.join([*EMBEDDED, *PRESETS])}, not {preset!r}")


def _peers(config: CodecConfig, batch: int, python: str) -> dict[str, str]:
    released = dataclasses.replace(CodecConfig(), num_codebooks=config.num_codebooks)
    if config != released:
        raise InputError("peers run the released codec only: add --preset moshika-vis")
    names = PEERS if batch == 1 else PEERS[:1]
    found = [name for name in names if _imports(python, name)]
    if not found:
        advice = "moshivis bench codec --help says how to get them"
        raise InputError(f"{python} does not find {' or '.join(names)}: {advice}")
    return dict.fromkeys(found, python)


def _imports(python: str, name: str) -> bool:
    try:
        return subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode == 0
    except OSError as error:
        raise InputError(f"{python} cannot be run: {error.strerror}") from error


def _table(costs: list[CodecCost], result: dict[str, Any]) -> Table:
    told = f"batch {result['batch']}, {result['frames']} frames, {result['threads']} threads"
    lines = [f"{told}, {result['bytes']['sum'] / 1e6:,.0f} MB to read a frame"]
    lines.append("; ".join(f"{cost.name} {cost.version}" for cost in costs))
    for name, same in result["agreement"].items():
        lines.append(f"{name}: {same['codes']:.2%} of the codes equal, waveforms of equal codes within {same['wave']}")
    if result["ratio"] is not None:
        ratios = f"{result['ratio']:.2f} of the time and {result['processor_ratio']:.2f} of the processor's"
        lines.append(f"ours takes {ratios}, each of the peer that needs least")
    title = f"codec of {result['preset']}, random weights, streamed: milliseconds a frame"
    table = Table(title=title, caption="\n".join(lines), title_justify="left", caption_justify="left")
    table.add_column("contender")
    for heading in ("encode", "p95", "decode", "p95", "sum", "p95", "CPU", "GB/s"):
        table.add_column(heading, justify="right")
    for cost in costs:
        parts = (cost.encode, cost.decode, cost.sum)
        numbers = [f"{q:.1f}" for ms in parts for q in (np.median(ms), np.percentile(ms, 95))]
        numbers += [f"{cost.median('processor'):.1f}", f"{result['gb_per_s'][cost.name]:.1f}"]
        table.add_row(cost.name, *numbers, style="bold" if cost.name == OURS else "")
    return table
