"""Names of the released Mimi file <-> ours (reference facts, mimi.md section 5)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# (pattern of the released name, our replacement, pattern of our name, released replacement)
_RULES: tuple[tuple[str, str, str, str], ...] = (
    (r"^(downsample|upsample)\.(conv|convtr)\.\2\.\2\.", r"\1.\2.", r"^(downsample|upsample)\.(conv|convtr)\.", r"\1.\2.\2.\2."),
    (r"\.block\.(\d+)\.conv\.conv\.", r".block.model.\1.conv.", r"\.block\.model\.(\d+)\.conv\.", r".block.\1.conv.conv."),
    (r"(coder\.model\.\d+)\.(conv|convtr)\.\2\.", r"\1.\2.", r"(coder\.model\.\d+)\.(conv|convtr)\.", r"\1.\2.\2."),
    (r"_transformer\.transformer\.layers\.", "_transformer.layers.", r"_transformer\.layers\.", "_transformer.transformer.layers."),
    (r"\.self_attn\.in_proj_weight$", ".self_attn.in_proj.weight", r"\.self_attn\.in_proj\.weight$", ".self_attn.in_proj_weight"),
    (r"\.linear([12])\.weight$", r".feed_forward.linear\1.weight", r"\.feed_forward\.linear([12])\.weight$", r".linear\1.weight"),
    (r"\.layer_scale_([12])\.scale$", r".layer_scale_\1", r"\.layer_scale_([12])$", r".layer_scale_\1.scale"),
    (r"^quantizer\.rvq_first\.", "quantizer.semantic.", r"^quantizer\.semantic\.", "quantizer.rvq_first."),
    (r"^quantizer\.rvq_rest\.", "quantizer.acoustic.", r"^quantizer\.acoustic\.", "quantizer.rvq_rest."),
    (r"\.vq\.layers\.(\d+)\._codebook\._?", r".levels.\1.", r"\.levels\.(\d+)\.(?=initialized)", r".vq.layers.\1._codebook._"),
    (r"(?!)", "", r"\.levels\.(\d+)\.", r".vq.layers.\1._codebook."),
)  # fmt: skip

_LEGACY = {"inited": "initialized", "cluster_size": "cluster_usage", "embed_avg": "embedding_sum", "embed_sum": "embedding_sum"}  # fmt: skip
_ATTENTION_ALIASES = (
    ("in_projs.0.weight", "in_proj_weight"),
    ("self_attn.in_proj.weight", "self_attn.in_proj_weight"),
    ("out_projs.0.", "out_proj."),
)


def from_released(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `Mimi` from released names; the older aliases that the release accepts are accepted too."""
    return {_to_ours(name): tensor for name, tensor in tensors.items()}


def to_released(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released names from the state dict of a `Mimi` with the SEANet decoder."""
    return {_to_released(name): tensor for name, tensor in tensors.items()}


def _to_ours(name: str) -> str:
    for alias, current in _ATTENTION_ALIASES:
        name = name.replace(alias, current)
    for pattern, replacement, _, _ in _RULES:
        name = re.sub(pattern, replacement, name)
    head, _, last = name.rpartition(".")
    return f"{head}.{_LEGACY.get(last, last)}" if ".levels." in name else name


def _to_released(name: str) -> str:
    for _, _, pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    return name
