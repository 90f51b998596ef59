"""Loading a model from wherever it is: our folder, a released folder, or, only when asked, a Hub repository."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from moshivis.checkpoints import mimi
from moshivis.checkpoints.folder import (
    TOKENIZER,
    LoadDtype,
    empty_model,
    fill_model,
    is_our_folder,
    load_folder,
    read_config,
    read_json,
    read_sampling,
    weight_files,
)
from moshivis.checkpoints.released import check_released, from_released, to_released
from moshivis.checkpoints.released_config import DEFAULTS, RELEASED, config_from_released, flatten
from moshivis.checkpoints.tensors import check_tensors, read_shapes, read_tensors
from moshivis.config import CodecConfig, ModelConfig, from_dict, to_dict
from moshivis.errors import CheckpointError, InputError
from moshivis.model import MoshiVis
from moshivis.speech_lm.tokenizer import TextTokenizer

HUB = "hf://"
_DESCRIBING = ("*.json", "*.yaml", "*.yml", "README.md")
_FETCHED = (*_DESCRIBING, "*.safetensors", "*.model")  # no pickle among them
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
RELEASED_WEIGHTS = "model.safetensors"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LARGE = 1_000_000_000  # parameters; larger models keep their stored dtype on a CPU too
# Tensors that the release's files for other programs hold, and PyTorch's do not.
_OTHER_PROGRAMS = {"audio_embs.0.weight": "MLX", "emb.0.weight": "candle (Rust)"}


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to run, and what else its folder holds."""

    model: MoshiVis
    tokenizer: TextTokenizer | None
    sampling: Mapping[str, Any] | None = None  # content of sampling.json, which only `inference` understands


def load_model(
    source: str | Path,
    device: torch.device | str = "cpu",
    dtype: LoadDtype = None,
    *,
    allow_download: bool = False,
) -> Checkpoint:
    """Load a folder, or the Hub repository `hf://owner/name`; with `allow_download` also `owner/name`.

    The codec is float32; `dtype` is that of all else. None takes float32 on a CPU and the stored dtype elsewhere and
    for models beyond a billion parameters. "stored" is as in `load_folder`.
    Raises CheckpointError if there is no such model or anything in it is missing, misshapen or damaged, or, in our own
    format, surplus.
    """
    folder = find_folder(source, allow_download=allow_download)
    if is_our_folder(folder):
        model = load_folder(folder, device, _dtype_for(folder, device, dtype))
        tokenizer = folder / TOKENIZER
        return Checkpoint(model, TextTokenizer.load(tokenizer) if tokenizer.exists() else None, read_sampling(folder))
    if (folder / RELEASED_WEIGHTS).is_file():
        return load_released(folder, device, _dtype_for(folder, device, dtype))
    raise _no_model(folder)


def load_config(source: str | Path, *, allow_download: bool = False) -> ModelConfig:
    """What `load_model` would load. Of a repository only what describes it is fetched, not its weights.

    Raises CheckpointError as `load_model` does.
    """
    folder = find_folder(source, allow_download=allow_download, fetched=_DESCRIBING)
    if is_our_folder(folder):
        return read_config(folder)
    if (folder / RELEASED_WEIGHTS).is_file() or (not Path(source).is_dir() and _weights_wait(str(source))):
        return _released_config(folder, CodecConfig())
    raise _no_model(folder)


def _no_model(folder: Path) -> CheckpointError:
    return CheckpointError(
        f"{folder} holds no model: neither a config.json of moshivis nor a released {RELEASED_WEIGHTS}"
    )


def find_folder(source: str | Path, *, allow_download: bool = False, fetched: Sequence[str] = _FETCHED) -> Path:
    """The folder of a model, downloaded if need be and allowed; `fetched` are patterns of its files.

    Raises CheckpointError as `load_model` does.
    """
    name = str(source)
    if name.startswith(HUB):
        return _download(name.removeprefix(HUB), fetched)
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; a model is a folder")
    if _REPOSITORY.fullmatch(name):
        if allow_download:
            return _download(name, fetched)
        raise CheckpointError(f"there is no folder {name}; to fetch it from the Hugging Face Hub write {HUB}{name}")
    raise CheckpointError(f"there is no model {name!r}: no such folder")


