"""`conform`: right cases pass, and whatever is wrong with a case makes it fail."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moshivis.conform import run_conform
from moshivis.conform.cases import find_cases
from moshivis.conform.compare import COARSE, EXACT, Tolerance, Tolerances, compare
from moshivis.errors import InputError

GOLDEN = Path(os.environ.get("MOSHIVIS_GOLDEN", Path(__file__).parent / "golden"))
CASES = sorted(find_cases(GOLDEN / "lm"), key=lambda case: case.name)
LANGUAGE = GOLDEN / "lm" / "lm_alt"

Json = dict[str, Any]


def run(capsys: pytest.CaptureFixture[str], *paths: Path, dtype: str = "float32") -> tuple[int, Json]:
    status = run_conform(paths, dtype=dtype)
    summary: Json = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["ok"] == (status == 0)
    return status, summary


@pytest.fixture
def case(tmp_path: Path) -> Path:
    shutil.copytree(LANGUAGE, tmp_path / "case")
    return tmp_path / "case"


def change(file: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


# right cases ---------------------------------------------------------------------------------------------------------


def test_the_selection_has_cases_of_all_kinds() -> None:
    names = {case.name for case in CASES}
    assert {"lm_alt", "xa_notshared_sigmoid_cond", "img_siglip", "img_pixtral"} <= names


@pytest.mark.parametrize("path", [case.path for case in CASES], ids=lambda path: path.name)
def test_every_tensor_of_a_case_agrees(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, summary = run(capsys, path)
    assert status == 0, summary["off"]
    assert summary["tensors"] == len(load_file(path / "outputs.safetensors"))


def test_codec_cases_agree(capsys: pytest.CaptureFixture[str]) -> None:
    status, summary = run(capsys, GOLDEN / "mimi")
    assert status == 0, summary["off"]
    assert summary["cases"] == len(list((GOLDEN / "mimi").glob("*.json")))


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_precisions(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, summary = run(capsys, LANGUAGE, GOLDEN / "lm" / "img_pixtral", dtype=dtype)
    assert status == 0, summary["off"]
    assert summary["cases"] == 2 and summary["dtype"] == dtype


def test_the_codec_is_judged_by_the_precision_that_it_computes_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float32, whatever reduced precision the rest is to compute in."""
    status, summary = run(capsys, GOLDEN / "mimi", dtype="bfloat16")
    assert status == 0, summary["off"]
    shutil.copytree(GOLDEN / "mimi", tmp_path / "off")
    for file in (tmp_path / "off").glob("*.io.safetensors"):
        change(file, lambda tensors: [t.mul_(1.05) for name, t in tensors.items() if name.endswith("decoded")])
    status, summary = run(capsys, tmp_path / "off", dtype="bfloat16")
    assert status == 1 and all(fault["tensor"].endswith("decoded") for fault in summary["off"])


