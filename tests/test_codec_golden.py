"""The codec against reference numbers (mimi.md 9): every tensor of every case; names and shapes of the released file.

A case is `<case>.json/.weights/.io`. Tolerances are those that hold from machine to machine: 1e-4 absolute for
latents and waveforms, codes exact.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moshivis.checkpoints.mimi import from_released, to_released
from moshivis.codec import Mimi
from moshivis.config import CodecConfig
from moshivis.conform.codec import codec_config

HERE = Path(__file__).parent / "golden"
FOLDER = Path(os.environ.get("MOSHIVIS_GOLDEN", HERE)) / "mimi"
DESCRIPTIONS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
WAVES = [name for name, case in DESCRIPTIONS.items() if case["kind"] == "wav"]
MASKS = [name for name, case in DESCRIPTIONS.items() if case["kind"] == "mask"]
CHUNKS = {"stream1": (1,), "stream2": (2,), "streamvar": (1, 3, 2, 4)}  # frames a call, over and over


def load(case: str) -> tuple[Mimi, dict[str, Tensor]]:
    codec = Mimi(codec_config(DESCRIPTIONS[case]["config"]))
    codec.load_state_dict(from_released(load_file(FOLDER / f"{case}.weights.safetensors")))
    return codec.eval(), load_file(FOLDER / f"{case}.io.safetensors")


def assert_equal(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(ours) == set(expected)
    for name, tensor in expected.items():
        tolerance = 1e-4 if tensor.is_floating_point() else 0
        assert ours[name].shape == tensor.shape and ours[name].dtype == tensor.dtype, name
        error = (ours[name] - tensor).abs().max().item()
        assert error <= tolerance, f"{name} is off by {error}"


@pytest.mark.parametrize("case", WAVES)
@torch.no_grad()
def test_every_tensor_of_a_wave_case(case: str) -> None:
    codec, expected = load(case)
    wave = expected.pop("x")
    ours = offline(codec, wave)
    for name in CHUNKS:
        ours |= {f"{name}.{key}": value for key, value in streamed(codec, wave, ours["codes"], CHUNKS[name]).items()}
    for name in {name.split(".")[0] for name in expected}:
        if length := re.fullmatch(r"odd(\d+)", name):
            piece = wave[..., : int(length[1])]
            ours |= {f"{name}.latent": codec.encode_to_latent(piece), f"{name}.codes": codec.encode(piece)}
            if f"{name}.decoded" in expected:
                ours[f"{name}.decoded"] = codec.decode(ours[f"{name}.codes"])
        elif codebooks := re.fullmatch(r"nq(\d+)", name):
            ours[f"{name}.codes"] = codec.encode(wave, int(codebooks[1]))
        elif codebooks := re.fullmatch(r"dec_k(\d+)", name):
            codes = ours["codes"][:, : int(codebooks[1]), : expected[f"{name}.q_latent"].shape[-1]]
            ours |= {f"{name}.q_latent": codec.quantizer.decode(codes), f"{name}.decoded": codec.decode(codes)}
    assert_equal(ours, expected)


def offline(codec: Mimi, wave: Tensor) -> dict[str, Tensor]:
    padded = torch.nn.functional.pad(wave, (0, -wave.shape[-1] % codec.config.frame_size))
    seanet = codec.encoder(padded)
    codes = codec.encode(wave)
    latent = codec.quantizer.decode(codes)
    upsampled = codec.upsample(latent)
    return {
        "enc_seanet": seanet,
        "enc_transformer": codec.encoder_transformer(seanet),
        "latent": codec.encode_to_latent(wave),
        "codes": codes,
        "q_latent": latent,
        "upsampled": upsampled,
        "dec_transformer": codec.decoder_transformer(upsampled),
        "decoded": codec.decode(codes),
    }


def streamed(codec: Mimi, wave: Tensor, codes: Tensor, chunks: tuple[int, ...]) -> dict[str, Tensor]:
    """The whole frames of the wave encoded, and the codes decoded, `chunks` frames a call while they fit."""
    size, batch = codec.config.frame_size, len(wave)
    encoder, twin, decoder = (
        codec.new_encoder_state(batch),
        codec.new_encoder_state(batch),
        codec.new_decoder_state(batch),
    )
    latents, found, waves = [], [], []
    for start, frames in calls(wave.shape[-1] // size, chunks):
        piece = wave[..., start * size : (start + frames) * size]
        latents.append(codec.encode_step_to_latent(encoder, piece))
        found.append(codec.encode_step(twin, piece))
    for start, frames in calls(codes.shape[-1], chunks):
        waves.append(codec.decode_step(decoder, codes[..., start : start + frames]))
    return {"latent": torch.cat(latents, -1), "codes": torch.cat(found, -1), "decoded": torch.cat(waves, -1)}


def calls(total: int, chunks: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    start = 0
    for frames in cycle(chunks):
        if start + frames > total:
            return
        yield start, frames
        start += frames


@pytest.mark.parametrize("case", MASKS)
@torch.no_grad()
def test_every_tensor_of_a_case_whose_rows_pause_and_reset(case: str) -> None:
    codec, expected = load(case)
    given = {name: expected.pop(name) for name in ("x", "exec_mask", "reset_mask", "frames", "chunk", "dec_in")}
    batch, size = len(given["chunk"]), codec.config.frame_size
    encoder, twin, decoder = (
        codec.new_encoder_state(batch),
        codec.new_encoder_state(batch),
        codec.new_decoder_state(batch),
    )
    pieces: dict[str, list[Tensor]] = {"latent": [], "codes": [], "decoded": []}
    ends = given["frames"].cumsum(0).tolist()
    for call, (end, frames) in enumerate(zip(ends, given["frames"].tolist(), strict=True)):
        active, start = given["exec_mask"][call], end - frames
        for state in (encoder, twin, decoder):
            state.reset(given["reset_mask"][call])
        wave = given["chunk"][..., start * size : end * size]
        results = {
            "latent": (codec.encode_step_to_latent(encoder, wave, active), 0.0),
            "codes": (codec.encode_step(twin, wave, active), -1),
            "decoded": (codec.decode_step(decoder, given["dec_in"][..., start:end], active), 0.0),
        }
        for name, (result, blank) in results.items():  # the case blanks what rows that did not run give
            pieces[name].append(result.masked_fill(~active[:, None, None], blank))
    assert not given["exec_mask"].all() and given["reset_mask"].any()
    assert_equal({name: torch.cat(parts, -1) for name, parts in pieces.items()}, expected)


def test_cases_of_both_kinds_are_there() -> None:
    assert "base" in WAVES and "execmask" in MASKS


@pytest.mark.parametrize("case", sorted(DESCRIPTIONS))
def test_released_names_and_back(case: str) -> None:
    released = load_file(FOLDER / f"{case}.weights.safetensors")
    again = to_released(from_released(released))
    assert list(again) == list(released)
    assert all(again[name] is tensor for name, tensor in released.items())
    codec = Mimi(codec_config(DESCRIPTIONS[case]["config"]))
    assert set(to_released(codec.state_dict())) == set(released)


def test_older_names_are_understood() -> None:
    layer = "encoder_transformer.transformer.layers.0.self_attn"
    book = "quantizer.rvq_rest.vq.layers.3._codebook"
    older = {
        f"{layer}.in_projs.0.weight": f"{layer}.in_proj_weight",
        f"{layer}.in_proj.weight": f"{layer}.in_proj_weight",
        f"{layer}.out_projs.0.weight": f"{layer}.out_proj.weight",
        f"{book}.inited": f"{book}._initialized",
        f"{book}.cluster_size": f"{book}.cluster_usage",
        f"{book}.embed_avg": f"{book}.embedding_sum",
        f"{book}.embed_sum": f"{book}.embedding_sum",
    }
    for old, new in older.items():
        tensor = torch.zeros(1)
        assert list(to_released(from_released({old: tensor}))) == [new]


def test_the_full_size_codec_has_the_released_names_and_shapes() -> None:
    manifest = json.loads(gzip.decompress((HERE / "manifests" / "mimi_full.json.gz").read_bytes()))
    with torch.device("meta"):
        codec = Mimi(CodecConfig())
    for kind, tensors in (("parameters", codec.named_parameters()), ("buffers", codec.named_buffers())):
        saved = {name: tensor for name, tensor in tensors if name in codec.state_dict()}
        assert {name: list(tensor.shape) for name, tensor in to_released(saved).items()} == manifest[kind]
    assert sum(parameter.numel() for parameter in codec.parameters()) == 79_308_609
