"""Reading and checking safetensors files: what is wrong is said before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moshivis.errors import CheckpointError

_FLOATING = ("F64", "F32", "F16", "BF16")  # all that a model, a codec or adapters are stored in


def read_shapes(files: Sequence[Path]) -> dict[str, Tensor]:
    """Names and shapes, as tensors on the meta device, of all tensors in some files; only headers are read.

    Raises CheckpointError for a file that is missing or damaged, for a name that two files hold, and for numbers that
    are not floating-point ones of 16 bits or more: quantised weights would be taken for what they stand for.
    """
    shapes: dict[str, Tensor] = {}
    for file in files:
        with _opened(file, "cpu") as opened:
            for name in opened.keys():
                if name in shapes:
                    raise CheckpointError(f"{file} holds {name}, which another file of the checkpoint holds too")
                stored = opened.get_slice(name)
                if stored.get_dtype() not in _FLOATING:
                    raise CheckpointError(
                        f"{file} holds {name} as {stored.get_dtype()}; quantised weights are not read, only those in "
                        "float32, bfloat16 or float16"
                    )
                shapes[name] = torch.empty(stored.get_shape(), device="meta")
    return shapes


def read_tensors(
    files: Sequence[Path], device: torch.device | str = "cpu", prefix: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of some files whose names begin with `prefix`, one after the other.

    Raises CheckpointError for a file that is missing or damaged; the rest is for `read_shapes` to find first.
    """
    for file in files:
        with _opened(file, str(device)) as opened:
            for name in opened.keys():
                if name.startswith(prefix):
                    yield name, opened.get_tensor(name)


def write_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError, and no error of another kind, if it cannot be written."""
    try:
        save_file(dict(tensors), file, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{file.name} cannot be written: {error}") from error


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: str) -> None:
    """Raise CheckpointError unless names and shapes are the expected ones; the message names those that are not."""
    missing = [f"{name} {list(tensor.shape)}" for name, tensor in expected.items() if name not in tensors]
    surplus = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} {list(tensors[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    faults = {"missing": missing, "not of this model": surplus, "of the wrong shape": misshapen}
    sentences = [f"{what}: {some(names)}" for what, names in faults.items() if names]
    if sentences:
        raise CheckpointError(f"the tensors in {file} do not fit the model's config; " + "; ".join(sentences))


def some(names: Sequence[str], limit: int = 8) -> str:
    """The first of many names."""
    listed = ", ".join(names[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"


@contextmanager
def _opened(file: Path, device: str) -> Iterator[Any]:
    if not file.is_file():
        raise CheckpointError(f"the file {file} is missing")
    try:
        with safe_open(file, "pt", device=device) as opened:
            yield opened
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged or is no safetensors file: {error}") from error
