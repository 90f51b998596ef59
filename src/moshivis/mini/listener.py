"""The listener's weights beside a model's: a recogniser of the assistant's original voice, for measuring speech."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moshivis.errors import CheckpointError
from moshivis.evaluation.recogniser import Recogniser, RecogniserConfig
from moshivis.files import atomic_write

FILE = "listener.safetensors"


def save_listener(listener: Recogniser, folder: Path) -> None:
    """Write the listener in half precision; its vocabulary and width go into the file's metadata."""
    tensors = {name: tensor.half().contiguous() for name, tensor in listener.state_dict().items()}
    described = {"words": list(listener.config.words), "width": listener.config.width}
    with atomic_write(folder / FILE) as temporary:
        save_file(tensors, temporary, metadata={"config": json.dumps(described)})


def load_listener(folder: Path) -> Recogniser:
    """Raises CheckpointError if the folder has none."""
    path = folder / FILE
    if not path.exists():
        raise CheckpointError(f"{path} is not there: this model brings no listener, its speech cannot be measured")
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name).float() for name in file.keys()}
    listener = Recogniser(RecogniserConfig(words=tuple(config["words"]), width=config["width"]))
    listener.load_state_dict(tensors)
    return listener.eval()
