"""Several processes that train one model on one machine: each takes a share of the batch, gradients are averaged.

On a few CPU cores one single-threaded process a core is faster than one process with as many threads, and far less
disturbed when a core is busy with something else.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException, spawn

from moshivis.errors import MoshivisError
from moshivis.processes import end_with_parent
from moshivis.training.speed import compiler

# Parameters of glibc's mallopt (malloc.h) and values that keep freed memory in the process.
_KEEPING = {-1: -1, -2: 256 << 20, -3: 32 << 20}  # M_TRIM_THRESHOLD: never; M_TOP_PAD; M_MMAP_THRESHOLD: its maximum
COMPILED_FROM_STEPS = 500


def run(workers: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Call `function(rank, workers, *arguments)` in `workers` processes and wait; one worker runs right here.

    Raises MoshivisError with what the first of them said that ended by one, or by an OSError.
    """
    if workers == 1:
        function(0, 1, *arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_worker, args=(workers, Path(folder), function, arguments), nprocs=workers)
        except ProcessException as error:
            said = sorted(Path(folder).glob("said-*"), key=lambda path: path.stat().st_mtime_ns)
            if not said:
                raise
            raise MoshivisError(said[0].read_text()) from error


def _worker(rank: int, workers: int, folder: Path, function: Callable[..., Any], arguments: tuple) -> None:
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    keep_memory()
    end_with_parent()
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=workers)
    try:
        function(rank, workers, *arguments)
    except (MoshivisError, OSError) as error:
        (folder / f"said-{rank}").write_text(str(error))
        raise
    dist.destroy_process_group()


def keep_memory() -> None:
    """Let this process keep the memory that it frees, for its next step, instead of giving it back to the system.

    On a CPU a training step is a fifth faster for it, and twice as fast when both cores are busy. Does nothing where
    the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in _KEEPING.items():
            mallopt(parameter, value)


def worth_compiling(steps: int, device: torch.device) -> bool:
    """Whether a training of `steps` steps is over sooner if it is compiled first, which takes half a minute or more.

    On a CPU with a C++ compiler a step is 1.4 times as fast for it.
    """
    return steps >= COMPILED_FROM_STEPS and device.type == "cpu" and compiler() is not None


def average_gradients(parameters: Iterable[Tensor], workers: int) -> None:
    """Replace every gradient by its mean over the processes; one that a process has no use for counts as zero."""
    if workers == 1:
        return
    trained = list(parameters)
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= workers
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
