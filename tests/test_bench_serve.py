"""`moshivis bench serve`: real clients on a real server, and what counts as late."""

from __future__ import annotations

import json

import pytest

from moshivis.cli import main
from moshivis.serve.bench import FRAME, JITTER_BUFFER, ClientReport


def test_a_frame_is_late_when_the_player_has_run_dry() -> None:
    steady = [10 + FRAME * k for k in range(50)]
    assert ClientReport(sent=50, arrivals=steady).late() == 0
    held_up = [at + (JITTER_BUFFER - 0.01 if k == 20 else 0) for k, at in enumerate(steady)]
    assert ClientReport(sent=50, arrivals=held_up).late() == 0
    behind = [at + (JITTER_BUFFER + 0.01 if k >= 40 else 0) for k, at in enumerate(steady)]
    assert ClientReport(sent=50, arrivals=behind).late() == 10
    assert ClientReport(sent=50, arrivals=steady[:30]).late() == 18  # two may still be on their way
    assert ClientReport(sent=50).late() == 50


def test_a_run_reports_what_the_clients_saw(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--sessions", "2", "--seconds", "10"]) == 0
    (run,) = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    assert run["accepted"] == run["sessions"] == 2
    assert run["frames"] == 2 * 125 and run["ticks"] >= 60
    assert 0 < run["tick_p50_ms"] <= run["tick_p99_ms"]
    assert run["memory_mb"] > 100


@pytest.mark.parametrize("words", [["--sessions", "0"], ["--sessions", "many"], ["--seconds", "3"]])
def test_what_cannot_be_measured_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *words]) == 2
    assert words[0] in capsys.readouterr().err
