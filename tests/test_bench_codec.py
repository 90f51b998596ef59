"""`moshivis bench codec` on a codec of a few thousand weights: what it prints, and that its numbers fit together.

With the environment variable MOSHIVIS_PEER_PYTHON, an interpreter that finds moshi and rustymimi, also that all three
compute the same, at full size.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

import numpy as np
import pytest
import torch

from moshivis.cli import main
from moshivis.codec.quantizer import Codebook
from moshivis.config import CodecConfig, CodecTransformerConfig, ModelConfig, QuantizerConfig, SEANetConfig
from moshivis.errors import InputError
from moshivis.inference.bench_codec import CodecCost, agreement, bytes_read, measure, random_codec, run_bench_codec
from moshivis.presets import PRESETS

TINY = CodecConfig(
    frame_rate=500.0,
    dimension=16,
    seanet=SEANetConfig(channels=(4, 8, 8, 16), ratios=(4, 3, 2), residual_layers=(1, 1, 1)),
    transformer=CodecTransformerConfig(num_layers=2, num_heads=2, feed_forward=24, context=10),
    quantizer=QuantizerConfig(dimension=6, bins=16, num_codebooks=5),
    num_codebooks=3,
)
PEER_PYTHON = os.environ.get("MOSHIVIS_PEER_PYTHON", "")


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", ModelConfig(name="tiny", codec=TINY))


def test_the_table_names_the_contender_and_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "tiny", "--frames", "7", "--batch", "2", "--threads", "1"]
    assert main(["bench", "codec", *options]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    for heading in ("encode", "decode", "sum", "p95", "CPU", "GB/s", "moshivis", "batch 2, 7 frames, 1 threads"):
        assert heading in "\n".join(table)
    result = json.loads(last)
    assert {name: result[name] for name in ("preset", "batch", "frames", "threads", "ratio", "agreement")} == {
        "preset": "tiny",
        "batch": 2,
        "frames": 7,
        "threads": 1,
        "ratio": None,
        "agreement": {},
    }
    ms = result["contenders"]["moshivis"]["ms"]
    assert list(ms) == ["encode", "decode", "sum", "processor"]
    assert all(0 < ms[part]["min"] <= ms[part]["median"] <= ms[part]["p95"] for part in ("encode", "decode", "sum"))
    assert ms["sum"]["min"] >= ms["encode"]["min"] + ms["decode"]["min"] - 1e-3
    assert result["bytes"]["sum"] == result["bytes"]["encode"] + result["bytes"]["decode"]
    bandwidth = result["bytes"]["sum"] / ms["sum"]["median"] / 1e6
    assert result["gb_per_s"]["moshivis"] == pytest.approx(bandwidth, rel=1e-2, abs=6e-3)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_process_streams_what_the_codec_streams(batch: int) -> None:
    """Warm-up and turns of a few frames are one stream, of the codec that we say it is."""
    (cost,) = measure(TINY, {}, batch=batch, frames=8, warm_up=4, threads=1)
    codec = random_codec(TINY)
    encoder, decoder = codec.new_encoder_state(batch), codec.new_decoder_state(batch)
    for frame in range(12):
        noise = 0.1 * np.random.default_rng(frame).standard_normal((batch, 1, TINY.frame_size))
        codes = codec.encode_step(encoder, torch.tensor(noise, dtype=torch.float32))
        wave = codec.decode_step(decoder, codes)
        if frame >= 4:
            assert codes[..., 0].tolist() == cost.codes[frame - 4].tolist()
            np.testing.assert_allclose(cost.samples[frame - 4], wave[0, 0, :: TINY.frame_size // 16], atol=1e-4)


def test_bytes_are_those_of_weights_used_codebooks_and_rings() -> None:
    codec = random_codec(TINY)
    read, batch_of_two = bytes_read(codec, 3, 1), bytes_read(codec, 3, 2)
    books = [module for module in codec.modules() if isinstance(module, Codebook)]
    book = sum(buffer.nbytes for buffer in books[0].buffers())
    rings = 2 * 2 * 2 * 10 * 16 * 4  # transformers, layers, keys and values, slots, width, bytes
    weights = sum(parameter.nbytes for parameter in codec.parameters())
    assert read["sum"] == weights + 3 * book + rings
    assert batch_of_two["sum"] - read["sum"] == rings


def test_random_weights_make_use_of_the_codebooks() -> None:
    (cost,) = measure(TINY, {}, batch=4, frames=20, warm_up=0, threads=1)
    assert all(len(np.unique(cost.codes[..., level])) > 3 for level in range(3))
    assert 1e-3 < cost.samples.std() < 1e3


def test_agreement_counts_codes_and_compares_waveforms_of_equal_codes_only() -> None:
    nothing = np.ones(2)
    ours = CodecCost(
        name="moshivis",
        version="",
        encode=nothing,
        decode=nothing,
        processor=nothing,
        codes=np.array([[[1, 2]], [[3, 4]]]),
        samples=np.array([[1.0, -1.0], [1.0, -1.0]], dtype=np.float32),
    )
    samples = np.array([[1.1, -1.0], [9.0, 9.0]], dtype=np.float32)
    peer = dataclasses.replace(ours, codes=np.array([[[1, 2]], [[3, 5]]]), samples=samples)
    assert agreement(ours, ours) == {"codes": 1.0, "wave": 0.0}
    assert agreement(ours, peer) == {"codes": 0.75, "wave": 0.1}
    first = dataclasses.replace(ours, codes=ours.codes[::-1].copy(), samples=samples[::-1].copy())
    other = dataclasses.replace(first, codes=peer.codes[::-1].copy(), samples=ours.samples)
    assert agreement(first, other) == {"codes": 0.75, "wave": 0.0}  # what follows another code is not compared


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": 0}, "frames must be 1 or more, not 0"),
        ({"batch": -1}, "batch must be 1 or more"),
        ({"threads": 0}, "threads must be 1 or more"),
        ({"preset": "huge"}, "mini, moshika-vis, tiny, not 'huge'"),
        ({"peers": True}, "peers run the released codec only"),
        ({"peers": True, "preset": "moshika-vis", "peer_python": "/no/python"}, "/no/python cannot be run"),
        ({"peers": True, "preset": "moshika-vis", "peer_python": "true-python"}, "does not find moshi or rustymimi"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    changed: dict[str, Any], message: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual: dict[str, Any] = {"preset": "tiny", "batch": 1, "frames": 1, "warm_up": 0, "threads": 1}
    usual |= {"peers": False, "peer_python": None}
    if changed.get("peer_python") == "true-python":  # an interpreter that finds nothing but its own library
        bare = tmp_path / "python"
        bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
        bare.chmod(0o755)
        changed = changed | {"peer_python": str(bare)}
    with pytest.raises(InputError, match=message):
        run_bench_codec(argparse.Namespace(**(usual | changed)))


@pytest.mark.skipif(not PEER_PYTHON, reason="no MOSHIVIS_PEER_PYTHON")
def test_the_peers_compute_the_same() -> None:
    peers = dict.fromkeys(("moshi", "rustymimi"), PEER_PYTHON)
    ours, *others = measure(CodecConfig(), peers, batch=1, frames=5, warm_up=0, threads=1)
    for peer in others:
        same = agreement(ours, peer)
        assert same["codes"] > 0.97 and same["wave"] < 1e-3
