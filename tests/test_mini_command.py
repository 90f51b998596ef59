"""`python -m moshivis.mini`: what it says of options that it cannot use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moshivis.mini.__main__ import main
from moshivis.mini.measure import _Asker


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["measure", "--count", "0"], "argument --count: must be 1 or more, not 0"),
        (["build", "--out", "built", "--workers", "none"], "argument --workers: must be a whole number, not none"),
        (["build", "--out", "built", "--device", "gpu"], "error: the device 'gpu' cannot be used here"),
        (["build", "--out", "/dev/null/built", "--stage", "tokenizer"], "error: /dev/null/built"),
        (["improve", "--out", "built", "--model", "nowhere"], "error: there is no model 'nowhere'"),
        (["measure", "--model", "nowhere"], "error: there is no model 'nowhere'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_used_is_named(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moshivis.mini", *words])
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)  # both would last for the tests that follow
    monkeypatch.setattr("moshivis.mini.parallel.keep_memory", lambda: None)
    try:
        status: object = main()
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["flite", "rsvg-convert"])
def test_measure_names_a_missing_program_before_it_asks(
    program: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None if name == program else f"/usr/bin/{name}")
    monkeypatch.setattr(_Asker, "_ask", lambda *_: pytest.fail("it asked"))
    monkeypatch.setattr(sys, "argv", ["moshivis.mini", "measure", "--count", "6"])
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)
    assert main() == 2
    assert f"'{program}' is not installed: apt-get install" in capsys.readouterr().err
