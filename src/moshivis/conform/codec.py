"""Cases of the codec: whole signals, streams in several chunkings, and streams whose rows pause and reset.

In a case of kind "wav" the tensors without a dot are the offline path, step by step; `stream1.*`, `stream2.*` and
`streamvar.*` feed 1, 2, or 1, 3, 2, 4, 1, … frames a call; `odd<L>.*` takes the first L samples, `nq<K>.*` encodes to
K codebooks, `dec_k<K>.*` decodes K of them. A case of kind "mask" says for each call which rows run and which reset.
Where the rest computes in a reduced precision the codec computes in float32: it does so in a loaded model too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moshivis.checkpoints.mimi import from_released, to_released
from moshivis.checkpoints.tensors import check_tensors
from moshivis.codec.mimi import Mimi
from moshivis.config import CodecConfig, CodecTransformerConfig, QuantizerConfig, SEANetConfig
from moshivis.conform.compare import REDUCED, Tolerances
from moshivis.errors import CheckpointError

Results = dict[str, Tensor]

_GIVEN = {"wav": ("x",), "mask": ("x", "exec_mask", "reset_mask", "frames", "chunk", "dec_in")}
_CHUNKS = {"stream1": (1,), "stream2": (2,), "streamvar": (1, 3, 2, 4)}  # frames a call, over and over


def codec_config(released: Mapping[str, Any]) -> CodecConfig:
    """Our config from the nested keys of the released codec's configuration."""
    seanet, transformer, quantizer = released["seanet"], released["transformer"], released["quantizer"]
    ratios = tuple(reversed(seanet["ratios"]))
    return CodecConfig(
        sample_rate=released["sample_rate"],
        frame_rate=released["frame_rate"],
        dimension=seanet["dimension"],
        seanet=SEANetConfig(
            channels=tuple(seanet["n_filters"] * 2**stage for stage in range(len(ratios) + 1)),
            ratios=ratios,
            residual_layers=(seanet["n_residual_layers"],) * len(ratios),
            kernel_size=seanet["kernel_size"],
            last_kernel_size=seanet["last_kernel_size"],
            residual_kernel_size=seanet["residual_kernel_size"],
            dilation_base=seanet["dilation_base"],
            compress=seanet["compress"],
        ),
        transformer=CodecTransformerConfig(
            num_layers=transformer["num_layers"],
            num_heads=transformer["num_heads"],
            feed_forward=transformer["dim_feedforward"],
            context=transformer["context"],
            max_period=transformer["max_period"],
        ),
        quantizer=QuantizerConfig(
            dimension=quantizer["dimension"], bins=quantizer["bins"], num_codebooks=quantizer["n_q"]
        ),
        num_codebooks=quantizer["n_q"],
    )


