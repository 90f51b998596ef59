"""Writing the released layout: model.safetensors, Mimi's file, the tokenizer, and a flat config.json."""

from __future__ import annotations

import dataclasses
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moshivis.checkpoints import mimi
from moshivis.checkpoints.folder import SAMPLING, TOKENIZER
from moshivis.checkpoints.released import to_released
from moshivis.checkpoints.released_config import ENCODERS, config_from_released
from moshivis.checkpoints.tensors import write_tensors
from moshivis.config import AdapterConfig, CodecConfig, ModelConfig
from moshivis.errors import CheckpointError
from moshivis.files import atomic_directory
from moshivis.model import MoshiVis

WEIGHTS, CODEC = "model.safetensors", "mimi.safetensors"


def save_released(
    folder: str | Path, model: MoshiVis, tokenizer: bytes | None, sampling: Mapping[str, Any] | None = None
) -> None:
    """Write the whole folder or nothing.

    Raises CheckpointError if the release has no way to say what the model is, FileExistsError if there is something
    at `folder` already.
    """
    flat = config_to_released(model.config)
    codec_config = model.config.codec
    if codec_config.decoder != "seanet":
        raise CheckpointError("the released layout has no place for a codec with an ISTFT decoder")
    known = CodecConfig()
    for name in ("transformer.context", "transformer.num_heads", "transformer.max_period", "latent_norm"):
        get = operator.attrgetter(name)  # no shape of a tensor tells these
        if get(codec_config) != get(known):
            raise CheckpointError(
                f"the released layout has no place for a codec whose {name} is {get(codec_config)}, not {get(known)}"
            )
    rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("codec.")}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in to_released(rest, model.config).items()}
    # Ours may store the codec in half precision; the release has it in float32.
    codec = {n: tensor.detach().cpu().float() for n, tensor in mimi.to_released(model.codec.state_dict()).items()}
    with atomic_directory(folder) as temporary:
        # Cloned: a shared projection appears under many names, and safetensors stores no tensor twice by reference.
        write_tensors({name: tensor.clone() for name, tensor in weights.items()}, temporary / WEIGHTS)
        write_tensors(codec, temporary / CODEC)
        if tokenizer is not None:
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
    if encoder_name is None:
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


def _as_computed(config: ModelConfig) -> ModelConfig:
    """The config with those fields of its adapters at their defaults that change nothing about what is computed."""
    adapters = config.adapters
    if adapters is None:
        return config
    idle: dict[str, Any] = {"gate_scale": AdapterConfig.gate_scale, "start": adapters.start or None}
    if adapters.gate == "none":
        idle |= {"gate_input": AdapterConfig.gate_input, "gate_activation": AdapterConfig.gate_activation}
    if not _keys_matter(adapters, config.speech_lm.backbone.num_layers):
        idle["stream_keys"] = AdapterConfig.stream_keys
    return dataclasses.replace(config, adapters=dataclasses.replace(adapters, **idle))


def _keys_matter(adapters: AdapterConfig, blocks: int) -> bool:
    """Whether `stream_keys` changes anything: there is more than one pair of keys and values."""
    return adapters.sharing == "none" and (blocks if adapters.layers is None else len(adapters.layers)) > 1
