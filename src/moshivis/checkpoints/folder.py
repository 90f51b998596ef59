"""Our own checkpoint: a folder with config.json, weights in shards, the tokenizer and a model card.

| file | holds |
| config.json | `{"format": "moshivis", "version": 1, "model": {...}}` |
| model-00001-of-0000N.safetensors | the state dict of `MoshiVis` |
| model.safetensors.index.json | which tensor is in which shard |
| tokenizer.model | SentencePiece, if the model has one |
| sampling.json | how to sample from the model, if it is not as released: some fields of `inference.sampling.Sampling` |
| README.md | the model card |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moshivis.checkpoints.tensors import check_tensors, read_shapes, read_tensors, write_tensors
from moshivis.config import ModelConfig, from_dict, to_dict
from moshivis.errors import CheckpointError
from moshivis.files import atomic_directory
from moshivis.model import MoshiVis

FORMAT, VERSION = "moshivis", 1
INDEX = "model.safetensors.index.json"
TOKENIZER, SAMPLING = "tokenizer.model", "sampling.json"
SHARD_BYTES = 4 * 2**30
LoadDtype = torch.dtype | Literal["stored"] | None


def save_folder(
    folder: str | Path,
    model: MoshiVis,
    tokenizer: bytes | None,
    card: str,
    *,
    sampling: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
) -> None:
    """Write the whole checkpoint or nothing. `dtype` converts parameters, not buffers; None keeps theirs. With
    `replace` it takes the place of an older folder when it is complete.

    Raises FileExistsError if there is something else at `folder` already, OSError if it cannot be written.
    """
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {
        name: (tensor.to(dtype) if dtype is not None and name in parameters else tensor).detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    shards = _shards(tensors, shard_bytes)
    described = {"format": FORMAT, "version": VERSION, "model": to_dict(model.config)}
    with atomic_directory(folder, replace=replace) as temporary:
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_tensors({name: tensors[name] for name in names}, temporary / file, {"format": "pt"})
            weight_map.update(dict.fromkeys(names, file))
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(temporary / "config.json", described)
        if tokenizer is not None:
            (temporary / TOKENIZER).write_bytes(tokenizer)
        if sampling is not None:
            _write_json(temporary / SAMPLING, sampling)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def read_sampling(folder: Path) -> dict[str, Any] | None:
    """What a model's folder, ours or a released one, says about sampling. Raises CheckpointError if it is damaged."""
    return read_json(folder / SAMPLING) if (folder / SAMPLING).is_file() else None


def is_our_folder(folder: Path) -> bool:
    """Whether config.json is there and says that the folder is one of ours."""
    return (folder / "config.json").is_file() and read_json(folder / "config.json").get("format") == FORMAT


def load_folder(folder: Path, device: torch.device | str = "cpu", dtype: LoadDtype = None) -> MoshiVis:
    """The model that `save_folder` wrote. `dtype` None: that of the text head; the codec is float32 either way.
    "stored" leaves every tensor as it is in the files: to be written again, not to be run.

    Raises CheckpointError if anything is missing, surplus, misshapen or damaged; nothing is half-loaded.
    """
    model = empty_model(read_config(folder))
    files = weight_files(folder)
    expected = model.state_dict()
    check_tensors(read_shapes(files), expected, str(folder))
    fill_model(model, dict(read_tensors(files, device)), dtype)
    return model.to(device)


def empty_model(config: ModelConfig) -> MoshiVis:
    """The model on the meta device, without memory for weights. Raises CheckpointError for an impossible config."""
    try:
        with torch.device("meta"):
            return MoshiVis(config).eval()
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise CheckpointError(f"no model can be built from this config: {error}") from error


def fill_model(model: MoshiVis, tensors: Mapping[str, Tensor], dtype: LoadDtype) -> None:
    """Give an empty model its weights, checked before; `dtype` as in `load_folder`."""
    parameters = {name for name, _ in model.named_parameters()}
    one = tensors["speech_lm.text_head.weight"].dtype if dtype is None else dtype

    def convert(name: str, tensor: Tensor) -> Tensor:
        if isinstance(one, str):
            return tensor
        if name.startswith("codec.") and tensor.is_floating_point():
            return tensor.float()
        return tensor.to(one) if name in parameters else tensor

    converted = {name: convert(name, tensor) for name, tensor in tensors.items()}
    model.requires_grad_(False)
    model.load_state_dict(converted, assign=True)


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError if the file is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return content


def read_config(folder: Path) -> ModelConfig:
    """The config of one of our folders. Raises CheckpointError if it describes no model."""
    described = read_json(folder / "config.json")
    if described.get("version") != VERSION:
        raise CheckpointError(
            f"{folder} is of version {described.get('version')!r} of the format, this program reads {VERSION}"
        )
    try:
        return from_dict(ModelConfig, described["model"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} describes no model: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The shards that hold the weights. Raises CheckpointError if the index is missing or damaged."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} holds no weight_map")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX} names a file outside its folder: {name}")
    return [folder / name for name in names]


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names in their order, cut so that no shard exceeds `limit` bytes unless a single tensor does."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    return shards


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
