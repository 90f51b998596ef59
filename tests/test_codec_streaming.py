"""The codec as a stream: any chunks equal the whole signal, rows live on their own, bad calls are refused.

With a few hundred parameters, both decoders, with and without normalised latents. Frames are 48 samples, two
transformer steps each.
"""

from __future__ import annotations

import functools
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moshivis.codec import Mimi
from moshivis.codec.quantizer import Codebook
from moshivis.config import CodecConfig, CodecTransformerConfig, ISTFTDecoderConfig, QuantizerConfig, SEANetConfig

FRAME = 48
CONTEXT = 24  # steps, so 12 frames
Decoder = Literal["seanet", "istft"]

CHECKED = settings(derandomize=True, deadline=None, max_examples=25)
decoders: st.SearchStrategy[Decoder] = st.sampled_from(("seanet", "istft"))
SEEDS = st.integers(0, 2**31)
every_codec = pytest.mark.parametrize(
    ("decoder", "latent_norm"), [("seanet", False), ("seanet", True), ("istft", False), ("istft", True)]
)


def config(decoder: Decoder, latent_norm: bool) -> CodecConfig:
    return CodecConfig(
        frame_rate=500.0,
        dimension=16,
        seanet=SEANetConfig(channels=(4, 8, 8, 16), ratios=(4, 3, 2), residual_layers=(1, 0, 2)),
        transformer=CodecTransformerConfig(num_layers=2, num_heads=2, feed_forward=24, context=CONTEXT),
        quantizer=QuantizerConfig(dimension=6, bins=16, num_codebooks=4),
        decoder=decoder,
        istft=ISTFTDecoderConfig(channels=8, num_blocks=2, kernel_size=3, expansion=2, n_fft=48, hop=12),
        latent_norm=latent_norm,
        num_codebooks=4,
    )


@functools.cache
def make_codec(decoder: Decoder, latent_norm: bool) -> Mimi:
    """Random weights, large enough that every layer matters."""
    torch.manual_seed(3)
    codec = Mimi(config(decoder, latent_norm))
    for name, parameter in codec.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1.2 * parameter[0].numel() ** -0.5)
        elif "layer_scale" in name:
            nn.init.constant_(parameter, 0.5)
    with torch.no_grad():
        latents = codec.encode_to_latent(wave(0, 4, 20 * FRAME))
        for part in (codec.quantizer.semantic, codec.quantizer.acoustic):
            scale = part.input_proj(latents).std()
            for book in part.levels:
                assert isinstance(book, Codebook)
                book.embedding_sum.normal_().mul_(scale)
    return codec.eval().requires_grad_(False)


def wave(seed: int, batch: int, samples: int) -> Tensor:
    return torch.randn(batch, 1, samples, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)


