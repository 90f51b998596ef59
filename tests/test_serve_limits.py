"""Limits and figures of a server."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from moshivis.errors import InputError
from moshivis.inference.engine import Tick
from moshivis.serve.limits import Limits
from moshivis.serve.metrics import Metrics


def test_the_usual_limits_are_in_range() -> None:
    limits = Limits()
    limits.check()
    assert limits.picture_bytes * 4 / 3 < limits.message_bytes  # in base64
    assert limits.origins == () and limits.token is None


GOOD: list[dict[str, Any]] = [
    {"queue": 0},
    {"token": "aB3-._~"},
    {"origins": ("*",)},
    {"origins": ("https://example.org", "http://localhost:3000", "http://[::1]:8080", "https://example.org:444")},
]


@pytest.mark.parametrize("values", GOOD, ids=str)
def test_what_can_be_asked(values: dict[str, Any]) -> None:
    Limits(**values).check()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"sessions": 0}, "sessions must be more than 0"),
    ({"queue": -1}, "queue must be 0 or more"),
    ({"idle_s": float("nan")}, "idle_s"),
    ({"session_s": float("inf")}, "session_s"),
    ({"heartbeat_s": -1.0}, "heartbeat_s"),
    ({"picture_bytes": 100, "message_bytes": 100}, "message_bytes"),
    ({"picture_bytes": 900_000, "message_bytes": 1_200_000}, "message_bytes"),
    ({"token": ""}, "a token is made of"),
    ({"token": "with space"}, "a token is made of"),
    ({"token": "päss"}, "a token is made of"),
    ({"origins": ("example.org",)}, "'example.org' cannot match"),
    ({"origins": ("https://example.org/",)}, "cannot match"),
    ({"origins": ("https://Example.org",)}, "cannot match"),
    ({"origins": ("https://example.org:443",)}, "cannot match"),
    ({"origins": ("https://example.org:x",)}, "cannot match"),
    ({"origins": ("https://[::1",)}, "cannot match"),
    ({"origins": ("file:///page.html",)}, "cannot match"),
    ({"origins": ("",)}, "cannot match"),
]


@pytest.mark.parametrize("values, sentence", BAD, ids=str)
def test_what_is_out_of_range_is_named(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        Limits(**values).check()
    assert sentence in str(refused.value)


def figures(metrics: Metrics) -> dict[str, float]:
    lines = metrics.render().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def test_a_conversation_is_counted_from_its_start_to_its_end() -> None:
    metrics = Metrics()
    metrics.started("chat")
    metrics.started("chat")
    metrics.ended("chat", "error: ValueError: something of this very moment", 12.0)
    metrics.dropped(3)
    metrics.lost(2)
    metrics.reaction(-0.1)
    metrics.rejected("full")
    metrics.queue_length(7)
    metrics.slots(4)
    found = figures(metrics)
    assert found['moshivis_sessions_started_total{kind="chat"}'] == 2
    assert found['moshivis_sessions_active{kind="chat"}'] == 1
    assert found['moshivis_sessions_ended_total{kind="chat",reason="error"}'] == 1
    assert found["moshivis_session_seconds_sum"] == 12
    assert found["moshivis_frames_dropped_total"] == 3
    assert found["moshivis_frames_lost_total"] == 2
    assert found["moshivis_reaction_seconds_count"] == 1
    assert found['moshivis_rejected_total{reason="full"}'] == 1
    assert found["moshivis_queue_length"] == 7
    assert found["moshivis_slots"] == 4


def test_ticks_of_several_threads_are_all_counted() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(500):
            metrics.tick(Tick(2, 0.02, 0.004, 0.01, 0.006))
        metrics.tick(Tick(2, 0.09, 0.01, 0.07, 0.01))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = figures(metrics)
    assert found["moshivis_ticks_total"] == 2004
    assert found["moshivis_ticks_missed_total"] == 4
    assert found["moshivis_tick_seconds_sum"] == pytest.approx(2000 * 0.02 + 4 * 0.09)
    assert found["moshivis_codec_seconds_sum"] == pytest.approx(2000 * 0.01 + 4 * 0.02)
    assert found["moshivis_model_seconds_sum"] == pytest.approx(2000 * 0.01 + 4 * 0.07)
    assert found['moshivis_tick_seconds_bucket{le="0.08"}'] == 2000


def test_two_servers_in_a_process_keep_their_own_figures() -> None:
    one, other = Metrics(), Metrics()
    one.started("chat")
    assert 'moshivis_sessions_started_total{kind="chat"}' not in figures(other)
