"""Many conversations with one model: a thread that steps them all in one batch, at the model's 80 ms clock.

A slot is a batch row. Every tick takes one frame of each conversation that has one and runs codec, speech LM, depth
transformer and codec over the whole batch; the other rows keep their state. Shapes never change, so what a row
computes does not depend on who else is there: it gives the same bits alone and in company.

When to tick: as soon as every talking conversation has a frame (then their clocks fall in step), or a period after the
last tick, or at once when somebody has fallen behind. A conversation cannot run ahead of the clock.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moshivis.adapters.gated_cross_attention import ImageKV
from moshivis.errors import MoshivisError
from moshivis.inference.call import Audio, Call, CallSettings, Deliver, Ended, Said
from moshivis.inference.conversation import Assistant, Picture
from moshivis.inference.rows import ImageRows, RowSampling
from moshivis.speech_lm.tokenizer import TextStream

__all__ = ["Busy", "Call", "CallSettings", "Ended", "Engine", "EngineStats", "Said", "Tick"]

_log = logging.getLogger(__name__)

WARM_UP_TICKS = 4
TALKING_PERIODS = 2.5  # a conversation that took no frame for so long is not waited for
RECENT_TICKS = 2048


class Busy(MoshivisError):
    """All slots are taken."""


@dataclass(frozen=True)
class Tick:
    """One step of the batch."""

    rows: int  # conversations that took part
    seconds: float
    encode: float  # seconds of it in the codec's encoder
    model: float
    decode: float


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start; `recent` are the latest ticks."""

    slots: int
    active: int
    ticks: int
    missed: int  # ticks that took longer than a frame lasts
    frames: int  # of all conversations
    dropped: int  # the users' frames that came faster than time passes
    recent: tuple[Tick, ...]

    def to_json(self) -> dict[str, Any]:
        """Counters and milliseconds of the latest ticks."""
        ms = np.array([tick.seconds for tick in self.recent]) * 1e3
        p50, p99 = (None, None) if not len(ms) else (round(float(np.percentile(ms, p)), 3) for p in (50, 99))
        return {
            "count": self.ticks,
            "missed": self.missed,
            "frames": self.frames,
            "dropped": self.dropped,
            "p50_ms": p50,
            "p99_ms": p99,
        }