@st.composite
def chunkings(draw: st.DrawFn, frames: int = CONTEXT // 2) -> list[int]:
    """Calls of one frame and more, no more than `frames` in all."""
    chunks: list[int] = []
    while (left := frames - sum(chunks)) and (not chunks or draw(st.booleans())):
        chunks.append(draw(st.integers(1, left)))
    return chunks


# streams and whole signals -------------------------------------------------------------------------------------------


@given(decoder=decoders, latent_norm=st.booleans(), chunks=chunkings(), batch=st.integers(1, 3), seed=SEEDS)
@CHECKED
def test_streaming_in_any_chunks_equals_offline_inside_the_window(
    decoder: Decoder, latent_norm: bool, chunks: list[int], batch: int, seed: int
) -> None:
    codec = make_codec(decoder, latent_norm)
    x = wave(seed, batch, sum(chunks) * FRAME)
    encoder, twin = codec.new_encoder_state(batch), codec.new_encoder_state(batch)
    decoding = codec.new_decoder_state(batch)
    pieces = x.split([chunk * FRAME for chunk in chunks], dim=-1)
    latents = [codec.encode_step_to_latent(encoder, piece) for piece in pieces]
    close(torch.cat(latents, -1), codec.encode_to_latent(x))
    codes = torch.cat([codec.encode_step(twin, piece) for piece in pieces], -1)
    assert torch.equal(codes, codec.encode(x))
    waves = [codec.decode_step(decoding, piece) for piece in codes.split(chunks, dim=-1)]
    close(torch.cat(waves, -1), codec.decode(codes))


@every_codec
def test_beyond_the_window_a_stream_goes_on_and_sees_less_than_offline(decoder: Decoder, latent_norm: bool) -> None:
    """The first step of a call has lost the key that its last step overwrote, as in the released code."""
    codec = make_codec(decoder, latent_norm)
    x = wave(5, 1, 3 * CONTEXT * FRAME)
    state = codec.new_encoder_state(1)
    latent = torch.cat([codec.encode_step_to_latent(state, piece) for piece in x.split(FRAME, dim=-1)], -1)
    offline = codec.encode_to_latent(x)
    inside = CONTEXT // 2
    close(latent[..., :inside], offline[..., :inside])
    difference = (latent - offline)[..., inside:].abs().amax()
    assert 1e-4 < difference < 0.5 * offline.abs().amax()


@given(decoder=decoders, chunks=st.lists(st.integers(1, 20), min_size=1, max_size=4), seed=SEEDS)
@CHECKED
def test_with_room_for_them_calls_of_many_frames_give_what_calls_of_one_give(
    decoder: Decoder, chunks: list[int], seed: int
) -> None:
    """Also beyond the window, and in calls that are longer than it."""
    codec = make_codec(decoder, False)
    x = wave(seed, 2, sum(chunks) * FRAME)

    def streamed(frames: int, calls: list[int]) -> tuple[Tensor, Tensor]:
        ears, mouth = codec.new_encoder_state(2, frames=frames), codec.new_decoder_state(2, frames=frames)
        pieces = x.split([call * FRAME for call in calls], dim=-1)
        latent = torch.cat([codec.encode_step_to_latent(ears, piece) for piece in pieces], -1)
        codes = codec.quantizer.encode(latent, 4)
        return latent, torch.cat([codec.decode_step(mouth, piece) for piece in codes.split(calls, dim=-1)], -1)

    for many, single in zip(streamed(20, chunks), streamed(1, [1] * sum(chunks)), strict=True):
        close(many, single)
    with pytest.raises(ValueError, match="at most 20 frames"):
        codec.encode_step(codec.new_encoder_state(2, frames=20), wave(0, 2, 21 * FRAME))


@given(
    decoder=decoders,
    latent_norm=st.booleans(),
    calls=st.lists(
        st.tuples(st.integers(1, 3), st.lists(st.booleans(), min_size=3, max_size=3), st.integers(0, 7)),
        min_size=1,
        max_size=12,
    ),
    seed=SEEDS,
)
@CHECKED
def test_rows_start_pause_and_reset_on_their_own(
    decoder: Decoder, latent_norm: bool, calls: list[tuple[int, list[bool], int]], seed: int
) -> None:
    """Each row of a batch gives what it would give alone, window or not; the bits of a call's number name the rows
    that are reset before it."""
    codec = make_codec(decoder, latent_norm)
    encoder, decoding = codec.new_encoder_state(3), codec.new_decoder_state(3)
    alone = [(codec.new_encoder_state(1), codec.new_decoder_state(1)) for _ in range(3)]
    for number, (frames, running, resets) in enumerate(calls):
        x = wave(seed + number, 3, frames * FRAME)
        codes = torch.randint(16, (3, 4, frames), generator=torch.Generator().manual_seed(seed + number))
        rows, active = torch.tensor([bool(resets >> row & 1) for row in range(3)]), torch.tensor(running)
        encoder.reset(rows)
        decoding.reset(rows)
        latent, decoded = codec.encode_step_to_latent(encoder, x, active), codec.decode_step(decoding, codes, active)
        for row in range(3):
            if rows[row]:
                alone[row] = codec.new_encoder_state(1), codec.new_decoder_state(1)
            if active[row]:
                one = slice(row, row + 1)
                close(latent[one], codec.encode_step_to_latent(alone[row][0], x[one]))
                close(decoded[one], codec.decode_step(alone[row][1], codes[one]))


@every_codec
def test_two_streams_of_one_codec_do_not_meet(decoder: Decoder, latent_norm: bool) -> None:
    codec = make_codec(decoder, latent_norm)
    x, y = wave(1, 1, 6 * FRAME), wave(2, 1, 6 * FRAME)
    states = codec.new_encoder_state(1), codec.new_encoder_state(1)
    codes: tuple[list[Tensor], list[Tensor]] = ([], [])
    for pieces in zip(x.split(FRAME, -1), y.split(FRAME, -1), strict=True):
        for found, state, piece in zip(codes, states, pieces, strict=True):
            found.append(codec.encode_step(state, piece))
    assert torch.equal(torch.cat(codes[0], -1), codec.encode(x))
    assert torch.equal(torch.cat(codes[1], -1), codec.encode(y))


@every_codec
def test_a_frame_depends_on_nothing_later(decoder: Decoder, latent_norm: bool) -> None:
    """Codes of frame t need its own samples, the very last one included, and no later ones."""
    codec = make_codec(decoder, latent_norm)
    x = wave(7, 1, 8 * FRAME)
    latent = codec.encode_to_latent(x)
    for sample, first in ((4 * FRAME, 4), (4 * FRAME - 1, 3)):
        changed = x.clone()
        changed[..., sample] += 1
        moved = (codec.encode_to_latent(changed) - latent).abs().amax((0, 1)) > 1e-5
        assert moved.tolist().index(True) == first
    codes = codec.encode(x)
    altered = codes.clone()
    altered[:, :, 4] = (altered[:, :, 4] + 1) % 16
    moved = (codec.decode(altered) - codec.decode(codes))[0, 0].abs() > 1e-6
    assert 4 * FRAME <= moved.tolist().index(True) < 5 * FRAME


# shapes --------------------------------------------------------------------------------------------------------------


@given(decoder=decoders, latent_norm=st.booleans(), samples=st.integers(1, 5 * FRAME), seed=SEEDS)
@CHECKED
def test_a_partial_last_frame_is_filled_with_silence(
    decoder: Decoder, latent_norm: bool, samples: int, seed: int
) -> None:
    codec = make_codec(decoder, latent_norm)
    frames = -(-samples // FRAME)
    x = wave(seed, 1, samples)
    full = torch.zeros(1, 1, frames * FRAME)
    full[..., :samples] = x
    codes = codec.encode(x)
    assert codes.shape == (1, 4, frames)
    assert torch.equal(codes, codec.encode(full))
    assert codec.decode(codes).shape == (1, 1, frames * FRAME)


@given(decoder=decoders, latent_norm=st.booleans(), codebooks=st.integers(1, 4), seed=SEEDS)
@CHECKED
def test_fewer_codebooks_are_a_prefix_of_more(decoder: Decoder, latent_norm: bool, codebooks: int, seed: int) -> None:
    codec = make_codec(decoder, latent_norm)
    x = wave(seed, 2, 4 * FRAME)
    codes = codec.encode(x)
    assert torch.equal(codec.encode(x, codebooks), codes[:, :codebooks])
    stepped = codec.encode_step(codec.new_encoder_state(2), x, num_codebooks=codebooks)
    assert torch.equal(stepped, codes[:, :codebooks])
    decoded = codec.decode(codes[:, :codebooks])
    assert decoded.shape == x.shape and decoded.isfinite().all()
    close(codec.decode_step(codec.new_decoder_state(2), codes[:, :codebooks]), decoded)


@given(decoder=decoders, latent_norm=st.booleans(), batch=st.integers(1, 5), seed=SEEDS)
@CHECKED
def test_a_row_of_a_batch_equals_the_row_alone(decoder: Decoder, latent_norm: bool, batch: int, seed: int) -> None:
    codec = make_codec(decoder, latent_norm)
    x = wave(seed, batch, 3 * FRAME + 5)
    codes = codec.encode(x)
    decoded = codec.decode(codes)
    for row in range(batch):
        one = slice(row, row + 1)
        assert torch.equal(codec.encode(x[one]), codes[one])
        close(codec.decode(codes[one]), decoded[one])


@every_codec
def test_a_training_pass_reaches_every_parameter(decoder: Decoder, latent_norm: bool) -> None:
    torch.manual_seed(0)
    codec = Mimi(config(decoder, latent_norm)).train()
    for _ in range(5):  # every level initialises after the one before it
        output = codec(wave(1, 2, 8 * FRAME))
    assert output.wave.shape == (2, 1, 8 * FRAME) and output.codes.shape == (2, 4, 8)
    (output.wave.square().mean() + output.penalty).backward()
    without = [name for name, parameter in codec.named_parameters() if parameter.grad is None]
    assert not without
    assert all(parameter.grad.isfinite().all() for parameter in codec.parameters() if parameter.grad is not None)


@every_codec
def test_evaluation_forward_is_encode_and_decode(decoder: Decoder, latent_norm: bool) -> None:
    codec = make_codec(decoder, latent_norm)
    x = wave(4, 2, 5 * FRAME)
    output = codec(x)
    assert torch.equal(output.codes, codec.encode(x)) and output.penalty == 0
    close(output.wave, codec.decode(output.codes))


@every_codec
def test_a_normalised_latent_has_unit_power(decoder: Decoder, latent_norm: bool) -> None:
    power = make_codec(decoder, latent_norm).encode_to_latent(wave(9, 1, 4 * FRAME)).square().mean(1)
    assert torch.allclose(power, torch.ones_like(power), atol=1e-3) == latent_norm


# calls that are refused ----------------------------------------------------------------------------------------------


def test_empty_input_is_refused() -> None:
    codec = make_codec("seanet", False)
    with pytest.raises(ValueError, match="empty"):
        codec.encode(torch.zeros(1, 1, 0))
    with pytest.raises(ValueError, match="at least one frame"):
        codec.decode(torch.zeros(1, 4, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="1 to 4 codebooks"):
        codec.decode(torch.zeros(1, 0, 3, dtype=torch.int64))


@pytest.mark.parametrize("samples", [0, 1, FRAME - 1, FRAME + 1])
def test_a_stream_takes_whole_frames_only_and_is_unharmed(samples: int) -> None:
    codec = make_codec("seanet", False)
    state = codec.new_encoder_state(1)
    x = wave(2, 1, 3 * FRAME)
    codec.encode_step(state, x[..., :FRAME])
    with pytest.raises(ValueError, match="whole frames of 48 samples"):
        codec.encode_step(state, torch.zeros(1, 1, samples))
    assert torch.equal(codec.encode_step(state, x[..., FRAME:]), codec.encode(x)[..., 1:])


@pytest.mark.parametrize("codebooks", [-1, 0, 5])
def test_a_number_of_codebooks_that_is_not_there_is_refused(codebooks: int) -> None:
    codec = make_codec("seanet", False)
    x = wave(2, 1, FRAME)
    state = codec.new_encoder_state(1)
    for call in (
        lambda: codec.encode(x, codebooks),
        lambda: codec.encode_step(state, x, num_codebooks=codebooks),
        lambda: codec(x, codebooks),
    ):
        with pytest.raises(ValueError, match=f"1 to 4 codebooks, not {codebooks}"):
            call()
    assert torch.equal(codec.encode_step(state, x), codec.encode(x))
    with pytest.raises(ValueError, match="1 to 4 codebooks, not 5"):
        codec.decode(torch.zeros(1, 5, 3, dtype=torch.int64))


def test_a_call_longer_than_the_window_is_refused() -> None:
    codec = make_codec("seanet", False)
    x = wave(2, 1, 2 * FRAME)
    encoder, decoding = codec.new_encoder_state(1), codec.new_decoder_state(1)
    with pytest.raises(ValueError, match="at most 12 frames"):
        codec.encode_step(encoder, torch.zeros(1, 1, 13 * FRAME))
    codes = codec.encode_step(encoder, x)
    assert torch.equal(codes, codec.encode(x))
    with pytest.raises(ValueError, match="at most 12 frames"):
        codec.decode_step(decoding, torch.zeros(1, 4, 13, dtype=torch.int64))
    close(codec.decode_step(decoding, codes), codec.decode(codes))


def test_codes_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"codes must be \[B, K, F\]"):
        make_codec("seanet", False).decode(torch.zeros(4, 3, dtype=torch.int64))