def _download(repository: str, fetched: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # here, because it takes its time and is seldom needed

    if not _REPOSITORY.fullmatch(repository):
        raise CheckpointError(f"a repository is named owner/name, not {repository!r}")
    try:
        return Path(snapshot_download(repository, allow_patterns=list(fetched)))
    except Exception as error:  # network, rights, no such repository: the Hub's client has many ways to say no
        raise CheckpointError(f"{repository} cannot be fetched from the Hugging Face Hub: {error}") from error


def _weights_wait(name: str) -> bool:
    """Whether a repository holds released weights, which were not fetched."""
    from huggingface_hub import file_exists

    repository = name.removeprefix(HUB)
    try:
        return file_exists(repository, RELEASED_WEIGHTS)
    except Exception as error:
        raise CheckpointError(f"the Hugging Face Hub does not say what {repository} holds: {error}") from error


def dtype_named(name: str | None) -> torch.dtype | None:
    """The dtype that a user names for a model; None for None. Raises InputError for what is none."""
    if name is None:
        return None
    if name not in _DTYPES:
        raise InputError(f"dtype must be float32, bfloat16 or float16, not {name!r}")
    return _DTYPES[name]


def _dtype_for(folder: Path, device: torch.device | str, dtype: LoadDtype) -> LoadDtype:
    if dtype is not None or torch.device(device).type != "cpu":
        return dtype
    files = weight_files(folder) if is_our_folder(folder) else [folder / RELEASED_WEIGHTS]
    stored = sum(tensor.numel() for tensor in read_shapes(files).values())
    return torch.float32 if stored < _LARGE else None


# released folders ----------------------------------------------------------------------------------------------------


def load_released(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: LoadDtype = None,
    codec: CodecConfig | None = None,
) -> Checkpoint:
    """The released PyTorch files: model.safetensors, one Mimi file, one SentencePiece model.

    A flat configuration beside them (*.yaml, *.yml, config.json) takes the place of the released one, `codec` that of
    the released codec. Raises CheckpointError as `load_model` does.
    """
    config = _released_config(folder, codec or CodecConfig())
    model = empty_model(config)
    state = model.state_dict()
    weights = folder / RELEASED_WEIGHTS
    codec_file = only_one(folder, ".safetensors", "Mimi file", besides=RELEASED_WEIGHTS)
    rest = {name: tensor for name, tensor in state.items() if not name.startswith("codec.")}
    shapes = read_shapes([weights])
    for name, program in _OTHER_PROGRAMS.items():
        if name in shapes:
            raise CheckpointError(f"{weights} is the release for {program}; fetch the one for PyTorch")
    check_released(shapes, to_released(rest, config), config, str(weights))
    check_tensors(mimi.from_released(read_shapes([codec_file])), model.codec.state_dict(), str(codec_file))
    tokenizer = TextTokenizer.load(only_one(folder, ".model", "SentencePiece model"))
    found = from_released(dict(read_tensors([weights], device)), config)
    ours = {name: tensor for name, tensor in found.items() if name in state}
    ours |= {f"codec.{n}": t for n, t in mimi.from_released(dict(read_tensors([codec_file], device))).items()}
    fill_model(model, ours, dtype)
    return Checkpoint(model.to(device), tokenizer, read_sampling(folder))


def _released_config(folder: Path, codec: CodecConfig) -> ModelConfig:
    flat: Mapping[str, Any] = RELEASED
    said_by: Path | None = None
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml"), *folder.glob("config.json")]):
        found = read_json(path) if path.suffix == ".json" else _read_yaml(path)
        if DEFAULTS.keys().isdisjoint(flatten(found)):  # it is of something else, such as how it is shown
            continue
        if said_by is not None and found != flat:
            raise CheckpointError(f"{said_by.name} and {path.name} in {folder} describe two models; remove one of them")
        flat, said_by = found, path
    try:
        config = config_from_released(flat)
        from_dict(ModelConfig, to_dict(config))  # every value is of its type
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"the configuration in {folder} describes no model: {error}") from error
    lm = config.speech_lm
    codebooks = max(lm.own_codebooks, lm.user_codebooks)
    return dataclasses.replace(config, codec=dataclasses.replace(codec, num_codebooks=codebooks))


def _read_yaml(path: Path) -> dict[str, Any]:
    """A mapping; empty for a file of something else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} is not readable as YAML: {error}") from error
    return content if isinstance(content, dict) else {}


def only_one(folder: Path, suffix: str, what: str, besides: str = "") -> Path:
    """The file of a folder with that suffix. Raises CheckpointError if there is none or more than one."""
    found = sorted(path for path in folder.glob(f"*{suffix}") if path.name != besides)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"{folder} must hold one {what} (*{suffix}), found: {names}")
    return found[0]
