"""`moshivis bench step` on models of a few thousand weights: what it prints, and that its numbers fit together."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import pytest
import torch

from moshivis.cli import main
from moshivis.config import (
    AdapterConfig,
    BackboneConfig,
    CodecConfig,
    CodecTransformerConfig,
    DepthConfig,
    ModelConfig,
    QuantizerConfig,
    SEANetConfig,
    SpeechLMConfig,
    VisionConfig,
)
from moshivis.errors import InputError
from moshivis.inference.bench import measure_step, run_bench_step
from moshivis.presets import PRESETS, random_model

TINY = ModelConfig(
    name="tiny",
    codec=CodecConfig(
        frame_rate=500.0,
        dimension=16,
        seanet=SEANetConfig(channels=(4, 8, 8, 16), ratios=(4, 3, 2), residual_layers=(1, 1, 1)),
        transformer=CodecTransformerConfig(num_layers=2, num_heads=2, feed_forward=24, context=10),
        quantizer=QuantizerConfig(dimension=6, bins=16, num_codebooks=5),
        num_codebooks=3,
    ),
    speech_lm=SpeechLMConfig(
        text_card=20,
        audio_card=16,
        own_codebooks=3,
        user_codebooks=3,
        delays=(0, 0, 1, 1, 0, 1, 1),
        backbone=BackboneConfig(dim=32, num_heads=2, num_layers=3, feed_forward=64, context=12),
        depth=DepthConfig(dim=16, num_heads=2, num_layers=2, feed_forward=32, context=3),
    ),
    adapters=AdapterConfig(),
    vision=VisionConfig(image_size=16, patch_size=4, hidden_size=24, num_layers=1, num_heads=2, mlp_size=32),
)
PARTS = ["codec_encode", "lm_step", "backbone", "depth", "codec_decode", "sum"]


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def bench(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[str, dict[str, Any]]:
    """What is printed before the last line, and the last line."""
    assert main(["bench", "step", "--preset", "tiny", "--random", *options]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    return "\n".join(table), json.loads(last)


def test_the_table_names_the_parts_and_the_last_line_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    table, result = bench(capsys, "--frames", "7", "--batch", "2", "--threads", "1", "--dtype", "float32")
    for heading in ("codec encode", "LM step", "backbone", "depth transformer", "codec decode", "sum", "p99", "GB/s"):
        assert heading in table
    assert "real-time factor" in table and "random weights" in table
    setting = {name: result[name] for name in ("model", "random", "device", "dtype", "threads", "batch", "frames")}
    assert setting == {
        "model": "tiny",
        "random": True,
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "batch": 2,
        "frames": 7,
    }
    assert list(result["ms"]) == list(result["bytes"]) == list(result["gb_per_s"]) == PARTS
    assert all(0 < numbers["median"] <= numbers["p99"] for numbers in result["ms"].values())


def test_the_parts_make_up_the_sum(capsys: pytest.CaptureFixture[str]) -> None:
    _, result = bench(capsys, "--frames", "9")
    mean = {name: numbers["mean"] for name, numbers in result["ms"].items()}
    assert mean["lm_step"] == pytest.approx(mean["backbone"] + mean["depth"], abs=1e-3)
    assert mean["sum"] == pytest.approx(mean["codec_encode"] + mean["lm_step"] + mean["codec_decode"], abs=1e-3)
    read = result["bytes"]
    assert read["lm_step"] == read["backbone"] + read["depth"]
    assert read["sum"] == read["codec_encode"] + read["lm_step"] + read["codec_decode"]
    median = result["ms"]["sum"]["median"]
    assert result["frame_ms"] == 2.0
    assert result["real_time_factor"] == pytest.approx(median / 2.0, rel=1e-3, abs=1e-3)
    assert result["gb_per_s"]["sum"] == pytest.approx(read["sum"] / median / 1e6, rel=1e-2, abs=1e-3)


def test_bytes_are_those_of_weights_and_full_rings() -> None:
    model = random_model(TINY)
    cost = measure_step(model, frames=1)
    lm = model.speech_lm
    weights = sum(p.nbytes for p in [*lm.backbone.parameters(), *lm.text_head.parameters()])
    assert model.adapters is not None
    key_value = sum(p.nbytes for p in model.adapters.key_value.parameters())
    adapters = sum(p.nbytes for p in model.adapters.parameters()) - key_value  # used once a picture, not once a frame
    ring = 3 * 2 * 12 * 32 * 4  # layers, keys and values, slots, width, bytes
    picture = 2 * (16 // 4) ** 2 * 32 * 4
    assert cost["backbone"].bytes == weights + adapters + ring + picture
    depth = sum(p.nbytes for name, p in lm.depth.named_parameters() if not name.startswith(("text.", "audio.")))
    assert cost["depth"].bytes == depth


def test_more_conversations_read_more_keys_but_no_more_weights() -> None:
    model = random_model(TINY)
    one, three = (measure_step(model, batch=batch, frames=1) for batch in (1, 3))
    assert one["depth"].bytes == three["depth"].bytes
    ring_and_picture = 3 * 2 * 12 * 32 * 4 + 2 * (16 // 4) ** 2 * 32 * 4
    assert three["backbone"].bytes - one["backbone"].bytes == 2 * ring_and_picture


def test_the_codec_stays_in_float32_and_the_rest_is_halved(capsys: pytest.CaptureFixture[str]) -> None:
    _, full = bench(capsys, "--frames", "2", "--dtype", "float32")
    _, half = bench(capsys, "--frames", "2", "--dtype", "bfloat16")
    assert half["dtype"] == "bfloat16"
    assert half["bytes"]["lm_step"] * 2 == full["bytes"]["lm_step"]
    assert half["bytes"]["codec_encode"] == full["bytes"]["codec_encode"]


def test_a_model_that_sees_nothing_is_measured_too() -> None:
    cost = measure_step(random_model(dataclasses.replace(TINY, adapters=None)), frames=2)
    assert cost["sum"].ms.shape == (2,)
    assert cost["backbone"].bytes < measure_step(random_model(TINY), frames=1)["backbone"].bytes


def test_the_number_of_threads_is_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    _, result = bench(capsys, "--frames", "1", "--threads", str(before + 1))
    assert result["threads"] == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": 0}, "frames must be 1 or more, not 0"),
        ({"batch": -1}, "batch must be 1 or more"),
        ({"threads": 0}, "threads must be 1 or more"),
        ({"dtype": "int8"}, "dtype must be float32, bfloat16 or float16, not 'int8'"),
        ({"preset": "huge"}, "one of mini, moshika-vis, tiny, not 'huge'"),
        ({"random": False}, "the weights of tiny do not come with the package"),
        ({"model": "folder"}, "not with both"),
        ({"device": "cuda:99"}, "the device 'cuda:99' cannot be used here"),
        ({"device": "meta"}, "not on meta"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(changed: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"preset": "tiny", "model": None, "download": False, "random": True, "device": "cpu"}
    usual |= {"dtype": None, "batch": 1, "frames": 1, "threads": None}
    with pytest.raises(InputError, match=message):
        run_bench_step(argparse.Namespace(**(usual | changed)))
