"""Cases of the speech LM: whole sequences, streams, the depth transformer, generation.

A tensor's name in a case is `<run>.<what>`; the run's name says how it was made:
`a.causal_kv` a whole sequence, `a.stream` step by step, `a.kv` the image's keys and values, `b` depth logits,
`c.imgA` generation, `d.stream`, `d.chunk2`, `d.gen` the same with the small window of `spec.ring`, `h.sampled`
sampled generation, `i.bf16` and below in bfloat16.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moshivis.adapters.gated_cross_attention import ImageContext, ImageKV
from moshivis.conform.generate import generate
from moshivis.conform.parts import Parts
from moshivis.inference.sampling import GREEDY, Sampling

Results = dict[str, Tensor]


class LanguageRuns:
    """Makes the runs of one case. `run` gives the tensors of a run, None if it does not know the run."""

    def __init__(self, parts: Parts, spec: Mapping[str, Any], inputs: Mapping[str, Tensor], dtype: torch.dtype):
        self.full_precision = parts
        self.parts = copy.deepcopy(parts).to(dtype)
        assert self.parts.speech_lm is not None
        self.speech_lm = self.parts.speech_lm
        self.adapters = self.parts.adapters
        self.spec = spec
        device = self.speech_lm.text_head.weight.device
        self.inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        self.dtype = dtype

    def run(self, name: str, expected: Mapping[str, Tensor]) -> Results | None:
        """`expected` holds the case's tensors of this run, by the names that the result has."""
        group, _, kind = name.partition(".")
        if name == "i.bf16" or name.startswith("i.bf16."):
            runs = LanguageRuns(self.full_precision, self.spec, self.inputs, torch.bfloat16)
            return runs.run("b" if name == "i.bf16" else "a." + name.removeprefix("i.bf16."), expected)
        match group:
            case "a" if kind == "kv":
                return self._keys_values()
            case "a" if kind.startswith("stream"):
                return self._stream(self.inputs["tokens"], set(kind.split("_")[1:]))
            case "a":
                return self._block(kind)
            case "b":
                return self._depth()
            case "c":
                return self._generate(kind, GREEDY, expected)
            case "d" if "ring" in self.spec:
                return self._small_window(kind, expected)
            case "h":
                return self._sampled(expected)
        return None

    # whole sequences --------------------------------------------------------------------------------------------

    def _block(self, kind: str) -> Results | None:
        attention, *flags = kind.split("_")
        if attention not in ("bidir", "causal") or set(flags) - _FLAGS:
            return None
        tokens = self.inputs["tokens"]
        image = self._image(set(flags))
        context = None
        if image is not None and self.adapters is not None:
            context = self.adapters.context(image, tokens.shape[-1])
        mask = None
        if attention == "bidir":
            mask = torch.ones(tokens.shape[-1], tokens.shape[-1], dtype=torch.bool, device=tokens.device)
        trace = _Trace(self.parts, context)
        hidden, text_logits = self.speech_lm(tokens, None if context is None else trace.update, mask)
        trace.remove()
        results = {"transformer_out": hidden, "text_logits": text_logits[:, None], **trace.results()}
        results["gate_weight"] = torch.zeros(()) if context is None else context.gate().mean()
        return results

    def _image(self, flags: set[str]) -> ImageKV | None:
        if "noimg" in flags or self.adapters is None:
            return None
        mask = self.inputs["image_mask"] if "xamask" in flags else None
        return self.adapters.encode(self._source("image_tokens"), mask, streaming="kv" in flags)

    def _source(self, name: str) -> Tensor:
        return self.inputs[name].to(self.dtype)

    def _keys_values(self) -> Results | None:
        if self.adapters is None:
            return None
        image = self.adapters.encode(self._source("image_tokens"), streaming=True)
        return {"k": image.keys[0].transpose(1, 2).flatten(2), "v": image.values[0].transpose(1, 2).flatten(2)}

    def _depth(self) -> Results:
        hidden, text = self._source("dep.hidden"), self.inputs["dep.text"]
        audio = self.inputs["dep.audio"].transpose(1, 2)
        logits = self.speech_lm.depth_logits(hidden.flatten(0, 1), text.flatten(), audio.flatten(0, 1))
        return {"audio_logits": logits.unflatten(0, text.shape)}

    # streams ----------------------------------------------------------------------------------------------------

    def _stream(self, tokens: Tensor, flags: set[str], chunk: int = 1) -> Results | None:
        """`chunk` steps a call; those of a call see each other, as in the released code."""
        if flags - _FLAGS or tokens.shape[-1] % chunk:
            return None
        image = self._image(flags)
        state = self.speech_lm.new_state(len(tokens))
        seen = None if self.adapters is None else self.adapters.new_state(len(tokens))
        outputs, gates = [], []
        for part in tokens.split(chunk, dim=-1):
            context = None
            if image is not None and self.adapters is not None and seen is not None:
                context = self.adapters.step_context(seen, image, steps=chunk)
            outputs.append(self.speech_lm.step(state, part, context, causal=chunk == 1))
            gates.append(torch.zeros(()) if context is None else context.gate().mean())
        return {
            "transformer_out": torch.cat([output.hidden for output in outputs], dim=1),
            "text_logits": torch.cat([output.text_logits for output in outputs], dim=1)[:, None],
            "gate_weight": torch.stack(gates),
        }

    def _small_window(self, kind: str, expected: Mapping[str, Tensor]) -> Results | None:
        context = self.spec["ring"]["context"]
        runs = LanguageRuns(_with_context(self.full_precision, context), self.spec, self.inputs, self.dtype)
        if kind == "gen":
            return runs._generate("imgA", GREEDY, expected)
        tokens = self.inputs["ring.tokens"]
        if kind == "stream":
            return runs._stream(tokens, set())
        chunked = re.fullmatch(r"chunk(\d+)", kind)
        return None if chunked is None else runs._stream(tokens, set(), int(chunked[1]))

    # generation -------------------------------------------------------------------------------------------------

    def _generate(self, kind: str, sampling: Sampling, expected: Mapping[str, Tensor]) -> Results | None:
        images = sorted(name for name in self.inputs if name.startswith("image_") and self.inputs[name].ndim == 3)
        letters = {name.removeprefix("image_"): name for name in images if name != "image_tokens"}
        user, first = self.inputs["user"], 0
        if kind == "batch":
            source = torch.cat([self._source(name) for name in letters.values()])
        elif kind in ("noimg", "late") or kind.removeprefix("img") in letters:
            letter = kind.removeprefix("img") if kind.startswith("img") else "A"
            source, user = self._source(letters[letter]), user[:, :1]
            first = {"noimg": len(user), "late": self.spec.get("src_from", 0)}.get(kind, 0)
        else:
            return None
        image = None if self.adapters is None else self.adapters.encode(source, streaming=True)
        return generate(self.parts, user, lambda step: image if step >= first else None, sampling, expected)

    def _sampled(self, expected: Mapping[str, Tensor]) -> Results | None:
        asked = self.spec["sampling"]
        sampling = Sampling(
            text_temperature=asked["temp_text"],
            text_top_k=asked["top_k_text"],
            audio_temperature=asked["temp"],
            audio_top_k=asked["top_k"],
        )
        with torch.random.fork_rng():
            torch.manual_seed(self.spec["sampling_seed"])
            return self._generate("imgA", sampling, expected)


