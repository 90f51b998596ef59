"""One contender of `moshivis bench codec`, in a process of its own: streams frames through a codec and times them.

A program, run by its path: the interpreter of a peer holds no moshivis, so nothing of ours is imported before it is
needed. `codec_contender.py NAME FOLDER CODEBOOKS BATCH THREADS`; FOLDER holds `weights.safetensors`, and for us
`config.json`. The answer to every line of standard input, `FIRST COUNT`, is one line of JSON: the milliseconds of
each of the COUNT frames and those of the processor (of all threads), codes, and some samples of what they decode to.
A frame's sound follows from its number.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Step = Callable[[Any], Any]


def moshivis(folder: Path, codebooks: int, batch: int) -> tuple[str, Step, Step]:
    import torch
    from safetensors.torch import load_file

    from moshivis.checkpoints.mimi import from_released
    from moshivis.codec import Mimi
    from moshivis.config import CodecConfig, from_dict

    config = from_dict(CodecConfig, json.loads((folder / "config.json").read_text()))
    codec = Mimi(config).eval().requires_grad_(False)
    weights = load_file(folder / "weights.safetensors")
    codec.load_state_dict(from_released(weights) if config.decoder == "seanet" else weights)
    encoder, decoder = codec.new_encoder_state(batch), codec.new_decoder_state(batch)

    @torch.inference_mode()
    def encode(wave: Any) -> Any:
        return codec.encode_step(encoder, torch.from_numpy(wave), num_codebooks=codebooks)

    @torch.inference_mode()
    def decode(codes: Any) -> Any:
        return codec.decode_step(decoder, codes)

    return f"torch {torch.__version__}", encode, decode


def moshi(folder: Path, codebooks: int, batch: int) -> tuple[str, Step, Step]:
    import moshi
    import torch
    from moshi.models import loaders

    codec = loaders.get_mimi(folder / "weights.safetensors", num_codebooks=codebooks)
    codec.streaming_forever(batch)

    @torch.no_grad()
    def encode(wave: Any) -> Any:
        return codec.encode(torch.from_numpy(wave))

    return f"{moshi.__version__} torch {torch.__version__}", encode, torch.no_grad()(codec.decode)


def rustymimi(folder: Path, codebooks: int, batch: int) -> tuple[str, Step, Step]:
    from importlib.metadata import version

    from rustymimi import Tokenizer

    if batch != 1:
        raise ValueError("rustymimi streams one conversation at a time")
    codec = Tokenizer(str(folder / "weights.safetensors"), num_codebooks=codebooks)
    return version("rustymimi"), codec.encode_step, codec.decode_step


def main(name: str, folder: str, codebooks: str, batch: str, threads: str) -> None:
    if name != "rustymimi":
        import torch

        torch.set_num_threads(int(threads))
    make = {"moshivis": moshivis, "moshi": moshi, "rustymimi": rustymimi}[name]
    version, encode, decode = make(Path(folder), int(codebooks), int(batch))
    print(json.dumps({"version": version}), flush=True)
    size = json.loads((Path(folder) / "frame.json").read_text())["samples"]
    for line in sys.stdin:
        first, count = map(int, line.split())
        answer: dict[str, list[Any]] = {"encode": [], "decode": [], "processor": [], "codes": [], "samples": []}
        for frame in range(first, first + count):
            noise = np.random.default_rng(frame).standard_normal((int(batch), 1, size))
            wave = (0.1 * noise).astype(np.float32)
            used = time.process_time()
            begun = time.perf_counter()
            codes = encode(wave)
            encoded = time.perf_counter()
            decoded = decode(codes)
            done = time.perf_counter()
            answer["processor"].append(1000 * (time.process_time() - used))
            answer["encode"].append(1000 * (encoded - begun))
            answer["decode"].append(1000 * (done - encoded))
            answer["codes"].append(np.asarray(codes)[..., 0].tolist())
            answer["samples"].append(np.asarray(decoded)[0, 0, :: size // 16].tolist())
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
