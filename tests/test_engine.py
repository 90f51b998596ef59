"""The engine: many conversations in one batch, each as if it were alone."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moshivis
from moshivis.adapters.gated_cross_attention import ImageKV
from moshivis.errors import InputError
from moshivis.inference.call import Call
from moshivis.inference.conversation import Assistant
from moshivis.inference.engine import Busy, CallSettings, Ended, Engine, Said
from moshivis.inference.rows import MAX_TOP_K, ImageRows, RowSampling, RowSettings, _uniform
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import TextStream, TextTokenizer

PICTURE = Path(moshivis.__file__).parent / "assets" / "example.png"
FRAMES = 16
NOISE = (np.random.default_rng(0).standard_normal((3, FRAMES, 1920)) * 0.1).astype(np.float32)


@pytest.fixture(scope="module")
def assistant() -> Assistant:
    return moshivis.load()


@pytest.fixture(scope="module")
def engine(assistant: Assistant) -> Iterator[Engine]:
    engine = Engine(assistant, 3, queue_frames=FRAMES, threads=1)
    engine.start()
    yield engine
    engine.stop()


class Listener:
    """Collects what a call delivers."""

    def __init__(self) -> None:
        self.said: list[Said] = []
        self.ended = threading.Event()
        self.reason = ""

    def __call__(self, event: Said | Ended) -> None:
        if isinstance(event, Said):
            self.said.append(event)
        else:
            self.reason = event.reason
            self.ended.set()

    def wait(self, frames: int, timeout: float = 60.0) -> None:
        limit = time.monotonic() + timeout
        while len(self.said) < frames and time.monotonic() < limit:
            time.sleep(0.01)
        assert len(self.said) >= frames

    def audio(self) -> np.ndarray:
        return np.stack([said.audio for said in self.said])


def sampled(engine: Engine, **values: object) -> CallSettings:
    usual = replace(engine.usual_settings(), text_temperature=0.7, seed=7)
    return replace(usual, **values)  # type: ignore[arg-type]


def converse(engine: Engine, frames: np.ndarray, settings: CallSettings, picture: bool = True) -> Listener:
    """A call that is given all its frames."""
    heard = Listener()
    call = engine.open(heard, settings, engine.look(PICTURE) if picture else None)
    call.push(frames.ravel())
    heard.wait(len(frames))
    call.close()
    assert heard.ended.wait(10)
    return heard


def test_a_conversation_has_the_same_bits_alone_and_in_company(engine: Engine) -> None:
    alone = converse(engine, NOISE[0], sampled(engine))
    other, third = Listener(), Listener()
    before = engine.open(other, sampled(engine, seed=8))
    before.push(NOISE[1, :5].ravel())
    heard = Listener()
    call = engine.open(heard, sampled(engine), engine.look(PICTURE))
    call.push(NOISE[0, :6].ravel())
    late = engine.open(third, sampled(engine, seed=9), engine.look(PICTURE))
    late.push(NOISE[2].ravel())
    heard.wait(6)
    before.close()
    call.push(NOISE[0, 6:].ravel())
    heard.wait(FRAMES)
    for one in (call, late):
        one.close()
    assert heard.ended.wait(10) and other.ended.wait(10) and third.ended.wait(10)
    assert np.array_equal(heard.audio(), alone.audio())
    assert [said.token for said in heard.said] == [said.token for said in alone.said]
    assert [said.gate for said in heard.said] == [said.gate for said in alone.said]


def test_the_seed_decides(engine: Engine) -> None:
    first = converse(engine, NOISE[0], sampled(engine, audio_temperature=1.0)).audio()
    assert np.array_equal(first, converse(engine, NOISE[0], sampled(engine, audio_temperature=1.0)).audio())
    assert not np.array_equal(first, converse(engine, NOISE[0], sampled(engine, audio_temperature=1.0, seed=8)).audio())


def test_a_picture_comes_and_goes(engine: Engine) -> None:
    heard = Listener()
    call = engine.open(heard, sampled(engine))
    call.push(NOISE[0, :4].ravel())
    heard.wait(4)
    call.set_image(engine.look(PICTURE))
    call.push(NOISE[0, 4:8].ravel())
    heard.wait(8)
    call.set_image(None)
    call.push(NOISE[0, 8:12].ravel())
    heard.wait(12)
    call.close()
    gates = [said.gate for said in heard.said]
    assert gates[:4] == [0.0] * 4 and all(gate > 0 for gate in gates[4:8]) and gates[8:] == [0.0] * 4


def test_the_gate_delay_counts_steps_with_a_picture(engine: Engine) -> None:
    said = converse(engine, NOISE[0, :8], sampled(engine, gate_delay=5)).said
    assert [one.gate > 0 for one in said] == [False] * 5 + [True] * 3


def test_the_gate_delay_comes_after_that_of_the_model(tiny_model: MoshiVis, tiny_tokenizer: TextTokenizer) -> None:
    assert tiny_model.config.adapters is not None
    adapters = replace(tiny_model.config.adapters, start=2)
    late = MoshiVis(replace(tiny_model.config, adapters=adapters)).eval()
    late.load_state_dict(tiny_model.state_dict())
    engine = Engine(Assistant(late, tiny_tokenizer), 1)
    engine.start()
    try:
        said = converse(engine, NOISE[0, :8], sampled(engine, gate_delay=3)).said
        assert [one.gate > 0 for one in said] == [False] * 5 + [True] * 3
    finally:
        engine.stop()


def test_a_call_ends_at_its_length_and_its_place_is_free_again(engine: Engine) -> None:
    heard = Listener()
    engine.open(heard, sampled(engine, max_frames=3)).push(NOISE[0].ravel())
    assert heard.ended.wait(20) and heard.reason == "length" and len(heard.said) == 3
    assert engine.stats().active == 0


def test_a_full_engine_says_so(engine: Engine) -> None:
    heard = [Listener() for _ in range(3)]
    calls = [engine.open(one) for one in heard]
    with pytest.raises(Busy, match="3 places"):
        engine.open(Listener())
    for call in calls:
        call.close()
    assert all(one.ended.wait(10) and one.reason == "closed" for one in heard)
    converse(engine, NOISE[0, :2], sampled(engine))


def test_a_listener_that_fails_ends_only_its_own_call(engine: Engine) -> None:
    heard, ended = Listener(), threading.Event()

    def broken(event: Said | Ended) -> None:
        if isinstance(event, Ended):
            ended.set()
        raise RuntimeError("no")

    good = engine.open(heard, sampled(engine))
    engine.open(broken, sampled(engine)).push(NOISE[1, :3].ravel())
    good.push(NOISE[0, :6].ravel())
    heard.wait(6)
    assert ended.wait(10)
    good.close()
    assert heard.ended.wait(10) and heard.reason == "closed"


def test_without_frames_a_call_waits_or_hears_silence(engine: Engine) -> None:
    parked, silent = Listener(), Listener()
    calls = [engine.open(parked), engine.open(silent, replace(engine.usual_settings(), on_gap="silence"))]
    silent.wait(4)
    assert not parked.said
    for call in calls:
        call.close()


def test_nobody_runs_ahead_of_the_clock(engine: Engine) -> None:
    heard = Listener()
    call = engine.open(heard)
    begun = time.monotonic()
    call.push(NOISE[0].ravel())
    heard.wait(FRAMES)
    assert time.monotonic() - begun > (FRAMES - 5) * engine.period
    call.close()


def test_stopping_ends_everybody(assistant: Assistant) -> None:
    engine = Engine(assistant, 1, threads=1)
    engine.start()
    heard = Listener()
    engine.open(heard).push(NOISE[0, :2].ravel())
    heard.wait(2)
    engine.stop()
    assert heard.ended.wait(10) and heard.reason == "engine stopped"
    with pytest.raises(Busy):
        engine.open(heard)


def test_when_its_thread_dies_everybody_hears_of_it(assistant: Assistant, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(assistant, 2, threads=1)
    engine.start()
    first, second = Listener(), Listener()
    engine.open(first).push(NOISE[0, :2].ravel())
    first.wait(2)

    def broken(*_: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("moshivis.inference.engine._Batch.begin", broken)
    engine.open(second)
    for heard in (first, second):
        assert heard.ended.wait(10) and heard.reason == "error: RuntimeError: the device is gone"
    assert not engine.ready and engine.stats().active == 0
    with pytest.raises(Busy, match="not running"):
        engine.open(first)
    engine.stop()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("text_temperature", float("nan")), ("audio_top_k", 501), ("audio_top_k", 25.0), ("seed", -1)],
        *[("gate_delay", -1), ("gate_delay", None), ("max_frames", 0)],
    ],
)
def test_settings_out_of_range_are_named(engine: Engine, name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} must be a {'' if name == 'text_temperature' else 'whole '}number"):
        engine.open(Listener(), sampled(engine, **{name: value}))
    assert engine.stats().active == 0
    replace(engine.usual_settings(), audio_top_k=np.int64(3)).check()  # type: ignore[arg-type]


def test_a_picture_of_another_model_ends_its_own_call(engine: Engine) -> None:
    other, heard = Listener(), Listener()
    good = engine.open(other)
    one = torch.zeros(1, 1, 1, 1)
    engine.open(heard, image=ImageKV((one,), (one,)))
    assert heard.ended.wait(10) and heard.reason.endswith("of a picture are of another model")
    good.push(NOISE[0, :2].ravel())
    other.wait(2)
    good.close()
    assert engine.ready


def test_an_engine_starts_once(engine: Engine) -> None:
    with pytest.raises(RuntimeError, match="started before"):
        engine.start()


# a call's queue -------------------------------------------------------------------------------------------------------


def a_call(assistant: Assistant, bound: int, **settings: Any) -> Call:
    usual = CallSettings(**vars(RowSettings.usual(assistant.sampling)), **settings)
    call = Call(1, usual, print, TextStream(assistant.tokenizer), frame_size=4, bound=bound)
    call.attach(lambda: None, 0.0)
    return call


def taken(call: Call) -> np.ndarray:
    frame = call.take(0.0)
    assert frame is not None
    return frame


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 23), max_size=12))
def test_the_queue_keeps_the_newest_whole_frames(assistant: Assistant, sizes: list[int]) -> None:
    call = a_call(assistant, bound=3)
    stream = np.linspace(-1, 1, max(1, sum(sizes))).astype(np.float32)[: sum(sizes)]
    dropped, at = 0, 0
    for size in sizes:
        dropped += call.push(stream[at : at + size])
        at += size
    whole = stream[: len(stream) // 4 * 4].reshape(-1, 4)
    assert dropped == call.dropped == max(0, len(whole) - 3) and call.queued == min(3, len(whole))
    for frame in whole[-3:]:
        assert np.array_equal(taken(call), frame)


def test_what_is_not_a_number_is_silence(assistant: Assistant) -> None:
    call = a_call(assistant, bound=3)
    call.push(np.array([np.nan, np.inf, -np.inf, 7.0], np.float32))
    assert np.array_equal(taken(call), np.array([0, 0, 0, 1], np.float32))


def test_silence_flows_as_fast_as_time(assistant: Assistant) -> None:
    call = a_call(assistant, bound=3, on_gap="silence")
    steps = [now for now in range(100) if call.due(float(now), 1.0) and call.take(float(now)) is None]
    assert steps == list(range(3, 100))
    call.push(np.ones(4, np.float32))
    assert call.take(100.0) is not None and not call.due(101.0, 1.0) and call.due(103.0, 1.0)


# sampling of rows -----------------------------------------------------------------------------------------------------


def a_sampling(rows: list[RowSettings]) -> RowSampling:
    sampling = RowSampling(len(rows), padding=3)
    for row, one in enumerate(rows):
        sampling.put(row, one)
    return sampling


def hot(seed: int, **values: float) -> RowSettings:
    usual = {"text_temperature": 1.0, "text_top_k": 0, "audio_temperature": 1.0, "audio_top_k": 0} | values
    return RowSettings(seed=seed, **usual)  # type: ignore[arg-type]


def test_draws_follow_the_softmax() -> None:
    rows = 4000
    sampling = a_sampling([hot(seed) for seed in range(rows)])
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5])
    counts = torch.zeros(5)
    for _ in range(10):
        counts += sampling(logits.expand(rows, -1), 1).bincount(minlength=5)
        sampling.advance(torch.ones(rows, dtype=torch.bool))
    assert torch.allclose(counts / counts.sum(), logits.softmax(0), atol=0.01)


def test_top_k_greedy_and_padding_bias() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    best = logits.topk(4, dim=-1).indices
    rows = [hot(1, text_temperature=0.0), hot(2, text_top_k=4), hot(3, text_temperature=0.0, padding_bias=9.0)]
    sampling = a_sampling(rows)
    for _ in range(40):
        ids = sampling(logits, 0)
        assert ids[0] == best[0, 0] and ids[1] in best[1] and ids[2] == 3
        sampling.advance(torch.ones(3, dtype=torch.bool))


def test_the_padding_bias_multiplies_its_probability_at_any_temperature() -> None:
    rows, bias, temperature = 20_000, 1.0, 0.45
    one = {"text_temperature": temperature, "padding_bias": bias}
    sampling = a_sampling([hot(seed, **one) for seed in range(rows)])
    logits = torch.tensor([0.0, 0.3, -0.2, 0.1, 0.2])
    weights = (logits / temperature).softmax(0)
    weights[3] *= math.exp(bias)
    counts = sampling(logits.expand(rows, -1), 0).bincount(minlength=5)
    assert torch.allclose(counts / rows, weights / weights.sum(), atol=0.02)


def test_a_picture_that_was_no_number_leaves_its_row_clean(tiny_model: MoshiVis) -> None:
    adapters = tiny_model.adapters
    assert adapters is not None
    tokens = torch.randn(1, 6, tiny_model.config.speech_lm.backbone.dim)
    whole, broken = adapters.encode(tokens, streaming=True), adapters.encode(tokens * math.nan, streaming=True)
    small = adapters.encode(tokens[:, :2], streaming=True)
    for then in (None, small):
        rows = ImageRows(2, whole, most_tokens=6)
        rows.put(0, broken)
        rows.put(0, then)
        context = adapters.step_context(adapters.new_state(2), rows.kv)
        x = torch.randn(2, 1, tiny_model.config.speech_lm.backbone.dim)
        updates = [context(layer, x) for layer in range(adapters.num_layers)]
        assert all(update is None or update.isfinite().all() for update in updates)
        assert context.gate().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_finite_whatever_the_bits(dtype: torch.dtype) -> None:
    uniform = _uniform(torch.tensor([-(2**63), -1, 0, 1, 2**63 - 1]), dtype)
    assert uniform.dtype == dtype and (uniform > 0).all() and (uniform < 1).all()
    assert (-(-uniform.log()).log()).isfinite().all() and (uniform.diff() >= 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 20), st.integers(0, 16), st.integers(1, MAX_TOP_K))
def test_a_rows_draw_does_not_depend_on_its_neighbours(seed: int, steps: int, stream: int, top_k: int) -> None:
    logits = torch.randn(3, 700, generator=torch.Generator().manual_seed(seed % 1000))
    one = hot(seed, text_top_k=top_k, audio_top_k=top_k)
    alone, company = a_sampling([one]), a_sampling([hot(5), one, hot(6)])
    alone.steps += steps
    company.steps[1] += steps
    assert alone(logits[1:2], stream)[0] == company(logits, stream)[1]
