"""Token streams and their delays (reference facts, model.md sections 2 and 5.3).

Streams are ordered text, own audio, user audio. Aligned tokens `codes[:, k, f]` belong to frame f in every stream.
Stream k is delayed by `delays[k]` frames; where a delay leaves nothing to say, the stream holds its initial token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moshivis.config import SpeechLMConfig

ZERO_TOKEN = -1  # embedded as an exact zero vector, in any stream


def initial_tokens(config: SpeechLMConfig, device: torch.device | str | None = None) -> Tensor:
    """[K] what each stream holds before its first frame."""
    audio = config.own_codebooks + config.user_codebooks
    return torch.tensor([config.text_card, *[config.audio_card] * audio], device=device)


def stream_delays(config: SpeechLMConfig, device: torch.device | str | None = None) -> Tensor:
    """[K] frames. Raises ValueError unless the config names one non-negative delay a stream."""
    if len(config.delays) != config.num_streams or min(config.delays) < 0:
        raise ValueError(f"{config.num_streams} streams need as many delays of 0 or more, not {config.delays}")
    return torch.tensor(config.delays, device=device)


def apply_delays(codes: Tensor, config: SpeechLMConfig) -> Tensor:
    """Aligned tokens [B, K, T] -> delayed ones [B, K, T]; the last `delays[k]` tokens of stream k fall off the end.

    Column t of the text and own streams is what the model must generate at step t.
    """
    return _shift(codes, stream_delays(config, codes.device), initial_tokens(config, codes.device))


def model_inputs(codes: Tensor, config: SpeechLMConfig) -> Tensor:
    """Aligned tokens [B, K, T] -> [B, K, T] what the backbone sees at each step of that conversation.

    The text and own streams are fed back one step after they are generated; the user's are fed as they arrive. The
    very first user frame is never seen: initial tokens stand in its place, as in the released generation loop.
    """
    delays = stream_delays(config, codes.device)
    own = 1 + config.own_codebooks
    initial = initial_tokens(config, codes.device)
    fed_back = _shift(codes[:, :own], delays[:own] + 1, initial[:own])
    heard = _shift(codes[:, own:], delays[own:], initial[own:], skip=1)
    return torch.cat([fed_back, heard], dim=1)


def _shift(codes: Tensor, delays: Tensor, initial: Tensor, skip: int = 0) -> Tensor:
    source = torch.arange(codes.shape[-1], device=codes.device) - delays[:, None]  # [K, T]
    shifted = codes.gather(2, source.clamp(min=0).expand(len(codes), -1, -1))
    return torch.where(source >= skip, shifted, initial[:, None])
