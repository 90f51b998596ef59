"""The codec and the tokenizer of a checkpoint, without the rest of it: what packing training data needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moshivis.checkpoints import mimi
from moshivis.checkpoints.folder import TOKENIZER, is_our_folder, weight_files
from moshivis.checkpoints.load import RELEASED_WEIGHTS, find_folder, load_config, only_one
from moshivis.checkpoints.tensors import check_tensors, read_shapes, read_tensors
from moshivis.codec.mimi import Mimi
from moshivis.config import ModelConfig
from moshivis.speech_lm.tokenizer import TextTokenizer

_PREFIX = "codec."


@dataclass(frozen=True)
class CodecCheckpoint:
    codec: Mimi  # float32
    tokenizer: TextTokenizer
    config: ModelConfig  # of the whole model


def load_codec(
    source: str | Path, device: torch.device | str = "cpu", *, allow_download: bool = False
) -> CodecCheckpoint:
    """From any source that `load_model` reads; of a large model only little is read.

    Raises CheckpointError as `load_model` does, and if the checkpoint has no tokenizer.
    """
    folder = find_folder(source, allow_download=allow_download)
    config = load_config(folder)
    tensors: dict[str, Tensor]
    if is_our_folder(folder):
        file, tokenizer = folder, folder / TOKENIZER
        files = weight_files(folder)
        read_shapes(files)  # says what is wrong with them, as for `load_model`
        stored = read_tensors(files, device, _PREFIX)
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in stored}
    else:
        file = only_one(folder, ".safetensors", "Mimi file", besides=RELEASED_WEIGHTS)
        tokenizer = only_one(folder, ".model", "SentencePiece model")
        read_shapes([file])
        tensors = mimi.from_released(dict(read_tensors([file], device)))
    with torch.device("meta"):
        codec = Mimi(config.codec)
    check_tensors(tensors, codec.state_dict(), str(file))
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    codec.load_state_dict(tensors, assign=True)
    return CodecCheckpoint(codec.to(device).eval().requires_grad_(False), TextTokenizer.load(tokenizer), config)
