"""Delays: there and back, and the columns that the model sees at every step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moshivis.config import BackboneConfig, DepthConfig, SpeechLMConfig
from moshivis.speech_lm.lm import SpeechLM
from moshivis.speech_lm.streams import apply_delays, initial_tokens, model_inputs, stream_delays

CHECKED = settings(derandomize=True, deadline=None, max_examples=60)


@st.composite
def configs(draw: st.DrawFn) -> SpeechLMConfig:
    own, user = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    delays = tuple(draw(st.lists(st.integers(0, 3), min_size=1 + own + user, max_size=1 + own + user)))
    return SpeechLMConfig(text_card=50, audio_card=20, own_codebooks=own, user_codebooks=user, delays=delays)


def some_codes(config: SpeechLMConfig, frames: int) -> Tensor:
    """Every token tells its row, stream and frame."""
    rows, streams = torch.arange(2)[:, None, None], torch.arange(config.num_streams)[:, None]
    return 10000 * (1 + rows) + 100 * streams + torch.arange(frames)


@CHECKED
@given(config=configs(), frames=st.integers(1, 9))
def test_delays_there_and_back(config: SpeechLMConfig, frames: int) -> None:
    codes = some_codes(config, frames)
    delayed = apply_delays(codes, config)
    assert delayed.shape == codes.shape
    kept = max(frames - config.max_delay, 0)
    back = [delayed[:, k, delay : delay + kept] for k, delay in enumerate(config.delays)]
    assert torch.equal(torch.stack(back, dim=1), codes[..., :kept])


@CHECKED
@given(config=configs(), frames=st.integers(1, 9))
def test_a_delayed_stream_starts_with_its_initial_token(config: SpeechLMConfig, frames: int) -> None:
    delayed, initial = apply_delays(some_codes(config, frames), config), initial_tokens(config)
    for k, delay in enumerate(config.delays):
        assert (delayed[:, k, :delay] == initial[k]).all()
        assert (delayed[:, k, delay:] != initial[k]).all()


@CHECKED
@given(config=configs(), frames=st.integers(1, 9))
def test_inputs_follow_the_generation_rule(config: SpeechLMConfig, frames: int) -> None:
    """Own streams: what was generated a step ago. User streams: what arrived `delay` steps ago, but not frame 0."""
    codes = some_codes(config, frames)
    inputs, generated, initial = model_inputs(codes, config), apply_delays(codes, config), initial_tokens(config)
    for k, delay in enumerate(config.delays):
        for t in range(frames):
            if t <= delay:
                expected = initial[k].expand(2)
            elif k <= config.own_codebooks:
                expected = generated[:, k, t - 1]
            else:
                expected = codes[:, k, t - delay]
            assert torch.equal(inputs[:, k, t], expected)


def test_released_streams() -> None:
    config = SpeechLMConfig()
    assert config.num_streams == 17 and config.max_delay == 1
    assert initial_tokens(config).tolist() == [32000] + [2048] * 16
    assert stream_delays(config).tolist() == [0, *[0, 1, 1, 1, 1, 1, 1, 1] * 2]


@pytest.mark.parametrize("delays", [(0, 0), (0, 0, -1)])
def test_delays_that_do_not_fit_are_refused(delays: tuple[int, ...]) -> None:
    small = BackboneConfig(dim=8, num_heads=2, num_layers=1, feed_forward=16, context=4)
    config = SpeechLMConfig(
        text_card=5, audio_card=5, own_codebooks=1, user_codebooks=1, delays=delays, backbone=small, depth=DepthConfig()
    )
    with pytest.raises(ValueError, match="3 streams need as many delays"):
        SpeechLM(config)
