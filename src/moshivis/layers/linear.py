"""Products with weights that a CPU computes as fast as it reads them.

A frame brings a few rows to each matrix, so a product takes as long as reading the matrix does. oneDNN reads one in
its own blocked layout at the full bandwidth of the memory; as PyTorch stores it, at a half or a third of that. A
frozen weight is therefore laid out anew when it is first used. A weight that may still learn is read as it is, and so
is everything that is not float32 on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

LARGEST = 32 * 2**20  # bytes of a matrix that is laid out: memory for a second copy of more is not taken unasked


class Laid:
    """What is made of some frozen tensors: made when it is first asked for, and again when one of them has changed.

    A change is another tensor, other memory, or another version of the same. What writes past the version, as a
    fused optimiser does, writes to a weight that requires gradients; that is no frozen one, and asking for it forgets
    what was made, as does asking for one that has left the CPU or is float32 no more. Writing through `.data` is the
    one way left to change a weight unnoticed. Copies start empty.
    """

    def __init__(self) -> None:
        # Of every source: itself, an alias of its memory (while both are held nothing else takes their place), the
        # address and the version; and what was made.
        self._held: tuple[list[tuple[Tensor, Tensor, int, int]], tuple[Tensor, ...]] | None = None

    def get(
        self, x: Tensor, sources: tuple[Tensor, ...], make: Callable[[], tuple[Tensor, ...]], wanted: bool = True
    ) -> tuple[Tensor, ...] | None:
        """What `make()` gives; None where x has to meet the sources as they are, or if nothing is `wanted`."""
        for source in sources:
            if source.requires_grad or not source.is_cpu or source.dtype != torch.float32:
                self._held = None
                return None
        if not wanted or not _free(x):
            return None
        if self._held is None or not _unchanged(sources, self._held[0]):
            if not all(_may_be_laid(source) for source in sources):
                return None
            self._held = [(s, s.detach(), s.data_ptr(), s._version) for s in sources], make()
        return self._held[1]

    def __reduce__(self) -> tuple[type[Laid], tuple[()]]:
        return Laid, ()


def _free(x: Tensor) -> bool:
    """Whether nothing but the numbers is asked of a product with x."""
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and not x.requires_grad
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _may_be_laid(source: Tensor) -> bool:
    usual = source.is_cpu and source.dtype == torch.float32 and source.nbytes <= LARGEST
    return usual and _has_onednn() and not source.is_inference()  # inference tensors have no version


def _unchanged(sources: tuple[Tensor, ...], held: list[tuple[Tensor, Tensor, int, int]]) -> bool:
    for source, (same, _, address, version) in zip(sources, held, strict=True):
        if source is not same or source.data_ptr() != address or source._version != version:
            return False
    return True


def blocked(matrix: Tensor) -> Tensor:
    """A matrix [out, in] in the layout that `product` reads."""
    laid: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), None)
    return laid


def product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in] times a `blocked` matrix, plus bias [out]: [..., out] in one piece of memory."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")
    return y


@functools.cache
def _has_onednn() -> bool:
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


class Linear(nn.Linear):
    """`nn.Linear`: the same numbers up to rounding."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self._laid = Laid()

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        laid = self._laid.get(input, weights_of(self), self._lay)
        return super().forward(input) if laid is None else product(input, *laid)

    def _lay(self) -> tuple[Tensor, ...]:
        weight, *bias = weights_of(self)
        return blocked(weight), *bias


def weights_of(layer: nn.Linear | nn.Conv1d) -> tuple[Tensor, ...]:
    """Weight and, if there is one, bias."""
    return (layer.weight,) if layer.bias is None else (layer.weight, layer.bias)
