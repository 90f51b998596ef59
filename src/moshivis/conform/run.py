"""`moshivis conform`: all cases below some folders, a table, one line of JSON, and an exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moshivis.conform.cases import check_case, find_cases
from moshivis.conform.compare import Check
from moshivis.devices import usable_device
from moshivis.errors import InputError

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_conform(paths: Sequence[str | Path], device: str = "cpu", dtype: str = "float32") -> int:
    """Check every case in `paths`, print the verdicts, and return 0 if there are any and all are right, else 1.

    Convolutions are computed in full float32, also on a GPU, where PyTorch else rounds their inputs to TF32.

    The last line printed is one JSON object: `ok, cases, tensors, off, empty, device, dtype`.
    Raises InputError for an unknown dtype or a device that is not there.
    """
    torch_dtype = DTYPES.get(dtype)
    if torch_dtype is None:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    usable_device(device)
    roots = [Path(path) for path in paths]
    found = {root: list(find_cases(root)) for root in roots}
    cases = list(dict.fromkeys(case for cases in found.values() for case in cases))
    checks: list[Check] = []
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        for case in cases:
            checks += check_case(case, torch.device(device), torch_dtype)
    empty = [str(root) for root, inside in found.items() if not inside]
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(_table(checks))
    for root in empty:
        console.print(f"no case found in {root}", style="red", markup=False)
    off = [check for check in checks if not check.ok]
    ok = bool(cases) and not empty and not off
    summary = {
        "ok": ok,
        "cases": len(cases),
        "tensors": sum(bool(check.tensor) for check in checks),
        "off": [{"case": check.case, "tensor": check.tensor, "note": _reason(check)} for check in off],
        "empty": empty,
        "device": device,
        "dtype": dtype,
    }
    print(json.dumps(summary))
    return 0 if ok else 1


def _table(checks: Sequence[Check]) -> Table:
    table = Table("case", "tensor", "max abs", "max rel", "tolerance", "verdict")
    for check in checks:
        numbers = [_number(check.max_abs), _number(check.max_rel)]
        verdict = "[green]ok[/]" if check.ok else "[red]OFF[/]"
        said = (escape(text) for text in (check.case, check.tensor, *numbers, check.tolerance or check.note))
        table.add_row(*said, verdict)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _reason(check: Check) -> str:
    return check.note or f"largest error {_number(check.max_abs)}, tolerance {check.tolerance}"