class CodecRuns:
    """Makes the runs of one case. `run` gives the tensors of a run, and nothing of a run that it does not know.

    Raises CheckpointError if the weights are not those of the config, or the kind of the case is unknown.
    """

    tolerances = Tolerances({"float32": {"rtol": 0.0, "atol": 1e-4}})

    def __init__(
        self,
        meta: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ):
        if meta.get("kind") not in _GIVEN:
            raise CheckpointError(f"codec cases are of kind {' or '.join(_GIVEN)}, not {meta.get('kind')!r}")
        self.kind: str = meta["kind"]
        self.given = {name: tensors[name].to(device) for name in _GIVEN[self.kind]}
        self.codec = Mimi(codec_config(meta["config"])).eval().requires_grad_(False)
        check_tensors(weights, to_released(self.codec.state_dict()), f"{meta.get('case')}.weights.safetensors")
        self.codec.load_state_dict(from_released(weights))
        self.codec.to(device, torch.float32 if dtype in REDUCED else dtype)
        wave = self.given["x" if self.kind == "wav" else "chunk"]
        self.wave = wave.to(next(self.codec.parameters()).dtype)

    def run(self, name: str, expected: Mapping[str, Tensor]) -> Results:
        """`expected` holds the case's tensors of this run, by the names that the result has."""
        if self.kind == "mask":
            return self._masked() if name == "" else {}
        if name == "":
            return self._offline()
        if name in _CHUNKS:
            return self._streamed(_CHUNKS[name])
        if length := re.fullmatch(r"odd(\d+)", name):
            piece = self.wave[..., : int(length[1])]
            codes = self.codec.encode(piece)
            latent = self.codec.encode_to_latent(piece)
            return {"latent": latent, "codes": codes, "decoded": self.codec.decode(codes)}
        if codebooks := re.fullmatch(r"nq(\d+)", name):
            return {"codes": self.codec.encode(self.wave, int(codebooks[1]))}
        if codebooks := re.fullmatch(r"dec_k(\d+)", name):
            frames = max(_frames(tensor, self.codec.config.frame_size) for tensor in expected.values())
            codes = self.codec.encode(self.wave)[:, : int(codebooks[1]), :frames]
            return {"q_latent": self.codec.quantizer.decode(codes), "decoded": self.codec.decode(codes)}
        return {}

    def _offline(self) -> Results:
        codec = self.codec
        seanet = codec.encoder(F.pad(self.wave, (0, -self.wave.shape[-1] % codec.config.frame_size)))
        codes = codec.encode(self.wave)
        latent = codec.quantizer.decode(codes)
        upsampled = codec.upsample(latent)
        return {
            "enc_seanet": seanet,
            "enc_transformer": codec.encoder_transformer(seanet),
            "latent": codec.encode_to_latent(self.wave),
            "codes": codes,
            "q_latent": latent,
            "upsampled": upsampled,
            "dec_transformer": codec.decoder_transformer(upsampled),
            "decoded": codec.decode(codes),
        }

    def _streamed(self, chunks: tuple[int, ...]) -> Results:
        codec, size, batch = self.codec, self.codec.config.frame_size, len(self.wave)
        encoder, twin = codec.new_encoder_state(batch), codec.new_encoder_state(batch)
        pieces: dict[str, list[Tensor]] = {"latent": [], "codes": [], "decoded": []}
        for start, frames in _calls(self.wave.shape[-1] // size, chunks):
            wave = self.wave[..., start * size : (start + frames) * size]
            pieces["latent"].append(codec.encode_step_to_latent(encoder, wave))
            pieces["codes"].append(codec.encode_step(twin, wave))
        decoder, codes = codec.new_decoder_state(batch), codec.encode(self.wave)
        for start, frames in _calls(codes.shape[-1], chunks):
            pieces["decoded"].append(codec.decode_step(decoder, codes[..., start : start + frames]))
        return {name: torch.cat(parts, -1) for name, parts in pieces.items() if parts}

    def _masked(self) -> Results:
        codec, size, batch = self.codec, self.codec.config.frame_size, len(self.wave)
        encoder, twin = codec.new_encoder_state(batch), codec.new_encoder_state(batch)
        decoder = codec.new_decoder_state(batch)
        pieces: dict[str, list[Tensor]] = {"latent": [], "codes": [], "decoded": []}
        start = 0
        for call, frames in enumerate(self.given["frames"].tolist()):
            active, reset = self.given["exec_mask"][call], self.given["reset_mask"][call]
            for state in (encoder, twin, decoder):
                state.reset(reset)
            wave = self.wave[..., start * size : (start + frames) * size]
            codes = self.given["dec_in"][..., start : start + frames]
            # What rows that did not run give means nothing; the case holds these values there.
            idle = ~active[:, None, None]
            pieces["latent"].append(codec.encode_step_to_latent(encoder, wave, active).masked_fill(idle, 0))
            pieces["codes"].append(codec.encode_step(twin, wave, active).masked_fill(idle, -1))
            pieces["decoded"].append(codec.decode_step(decoder, codes, active).masked_fill(idle, 0))
            start += frames
        return {name: torch.cat(parts, -1) for name, parts in pieces.items()}


def _calls(total: int, chunks: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Start and length of each call, while they fit in `total` frames."""
    start = 0
    for frames in cycle(chunks):
        if start + frames > total:
            return
        yield start, frames
        start += frames


def _frames(tensor: Tensor, frame_size: int) -> int:
    """Frames of a latent [B, D, F] or a waveform [B, 1, F * frame_size]."""
    return tensor.shape[-1] // frame_size if tensor.shape[1] == 1 else tensor.shape[-1]
