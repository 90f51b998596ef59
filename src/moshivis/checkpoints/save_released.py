"""Writing the released layout: model.safetensors, Mimi's file, the tokenizer, and a flat config.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moshivis.checkpoints import mimi
from moshivis.checkpoints.folder import SAMPLING, TOKENIZER
from moshivis.checkpoints.released import to_released
from moshivis.checkpoints.released_config import ENCODERS, RELEASED, config_from_released
from moshivis.checkpoints.tensors import write_tensors
from moshivis.config import AdapterConfig, CodecConfig, ModelConfig, VisionConfig, to_dict
from moshivis.errors import CheckpointError
from moshivis.files import atomic_directory
from moshivis.model import MoshiVis

WEIGHTS, CODEC = "model.safetensors", "mimi.safetensors"
RELEASED_CODEC = CodecConfig()


def save_released(
    folder: str | Path, model: MoshiVis, tokenizer: bytes | None, sampling: Mapping[str, Any] | None = None
) -> None:
    """Write the whole folder or nothing.

    Raises CheckpointError if the release has no way to say what the model is, FileExistsError if there is something
    at `folder` already.
    """
    if tokenizer is None:
        raise CheckpointError("the released layout needs a tokenizer, which this model has not; use --layout moshivis")
    flat = config_to_released(model.config)
    _refuse_another_codec(model.config.codec, RELEASED_CODEC)
    rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("codec.")}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in to_released(rest, model.config).items()}
    # Ours may store the codec in half precision; the release has it in float32.
    codec_weights = {n: x.detach().cpu().float() for n, x in mimi.to_released(model.codec.state_dict()).items()}
    with atomic_directory(folder) as temporary:
        write_tensors(_apart(weights), temporary / WEIGHTS)
        write_tensors(codec_weights, temporary / CODEC)
        (temporary / TOKENIZER).write_bytes(tokenizer)
        if sampling is not None:  # a file of ours, which other programs do not read
            (temporary / SAMPLING).write_text(json.dumps(sampling, indent=2) + "\n", encoding="utf-8")
        (temporary / "config.json").write_text(json.dumps(flat, indent=2) + "\n", encoding="utf-8")


def config_to_released(config: ModelConfig) -> dict[str, Any]:
    """The flat keys that `config_from_released` reads back as `config`.

    They do not describe its codec, nor those fields of its adapters that change nothing about what is computed.

    Raises CheckpointError if there are none.
    """
    lm, depth, backbone, adapters = config.speech_lm, config.speech_lm.depth, config.speech_lm.backbone, config.adapters
    encoder = dataclasses.replace(config.vision, projection_norm="rms_norm")
    encoder_name = next((name for name, known in ENCODERS.items() if known == encoder), None)
    if adapters is None:  # nothing sees
        encoder_name = RELEASED["encoder_name"]
    elif encoder_name is None:
        raise CheckpointError(f"the released layout knows no image encoder but {', '.join(ENCODERS)}")
    flat: dict[str, Any] = {
        "name": config.name,
        "dim": backbone.dim,
        "num_heads": backbone.num_heads,
        "num_layers": backbone.num_layers,
        "hidden_scale": (backbone.feed_forward + 0.5) / backbone.dim,  # rounded down where it is read
        "context": backbone.context,
        "max_period": backbone.max_period,
        "positional_embedding": backbone.positions,
        "text_card": lm.text_card,
        "padding_token_id": lm.text_padding,
        "n_q": lm.own_codebooks + lm.user_codebooks,
        "dep_q": lm.own_codebooks,
        "audio_card": lm.audio_card,
        "delays": list(lm.delays),
        "norm": depth.norm,
        "activation": depth.activation,
        "depformer_dim": depth.dim,
        "depformer_num_heads": depth.num_heads,
        "depformer_num_layers": depth.num_layers,
        "depformer_dim_feedforward": depth.feed_forward,
        "depformer_context": depth.context,
        "depformer_multi_linear": depth.input_per_step,
        "encoder_name": encoder_name,
        "norm_xa": config.vision.projection_norm,
        "num_extra_tokens": 0,  # else the release's programs look for weights that no model of ours has
        "num_crossattended_tokens": 0 if adapters is None else -1,
    }
    if adapters is not None:
        if _keys_matter(adapters, backbone.num_layers) and adapters.stream_keys == "own":
            raise CheckpointError(
                "the released layout has no place for adapters that share nothing and use every block's keys and "
                "values, as those trained anew do: in it all blocks use the first one's; use --layout moshivis"
            )
        flat |= {
            "xa_layers": [] if adapters.layers is None else list(adapters.layers),
            "xa_shared": adapters.sharing == "qkv",
            "xa_gate_shared": adapters.gate == "shared",
            "xa_gating": "none" if adapters.gate == "none" else adapters.gate_activation,
            "xa_conditional_gating": adapters.gate_input == "conditional",
            "xa_dim": adapters.source_dim,
            "xa_start": "start" if adapters.start is None else adapters.start,
            "xa_end": "end" if adapters.end is None else adapters.end,
        }
    read = dataclasses.replace(config_from_released(flat), codec=config.codec)
    one, other = _as_computed(read), _as_computed(config)
    names = [field.name for field in dataclasses.fields(config)]
    differing = [name for name in names if getattr(one, name) != getattr(other, name)]
    if differing:
        raise CheckpointError(
            f"the released layout cannot describe this model's {', '.join(differing)}; use --layout moshivis"
        )
    return flat


def _refuse_another_codec(codec: CodecConfig, known: CodecConfig) -> None:
    """Raise CheckpointError unless `codec` is read back as what it is: a released file says nothing about it."""
    if codec.decoder != known.decoder:
        raise CheckpointError("the released layout has no place for a codec with an ISTFT decoder")
    transformer = dataclasses.replace(codec.transformer, layer_scale=known.transformer.layer_scale)  # where it began
    # As many codebooks as the speech LM has.
    read = dataclasses.replace(codec, transformer=transformer, istft=known.istft, num_codebooks=known.num_codebooks)
    if read != known:
        one, other = _flat(to_dict(read)), _flat(to_dict(known))
        name = next(name for name in one if one[name] != other.get(name))
        raise CheckpointError(
            f"the released layout has no place for a codec whose {name} is {one[name]}, not {other.get(name)}; "
            "use --layout moshivis"
        )


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With a copy of each that is there by another name, too, as shared gates are: safetensors stores none twice."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        apart[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return apart


def _as_computed(config: ModelConfig) -> ModelConfig:
    """The config with those of its fields at their defaults that change nothing about what is computed."""
    adapters = config.adapters
    if adapters is None:
        return dataclasses.replace(config, vision=VisionConfig())
    idle: dict[str, Any] = {"gate_scale": AdapterConfig.gate_scale, "start": adapters.start or None}
    if adapters.gate == "none":
        idle |= {"gate_input": AdapterConfig.gate_input, "gate_activation": AdapterConfig.gate_activation}
    if not _keys_matter(adapters, config.speech_lm.backbone.num_layers):
        idle["stream_keys"] = AdapterConfig.stream_keys
    return dataclasses.replace(config, adapters=dataclasses.replace(adapters, **idle))


def _keys_matter(adapters: AdapterConfig, blocks: int) -> bool:
    """Whether `stream_keys` changes anything: there is more than one pair of keys and values."""
    return adapters.sharing == "none" and (blocks if adapters.layers is None else len(adapters.layers)) > 1