_FLAGS = {"noimg", "kv", "xamask"}


def _with_context(parts: Parts, context: int) -> Parts:
    """The same weights with a window of `context` keys."""
    lm = parts.config.speech_lm
    backbone = dataclasses.replace(lm.backbone, context=context)
    config = dataclasses.replace(parts.config, speech_lm=dataclasses.replace(lm, backbone=backbone))
    small = Parts(config, language=True, vision=parts.vision is not None)
    small.load_state_dict(parts.state_dict())
    weight = next(parts.parameters())
    return small.eval().requires_grad_(False).to(weight.device, weight.dtype)


class _Trace:
    """Watches the blocks of one call from outside."""

    def __init__(self, parts: Parts, context: ImageContext | None):
        assert parts.speech_lm is not None
        self._context = context
        self._outputs: list[Tensor] = []
        self._attention: list[Tensor] = []
        self._updates: list[Tensor] = []
        self._handles = []
        for block in parts.speech_lm.backbone.layers:
            attention = block.get_submodule("self_attn")
            self._handles += [
                block.register_forward_hook(lambda _m, _a, output: self._outputs.append(output)),
                attention.register_forward_hook(lambda _m, _a, output: self._attention.append(output)),
            ]

    def update(self, layer: int, x: Tensor) -> Tensor | None:
        update = None if self._context is None else self._context(layer, x)
        if update is not None:
            self._updates.append(update)
        return update

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def results(self) -> Results:
        found = {"layer_out": torch.stack(self._outputs), "self_attn": torch.stack(self._attention)}
        if self._updates:
            found["xa_update"] = torch.stack(self._updates)
        gates = {} if self._context is None else self._context.gates
        return found | {f"gate.layer{layer}": gate for layer, gate in gates.items()}
