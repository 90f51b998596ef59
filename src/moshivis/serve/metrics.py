"""What a server counts and measures, for Prometheus. Safe to call from any thread; nothing here tells what was said."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from moshivis.inference.engine import Tick

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
FRAME = 0.08  # seconds; a tick that takes longer has missed its deadline

_TICK_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, FRAME, 0.1, 0.15, 0.2, 0.5, 1.0)
_REACTION_BUCKETS = (0.08, 0.16, 0.24, 0.32, 0.48, 0.64, 0.8, 1.2, 2.0, 4.0, 8.0)
_SESSION_BUCKETS = (1, 5, 15, 60, 180, 300, 600, 1800, 3600)


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time, open files
        counter = partial(Counter, namespace="moshivis", registry=self.registry)
        gauge = partial(Gauge, namespace="moshivis", registry=self.registry)
        histogram = partial(Histogram, namespace="moshivis", registry=self.registry)
        self._started = counter("sessions_started", "Conversations begun", ["kind"])
        self._active = gauge("sessions_active", "Conversations under way", ["kind"])
        self._ended = counter("sessions_ended", "Conversations over, by what ended them", ["kind", "reason"])
        self._seconds = histogram("session_seconds", "How long conversations lasted", buckets=_SESSION_BUCKETS)
        self._rejected = counter("rejected", "Callers and requests turned away", ["reason"])
        self._queue = gauge("queue_length", "Callers who wait for a slot")
        self._slots = gauge("slots", "Conversations that fit")
        self._ticks = counter("ticks", "Steps of the whole batch")
        self._missed = counter("ticks_missed", "Steps that took longer than 80 ms")
        self._tick = histogram("tick_seconds", "One step of the whole batch", buckets=_TICK_BUCKETS)
        self._codec = histogram("codec_seconds", "The codec's part of a step", buckets=_TICK_BUCKETS)
        self._model = histogram("model_seconds", "The language model's part of a step", buckets=_TICK_BUCKETS)
        self._dropped = counter("frames_dropped", "Frames from clients that were ahead of the clock")
        self._lost = counter("frames_lost", "Frames for clients that did not read in time")
        self._reaction = histogram(
            "reaction_seconds", "From the end of speech to the first word of the answer", buckets=_REACTION_BUCKETS
        )

    def started(self, kind: str) -> None:
        """A conversation over the protocol `kind` begins."""
        self._started.labels(kind).inc()
        self._active.labels(kind).inc()

    def ended(self, kind: str, reason: str, seconds: float) -> None:
        """It is over. Of the reason only what stands before a colon becomes a label, so that labels stay few."""
        self._active.labels(kind).dec()
        self._ended.labels(kind, _label(reason)).inc()
        self._seconds.observe(seconds)

    def rejected(self, reason: str) -> None:
        """Somebody was turned away: "full", "queue full", "stopping", "origin", "token", "picture", …"""
        self._rejected.labels(_label(reason)).inc()

    def queue_length(self, callers: int) -> None:
        self._queue.set(callers)

    def slots(self, number: int) -> None:
        self._slots.set(number)

    def tick(self, tick: Tick) -> None:
        """One step of the batch; meant as `Engine.on_tick`."""
        self._ticks.inc()
        self._missed.inc(tick.seconds > FRAME)
        self._tick.observe(tick.seconds)
        self._codec.observe(tick.encode + tick.decode)
        self._model.observe(tick.model)

    def dropped(self, frames: int) -> None:
        self._dropped.inc(frames)

    def lost(self, frames: int) -> None:
        self._lost.inc(frames)

    def reaction(self, seconds: float) -> None:
        self._reaction.observe(max(0.0, seconds))

    def render(self) -> bytes:
        """The text format of Prometheus, of the type `CONTENT_TYPE`."""
        return generate_latest(self.registry)


def _label(reason: str) -> str:
    return reason.partition(":")[0].strip() or "unknown"
