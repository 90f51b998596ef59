// Streaming sample rate conversion by a windowed sinc that can be read at a slightly changed speed.

const ZERO_CROSSINGS = 12;
const STEPS = 256; // table entries between two input samples

/**
 * @param {number} reach input samples to either side
 * @param {number} stretch how much lower than the input's rate the cut-off lies
 */
function kernel(reach, stretch) {
  const table = new Float32Array(reach * STEPS + 2);
  for (let i = 0; i <= reach * STEPS; i++) {
    const x = i / STEPS;
    const phase = (Math.PI * x) / stretch;
    const sinc = x === 0 ? 1 : Math.sin(phase) / phase;
    table[i] = (sinc / stretch) * Math.cos((Math.PI / 2) * (x / reach)) ** 2;
  }
  return table;
}

export class Resampler {
  /** @param {number} from samples a second that go in @param {number} to samples a second that come out */
  constructor(from, to) {
    this.step = from / to;
    const stretch = Math.max(1, this.step) * 1.08; // the window's slope stays below half of the lower rate
    this.reach = Math.ceil(ZERO_CROSSINGS * stretch);
    this.table = kernel(this.reach, stretch);
    this.buffer = new Float32Array(from);
    this.clear();
  }

  clear() {
    this.buffer.fill(0, 0, this.reach);
    this.end = this.reach;
    this.position = this.reach;
  }

  /** Input samples not yet heard. */
  get waiting() {
    return Math.max(0, this.end - this.position);
  }

  /** @param {Float32Array} samples */
  push(samples) {
    const first = Math.max(0, Math.floor(this.position) - this.reach);
    if (this.end + samples.length > this.buffer.length) {
      const kept = this.buffer.subarray(first, this.end);
      const room = Math.max(this.buffer.length, 2 * (kept.length + samples.length));
      const buffer = room === this.buffer.length ? this.buffer : new Float32Array(room);
      buffer.set(kept);
      this.buffer = buffer;
      this.position -= first;
      this.end -= first;
    }
    this.buffer.set(samples, this.end);
    this.end += samples.length;
  }

  /** Leave out input samples. @param {number} samples */
  skip(samples) {
    this.position = Math.min(this.position + samples, this.end);
  }

  /**
   * Fill `out` as far as the input goes.
   * @param {Float32Array} out
   * @param {number} speed 1.01 plays one per cent faster
   * @returns {number} samples written
   */
  pull(out, speed = 1) {
    const { buffer, table, reach } = this;
    const step = this.step * speed;
    let written = 0;
    while (written < out.length && this.position + reach < this.end) {
      const last = Math.floor(this.position + reach);
      let sum = 0;
      for (let i = Math.ceil(this.position - reach); i <= last; i++) {
        const place = Math.abs(i - this.position) * STEPS;
        const entry = Math.floor(place);
        sum += buffer[i] * (table[entry] + (table[entry + 1] - table[entry]) * (place - entry));
      }
      out[written++] = sum;
      this.position += step;
    }
    return written;
  }
}
