"""Finding golden cases on disk and checking every tensor that they hold.

A case of the model is a folder with `meta.json` and `weights`, `inputs` and `outputs.safetensors`; a case of the codec
is `<case>.json`, `<case>.weights.safetensors` and `<case>.io.safetensors`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moshivis.checkpoints.folder import read_json
from moshivis.checkpoints.tensors import read_tensors
from moshivis.conform.codec import CodecRuns
from moshivis.conform.compare import REDUCED, Check, Tolerances, compare
from moshivis.conform.images import ImageRuns
from moshivis.conform.language import LanguageRuns
from moshivis.conform.parts import build
from moshivis.errors import CheckpointError

Run = Callable[[str, Mapping[str, Tensor]], dict[str, Tensor] | None]

_FILES = ("meta.json", "weights.safetensors", "inputs.safetensors", "outputs.safetensors")
_COMPUTED = ("weights.safetensors", "outputs.safetensors")
_WHAT = re.compile(
    r"(?:(?P<run>.+?)\.)?(?P<what>gate\.layer\d+|[^.]+)$"
)  # the last word of a name, or the last two where the gate of a layer is meant


@dataclass(frozen=True)
class Case:
    """Where a case lies: a folder, or the `.json` of a codec case."""

    name: str
    path: Path


def find_cases(root: Path) -> Iterator[Case]:
    """All cases in and below a folder, in the order of their paths."""
    if _is_model_case(root):
        yield Case(root.resolve().name, root)
        return
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.is_dir():
            yield from find_cases(path)
        elif path.suffix == ".json" and path.with_suffix(".weights.safetensors").exists():
            yield Case(path.stem, path)


def _is_model_case(folder: Path) -> bool:
    """Files may be missing or damaged, which is then reported, but something must have been computed there."""
    if not (folder / "meta.json").is_file() or not any((folder / name).is_file() for name in _COMPUTED):
        return False
    try:
        return "config" in read_json(folder / "meta.json")
    except CheckpointError:
        return True


def check_case(case: Case, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """One check for every tensor of the case; one without a tensor's name if the case could not be run at all."""
    try:
        checks = _check_codec if case.path.suffix == ".json" else _check_model
        yield from checks(case, device, dtype)
    except Exception as error:  # whatever is wrong with one case must not hide the others
        yield Check(case=case.name, tensor="", ok=False, note=f"{type(error).__name__}: {error}")


def _check_model(case: Case, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    missing = [name for name in _FILES if not (case.path / name).is_file()]
    if missing:
        raise CheckpointError(f"the case lacks {', '.join(missing)}")
    meta = read_json(case.path / "meta.json")
    weights, inputs, outputs = (_read(case.path / name) for name in _FILES[1:])
    built = build(meta, weights, device)
    spec = meta.get("spec", {})
    runners: list[Run] = []
    if built.parts.vision is not None:
        runners.append(ImageRuns(built, spec, inputs, dtype).run)
    if built.parts.speech_lm is not None:
        runners.append(LanguageRuns(built.parts, spec, inputs, dtype).run)
    tolerances = Tolerances(meta.get("tolerance", {}))
    yield from _check_outputs(case.name, outputs, runners, tolerances, dtype)


def _check_codec(case: Case, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    meta = read_json(case.path)
    weights = _read(case.path.with_suffix(".weights.safetensors"))
    tensors = _read(case.path.with_suffix(".io.safetensors"))
    runs = CodecRuns(meta, weights, tensors, device, dtype)
    outputs = {name: tensor for name, tensor in tensors.items() if name not in runs.given}
    computed_in = torch.float32 if dtype in REDUCED else dtype
    yield from _check_outputs(case.name, outputs, [runs.run], runs.tolerances, computed_in)


def _check_outputs(
    case: str, outputs: Mapping[str, Tensor], runners: list[Run], tolerances: Tolerances, dtype: torch.dtype
) -> Iterator[Check]:
    grouped: dict[str, dict[str, Tensor]] = {}
    for name, tensor in outputs.items():
        match = _WHAT.fullmatch(name)
        run, what = ("", name) if match is None else (match["run"] or "", match["what"])
        grouped.setdefault(run, {})[what] = tensor
    if not grouped:
        raise CheckpointError("the case holds no tensor to check")
    for run, expected in grouped.items():
        results: dict[str, Tensor] = {}
        for runner in runners:
            results |= _run(runner, run, expected)
        for what, tensor in expected.items():
            name = f"{run}.{what}" if run else what
            if what not in results:
                yield Check(case=case, tensor=name, ok=False, note="not checked: unknown kind of tensor")
                continue
            computed_in = torch.bfloat16 if tensor.dtype == torch.bfloat16 or "bf16" in run.split(".") else dtype
            yield compare(case, name, results[what], tensor, tolerances.of(name, tensor, computed_in))


@torch.no_grad()
def _run(runner: Run, name: str, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return runner(name, expected) or {}


def _read(path: Path) -> dict[str, Tensor]:
    return dict(read_tensors([path]))
