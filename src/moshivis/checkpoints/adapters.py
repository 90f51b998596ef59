"""Adapters alone: one safetensors file with what was trained on top of a frozen base, and nothing else.

Names are those of `MoshiVis`: adapters.*, vision.projection.*, and, from LoRA, speech_lm.backbone.*.lora_{down,up}.
The metadata holds their config and the fingerprint of the base that they were trained on. 206 M parameters take
412 MB in bfloat16 at the full size.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from moshivis.adapters.gated_cross_attention import GatedCrossAttention
from moshivis.checkpoints.fingerprint import base_fingerprint
from moshivis.checkpoints.folder import empty_model
from moshivis.checkpoints.tensors import check_tensors, write_tensors
from moshivis.config import AdapterConfig, ModelConfig, NormName, from_dict, to_dict
from moshivis.errors import CheckpointError
from moshivis.files import atomic_write
from moshivis.model import TRAINED, MoshiVis
from moshivis.vision.projection import ImageProjection

FORMAT, VERSION = "moshivis-adapters", "1"
LORA_DOWN, LORA_UP = ".lora_down", ".lora_up"


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """What such a file holds."""

    config: AdapterConfig
    projection_norm: NormName | None
    base: str  # fingerprint
    lora_scale: float  # of the low-rank updates, if there are any
    tensors: Mapping[str, Tensor]


def save_adapters(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    base: str,
    lora_scale: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write trained tensors, by the names of the model's parameters, atomically; `base` is its `base_fingerprint`.

    Raises CheckpointError if the model has no adapters, OSError if the file cannot be written.
    """
    if config.adapters is None:
        raise CheckpointError(f"the model {config.name} has no adapters to save")
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "adapters": json.dumps(to_dict(config.adapters)),
        "projection_norm": json.dumps(config.vision.projection_norm),
        "base": base,
        "lora_scale": json.dumps(lora_scale),
    }
    with atomic_write(path) as temporary:
        stored = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
        write_tensors(stored, temporary, metadata)


def require_adapters(path: str | os.PathLike[str]) -> Path:
    """Raises CheckpointError if there is no such file."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; give the adapters.safetensors of a training run")
    return path


def read_adapters(path: str | Path) -> AdapterFile:
    """Raises CheckpointError if the file is missing, damaged, or something else."""
    path = require_adapters(path)
    try:
        with safe_open(path, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or is no safetensors file: {error}") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise CheckpointError(f"{path} holds no adapters of version {VERSION} of the format; is it a whole model?")
    try:
        norm, scale = json.loads(metadata["projection_norm"]), float(json.loads(metadata["lora_scale"]))
        if norm is not None and norm not in typing.get_args(NormName):
            raise ValueError(f"unknown norm {norm!r}")
        if not math.isfinite(scale):
            raise ValueError(f"a lora_scale of {scale}")
        return AdapterFile(
            config=from_dict(AdapterConfig, json.loads(metadata["adapters"])),
            projection_norm=norm,
            base=metadata["base"],
            lora_scale=scale,
            tensors=tensors,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe its adapters: {error}") from error


def load_adapters(path: str | Path, model: MoshiVis) -> None:
    """Put the adapters of a file in place of the model's own; low-rank updates are added to the weights.

    Raises CheckpointError as `read_adapters` does, and if the file was trained on another base; the model is then as
    it was.
    """
    file = read_adapters(path)
    if model.vision is None:
        raise CheckpointError(f"the model {model.config.name} has no image encoder, {path} cannot stand on it")
    in_float16 = model.speech_lm.text_head.weight.dtype == torch.float16
    if file.base != base_fingerprint(model):
        raise CheckpointError(
            f"{path} was trained on another base than {model.config.name}: its speech LM or image encoder differ; "
            "load it on top of the model that the recipe names as base"
            + (". In float16 a bfloat16 base is another one, as some of it is rounded away" if in_float16 else "")
        )
    weight = model.speech_lm.text_head.weight
    low_rank = {name: tensor for name, tensor in file.tensors.items() if name.endswith((LORA_DOWN, LORA_UP))}
    _check(path, model, file, low_rank)
    replace_adapters(model, file.config, file.projection_norm, "meta")
    placed = {
        name: tensor.to(weight.device, weight.dtype) for name, tensor in file.tensors.items() if name not in low_rank
    }
    model.load_state_dict(placed, strict=False, assign=True)
    model.requires_grad_(False).eval()
    for name in sorted(low_rank):
        if name.endswith(LORA_DOWN):
            _merge(model, name, low_rank, file.lora_scale)


def replace_adapters(
    model: MoshiVis, config: AdapterConfig, projection_norm: NormName | None, device: torch.device | str
) -> None:
    """Fresh adapters and a fresh projection on `device`, in float32, in place of the model's."""
    assert model.vision is not None
    backbone, encoder = model.config.speech_lm.backbone, model.config.vision
    with torch.device(device):
        adapters = GatedCrossAttention(config, backbone.dim, backbone.num_heads, backbone.num_layers)
        projection = ImageProjection(encoder.hidden_size, config.source_dim or backbone.dim, projection_norm)
    model.adapters, model.vision.projection = adapters, projection
    model.config = _with(model.config, config, projection_norm)


def _with(config: ModelConfig, adapters: AdapterConfig, projection_norm: NormName | None) -> ModelConfig:
    vision = dataclasses.replace(config.vision, projection_norm=projection_norm)
    return dataclasses.replace(config, adapters=adapters, vision=vision)


def _check(path: str | Path, model: MoshiVis, file: AdapterFile, low_rank: Mapping[str, Tensor]) -> None:
    """All tensors that the config asks for, and no others, before anything is touched."""
    shapes = empty_model(_with(model.config, file.config, file.projection_norm)).state_dict()
    expected = {name: tensor for name, tensor in shapes.items() if name.startswith(TRAINED)}
    for stem in sorted({name.rpartition(".")[0] for name in low_rank}):
        matrix, down, up = shapes.get(f"{stem}.weight"), low_rank.get(stem + LORA_DOWN), low_rank.get(stem + LORA_UP)
        if matrix is not None and all(part is None or part.ndim == 2 for part in (matrix, down, up)):
            rank = down.shape[0] if down is not None else low_rank[stem + LORA_UP].shape[1]
            expected[f"{stem}{LORA_DOWN}"] = torch.empty((rank, matrix.shape[1]), device="meta")
            expected[f"{stem}{LORA_UP}"] = torch.empty((matrix.shape[0], rank), device="meta")
    check_tensors(file.tensors, expected, str(path))


@torch.no_grad()
def _merge(model: MoshiVis, down: str, tensors: Mapping[str, Tensor], scale: float) -> None:
    stem = down.removesuffix(LORA_DOWN)
    layer = model.get_submodule(stem)
    assert isinstance(layer, nn.Linear)
    weight = layer.weight
    update = tensors[stem + LORA_UP].float() @ tensors[down].float() * scale
    weight.copy_((weight.float() + update.to(weight.device)).to(weight.dtype))
