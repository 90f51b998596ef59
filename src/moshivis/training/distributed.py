"""Several processes that train one model, as `torchrun` starts them; one process is the same with nobody to wait for.

`ddp`: every process holds the model and sums the gradients of what is trained, in buckets. Losses are normalised over
all ranks beforehand (see `losses`), so the sum is the gradient of the whole batch.
`fsdp`: parameters, gradients and optimiser state are sharded, block by block, by FSDP2.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moshivis.devices import device_type, usable_device
from moshivis.training.learner import Learner

BUCKET = 32 * 2**20  # numbers that are reduced at once: 128 MiB


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    count: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place; returned on the device where it came from."""
        if self.count > 1:
            moved = values.to(self.device)
            dist.all_reduce(moved)
            values.copy_(moved)
        return values

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks]:
    """Join the other processes of this run, if torchrun has started any; or those that are joined already.

    Raises InputError for a device that is not there.
    """
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), _device(device, int(os.environ.get("LOCAL_RANK", 0))))
        return
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if count == 1:
        yield Ranks(0, 1, chosen)
        return
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    patience = timedelta(hours=1)  # rank 0 generates the samples of a validation while the others wait
    dist.init_process_group(backend, timeout=patience, device_id=chosen if chosen.type == "cuda" else None)
    yield Ranks(rank, count, chosen)
    dist.destroy_process_group()  # not if this rank fails: over NCCL it would wait for the others, who wait for it


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = device_type(name)
    device = usable_device(f"cuda:{local_rank}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


# ddp ------------------------------------------------------------------------------------------------------------------


def sum_gradients(parameters: Iterable[Tensor], ranks: Ranks) -> None:
    """Replace every gradient by its sum over the ranks; one that a rank has no use for counts as zero."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    if ranks.count == 1:
        return
    bucket: list[Tensor] = []
    for gradient in gradients:
        if bucket and sum(held.numel() for held in bucket) + gradient.numel() > BUCKET:
            _reduce(bucket)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _reduce(bucket)


def _reduce(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([held.numel() for held in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


# fsdp -----------------------------------------------------------------------------------------------------------------


def shard(learner: Learner, ranks: Ranks, *, half: bool) -> None:
    """Spread the parameters over the ranks: a group a backbone block, one for the depth transformer, one for the rest.

    The learner of rank 0 holds the weights, on the CPU; the others' may be on the meta device. `half` computes in
    bfloat16 with gradients summed in float32.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    # Inputs stay as they are: rotations and loss weights are float32 whatever the weights are.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if half:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    whole = {name: parameter.detach() for name, parameter in learner.named_parameters()}
    learner.to("meta")

    def placement(parameter: nn.Parameter) -> Shard | None:
        """Tables [streams, ids, width] have too few streams to share them out; all else is cut along its rows."""
        return Shard(2) if parameter.ndim == 3 and parameter.shape[2] % ranks.count == 0 else None

    for module in (*learner.speech_lm.backbone.layers, learner.speech_lm.depth, learner):
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)
    learner.to_empty(device=ranks.device)
    _fill(learner, whole, ranks)


@torch.no_grad()
def _fill(learner: Learner, whole: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Hand out rank 0's weights, one tensor at a time: no rank ever holds a second model."""
    for name, parameter in learner.named_parameters():
        assert isinstance(parameter, DTensor)
        source = whole[name] if ranks.leads else torch.empty(parameter.shape, dtype=parameter.dtype)
        placed = distribute_tensor(source.to(ranks.device), parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(placed.to_local())


def broadcast(module: nn.Module, ranks: Ranks) -> None:
    """Give all ranks rank 0's weights of a module that is whole on each of them."""
    for tensor in [*module.parameters(), *module.buffers()]:
        dist.broadcast(tensor.detach(), 0)


def gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Whole copies on the CPU of rank 0; nothing on the others, which must help if the tensors are sharded."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if ranks.leads:
            found[name] = full.to("cpu", copy=True)
    return found


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one piece: all ranks must ask together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
