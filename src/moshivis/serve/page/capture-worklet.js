// Hands on what flows through it as 24 kHz mono in blocks of 20 ms. One listens to the microphone, another one to what
// is played; both count the same clock, so that recordings and reaction times line up.

import { Resampler } from './resample.js';

const RATE = 24000;
const BLOCK = 480;

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate, RATE);
    this.silence = new Float32Array(128);
    this.block = new Float32Array(BLOCK);
    this.filled = 0;
    this.at = Math.round((currentFrame / sampleRate) * RATE);
  }

  process(inputs) {
    this.resampler.push(inputs[0][0] ?? this.silence);
    for (;;) {
      this.filled += this.resampler.pull(this.block.subarray(this.filled));
      if (this.filled < BLOCK) return true;
      this.port.postMessage({ samples: this.block, at: this.at }, [this.block.buffer]);
      this.block = new Float32Array(BLOCK);
      this.filled = 0;
      this.at += BLOCK;
    }
  }
}

registerProcessor('capture', Capture);
