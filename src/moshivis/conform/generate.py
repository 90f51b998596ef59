"""Generation as a case describes it, with everything recorded that a case may pin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moshivis.adapters.gated_cross_attention import ImageKV
from moshivis.conform.compare import REDUCED
from moshivis.conform.parts import Parts
from moshivis.inference.generation import Generator
from moshivis.inference.sampling import GREEDY, Sampling

CLOSE = 0.1  # of the range of the logits; a decision may flip in a reduced precision if it is as close as this
NOTHING = -1000  # stands in a case's tokens where the step returned none


def generate(
    parts: Parts,
    user: Tensor,
    image_at: Callable[[int], ImageKV | None],
    sampling: Sampling,
    expected: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """User codes [N, B, Ku] -> what happened at each of the N steps, by the names that cases use.

    In a reduced precision the tokens of `expected` are fed back in place of what is drawn, so that one close decision
    does not make all later steps incomparable; a decision that is not close stands as drawn, wrong (`_Recorder`).
    """
    assert parts.speech_lm is not None
    generator = Generator(parts.speech_lm, parts.adapters)
    state = generator.new_state(user.shape[1])
    recorder = _Recorder(parts, sampling, expected)
    tokens, valid, gates = [], [], []
    with recorder.hooks():
        for step, codes in enumerate(user):
            frame = generator.step(state, codes, image_at(step), recorder)
            tokens.append(torch.where(frame.valid[:, None], frame.tokens, NOTHING))
            valid.append(frame.valid[0])
            gates.append(frame.gate.mean())
    return {
        "tokens": torch.stack(tokens),
        "is_none": ~torch.stack(valid),
        "gate_weight": torch.stack(gates),
        "model_input": torch.stack(recorder.inputs)[..., 0],
        "transformer_out": torch.stack(recorder.hidden)[..., 0, :],
        "text_logits": torch.stack(recorder.logits[0]),
        "audio_logits": torch.stack([torch.stack(one) for one in recorder.logits[1:]], dim=2),
    }


@dataclass
class _Recorder:
    """Draws tokens and remembers the logits; see `generate` for what it does in a reduced precision."""

    parts: Parts
    sampling: Sampling
    expected: Mapping[str, Tensor]
    inputs: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    logits: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        assert self.parts.speech_lm is not None
        self.logits = [[] for _ in range(1 + self.parts.config.speech_lm.own_codebooks)]

    def __call__(self, logits: Tensor, stream: int) -> Tensor:
        step = len(self.logits[stream])
        self.logits[stream].append(logits)
        drawn = self.sampling(logits.cpu(), stream).to(logits.device)  # a case's random draws are those of a CPU
        if logits.dtype not in REDUCED:
            return drawn
        known = self._known(step, stream)
        if known is None:
            return drawn
        known = known.to(drawn.device)
        if any(self._known(step, before) is None for before in range(stream)):
            return known  # the case does not tell on what this token depends, so there is nothing to judge
        top_k = self.sampling.text_top_k if stream == 0 else self.sampling.audio_top_k
        rank = 1 if self.sampling == GREEDY else min(top_k or logits.shape[-1], logits.shape[-1])
        values = logits.float()
        threshold = values.topk(rank).values[:, -1] - CLOSE * (values.amax(-1) - values.amin(-1))
        return torch.where(values.gather(1, known[:, None])[:, 0] >= threshold, known, drawn)

    def _known(self, step: int, stream: int) -> Tensor | None:
        """Ids [B] that the case has for a stream's token of a step: what was likeliest, fed back, or returned."""
        logits = self.expected.get("audio_logits" if stream else "text_logits")
        if logits is not None and self.sampling == GREEDY:
            return (logits[step, :, stream - 1] if stream else logits[step]).argmax(-1)
        delay = self.parts.config.speech_lm.delays[stream]
        inputs, tokens = self.expected.get("model_input"), self.expected.get("tokens")
        if inputs is not None and delay <= step < len(inputs) - 1:
            return inputs[step + 1, :, stream]
        returned = step + self.parts.config.speech_lm.max_delay - delay
        if tokens is not None and step >= delay and returned < len(tokens):
            return tokens[returned, :, stream]
        return None

    def hooks(self) -> _Hooks:
        assert self.parts.speech_lm is not None
        return _Hooks(
            [
                self.parts.speech_lm.embedding.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0])),
                self.parts.speech_lm.text_head.register_forward_pre_hook(lambda _, args: self.hidden.append(args[0])),
            ]
        )


@dataclass
class _Hooks:
    handles: list[torch.utils.hooks.RemovableHandle]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
