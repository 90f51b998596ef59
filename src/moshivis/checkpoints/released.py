"""Names and layout of the released PyTorch file <-> ours (reference facts, model.md 3 to 5, 7 and 9).

Everything but the vision encoder is described by a list of links that is walked in either direction. The released
file repeats what layers share; it must hold the shared projections at least once, and copies must be equal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moshivis.checkpoints.tensors import check_tensors, some
from moshivis.config import AdapterConfig, ModelConfig, SpeechLMConfig
from moshivis.errors import CheckpointError
from moshivis.vision import released as vision_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Link:
    """Some of our tensors, the released ones that hold the same numbers, and the way from each to the other."""

    ours: tuple[str, ...]
    released: tuple[str, ...]
    to_ours: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    to_released: Callable[[Sequence[Tensor]], Sequence[Tensor]]


def to_released(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The released file's tensors from the state dict of a `MoshiVis`, less its codec, which has a file of its own.

    Speech LM and adapters, or vision, may be left out as a whole.
    Raises CheckpointError if the release has no way to say what the config says.
    """
    released: dict[str, Tensor] = {}
    links = _links(config) if any(name.startswith("speech_lm.") for name in tensors) else []
    placed = {name for link in links for name in link.ours}
    lost = [name for name in tensors if name not in placed and not name.startswith("vision.")]
    if lost:
        raise CheckpointError(f"the released layout has no place for {some(lost)}; use --layout moshivis")
    for link in links:
        found = link.to_released([tensors[name] for name in link.ours])
        released.update(zip(link.released, found, strict=True))
    vision = {n.removeprefix("vision."): t for n, t in tensors.items() if n.startswith("vision.")}
    return released | vision_names.to_released(vision)