class Engine:
    """Runs up to `slots` conversations with `assistant`. `on_tick`, if set, hears of every tick in the engine's thread.

    `threads` are those of the CPU that a tick computes with (None = as torch is set).
    """

    def __init__(self, assistant: Assistant, slots: int, *, queue_frames: int = 12, threads: int | None = None):
        if slots < 1 or queue_frames < 1:
            raise ValueError("an engine needs at least one slot, and room for a frame")
        self.assistant, self.slots, self.queue_frames, self.threads = assistant, slots, queue_frames, threads
        self.frame_size = assistant.frame_size
        self.sample_rate = assistant.config.codec.sample_rate
        self.period = self.frame_size / self.sample_rate  # seconds
        self.on_tick: Callable[[Tick], None] | None = None
        self.ready = False
        self._condition = threading.Condition()
        self._looking = threading.Lock()
        self._calls: list[Call | None] = [None] * slots
        self._numbers = itertools.count(1)
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._recent: deque[Tick] = deque(maxlen=RECENT_TICKS)
        self._ticks = self._missed = self._frames = self._dropped_before = 0

    # from any thread --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread, and return when it has warmed up over the path that conversations take. Once: a stopped
        engine does not start again.
        """
        if self._thread is not None:
            raise RuntimeError("the engine was started before")
        started = threading.Event()
        failure: list[BaseException] = []

        def run() -> None:
            try:
                if self.threads is not None:
                    torch.set_num_threads(self.threads)
                batch = _Batch(self.assistant, self.slots)
                batch.warm_up()
                self.ready = True
            except BaseException as error:
                failure.append(error)
                return
            finally:
                started.set()
            try:
                self._run(batch)
            except Exception as error:
                _log.exception("the engine's thread failed")
                self._abandon(f"error: {type(error).__name__}: {error}")

        self._thread = threading.Thread(target=run, name="moshivis-engine", daemon=True)
        self._thread.start()
        started.wait()
        if failure:
            raise failure[0]

    def stop(self, timeout: float = 5.0) -> None:
        """End all calls and the thread."""
        with self._condition:
            self._stopping = True
            self.ready = False
            self._condition.notify()
        if self._thread is not None:
            self._thread.join(timeout)

    def look(self, picture: Picture) -> ImageKV:
        """Keys and values of a picture. Takes a while: call it in a thread of your own, beside the ticks.

        Raises InputError if it is not a picture, is too large, or if the model cannot see.
        """
        with self._looking:  # one at a time: pictures must not take the processor from the ticks
            return self.assistant.look(picture)

    def usual_settings(self) -> CallSettings:
        """How this model is sampled if nobody says otherwise."""
        return CallSettings(**vars(CallSettings.usual(self.assistant.sampling)))

    def open(self, deliver: Deliver, settings: CallSettings | None = None, image: ImageKV | None = None) -> Call:
        """Begin a conversation. `deliver` gets every frame and the end, in the engine's thread: it must return at once.

        Raises Busy if no slot is free, InputError if a setting is out of range.
        """
        settings = settings or self.usual_settings()
        settings.check()
        text = TextStream(self.assistant.tokenizer)
        with self._condition:
            if self._stopping or not self.ready:
                raise Busy("the engine is not running")
            if None not in self._calls:
                raise Busy(f"all {self.slots} places are taken")
            call = Call(next(self._numbers), settings, deliver, text, self.frame_size, self.queue_frames)
            call.attach(self._wake, time.monotonic())
            call.set_image(image)
            self._calls[self._calls.index(None)] = call
            self._condition.notify()
        return call

    def stats(self) -> EngineStats:
        with self._condition:
            calls = [call for call in self._calls if call is not None]
            dropped = self._dropped_before + sum(call.dropped for call in calls)
            recent = tuple(self._recent)
            return EngineStats(self.slots, len(calls), self._ticks, self._missed, self._frames, dropped, recent)

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify()

    # the engine's thread ----------------------------------------------------------------------------------------

    def _run(self, batch: _Batch) -> None:
        rows: list[Call | None] = [None] * self.slots  # whose conversation the batch holds in each row
        last = time.monotonic()
        while True:
            with self._condition:
                while not self._stopping and not self._turnover(rows) and not self._time_to_tick(rows, last):
                    self._condition.wait(self._wait(rows, last))
                stopping = self._stopping
                calls = list(self._calls)
            if stopping:
                for call in filter(None, calls):
                    call.end("engine stopped")
            self._admit_and_release(batch, rows, calls)
            if stopping:
                return
            now = time.monotonic()
            due = {row: call for row, call in enumerate(rows) if call is not None and call.due(now, self.period)}
            if due and self._time_to_tick(rows, last):
                last = now
                self._tick(batch, due, now)

    def _abandon(self, reason: str) -> None:
        """The thread ends and no other takes its place: nobody may wait for it in vain."""
        with self._condition:
            self.ready = False
            calls, self._calls = self._calls, [None] * self.slots
        for call in filter(None, calls):
            call.end(reason)
            _guarded(call, call.finish)

    def _turnover(self, rows: list[Call | None]) -> bool:
        """Whether somebody came or goes."""
        return any(call is not rows[row] or (call is not None and call.closing) for row, call in enumerate(self._calls))

    def _time_to_tick(self, rows: list[Call | None], last: float) -> bool:
        now = time.monotonic()
        waiting = [(call, call.due(now, self.period)) for call in rows if call is not None]
        most = max((frames for _, frames in waiting), default=0)
        if most == 0:
            return False
        if most > 1 or now - last >= self.period:
            return True
        return all(frames or now - call.last_step > TALKING_PERIODS * self.period for call, frames in waiting)

    def _wait(self, rows: list[Call | None], last: float) -> float | None:
        """Seconds until something can be due without anybody waking us; None if nothing can."""
        pending = [call for call in rows if call is not None and (call.queued or call.settings.on_gap == "silence")]
        if not pending:
            return None
        return max(0.001, min(self.period, last + self.period - time.monotonic()))

    def _admit_and_release(self, batch: _Batch, rows: list[Call | None], calls: list[Call | None]) -> None:
        for row, call in enumerate(calls):
            if call is not None and call is not rows[row] and not call.closing:
                batch.begin(row, call.settings)
                rows[row] = call
            if call is not None and call.closing:
                rows[row] = None
                batch.images_put(row, None)
                with self._condition:
                    self._calls[row] = None
                    self._dropped_before += call.dropped
                _guarded(call, call.finish)
        for row, call in enumerate(rows):
            if call is not None:
                changed, image = call.take_image()
                if changed:
                    try:
                        batch.images_put(row, image)
                    except Exception as error:  # of another model, or without memory for it: its own call's misfortune
                        _log.exception("call %d: its picture cannot be shown", call.id)
                        call.end(f"error: {type(error).__name__}: {error}")

    def _tick(self, batch: _Batch, due: dict[int, Call], now: float) -> None:
        frames = {row: call.take(now) for row, call in due.items()}
        try:
            said, tick = batch.step(frames)
        except Exception as error:  # whatever it is, the server must live on: all that were in the batch end
            _log.exception("a tick failed")
            for call in due.values():
                call.end(f"error: {type(error).__name__}: {error}")
            return
        with self._condition:
            self._recent.append(tick)
            self._ticks += 1
            self._frames += len(due)
            self._missed += tick.seconds > self.period
        for row, call in due.items():
            audio, token, gate = said[row]
            _guarded(call, functools.partial(call.say, audio, token, gate))
        if self.on_tick is not None:
            self.on_tick(tick)


def _guarded(call: Call, deliver: Callable[[], None]) -> None:
    """What a listener does wrong ends its own call, and nothing else."""
    try:
        deliver()
    except Exception:
        _log.exception("call %d: its listener failed", call.id)
        call.end("error: the listener failed")


class _Batch:
    """The state of all rows and the tensors that a tick writes to. Used by the engine's thread only."""

    def __init__(self, assistant: Assistant, rows: int):
        config, device = assistant.config, assistant.device
        self.duplex = assistant.duplex
        self.state = self.duplex.new_state(rows)
        self.state.read_whole_rings()
        self.wave = torch.zeros(rows, 1, assistant.frame_size, device=device)
        self.active = torch.zeros(rows, dtype=torch.bool, device=device)
        self.sampling = RowSampling(rows, config.speech_lm.text_padding, device)
        self.images = self._image_rows(assistant, rows)
        self.first_look = (config.adapters.start or 0) if config.adapters is not None else 0  # step

    @staticmethod
    def _image_rows(assistant: Assistant, rows: int) -> ImageRows | None:
        if assistant.model.adapters is None or assistant.model.vision is None:
            return None
        from PIL import Image

        vision = assistant.config.vision
        size = vision.longest_edge or vision.image_size
        like = assistant.look(Image.new("RGB", (size, size)))
        tokens = like.keys[0].shape[2] if vision.encoder == "pixtral" else None  # a square has the most
        return ImageRows(rows, like, tokens)

    def warm_up(self) -> None:
        for row in range(len(self.active)):
            self.begin(row, CallSettings(text_temperature=1, text_top_k=0, audio_temperature=1, audio_top_k=0))
        for _ in range(WARM_UP_TICKS):
            self.step(dict.fromkeys(range(len(self.active))))

    def begin(self, row: int, settings: CallSettings) -> None:
        """Reset a row for a new conversation."""
        rows = torch.zeros_like(self.active)
        rows[row] = True
        self.state.reset(rows)
        self.sampling.put(row, settings)
        self.images_put(row, None)
        adapters = self.state.generator.adapters
        if adapters is not None:
            if adapters.start is None:
                adapters.start = torch.zeros_like(adapters.seen)
            adapters.start[row] = self.first_look + settings.gate_delay

    def images_put(self, row: int, image: ImageKV | None) -> None:
        if self.images is not None:
            self.images.put(row, image)

    @torch.inference_mode()
    def step(self, frames: dict[int, Audio | None]) -> tuple[dict[int, tuple[Audio, int | None, float]], Tick]:
        """Step the rows in `frames`; None is silence. Returns sound, token and gate of each."""
        begun = time.perf_counter()
        wave = np.zeros(tuple(self.wave.shape), np.float32)
        for row, samples in frames.items():
            if samples is not None:
                wave[row, 0] = samples
        self.wave.copy_(torch.from_numpy(wave))
        self.active.copy_(torch.tensor([row in frames for row in range(len(self.active))]))
        codes = self.duplex.hear(self.state, self.wave, self.active)
        encoded = self._clock()
        image = None if self.images is None else self.images.kv
        frame = self.duplex.generator.step(self.state.generator, codes, image, self.sampling, self.active)
        self.sampling.advance(self.active)
        thought = self._clock()
        audio = self.duplex.speak(self.state, frame)[:, 0].cpu().numpy()
        tokens, valid, gates = frame.tokens[:, 0].tolist(), frame.valid.tolist(), frame.gate.tolist()
        ended = time.perf_counter()
        said = {row: (audio[row].copy(), tokens[row] if valid[row] else None, gates[row]) for row in frames}
        return said, Tick(len(frames), ended - begun, encoded - begun, thought - encoded, ended - thought)

    def _clock(self) -> float:
        if self.wave.is_cuda:
            torch.cuda.synchronize(self.wave.device)
        elif self.wave.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()
