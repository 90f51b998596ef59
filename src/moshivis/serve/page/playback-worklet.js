// Plays what arrives, behind a buffer that adapts. It begins to play with 160 ms in hand. The least it held during the
// last ten seconds says how much of that was needed: while there was more than enough it plays a little faster, pauses
// much faster, and slower while it was close to running dry. After an underrun it waits for more than before.

import { Resampler } from './resample.js';

const START = 160; // ms, and 40 ms more after each underrun
const START_MAX = 480;
const START_MIN = 120;
const SPARE = 60; // ms in hand at the worst moment: more than that is given back
const SCARCE = 15;
const QUIET = 0.003; // peak of a pause
const FAR_TOO_LATE = 600; // ms above the start level: the oldest is dropped
const WINDOWS = 10; // of a second
const REPORT = 0.2; // s

class Playback extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = null;
    this.start = START;
    this.counters = { played: 0, missed: 0, underruns: 0 };
    this.reset();
    this.reported = 0;
    this.port.onmessage = ({ data }) => this.receive(data);
  }

  reset() {
    this.resampler?.clear();
    this.filling = true;
    this.begun = false;
    this.finished = false; // silence is no longer missed audio
    this.forget();
  }

  forget() {
    this.lowest = new Array(WINDOWS).fill(Infinity);
    this.windowEnd = currentTime + 1;
    this.steady = 0; // s since the last underrun
  }

  receive({ samples, rate, reset, finish }) {
    if (reset) this.reset();
    if (finish) this.finished = true;
    if (!samples) return;
    if (this.rate !== rate) {
      this.rate = rate;
      this.resampler = new Resampler(rate, sampleRate);
      this.reset();
    }
    this.resampler.push(samples);
    const late = this.level() - this.start;
    if (late > FAR_TOO_LATE) {
      this.resampler.skip((late * rate) / 1000);
      this.counters.missed += late;
      this.forget();
    }
  }

  /** ms in hand */
  level() {
    return this.resampler ? (this.resampler.waiting / this.rate) * 1000 : 0;
  }

  process(inputs, outputs) {
    const out = outputs[0][0];
    const quantum = (out.length / sampleRate) * 1000;
    const level = this.level();
    if (this.filling && level >= this.start) {
      this.filling = false;
      this.fadeIn = true;
    }
    if (this.filling) {
      if (this.begun && !this.finished) this.counters.missed += quantum;
    } else {
      this.play(out, level, quantum);
    }
    if (currentTime >= this.reported + REPORT) this.report(level);
    return true;
  }

  play(out, level, quantum) {
    const dry = level < 2 * quantum + (this.resampler.reach / this.rate) * 1000;
    const written = this.resampler.pull(out, this.speed());
    this.counters.played += quantum;
    if (this.fadeIn || dry) {
      for (let i = 0; i < written; i++) out[i] *= dry ? 1 - i / written : i / written;
      this.fadeIn = false;
    }
    this.quiet = out.every((value) => Math.abs(value) < QUIET);
    if (dry) this.runDry();
    else this.watch(level, quantum);
  }

  runDry() {
    this.filling = true;
    if (this.finished) return;
    this.counters.underruns += 1;
    this.start = Math.min(this.start + 40, START_MAX);
    this.forget();
  }

  watch(level, quantum) {
    this.begun = true;
    this.lowest[0] = Math.min(this.lowest[0], level);
    this.steady += quantum / 1000;
    if (currentTime < this.windowEnd) return;
    this.windowEnd = currentTime + 1;
    this.lowest.pop();
    this.lowest.unshift(Infinity);
    if (this.steady > 10) this.start = Math.max(this.start - 2, START_MIN);
  }

  speed() {
    if (this.steady < 2) return 1;
    const least = Math.min(...this.lowest);
    if (least < SCARCE) return 0.994;
    if (least < SPARE) return 1;
    if (this.quiet) return 1.25;
    return least > 3 * SPARE ? 1.01 : 1.005;
  }

  report(level) {
    this.reported = currentTime;
    this.port.postMessage({ ...this.counters, level, start: this.start });
  }
}

registerProcessor('playback', Playback);
