"""The parts of a model that a case has weights for, built from the case's own config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moshivis.adapters.gated_cross_attention import GatedCrossAttention
from moshivis.checkpoints.released import check_released, from_released, to_released
from moshivis.checkpoints.released_config import config_from_released
from moshivis.config import ModelConfig, VisionConfig
from moshivis.errors import CheckpointError
from moshivis.speech_lm.lm import SpeechLM
from moshivis.vision import released as vision_names
from moshivis.vision.projection import ImageProjection, Vision


class Parts(nn.Module):
    """Named as in `MoshiVis`, so that the released names map to them; any of them may be absent."""

    def __init__(self, config: ModelConfig, *, language: bool, vision: bool):
        super().__init__()
        self.config = config
        backbone = config.speech_lm.backbone
        self.speech_lm = SpeechLM(config.speech_lm) if language else None
        self.adapters: GatedCrossAttention | None = None
        if language and config.adapters is not None:
            self.adapters = GatedCrossAttention(config.adapters, backbone.dim, backbone.num_heads, backbone.num_layers)
        self.vision: Vision | None = None
        if vision:
            source_dim = None if config.adapters is None else config.adapters.source_dim
            self.vision = Vision(config.vision, source_dim or backbone.dim)


@dataclass(frozen=True)
class Built:
    """What a case's folder gives, ready to run."""

    parts: Parts
    extra: ImageProjection | None  # the released files may hold a second projection that nothing reads


def build(meta: Mapping[str, Any], weights: Mapping[str, Tensor], device: torch.device) -> Built:
    """In float32. Raises CheckpointError if the weights are not those of the config."""
    flat = dict(meta["config"])
    vision = _vision_config(meta.get("spec", {}).get("vision"))
    config = config_from_released(flat, vision)
    has_language = any(name.startswith("llm.") for name in weights)
    has_vision = any(name.startswith(vision_names.PREFIX) for name in weights)
    parts = Parts(config, language=has_language, vision=has_vision)
    expected = to_released(parts.state_dict(), config)
    check_released(weights, expected, config, f"{meta.get('case')}/weights.safetensors")
    parts.load_state_dict(from_released(weights, config))
    parts.eval().requires_grad_(False)
    return Built(parts.to(device), _extra(flat, config, weights, device))


def _vision_config(spec: Mapping[str, Any] | None) -> VisionConfig | None:
    """The small encoder that a case describes with the key names of `transformers`."""
    if spec is None:
        return None
    pixtral = spec["kind"] == "pixtral"
    if spec["kind"] not in ("siglip", "pixtral"):
        raise CheckpointError(f"unknown image encoder {spec['kind']!r}")
    return VisionConfig(
        encoder="pixtral" if pixtral else "siglip",
        image_size=spec["image_size"],
        patch_size=spec["patch_size"],
        hidden_size=spec["hidden_size"],
        num_layers=spec["num_hidden_layers"],
        num_heads=spec["num_attention_heads"],
        mlp_size=spec["intermediate_size"],
        norm_eps=spec.get("layer_norm_eps", 1e-5 if pixtral else 1e-6),
        rope_theta=spec.get("rope_theta", 10000.0),
        longest_edge=spec.get("longest_edge"),
    )


def _extra(
    flat: Mapping[str, Any], config: ModelConfig, weights: Mapping[str, Tensor], device: torch.device
) -> ImageProjection | None:
    if not flat.get("num_extra_tokens", -1) or "encoder_name" not in flat:
        return None
    own = {
        name.removeprefix("projection."): tensor
        for name, tensor in vision_names.from_released(weights, head="extra").items()
        if name.startswith("projection.")
    }
    if not own:
        return None
    width = config.speech_lm.backbone.dim
    extra = ImageProjection(config.vision.hidden_size, width, flat.get("norm_extra", "rms_norm"))
    extra.load_state_dict(own)
    return extra.eval().to(device)
