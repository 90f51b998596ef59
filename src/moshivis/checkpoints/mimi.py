"""Names of the released Mimi file <-> ours (reference facts, mimi.md section 5)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from moshivis.errors import CheckpointError

_TO_OURS = (
    (r"\bin_projs\.0\.weight$|\bself_attn\.in_proj_weight$", "self_attn.in_proj.weight"),
    (r"\bself_attn\.self_attn\.", "self_attn."),
    (r"\bout_projs\.0\.", "out_proj."),
    (r"^(downsample|upsample)\.(conv|convtr)\.\2\.\2\.", r"\1.\2."),
    (r"\.block\.(\d+)\.conv\.conv\.", r".block.model.\1.conv."),
    (r"(coder\.model\.\d+)\.(conv|convtr)\.\2\.", r"\1.\2."),
    (r"_transformer\.transformer\.layers\.", "_transformer.layers."),
    (r"\.linear([12])\.weight$", r".feed_forward.linear\1.weight"),
    (r"\.layer_scale_([12])\.scale$", r".layer_scale_\1"),
    (r"^quantizer\.rvq_first\.", "quantizer.semantic."),
    (r"^quantizer\.rvq_rest\.", "quantizer.acoustic."),
    (r"\.vq\.layers\.(\d+)\._codebook\._?", r".levels.\1."),
    # older names of the codebook's buffers
    (r"(\.levels\.\d+)\.inited$", r"\1.initialized"),
    (r"(\.levels\.\d+)\.cluster_size$", r"\1.cluster_usage"),
    (r"(\.levels\.\d+)\.(embed_avg|embed_sum)$", r"\1.embedding_sum"),
)
_TO_RELEASED = (
    (r"\.self_attn\.in_proj\.weight$", ".self_attn.in_proj_weight"),
    (r"^(downsample|upsample)\.(conv|convtr)\.", r"\1.\2.\2.\2."),
    (r"\.block\.model\.(\d+)\.conv\.", r".block.\1.conv.conv."),
    (r"(coder\.model\.\d+)\.(conv|convtr)\.", r"\1.\2.\2."),
    (r"_transformer\.layers\.", "_transformer.transformer.layers."),
    (r"\.feed_forward\.linear([12])\.weight$", r".linear\1.weight"),
    (r"\.layer_scale_([12])$", r".layer_scale_\1.scale"),
    (r"^quantizer\.semantic\.", "quantizer.rvq_first."),
    (r"^quantizer\.acoustic\.", "quantizer.rvq_rest."),
    (r"\.levels\.(\d+)\.initialized$", r".vq.layers.\1._codebook._initialized"),
    (r"\.levels\.(\d+)\.", r".vq.layers.\1._codebook."),
)


def from_released(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `Mimi` from released names; the older aliases that the release accepts are accepted too.

    Raises CheckpointError if one of ours is there by two names.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours_name = _rename(name, _TO_OURS)
        if ours_name in ours:
            raise CheckpointError(f"the codec's {ours_name} is there by two names, {name} being one of them")
        ours[ours_name] = tensor
    return ours


def to_released(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released names from the state dict of a `Mimi` with the SEANet decoder."""
    return {_rename(name, _TO_RELEASED): tensor for name, tensor in tensors.items()}


def _rename(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name
