"""Comparing what we compute with what a case says, tensor by tensor.

A case states how far each element may be off. Where a float32 case is run in a reduced precision that would say
nothing: errors grow from layer to layer. Then the error of the whole tensor is judged, root mean square.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

REDUCED = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """|ours - expected| <= atol + rtol * |expected|."""

    rtol: float
    atol: float
    by_rms: bool = False  # compare root mean squares of error and expectation instead of elements

    def __str__(self) -> str:
        if self.by_rms:
            return f"rms {self.rtol:.0%}"
        if self.rtol == 0:
            return "exact" if self.atol == 0 else f"{self.atol:g}"
        return f"{self.atol:g} + {self.rtol:g} |x|"

    def accepts(self, error: Tensor, expected: Tensor) -> bool:
        if self.by_rms:
            error, expected = error.square().mean().sqrt(), expected.square().mean().sqrt()
        return bool((error <= self.atol + self.rtol * expected.abs()).all())


EXACT = Tolerance(rtol=0.0, atol=0.0)
COARSE = Tolerance(rtol=0.15, atol=1e-3, by_rms=True)
_DEFAULTS = {
    "float32": Tolerance(rtol=1e-4, atol=2e-5),
    "bf16": Tolerance(rtol=3e-2, atol=6e-2),
    "gate_weight": Tolerance(rtol=0.0, atol=1e-6),
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """The verdict on one tensor of a case. `note` says what happened where there are no numbers."""

    case: str
    tensor: str
    ok: bool
    max_abs: float | None = None
    max_rel: float | None = None
    tolerance: str = ""
    note: str = ""


class Tolerances:
    """The tolerances that a case states, or the usual ones."""

    def __init__(self, stated: Mapping[str, Any]):
        self._table = dict(_DEFAULTS)
        for kind in _DEFAULTS:
            for key, value in stated.items():
                if key.startswith(kind) and isinstance(value, Mapping):
                    self._table[kind] = Tolerance(rtol=value.get("rtol", 0.0), atol=value.get("atol", 0.0))

    def of(self, name: str, expected: Tensor, dtype: torch.dtype) -> Tolerance:
        """For a tensor that was computed in `dtype`."""
        if not expected.is_floating_point():
            return EXACT
        if dtype in REDUCED:
            return self._table["bf16"] if expected.dtype in REDUCED else COARSE
        return self._table["gate_weight" if name.endswith("gate_weight") else "float32"]


def compare(case: str, name: str, ours: Tensor, expected: Tensor, tolerance: Tolerance) -> Check:
    """NaN on one side, or another shape, is off whatever the tolerance."""
    if ours.shape != expected.shape:
        note = f"shape {list(ours.shape)} instead of {list(expected.shape)}"
        return Check(case=case, tensor=name, ok=False, note=note)
    a, b = ours.detach().cpu().double(), expected.double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, torch.zeros_like(a), (a - b).abs())
    b = b.nan_to_num(0, 0, 0)  # where these are expected nothing else is near
    relative = error / b.abs().clamp(min=max(tolerance.atol, 1e-12))
    return Check(
        case=case,
        tensor=name,
        ok=tolerance.accepts(error, b),
        max_abs=float(error.max()) if error.numel() else 0.0,
        max_rel=float(relative.max()) if error.numel() else 0.0,
        tolerance=str(tolerance),
    )