def test_a_small_window(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The runs under `spec.ring`, as in a case that has them: a window that is never full changes nothing."""
    meta = json.loads((case / "meta.json").read_text())
    meta["spec"]["ring"] = {"T": 6, "context": 6, "chunks": [1]}
    (case / "meta.json").write_text(json.dumps(meta))
    change(case / "inputs.safetensors", lambda t: t.update({"ring.tokens": t["tokens"].clone()}))
    outputs = load_file(case / "outputs.safetensors")
    for what in ("text_logits", "transformer_out", "gate_weight"):
        outputs |= {f"d.{kind}.{what}": outputs[f"a.stream.{what}"].clone() for kind in ("stream", "chunk1")}
    save_file(outputs, case / "outputs.safetensors")
    status, summary = run(capsys, case)
    assert status == 0, summary["off"]
    meta["spec"]["ring"]["context"] = 3
    (case / "meta.json").write_text(json.dumps(meta))
    status, summary = run(capsys, case)
    assert status == 1 and {fault["tensor"].rsplit(".", 1)[0] for fault in summary["off"]} == {"d.stream", "d.chunk1"}


# wrong cases ---------------------------------------------------------------------------------------------------------


def test_a_tensor_that_is_off_is_named(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["a.causal.text_logits"][0, 0, 0, 0] += 0.001
        tensors["c.batch.tokens"][5, 1, 0] += 1

    change(case / "outputs.safetensors", edit)
    status, summary = run(capsys, case)
    assert status == 1
    assert {fault["tensor"] for fault in summary["off"]} == {"a.causal.text_logits", "c.batch.tokens"}


@pytest.mark.parametrize(
    "name", ["a.causal.something", "a.sideways.text_logits", "z.text_logits", "c.imgQ.tokens", "x"]
)
def test_a_tensor_that_cannot_be_checked_is_named(name: str, case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(case / "outputs.safetensors", lambda tensors: tensors.update({name: torch.zeros(2)}))
    status, summary = run(capsys, case)
    assert status == 1
    assert [(fault["tensor"], fault["note"]) for fault in summary["off"]] == [
        (name, "not checked: unknown kind of tensor")
    ]


def test_another_shape_is_off(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["b.audio_logits"] = tensors["b.audio_logits"][:1].clone()

    change(case / "outputs.safetensors", edit)
    status, summary = run(capsys, case)
    assert status == 1 and "shape" in summary["off"][0]["note"]


def test_a_case_is_called_by_its_folder(
    case: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = case.rename(case.with_name("run[red]"))
    monkeypatch.chdir(odd)
    assert run_conform(["."]) == 0
    assert "run[red]" in capsys.readouterr().out.splitlines()[3]


def test_other_weights_are_off(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(case / "weights.safetensors", lambda tensors: tensors["llm.out_norm.alpha"].mul_(1.01))
    assert run(capsys, case)[0] == 1


@pytest.mark.parametrize("file", ["weights.safetensors", "inputs.safetensors", "outputs.safetensors"])
def test_a_missing_or_damaged_file_is_named(file: str, case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (case / file).read_bytes()
    (case / file).write_bytes(content[: len(content) // 2])
    status, summary = run(capsys, case)
    assert status == 1 and file in summary["off"][0]["note"]
    (case / file).unlink()
    status, summary = run(capsys, case)
    assert status == 1 and file in summary["off"][0]["note"]


def test_weights_that_do_not_fit_the_config_are_named(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(case / "weights.safetensors", lambda tensors: tensors.pop("depformer_in.0.weight"))
    status, summary = run(capsys, case)
    assert status == 1 and "missing: depformer_in.0.weight" in summary["off"][0]["note"]


def test_a_damaged_description_is_a_fault(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (case / "meta.json").write_text("{")
    status, summary = run(capsys, case)
    assert status == 1 and "not readable as JSON" in summary["off"][0]["note"]


def test_one_bad_case_does_not_hide_the_others(case: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(LANGUAGE, case.parent / "good")
    (case / "weights.safetensors").unlink()
    status, summary = run(capsys, case.parent)
    assert status == 1 and summary["cases"] == 2 and summary["tensors"] > 10
    assert {fault["case"] for fault in summary["off"]} == {"case"}


def test_a_codec_tensor_that_is_off_or_unknown_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (GOLDEN / "mimi").glob("execmask.*"):
        shutil.copy(file, tmp_path)

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["codes"][0, 0, 0] += 1
        tensors["stream9.latent"] = torch.zeros(1)

    change(tmp_path / "execmask.io.safetensors", edit)
    status, summary = run(capsys, tmp_path)
    assert status == 1
    assert {fault["tensor"] for fault in summary["off"]} == {"codes", "stream9.latent"}


def test_nothing_found_is_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        status, summary = run(capsys, path)
        assert status == 1 and summary["empty"] == [str(path)]
    status, summary = run(capsys, LANGUAGE, tmp_path)
    assert status == 1 and summary["cases"] == 1 and not summary["off"]


def test_unknown_precisions_and_devices_are_refused() -> None:
    with pytest.raises(InputError, match="dtype must be one of"):
        run_conform([LANGUAGE], dtype="int8")
    with pytest.raises(InputError, match="the device 'warp' cannot be used"):
        run_conform([LANGUAGE], device="warp")


# comparing -----------------------------------------------------------------------------------------------------------


def test_what_counts_as_equal() -> None:
    close, nan = Tolerance(rtol=0.1, atol=0.0), torch.tensor([float("nan"), 1.0])
    ones = torch.ones(2)
    for ours, expected, tolerance, verdict in (
        (ones * 1.05, ones, close, True),
        (ones * 1.2, ones, close, False),
        (nan, nan, EXACT, True),
        (nan, ones, close, False),
        (ones, nan, close, False),
        (ones, ones / 0, close, False),
        (ones / 0, ones / 0, EXACT, True),
        (ones.long(), ones, EXACT, True),
        (torch.tensor([True, False]), torch.tensor([True, True]), EXACT, False),
        (torch.tensor([1.0, 1.4]), ones, COARSE, False),
        (torch.tensor([1.0, 1.2]), ones, COARSE, True),
        (torch.zeros(0), torch.zeros(0), EXACT, True),
    ):
        assert compare("case", "name", ours, expected, tolerance).ok is verdict


def test_tolerances_are_those_of_the_case() -> None:
    stated = Tolerances({"float32 tensors": {"rtol": 0.5, "atol": 0.25}, "tokens": "exact"})
    values = torch.zeros(2)
    assert stated.of("a.text_logits", values, torch.float32) == Tolerance(rtol=0.5, atol=0.25)
    assert stated.of("a.gate_weight", values, torch.float32) == Tolerance(rtol=0.0, atol=1e-6)
    assert stated.of("a.tokens", values.long(), torch.bfloat16) == EXACT
    assert stated.of("a.text_logits", values.bfloat16(), torch.bfloat16) == Tolerance(rtol=0.03, atol=0.06)
    assert stated.of("a.text_logits", values, torch.bfloat16) == COARSE
