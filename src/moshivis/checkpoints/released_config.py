"""The flat keys of the released configuration -> our `ModelConfig` (reference facts, model.md section 1).

Several keys do not do what they say: `norm` and `activation` reach the depth transformer only, `causal` nothing. Here
they mean what they do.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from moshivis.config import (
    Activation,
    AdapterConfig,
    BackboneConfig,
    DepthConfig,
    ModelConfig,
    NormName,
    SpeechLMConfig,
    VisionConfig,
)
from moshivis.errors import CheckpointError

ENCODERS = {
    **{f"siglip_gemma2_{size}": VisionConfig(image_size=size) for size in (224, 448, 896)},
    "pixtral": VisionConfig(
        encoder="pixtral",
        image_size=1024,
        patch_size=16,
        hidden_size=1024,
        num_layers=24,
        num_heads=16,
        mlp_size=4096,
        norm_eps=1e-5,
    ),
}

# What the release's code assumes where a key is absent.
DEFAULTS: dict[str, Any] = {
    "dim": 4096,
    "text_card": 32000,
    "padding_token_id": 3,
    "n_q": 16,
    "dep_q": 8,
    "audio_card": 2048,
    "num_heads": 32,
    "num_layers": 32,
    "hidden_scale": 4.125,
    "context": 3000,
    "max_period": 10000,
    "gating": True,
    "activation": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer": True,
    "depformer_dim": 1024,
    "depformer_dim_feedforward": 4224,
    "depformer_num_heads": 16,
    "depformer_num_layers": 6,
    "depformer_multi_linear": True,
    "depformer_context": 8,
    "depformer_gating": None,
    "depformer_activation": None,
    "depformer_pos_emb": "none",
    "depformer_weights_per_step": True,
    "delays": [0, *[0, 1, 1, 1, 1, 1, 1, 1] * 2],
    "num_extra_tokens": -1,
    "num_crossattended_tokens": 0,
    "align_img_and_speech_tokens_dim": True,
    "xa_dim": None,
    "xa_start": None,
    "xa_end": None,
    "xa_step": 1,
    "xa_layers": [],
    "xa_shared": True,
    "xa_gate_shared": False,
    "xa_gating": "tanh",
    "xa_conditional_gating": False,
    "encoder_name": "pixtral",
    "norm_xa": "rms_norm",
}


# What the release's own configuration says, beyond names of files.
RELEASED: dict[str, Any] = {
    "num_extra_tokens": 0,
    "num_crossattended_tokens": -1,
    "align_img_and_speech_tokens_dim": True,
    "encoder_name": "siglip_gemma2_448",
    "norm_extra": None,
    "norm_xa": "rms_norm",
    "xa_dim": None,
    "xa_start": "start",
    "xa_end": "end",
    "xa_layers": [],
    "xa_step": 1,
    "xa_shared": True,
    "xa_gate_shared": False,
    "xa_gating": "sigmoid",
    "xa_conditional_gating": True,
}


def config_from_released(flat: Mapping[str, Any], vision: VisionConfig | None = None) -> ModelConfig:
    """The model that a flat mapping of released keys describes; one level of nesting is flattened first.

    `vision` takes the place of the encoder that `encoder_name` names. Keys that do not change the model are ignored.
    Raises CheckpointError for a value that the model cannot have.
    """
    keys = DEFAULTS | flatten(flat)
    adapters = _adapters(keys, vision)
    norm = None if adapters is None else keys["norm_xa"]
    encoder = vision or _one_of(keys, "encoder_name", ENCODERS)
    return ModelConfig(
        name=str(keys.get("name", "moshika-vis")),
        speech_lm=_speech_lm(keys),
        adapters=adapters,
        vision=dataclasses.replace(encoder, projection_norm=None if norm is None else _norm(norm)),
    )


def flatten(nested: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration, and those one level below them."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat.update(value if isinstance(value, Mapping) else {key: value})
    return flat


def _speech_lm(keys: Mapping[str, Any]) -> SpeechLMConfig:
    if not keys["depformer"] or not keys["depformer_weights_per_step"]:
        raise CheckpointError("only models with a depth transformer with weights per step are supported")
    if (keys["depformer_gating"] or keys["gating"]) in ("none", False):
        raise CheckpointError("only depth transformers with a gated feed-forward are supported")
    if keys["depformer_pos_emb"] != "none":
        raise CheckpointError("only depth transformers without positions are supported")
    if keys["positional_embedding"] not in ("rope", "none"):
        raise CheckpointError(f"positional_embedding must be rope or none, not {keys['positional_embedding']!r}")
    if keys["padding_token_id"] is None:
        raise CheckpointError("the model needs a padding_token_id")
    activation = keys["depformer_activation"] or keys["activation"]
    if activation not in typing.get_args(Activation):
        raise CheckpointError(f"unknown activation {activation!r}")
    streams, delays = 1 + keys["n_q"], [int(delay) for delay in keys["delays"]]
    if not delays or len(delays) > streams or keys["dep_q"] > keys["n_q"]:
        raise CheckpointError(f"{streams} streams do not go with delays {delays} and dep_q {keys['dep_q']}")
    return SpeechLMConfig(
        text_card=keys["text_card"],
        audio_card=keys["audio_card"],
        own_codebooks=keys["dep_q"],
        user_codebooks=keys["n_q"] - keys["dep_q"],
        delays=(*delays, *[delays[-1]] * (streams - len(delays))),
        text_padding=keys["padding_token_id"],
        backbone=BackboneConfig(
            dim=keys["dim"],
            num_heads=keys["num_heads"],
            num_layers=keys["num_layers"],
            feed_forward=int(keys["hidden_scale"] * keys["dim"]),
            context=keys["context"],
            positions=keys["positional_embedding"],
            max_period=float(keys["max_period"]),
        ),
        depth=DepthConfig(
            dim=keys["depformer_dim"],
            num_heads=keys["depformer_num_heads"],
            num_layers=keys["depformer_num_layers"],
            feed_forward=keys["depformer_dim_feedforward"],
            context=keys["depformer_context"],
            norm=_norm(keys["norm"]),
            activation=typing.cast(Activation, activation),
            input_per_step=bool(keys["depformer_multi_linear"]),
        ),
    )


def _adapters(keys: Mapping[str, Any], vision: VisionConfig | None) -> AdapterConfig | None:
    if keys["num_crossattended_tokens"] == 0:
        return None
    if keys["num_crossattended_tokens"] != -1:
        raise CheckpointError("num_crossattended_tokens must be 0 (no adapters) or -1 (all image tokens)")
    if keys["xa_step"] != 1:
        raise CheckpointError("xa_step must be 1")
    source_dim = keys["xa_dim"]
    if source_dim is None and not keys["align_img_and_speech_tokens_dim"]:
        source_dim = (vision or _one_of(keys, "encoder_name", ENCODERS)).hidden_size
    gating = keys["xa_gating"]
    if gating not in ("sigmoid", "tanh", "none", None):
        raise CheckpointError(f"xa_gating must be sigmoid, tanh or none, not {gating!r}")
    has_gate = gating in ("sigmoid", "tanh")
    start, end = _scope(keys["xa_start"], "xa_start", "start"), _scope(keys["xa_end"], "xa_end", "end")
    return AdapterConfig(
        layers=tuple(sorted(keys["xa_layers"])) if keys["xa_layers"] else None,
        sharing="qkv" if keys["xa_shared"] else "none",
        gate=("shared" if keys["xa_gate_shared"] else "layer") if has_gate else "none",
        gate_input="conditional" if keys["xa_conditional_gating"] else "constant",
        gate_activation="tanh" if gating == "tanh" else "sigmoid",
        source_dim=source_dim,
        start=start or None,
        end=end,
        stream_keys="own" if keys["xa_shared"] else "first",
    )


def _scope(value: Any, key: str, always: str) -> int | None:
    if value is None or value == always:
        return None
    try:
        return int(value)
    except ValueError:
        raise CheckpointError(f"{key} must be {always!r} or a number of steps, not {value!r}") from None


def _norm(name: Any) -> NormName:
    if name not in typing.get_args(NormName):
        raise CheckpointError(f"unknown norm {name!r}")
    return typing.cast(NormName, name)


def _one_of(keys: Mapping[str, Any], key: str, table: Mapping[str, VisionConfig]) -> VisionConfig:
    if not isinstance(keys[key], str) or keys[key] not in table:
        raise CheckpointError(f"{key} must be one of {', '.join(table)}, not {keys[key]!r}")
    return table[keys[key]]