def from_released(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Inverse of `to_released`; names and shapes are to be checked first, with `check_released`."""
    tensors = _without_copies(tensors, config)
    ours: dict[str, Tensor] = {}
    for link in _links(config) if any(name.startswith("llm.") for name in tensors) else []:
        found = link.to_ours([tensors[name] for name in link.released])
        ours.update(zip(link.ours, found, strict=True))
    vision = vision_names.from_released(tensors)
    return ours | {f"vision.{name}": tensor for name, tensor in vision.items()}


def check_released(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], config: ModelConfig, file: str
) -> None:
    """Compare names and shapes with what `to_released` gives for a model on the meta device.

    Other tensors are ignored, as the released code does, and named in a warning.
    Raises CheckpointError naming tensors that are missing or misshapen.
    """
    tensors = _without_copies(tensors, config)
    surplus = [name for name in tensors if name not in expected]
    if surplus:
        logger.warning("%s holds tensors that this model has no use for: %s", file, some(surplus))
    check_tensors({name: tensor for name, tensor in tensors.items() if name in expected}, expected, file)


# ---------------------------------------------------------------------------------------------------------------------


def _links(config: ModelConfig) -> list[Link]:
    links = _speech_lm_links(config.speech_lm)
    if config.adapters is not None:
        links += _adapter_links(config.adapters, config.speech_lm)
    return links


def _speech_lm_links(config: SpeechLMConfig) -> list[Link]:
    own, num_audio = config.own_codebooks, config.own_codebooks + config.user_codebooks
    ours, theirs = "speech_lm.embedding", "llm.transformer.layers"
    links = [
        _stacked(f"{ours}.text.weight", ["llm.text_emb.weight"]),
        _stacked(f"{ours}.audio.weight", [f"audio_emb.{j}.weight" for j in range(num_audio)]),
        _same("speech_lm.text_head.weight", "llm.text_linear.weight"),
        _norm("speech_lm.backbone.out_norm", "llm.out_norm"),
    ]
    for i in range(config.backbone.num_layers):
        ours = f"speech_lm.backbone.layers.{i}"
        links += [
            _same(f"{ours}.self_attn.in_proj.weight", f"{theirs}.{i}.self_attn.in_proj_weight"),
            _same(f"{ours}.self_attn.out_proj.weight", f"{theirs}.{i}.self_attn.out_proj.weight"),
            _same(f"{ours}.feed_forward.linear_in.weight", f"{theirs}.{i}.gating.linear_in.weight"),
            _same(f"{ours}.feed_forward.linear_out.weight", f"{theirs}.{i}.gating.linear_out.weight"),
            _norm(f"{ours}.norm1", f"{theirs}.{i}.norm1"),
            _norm(f"{ours}.norm2", f"{theirs}.{i}.norm2"),
        ]
    ours, theirs = "speech_lm.depth", "depformer.layers"
    inputs = own if config.depth.input_per_step else 1
    links += [
        _stacked(f"{ours}.input.weight", [f"depformer_in.{q}.weight" for q in range(inputs)]),
        _stacked(f"{ours}.text.weight", ["depformer_text_emb.weight"]),
        _stacked(f"{ours}.audio.weight", [f"depformer_emb.{q}.weight" for q in range(own - 1)])
        if own > 1
        else _empty(f"{ours}.audio.weight", (0, config.audio_card + 1, config.depth.dim)),
        _stacked(f"{ours}.heads.weight", [f"audio_linears.{q}.weight" for q in range(own)]),
    ]
    for i in range(config.depth.num_layers):
        ours = f"speech_lm.depth.layers.{i}"
        links += [
            _blocks(f"{ours}.in_proj.weight", f"{theirs}.{i}.self_attn.in_proj_weight", own),
            _blocks(f"{ours}.out_proj.weight", f"{theirs}.{i}.self_attn.out_proj.weight", own),
            _norm(f"{ours}.norm1", f"{theirs}.{i}.norm1"),
            _norm(f"{ours}.norm2", f"{theirs}.{i}.norm2"),
        ]
        for linear in ("linear_in", "linear_out"):
            steps = [f"{theirs}.{i}.gating.{q}.{linear}.weight" for q in range(own)]
            links.append(_stacked(f"{ours}.{linear}.weight", steps))
    return links


def _adapter_links(config: AdapterConfig, lm: SpeechLMConfig) -> list[Link]:
    if config.sharing == "kv":
        raise CheckpointError('the released format cannot hold adapters with sharing = "kv"')
    blocks = _adapted_blocks(config, lm)
    links: list[Link] = []
    for index, block in enumerate(blocks):
        theirs = f"llm.transformer.layers.{block}"
        links.append(_norm(f"adapters.norm.{index}", f"{theirs}.norm_cross"))
        if index == 0 or config.sharing == "none":
            fused = (config.source_dim or lm.backbone.dim) == lm.backbone.dim
            attention = f"{theirs}.cross_attention.mha"
            links += _attention_links(index, attention, lm.backbone.dim if fused else None)
    for index in range({"layer": len(blocks), "shared": 1, "none": 0}[config.gate]):
        owners = blocks if config.gate == "shared" else blocks[index : index + 1]
        gates = [f"llm.transformer.layers.{block}.cross_attention.gate" for block in owners]
        if config.gate_input == "constant":
            links.append(_repeated(f"adapters.gate.{index}.alpha", [f"{gate}.alpha" for gate in gates], (1, 1, 1)))
            continue
        for ours, theirs in (("linear_in", "alpha.0"), ("linear_out", "alpha.2")):
            links.append(
                _repeated(f"adapters.gate.{index}.{ours}.weight", [f"{gate}.{theirs}.weight" for gate in gates])
            )
    if config.sharing == "qkv" and config.gate == "shared":
        scales = tuple(f"llm.transformer.layers.{block}.cross_attention.per_layer_alpha" for block in blocks)
        links.append(
            Link(
                ("adapters.scale",),
                scales,
                lambda found: [torch.cat([scale.flatten() for scale in found])],
                lambda found: list(found[0].reshape(-1, 1, 1, 1)),
            )
        )
    return links


def _attention_links(index: int, theirs: str, fused_dim: int | None) -> list[Link]:
    query, key_value = f"adapters.query.{index}.weight", f"adapters.key_value.{index}.weight"
    out = _same(f"adapters.out.{index}.weight", f"{theirs}.out_proj.weight")
    if fused_dim is None:
        return [
            _same(query, f"{theirs}.in_proj_weight_q"),
            _same(key_value, f"{theirs}.in_proj_weight_kv"),
            out,
        ]
    rows = (fused_dim, 2 * fused_dim)
    fused = Link(
        (query, key_value),
        (f"{theirs}.in_proj_weight",),
        lambda found: found[0].split(rows),
        lambda found: [torch.cat(list(found))],
    )
    return [fused, out]


def _adapted_blocks(config: AdapterConfig, lm: SpeechLMConfig) -> tuple[int, ...]:
    return tuple(range(lm.backbone.num_layers)) if config.layers is None else config.layers


def _without_copies(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Drop copies of the shared cross-attention, keeping one under the first adapted block's names.

    Also drops the projection of extra image tokens, which a file may hold and nothing reads.
    Raises CheckpointError if copies differ.
    """
    kept = {
        n: t for n, t in tensors.items() if not n.startswith(("image_prefix.proj_extra.", "image_prefix.norm_extra."))
    }
    if config.adapters is None or config.adapters.sharing == "none":
        return kept
    blocks = _adapted_blocks(config.adapters, config.speech_lm)
    for block in blocks[1:]:
        prefix = f"llm.transformer.layers.{block}.cross_attention.mha."
        for name in [name for name in kept if name.startswith(prefix)]:
            first = f"llm.transformer.layers.{blocks[0]}.cross_attention.mha.{name.removeprefix(prefix)}"
            copy = kept.pop(name)
            _check_equal(first, kept.setdefault(first, copy), name, copy)
    return kept


def _check_equal(first: str, tensor: Tensor, name: str, copy: Tensor) -> None:
    if tensor.shape != copy.shape or not (tensor is copy or tensor.is_meta or torch.equal(tensor, copy)):
        raise CheckpointError(f"{name} should be a copy of {first}, as the layers share it, but differs from it")


# kinds of links ------------------------------------------------------------------------------------------------------


def _same(ours: str, released: str) -> Link:
    return Link((ours,), (released,), lambda found: found, lambda found: found)


def _norm(ours: str, released: str) -> Link:
    """A gain: [C], [1, 1, C] in the release."""
    gain = (f"{ours}.weight",), (f"{released}.alpha",)
    return Link(*gain, lambda found: [found[0].flatten()], lambda found: [found[0].view(1, 1, -1)])


def _stacked(ours: str, released: Sequence[str]) -> Link:
    """One of ours, of a tensor a codebook or stream."""
    return Link((ours,), tuple(released), lambda found: [torch.stack(list(found))], lambda found: found[0].unbind(0))


def _empty(ours: str, shape: tuple[int, ...]) -> Link:
    """One of ours without any numbers, which the release leaves out."""
    return Link((ours,), (), lambda found: [torch.empty(shape)], lambda found: [])


def _blocks(ours: str, released: str, count: int) -> Link:
    """Ours [K, out, in], theirs [K * out, in]."""
    return Link(
        (ours,),
        (released,),
        lambda found: [found[0].unflatten(0, (count, -1))],
        lambda found: [found[0].flatten(0, 1)],
    )


def _repeated(ours: str, released: Sequence[str], shape: tuple[int, ...] | None = None) -> Link:
    """One of ours, the same numbers under several released names."""

    def one(found: Sequence[Tensor]) -> list[Tensor]:
        for name, copy in zip(released, found, strict=True):
            _check_equal(released[0], found[0], name, copy)
        return [found[0] if shape is None else found[0].flatten()]

    def many(found: Sequence[Tensor]) -> list[Tensor]:
        return [found[0] if shape is None else found[0].view(shape)] * len(released)

    return Link((ours,), tuple(released), one, many)
