"""`moshivis bench serve`: real clients on a real server, and what counts as late."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moshivis.cli import main
from moshivis.serve.bench import FRAME, JITTER_BUFFER, ClientReport, LoadReport


def test_a_frame_is_late_when_the_player_has_run_dry() -> None:
    steady = [10 + FRAME * k for k in range(50)]
    assert ClientReport(accepted=True, arrivals=steady).late(50) == 0
    held_up = [at + (JITTER_BUFFER - 0.01 if k == 20 else 0) for k, at in enumerate(steady)]
    assert ClientReport(accepted=True, arrivals=held_up).late(50) == 0
    behind = [at + (JITTER_BUFFER + 0.01 if k >= 40 else 0) for k, at in enumerate(steady)]
    assert ClientReport(accepted=True, arrivals=behind).late(50) == 10
    assert ClientReport(accepted=True, arrivals=steady[:30]).late(50) == 18  # two may still be on their way
    assert ClientReport(accepted=True, arrivals=steady[:30], skipped=20).late(50) == 0
    assert ClientReport(accepted=True).late(50) == ClientReport().late(50) == 50


def test_a_run_reports_what_the_clients_saw(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://localhost:9")  # where nobody is; the server is asked directly
    monkeypatch.delenv("no_proxy", raising=False)
    assert main(["bench", "serve", "--sessions", "2", "--seconds", "10"]) == 0
    (run,) = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert run["accepted"] == run["sessions"] == 2
    assert run["frames"] == 2 * 125 and run["ticks"] >= 60
    assert 0 < run["tick_p50_ms"] <= run["tick_p99_ms"]
    assert run["memory_mb"] > 100


def test_what_clients_or_server_left_undone_is_not_sustained() -> None:
    whole = LoadReport(
        sessions=1,
        accepted=1,
        ticks=100,
        missed=0,
        tick_p50_ms=None,
        tick_p99_ms=None,
        frames=100,
        late=0,
        dropped=0,
        skipped=0,
        reaction_ms=None,
        memory_mb=1.0,
    )
    assert whole.sustained
    assert not replace(whole, skipped=2).sustained and not replace(whole, late=2).sustained


@pytest.mark.parametrize("words", [["--sessions", "0"], ["--sessions", "many"], ["--seconds", "3"]])
def test_what_cannot_be_measured_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *words]) == 2
    assert words[0] in capsys.readouterr().err
